"""A run: its folder and progress, its tables and pictures, its device and processes.

It does not import the method. To show several runs in one table:

    python runs.py runs/caltech-101 runs/eurosat runs/dtd
"""

import collections
import contextlib
import csv
import dataclasses
import datetime
import io
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from torchvision.utils import make_grid, save_image

from weights import read_tensors

# ---- The folder of a run -------------------------------------------------------------------------
NOT_COMPARED = ("output", "resume", "device", "workers", "predict", "csv")  # when resuming
CHANCE = """note    zero-shot accuracy on {} is at the level of chance. If CLIP does not know the
        class names (ids, another language), or they are mixed up, use --classnames. If they
        are right, the weights are not: use another --activation or --model."""


class Run:
    """A folder with log.txt, metrics.json, results.md, and a sub-folder for each tuning.

    settings: everything that the results depend on. Only those in `sweep` may differ when a run is
    resumed. Raises ValueError if the folder cannot be used.

    metrics.json: settings; versions; zero_shot and zero_shot_template (target -> accuracy in % with
    "a photo of a {}." and with the template of the data set); runs, each with name, recipe, history
    (means per epoch), accuracy (target -> %) and per_class (target -> class -> %).
    """

    def __init__(self, folder: str | None, settings: dict, sweep: tuple[str, ...], resume: bool):
        settings = {k: v for k, v in settings.items() if k not in (*sweep, *NOT_COMPARED)}
        versions = {module.__name__: module.__version__ for module in (torch, torchvision)}
        self.metrics = {"settings": settings, "versions": versions}
        self.metrics |= {"zero_shot": {}, "zero_shot_template": {}, "runs": []}
        folders = [open_folder(folder, settings["data"], resume) if rank() == 0 else None]
        if world_size() > 1:
            dist.broadcast_object_list(folders)  # from process 0
        self.folder = folders[0]
        if (self.folder / "metrics.json").exists():
            self.metrics = read_metrics(self.folder)
            for name, old in self.metrics["settings"].items():
                if settings.get(name) != old:
                    new = settings.get(name)
                    raise ValueError(f"cannot resume {self.folder}: {name} was {old}, is now {new}")
        self.save()

    def log(self, text: str) -> None:
        """Prints the text and appends it to log.txt."""
        if rank() == 0:
            clear_line()
            print(text, flush=True)
            with open(self.folder / "log.txt", "a", encoding="utf-8", errors="replace") as f:
                f.write(text + "\n")

    def save(self) -> None:
        """Writes metrics.json and results.md."""
        if rank() == 0:
            tables = f"{results(self.metrics)}\n\n{per_class(self.metrics)}"
            write_file(self.folder / "results.md", tables.encode(errors="replace"))
            write_file(self.folder / "metrics.json", json.dumps(self.metrics, indent=1).encode())

    def add_zero_shot(self, name: str, target, counts: Tensor) -> None:
        """counts: (2, C) correct predictions, with "a photo of a {}." and the target's template."""
        plain, own = (100 * counts.sum(dim=1) / len(target.test)).tolist()
        self.metrics["zero_shot"][name] = plain
        self.metrics["zero_shot_template"][name] = own
        also = "" if own == plain else f', with "{target.template}" {own:.2f} %'
        self.log(f"zero-shot {name} {plain:.2f} %{also}")
        self.save()

    def note_chance(self, targets: dict) -> None:
        """Prints a note if zero-shot accuracy is at the level of chance on a target."""
        for name, target in targets.items():
            classes, images = len(target.classnames), len(target.test)
            if classes >= 3 and images >= 20 and self.metrics["zero_shot"][name] < 150 / classes:
                return self.log(CHANCE.format(name))

    def record(self, name: str) -> "Record | None":
        """The progress of a tuning, with its state in a sub-folder. None if it is finished."""
        done = any(run["name"] == name for run in self.metrics["runs"])
        self.log(f"\n{name}" + (": finished before" if done else ""))
        (self.folder / name).mkdir(exist_ok=True)
        return None if done else Record(self.folder / name / "state.pt", self.log)

    def add_tuning(self, recipe, history: list, targets: dict, counts: dict[str, Tensor]) -> None:
        """counts: target -> (C,) correct predictions per class. Deletes the state of the tuning."""
        accuracy, classes = {}, {}
        for name, target in targets.items():
            correct = counts[name].tolist()
            images = collections.Counter(label for _, label in target.test)
            accuracy[name] = 100 * sum(correct) / len(target.test)
            classes[name] = {target.classnames[y]: 100 * correct[y] / images[y] for y in images}
            self.log(f"{name} {accuracy[name]:.2f} %")
        finished = {"name": recipe.name, "recipe": dataclasses.asdict(recipe), "history": history}
        self.metrics["runs"].append(finished | {"accuracy": accuracy, "per_class": classes})
        self.save()
        if rank() == 0:
            (self.folder / recipe.name / "state.pt").unlink(missing_ok=True)


