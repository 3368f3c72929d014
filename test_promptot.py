"""Tests: offline, on small models and tiny data; they show what may be relied on.

    python -m pytest -q
"""

import contextlib
import itertools
import json
import math
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
from torchvision.transforms.functional import pil_to_tensor

import clip_model
import data
import promptot
import report
from clip_model import CLIP, load, tokenize
from promptot import PromptLearner, PromptOT, learning_rate, main, ot_loss, sinkhorn, unit

torch.set_num_threads(1)  # for models this small, threads only wait for each other
HERE = Path(__file__).parent
DEMO = HERE / "demo"


def small_clip(seed: int = 0) -> CLIP:
    """Random CLIP with 2 heads in the image tower, 1 in the text tower, and depths that differ."""
    torch.manual_seed(seed)
    clip = CLIP(
        embed_dim=16, image_resolution=32, patch_size=8, vision_width=128, vision_layers=3,
        text_width=64, text_layers=4,
    )
    for p in clip.parameters():  # biases and norms away from 0 and 1, so that mistakes show
        p.data += 0.05 * torch.randn_like(p)
    return clip.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def clip() -> CLIP:
    return small_clip()


@pytest.fixture(scope="module")
def demo_clip() -> CLIP:
    return load(DEMO / "tiny-clip.pt")


# --------------------------------------------------------------------------------------------------
# Sinkhorn


def exact_transport(cost):
    """The cheapest permutation, by trying all: optimal for equal uniform marginals (Birkhoff)."""
    n = len(cost)
    return min(sum(cost[i, p[i]] for i in range(n)) / n for p in itertools.permutations(range(n)))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_sinkhorn_finds_the_cheapest_permutation(n):
    for seed in range(10):
        cost = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
        plan = sinkhorn(cost, epsilon=1e-5)
        torch.testing.assert_close((plan * cost).sum(), exact_transport(cost), rtol=1e-3, atol=1e-5)


def test_sinkhorn_finds_a_planted_permutation():
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    cost = 0.3 + torch.rand(50, 50, generator=torch.Generator().manual_seed(1))
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
@pytest.mark.parametrize("epsilon", [10.0, 0.1, 0.01, 1e-4])
def test_sinkhorn_marginals_and_optimality(n, m, epsilon):
    """Right sums; and pi_ij = u_i v_j exp(-C_ij / epsilon), which only the optimal plan has."""
    generator = torch.Generator().manual_seed(n * m)
    cost = torch.rand(n, m, generator=generator, dtype=torch.float64)
    a = torch.rand(n, generator=generator, dtype=torch.float64).softmax(0)
    b = torch.rand(m, generator=generator, dtype=torch.float64).softmax(0)
    plan = sinkhorn(cost, a, b, epsilon=epsilon)
    torch.testing.assert_close(plan.sum(0), b, atol=1e-5, rtol=0)
    torch.testing.assert_close(plan.sum(1), a, atol=1e-4, rtol=0)
    if epsilon >= 0.01:  # log pi + C / epsilon = f_i + g_j has no interaction
        log = plan.log() + cost / epsilon
        interaction = log - log.mean(0) - log.mean(1, keepdim=True) + log.mean()
        assert interaction.abs().max() < 1e-6


def test_sinkhorn_zero_mass_stays_where_it_is():
    a, b = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.25, 0.0, 0.0, 0.75])
    cost = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    plan = sinkhorn(cost, a, b, epsilon=0.1)
    assert plan[0].sum() == 0 and plan[:, 1:3].sum() == 0
    torch.testing.assert_close(plan[1:, [0, 3]], sinkhorn(cost[1:, [0, 3]], a[1:], b[[0, 3]], 0.1))
    for epsilon in (1e-2, 1e-3, 1e-4, 1e-5):
        plan = sinkhorn(cost, a, b, epsilon)
        torch.testing.assert_close(plan.sum(0), b, atol=1e-5, rtol=0)
        torch.testing.assert_close(plan.sum(1), a, atol=1e-4, rtol=0)


def test_sinkhorn_symmetry_and_batching():
    cost = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    plans = sinkhorn(cost, epsilon=0.05)
    assert plans.shape == cost.shape
    for i, j in itertools.product(range(2), range(3)):
        alone, swapped = (sinkhorn(c, epsilon=0.05) for c in (cost[i, j], cost[i, j].T))
        torch.testing.assert_close(plans[i, j], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(plans[i, j].T, swapped, atol=1e-5, rtol=0)
    shifted = cost + torch.rand(2, 3, 5, 1) + torch.rand(2, 3, 1, 6)  # changes no plan
    torch.testing.assert_close(sinkhorn(shifted, epsilon=0.05), plans, atol=1e-5, rtol=0)


def test_sinkhorn_of_many_large_problems_and_of_many_masses():
    """Large ones are solved one by one on a CPU; leading dimensions broadcast."""
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(3, 128, 130, generator=generator)
    a = torch.rand(2, 1, 128, generator=generator)
    plans = sinkhorn(costs, a, epsilon=0.05)
    assert plans.shape == (2, 3, 128, 130)
    for i, j in itertools.product(range(2), range(3)):
        alone = sinkhorn(costs[j], a[i, 0], epsilon=0.05)
        torch.testing.assert_close(plans[i, j], alone, atol=1e-6, rtol=0)
        torch.testing.assert_close(plans[i, j].sum(1), a[i, 0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("epsilon", [1e-45, 1e-20, 1e-3, 1.0, 1e20, 1e300])
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1.0, 1e6, 3e38])
def test_sinkhorn_is_finite_for_any_finite_cost(scale, epsilon):
    cost = scale * (2 * torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) - 1)
    plan = sinkhorn(cost, epsilon=epsilon)
    assert plan.isfinite().all() and (plan >= 0).all()
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 1 / 6))
    torch.testing.assert_close(plan.sum(1), torch.full((4,), 1 / 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_iter", [0, 1, 15, 25, 37])
def test_sinkhorn_that_is_stopped_early_has_exact_column_sums(max_iter):
    for seed, epsilon in itertools.product(range(5), (1e-5, 1e-3, 1e-2)):
        cost = torch.rand(5, 7, generator=torch.Generator().manual_seed(seed))
        plan = sinkhorn(cost, epsilon=epsilon, max_iter=max_iter)
        torch.testing.assert_close(plan.sum(0), torch.full((7,), 1 / 7))


def test_sinkhorn_computes_half_precision_in_fp32():
    cost = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)).half()
    for dtype in (torch.float16, torch.bfloat16):
        plan = sinkhorn(cost.to(dtype))
        assert plan.dtype == torch.float32
        torch.testing.assert_close(plan, sinkhorn(cost.to(dtype).float()))
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(plan, sinkhorn(cost.to(dtype)), rtol=0, atol=0)


