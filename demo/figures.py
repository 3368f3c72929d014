"""Draws the pictures of the README into demo/figures/.

    pip install matplotlib        # besides what promptot.py needs
    python demo/figures.py

Colours are Okabe and Ito's, which colour-blind readers can tell apart, with lighter shades of them;
what a colour says is also written. Drawings are measured in pixels from the upper left corner, in
the width of the README's column.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # promptot.py lies beside this folder
from promptot import Recipe, sinkhorn  # noqa: E402
from study import find  # noqa: E402

# Text as outlines looks the same everywhere; a fixed salt gives the same file on every run;
# pictures that are pasted into one would be moved to whole pixels.
matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "prompt-ot"})
matplotlib.rcParams["image.composite_image"] = False

BLACK, GREY, PALE, WHITE = "#222222", "#777777", "#DDDDDD", "#FFFFFF"
ORANGE, VERMILLION, BLUE, SKY = "#E69F00", "#D55E00", "#0072B2", "#56B4E9"
GREEN, PURPLE = "#009E73", "#CC79A7"
APRICOT = "#F4B183"  # to vermillion what sky is to blue: texts beside pictures


def save(figure: Figure, name: str) -> None:
    """Writes demo/figures/`name`. Pictures in it have 3 dots for 2 pixels of the drawing."""
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / "figures" / name, facecolor=WHITE, dpi=144, metadata={"Date": None})


# --------------------------------------------------------------------------------------------------
# The method on one drawing

GAP, CELL = 4, 22  # pixels between tokens; from cell to cell of a matrix
BATCH = ["three/0003", "eight/0000", "three/0000", "nine/0003"]  # of demo/digits


class Token(NamedTuple):
    """One of the vectors that a layer takes in."""

    width: int  # pixels
    colour: str = PALE
    text: str = ""
    picture: np.ndarray | None = None  # in place of text


CLASS, START, END = (Token(30, text=text) for text in ("CLS", "SOT", "EOT"))
PROMPTS = [Token(16, ORANGE, "p")] * 4
PHRASE, NAME, STOP = Token(72, text="a photo of a"), Token(38, text="three"), Token(12, text=".")


def method() -> Figure:
    """Two towers with and without prompts, joint features, cost and plan, the two losses."""
    width, height = 830, 664
    figure = Figure(figsize=(width / 96, height / 96))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    ax.axis("off")
    batch = [np.asarray(Image.open(HERE / f"digits/{name}.png")) for name in BATCH]
    draw_tuned_model(ax, batch[0])
    draw_frozen_model(ax, batch[0])
    draw_cross_entropy(ax, batch)
    draw_transport(ax, batch)
    box(ax, 22, 627, 16, 16, ORANGE, text="p")
    write(ax, 46, 635, "learned: 61,440 numbers in ViT-B/16", align="left")
    write(ax, 415, 635, r"$L\;=\;$CE$\;+\;\lambda\,L_{ot}$", size=20)
    box(ax, 571, 625, 52, 20, WHITE, GREY, "layer")
    write(ax, 631, 635, "frozen: one copy does for both", align="left")
    return figure


def draw_tuned_model(ax: Axes, picture: np.ndarray) -> None:
    box(ax, 8, 8, 436, 308, "#FFF6E3", ORANGE)
    write(ax, 226, 28, "Tuned: CLIP with learned prompts", size=15, weight="bold")
    show(ax, 22, 46, 36, picture)
    write(ax, 65, 57, "image tower", align="left", weight="bold")
    write(ax, 65, 74, "each of B pictures", align="left")
    draw_tower(ax, 22, [CLASS, *patches(picture), *PROMPTS], 0, Token(30, VERMILLION, "$f_i$"))
    write(ax, 228, 57, "text tower", align="left", weight="bold")
    write(ax, 228, 74, "each of C class names", align="left")
    draw_tower(ax, 228, [START, *PROMPTS, NAME, STOP, END], -1, Token(30, APRICOT, "$t_c$"))
    write(ax, 226, 212, "···      new prompts in each of 12 layers      ···")


def draw_frozen_model(ax: Axes, picture: np.ndarray) -> None:
    box(ax, 456, 8, 366, 308, "#EAF4FB", BLUE)
    write(ax, 639, 28, "Frozen: CLIP as it was", size=15, weight="bold")
    show(ax, 470, 46, 36, picture)
    write(ax, 511, 57, "image tower", align="left", weight="bold")
    write(ax, 511, 74, "the same", align="left")
    draw_tower(ax, 470, [CLASS, *patches(picture)], 0, Token(30, BLUE, "$f^0_j$"))
    write(ax, 610, 57, "text tower", align="left", weight="bold")
    write(ax, 610, 74, "the same, in a template", align="left")
    draw_tower(ax, 610, [START, PHRASE, NAME, STOP, END], -1, Token(30, SKY, "$t^0_c$"))
    write(ax, 525, 212, "···")
    write(ax, 709, 212, "···")


def patches(picture: np.ndarray) -> list[Token]:
    """The four quarters of a picture."""
    halves = np.vsplit(picture, 2)
    return [Token(16, picture=quarter) for half in halves for quarter in np.hsplit(half, 2)]


def draw_tower(ax: Axes, x: float, tokens: list[Token], read: int, feature: Token) -> None:
    """Three of twelve layers with the tokens that each takes in; the feature is read at one."""
    deeper = [t if t in PROMPTS else Token(t.width) for t in tokens]
    for layer, y in ((0, 94), (1, 152), (11, 228)):
        draw_tokens(ax, x, y, tokens if layer == 0 else deeper)
        box(ax, x, y + 21, length(tokens), 22, WHITE, GREY, f"layer {layer}")
    left = x if read == 0 else x + length(tokens) - tokens[read].width
    arrow(ax, (left + 15, 271), (left + 15, 284))
    draw_tokens(ax, left, 286, [feature], height=24)


def length(tokens: list[Token]) -> float:
    """Pixels that tokens take side by side."""
    return sum(token.width for token in tokens) + GAP * (len(tokens) - 1)


def draw_tokens(ax: Axes, x: float, y: float, tokens: list[Token], height: float = 16) -> None:
    for token in tokens:
        box(ax, x, y, token.width, height, token.colour, text=token.text)
        if token.picture is not None:
            show(ax, x + 2, y + 2, height - 4, token.picture)
        x += token.width + GAP


def draw_cross_entropy(ax: Axes, batch: list[np.ndarray]) -> None:
    """Lower left: each picture of the batch against all class names."""
    box(ax, 8, 350, 236, 254, WHITE, GREEN)
    arrow(ax, (40, 318), (40, 348))
    write(ax, 48, 333, "all $f_i$, all $t_c$", align="left")
    write(ax, 20, 370, "Cross-entropy", align="left", size=14, weight="bold")
    scores = [[1, 2, 9, 3, 2], [2, 1, 3, 8, 4], [1, 2, 8, 2, 2], [2, 1, 3, 3, 7]]
    draw_matrix(ax, 100, 464, np.array(scores) / 10, GREEN)
    for i, picture in enumerate(batch):
        box(ax, 42, 464 + CELL * i, 30, 20, VERMILLION, text="$f_i$")
        show(ax, 76, 464 + CELL * i, 20, picture)
    for j, name in enumerate(["zero", "two", "three", "eight", "nine"]):
        box(ax, 100 + CELL * j, 395, 20, 24, APRICOT, text="$t_c$")
        write(ax, 110 + CELL * j, 441, name, size=11, rotation=90, rotation_mode="anchor")
    write(ax, 126, 580, r"CE$(e^s f_i \cdot t_c,\; y_i)$", size=14)


def draw_transport(ax: Axes, batch: list[np.ndarray]) -> None:
    """Lower right: joint features, their costs (made up) and the plan (theirs)."""
    box(ax, 260, 350, 562, 254, WHITE, PURPLE)
    arrow(ax, (280, 318), (280, 348))
    write(ax, 288, 333, r"$z_i = [f_i\,;\, t_{y_i}]$", align="left")
    arrow(ax, (480, 318), (480, 348))
    write(ax, 488, 333, r"$z^0_j = [f^0_j\,;\, t^0_{y_j}]$", align="left")
    write(ax, 272, 370, "Optimal transport", align="left", size=14, weight="bold")
    rows = [[12, 90, 30, 80], [95, 10, 85, 70], [28, 80, 15, 90], [85, 75, 90, 10]]
    cost = torch.tensor(rows) / 100
    plan = sinkhorn(cost, epsilon=0.1)
    draw_matrix(ax, 376, 464, cost.numpy(), GREY)
    draw_matrix(ax, 590, 464, len(plan) * plan.numpy(), PURPLE)
    for k, picture in enumerate(batch):
        x, y = 376 + CELL * k, 464 + CELL * k
        box(ax, 284, y, 30, 20, VERMILLION, text="$f_i$")
        box(ax, 316, y, 30, 20, APRICOT, text="$t_{y_i}$")
        box(ax, x, 388, 20, 24, BLUE, text="$f^0_j$")
        box(ax, x, 414, 20, 24, SKY, text="$t^0_{y_j}$")
        for corner in ((350, y), (x, 440), (564, y), (x + 214, 440)):
            show(ax, *corner, 20, picture)
    write(ax, 419, 580, r"$C_{ij} = \frac{1}{2}\Vert z_i - z^0_j \Vert^2$", size=14)
    arrow(ax, (472, 507), (556, 507))
    write(ax, 511, 495, "Sinkhorn", size=12)
    write(ax, 511, 519, r"($\epsilon$ = 0.1 here)", size=11)
    write(ax, 633, 425, r"plan $\pi$", size=14)
    write(ax, 633, 565, "rows and columns", size=11)
    write(ax, 633, 581, "sum to 1/B", size=11)
    write(ax, 752, 494, r"$L_{ot} = \langle \pi, C \rangle$", size=18)
    write(ax, 752, 522, "no gradient through $\\pi$", size=11)


def draw_matrix(ax: Axes, x: float, y: float, values: np.ndarray, colour: str) -> None:
    """Cells of values 0..1, from white to the colour."""
    shades = LinearSegmentedColormap.from_list("", [WHITE, colour])
    for (i, j), value in np.ndenumerate(values):
        corner, fill = (x + CELL * j, y + CELL * i), shades(float(value))
        ax.add_patch(Rectangle(corner, 20, 20, fc=fill, ec=PALE, clip_on=False))


# --------------------------------------------------------------------------------------------------
# Measured: the rows that study.py and orders.py left in demo/results/

METHODS = {  # colour, marker, words
    "zero-shot": (BLACK, "D", "zero-shot"),
    "none": (VERMILLION, "s", "tuned, no regulariser"),
    "pointwise": (SKY, "^", "tuned, point-wise"),
    "ot": (BLUE, "o", "tuned, OT"),
}
BATCHES = {4: (BLUE, "o", "-"), 16: (VERMILLION, "s", "--"), 64: (GREEN, "^", ":")}


def demo() -> Figure:
    """Accuracy over three seeds; HM against that of zero-shot in eight orders of the classes."""
    figure = Figure(figsize=(830 / 96, 370 / 96))
    left, right = figure.subplots(1, 2, width_ratios=(8, 5))
    figure.subplots_adjust(left=0.045, right=0.985, top=0.81, bottom=0.13, wspace=0.13)
    draw_seeds(left)
    draw_orders(right)
    handles = [Line2D([], [], color=colour, marker=marker, ms=7, ls="none", label=words)
               for colour, marker, words in METHODS.values()]
    figure.legend(handles=handles, loc="upper center", ncols=4, frameon=False, fontsize=10)
    return figure


def draw_seeds(ax: Axes) -> None:
    rows = default_rows("study.json")
    for i, (method, (colour, marker, _)) in enumerate(METHODS.items()):
        for x, name in enumerate(("base", "novel", "hm")):
            middle, spread = mean_and_deviation([r[name] for r in find(rows, {"reg": method})])
            at = x + 0.23 * (i - 1.5)
            ax.errorbar(at, middle, spread, color=colour, marker=marker, ms=7, capsize=4)
            ax.annotate(f"{middle:.1f}", (at, middle + spread), (0, 7), ha="center", size=9,
                        textcoords="offset points")
    panel(ax, "Accuracy in % (axis from 80): mean and sd of 3 seeds")
    ax.set(ylim=(80, 98), xlim=(-0.5, 2.5), xticks=range(3))
    ax.set_xticklabels(["base classes", "novel classes", "harmonic mean (HM)"])


def draw_orders(ax: Axes) -> None:
    """A point for each order; those of one order are joined."""
    rows = default_rows("orders.json")
    hm = {method: np.array([row["hm"] for row in find(rows, {"reg": method})])
          for method in METHODS}
    tuned = ["none", "pointwise", "ot"]
    gains = np.stack([hm[method] - hm["zero-shot"] for method in tuned])  # (methods, orders)
    ax.axhline(0, color=BLACK, lw=1, ls="-.")
    ax.plot(gains, color=PALE, lw=1, zorder=1)
    for x, method in enumerate(tuned):
        colour, marker, _ = METHODS[method]
        ax.plot([x] * gains.shape[1], gains[x], color=colour, marker=marker, ms=7, mec=WHITE,
                ls="none")
        ax.plot([x - 0.25, x + 0.25], [gains[x].mean()] * 2, color=colour, lw=3, zorder=1)
    panel(ax, "HM minus zero-shot's: 8 class orders")
    ax.set(xlim=(-0.5, 2.5), ylim=(-7, 5), xticks=range(3))
    means = [f"{gain:+.1f}".replace("-", "−") for gain in gains.mean(axis=1)]
    ax.set_xticklabels([f"{x}\nmean {y}" for x, y in zip(("none", "point-wise", "OT"), means)])


def study() -> Figure:
    """Off-diagonal mass of the plan, base and novel over epsilon, a line for each batch size."""
    figure = Figure(figsize=(830 / 96, 340 / 96))
    panels = zip(figure.subplots(1, 3), ("off_diagonal", "base", "novel"))
    figure.subplots_adjust(left=0.045, right=0.99, top=0.79, bottom=0.14, wspace=0.15)
    rows = read("study.json")
    for ax, name in panels:
        draw_over_epsilon(ax, rows, name)
        if name == "off_diagonal":
            panel(ax, "Mass off the plan's diagonal in %")
        else:
            panel(ax, f"{name.capitalize()} accuracy in %, 3 seeds ± sd")
            ax.set(ylim=(50, 100))
            ax.axhline(find(rows, {"reg": "zero-shot"})[0][name], color=BLACK, lw=1, ls="-.")
    handles = [Line2D([], [], color=colour, marker=marker, ls=line, label=f"batch {size}")
               for size, (colour, marker, line) in BATCHES.items()]
    handles += [Line2D([], [], color=BLACK, lw=1, ls="-.", label="zero-shot")]
    figure.legend(handles=handles, loc="upper center", ncols=4, frameon=False, fontsize=10)
    return figure


def draw_over_epsilon(ax: Axes, rows: list[dict], name: str) -> None:
    """At the left of the lines point-wise matching, which epsilon 0 tends to; at the right none."""
    epsilons = sorted({row["epsilon"] for row in rows if row["reg"] == "ot"})
    plans = [{"reg": "pointwise"}, *({"epsilon": epsilon} for epsilon in epsilons)]
    plans += [{"reg": "none"}] if name != "off_diagonal" else []
    for i, (size, (colour, marker, line)) in enumerate(BATCHES.items()):
        groups = [find(rows, {"batch_size": size, **plan}) for plan in plans]
        at = np.arange(len(plans)) + 0.16 * (i - 1)
        middle, spread = np.transpose(
            [mean_and_deviation([row[name] for row in seeds]) for seeds in groups])
        ax.errorbar(at, middle, spread, color=colour, marker=marker, ms=5, ls="none")
        ax.plot(at[1:][: len(epsilons)], middle[1:][: len(epsilons)], color=colour, ls=line)
    ax.set(xlim=(-0.7, len(epsilons) + 1.5), xticks=range(len(plans)))
    labels = [f"{epsilon:g}\n" for epsilon in epsilons]
    labels[len(labels) // 2] += "epsilon"
    ax.set_xticklabels(["\npoint-wise", *labels, "\nnone"][: len(plans)])


def panel(ax: Axes, title: str) -> None:
    ax.set_title(title, size=10, loc="left", pad=8)
    ax.tick_params(labelsize=9)
    ax.grid(axis="y", color=PALE, lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def read(name: str) -> list[dict]:
    return json.loads((HERE / "results" / name).read_text(encoding="utf-8"))


def default_rows(name: str) -> list[dict]:
    """Those whose batch size and epsilon are the recipe's."""
    size, epsilon = Recipe().batch_size, Recipe().epsilon
    return [row for row in read(name)
            if row.get("batch_size", size) == size and row.get("epsilon", epsilon) == epsilon]


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0


