"""Draw the architecture, with the file that holds each part under its box.

    python dev/draw_architecture.py        # writes docs/figures/architecture.svg

Knows nothing about the code: tests/test_house.py checks that the files named here exist.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "docs" / "figures" / "architecture.svg"

DATA, MODEL, TRAINING, PANEL = "#f6f2e9", "#e2ebf7", "#d5ead0", "#eff7ed"  # fill colours
EDGE, TEXT, FILE = "#44546a", "#1b1f24", "#8a3b12"  # line and text colours
TITLE, WORDS, NAMES = 11, 9, 8.5  # font sizes

Point = tuple[float, float]


class Box(NamedTuple):
    left: float
    bottom: float
    width: float
    height: float
    fill: str
    title: str
    subtitle: str = ""
    files: tuple[str, ...] = ()
    """Names of files in modeling_segcompass/, or paths from the repository's root."""


BOXES = {
    "instruction": Box(0.0, 4.75, 2.3, 0.9, DATA, "instruction", '"find the blue star"'),
    "image": Box(0.0, 2.6, 2.3, 0.9, DATA, "image"),
    "response": Box(
        3.2,
        6.8,
        6.4,
        0.75,
        DATA,
        "<think> … </think> and $K_s$ tokens <REF_POS>",
        files=("token_layout.py",),
    ),
    "mllm": Box(3.2, 4.6, 2.7, 1.2, MODEL, "MLLM  $\\pi_\\theta$", "reasons, then points", ("backbone.py",)),
    "sae": Box(
        6.9,
        4.6,
        2.7,
        1.2,
        MODEL,
        "SAE  $E_{sae}$",
        "states → few concepts",
        ("modeling_sparse_autoencoder.py", "sae_activations.py"),
    ),
    "codebook": Box(
        10.6, 4.6, 2.7, 1.2, MODEL, "query codebook  $C$", "concepts → $K_s$ queries", ("query_codebook.py",)
    ),
    "encoder": Box(10.6, 2.45, 2.7, 1.2, MODEL, "image encoder  $F_{enc}$", "image → keys $K$", ("image_encoder.py",)),
    "mapper": Box(14.3, 4.6, 2.7, 1.2, MODEL, "slot mapper", "$S = QK^T$ → heatmaps", ("slot_mapper.py",)),
    "decoder": Box(18.0, 4.6, 2.7, 1.2, MODEL, "mask decoder  $F_{dec}$", "heatmaps → masks", ("mask_decoder.py",)),
    "masks": Box(18.35, 2.6, 2.0, 0.9, DATA, "masks  $\\hat{M}_k$"),
    "panel": Box(3.2, -0.35, 17.5, 2.0, PANEL, ""),
    "rewards": Box(
        10.6, 0.3, 4.2, 1.05, TRAINING, "rewards", "form of the response, IoU of masks", ("trainers/rewards.py",)
    ),
    "losses": Box(
        16.0, 0.3, 4.4, 1.05, TRAINING, "supervised losses", "heatmap, mask, confidence", ("trainers/losses.py",)
    ),
}


def write(axes: Axes, at: Point, text: str, size: float = WORDS, color: str = TEXT, align: str = "center") -> None:
    """Write text around a point."""
    axes.text(*at, text, size=size, color=color, ha=align, va="center")


def write_file(axes: Axes, at: Point, name: str, align: str = "center") -> None:
    """Write a file's name."""
    axes.text(*at, name, size=NAMES, color=FILE, family="monospace", ha=align, va="center")


def draw_box(axes: Axes, box: Box) -> None:
    """Draw a box, its words inside and its files below."""
    axes.add_patch(
        FancyBboxPatch(
            (box.left, box.bottom), box.width, box.height, "round,pad=0,rounding_size=0.12", fc=box.fill, ec=EDGE, lw=1
        )
    )
    middle, centre = box.left + box.width / 2, box.bottom + box.height / 2
    write(axes, (middle, centre + (0.22 if box.subtitle else 0)), box.title, size=TITLE)
    write(axes, (middle, centre - 0.26), box.subtitle)
    for line, file in enumerate(box.files):
        write_file(axes, (middle, box.bottom - 0.22 - 0.3 * line), file)


