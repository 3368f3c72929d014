"""Prompt-OT: few-shot prompt tuning of CLIP, regularised by optimal transport.

Chen et al., "Prompt-OT: An Optimal Transport Regularization Paradigm for Knowledge Preservation
in Vision-Language Model Adaptation", arXiv 2503.08906.

A batch has B images x_i with labels y_i; there are C classes. Frozen CLIP gives image features f0_i
and text features t0_c. The same weights with learned prompts give f_i and t_c. All features have
unit length. H is the entropy, and s is CLIP's `logit_scale`.

    joint features   z_i = [f_i ; t_{y_i}],  z0_j = [f0_j ; t0_{y_j}]              PromptOT.loss
    cost             C_ij = 1/2 ||z_i - z0_j||^2
                          = (1 - cos(f_i, f0_j)) + (1 - cos(t_{y_i}, t0_{y_j}))    transport_cost
    plan             pi = argmin <pi, C> - epsilon H(pi), uniform marginals        sinkhorn
    OT loss          L_ot = <pi, C>, pi held constant in the backward pass         ot_loss
    objective        L = CE(exp(s) f_i . t_c, y) + lambda L_ot                     PromptOT.loss

From the command line to the loss: main -> train -> PromptOT.loss -> ot_loss -> sinkhorn. Not here:
exact transport, which the released code uses, and checkpoint selection: the last epoch counts.

    python promptot.py                               # the embedded demo, offline
    python promptot.py --data ./eurosat --shots 16   # your own folder, or a benchmark data set
    python promptot.py --load runs/eurosat/base-ot-16shots-seed1/prompts.pt --predict photos/
"""

import argparse
import functools
import itertools
import math
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import runs
from clip_model import CLIP, fingerprint, load, pack, tokenize
from data import AUGMENTS, TEMPLATE, Dataset, Items
from weights import read_tensors

# ---- Recipe --------------------------------------------------------------------------------------
EPSILON = 0.001  # ot_loss says how close this is to exact transport


def setting(default, help: str, choices=None, minimum: float = 0):
    """A field of Recipe, with the help text and the valid values of its flag."""
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


@dataclass(frozen=True)
class Recipe:
    """Settings of one training run. Defaults follow the released code. ValueError if invalid."""

    classes: str = setting("base", "classes to tune on; base: the first half", ("base", "all"))
    reg: str = setting("ot", "regulariser; pointwise: identity plan", ("ot", "pointwise", "none"))
    shots: int = setting(16, "training images per class; 0: all")
    seed: int = setting(1, "random seed for shots, prompts and augmentation")
    modality: str = setting("joint", "features that reg compares", ("joint", "image", "text"))
    lam: float = setting(10.0, "weight lambda of the regulariser")
    epsilon: float = setting(EPSILON, "entropy weight of the transport plan", minimum=1e-4)
    n_ctx: int = setting(4, "prompts per layer in each tower", minimum=1)
    depth: int = setting(12, "layers with prompts in each tower", minimum=1)
    augment: str = setting("field", "field: crops of 8-100 % and flips; gentle: 60-100 %", AUGMENTS)
    epochs: int = setting(40, "epochs of the learning-rate schedule", minimum=1)
    stop_epoch: int = setting(0, "stop after this epoch of the schedule; 0: run all")
    batch_size: int = setting(4, "images per step, over all processes", minimum=1)
    lr: float = setting(0.005, "peak learning rate; the first epoch runs at 1e-4")
    precision: str = setting("auto", "auto: bf16 on GPUs that support it", ("auto", "fp32", "bf16"))

    def __post_init__(self):
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}, not {value}")
            if not choices and not f.metadata["minimum"] <= value < math.inf:
                least = f.metadata["minimum"]
                raise ValueError(f"{f.name} must be a number of at least {least}, not {value}")

    @property
    def name(self) -> str:
        """Folder name of the run, for example base-ot-16shots-seed1."""
        return f"{self.classes}-{self.reg}-{self.shots or 'all-'}shots-seed{self.seed}"


