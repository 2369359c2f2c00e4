"""Training curves as a page: what one or several runs logged, one small chart per value, runs over one another.

Reads the `trainer_state.json` that every checkpoint of the trainers holds. Knows nothing about trainers or models.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from segcompass.charts import line_chart
from segcompass.modeling_segcompass.palette import css_colour, slot_colour
from segcompass.modeling_segcompass.report_page import page, text

STATE = "trainer_state.json"
PLAIN = "training"
HELD_OUT = "held-out rows"
LEFT_OUT = {"step", "epoch", "total_flos"}


class Run(NamedTuple):
    """What a run logged."""

    name: str
    values: dict[str, list[tuple[float, float]]]
    """name -> (step, value) pairs in order, finite."""
    not_finite: dict[str, int]
    """name -> how many values were NaN or infinite, and are left out."""


def find_state(source: str | Path) -> Path:
    """The file that holds a run's log.

    Args:
        source: the file, a checkpoint, or the output folder of a training, whose newest checkpoint is taken.

    Returns:
        An existing file.

    Raises:
        ValueError: there is none.
    """
    source = Path(source)
    if source.is_file():
        return source
    numbers = (folder.name.removeprefix("checkpoint-") for folder in source.glob("checkpoint-*"))
    newest = sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)
    for path in (source / STATE, *(source / f"checkpoint-{number}" / STATE for number in newest)):
        if path.is_file():
            return path
    raise ValueError(
        f"{source} holds no {STATE}, and no checkpoint with one; name the output folder of a training that saved a "
        "checkpoint (--save-strategy steps), or the file itself."
    )


def read_run(source: str | Path) -> Run:
    """What a run logged.

    Args:
        source: see `find_state`.

    Returns:
        The run, named after its folder.

    Raises:
        ValueError: no such file, a damaged one, or one that logged no values.
    """
    path = find_state(source)
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        steps = [(float(entry["step"]), entry) for entry in history]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no trainer's state ({error!r}); take that of another checkpoint, or train again."
        ) from error
    values: dict[str, list[tuple[float, float]]] = {}
    not_finite: dict[str, int] = {}
    for step, entry in steps:
        for name, value in entry.items():
            if name in LEFT_OUT or name.startswith("train_") or isinstance(value, bool):
                continue
            if not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                values.setdefault(name, []).append((step, float(value)))
            else:
                not_finite[name] = not_finite.get(name, 0) + 1
    if not values:
        raise ValueError(f"{path} logged no values; train with --logging-steps below the number of steps.")
    source = Path(source)
    return Run(str(source.parent if source.is_file() else source), values, not_finite)


def curves_page(runs: Sequence[Run], title: str = "Training curves") -> str:
    """The page.

    Args:
        runs: one or more; the n-th has the colour of slot n.
        title: heading.

    Returns:
        The text of an HTML file.

    Example:
        Path("curves.html").write_text(curves_page([read_run("runs/sft"), read_run("runs/grpo")]))
    """
    names = dict.fromkeys(name for run in runs for name in (*run.values, *run.not_finite))
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name), []).append(name)
    sections = []
    for group in sorted(groups, key=lambda group: (group != PLAIN, group)):
        figures = "".join(_figure(name, runs) for name in groups[group])
        sections.append(f"<h2>{text(group)}</h2><div class='grid'>{figures}</div>")
    legend = " &nbsp; ".join(f"{_swatch(number)} {text(name)}" for number, name in enumerate(_short_names(runs)))
    return page(title, "\n".join(sections), f"{legend} &nbsp; over optimizer steps")


def _short_names(runs: Sequence[Run]) -> list[str]:
    """The runs' folders, without what all of them begin with."""
    parts = [Path(run.name).parts for run in runs]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return ["/".join(part[shared:]) for part in parts]


def _swatch(number: int) -> str:
    return f"<span class='swatch' style='background:{css_colour(slot_colour(number))}'></span>"


def _group(name: str) -> str:
    """Under which heading a value stands: `seg/…`, `rewards/…`; what is held out together, all else together."""
    if name.startswith("eval_"):
        return HELD_OUT
    return name.split("/")[0] if "/" in name else PLAIN


def _figure(name: str, runs: Sequence[Run]) -> str:
    lines = {str(number): run.values.get(name, []) for number, run in enumerate(runs)}
    chart = line_chart(name, lines) if any(lines.values()) else ""
    said = []
    for number, run in enumerate(runs):
        notes = [f"last {run.values[name][-1][1]:.4g}"] if name in run.values else []
        if name in run.not_finite:
            notes.append(f"<b>{run.not_finite[name]} not finite, left out</b>")
        if notes:
            said.append(f"{_swatch(number)} {', '.join(notes)}")
    return f"<figure><h3>{text(name)}</h3>{chart}<figcaption>{' &nbsp; '.join(said)}</figcaption></figure>"
