"""Tests: offline, on small models and tiny data; they show what may be relied on.

    python -m pytest -q
"""

import ast
import contextlib
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

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
from clip_model import CLIP, load, pack, tokenize
from promptot import (
    PromptLearner, PromptOT, Recipe, learning_rate, main, ot_loss, sinkhorn, transport_cost, unit,
)

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
    dict(a=torch.tensor([1.5, -0.5])), dict(a=torch.ones(2), b=torch.ones(3)), dict(a=torch.zeros(2)),
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


# ---- Tokenizer. The ids were made with an independent implementation (open_clip's). ---------------

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


# ---- CLIP with prompts, against a slow and obvious second implementation --------------------------


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
    assert texts.tokens.flatten()[texts.ends].tolist() == [9, 9, 9] and texts.ends.tolist() == [3, 4, 9]
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


# ---- Prompts and objective -----------------------------------------------------------------------

NAMES = ["cat", "dog", "great white shark"]


def batch(seed: int = 0, n: int = 4):
    return torch.randn(n, 3, 32, 32, generator=seeded(seed)), torch.arange(n) % len(NAMES)


def make(clip, names=NAMES, **settings) -> PromptOT:
    """The same prompts each time."""
    torch.manual_seed(0)
    return PromptOT(clip, names, Recipe(**settings))


@pytest.mark.parametrize("bad", [
    dict(shots=-1), dict(reg="wasserstein"), dict(lam=math.nan), dict(lam=math.inf), dict(epsilon=0),
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
    assert sum(p.numel() for p in PromptLearner(paper).parameters()) == 61_440


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


def test_an_interrupted_tuning_goes_on_to_the_same_prompts(demo_clip, digits, tmp_path, monkeypatch):
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
    (percent,), (plain, own) = promptot.accuracy(model, few), promptot.accuracy(model, few, tuned=False)
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


# --------------------------------------------------------------------------------------------------
# Data: tiny folders to load

CLASSES = ["red_fox", "tabby", "zebra"]
BENCHMARK_NAMES = [b.name for b in data.BENCHMARKS]


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10)) -> None:
    """A small image of random pixels; the seed makes it its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1])).save(path)


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    for c, count in counts.items():
        for i in range(count):
            picture(root / c / f"{i:03d}.png", 100 * len(c) + i)
    return root


def benchmark(name: str) -> data.Benchmark:
    return next(b for b in data.BENCHMARKS if b.name == name)


def build(name: str, parent: Path) -> Path:
    """A tiny copy of a benchmark: three classes with 3 train, 1 val and 2 test images each."""
    b = benchmark(name)
    home = parent / b.folder
    wnids = [f"n0000000{i}" for i in range(3)]
    if "classnames.txt" in b.files:
        folders = [str(i) for i in range(3)] if name == "ImageNetV2" else wnids
        parts = {"train/": 3, "val/": 2} if name == "ImageNet" else {"": 2}
        for part, count in parts.items():
            class_folders(home / b.images / part, dict.fromkeys(folders, count))
        lines = [f"{w} {c.replace('_', ' ')}" for w, c in zip(wnids, CLASSES)]
        (home / "classnames.txt").write_text("\n".join(lines) + "\n")
        return home
    split = defaultdict(list)
    for label, c in enumerate(CLASSES):
        for i, part in enumerate(["train"] * 3 + ["val"] + ["test"] * 2):
            split[part].append((f"{label}{i}.jpg", label, c))
            picture(home / b.images / f"{label}{i}.jpg", 10 * label + i)
    if name == "FGVCAircraft":
        (home / "variants.txt").write_text("\n".join(CLASSES))
        for part, rows in split.items():
            text = "".join(f"{path[:-4]} {c}\n" for path, _, c in rows)
            (home / f"images_variant_{part}.txt").write_text(text)
    else:
        (home / b.split_file).write_text(json.dumps(split))
    return home


# --------------------------------------------------------------------------------------------------
# Data: benchmarks


@pytest.mark.parametrize("name", BENCHMARK_NAMES)
def test_every_benchmark_is_known_by_its_folder_or_its_files(name, tmp_path):
    home = build(name, tmp_path)
    dataset = data.load_dataset(home)
    assert dataset.name == name and dataset.template == benchmark(name).template
    assert dataset.classnames == ["red fox", "tabby", "zebra"]  # as CLIP reads them
    test_only = name.startswith("ImageNet") and name != "ImageNet"
    counts = [len(dataset.train), len(dataset.val), len(dataset.test)]
    assert counts == ([0, 0, 6] if test_only else [9, 0, 6] if name == "ImageNet" else [9, 3, 6])
    assert all(Path(path).is_file() for path, _ in dataset.train + dataset.val + dataset.test)
    assert [label for _, label in dataset.test] == [0, 0, 1, 1, 2, 2]
    assert not any("compare" in note for note in dataset.notes)

    assert dataclasses.replace(data.load_dataset(tmp_path), root=dataset.root) == dataset  # what holds it
    renamed = home.rename(tmp_path / "my pictures")
    assert data.load_dataset(renamed).name == name


@pytest.mark.parametrize("name", BENCHMARK_NAMES)
def test_a_wrong_tree_gets_the_expected_one(name, tmp_path):
    b = benchmark(name)
    (tmp_path / b.folder).mkdir()
    with pytest.raises(FileNotFoundError) as e:
        data.load_dataset(tmp_path / b.folder)
    for part in (str(tmp_path / b.folder), f"{b.images}/...", *(b.files or [b.split_file])):
        assert part in str(e.value)


@pytest.mark.parametrize("name", ["ImageNetV2", "ImageNet-A"])
def test_imagenet_variants_find_the_names_in_the_sibling_or_where_told(name, tmp_path):
    home = build(name, tmp_path)
    elsewhere = (home / "classnames.txt").rename(tmp_path / "names.txt")
    for told in (None, tmp_path / "typo.txt"):
        with pytest.raises(FileNotFoundError, match="(classnames|typo).txt"):
            data.load_dataset(home, told)
    assert data.load_dataset(home, elsewhere).classnames[0] == "red fox"
    build("ImageNet", tmp_path)
    assert data.load_dataset(home).classnames[0] == "red fox"
    elsewhere.write_text("n00000001 tabby\n")
    with pytest.raises(ValueError, match="has no name for the class folder"):
        data.load_dataset(home, elsewhere)


def test_imagenet_v2_folders_are_lines_of_classnames(tmp_path):
    images = "imagenetv2-matched-frequency-format-val"
    home = class_folders(tmp_path / "imagenetv2", {f"{images}/{i}": 1 for i in range(12)})
    lines = [f"n{i:08d} class {i}" for i in range(12)]
    (home / "classnames.txt").write_text("\n".join(lines))
    dataset = data.load_dataset(home)
    assert dataset.classnames == [f"class {i}" for i in range(12)]
    assert all(Path(path).parent.name == str(label) for path, label in dataset.test)


def test_imagenet_has_names_that_two_classes_share(tmp_path):
    """CLIP's list has "missile" and "sunglasses" twice, and published numbers are with them."""
    home = build("ImageNet", tmp_path)
    (home / "classnames.txt").write_text("n00000000 missile\nn00000001 crane\nn00000002 missile\n")
    dataset = data.load_dataset(home)
    assert dataset.classnames == ["missile", "crane", "missile"]
    assert any("missile" in note for note in dataset.notes)


