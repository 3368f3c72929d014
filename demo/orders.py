"""Base-to-novel on the demo's digits over eight random orders of the classes.

    python demo/orders.py       # 40 rows, about 10 minutes on one core

Which digits are base and which are novel decides how much there is to gain and to forget, so one
split says little. Here the classes are shuffled, each order gives two other halves, and methods are
compared order by order.

Rows go to demo/results/orders.json as they are measured, and what is there is not measured again.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from study import EPSILON, HERE, Dataset, demo, find, markdown, mean, measure, measure_all

METHODS = {
    "zero-shot": {"reg": "zero-shot"},
    "none": {"reg": "none"},
    "pointwise": {"reg": "pointwise"},
    "ot": {"reg": "ot", "epsilon": EPSILON},
    "ot, epsilon 0.1": {"reg": "ot", "epsilon": 0.1},  # did best in demo/study.py
}
PAIRS = (("ot", "zero-shot", "hm"), ("ot", "none", "hm"), ("ot", "pointwise", "hm"),
         ("ot", "zero-shot", "base"), ("ot", "zero-shot", "novel"),
         ("ot, epsilon 0.1", "pointwise", "hm"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--order", type=int, nargs="+", default=range(8), help="seeds of orders")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "orders.json")
    args = parser.parse_args()
    clip, data = demo()
    wanted = [{"order": order, **method} for method in METHODS.values() for order in args.order]

    def measure_order(settings: dict) -> dict[str, float]:
        method = {name: value for name, value in settings.items() if name != "order"}
        return measure(clip, shuffled(data, settings["order"]), method)

    rows = measure_all(args.results, wanted, measure_order)
    print("\n" + table(rows), differences(rows), sep="\n\n")


def shuffled(data: Dataset, seed: int) -> Dataset:
    """The same pictures, the classes in another order."""
    order = random.Random(seed).sample(range(len(data.classnames)), len(data.classnames))
    parts = {part: [(path, order.index(label)) for path, label in getattr(data, part)]
             for part in ("train", "val", "test")}
    return replace(data, classnames=[data.classnames[i] for i in order], **parts)


def table(rows: list[dict]) -> str:
    """Markdown: base / novel / HM of each order, and their means."""
    columns = [[column(rows, method, name) for name in ("base", "novel", "hm")]
               for method in METHODS]
    cells = [["order", *METHODS]]
    for i, row in enumerate(find(rows, METHODS["zero-shot"])):
        cells.append([str(row["order"]), *(triple([x[i] for x in xs]) for xs in columns)])
    return markdown([*cells, ["mean", *(triple(map(statistics.mean, xs)) for xs in columns)]])


def triple(values: Iterable[float]) -> str:
    return " / ".join(f"{x:.1f}" for x in values)


def differences(rows: list[dict]) -> str:
    """Markdown: what one has more than another, mean and standard deviation over the orders."""
    cells = [["", "minus", "in", "difference", "above 0", "below 0"]]
    for one, other, name in PAIRS:
        gains = [a - b for a, b in zip(column(rows, one, name), column(rows, other, name))]
        above, below = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        cells.append([one, other, name, mean(gains), f"{above} of {len(gains)}", f"{below}"])
    return markdown(cells)


def column(rows: list[dict], method: str, name: str) -> list[float]:
    """Base, novel or HM of a method, order by order."""
    return [row[name] for row in find(rows, METHODS[method])]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
