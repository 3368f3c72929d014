"""What a run shows and keeps: description, log, progress line, tables, picture, metrics."""

import collections
import contextlib
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor


def describe(args, dataset, targets: dict, clip, prompts, processes: int) -> Iterator[str]:
    """What the run is made of, in a few lines. targets: as for `tables`."""
    counts = [len(items) for items in (dataset.train, dataset.val, dataset.test)]
    yield (f"data    {dataset.name} ({args.data}): {len(dataset.classnames)} classes, "
           f"{counts[0]} train, {counts[1]} val, {counts[2]} test images")
    every = dict(itertools.chain(*(group.items() for group in targets.values())))
    for name, target in every.items():
        names = ", ".join(target.classnames[:9]) + (", ..." if len(target.classnames) > 9 else "")
        yield f"target  {name}: {len(target.test)} images; {len(target.classnames)} classes {names}"
    frozen, learned = (sum(p.numel() for p in m.parameters()) for m in (clip, prompts))
    size = clip.image_resolution
    yield (f"model   {args.model}: {size} x {size} pixels, {frozen / 1e6:.1f} M frozen parameters, "
           f"{learned:,} learned in the prompts")
    several = f", {processes} processes" if processes > 1 else ""
    yield f"device  {args.device}, {args.precision}{several}"
    for note in dict.fromkeys(note for d in (dataset, *every.values()) for note in d.notes):
        yield f"note    {note}"
    per_class = collections.Counter(label for _, label in dataset.train)
    few = [label for label, count in per_class.items() if count < max(args.shots)]
    if few and not args.load:
        yield (f"note    classes with fewer than {max(args.shots)} training images: {len(few)}, "
               f"e.g. {dataset.classnames[few[0]]} with {per_class[few[0]]}; all of them are used")


class Log:
    """Prints lines and appends them to a file, if it is given. `quiet`: does neither."""

    def __init__(self, file: Path | None = None, quiet: bool = False):
        self.file, self.quiet = file, quiet

    def __call__(self, text: str = "") -> None:
        if self.quiet:
            return
        print(text, flush=True)
        if self.file:
            with open(self.file, "a", encoding="utf-8") as f:
                f.write(text + "\n")


class Progress:
    """One line that is rewritten on a terminal; elsewhere a line for every tenth of the way."""

    def __init__(self, log: Log, total: int, images: int):
        self.log, self.total, self.images = log, total, images
        self.start, self.done, self.waited, self.printed = time.time(), 0, 0.0, 0.0
        self.terminal = sys.stdout.isatty() and not getattr(log, "quiet", False)

    @contextlib.contextmanager
    def waiting(self):
        """Around what a step has to wait for: reading images."""
        before = time.time()
        yield
        self.waited += time.time() - before

    def step(self) -> None:
        """One more step is done."""
        self.done += 1

    def show(self, title: str, means: dict[str, float]) -> None:
        """means: "loss", "ce", "ot", "off_diagonal" of this epoch so far."""
        seconds = time.time() - self.start
        left = seconds / self.done * (self.total - self.done)
        self.line = (
            f"{title}  loss {means['loss']:.3f}  CE {means['ce']:.3f}  OT {means['ot']:.4f}  "
            f"off-diagonal {means['off_diagonal']:.1%}  "
            f"{self.images * self.done / seconds:.0f} images/s "
            f"({self.waited / seconds:.0%} of the time reading)  {duration(left)} left"
        )
        if self.terminal:
            print(f"\r{self.line}\033[K", end="", flush=True)

    def end_of_epoch(self) -> None:
        """Keeps the line if it is the last, or nobody sees it being rewritten."""
        share = self.done / self.total
        if share >= 1 or (not self.terminal and share >= self.printed + 0.1):
            if self.terminal:
                print("\r\033[K", end="")
            self.log(self.line)
            self.printed = share


