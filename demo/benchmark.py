"""How long a training step takes, where the time goes, and what the plain way would take.

    python demo/benchmark.py --classes 5 50 --batch-size 4    # on two CPU cores: five minutes
    python demo/benchmark.py                                  # there an hour, on a GPU minutes

No weights and no data: random weights of the published sizes, random images, made-up class names.
Prints a Markdown table. "plain" is a re-enactment of the released code: two more copies of CLIP
(a teacher, and one that is only kept), all texts at 77 tokens by nn.MultiheadAttention, those of
the teacher encoded again in every step, transport on the CPU. (Its network simplex is replaced by
textbook log-domain Sinkhorn, which needs no further package; both take milliseconds.)
Both take their steps in turn, so that what else the machine does falls on both alike.
"""

import argparse
import copy
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))  # the modules lie beside this folder
from clip_model import CLIP, tokenize  # noqa: E402
from promptot import PromptOT, Recipe, ot_loss, unit  # noqa: E402

SIZES = {  # embed_dim, image, patch, vision width and layers, text width and layers
    "ViT-B/32": (512, 224, 32, 768, 12, 512, 12),
    "ViT-B/16": (512, 224, 16, 768, 12, 512, 12),
    "ViT-L/14": (768, 224, 14, 1024, 24, 768, 12),
    "ViT-L/14@336px": (768, 336, 14, 1024, 24, 768, 12),
}
WORDS = """apple bear bridge castle chair church cloud desert dog field forest garden glass horse
house island kitchen lake mountain ocean orange park piano river road rose snake tower train wolf
annual black great green northern old red spotted white wild""".split()
COLUMNS = (
    "classes", "batch", "step, ms", "images/s", "of matmul rate", "images", "texts", "losses, OT",
    "plain, ms", "speed-up", "peak, GiB",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# --------------------------------------------------------------------------------------------------
# The plain way


class PlainBlock(nn.Module):
    """CLIP's block by nn.MultiheadAttention, with the weights of `block`."""

    def __init__(self, block: nn.Module, causal: bool):
        super().__init__()
        width = block.ln_1.normalized_shape[0]
        self.attn = nn.MultiheadAttention(width, block.attn.heads, batch_first=True)
        self.attn.load_state_dict(block.attn.state_dict())
        self.ln_1, self.mlp, self.ln_2 = block.ln_1, block.mlp, block.ln_2
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        y, size = self.ln_1(x), (x.shape[1], x.shape[1])
        mask = y.new_full(size, float("-inf")).triu(1) if self.causal else None
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(y * torch.sigmoid(1.702 * y))


class PlainCLIP(nn.Module):
    """A copy of CLIP, on the same device, with plain blocks: every token of every layer."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = copy.deepcopy(clip)
        for tower, causal in ((self.clip.transformer, True), (self.clip.visual.transformer, False)):
            tower.resblocks = nn.ModuleList(PlainBlock(b, causal) for b in tower.resblocks)
        self.to(clip.logit_scale.device).requires_grad_(False)

    def encode_image(self, images: Tensor, prompts: Tensor | tuple = ()) -> Tensor:
        tower = self.clip.visual
        patches = tower.conv1(images).flatten(2).transpose(1, 2)  # (B, N, W)
        start = tower.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([start, patches], dim=1) + tower.positional_embedding
        length = x.shape[1]
        for layer, block in enumerate(tower.transformer.resblocks):
            if layer < len(prompts):
                x = torch.cat([x[:, :length], prompts[layer].expand(len(x), -1, -1)], dim=1)
            x = block(tower.ln_pre(x) if layer == 0 else x)
        return tower.ln_post(x[:, 0]) @ tower.proj

    def encode_text(self, tokens: Tensor, prompts: Tensor | tuple = ()) -> Tensor:
        clip = self.clip
        x = clip.token_embedding(tokens)  # (C, 77, W)
        for layer, block in enumerate(clip.transformer.resblocks):
            if layer < len(prompts):
                new = prompts[layer].expand(len(x), -1, -1)
                x = torch.cat([x[:, :1], new, x[:, 1 + new.shape[1] :]], dim=1)
            x = block(x + clip.positional_embedding if layer == 0 else x)
        return clip.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=1)] @ clip.text_projection


@torch.no_grad()
def plain_sinkhorn(cost: Tensor) -> Tensor:
    """Entropic transport between uniform marginals, (B, B) -> (B, B)."""
    scores, n, v = -cost / Recipe.epsilon, len(cost), torch.zeros(1, len(cost))
    for _ in range(100):
        u = -(scores + v).logsumexp(dim=1, keepdim=True)
        v = -(scores + u).logsumexp(dim=0, keepdim=True)
    return (scores + u + v).exp() / n


class PlainPromptOT(nn.Module):
    """The released code's way, with the weights and prompts of a PromptOT."""

    def __init__(self, model: PromptOT):
        super().__init__()
        self.student, self.teacher, self.kept = (PlainCLIP(model.clip) for _ in range(3))
        self.prompts, self.autocast = copy.deepcopy(model.prompts), model.autocast
        texts = tokenize([f"a photo of a {name}." for name in model.classnames])
        self.tokens = texts.to(model.text0.device)

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor]:
        """As `PromptOT.loss`, without the parts."""
        with self.autocast():
            image = unit(self.student.encode_image(images, self.prompts.vision))
            text = unit(self.student.encode_text(self.tokens, self.prompts.text))
            image0 = unit(self.teacher.encode_image(images))
            text0 = unit(self.teacher.encode_text(self.tokens))
        cost = 2 - image @ image0.T - text[labels] @ text0[labels].T
        plan = plain_sinkhorn(cost.detach().cpu()).to(cost.device)
        logits = self.student.clip.logit_scale.exp() * image @ text.T
        return (F.cross_entropy(logits, labels) + Recipe.lam * (plan * cost).sum(),)


