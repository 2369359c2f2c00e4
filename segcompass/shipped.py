"""What ships with the package: the small model, the scene it is shown on, and the recipes.

In a clone they are the files under examples/, in an installed package their copies; neither needs the network.
"""

import json
from importlib.resources import files
from pathlib import Path

EXAMPLES = Path(str(files("segcompass.examples") / "scene.json")).parent
MODEL = EXAMPLES / "checkpoints" / "mini"
RECIPES = EXAMPLES / "recipes"


def default_scene() -> tuple[Path, str]:
    """The image file and the instruction that are shown when a user names none."""
    noted = json.loads((EXAMPLES / "scene.json").read_text(encoding="utf-8"))
    return EXAMPLES / noted["image"], noted["instruction"]
