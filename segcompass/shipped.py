"""What ships with the package: the small model, the scene it is shown on, and the recipes.

In a clone they are the files under examples/, in an installed package their copies; neither needs the network.
"""

import json
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

from segcompass.routes import PHOTOGRAPH

EXAMPLES = Path(str(files("segcompass.examples") / "scene.json")).parent
MODEL = EXAMPLES / "checkpoints" / "mini"
RECIPES = EXAMPLES / "recipes"


def notes_on(model: Any, tokenizer: Any, image: str, instruction: str) -> tuple[list[str], list[str]]:
    """What to know of an answer of the small model, wherever its weights lie; nothing of any other's.

    Args:
        model: loaded.
        tokenizer: the model's.
        image: file or URL of the image.
        instruction: what was asked.

    Returns:
        The words of the instruction that the model never learned, and lines to print: one about those, and one where
        the image is not the scene that ships.
    """
    from segcompass.hub_cards.space.small_model import is_small, unknown_words, warning

    if not is_small(model):
        return [], []
    unknown = unknown_words(tokenizer, instruction)
    lines = [warning(unknown)] if unknown else []
    if Path(image).resolve() != default_scene()[0].resolve():
        photograph = f'segcompass segment {shlex.quote(image)} "…" {PHOTOGRAPH}'
        lines.append(f"the small model knows drawn scenes only; for a photograph: {photograph}")
    return unknown, [f"note         {line}" for line in lines]


def default_scene() -> tuple[Path, str]:
    """The image file and the instruction that are shown when a user names none."""
    noted = json.loads((EXAMPLES / "scene.json").read_text(encoding="utf-8"))
    return EXAMPLES / noted["image"], noted["instruction"]
