"""What is said to be true of a scene is what its masks show."""

import numpy as np
import pytest

from segcompass.loaders.scene_drawing import draw_scene
from segcompass.loaders.scenes import scene_question
from segcompass.white_box.scene_attributes import ATTRIBUTES, patch_shares, patch_words


def test_shares_of_patches_are_those_of_the_masks():
    scene = draw_scene(np.random.default_rng(0), "train")
    shares = patch_shares(scene, (4, 8))
    for place, word in enumerate(ATTRIBUTES):
        wanted = [word in (thing.colour, thing.shape, thing.size) for thing in scene.objects]
        union = scene.masks[wanted].any(0) if any(wanted) else np.zeros((128, 128), bool)
        assert shares[place].reshape(4, 8)[1, 2] == pytest.approx(union[32:64, 32:48].mean())
    number = next(n for n in range(50) if len(scene_question("train", 0, n)[0].objects) == 3)
    words = patch_words("train", 0, number, (8, 8))
    assert len(words) == 64 and "ground" in words and any(len(word.split()) == 3 for word in words)
