"""What a run shows: description, progress line, tables, pictures. Knows nothing of the method."""

import argparse
import collections
import contextlib
import csv
import dataclasses
import itertools
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def stop_at_once(number: int, frame) -> None:
    """Ends the program while PyTorch is imported: an exception there might get lost or altered."""
    if multiprocessing.parent_process() is None:  # not a worker
        print("\ninterrupted", file=sys.stderr, flush=True)
    os._exit(130)


if (Path(sys.argv[0]).name == "promptot.py"  # who imports this file has handlers of their own
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, stop_at_once)  # until `one_line_errors`
    signal.signal(signal.SIGTERM, stop_at_once)

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn


asked_to_stop: list[int] = []  # signals


def stop(number: int, frame) -> None:
    """Handler of Ctrl-C and SIGTERM: a KeyboardInterrupt."""
    asked_to_stop.append(number)
    raise KeyboardInterrupt


def go_on() -> None:
    """Raises the KeyboardInterrupt again, which is lost if it comes within a destructor."""
    if asked_to_stop:
        raise KeyboardInterrupt


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input ends the program with a line on stderr and exit status 2, Ctrl-C or SIGTERM 130."""
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is stop_at_once:
        signal.signal(signal.SIGINT, stop)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # closed, as by `>&-`
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may not know all characters
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as e:
        text = " ".join(str(e).split()) or "out of memory"  # as Python's own says nothing
        print(f"error: {text[:2000]}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as e:  # a worker or another process is lost, or the device fails
        print(f"error: {type(e).__name__}: {' '.join(str(e).split())[:500]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on after the last whole epoch", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """Flags in groups; says in one line what is wrong with them, without their list.

    text: a module's docstring; its first line is what the program does, its commands are examples.
    """

    def __init__(self, text: str):
        lines = text.splitlines()
        commands = [line for line in lines if line.startswith("    python ")]
        super().__init__(usage="%(prog)s [flags]", description=lines[0],
                         epilog="\n".join(["examples:", *commands]), allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str):
        """Raises ValueError."""
        raise ValueError(f"{message} (--help shows all flags)")

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """The flags; ValueError for such as do not go together."""
        args = super().parse_args(argv)
        if args.predict and not args.load:
            self.error("--predict needs --load FILE, the prompts that a run has saved")
        if args.workers is None:
            on_gpu = torch.cuda.is_available() and args.device != "cpu"
            args.workers = min(8, os.cpu_count() or 1) if on_gpu else 0
        if not 0 <= args.workers <= 256:
            self.error(f"--workers is {args.workers!r:.40}, not within 0 to 256")
        return args

    def add_run_flags(self) -> None:
        """Flags of every run: what it leaves, saved prompts, the machine."""
        add = self.add_argument_group("what a run leaves").add_argument
        add("--output", metavar="DIR", help="for prompts, metrics, log, pictures (runs/...)")
        add("--resume", action="store_true", help="go on with an interrupted run in --output")
        add = self.add_argument_group("saved prompts").add_argument
        add("--load", metavar="FILE", type=full_path, help="evaluate these prompts, tune none")
        add("--predict", metavar="PATH", nargs="+", help="images or folders to classify by --load")
        add("--csv", metavar="FILE", help="for path, class, probability by --predict")
        add("--names", metavar="NAME", nargs="+", help="for --predict (all classes of the data)")
        add = self.add_argument_group("the machine").add_argument
        add("--device", default="auto", help="cpu, cuda, ... (a GPU if there is one)")
        add("--workers", type=int, metavar="INT",
            help="processes that read images, up to 256 (8 with a GPU, else none)")

    def add_settings(self, settings: type, several: tuple[str, ...]) -> None:
        """A flag for each field of a dataclass; those in `several` take more than one value.

        Metadata of a field: help; within: choices of a str, bounds of a number.
        """
        group = self.add_argument_group("how prompts are tuned")
        for f in dataclasses.fields(settings):
            many, is_choice, within = f.name in several, f.type is str, f.metadata["within"]
            bounds = "" if is_choice else f"; {within[0]:g} to {within[1]:g}"
            group.add_argument(
                "--" + f.name.replace("_", "-"), type=f.type, nargs="+" if many else None,
                default=[f.default] if many else f.default,
                choices=within if is_choice else None,
                metavar=None if is_choice else f.type.__name__.upper(),
                help=f"{f.metadata['help']} ({f.default}{bounds})".replace("%", "%%"),
            )


def full_path(path: str) -> str:
    """A flag's value as an absolute path, with ~ expanded."""
    return os.path.abspath(os.path.expanduser(path))


