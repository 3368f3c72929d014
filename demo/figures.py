"""Draws the figures of the README into demo/figures/.

    pip install matplotlib        # in addition to what promptot.py needs
    python demo/figures.py

The colours are those of Okabe and Ito, which colour-blind readers can tell apart, and two lighter
shades. Nothing is said by colour alone. Coordinates are pixels from the upper left corner, at the
width of the README's column.
"""

import json
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
from study import find  # study.py adds promptot's folder to the path

from promptot import Recipe, sinkhorn

HERE = Path(__file__).parent
# Outlines of letters look the same everywhere. A fixed salt gives the same file on every run.
# Composite images would be moved to whole pixels.
matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "prompt-ot"})
matplotlib.rcParams["image.composite_image"] = False

BLACK, GREY, PALE, WHITE = "#222222", "#777777", "#DDDDDD", "#FFFFFF"
ORANGE, VERMILLION, BLUE, SKY = "#E69F00", "#D55E00", "#0072B2", "#56B4E9"
GREEN, PURPLE = "#009E73", "#CC79A7"
APRICOT = "#F4B183"  # vermillion and blue: image features; apricot and sky: text features


def save(figure: Figure, name: str) -> None:
    """Writes demo/figures/`name`."""
    figure.savefig(HERE / "figures" / name, facecolor=WHITE, dpi=144, metadata={"Date": None})


# ---- The method in one drawing -------------------------------------------------------------------
GAP, CELL = 4, 22  # pixels between tokens; from one cell of a matrix to the next
BATCH = ["three/0003", "eight/0000", "three/0000", "nine/0003"]  # of demo/digits


class Token(NamedTuple):
    """An input vector of a layer."""

    width: int  # pixels
    colour: str = PALE
    text: str = ""
    picture: np.ndarray | None = None  # instead of text


CLASS, START, END = (Token(30, text=text) for text in ("CLS", "SOT", "EOT"))
PROMPTS = [Token(16, ORANGE, "p")] * 4
PHRASE, NAME, STOP = Token(72, text="a photo of a"), Token(38, text="three"), Token(12, text=".")


def method() -> Figure:
    """The towers with and without prompts, joint features, cost, plan and the two losses."""
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
    write(ax, 46, 635, "trained: 61,440 parameters (ViT-B/16)", align="left")
    write(ax, 415, 635, r"$L\;=\;$CE$\;+\;\lambda\,L_{ot}$", size=20)
    box(ax, 571, 625, 52, 20, WHITE, GREY, "layer")
    write(ax, 631, 635, "frozen, one copy for both", align="left")
    return figure


def draw_tuned_model(ax: Axes, picture: np.ndarray) -> None:
    box(ax, 8, 8, 436, 308, "#FFF6E3", ORANGE)
    write(ax, 226, 28, "Tuned: CLIP with learned prompts", size=15, weight="bold")
    show(ax, 22, 46, 36, picture)
    heading(ax, 65, "image tower", "each of B images")
    draw_tower(ax, 22, [CLASS, *patches(picture), *PROMPTS], 0, Token(30, VERMILLION, "$f_i$"))
    heading(ax, 228, "text tower", "each of C class names")
    draw_tower(ax, 228, [START, *PROMPTS, NAME, STOP, END], -1, Token(30, APRICOT, "$t_c$"))
    write(ax, 226, 212, "···      new prompts in each of 12 layers      ···")


def draw_frozen_model(ax: Axes, picture: np.ndarray) -> None:
    box(ax, 456, 8, 366, 308, "#EAF4FB", BLUE)
    write(ax, 639, 28, "Frozen: CLIP without prompts", size=15, weight="bold")
    show(ax, 470, 46, 36, picture)
    heading(ax, 511, "image tower", "the same")
    draw_tower(ax, 470, [CLASS, *patches(picture)], 0, Token(30, BLUE, "$f^0_j$"))
    heading(ax, 610, "text tower", "the same, with a template")
    draw_tower(ax, 610, [START, PHRASE, NAME, STOP, END], -1, Token(30, SKY, "$t^0_c$"))
    write(ax, 525, 212, "···")
    write(ax, 709, 212, "···")