def test_sinkhorn_rejects_what_is_no_problem():
    cost = torch.rand(2, 3)
    for bad in (
        dict(epsilon=0.0), dict(epsilon=-1.0), dict(epsilon=math.nan), dict(a=torch.ones(3)),
        dict(a=torch.tensor([1.5, -0.5])), dict(a=torch.ones(2), b=torch.ones(3)),
        dict(a=torch.tensor([1.0, math.inf])), dict(b=torch.tensor([1.0, math.nan, 1.0])),
    ):
        with pytest.raises(ValueError):
            sinkhorn(cost, **bad)


# --------------------------------------------------------------------------------------------------
# The OT loss


def features(n: int, dim: int = 8, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [unit(torch.randn(n, dim, generator=generator)) for _ in range(4)]


def test_cost_is_half_the_squared_distance_of_joint_features():
    image, text, image0, text0 = features(6)
    loss, plan = ot_loss(image, text, image0, text0, epsilon=0.05)
    distance = torch.cdist(torch.cat([image, text], 1), torch.cat([image0, text0], 1))
    cost = distance.square() / 2
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
    cost = torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def objective(cost):
        plan = sinkhorn(cost, epsilon=0.1, tol=1e-12)
        return (plan * cost).sum() + 0.1 * (plan * (plan.log() - 1)).sum()

    plan = sinkhorn(cost, epsilon=0.1, tol=1e-12)
    for i, j in [(0, 0), (1, 2), (3, 1)]:
        step = torch.zeros_like(cost)
        step[i, j] = 1e-4
        difference = (objective(cost + step) - objective(cost - step)) / 2e-4
        torch.testing.assert_close(difference, plan[i, j], rtol=1e-3, atol=1e-6)


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
    torch.testing.assert_close(separate, alone["image"] + alone["text"], atol=1e-5, rtol=0)
    assert plans.shape == (2, 5, 5)
    assert ot_loss(image, text, image0, text0)[0] >= separate - 1e-5  # one plan for both costs more


def test_off_diagonal_mass():
    assert promptot.off_diagonal(torch.eye(4) / 4) == 0
    assert promptot.off_diagonal(torch.full((4, 4), 1 / 16)) == 0.75
    assert promptot.off_diagonal(torch.stack([torch.eye(2) / 2, torch.full((2, 2), 0.25)])) == 0.25


# --------------------------------------------------------------------------------------------------
# Tokenizer. The ids were made with an independent implementation (open_clip's).

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


# --------------------------------------------------------------------------------------------------
# CLIP with prompts, against a slow and obvious second implementation


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


def test_a_text_does_not_depend_on_its_company(clip):
    """Leaving out what stands behind the end, and sharing beginnings, are exact."""
    prompts = torch.randn(3, 4, 64)
    for texts in (TEXTS, TEXTS[:1], ["a photo of a cat."] * 3, ["one two three four five", *TEXTS]):
        together = clip.encode_text(tokenize(texts), prompts)
        for row, text in zip(together, texts):
            alone = slow_encode_text(clip, tokenize(text)[0], prompts)
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
    plain = clip.encode_text(tokenize(["", "cat", *TEXTS]))
    torch.testing.assert_close(plain[0], slow_encode_text(clip, tokenize("")[0],
                               torch.zeros(1, 0, 64)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="too short"):
        clip.encode_text(tokenize(["cat", "a photo of a cat"]), prompts)
    tokens = tokenize(TEXTS)
    tokens[-1, 0] = 7
    with pytest.raises(ValueError, match="begin with the same token"):
        clip.encode_text(tokens, prompts)


def test_a_prefix_tree_has_one_node_for_each_beginning():
    """9 is the end; what stands behind it does not count."""
    tree = clip_model.prefix_tree(
        torch.tensor([[1, 2, 9, 0], [1, 2, 3, 9], [1, 2, 9, 0], [4, 9, 7, 7]])
    )
    beginnings = {(1,), (1, 2), (1, 2, 3), (1, 2, 3, 9), (1, 2, 9), (4,), (4, 9)}
    assert sorted(tree.tokens.tolist()) == sorted(text[-1] for text in beginnings)
    assert tree.tokens[tree.ends].tolist() == [9, 9, 9, 9] and tree.ends[0] == tree.ends[2]
    assert tree.positions[tree.ends].tolist() == [2, 3, 2, 1]
    assert torch.equal(tree.rows.flatten()[tree.places], torch.arange(len(beginnings)))
    assert tree.rows[0, :3].tolist() == [0, 1, 2]


# --------------------------------------------------------------------------------------------------
# Reading weights


class ScriptedBlock(torch.nn.Module):
    """Some of CLIP's tensors as TorchScript modules, to be saved like OpenAI's archives."""

    def __init__(self):
        super().__init__()
        self.ln_1 = torch.nn.LayerNorm(4).half()
        self.weight = torch.nn.Parameter(torch.randn(6, 5).half().T)  # not contiguous
        self.register_buffer("count", torch.tensor([7]))
        self.shared = self.weight
        self.numbers = [1, 2]

    def forward(self, x):
        return self.ln_1(x) + self.weight[0, 0] + self.count


@pytest.fixture
def archive(tmp_path):
    module = torch.nn.Sequential(ScriptedBlock(), ScriptedBlock())
    path = tmp_path / "model.pt"
    torch.jit.script(module).save(str(path))
    return path, module.state_dict()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_archive_is_read_without_torch_jit(archive, monkeypatch):
    path, expected = archive
    monkeypatch.setattr(torch.jit, "load", None)
    state = clip_model.read_state_dict(path)
    assert set(expected) <= set(state)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_damaged_archives_are_refused(archive, tmp_path):
    whole = archive[0].read_bytes()
    generator = random.Random(0)
    for i in range(30):
        place = generator.randrange(len(whole))
        flipped = bytes([whole[place] ^ 0xFF])
        for damaged in (whole[:place], whole[:place] + flipped + whole[place + 1 :]):
            (tmp_path / "damaged.pt").write_bytes(damaged)
            try:
                state = clip_model.read_state_dict(tmp_path / "damaged.pt")
            except ValueError as e:
                assert "\n" not in str(e)
            else:  # a byte that does not matter, such as a date
                assert all(torch.equal(state[k], v) for k, v in archive[1].items())


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_no_code_in_a_weights_file_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("archive.pt", "w") as z:
        z.writestr("a/data.pkl", pickle.dumps(Malicious(), protocol=2))
        z.writestr("a/constants.pkl", b"")
    Path("pickle.pt").write_bytes(pickle.dumps({"a": Malicious()}))
    for name in ("archive.pt", "pickle.pt"):
        with pytest.raises(ValueError):
            clip_model.read_state_dict(name)
    assert not Path("hacked").exists()


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], name="F16") -> None:
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for key, t in tensors.items():
        raw = t.contiguous().numpy().tobytes()
        header[key] = {"dtype": name, "shape": list(t.shape),
                       "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_every_format_gives_the_same_model(clip, tmp_path):
    state = {k: v.half() for k, v in clip.state_dict().items()}
    torch.save(state | {"input_resolution": torch.tensor(32)}, tmp_path / "saved.pt")
    write_safetensors(tmp_path / "model.safetensors", state)
    for file in ("saved.pt", "model.safetensors"):
        loaded = load(tmp_path / file)
        assert not loaded.training and loaded.image_resolution == 32 and loaded.context_length == 77
        for name, p in loaded.named_parameters():
            assert p.dtype == torch.float32 and not p.requires_grad
            assert torch.equal(p, state[name].float())


def test_what_is_no_clip_is_refused_in_one_line(clip, tmp_path):
    state = dict(clip.state_dict())
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "short.safetensors").write_bytes(b"\xff" * 9)
    write_safetensors(tmp_path / "lying.safetensors", {"a": torch.ones(3)}, name="F32")
    raw = (tmp_path / "lying.safetensors").read_bytes()
    (tmp_path / "lying.safetensors").write_bytes(raw[:-4])
    write_safetensors(tmp_path / "long.safetensors", state, name="F32")
    with (tmp_path / "long.safetensors").open("ab") as f:
        f.write(b"more")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "resnet.pt")
    torch.save({k: v for k, v in state.items() if "ln_final" not in k}, tmp_path / "part.pt")
    torch.save(state | {"visual.proj": torch.ones(3, 3)}, tmp_path / "shape.pt")
    torch.save(state | {"visual.proj": state["visual.proj"] * math.nan}, tmp_path / "nan.pt")
    torch.save(state | {"visual.proj": state["visual.proj"].to_sparse()}, tmp_path / "sparse.pt")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError) as error:
            load(path)
        assert path.name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px"):
        load("ViT-B/17")