def duration(seconds: float) -> str:
    """61 -> "1:01", 3661 -> "1:01:01"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def harmonic_mean(accuracies: list[float]) -> float:
    """HM = 2 b n / (b + n) of base and novel accuracy; 0 if both are 0."""
    base, novel = accuracies
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def tables(classnames: list[str], targets: dict[str, dict]) -> list[dict]:
    """The paper's tables, as far as there are targets for them; `results` fills them in.

    classnames: of the source. targets: for each of --classes, name -> data set to be tested on.

    Targets whose classes are among those of the source are domain generalisation (ImageNet-R has
    200 of the 1,000), others are cross-dataset.
    """
    found = []

    def add(title: str, classes: str, source: list[str], names: list[str]) -> None:
        if names:
            found.append({"title": title, "classes": classes, "source": source, "targets": names})

    for classes, group in targets.items():
        names = list(group)
        source, others = (names[:2], names[2:]) if classes == "base" else (names[:1], names[1:])
        shifted = [n for n in others if set(group[n].classnames) <= set(classnames)]
        foreign = [n for n in others if n not in shifted]
        if classes == "base" or not others:
            add("base-to-novel" if classes == "base" else "all classes", classes, [], source)
        add("cross-dataset", classes, source, foreign)
        add("domain generalisation", classes, source, shifted)
    return found


def results(metrics: dict) -> str:
    """The tables of `metrics.json` as Markdown, which reads well in a terminal, too."""
    return "\n\n".join(_result_table(table, metrics) for table in metrics["tables"])


def _result_table(table: dict, metrics: dict) -> str:
    """Rows are data sets and their summary, columns are methods; base-to-novel is the other way.

    Mean and standard deviation (of the sample) over seeds, also of HM and average.
    """
    names = table["source"] + table["targets"]
    methods = {'zero-shot, "a photo of a {}."': [metrics["zero_shot"]]}
    if metrics["zero_shot_template"] != metrics["zero_shot"]:
        methods["zero-shot, the data set's template"] = [metrics["zero_shot_template"]]
    runs = [run for run in metrics["runs"] if run["classes"] == table["classes"]]
    many_shots = len({run["shots"] for run in runs}) > 1
    for run in runs:
        shots = f", {run['shots'] or 'all'} shots" if many_shots else ""
        methods.setdefault(f"tuned, {run['reg']}{shots}", []).append(run["accuracy"])

    base_to_novel = table["targets"] == ["base", "novel"]
    rows = [[table["title"], *methods]]
    for name in names:
        rows.append([name, *(_mean([seed[name] for seed in seeds]) for seeds in methods.values())])
    if len(table["targets"]) > 1:
        title = "HM" if base_to_novel else "average of targets"
        summarise = harmonic_mean if base_to_novel else statistics.mean
        of_seeds = [[summarise([seed[name] for name in table["targets"]]) for seed in seeds]
                    for seeds in methods.values()]
        rows.append([title, *map(_mean, of_seeds)])
    return markdown([list(row) for row in zip(*rows)] if base_to_novel else rows)


def _mean(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def markdown(table: list[list[str]]) -> str:
    """Rows of cells, the first row being the head -> a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    rule = ["-" * widths[0]] + ["-" * (w - 1) + ":" for w in widths[1:]]
    lines = []
    for row in [table[0], rule, *table[1:]]:
        cells = [row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plan_picture(cost: Tensor, plan: Tensor, labels: list[int], path: Path) -> None:
    """PNG: the cost (B, B) and the plan (B, B) side by side, dark = much, lines between classes."""
    size, margin = 400, 30
    picture = Image.new("L", (2 * size + 3 * margin, size + 2 * margin), 255)
    draw = ImageDraw.Draw(picture)
    few_classes = size / len(set(labels)) >= 8  # else the lines would hide the matrix
    panels = (
        (f"cost C, tuned (down) to frozen (across), {len(labels)} training images", cost, 0),
        ("optimal plan between them", plan, 160),
    )
    for i, (title, matrix, line_shade) in enumerate(panels):
        left = margin + i * (size + margin)
        shade = 255 * (1 - (matrix - matrix.min()) / (matrix.max() - matrix.min()).clamp(min=1e-12))
        panel = Image.fromarray(shade.round().to(torch.uint8).cpu().numpy())
        picture.paste(panel.resize((size, size), Image.Resampling.NEAREST), (left, margin))
        draw.text((left, margin - 18), title, fill=0)
        for k in range(1, len(labels)):
            if labels[k] != labels[k - 1] and few_classes:
                at = k * size / len(labels)
                draw.line([(left + at, margin), (left + at, margin + size)], fill=line_shade)
                draw.line([(left, margin + at), (left + size, margin + at)], fill=line_shade)
        draw.rectangle([left, margin, left + size, margin + size], outline=0)
    picture.save(path)


# --------------------------------------------------------------------------------------------------
# The output folder


def free_folder(data: str, resume: bool) -> str:
    """runs/NAME, NAME-2, ...: the first that is free or, to resume, the last that there is."""
    base = Path("runs") / Path(data).resolve().name.replace(":", "-")
    names = (base if i == 1 else base.with_name(f"{base.name}-{i}") for i in itertools.count(1))
    taken = []
    for folder in names:
        if not folder.exists():
            return str(taken[-1] if resume and taken else folder)
        taken.append(folder)


def open_metrics(folder: Path, settings: dict, resume: bool) -> dict:
    """The content of metrics.json: new, or with `resume` what is there. Makes the folder.

    settings, versions: name -> value. zero_shot, zero_shot_template: target -> accuracy in %, of
    "a photo of a {}." and the data set's own template. runs: for each training its classes, reg,
    shots, seed, seconds, history (means of each epoch), accuracy (target -> %). tables: title,
    classes, source and targets (names of the rows) of each table in results.md.
    ValueError if there is a run already and `resume` is not given, or its settings are others.
    """
    file = folder / "metrics.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("*/state.pt"):  # of a run whose settings are not known any more
            stale.unlink(missing_ok=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "torchvision": torchvision.__version__}
        return {"settings": settings, "versions": versions,
                "zero_shot": {}, "zero_shot_template": {}, "runs": [], "tables": []}
    if not resume:
        raise ValueError(f"{folder} holds a run: --resume goes on with it, --output names another")
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        before = dict(metrics["settings"])
        for key in ("zero_shot", "zero_shot_template", "runs", "tables"):
            metrics[key]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is damaged; name another --output") from None
    settings = json.loads(json.dumps(settings))  # as they come back from the file
    changed = [
        f"{name} was {before.get(name)}, is {value}"
        for name, value in settings.items() if before.get(name) != value
    ]
    if changed:
        raise ValueError(f"cannot resume {folder} with other settings: {'; '.join(changed)}")
    return metrics


def save_metrics(folder: Path, metrics: dict) -> None:
    """metrics.json and results.md, each replaced in one go."""
    texts = {"metrics.json": json.dumps(metrics, indent=1), "results.md": results(metrics) + "\n"}
    for name, text in texts.items():
        replace_file(folder / name, text.encode())


def replace_file(path: Path, content: bytes) -> None:
    """Writes to a temporary file, then renames: whoever is killed leaves the old file whole."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as e:  # the system's message does not name the file if the disk is full
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({e.strerror})") from None
