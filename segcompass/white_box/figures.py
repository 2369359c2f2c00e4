"""The paper's Figures 4, 5, 8 and 9 of a model, as data (CSV) and as plots (PNG).

Figures 4, 5 and 8 are drawn from the records of `figure_records.measure`, Figure 9 from the model itself.
"""

import csv
import io
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.explanation_page import draw_panels
from segcompass.modeling_segcompass.palette import SLOT_COLOURS, css_colour
from segcompass.modeling_segcompass.whole_files import write_whole

from .figure_records import KINDS, LEVELS, RANKINGS, SHARES

POINTS = 8  # samples behind a point of Figure 8, left
LINE_COLOUR = css_colour(SLOT_COLOURS[6])  # of the regressions
RANKING_NAMES = {"activation": "strongest activations", "concepts": "slots' concepts", "random": "random tokens"}

Records = Sequence[dict[str, Any]]


def write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write a table.

    Args:
        path: the file.
        header: names of the columns.
        lines: of values.
    """
    with io.StringIO(newline="") as text:
        csv.writer(text).writerows([header, *lines])
        write_whole(path, text.getvalue())


def figure4(records: Records, folder: Path) -> dict[str, list[float]]:
    """Active features per token by kind of token: figure4.csv and figure4.png.

    Args:
        records: one per sample.
        folder: where to write.

    Returns:
        kind -> active features per token at each of `LEVELS`.
    """
    from matplotlib.figure import Figure

    means = {}
    for kind in KINDS:
        tokens = sum(record["tokens"][kind] for record in records)
        active = np.sum([record["active"][kind] for record in records], axis=0)
        means[kind] = (active / max(tokens, 1)).tolist()
    lines = [[kind, level, value] for kind in KINDS for level, value in zip(LEVELS, means[kind], strict=True)]
    header = ["kind", "threshold_in_mean_active_activations", "active_features_per_token"]
    write_csv(folder / "figure4.csv", header, lines)
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for kind in KINDS:
        ax.plot(LEVELS, means[kind], marker="o", label=kind)
    ax.set(xlabel="threshold (mean active activations)", ylabel="active features per token")
    ax.legend(frameon=False)
    write_whole(folder / "figure4.png", lambda part: figure.savefig(part, dpi=130))
    return means


def figure5(records: Records, folder: Path) -> dict[str, list[float]]:
    """Coverage of instances by the first K % of the image tokens: figure5.csv and figure5.png.

    Args:
        records: one per sample.
        folder: where to write.

    Returns:
        ranking -> mean coverage at each of `SHARES`; {} when no sample has a target, and nothing is written.
    """
    from matplotlib.figure import Figure

    curves = {ranking: [curve for record in records for curve in record["coverage"][ranking]] for ranking in RANKINGS}
    if not curves["random"]:
        return {}
    means = {ranking: np.mean(curves[ranking], axis=0).tolist() for ranking in RANKINGS}
    lines = [
        [ranking, share, value] for ranking in RANKINGS for share, value in zip(SHARES, means[ranking], strict=True)
    ]
    write_csv(folder / "figure5.csv", ["ranking", "top_percent", "instance_coverage"], lines)
    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for ranking in RANKINGS:
        ax.plot(SHARES, means[ranking], marker="o", label=RANKING_NAMES[ranking])
    ax.set(xlabel="top K % of the image tokens", ylabel="instance coverage")
    ax.legend(frameon=False)
    write_whole(folder / "figure5.png", lambda part: figure.savefig(part, dpi=130))
    return means


def figure8(records: Records, folder: Path) -> dict[str, dict[str, float]]:
    """SAE error against dice loss, heatmap IoU against mask IoU: figure8_sae.csv, figure8_heatmap.csv, figure8.png.

    Args:
        records: one per sample.
        folder: where to write.

    Returns:
        "sae" and "heatmap" -> {"r", "p", "slope", "n"}; a side with fewer than three points is left out.
    """
    from matplotlib.figure import Figure

    scored = [record for record in records if record["dice"] is not None]
    groups = [scored[start : start + POINTS] for start in range(0, len(scored) - POINTS + 1, POINTS)]
    errors = [[np.mean([r["sae_error"] for r in group]), np.mean([r["dice"] for r in group])] for group in groups]
    pairs = [pair for record in scored for pair in record["pairs"]]
    write_csv(folder / "figure8_sae.csv", ["sae_error", "mask_dice_loss"], errors)
    write_csv(folder / "figure8_heatmap.csv", ["heatmap_iou", "mask_iou"], pairs)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    found = {}
    for ax, name, points, labels in zip(
        figure.subplots(1, 2),
        ("sae", "heatmap"),
        (errors, pairs),
        (("SAE error ||z - ẑ||²", "mask dice loss"), ("heatmap IoU", "mask IoU")),
        strict=True,
    ):
        ax.set(xlabel=labels[0], ylabel=labels[1])
        if len(points) < 3 or np.ptp(np.array(points)[:, 0]) == 0:
            ax.set_title(f"{len(points)} points: too few")
            continue
        x, y = np.array(points).T
        line = stats.linregress(x, y)
        found[name] = {"r": line.rvalue, "p": line.pvalue, "slope": line.slope, "n": len(x)}
        ax.scatter(x, y, s=12, alpha=0.5)
        at, low, high = confidence_band(x, y, line)
        ax.plot(at, line.intercept + line.slope * at, color=LINE_COLOUR)
        ax.fill_between(at, low, high, color=LINE_COLOUR, alpha=0.2)
        ax.set_title(f"r = {line.rvalue:.2f}, p = {line.pvalue:.1e}, n = {len(x)}")
    write_whole(folder / "figure8.png", lambda part: figure.savefig(part, dpi=130))
    return found


def confidence_band(x: np.ndarray, y: np.ndarray, line: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 95 % band of a regression's mean over the range of x.

    Args:
        x: float (N,).
        y: float (N,).
        line: what scipy's `linregress(x, y)` returned.

    Returns:
        (at, low, high), float (50,) each.
    """
    at = np.linspace(x.min(), x.max(), 50)
    residuals = y - (line.intercept + line.slope * x)
    error = np.sqrt((residuals**2).sum() / (len(x) - 2))
    width = stats.t.ppf(0.975, len(x) - 2) * error
    width = width * np.sqrt(1 / len(x) + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum())
    middle = line.intercept + line.slope * at
    return at, middle - width, middle + width


