"""The tables of docs/families.md: what was tried of each family, and what is known of every MLLM of transformers.

    python -m tests.support.family_table    # prints the second

`python dev/measured.py families entries` keeps both in the page.
"""

from collections.abc import Mapping

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from segcompass.modeling_segcompass.family_processor import known_obstacle

from .families import TINY_FAMILIES

SIGNS = {"passed": "✓", "skipped": "–", "failed": "✗"}


def tried(results: Mapping[str, Mapping[str, str]]) -> tuple[str, list[str]]:
    """The table of what was tried.

    Args:
        results: family -> column -> "passed", "failed" or "skipped".

    Returns:
        tuple: the table, and the families that passed everything.
    """
    columns = list(dict.fromkeys(column for found in results.values() for column in found))
    whole = [family for family, found in results.items() if all(found.get(name) == "passed" for name in columns)]
    lines = [f"| family | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
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
    lines = ["| | `model_type` |", "|---|---|"]
    for what, names in groups.items():
        lines.append(f"| {what} ({len(names)}) | {', '.join(f'`{name}`' for name in names)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(every_entry())
