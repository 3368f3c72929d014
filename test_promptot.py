"""Tests: offline, on small models and tiny data; they show what may be relied on.

    python -m pytest -q
"""

import ast
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections import defaultdict
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import clip_model
import data
import promptot
import report
import runs
import weights
from clip_model import CLIP, load, pack, tokenize
from promptot import (
    PromptLearner, PromptOT, Recipe, learning_rate, main, ot_loss, sinkhorn, transport_cost, unit,
)
from weights import read_tensors, read_weights

pytestmark = [  # what is deprecated today may be gone tomorrow; torch.jit only tests a reader
    pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore:.*torch.jit"),
]
torch.set_num_threads(1)  # for models this small, threads only wait for each other
HERE = Path(__file__).parent
DEMO = HERE / "demo"
MODEL = ("--model", DEMO / "tiny-clip.pt")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_clip(seed: int = 0, **options) -> CLIP:
    """Random CLIP with 2 heads in the image tower, 1 in the text tower, and depths that differ."""
    clip = CLIP(
        embed_dim=16, image_resolution=32, patch_size=8, vision_width=128, vision_layers=3,
        text_width=64, text_layers=4, **options,
    )
    generator = seeded(seed)
    for p in clip.parameters():  # matrices by their width, so that signals keep their size
        scale = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1
        p.data = scale * torch.randn(p.shape, generator=generator)
    for name, p in clip.named_parameters():
        p.data += "ln_" in name and name.endswith("weight")  # norms near 1
    clip.logit_scale.data.fill_(2.5)
    return clip.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return small_clip()


@pytest.fixture(scope="module")
def demo_clip() -> CLIP:
    return load(DEMO / "tiny-clip.pt")


# ---- Sinkhorn ------------------------------------------------------------------------------------


def exact_transport(cost):
    """The cheapest permutation, by trying all: optimal for equal uniform marginals (Birkhoff)."""
    n = len(cost)
    return min(sum(cost[i, p[i]] for i in range(n)) / n for p in itertools.permutations(range(n)))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_sinkhorn_finds_the_cheapest_permutation(n):
    for seed in range(10):
        cost = torch.rand(n, n, generator=seeded(seed))
        plan = sinkhorn(cost, epsilon=1e-4, max_iter=5000)
        torch.testing.assert_close((plan * cost).sum(), exact_transport(cost), rtol=1e-3, atol=1e-4)


def test_sinkhorn_finds_a_planted_permutation():
    order = torch.randperm(50, generator=seeded())
    cost = 0.3 + torch.rand(50, 50, generator=seeded(1))
    cost[torch.arange(50), order] = 0.2
    expected = F.one_hot(order, 50) / 50
    torch.testing.assert_close(sinkhorn(cost, epsilon=0.005), expected, atol=1e-5, rtol=0)


def test_sinkhorn_two_by_two_closed_form():
    """Cost d off the diagonal: the plan is [[x, y], [y, x]] with y / x = exp(-d / epsilon)."""
    for d, epsilon in [(1.0, 0.5), (0.3, 0.1), (-2.0, 1.0)]:
        ratio = math.exp(-d / epsilon)
        x = 0.5 / (1 + ratio)
        plan = sinkhorn(torch.tensor([[0.0, d], [d, 0.0]]), epsilon=epsilon)
        torch.testing.assert_close(plan, torch.tensor([[x, x * ratio], [x * ratio, x]]))


@pytest.mark.parametrize("n, m", [(4, 4), (1, 5), (7, 3), (30, 70)])
@pytest.mark.parametrize("epsilon", [10.0, 0.1, 0.01, 1e-3])
def test_sinkhorn_marginals_and_optimality(n, m, epsilon):
    """Right sums; and pi_ij = u_i v_j exp(-C_ij / epsilon), which only the optimal plan has."""
    cost = torch.rand(n, m, generator=seeded(n * m), dtype=torch.float64)
    a, b = (torch.rand(k, generator=seeded(k), dtype=torch.float64).softmax(0) for k in (n, m))
    plan = sinkhorn(cost, a, b, epsilon=epsilon)
    torch.testing.assert_close(plan.sum(0), b)
    assert (plan.sum(1) - a).abs().sum() <= 1e-4
    log = plan.log() + cost / epsilon  # = f_i + g_j, which has no interaction
    if log.isfinite().all():
        interaction = log - log.mean(0) - log.mean(1, keepdim=True) + log.mean()
        assert interaction.abs().max() < 1e-6


def test_sinkhorn_zero_mass_stays_where_it_is():
    a, b = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.25, 0.0, 0.0, 0.75])
    cost = torch.rand(3, 4, generator=seeded())
    for epsilon in (1, 0.1, 1e-2, 1e-3, 1e-4):
        plan = sinkhorn(cost, a, b, epsilon)
        assert plan[0].sum() == 0 and plan[:, 1:3].sum() == 0
        rest = sinkhorn(cost[1:, [0, 3]], a[1:], b[[0, 3]], epsilon)
        torch.testing.assert_close(plan[1:, [0, 3]], rest, atol=2e-4, rtol=0)


