"""Several sparse autoencoders that differ in how sparse they are, side by side: the curve of quality over L0.

One autoencoder's explained variance says little: a denser one always explains more. The curve is what two kinds of
autoencoders, or two data sets, can be compared by. Knows nothing about how they are trained.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from segcompass.modeling_segcompass.sae_activations import SAE_ACTIVATIONS


def swept_field(activation: str, values: list[float], d_sae: int) -> str:
    """Which field makes an activation sparse, after its values were checked.

    Args:
        activation: a name in `SAE_ACTIVATIONS`.
        values: the values to try.
        d_sae: number of features.

    Returns:
        "k", "l1_coefficient" or "l0_coefficient".

    Raises:
        ValueError: the activation has no such field, a value is none of it, or one stands twice.
    """
    known = SAE_ACTIVATIONS[activation]
    field = "k" if known.keeps_k else known.coefficient
    if field is None:
        raise ValueError(f"activation {activation!r} has nothing to sweep over; choose one with a k or a penalty.")
    if len(set(values)) != len(values):
        raise ValueError(f"sweep is {values}; each value must stand once.")
    wrong = [value for value in values if value <= 0 or (field == "k" and (value != int(value) or value > d_sae))]
    if wrong:
        allowed = f"whole numbers from 1 to d_sae={d_sae}" if field == "k" else "more than 0"
        raise ValueError(f"sweep is {values}, over {field}; its values must be {allowed}.")
    return field


def write_sweep(qualities: dict[float, dict[str, Any]], field: str, folder: Path) -> dict[str, Any]:
    """Write `sweep.json` and `sweep.png`.

    Args:
        qualities: value of the field -> what `evaluate_sae` found.
        field: what was swept.
        folder: where the files go.

    Returns:
        A summary: `field`, `values`, and lists in their order of `l0`, `explained_variance`, `dead_share` over all
        tokens, and the first two of each token type under its name.
    """
    points = list(qualities.values())
    summary: dict[str, Any] = {"field": field, "values": list(qualities)}
    summary |= {name: [point[name] for point in points] for name in ("l0", "explained_variance", "dead_share")}
    for kind in points[0].get("by_type", {}):
        of_kind = [point["by_type"][kind] for point in points]
        summary[kind] = {name: [point[name] for point in of_kind] for name in ("l0", "explained_variance")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps({field: qualities}, indent=2) + "\n")
    _draw(summary, folder / "sweep.png")
    return summary


def _draw(summary, path):
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    quality, dead = figure.subplots(1, 2)
    kinds = {"all": summary} | {name: part for name, part in summary.items() if isinstance(part, dict)}
    for name, part in kinds.items():
        points = sorted(zip(part["l0"], part["explained_variance"], strict=True))
        quality.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=2.5 if name == "all" else 1.2)
    quality.set(xlabel="active features per token (L0)", title="explained variance", xscale="log")
    quality.legend(title="tokens")
    points = sorted(zip(summary["l0"], summary["dead_share"], strict=True))
    dead.plot(*zip(*points, strict=True), marker="o", color="black")
    dead.set(xlabel="active features per token (L0)", title="dead features", xscale="log", ylim=(0, None))
    for axis in (quality, dead):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