def test_download_checks_before_it_renames(clip, tmp_path, monkeypatch):
    published = tmp_path / "published"
    torch.save(clip.state_dict(), published)
    (tmp_path / "cache").mkdir()
    sha256 = clip_model.hashlib.sha256(published.read_bytes()).hexdigest()
    monkeypatch.setattr(clip_model, "MODELS", {"good": (sha256, "x.pt"), "bad": ("0", "y.pt")})
    for digest in (sha256, "0"):
        (tmp_path / digest).mkdir()
        for file in ("x.pt", "y.pt"):
            shutil.copy(published, tmp_path / digest / file)
    monkeypatch.setattr(clip_model, "URL", tmp_path.as_uri())
    assert load("good", cache_dir=tmp_path / "cache").image_resolution == 32
    with pytest.raises(OSError, match="y.pt .*SHA-256.*path"):
        load("bad", cache_dir=tmp_path / "cache")
    monkeypatch.setattr(clip_model, "URL", "file:///nowhere")
    assert load("good", cache_dir=tmp_path / "cache")  # from the cache
    with pytest.raises(OSError, match="cannot download file:///nowhere/.*pass their path"):
        load("good", cache_dir=tmp_path / "other")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["x.pt"]


# --------------------------------------------------------------------------------------------------
# Prompts and objective

NAMES = ["cat", "dog", "great white shark"]


def batch(seed: int = 0, n: int = 4):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 32, 32, generator=generator)
    return images, torch.arange(n) % len(NAMES)


def test_prompts_start_where_the_paper_says(clip):
    torch.manual_seed(0)
    prompts = PromptLearner(clip, n_ctx=4, depth=12)
    assert prompts.text.shape == (4, 4, 64) and prompts.vision.shape == (3, 4, 128)  # cut to layers
    words = clip.token_embedding.weight[[320, 1125, 539, 320]]  # a photo of a
    assert torch.equal(prompts.text[0], words)
    assert 0.015 < prompts.text[1:].std() < 0.025 and 0.015 < prompts.vision.std() < 0.025
    paper = CLIP(512, 224, 16, 768, 12, 512, 12, vocab_size=49408)
    assert sum(p.numel() for p in PromptLearner(paper).parameters()) == 61_440


@pytest.mark.parametrize("n_ctx", [1, 2, 4, 6])
def test_number_of_prompts(clip, n_ctx):
    """Fewer than "a photo of a" leave its last words; more get positions of their own."""
    model = PromptOT(clip, NAMES, n_ctx=n_ctx, depth=1)
    text = model.text_features()
    assert text.shape == (3, 16) and model(batch()[0]).shape == (4, 3)
    if n_ctx <= 4:  # as initialised, the first layer changes nothing
        torch.testing.assert_close(text, model.text0)


@pytest.mark.parametrize("n_ctx", [1, 2, 4, 6])
def test_class_names_that_begin_alike(clip, n_ctx):
    names = ["sea", "sea lion", "sea lion pup", "sea", "sea.", "x", "lake"]
    model = PromptOT(clip, names, n_ctx=n_ctx, depth=2)
    slow = [slow_encode_text(clip, row, model.prompts.text) for row in model.tokens]
    torch.testing.assert_close(model.text_features(), unit(torch.stack(slow)), rtol=1e-4, atol=1e-5)


def test_loss_is_cross_entropy_plus_lambda_ot(clip):
    torch.manual_seed(0)
    model, (images, labels) = PromptOT(clip, NAMES), batch()
    loss, parts = model.loss(images, labels, lam=3.0, epsilon=0.02)
    torch.testing.assert_close(parts["ce"], F.cross_entropy(model(images), labels))
    z = torch.cat([model.image_features(images), model.text_features()[labels]], 1)
    z0 = torch.cat([unit(clip.encode_image(images)), unit(clip.encode_text(
        tokenize([f"a photo of a {name}." for name in NAMES])))[labels]], 1)
    cost = torch.cdist(z, z0).square() / 2
    ot = (sinkhorn(cost, epsilon=0.02) * cost).sum()
    torch.testing.assert_close(parts["ot"], ot, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loss, parts["ce"] + 3 * ot, rtol=1e-3, atol=1e-5)
    alone, parts = model.loss(images, labels, reg="none")
    assert alone == parts["ce"] and parts["plan"] is None


def test_only_prompts_get_gradients(clip):
    model, (images, labels) = PromptOT(clip, NAMES), batch()
    model.loss(images, labels)[0].backward()
    assert all(p.grad is None for p in clip.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.prompts.parameters())