def draw_arrow(axes: Axes, *points: Point, label: str = "", at: Point = (0, 0)) -> None:
    """Draw a line through the points, with a head at the last one and a label at `at`."""
    for start, end in zip(points[:-2], points[1:-1], strict=True):
        axes.plot(*zip(start, end, strict=True), color=EDGE, lw=1.1, solid_capstyle="round")
    style = {"arrowstyle": "-|>", "color": EDGE, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style)
    write(axes, at, label, color=EDGE)


def draw(axes: Axes) -> None:
    """Draw the whole figure."""
    for box in BOXES.values():
        draw_box(axes, box)
    write(axes, (3.45, 1.25), "joint training", size=TITLE, align="left")
    write(axes, (3.45, 0.8), "rewards → advantages → GRPO loss,", align="left")
    write(axes, (3.45, 0.45), "supervised losses in the same backward pass", align="left")
    write_file(axes, (3.45, 0.05), "trainers/grpo_trainer.py", align="left")

    draw_arrow(axes, (2.3, 5.2), (3.2, 5.2))  # instruction → MLLM
    draw_arrow(axes, (1.15, 3.5), (1.15, 4.3), (2.75, 4.3), (2.75, 4.9), (3.2, 4.9))  # image → MLLM
    draw_arrow(axes, (2.3, 3.05), (10.6, 3.05))  # image → image encoder
    draw_arrow(axes, (4.55, 5.8), (4.55, 6.4), label="generates", at=(5.25, 6.1))
    draw_arrow(axes, (5.9, 5.2), (6.9, 5.2), label="states of\nlayer $L$", at=(6.4, 5.6))
    draw_arrow(axes, (9.6, 5.2), (10.6, 5.2), label="$h_j$", at=(10.1, 5.42))
    draw_arrow(
        axes, (9.6, 7.17), (15.65, 7.17), (15.65, 5.8), label="last states of these tokens, $e_k$", at=(12.6, 7.4)
    )
    draw_arrow(axes, (13.3, 5.2), (14.3, 5.2), label="$r_k$", at=(13.8, 5.42))
    draw_arrow(axes, (13.3, 3.05), (15.65, 3.05), (15.65, 4.15), label="$K$", at=(14.4, 3.27))
    draw_arrow(axes, (15.65, 3.05), (17.5, 3.05), (17.5, 4.9), (18.0, 4.9))  # keys → mask decoder
    draw_arrow(axes, (17.0, 5.2), (18.0, 5.2), label="$H_k, c_k$", at=(17.5, 5.42))
    draw_arrow(axes, (19.35, 4.15), (19.35, 3.5))  # decoder → masks
    draw_arrow(axes, (19.35, 2.6), (19.35, 1.35))  # masks → losses
    draw_arrow(axes, (19.35, 2.0), (12.7, 2.0), (12.7, 1.35))  # masks → rewards
    draw_arrow(axes, (4.55, 1.65), (4.55, 4.15), label="gradients", at=(5.3, 2.1))


def main() -> None:
    with plt.rc_context({"svg.hashsalt": "segcompass", "font.family": "DejaVu Sans"}):
        figure, axes = plt.subplots(figsize=(16.5, 6.6))
        axes.set(xlim=(-0.1, 20.85), ylim=(-0.45, 7.65), aspect="equal")
        axes.axis("off")
        draw(axes)
        figure.savefig(OUTPUT, bbox_inches="tight", pad_inches=0.05, metadata={"Date": None}, facecolor="white")
    print(OUTPUT.relative_to(ROOT))


if __name__ == "__main__":
    main()
