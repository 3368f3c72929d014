"""Prompt-OT: few-shot prompt tuning of CLIP that keeps what CLIP knew by optimal transport.

Chen et al., "Prompt-OT: An Optimal Transport Regularization Paradigm for Knowledge Preservation
in Vision-Language Model Adaptation", arXiv 2503.08906.

B images x_i with labels y_i, C class names. Frozen CLIP gives f0_i (image), t0_c (text); with
learned prompts it gives f_i, t_c. All have length 1. H is the entropy, s CLIP's logit scale.

    joint features   z_i = [f_i ; t_{y_i}],  z0_j = [f0_j ; t0_{y_j}]              PromptOT.loss
    cost             C_ij = 1/2 ||z_i - z0_j||^2
                          = (1 - cos(f_i, f0_j)) + (1 - cos(t_{y_i}, t0_{y_j}))    transport_cost
    plan             pi = argmin <pi, C> - epsilon H(pi), marginals uniform        sinkhorn
    OT loss          L_ot = <pi, C>, with pi held constant in the backward pass    ot_loss
    objective        L = CE(exp(s) f_i . t_c, y) + lambda L_ot                     PromptOT.loss

    python promptot.py                               # the embedded demo, offline
    python promptot.py --data ./eurosat --shots 16   # your own folder, or a benchmark data set
    python promptot.py --load runs/eurosat/base-ot-16shots-seed1/prompts.pt --predict photos/
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import report  # first: from here on Ctrl-C is one line
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import runs
from clip_model import CLIP, available_models, fingerprint, load, pack, tokenize
from data import AUGMENTS, TEMPLATE, Dataset, Items

# ---- Recipe: all that a tuning depends on, but for data and weights ------------------------------

EPSILON = 0.001  # see ot_loss
VARIED = ("classes", "reg", "shots", "seed")  # settings of which one command may have several
DEMO = Path(__file__).parent / "demo"  # what runs without --data


def setting(default, within: tuple, help: str):
    """A field of Recipe. within: the choices, or the least and the greatest number."""
    return field(default=default, metadata={"within": within, "help": help})


@dataclass(frozen=True)
class Recipe:
    """How prompts are tuned, by default as in the released code. ValueError out of bounds."""

    classes: str = setting("base", ("base", "all"), "tune on the first half, or on all")
    reg: str = setting("ot", ("ot", "pointwise", "none"), "OT, the identity as plan, or none")
    shots: int = setting(16, (0, 10**6), "training images per class, 0 = all")
    seed: int = setting(1, (0, 2**63 - 1), "of shots, prompts and augmentation")
    modality: str = setting("joint", ("joint", "image", "text", "separate"), "what reg compares")
    lam: float = setting(10.0, (0, 1e6), "weight lambda of the OT loss")
    epsilon: float = setting(EPSILON, (1e-9, 1e9), "entropy weight of the plan")
    n_ctx: int = setting(4, (1, 64), "prompts per layer and tower")
    depth: int = setting(12, (1, 1000), "layers with prompts")
    augment: str = setting("field", AUGMENTS, "crops of 8 to 100 % and flips, of 60 to 100 %, none")
    epochs: int = setting(40, (1, 10**6), "length of the learning-rate schedule")
    stop_epoch: int = setting(0, (0, 10**6), "stop after this epoch of the schedule, 0 = the last")
    batch_size: int = setting(4, (1, 10**6), "images per step, over all processes")
    lr: float = setting(0.005, (1e-9, 1e6), "learning rate of SGD")
    precision: str = setting("auto", ("auto", "fp32", "bf16"), "auto: bf16 on GPUs that have it")

    def __post_init__(self):
        for f in fields(self):
            value, within = getattr(self, f.name), f.metadata["within"]
            if type(value) not in (f.type, int) or not (  # an int may stand for a float
                value in within if f.type is str else within[0] <= value <= within[1]
            ):
                raise ValueError(f"{f.name} is {value!r:.40}, not within {within}")

    @property
    def name(self) -> str:
        """Title and folder of the tuning."""
        return f"{self.classes}-{self.reg}-{self.shots or 'all-'}shots-seed{self.seed}"


# ---- Optimal transport ---------------------------------------------------------------------------

@torch.no_grad()
def sinkhorn(
    cost: Tensor, a: Tensor | None = None, b: Tensor | None = None,
    epsilon: float = EPSILON, max_iter: int = 1000, tol: float = 1e-4,
) -> Tensor:
    """Entropic optimal transport: argmin <pi, cost> - epsilon H(pi) with row sums a, column sums b.

    cost: (..., n, m), finite; leading dimensions are independent problems. a: (..., n) and b:
    (..., m), masses of one total; by default uniform, of total 1. epsilon: > 0, in units of the
    cost; it is raised to 1e-6 of the cost's range. Returns the plan (..., n, m), without gradient,
    fp32 or wider. Column sums are exact; row errors add up to at most `tol` of the mass, unless
    `max_iter` steps (in tens) are too few. ValueError for other input; infinite costs give NaN.

    In the log domain (Cuturi 2013; Peyre and Cuturi 2019, 4.4). One step does if the plan is nearly
    a permutation, as in training. Else epsilon is annealed from a quarter of the cost's range
    (Schmitzer 2019), then steps are over-relaxed, but for ten after each ten that did not help
    (Thibault et al. 2021). In fp64, but on mps: f / epsilon leaves too few of fp32's digits.
    """
    dtype = torch.promote_types(cost.dtype, torch.float32)
    cost = cost.to(torch.float32 if cost.device.type == "mps" else torch.float64)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, not {epsilon}")
    if cost.numel() == 0:
        return cost.to(dtype)
    a, b = marginals(cost, a, b)
    low, high = cost.amin((-2, -1), keepdim=True), cost.amax((-2, -1), keepdim=True)
    span = (high - low).clamp(min=torch.finfo(cost.dtype).tiny)
    cost, target = (cost - low) / span, (epsilon / span).clamp(1e-6, 1e6)  # costs from 0 to 1
    log_a, log_b = a.log().clamp(min=-1e4), b.log().clamp(min=-1e4)  # exp(-1e4) is 0
    f, g = torch.zeros_like(a), torch.zeros_like(b)  # (..., n, 1), (..., 1, m)
    # (least epsilon, steps, over-relaxation): one step; annealing; epsilon itself until it fits
    annealed = [(0.25 * 0.7**k, 2, 1.0) for k in range(36) if 0.25 * 0.7**k > target.min()]
    error = before = math.inf
    for level, steps, omega in [(0, 1, 1.0), *annealed, *[(0, 10, 1.8)] * max(1, max_iter // 10)]:
        eps, omega = target.clamp(min=level), 1.0 if error > before else omega
        for _ in range(steps):
            f = f + omega * (eps * (log_a - ((g - cost) / eps).logsumexp(-1, keepdim=True)) - f)
            g = g + omega * (eps * (log_b - ((f - cost) / eps).logsumexp(-2, keepdim=True)) - g)
        plan = b * ((f - cost) / eps).softmax(-2)  # one more step of g, which is not relaxed
        errors = (plan.sum(-1, keepdim=True) - a).abs().sum(-2) / a.sum(-2)
        before, error = error, float(errors.max())
        if level == 0 and error <= tol:
            break
    return plan.to(dtype)


def marginals(cost: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Checked masses (..., n, 1) and (..., 1, m), in the cost's dtype and of exactly one total."""
    n, m = cost.shape[-2:]
    given = b if a is None else a
    total = cost.new_ones(1) if given is None else given.to(cost).sum(-1, keepdim=True)
    a = total / n * cost.new_ones(n) if a is None else a.to(cost)
    b = total / m * cost.new_ones(m) if b is None else b.to(cost)
    if (a.shape[-1], b.shape[-1]) != (n, m):
        raise ValueError(f"{n} x {m} costs, {a.shape[-1]} and {b.shape[-1]} masses do not fit")
    sums = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
    if not (all((x >= 0).all() and x.isfinite().all() and x.any(-1).all() for x in (a, b))
            and torch.allclose(*sums, rtol=1e-3, atol=0)):
        raise ValueError("masses must be finite, not negative, not all zero, and of one total")
    return a[..., None], (b * (sums[0] / sums[1]))[..., None, :]


