"""Base-to-novel on the demo's digits over eight random orders of the classes.

    python demo/orders.py       # 32 rows, about 8 minutes on one core

Which digits are base and which are novel decides how much there is to gain and to forget, so one
split says little. Here the classes are shuffled, each order gives two other halves, and methods are
compared order by order.

Rows go to demo/results/orders.json as they are measured, and what is there is not measured again.
"""

import argparse
import random
import statistics
from dataclasses import replace
from pathlib import Path

from study import HERE, Dataset, demo, find, markdown, mean, measure, measure_all

REGS = ("zero-shot", "none", "pointwise", "ot")
PAIRS = (("hm", "zero-shot"), ("hm", "none"), ("hm", "pointwise"),
         ("base", "zero-shot"), ("novel", "zero-shot"))  # what ot is compared in, and with which


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--order", type=int, nargs="+", default=range(8), help="seeds of orders")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "orders.json")
    args = parser.parse_args()
    clip, data = demo()
    wanted = [{"order": order, "reg": reg} for order in args.order for reg in REGS]
    rows = measure_all(args.results, wanted, lambda settings: measure(
        clip, shuffled(data, settings["order"]), {"reg": settings["reg"]}))
    print("\n" + table(rows), differences(rows), sep="\n\n")


def shuffled(data: Dataset, seed: int) -> Dataset:
    """The same pictures, the classes in another order."""
    order = random.Random(seed).sample(range(len(data.classnames)), len(data.classnames))
    parts = {part: [(path, order.index(label)) for path, label in getattr(data, part)]
             for part in ("train", "val", "test")}
    return replace(data, classnames=[data.classnames[i] for i in order], **parts)


def table(rows: list[dict]) -> str:
    """Markdown: base / novel / HM of each order, and their means."""
    cells = [["order", *REGS]]
    for order in dict.fromkeys(row["order"] for row in rows):
        found = [find(rows, {"order": order, "reg": reg})[0] for reg in REGS]
        triples = [" / ".join(f"{row[k]:.1f}" for k in ("base", "novel", "hm")) for row in found]
        cells.append([str(order), *triples])
    means = [" / ".join(f"{statistics.mean(column(rows, reg, k)):.1f}"
                        for k in ("base", "novel", "hm")) for reg in REGS]
    return markdown([*cells, ["mean", *means]])


def differences(rows: list[dict]) -> str:
    """Markdown: what ot has more than another, mean and standard deviation over the orders."""
    cells = [["ot minus", "in", "difference", "above 0", "below 0"]]
    for name, other in PAIRS:
        gains = [a - b for a, b in zip(column(rows, "ot", name), column(rows, other, name))]
        above, below = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        cells.append([other, name, mean(gains), f"{above} of {len(gains)}", f"{below}"])
    return markdown(cells)


def column(rows: list[dict], reg: str, name: str) -> list[float]:
    return [row[name] for row in find(rows, {"reg": reg})]


if __name__ == "__main__":
    main()