# ---- Optimal transport ---------------------------------------------------------------------------
@torch.no_grad()
def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    epsilon: float = EPSILON,
    max_iter: int = 5000,
    tol: float = 1e-4,
) -> Tensor:
    """Entropic optimal transport: the plan that minimises <plan, cost> - epsilon H(plan).

    cost: (..., n, m); leading dimensions are independent problems. epsilon: in units of the cost.
    a, b: row sums (..., n) and column sums (..., m) of the plan, by default uniform with sum 1.
    Returns the plan (..., n, m), detached, in fp32 or wider. Its column sums are exact. Its row
    errors add up to at most `tol`, or a warning says that `max_iter` was too small. For random
    costs, 5,000 iterations leave up to 2e-3 at epsilon = range(cost) / 10,000 and often 0.1 at
    range(cost) / 100,000.
    Raises ValueError if epsilon is not positive or if a and b have different sums.

    Sinkhorn's algorithm in the log domain (Cuturi 2013; Peyré and Cuturi 2019, section 4.4).
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, not {epsilon}")
    # In fp64, since cost / epsilon can be large; mps has only fp32.
    dtype = torch.float32 if cost.device.type == "mps" else torch.float64
    scaled = cost.to(dtype) / epsilon
    n, m = cost.shape[-2:]
    uniform = a is None and b is None
    a = (scaled.new_full((n,), 1 / n) if a is None else a.to(scaled)).unsqueeze(-1)  # (..., n, 1)
    b = (scaled.new_full((m,), 1 / m) if b is None else b.to(scaled)).unsqueeze(-2)  # (..., 1, m)
    if not uniform and not torch.allclose(a.sum((-2, -1)), b.sum((-2, -1))):
        raise ValueError("a and b must have the same sum")
    g = torch.zeros_like(b)  # f and g are the dual potentials, divided by epsilon
    for _ in range(max_iter):
        f = a.log() - (g - scaled).logsumexp(-1, keepdim=True)  # makes the rows sum to a
        g = b.log() - (f - scaled).logsumexp(-2, keepdim=True)  # makes the columns sum to b
        plan = (f + g - scaled).exp()
        row_error = (plan.sum(-1, keepdim=True) - a).abs().sum(-2)  # (..., 1)
        if row_error.max() <= tol:
            break
    else:
        problem = f"row errors above {tol} after {max_iter} iterations"
        warnings.warn(f"sinkhorn: {problem}; raise epsilon or max_iter", stacklevel=3)
    return plan.to(torch.promote_types(cost.dtype, torch.float32))


def transport_cost(
    image: Tensor, text: Tensor, image0: Tensor, text0: Tensor, modality: str = "joint"
) -> Tensor:
    """C_ij = (1 - cos(f_i, f0_j)) + (1 - cos(t_i, t0_j)), (B, B), or one of the two terms."""
    image_cost = 1 - image @ image0.T  # (B, B)
    text_cost = 1 - text @ text0.T  # (B, B)
    return {"joint": image_cost + text_cost, "image": image_cost, "text": text_cost}[modality]


def ot_loss(
    image: Tensor,
    text: Tensor,
    image0: Tensor,
    text0: Tensor,
    epsilon: float = EPSILON,
    modality: str = "joint",
    pointwise: bool = False,
) -> tuple[Tensor, Tensor]:
    """OT loss <plan, C> between tuned and frozen joint features: (loss, plan (B, B)).

    image, text: (B, D) unit-length features of the tuned model; row i of text belongs to label y_i.
    image0, text0: the same for the frozen model. modality: "joint", "image" or "text" features.
    pointwise: use identity / B as the plan. Call outside autocast: costs in bf16 are too coarse.

    The plan is constant in the backward pass: d loss / d C = plan. By the envelope theorem, that is
    the gradient of <plan, C> - epsilon H(plan). For <plan, C> alone it is the released code's rule,
    exact as epsilon -> 0. The loss is at most epsilon log(B) above exact transport. It is within
    1 % at epsilon 0.001 on CLIP-like features, whose off-diagonal costs are far above epsilon.
    """
    cost = transport_cost(image, text, image0, text0, modality)
    identity = torch.eye(len(cost), device=cost.device) / len(cost)
    plan = identity if pointwise else sinkhorn(cost, epsilon=epsilon)  # has no gradient
    return (plan * cost).sum(), plan


# ---- The model -----------------------------------------------------------------------------------
def unit(x: Tensor) -> Tensor:
    """Rows scaled to unit length, in fp32."""
    return F.normalize(x.float(), dim=-1)


class PromptLearner(nn.Module):
    """The trained parameters: `text` and `vision`, each (depth, n_ctx, width of the tower).

    Text prompts of the first layer start from the embeddings of "a photo of a", all others from
    N(0, 0.02^2). `depth` is capped at the tower's layers. 61,440 parameters for ViT-B/16.
    """

    def __init__(self, clip: CLIP, n_ctx: int, depth: int):
        super().__init__()
        text, image = clip.transformer, clip.visual.transformer  # the towers
        self.text = nn.Parameter(0.02 * torch.randn(min(depth, text.layers), n_ctx, text.width))
        self.vision = nn.Parameter(0.02 * torch.randn(min(depth, image.layers), n_ctx, image.width))
        self.to(clip.logit_scale.device)
        words = tokenize(TEMPLATE)[0, 1:5][:n_ctx]  # ids of "a photo of a"
        self.text.data[0, : len(words)] = clip.token_embedding.weight[words.to(self.text.device)]


class PromptOT(nn.Module):
    """CLIP with learned prompts, and the same weights without prompts as the frozen teacher.

    clip: as returned by `load`, on the device to use. recipe: only n_ctx, depth, precision count.
    The towers compute in that precision; prompts, features and losses are fp32.
    """

    def __init__(self, clip: CLIP, classnames: list[str], recipe: Recipe = Recipe()):
        super().__init__()
        self.clip = clip.requires_grad_(False)
        self.prompts = PromptLearner(clip, recipe.n_ctx, recipe.depth)
        device = clip.logit_scale.device.type
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and native)
        self.autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=bf16)
        self.set_classes(classnames)

    def set_classes(self, classnames: list[str]) -> "PromptOT":
        """Sets the classes and encodes their names with frozen CLIP. Keeps the prompts."""
        self.classnames = list(classnames)
        n_ctx = self.prompts.text.shape[1]
        # Prompts overwrite the first n_ctx tokens after SOT: "a photo of a", then words "x".
        template = TEMPLATE.replace(" {}", " x" * max(0, n_ctx - 4) + " {}")
        tokens = tokenize([template.replace("{}", n) for n in classnames], self.clip.context_length)
        self.texts = pack(tokens, n_ctx).to(self.prompts.text.device)  # faster, same features
        self.text0 = self.frozen_text_features()  # (C, D)
        return self

    def image_features(self, images: Tensor, tuned: bool = True) -> Tensor:
        """Images (B, 3, R, R) -> f (B, D), or f0 of the frozen model if not tuned."""
        with self.autocast():
            return unit(self.clip.encode_image(images, self.prompts.vision if tuned else None))

    def text_features(self) -> Tensor:
        """t (C, D) of the classes, with prompts."""
        with self.autocast():
            return unit(self.clip.encode_text(self.texts, self.prompts.text))

    def frozen_text_features(self, template: str = TEMPLATE) -> Tensor:
        """t0 (C, D) of the classes, the weights of a zero-shot classifier."""
        texts = [template.replace("{}", name) for name in self.classnames]
        with self.autocast():
            return unit(self.clip.encode_text(tokenize(texts, self.clip.context_length)))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) -> logits (B, C)."""
        return self.clip.logit_scale.exp() * self.image_features(images) @ self.text_features().T

    def loss(self, images: Tensor, labels: Tensor, recipe: Recipe = Recipe()) -> tuple:
        """L = CE + lambda L_ot for images (B, 3, R, R) with labels (B,), and a dict of its parts.

        Parts: "ce"; "ot", unweighted; "plan", None if reg is "none"; "off_diagonal", the share of
        the plan's mass between different images. Each process passes its share of the B images.
        """
        image = runs.gather(self.image_features(images))  # f (B, D)
        labels = runs.gather(labels)  # y (B,)
        text = self.text_features()  # t (C, D)
        logits = self.clip.logit_scale.exp() * image @ text.T  # (B, C)
        ce = F.cross_entropy(logits, labels)
        if recipe.reg == "none":
            zero = torch.zeros_like(ce)
            return ce, {"ce": ce.detach(), "ot": zero, "off_diagonal": zero, "plan": None}

        # The frozen features are not cached, since augmentation changes images in every epoch.
        image0 = runs.gather(self.image_features(images, tuned=False))  # f0 (B, D)
        z = image, text[labels]  # the two halves of the joint features, (B, D) each
        z0 = image0, self.text0[labels]
        ot, plan = ot_loss(*z, *z0, recipe.epsilon, recipe.modality, recipe.reg == "pointwise")
        off_diagonal = 1 - plan.trace() / plan.sum()
        parts = {"ce": ce.detach(), "ot": ot.detach(), "off_diagonal": off_diagonal, "plan": plan}
        return ce + recipe.lam * ot, parts


