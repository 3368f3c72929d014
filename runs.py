"""A run: its folder with log, metrics, saved prompts and training states; its processes and device.

Knows nothing of the method: what it keeps are named numbers and tensors.
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from report import Line, curves, describe, duration, go_on, per_class, plan_picture, results, tables
from weights import read_tensors

try:
    import fcntl
except ImportError:  # on Windows
    import msvcrt

    fcntl = None

# ---- The folder of a run -------------------------------------------------------------------------


ORIGIN = ("data", "classnames", "template", "model", "activation")  # flags kept with prompts
BEGUN = {"lock", "metrics.json.part"}  # all that a run leaves that is killed in its first moment
MAY_CHANGE = ("output", "resume", "download", "predict", "csv", "names", "device", "workers")


class Run:
    """A folder with log.txt, metrics.json, results.md, and a sub-folder for each tuning.

    folder: new or empty, None for one of `free_folder`; with `resume` that of a run with the same
    settings, which are all flags but MAY_CHANGE and those that its tunings have `varied`. writes:
    false for all processes but the first, which neither write nor print.
    Raises ValueError if the folder holds something else, or another process is at work in it.

    metrics.json: settings, versions: name -> value. zero_shot, zero_shot_template: target ->
    accuracy in %, of "a photo of a {}." and of the data set's own template. runs: name, recipe,
    history (means of each epoch), accuracy (target -> %) and per_class (target -> class -> %) of
    each tuning. tables: title, classes, source and targets (names of the rows) of each table in
    results.md.
    """

    def __init__(
        self, folder: str | None, flags: dict, varied: tuple[str, ...], resume: bool,
        writes: bool = True,
    ):
        self.writes = writes
        settings = {k: v for k, v in flags.items() if k not in (*varied, *MAY_CHANGE)}
        settings = json.loads(json.dumps(settings))  # as they come back from the file
        if writes:
            self.lock = open_folder(folder, flags["data"], settings, resume)
            weakref.finalize(self, self.lock.close)  # also after an error
        self.folder = first_process(lambda: Path(self.lock.name).parent)
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "torchvision": torchvision.__version__}
        self.metrics = {"settings": settings, "versions": versions, "zero_shot": {},
                        "zero_shot_template": {}, "runs": [], "tables": []}
        file = self.folder / "metrics.json"
        if resume and file.exists():
            self.metrics = read_metrics(file, settings)
        self.save()

    def log(self, text: str) -> None:
        """Prints lines and appends them to log.txt."""
        if self.writes:
            print(text, flush=True)
            line = (text + "\n").encode(errors="backslashreplace")  # names may be no Unicode
            with open(self.folder / "log.txt", "ab") as f:
                f.write(line)

    def save(self) -> None:
        """Writes metrics.json."""
        if self.writes:
            text = json.dumps(self.metrics, indent=1)
            replace_file(self.folder / "metrics.json", text.encode())

    def introduce(
        self, dataset, targets: dict, shots: int, model: nn.Module, notes=()
    ) -> None:
        """Says what the run is made of; arguments as for `describe` and `tables`."""
        planned = self.metrics["tables"]
        planned += [t for t in tables(dataset.classnames, targets) if t not in planned]
        self.log(describe(dataset, targets, shots, model, notes))

    def add_zero_shot(self, target: str, plain: float, own: float, template: str) -> None:
        """Accuracy in % of the frozen model, with "a photo of a {}." and with the own template."""
        self.metrics["zero_shot"][target] = plain
        self.metrics["zero_shot_template"][target] = own
        also = f', with "{template}" {own:.2f} %' if own != plain else ""
        self.log(f"zero-shot {target} {plain:.2f} %{also}")
        self.save()

    def is_done(self, name: str) -> bool:
        """Whether the tuning of that name was finished before; prints its title."""
        done = any(run["name"] == name for run in self.metrics["runs"])
        self.log(f"\n{name}" + (": finished before" if done else ""))
        return done

    def record(self, name: str) -> "Record":
        """What shows and keeps the progress of a tuning."""
        if self.writes:
            (self.folder / name).mkdir(exist_ok=True)
        return Record(self.folder / name / "state.pt", self.log, self.writes)

    def keep(
        self, recipe, prompts: nn.Module, tuned_names: list[str], all_names: list[str],
        history: list, plan: tuple,
    ) -> None:
        """Saves tuned prompts with what it takes to use them, and pictures of history and plan."""
        if self.writes:
            content = {name: p.detach().cpu() for name, p in prompts.named_parameters()}
            content |= {"recipe": dataclasses.asdict(recipe), "classnames": tuned_names}
            content["all_classnames"] = all_names
            settings = self.metrics["settings"]
            content |= {"flags": {flag: settings[flag] for flag in ORIGIN}}
            content |= {"fingerprint": settings["fingerprint"]}
            save_tensors(content, self.folder / recipe.name / "prompts.pt")
            curves(history, self.folder / recipe.name / "curves.png")
            plan_picture(*plan, self.folder / recipe.name / "plan.png")

    def finish(self, recipe, history: list, right: dict[str, tuple]) -> None:
        """A tuning is complete, and nothing of it is left to resume.

        right: target -> its data set, and how many images of each class were classified right.
        """
        run = {"name": recipe.name, "recipe": dataclasses.asdict(recipe), "history": history,
               "accuracy": {}, "per_class": {}}
        for target, (dataset, counts) in right.items():
            images = collections.Counter(label for _, label in dataset.test)
            run["accuracy"][target] = 100 * sum(counts) / len(dataset.test)
            run["per_class"][target] = {name: 100 * counts[label] / images[label] for label, name
                                        in enumerate(dataset.classnames) if images[label]}
            self.log(f"{target} {run['accuracy'][target]:.2f} %")
        self.metrics["runs"].append(run)
        self.save()
        if self.writes:
            text = f"{results(self.metrics)}\n\n{per_class(self.metrics)}"
            replace_file(self.folder / "results.md", text.encode(errors="backslashreplace"))
            (self.folder / recipe.name / "state.pt").unlink(missing_ok=True)

    def close(self) -> None:
        """Prints the tables, and leaves the folder to others."""
        self.log(f"\n{results(self.metrics)}\n\nprompts, metrics, log, pictures: {self.folder}")
        if self.writes:
            self.lock.close()


def open_folder(folder: str | None, data: str, settings: dict, resume: bool):
    """Locks a run's folder, see `lock_folder`; without a name the one that `free_folder` finds."""
    if folder:
        return lock_folder(Path(folder), data, settings, resume)
    while True:
        free = free_folder(data, resume)
        try:
            return lock_folder(free, data, settings, resume)
        except ValueError:
            if resume or not free.exists():
                raise  # else another run has just taken it


