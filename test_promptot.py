"""Tests: offline, on small models and tiny data. They also show how the pieces are used.

python -m pytest -q
python -m pytest -q -k sinkhorn      # also: ot_loss, image_prompts, text_prompts, training
"""

import argparse
import collections
import contextlib
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip_model
import data
import promptot
import runs
import weights
from clip_model import CLIP, load, tokenize
from promptot import PromptLearner, PromptOT, Recipe, main, ot_loss, sinkhorn, unit
from weights import find, read_tensors, read_weights

pytestmark = pytest.mark.filterwarnings("error:::(promptot|clip_model|weights|data|runs)$")
torch.set_num_threads(1)  # models this small are not faster with more
HERE = Path(__file__).parent
DEMO = HERE / "demo"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_clip(**options) -> CLIP:
    """A random CLIP. Its towers differ in width, number of heads and depth."""
    sizes = {"embed_dim": 16, "image_resolution": 32, "patch_size": 8}
    vision = {"vision_width": 128, "vision_layers": 3}
    clip = CLIP(**sizes, **vision, text_width=64, text_layers=4, **options)
    generator = seeded()
    for name, p in clip.named_parameters():
        scale = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1  # keeps signals at their size
        p.data = scale * torch.randn(p.shape, generator=generator)
        if "ln_" in name and name.endswith("weight"):
            p.data += 1
    clip.logit_scale.data.fill_(2.5)
    return clip.requires_grad_(False).eval()


def assert_refused(words: str, function, path: Path, *args) -> None:
    """The error is one line that names the file or folder. words: a regular expression."""
    with pytest.raises((ValueError, OSError), match=words) as error:
        function(path, *args)
    assert path.name in str(error.value) and "\n" not in str(error.value), error.value


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return small_clip()


@pytest.fixture(scope="module")
def demo_clip() -> CLIP:
    return load(DEMO / "tiny-clip.pt")


# ---- Sinkhorn ------------------------------------------------------------------------------------
def exact_transport(cost):
    """The cheapest permutation by brute force. It is optimal for uniform marginals (Birkhoff)."""
    n = len(cost)
    permutations = torch.tensor(list(itertools.permutations(range(n))))  # (n!, n)
    return cost[torch.arange(n), permutations].mean(dim=1).min()


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_sinkhorn_costs_at_most_epsilon_log_n_more_than_exact_transport(n):
    """The entropy of a plan is between log n (a permutation's) and 2 log n (the uniform plan's)."""
    for seed, epsilon in itertools.product(range(10), (0.1, 0.05)):
        cost = torch.rand(n, n, generator=seeded(seed))
        plan = sinkhorn(cost, epsilon=epsilon)
        excess = (plan * cost).sum() - exact_transport(cost)
        assert -1e-4 < excess < epsilon * math.log(n) + 1e-4


def test_sinkhorn_two_by_two_closed_form():
    """With cost d off the diagonal, the plan is [[x, y], [y, x]] with y / x = exp(-d / epsilon)."""
    for d, epsilon in [(1.0, 0.5), (0.3, 0.1), (-2.0, 1.0)]:
        ratio = math.exp(-d / epsilon)
        x = 0.5 / (1 + ratio)
        plan = sinkhorn(torch.tensor([[0.0, d], [d, 0.0]]), epsilon=epsilon)
        torch.testing.assert_close(plan, torch.tensor([[x, x * ratio], [x * ratio, x]]))


@pytest.mark.parametrize("n, m", [(4, 4), (1, 5), (7, 3), (30, 70)])
@pytest.mark.parametrize("epsilon", [10.0, 0.1, 0.01])
def test_sinkhorn_marginals_and_optimality(n, m, epsilon):
    """The optimal plan is the only one with these sums that has the form u_i v_j exp(-C / eps)."""
    cost = torch.rand(n, m, generator=seeded(n * m), dtype=torch.float64)
    a, b = (torch.rand(k, generator=seeded(k), dtype=torch.float64).softmax(0) for k in (n, m))
    plan = sinkhorn(cost, a, b, epsilon=epsilon)
    torch.testing.assert_close(plan.sum(0), b)
    assert (plan.sum(1) - a).abs().sum() <= 1e-4
    log = plan.log() + cost / epsilon  # = log u_i + log v_j
    interaction = log - log.mean(0) - log.mean(1, keepdim=True) + log.mean()
    assert interaction.abs().max() < 1e-6


def test_sinkhorn_does_not_underflow():
    """A constant added to all costs changes no plan, even where exp(-cost / epsilon) is zero."""
    cost = torch.rand(4, 4, generator=seeded(), dtype=torch.float64)
    plans = [sinkhorn(cost + constant, epsilon=0.01) for constant in (0, 20)]
    torch.testing.assert_close(*plans, atol=1e-6, rtol=0)


def test_sinkhorn_solves_batches_of_problems():
    """Leading dimensions are independent problems, and those of the marginals broadcast."""
    cost = torch.rand(2, 3, 5, 6, generator=seeded())
    a = torch.rand(2, 1, 5, generator=seeded())
    a[..., 0] = 0  # the first row has no mass
    a = a / a.sum(-1, keepdim=True)
    plans = sinkhorn(cost, a, epsilon=0.05, tol=1e-7)
    assert (plans[..., 0, :] == 0).all()
    for i, j in itertools.product(range(2), range(3)):
        alone = sinkhorn(cost[i, j], a[i, 0], epsilon=0.05, tol=1e-7)
        torch.testing.assert_close(plans[i, j], alone, atol=1e-6, rtol=0)
        turned = sinkhorn(cost[i, j].T, None, a[i, 0], epsilon=0.05, tol=1e-7)
        torch.testing.assert_close(turned.T, alone, atol=1e-6, rtol=0)


def test_sinkhorn_of_half_precision_returns_fp32():
    cost = torch.rand(8, 8, generator=seeded()).bfloat16()
    plan = sinkhorn(cost, epsilon=0.05)
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan, sinkhorn(cost.float(), epsilon=0.05))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plan, sinkhorn(cost, epsilon=0.05))


def test_sinkhorn_warns_when_iterations_are_too_few():
    cost = torch.rand(20, 20, generator=seeded())
    with pytest.warns(UserWarning, match="3 iterations"):
        plan = sinkhorn(cost, epsilon=1e-3, max_iter=3)
    torch.testing.assert_close(plan.sum(0), torch.full((20,), 1 / 20))  # columns are exact


@pytest.mark.parametrize("bad", [{"epsilon": 0.0}, {"epsilon": math.nan}, {"a": torch.ones(2)}])
def test_sinkhorn_rejects_invalid_arguments(bad):
    with pytest.raises(ValueError):
        sinkhorn(torch.rand(2, 3), **bad)


# ---- The OT loss ---------------------------------------------------------------------------------
def features(n: int, dim: int = 8) -> list[torch.Tensor]:
    generator = seeded()
    return [unit(torch.randn(n, dim, generator=generator)) for _ in range(4)]


def test_ot_loss_cost_is_half_the_squared_distance_of_joint_features():
    image, text, image0, text0 = features(6)
    loss, plan = ot_loss(image, text, image0, text0, epsilon=0.05)
    cost = torch.cdist(torch.cat([image, text], 1), torch.cat([image0, text0], 1)).square() / 2
    torch.testing.assert_close(plan, sinkhorn(cost, epsilon=0.05), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, (plan * cost).sum())


def test_ot_loss_gradient_holds_the_plan_constant():
    """By the envelope theorem, this is the gradient of the entropic objective."""
    image, text, image0, text0 = (x.double() for x in features(6))
    image.requires_grad_(), text.requires_grad_()
    loss, plan = ot_loss(image, text, image0, text0, epsilon=0.05)
    loss.backward()
    assert not plan.requires_grad
    torch.testing.assert_close(image.grad, -plan @ image0)
    torch.testing.assert_close(text.grad, -plan @ text0)

    def objective(image):  # <pi, C> - epsilon H(pi)
        loss, plan = ot_loss(image, text, image0, text0, epsilon=0.05)
        return loss + 0.05 * (plan * plan.log()).sum()

    step = 1e-2 * torch.randn(image.shape, generator=seeded())
    difference = (objective(image + step) - objective(image - step)) / 2
    torch.testing.assert_close(difference, (image.grad * step).sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("n", [4, 6])
def test_ot_loss_is_within_one_per_cent_of_exact_transport(n):
    """On features like CLIP's, which are all alike, moved a little and a lot by tuning."""
    for seed, moved in itertools.product(range(5), (0.1, 1, 2)):
        generator = seeded(seed)
        image0 = unit(torch.randn(n, 64, generator=generator) + 1)
        image = unit(image0 + moved * torch.randn(n, 64, generator=generator) / 8)
        loss, _ = ot_loss(image, image, image0, image0)
        exact = exact_transport(2 - 2 * image @ image0.T)
        torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)