def test_many_classes_in_chunks_give_the_same_gradients(clip, monkeypatch):
    """Encoding very many classes in parts, and again in the backward pass, is exact."""
    names = [" ".join(["thing"] * (1 + i % 5)) + f" {i}" for i in range(300)]
    images, labels = batch()
    gradients, texts = [], []
    for many in (2048, 3):
        monkeypatch.setattr(promptot, "MANY_CLASSES", many)
        torch.manual_seed(0)
        model = PromptOT(clip, names)
        model.loss(images, labels)[0].backward()
        gradients.append(model.prompts.text.grad)
        texts.append(model.text_features())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    whole = unit(clip.encode_text(model.tokens, model.prompts.text))
    for text in texts:
        torch.testing.assert_close(text, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_and_losses_are_fp32(clip, precision):
    images, labels = batch()
    losses = {}
    for p in ("fp32", precision):
        torch.manual_seed(0)
        model = PromptOT(clip, NAMES, precision=p)
        losses[p], parts = model.loss(images, labels)
        losses[p].backward()
        for tensor in (losses[p], parts["plan"], model.prompts.text.grad):
            assert tensor.dtype == torch.float32
    torch.testing.assert_close(losses[precision], losses["fp32"], rtol=0.05, atol=0.01)


def test_half_precision_gradients_of_many_texts(clip):
    """All texts share the prompts: their gradients are added up in fp32."""
    gradients = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = PromptOT(clip, [str(i) for i in range(500)], precision=precision)
        direction = torch.randn(16, generator=torch.Generator().manual_seed(1))
        (model.text_features() @ direction).sum().backward()
        gradients.append(model.prompts.text.grad)
    assert (gradients[0] - gradients[1]).norm() < 0.03 * gradients[0].norm()


def test_schedule_of_learning_rates():
    rates = [learning_rate(epoch) for epoch in range(40)]
    assert rates[0] == 1e-4 and rates[1] == 5e-3
    for epoch, rate in ((2, 4.9923e-3), (3, 4.9692e-3), (39, 3.0779e-5)):
        assert rates[epoch] == pytest.approx(rate, rel=1e-4)


# --------------------------------------------------------------------------------------------------
# Training


def digits(shots: int = 4) -> list:
    dataset = data.load_dataset(DEMO / "digits")
    return data.few_shot(dataset.train, shots, random.Random(1)), dataset.classnames


def tune(clip, epochs=2, **options):
    items, names = digits()
    torch.manual_seed(1)
    model = PromptOT(clip, names)
    history = promptot.train(model, items, epochs=40, stop_epoch=epochs, log=report.Log(quiet=True),
                             **options)
    return model, history


def prompts_of(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.prompts.parameters()])


def test_training_moves_the_prompts_and_nothing_else(demo_clip):
    before = {name: p.clone() for name, p in demo_clip.named_parameters()}
    start, _ = tune(demo_clip, epochs=0)
    model, history = tune(demo_clip)
    assert all(torch.equal(p, before[name]) for name, p in demo_clip.named_parameters())
    assert (prompts_of(model) != prompts_of(start)).float().mean() > 0.99
    assert [set(h) for h in history] == 2 * [{"loss", "ce", "ot", "off_diagonal"}]


def test_same_seed_same_prompts_other_regulariser_others(demo_clip):
    model, history = tune(demo_clip)
    again, _ = tune(demo_clip)
    assert torch.equal(prompts_of(model), prompts_of(again))
    for other in (dict(reg="none"), dict(modality="image"), dict(seed=2), dict(augment=False)):
        assert not torch.equal(prompts_of(tune(demo_clip, **other)[0]), prompts_of(model))


def test_a_killed_run_resumes_to_the_same_prompts(demo_clip, tmp_path, monkeypatch):
    model, history = tune(demo_clip, epochs=3)
    state_file = tmp_path / "state.pt"
    save, saved = promptot.save_atomically, []

    def save_once(*args):
        if saved:
            raise KeyboardInterrupt  # after the work of epoch 2, before it is saved
        saved.append(save(*args))

    monkeypatch.setattr(promptot, "save_atomically", save_once)
    with pytest.raises(KeyboardInterrupt):
        tune(demo_clip, epochs=3, state_file=state_file)
    monkeypatch.setattr(promptot, "save_atomically", save)
    resumed, its_history = tune(demo_clip, epochs=3, state_file=state_file)
    assert torch.equal(prompts_of(resumed), prompts_of(model)) and its_history == history
    whole = state_file.read_bytes()
    state_file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="state.pt is damaged"):
        tune(demo_clip, epochs=3, state_file=state_file)


def test_workers_do_not_change_the_result(demo_clip):
    with_workers, _ = tune(demo_clip, epochs=1, workers=2)
    assert torch.equal(prompts_of(with_workers), prompts_of(tune(demo_clip, epochs=1)[0]))


def test_a_loss_that_is_not_finite_stops_the_run(demo_clip):
    with pytest.raises(ValueError, match=r"not finite in epoch \d+, step \d+"):
        tune(demo_clip, epochs=40, lr=1e20, reg="none")


# --------------------------------------------------------------------------------------------------
# Data: tiny folders to load

