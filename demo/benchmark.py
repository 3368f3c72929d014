"""Measures the time and memory of a training step, and of the plain way to compute the same step.

    python demo/benchmark.py --classes 5 50 --batch-size 4      # 5 minutes on two CPU cores
    python demo/benchmark.py --model ViT-B/16 ViT-L/14 --precision fp32 bf16

No weights and no data are needed: the models have the published sizes and random weights, images
are random, and class names are made up. For each model and precision it prints a Markdown table:

    ms, plain ms     time of a step, and of the plain way. They take turns, so that other load on
                     the machine slows down both.
    syncs            how often the CPU waits for the GPU in a step, and in a plain one
    matmul           operations per second, as a share of those of a large matrix product
    image/text/loss  shares of the step's time in %: image tower, text tower, losses with transport
    GiB              peak memory of the process or of the GPU, not for the plain way
    eval/s           images per second in evaluation, with the text features at hand

The plain way is that of the released code: two more copies of CLIP (the teacher and one that is
never used), every text at 77 tokens, nn.MultiheadAttention, the teacher's class features computed
again in each step, and transport on the CPU. It uses Sinkhorn in place of the released network
simplex, which would need another package. Both take milliseconds.
"""

import argparse
import copy
import itertools
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))  # promptot.py is in the folder above
from clip_model import CLIP, tokenize  # noqa: E402 (found by the line above)
from promptot import PromptOT, Recipe, ot_loss, sinkhorn, unit  # noqa: E402 (the same)

SIZES = {  # embed_dim, resolution, patch size, vision width and layers, text width and layers
    "ViT-B/32": (512, 224, 32, 768, 12, 512, 12),
    "ViT-B/16": (512, 224, 16, 768, 12, 512, 12),
    "ViT-L/14": (768, 224, 14, 1024, 24, 768, 12),
    "ViT-L/14@336px": (768, 336, 14, 1024, 24, 768, 12),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WORDS = """apple bear bridge castle chair church cloud desert dog field forest garden glass horse
house island kitchen lake mountain ocean orange park piano river road rose snake tower train wolf
annual black great green northern old red spotted white wild""".split()
HEAD = """\
| classes | batch | ms | plain ms | speed-up | syncs | matmul | image/text/loss | GiB | eval/s |
|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


@dataclass(frozen=True)
class Setting:
    """What a row of the table measures."""

    model: str
    precision: str
    device: str
    n_classes: int
    batch_size: int


# ---- The plain way -------------------------------------------------------------------------------
class PlainAttention(nn.MultiheadAttention):
    """PyTorch's module in place of `attention` of clip_model.py, with the same weights."""

    def __init__(self, attention: nn.Module):
        super().__init__(attention.out_proj.in_features, attention.heads, batch_first=True)
        self.load_state_dict(attention.state_dict())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, x, x, need_weights=False, attn_mask=mask)[0]


class PlainQuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def plain_copy(clip: CLIP) -> CLIP:
    """A copy of CLIP with plain attention and activation."""
    clip = copy.deepcopy(clip)
    for block in (*clip.transformer.resblocks, *clip.visual.transformer.resblocks):
        block.attn = PlainAttention(block.attn)
        block.mlp.gelu = PlainQuickGELU()
    return clip.to(clip.logit_scale.device).requires_grad_(False)


def plain_text(clip: CLIP, tokens: Tensor, prompts: Tensor | tuple = ()) -> Tensor:
    """As CLIP.encode_text, with every text in a row of its own: (C, 77) -> (C, D)."""
    x = clip.token_embedding(tokens)  # (C, 77, W)
    mask = x.new_full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
    for layer, block in enumerate(clip.transformer.resblocks):
        if layer < len(prompts):
            new = prompts[layer].expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], new, x[:, 1 + new.shape[1] :]], dim=1)
        x = block(x + clip.positional_embedding if layer == 0 else x, mask)
    return clip.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=1)] @ clip.text_projection


class PlainPromptOT(nn.Module):
    """The released code's way, with the weights and prompts of a PromptOT."""

    def __init__(self, model: PromptOT):
        super().__init__()
        self.student, self.teacher, self.unused = (plain_copy(model.clip) for _ in range(3))
        self.prompts, self.autocast = copy.deepcopy(model.prompts), model.autocast
        texts = tokenize([f"a photo of a {name}." for name in model.classnames])
        self.tokens = texts.to(model.text0.device)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor]:
        """As PromptOT.loss, without the parts."""
        with self.autocast():
            image = unit(self.student.encode_image(images, self.prompts.vision))
            text = unit(plain_text(self.student, self.tokens, self.prompts.text))
            image0 = unit(self.teacher.encode_image(images))
            text0 = unit(plain_text(self.teacher, self.tokens))
        cost = 2 - image @ image0.T - text[labels] @ text0[labels].T
        plan = sinkhorn(cost.detach().cpu()).to(cost.device)
        logits = self.student.logit_scale.exp() * image @ text.T
        return (F.cross_entropy(logits, labels) + Recipe().lam * (plan * cost).sum(),)