# ---- Training, evaluation, main ------------------------------------------------------------------
def learning_rate(epoch: int, recipe: Recipe = Recipe()) -> float:
    """CoOp's schedule: 1e-4 in epoch 0, whatever lr is, then a cosine from lr to almost 0."""
    if epoch == 0:
        return 1e-4
    return recipe.lr * (1 + math.cos(math.pi * (epoch - 1) / recipe.epochs)) / 2


def train(
    model: PromptOT, items: Items, recipe: Recipe = Recipe(), record=None, workers: int = 0
) -> list[dict[str, float]]:
    """Tunes the prompts by SGD (momentum 0.9, weight decay 5e-4). Returns the means of each epoch.

    record: a `runs.Record`, which shows progress and saves the state after each epoch. It resumes a
    saved state, on a CPU with bit-identical results. ValueError if the loss is not finite.
    """
    record = record or runs.Record()
    clip = model.clip
    device = model.text0.device
    transform = data.train_transform(clip.image_resolution, recipe.augment, clip.mean, clip.std)
    loader = data.train_loader(
        items, transform, recipe.batch_size, recipe.seed, workers, runs.rank(), runs.world_size()
    )
    sgd = torch.optim.SGD(model.prompts.parameters(), recipe.lr, momentum=0.9, weight_decay=5e-4)
    epochs = min(recipe.stop_epoch or recipe.epochs, recipe.epochs)
    first_epoch = record.begin(epochs, len(loader), model.prompts, sgd)  # above 0 if resumed
    for epoch in range(first_epoch, epochs):
        sgd.param_groups[0]["lr"] = learning_rate(epoch, recipe)
        loader.batch_sampler.epoch = epoch  # reshuffles
        for images, labels in loader:
            loss, parts = model.loss(images.to(device), labels.to(device), recipe)
            sgd.zero_grad()
            loss.backward()
            runs.average_gradients(model.prompts)
            sgd.step()
            record.step({"loss": loss.detach(), **parts})
        record.end_of_epoch()
    return record.history