CLASSES = ["red_fox", "tabby", "zebra"]


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (12, 10)) -> None:
    """A small image of random pixels; the seed makes it its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1])).save(path)


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    for c, count in counts.items():
        for i in range(count):
            picture(root / c / f"{i:03d}.png", hash((len(c), i)))
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


@pytest.mark.parametrize("name", [b.name for b in data.BENCHMARKS])
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

    assert data.load_dataset(tmp_path) == dataset  # the folder that it is in, too
    renamed = home.rename(tmp_path / "my pictures")
    assert data.load_dataset(renamed).name == name


@pytest.mark.parametrize("name", [b.name for b in data.BENCHMARKS])
def test_a_wrong_tree_gets_the_expected_one(name, tmp_path):
    b = benchmark(name)
    home = tmp_path / b.folder
    home.mkdir()
    with pytest.raises(FileNotFoundError) as e:
        data.load_dataset(home)
    first, *tree = str(e.value).splitlines()
    assert str(home) in first
    for line in (f"{b.folder}/", f"{b.images}/...", *(b.files or [b.split_file])):
        assert line in [t.strip() for t in tree]


@pytest.mark.parametrize("name", ["ImageNetV2", "ImageNet-A"])
def test_imagenet_variants_find_the_names_in_the_sibling_or_where_told(name, tmp_path):
    home = build(name, tmp_path)
    elsewhere = (home / "classnames.txt").rename(tmp_path / "names.txt")
    for told in (None, tmp_path / "typo.txt"):
        with pytest.raises(FileNotFoundError, match="no file .*(classnames|typo).txt"):
            data.load_dataset(home, classnames_file=told)
    assert data.load_dataset(home, classnames_file=elsewhere).classnames[0] == "red fox"
    build("ImageNet", tmp_path)
    assert data.load_dataset(home).classnames[0] == "red fox"


def test_imagenet_v2_folders_are_lines_of_classnames(tmp_path):
    home = class_folders(tmp_path / "imagenetv2", {f"imagenetv2-matched-frequency-format-val/{i}": 1
                                                   for i in range(12)})
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


def test_eurosat_as_torchvision_leaves_it(tmp_path):
    images = class_folders(tmp_path / "eurosat/2750", {"Forest": 10, "AnnualCrop": 10, "River": 10})
    dataset = data.load_dataset(tmp_path)
    assert dataset.classnames == ["Annual Crop Land", "Forest", "River"]
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [15, 6, 9]
    assert any("split" in note for note in dataset.notes)
    for root in (tmp_path / "eurosat", images):
        assert data.load_dataset(root) == dataset
    for root in (tmp_path / "x", tmp_path / "EuroSAT_RGB"):  # other zips, other names
        shutil.copytree(images, root)
        assert data.load_dataset(root).classnames == dataset.classnames


def test_a_benchmark_without_split_file_is_read_from_its_class_folders(tmp_path):
    home = class_folders(tmp_path / "caltech-101", {
        f"101_ObjectCategories/{c}": 4 for c in ("BACKGROUND_Google", "Faces", "lotus")
    })
    dataset = data.load_dataset(home)
    assert dataset.classnames == ["face", "lotus"]  # CoOp's names, and without the background
    assert any("do not compare" in note for note in dataset.notes)


def test_flat_image_folders_are_not_classes(tmp_path):
    home = class_folders(tmp_path / "stanford_cars", {"cars_train": 3, "cars_test": 3})
    with pytest.raises(FileNotFoundError, match="split_zhou_StanfordCars.json"):
        data.load_dataset(home)


def test_a_folder_of_several_benchmarks_is_refused(tmp_path):
    build("EuroSAT", tmp_path), build("DescribableTextures", tmp_path)
    with pytest.raises(ValueError, match="several data sets.*dtd, eurosat"):
        data.load_dataset(tmp_path)


def split_file(home: Path, change) -> None:
    file = home / "split_zhou_EuroSAT.json"
    split = json.loads(file.read_text())
    change(split)
    file.write_text(json.dumps(split))


@pytest.mark.parametrize("change, message", [
    (lambda s: s["test"].extend([["a.jpg", 0, "red_fox"], ["b.jpg", 1, "tabby"]]),
     r"names 2 images that are not there, the first is .*a\.jpg"),
    (lambda s: [row.__setitem__(1, 3) for p in s.values() for row in p if row[1] == 2],
     "no image has label 2"),
    (lambda s: s["test"][0].__setitem__(2, "dog"), "label 0 has two names, 'red_fox' and 'dog'"),
    (lambda s: [row.__setitem__(2, "red fox") for p in s.values() for row in p if row[1] == 2],
     "two classes have the name 'red fox'"),
    (lambda s: s.update(train=[row for row in s["train"] if row[1] != 1]),
     "no train image of class 'tabby'"),
    (lambda s: s.pop("test"), "not a split file"),
    (lambda s: s["train"].append("x"), "not a split file"),
    (lambda s: [p.clear() for p in s.values()], "two classes are needed"),
])
def test_bad_split_files(change, message, tmp_path):
    home = build("EuroSAT", tmp_path)
    split_file(home, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        data.load_dataset(home)
    assert "\n" not in str(e.value) or isinstance(e.value, FileNotFoundError)


def test_unreadable_json_and_unknown_variant(tmp_path):
    home = build("EuroSAT", tmp_path)
    (home / "split_zhou_EuroSAT.json").write_text('{"train": [')
    with pytest.raises(ValueError, match="is not a split file"):
        data.load_dataset(home)
    home = build("FGVCAircraft", tmp_path)
    (home / "images_variant_val.txt").write_text("003 Concorde\n")
    with pytest.raises(ValueError, match="Concorde"):
        data.load_dataset(home)


def test_download(tmp_path, monkeypatch):
    class FGVCAircraft:
        _URL = "http://example.org/aircraft.tar.gz"

        def __init__(self, root, download):
            assert download
            build("FGVCAircraft", Path(root)).rename(Path(root) / "data")
            (Path(root) / "fgvc-aircraft-2013b").mkdir()
            (Path(root) / "data").rename(Path(root) / "fgvc-aircraft-2013b/data")

    class Offline(FGVCAircraft):
        def __init__(self, root, download):
            Path(root, "half").mkdir()
            raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "FGVCAircraft", Offline)
    with pytest.raises(OSError, match=r"from http://example.org/.*\(no route to host\)$"):
        data.download("FGVCAircraft", tmp_path)
    monkeypatch.setattr(torchvision.datasets, "FGVCAircraft", FGVCAircraft)
    home = data.download("fgvc_aircraft", tmp_path)
    assert home == tmp_path / "fgvc_aircraft" and len(data.load_dataset(home).train) == 9
    assert [p.name for p in tmp_path.iterdir()] == ["fgvc_aircraft"]  # nothing left lying about
    monkeypatch.setattr(torchvision.datasets, "FGVCAircraft", Offline)
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
    assert any("fly" in note for note in dataset.notes)  # cannot be tested
    items = dataset.train + dataset.val + dataset.test
    assert len(items) == len(set(items)) == 33

    shutil.rmtree(root / "tabby_cat")
    again = data.load_dataset(root)
    assert again.train == [item for item in dataset.train if item[1] < 3]


@pytest.mark.parametrize("n, counts", [
    (1, [1, 0, 0]), (2, [1, 0, 1]), (3, [2, 0, 1]), (4, [2, 1, 1]), (5, [2, 1, 2]), (10, [5, 2, 3]),
])
def test_few_images_go_to_train_then_test_then_val(n, counts):
    splits = data._split([(str(i), 0, "a") for i in range(n)])
    assert [len(splits[part]) for part in data.PARTS] == counts


def test_folders_train_and_test(tmp_path):
    for part, count in {"train": 3, "test": 2}.items():
        class_folders(tmp_path / part, {"b_c": count, "a": count})
    dataset = data.load_dataset(tmp_path)
    assert dataset.classnames == ["a", "b c"] and dataset.val == []
    assert [y for _, y in dataset.train] == [0, 0, 0, 1, 1, 1] and len(dataset.test) == 4

    class_folders(tmp_path / "test", {"d": 1})
    with pytest.raises(ValueError, match="different classes: 'd'"):
        data.load_dataset(tmp_path)
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(FileNotFoundError, match="neither test/ nor val/"):
        data.load_dataset(tmp_path)
    (tmp_path / "train").rename(tmp_path / "val")
    assert data.load_dataset(tmp_path).notes  # val/ is the test set


@pytest.mark.parametrize("files, message", [
    ([], "no class folders"),
    (["a.png"], "no class folders"),
    (["cat/a.png", "dog/"], "no images in .*dog"),
    (["cat/a.png", "cat/b.png"], "two classes are needed"),
    (["big_cat/a.png", "big cat/b.png"], "two classes have the name 'big cat'"),
    (["Big_cat/a.png", "big cat/b.png"], "two classes have the name 'big cat'"),  # same tokens
])
def test_bad_folders(files, message, tmp_path):
    for file in files:
        picture(tmp_path / file) if file.endswith("png") else (tmp_path / file).mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.load_dataset(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nothing"):
        data.load_dataset(tmp_path / "nothing")


def test_other_files_are_skipped_and_noted(tmp_path):
    class_folders(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "a/readme.txt").write_text("hello")
    (tmp_path / "a/.DS_Store").write_text("")
    (tmp_path / ".git").mkdir()
    dataset = data.load_dataset(tmp_path)
    assert len(dataset.train + dataset.test) == 4 and "1 files skipped" in dataset.notes[0]
    assert "readme.txt" in dataset.notes[0]


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
    for seed in (0, 1, 2, 3):
        rng = random.Random(seed)
        ours = [data.few_shot(train, shots, rng), data.few_shot(val, min(shots, 4), rng)]
        assert ours == coop_shots(train, val, shots, seed)
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
    dataset = data.Dataset("x", [f"c{i}" for i in range(n)], items[:20], items[:4], items[20:],
                           template="{}!", shift=data.noisy)
    expected = coop_base_novel(dataset.train, dataset.test, dataset.classnames)
    for part, (classnames, train, test) in zip(data.base_novel(dataset), expected):
        assert (part.classnames, part.train, part.test) == (classnames, train, test)
        assert part.template == "{}!" and part.shift is data.noisy
    assert len(part.notes) == (n == 2)  # accuracy on a single novel class is 100 %


def test_base_shots_equal_those_of_the_all_class_run():
    items = [(f"{i}.jpg", i % 10) for i in range(200)]
    shots = data.few_shot(items, 4, random.Random(1))
    dataset = data.Dataset("x", [str(i) for i in range(10)], shots, [], items)
    base, _ = data.base_novel(dataset)
    assert base.train == [item for item in shots if item[1] < 5]


# --------------------------------------------------------------------------------------------------
# Data: images


def test_test_transform_is_resize_crop_normalise():
    """Pixel by pixel against Pillow: the smaller edge to 16, then the centre."""
    image = Image.frombytes("RGB", (64, 32), random.Random(0).randbytes(3 * 64 * 32))
    crop = image.resize((32, 16), Image.Resampling.BICUBIC).crop((8, 0, 24, 16))
    x = data.test_transform(16)(image)
    assert x.shape == (3, 16, 16)
    for row, column in [(0, 0), (0, 15), (7, 8), (15, 0)]:
        for channel, value in enumerate(crop.getpixel((column, row))):
            expected = (value / 255 - data.MEAN[channel]) / data.STD[channel]
            assert x[channel, row, column].item() == pytest.approx(expected, abs=1e-5)


def test_train_transform_crops_8_to_100_percent_and_flips_half():
    """On a ramp from left to right the range of values is the width of the crop."""
    torch.manual_seed(0)
    ramp = Image.linear_gradient("L").rotate(90).convert("RGB")  # 256 x 256, 0 to 255
    transform = data.train_transform(32)
    assert transform.transforms[0].interpolation.value == "bicubic"
    pixels = torch.stack([transform(ramp)[0, 16] for _ in range(400)])  # a row of each, (400, 32)
    pixels = pixels * data.STD[0] + data.MEAN[0]
    slope = pixels[:, -1] - pixels[:, 0]
    assert 0.4 < (slope > 0).float().mean() < 0.6
    widths = slope.abs() * 32 / 31
    assert widths.min() > math.sqrt(0.08 * 3 / 4) - 0.05 and widths.max() > 0.95
    # area uniform in (0.08, 1), log ratio uniform: the mean of sqrt(area) is 0.705
    assert 0.65 < widths.mean() < 0.75


@pytest.mark.parametrize("shift", list(data.SHIFTS))
def test_shifts_are_deterministic_and_touch_test_images_only(shift, tmp_path):
    class_folders(tmp_path, {"a": 4, "b": 4})
    plain, shifted = data.load_dataset(tmp_path), data.load_dataset(f"{tmp_path}:{shift}")
    assert shifted.name == f"{plain.name}:{shift}" and shifted.test == plain.test
    images = [data.Images(plain.test, data.test_transform(8), s) for s in (None, shifted.shift)]
    assert not torch.equal(images[0][0][0], images[1][0][0])
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = [images[1][i][0] for i in range(2)]
    second = [images[1][i][0] for i in (1, 0)][::-1]
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert torch.equal(torch.get_rng_state(), state)


def test_shifts_by_hand():
    image = Image.new("RGB", (64, 64), (100, 150, 200))
    assert data.SHIFTS["inverted"](image).getpixel((3, 3)) == (155, 105, 55)
    assert data.rotated(image).getpixel((0, 0)) == (0, 0, 0)
    noise = pil_to_tensor(data.noisy(image)).float()
    assert abs(noise[1].mean() - 150) < 5 and 40 < noise[0].std() < 55
    darker = pil_to_tensor(data.noisy(image.point(lambda v: v - 1)))
    assert (noise - darker).std() > 20  # another image, other noise


def test_a_folder_with_a_colon_is_itself(tmp_path):
    class_folders(tmp_path / "x:noisy", {"a": 2, "b": 2})
    assert data.load_dataset(f"{tmp_path}/x:noisy").shift is None


def test_all_kinds_of_images_become_rgb(tmp_path):
    grey = Image.frombytes("L", (2, 1), bytes([0, 200]))
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "I"):
        if mode.startswith("I"):
            image = Image.frombytes("I;16", (2, 1), bytes([0, 0, 0, 200])).convert(mode)
        else:
            image = grey.convert(mode)
        path = tmp_path / f"{mode[0]}.tiff"
        image.save(path)
        rgb = data.open_image(str(path))
        assert rgb.mode == "RGB" and rgb.getpixel((0, 0)) == (0, 0, 0)
        assert rgb.getpixel((1, 0)) == ((255,) * 3 if mode == "1" else (200,) * 3), mode


def broken(path: Path, kind: str) -> str:
    picture(path, size=(64, 64))
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no image", "cut": content[: len(content) // 2]}[kind])
    return str(path)


@pytest.mark.parametrize("kind, workers", [
    ("empty", 0), ("text", 0), ("cut", 0), ("cut", 1), ("bomb", 0), ("missing", 0),
])
def test_a_broken_image_is_named_in_one_line(kind, workers, tmp_path, monkeypatch):
    path = str(tmp_path / "x.png")
    if kind == "bomb":
        picture(tmp_path / "x.png", size=(64, 64))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    elif kind != "missing":
        broken(tmp_path / "x.png", kind)
    with pytest.raises(ValueError) as e:
        list(data.test_loader([(path, 0)], 8, 4, workers=workers))
    assert str(e.value).startswith(f"cannot read the image {path} (") and "\n" not in str(e.value)
    with pytest.raises(data.ImageError, match="x.png"):
        data.train_loader([(path, 0)], 8, 4, seed=1, epochs=range(1))


# --------------------------------------------------------------------------------------------------
# Data: batches


@pytest.fixture
def items(tmp_path):
    class_folders(tmp_path, {"a": 5, "b": 6})
    dataset = data.load_dataset(tmp_path)
    return dataset.train + dataset.val + dataset.test  # 11


@pytest.mark.parametrize("n, batch_size, sizes", [(11, 4, [4, 4]), (8, 4, [4, 4]), (6, 8, [6])])
def test_an_epoch_is_a_permutation_without_the_last_incomplete_batch(n, batch_size, sizes):
    batches = data.EpochBatches(n, batch_size, seed=1, epochs=range(3))
    assert batches.steps == len(sizes) and len(batches) == len(list(batches)) == 3 * len(sizes)
    orders = []
    for epoch in range(3):
        of_epoch = list(batches)[epoch * len(sizes) : (epoch + 1) * len(sizes)]
        assert [len(batch) for batch in of_epoch] == sizes
        draws = [draw for batch in of_epoch for draw in batch]
        assert {e for e, _ in draws} == {epoch}
        orders.append([index for _, index in draws])
        assert len(set(orders[-1])) == sum(sizes) and set(orders[-1]) <= set(range(n))
    assert orders[0] != orders[1] and list(batches) == list(batches)
    other = data.EpochBatches(n, batch_size, seed=2, epochs=range(3))
    assert list(other) != list(batches)
    late = data.EpochBatches(n, batch_size, seed=1, epochs=range(1, 3))  # after an interruption
    assert list(late) == list(batches)[len(sizes) :]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_see_what_one_sees(world):
    alone = list(data.EpochBatches(13, 5, seed=1, epochs=range(2)))
    shares = [list(data.EpochBatches(13, 5, 1, range(2), rank, world)) for rank in range(world)]
    assert [sum(parts, []) for parts in zip(*shares)] == alone
    assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in zip(*shares))
    with pytest.raises(ValueError, match="too few for 6 processes"):
        data.EpochBatches(13, 5, 1, range(2), 0, 6)


def test_pictures_depend_on_seed_epoch_and_index_alone(items, monkeypatch):
    """Not on workers, batch size, shards, interruption, or whether images are kept in memory."""
    kept = data.Images(items, data.train_transform(8), seed=1)
    monkeypatch.setattr(data, "KEEP_BYTES", 0)
    read = data.Images(items, data.train_transform(8), seed=1)
    assert kept.kept and not read.kept
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for draw in [(0, 3), (1, 3), (0, 4)]:
        assert torch.equal(kept[draw][0], read[draw][0]) and kept[draw][1] == items[draw[1]][1]
    assert torch.equal(torch.get_rng_state(), state)  # the program's own randomness is untouched
    assert not torch.equal(kept[0, 3][0], kept[1, 3][0])
    twins = data.Images([items[0]] * 2, data.train_transform(8), seed=1)
    assert not torch.equal(twins[0, 0][0], twins[0, 1][0])
    other = data.Images(items, data.train_transform(8), seed=2)
    assert not torch.equal(kept[0, 3][0], other[0, 3][0])


def test_loaders_give_the_same_with_and_without_workers_and_in_shards(items):
    def run(epochs=range(3), **kwargs):
        loader = data.train_loader(items, 8, 4, seed=1, epochs=epochs, **kwargs)
        assert loader.batch_sampler.steps == 2 and len(loader) == 2 * len(epochs)
        return list(loader)

    state = torch.get_rng_state()
    alone = run()
    assert torch.equal(torch.get_rng_state(), state)
    assert alone[0][0].shape == (4, 3, 8, 8) and alone[0][1].dtype == torch.long
    shards = [
        [torch.cat(parts) for parts in zip(a, b)]
        for a, b in zip(run(rank=0, world=2), run(rank=1, world=2))
    ]
    for other in (run(workers=2), shards, alone[:2] + run(epochs=range(1, 3), workers=1)):
        for (x, y), (x2, y2) in zip(alone, other, strict=True):
            assert torch.equal(x, x2) and torch.equal(y, y2)


def test_test_loader_keeps_the_order(items):
    for workers in (0, 2):
        loader = data.test_loader(items, 8, 4, workers=workers)
        batches = list(loader)
        assert [len(y) for _, y in batches] == [4, 4, 3]
        assert torch.cat([y for _, y in batches]).tolist() == [y for _, y in items]


# --------------------------------------------------------------------------------------------------
# The command line


def run(*args, capsys=None) -> dict:
    """main([...]) on the demo, quick by default; returns the content of metrics.json."""
    main([str(a) for a in args])
    output = args[args.index("--output") + 1]
    return json.loads((Path(output) / "metrics.json").read_text())


QUICK = ("--epochs", 2, "--shots", 4)


def test_demo_from_the_command_line(tmp_path, capsys):
    metrics = run("--output", tmp_path / "run", "--epochs", 6)
    zero_shot, (result,) = metrics["zero_shot"], metrics["runs"]
    assert zero_shot["base"] > 60 and zero_shot["novel"] > 60  # chance is 20
    assert result["accuracy"]["base"] > 70 and result["accuracy"]["novel"] > 70
    printed = capsys.readouterr().out
    order = ["data  ", "model  ", "zero-shot base", "off-diagonal", "| base-to-novel", "tuned, ot"]
    places = [printed.index(word) for word in order]
    assert places == sorted(places)
    assert "HM" in (tmp_path / "run" / "results.md").read_text()
    files = {p.name for p in (tmp_path / "run" / "base-ot-16shots-seed1").iterdir()}
    assert files == {"prompts.pt", "plan.png"}


def test_seeds_shots_and_regularisers_in_one_table_and_resume(tmp_path, capsys):
    args = ("--output", tmp_path, "--epochs", 1, "--shots", 1, 2, "--reg", "none", "pointwise",
            "--resume")
    metrics = run(*args)
    assert [(r["reg"], r["shots"]) for r in metrics["runs"]] == [
        ("none", 1), ("none", 2), ("pointwise", 1), ("pointwise", 2)]
    metrics_again = run(*args, "--seed", 1, 2)
    assert metrics_again["runs"][:4] == metrics["runs"] and len(metrics_again["runs"]) == 8
    printed = capsys.readouterr().out
    assert printed.count("finished before") == 4
    assert "tuned, pointwise, 2 shots" in printed and " ± " in printed
    for args in (("--lam", 5), ("--no-augment",)):
        expect_error(capsys, args[0][-3:], "--output", tmp_path, "--epochs", 1, *args, "--resume")
    expect_error(capsys, "--resume", "--output", tmp_path, "--epochs", 1)


def test_killed_at_any_moment_and_resumed(tmp_path):
    """SIGKILL after random times; in the end the prompts are those of an undisturbed run."""
    args = ["--epochs", 12, "--shots", 4, "--batch-size", 8]
    run(*args, "--output", tmp_path / "whole")
    command = [sys.executable, HERE / "promptot.py", *args, "--output", tmp_path / "killed",
               "--resume"]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    prompts = "base-ot-4shots-seed1/prompts.pt"
    for seconds in (4, 5, 6):
        process = subprocess.Popen([str(c) for c in command], env=env, stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        process.wait()
    run(*args, "--output", tmp_path / "killed", "--resume")
    whole, killed = (torch.load(tmp_path / d / prompts) for d in ("whole", "killed"))
    assert torch.equal(whole["text"], killed["text"])
    assert torch.equal(whole["vision"], killed["vision"])


def test_all_classes_other_data_and_shifts(tmp_path, capsys):
    metrics = run("--output", tmp_path, *QUICK, "--classes", "base", "all", "--eval-data",
                  f"{DEMO}/digits:inverted", f"{DEMO}/digits:noisy", DEMO / "letters")
    targets = ["digits", "digits:inverted", "digits:noisy", "letters"]
    base, every = metrics["runs"]
    assert list(base["accuracy"]) == ["base", "novel"] and list(every["accuracy"]) == targets
    assert list(metrics["zero_shot"]) == ["base", "novel", *targets]
    printed = capsys.readouterr().out
    places = [printed.index(f"| {title} ") for title in
              ("base-to-novel", "cross-dataset", "domain generalisation", "average of targets")]
    assert places == sorted(places)


def test_a_state_of_unknown_settings_is_not_taken_up(tmp_path):
    stale = tmp_path / "base-ot-4shots-seed1" / "state.pt"
    stale.parent.mkdir()
    stale.write_text("left behind by a run whose metrics.json was removed")
    assert len(run("--output", tmp_path, *QUICK)["runs"][0]["history"]) == 2


def test_data_sets_named_like_others_keep_their_own_numbers(tmp_path):
    novel = tmp_path / "novel"
    for c in ("one", "two", "three", "four"):
        shutil.copytree(DEMO / "digits" / c, novel / c)
    metrics = run("--data", novel, "--model", DEMO / "tiny-clip.pt", "--output", tmp_path / "run",
                  "--epochs", 1, "--shots", 1, "--classes", "base", "all", "--eval-data", novel)
    base, every = metrics["runs"]
    assert list(base["accuracy"]) == ["base", "novel"]
    assert list(every["accuracy"]) == [str(novel)] and str(novel) in metrics["zero_shot"]


def test_saved_prompts_are_evaluated_and_predict(tmp_path, capsys):
    metrics = run("--output", tmp_path / "run", *QUICK)
    prompts = tmp_path / "run" / "base-ot-4shots-seed1" / "prompts.pt"
    assert prompts.stat().st_size < 100_000
    loaded = run("--load", prompts, "--output", tmp_path / "loaded")
    assert loaded["runs"][0]["accuracy"] == metrics["runs"][0]["accuracy"]
    run("--load", prompts, "--data", DEMO / "letters", "--classes", "all",
        "--output", tmp_path / "letters")
    capsys.readouterr()

    image = next((DEMO / "digits" / "nine").iterdir())
    main(["--load", str(prompts), "--predict", str(image), "--names", "zero, nine"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(image) and len(lines) == 3
    shares = [float(line.split("%")[0]) for line in lines[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)

    other = tmp_path / "other.pt"
    torch.save(small_clip().state_dict(), other)
    expect_error(capsys, "other weights", "--load", prompts, "--model", other)
    whole, saved = prompts.read_bytes(), promptot.load_saved(prompts)
    saved["text"][0, 0, 0] = math.nan
    torch.save(saved, prompts)
    expect_error(capsys, "not all of their numbers are finite", "--load", prompts)
    prompts.write_bytes(whole[:1000])
    expect_error(capsys, "damaged", "--load", prompts)
    expect_error(capsys, "no saved prompts", "--load", DEMO / "tiny-clip.pt", "--model",
                 DEMO / "tiny-clip.pt")


def expect_error(capsys, words: str, *args) -> None:
    """One line on stderr that has the words, exit status 2, no traceback."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error and "Traceback" not in error
    assert error.count("\n") == 0 or "is expected as" in error  # the expected tree may follow


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    shutil.copytree(DEMO / "digits" / "one", tmp_path / "single" / "one")
    for c in ("one", "two"):
        shutil.copytree(DEMO / "digits" / c, tmp_path / "broken" / c)
    broken = sorted((tmp_path / "broken" / "two").iterdir())
    for image in broken:
        image.write_text("not an image")
    model = ("--model", DEMO / "tiny-clip.pt")
    for words, *args in (
        ("no folder nowhere", "--data", "nowhere", *model),
        ("no class folders", "--data", "empty", *model),
        ("two classes", "--data", "single", *model),
        ("cannot read the image", "--data", "broken", *model),
        ("unknown model 'ViT-X'", "--model", "ViT-X"),
        ("file", "--model", "file"),
        ("no folder elsewhere", "--eval-data", "elsewhere"),
        ("--lam", "--lam", "-1"),
        ("--lam", "--lam", "inf"),
        ("--epsilon", "--epsilon", "0"),
        ("--epsilon", "--epsilon", "x"),
        ("--epochs", "--epochs", "0"),
        ("--stop-epoch", "--stop-epoch", "41"),
        ("--reg", "--reg", "wasserstein"),
        ("--predict needs --load", "--predict", "x.png"),
        ("--device", "--device", "cuda:99"),
        ("unrecognized arguments: --shot", "--shot", "4"),
        ("file", "--output", "file/x"),
        ("not finite", "--lr", "1e20", "--reg", "none"),
    ):
        expect_error(capsys, words, *args)