def path_or_name(text: str) -> str:
    """A flag's value as an absolute path, if there is such a file or folder."""
    path = full_path(text)
    return path if os.path.exists(path) else text


def watch(batches: Iterable, size: int, total: int, show: bool = True) -> Iterator:
    """Passes on batches of `size` images, and shows how many of the images are done."""
    line, start = Line(print), time.perf_counter()
    for number, batch in enumerate(batches, start=1):
        line.clear()
        go_on()
        yield batch
        done, seconds = min(number * size, total), time.perf_counter() - start
        if show and seconds > 1:
            left = duration(seconds / done * (total - done))
            line.show(f"{done}/{total} images {done / seconds:.0f} img/s {left}")
    line.clear()


def look_at(
    check: Callable[[set[str]], Iterable[str]], paths: set[str], show: bool = True
) -> None:
    """Checks images, with progress; raises what `check` raises at a bad one."""
    for _ in watch(check(paths), 1, len(paths), show):
        pass


class Line:
    """A line that is rewritten on a terminal; elsewhere one is printed every half minute."""

    def __init__(self, log):
        self.log, self.text, self.printed = log, "", time.perf_counter()

    def show(self, text: str) -> None:
        """Shows the text in place of the last."""
        self.text = text
        if sys.stdout.isatty():
            print(f"\r{text}\033[K", end="", flush=True)
        elif time.perf_counter() > self.printed + 30:
            self.keep()

    def keep(self) -> None:
        """The line stays, in the log, too."""
        self.clear()
        self.log(self.text)
        self.printed = time.perf_counter()

    def clear(self) -> None:
        """Makes room for other output."""
        if self.text and sys.stdout.isatty():
            print("\r\033[K", end="", flush=True)