@torch.no_grad()
def encode(
    model: PromptOT, items: Items, tuned: bool = True, workers: int = 0, skip: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields image features (B, D) and labels (B,) in order. skip: leave out unreadable images."""
    device = model.text0.device
    transform = data.test_transform(model.clip.image_resolution, model.clip.mean, model.clip.std)
    batches = data.test_loader(items, transform, batch_size=64, workers=workers, skip=skip)
    start = time.perf_counter()
    for number, (images, labels) in enumerate(batches, start=1):
        if len(labels):  # empty if no image was readable
            yield model.image_features(images.to(device), tuned), labels.to(device)
        runs.progress(f"batch {number} of {len(batches)}", number, len(batches), start)
    runs.clear_line()


@torch.no_grad()
def correct(
    model: PromptOT, dataset: Dataset, texts: Tensor, tuned: bool = True, workers: int = 0
) -> Tensor:
    """Counts correct test predictions per class (T, C), for T sets of text features (T, C, D)."""
    counts = texts.new_zeros(texts.shape[:2])
    share = dataset.test[runs.rank() :: runs.world_size()]  # this process's share
    for image, labels in encode(model, share, tuned, workers):
        hits = (texts @ image.T).argmax(dim=1) == labels  # (T, C, B) -> (T, B)
        counts.index_add_(1, labels, hits.to(counts))
    return runs.add_up(counts)


def main(argv: list[str] | None = None) -> None:
    """Measures zero-shot accuracy, tunes and evaluates each recipe, and prints the table."""
    with runs.one_line_errors(), runs.processes():
        args, recipes = parse_args(argv)
        if args.predict:
            return classify(args)
        dataset = data.load_dataset(args.data, args.classnames, args.template)
        others = [data.load_dataset(folder) for folder in args.eval_data]
        targets = data.evaluation_targets(dataset, args.classes, others)
        clip = load(args.model, args.device, activation=args.activation)
        runs.set_threads(clip)
        model = PromptOT(clip, dataset.classnames, recipes[0])
        flags = vars(args) | {"names": dataset.classnames, "fingerprint": fingerprint(clip)}
        run = runs.Run(args.output, flags, SWEEP, args.resume)
        run.log(runs.describe(dataset, targets, model, recipes))

        for name, target in targets.items():
            if name not in run.metrics["zero_shot"]:
                own = model.set_classes(target.classnames).frozen_text_features(target.template)
                texts = torch.stack([model.text0, own])  # (2, C, D)
                counts = correct(model, target, texts, tuned=False, workers=args.workers)
                run.add_zero_shot(name, target, counts)
        run.note_chance(targets)
        for recipe in recipes:
            record = run.record(recipe.name)
            if record is None:  # already finished
                continue
            if args.load:
                model = load_prompts(args.load, clip, recipe.precision)
            else:
                source = data.few_shot_source(dataset, recipe.shots, recipe.seed, recipe.classes)
                torch.manual_seed(recipe.seed)  # prompts are initialised randomly
                model = PromptOT(clip, source.classnames, recipe)
                train(model, source.train, recipe, record, args.workers)
                if runs.rank() == 0:
                    folder = run.folder / recipe.name
                    save_tuning(folder, model, source.train, recipe, record.history, flags)
            counts = {}
            for name, target in targets.items():  # the same prompts with other class names
                with torch.no_grad():
                    texts = model.set_classes(target.classnames).text_features()  # (C, D)
                counts[name] = correct(model, target, texts[None], workers=args.workers)[0]
            run.add_tuning(recipe, record.history, targets, counts)
        run.log(f"\n{runs.results(run.metrics)}\n\nprompts, metrics, log, pictures: {run.folder}")


# ---- Saved prompts, prediction, the picture of the plan ------------------------------------------
def save_tuning(
    folder: Path, model: PromptOT, items: Items, recipe: Recipe, history: list, flags: dict
) -> None:
    """Saves prompts.pt with everything needed to reuse them, curves.png and plan.png."""
    prompts = {name: tensor.cpu() for name, tensor in model.prompts.state_dict().items()}
    content = {"prompts": prompts, "classnames": model.classnames, "recipe": asdict(recipe)}
    content["flags"] = {name: flags[name] for name in SAVED_FLAGS}
    runs.save_tensors(content, folder / "prompts.pt")
    runs.curves(history, folder / "curves.png")
    runs.plan_picture(*plan_of(model, items, recipe), folder / "plan.png")


def read_prompts(path: str | Path) -> dict:
    """Reads a prompts.pt. The recipe becomes a Recipe again. ValueError for any other file."""
    saved = read_tensors(path)
    try:
        content = {name: saved[name] for name in ("prompts", "classnames")}
        flags = {name: saved["flags"][name] for name in SAVED_FLAGS}
        return content | {"flags": flags, "recipe": Recipe(**saved["recipe"])}
    except (KeyError, TypeError) as e:
        raise ValueError(f"{path} does not hold prompts saved by a run ({e})") from None


def load_prompts(path: str | Path, clip: CLIP, precision: str = "auto") -> PromptOT:
    """The tuned model with its classes. ValueError if the weights are others."""
    saved = read_prompts(path)
    if saved["flags"]["fingerprint"] != fingerprint(clip):
        raise ValueError(f"{path} was tuned on other weights: {saved['flags']['model']}")
    model = PromptOT(clip, saved["classnames"], replace(saved["recipe"], precision=precision))
    model.prompts.load_state_dict(saved["prompts"])
    return model


@torch.no_grad()
def predict(model: PromptOT, paths: list[str], workers: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yields path and probabilities (C,) of each image that can be read."""
    text = model.clip.logit_scale.exp() * model.text_features()  # (C, D)
    items = [(path, index) for index, path in enumerate(paths)]
    for image, indices in encode(model, items, workers=workers, skip=True):
        probabilities = (image @ text.T).softmax(dim=1).cpu()  # (B, C)
        yield from zip([paths[index] for index in indices.tolist()], probabilities)


def classify(args: argparse.Namespace) -> None:
    """Runs --predict."""
    paths = data.find_images(args.predict)
    clip = load(args.model, args.device, activation=args.activation)
    model = load_prompts(args.load, clip, args.precision).set_classes(args.names)
    runs.predictions(predict(model, paths, args.workers), paths, args.names, args.csv)


@torch.no_grad()
def plan_of(model: PromptOT, items: Items, recipe: Recipe) -> tuple[Tensor, Tensor, list]:
    """Joint cost and plan (B, B) for up to twelve of the images, and these images."""
    items = items[:: math.ceil(len(items) / 12)]  # evenly spaced, since items are grouped by class
    [(image, labels)] = encode(model, items)  # a single batch
    [(image0, _)] = encode(model, items, tuned=False)
    cost = transport_cost(image, model.text_features()[labels], image0, model.text0[labels])
    return cost, sinkhorn(cost, epsilon=recipe.epsilon), [data.open_image(p) for p, _ in items]


# ---- The command line ----------------------------------------------------------------------------
DEMO = Path(__file__).parent / "demo"
SWEEP = ("reg", "shots", "seed")  # flags with several values: each combination is one run
SAVED_FLAGS = ("data", "classnames", "template", "model", "activation", "names", "fingerprint")


class Parser(argparse.ArgumentParser):
    """Command-line flags. Those not given are None."""

    def __init__(self):
        title = __doc__.splitlines()[0]
        super().__init__(usage="%(prog)s [flags]", description=title, allow_abbrev=False)
        path = {"type": runs.full_path, "metavar": "PATH"}
        add = self.add_argument_group("data").add_argument
        add("--data", **path, help="folder of images, or a benchmark (default: the demo)")
        add("--eval-data", **path, nargs="+", help="also evaluate on these data sets")
        add("--classnames", **path, help="file with a line 'folder name' per class of --data")
        add("--template", help="zero-shot template for --data, such as 'an aerial photo of {}.'")
        add = self.add_argument_group("model").add_argument
        add("--model", **path, help="name or path of CLIP weights (default: ViT-B/16)")
        add("--activation", choices=("quickgelu", "gelu"), help="overrides the weights' config")
        add = self.add_argument_group("tuning").add_argument
        for f in fields(Recipe):
            flag = "--" + f.name.replace("_", "-")
            nargs = "+" if f.name in SWEEP else None
            choices = f.metadata["choices"]
            metavar = None if choices else f.type.__name__.upper()
            help = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
            add(flag, type=f.type, nargs=nargs, choices=choices, metavar=metavar, help=help)
        add = self.add_argument_group("run").add_argument
        add("--output", metavar="PATH", help="folder for the results (default: runs/DATA)")
        add("--resume", action="store_true", help="continue an interrupted run")
        add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
        add("--workers", type=int, metavar="INT", help="image loaders (default: 8 with a GPU)")
        add = self.add_argument_group("saved prompts").add_argument
        add("--load", metavar="FILE", help="evaluate these prompts instead of tuning")
        add("--predict", nargs="+", metavar="PATH", help="classify images or folders; needs --load")
        add("--csv", metavar="FILE", help="file for the predictions (default: print them)")
        add("--names", nargs="+", metavar="NAME", help="classes for --predict (default: all)")

    def error(self, message: str):  # one line, without argparse's usage
        raise ValueError(f"{message} (see --help)")


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, list[Recipe]]:
    """All flags, and a recipe for each combination of the flags in SWEEP."""
    flags = vars(Parser().parse_args(argv))
    given = {name: value for name, value in flags.items() if value is not None}
    flags |= asdict(Recipe()) | {"model": "ViT-B/16", "eval_data": [], "device": "auto"}
    if "load" in given:
        saved = read_prompts(given["load"])
        flags |= asdict(saved["recipe"]) | saved["flags"]
        if "data" in given:
            flags |= {"classnames": None, "template": None}  # these belong to the saved data set
    elif "data" not in given:
        flags |= {"data": str(DEMO / "digits"), "model": str(DEMO / "tiny-clip.pt")}
        flags |= {"augment": "gentle", "reg": ["none", "ot"]}
    args = argparse.Namespace(**flags | given)
    if args.predict and not args.load:
        raise ValueError("--predict needs --load FILE, the prompts of a run")
    args.device = runs.usable_device(args.device)
    if args.workers is None:
        args.workers = 0 if args.device == "cpu" else min(8, os.cpu_count() or 1)
    if args.load:
        return args, [replace(saved["recipe"], classes=args.classes, precision=args.precision)]
    settings = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    sweep = {name: settings[name] for name in SWEEP}
    choices = [values if isinstance(values, list) else [values] for values in sweep.values()]
    return args, [Recipe(**settings | dict(zip(sweep, c))) for c in itertools.product(*choices)]


if __name__ == "__main__":
    main()
