"""Prompt-OT: few-shot prompt tuning of CLIP that keeps what CLIP knew by optimal transport.

Chen et al., "Prompt-OT: An Optimal Transport Regularization Paradigm for Knowledge Preservation
in Vision-Language Model Adaptation", arXiv 2503.08906.

B images x_i with labels y_i, C class names. Frozen CLIP gives f0_i (image) and t0_c (text); the
same weights with learned prompts give f_i and t_c. All features have length 1.

    joint features   z_i = [f_i ; t_{y_i}],  z0_j = [f0_j ; t0_{y_j}]              PromptOT.loss
    cost             C_ij = 1/2 ||z_i - z0_j||^2
                          = (1 - cos(f_i, f0_j)) + (1 - cos(t_{y_i}, t0_{y_j}))    ot_loss
    plan             pi = argmin <pi, C> - epsilon H(pi), marginals uniform        sinkhorn
    OT loss          L_ot = <pi, C>, with pi held constant in the backward pass    ot_loss
    objective        L = CE(exp(s) f_i . t_c, y) + lambda L_ot                     PromptOT.loss

    python promptot.py                               # the embedded demo, offline
    python promptot.py --data ./eurosat --shots 16   # your own folder, or a benchmark data set
"""

import argparse
import contextlib
import functools
import io
import itertools
import math
import os
import random
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import report
from clip_model import CLIP, available_models, fingerprint, load, tokenize
from data import (
    Dataset, base_novel, download, few_shot, load_dataset, test_loader, train_loader
)

DEMO = Path(__file__).parent / "demo"

# --------------------------------------------------------------------------------------------------
# Optimal transport

EPSILON = 0.001  # in units of the cost; see ot_loss for why
SWEEP = 10  # Sinkhorn iterations between two looks at the error
TINY = torch.finfo(torch.float32).tiny  # stands for a mass of 0