def test_benchmarks_without_split_file_are_read_from_their_class_folders(tmp_path):
    images = class_folders(tmp_path / "eurosat/2750", {"Forest": 10, "AnnualCrop": 10, "River": 10})
    dataset = data.load_dataset(tmp_path)
    assert dataset.classnames == ["Annual Crop Land", "Forest", "River"]
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [15, 6, 9]
    assert any("do not compare" in note for note in dataset.notes)
    for root in (tmp_path / "eurosat", images):
        assert dataclasses.replace(data.load_dataset(root), root=dataset.root) == dataset
    (tmp_path / "names.txt").write_text("AnnualCrop crops\n")  # goes before CoOp's names
    renamed = data.load_dataset(images, tmp_path / "names.txt")
    assert renamed.classnames == ["crops", "Forest", "River"]
    other_zip = shutil.copytree(images, tmp_path / "EuroSAT_RGB")
    assert data.load_dataset(other_zip).classnames == dataset.classnames

    home = class_folders(tmp_path / "caltech-101", {
        f"101_ObjectCategories/{c}": 4 for c in ("BACKGROUND_Google", "Faces", "lotus")
    })
    assert data.load_dataset(home).classnames == ["face", "lotus"]  # CoOp's, no background
    home = class_folders(tmp_path / "stanford_cars", {"cars_train": 3, "cars_test": 3})
    with pytest.raises(FileNotFoundError, match="split_zhou_StanfordCars.json"):
        data.load_dataset(home)