def lock_folder(folder: Path, data: str, settings: dict, resume: bool):
    """Makes the folder if need be; returns an open file, which is locked as long as it is open.

    The system frees the lock when the process ends, however it does. Raises ValueError if the
    folder is inside the data set, is locked, or holds something that a run must not touch.
    """
    if Path(os.path.realpath(data)) in Path(os.path.realpath(folder)).parents:
        raise ValueError(f"--output {folder} is inside --data, where it would become a class")
    if resume and (folder / "metrics.json").exists():
        read_metrics(folder / "metrics.json", settings)  # before anything is written there
    elif folder.exists() and {p.name for p in folder.iterdir()} - BEGUN:
        raise ValueError(f"{folder} is not empty: --output names another, or --resume goes on with "
                         "a run that is in it")
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:  # Windows
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        file.close()
        raise ValueError(f"another process is at work in {folder}") from None
    return file


def read_metrics(file: Path, settings: dict) -> dict:
    """The content of a run's metrics.json; ValueError if it is damaged or of other settings."""
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
        before = metrics["settings"]
        kinds = {"settings": dict, "zero_shot": dict, "zero_shot_template": dict, "runs": list,
                 "tables": list}
        percents = [*metrics["zero_shot"].values(), *metrics["zero_shot_template"].values()]
        if not (all(isinstance(metrics[name], kind) for name, kind in kinds.items())
                and all(type(x) is float for x in percents)):
            raise TypeError
        if metrics["runs"]:
            [run["name"] for run in metrics["runs"]]
            results(metrics), per_class(metrics)  # they need all that there should be
        else:
            metrics["tables"] = []  # are planned anew
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ValueError(f"{file} is damaged, or not of a run; name another --output") from None
    changed = [f"{name} was {before.get(name)}, is {value}"
               for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise ValueError(f"cannot resume {file.parent} with other settings: {'; '.join(changed)}")
    return metrics


def free_folder(data: str, resume: bool) -> Path:
    """runs/NAME, NAME-2, ...: the first that is free or, to resume, the last that there is."""
    base = Path("runs") / Path(data).name
    names = (base.with_name(f"{base.name}-{i}" if i > 1 else base.name) for i in itertools.count(1))
    taken = []
    for folder in names:
        if not folder.exists():
            return taken[-1] if resume and taken else folder
        taken.append(folder)


# ---- The progress of a tuning --------------------------------------------------------------------


class Record:
    """Shows the progress of a tuning, and keeps its state and the means of each epoch.

    file: for the state; without one nothing is kept. log: prints a line.
    """

    def __init__(self, file: Path | None = None, log: Callable = print, writes: bool = True):
        self.file, self.log, self.writes = file, log, writes
        self.history: list[dict[str, float]] = []
        self.parts: list[Tensor] = []  # the numbers of each step of this epoch

    def begin(self, epochs: int, steps: int, images: int, prompts: nn.Module, optimizer) -> int:
        """Restores the state if there is one; returns the number of epochs done before.

        epochs: of the tuning, steps: of an epoch, images: of a step.
        """
        self.epochs, self.steps, self.images = epochs, steps, images
        self.state = {"prompts": prompts, "optimizer": optimizer}
        if self.file and self.file.exists():
            self.history = self.restore()
        self.start, self.before = time.perf_counter(), len(self.history)
        self.line = Line(self.log)
        return self.before

    def restore(self) -> list[dict[str, float]]:
        """Loads the state from the file; returns the history in it."""
        saved = load_tensors(self.file, {"prompts": dict, "optimizer": dict, "history": list})
        optimizer, history = self.state["optimizer"], saved["history"]
        groups = optimizer.state_dict()["param_groups"]  # are the recipe's
        restore(self.state["prompts"], saved["prompts"], self.file)
        restore(optimizer, saved["optimizer"] | {"param_groups": groups}, self.file)
        for parameter in self.state["prompts"].parameters():
            buffers = optimizer.state[parameter]
            momentum = buffers.get("momentum_buffer") if isinstance(buffers, dict) else None
            if not isinstance(momentum, Tensor) or momentum.shape != parameter.shape or not (
                momentum.isfinite().all()
            ):
                raise ValueError(f"{self.file} does not fit: a momentum is of another tuning")
        if not 0 < len(history) <= self.epochs or not all(
            isinstance(means, dict) and means and set(means) == set(history[0])
            and all(type(x) is float and math.isfinite(x) for x in means.values())
            for means in history
        ):
            raise ValueError(f"{self.file} does not fit: its history is not of this tuning")
        return history

    def step(self, parts: dict[str, Tensor]) -> None:
        """parts: the loss and what it is made of; its numbers (not tensors) are kept."""
        go_on()
        numbers = {k: x for k, x in parts.items() if isinstance(x, Tensor) and x.ndim == 0}
        self.names = list(numbers)
        self.parts.append(torch.stack(list(numbers.values())))
        if len(self.parts) % 10 == 0:  # to read numbers in every step would stall a GPU
            self.show()

    def show(self) -> dict[str, float]:
        """Shows how far the tuning is, with the means of this epoch, which are returned."""
        epoch, done = len(self.history), len(self.parts)
        numbers = torch.stack(self.parts).cpu()  # (steps, names)
        if not numbers.isfinite().all():
            step = int(numbers.isfinite().all(dim=1).logical_not().nonzero()[0]) + 1
            where = f"epoch {epoch + 1}, step {step}"
            raise ValueError(f"the loss is not finite in {where}; lower --lr?")
        means = dict(zip(self.names, numbers.mean(dim=0).tolist()))
        done += self.steps * (epoch - self.before)
        seconds = time.perf_counter() - self.start
        left = seconds / done * (self.steps * (self.epochs - self.before) - done)
        columns = [f"{name.replace('_', '-')} {mean:.4f}" for name, mean in means.items()]
        rate = f"{self.images * done / seconds:.0f} img/s"
        self.line.show(" ".join([f"{epoch + 1}/{self.epochs}", *columns, rate, duration(left)]))
        return means

    def end_of_epoch(self) -> None:
        """Keeps the means and the state."""
        self.history.append(self.show())
        self.parts = []
        if len(self.history) == self.epochs:
            self.line.keep()
        if self.file and self.writes:
            state = {name: dict(holder.state_dict()) for name, holder in self.state.items()}
            save_tensors(state | {"history": self.history}, self.file)


# ---- Files ---------------------------------------------------------------------------------------


def save_tensors(content: dict, path: Path) -> None:
    """torch.save in one go."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace_file(path, buffer.getvalue())


def load_tensors(path: str | os.PathLike, kinds: dict[str, type]) -> dict:
    """What `save_tensors` wrote; no code in the file is run. kinds: what it must have, by name.

    Raises ValueError if the file is damaged, or of another kind.
    """
    saved = read_tensors(path)
    for name, kind in kinds.items():
        if not isinstance(saved.get(name), kind):
            raise ValueError(f"{path} is another kind of file: it has no {name}")
    return saved


def read_prompts(path: str | os.PathLike, recipe: type, fingerprint: str | None = None) -> dict:
    """The content of a prompts.pt, see `Run.keep`; its recipe as an object of the class `recipe`.

    Raises ValueError also for prompts of weights with another fingerprint.
    """
    saved = load_tensors(path, {
        "text": Tensor, "vision": Tensor, "recipe": dict, "classnames": list,
        "all_classnames": list, "flags": dict, "fingerprint": str,
    })
    fields = dataclasses.fields(recipe)
    for names in (saved["classnames"], saved["all_classnames"]):
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path} does not fit: its class names are no text")
    saved["flags"] = {flag: saved["flags"].get(flag) for flag in ORIGIN}
    for flag, value in saved["flags"].items():
        if not isinstance(value, str) and (value is not None or flag in ("data", "model")):
            raise ValueError(f"{path} does not fit: its flag {flag} is no text")
    if fingerprint not in (None, saved["fingerprint"]):
        model = saved["flags"]["model"]
        raise ValueError(f"the prompts in {path} were tuned for other weights: {model}")
    known = {f.name: saved["recipe"].get(f.name, f.default) for f in fields}
    return saved | {"recipe": recipe(**known)}


def flags_of(saved: dict, with_data: bool) -> dict:
    """The flags that a prompts.pt stands for; with those that speak of its data, or without."""
    flags = saved["flags"] if with_data else {k: saved["flags"][k] for k in ("model", "activation")}
    return flags | {"classes": [saved["recipe"].classes], "names": saved["all_classnames"]}


def restore(holder, state: dict, path: str | os.PathLike) -> None:
    """Loads a state from a file into a module or an optimizer; ValueError if it does not fit."""
    try:
        holder.load_state_dict(state)
        tensors = [value for value in state.values() if isinstance(value, Tensor)]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError("not all of its numbers are finite")
    except (AttributeError, KeyError, TypeError, RuntimeError, ValueError) as e:
        raise ValueError(f"{path} does not fit: {' '.join(str(e).split())[:200]}") from None


def replace_file(path: Path, content: bytes) -> None:
    """Writes to a temporary file, then renames: whoever is killed leaves the old file whole."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as e:  # the system's message does not name the file if the disk is full
        part.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({e.strerror})") from None


# ---- Device and processes ------------------------------------------------------------------------


def usable_device(name: str) -> str:
    """A device; "auto" is a GPU if there is one. ValueError if it cannot be used here."""
    if name == "auto":
        there = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
        kinds = [kind for kind, backend in there.items() if backend.is_available()]
        name = f"{kinds[0]}:{os.environ.get('LOCAL_RANK', '0')}" if kinds else "cpu"
    try:
        torch.zeros(1, device=name).tolist()
    except Exception as e:  # each kind of device has its own for not being there
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None
    return name


def set_threads(model: nn.Module) -> None:
    """One thread for a small model on a CPU, unless OMP_NUM_THREADS says otherwise.

    More threads wait for each other more than they compute, above all on a busy machine.
    """
    if sum(p.numel() for p in model.parameters()) < 2e7 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Joins the processes that torchrun has started, if it has, and leaves them in the end."""
    if "LOCAL_RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()  # gloo for tensors on the CPU, nccl on GPUs
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Of this process, 0 to P - 1; the first is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """P, the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first_process(function: Callable, *args):
    """function(*args), which the first process alone computes, on all of them."""
    values = [function(*args) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def add_up(x: Tensor) -> Tensor:
    """The sum over all processes."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


class Gather(torch.autograd.Function):
    """Rows of all processes, in order of rank: (B / P, ...) -> (B, ...)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Everyone's rows, on every process."""
        rows = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        """What the losses of all processes together say of one's own rows."""
        return add_up(gradient.clone()).chunk(world_size())[rank()]


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, with gradients."""
    return Gather.apply(x) if world_size() > 1 else x


def average_gradients(module: nn.Module) -> None:
    """Over processes; each has the gradient of the whole loss, or P times that of its share."""
    if world_size() > 1:
        for parameter in module.parameters():
            parameter.grad = add_up(parameter.grad) / world_size()