def test_sinkhorn_symmetry_and_batching():
    cost = torch.rand(2, 3, 5, 6, generator=seeded())

    def solve(*problem):
        return sinkhorn(*problem, epsilon=0.05, tol=1e-7)

    plans = solve(cost)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(plans[i, j], solve(cost[i, j]), atol=1e-6, rtol=0)
        torch.testing.assert_close(plans[i, j].T, solve(cost[i, j].T), atol=1e-6, rtol=0)
    shifted = cost + torch.rand(2, 3, 5, 1) + torch.rand(2, 3, 1, 6)  # changes no plan
    torch.testing.assert_close(solve(shifted), plans, atol=1e-6, rtol=0)

    a = torch.rand(2, 1, 5, generator=seeded())  # leading dimensions broadcast; b: uniform
    plans = solve(cost[0], a)
    assert plans.shape == (2, 3, 5, 6)
    torch.testing.assert_close(plans[1, 2], solve(cost[0, 2], a[1, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("epsilon", [1e-45, 1e-20, 1e-3, 1.0, 1e20, 1e300])
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1.0, 1e6, 3e38])
def test_sinkhorn_is_finite_for_any_finite_cost(scale, epsilon):
    cost = scale * (2 * torch.rand(4, 6, generator=seeded()) - 1)
    plan = sinkhorn(cost, epsilon=epsilon)
    assert plan.isfinite().all() and (plan >= 0).all()
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 1 / 6))
    torch.testing.assert_close(plan.sum(1), torch.full((4,), 1 / 4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("max_iter", [0, 10, 30])
def test_sinkhorn_that_is_stopped_early_has_exact_column_sums(max_iter):
    for seed, epsilon in itertools.product(range(5), (1e-5, 1e-3, 1e-2)):
        cost = torch.rand(5, 7, generator=seeded(seed))
        plan = sinkhorn(cost, epsilon=epsilon, max_iter=max_iter)
        torch.testing.assert_close(plan.sum(0), torch.full((7,), 1 / 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinkhorn_of_half_precision_is_fp32(dtype):
    cost = torch.rand(8, 8, generator=seeded()).to(dtype)
    plan = sinkhorn(cost)
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan, sinkhorn(cost.float()))
    with torch.autocast("cpu", dtype):
        torch.testing.assert_close(plan, sinkhorn(cost), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [
    dict(epsilon=0.0), dict(epsilon=-1.0), dict(epsilon=math.nan), dict(a=torch.ones(3)),
    dict(a=torch.tensor([1.5, -0.5])), dict(a=torch.ones(2), b=torch.ones(3)),
    dict(a=torch.zeros(2)),
    dict(a=torch.tensor([1.0, math.inf])), dict(b=torch.tensor([1.0, math.nan, 1.0])),
])
def test_sinkhorn_rejects_what_is_no_problem(bad):
    with pytest.raises(ValueError):
        sinkhorn(torch.rand(2, 3), **bad)


# ---- The OT loss ---------------------------------------------------------------------------------


def features(n: int, dim: int = 8) -> list[torch.Tensor]:
    generator = seeded()
    return [unit(torch.randn(n, dim, generator=generator)) for _ in range(4)]


def test_cost_is_half_the_squared_distance_of_joint_features():
    image, text, image0, text0 = features(6)
    loss, plan = ot_loss(image, text, image0, text0, epsilon=0.05)
    cost = torch.cdist(torch.cat([image, text], 1), torch.cat([image0, text0], 1)).square() / 2
    torch.testing.assert_close(plan, sinkhorn(cost, epsilon=0.05), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, (plan * cost).sum())


def test_gradient_of_the_ot_loss_is_the_plans():
    """d L / d f_i = -sum_j pi_ij f0_j, as if the plan did not depend on the features."""
    image, text, image0, text0 = features(6)
    image.requires_grad_(), text.requires_grad_()
    loss, plan = ot_loss(image, text, image0, text0, epsilon=0.05)
    loss.backward()
    assert not plan.requires_grad
    torch.testing.assert_close(image.grad, -plan @ image0)
    torch.testing.assert_close(text.grad, -plan @ text0)


def test_envelope_theorem():
    """Where entropy is part of the objective, the gradient is exact: see finite differences."""
    cost = torch.rand(4, 4, generator=seeded(), dtype=torch.float64)

    def objective(cost):
        plan = sinkhorn(cost, epsilon=0.1, tol=1e-12)
        return (plan * cost).sum() + 0.1 * (plan * (plan.log() - 1)).sum()

    plan = sinkhorn(cost, epsilon=0.1, tol=1e-12)
    for i, j in [(0, 0), (1, 2), (3, 1)]:
        step = torch.zeros_like(cost)
        step[i, j] = 1e-4
        difference = (objective(cost + step) - objective(cost - step)) / 2e-4
        torch.testing.assert_close(difference, plan[i, j], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("n", [2, 4, 7])
def test_ot_loss_is_within_one_per_cent_of_exact_transport(n):
    """On features like CLIP's: all images are alike, and tuning has moved them, much and little."""
    for seed, moved in itertools.product(range(5), (0.1, 1, 3)):
        generator = seeded(seed)
        image0 = unit(torch.randn(n, 64, generator=generator) + 1)
        image = unit(image0 + moved * torch.randn(n, 64, generator=generator) / 8)
        loss, _ = ot_loss(image, image, image0, image0)
        exact = exact_transport(transport_cost(image, image, image0, image0))
        torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)


def test_pointwise_and_modalities():
    image, text, image0, text0 = features(5)
    image_cost, text_cost = 1 - image @ image0.T, 1 - text @ text0.T
    loss, plan = ot_loss(image, text, image0, text0, pointwise=True)
    torch.testing.assert_close(plan, torch.eye(5) / 5)
    torch.testing.assert_close(loss, (image_cost + text_cost).diagonal().mean())
    alone = {}
    for modality, cost in (("image", image_cost), ("text", text_cost)):
        alone[modality], plan = ot_loss(image, text, image0, text0, modality=modality)
        torch.testing.assert_close(plan, sinkhorn(cost))
    separate, plans = ot_loss(image, text, image0, text0, modality="separate")
    torch.testing.assert_close(separate, alone["image"] + alone["text"], atol=1e-4, rtol=0)
    assert plans.shape == (2, 5, 5)
    assert ot_loss(image, text, image0, text0)[0] >= separate - 1e-4  # one plan for both costs more


# ---- Tokenizer. The ids were made with an independent implementation (open_clip's). -------------

KNOWN_IDS = {
    "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
    "": [],
    "  Hello\t WORLD!\n": [3306, 1002, 256],
    "it's we'll o'clock": [585, 568, 649, 1342, 334, 262, 6716],
    "&amp;lt;b&amp;gt; &eacute;": [283, 321, 285, 4166],
    "naïve café ☕ 日本語": [1097, 35689, 563, 15304, 26561, 39121, 44353, 34002, 508],
    "1234 ½ x²": [272, 273, 274, 275, 33613, 343, 41175],
    "<|endoftext|>": [27, 347, 40786, 4160, 91, 285],
    "\ufb01ne \ufb02ow": [3797, 5608],
    "Ünï\u0301cøde": [6522, 77, 157, 116, 107, 66, 17483, 654],
    "don’t “quote”": [847, 713, 257, 4020, 257],
    "🙂👍🏽": [32006, 43722],
    "antidisestablishmentarianism": [3120, 4262, 7726, 12658, 1585, 44351],
    "schÃ¶n": [844, 7255, 333],
    "a\x00b\x1cc": [5334],
}


def test_tokenizer_knows_awkward_strings():
    tokens = tokenize(list(KNOWN_IDS))
    assert tokens.shape == (len(KNOWN_IDS), 77) and tokens.dtype == torch.long
    for row, ids in zip(tokens.tolist(), KNOWN_IDS.values()):
        assert row == [49406, *ids, 49407] + [0] * (75 - len(ids))


def test_tokenizer_length_limit():
    with pytest.raises(ValueError, match="103 tokens, the limit is 77"):
        tokenize("cat " * 101)
    tokens = tokenize("cat " * 101, truncate=True)
    assert tokens[0, 0] == 49406 and tokens[0, -1] == 49407 and (tokens[0, 1:-1] == 2368).all()
    assert tokenize(["a cat"], context_length=4).tolist() == [[49406, 320, 2368, 49407]]


# ---- CLIP with prompts, against a slow and obvious second implementation -------------------------


def slow_block(block, x, causal):
    """One token row (L, W) at a time, one head at a time, softmax written out."""
    y = F.layer_norm(x, x.shape[-1:], block.ln_1.weight, block.ln_1.bias)
    q, k, v = (y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, dim=-1)
    heads = []
    for h in range(x.shape[-1] // 64):
        part = slice(64 * h, 64 * h + 64)
        scores = q[:, part] @ k[:, part].T / 8
        if causal:
            scores = scores + torch.full_like(scores, -math.inf).triu(1)
        heads.append(scores.softmax(-1) @ v[:, part])
    x = x + torch.cat(heads, -1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    y = F.layer_norm(x, x.shape[-1:], block.ln_2.weight, block.ln_2.bias)
    y = y @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias
    y = y * torch.sigmoid(1.702 * y)
    return x + y @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias


def slow_encode_image(clip, image, prompts):
    v, n = clip.visual, prompts.shape[1]
    patches = F.conv2d(image[None], v.conv1.weight, stride=v.conv1.stride)[0].flatten(1).T
    x = torch.cat([v.class_embedding[None], patches]) + v.positional_embedding
    x = torch.cat([x, prompts[0]])
    x = F.layer_norm(x, x.shape[-1:], v.ln_pre.weight, v.ln_pre.bias)
    for layer, block in enumerate(v.transformer.resblocks):
        if 1 <= layer < len(prompts):
            x = torch.cat([x[:-n], prompts[layer]])
        x = slow_block(block, x, causal=False)
    x = F.layer_norm(x[0], x.shape[-1:], v.ln_post.weight, v.ln_post.bias)
    return x @ v.proj


def slow_encode_text(clip, tokens, prompts):
    n = prompts.shape[1]
    x = clip.token_embedding.weight[tokens]
    x = torch.cat([x[:1], prompts[0], x[1 + n :]]) + clip.positional_embedding
    for layer, block in enumerate(clip.transformer.resblocks):
        if 1 <= layer < len(prompts):
            x = torch.cat([x[:1], prompts[layer], x[1 + n :]])
        x = slow_block(block, x, causal=True)
    x = F.layer_norm(x, x.shape[-1:], clip.ln_final.weight, clip.ln_final.bias)
    return x[tokens.tolist().index(49407)] @ clip.text_projection


TEXTS = ["a photo of a cat.", "a photo of a very long-haired dachshund.", "a photo of a ox"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_deep_prompts_enter_where_the_design_says(clip, depth):
    generator = torch.Generator().manual_seed(depth)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    vision = torch.randn(depth, 4, 128, generator=generator, requires_grad=True)
    text = torch.randn(depth, 4, 64, generator=generator, requires_grad=True)
    tokens = tokenize(TEXTS)

    fast = clip.encode_image(images, vision), clip.encode_text(tokens, text)
    slow = (
        torch.stack([slow_encode_image(clip, image, vision) for image in images]),
        torch.stack([slow_encode_text(clip, row, text) for row in tokens]),
    )
    for x, y, prompts in zip(fast, slow, (vision, text)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        gradients = [torch.autograd.grad(z.sin().sum(), prompts)[0] for z in (x, y)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_no_prompts_are_plain_clip(clip):
    images, tokens = torch.randn(2, 3, 32, 32), tokenize(TEXTS)
    no_depth = clip.encode_image(images, torch.zeros(0, 4, 128))
    assert torch.equal(clip.encode_image(images), no_depth)
    assert torch.equal(clip.encode_text(tokens), clip.encode_text(tokens, torch.zeros(0, 4, 64)))
    slow = slow_encode_image(clip, images[0], torch.zeros(1, 0, 128))
    torch.testing.assert_close(no_depth[0], slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("texts", [
    TEXTS, TEXTS[:1], TEXTS[:1] * 3, ["one two three four five", *TEXTS, *TEXTS],
    [f"a photo of a {'very ' * (i % 30)}old thing." for i in range(70)],
])
def test_a_text_does_not_depend_on_its_company(clip, texts):
    """Leaving out what comes after the end, and sharing rows, are exact."""
    prompts = torch.randn(3, 4, 64, generator=seeded())
    for learned, slow_prompts in ((prompts, prompts), (None, torch.zeros(1, 0, 64))):
        together = clip.encode_text(tokenize(texts), learned)
        for row, text in zip(together, texts):
            alone = slow_encode_text(clip, tokenize(text)[0], slow_prompts)
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_texts_are_packed_in_rows():
    """9 is the end; what comes after it does not count. Two places are shared: SOT and a prompt."""
    tokens = torch.tensor([[1, 5, 2, 9, 0], [1, 6, 9, 0, 0], [1, 7, 3, 4, 9]])
    texts = pack(tokens, n_prompts=1, length=6)
    assert texts.tokens.tolist() == [[1, 5, 2, 9, 9], [1, 7, 3, 4, 9]]
    assert texts.positions.tolist() == [[0, 1, 2, 3, 2], [0, 1, 2, 3, 4]]
    assert texts.tokens.flatten()[texts.ends].tolist() == [9, 9, 9]
    assert texts.ends.tolist() == [3, 4, 9]
    sees = [[j for j in range(5) if texts.mask[0, 0, i, j]] for i in range(5)]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4]]  # the last: its own text only
    with pytest.raises(ValueError, match="too short"):
        pack(tokens, n_prompts=2)
    tokens[-1, 0] = 8
    with pytest.raises(ValueError, match="begin with the same token"):
        pack(tokens)


def test_gelu_and_other_heads_are_other_models():
    """The activation and the width of heads, which no tensor tells, against the formulas."""
    x = torch.linspace(-3, 3, 7)
    quick, exact = (small_clip(activation=a).transformer.resblocks[0].mlp.gelu(x)
                    for a in ("quickgelu", "gelu"))
    torch.testing.assert_close(quick, x * torch.sigmoid(1.702 * x))
    torch.testing.assert_close(exact, x * (1 + torch.erf(x / 2**0.5)) / 2)
    options = (dict(), dict(activation="gelu"), dict(head_width=32), dict(mean=(0.5,) * 3))
    assert len({clip_model.fingerprint(small_clip(**o)) for o in options}) == len(options)


# ---- Reading weights: what files hold ------------------------------------------------------------


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path, **header_changes) -> None:
    """8 bytes with the header's length, the header (JSON), the numbers."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for key, t in tensors.items():
        start, body = len(body), body + bytes(t.contiguous().flatten().view(torch.uint8).tolist())
        offsets = [start, len(body)]
        header[key] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
    text = json.dumps(header | header_changes).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def as_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """OpenAI's keys -> those of transformers' CLIPModel."""
    result = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    for key, tensor in state.items():
        tower = "vision_model." if key.startswith("visual.") else "text_model."
        for ours, theirs in (
            ("visual.proj", "visual_projection.weight"), ("attn.", "self_attn."), ("c_fc", "fc1"),
            ("text_projection", "text_projection.weight"), ("visual.", ""), ("c_proj", "fc2"),
            ("positional_embedding", "embeddings.position_embedding.weight"),
            ("class_embedding", "embeddings.class_embedding"), ("ln_pre", "pre_layrnorm"),
            ("token_embedding", "embeddings.token_embedding"), ("ln_post", "post_layernorm"),
            ("conv1", "embeddings.patch_embedding"), ("ln_final", "final_layer_norm"),
            ("transformer.resblocks", "encoder.layers"), ("ln_", "layer_norm"),
        ):
            key = key.replace(ours, theirs)
        if "projection" in key or "logit" in key:
            result[key] = tensor.T if tensor.ndim else tensor
        elif "in_proj_" in key:
            for part, third in zip("qkv", tensor.chunk(3)):
                result[tower + key.replace("in_proj_", f"{part}_proj.")] = third.clone()
        else:
            result[tower + key] = tensor
    return result


LAYOUTS = {
    "OpenAI's": lambda state: state | {"input_resolution": torch.tensor(32)},
    "open_clip's": lambda state: {
        k if k.startswith(("visual", "logit")) else f"text.{k}": v if v.ndim else v[None]
        for k, v in state.items()
    },
    "training checkpoint": lambda state: {
        "state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": (3, 1.5),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"foreach": None}]},
    },
    "transformers'": as_transformers,
}


@pytest.fixture(scope="module")
def state(clip) -> dict[str, torch.Tensor]:
    small = {k: v.half() for k, v in clip.state_dict().items()}
    return small | {"token_embedding.weight": small["token_embedding.weight"][:50].clone()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_openais_keys(state, tmp_path, layout, dtype):
    expected = {k: v.to(dtype) for k, v in state.items()}
    tensors = LAYOUTS[layout](expected)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_same(read_weights(tmp_path).state, expected)
    assert bool(read_weights(tmp_path).notes) == (layout != "OpenAI's")
    if layout != "training checkpoint":  # safetensors holds nothing but tensors
        save_safetensors(tensors, tmp_path / "model.safetensors")
        assert_same(read_weights(tmp_path / "model.safetensors").state, expected)


def test_torchscript_archives_are_read_without_torch_jit(tmp_path, monkeypatch):
    class Layer(torch.nn.Linear):
        def __init__(self):
            super().__init__(5, 6)
            self.transposed = torch.nn.Parameter(torch.randn(6, 5).half().T)  # not contiguous
            self.numbers = [1, 2]

    module = torch.nn.Sequential(Layer(), torch.nn.Sequential(Layer()))
    torch.jit.script(module).save(str(tmp_path / "model.pt"))
    monkeypatch.setattr(torch.jit, "load", None)
    layers = read_tensors(tmp_path / "model.pt")
    for name, expected in module.state_dict().items():
        found = functools.reduce(lambda layer, attribute: layer[attribute], name.split("."), layers)
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_activation_heads_and_colours_come_from_the_config_beside(state, tmp_path):
    def write(name, **config):
        (tmp_path / name).write_text(json.dumps(config))

    torch.save(as_transformers(state), tmp_path / "pytorch_model.bin")
    gelu = {"hidden_act": "gelu", "hidden_size": 128, "num_attention_heads": 4}
    write("config.json", text_config=gelu, vision_config=gelu)
    write("preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    assert read_weights(tmp_path)[1:] == ("gelu", 32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), ())
    with pytest.raises(ValueError, match="relu"):
        read_weights(tmp_path, "relu")
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    write("open_clip_config.json", model_cfg={"quick_gelu": True, "vision_cfg": {"head_width": 32}},
          preprocess_cfg={"mean": [0.5] * 3, "std": [0.2] * 3})
    assert read_weights(tmp_path)[1:] == ("quickgelu", 32, (0.5,) * 3, (0.2,) * 3, ())
    for config, activation, other in [("{}", "gelu", "quickgelu"), (None, "quickgelu", "gelu")]:
        (tmp_path / "open_clip_config.json").unlink()
        if config:
            (tmp_path / "open_clip_config.json").write_text(config)
        guessed = read_weights(tmp_path)
        assert guessed.activation == activation and f"--activation {other}" in guessed.notes[0]
        assert read_weights(tmp_path, other)[1:] == (other, 64, weights.MEAN, weights.STD, ())


def assert_refused(read, path: Path, complaint: str = "") -> None:
    """In one line that names the file."""
    with pytest.raises(ValueError) as error:
        read(path)
    message = str(error.value)
    assert path.name in message and complaint in message and "\n" not in message, message


@pytest.mark.parametrize("config, complaint", [
    ({"model_type": "siglip"}, "siglip"), ({"text_config": {"layer_norm_eps": 1e-6}}, "eps 1e-06"),
    ({"vision_config": {"hidden_act": "relu"}}, "relu"), ({"vision_config": [1]}, "list"),
    ({"vision_config": {"hidden_act": "gelu"}}, "quick_gelu"),  # what is absent in text_config
    ({"vision_config": {"num_attention_heads": 0}}, "zero"), ({"model_cfg": [1]}, "list"),
    ({"model_cfg": {"vision_cfg": {"head_width": -1}}}, "-1"), ("[" * 10**5, "recursion"),
    ({"preprocess_cfg": {"std": [0, 1, 1]}}, "(0, 1, 1)"), ("{", "config.json: Expecting"),
])
def test_configs_that_are_not_supported_are_refused_by_name(state, tmp_path, config, complaint):
    is_open_clip = "_cfg" in str(config)
    torch.save(state if is_open_clip else as_transformers(state), tmp_path / "model.bin")
    file = tmp_path / ("open_clip_config.json" if is_open_clip else "config.json")
    file.write_text(config if isinstance(config, str) else json.dumps(config))
    assert_refused(read_weights, tmp_path / "model.bin", complaint)


ONES = torch.ones(128, 16)


@pytest.mark.parametrize("change, complaint", [
    ({"visual.trunk.x": ONES}, "timm"), ({"visual.attnpool.x": ONES}, "ResNet"),
    ({"visual.attn_pool.x": ONES}, "CoCa"), ({"logit_bias": ONES}, "SigLIP"),
    ({"text.transformer.embeddings.x": ONES}, "another text tower"),
    ({"visual.proj": ONES.log() / 0}, "finite"), ({"visual.proj": ONES.long()}, "finite"),
    ({f"{i}": ONES.expand(9999, 128, 16) for i in range(9)}, ""), ({(1, 2): 3}, "unhashable"),
    ({"a.q_proj.bias": ONES}, "a.k_proj.bias"), ({"ln_final.bias": None}, "ln_final.bias"),
    ({f"transformer.resblocks.{i}.ln_1.bias": ONES[0] for i in range(9999)}, "blocks"),
    ({"visual.conv1.weight": torch.ones(128, 4, 8, 8)}, "conv1"), ({"more": ONES}, "more"),
    ({"visual.proj": ONES[0]}, "visual.proj"), ({"visual.class_embedding": ONES[0, 0]}, ""),
])
def test_state_dicts_that_are_no_clip_are_refused_by_name(state, tmp_path, change, complaint):
    torch.save(state | change, tmp_path / "model.pt")
    assert_refused(load, tmp_path / "model.pt", complaint)


class Call:
    """Is pickled as the call of a function."""

    def __init__(self, *function_and_arguments):
        self.call = function_and_arguments

    def __reduce__(self):
        return self.call[0], self.call[1:]


def archive(path: str, value: object, storage: bytes = struct.pack("<6f", *range(6))) -> None:
    """What torch.save would write, had it a dict with `value`, and six numbers to refer to."""
    pickler = pickle.Pickler(pickled := io.BytesIO(), protocol=2)
    pickler.persistent_id = lambda x: x[1:] if isinstance(x, tuple) and x[:1] == (...,) else None
    pickler.dump({"x": value})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a/data.pkl", pickled.getvalue())
        z.writestr("a/data/0", storage)


def tensor(size=(2, 3), stride=(3, 1), offset=0, kind=torch.FloatStorage) -> Call:
    storage = (..., "storage", kind, "0", "cpu", 6)
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})


def test_hostile_files_are_refused_and_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    archive("honest.pt", tensor())
    assert read_tensors("honest.pt")["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    for i, lie in enumerate([
        {"size": (2, 4)}, {"size": (10**6, 10**6), "stride": (0, 0)}, {"stride": (-3, 1)},
        {"offset": -1}, {"offset": 1}, {"offset": 2**62}, {"size": "ab"}, {"size": (2**62, 4)},
        {"size": (2,)}, {"size": (1,) * 70, "stride": (1,) * 70}, {"size": ((1, 2), 2**40)},
        {"size": (-1, -1)}, {"kind": torch.UntypedStorage}, {"kind": torch.LongStorage},
    ]):
        archive(f"lie{i}.pt", tensor(**lie))
    archive("code.pt", Call(os.system, "touch hacked"))
    archive("bomb.pt", tensor(), bytes(2**28))
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile("honest.pt", "a") as z:
        z.writestr("a/data.pkl", b"")
    torch.save([1, 2], "list.pt")
    torch.save({"a": 1}, "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.ones(3)}, "damaged.pt")
    flipped = Path("damaged.pt").read_bytes().replace(struct.pack("<f", 1), struct.pack("<f", 2))
    Path("damaged.pt").write_bytes(flipped)
    x = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    for i, lie in enumerate([
        {"shape": [2, 2]}, {"shape": [-2, -3]}, {"shape": "6"}, {"dtype": "F4"},
        {"shape": [[9], 2**40]}, {"data_offsets": [0, 2**50]}, {"data_offsets": [28, 4]},
        {"shape": [0, 2**50], "data_offsets": [0, 0]}, {"dtype": None}, {"data_offsets": [0, 12]},
    ]):
        save_safetensors({"x": torch.ones(2, 3)}, Path(f"lie{i}.safetensors"), x=x | lie)
    save_safetensors({"x": torch.ones(2, 3)}, Path("again.safetensors"), y=x)
    for length in (2**60, 10**6):
        Path(f"{length}.safetensors").write_bytes(struct.pack("<Q", length) + b"[" * 10**6)
    Path("empty.pt").write_bytes(b"")
    for path in tmp_path.iterdir():
        assert_refused(read_tensors, path)
    assert not Path("hacked").exists()


# ---- Reading weights: where they are found -------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves one file in the ways that the first part of the path says: /good/..., /stall/..."""

    content, requests = b"", []

    def do_GET(self):
        fault, moved = self.path.split("/")[1], self.path.endswith("moved")
        self.requests.append(self.path)
        self.send_response(404 if fault == "missing" else 200 if moved else 302)
        sha256 = hashlib.sha256(self.content + b"?" * (fault == "wrong")).hexdigest()
        if not moved:
            self.send_header("Location", self.path + "/moved")
            self.send_header("X-Linked-Etag", f'"{sha256}"' if fault != "unstated" else "")
        length = len(self.content) - 9 * (fault == "short")
        self.send_header("Content-Length", str(length * moved))
        self.end_headers()
        if moved:
            self.wfile.write(self.content[:100] if fault in ("cut", "stall") else self.content)
            time.sleep(1.5 * (fault == "stall"))

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(state, tmp_path, monkeypatch):
    """A function that sets the faults of the hub and of OpenAI's hosts; the home is empty."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"

    def set_up(hub: str, *hosts: str) -> None:
        monkeypatch.setenv("HF_ENDPOINT", f"{root}/{hub}")
        monkeypatch.setattr(weights, "HOSTS", [f"{root}/{host}" for host in hosts])

    for name in ("HOME", "USERPROFILE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(weights, "TIMEOUT", 0.3)
    torch.save(state, tmp_path / "x")
    monkeypatch.setattr(Hub, "requests", [])
    monkeypatch.setattr(Hub, "content", (tmp_path / "x").read_bytes())
    sha256 = hashlib.sha256(Hub.content).hexdigest()
    monkeypatch.setitem(weights.MODELS, "ViT-B/16", (sha256, *weights.MODELS["ViT-B/16"][1:]))
    yield set_up
    server.shutdown()
    server.server_close()


def test_the_hub_comes_first_then_the_cache_and_two_first_runs_do_not_meet(
    hub, tmp_path, capsys, monkeypatch
):
    hub("good", "good")
    monkeypatch.setattr(weights, "TIMEOUT", 30)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        (path,) = set(pool.map(weights.find, ["ViT-B/16"] * 8))
    assert path.read_bytes() == Hub.content and [*(tmp_path / ".cache/clip").iterdir()] == [path]
    assert read_weights(path).notes == ()  # whose file it is, is known: nothing is guessed
    url = "/good/timm/vit_base_patch16_clip_224.openai/resolve/main/open_clip_model.safetensors"
    assert {*Hub.requests} == {url, f"{url}/moved"} and url in capsys.readouterr().err
    Hub.requests.clear()
    assert weights.find("ViT-B/16") == path and not Hub.requests


def failure_to_find(name: str, folder: Path) -> str:
    """In one line, and no files are left."""
    with pytest.raises((ValueError, OSError)) as error:
        weights.find(name, folder)
    message = str(error.value)
    assert "\n" not in message and not [path for path in folder.rglob("*") if path.is_file()]
    assert name not in weights.MODELS or message.count("http://") == 3 and "--model" in message
    return message


@pytest.mark.parametrize("fault, complaint", [
    ("missing", "404"), ("wrong", "SHA-256"), ("unstated", "no SHA-256"), ("cut", ""),
    ("short", "SHA-256"), ("stall", "timed out"), ("good", "No space left"),
])
def test_faults_lead_to_the_next_source_and_then_to_one_line(
    hub, tmp_path, monkeypatch, fault, complaint
):
    if fault == "good":  # but the disk is full
        monkeypatch.setattr(Path, "replace", Mock(side_effect=OSError(28, "No space left")))
    else:
        hub(fault, "missing", "good")
        path = weights.find("ViT-B/16", tmp_path / "a")
        assert path.name == "ViT-B-16.pt" and path.read_bytes() == Hub.content
    hub(fault, "missing", "missing")
    assert complaint in failure_to_find("ViT-B/16", tmp_path / "b")


def test_what_other_programs_have_put_on_the_disk_is_found(hub, tmp_path):
    hub("missing")
    file = tmp_path / ".cache" / "clip" / "ViT-B-16.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(Hub.content[:-9])  # as an interrupted download leaves it
    with pytest.raises(OSError):
        weights.find("ViT-B/16")
    file.write_bytes(Hub.content)
    assert weights.find("ViT-B/16") == file
    file.unlink()
    timm = "timm/vit_base_patch16_clip_224.openai"
    for repository, name in [("openai/clip-vit-base-patch16", "pytorch_model.bin"),
                             (timm, "model.safetensors"), (timm, "open_clip_model.safetensors")]:
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / "abc"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(Hub.content)
        if name != "model.safetensors":  # timm's own, without a text tower
            assert weights.find("ViT-B/16") == folder / name == weights.find(repository)
    assert read_weights(folder).notes == ()  # known: no config is needed
    assert weights.find("~/x") == tmp_path / "x"
    for name in ("ViT-B/17", "openai/none", "~nobody/x", "a\0b", "x" * 999):
        failure_to_find(name, tmp_path / "a")
# ---- Prompts and objective -----------------------------------------------------------------------

NAMES = ["cat", "dog", "great white shark"]


def batch(seed: int = 0, n: int = 4):
    return torch.randn(n, 3, 32, 32, generator=seeded(seed)), torch.arange(n) % len(NAMES)


def make(clip, names=NAMES, **settings) -> PromptOT:
    """The same prompts each time."""
    torch.manual_seed(0)
    return PromptOT(clip, names, Recipe(**settings))


@pytest.mark.parametrize("bad", [
    dict(shots=-1), dict(reg="wasserstein"), dict(lam=math.nan), dict(lam=math.inf),
    dict(epsilon=0),
    dict(epochs=0), dict(epochs=10**12), dict(epochs=2.5), dict(lr="0.1"), dict(seed=None),
    dict(n_ctx=10**6), dict(classes=3), dict(batch_size=[4]),
])
def test_a_recipe_refuses_what_cannot_be_tuned(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*, not within"):
        Recipe(**bad)


def test_prompts_start_where_the_paper_says(clip):
    torch.manual_seed(0)
    prompts = PromptLearner(clip, n_ctx=4, depth=12)
    assert prompts.text.shape == (4, 4, 64) and prompts.vision.shape == (3, 4, 128)  # cut to layers
    words = clip.token_embedding.weight[[320, 1125, 539, 320]]  # a photo of a
    assert torch.equal(prompts.text[0], words)
    assert 0.015 < prompts.text[1:].std() < 0.025 and 0.015 < prompts.vision.std() < 0.025
    paper = CLIP(512, 224, 16, 768, 12, 512, 12)
    assert sum(p.numel() for p in PromptLearner(paper, 4, 12).parameters()) == 61_440


@pytest.mark.parametrize("n_ctx", [1, 2, 4, 6])
def test_number_of_prompts(clip, n_ctx):
    """Fewer than "a photo of a" leave its last words; more get positions of their own."""
    names = ["sea", "sea lion", "sea lion pup", "sea", "sea.", "x", "lake"]
    model = make(clip, names, n_ctx=n_ctx, depth=1)
    if n_ctx <= 4:  # as initialised, the first layer changes nothing
        torch.testing.assert_close(model.text_features(), model.text0)
    model = make(clip, names, n_ctx=n_ctx, depth=2)
    words = "a photo of a" + " x" * (n_ctx - 4)
    tokens = tokenize([f"{words} {name}." for name in names])
    slow = [slow_encode_text(clip, row, model.prompts.text) for row in tokens]
    torch.testing.assert_close(model.text_features(), unit(torch.stack(slow)), rtol=1e-4, atol=1e-5)
    assert model(batch()[0]).shape == (4, len(names))


def test_loss_is_cross_entropy_plus_lambda_ot(clip):
    model, (images, labels) = make(clip), batch()
    recipe = Recipe(lam=3, epsilon=0.02)
    loss, parts = model.loss(images, labels, recipe)
    torch.testing.assert_close(parts["ce"], F.cross_entropy(model(images), labels))
    z = torch.cat([model.image_features(images), model.text_features()[labels]], 1)
    z0 = torch.cat([unit(clip.encode_image(images)), unit(clip.encode_text(
        tokenize([f"a photo of a {name}." for name in NAMES])))[labels]], 1)
    cost = torch.cdist(z, z0).square() / 2
    plan = sinkhorn(cost, epsilon=0.02)
    torch.testing.assert_close(parts["ot"], (plan * cost).sum(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(parts["off_diagonal"], 1 - plan.trace(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loss, parts["ce"] + 3 * parts["ot"])
    alone, parts = model.loss(images, labels, Recipe(reg="none"))
    assert alone == parts["ce"] and parts["plan"] is None
    _, parts = model.loss(images, labels, Recipe(reg="pointwise"))
    assert parts["off_diagonal"] == 0


def test_only_prompts_get_gradients(clip):
    model, (images, labels) = make(clip), batch()
    model.loss(images, labels)[0].backward()
    assert all(p.grad is None for p in clip.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.prompts.parameters())


def test_half_precision_is_near_and_losses_are_fp32(clip):
    """Also the gradients of prompts that very many texts share."""
    images, labels = batch()
    names, losses, gradients = NAMES + [str(i) for i in range(500)], [], []
    for precision in ("fp32", "bf16"):
        model = make(clip, names, precision=precision)
        loss, parts = model.loss(images, labels)
        loss.backward()
        losses.append(loss), gradients.append(model.prompts.text.grad)
        assert {x.dtype for x in (loss, parts["plan"], gradients[-1])} == {torch.float32}
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.01)
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


def test_schedule_of_learning_rates():
    rates = [learning_rate(epoch) for epoch in range(40)]
    assert rates[0] == 1e-4 and rates[1] == 5e-3
    for epoch, rate in ((2, 4.9923e-3), (3, 4.9692e-3), (39, 3.0779e-5)):
        assert rates[epoch] == pytest.approx(rate, rel=1e-4)


# ---- Training ------------------------------------------------------------------------------------


class Quiet:
    """All that `train` asks of a record."""

    history, begin, step, end_of_epoch = (), lambda *_: 0, lambda *_: None, lambda _: None


@pytest.fixture(scope="module")
def digits():
    return data.few_shot_source(data.load_dataset(DEMO / "digits"), shots=4, seed=1, classes="all")


def tune(clip, digits, record=None, workers=0, **settings) -> tuple[PromptOT, list[dict]]:
    recipe = Recipe(**{"stop_epoch": 2, "augment": "gentle"} | settings)
    torch.manual_seed(1)
    model = PromptOT(clip, digits.classnames, recipe)
    return model, promptot.train(model, digits.train, recipe, record, workers)


def prompts_of(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.prompts.parameters()])


def test_training_moves_the_prompts_and_nothing_else(demo_clip, digits):
    before = {name: p.clone() for name, p in demo_clip.named_parameters()}
    torch.manual_seed(1)
    start = PromptOT(demo_clip, digits.classnames)
    model, history = tune(demo_clip, digits)
    assert all(torch.equal(p, before[name]) for name, p in demo_clip.named_parameters())
    assert (prompts_of(model) != prompts_of(start)).float().mean() > 0.99
    assert [set(means) for means in history] == 2 * [{"loss", "ce", "ot", "off_diagonal"}]
    assert torch.equal(prompts_of(tune(demo_clip, digits, Quiet())[0]), prompts_of(model))


def test_training_is_sgd_by_hand(demo_clip, digits):
    """Momentum and weight decay written out, on the same batches."""
    recipe = Recipe(stop_epoch=2, augment="none")
    torch.manual_seed(1)
    by_hand = PromptOT(demo_clip, digits.classnames, recipe)
    loader = data.train_loader(digits.train, data.train_transform(32, "none"), 4, recipe.seed)
    velocity = [torch.zeros_like(p) for p in by_hand.prompts.parameters()]
    for epoch, lr in enumerate((1e-4, 0.005)):
        loader.batch_sampler.set_epoch(epoch)
        for images, labels in loader:
            loss, _ = by_hand.loss(images, labels)
            gradients = torch.autograd.grad(loss, list(by_hand.prompts.parameters()))
            for p, g, v in zip(by_hand.prompts.parameters(), gradients, velocity):
                v.mul_(0.9).add_(g + 5e-4 * p.detach())
                p.data -= lr * v
    model, _ = tune(demo_clip, digits, augment="none")
    torch.testing.assert_close(prompts_of(model), prompts_of(by_hand), rtol=1e-4, atol=1e-6)


def test_same_seed_same_prompts_other_settings_others(demo_clip, digits):
    model, _ = tune(demo_clip, digits, stop_epoch=1)
    for workers in (0, 2):
        again, _ = tune(demo_clip, digits, workers=workers, stop_epoch=1)
        assert torch.equal(prompts_of(model), prompts_of(again))
    for other in (dict(reg="none"), dict(modality="image"), dict(seed=2), dict(augment="field"),
                  dict(batch_size=8)):
        tuned, _ = tune(demo_clip, digits, stop_epoch=1, **other)
        assert not torch.equal(prompts_of(tuned), prompts_of(model))


def test_an_interrupted_tuning_goes_on_to_the_same_prompts(
    demo_clip, digits, tmp_path, monkeypatch
):
    model, history = tune(demo_clip, digits, stop_epoch=3)
    file, save, saved = tmp_path / "state.pt", runs.save_tensors, []

    def save_once(*args):
        if saved:
            raise KeyboardInterrupt  # after the work of epoch 2, before it is saved
        saved.append(save(*args))

    monkeypatch.setattr(runs, "save_tensors", save_once)
    with pytest.raises(KeyboardInterrupt):
        tune(demo_clip, digits, runs.Record(file), stop_epoch=3)
    monkeypatch.setattr(runs, "save_tensors", save)
    resumed, its_history = tune(demo_clip, digits, runs.Record(file), stop_epoch=3)
    assert torch.equal(prompts_of(resumed), prompts_of(model)) and its_history == history
    with pytest.raises(ValueError, match="state.pt does not fit"):
        tune(demo_clip, digits, runs.Record(file), n_ctx=2)
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="state.pt.*damaged"):
        tune(demo_clip, digits, runs.Record(file))


def test_a_model_can_be_tested_and_tuned_on(demo_clip, digits):
    """Accuracy against counting; it leaves no trace that a backward pass would trip over."""
    model = PromptOT(demo_clip, digits.classnames)
    few = dataclasses.replace(digits, test=digits.test[::9], template="{}!")
    percent, plain, own = promptot.accuracy(model, few) + promptot.accuracy(model, few, tuned=False)
    transform, right = data.test_transform(32), [0, 0, 0]
    with torch.no_grad():
        own_text = demo_clip.encode_text(tokenize([f"{name}!" for name in few.classnames]))
        texts = [model.text_features(), model.text0, unit(own_text)]
        for path, label in few.test:
            image = transform(data.open_image(path))[None]
            for i, tuned in enumerate((True, False, False)):
                right[i] += (model.image_features(image, tuned) @ texts[i].T).argmax() == label
    counted = [100 * float(r) / len(few.test) for r in right]
    assert [percent, plain, own] == pytest.approx(counted, abs=1e-3)
    promptot.train(model, few.train, Recipe(stop_epoch=1), Quiet())


def test_a_loss_that_is_not_finite_stops_the_run(demo_clip, digits):
    with pytest.raises(ValueError, match=r"not finite in epoch \d+, step \d+"):
        tune(demo_clip, digits, stop_epoch=40, lr=1e6, reg="none")


# ---- Data: tiny folders to load ------------------------------------------------------------------


def picture(path: Path) -> str:
    """A small image of random pixels, which its name seeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (12, 10), random.Random(path.name).randbytes(360)).save(path)
    return str(path)


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    for c, count in counts.items():
        for i in range(count):
            picture(root / c / f"{c[-1]}{i}.png")
    return root


def build(name: str, parent: Path) -> Path:
    """A tiny copy of a benchmark: three classes with an image each for train, val and test."""
    b = data._by_name(name)
    home, classes = parent / b.folder, ["red_fox", "tabby", "zebra"]
    if b.files == data.IMAGENET:  # ImageNetV2's folders are numbers of lines in classnames.txt
        names = {f"n9999999{i}": "other" for i in range(9)}
        names |= {"n00000003": "zebra", "n00000001": "red_fox", "n00000002": "tabby"}
        folders = ["9", "10", "11"] if name == "ImageNetV2" else list(names)[9:]
        for part in ("train", "val") if name == "ImageNet" else (".",):
            class_folders(home / b.images / part, dict.fromkeys(folders, 1))
        (home / "classnames.txt").write_text("\n".join(map(" ".join, names.items())))
        return home
    split = {part: [(f"{part}{i}.jpg", i, c) for i, c in enumerate(classes)] for part in data.PARTS}
    for path, _, _ in itertools.chain(*split.values()):
        picture(home / b.images / path)
    if b.files == data.AIRCRAFT:
        (home / "variants.txt").write_text("\n".join(classes))
        for part, rows in split.items():
            lines = [f"{path[:-4]} {c}" for path, _, c in rows]
            (home / f"images_variant_{part}.txt").write_text("\n".join(lines))
    else:
        (home / b.split_file).write_text(json.dumps(split))
    return home


def refused(root: Path, message: str, *names) -> None:
    """`load_dataset` raises an error of one line, in which the message is found."""
    with pytest.raises((ValueError, OSError), match=message) as e:
        data.load_dataset(root, *names)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", [b.name for b in data.BENCHMARKS])
def test_every_benchmark_is_known_by_its_folder_or_its_files(name, tmp_path):
    b = data._by_name(name)
    (tmp_path / "empty" / b.folder).mkdir(parents=True)
    refused(tmp_path / "empty" / b.folder, f"{b.images}/..., {(b.files or [b.split_file])[0]}")
    home = build(name, tmp_path)
    dataset = data.load_dataset(home)
    assert (dataset.name, dataset.template, dataset.notes) == (name, b.template, ())
    assert dataset.classnames == ["red fox", "tabby", "zebra"]  # as CLIP reads them
    of_imagenet = ("train", "test") if name == "ImageNet" else ("test",)
    for part in of_imagenet if b.files == data.IMAGENET else data.PARTS:
        paths, labels = zip(*getattr(dataset, part))
        assert labels == (0, 1, 2) and all(map(os.path.isfile, paths))
    assert data.load_dataset(home.rename(tmp_path / "my pictures")).name == name


def test_imagenet_variants_find_the_names_in_the_sibling_or_where_told(tmp_path):
    home = build("ImageNet-A", tmp_path)
    elsewhere = (home / "classnames.txt").rename(tmp_path / "names.txt")
    refused(home, "classnames.txt")
    refused(home, "typo.txt", tmp_path / "typo.txt")
    assert data.load_dataset(home, elsewhere).classnames[0] == "red fox"
    build("ImageNet", tmp_path)
    assert data.load_dataset(home).classnames[0] == "red fox"
    elsewhere.write_text("n00000001 tabby\n")
    refused(home, "has no name for the class folder", elsewhere)
    # CLIP's list has "missile" and "sunglasses" twice, and published numbers are with them
    elsewhere.write_text("n00000001 missile\nn00000002 crane\nn00000003 missile\n")
    assert data.load_dataset(home, elsewhere).classnames == ["missile", "crane", "missile"]


def test_eurosat_without_split_file_has_coops_names(tmp_path):
    images = class_folders(tmp_path / "eurosat/2750", {"Forest": 10, "AnnualCrop": 10, "River": 10})
    dataset = data.load_dataset(tmp_path / "eurosat")
    assert dataset.classnames == ["Annual Crop Land", "Forest", "River"]
    assert "do not compare" in dataset.notes[-1]
    assert data.load_dataset(images) == dataclasses.replace(dataset, root=str(images))


def test_a_folder_that_holds_benchmarks_or_has_classes_called_like_them(tmp_path):
    build("EuroSAT", tmp_path / "data"), build("DescribableTextures", tmp_path / "data")
    refused(tmp_path / "data", "holds data sets, name one of them: dtd, eurosat")
    own = class_folders(tmp_path / "own", {"imagenet": 2, "dtd": 2, "images": 2})
    assert data.load_dataset(own).classnames == ["dtd", "imagenet", "images"]


@pytest.mark.parametrize("change, message", [
    (lambda s: s["val"].append(["x.jpg", 4, "x"]), r"labels are not 0, 1, 2, .* \[0, 1, 2, 4\]"),
    (lambda s: s["val"].append(["x.jpg", 1, "tabby"]), "1 images are not there, as .*x.jpg"),
    (lambda s: s["val"].append([s["val"][0][0], 3, "red fox"]),
     "two classes have the name 'red fox'"),
    (lambda s: s["val"].append([s["val"][0][0], 2, "dog"]),
     "label 2 has two names, 'zebra' and 'dog'"),
    (lambda s: s["train"].pop(1), "no train image of class 'tabby'"),
    (lambda s: s.pop("test"), "not a split file"),
    (lambda s: s["train"].append("x"), "not a split file"),
    (lambda s: s["train"].append(["a.jpg", 1e999, "x"]), "not a split file"),
    (lambda s: "[" * 100_000, "not a split file"),
])
def test_bad_split_files(change, message, tmp_path):
    file = build("EuroSAT", tmp_path) / "split_zhou_EuroSAT.json"
    split = json.loads(file.read_text())
    text = change(split)
    file.write_text(text if isinstance(text, str) else json.dumps(split))
    refused(file.parent, message)


def test_download(tmp_path, monkeypatch):
    def fetched(root, download):
        (Path(root) / "fgvc-aircraft-2013b").mkdir()
        build("FGVCAircraft", Path(root)).rename(Path(root) / "fgvc-aircraft-2013b/data")

    def offline(root, download):
        Path(root, "half").mkdir()
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "FGVCAircraft", offline)
    with pytest.raises(OSError, match=r"cannot download FGVCAircraft .*\(no route to host\)$"):
        data.download("FGVCAircraft", tmp_path)
    monkeypatch.setattr(torchvision.datasets, "FGVCAircraft", fetched)
    home = Path(data.download("fgvc_aircraft", tmp_path))
    assert home == tmp_path / "fgvc_aircraft" and len(data.load_dataset(home).train) == 3
    assert list(tmp_path.iterdir()) == [home]  # nothing left lying about
    assert data.download("FGVCAircraft", tmp_path) == str(home)  # is there already
    with pytest.raises(ValueError, match="UCF101 cannot be downloaded"):
        data.download("UCF101", tmp_path)
    (home / "images_variant_val.txt").write_text("003 Concorde\n")
    refused(home, "'003 Concorde' does not end with a name")


def test_class_folders_are_split_50_20_30(tmp_path):
    """Few images go to train, then test, then val; whatever other classes there are."""
    counts = {"a_b": [1, 0, 1], "c": [2, 0, 1], "d": [2, 1, 1], "e": [2, 1, 2], "f": [10, 4, 6]}
    root = class_folders(tmp_path / "pets", {c: sum(count) for c, count in counts.items()})
    dataset = data.load_dataset(root)
    assert dataset.name == "pets" and dataset.classnames == ["a b", "c", "d", "e", "f"]
    parts = dataset.train, dataset.val, dataset.test
    for label, count in enumerate(counts.values()):
        assert [sum(y == label for _, y in part) for part in parts] == count
    assert "50 / 20 / 30" in dataset.notes[0]
    assert len(set(itertools.chain(*parts))) == 34
    shutil.rmtree(root / "f")
    assert data.load_dataset(root).train == [item for item in dataset.train if item[1] < 4]


def test_folders_train_and_test(tmp_path):
    for part, count in {"train": 3, "val": 2, "extra": 1}.items():
        class_folders(tmp_path / part, {"b_c": count, "a": count})
    dataset = data.load_dataset(tmp_path)  # tested on val/, where there is no test/
    assert dataset.classnames == ["a", "b c"] and dataset.val == []
    assert [y for _, y in dataset.train] == [0, 0, 0, 1, 1, 1] and len(dataset.test) == 4
    assert dataset.notes == (f"folder left out: {tmp_path / 'extra'}",)
    (tmp_path / "extra").rename(tmp_path / "test")
    dataset = data.load_dataset(tmp_path)
    assert [len(dataset.train), len(dataset.val), len(dataset.test)] == [6, 4, 2]
    class_folders(tmp_path / "test", {"d": 1})
    refused(tmp_path, "different classes: 'd'")
    shutil.rmtree(tmp_path / "train"), shutil.rmtree(tmp_path / "val")
    assert data.load_dataset(tmp_path).train == []  # to evaluate on only


@pytest.mark.parametrize("files, message", [
    ([], "no class folders in .*; expected is folder/class name/image.jpg"),
    (["cat/a.png", "dog/"], "no images in .*dog"),
    (["cat/a.png"], "two classes with names are needed"),
    (["cat/a.png", "_/b.png"], "two classes with names are needed"),
    (["big_cat/a.png", "Big cat/b.png"], "two classes have the name 'big cat'"),  # same tokens
    (["train/cat/a.png", "train/dog/a.png", "test/a.png"], "val"),
])
def test_bad_folders(files, message, tmp_path):
    for file in files:
        picture(tmp_path / file) if file.endswith("png") else (tmp_path / file).mkdir()
    refused(tmp_path, message)
    refused(tmp_path / "nothing", "no folder .*nothing")


def test_nested_and_hidden_files_and_links(tmp_path):
    pictures = [picture(tmp_path / file) for file in (
        "cat/a.JPG", "cat/siam/b.png", "cat/siam/old/c.TIF", "dog/d.jpeg", "dog/e.png")]
    picture(tmp_path / "loose.png")
    for file in ("cat/readme.txt", "cat/.DS_Store", "dog/._d.jpeg", ".git/x.png", "__MACOSX/y.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("hello")
    with contextlib.suppress(OSError):  # some systems have no links
        os.symlink(tmp_path, tmp_path / "cat/circle")
    dataset = data.load_dataset(tmp_path)
    found = dataset.train + dataset.val + dataset.test
    assert sorted(path for path, _ in found) == sorted(pictures)
    assert dataset.classnames == ["cat", "dog"]


def test_own_class_names(tmp_path):
    root = class_folders(tmp_path / "x", {"ct": 2, "mri": 2, "cat": 2})
    names = tmp_path / "names.txt"
    names.write_text("\ufeffct computed  tomography\ncat\tbig_cat\nmr typo\n", encoding="utf-8")
    assert data.load_dataset(root, names).classnames == ["big cat", "computed tomography", "mri"]
    for content, message in {b"mr x": "no name for", b"\xff": "utf-8", b"ct": "with names"}.items():
        names.write_bytes(content)
        refused(root, message, names)


def test_random_trees_are_read_or_refused_in_one_line(tmp_path):
    """A seeded fuzz: what is read has each picture once, with its class's label."""
    rng = random.Random(0)
    names = ["a", "B b", "train", "test", "val", ".h", "__x", "imagenet", "n00000001", "2750", "é"]
    for tree in range(60):
        root = tmp_path / str(tree)
        for _ in range(rng.randrange(1, 12)):
            folder = root.joinpath(*(rng.choice(names) for _ in range(rng.randint(0, 3))))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / rng.choice(["1.png", "2.JPG", "x.txt", ".y.png"])).write_bytes(b"")
        try:
            dataset = data.load_dataset(root)
        except (ValueError, OSError) as e:
            assert "\n" not in str(e)
            continue
        items = dataset.train + dataset.val + dataset.test
        assert len({path for path, _ in items}) == len(items)
        assert all(f"/{dataset.classnames[label]}/" in path for path, label in items)


# ---- Data: protocol ------------------------------------------------------------------------------


def coop_shots(items, n):
    """CoOp's sampling with Python's own generator: Dassl's `generate_fewshot_dataset`."""
    tracker = defaultdict(list)
    for item in items:
        tracker[item[1]].append(item)
    output = []
    for of_label in tracker.values():
        output.extend(random.sample(of_label, n) if len(of_label) >= n else of_label)
    return output


@pytest.mark.parametrize("shots, seed", [(1, 0), (4, 1), (16, 2), (16, 3)])
def test_shots_are_those_of_coop(shots, seed):
    labels = random.Random(0)
    train = [(f"{i}.jpg", labels.randrange(7)) for i in range(150)]  # labels in no order
    train += [("few.jpg", 7), ("too few.jpg", 7)]
    val = [(f"v{i}.jpg", labels.randrange(8)) for i in range(60)]
    random.seed(seed)  # CoOp's: first for train, then for val
    expected = [coop_shots(train, shots), coop_shots(val, min(shots, 4))]
    rng = random.Random(seed)
    assert [data.few_shot(train, shots, rng), data.few_shot(val, min(shots, 4), rng)] == expected
    assert data.few_shot(train, 0, rng) == train
    dataset = data.Dataset("x", list("abcdefgh"), train, val, [])
    assert data.few_shot_source(dataset, shots, seed, "all").train == expected[0]
    base = data.few_shot_source(dataset, shots, seed)  # sampled first, reduced then
    assert base.train == [item for item in expected[0] if item[1] < 4]


@pytest.mark.parametrize("n", [2, 5, 10])
def test_base_and_novel_are_those_of_coop(n):
    """What CoOp's `subsample_classes` does, step by step."""
    items = [(f"{i}.jpg", (7 * i) % n) for i in range(40)]
    names = [f"c{i}" for i in range(n)]
    dataset = data.Dataset("x", names, items[:20], items[:4], items[20:], template="{}!")
    labels, m = sorted({y for _, y in dataset.train}), math.ceil(n / 2)
    for part, selected in zip(data.base_novel(dataset), (labels[:m], labels[m:])):
        relabeler = {y: y_new for y_new, y in enumerate(selected)}
        for ours, whole in ((part.train, dataset.train), (part.test, dataset.test)):
            assert ours == [(path, relabeler[y]) for path, y in whole if y in selected]
        assert part.classnames == [names[y] for y in selected] and part.template == "{}!"
    assert len(part.notes) == (n == 2)  # accuracy on a single novel class is 100 %


def test_what_is_tested_has_names_of_its_own():
    own, novel, other, again = (
        data.Dataset(name, ["a", "b"], [], [], [(f"{root}.png", 0), ("b.png", 1)], root=root)
        for name, root in [("x", "1/x"), ("novel", "2/novel"), ("y", "3/y"), ("x", "4/x")]
    )
    targets = data.evaluation_targets(own, ["base", "all"], [novel, other, again])
    assert targets == {
        "base": dict(zip(("base", "novel"), data.base_novel(own))),
        "all": {"x": own, "2/novel": novel, "y": other, "4/x": again},
    }
    assert list(data.evaluation_targets(own, ["base"], [other])["base"]) == ["base", "novel", "y"]
    with pytest.raises(ValueError, match="no test image of a novel class"):
        data.evaluation_targets(dataclasses.replace(own, test=own.test[:1]), ["base"])
    with pytest.raises(ValueError, match="1/x has no training images"):
        data.few_shot_source(own, 16, 1)


def test_notes_say_what_was_read_as_what(tmp_path):
    class_folders(tmp_path, {"a": 2, "a/deep/deeper": 2, "b": 1})
    (tmp_path / "a" / "deep" / "text.txt").write_text("no picture")
    dataset = data.load_dataset(tmp_path, template="an aerial photo of {}.")
    assert len(dataset.train + dataset.val + dataset.test) == 5
    notes = "\n".join(dataset.notes)
    for words in ("left out, no pictures by their names: 1", "text.txt", "sub-folders.*: 2",
                  "50 / 20 / 30 %", "without a test image: 1, as 'b'"):
        assert re.search(words, notes), words
    assert dataset.template == "an aerial photo of {}."
    with pytest.raises(ValueError, match="needs one {}"):
        data.load_dataset(tmp_path, template="a photo")
    pictures = data.find_images([tmp_path, "x.jpg"])
    assert len(pictures) == 6 and list(data.check_images(pictures[:5])) == pictures[:5]
    with pytest.raises(data.ImageError, match="x.jpg"):
        list(data.check_images(pictures))


# ---- Data: images and batches --------------------------------------------------------------------


def test_test_transform_is_resize_crop_normalise():
    """Pixel by pixel against Pillow: the smaller edge to 16, then the centre."""
    image = Image.frombytes("RGB", (64, 32), random.Random(0).randbytes(3 * 64 * 32))
    crop = image.resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    expected = torch.tensor(list(crop.tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))
    torch.testing.assert_close(data.test_transform(16)(image), (expected - mean) / std)
    plain = data.train_transform(16, "none", mean=(0,) * 3, std=(1,) * 3)
    torch.testing.assert_close(plain(image), expected)


@pytest.mark.parametrize("augment, smallest, flipped", [("field", 0.08, 0.5), ("gentle", 0.6, 0)])
def test_train_transform_crops_and_flips(augment, smallest, flipped):
    """On a ramp from left to right the range of values is the width of the crop."""
    torch.manual_seed(0)
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")  # 256 x 256, 0 to 255
    transform = data.train_transform(32, augment, mean=(0,) * 3, std=(1,) * 3)
    pixels = torch.stack([transform(ramp)[0, 16] for _ in range(400)])  # a row of each, (400, 32)
    slope = pixels[:, -1] - pixels[:, 0]
    assert abs((slope < 0).float().mean() - flipped) <= 0.1 * flipped
    widths = slope.abs() * 32 / 31
    assert widths.min() > math.sqrt(smallest * 3 / 4) - 0.05 and widths.max() > 0.95
    # area uniform in (smallest, 1), log ratio uniform: the mean of sqrt(area)
    assert abs(widths.mean() - 2 / 3 * (1 - smallest**1.5) / (1 - smallest)) < 0.05
    with pytest.raises(ValueError, match="field, gentle, none"):
        data.train_transform(32, "strong")


GREY = Image.frombytes("L", (3, 1), bytes([0, 100, 200]))


@pytest.mark.parametrize("image, expected", [
    *((GREY.convert(mode), [0, 100, 200]) for mode in ("L", "P", "LA", "RGBA", "CMYK", "I", "F")),
    (GREY.convert("1"), [0, 0, 255]),
    (Image.frombytes("I;16", (3, 1), struct.pack("<3H", 0, 25700, 65535)), [0, 100, 255]),
    (Image.frombytes("I;16", (3, 1), struct.pack("<3H", 0, 100, 255)), [0, 100, 255]),
    (Image.frombytes("I", (3, 1), struct.pack("=3i", -5, 2**30, 2**31 - 1)), [0, 128, 255]),
    (Image.frombytes("F", (3, 1), struct.pack("=3f", 0, 0.2, 1)), [0, 51, 255]),
    (Image.frombytes("F", (3, 1), struct.pack("=3f", math.nan, -math.inf, 200)), [0, 0, 200]),
    (Image.frombytes("LA", (3, 1), bytes([0, 0, 0, 102, 0, 255])), [255, 153, 0]),  # on white
])
def test_all_kinds_of_images_become_rgb(image, expected, tmp_path):
    image.save(tmp_path / "x.tiff")
    rgb = data.open_image(str(tmp_path / "x.tiff"))
    assert rgb.mode == "RGB" and rgb.tobytes() == bytes(v for v in expected for _ in range(3))


def test_animation_transparent_colour_and_orientation(tmp_path):
    path = str(tmp_path / "x.gif")
    red, green = (Image.new("RGB", (3, 1), colour) for colour in ("red", "lime"))
    red.save(path, save_all=True, append_images=[green])
    assert data.open_image(path).tobytes() == red.tobytes()  # the first frame
    Image.new("P", (1, 1)).save(path, transparency=0)
    assert data.open_image(path).tobytes() == b"\xff\xff\xff"
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was turned: row 0 is the right side
    GREY.save(tmp_path / "x.png", exif=exif)
    turned = data.open_image(str(tmp_path / "x.png"))
    assert turned.size == (1, 3) and turned.getpixel((0, 2)) == (200, 200, 200)


@pytest.mark.parametrize("content, reason", [
    (b"", "cannot identify"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),  # is not run
    (b"P5 64 64 255 " + bytes(100), "truncated|not large enough"),
    ((5000, 1), "5000 x 1"), ((15_000, 15_000), "DecompressionBomb"),
])
def test_a_broken_image_is_named_in_one_line(content, reason, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(content) if isinstance(content, bytes) else Image.new("1", content).save(path)
    loader = data.test_loader([(str(path), 0)], data.test_transform(8), batch_size=4)
    for look in (lambda: data.open_image(str(path)), lambda: list(loader)):
        with pytest.raises(data.ImageError, match=reason) as e:
            look()
        assert str(e.value).startswith(f"cannot read the image {path} (")
        assert "\n" not in str(e.value)


@pytest.fixture
def items(tmp_path):
    return [(picture(tmp_path / f"{i}.png"), i % 3) for i in range(11)]


@pytest.mark.parametrize("n, batch_size, sizes", [(11, 4, [4, 4]), (8, 4, [4, 4]), (6, 8, [6])])
def test_an_epoch_is_a_permutation_without_the_last_incomplete_batch(n, batch_size, sizes):
    batches, other = (data.EpochBatches(n, batch_size, seed) for seed in (1, 2))
    orders = [[i for batch in other for _, i in batch]]
    for epoch in range(3):
        batches.set_epoch(epoch)
        assert list(map(len, batches)) == sizes and len(batches) == len(sizes)
        assert {e for batch in batches for e, _ in batch} == {epoch}
        orders.append([i for batch in batches for _, i in batch])
        assert len(set(orders[-1])) == sum(sizes) and set(orders[-1]) <= set(range(n))
    assert len(set(map(str, orders))) == 4


@pytest.mark.parametrize("n, world", [(13, 2), (13, 3), (6, 3)])
def test_processes_together_see_what_one_sees(n, world):
    alone = list(data.EpochBatches(n, 6, seed=1))
    shares = [list(data.EpochBatches(n, 6, 1, rank, world)) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*shares)] == alone
    assert {len(part) for parts in shares for part in parts} == {6 // world}
    for images, batch_size in ((13, 4 * world + 1), (world + 1, 8 * world), (0, world)):
        with pytest.raises(ValueError, match="must be a multiple"):
            data.EpochBatches(images, batch_size, 1, 0, world)


def test_pictures_depend_on_seed_epoch_and_index_alone(items):
    transform = data.train_transform(8)
    first, other = (data.Images([items[0]] * 5, transform, seed) for seed in (1, 2))
    state = torch.get_rng_state()
    pictures = [first[0, 3], first[1, 3], first[0, 4], other[0, 3]]
    assert all(torch.equal(x, y) == (x is y) for x, _ in pictures for y, _ in pictures)
    assert torch.equal(first[0, 3][0], pictures[0][0])
    share = next(iter(data.train_loader(items, transform, 4, seed=1, rank=1, world=2)))
    for own, whole in zip(share, next(iter(data.train_loader(items, transform, 4, seed=1)))):
        assert torch.equal(own, whole[2:])
    assert torch.equal(torch.get_rng_state(), state)  # the program's own randomness is untouched


@pytest.mark.parametrize("start", ["spawn", None])  # None: as the system likes it
def test_workers_however_they_are_started(start, items, tmp_path):
    """Spawned ones (Windows, macOS) get all that they need by pickle; errors keep to one line."""
    transform = data.train_transform(8)
    alone, helped = (data.train_loader(items, transform, 4, seed=1, workers=w) for w in (0, 2))
    helped.multiprocessing_context = start
    for epoch in (1, 2):
        for loader in (alone, helped):
            loader.batch_sampler.set_epoch(epoch)
        torch.testing.assert_close(list(helped), list(alone), rtol=0, atol=0)
    (tmp_path / "x.png").write_text("no picture")
    loader = data.test_loader([*items, (str(tmp_path / "x.png"), 0)], transform, 8, workers=1)
    loader.multiprocessing_context = start
    batches = iter(loader)
    assert next(batches)[1].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]  # in order
    with pytest.raises(data.ImageError, match=r"^cannot read the image .*x.png \([^\n]*\)$"):
        next(batches)


# ---- The command line ----------------------------------------------------------------------------


def run(*args) -> dict:
    """main([...]); returns the content of metrics.json."""
    main([str(a) for a in args])
    return json.loads((Path(args[args.index("--output") + 1]) / "metrics.json").read_text())


QUICK = ("--epochs", 2, "--shots", 4, "--reg", "ot")
TITLE = "base-ot-4shots-seed1"


def start(*args, python=(), **options) -> subprocess.Popen:
    """The command line in a process of its own."""
    command = [sys.executable, *python, HERE / "promptot.py", *args]
    return subprocess.Popen([str(c) for c in command], text=True, **options,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def saved_in(folder: Path) -> dict:
    return runs.read_prompts(folder / TITLE / "prompts.pt", Recipe)


def test_demo_from_the_command_line(tmp_path, capsys):
    metrics = run("--output", tmp_path / "run", "--epochs", 6, "--reg", "ot")
    zero_shot, (result,) = metrics["zero_shot"], metrics["runs"]
    assert zero_shot["base"] > 60 and zero_shot["novel"] > 60  # chance is 20
    assert result["accuracy"]["base"] > 70 and result["accuracy"]["novel"] > 70
    assert Recipe(**result["recipe"]).name == result["name"] and len(result["history"]) == 6
    printed = capsys.readouterr().out
    order = ["data  ", "model  ", "zero-shot base", "off-diagonal", "| base-to-novel", "tuned, ot"]
    places = [printed.index(word) for word in order]
    assert places == sorted(places) and max(map(len, printed.splitlines())) < 100
    written = (tmp_path / "run" / "results.md").read_text()
    assert "HM" in written and "| novel " in written  # the latter: accuracy on each class
    per_class = result["per_class"]["novel"]
    assert len(per_class) == 5  # of 60 test images each
    assert sum(per_class.values()) / 5 == pytest.approx(result["accuracy"]["novel"], abs=0.01)
    files = {p.name for p in (tmp_path / "run" / result["name"]).iterdir()}
    assert files == {"prompts.pt", "plan.png", "curves.png"}


def test_seeds_shots_and_regularisers_in_one_table_and_resume(tmp_path, capsys):
    args = ("--output", tmp_path / "run", "--epochs", 1, "--reg", "none", "pointwise", "--resume")
    metrics = run(*args, "--shots", 1, 2)
    assert [r["name"] for r in metrics["runs"]] == [
        f"base-{reg}-{shots}shots-seed1" for reg in ("none", "pointwise") for shots in (1, 2)]
    again = run(*args, "--shots", 1, 2, "--seed", 1, 2)
    assert again["runs"][:4] == metrics["runs"] and len(again["runs"]) == 8
    printed = capsys.readouterr().out
    assert printed.count("finished before") == 4
    assert "tuned, pointwise, 2 shots" in printed and " ± " in printed
    for other in (("--lam", 5), ("--augment", "none"), ("--data", DEMO / "letters", *MODEL)):
        expect_error(capsys, other[0][2:], *args, *other)
    expect_error(capsys, "--resume goes on", "--output", tmp_path / "run", "--epochs", 1)


def test_killed_at_any_moment_and_resumed(tmp_path):
    """SIGKILL after random times; in the end the prompts are those of an undisturbed run."""
    args = ["--epochs", 12, "--shots", 4, "--batch-size", 8, "--reg", "ot", "--output"]
    run(*args, tmp_path / "whole")
    for seconds in (4, 5, 6):
        process = start(*args, tmp_path / "killed", "--resume", stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.wait()
    run(*args, tmp_path / "killed", "--resume")
    whole, killed = (saved_in(tmp_path / name) for name in ("whole", "killed"))
    assert torch.equal(whole["text"], killed["text"])
    assert torch.equal(whole["vision"], killed["vision"])


@pytest.mark.parametrize("seconds", [0.7, 2, 4])
def test_ctrl_c_and_sigterm_are_one_line(seconds, tmp_path):
    """While PyTorch is imported, data are read, prompts are tuned; workers are silent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start("--output", tmp_path / str(number), "--workers", 2, "--epochs", 500,
                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        time.sleep(seconds)
        process.send_signal(number)
        try:
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
        assert process.returncode == 130
        assert len(error.strip().splitlines()) == 1 and "interrupted" in error


def test_runs_at_once(tmp_path):
    """Into one folder: one of them. Without --output: each takes its own."""
    args = ("--epochs", 1, "--shots", 1, "--reg", "ot")
    options = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    same = [start(*args, "--output", "one", *more, **options) for more in ((), (), ("--resume",))]
    own = [start(*args, **options) for _ in range(3)]
    assert sorted(p.wait(120) for p in same) == [0, 2, 2]
    assert [p.wait(120) for p in own] == [0, 0, 0]
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"digits", "digits-2", "digits-3"}


@pytest.mark.parametrize("content", ["mine", "{}", '{"settings": {}, "runs": []}', "[" * 10**5])
def test_somebodys_own_files_stay(content, tmp_path, capsys):
    names = ("metrics.json", "lock", "log.txt", "results.md", "state.pt")
    files = {name: content for name in names}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for resume in ((), ("--resume",)):
        expect_error(capsys, tmp_path.name, "--output", tmp_path, *QUICK, *resume)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == files


def test_a_run_that_was_killed_at_once_is_resumed(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / "metrics.json.part").touch()
    assert run("--output", tmp_path, *QUICK, "--resume")["runs"]


def test_all_classes_and_other_data(tmp_path, capsys):
    shutil.copytree(DEMO / "digits", tmp_path / "other digits")
    metrics = run("--output", tmp_path / "run", *QUICK, "--classes", "base", "all", "--eval-data",
                  tmp_path / "other digits", DEMO / "letters")
    base, every = metrics["runs"]
    assert list(base["accuracy"]) == ["base", "novel"]
    assert list(every["accuracy"]) == ["digits", "other digits", "letters"]
    assert every["accuracy"]["digits"] == every["accuracy"]["other digits"]
    assert list(metrics["zero_shot"]) == ["base", "novel", "digits", "other digits", "letters"]
    printed = capsys.readouterr().out
    places = [printed.index(f"| {title} ") for title in
              ("base-to-novel", "cross-dataset", "domain generalisation")]
    assert places == sorted(places)


def test_data_sets_named_like_others_keep_their_own_numbers(tmp_path):
    novel = tmp_path / "novel"
    for c in ("one", "two", "three", "four"):
        shutil.copytree(DEMO / "digits" / c, novel / c)
    metrics = run("--data", novel, *MODEL, "--output", tmp_path / "run", "--epochs", 1,
                  "--shots", 1, "--classes", "base", "all", "--eval-data", novel)
    base, every = metrics["runs"]
    assert list(base["accuracy"]) == ["base", "novel"]
    assert list(every["accuracy"]) == [str(novel)] and str(novel) in metrics["zero_shot"]


def test_saved_prompts_are_evaluated_and_predict(tmp_path, capsys):
    metrics = run("--output", tmp_path / "run", *QUICK)
    prompts = tmp_path / "run" / TITLE / "prompts.pt"
    assert prompts.stat().st_size < 100_000
    loaded = run("--load", prompts, "--output", tmp_path / "loaded")
    assert loaded["runs"][0]["accuracy"] == metrics["runs"][0]["accuracy"]
    run("--load", prompts, "--data", DEMO / "letters", "--classes", "all",
        "--output", tmp_path / "letters")
    capsys.readouterr()

    image = next((DEMO / "digits" / "nine").iterdir())
    main(["--load", str(prompts), "--predict", str(image), "--names", "zero", "nine"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image) and len(lines) == 3
    shares = [float(line.split("%")[0]) for line in lines[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)

    (tmp_path / "pictures").mkdir()
    shutil.copy(image, tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "b.png").write_text("no picture")
    rows = tmp_path / "rows.csv"
    expect_error(capsys, "b.png", "--load", prompts, "--predict", tmp_path / "pictures",
                 "--csv", rows)
    (row,) = csv.DictReader(rows.read_text().splitlines())
    digits = {folder.name for folder in (DEMO / "digits").iterdir()}  # not the tuned half alone
    assert row["path"].endswith("a.png") and row["class"] in digits
    assert 0 < float(row["probability"]) <= 1

    torch.save(small_clip().state_dict(), tmp_path / "other.pt")
    expect_error(capsys, "other weights", "--load", prompts, "--model", tmp_path / "other.pt",
                 "--predict", image)
    saved, bad = runs.load_tensors(prompts, {}), tmp_path / "bad.pt"
    nan = saved["text"] * math.nan
    for words, content in (("finite", saved | {"text": nan}), ("size", saved | {"text": nan[1:]}),
                           ("lam", saved | {"recipe": {"lam": -1}}), ("no text", {"a": 1}),
                           ("flag data", saved | {"flags": saved["flags"] | {"data": None}})):
        torch.save(content, bad)
        expect_error(capsys, words, "--load", bad, "--predict", image)
    bad.write_bytes(prompts.read_bytes()[:1000])
    expect_error(capsys, "damaged", "--load", bad)


def expect_error(capsys, words: str, *args) -> None:
    """One line on stderr that has the words, exit status 2, no traceback."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and error.count("\n") == 0


@pytest.fixture
def odd_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    shutil.copytree(DEMO / "digits" / "one", tmp_path / "single" / "one")
    for c in ("one", "two"):
        shutil.copytree(DEMO / "digits" / c, tmp_path / "broken" / c)
    for image in (tmp_path / "broken" / "two").iterdir():
        image.write_text("not an image")


@pytest.mark.parametrize("words, args", [
    ("no folder", ("--data", "nowhere", *MODEL)),
    ("no class folders", ("--data", "empty", *MODEL)),
    ("two classes", ("--data", "single", *MODEL)),
    ("cannot read the image", ("--data", "broken", *MODEL)),
    ("ViT-X", ("--model", "ViT-X")),
    ("file", ("--model", "file")),
    ("no folder", ("--eval-data", "elsewhere")),
    ("lam is -1", ("--lam", "-1")),
    ("lam is inf", ("--lam", "inf")),
    ("epsilon is 0", ("--epsilon", "0")),
    ("--epsilon: invalid", ("--epsilon", "x")),
    ("epochs is 0", ("--epochs", "0")),
    ("--reg: invalid choice", ("--reg", "wasserstein")),
    ("--predict needs --load", ("--predict", "x.png")),
    ("--workers is -1", ("--workers", "-1")),
    ("no file", ("--classnames", os.devnull)),
    ("--device", ("--device", "cuda:99")),
    ("unrecognized arguments: --shot", ("--shot", "4")),
    ("file", ("--output", "file/x")),
    ("not empty", ("--output", "single")),
    ("not finite", ("--lr", "1e6", "--reg", "none", "--augment", "none")),
])
def test_bad_input_is_one_line(words, args, odd_folders, capsys, tmp_path):
    expect_error(capsys, words, *args)
    assert (tmp_path / "file").read_text() == "mine"


VALUES = ["", " ", "0", "-1", "1", "1e400", "nan", "9" * 400, "ü", "\n", "%s", "a b", "~nobody/x",
          "/dev/null", "None", "[]", "base", "ot", "cuda", "meta", "gelu", "{}", "{0}", "--", "0.5",
          "\udcff"]


def test_any_command_line_ends_in_one_line(capsys, tmp_path, monkeypatch):
    """FUZZ=1000 python -m pytest -k any_command tries more of them."""
    monkeypatch.chdir(tmp_path)
    flags = re.findall(r"(--[a-z-]+)", (HERE / "promptot.py").read_text(encoding="utf-8"))
    flags += [f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(Recipe)]
    flags = sorted({*flags, "--output", "--load", "--predict", "--csv", "--names", "--device",
                    "--workers"})
    rng = random.Random(0)
    for _ in range(int(os.environ.get("FUZZ", 40))):
        args = [[flag, *rng.choices(VALUES, k=rng.choice((0, 1, 1, 1, 2)))]
                for flag in rng.sample(flags, rng.randint(1, 4)) if flag != "--download"]
        expect_error(capsys, "", *sum(args, []), "--data", tmp_path / "nowhere", *MODEL)
    assert not list(tmp_path.iterdir())


def test_torchrun_gives_the_prompts_of_one_process(tmp_path):
    """Two gloo processes share batches and test set."""
    args = ["--epochs", "2", "--shots", "4", "--batch-size", "8", "--reg", "ot", "--device", "cpu"]
    one = run(*args, "--output", tmp_path / "one")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port",
                29500 + os.getpid() % 1000)
    process = start(*args, "--output", tmp_path / "two", python=torchrun, stdout=subprocess.DEVNULL)
    assert process.wait(120) == 0
    prompts = [saved_in(tmp_path / name) for name in ("one", "two")]
    for name in ("text", "vision"):
        torch.testing.assert_close(prompts[0][name], prompts[1][name], rtol=1e-4, atol=1e-6)
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["zero_shot"] == one["zero_shot"]
    for name, value in one["runs"][0]["accuracy"].items():
        assert two["runs"][0]["accuracy"][name] == pytest.approx(value, abs=0.5)


# ---- The report, the house -----------------------------------------------------------------------


def test_results_table():
    found = [{"recipe": {"classes": "base", "reg": reg, "shots": 16},
              "accuracy": {"base": 90.0 + seed, "novel": 60.0}}
             for reg in ("none", "ot") for seed in (1, 3)]
    zero_shot = {"base": 50.0, "novel": 50.0}
    table = {"title": "base-to-novel", "classes": "base", "targets": ["base", "novel"],
             "source": []}
    metrics = {"zero_shot": zero_shot, "zero_shot_template": zero_shot, "runs": found,
               "tables": [table]}
    lines = report.results(metrics).split("\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["base-to-novel", "base", "novel", "HM"]
    assert rows[2] == ['zero-shot, "a photo of a {}."', "50.00", "50.00", "50.00"]
    assert rows[3][:3] == ["tuned, none", "92.00 ± 1.41", "60.00 ± 0.00"]
    hm = [report.harmonic_mean([91, 60]), report.harmonic_mean([93, 60])]
    assert rows[4][3].startswith(f"{sum(hm) / 2:.2f} ±")


def test_durations():
    assert [report.duration(s) for s in (0, 61, 3661)] == ["0:00", "1:01", "1:01:01"]


HOUSE = {"promptot": {"clip_model", "data", "report", "runs"}, "clip_model": {"weights"},
         "runs": {"report", "weights"}, "weights": set(), "data": set(), "report": set()}


@pytest.mark.parametrize("module", HOUSE)
def test_imports_point_one_way(module):
    tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found & set(HOUSE) == HOUSE[module]


SNIPPETS = (HERE / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]


@pytest.mark.parametrize("snippet", [text.split("```")[0] for text in SNIPPETS])
def test_a_snippet_of_the_readme_runs_beside_the_files_that_it_needs(snippet, tmp_path):
    modules = [name for name in HOUSE if re.search(f"from {name} import", snippet)]
    for name in modules:  # which grows by what they import
        modules += [other for other in HOUSE[name] if other not in modules]
        shutil.copy(HERE / f"{name}.py", tmp_path)
    shutil.copy(clip_model.MERGES_FILE, tmp_path)
    (tmp_path / "demo" / "digits" / "three").mkdir(parents=True)
    for file in re.findall(r'"(demo/[^"]*)"', snippet):
        shutil.copy(HERE / file, tmp_path / file)
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)


def test_sinkhorn_and_the_ot_loss_can_be_copied():
    """With the names that the README gives, and nothing else of this file."""
    source = (HERE / "promptot.py").read_text(encoding="utf-8")
    wanted = {"EPSILON", "marginals", "sinkhorn", "transport_cost", "ot_loss"}
    lines = source.splitlines()
    copied = ["import math", "import torch", "from torch import Tensor"]
    for node in ast.parse(source).body:
        names = {target.id for target in getattr(node, "targets", [])} | {getattr(node, "name", "")}
        if names & wanted:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            copied += lines[first - 1 : node.end_lineno]
    space = {}
    exec("\n".join(copied), space)
    torch.testing.assert_close(space["ot_loss"](*features(6)), ot_loss(*features(6)))