def test_a_folder_that_holds_several_benchmarks_or_classes_called_like_them(tmp_path):
    build("EuroSAT", tmp_path / "data"), build("DescribableTextures", tmp_path / "data")
    with pytest.raises(ValueError, match="several data sets.*dtd, eurosat"):
        data.load_dataset(tmp_path / "data")
    own = class_folders(tmp_path / "own", {"imagenet": 2, "dtd": 2, "images": 2})
    assert data.load_dataset(own).classnames == ["dtd", "imagenet", "images"]


def change_label(split, old, new):
    for row in itertools.chain(*split.values()):
        row[1] = new if row[1] == old else row[1]


@pytest.mark.parametrize("change, message", [
    (lambda s: s["test"].extend([["a.jpg", 0, "red_fox"], ["b.jpg", 1, "tabby"]]),
     r"no image .*a\.jpg, and 1 more missing"),
    (lambda s: change_label(s, 1, 3), r"labels are not 0, 1, 2, ..., but \[0, 2, 3\]"),
    (lambda s: s["test"][0].__setitem__(2, "dog"), "label 0 has two names, 'red_fox' and 'dog'"),
    (lambda s: [row.__setitem__(2, "red fox") for p in s.values() for row in p if row[1] == 2],
     "two classes have the name 'red fox'"),
    (lambda s: s.update(train=[row for row in s["train"] if row[1] != 1]),
     "no train image of class 'tabby'"),
    (lambda s: s.pop("test"), "not a split file"),
    (lambda s: s["train"].append("x"), "not a split file"),
    (lambda s: change_label(s, 0, 1e999), "not a split file"),
    (lambda s: [p.clear() for p in s.values()], "two classes with names are needed"),
])
def test_bad_split_files(change, message, tmp_path):
    home = build("EuroSAT", tmp_path)
    file = home / "split_zhou_EuroSAT.json"
    split = json.loads(file.read_text())
    change(split)
    file.write_text(json.dumps(split))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        data.load_dataset(home)
    assert "\n" not in str(e.value)


def test_unreadable_json_and_unknown_variant(tmp_path):
    home = build("EuroSAT", tmp_path)
    for content in ('{"train": [', "[]", "3", "[" * 100_000):
        (home / "split_zhou_EuroSAT.json").write_text(content)
        with pytest.raises(ValueError, match="is not a split file"):
            data.load_dataset(home)
    home = build("FGVCAircraft", tmp_path)
    (home / "images_variant_val.txt").write_text("003 Concorde\n")
    with pytest.raises(ValueError, match="Concorde"):
        data.load_dataset(home)


def test_download(tmp_path, monkeypatch):
    def fetched(root, download):
        assert download
        (Path(root) / "fgvc-aircraft-2013b").mkdir()
        build("FGVCAircraft", Path(root)).rename(Path(root) / "fgvc-aircraft-2013b/data")

    def offline(root, download):
        Path(root, "half").mkdir()
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "FGVCAircraft", offline)
    with pytest.raises(OSError, match=r"cannot download FGVCAircraft .*\(no route to host\)$"):
        data.download("FGVCAircraft", tmp_path)
    monkeypatch.setattr(torchvision.datasets, "FGVCAircraft", fetched)
    home = data.download("fgvc_aircraft", tmp_path)
    assert home == tmp_path / "fgvc_aircraft" and len(data.load_dataset(home).train) == 9
    assert [p.name for p in tmp_path.iterdir()] == ["fgvc_aircraft"]  # nothing left lying about
    monkeypatch.setattr(torchvision.datasets, "FGVCAircraft", offline)
    assert data.download("FGVCAircraft", tmp_path) == home  # is there already
    with pytest.raises(ValueError, match="UCF101 cannot be downloaded"):
        data.download("UCF101", tmp_path)


# --------------------------------------------------------------------------------------------------
# Data: folders of one's own


def test_class_folders_are_split_50_20_30(tmp_path):
    """Whatever else is in the folder, and however often it is read."""
    root = class_folders(tmp_path / "pets", {"tabby_cat": 20, "dog": 10, "eel": 2, "fly": 1})
    dataset = data.load_dataset(root)
    assert dataset.name == "pets" and dataset.classnames == ["dog", "eel", "fly", "tabby cat"]
    count = {p: [sum(y == c for _, y in getattr(dataset, p)) for c in range(4)] for p in data.PARTS}
    assert count == {"train": [5, 1, 1, 10], "val": [2, 0, 0, 4], "test": [3, 1, 0, 6]}
    assert "50 / 20 / 30" in dataset.notes[0] and "fly" in dataset.notes[1]  # cannot be tested
    items = dataset.train + dataset.val + dataset.test
    assert len(items) == len(set(items)) == 33

    shutil.rmtree(root / "tabby_cat")
    again = data.load_dataset(root)
    assert again.train == [item for item in dataset.train if item[1] < 3]