# --------------------------------------------------------------------------------------------------
# Measuring


def clock() -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(*functions: Callable, steps: int) -> list[float]:
    """Median time of each function; they are called in turn."""
    times = [[] for _ in functions]
    for _ in range(steps):
        for function, column in zip(functions, times):
            start = clock()
            function()
            column.append(clock() - start)
    return [statistics.median(column) for column in times]


def trainer(model: nn.Module, images: Tensor, labels: Tensor) -> Callable:
    """A function that does a training step and returns the loss."""
    parameters = model.prompts.parameters()
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=5e-4)

    def step() -> float:
        loss = model.loss(images, labels)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def parts(model: PromptOT, images: Tensor, labels: Tensor) -> list[float]:
    """Shares of images, texts, losses in a step (what the optimiser does takes next to nothing).

    The step is cut at the features, so that the backward passes of the towers can be told apart.
    """
    marks = []

    def mark(value):
        marks.append(clock())
        return value

    mark(None)
    image, image0 = mark((model.image_features(images), model.image_features(images, tuned=False)))
    text = mark(model.text_features())
    f, t = image.detach().requires_grad_(), text.detach().requires_grad_()
    ce = F.cross_entropy(model.clip.logit_scale.exp() * f @ t.T, labels)
    mark((ce + Recipe.lam * ot_loss(f, t[labels], image0, model.text0[labels])[0]).backward())
    mark(image.backward(f.grad))
    mark(text.backward(t.grad))
    forward, text_forward, losses, backward, text_backward = map(float.__sub__, marks[1:], marks)
    total = marks[-1] - marks[0]
    return [(forward + backward) / total, (text_forward + text_backward) / total, losses / total]


def matmul_rate(args: argparse.Namespace) -> float:
    """Operations per second of a big matrix product: the most that the machine can do."""
    size = 8192 if args.device.startswith("cuda") else 2048
    x = torch.randn(size, size, device=args.device, dtype=DTYPES[args.precision])
    return 2 * size**3 / seconds(lambda: x @ x, steps=5)[0]


def setup(args: argparse.Namespace, n_classes: int, batch_size: int) -> tuple:
    """Model, images, labels; the same for the same arguments. Names have one to four words."""
    torch.manual_seed(0)
    rng = random.Random(0)
    lengths = rng.choices((1, 2, 3, 4), weights=(4, 4, 2, 1), k=n_classes)
    names = [" ".join(rng.sample(WORDS, length)) for length in lengths]
    with torch.device(args.device):
        clip = CLIP(*SIZES[args.model])
        for p in clip.parameters():  # matrices by their width, so that signals keep their size
            p.data = torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1)
        for name, p in clip.named_parameters():
            p.data += "ln_" in name and name.endswith("weight")
        clip.logit_scale.data.fill_(2.0)
        images = torch.randn(batch_size, 3, clip.image_resolution, clip.image_resolution)
        labels = torch.randint(n_classes, (batch_size,))
    return PromptOT(clip, names, Recipe(precision=args.precision)), images, labels