def test_ot_loss_pointwise_and_modalities():
    image, text, image0, text0 = features(5)
    image_cost, text_cost = 1 - image @ image0.T, 1 - text @ text0.T
    loss, plan = ot_loss(image, text, image0, text0, pointwise=True)
    torch.testing.assert_close(plan, torch.eye(5) / 5)
    torch.testing.assert_close(loss, (image_cost + text_cost).diagonal().mean())
    for modality, cost in (("image", image_cost), ("text", text_cost)):
        loss, plan = ot_loss(image, text, image0, text0, epsilon=0.05, modality=modality)
        torch.testing.assert_close(plan, sinkhorn(cost, epsilon=0.05))
        torch.testing.assert_close(loss, (plan * cost).sum())


# ---- Tokenizer. The ids come from an independent implementation, open_clip's. --------------------
KNOWN_IDS = {
    "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
    "": [],
    "  Hello\t WORLD!\n": [3306, 1002, 256],
    "it's we'll o'clock": [585, 568, 649, 1342, 334, 262, 6716],
    "&amp;lt;b&amp;gt; &eacute;": [283, 321, 285, 4166],
    "naïve café ☕ 日本語": [1097, 35689, 563, 15304, 26561, 39121, 44353, 34002, 508],
    "<|endoftext|>": [27, 347, 40786, 4160, 91, 285],
    "\ufb01ne \ufb02ow": [3797, 5608],
    "Ünï\u0301cøde": [6522, 77, 157, 116, 107, 66, 17483, 654],
    "don’t “quote”": [847, 713, 257, 4020, 257],
}


def test_tokenizer_ids():
    tokens = tokenize(list(KNOWN_IDS))
    assert tokens.shape == (len(KNOWN_IDS), 77) and tokens.dtype == torch.long
    for row, ids in zip(tokens.tolist(), KNOWN_IDS.values()):
        assert row == [49406, *ids, 49407] + [0] * (75 - len(ids))


def test_tokenizer_length_limit():
    long = "cat " * 101
    with pytest.raises(ValueError, match="has 103 tokens, but the limit is 77"):
        tokenize(long)
    assert tokenize(long, truncate=True).tolist() == [[49406, *[2368] * 75, 49407]]
    assert tokenize("a cat", context_length=4).tolist() == [[49406, 320, 2368, 49407]]


# ---- CLIP with prompts, against a slow and obvious second implementation -------------------------
def slow_block(block, x, causal):
    """One row of tokens (L, W), one head at a time, with softmax written out."""
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


def assert_same_features_and_gradients(fast, slow, prompts):
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(x.sin().sum(), prompts)[0] for x in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_image_prompts_enter_each_layer(clip, depth):
    images = torch.randn(2, 3, 32, 32, generator=seeded(depth))
    prompts = torch.randn(depth, 4, 128, generator=seeded(depth), requires_grad=True)
    slow = torch.stack([slow_encode_image(clip, image, prompts) for image in images])
    assert_same_features_and_gradients(clip.encode_image(images, prompts), slow, prompts)


def test_image_prompts_none_is_plain_clip(clip):
    """So one copy of the weights is the tuned model and its frozen teacher."""
    images = torch.randn(2, 3, 32, 32, generator=seeded())
    plain = clip.encode_image(images)
    assert torch.equal(plain, clip.encode_image(images, torch.zeros(0, 4, 128)))
    slow = slow_encode_image(clip, images[0], torch.zeros(1, 0, 128))
    torch.testing.assert_close(plain[0], slow, rtol=1e-4, atol=1e-5)


TEXTS = ["a photo of a cat.", "a photo of a very long-haired dachshund.", "a photo of a ox"]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_text_prompts_enter_each_layer(clip, depth):
    prompts = torch.randn(depth, 4, 64, generator=seeded(depth), requires_grad=True)
    tokens = tokenize(TEXTS)
    slow = torch.stack([slow_encode_text(clip, row, prompts) for row in tokens])
    assert_same_features_and_gradients(clip.encode_text(tokens, prompts), slow, prompts)


def test_text_prompts_do_not_mix_texts_in_a_row(clip):
    """Packing texts into rows, and leaving out what follows their ends, is exact."""
    texts = [f"a photo of a {'very ' * (i % 30)}old thing." for i in range(50)] + TEXTS
    prompts = torch.randn(3, 4, 64, generator=seeded())
    for learned, slow_prompts in ((prompts, prompts), (None, torch.zeros(1, 0, 64))):
        together = clip.encode_text(tokenize(texts), learned)
        for row, text in zip(together, texts):
            alone = slow_encode_text(clip, tokenize(text)[0], slow_prompts)
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_activation_and_heads_matter():
    """They are not in the weights: the activations against their formulas, and the fingerprint."""
    x = torch.linspace(-3, 3, 7)
    quick, exact = (clip_model.ACTIVATIONS[name]()(x) for name in ("quickgelu", "gelu"))
    torch.testing.assert_close(quick, x * torch.sigmoid(1.702 * x))
    torch.testing.assert_close(exact, x * (1 + torch.erf(x / 2**0.5)) / 2)
    options = ({}, {"activation": "gelu"}, {"head_width": 32}, {"mean": (0.5,) * 3})
    assert len({clip_model.fingerprint(small_clip(**o)) for o in options}) == len(options)


# ---- Weights: every layout -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return small_clip(vocab_size=50).half().state_dict()


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """8 bytes with the header's length, the header (JSON), the numbers."""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for key, tensor in tensors.items():
        content = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
        entry = {"dtype": names[tensor.dtype], "shape": [*tensor.shape]}
        header[key] = entry | {"data_offsets": [len(body), len(body) + len(content)]}
        body += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


TO_TRANSFORMERS = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "visual.": "",
    "attn.": "self_attn.",
    "c_fc": "fc1",
    "c_proj": "fc2",
    "positional_embedding": "embeddings.position_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "token_embedding": "embeddings.token_embedding",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm",
    "transformer.resblocks": "encoder.layers",
    "ln_": "layer_norm",
}


def as_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """OpenAI's keys -> those of CLIPModel."""
    result = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    for key, tensor in state.items():
        tower = "vision_model." if key.startswith("visual.") else "text_model."
        for ours, theirs in TO_TRANSFORMERS.items():
            key = key.replace(ours, theirs)
        if "projection" in key or "logit" in key:
            result[key] = tensor.T if tensor.ndim else tensor
        elif "in_proj_" in key:
            for part, third in zip("qkv", tensor.chunk(3)):
                result[tower + key.replace("in_proj_", f"{part}_proj.")] = third.clone()
        else:
            result[tower + key] = tensor
    return result


def as_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        k if k.startswith(("visual", "logit")) else f"text.{k}": v if v.ndim else v[None]
        for k, v in state.items()
    }


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: tensor for key, tensor in state.items()}


