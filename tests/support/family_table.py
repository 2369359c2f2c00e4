"""The tables of docs/families.md: what was tried of each family, and what is known of every MLLM of transformers."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from segcompass.modeling_segcompass.family_processor import known_obstacle

from .families import TINY_FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
SIGNS = {"passed": "✓", "skipped": "–", "failed": "✗"}


def made_with() -> str:
    """Day and versions."""
    return f"{date.today()}, transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"


def tried(results: Mapping[str, Mapping[str, str]]) -> tuple[str, list[str]]:
    """The table of what was tried.

    Args:
        results: family -> column -> "passed", "failed" or "skipped".

    Returns:
        tuple: the table, and the families that passed everything.
    """
    columns = list(dict.fromkeys(column for found in results.values() for column in found))
    whole = [family for family, found in results.items() if all(found.get(name) == "passed" for name in columns)]
    lines = [f"{made_with()}: {len(whole)} of {len(results)} families pass all {len(columns)}.", ""]
    lines += [f"| family | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for family, found in results.items():
        lines.append(f"| `{family}` | {' | '.join(SIGNS.get(found.get(name, ''), '·') for name in columns)} |")
    return "\n".join(lines), whole


def every_entry() -> str:
    """Every entry of transformers' image-text-to-text mapping, by what happens to it."""
    groups: dict[str, list[str]] = {"in the table above": list(TINY_FAMILIES)}
    untried = []
    for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        obstacle = known_obstacle(name)
        if name in TINY_FAMILIES:
            continue
        if obstacle is None:
            untried.append(name)
        else:
            groups.setdefault(f"refused: {obstacle}", []).append(name)
    groups["not tried here: passes the three trials, or is refused, when a model is built"] = untried
    count = sum(map(len, groups.values()))
    lines = [f"{made_with()}: {count} entries.", "", "| | `model_type` |", "|---|---|"]
    for what, names in groups.items():
        lines.append(f"| {what} ({len(names)}) | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines)


def write(mark: str, body: str) -> None:
    """Put a table between its marks on the page: `<!-- made: MARK -->` and `<!-- end -->`."""
    first = f"<!-- made: {mark} -->"
    before, rest = PAGE.read_text(encoding="utf-8").split(first)
    after = rest.split("<!-- end -->", 1)[1]
    PAGE.write_text(f"{before}{first}\n{body}\n\n<!-- end -->{after}", encoding="utf-8")