def peak_memory(args: argparse.Namespace) -> float:
    """GiB at the peak of two steps: by CUDA's account, else the resident memory of the process."""
    step = trainer(*setup(args, args.classes[0], args.batch_size[0]))
    step(), step()
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / 2 ** (30 if sys.platform == "darwin" else 20)


def in_new_process(args: argparse.Namespace, n_classes: int, batch_size: int) -> float:
    """`peak_memory` of a process of its own. To be asked first: it inherits this one's peak."""
    flags = f"--memory --classes {n_classes} --batch-size {batch_size} --model {args.model}"
    flags += f" --device {args.device} --precision {args.precision}"
    return float(subprocess.check_output([sys.executable, __file__, *flags.split()]))


def row(args: argparse.Namespace, n_classes: int, batch_size: int, rate: float) -> list:
    """The cells of one line of the table, but for the memory."""
    model, *batch = setup(args, n_classes, batch_size)
    steps = [trainer(model, *batch)]
    if n_classes <= args.plain:
        steps.append(trainer(PlainPromptOT(model), *batch))
    with FlopCounterMode(display=False) as operations:
        losses = [steps[0]()]
    losses += [step() for step in steps[1:]]
    if max(losses) - min(losses) > (0.001 if args.precision == "fp32" else 0.1) * max(losses):
        sys.exit(f"error: the losses differ, so that times cannot be compared: {losses}")
    own, *plain = seconds(*steps, steps=args.steps)
    trials = [parts(model, *batch) for _ in range(args.steps)]
    shares = [f"{statistics.median(column):.0%}" for column in zip(*trials)]
    compared = [f"{1000 * plain[0]:.0f}", f"{plain[0] / own:.1f}"] if plain else ["", ""]
    utilisation = f"{operations.get_total_flops() / own / rate:.0%}"
    figures = [f"{1000 * own:.0f}", f"{batch_size / own:.1f}", utilisation]
    return [n_classes, batch_size, *figures, *shares, *compared]


def evaluation(args: argparse.Namespace) -> str:
    """Images/s with the text features at hand, as they are during an evaluation."""
    model, images, _ = setup(args, args.classes[0], max(args.batch_size))
    with torch.inference_mode():
        text = model.text_features()
        guess = lambda: (model.image_features(images) @ text.T).argmax(dim=1)  # noqa: E731
        rate = len(images) / seconds(guess, steps=args.steps)[0]
    return f"evaluation, batches of {len(images)}: {rate:.1f} images/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", choices=SIZES, default="ViT-B/16")
    add("--classes", nargs="+", type=int, default=[5, 50, 200, 1000])
    add("--batch-size", nargs="+", type=int, default=[4, 32])
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=DTYPES, default="fp32")
    add("--steps", type=int, default=5, help="steps of which the median is printed (5)")
    add("--threads", type=int, help="of the CPU")
    add("--plain", type=int, default=200, help="compare with the plain way up to this many classes")
    add("--memory", action="store_true", help="only print the peak memory of the first setting")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.memory:
        return print(peak_memory(args))

    settings = [(n, size) for n in args.classes for size in args.batch_size]
    memory = [in_new_process(args, *setting) for setting in settings]
    rate = matmul_rate(args)
    gpu = torch.cuda.get_device_name() if args.device.startswith("cuda") else ""
    device = gpu or f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, {args.precision}, {device}, matrix product {rate / 1e12:.2f} TFLOP/s\n")
    print("|", " | ".join(COLUMNS), "|\n|" + "---:|" * len(COLUMNS))
    for setting, peak in zip(settings, memory):
        cells = [*row(args, *setting, rate), f"{peak:.2f}"]
        print("|", " | ".join(map(str, cells)), "|", flush=True)
    print(f"\n{evaluation(args)}")


if __name__ == "__main__":
    main()