def open_folder(folder: str | None, data: str, resume: bool) -> Path:
    """Takes a new or empty folder, or finds the run to resume. Default: runs/DATA, runs/DATA-2, ...

    Of several runs that start at once, the one that creates log.txt gets the folder.
    """
    base = Path(folder or Path("runs") / Path(data).name)
    if Path(data).resolve() in base.resolve().parents:
        raise ValueError(f"the results, {base}, would be inside --data: choose another --output")
    numbered = (base.with_name(f"{base.name}-{i}") for i in itertools.count(2))
    candidates = [base] if folder else itertools.chain([base], numbered)
    if resume:
        candidates = list(itertools.takewhile(Path.exists, candidates))[-1:] or [base]
        if (candidates[0] / "metrics.json").exists():
            return candidates[0]
    for path in candidates:
        with contextlib.suppress(FileExistsError):  # a file, or taken by another run
            path.mkdir(parents=True, exist_ok=True)
            if not any(path.iterdir()):
                open(path / "log.txt", "x").close()
                return path
    raise ValueError(f"{path} is not empty: choose another --output, or --resume the run in it")


def read_metrics(folder: Path) -> dict:
    """Reads the metrics.json of a run. ValueError if it is damaged or foreign."""
    file = folder / "metrics.json"
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        results(metrics), per_class(metrics), Path(metrics["settings"]["data"])
        return metrics
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{file} is damaged or was not written by a run") from None


class Record:
    """Shows the progress of a tuning, and saves its state after each epoch to resume from it."""

    def __init__(self, file: Path | None = None, log=print):
        self.file, self.log = file, log
        self.history: list[dict[str, float]] = []  # the means of each epoch
        self.parts: list[Tensor] = []  # the numbers of each step in this epoch

    def begin(self, epochs: int, steps: int, prompts: nn.Module, optimizer) -> int:
        """Restores the state if there is one. Returns the number of finished epochs."""
        self.epochs, self.prompts, self.optimizer = epochs, prompts, optimizer
        if self.file and self.file.exists():
            saved = read_tensors(self.file)
            try:
                prompts.load_state_dict(saved["prompts"])
                optimizer.load_state_dict(saved["optimizer"])
                self.history = list(saved["history"])
            except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as e:
                raise ValueError(f"{self.file} is not the state of this tuning: {e}") from None
        self.start = time.perf_counter()
        self.done, self.total = 0, steps * (epochs - len(self.history))  # steps since the start
        return len(self.history)

    def step(self, parts: dict[str, Tensor]) -> None:
        """parts: the loss and its parts by name. Only scalars are kept."""
        scalars = {k: x for k, x in parts.items() if isinstance(x, Tensor) and x.ndim == 0}
        self.names = list(scalars)
        self.parts.append(torch.stack(list(scalars.values())))
        self.done += 1
        if self.done % 10 == 0:  # reading the numbers in every step would stall a GPU
            self.show()

    def show(self) -> tuple[dict[str, float], str]:
        """Shows the means of this epoch. Returns them and the line."""
        epoch = len(self.history) + 1
        means = dict(zip(self.names, torch.stack(self.parts).mean(dim=0).tolist()))
        if not all(map(math.isfinite, means.values())):
            raise ValueError(
                f"the loss is not finite in epoch {epoch}: try a lower --lr or --precision fp32"
            )
        text = " ".join(f"{k.replace('_', '-')} {mean:.4f}" for k, mean in means.items())
        rate = self.done / (time.perf_counter() - self.start)
        text = f"{epoch}/{self.epochs} {text} {rate:.1f} steps/s"
        return means, progress(text, self.done, self.total, self.start)

    def end_of_epoch(self) -> None:
        """Adds the means to the history and saves the state."""
        means, line = self.show()
        self.history.append(means)
        self.parts = []
        if len(self.history) == self.epochs:
            self.log(line)
        if self.file and rank() == 0:
            state = {"prompts": self.prompts.state_dict(), "history": self.history}
            save_tensors(state | {"optimizer": self.optimizer.state_dict()}, self.file)