def test_torchrun_gives_the_prompts_of_one_process(tmp_path):
    """Two gloo processes share batch, classes and test set; 5 base classes and 4 images each."""
    args = ["--epochs", "2", "--shots", "4", "--batch-size", "8"]
    metrics = run(*args, "--output", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", str(29500 + os.getpid() % 1000), HERE / "promptot.py", *args,
               "--output", tmp_path / "two", "--device", "cpu"]
    subprocess.run([str(c) for c in command], check=True, timeout=120,
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    prompts = [torch.load(tmp_path / d / "base-ot-4shots-seed1/prompts.pt") for d in ("one", "two")]
    for name in ("text", "vision"):
        torch.testing.assert_close(prompts[0][name], prompts[1][name], rtol=1e-3, atol=1e-5)
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    for name, value in metrics["runs"][0]["accuracy"].items():
        assert two["runs"][0]["accuracy"][name] == pytest.approx(value, abs=0.5)


# --------------------------------------------------------------------------------------------------
# The report


def test_results_table():
    runs = [{"classes": "base", "reg": reg, "shots": 16, "seed": s,
             "accuracy": {"base": 90.0 + s, "novel": 60.0}}
            for reg in ("none", "ot") for s in (1, 3)]
    zero_shot = {"base": 50.0, "novel": 50.0}
    table = {"title": "base-to-novel", "classes": "base", "targets": ["base", "novel"],
             "source": []}
    metrics = {"zero_shot": zero_shot, "zero_shot_template": zero_shot, "runs": runs,
               "tables": [table]}
    lines = report.results(metrics).split("\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0] == ["base-to-novel", "base", "novel", "HM"]
    assert rows[2] == ['zero-shot, "a photo of a {}."', "50.00", "50.00", "50.00"]
    assert rows[3][:3] == ["tuned, none", "92.00 ± 1.41", "60.00 ± 0.00"]
    hm = [report.harmonic_mean([91, 60]), report.harmonic_mean([93, 60])]
    assert rows[4][3].startswith(f"{sum(hm) / 2:.2f} ±")


def test_the_readmes_snippets_run(monkeypatch):
    monkeypatch.chdir(HERE)
    snippets = (HERE / "README.md").read_text().split("```python\n")[1:]
    assert len(snippets) == 3
    for snippet in snippets:
        exec(snippet.split("```")[0], {})


def test_durations():
    assert [report.duration(s) for s in (0, 61, 3661)] == ["0:00", "1:01", "1:01:01"]