@torch.no_grad()
def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    epsilon: float = EPSILON,
    max_iter: int = 5000,
    tol: float = 1e-5,
) -> Tensor:
    """Entropic optimal transport: argmin <pi, cost> - epsilon H(pi) with row sums a, column sums b.

    cost: (..., n, m), any finite numbers; leading dimensions are independent problems.
    a: (..., n), b: (..., m), masses >= 0 with the same total; uniform with total 1 by default.
    Leading dimensions broadcast.
    epsilon: > 0, in units of the cost; below what the dtype resolves (1e-6 of the cost's range in
    fp32) it changes nothing more. Stops when the row sums are within `tol` of a (sum of absolute
    errors, as a share of the total mass) in every problem, which is looked at every 10 iterations,
    or after `max_iter` iterations (rounded up to tens): then the row sums may be off, and the plan
    be that of a larger epsilon. The column sums are exact to rounding.
    Returns the plan (..., n, m), without gradient; half precision is computed and returned in fp32.
    Raises ValueError for epsilon <= 0, marginals of the wrong length, negative, not finite or of
    unequal total.

    Textbook Sinkhorn (Cuturi 2013) takes K = exp(-cost / epsilon), repeats u = a / (K v) and
    v = b / (K^T u), and returns diag(u) K diag(v). `_solve` does so on a K whose rows and columns
    do not vanish, however small epsilon is.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, not {epsilon}")
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    if cost.numel() == 0:
        return cost
    n, m = cost.shape[-2:]
    uniform = a is None and b is None
    if uniform:
        a, b = cost.new_full((1, 1, n), 1 / n), cost.new_full((1, 1, m), 1 / m)
    else:
        a, b, total = _marginals(cost, a, b)
        cost = cost.expand(*a.shape[:-2], n, m)
    problems = [cost.reshape(-1, n, m), a.reshape(-1, 1, n), b.reshape(-1, 1, m)]
    with torch.autocast(cost.device.type, enabled=False):  # half precision is too coarse here
        if n * m >= 2**14 and cost.device.type == "cpu":  # large ones one by one: they fit a cache
            each = zip(*(x.expand(len(problems[0]), -1, -1).split(1) for x in problems))
            plan = torch.cat([_solve(*problem, epsilon, max_iter, tol) for problem in each])
        else:
            plan = _solve(*problems, epsilon, max_iter, tol)
    plan = plan.view(cost.shape)
    return plan if uniform else plan * total * (a > TINY).mT * (b > TINY)


def _marginals(cost: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, ...]:
    """Checked marginals (..., 1, n), (..., 1, m) as shares of a total mass, and that (..., 1, 1).

    They have the dtype of the cost and all leading dimensions. One of them may be None: uniform.
    """
    n, m = cost.shape[-2:]
    a = None if a is None else a.to(cost)
    b = None if b is None else b.to(cost)
    a = b.sum(-1, keepdim=True).expand(*b.shape[:-1], n) / n if a is None else a
    b = a.sum(-1, keepdim=True).expand(*a.shape[:-1], m) / m if b is None else b
    if (a.shape[-1], b.shape[-1]) != (n, m):
        raise ValueError(f"{n} x {m} costs and {a.shape[-1]}, {b.shape[-1]} masses do not fit")
    if not all((x >= 0).all() and x.isfinite().all() for x in (a, b)) or (a.sum(-1) <= 0).any():
        raise ValueError("masses must be finite and not negative, nor all of them zero")
    if not torch.allclose(a.sum(-1), b.sum(-1), rtol=1e-3, atol=0):
        raise ValueError("the two marginals must have the same total mass")
    total = a.sum(-1)[..., None, None]
    batch = torch.broadcast_shapes(cost.shape[:-2], a.shape[:-1], b.shape[:-1])
    shares = (mass / mass.sum(-1, keepdim=True) for mass in (a, b))
    a, b = (share.clamp(min=TINY).expand(*batch, -1)[..., None, :] for share in shares)
    return a, b, total


def _solve(
    cost: Tensor, a: Tensor, b: Tensor, epsilon: float, max_iter: int, tol: float
) -> Tensor:
    """`sinkhorn` of P problems at once: cost (P, n, m), a (P or 1, 1, n), b (P or 1, 1, m).

    K is a plan, normalised in the log domain: first its rows, then its columns; where the plan is
    nearly a permutation, that solves the problem. Then u and v rescale rows and columns, each step
    over-relaxed by omega (Thibault et al. 2021), which is estimated per problem from the speed of
    convergence (Young 1971): 10 to 30 times fewer iterations than without, where Sinkhorn is slow.
    When u has become large, and with it v, they go into K (Schmitzer 2019). A tiny epsilon is
    reached by halving a larger one.
    """
    info = torch.finfo(cost.dtype)
    # A constant added to a row or column of the cost does not change the plan: start each at 0.
    cost = cost.clamp(-1e37, 1e37)
    cost = cost - cost.amin(dim=2, keepdim=True)
    cost = cost - cost.amin(dim=1, keepdim=True)
    finest = cost.amax(dim=(1, 2), keepdim=True) * (10 * info.eps)  # what the dtype can resolve
    log_k = cost / -finest.clamp(min=min(max(epsilon, info.tiny), info.max))
    k, omega, last_error = None, None, None
    excess = 1.0  # the factor by which epsilon is still too large
    for iteration in range(0, max_iter + SWEEP, SWEEP):
        if k is None:
            log_k = log_k.log_softmax(dim=2) + a.log().mT  # rows sum to a
            k = log_k.softmax(dim=1) * b  # columns sum to b
            kt, u = k.mT, k.new_ones(len(k), 1, k.shape[1])
        v = (b / u.bmm(k)).clamp(1e-30, 1e30)  # columns sum to b again
        error = (u * v.bmm(kt) - a).abs().sum(dim=2, keepdim=True)
        largest = float(error.max())
        if iteration >= max_iter or (excess == 1 and largest <= tol):
            break

        sharpen = 1.0  # what epsilon is to be divided by
        if iteration == 0:  # not solved at once: begin with a larger epsilon, if it is a hard one
            sharpen = 1 / max(1.0, -float(log_k.min()) / 100)
        elif excess > 1 and largest <= 1e-4:  # solved: a good start for the next
            sharpen = min(2.0, excess)
        if sharpen == 1:
            omega = None if last_error is None else _relaxation(omega, error, last_error)
            last_error = error
            for _ in range(SWEEP):
                u = _relaxed(u, a / v.bmm(kt), omega)
                v = _relaxed(v, b / u.bmm(k), omega)
        else:
            last_error = None  # the error of another problem says nothing here
        if sharpen != 1 or float(u.log().abs().max()) > 20:
            log_k = log_k.log_softmax(dim=1) + b.log()  # columns as those of k
            log_k = sharpen * (log_k + u.log().mT + v.log())
            k, excess = None, excess / sharpen
    return u.mT * k * v


def _relaxed(old: Tensor, new: Tensor, omega: Tensor | None) -> Tensor:
    """The step from old to new lengthened by omega: old^(1 - omega) new^omega; kept within fp32."""
    if omega is not None:
        new = old * (new / old).pow(omega)
    return new.clamp(1e-30, 1e30)


def _relaxation(omega: Tensor | None, error: Tensor, last_error: Tensor) -> Tensor:
    """Next over-relaxation factor (P, 1, 1), from the errors before and after a sweep with omega.

    Young's theory: a step shrinks the error by `rate`, from which follows rho, the rate without
    relaxation, and from rho the best factor. Back to plain Sinkhorn where the error has grown.
    """
    omega = 1.0 if omega is None else omega
    rate = (error / last_error).clamp(1e-10, 1) ** (1 / SWEEP)
    rho = ((rate + omega - 1) ** 2 / (rate * omega**2)).clamp(max=1 - 1e-5)
    return torch.where(error < last_error, 2 / (1 + (1 - rho).sqrt()), 1.0)


MODALITIES = ("joint", "image", "text", "separate")


def transport_cost(
    image: Tensor, text: Tensor, image0: Tensor, text0: Tensor, modality: str = "joint"
) -> Tensor:
    """C_ij = (1 - cos(f_i, f0_j)) + (1 - cos(t_i, t0_j)), or what `modality` leaves of it.

    Arguments as for `ot_loss`. Returns (B, B), for "separate" (2, B, B).
    """
    image_cost, text_cost = 1 - image @ image0.T, 1 - text @ text0.T
    if modality == "separate":
        return torch.stack([image_cost, text_cost])
    costs = {"joint": image_cost + text_cost, "image": image_cost, "text": text_cost}
    if modality not in costs:
        raise ValueError(f"modality {modality!r} is none of {', '.join(MODALITIES)}")
    return costs[modality]


def ot_loss(
    image: Tensor,
    text: Tensor,
    image0: Tensor,
    text0: Tensor,
    epsilon: float = EPSILON,
    modality: str = "joint",
    pointwise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Transport cost from tuned to frozen joint features: (loss, plan (B, B)).

    image, text: (B, D), features of length 1 of the tuned model, row i belonging to image i (text
    is that of its label). image0, text0: the same of the frozen model. Costs lie in [0, 4].
    modality: which features are compared: "joint", "image" or "text" alone, or "separate" (one
    plan for each, the losses added, plan (2, B, B)). pointwise: the identity instead of the plan.

    The gradient takes the plan as constant (envelope theorem): d loss / d C = plan.
    epsilon 0.001: on the demo's features and on simulated ones like CLIP's, batch 4 to 64, the loss
    is within 0.6 % of exact OT (mostly 0.01 %), in 0.1 ms where the plan is a permutation, else in
    up to 10 ms, on one CPU core. At 0.01 it is up to 4 % too high, at 0.1 several times too high.
    """
    cost = transport_cost(image, text, image0, text0, modality)
    if pointwise:
        plan = torch.eye(len(image), device=cost.device).expand_as(cost) / len(image)
    else:
        plan = sinkhorn(cost, epsilon=epsilon)
    return (plan * cost).sum(), plan


