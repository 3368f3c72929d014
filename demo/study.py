"""When is OT not point-wise matching? The demo's digits over batch size and epsilon.

    python demo/study.py        # 64 rows, about 15 minutes on one core

With a small epsilon the plan sends each image to itself, with a large one it is uniform. Measured
in %: the mass off the plan's diagonal (mean of the last epoch), base and novel accuracy, their HM.
Epochs and learning rate are the recipe's for all batch sizes, so that of 80 images batches of 4, 16
and 64 make 20, 5 and 1 steps an epoch. The table's last column compares seed by seed.

Rows go to demo/results/study.json as they are measured, and what is there is not measured again.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # promptot.py lies beside this folder
from data import Dataset, base_novel, few_shot_source, load_dataset  # noqa: E402
from promptot import CLIP, DEMO, EPSILON, PromptOT, Recipe, accuracy, load, train  # noqa: E402
from report import harmonic_mean, markdown  # noqa: E402


def main() -> None:
    args = parse_args()
    clip, data = demo()
    wanted = [{"reg": "zero-shot"}]
    for size in args.batch_size:
        regs = [{"reg": "none"}, {"reg": "pointwise"}]
        regs += [{"reg": "ot", "epsilon": epsilon} for epsilon in args.epsilon]
        wanted += [{"batch_size": size, **reg, "seed": seed} for reg in regs for seed in args.seed]
    rows = measure_all(args.results, wanted, lambda settings: measure(clip, data, settings))
    print("\n" + table(rows))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--batch-size", type=int, nargs="+", default=[4, 16, 64])
    add("--epsilon", type=float, nargs="+", default=[EPSILON, 0.01, 0.1, 1, 10])
    add("--seed", type=int, nargs="+", default=[1, 2, 3])
    add("--results", metavar="FILE", type=Path, default=HERE / "results" / "study.json")
    return parser.parse_args()


def demo() -> tuple[CLIP, Dataset]:
    """The demo's weights and digits, and one thread: two are slower with so small a model."""
    torch.set_num_threads(1)
    return load(DEMO / "tiny-clip.pt"), load_dataset(DEMO / "digits")


def measure(clip: CLIP, data: Dataset, settings: dict) -> dict[str, float]:
    """Accuracy of one tuning and the off-diagonal mass of its last epoch, all in %.

    settings: fields of Recipe that differ from the demo's; reg may be "zero-shot", too.
    """
    if settings["reg"] == "zero-shot":
        return base_to_novel(PromptOT(clip, data.classnames), data, tuned=False)
    recipe = Recipe(augment="gentle", **settings)
    source = few_shot_source(data, recipe.shots, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = PromptOT(clip, source.classnames, recipe)
    history = train(model, source.train, recipe)
    off_diagonal = round(100 * history[-1]["off_diagonal"], 4)
    return base_to_novel(model, data) | {"off_diagonal": off_diagonal}


def base_to_novel(model: PromptOT, data: Dataset, tuned: bool = True) -> dict[str, float]:
    base, novel = (accuracy(model, half, tuned)[0] for half in base_novel(data))
    hm = harmonic_mean([base, novel])
    return {name: round(x, 3) for name, x in (("base", base), ("novel", novel), ("hm", hm))}


def measure_all(file: Path, wanted: list[dict], measure) -> list[dict]:
    """A row of settings and numbers for each of `wanted` settings; those in the file are reused.

    measure: settings -> numbers by name.
    """
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    for i, settings in enumerate(wanted):
        if find(rows, settings):
            continue
        print(f"{i + 1}/{len(wanted)}", *(f"{k} {v}" for k, v in settings.items()), flush=True)
        start = time.time()
        rows.append(settings | measure(settings))
        lines = ",\n".join(json.dumps(row) for row in rows)
        file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        print(*(f"{k} {v}" for k, v in rows[-1].items() if k not in settings),
              f"({time.time() - start:.0f} s)", flush=True)
    return [row for settings in wanted for row in find(rows, settings)]


def find(rows: list[dict], settings: dict) -> list[dict]:
    """The rows that have these settings."""
    return [row for row in rows if settings.items() <= row.items()]


def table(rows: list[dict]) -> str:
    """Markdown: means and standard deviations over seeds."""
    cells = [["batch", "plan", "off-diagonal, %", "base", "novel", "HM", "HM - HM(pointwise)"]]
    groups = {(row.get("batch_size", ""), row["reg"], row.get("epsilon", "")): None for row in rows}
    for size, reg, epsilon in groups:
        settings = {"batch_size": size, "reg": reg, "epsilon": epsilon}
        group = find(rows, {k: v for k, v in settings.items() if v != ""})
        off, difference = "", ""
        if reg == "ot":
            off = mean([row["off_diagonal"] for row in group])
            pairs = [(row, *find(rows, {"batch_size": size, "reg": "pointwise",
                                        "seed": row["seed"]})) for row in group]
            difference = mean([row["hm"] - other["hm"] for row, other in pairs])
        plan = f"{reg}, epsilon {epsilon:g}" if reg == "ot" else reg
        accuracies = [mean([row[name] for row in group]) for name in ("base", "novel", "hm")]
        cells.append([str(size), plan, off, *accuracies, difference])
    return markdown(cells)


def mean(values: list[float]) -> str:
    """Mean and, of several values, standard deviation."""
    text = f"{round(statistics.mean(values), 1) + 0:.1f}"  # -0.0 + 0 is 0.0
    return f"{text} ± {statistics.stdev(values):.1f}" if len(values) > 1 else text


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
