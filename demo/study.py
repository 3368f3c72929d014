"""When is OT not point-wise matching? Varies batch size and epsilon on the demo's digits.

    python demo/study.py        # 64 rows, about 18 minutes on one core

With a small epsilon the plan matches each image with itself; with a large one it is uniform. The
table shows, in %, the plan's mass off the diagonal in the last epoch, accuracy on base and novel
classes, their harmonic mean (HM), and the HM gain over point-wise matching, seed by seed. All
batch sizes have the same epochs and learning rate: of 80 images, batches of 4, 16 and 64 make 20, 5
and 1 steps per epoch.

Each row is saved as soon as it is measured, and rows in the file are not measured again. After a
change of the code, delete the file or name another one with --results.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # promptot.py is in the folder above
from clip_model import CLIP, load  # noqa: E402 (found there)
from data import Dataset, base_novel, few_shot_source, load_dataset  # noqa: E402 (found there)
from promptot import DEMO, EPSILON, PromptOT, Recipe, correct, train  # noqa: E402 (found there)
from runs import markdown  # noqa: E402 (found there)

EPSILONS = [EPSILON, 0.01, 0.1, 1, 10]
FILE = DEMO / "results" / "study.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    ints = {"type": int, "nargs": "+", "metavar": "N"}
    floats = {"type": float, "nargs": "+", "metavar": "X"}
    add("--batch-size", **ints, default=[4, 16, 64], help="images per step (default: 4 16 64)")
    add("--epsilon", **floats, default=EPSILONS, help="for ot (default: 0.001 0.01 0.1 1 10)")
    add("--seed", **ints, default=[1, 2, 3], help="random seeds (default: 1 2 3)")
    add("--results", type=Path, default=FILE, metavar="FILE", help="file of the measured rows")
    args = parser.parse_args()
    plans = [{"reg": "none"}, {"reg": "pointwise"}]
    plans += [{"reg": "ot", "epsilon": epsilon} for epsilon in args.epsilon]
    groups = [{"batch_size": size, **plan} for size in args.batch_size for plan in plans]
    wanted = [group | {"seed": seed} for group in groups for seed in args.seed]
    zero_shot = {"reg": "zero-shot"}
    clip, digits = demo()
    rows = measure_all(args.results, [zero_shot, *wanted], lambda s: measure(clip, digits, s))
    head = ["batch", "plan, epsilon", "off-diagonal", "base", "novel", "HM", "HM gain"]
    print("\n" + markdown([head, *(cells(rows, group) for group in [zero_shot, *groups])]))


def demo() -> tuple[CLIP, Dataset]:
    """The demo's weights and digits. One thread is faster than two with so small a model."""
    torch.set_num_threads(1)
    return load(DEMO / "tiny-clip.pt"), load_dataset(DEMO / "digits")


def measure(clip: CLIP, data: Dataset, settings: dict) -> dict[str, float]:
    """Accuracies, and the off-diagonal mass in the last epoch, in %.

    settings: fields of Recipe that differ from the demo's. reg may also be "zero-shot".
    """
    if settings["reg"] == "zero-shot":
        return base_to_novel(PromptOT(clip, data.classnames), data, tuned=False)
    recipe = Recipe(augment="gentle", **settings)
    source = few_shot_source(data, recipe.shots, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = PromptOT(clip, source.classnames, recipe)
    with contextlib.redirect_stdout(io.StringIO()):  # hides the progress
        history = train(model, source.train, recipe)
    off_diagonal = round(100 * history[-1]["off_diagonal"], 4)
    return base_to_novel(model, data) | {"off_diagonal": off_diagonal}


@torch.no_grad()
def base_to_novel(model: PromptOT, data: Dataset, tuned: bool = True) -> dict[str, float]:
    """Accuracy in % on base and novel classes, and their harmonic mean."""
    accuracy = {}
    for name, half in zip(("base", "novel"), base_novel(data)):
        model.set_classes(half.classnames)
        texts = model.text_features() if tuned else model.text0
        counts = correct(model, half, texts[None], tuned)
        accuracy[name] = 100 * float(counts.sum()) / len(half.test)
    accuracy["hm"] = statistics.harmonic_mean([accuracy["base"], accuracy["novel"]])
    return {name: round(value, 3) for name, value in accuracy.items()}


def measure_all(file: Path, wanted: list[dict], measure: Callable) -> list[dict]:
    """A row for each of the wanted settings: the settings, and what `measure` returns for them."""
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    for i, settings in enumerate(wanted, start=1):
        if find(rows, settings):
            continue
        start = time.time()
        rows.append(settings | measure(settings))
        lines = ",\n".join(json.dumps(row) for row in rows)
        file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(f"{i}/{len(wanted)} {rows[-1]} ({time.time() - start:.0f} s)", flush=True)
    return [row for settings in wanted for row in find(rows, settings)]


def find(rows: list[dict], settings: dict) -> list[dict]:
    """The rows that have these settings."""
    return [row for row in rows if settings.items() <= row.items()]


def cells(rows: list[dict], group: dict) -> list[str]:
    """A line of the table: means and standard deviations over seeds."""
    seeds = find(rows, group)
    size, plan, off_diagonal, difference = group.get("batch_size", ""), group["reg"], "", ""
    if plan == "ot":
        plan = f"ot, {group['epsilon']:g}"
        off_diagonal = mean([row["off_diagonal"] for row in seeds])
        pointwise = find(rows, {"batch_size": size, "reg": "pointwise"})
        difference = mean([a["hm"] - b["hm"] for a, b in zip(seeds, pointwise)])
    accuracy = [mean([row[name] for row in seeds]) for name in ("base", "novel", "hm")]
    return [str(size), plan, off_diagonal, *accuracy, difference]


def mean(values: list[float]) -> str:
    """The mean and, for several values, the standard deviation."""
    text = f"{round(statistics.mean(values), 1) + 0:.1f}"  # -0.0 + 0 is 0.0
    return f"{text} ± {statistics.stdev(values):.1f}" if len(values) > 1 else text


if __name__ == "__main__":
    main()