def off_diagonal(plan: Tensor) -> Tensor:
    """Share of the transported mass that does not go from an image to itself: (..., B, B) -> ()."""
    return 1 - plan.diagonal(dim1=-2, dim2=-1).sum() / plan.sum()


# --------------------------------------------------------------------------------------------------
# The model

REGULARISERS = ("ot", "pointwise", "none")
TEMPLATE = "a photo of a {}."
CONTEXT = "a photo of a"  # the text prompts start from its token embeddings
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TEST_BATCH = 64  # images
MANY_CLASSES = 1024  # of more, texts are encoded in parts, again in the backward pass


class PromptLearner(nn.Module):
    """All that is learned: `text` (depth, n_ctx, width) and `vision` (depth, n_ctx, its width).

    The first text layer starts from the embeddings of "a photo of a", everything else from
    N(0, 0.02^2). Depth is cut to the layers of each tower. 61,440 numbers for ViT-B/16.
    """

    def __init__(self, clip: CLIP, n_ctx: int = 4, depth: int = 12):
        super().__init__()
        towers = {"text": clip.transformer, "vision": clip.visual.transformer}
        for name, tower in towers.items():
            shape = (min(depth, tower.layers), n_ctx, tower.width)
            setattr(self, name, nn.Parameter(0.02 * torch.randn(shape)))
        ids = tokenize(CONTEXT)[0, 1 : 1 + min(n_ctx, len(CONTEXT.split()))]
        words = clip.token_embedding(ids.to(clip.token_embedding.weight.device))
        with torch.no_grad():
            self.text[:1, : len(words)] = words.float()
        self.to(words.device)


class PromptOT(nn.Module):
    """Frozen CLIP, learned prompts and the classes to tell apart.

    clip: as `load` gives it; the one copy of the weights is student (with prompts) and teacher
    (without). classnames: C names. n_ctx: prompts per layer and tower. depth: layers that have
    prompts. precision: in which the towers compute, "fp32", "bf16" or "fp16" (by autocast);
    prompts, losses and transport are always fp32.
    """

    def __init__(
        self,
        clip: CLIP,
        classnames: list[str],
        n_ctx: int = 4,
        depth: int = 12,
        precision: str = "fp32",
    ):
        super().__init__()
        if not classnames:
            raise ValueError("there must be at least one class name")
        self.clip = clip.requires_grad_(False)
        self.prompts = PromptLearner(clip, n_ctx, depth)
        self.precision = precision
        self.set_classes(classnames)

    def set_classes(self, classnames: list[str]) -> "PromptOT":
        """Takes other class names for the prompts to apply to; frozen CLIP encodes them, too."""
        n_ctx = self.prompts.text.shape[1]
        # More prompts than words in "a photo of a": place holders keep their positions free.
        template = TEMPLATE.replace(CONTEXT, CONTEXT + " x" * (n_ctx - len(CONTEXT.split())))
        self.classnames = list(classnames)
        self.tokens = tokenize([template.format(name) for name in classnames])  # the student's
        text0 = class_features(self.clip, classnames, precision=self.precision)
        self.register_buffer("text0", text0, persistent=False)  # (C, D), of the frozen model
        return self

    def image_features(self, images: Tensor, tuned: bool = True) -> Tensor:
        """(B, 3, R, R) -> (B, D) of the tuned or the frozen model (which needs no gradient)."""
        with autocast(images.device, self.precision):
            return unit(self.clip.encode_image(images, self.prompts.vision if tuned else None))

    def text_features(self) -> Tensor:
        """Features (C, D) of the classes, tuned; several processes share the work."""
        n_classes, size = len(self.tokens), world()[1]
        copies = math.ceil(size / n_classes)  # of fewer classes than processes, each needs one
        tokens = shard(self.tokens.repeat(copies, 1))
        with autocast(self.prompts.text.device, self.precision):
            return gather(unit(encode_texts(self.clip, tokens, self.prompts.text)))[:n_classes]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) -> logits (B, C)."""
        return self.clip.logit_scale.exp() * self.image_features(images) @ self.text_features().T

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        lam: float = 10.0,
        epsilon: float = EPSILON,
        reg: str = "ot",
        modality: str = "joint",
    ) -> tuple[Tensor, dict]:
        """The objective CE + lam L_ot on images (B, 3, R, R) with labels (B,).

        reg: "ot", "pointwise" (identity plan) or "none". Returns the loss and its parts: "ce",
        "ot" (before lam), "off_diagonal" and "plan" (None without regulariser). With several
        processes each brings its share of the batch, and the loss is that of the whole.
        """
        if reg not in REGULARISERS:
            raise ValueError(f"reg {reg!r} is none of {', '.join(REGULARISERS)}")
        labels = gather(labels)
        image, text = gather(self.image_features(images)), self.text_features()
        logits = self.clip.logit_scale.exp() * image @ text.T
        ce = F.cross_entropy(logits, labels)
        if reg == "none":
            zero = torch.zeros_like(ce)
            return ce, {"ce": ce.detach(), "ot": zero, "off_diagonal": zero, "plan": None}
        image0, text0 = gather(self.image_features(images, tuned=False)), self.text0
        ot, plan = ot_loss(
            image, text[labels], image0, text0[labels], epsilon, modality, reg == "pointwise"
        )
        parts = {"ce": ce.detach(), "ot": ot.detach(), "off_diagonal": off_diagonal(plan)}
        return ce + lam * ot, {**parts, "plan": plan}


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1, in fp32."""
    return F.normalize(x.float(), dim=-1)