def as_module(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = small_clip(vocab_size=50)
    model.load_state_dict(state, assign=True)
    return torch.nn.DataParallel(model)


LAYOUTS = {
    "OpenAI": lambda state: state | {"input_resolution": torch.tensor(32)},
    "open_clip": as_open_clip,
    "transformers": as_transformers,
    "compiled": lambda state: prefixed("_orig_mod.module.", as_open_clip(state)),
    "checkpoint": lambda state: {"model": as_transformers(state), "optimizer": {0: torch.ones(2)}},
    "Lightning": lambda state: {"state_dict": prefixed("net.clip.", state) | {"net.head": ONES}},
    "module": lambda state: {"net": as_module(state), "args": argparse.Namespace(lr=0.1)},
}
ONES = torch.ones(128, 16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_openais_keys(state, tmp_path, layout, dtype):
    expected = {key: tensor.to(dtype) for key, tensor in state.items()}
    tensors = LAYOUTS[layout](expected)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    torch.testing.assert_close(dict(read_weights(tmp_path).state), expected, rtol=0, atol=0)
    assert bool(read_weights(tmp_path).notes) == (layout != "OpenAI")
    if all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        save_safetensors(tensors, tmp_path / "model.safetensors")
        found = read_weights(tmp_path / "model.safetensors").state
        torch.testing.assert_close(dict(found), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_torchscript_archives_are_read_without_torch_jit(tmp_path, monkeypatch):
    """OpenAI's files are such archives."""
    inner = torch.nn.Sequential(torch.nn.Linear(6, 7).half())
    module = torch.nn.Sequential(torch.nn.Linear(5, 6), inner)
    torch.jit.script(module).save(str(tmp_path / "model.pt"))
    monkeypatch.setattr(torch.jit, "load", None)
    layers = read_tensors(tmp_path / "model.pt")
    assert torch.equal(layers["0"]["weight"], module[0].weight)
    assert torch.equal(layers["1"]["0"]["bias"], inner[0].bias)  # in fp16


def test_activation_heads_and_normalisation_come_from_the_config(state, tmp_path):
    def write(name, **config):
        (tmp_path / name).write_text(json.dumps(config))

    torch.save(as_transformers(state), tmp_path / "pytorch_model.bin")
    tower = {"hidden_act": "gelu", "hidden_size": 128, "num_attention_heads": 4}
    write("config.json", text_config={"hidden_act": "gelu"}, vision_config=tower)
    write("preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    assert read_weights(tmp_path)[1:] == ("gelu", 32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), ())
    write("config.json")  # every field has a default
    assert read_weights(tmp_path)[1:3] == ("quickgelu", 64)

    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    model = {"quick_gelu": True, "vision_cfg": {"head_width": 32}}
    colours = {"mean": [0.5] * 3, "std": [0.2] * 3}
    write("open_clip_config.json", model_cfg=model, preprocess_cfg=colours)
    assert read_weights(tmp_path)[1:] == ("quickgelu", 32, (0.5,) * 3, (0.2,) * 3, ())
    write("open_clip_config.json")
    found = read_weights(tmp_path)
    assert found.activation == "gelu" and "--activation quickgelu" in found.notes[0]
    (tmp_path / "open_clip_config.json").unlink()
    found = read_weights(tmp_path)
    assert found.activation == "quickgelu" and "--activation gelu" in found.notes[0]
    assert read_weights(tmp_path, "gelu")[1:] == ("gelu", 64, weights.MEAN, weights.STD, ())


# ---- Weights: what is refused, and that no code is run -------------------------------------------
def test_configs_that_are_not_supported_are_refused_by_name(state, tmp_path):
    torch.save(as_transformers(state), tmp_path / "model.bin")
    gelu, relu = {"hidden_act": "gelu"}, {"hidden_act": "relu"}
    for config, complaint in (
        ({"model_type": "siglip"}, "siglip"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps 1e-06"),
        ({"vision_config": relu, "text_config": relu}, "relu"),
        ({"vision_config": gelu}, "quick_gelu"),  # the default in text_config
        ({"vision_config": [1]}, "config.json: "),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert_refused(complaint, read_weights, tmp_path / "model.bin")


def test_checkpoints_that_are_not_one_clip_are_refused_by_name(state, tmp_path):
    transformers = as_transformers(state)
    for content, complaint in (
        (state | {"visual.trunk.x": ONES}, "timm"),
        (state | {"visual.attnpool.x": ONES}, "ResNet"),
        (state | {"logit_bias": ONES}, "SigLIP"),
        (state | {"visual.proj": ONES.log() / 0}, "visual.proj"),
        (state | {"visual.proj": ONES.to(torch.int8)}, "quantised"),
        (state | {"head.weight": ONES}, "head.weight"),
        (state | {"ln_final.bias": None}, "ln_final.bias"),
        ({"student": state, "ema": prefixed("module.", state)}, "'student.', 'ema.module.'"),
        ({k: v for k, v in transformers.items() if "text" in k}, "CLIPTextModel"),
        ({k: v for k, v in transformers.items() if "vis" in k}, "CLIPVisionModel"),
        ([state], "list"),
    ):
        torch.save(content, tmp_path / "model.pt")
        assert_refused(complaint, load, tmp_path / "model.pt")


def test_folders_without_one_file_of_weights_are_refused(tmp_path):
    assert_refused("model.safetensors", read_weights, tmp_path)
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).touch()
        assert_refused("max_shard_size", read_weights, tmp_path / name)
    assert_refused("max_shard_size", read_weights, tmp_path)


def test_checkpoints_may_hold_objects_of_any_package(tmp_path):
    content = {
        "tensors": [torch.ones(2), torch.zeros(0), torch.nn.Parameter(torch.ones(3).bfloat16())],
        "args": argparse.Namespace(lr=0.1, tensor=torch.ones(3)),
        "counts": collections.defaultdict(list, a=[1]),
        "recent": collections.deque([1, 2]),
    }
    torch.save(content, tmp_path / "checkpoint.pt")
    found = read_tensors(tmp_path / "checkpoint.pt")
    assert [tensor.tolist() for tensor in found["tensors"]] == [[1, 1], [], [1, 1, 1]]
    assert found["args"]["lr"] == 0.1 and found["args"]["tensor"].tolist() == [1, 1, 1]
    assert found["counts"] == {"a": [1]} and [*found["recent"].values()] == [1, 2]


def test_no_code_in_a_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for pickled in (
        b"cos\nsystem\n(S'touch hacked'\ntR.",  # os.system("touch hacked")
        b"(S'touch hacked'\nios\nsystem\n.",  # the same by other opcodes
        b"cos\nX\n)\x81}S'__setstate__'\ncos\nsystem\nsbS'touch hacked'\nb.",
        b'cbuiltins\neval\n(S\'open("hacked", "w")\'\ntR.',
        b"cbuiltins\ngetattr\n(cos\nX\nS'system'\ntR(S'touch hacked'\ntR.",
        b"(cos\nsystem\nS'touch hacked'\ntQ.",
    ):
        with zipfile.ZipFile("model.pt", "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
        assert_refused("model.pt", read_weights, tmp_path / "model.pt")
        assert not Path("hacked").exists()


def test_damaged_files_and_files_of_other_kinds(tmp_path):
    bad = tmp_path / "bad.bin"
    torch.save({"a": torch.ones(3)}, bad)
    good = bad.read_bytes()
    save_safetensors({"a": torch.ones(3)}, tmp_path / "good.safetensors")
    for content in (
        good[:-30],
        good.replace(struct.pack("<f", 1), struct.pack("<f", 2)),
        (tmp_path / "good.safetensors").read_bytes()[:-4],
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4b8699\n",
    ):
        bad.write_bytes(content)
        assert_refused("delete it and run again", read_tensors, bad)
    torch.save({"a": torch.ones(3)}, bad, _use_new_zipfile_serialization=False)
    assert_refused("1.6", read_tensors, bad)
    assert_refused("No such file", read_tensors, tmp_path / "nowhere.bin")


# ---- Weights: where they are found ---------------------------------------------------------------
TIMM = "timm--vit_base_patch16_clip_224.openai"


@pytest.fixture
def published(tmp_path, monkeypatch) -> list[Path]:
    """Files that stand for those of the hub and of OpenAI's second host; the caches are empty."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    _, openai, timm, _ = weights.MODELS["ViT-B/16"]
    sha256 = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(weights.MODELS, "ViT-B/16", (sha256, openai, timm, sha256))
    monkeypatch.setenv("HF_ENDPOINT", (tmp_path / "hub").as_uri())
    monkeypatch.setattr(weights, "HOSTS", [(tmp_path / host).as_uri() for host in "ab"])
    on_hub = tmp_path / "hub" / timm.replace("@", "/resolve/") / "open_clip_model.safetensors"
    on_host = tmp_path / "b/clip/models" / sha256 / "ViT-B-16.pt"
    for file in (on_hub, on_host):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"weights")
    return [on_hub, on_host]


def test_downloads_keep_only_the_right_file(published, tmp_path, capsys):
    """From the hub, then from OpenAI. Each file is checked by its SHA-256."""
    on_hub, on_host = published
    path = find("ViT-B/16")
    assert path == tmp_path / f".cache/clip/{TIMM}.safetensors"
    assert path.read_bytes() == b"weights" and on_hub.as_uri() in capsys.readouterr().err
    on_hub.write_bytes(b"wrong")
    assert find("ViT-B/16") == path  # without a second download
    assert find("ViT-B/16", tmp_path / "other") == tmp_path / "other" / "ViT-B-16.pt"
    on_host.unlink()
    with pytest.raises(OSError, match="--model PATH.*invalid hash") as error:
        find("ViT-B/16", tmp_path / "third")
    assert "\n" not in str(error.value) and not [*(tmp_path / "third").iterdir()]
    assert socket.getdefaulttimeout() is None


def test_finds_what_other_programs_have_cached(published, tmp_path, monkeypatch, state):
    for file in published:
        file.unlink()
    archive = tmp_path / ".cache/clip/ViT-B-16.pt"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"PK, but an interrupted download")
    with pytest.raises(OSError):
        find("ViT-B/16")
    torch.save(state, archive)
    assert find("ViT-B/16") == archive
    archive.unlink()
    for variable, folder in (  # each comes before those above it
        ("XDG_CACHE_HOME", "xdg/huggingface/hub"),
        ("HF_HOME", "home/hub"),
        ("HUGGINGFACE_HUB_CACHE", "older"),
        ("HF_HUB_CACHE", "newer"),
    ):
        monkeypatch.setenv(variable, str(tmp_path / folder.split("/")[0]))
        snapshot = tmp_path / folder / "models--openai--clip-vit-base-patch16/snapshots/abc"
        snapshot.mkdir(parents=True)
        (snapshot / "pytorch_model.bin").touch()
        assert find("ViT-B/16") == snapshot / "pytorch_model.bin"
        assert find("openai/clip-vit-base-patch16") == snapshot / "pytorch_model.bin"
    snapshot = tmp_path / "newer" / f"models--{TIMM}" / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()  # not a CLIP
    torch.save(state, snapshot / "open_clip_model.safetensors")
    assert find("ViT-B/16") == snapshot / "open_clip_model.safetensors"
    assert read_weights(find("ViT-B/16")).notes == ()  # OpenAI's weights: nothing to guess


@pytest.mark.parametrize("name", ["~nobody/x", "x" * 999, "", "laion/x", "nowhere.pt"])
def test_unknown_models(published, name):
    with pytest.raises(ValueError, match="unknown model.*ViT-L/14@336px"):
        find(name)


# ---- Data: small folders -------------------------------------------------------------------------
def picture(path: Path) -> str:
    """Saves a small image of random pixels, seeded by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (12, 10), random.Random(path.name).randbytes(360)).save(path)
    return str(path)


def class_folders(root: Path, *folders: str, count: int = 4) -> Path:
    for folder, i in itertools.product(folders, range(count)):
        picture(root / folder / f"{i}.png")
    return root


def build(benchmark: data.Benchmark, parent: Path) -> Path:
    """A tiny copy of a benchmark: three classes with an image each for train, val and test."""
    home, classes = parent / benchmark.folder, ["red_fox", "tabby", "zebra"]
    if benchmark.name in data.IMAGENETS:  # ImageNetV2's folders are line numbers
        wnids = ["n00000001", "n00000002", "n00000003"]
        folders = ["0", "1", "2"] if benchmark.name == "ImageNetV2" else wnids
        for part in ("train", "val") if benchmark.name == "ImageNet" else (".",):
            class_folders(home / benchmark.images / part, *folders, count=1)
        (home / "classnames.txt").write_text("\n".join(map(" ".join, zip(wnids, classes))))
        return home
    split = {part: [(f"{part}{i}.jpg", i, c) for i, c in enumerate(classes)] for part in data.PARTS}
    for part, rows in split.items():
        for path, _, _ in rows:
            picture(home / benchmark.images / path)
        lines = [f"{path[:-4]} {name}" for path, _, name in rows]
        (home / f"images_variant_{part}.txt").write_text("\n".join(lines))  # FGVCAircraft's
    is_json = benchmark.split_file.endswith(".json")
    (home / benchmark.split_file).write_text(json.dumps(split) if is_json else "\n".join(classes))
    return home


# ---- Data: benchmarks ----------------------------------------------------------------------------
@pytest.mark.parametrize("benchmark", data.BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_all_benchmarks_are_read(benchmark, tmp_path):
    advice = "python -c|DATASETS.md"  # how to get it
    assert_refused(advice, data.load_dataset, tmp_path / benchmark.folder)
    home = build(benchmark, tmp_path)
    dataset = data.load_dataset(home)
    assert (dataset.name, dataset.template) == (benchmark.name, benchmark.template)
    assert dataset.notes == ()
    assert dataset.classnames == ["red fox", "tabby", "zebra"]
    parts = ("train", "test") if benchmark.name == "ImageNet" else ("test",)
    for part in parts if benchmark.name in data.IMAGENETS else data.PARTS:
        paths, labels = zip(*getattr(dataset, part))
        assert labels == (0, 1, 2) and all(map(os.path.isfile, paths))
    if benchmark.name not in data.IMAGENETS:  # known by its split file
        assert data.load_dataset(home.rename(tmp_path / "x")).name == benchmark.name


def test_eurosat_without_split_file(tmp_path):
    images = class_folders(tmp_path / "eurosat/2750", "Forest", "AnnualCrop", "River")
    dataset = data.load_dataset(tmp_path / "eurosat")
    assert dataset.classnames == ["Annual Crop Land", "Forest", "River"]
    assert "not comparable" in dataset.notes[0]
    renamed = images.rename(tmp_path / "EuroSAT_RGB")
    assert data.load_dataset(renamed).classnames == dataset.classnames
    assert data.load_dataset(tmp_path).name == "EuroSAT"  # one folder too high


def test_split_files(tmp_path):
    home = build(data.BENCHMARKS[9], tmp_path)
    picture(home / "2750/deep/x.jpg")
    file = home / "split_zhou_EuroSAT.json"
    good = file.read_text()
    file.write_text(good.replace("train0.jpg", r"deep\\x.jpg"))  # written on Windows
    assert data.load_dataset(home).train[0][0] == str(home / "2750/deep/x.jpg")
    for old, new, message in (
        ('"val2.jpg", 2', '"val2.jpg", 4', "split_zhou_EuroSAT.json is damaged"),
        ("val0.jpg", "x.jpg", "1 of 9 images .* missing.*x.jpg"),
        ("zebra", "tabby", "different class names needed, not .*'tabby'"),
        ('["train1.jpg", 1, "tabby"], ', "", "without a train image: 1, e.g. 'tabby'"),
    ):
        file.write_text(good.replace(old, new))
        assert_refused(message, data.load_dataset, home)


# ---- Data: folders as people have them -----------------------------------------------------------
@pytest.mark.parametrize(
    "folders, classes, sizes",
    [
        (["cat", "big_dog"], ["big dog", "cat"], [4, 2, 2]),
        (["Training/a", "Training/b", "Test/a", "Test/b"], ["a", "b"], [8, 0, 8]),
        (["train/a", "train/b", "validation/a", "validation/b"], ["a", "b"], [8, 0, 8]),
        (["s_train/s_train/a", "s_train/s_train/b", "s_test/a", "s_test/b"], ["a", "b"], [8, 0, 8]),
        (["train/a", "train/b"], ["a", "b"], [4, 2, 2]),
        (["unzipped/set/a", "unzipped/set/b"], ["a", "b"], [4, 2, 2]),
        (["car", "train"], ["car", "train"], [4, 2, 2]),  # a class called train
        (["001.ak47", "002.big-cat"], ["ak47", "big-cat"], [4, 2, 2]),
        (["n02085620-Chihuahua", "n02085782-Pug"], ["Chihuahua", "Pug"], [4, 2, 2]),
        (["0-2", "3-9", "7 up"], ["0-2", "3-9", "7 up"], [6, 3, 3]),
        (["1.cat", "2.cat"], ["1.cat", "2.cat"], [4, 2, 2]),
    ],
)
def test_layouts(folders, classes, sizes, tmp_path):
    dataset = data.load_dataset(class_folders(tmp_path, *folders))
    assert dataset.classnames == classes
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == sizes
    for path, label in dataset.train + dataset.test:
        assert Path(path).parent.name.replace("_", " ").endswith(classes[label])


@pytest.mark.parametrize(
    "files, message",
    [
        ([], "0 pictures"),
        (["a.png", "b.png"], "2 pictures but no class folders"),
        (["cat/a.png"], "two different class names"),
        (["big_cat/a.png", "Big cat/b.png"], "different class names .*'big cat'"),
        (["train/cat/a.png", "train/dog/a.png", "test/a.png"], "test has 1 pictures but no class"),
        (["train/cat/a.png", "val/images/a.png"], "val has 1 pictures but no class folders"),
        (["images/a.png", "masks/a.png"], "2 pictures but no class folders .*images, masks"),
        (["dtd/a.png", "eurosat/a.png", "x/a.png"], "no class folders .*dtd, eurosat, x"),
        (["a/x/a.png", "a/y/a.png", "b/x/a.png", "b/y/a.png"], "--data .*/a --eval-data .*/b"),
        (["a/train/a.png", "a/test/a.png", "b/train/a.png", "b/test/a.png"], "expected .*/train/a"),
        (["train/a/a.png", "train/b/a.png", "test/a/a.png", "test/c/a.png"], "train image: 1, .*c"),
        (["cat/a.png", "dog/a.heic"], r"dog has only .heic images"),
    ],
)
def test_folders_that_are_refused(files, message, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    assert_refused(message, data.load_dataset, tmp_path)


def test_what_is_left_out_is_noted(tmp_path):
    class_folders(tmp_path / "train", "a", "a/deep", "b", "c")
    class_folders(tmp_path / "test", "a", "b")
    class_folders(tmp_path / "extra", "a", count=1)
    for file in ("train/a/x.txt", "train/a/.DS_Store", "train/.b/x.png", "__MACOSX/test/x.png"):
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).write_text("")
    (tmp_path / "test/empty").mkdir()
    os.symlink(tmp_path, tmp_path / "train/a/circle")
    dataset = data.load_dataset(tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (16, 8)
    assert len(dataset.notes) == 5
    for words in ("in sub-folders", "folders without", "extra/a/0.png", "a/x.txt", "test image: 1"):
        assert any(words in note for note in dataset.notes), words
    found = data.find_images([tmp_path / "train/b/1.png", tmp_path / "extra"])
    assert found == [str(tmp_path / "train/b/1.png"), str(tmp_path / "extra/a/0.png")]
    assert len(data.find_images([tmp_path / "train/.b"])) == 1  # hidden, but asked for
    for nothing in (tmp_path / "typo", tmp_path / "test/empty"):
        with pytest.raises(ValueError, match="typo|empty"):
            data.find_images([nothing])


def test_own_class_names(tmp_path):
    root = class_folders(tmp_path / "x", "ct", "my", "my cat", "1", "10")
    file = tmp_path / "names.txt"
    file.write_text("\ufeffct, computed  tomography\nmy cat\tPersian_cat\n10 ten\n1x y\n", "utf-8")
    dataset = data.load_dataset(root, file)
    assert dataset.classnames == ["1", "ten", "computed tomography", "my", "Persian cat"]
    assert dataset.notes[-1].startswith("1 lines")
    for content, message in {b"x y": "no line", b"\xff": "UTF-8", b"ct": "no line"}.items():
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"names.txt .*{message}"):
            data.load_dataset(root, file)
    with pytest.raises(ValueError, match="must contain {} once"):
        data.load_dataset(root, template="a photo")
    domains = class_folders(tmp_path / "y", "a/front", "a/back", "b/front", "b/back")
    file.write_text("a cat\nb dog")
    assert data.load_dataset(domains, file).classnames == ["cat", "dog"]


def test_split_does_not_depend_on_other_classes(tmp_path):
    counts = {"a": [1, 0, 1], "b": [2, 0, 1], "c": [2, 1, 1], "d": [2, 1, 2], "e": [5, 2, 3]}
    for name, parts in counts.items():
        class_folders(tmp_path, name, count=sum(parts))
    dataset = data.load_dataset(tmp_path)
    for part, sizes in zip((dataset.train, dataset.val, dataset.test), zip(*counts.values())):
        assert [sum(y == label for _, y in part) for label in range(5)] == list(sizes)
    (tmp_path / "e").rename(tmp_path / ".e")
    assert data.load_dataset(tmp_path).train == [item for item in dataset.train if item[1] < 4]


# ---- Data: protocol ------------------------------------------------------------------------------
@pytest.mark.parametrize("shots, seed", [(1, 0), (4, 1), (16, 3)])
def test_shots_are_those_of_coop(shots, seed):
    labels = random.Random(0)
    train = [(f"{i}.jpg", labels.randrange(8)) for i in range(150)]  # labels in no order
    by_label = collections.defaultdict(list)  # what Dassl's `generate_fewshot_dataset` does
    for item in train:
        by_label[item[1]].append(item)
    random.seed(seed)
    expected = []
    for group in by_label.values():
        expected += random.sample(group, shots) if len(group) >= shots else group
    assert data.few_shot(train, shots, random.Random(seed)) == expected
    assert data.few_shot(train, 0, random.Random(seed)) == train
    dataset = data.Dataset("x", list("abcdefgh"), train, [], [])
    base = data.few_shot_source(dataset, shots, seed)  # sampled first, then reduced
    assert base.train == [item for item in expected if item[1] < 4]
    with pytest.raises(ValueError, match="no training images"):
        data.few_shot_source(dataclasses.replace(dataset, train=[]), shots, seed)


def test_base_and_novel_are_halves():
    items = [(f"{i}.jpg", (7 * i) % 3) for i in range(40)]
    dataset = data.Dataset("x", ["a", "b", "c"], items[:20], [], items[20:])
    base, novel = data.base_novel(dataset)
    assert base.classnames == ["a", "b"] and base.test == [i for i in items[20:] if i[1] < 2]
    assert novel.classnames == ["c"] and novel.test == [(p, 0) for p, y in items[20:] if y == 2]
    assert (len(base.notes), len(novel.notes)) == (0, 1)  # novel is always 100 %
    only_base = dataclasses.replace(dataset, test=base.test)
    with pytest.raises(ValueError, match="no test image of a novel class"):
        data.evaluation_targets(only_base, "base")


# ---- Data: images and batches --------------------------------------------------------------------
GREY = Image.frombytes("L", (3, 1), bytes([0, 100, 200]))


def test_all_kinds_of_images_become_rgb(tmp_path):
    for image, expected in (
        *((GREY.convert(mode), [0, 100, 200]) for mode in ("L", "P", "LA", "CMYK", "I", "F")),
        (Image.frombytes("I;16", (3, 1), struct.pack("<3H", 0, 25700, 65535)), [0, 100, 255]),
        (Image.frombytes("F", (3, 1), struct.pack("=3f", math.nan, 0.2, 1)), [0, 51, 255]),
        (Image.frombytes("LA", (3, 1), bytes([0, 0, 0, 102, 0, 255])), [255, 153, 0]),  # on white
    ):
        image.save(tmp_path / "x.tiff")
        rgb = data.open_image(str(tmp_path / "x.tiff"))
        assert rgb.mode == "RGB" and rgb.tobytes() == bytes(v for v in expected for _ in range(3))
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was turned
    GREY.save(tmp_path / "x.png", exif=exif)
    assert data.open_image(str(tmp_path / "x.png")).size == (1, 3)


def test_unreadable_images_are_named_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    Image.new("1", (5000, 1)).save(tmp_path / "long.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "cut.png").write_bytes(Path(picture(tmp_path / "x.png")).read_bytes()[:99])
    for name in ("pipe.png", "long.png", "empty.jpg", "eps.jpg", "cut.png", "none.png"):
        with pytest.raises(ValueError, match=f"^cannot read the image .*{name} ([^\n]*)$"):
            data.open_image(str(tmp_path / name))
    paths = [str(tmp_path / name) for name in ("long.png", "x.png", "empty.jpg")]
    items = [(path, label) for label, path in enumerate(paths)]
    loader = data.test_loader(items, data.test_transform(8), batch_size=1, skip=True)
    assert [labels.tolist() for _, labels in loader] == [[], [1], []]


def test_transforms_by_hand():
    image = Image.frombytes("RGB", (64, 32), random.Random(0).randbytes(3 * 64 * 32))
    crop = image.resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    expected = torch.tensor(list(crop.tobytes())).view(16, 16, 3).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.MEAN, data.STD))
    torch.testing.assert_close(data.test_transform(16)(image), (expected - mean) / std)


@pytest.mark.parametrize("n, world", [(13, 2), (13, 3), (6, 3)])
def test_epochs_are_permutations_shared_by_processes(n, world):
    alone = data.EpochBatches(n, 6, seed=1)
    shares = [data.EpochBatches(n, 6, 1, rank, world) for rank in range(world)]
    for epoch in range(3):
        for batches in (alone, *shares):
            batches.epoch = epoch
        assert [sum(parts, []) for parts in zip(*shares)] == list(alone)
        order = [i for batch in alone for _, i in batch]
        assert len(order) == len(set(order)) == n // 6 * 6
    with pytest.raises(ValueError, match="cannot share"):
        data.EpochBatches(n, 5, 1, 0, world)


def test_augmentation_depends_on_seed_epoch_and_position_only(tmp_path):
    items, transform = [(picture(tmp_path / "x.png"), 0)] * 5, data.train_transform(8)
    state = torch.get_rng_state()
    first, other = (data.Images(items, transform, seed) for seed in (1, 2))
    images = [first[0, 3][0], first[1, 3][0], first[0, 4][0], other[0, 3][0]]
    assert all(torch.equal(x, y) == (x is y) for x in images for y in images)
    assert torch.equal(first[0, 3][0], images[0])
    assert torch.equal(torch.get_rng_state(), state)


# ---- Prompts and objective -----------------------------------------------------------------------
NAMES = ["cat", "dog", "great white shark"]


def batch(seed: int = 0, n: int = 4):
    return torch.randn(n, 3, 32, 32, generator=seeded(seed)), torch.arange(n) % len(NAMES)


def make(clip, names=NAMES, **settings) -> PromptOT:
    torch.manual_seed(0)  # the same prompts each time
    return PromptOT(clip, names, Recipe(**settings))


def test_prompts_are_initialised_as_in_the_paper(clip):
    torch.manual_seed(0)
    prompts = PromptLearner(clip, n_ctx=4, depth=12)
    assert prompts.text.shape == (4, 4, 64) and prompts.vision.shape == (3, 4, 128)
    words = clip.token_embedding.weight[[320, 1125, 539, 320]]  # a photo of a
    assert torch.equal(prompts.text[0], words)
    assert 0.015 < prompts.text[1:].std() < 0.025 and 0.015 < prompts.vision.std() < 0.025
    paper = CLIP(512, 224, 16, 768, 12, 512, 12)
    assert sum(p.numel() for p in PromptLearner(paper, 4, 12).parameters()) == 61_440


@pytest.mark.parametrize("n_ctx", [1, 2, 4, 6])
def test_number_of_prompts(clip, n_ctx):
    """Fewer than "a photo of a" leave its last words; more get positions of their own."""
    names = ["sea", "sea lion", "sea lion pup", "sea.", "x"]
    model = make(clip, names, n_ctx=n_ctx, depth=1)
    if n_ctx <= 4:  # as initialised, the first layer changes nothing
        torch.testing.assert_close(model.text_features(), model.text0)
    model = make(clip, names, n_ctx=n_ctx, depth=2)
    words = "a photo of a" + " x" * (n_ctx - 4)
    tokens = tokenize([f"{words} {name}." for name in names])
    slow = [slow_encode_text(clip, row, model.prompts.text) for row in tokens]
    torch.testing.assert_close(model.text_features(), unit(torch.stack(slow)), rtol=1e-4, atol=1e-5)


def test_objective_is_cross_entropy_plus_lambda_ot(clip):
    model, (images, labels) = make(clip), batch()
    loss, parts = model.loss(images, labels, Recipe(lam=3, epsilon=0.02))
    torch.testing.assert_close(parts["ce"], F.cross_entropy(model(images), labels))
    image, text = model.image_features(images), model.text_features()
    image0 = unit(clip.encode_image(images))
    text0 = unit(clip.encode_text(tokenize([f"a photo of a {name}." for name in NAMES])))
    ot, plan = ot_loss(image, text[labels], image0, text0[labels], epsilon=0.02)
    torch.testing.assert_close(parts["ot"], ot, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(parts["off_diagonal"], 1 - plan.trace(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loss, parts["ce"] + 3 * parts["ot"])
    alone, parts = model.loss(images, labels, Recipe(reg="none"))
    assert alone == parts["ce"] and parts["plan"] is None
    _, parts = model.loss(images, labels, Recipe(reg="pointwise"))
    assert parts["off_diagonal"] == 0


def test_bf16_is_close_and_losses_are_fp32(clip):
    gradients = []
    for precision in ("fp32", "bf16"):
        model = make(clip, precision=precision)
        loss, parts = model.loss(*batch())
        loss.backward()
        gradients.append(model.prompts.text.grad)
        assert {x.dtype for x in (loss, parts["plan"], gradients[-1])} == {torch.float32}
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert 0 < error < 0.05


def test_export_with_a_dynamic_batch(demo_clip):
    """torch.export of the image tower, and of a classifier with tuned prompts."""
    model = make(demo_clip)

    class Exported(torch.nn.Module):
        def __init__(self, prompts=None, text=None):
            super().__init__()
            self.clip, self.prompts, self.text = demo_clip, prompts, text

        def forward(self, images):
            image = self.clip.encode_image(images, self.prompts)
            return image if self.text is None else unit(image) @ self.text.T

    text = torch.nn.Parameter(demo_clip.logit_scale.exp() * model.text_features())
    classifier = Exported(model.prompts.vision, text)
    shapes = ({0: torch.export.Dim("batch", max=4096)},)  # torch 2.6 asks for a maximum
    images = [torch.randn(n, 3, 32, 32, generator=seeded(n)) for n in (2, 7, 1)]
    for module, expected in ((Exported(), demo_clip.encode_image), (classifier, model)):
        program = torch.export.export(module, (images[0],), dynamic_shapes=shapes).module()
        for x in images:
            torch.testing.assert_close(program(x), expected(x))


# ---- Training ------------------------------------------------------------------------------------
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


def test_training_changes_the_prompts_and_nothing_else(demo_clip, digits):
    before = {name: p.clone() for name, p in demo_clip.named_parameters()}
    torch.manual_seed(1)
    prompts = prompts_of(PromptOT(demo_clip, digits.classnames))
    model, history = tune(demo_clip, digits)
    assert all(torch.equal(p, before[name]) for name, p in demo_clip.named_parameters())
    assert (prompts_of(model) != prompts).float().mean() > 0.99
    assert [set(means) for means in history] == 2 * [{"loss", "ce", "ot", "off_diagonal"}]


def test_training_is_sgd_by_hand(demo_clip, digits):
    """Momentum, weight decay and the schedule written out, on the same batches."""
    recipe = Recipe(stop_epoch=3, augment="none")
    torch.manual_seed(1)
    by_hand = PromptOT(demo_clip, digits.classnames, recipe)
    loader = data.train_loader(digits.train, data.train_transform(32, "none"), 4, recipe.seed)
    velocity = [torch.zeros_like(p) for p in by_hand.prompts.parameters()]
    for epoch, lr in enumerate((1e-4, 5e-3, 4.9923e-3)):
        loader.batch_sampler.epoch = epoch
        for images, labels in loader:
            loss, _ = by_hand.loss(images, labels)
            gradients = torch.autograd.grad(loss, list(by_hand.prompts.parameters()))
            for p, g, v in zip(by_hand.prompts.parameters(), gradients, velocity):
                v.mul_(0.9).add_(g + 5e-4 * p.detach())
                p.data -= lr * v
    model, _ = tune(demo_clip, digits, stop_epoch=3, augment="none")
    torch.testing.assert_close(prompts_of(model), prompts_of(by_hand), rtol=1e-3, atol=1e-5)


def test_training_learning_rates():
    rates = [promptot.learning_rate(epoch) for epoch in range(40)]
    assert rates[0] == 1e-4 and rates[1] == 5e-3
    for epoch, rate in ((2, 4.9923e-3), (3, 4.9692e-3), (39, 3.0779e-5)):
        assert rates[epoch] == pytest.approx(rate, rel=1e-4)


def test_training_is_reproducible_and_depends_on_the_settings(demo_clip, digits):
    """Workers change nothing, since each augmentation has a seed of its own."""
    model, _ = tune(demo_clip, digits, stop_epoch=1)
    again, _ = tune(demo_clip, digits, workers=2, stop_epoch=1)
    assert torch.equal(prompts_of(model), prompts_of(again))
    for other in ({"reg": "none"}, {"modality": "image"}, {"seed": 2}, {"augment": "field"}):
        tuned, _ = tune(demo_clip, digits, stop_epoch=1, **other)
        assert not torch.equal(prompts_of(tuned), prompts_of(model))


def test_training_resumes_to_the_same_bits(demo_clip, digits, tmp_path):
    """The state of the optimizer counts, too: without its momentum, the prompts would differ."""
    model, history = tune(demo_clip, digits, stop_epoch=3)
    file = tmp_path / "state.pt"
    tune(demo_clip, digits, runs.Record(file), stop_epoch=2)
    resumed, its_history = tune(demo_clip, digits, runs.Record(file), stop_epoch=3)
    assert torch.equal(prompts_of(resumed), prompts_of(model)) and its_history == history
    with pytest.raises(ValueError, match="state.pt is not the state of this tuning"):
        tune(demo_clip, digits, runs.Record(file), n_ctx=2)


def test_training_stops_when_the_loss_is_not_finite(demo_clip, digits):
    with pytest.raises(ValueError, match=r"not finite in epoch \d+: try a lower --lr"):
        tune(demo_clip, digits, stop_epoch=40, lr=1e6, reg="none")


def test_correct_predictions_are_counted_per_class(demo_clip, digits):
    """Against counting one by one. Rotated class names are a second set of texts."""
    model = PromptOT(demo_clip, digits.classnames)
    few = dataclasses.replace(digits, test=digits.test[::9])
    text = model.text_features()
    counts = promptot.correct(model, few, torch.stack([text, text.roll(1, dims=0)]))
    expected = torch.zeros(10)
    with torch.no_grad():
        for path, label in few.test:
            image = data.test_transform(32)(data.open_image(path))[None]
            expected[label] += model(image).argmax() == label
    assert counts.shape == (2, 10) and torch.equal(counts[0], expected)
    assert counts[0].sum() > counts[1].sum()


# ---- The command line ----------------------------------------------------------------------------
QUICK = ("--epochs", 2, "--shots", 4)
NAME = "base-ot-4shots-seed1"
MODEL = ("--model", DEMO / "tiny-clip.pt")


def run(*args) -> dict:
    """Runs main in this process. Returns the content of metrics.json."""
    main([str(arg) for arg in args])
    return metrics_in(args[args.index("--output") + 1])


def metrics_in(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@contextlib.contextmanager
def start(*args, python=(), **options):
    """Runs promptot.py in a process of its own, in which SIGINT has its usual effect.

    A shell that starts pytest in the background lets it, and its children, ignore SIGINT.
    """
    command = [sys.executable, *python, HERE / "promptot.py", *args]
    with subprocess.Popen(
        [str(part) for part in command],
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_epochs(process: subprocess.Popen, folder: Path, epochs: int) -> None:
    state = folder / NAME / "state.pt"
    while not state.exists() or len(read_tensors(state)["history"]) < epochs:
        assert process.poll() is None
        time.sleep(0.01)


def saved_prompts(folder: Path) -> torch.Tensor:
    prompts = read_tensors(folder / NAME / "prompts.pt")["prompts"]
    return torch.cat([prompts[tower].flatten() for tower in ("text", "vision")])


def expect_error(capsys, words: str, *args) -> None:
    """One line on stderr that contains the words, and exit status 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "\n" not in error, error


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> tuple:
    """Flags for ten of the demo's digits per class, so that a run takes a second."""
    folder = tmp_path_factory.mktemp("few") / "digits"
    others = shutil.ignore_patterns("00[1-9]*", "01*")  # all but 0000.png to 0009.png
    shutil.copytree(DEMO / "digits", folder, ignore=others)
    return ("--data", folder, *MODEL)


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(*few, *QUICK, "--output", folder)
    return folder


def test_demo(tmp_path):
    """What a newcomer sees, in less time: the whole demo is 40 epochs without and with OT."""
    args = ("--epochs", 6, "--reg", "ot", "--output", tmp_path)
    with start(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        printed, error = process.communicate(timeout=120)
    assert process.returncode == 0 and "sinkhorn" not in error, error
    order = ["data  ", "zero-shot base", "off-diagonal", "| accuracy", "ot, 16 shots"]
    places = [printed.index(word) for word in order]
    assert places == sorted(places) and max(map(len, printed.splitlines())) <= 100
    assert "chance" not in printed
    metrics = metrics_in(tmp_path)
    zero_shot, (result,) = metrics["zero_shot"], metrics["runs"]
    assert zero_shot["base"] > 60 and zero_shot["novel"] > 60  # chance is 20
    assert result["accuracy"]["base"] > 70 and result["accuracy"]["novel"] > 70
    assert Recipe(**result["recipe"]).name == result["name"] and len(result["history"]) == 6
    per_class = result["per_class"]["novel"]
    assert len(per_class) == 5  # with 60 test images each
    assert sum(per_class.values()) / 5 == pytest.approx(result["accuracy"]["novel"], abs=0.01)
    files = {path.name for path in (tmp_path / result["name"]).iterdir()}
    assert files == {"prompts.pt", "plan.png", "curves.png"}
    assert "| three " in (tmp_path / "results.md").read_text()


def test_seeds_shots_and_regularisers_in_one_table(few, tmp_path, capsys):
    args = (*few, "--output", tmp_path, "--epochs", 1, "--reg", "none", "pointwise", "--resume")
    metrics = run(*args, "--shots", 1, 2)
    names = [f"base-{r}-{s}shots-seed1" for r in ("none", "pointwise") for s in (1, 2)]
    assert [r["name"] for r in metrics["runs"]] == names
    again = run(*args, "--shots", 1, "--seed", 1, 2)
    assert again["runs"][:4] == metrics["runs"] and len(again["runs"]) == 6
    printed = capsys.readouterr().out
    assert printed.count("finished before") == 2
    assert "pointwise, 2 shots" in printed and " ± " in printed
    for other in (("--lam", 5), ("--augment", "none"), ("--data", DEMO / "letters")):
        expect_error(capsys, other[0][2:], *args, *other)


def test_killed_runs_resume_to_the_same_bits(few, tmp_path):
    """SIGKILL after the first epoch, and later. The prompts become those of an undisturbed run."""
    args = (*few, "--epochs", 20, "--shots", 4, "--output")
    run(*args, tmp_path / "whole")
    for epochs in (1, 8):
        with start(*args, tmp_path / "killed", "--resume", stdout=subprocess.DEVNULL) as process:
            wait_for_epochs(process, tmp_path / "killed", epochs)
    run(*args, tmp_path / "killed", "--resume")
    whole, killed = (saved_prompts(tmp_path / name) for name in ("whole", "killed"))
    assert torch.equal(whole, killed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_are_one_line(number, few, tmp_path):
    args = (*few, "--shots", 4, "--epochs", 500, "--workers", 2, "--output", tmp_path)
    with start(*args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        wait_for_epochs(process, tmp_path, 1)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert len(error.strip().splitlines()) == 1 and "interrupted" in error


def test_runs_at_once_take_different_folders(tmp_path, monkeypatch):
    """Eight threads stand for eight processes. Of those that name a folder, one gets it."""
    monkeypatch.chdir(tmp_path)
    barrier = threading.Barrier(8)

    def open_folder(output: str | None) -> str:
        barrier.wait()
        try:
            return runs.open_folder(output, data="digits", resume=False).name
        except ValueError:
            return "taken"

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(open_folder, [None] * 8))
        assert found == {"digits", *(f"digits-{i}" for i in range(2, 9))}
        assert sorted(pool.map(open_folder, ["one"] * 8)) == ["one", *["taken"] * 7]


@pytest.mark.parametrize("content", ["mine", "{}", '{"settings": {}, "runs": []}', "[" * 10**5])
def test_other_peoples_files_stay(content, few, tmp_path, capsys):
    names = ("metrics.json", "log.txt", "results.md", "state.pt")
    for name in names:
        (tmp_path / name).write_text(content)
    for resume in ((), ("--resume",)):
        expect_error(capsys, tmp_path.name, *few, "--output", tmp_path, *resume)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(names, content)


def test_all_classes_and_other_data_sets(few, tmp_path, capsys):
    """Another data set of the same name goes by its folder."""
    args = ("--classes", "all", "--eval-data", few[1], DEMO / "letters")
    accuracy = run(*few, *QUICK, *args, "--output", tmp_path)["runs"][0]["accuracy"]
    assert list(accuracy) == ["digits", str(few[1]), "letters"]
    assert accuracy["digits"] == accuracy[str(few[1])]
    assert "average of others" in capsys.readouterr().out


def test_zero_shot_at_the_level_of_chance_is_noted(few, tmp_path, capsys):
    names = sorted(path.name for path in few[1].iterdir())
    lines = [f"{name} {other}" for name, other in zip(names, names[3:] + names[:3])]
    (tmp_path / "names.txt").write_text("\n".join(lines))
    args = ("--classnames", tmp_path / "names.txt", "--classes", "all")
    run(*few, *QUICK, *args, "--output", tmp_path / "run")
    assert "on digits is at the level of chance" in capsys.readouterr().out


def test_saved_prompts_are_evaluated_and_predict(finished, tmp_path, capsys):
    prompts = finished / NAME / "prompts.pt"
    loaded = run("--load", prompts, "--output", tmp_path / "loaded")
    assert loaded["runs"][0]["accuracy"] == metrics_in(finished)["runs"][0]["accuracy"]
    other = ("--data", DEMO / "letters", "--classes", "all")
    run("--load", prompts, *other, "--output", tmp_path / "letters")
    capsys.readouterr()

    image = next((DEMO / "digits" / "nine").iterdir())
    main(["--load", str(prompts), "--predict", str(image), "--names", "zero", "nine"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image) and len(lines) == 3
    shares = [float(line.split("%")[0]) for line in lines[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)

    (tmp_path / ".pictures").mkdir()
    shutil.copy(image, tmp_path / ".pictures" / "a.png")
    (tmp_path / ".pictures" / "b.png").write_text("not an image")
    rows = tmp_path / "rows.csv"
    predict = ("--load", prompts, "--predict", tmp_path / ".pictures", "--csv", rows)
    expect_error(capsys, "b.png", *predict)
    (row,) = csv.DictReader(rows.read_text().splitlines())
    assert row["path"].endswith("a.png") and 0 < float(row["probability"]) <= 1
    assert (DEMO / "digits" / row["class"]).is_dir()  # all ten classes, not only the tuned half
    expect_error(capsys, "rows.csv", *predict)

    bad = tmp_path / "bad.pt"
    torch.save(small_clip().state_dict(), bad)
    expect_error(capsys, "other weights", "--load", prompts, "--model", bad)
    saved = read_tensors(prompts)
    for words, content in (("lam", saved | {"recipe": {"lam": -1}}), ("prompts", {"a": 1})):
        torch.save(content, bad)
        expect_error(capsys, words, "--load", bad)


@pytest.mark.parametrize(
    "words, args",
    [
        ("nowhere", ("--data", "nowhere")),  # read before the default weights are looked for
        ("cannot read the image", ("--data", "broken", *MODEL)),
        ("cannot read the image", ("--data", "broken", "--workers", "2", *MODEL)),
        ("lam must be", ("--lam", "nan")),
        ("epsilon must be", ("--epsilon", "0")),
        ("--predict needs --load", ("--predict", "x.png")),
        ("--device", ("--device", "cuda:99")),
        ("unrecognized arguments: --shot", ("--shot", "4")),
        ("file", ("--output", "file/x")),
        ("not empty", ("--output", "broken")),
        ("inside --data", ("--data", "broken", "--output", "broken/run", *MODEL)),
    ],
)
def test_bad_input_is_one_line(words, args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    for image in ("one/a.png", "one/b.png", "two/a.png", "two/b.png"):
        Path("broken", image).parent.mkdir(parents=True, exist_ok=True)
        Path("broken", image).write_text("not an image")
    expect_error(capsys, words, *args)
    assert Path("file").read_text() == "mine"


def test_output_on_an_ascii_terminal(few, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run(*few, *QUICK, "--seed", 1, 2, "--output", tmp_path)
    terminal.flush()
    assert rb" \xb1 " in terminal.buffer.getvalue()  # the ± in the table


def test_output_into_a_closed_pipe(few, tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start(*few, "--output", tmp_path, **pipes) as process:
        process.stdout.close()  # as in `... | head`
        assert process.wait(120) == 2 and "Traceback" not in process.stderr.read()


def test_torchrun_gives_the_prompts_of_one_process(few, tmp_path):
    """Two processes share batches and test images."""
    args = (*few, *QUICK, "--batch-size", 8, "--device", "cpu", "--output")
    one = run(*args, tmp_path / "one")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2)
    port = ("--master-port", 29500 + os.getpid() % 1000)
    with start(*args, tmp_path / "two", python=(*torchrun, *port)) as process:
        assert process.wait(120) == 0
    first, second = (saved_prompts(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    two = metrics_in(tmp_path / "two")
    assert two["zero_shot"] == one["zero_shot"]
    for name, value in one["runs"][0]["accuracy"].items():
        assert two["runs"][0]["accuracy"][name] == pytest.approx(value, abs=7)  # one of 15 images


# ---- Tables --------------------------------------------------------------------------------------
def test_results_table():
    """HM is taken for each seed, then averaged. The standard deviation is that of a sample."""
    recipe = {"reg": "ot", "shots": 16}
    seeds = [{"recipe": recipe, "accuracy": {"base": base, "novel": 60.0}} for base in (90.0, 94.0)]
    zero_shot = {"base": 50.0, "novel": 50.0}
    metrics = {"zero_shot": zero_shot, "zero_shot_template": zero_shot, "runs": seeds}
    table = runs.results(metrics).split("\n")
    rows = [[cell.strip() for cell in line.split("|")] for line in table]
    assert rows[0][1:-1] == ["accuracy in %", "base", "novel", "HM"]
    assert rows[2][1:-1] == ["zero-shot", "50.00", "50.00", "50.00"]
    assert rows[3][1:4] == ["ot, 16 shots", "92.00 ± 2.83", "60.00 ± 0.00"]
    hm = [statistics.harmonic_mean([90, 60]), statistics.harmonic_mean([94, 60])]
    assert rows[3][4].startswith(f"{sum(hm) / 2:.2f} ±")


def test_overview_of_several_runs(finished, tmp_path):
    """Its HM in the last row is that of the means, as the field reports it."""
    other = shutil.copytree(finished, tmp_path / "other")
    metrics = metrics_in(other)
    metrics["settings"]["data"] = "letters"
    metrics["runs"][0]["accuracy"] = {"base": 50.0, "novel": 100.0}
    (other / "metrics.json").write_text(json.dumps(metrics))
    command = [sys.executable, HERE / "runs.py", finished, other]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in table.split("\n")[:5]]
    assert [row[1] for row in rows] == ["digits", "letters", "mean"]
    columns = [head.index(f"ot, 4 shots: {target}") for target in ("base", "novel", "HM")]
    first, second, mean = ([float(row[column]) for column in columns] for row in rows)
    assert mean[1] == pytest.approx((first[1] + second[1]) / 2, abs=0.01)
    assert mean[2] == pytest.approx(statistics.harmonic_mean(mean[:2]), abs=0.01)
    with pytest.raises((ValueError, OSError), match="metrics.json"):
        runs.overview([str(tmp_path)])


# ---- The README ----------------------------------------------------------------------------------
IMPORTS = {"promptot": ["clip_model", "weights", "data", "runs"], "clip_model": ["weights"]}
SNIPPETS = (HERE / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]


@pytest.mark.parametrize("snippet", [text.split("```")[0] for text in SNIPPETS])
def test_snippets_of_the_readme_run_beside_the_files_they_need(snippet, finished, tmp_path):
    for name in re.findall(r"^(?:from|import) (\w+)", snippet, re.MULTILINE):
        for module in (name, *IMPORTS.get(name, [])):
            if (HERE / f"{module}.py").exists():
                shutil.copy(HERE / f"{module}.py", tmp_path)
    shutil.copy(clip_model.MERGES_FILE, tmp_path)
    shutil.copy(finished / NAME / "prompts.pt", tmp_path)
    for file in re.findall(r'"(demo/[^"]*)"', snippet):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / file, tmp_path / file)
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