def save_tensors(content: dict, path: Path) -> None:
    """torch.save, but atomic."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def write_file(path: Path, content: bytes) -> None:
    """Writes to a temporary file, then renames it, so that a killed process leaves the old one."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


# ---- Output --------------------------------------------------------------------------------------
@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line on stderr: exit status 2 for errors, 130 if interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if it is closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not know every character
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:  # the reader has quit, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except (ValueError, OSError, RuntimeError, MemoryError) as e:
        if sys.flags.dev_mode:  # python -X dev
            raise
        text = str(e).strip() or type(e).__name__
        if text.startswith("Caught ") and "DataLoader worker" in text:  # includes a traceback
            text = text.splitlines()[-1].partition(": ")[2]
        print(f"error: {' '.join(text.split())[:500]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; --resume continues after the last finished epoch", file=sys.stderr)
        sys.exit(130)


_printed = 0.0  # when `progress` last printed a line


def progress(text: str, done: int, total: int, start: float) -> str:
    """Shows the progress of work begun at `start` (time.perf_counter). Returns the line.

    On a terminal, the line is rewritten. Elsewhere, one is printed every 30 seconds.
    """
    global _printed
    now = time.perf_counter()
    left = datetime.timedelta(seconds=round((now - start) * (total / done - 1)))
    line = f"{text}, {left} left"
    if rank() == 0 and sys.stdout.isatty():
        print(f"\r{line[: shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)
    elif rank() == 0 and now - max(start, _printed) > 30:
        print(line, flush=True)
        _printed = now
    return line


def clear_line() -> None:
    """Removes the line of `progress` from a terminal."""
    if rank() == 0 and sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)


def describe(dataset, targets: dict, model: nn.Module, recipes: list) -> str:
    """Describes data, targets and model, with a note for each guess."""
    parts = [f"{len(getattr(dataset, part))} {part}" for part in ("train", "val", "test")]
    lines = [f"data    {dataset.name}: {', '.join(parts)} images"]
    notes = [*model.clip.notes, *dataset.notes]
    for name, target in targets.items():
        names = ", ".join(target.classnames[:9]) + ", ..." * (len(target.classnames) > 9)
        size = f"{len(target.test)} images of {len(target.classnames)} classes"
        lines.append(f"target  {name}: {size}: {names}")
        notes += target.notes
    frozen = sum(p.numel() for p in model.clip.parameters()) / 1e6
    trained = sum(p.numel() for p in model.prompts.parameters())
    sizes = f"{frozen:.1f} M frozen parameters, {trained:,} trained"
    lines.append(f"model   {sizes}, on {model.text0.device}")
    if recipes[0].classes == "base":
        notes.append("base is the first half of the classes; --classes all: tune on all of them")
    shots = max(recipe.shots for recipe in recipes)
    images = collections.Counter(dataset.classnames[label] for _, label in dataset.train)
    if few := [name for name in images if images[name] < shots]:
        notes.append(f"{len(few)} classes have fewer than {shots} training images, e.g. {few[0]}")
    return "\n".join(lines + [f"note    {note}" for note in dict.fromkeys(notes)]) + "\n"


def methods(metrics: dict) -> dict[str, list[dict[str, float]]]:
    """The accuracies (target -> %) of zero-shot CLIP and of the tunings, for each seed."""
    found = {"zero-shot": [metrics["zero_shot"]]}
    found["zero-shot, own template"] = [metrics["zero_shot_template"]]
    for run in metrics["runs"]:
        name = f"{run['recipe']['reg']}, {run['recipe']['shots'] or 'all'} shots"
        found.setdefault(name, []).append(run["accuracy"])
    return found