@pytest.mark.parametrize("n, counts", [
    (1, [1, 0, 0]), (2, [1, 0, 1]), (3, [2, 0, 1]), (4, [2, 1, 1]), (5, [2, 1, 2]), (10, [5, 2, 3]),
])
def test_few_images_go_to_train_then_test_then_val(n, counts):
    splits = data._split([(str(i), 0) for i in range(n)], ["a"])
    assert [len(splits[part]) for part in data.PARTS] == counts


def test_folders_train_and_test(tmp_path):
    for part, count in {"Training": 3, "test": 2}.items():
        class_folders(tmp_path / part, {"b_c": count, "a": count})
    dataset = data.load_dataset(tmp_path)
    assert dataset.classnames == ["a", "b c"] and dataset.val == []
    assert [y for _, y in dataset.train] == [0, 0, 0, 1, 1, 1] and len(dataset.test) == 4

    class_folders(tmp_path / "test", {"d": 1})
    with pytest.raises(ValueError, match="different classes: 'd'"):
        data.load_dataset(tmp_path)
    shutil.rmtree(tmp_path / "test")
    picture(tmp_path / "test/flat.png")  # of unknown classes
    with pytest.raises(FileNotFoundError, match="neither test/ nor val/"):
        data.load_dataset(tmp_path)
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "Training").rename(tmp_path / "valid")
    assert "valid/ is the test set" in data.load_dataset(tmp_path).notes[-1]
    class_folders(tmp_path, {"train/steam": 2, "tram": 2})
    (tmp_path / "valid").rename(tmp_path / "bus")
    assert data.load_dataset(tmp_path).classnames == ["bus", "train", "tram"]