def transport_cost(
    image: Tensor, text: Tensor, image0: Tensor, text0: Tensor, modality: str = "joint"
) -> Tensor:
    """C_ij = (1 - cos(f_i, f0_j)) + (1 - cos(t_i, t0_j)), (B, B); see `ot_loss` for arguments."""
    image_cost, text_cost = 1 - image @ image0.T, 1 - text @ text0.T
    if modality == "separate":
        return torch.stack([image_cost, text_cost])  # (2, B, B)
    return {"joint": image_cost + text_cost, "image": image_cost, "text": text_cost}[modality]


def ot_loss(
    image: Tensor, text: Tensor, image0: Tensor, text0: Tensor,
    epsilon: float = EPSILON, modality: str = "joint", pointwise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Transport cost <pi, C> from tuned to frozen joint features: (loss, plan (B, B)).

    image, text: (B, D), features of length 1 of the tuned model, row i belonging to image i (text
    is that of its label). image0, text0: the same of the frozen model. modality: what is compared:
    "joint" features, "image" or "text" alone, or "separate": one plan for each, (2, B, B), and the
    losses added up. pointwise: the identity as the plan. Not under autocast: bf16 is too coarse.

    The gradient takes the plan as constant (envelope theorem): d loss / d C = plan. At epsilon
    0.001 the loss is within 1 % of exact OT's where costs off the diagonal are well above it, as
    with CLIP's features. Between features that are all alike (costs below some 10 epsilon) it is up
    to 1e-3 too high, which may be many times the exact value.
    """
    cost = transport_cost(image, text, image0, text0, modality)
    identity = torch.eye(len(image), device=cost.device).expand_as(cost)
    plan = identity / len(image) if pointwise else sinkhorn(cost, epsilon=epsilon)
    return (plan * cost).sum(), plan


# ---- The model -----------------------------------------------------------------------------------

class PromptLearner(nn.Module):
    """All that is learned: `text` (depth, n_ctx, width) and `vision` (depth, n_ctx, its width).

    The first text layer starts from the embeddings of "a photo of a", all else from N(0, 0.02^2).
    Depth is cut to the layers of each tower. 61,440 numbers for ViT-B/16.
    """

    def __init__(self, clip: CLIP, n_ctx: int, depth: int):
        super().__init__()
        for name, tower in (("text", clip.transformer), ("vision", clip.visual.transformer)):
            shape = min(depth, tower.layers), n_ctx, tower.width
            setattr(self, name, nn.Parameter(0.02 * torch.randn(shape)))
        self.to(clip.logit_scale.device)
        words = tokenize(TEMPLATE)[0, 1:5][:n_ctx]  # a photo of a
        self.text.data[0, : len(words)] = clip.token_embedding.weight[words.to(self.text.device)]


class PromptOT(nn.Module):
    """Frozen CLIP, learned prompts and the classes to tell apart.

    clip: as `load` gives it; the one copy of the weights is student (with prompts) and teacher
    (without). classnames: C names. recipe: its n_ctx, depth and precision, in which the towers
    compute; prompts, features and losses are fp32. All is where `clip` is: `load(name, device)`.
    """

    def __init__(self, clip: CLIP, classnames: list[str], recipe: Recipe = Recipe()):
        super().__init__()
        self.clip = clip.requires_grad_(False)
        self.prompts = PromptLearner(clip, recipe.n_ctx, recipe.depth)
        device = clip.logit_scale.device.type
        native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        half = recipe.precision == "bf16" or (recipe.precision == "auto" and native)
        self.autocast = functools.partial(torch.autocast, device, torch.bfloat16, enabled=half)
        self.set_classes(classnames)

    def set_classes(self, classnames: list[str]) -> "PromptOT":
        """Takes other class names for the prompts to apply to; frozen CLIP encodes them, too."""
        self.classnames, n_ctx = list(classnames), self.prompts.text.shape[1]
        # Prompts take the places of "a photo of a"; if there are more, of placeholders, too.
        template = TEMPLATE.replace(" {}", " x" * max(0, n_ctx - 4) + " {}")
        tokens = tokenize([template.format(n) for n in classnames], self.clip.context_length)
        self.texts = pack(tokens, n_ctx).to(self.prompts.text.device)
        self.text0 = self.frozen_text_features()
        return self

    def image_features(self, images: Tensor, tuned: bool = True) -> Tensor:
        """f (B, D) of images (B, 3, R, R); f0 of the frozen model, if not tuned."""
        with self.autocast():
            return unit(self.clip.encode_image(images, self.prompts.vision if tuned else None))

    def text_features(self) -> Tensor:
        """t (C, D) of the classes."""
        with self.autocast():
            return unit(self.clip.encode_text(self.texts, self.prompts.text))

    def frozen_text_features(self, template: str = TEMPLATE) -> Tensor:
        """t0 (C, D) of the classes: a zero-shot classifier."""
        with self.autocast():
            texts = [template.format(name) for name in self.classnames]
            return unit(self.clip.encode_text(tokenize(texts, self.clip.context_length)))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, R, R) -> logits (B, C)."""
        return self.clip.logit_scale.exp() * self.image_features(images) @ self.text_features().T

    def loss(self, images: Tensor, labels: Tensor, recipe: Recipe = Recipe()) -> tuple:
        """L = CE + lambda L_ot of images (B, 3, R, R) with labels (B,), and a dict of its parts.

        recipe: its reg, modality, lam, epsilon. Parts: "ce"; "ot", before lambda; "off_diagonal",
        the share of the mass that does not go from an image to itself; "plan", None without OT.
        Of several processes each brings its share of the images; the loss is that of all.
        """
        image, labels = runs.gather(self.image_features(images)), runs.gather(labels)
        text = self.text_features()  # (C, D)
        logits = self.clip.logit_scale.exp() * image @ text.T  # (B, C)
        ce = F.cross_entropy(logits, labels)
        if recipe.reg == "none":
            zero = torch.zeros_like(ce)
            return ce, {"ce": ce.detach(), "ot": zero, "off_diagonal": zero, "plan": None}
        image0, text0 = runs.gather(self.image_features(images, tuned=False)), self.text0
        ot, plan = ot_loss(
            image, text[labels], image0, text0[labels],  # halves of z_i, of z0_j
            recipe.epsilon, recipe.modality, pointwise=recipe.reg == "pointwise",
        )
        off = 1 - plan.diagonal(dim1=-2, dim2=-1).sum() / plan.sum()
        parts = {"ce": ce.detach(), "ot": ot.detach(), "off_diagonal": off, "plan": plan}
        return ce + recipe.lam * ot, parts


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1, in fp32."""
    return F.normalize(x.float(), dim=-1)


# ---- Training and evaluation ---------------------------------------------------------------------

def learning_rate(epoch: int, recipe: Recipe = Recipe()) -> float:
    """A first epoch at 1e-4, then a cosine from lr; constant within each epoch 0, 1, ..."""
    cosine = (1 + math.cos(math.pi * (epoch - 1) / recipe.epochs)) / 2
    return 1e-4 if epoch == 0 else recipe.lr * cosine


def train(
    model: PromptOT, items: Items, recipe: Recipe = Recipe(), record=None, workers: int = 0
) -> list[dict[str, float]]:
    """Tunes the prompts on items (image path, label) by SGD; returns the means of each epoch.

    record: a `runs.Record`, which shows and keeps the progress; an interrupted tuning that it holds
    goes on, to the very same prompts on the CPU. ValueError if the loss stops being finite.
    """
    record, clip, device = record or runs.Record(), model.clip, model.text0.device
    transform = data.train_transform(clip.image_resolution, recipe.augment, clip.mean, clip.std)
    loader = data.train_loader(items, transform, recipe.batch_size, recipe.seed, workers,
                               runs.rank(), runs.world_size())
    sgd = torch.optim.SGD(model.prompts.parameters(), recipe.lr, momentum=0.9, weight_decay=5e-4)
    epochs = min(recipe.stop_epoch or recipe.epochs, recipe.epochs)
    done = record.begin(epochs, len(loader), loader.batch_sampler.batch_size, model.prompts, sgd)
    for epoch in range(done, epochs):
        sgd.param_groups[0]["lr"] = learning_rate(epoch, recipe)
        loader.batch_sampler.set_epoch(epoch)
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
def encode(model: PromptOT, items: Items, tuned: bool = True, **loading) -> Iterator:
    """Yields image features (B, D) and labels (B,) of items in order; loading: see test_loader."""
    clip, device = model.clip, model.text0.device
    transform = data.test_transform(clip.image_resolution, clip.mean, clip.std)
    batches = data.test_loader(items, transform, batch_size=64, **loading)
    for images, labels in report.watch(batches, 64, len(items), show=runs.rank() == 0):
        yield model.image_features(images.to(device), tuned), labels.to(device)


@torch.no_grad()
def correct(model: PromptOT, dataset: Dataset, tuned: bool = True, workers: int = 0) -> Tensor:
    """How many test images of each class are classified right; the model keeps the class names.

    (1, C) of the tuned model; (2, C) of the frozen one, for TEMPLATE and the data set's own.
    """
    model.set_classes(dataset.classnames)
    frozen = () if tuned else (model.text0, model.frozen_text_features(dataset.template))
    texts = torch.stack(frozen or [model.text_features()])  # (T, C, D)
    right = torch.zeros(texts.shape[:2]).to(texts)
    share = dataset.test[runs.rank() :: runs.world_size()]
    for image, labels in encode(model, share, tuned, workers=workers):
        hits = (texts @ image.T).argmax(dim=1) == labels  # (T, C, B) -> (T, B)
        right.index_add_(1, labels, hits.to(right))
    return runs.add_up(right)


def accuracy(model: PromptOT, dataset: Dataset, tuned: bool = True, workers: int = 0) -> list:
    """Share of the test images that are classified right, in %: T numbers, as of `correct`."""
    return (100 * correct(model, dataset, tuned, workers).sum(1) / len(dataset.test)).tolist()


# ---- From the command line to the table ----------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    """Zero-shot accuracy; for each recipe a tuning and its accuracy; the tables."""
    with report.one_line_errors(), runs.processes():
        args, recipes = parse_args(argv)
        clip = load(args.model, runs.usable_device(args.device), activation=args.activation)
        runs.set_threads(clip)
        if args.predict:
            model = load_prompts(args.load, clip, args.precision).set_classes(args.names)
            found = predict(model, args.predict, args.workers)
            return report.predictions(found, args.predict, args.names, args.csv)
        dataset = data.load_dataset(args.data, args.classnames, args.template)
        others = map(data.load_dataset, args.eval_data)
        targets = data.evaluation_targets(dataset, args.classes, others)
        model = PromptOT(clip, dataset.classnames, recipes[0])
        flags = vars(args) | asdict(recipes[0]) | {"fingerprint": fingerprint(clip)}
        run = runs.Run(args.output, flags, VARIED, args.resume, writes=runs.rank() == 0)
        run.introduce(dataset, targets, max(r.shots for r in recipes), model, clip.notes)

        for name, target in (pair for group in targets.values() for pair in group.items()):
            if name not in run.metrics["zero_shot"]:
                percent = accuracy(model, target, tuned=False, workers=args.workers)
                run.add_zero_shot(name, *percent, target.template)
        sources = {} if args.load else {
            r.name: data.few_shot_source(dataset, r.shots, r.seed, r.classes) for r in recipes}
        report.look_at(data.check_images, {path for s in sources.values() for path, _ in s.train})
        for recipe in recipes:
            if run.is_done(recipe.name):
                continue
            record = run.record(recipe.name)
            if args.load:
                model = load_prompts(args.load, clip, recipe.precision)
            else:
                source = sources[recipe.name]
                torch.manual_seed(recipe.seed)
                model = PromptOT(clip, source.classnames, recipe)
                train(model, source.train, recipe, record, args.workers)
                run.keep(recipe, model.prompts, source.classnames, dataset.classnames,
                         record.history, plan_of(model, source.train, recipe))
            right = {name: (target, correct(model, target, workers=args.workers)[0].tolist())
                     for name, target in targets[recipe.classes].items()}
            run.finish(recipe, record.history, right)
        run.close()


# ---- After the story: saved prompts, prediction, a picture of the plan, flags --------------------

def load_prompts(path: str | Path, clip: CLIP, precision: str = "auto") -> PromptOT:
    """The tuned model of a prompts.pt, on the class names that it was tuned on.

    Raises ValueError if `clip` is not the model that it was tuned for, or the file is damaged.
    """
    saved = runs.read_prompts(path, Recipe, fingerprint(clip))
    model = PromptOT(clip, saved["classnames"], replace(saved["recipe"], precision=precision))
    runs.restore(model.prompts, {name: saved[name] for name in ("text", "vision")}, path)
    return model


@torch.no_grad()
def predict(model: PromptOT, paths: list[str], workers: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yields path and probabilities (C,) of each image that can be read."""
    text = model.clip.logit_scale.exp() * model.text_features()  # (C, D)
    items = [(path, number) for number, path in enumerate(paths)]
    for image, numbers in encode(model, items, workers=workers, skip=True):
        shares = (image @ text.T).softmax(dim=1).cpu()  # (B, C)
        yield from zip([paths[number] for number in numbers.tolist()], shares)


@torch.no_grad()
def plan_of(model: PromptOT, items: Items, recipe: Recipe) -> tuple[Tensor, Tensor, list]:
    """Joint cost and plan (B, B) from tuned to frozen features of a dozen images, and these."""
    items = items[:: math.ceil(len(items) / 12)]  # they come class by class
    [(image, labels)], [(image0, _)] = encode(model, items), encode(model, items, tuned=False)
    text, text0 = model.text_features()[labels], model.text0[labels]
    cost = transport_cost(image, text, image0, text0)
    return cost, sinkhorn(cost, epsilon=recipe.epsilon), [data.open_image(p) for p, _ in items]


def parse_args(argv: list[str] | None) -> tuple:
    """The flags, and a recipe for each combination of what is VARIED."""
    parser = report.Parser(__doc__)
    add = parser.add_argument_group("data and weights").add_argument
    add("--data", type=report.full_path, help="class folders, or train/ val/ test/ with class"
        " folders, or a data set in CoOp's layout (the embedded demo)")
    add("--download", action="store_true", help="fetch --data first, if torchvision can")
    add("--eval-data", type=report.full_path, nargs="+", default=[], help="tested on, too")
    add("--classnames", type=report.full_path, help="file of lines 'folder name', for --data")
    add("--template", help="of --data for zero-shot accuracy: 'an aerial photo of {}.'")
    add("--model", type=report.path_or_name, default="ViT-B/16", help="weights: a file, a folder, "
        + ", ".join(available_models()) + " (ViT-B/16; the demo has its own)")
    add("--activation", choices=("quickgelu", "gelu"), help="if no config beside the weights says")
    parser.add_settings(Recipe, several=VARIED)
    parser.add_run_flags()
    args = parser.parse_args(argv)
    if args.load:  # what was tuned on is tested on, unless flags say otherwise
        saved = runs.read_prompts(args.load, Recipe)
        tuned = saved["recipe"]
        parser.set_defaults(**runs.flags_of(saved, with_data=args.data is None))
    elif args.data is None:
        parser.set_defaults(data=f"{DEMO}/digits", model=f"{DEMO}/tiny-clip.pt", augment="gentle",
                            reg=["none", "ot"])
    args = parser.parse_args(argv)
    args.predict = args.predict and data.find_images(args.predict)
    if args.download:
        args.data = runs.first_process(data.download, Path(args.data).name, Path(args.data).parent)
    if args.load:
        return args, [replace(tuned, classes=c, precision=args.precision) for c in args.classes]
    flags = {f.name: getattr(args, f.name) for f in fields(Recipe)}
    choices = itertools.product(*(flags[name] for name in VARIED))
    return args, [Recipe(**flags | dict(zip(VARIED, choice))) for choice in choices]


if __name__ == "__main__":
    main()