# ---- Measuring -----------------------------------------------------------------------------------
def clock() -> float:
    """Time in seconds, after a GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(*functions: Callable, repeats: int) -> list[float]:
    """Median time of each function. They take turns."""
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, column in zip(functions, times):
            start = clock()
            function()
            column.append(clock() - start)
    return [statistics.median(column) for column in times]


def trainer(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A function that does one training step and returns the loss."""
    parameters = model.prompts.parameters()
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def step() -> Tensor:
        loss = model.loss(images, labels)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def shares(model: PromptOT, images: Tensor, labels: Tensor, repeats: int) -> list[float]:
    """Shares of images, texts and losses in a step, forward and backward."""
    with torch.no_grad():
        image0 = model.image_features(images, tuned=False)
        f, t = model.image_features(images).requires_grad_(), model.text_features().requires_grad_()

    def image_tower():
        model.image_features(images, tuned=False)
        model.image_features(images).sum().backward()

    def text_tower():
        model.text_features().sum().backward()

    def losses():
        ce = F.cross_entropy(model.clip.logit_scale.exp() * f @ t.T, labels)
        ot, _ = ot_loss(f, t[labels], image0, model.text0[labels])
        (ce + Recipe().lam * ot).backward()

    times = seconds(image_tower, text_tower, losses, repeats=repeats)
    return [part / sum(times) for part in times]


def synchronisations(step: Callable, device: str) -> str:
    """How often the CPU waits for the GPU in one step, as far as PyTorch can tell."""
    if not device.startswith("cuda"):
        return "-"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return str(sum("called a synchronizing" in str(warning.message) for warning in caught))


def peak_memory(device: str) -> float:
    """GiB: of the GPU's memory as PyTorch counts it, otherwise of this process's memory."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # does not exist on Windows

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / 2 ** (30 if sys.platform == "darwin" else 20)


def matmul_rate(device: str, precision: str) -> float:
    """Operations per second of a large matrix product, which is about the most one can get."""
    size = 8192 if device.startswith("cuda") else 2048
    x = torch.randn(size, size, device=device, dtype=DTYPES[precision])
    return 2 * size**3 / seconds(lambda: x @ x, repeats=5)[0]


def setup(setting: Setting) -> tuple[PromptOT, Tensor, Tensor]:
    """Model, images and labels, always the same. Class names have one to four words."""
    torch.manual_seed(0)
    rng = random.Random(0)
    lengths = rng.choices((1, 2, 3, 4), weights=(4, 4, 2, 1), k=setting.n_classes)
    names = [" ".join(rng.sample(WORDS, length)) for length in lengths]
    with torch.device(setting.device):
        clip = CLIP(*SIZES[setting.model])
        for p in clip.parameters():  # scaled by their width, so that features keep their size
            p.data = torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1)
        for name, p in clip.named_parameters():
            p.data += "ln_" in name and name.endswith("weight")
        clip.logit_scale.data.fill_(2.0)
        images = torch.randn(setting.batch_size, 3, clip.image_resolution, clip.image_resolution)
        labels = torch.randint(setting.n_classes, (setting.batch_size,))
    return PromptOT(clip, names, Recipe(precision=setting.precision)), images, labels


def row(setting: Setting, rate: float, repeats: int, plain: bool) -> list[str]:
    """The cells of one line of the table."""
    model, images, labels = setup(setting)
    steps = [trainer(model, images, labels)]
    steps[0]()
    steps[0]()
    peak = peak_memory(setting.device)  # before the plain copies are made
    if plain:
        steps.append(trainer(PlainPromptOT(model), images, labels))
    losses = [float(step()) for step in steps]
    tolerance = 0.001 if setting.precision == "fp32" else 0.1
    if max(losses) - min(losses) > tolerance * max(losses):
        raise ValueError(f"the losses differ, so times cannot be compared: {losses}")
    times = seconds(*steps, repeats=repeats)
    syncs = [synchronisations(step, setting.device) for step in steps]
    with FlopCounterMode(display=False) as operations:
        steps[0]()
    with torch.no_grad():
        text = model.text_features()  # computed once in an evaluation
        evaluation = seconds(lambda: model.image_features(images) @ text.T, repeats=repeats)[0]
    comparison = ["", ""]
    if plain:
        comparison = [f"{1000 * times[1]:.0f}", f"{times[1] / times[0]:.1f}"]
    return [
        str(setting.n_classes),
        str(setting.batch_size),
        f"{1000 * times[0]:.0f}",
        *comparison,
        " / ".join(syncs),
        f"{operations.get_total_flops() / times[0] / rate:.0%}",
        " / ".join(f"{100 * share:.0f}" for share in shares(model, images, labels, repeats)),
        f"{peak:.2f}",
        f"{setting.batch_size / evaluation:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = {"nargs": "+", "metavar": "NAME"}
    ints = {"nargs": "+", "type": int, "metavar": "N"}
    add("--model", **names, default=["ViT-B/16"], choices=SIZES, help="default: ViT-B/16")
    add("--precision", **names, default=["fp32"], choices=DTYPES, help="default: fp32")
    add("--classes", **ints, default=[5, 50, 200, 1000], help="number (default: 5 50 200 1000)")
    add("--batch-size", **ints, default=[4, 32], help="images per step (default: 4 32)")
    add("--steps", type=int, default=5, help="steps per median time (default: 5)")
    add("--plain", type=int, default=200, help="plain way up to this many classes (default: 200)")
    add("--device", help="cpu or cuda (default: a GPU if there is one)")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = f"{torch.get_num_threads()} CPU threads"
    if device.startswith("cuda"):
        where = torch.cuda.get_device_name(device)
    for model, precision in itertools.product(args.model, args.precision):
        rate = matmul_rate(device, precision)
        print(f"\n{model}, {precision}, {where}, matrix product {rate / 1e12:.2f} TFLOP/s\n")
        print(HEAD, flush=True)
        for n_classes, batch_size in itertools.product(args.classes, args.batch_size):
            setting = Setting(model, precision, device, n_classes, batch_size)
            # Each row has a process of its own, because peak memory is counted per process.
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                plain = n_classes <= args.plain
                cells = process.submit(row, setting, rate, args.steps, plain).result()
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