def own_targets(accuracy: dict[str, float]) -> list[str]:
    """The targets in the run's own data set: base and novel, or all of it."""
    targets = list(accuracy)
    return targets[:2] if targets[:2] == ["base", "novel"] else targets[:1]


def with_summary(accuracy: dict[str, float]) -> dict[str, float]:
    """Adds HM after base and novel, and the average of the other targets if there are several."""
    summary = {target: accuracy[target] for target in own_targets(accuracy)}
    others = {target: value for target, value in accuracy.items() if target not in summary}
    if len(summary) == 2:
        summary["HM"] = statistics.harmonic_mean(summary.values())
    if len(others) > 1:
        others["average of others"] = statistics.mean(others.values())
    return summary | others


def results(metrics: dict) -> str:
    """A Markdown table: a row for each method, a column for each target. Mean ± std over seeds.

    HM and average are taken for each seed. The standard deviation is that of a sample.
    """
    rows = [["accuracy in %", *with_summary(metrics["zero_shot"])]]
    for name, seeds in methods(metrics).items():
        cells = [name]
        for values in zip(*(with_summary(seed).values() for seed in seeds)):
            std = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{std}")
        rows.append(cells)
    if rows[1][1:] == rows[2][1:]:  # the data set's template is the common one
        del rows[2]
    return markdown(rows)


def per_class(metrics: dict) -> str:
    """A Markdown table for each target: accuracy in % per class, the lowest first."""
    runs = metrics["runs"]
    tables = []
    for target, first in runs[0]["per_class"].items() if runs else ():
        rows = [[target, *(run["name"] for run in runs)]]
        for name in sorted(first, key=first.get):
            rows.append([name, *(f"{run['per_class'][target][name]:.1f}" for run in runs)])
        tables.append(markdown(rows))
    return "\n\n".join(tables) + "\n"


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells, the first being the header, as a Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    lines = []
    for first, *others in [rows[0], rule, *rows[1:]]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("| " + " | ".join([first.ljust(widths[0]), *cells]) + " |")
    return "\n".join(lines)


def overview(folders: list[str]) -> str:
    """A Markdown table over runs: a row for each data set, then their mean. Means over seeds."""
    if not folders:
        raise ValueError("usage: python runs.py runs/A runs/B ...")
    table: dict[str, dict[str, dict]] = {}  # data set -> method -> target -> %
    for folder in folders:
        metrics = read_metrics(Path(folder))
        name = Path(metrics["settings"]["data"]).name
        if name in table or not metrics["runs"]:
            raise ValueError(f"{folder} is unfinished, or there is another run on {name}")
        row = table[name] = {}
        for method, seeds in methods(metrics).items():
            targets = own_targets(seeds[0])
            means = [statistics.mean(seed[target] for seed in seeds) for target in targets]
            row[method] = dict(zip(targets if len(means) == 2 else ["accuracy"], means))
    first = next(iter(table.values()))
    columns = [[(method, *means) for method, means in row.items()] for row in table.values()]
    if any(names != columns[0] for names in columns):
        raise ValueError("the runs differ in --reg, --shots or --classes")
    table["mean"] = {
        method: {t: statistics.mean(row[method][t] for row in table.values()) for t in targets}
        for method, targets in first.items()
    }
    rows = [["accuracy in %", *(f"{m}: {t}" for m in first for t in with_summary(first[m]))]]
    for name, row in table.items():
        values = [value for method in row.values() for value in with_summary(method).values()]
        rows.append([name, *(f"{value:.2f}" for value in values)])
    return markdown(rows)


def predictions(found: Iterable, paths: list[str], names: list[str], file: str | None) -> None:
    """Prints the five most likely classes of each image, or writes the first to a new CSV file.

    found: pairs of path and probabilities (C,). Raises ValueError at the end if some of `paths` are
    not among them, since these images could not be read.
    """
    unreadable = dict.fromkeys(paths)
    text = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    with open(file, "x", **text) if file else contextlib.nullcontext() as output:
        if file:
            rows = csv.writer(output)
            rows.writerow(["path", "class", "probability"])
        for path, probabilities in found:
            unreadable.pop(path, None)
            top = probabilities.argsort(descending=True)[:5].tolist()
            if file:
                rows.writerow([path, names[top[0]], f"{probabilities[top[0]]:.4f}"])
            else:
                print(path, *(f"  {probabilities[i]:6.1%}  {names[i]}" for i in top), sep="\n")
    if unreadable:
        raise ValueError(f"cannot read {len(unreadable)} images: {', '.join(unreadable)}")


