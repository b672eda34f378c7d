"""Draws docs/cuda.svg: how the steps of the loss map to blocks, warps and lanes. ``python tools/cuda_picture.py``"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "vrm"  # the same picture, the same bytes
matplotlib.rcParams["svg.fonttype"] = "none"  # text as text, in whatever font there is: room is left for a wider one
matplotlib.rcParams["font.sans-serif"] = ["DejaVu Sans", "Verdana", "Arial"]

INK, BLUE, ORANGE, GREEN, GREY = "#222222", "#3b6fb6", "#d9822b", "#4c9a5b", "#dddddd"
STEPS = [
    ("prepare", "softmax:\na warp a row;\ncolumn sums:\na block 32 dims\nof a chunk", BLUE),
    ("means,\nentropy", "a thread a dim;\na block\n32 x 32 edges", BLUE),
    ("pack", "a block\n32 vertices:\ncentred s, t, s - t;\nnorms", BLUE),
    ("histogram", "a block\n16384 edges;\ncounts in shared\nmemory", GREEN),
    ("advance", "one block a graph:\nthe next digit of\nthe threshold", GREEN),
    ("weigh", "a block\n32 x 32 edges:\n3 dots, certificate,\nbeta, gamma, loss", ORANGE),
    ("gradient", "a block 32 vertices\nby 32 dims:\n2 products,\nliteral edges", ORANGE),
    ("finish", "a block 32 x 32\nof the result,\nin the caller's\nlayout", BLUE),
]


def box(ax, x, y, w, h, colour, text="", size=8, alpha=0.25, **kwargs):
    ax.add_patch(Rectangle((x, y), w, h, facecolor=colour, alpha=alpha, edgecolor="none"))
    ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=colour, linewidth=1.2))
    ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", size=size, color=INK, **kwargs)


def arrow(ax, start, end, **kwargs):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=INK, linewidth=0.9, **kwargs))


def draw_tile(ax):
    ax.set_title("One tile of 32 x 32 edges: a block of 8 warps", size=10, loc="left")
    for w in range(8):
        box(ax, 0, 28 - 4 * w, 32, 4, ORANGE if w == 2 else GREY, alpha=0.35)
        ax.text(33, 30 - 4 * w, f"warp {w}: rows {4 * w} to {4 * w + 3}", va="center", size=7.5, color=INK)
    ax.vlines(range(33), 0, 32, color="white", linewidth=0.5)
    ax.hlines(range(33), 0, 32, color="white", linewidth=0.4)
    for column in (5, 19):
        ax.add_patch(Rectangle((column, 22), 1, 1, color=INK, zorder=3))
    ax.text(16, 34, "lane = column j", ha="center", size=8)
    arrow(ax, (4, 33.2), (30, 33.2))
    ax.text(-1, 16, "row i", rotation=90, ha="right", va="center", size=8)
    ax.text(0, -2.2, "Black: literal edges. A ballot of the row finds them, and\n"
            "all lanes of the warp take each together, 32 dims at a time.",
            va="top", size=8)  # fmt: skip
    ax.set_xlim(-3, 58)
    ax.set_ylim(-9, 36)


def draw_steps(ax):
    ax.set_title(
        "Small graphs: one cooperative launch for both graphs, bars are barriers of the whole grid", size=10, loc="left"
    )
    for k, (name, what, colour) in enumerate(STEPS):
        x = 12.4 * k
        box(ax, x, 6, 10.6, 6, colour, name, size=9, weight="bold")
        ax.text(x + 5.3, 5.2, what, ha="center", va="top", size=7, color=INK, linespacing=1.3)
        if k:
            ax.plot([x - 0.9] * 2, [5.4, 12.6], color=INK, linewidth=2.2 if k != 3 else 0)
    arrow(ax, (12.4 * 4 + 8, 12.2), (12.4 * 3 + 2, 12.2), connectionstyle="arc3,rad=0.25")
    ax.text(12.4 * 4, 15.3, "3 passes (float32), 6 (float64)", ha="center", size=7.5)
    ax.set_xlim(-1, 100)
    ax.set_ylim(-0.5, 17)


def draw_large(ax):
    ax.set_title("Large graphs: for each tile of 2048 x 2048 edges", size=10, loc="left")
    parts = [
        ("torch's product", "entropy H of the tile, again if it is not stored", GREY),
        ("torch's products", "dots of the students, the teachers, the residuals", GREY),
        ("weigh", "reads H and the dots, writes beta, gamma in their place", ORANGE),
        (
            "torch's products",
            "gamma x and beta w for both sides, 4; columns of ones\nin x and w give the sums of gamma and beta",
            GREY,
        ),
        ("gradient", "literal edges: a warp a vertex, 128 dims a task;\nthe tile's loss", ORANGE),
    ]
    for k, (name, what, colour) in enumerate(parts):
        y = 29 - 6.3 * k
        box(ax, 0, y, 15, 4.6, colour, name, size=8, alpha=0.5 if colour == GREY else 0.25, weight="bold")
        ax.text(16, y + 2.3, what, ha="left", va="center", size=8, color=INK)
        if k:
            arrow(ax, (7.5, y + 6.4), (7.5, y + 4.6))
    ax.text(0, 1, "Before: prepare, means, pack; then H by tiles into the histograms. After: finish.", va="top", size=8)
    ax.set_xlim(-1, 58)
    ax.set_ylim(-5, 36)


def main() -> None:
    figure = plt.figure(figsize=(12, 7.4))
    grid = figure.add_gridspec(2, 2, height_ratios=[1, 1.25], hspace=0.2, wspace=0.06)
    for area, draw in ((grid[0, :], draw_steps), (grid[1, 0], draw_tile), (grid[1, 1], draw_large)):
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