@pytest.mark.parametrize("files, message", [
    ([], "no class folders"),
    (["a.png"], "no class folders"),
    (["cat/a.png", "dog/"], "no images in .*dog"),
    (["cat/a.png", "cat/b.png"], "two classes with names are needed"),
    (["cat/a.png", "_/b.png"], "two classes with names are needed"),
    (["big_cat/a.png", "big cat/b.png"], "two classes have the name 'big cat'"),
    (["Big_cat/a.png", "big cat/b.png"], "two classes have the name 'big cat'"),  # same tokens
])
def test_bad_folders(files, message, tmp_path):
    for file in files:
        picture(tmp_path / file) if file.endswith("png") else (tmp_path / file).mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder .*nothing"):
        data.load_dataset(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no folder ~nobody"):
        data.load_dataset("~nobody at all/x")


def test_what_is_left_out_and_what_counts_is_noted(tmp_path):
    for file in ("cat/a.JPG", "cat/siam/b.png", "cat/siam/old/c.TIF", "dog/d.jpeg", "dog/e.png"):
        picture(tmp_path / file)
    for file in ("cat/readme.txt", "cat/.DS_Store", "dog/._d.jpeg", ".git/x.png", "__MACOSX/y.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("hello")
    picture(tmp_path / "loose.png")
    dataset = data.load_dataset(tmp_path)
    assert len(dataset.train + dataset.test) == 5
    left_out, deep, _ = dataset.notes
    assert ": 2, " in left_out and "loose.png" in left_out
    assert ": 2, " in deep and "b.png" in deep


def test_links_in_a_circle_and_names_that_are_no_text(tmp_path):
    class_folders(tmp_path, {"a": 2, "b": 2})
    odd = os.fsencode(tmp_path / "b") + b"/new\nline \xff.png"
    try:
        shutil.copy(tmp_path / "b/000.png", odd)
        for link, folder in (("a/up", "."), ("a/again", "a"), ("c", "b")):
            os.symlink(tmp_path / folder, tmp_path / link)
    except OSError:
        pytest.skip("neither links nor such names here")
    dataset = data.load_dataset(tmp_path)
    paths = [path for path, _ in dataset.train + dataset.val + dataset.test]
    assert dataset.classnames == ["a", "b", "c"] and len(paths) == 2 + 3 + 3
    assert odd in map(os.fsencode, paths)
    assert len(list(data.check_images(paths, decode=True))) == len(paths)


def test_own_class_names_and_template(tmp_path):
    root = class_folders(tmp_path / "x", {"ct": 2, "mri": 2, "big cat": 2})
    names = tmp_path / "names.txt"
    names.write_text("\ufeffct computed tomography\nbig cat\tlion\nmr typo\n", encoding="utf-8")
    dataset = data.load_dataset(root, names, "a scan: {}.")
    assert dataset.classnames == ["lion", "computed tomography", "mri"]
    assert dataset.template == "a scan: {}." and data.load_dataset(root).template == data.TEMPLATE
    for template in ("", "a photo", "{} and {}", "{x}", "{0}", "{}{"):
        with pytest.raises(ValueError, match="needs one {}"):
            data.load_dataset(root, template=template)
    for content, message in ((b"mr typo", "no name for the class folder"), (b"\xff", "utf-8")):
        names.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.load_dataset(root, names)


def test_random_trees_are_read_or_refused_in_one_line(tmp_path):
    """A seeded fuzz: every picture of a class is found, in one split, with its class's label."""
    rng = random.Random(0)
    names = ["a", "B b", "train", "Test", "val", ".h", "__x", "imagenet", "n00000001", "2750", "é"]
    for tree in range(60):
        root = tmp_path / str(tree)
        root.mkdir()
        for _ in range(rng.randrange(12)):
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
        for path, label in items:
            assert dataset.classnames[label].replace(" ", "_") in path.replace(" ", "_")


# --------------------------------------------------------------------------------------------------
# Data: protocol


def coop_shots(train, val, shots, seed):
    """What CoOp does, step by step, with Python's own generator: Dassl's
    `split_dataset_by_label` and `generate_fewshot_dataset`, first for train, then for val."""
    random.seed(seed)
    outputs = []
    for source, n in ((train, shots), (val, min(shots, 4))):
        tracker = defaultdict(list)
        for item in source:
            tracker[item[1]].append(item)
        output = []
        for label, items in tracker.items():
            if len(items) >= n:
                sampled = random.sample(items, n)
            else:
                sampled = items
            output.extend(sampled)
        outputs.append(output)
    return outputs


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_shots_are_those_of_coop(shots):
    names = random.Random(0)
    train = [(f"{i}.jpg", names.randrange(7)) for i in range(150)]  # labels in no order
    train += [("few.jpg", 7), ("too few.jpg", 7)]
    val = [(f"v{i}.jpg", names.randrange(8)) for i in range(60)]
    dataset = data.Dataset("x", [str(i) for i in range(8)], train, val, [])
    for seed in (0, 1, 2, 3):
        rng = random.Random(seed)
        ours = [data.few_shot(train, shots, rng), data.few_shot(val, min(shots, 4), rng)]
        assert ours == coop_shots(train, val, shots, seed)
        assert data.few_shot_source(dataset, shots, seed, "all").train == ours[0]
        base = data.few_shot_source(dataset, shots, seed)  # sampled first, reduced then
        assert base.train == [item for item in ours[0] if item[1] < 4]
        assert len(base.classnames) == 4
    assert data.few_shot(train, 0, rng) == train


def coop_base_novel(train, test, classnames):
    """CoOp's `subsample_classes`."""
    labels = sorted({y for _, y in train})
    m = math.ceil(len(labels) / 2)
    for selected in (labels[:m], labels[m:]):
        relabeler = {y: y_new for y_new, y in enumerate(selected)}
        yield [classnames[y] for y in selected], *(
            [(path, relabeler[y]) for path, y in items if y in selected] for items in (train, test)
        )


@pytest.mark.parametrize("n", [2, 5, 10])
def test_base_and_novel_are_those_of_coop(n):
    items = [(f"{i}.jpg", (7 * i) % n) for i in range(40)]
    names = [f"c{i}" for i in range(n)]
    dataset = data.Dataset("x", names, items[:20], items[:4], items[20:], template="{}!")
    expected = coop_base_novel(dataset.train, dataset.test, dataset.classnames)
    for part, (classnames, train, test) in zip(data.base_novel(dataset), expected):
        assert (part.classnames, part.train, part.test) == (classnames, train, test)
        assert part.template == "{}!"
    assert len(part.notes) == (n == 2)  # accuracy on a single novel class is 100 %


def test_what_is_tested_has_names_of_its_own():
    own, novel, other, again = (
        data.Dataset(name, ["a", "b"], [], [], [(f"{root}.png", 1)], root=root)
        for name, root in [("x", "1/x"), ("novel", "2/novel"), ("y", "3/y"), ("x", "4/x")]
    )
    targets = data.evaluation_targets(own, ["base", "all"], [novel, other, again])
    assert targets == {
        "base": dict(zip(("base", "novel"), data.base_novel(own))),
        "all": {"x": own, "2/novel": novel, "y": other, "4/x": again},
    }
    assert list(data.evaluation_targets(own, ["base"], [other])["base"]) == ["base", "novel", "y"]


# --------------------------------------------------------------------------------------------------
# Data: images


def test_test_transform_is_resize_crop_normalise():
    """Pixel by pixel against Pillow: the smaller edge to 16, then the centre."""
    image = Image.frombytes("RGB", (64, 32), random.Random(0).randbytes(3 * 64 * 32))
    crop = image.resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    x = data.test_transform(16)(image)
    assert x.shape == (3, 16, 16)
    expected = pil_to_tensor(crop) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))
    torch.testing.assert_close(x, (expected - mean) / std)
    plain = data.train_transform(16, "none", mean=(0,) * 3, std=(1,) * 3)
    torch.testing.assert_close(plain(image), expected)