# ---- Pictures ------------------------------------------------------------------------------------
def plan_picture(cost: Tensor, plan: Tensor, images: list[Image.Image], path: Path) -> None:
    """Draws the cost (B, B), left, and the plan (B, B), right, of B images; dark is high.

    Rows: tuned model. Columns: frozen model.
    """
    tiles = [TF.to_tensor(ImageOps.fit(image, (40, 40))) for image in images]  # (3, 40, 40) each
    panels = []
    for matrix in (cost, plan):
        shades = 1 - (matrix - matrix.min()) / (matrix.max() - matrix.min() + 1e-12)
        cells = [torch.ones(3, 40, 40), *tiles]
        for tile, row in zip(tiles, shades.tolist()):
            cells += [tile, *(torch.full((3, 40, 40), shade) for shade in row)]
        panels.append(make_grid(cells, nrow=1 + len(tiles), padding=3, pad_value=0.8))
    save_image(torch.cat(panels, dim=2), path)


def curves(history: list[dict[str, float]], path: Path) -> None:
    """Draws the mean of each number per epoch, in its own panel from 0 to its maximum."""
    width, height = 640, 150
    picture = Image.new("RGB", (width, height * len(history[0])), "white")
    draw = ImageDraw.Draw(picture)
    for k, name in enumerate(history[0]):
        values = [means[name] for means in history]
        top = max(values) or 1
        title = f"{name.replace('_', '-')}: 0 to {top:.3g}, epochs 1 to {len(values)}"
        draw.text((10, k * height), title, fill="black", font_size=18)
        x = torch.linspace(10, width - 10, len(values)).tolist()
        y = [(k + 1) * height - 10 - (height - 40) * value / top for value in values]
        draw.line([*zip(x, y)], fill="black", width=3)
        draw.rectangle([10, k * height + 30, width - 10, (k + 1) * height - 10], outline="gray")
    picture.save(path)


# ---- Paths, device, processes started by torchrun ------------------------------------------------
def full_path(path: str) -> str:
    """The absolute path, or the text itself if there is no such file, as for ViT-B/16."""
    full = os.path.abspath(os.path.expanduser(path))
    return full if os.path.exists(full) else path


def usable_device(name: str) -> str:
    """Checks the device; "auto" means a GPU if there is one. ValueError if it cannot be used."""
    if name == "auto":
        gpu = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if gpu else "cpu"
    try:
        torch.zeros(1, device=name).tolist()
    except Exception as e:  # each kind of device raises its own
        reason = str(e).split("\n")[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None
    return name


def set_threads(model: nn.Module) -> None:
    """Uses one thread for a tiny model on a CPU, where more would mostly wait for each other."""
    if sum(p.numel() for p in model.parameters()) < 2e7 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Joins the processes started by torchrun, if any, and leaves them at the end."""
    if "LOCAL_RANK" in os.environ:
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()  # gloo for tensors on the CPU, nccl on GPUs
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 to P - 1. Process 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """P, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(x: Tensor) -> Tensor:
    """Sums x over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


class Gather(torch.autograd.Function):
    """Concatenates the rows of all processes in the order of ranks: (B / P, ...) -> (B, ...)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return add_up(gradient.clone()).chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """The rows of all processes; differentiable."""
    return Gather.apply(x) if world_size() > 1 else x


def average_gradients(module: nn.Module) -> None:
    """Averages gradients over the P processes.

    Every process computes the loss of the whole batch, so its text prompts get the full gradient.
    The backward pass of `gather` adds up P such losses, so its vision prompts get P times the
    gradient of its own images. The mean over processes is the full gradient in both cases.
    """
    if world_size() > 1:
        for parameter in module.parameters():
            parameter.grad = add_up(parameter.grad) / world_size()


if __name__ == "__main__":
    with one_line_errors():
        print(overview(sys.argv[1:]), "HM is computed from the means in its row.", sep="\n\n")