def heading(ax: Axes, x: float, title: str, note: str) -> None:
    write(ax, x, 57, title, align="left", weight="bold")
    write(ax, x, 74, note, align="left")


def patches(picture: np.ndarray) -> list[Token]:
    """The four quarters of a picture."""
    halves = np.vsplit(picture, 2)
    return [Token(16, picture=quarter) for half in halves for quarter in np.hsplit(half, 2)]


def draw_tower(ax: Axes, x: float, tokens: list[Token], read: int, feature: Token) -> None:
    """Three of twelve layers with their input tokens. `read`: the token that gives the feature."""
    deeper = [t if t in PROMPTS else Token(t.width) for t in tokens]
    for layer, y in ((0, 94), (1, 152), (11, 228)):
        draw_tokens(ax, x, y, tokens if layer == 0 else deeper)
        box(ax, x, y + 21, length(tokens), 22, WHITE, GREY, f"layer {layer}")
    left = x if read == 0 else x + length(tokens) - tokens[read].width
    arrow(ax, (left + 15, 271), (left + 15, 284))
    draw_tokens(ax, left, 286, [feature], height=24)


def length(tokens: list[Token]) -> float:
    """Width of tokens side by side, in pixels."""
    return sum(token.width for token in tokens) + GAP * (len(tokens) - 1)


def draw_tokens(ax: Axes, x: float, y: float, tokens: list[Token], height: float = 16) -> None:
    for token in tokens:
        box(ax, x, y, token.width, height, token.colour, text=token.text)
        if token.picture is not None:
            show(ax, x + 2, y + 2, height - 4, token.picture)
        x += token.width + GAP


def draw_cross_entropy(ax: Axes, batch: list[np.ndarray]) -> None:
    """Lower left: each image of the batch against all class names."""
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
    """Lower right: joint features, their costs (made up) and the plan for these costs."""
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
    """Cells for values from 0 (white) to 1 (the colour)."""
    shades = LinearSegmentedColormap.from_list("", [WHITE, colour])
    for (i, j), value in np.ndenumerate(values):
        corner = (x + CELL * j, y + CELL * i)
        ax.add_patch(Rectangle(corner, 20, 20, fc=shades(float(value)), ec=PALE, clip_on=False))


# ---- Results of study.py and orders.py -----------------------------------------------------------
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
    handles = [
        Line2D([], [], color=colour, marker=marker, ms=7, ls="none", label=words)
        for colour, marker, words in METHODS.values()
    ]
    figure.legend(handles=handles, loc="upper center", ncols=4, frameon=False, fontsize=10)
    return figure


def draw_seeds(ax: Axes) -> None:
    style = {"ha": "center", "size": 9, "textcoords": "offset points"}
    for i, (method, (colour, marker, _)) in enumerate(METHODS.items()):
        rows = default_rows("study.json", method)
        for x, name in enumerate(("base", "novel", "hm")):
            middle, spread = mean_and_deviation(rows, name)
            at = x + 0.23 * (i - 1.5)
            ax.errorbar(at, middle, spread, color=colour, marker=marker, ms=7, capsize=4)
            ax.annotate(f"{middle:.1f}", (at, middle + spread), (0, 7), **style)
    panel(ax, "Accuracy in % (axis from 80): mean and sd of 3 seeds")
    ax.set(ylim=(80, 98), xlim=(-0.5, 2.5), xticks=range(3))
    ax.set_xticklabels(["base classes", "novel classes", "harmonic mean (HM)"])


