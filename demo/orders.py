"""Base-to-novel accuracy on the demo's digits for eight random orders of the classes.

    python demo/orders.py       # 40 rows, about 10 minutes on one core

What there is to gain and to forget depends on which digits are base and which are novel. Here each
order of the classes gives another split, and methods are compared order by order.

Rows are saved and used again as in demo/study.py.
"""

import argparse
import random
import statistics
from dataclasses import replace
from pathlib import Path

from study import DEMO, EPSILON, Dataset, demo, find, markdown, mean, measure, measure_all

METHODS = {
    "zero-shot": {"reg": "zero-shot"},
    "none": {"reg": "none"},
    "pointwise": {"reg": "pointwise"},
    "ot": {"reg": "ot", "epsilon": EPSILON},
    "ot, epsilon 0.1": {"reg": "ot", "epsilon": 0.1},  # the best in demo/study.py
}
COMPARED = [
    ("ot", "zero-shot", "hm"),
    ("ot", "none", "hm"),
    ("ot", "pointwise", "hm"),
    ("ot", "zero-shot", "base"),
    ("ot", "zero-shot", "novel"),
    ("ot, epsilon 0.1", "pointwise", "hm"),
]
FILE = DEMO / "results" / "orders.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--order", type=int, nargs="+", default=range(8), help="seeds of orders (default: 0 to 7)")
    add("--results", type=Path, default=FILE, metavar="FILE", help="file of the measured rows")
    args = parser.parse_args()
    clip, digits = demo()

    def measure_order(settings: dict) -> dict[str, float]:
        method = {name: value for name, value in settings.items() if name != "order"}
        return measure(clip, shuffled(digits, settings["order"]), method)

    wanted = [{"order": order, **method} for method in METHODS.values() for order in args.order]
    rows = measure_all(args.results, wanted, measure_order)
    print("\n" + table(rows), differences(rows), sep="\n\n")


def shuffled(data: Dataset, seed: int) -> Dataset:
    """The same images, with the classes in another order."""
    order = random.Random(seed).sample(range(len(data.classnames)), len(data.classnames))
    names = [data.classnames[label] for label in order]
    parts = {
        part: [(path, order.index(label)) for path, label in getattr(data, part)]
        for part in ("train", "val", "test")
    }
    return replace(data, classnames=names, **parts)


def table(rows: list[dict]) -> str:
    """Base/novel/HM of each order, and their means."""
    columns = [find(rows, method) for method in METHODS.values()]  # of rows, order by order
    lines = [[str(row[0]["order"]), *(triple([cell]) for cell in row)] for row in zip(*columns)]
    means = ["mean", *(triple(column) for column in columns)]
    return markdown([["order", *METHODS], *lines, means])


def triple(rows: list[dict]) -> str:
    """Mean base/novel/HM of some rows."""
    means = [statistics.mean(row[name] for row in rows) for name in ("base", "novel", "hm")]
    return "/".join(f"{x:.1f}" for x in means)


def differences(rows: list[dict]) -> str:
    """By how much one method exceeds another: mean and standard deviation over the orders."""
    cells = [["", "minus", "in", "difference", "above 0", "below 0"]]
    for one, other, name in COMPARED:
        pairs = zip(find(rows, METHODS[one]), find(rows, METHODS[other]))
        gains = [a[name] - b[name] for a, b in pairs]
        above, below = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        cells.append([one, other, name, mean(gains), f"{above} of {len(gains)}", str(below)])
    return markdown(cells)


if __name__ == "__main__":
    main()