def duration(seconds: float) -> str:
    """61 -> "1:01", 3661 -> "1:01:01"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def predictions(
    found: Iterable[tuple[str, Tensor]], paths: list[str], names: list[str], file: str | None
) -> None:
    """Prints the five likeliest classes of each image or, in a CSV file, the likeliest of each.

    found: path and probabilities (C,). Raises ValueError in the end for paths that are not among
    them, as those images cannot be read.
    """
    missing = dict.fromkeys(paths)
    # "x": a file that is there already is somebody's
    with open(file, "x", newline="", encoding="utf-8", errors="backslashreplace") if file else (
        contextlib.nullcontext(sys.stdout)
    ) as out:
        rows = csv.writer(out)
        if file:
            rows.writerow(["path", "class", "probability"])
        for path, share in found:
            missing.pop(path, None)
            top = share.argsort(descending=True)[:5].tolist()
            if file:
                rows.writerow([path, names[top[0]], f"{share[top[0]]:.4f}"])
            else:
                print(path, *(f"  {share[i]:6.1%}  {names[i]}" for i in top), sep="\n")
    if missing:
        raise ValueError(f"left out as they cannot be read: {len(missing)}, {', '.join(missing)}")


def describe(dataset, targets: dict, shots: int, model: nn.Module, notes: tuple[str, ...]) -> str:
    """What a run is made of, in a few lines.

    targets: as for `tables`. shots: wanted of each class. notes: beside those of the data sets.
    """
    counts = [len(items) for items in (dataset.train, dataset.val, dataset.test)]
    lines = [f"data    {dataset.name}: {len(dataset.classnames)} classes, "
             f"{counts[0]} train, {counts[1]} val, {counts[2]} test images"]
    plans = {"base": "on the first half of the classes, tested on both (--classes all: on all)",
             "all": "on all classes"}
    lines += [f"tuning  {plans[classes]}" for classes in targets]
    every = dict(itertools.chain(*(group.items() for group in targets.values())))
    for name, target in every.items():
        names = ", ".join(target.classnames[:9]) + (", ..." if len(target.classnames) > 9 else "")
        lines.append(f"target  {name}: {len(target.test)} images; "
                     f"{len(target.classnames)} classes {names}")
    parameters = list(model.parameters())
    learned, frozen = (sum(p.numel() for p in parameters if p.requires_grad == learned)
                       for learned in (True, False))
    lines.append(f"model   {frozen / 1e6:.1f} M frozen numbers, {learned:,} learned, "
                 f"on {parameters[0].device}")
    of_data = (note for d in (dataset, *every.values()) for note in d.notes)
    notes = dict.fromkeys([*notes, *of_data])  # each of them once
    per_class = collections.Counter(label for _, label in dataset.train)
    if few := [label for label, count in per_class.items() if count < shots]:
        notes[f"{len(few)} classes have fewer than {shots} training images, e.g. "
              f"{dataset.classnames[few[0]]} {per_class[few[0]]}; all of them are used"] = None
    return "\n".join([*lines, *(f"note    {note}" for note in notes)]) + "\n"


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
    """The tables of `metrics.json` as Markdown."""
    return "\n\n".join(_result_table(table, metrics) for table in metrics["tables"])


def _result_table(table: dict, metrics: dict) -> str:
    """Rows are data sets and their summary, columns are methods; base-to-novel is the other way.

    Mean and standard deviation (of the sample) over seeds, also of HM and average.
    """
    names = table["source"] + table["targets"]
    methods = {'zero-shot, "a photo of a {}."': [metrics["zero_shot"]]}
    if metrics["zero_shot_template"] != metrics["zero_shot"]:
        methods["zero-shot, the data set's template"] = [metrics["zero_shot_template"]]
    runs = [run for run in metrics["runs"] if run["recipe"]["classes"] == table["classes"]
            and set(names) <= set(run["accuracy"])]
    many_shots = len({run["recipe"]["shots"] for run in runs}) > 1
    for run in runs:
        shots = f", {run['recipe']['shots'] or 'all'} shots" if many_shots else ""
        methods.setdefault(f"tuned, {run['recipe']['reg']}{shots}", []).append(run["accuracy"])

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


def per_class(metrics: dict, most: int = 100) -> str:
    """Markdown: accuracy in % on each class of each target, the worst first, by tuning.

    Of targets with at most `most` classes.
    """
    found = []
    targets = dict.fromkeys(name for run in metrics["runs"] for name in run["per_class"])
    for target in targets:
        of_target = [run for run in metrics["runs"] if target in run["per_class"]]
        classes = of_target[0]["per_class"][target]
        rows = [[name, *(f"{run['per_class'][target][name]:.1f}" for run in of_target)]
                for name in sorted(classes, key=classes.get)]
        if len(rows) <= most:
            found.append(markdown([[target, *(run["name"] for run in of_target)], *rows]))
    return "\n\n".join(found) + "\n"


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


# ---- Pictures ------------------------------------------------------------------------------------


def plan_picture(cost: Tensor, plan: Tensor, images: list[Image.Image], path: Path) -> None:
    """PNG of the cost (B, B) and the plan (B, B): dark is much; B images stand along both sides."""
    size, n = 44, len(images)
    thumbnails = [ImageOps.fit(image, (size - 4, size - 4)) for image in images]
    picture = Image.new("RGB", ((2 * n + 5) * size, (n + 3) * size), "white")
    draw = ImageDraw.Draw(picture)
    for left, title, matrix in ((1, "cost: tuned (down), frozen (across)", cost),
                                (n + 3, "plan: what is moved where", plan)):
        draw.text((left * size, size // 2), title, fill="black", font_size=20)
        span = (matrix.max() - matrix.min()).clamp(min=1e-12)
        shades = 255 * (1 - (matrix - matrix.min()) / span)
        for k, thumbnail in enumerate(thumbnails, start=1):
            picture.paste(thumbnail, ((left + k) * size + 2, size + 12))
            picture.paste(thumbnail, (left * size - 8, (k + 1) * size + 18))
        for (i, row), j in itertools.product(enumerate(shades.int().tolist()), range(n)):
            x, y = (left + j + 1) * size, (i + 2) * size + 16
            draw.rectangle([x, y, x + size, y + size], fill=(row[j],) * 3, outline=(200,) * 3)
    picture.save(path)


def curves(history: list[dict[str, float]], path: Path) -> None:
    """PNG: the mean of each number in each epoch, over epochs, one panel below the other."""
    left, width, height, margin = 100, 640, 110, 40
    size = left + width + margin, len(history[0]) * (height + margin) + margin
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for k, name in enumerate(history[0]):
        values, top = [means[name] for means in history], margin + k * (height + margin)
        span, steps = max(values) or 1, max(1, len(values) - 1)
        points = [(left + width * i / steps, top + height * (1 - value / span))
                  for i, value in enumerate(values)]
        draw.rectangle([left, top, left + width, top + height], outline=(200,) * 3)
        draw.line(points if len(points) > 1 else points * 2, fill=(0, 114, 178), width=3)
        draw.text((left, top - 24), name.replace("_", "-"), fill="black", font_size=18)
        for value, y in ((span, top - 8), (0, top + height - 10)):
            draw.text((margin - 10, y), f"{value:.3g}", fill="black", font_size=16)
    draw.text((left, size[1] - 30), f"epochs 1 to {len(history)}", fill="black", font_size=16)
    picture.save(path)
