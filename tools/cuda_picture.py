"""Draws docs/cuda.svg: how the stages of the loss map to blocks, warps and lanes. ``python tools/cuda_picture.py``"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "vrm"  # the same picture, the same bytes
matplotlib.rcParams["svg.fonttype"] = "none"  # text as text, in whatever font there is: room is left for a wider one
matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans", "Verdana", "Arial"]

INK, BLUE, ORANGE, GREEN, GREY = "#222222", "#3b6fb6", "#d9822b", "#4c9a5b", "#dddddd"
LITERAL = [
    ("prepare", "a warp a row of logits:\ncopies by row and column,\nsoftmax, cross-entropy", BLUE),
    ("entropy", "a block 32 x 32 edges", GREEN),
    (
        "select",
        "a block of 1024 a graph:\nthe threshold (large graphs:\nafter brackets); another:\nthe batch's totals",
        GREEN,
    ),
    ("literal", "a block a vertex:\nits kept edges, their loss,\nits gradient", ORANGE),
    ("finish", "a block 32 x 32 logits:\nboth graphs and the\ncross-entropies", BLUE),
]


def box(ax, x, y, w, h, colour, text="", size=8, alpha=0.25, **kwargs):
    ax.add_patch(Rectangle((x, y), w, h, facecolor=colour, alpha=alpha, edgecolor="none"))
    ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=1.2))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", size=size, color=INK, **kwargs)


def arrow(ax, start, end, **kwargs):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK, linewidth=0.9, **kwargs))


def draw_literal(ax):
    ax.set_title("literal, small graphs: a launch a stage, both graphs in each", size=10, loc="left")
    for k, (name, what, colour) in enumerate(LITERAL):
        x = 20 * k
        box(ax, x, 6, 17, 5, colour, name, size=9, weight="bold")
        ax.text(x + 8.5, 5.2, what, ha="center", va="top", size=7.5, color=INK, linespacing=1.3)
        if k:
            arrow(ax, (x - 3, 8.5), (x, 8.5))
    ax.set_xlim(-1, 100)
    ax.set_ylim(-0.5, 12)


def draw_vertex(ax):
    ax.set_title("literal: the block of one vertex, 256 other ends at a time", size=10, loc="left")
    ax.text(0, 31, "1. A thread an edge: is it kept? The kept ones close up to a list.", size=8)
    for k in range(32):
        kept = k in (2, 3, 9, 14, 21, 22, 30)
        box(ax, 1.6 * k, 27, 1.6, 2.4, ORANGE if kept else GREY, alpha=0.5)
    for k in range(7):
        box(ax, 1.6 * k, 22, 1.6, 2.4, ORANGE, alpha=0.5)
    arrow(ax, (5.6, 26.8), (5.6, 24.6))
    ax.text(0, 17.5, "2. A warp an edge, lanes along the dimensions: both norms, loss, slope.", size=8)
    for w in range(4):
        box(ax, 13 * w, 13, 12, 2.8, BLUE, f"warp {w}: edge {w}", size=7.5)
    ax.text(0, 8.5, "3. Threads along the dimensions: the edges' steps add up in registers.", size=8)
    for group in range(2):
        box(ax, 26 * group, 4, 25, 2.8, GREEN, f"128 dims: edges {group}, {group + 2}, ...", size=7.5)
    ax.text(0, 1.6, "Both ends of an edge visit it: nothing is added by two writers.", size=8)
    ax.set_xlim(-1, 54)
    ax.set_ylim(0, 34)


def draw_dense(ax):
    ax.set_title("dense, large graphs: for each tile of 2048 x 2048 edges", size=10, loc="left")
    parts = [
        ("torch's product", "entropies H of the tile, again if they are not stored", GREY),
        ("torch's products", "dots of the students, the teachers, the residuals", GREY),
        ("dense", "a warp 32 x 32 edges, a column a lane: loss, beta, gamma;\n"
         "a bit for each kept edge that is not certified", ORANGE),
        ("torch's products", "gamma x and beta w for both sides, 4; columns of ones\n"
         "in x and w give the sums of gamma and beta", GREY),
        ("add", "to the gradients of the tiles before", ORANGE),
        ("literal_tile", "the same for the edges whose bit is set", ORANGE),
    ]  # fmt: skip
    for k, (name, what, colour) in enumerate(parts):
        y = 29.6 - 5.2 * k
        box(ax, 0, y, 15, 4, colour, name, size=8, alpha=0.5 if colour == GREY else 0.25, weight="bold")
        ax.text(16, y + 2, what, ha="left", va="center", size=8, color=INK)
        if k:
            arrow(ax, (7.5, y + 5.2), (7.5, y + 4))
    ax.text(0, 2.6, "Before, a graph: split, H by tiles, bracket and count, exact; sums, means, pack.\n"
            "After, both graphs: finish.", va="top", size=8)  # fmt: skip
    ax.set_xlim(-1, 58)
    ax.set_ylim(-2, 36)


def main() -> None:
    figure = plt.figure(figsize=(12, 6.6))
    grid = figure.add_gridspec(2, 2, height_ratios=[1, 2], hspace=0.2, wspace=0.06)
    for area, draw in ((grid[0, :], draw_literal), (grid[1, 0], draw_vertex), (grid[1, 1], draw_dense)):
        ax = figure.add_subplot(area)
        ax.axis("off")
        draw(ax)
    figure.savefig(
        Path(__file__).parents[1] / "docs" / "cuda.svg",
        bbox_inches="tight",
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )


if __name__ == "__main__":
    main()