@pytest.mark.parametrize("augment, smallest, flips", [("field", 0.08, 0.5), ("gentle", 0.6, 0)])
def test_train_transform_crops_and_flips(augment, smallest, flips):
    """On a ramp from left to right the range of values is the width of the crop."""
    torch.manual_seed(0)
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")  # 256 x 256, 0 to 255
    transform = data.train_transform(32, augment, mean=(0,) * 3, std=(1,) * 3)
    assert transform.transforms[0].interpolation.value == "bicubic"
    pixels = torch.stack([transform(ramp)[0, 16] for _ in range(400)])  # a row of each, (400, 32)
    slope = pixels[:, 0] - pixels[:, -1]
    slope = slope if (slope > 0).float().mean() > 0.4 else -slope
    assert abs((slope < 0).float().mean() - flips) < 0.1 or flips == 0 and (slope > 0).all()
    widths = slope.abs() * 32 / 31
    assert widths.min() > math.sqrt(smallest * 3 / 4) - 0.05 and widths.max() > 0.95
    # area uniform in (smallest, 1), log ratio uniform: the mean of sqrt(area)
    expected = 2 / 3 * (1 - smallest**1.5) / (1 - smallest)
    assert abs(widths.mean() - expected) < 0.05
    with pytest.raises(ValueError, match="field, gentle, none"):
        data.train_transform(32, "strong")


GREY = Image.frombytes("L", (3, 1), bytes([0, 100, 200]))


def floats(*values: float) -> Image.Image:
    return Image.frombytes("F", (3, 1), struct.pack("3f", *values))


@pytest.mark.parametrize("image, expected", [
    *((GREY.convert(mode), [0, 100, 200]) for mode in ("L", "P", "LA", "RGBA", "CMYK", "I", "F")),
    (GREY.convert("1"), [0, 0, 255]),
    (Image.frombytes("I;16", (3, 1), struct.pack("<3H", 0, 25700, 65535)), [0, 100, 255]),
    (Image.frombytes("I;16", (3, 1), struct.pack("<3H", 0, 100, 255)), [0, 100, 255]),
    (Image.frombytes("I", (3, 1), struct.pack("=3i", -5, 2**30, 2**31 - 1)), [0, 128, 255]),
    (floats(0, 0.2, 1), [0, 51, 255]),
    (floats(math.nan, -math.inf, 200), [0, 0, 200]),
    (floats(0, 1e38, 2e38), [0, 128, 255]),
    (Image.frombytes("LA", (3, 1), bytes([0, 0, 0, 102, 0, 255])), [255, 153, 0]),  # on white
])
def test_all_kinds_of_images_become_rgb(image, expected, tmp_path):
    image.save(tmp_path / "x.tiff")
    rgb = data.open_image(str(tmp_path / "x.tiff"))
    assert rgb.mode == "RGB" and [rgb.getpixel((i, 0)) for i in range(3)] == [
        (value,) * 3 for value in expected
    ]


def test_animation_transparent_colour_and_orientation(tmp_path):
    path = str(tmp_path / "x.gif")
    frames = [Image.new("P", (2, 1), i) for i in (0, 1)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 255, 0])
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert data.open_image(path).getpixel((0, 0)) == (255, 0, 0)
    frames[0].save(path, transparency=0)
    assert data.open_image(path).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was turned: row 0 is the right side
    GREY.save(tmp_path / "x.png", exif=exif)
    turned = data.open_image(str(tmp_path / "x.png"))
    assert turned.size == (1, 3) and turned.getpixel((0, 2)) == (200, 200, 200)