def autocast(device: torch.device, precision: str):
    """Context in which the towers compute in the given precision."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def encode_texts(clip: CLIP, tokens: Tensor, prompts: Tensor | None = None) -> Tensor:
    """`clip.encode_text`, (C, L) -> (C, D).

    Very many classes go in parts, computed again in the backward pass, to save memory.
    """
    if len(tokens) <= MANY_CLASSES:
        return clip.encode_text(tokens, prompts)
    parts = tokens.split(MANY_CLASSES)
    encode = functools.partial(checkpoint, clip.encode_text, use_reentrant=False)
    return torch.cat([encode(part, prompts) for part in parts])


@torch.no_grad()
def class_features(
    clip: CLIP, classnames: list[str], template: str = TEMPLATE, precision: str = "fp32"
) -> Tensor:
    """Features (C, D) of the class names in a template, by frozen CLIP: a zero-shot classifier."""
    tokens = tokenize([template.format(name) for name in classnames])
    with autocast(clip.logit_scale.device, precision):
        return unit(encode_texts(clip, tokens))


# --------------------------------------------------------------------------------------------------
# Several processes (torchrun). Every process computes the whole loss from the features of all, of
# which its own share carries gradients; the gradients of the prompts are then added up.


def world() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main() -> bool:
    """Whether this process is the one that prints and writes files."""
    return world()[0] == 0


def start_processes() -> None:
    """Joins the processes that torchrun has started, if it has."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def share(value):
    """The first process's value, on all processes."""
    values = [value]
    if world()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def shard(x: Tensor) -> Tensor:
    """This process's share of the rows."""
    rank, size = world()
    return x.tensor_split(size)[rank]


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, in order of rank; shares may differ in length."""
    rank, size = world()
    if size == 1:
        return x
    lengths = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(x)], device=x.device))
    padded = x.new_zeros(int(max(lengths)), *x.shape[1:])
    padded[: len(x)] = x.detach()
    shares = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(shares, padded)
    shares = [share[: int(length)] for share, length in zip(shares, lengths)]
    shares[rank] = x
    return torch.cat(shares)


def add_gradients(parameters: list[nn.Parameter]) -> None:
    """Gradients summed over the processes."""
    if world()[1] > 1:
        for parameter in parameters:
            dist.all_reduce(parameter.grad)


# --------------------------------------------------------------------------------------------------
# Training and evaluation


def learning_rate(epoch: int, epochs: int = 40, lr: float = 0.005) -> float:
    """Warm-up of one epoch at 1e-4, then a cosine from lr: constant within each epoch 0, 1, ..."""
    return 1e-4 if epoch == 0 else lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def train(
    model: PromptOT,
    items: list,
    *,
    reg: str = "ot",
    modality: str = "joint",
    lam: float = 10.0,
    epsilon: float = EPSILON,
    epochs: int = 40,
    stop_epoch: int | None = None,
    batch_size: int = 4,
    lr: float = 0.005,
    seed: int = 1,
    augment: bool = True,
    workers: int = 0,
    state_file: Path | None = None,
    log: Callable = print,
) -> list[dict]:
    """Tunes the prompts of `model` on items (image path, label); returns the means of each epoch.

    SGD, momentum 0.9, weight decay 5e-4 (protocol of Prompt-OT's released code). `stop_epoch` ends
    the schedule of `epochs` early. Pictures and their order depend on the seed alone; `augment`
    crops and flips them. With `state_file` the state is saved after every epoch, and a run that
    finds one goes on from there, to the very same prompts (on the CPU).
    Raises ValueError if the loss stops being finite.
    """
    parameters = list(model.prompts.parameters())
    device = parameters[0].device
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=model.precision == "fp16")
    history = _load_state(state_file, model, optimizer, scaler) if state_file else []
    remaining = range(len(history), epochs if stop_epoch is None else stop_epoch)
    resolution = model.clip.image_resolution
    loader = train_loader(
        items, resolution, batch_size, seed, remaining, workers, *world(), augment=augment
    )
    batches, steps = iter(loader), loader.batch_sampler.steps
    progress = report.Progress(log, total=steps * len(remaining), images=batch_size)

    for epoch in remaining:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, epochs, lr)
        parts = []  # kept on the device: reading them at every step would stall it
        for step in range(steps):
            with progress.waiting():
                images, labels = next(batches)
            images, labels = images.to(device, non_blocking=True), labels.to(device)
            loss, part = model.loss(images, labels, lam, epsilon, reg, modality)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            add_gradients(parameters)
            scaler.step(optimizer)
            scaler.update()
            parts.append(torch.stack([loss.detach(), part["ce"], part["ot"], part["off_diagonal"]]))
            progress.step()
            if step % 10 == 9 or step == steps - 1:
                means = _means(parts, epoch)
                progress.show(f"epoch {epoch + 1}/{remaining.stop}", means)
        history.append(means)
        progress.end_of_epoch()
        if state_file and is_main():
            _save_state(state_file, model, optimizer, scaler, history)
    return history


def _means(parts: list[Tensor], epoch: int) -> dict[str, float]:
    """Means over the steps of an epoch; each step's parts are (loss, CE, OT, off-diagonal mass)."""
    steps = torch.stack(parts).cpu()
    if not steps.isfinite().all():
        step = int(steps.isfinite().all(dim=1).logical_not().nonzero()[0]) + 1
        raise ValueError(f"the loss is not finite in epoch {epoch + 1}, step {step}; lower --lr?")
    return dict(zip(("loss", "ce", "ot", "off_diagonal"), steps.mean(dim=0).tolist()))


@torch.inference_mode()
def accuracy(
    clip: CLIP,
    dataset: Dataset,
    classifiers: list[Tensor],
    vision_prompts: Tensor | None = None,
    precision: str = "fp32",
    workers: int = 0,
) -> list[float]:
    """Share of the test images, in %, that each classifier (C, D) gets right, in one pass."""
    rank, size = world()
    device = clip.logit_scale.device
    right = torch.zeros(len(classifiers), dtype=torch.long, device=device)
    items = dataset.test[rank::size]
    loader = test_loader(items, clip.image_resolution, TEST_BATCH, workers, dataset.shift)
    for images, labels in loader:
        with autocast(device, precision):
            features = unit(clip.encode_image(images.to(device, non_blocking=True), vision_prompts))
        guesses = torch.stack([(features @ text.T).argmax(dim=1) for text in classifiers])
        right += (guesses == labels.to(device)).sum(dim=1)
    if size > 1:
        dist.all_reduce(right)
    return (100 * right / len(dataset.test)).tolist()


def zero_shot_accuracy(clip: CLIP, dataset: Dataset, precision: str, workers: int) -> list[float]:
    """Accuracy of frozen CLIP in %: with "a photo of a {}.", and with the data set's template."""
    classifiers = [
        class_features(clip, dataset.classnames, template, precision)
        for template in (TEMPLATE, dataset.template)
    ]
    return accuracy(clip, dataset, classifiers, precision=precision, workers=workers)


def tuned_accuracy(model: PromptOT, dataset: Dataset, workers: int) -> float:
    """Accuracy in % on the test images and class names of `dataset`, which the model then keeps."""
    with torch.no_grad():
        text = model.set_classes(dataset.classnames).text_features()
    vision = model.prompts.vision
    return accuracy(model.clip, dataset, [text], vision, model.precision, workers)[0]


@torch.no_grad()
def plan_of(
    model: PromptOT, items: list, epsilon: float, modality: str, limit: int = 128
) -> tuple[Tensor, Tensor, list[int]]:
    """Cost and optimal plan (B, B) between tuned and frozen features of items, sorted by label."""
    items = sorted(items, key=lambda item: item[1])[:: -(-len(items) // limit)]
    device, text = model.text0.device, model.text_features()
    features = []
    for images, labels in test_loader(items, model.clip.image_resolution, TEST_BATCH):
        images, labels = images.to(device), labels.to(device)
        image, image0 = (model.image_features(images, tuned) for tuned in (True, False))
        features.append((image, text[labels], image0, model.text0[labels]))
    cost = transport_cost(*(torch.cat(column) for column in zip(*features)), modality)
    cost = cost.sum(dim=0) if cost.ndim == 3 else cost
    return cost, sinkhorn(cost, epsilon=epsilon), [label for _, label in items]


# --------------------------------------------------------------------------------------------------
# Files


def save_atomically(content: dict, path: Path) -> None:
    """torch.save in one go: a killed run leaves the old file whole."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    report.replace_file(path, buffer.getvalue())


def load_saved(path: str | os.PathLike) -> dict:
    """What `save_atomically` wrote; no code in the file is run. ValueError if it is damaged."""
    content = io.BytesIO(Path(path).read_bytes())
    try:
        if damaged := zipfile.ZipFile(content).testzip():  # torch.load compares no checksums
            raise ValueError(f"wrong checksum of {damaged}")
        content.seek(0)
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as e:  # zip, pickle and torch each have their own words for damage
        raise ValueError(f"{path} is damaged, or no file that this program saved") from e


def _save_state(path: Path, model: PromptOT, optimizer, scaler, history: list[dict]) -> None:
    state = {"prompts": model.prompts, "optimizer": optimizer, "scaler": scaler}
    state = {name: part.state_dict() for name, part in state.items()}
    save_atomically(state | {"history": history}, path)


def _load_state(path: Path, model: PromptOT, optimizer, scaler) -> list[dict]:
    """Restores a training state, if there is one; returns the means of the epochs behind it."""
    if not path.exists():
        return []
    state = load_saved(path)
    try:
        model.prompts.load_state_dict(state["prompts"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        return state["history"]
    except (KeyError, TypeError, RuntimeError, ValueError) as e:
        raise ValueError(f"{path} is no state of this run, nothing can be resumed from it") from e


def save_prompts(model: PromptOT, path: Path, settings: dict) -> None:
    """The prompts alone, with what it takes to use them: settings, class names, which CLIP."""
    content = {name: p.detach().cpu() for name, p in model.prompts.named_parameters()}
    content |= {"classnames": model.classnames, "settings": settings}
    content |= {"model": settings["model"], "fingerprint": fingerprint(model.clip)}
    save_atomically(content, path)


def load_prompts(path: str | os.PathLike, clip: CLIP, precision: str = "fp32") -> PromptOT:
    """The tuned model that `save_prompts` saved, on its saved class names.

    ValueError if `clip` is not the model that they were tuned for, or the file is damaged.
    """
    saved = load_saved(path)
    missing = {"text", "vision", "classnames", "model", "settings", "fingerprint"} - set(saved)
    if missing:
        raise ValueError(f"{path} holds no saved prompts (no {', '.join(sorted(missing))})")
    if saved["fingerprint"] != fingerprint(clip):
        raise ValueError(f"the prompts in {path} were tuned for other weights: {saved['model']}")
    try:
        depth, n_ctx, _ = saved["text"].shape
        depth = max(depth, len(saved["vision"]))
        model = PromptOT(clip, saved["classnames"], n_ctx, depth, precision)
        model.prompts.load_state_dict({name: saved[name] for name in ("text", "vision")})
        if not all(p.isfinite().all() for p in model.prompts.parameters()):
            raise ValueError("not all of their numbers are finite")
    except (RuntimeError, ValueError) as e:
        raise ValueError(f"the prompts in {path} do not fit: {' '.join(str(e).split())}") from None
    return model


# --------------------------------------------------------------------------------------------------
# From the command line to the table


def run(args: argparse.Namespace) -> None:
    """Zero-shot accuracy; a tuning for each of --classes, --reg, --shots and --seed; the tables."""
    dataset = load_dataset(args.data, args.classnames)
    if not (dataset.train or args.load):
        raise ValueError(f"{args.data} has no training images; it can be a target of --eval-data")
    targets = evaluation_targets(dataset, args)
    clip = load(args.model, args.device)
    loaded = load_prompts(args.load, clip, args.precision) if args.load else None
    folder = Path(share(args.output or report.free_folder(args.data, args.resume)))
    metrics = report.open_metrics(folder, settings_of(args, clip), args.resume)
    tables = report.tables(dataset.classnames, targets)
    metrics["tables"] += [table for table in tables if table not in metrics["tables"]]
    log = report.Log(folder / "log.txt", quiet=not is_main())
    save = functools.partial(report.save_metrics, folder) if is_main() else lambda metrics: None
    prompts = loaded.prompts if loaded else PromptLearner(clip, args.n_ctx, args.depth)
    log("\n".join(report.describe(args, dataset, targets, clip, prompts, world()[1])) + "\n")

    for name, target in itertools.chain(*(group.items() for group in targets.values())):
        if name not in metrics["zero_shot"]:
            plain, own = zero_shot_accuracy(clip, target, args.precision, args.workers)
            metrics["zero_shot"][name], metrics["zero_shot_template"][name] = plain, own
            template = f', "{target.template}" {own:.2f} %' if target.template != TEMPLATE else ""
            log(f'zero-shot {name}: "{TEMPLATE}" {plain:.2f} %{template}')
    save(metrics)

    for job in jobs(args):
        title = job_name(job)
        if any(all(done[key] == job[key] for key in JOB) for done in metrics["runs"]):
            log(f"\n{title}: finished before")
            continue
        log(f"\n{title}")
        start = time.time()
        state_file = folder / title / "state.pt"
        model, history = (loaded, []) if loaded else tune(args, clip, dataset, job, state_file, log)
        result = {"seconds": round(time.time() - start, 1), "history": history, "accuracy": {}}
        for name, target in targets[job["classes"]].items():
            result["accuracy"][name] = tuned_accuracy(model, target, args.workers)
            log(f"{name} {result['accuracy'][name]:.2f} %")
        metrics["runs"].append(job | result)
        save(metrics)
        state_file.unlink(missing_ok=True)  # the run is complete: nothing is left to resume
    log(f"\n{report.results(metrics)}\n\nprompts, metrics, log, pictures: {folder}")


def evaluation_targets(dataset: Dataset, args: argparse.Namespace) -> dict[str, dict[str, Dataset]]:
    """What is evaluated, by name, for each of --classes; --eval-data goes with the last of them."""
    targets, taken = {}, {"base", "novel"}

    def add(group: dict[str, Dataset], target: Dataset, path: str) -> None:
        name = target.name if target.name not in taken else path
        taken.add(name)
        group[name] = target

    if "base" in args.classes:
        targets["base"] = dict(zip(("base", "novel"), base_novel(dataset)))
    if "all" in args.classes:
        targets["all"] = {}
        add(targets["all"], dataset, args.data)
    for path in args.eval_data:
        add(list(targets.values())[-1], load_dataset(path, args.classnames), path)
    return targets


JOB = ("classes", "reg", "shots", "seed")  # what tells the runs of one command apart
# Settings that make a run another run.
SETTINGS = (
    "data", "model", "eval_data", "modality", "lam", "epsilon", "epochs", "stop_epoch",
    "batch_size", "lr", "n_ctx", "depth", "augment", "precision", "load",
)


def jobs(args: argparse.Namespace) -> list[dict]:
    """A dict with the keys of JOB for each run."""
    choices = [args.classes, args.reg, args.shots, args.seed]
    if args.load:
        settings = load_saved(args.load)["settings"]
        choices[1:] = [[settings.get(key)] for key in JOB[1:]]
    return [dict(zip(JOB, choice)) for choice in itertools.product(*choices)]


def settings_of(args: argparse.Namespace, clip: CLIP) -> dict:
    """The settings as they are kept; paths are absolute, for one path has many spellings."""
    settings = {name: getattr(args, name) for name in SETTINGS} | {"weights": fingerprint(clip)}
    settings["data"] = os.path.abspath(args.data)
    settings["eval_data"] = [os.path.abspath(path) for path in args.eval_data]
    settings["load"] = args.load and os.path.abspath(args.load)
    settings["model"] = os.path.abspath(args.model) if os.path.isfile(args.model) else args.model
    return settings


def job_name(job: dict) -> str:
    """Title and folder of a run."""
    return f"{job['classes']}-{job['reg']}-{job['shots'] or 'all-'}shots-seed{job['seed']}"


def tune(
    args: argparse.Namespace, clip: CLIP, dataset: Dataset, job: dict, state_file: Path, log
) -> tuple[PromptOT, list[dict]]:
    """One tuning, which leaves prompts.pt and plan.png beside the state file."""
    # CoOp's order: the shots of all classes are drawn first, and then reduced to the base classes.
    shots = few_shot(dataset.train, job["shots"], random.Random(job["seed"]))
    source = replace(dataset, train=shots)
    source = base_novel(source)[0] if job["classes"] == "base" else source
    torch.manual_seed(job["seed"])
    model = PromptOT(clip, source.classnames, args.n_ctx, args.depth, args.precision)
    if is_main():
        state_file.parent.mkdir(exist_ok=True)
    history = train(
        model, source.train, reg=job["reg"], modality=args.modality, lam=args.lam,
        epsilon=args.epsilon, epochs=args.epochs, stop_epoch=args.stop_epoch,
        batch_size=args.batch_size, lr=args.lr, seed=job["seed"], augment=args.augment,
        workers=args.workers, state_file=state_file, log=log,
    )
    cost, plan, labels = plan_of(model, source.train, args.epsilon, args.modality)
    if is_main():
        settings = settings_of(args, clip) | job
        save_prompts(model, state_file.with_name("prompts.pt"), settings)
        report.plan_picture(cost, plan, labels, state_file.with_name("plan.png"))
    return model, history


def predict(args: argparse.Namespace) -> None:
    """Prints the five likeliest classes of each image, by saved prompts."""
    clip = load(args.model, args.device)
    model = load_prompts(args.load, clip, args.precision)
    if args.names:
        model.set_classes(args.names)
    images = test_loader([(path, 0) for path in args.predict], clip.image_resolution, TEST_BATCH)
    with torch.no_grad():
        batches = [model(batch.to(args.device)).softmax(dim=1) for batch, _ in images]
    for path, probabilities in zip(args.predict, torch.cat(batches)):
        print(path)
        top = probabilities.topk(min(5, len(model.classnames)))
        for share, label in zip(top.values.tolist(), top.indices.tolist()):
            print(f"  {share:6.1%}  {model.classnames[label]}")


# --------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage."""

    def error(self, message: str):
        """Ends the program with exit status 2."""
        self.exit(2, f"error: {message} (--help shows all flags)\n")


def number(kind: type, low: float, open_end: bool = False):
    """Argument type: a finite number >= low, or > low."""

    def parse(text: str):
        value = kind(text)
        if not math.isfinite(value) or value < low or (open_end and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not {'>' if open_end else '>='} {low}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse says: invalid NAME
    return parse


def class_names(text: str) -> list[str]:
    """Argument type: different names, separated by commas."""
    names = [name.replace("_", " ").strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError("names must not be empty, nor the same twice")
    return names


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, with the defaults of the paper's released recipe; bad ones end the program."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    whole, positive = number(int, 1), number(float, 0, open_end=True)

    add("--data", metavar="DIR", help="folder of class sub-folders, folder with train/ val/ test/,"
        " or a benchmark data set (CoOp layout); default: the embedded demo")
    add("--download", action="store_true", help="fetch --data DIR first, if torchvision can")
    add("--model", metavar="NAME_OR_PATH", help=f"one of {', '.join(available_models())}, or a"
        " file of CLIP weights; default: ViT-B/16, for the demo its own")
    add("--classes", nargs="+", choices=("base", "all"), default=["base"], help="tune on the first"
        " half of the classes and test on both halves (default), tune and test on all, or both")
    add("--eval-data", nargs="+", metavar="DIR", default=[], help="also test on these;"
        " DIR:inverted, DIR:noisy and DIR:rotated shift the pictures")
    add("--classnames", metavar="FILE", help="ImageNet's classnames.txt, if it is not found")
    add("--shots", nargs="+", type=number(int, 0), default=[16], metavar="K", help="training images"
        " per class, 0 = all (default 16); several: one run each")
    add("--seed", nargs="+", type=number(int, 0), default=[1], metavar="S", help="default 1;"
        " several: one run each, the table has mean and standard deviation")

    add("--reg", nargs="+", choices=REGULARISERS, default=["ot"], help="optimal"
        " transport (default), the identity instead of the plan, no regulariser; several: compared")
    add("--modality", choices=MODALITIES, default="joint", help="the features that it constrains")
    add("--lam", type=number(float, 0), default=10.0, help="weight lambda of the OT loss (10)")
    add("--epsilon", type=positive, default=EPSILON, help="entropy weight of the plan (0.001)")
    add("--n-ctx", type=whole, default=4, help="prompts per layer and tower (4)")
    add("--depth", type=whole, default=12, help="layers with prompts (12)")
    add("--epochs", type=whole, default=40, help="length of the learning-rate schedule (40)")
    add("--stop-epoch", type=whole, help="stop after this epoch of the schedule")
    add("--batch-size", type=whole, default=4, help="images per step, over all processes (4)")
    add("--lr", type=positive, default=0.005, help="learning rate of SGD (0.005)")

    add("--no-augment", dest="augment", action="store_false", help="no random crops and flips: for"
        " pictures that do not bear them, such as digits")

    add("--output", metavar="DIR", help="for prompts, metrics, log, pictures (runs/...)")
    add("--resume", action="store_true", help="go on with an interrupted run in --output")
    add("--load", metavar="FILE", help="evaluate these saved prompts instead of tuning")
    add("--predict", nargs="+", metavar="IMAGE", help="print the top classes by prompts of --load")
    add("--names", type=class_names, metavar="A,B,C", help="class names for --predict; default:"
        " the saved ones")
    add("--device", default="auto", help="cpu, cuda, ...; default: a GPU if there is one")
    add("--precision", choices=("auto", *PRECISIONS), default="auto", help="of the two towers;"
        " default: bf16 on GPUs that have it, else fp32")
    add("--workers", type=number(int, 0), help="processes that read images; default: as needed")
    args = parser.parse_args(argv)

    if args.stop_epoch and args.stop_epoch > args.epochs:
        parser.error(f"--stop-epoch {args.stop_epoch} lies behind --epochs {args.epochs}")
    if args.predict and not args.load:
        parser.error("--predict needs --load FILE, the prompts that a run has saved")
    if args.names and not args.predict:
        parser.error("--names goes with --predict")
    if args.download and not args.data:
        parser.error("--download needs --data DIR")
    return args


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Replaces "auto" and what else depends on the machine or on other flags."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if args.device == "auto":
        args.device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device).tolist()
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"--device {args.device} cannot be used here: {reason}") from None
    on_gpu = args.device.startswith("cuda")
    if args.precision == "auto":
        args.precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    if args.workers is None:  # on a CPU, reading is a small part and the cores have work to do
        args.workers = min(8, os.cpu_count() or 1) if on_gpu else 0
    if args.load:  # on the data and the model that the prompts were tuned for, if nothing is said
        settings = load_saved(args.load).get("settings", {})
        args.data = settings.get("data") if args.data is None else args.data
        args.model = settings.get("model") if args.model is None else args.model
    if args.model is None:
        args.model = os.path.relpath(DEMO / "tiny-clip.pt") if args.data is None else "ViT-B/16"
    if args.data is None:
        args.data = os.path.relpath(DEMO / "digits")
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the command line; bad input ends with one line on stderr and exit status 2."""
    args = parse_args(argv)
    try:
        start_processes()
        args = resolve(args)
        if args.download:
            place = Path(args.data)
            args.data = share(str(download(place.name, place.parent)) if is_main() else None)
        predict(args) if args.predict else run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:
        if not dist.is_initialized():
            raise
        reason = str(e).splitlines()[0][:200]
        print(f"error: process {world()[0]} stops, is another lost? ({reason})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on after the last whole epoch", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