@torch.no_grad()
def figure9(
    model: SegCompassModel, processor: SegCompassProcessor, rows: Iterable[dict[str, Any]], path: Path, panels: int = 6
) -> bool:
    """Instruction, image, activated tokens, heatmap and mask of the first samples that have a target and a slot.

    The samples are not chosen: right or wrong, each shows its most confident slot.

    Args:
        model: in evaluation mode.
        processor: the model's.
        rows: of a data set.
        path: the PNG to write.
        panels: how many samples at most.

    Returns:
        False when no sample with a target has a slot, and nothing is written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.6 * panels), layout="constrained")
    axes = figure.subplots(panels, 5, squeeze=False)
    count = 0
    for row in rows:
        if not row["masks"]:
            continue
        outputs: Any = model.segment(**processor(images=row["image"], text=row["instruction"]).to(model.device))
        slots = outputs.slot_mask[0].nonzero()[:, 0].tolist()
        if not slots:
            continue
        slot = max(slots, key=lambda slot: float(outputs.pred_logits[0, slot]))
        explanation = model.explain(outputs, slot=slot, processor=processor)
        size = [(row["height"], row["width"])]
        mask = processor.post_process_masks(outputs.pred_masks, size)[0][slot].cpu().numpy() > 0  # (H, W)
        first, *others = axes[count]
        first.text(0.5, 0.5, textwrap.fill(row["instruction"], 22), ha="center", va="center", parse_math=False)
        draw_panels(others, explanation, row["image"].convert("RGB"), mask)
        count += 1
        if count == panels:
            break
    if not count:
        return False
    for ax, title in zip(axes[0], ("instruction", "image", "activated tokens", "heatmap", "mask"), strict=True):
        ax.set_title(title)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(False)
    write_whole(path, lambda part: figure.savefig(part, dpi=110))
    return True