# As data.py has it for every process; pytest takes such filters back.
BOMBS = "error::PIL.Image.DecompressionBombWarning"


def broken(path: Path, kind: str) -> str:
    picture(path, size=(64, 64))
    content = path.read_bytes()
    if kind in ("long", "bomb"):
        Image.new("1", {"long": (5000, 1), "bomb": (10_000, 10_000)}[kind]).save(path)
    elif kind == "missing":
        path.unlink()
    else:
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
        path.write_bytes({"empty": b"", "eps": eps, "cut": content[: len(content) // 2]}[kind])
    return str(path)


@pytest.mark.filterwarnings(BOMBS)
@pytest.mark.parametrize("kind", ["empty", "eps", "cut", "bomb", "long", "missing"])
def test_a_broken_image_is_named_in_one_line(kind, tmp_path):
    picture(tmp_path / "fine.png")
    path = broken(tmp_path / "x.png", kind)
    items = [(str(tmp_path / "fine.png"), 0), (path, 1)]
    checked = data.check_images([p for p, _ in items], decode=True)
    assert next(checked) == items[0][0]
    for look in (lambda: next(checked), lambda: data.open_image(path),
                 lambda: list(data.test_loader(items, data.test_transform(8), 4))):
        with pytest.raises(data.ImageError) as e:
            look()
        assert str(e.value).startswith(f"cannot read the image {path} (")
        assert "\n" not in str(e.value)
    if kind == "eps":  # is not even looked at, or Ghostscript would be started
        assert "cannot identify" in str(e.value)
    if kind == "cut":  # its header is fine
        assert list(data.check_images([path])) == [path]


# --------------------------------------------------------------------------------------------------
# Data: batches


@pytest.fixture
def items(tmp_path):
    class_folders(tmp_path, {"a": 5, "bb": 6})
    dataset = data.load_dataset(tmp_path)
    return dataset.train + dataset.val + dataset.test  # 11


def epochs_of(loader, epochs) -> list:
    """All batches of some epochs."""
    batches = []
    for epoch in epochs:
        loader.batch_sampler.set_epoch(epoch)
        batches += list(loader)
    return batches


@pytest.mark.parametrize("n, batch_size, sizes", [(11, 4, [4, 4]), (8, 4, [4, 4]), (6, 8, [6])])
def test_an_epoch_is_a_permutation_without_the_last_incomplete_batch(n, batch_size, sizes):
    batches, other = (data.EpochBatches(n, batch_size, seed) for seed in (1, 2))
    orders = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        other.set_epoch(epoch)
        assert list(map(len, batches)) == sizes and len(batches) == len(sizes)
        draws = [draw for batch in batches for draw in batch]
        assert {e for e, _ in draws} == {epoch} and list(other) != list(batches)
        orders.append([index for _, index in draws])
        assert len(set(orders[-1])) == sum(sizes) and set(orders[-1]) <= set(range(n))
    assert orders[0] != orders[1] != orders[2]


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
    first, other = (data.Images(items, data.train_transform(8), seed) for seed in (1, 2))
    torch.manual_seed(0)
    state, python_state = torch.get_rng_state(), random.getstate()
    for draw in [(0, 3), (1, 3), (0, 4)]:
        assert torch.equal(first[draw][0], first[draw][0]) and first[draw][1] == items[draw[1]][1]
    assert torch.equal(torch.get_rng_state(), state)  # the program's own randomness is untouched
    assert random.getstate() == python_state
    assert not torch.equal(first[0, 3][0], first[1, 3][0])
    assert not torch.equal(first[0, 3][0], other[0, 3][0])
    twins = data.Images([items[0]] * 2, data.train_transform(8), seed=1)
    assert not torch.equal(twins[0, 0][0], twins[0, 1][0])


def test_loaders_give_the_same_with_and_without_workers_and_in_shares(items):
    def run(epochs=range(3), **kwargs):
        loader = data.train_loader(items, data.train_transform(8), 4, seed=1, **kwargs)
        assert len(loader) == 2
        return epochs_of(loader, epochs)

    state = torch.get_rng_state()
    alone = run()
    assert torch.equal(torch.get_rng_state(), state)
    assert alone[0][0].shape == (4, 3, 8, 8) and alone[0][1].dtype == torch.long
    shares = [
        [torch.cat(parts) for parts in zip(a, b)]
        for a, b in zip(run(rank=0, world=2), run(rank=1, world=2))
    ]
    for other in (run(workers=2), shares, alone[:2] + run(epochs=range(1, 3), workers=1)):
        for (x, y), (x2, y2) in zip(alone, other, strict=True):
            assert torch.equal(x, x2) and torch.equal(y, y2)
    assert torch.equal(torch.get_rng_state(), state)


def test_test_loader_keeps_the_order(items):
    for workers in (0, 2):
        batches = list(data.test_loader(items, data.test_transform(8), 4, workers))
        assert [len(y) for _, y in batches] == [4, 4, 3]
        assert torch.cat([y for _, y in batches]).tolist() == [y for _, y in items]


@pytest.mark.filterwarnings(BOMBS)
@pytest.mark.parametrize("start", multiprocessing.get_all_start_methods())
def test_workers_however_they_are_started(start, items, tmp_path):
    """Spawned ones (Windows, macOS) get all that they need by pickle; errors keep to one line."""
    loader = data.train_loader(items, data.train_transform(8), 4, seed=1, workers=1)
    expected = epochs_of(data.train_loader(items, data.train_transform(8), 4, seed=1), range(2))
    loader.multiprocessing_context = start
    for (x, y), (x2, y2) in zip(expected, epochs_of(loader, range(2)), strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    path = broken(tmp_path / "x.png", "bomb")  # which a new process must not just warn of
    loader = data.test_loader([*items, (path, 0)], data.test_transform(8), 6, workers=1)
    loader.multiprocessing_context = start
    batches = iter(loader)
    next(batches)
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
    assert "HM" in (tmp_path / "run" / "results.md").read_text()
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
    whole, killed = (runs.read_prompts(tmp_path / d / TITLE / "prompts.pt") for d in ("whole", "killed"))
    assert torch.equal(whole["text"], killed["text"])
    assert torch.equal(whole["vision"], killed["vision"])


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
    metrics = run("--data", novel, *MODEL, "--output", tmp_path / "run", "--epochs", 1, "--shots", 1,
                  "--classes", "base", "all", "--eval-data", novel)
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

    torch.save(small_clip().state_dict(), tmp_path / "other.pt")
    expect_error(capsys, "other weights", "--load", prompts, "--model", tmp_path / "other.pt",
                 "--predict", image)
    saved, bad = runs.read_prompts(prompts), tmp_path / "bad.pt"
    nan = saved["text"] * math.nan
    for words, content in (("finite", saved | {"text": nan}), ("size", saved | {"text": nan[1:]}),
                           ("lam", saved | {"recipe": {"lam": -1}}), ("no text", {"a": 1})):
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
    ("--device", ("--device", "cuda:99")),
    ("unrecognized arguments: --shot", ("--shot", "4")),
    ("file", ("--output", "file/x")),
    ("not empty", ("--output", "single")),
    ("not finite", ("--lr", "1e6", "--reg", "none", "--augment", "none")),
])
def test_bad_input_is_one_line(words, args, odd_folders, capsys, tmp_path):
    expect_error(capsys, words, *args)
    assert (tmp_path / "file").read_text() == "mine"


def test_torchrun_gives_the_prompts_of_one_process(tmp_path):
    """Two gloo processes share batches and test set."""
    args = ["--epochs", "2", "--shots", "4", "--batch-size", "8", "--reg", "ot", "--device", "cpu"]
    one = run(*args, "--output", tmp_path / "one")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port",
                29500 + os.getpid() % 1000)
    process = start(*args, "--output", tmp_path / "two", python=torchrun, stdout=subprocess.DEVNULL)
    assert process.wait(120) == 0
    prompts = [runs.read_prompts(tmp_path / d / TITLE / "prompts.pt") for d in ("one", "two")]
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
    table = {"title": "base-to-novel", "classes": "base", "targets": ["base", "novel"], "source": []}
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


def test_imports_point_one_way():
    """What may be copied without what: see README."""
    allowed = {"promptot": {"clip_model", "data", "report", "runs"}, "clip_model": {"weights"},
               "runs": {"report", "weights"}, "weights": set(), "data": set(), "report": set()}
    for module, others in allowed.items():
        tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
        found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                 for alias in node.names}
        found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert found & set(allowed) <= others, module


def test_the_readmes_snippets_run(monkeypatch):
    monkeypatch.chdir(HERE)
    snippets = (HERE / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet.split("```")[0], {})
