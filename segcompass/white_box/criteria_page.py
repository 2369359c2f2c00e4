"""The six criteria as a page: each measure as a bar with its interval, its control below, its bar as a dashed line.

Draws what `segcompass white-box` measured (`metrics.json`); bars and controls are the command's. Measures nothing.
"""

from collections.abc import Mapping
from typing import Any

from segcompass.charts import Interval, interval_bars
from segcompass.modeling_segcompass.report_page import page, text

QUESTIONS = {
    "Name": (
        "Do the heavy concepts name what the object is, rather than what others are?",
        {
            "name": "weight on concepts that detect an attribute of the object",
            "name_look": "the same of colours, shapes and sizes alone",
            "selectivity": "weight on what only this object has, over weight on what only others have",
        },
    ),
    "Locate": (
        "Does the map that is shown lie on the object?",
        {
            "pointing": "its maximum lies on the object",
            "auc_others": "it tells the object's patches from other objects' (0.5 is chance)",
            "energy": "share of it that lies on the object",
            "twins": "of objects whose looks another object has too, those that are found",
        },
    ),
    "Move": (
        "Do the concepts decide which object is meant?",
        {"move": "another question's concepts make its object appear"},
    ),
    "Steer": (
        "Does the mask follow when named concepts are changed?",
        {
            "steer_own": "IoU lost without the detectors of the object's looks, less that without random ones",
            "steer_others": "IoU lost without the detectors of another object's looks",
            "steer_flip": "the weight handed to another object's detectors makes that object appear",
            "write_swap": "a look replaced while the response is written: the conclusion says the other one",
            "write_off": "its detectors off while the response is written: the conclusion no longer names it",
        },
    ),
    "No switch": (
        "Is what the concepts say used, or only that they are there?",
        {"content": "share of the deletion's effect that their content explains"},
    ),
    "Shown = used": (
        "Is what is shown what the mask is made of?",
        {
            "shown": "share of the mask that goes when what fires on the image is taken away",
            "sum_error": "greatest difference between the sum of what is shown and the heatmap",
        },
    ),
}
"""Criterion -> (what it asks, {measure: what it is})."""
LOGARITHMIC = ("selectivity",)
FEW = 20
"""Images with a right mask, below which figures are said to say little."""
LATER = ("energy", "twins", "write_swap", "write_off")
"""Measures that RESULT, or the metrics of an earlier version, may lack."""
STYLE = """
.measure { border: 1px solid var(--line); border-radius: 6px; padding: .8rem; background: var(--panel) }
.measure svg { margin: .3rem 0 } .measure b { color: var(--ink) }
"""


def criteria_page(metrics: Mapping[str, Any], source: str, bars: Mapping[str, str], controls: Mapping[str, str]) -> str:
    """The page.

    Args:
        metrics: content of metrics.json, or the object after RESULT (which has no controls).
        source: what was examined.
        bars: measure -> what is wanted of the end of its interval, such as "≥ .60" (lower) or "≤ .05" (upper).
        controls: measure -> what its control is.

    Returns:
        The text of an HTML file.

    Raises:
        ValueError: metrics without a measure, or with one that is neither an interval nor a number.

    Example:
        metrics = json.loads(Path("runs/white_box/metrics.json").read_text())
        Path("report.html").write_text(criteria_page(metrics, "the small model", BARS, CONTROLS))
    """
    sections, met, judged = [], 0, 0
    for criterion, (question, measures) in QUESTIONS.items():
        figures = []
        for name, meaning in measures.items():
            value = _number(metrics, name)
            verdict = _is_met(value, bars.get(name, ""))
            judged += verdict is not None
            met += bool(verdict)
            control = (metrics.get("controls") or {}).get(name)
            figures.append(_figure(name, meaning, value, control, bars.get(name, ""), controls.get(name), verdict))
        sections.append(f"<h2>{criterion}</h2><p>{question}</p><div class='grid'>{''.join(figures)}</div>")
    lead = (
        f"{text(source)}. {_counted(metrics)}{met} of {judged} measures meet their bar. Blue: measured; grey: control; "
        "whiskers: 95&nbsp;% interval over scenes, whose worse end is held to the bar; dashed: the bar."
    )
    return page("Does the white box mean what it shows?", "\n".join(sections), lead, STYLE)


def _counted(metrics: Mapping[str, Any]) -> str:
    if not {"masks", "scenes", "scenes_with_masks"} <= metrics.keys():
        return ""
    counted = f"{metrics['masks']} right masks in {metrics['scenes_with_masks']} of {metrics['scenes']} scenes. "
    return counted + caution(metrics["scenes_with_masks"])


def caution(scenes: int) -> str:
    """What to say of a measurement of few images.

    Args:
        scenes: how many had a right mask.

    Returns:
        A sentence and a space; "" from `FEW` on.
    """
    return f"Of fewer than {FEW} images the figures say little, and their intervals are too narrow. " * (scenes < FEW)


def _number(metrics: Mapping[str, Any], name: str) -> Interval | float | None:
    """A measure; None where nothing was measured."""
    if name not in metrics and name not in LATER:
        raise ValueError(f"no {name!r} among the metrics; give what `segcompass white-box` wrote into metrics.json.")
    value = metrics.get(name)
    if value is None or isinstance(value, int | float):
        return value
    if not (isinstance(value, list | tuple) and len(value) == 3):
        raise ValueError(f"{name!r} is {value!r}; it must be [mean, low, high] or a number.")
    return Interval(*map(float, value))


def _is_met(value: Interval | float | None, bar: str) -> bool | None:
    """Whether the worse end reaches the bar; None without value or bar."""
    if value is None or not bar:
        return None
    low, high = (value.low, value.high) if isinstance(value, Interval) else (value, value)
    return low >= _wanted(bar) if bar.startswith("≥") else high <= _wanted(bar)


def _wanted(bar: str) -> float:
    return float(bar.strip("≥≤ "))


def _figure(
    name: str, meaning: str, value: Any, control: Any, bar: str, control_is: str | None, verdict: bool | None
) -> str:
    """One measure."""
    said = {None: "", True: "met", False: "not met"}[verdict]
    chart = ""
    if isinstance(value, Interval):
        drawn = Interval(*map(float, control)) if control else None
        wanted = _wanted(bar) if bar else None
        label = f"{name}: {_shown(value)}, control {_shown(drawn)}, bar {bar}"
        chart = interval_bars(label, value, drawn, wanted, name in LOGARITHMIC)
    judged = f", bar&nbsp;{bar.replace(' ', '&nbsp;')}:&nbsp;{said}" if bar and said else ""
    lines = [f"<b>{_shown(value)}</b>{judged}"]
    if control:
        lines.append(f"control {_shown(Interval(*map(float, control)))}: {text(control_is or 'random concepts')}")
    caption = f"<figcaption>{'<br>'.join(lines)}</figcaption>"
    return f"<figure class='measure'><h3>{text(name)}</h3>{text(meaning)}{chart}{caption}</figure>"


def _shown(value: Interval | float | None) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, Interval):
        return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
    return f"{value:.3g}"