def draw_orders(ax: Axes) -> None:
    """A point for each order. Lines join the points of the same order."""
    hm = np.array([[row["hm"] for row in default_rows("orders.json", m)] for m in METHODS])
    gains = hm[1:] - hm[0]  # over zero-shot, (methods, orders)
    ax.axhline(0, color=BLACK, lw=1, ls="-.")
    ax.plot(gains, color=PALE, lw=1, zorder=1)
    for x, (colour, marker, _) in enumerate(list(METHODS.values())[1:]):
        style = {"color": colour, "marker": marker, "ms": 7, "mec": WHITE, "ls": "none"}
        ax.plot([x] * gains.shape[1], gains[x], **style)
        ax.plot([x - 0.25, x + 0.25], [gains[x].mean()] * 2, color=colour, lw=3, zorder=1)
    panel(ax, "HM minus zero-shot HM: 8 class orders")
    ax.set(xlim=(-0.5, 2.5), ylim=(-7, 5), xticks=range(3))
    means = [f"{gain:+.1f}".replace("-", "−") for gain in gains.mean(axis=1)]
    ax.set_xticklabels([f"{x}\nmean {y}" for x, y in zip(("none", "point-wise", "OT"), means)])


def study() -> Figure:
    """Off-diagonal mass, base and novel accuracy over epsilon, a line for each batch size."""
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
    handles = [
        Line2D([], [], color=colour, marker=marker, ls=line, label=f"batch {size}")
        for size, (colour, marker, line) in BATCHES.items()
    ]
    handles += [Line2D([], [], color=BLACK, lw=1, ls="-.", label="zero-shot")]
    figure.legend(handles=handles, loc="upper center", ncols=4, frameon=False, fontsize=10)
    return figure


def draw_over_epsilon(ax: Axes, rows: list[dict], name: str) -> None:
    """Left of each line: point-wise matching, the limit of epsilon 0. Right of it: none."""
    epsilons = sorted({row["epsilon"] for row in rows if row["reg"] == "ot"})
    plans = [{"reg": "pointwise"}, *({"epsilon": epsilon} for epsilon in epsilons)]
    plans += [{"reg": "none"}] if name != "off_diagonal" else []
    for i, (size, (colour, marker, line)) in enumerate(BATCHES.items()):
        groups = [find(rows, {"batch_size": size, **plan}) for plan in plans]
        at = np.arange(len(plans)) + 0.16 * (i - 1)
        middle, spread = np.transpose([mean_and_deviation(group, name) for group in groups])
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


def default_rows(name: str, method: str) -> list[dict]:
    """The rows of a method with the default batch size and epsilon."""
    size, epsilon = Recipe().batch_size, Recipe().epsilon
    rows = find(read(name), {"reg": method})
    rows = [row for row in rows if row.get("batch_size", size) == size]
    return [row for row in rows if row.get("epsilon", epsilon) == epsilon]


def mean_and_deviation(rows: list[dict], name: str) -> tuple[float, float]:
    values = [row[name] for row in rows]
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0


# ---- Shapes --------------------------------------------------------------------------------------
def box(ax: Axes, x, y, width, height, fill, edge="none", text="") -> None:
    style = f"round,pad=0,rounding_size={min(4, height / 5)}"
    ax.add_patch(FancyBboxPatch((x, y), width, height, style, fc=fill, ec=edge, clip_on=False))
    colour = WHITE if fill in (VERMILLION, BLUE) else BLACK
    write(ax, x + width / 2, y + height / 2, text, size=11, color=colour)


def write(ax: Axes, x, y, text, size=12, align="center", **style) -> None:
    """Words are aligned at their baseline. Formulas differ in height and are centred."""
    anchor = "center" if text.startswith("$") else "center_baseline"
    ax.text(x, y, text, ha=align, va=anchor, size=0.75 * size, **style)  # pixels -> points


def arrow(ax: Axes, start, end) -> None:
    style = {"arrowstyle": "-|>", "color": BLACK, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style)


def show(ax: Axes, x, y, side, picture: np.ndarray) -> None:
    extent = (x, x + side, y + side, y)
    ax.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent, aspect="auto", zorder=2)


if __name__ == "__main__":
    save(method(), "method.svg")
    save(demo(), "demo.svg")
    save(study(), "study.svg")