# --------------------------------------------------------------------------------------------------
# Shapes


def box(ax: Axes, x, y, width, height, fill, edge="none", text="") -> None:
    style = f"round,pad=0,rounding_size={min(4, height / 5)}"
    ax.add_patch(FancyBboxPatch((x, y), width, height, style, fc=fill, ec=edge, clip_on=False))
    colour = WHITE if fill in (VERMILLION, BLUE) else BLACK
    write(ax, x + width / 2, y + height / 2, text, size=11, color=colour)


def write(ax: Axes, x, y, text, size=12, align="center", **style) -> None:
    """Words stand on a common line; formulas, whose height differs, are centred by it."""
    anchor = "center" if text.startswith("$") else "center_baseline"
    ax.text(x, y, text, ha=align, va=anchor, size=0.75 * size, **style)  # pixels -> points


def arrow(ax: Axes, start, end) -> None:
    style = dict(arrowstyle="-|>", color=BLACK, lw=1.2, shrinkA=0, shrinkB=0)
    ax.annotate("", end, start, arrowprops=style)


def show(ax: Axes, x, y, side, picture: np.ndarray) -> None:
    extent = (x, x + side, y + side, y)
    ax.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto", zorder=2)


if __name__ == "__main__":
    save(method(), "method.svg")
    save(demo(), "demo.svg")
    save(study(), "study.svg")
