"""The examples of the Space, drawn again from the scenes: test scenes that training never shows, one for each lesson.

python dev/space_examples.py    # writes hub_cards/space/examples.json and example_*.png
"""

import json
from pathlib import Path

from PIL import Image

from segcompass.loaders.scenes import scene_question

FOLDER = Path(__file__).resolve().parents[1] / "hub_cards" / "space"
SEED = 100
CHOSEN = (
    (256, "two targets, by relation"),
    (275, "two targets, by shape"),
    (289, "one of three alike"),
    (204, "nothing is there"),
    (272, "compares sizes"),
    (246, "knows what things are for"),
)
"""(number of the test scene, what it shows)."""


def main() -> None:
    """Write the files."""
    listed = []
    for place, (index, shows) in enumerate(CHOSEN, 1):
        scene, question = scene_question("test", SEED, index)
        name = f"example_{place}.png"
        Image.fromarray(scene.image).save(FOLDER / name, optimize=True)
        listed.append({"image": name, "instruction": question.instruction, "shows": shows})
    (FOLDER / "examples.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
