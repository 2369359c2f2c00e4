"""What is true of a procedural scene, and which features know it.

On scenes every object's colour, shape and size is known, so that a feature's name can be scored. Three readings of
"the feature fires where the attribute is":
    scene  it fires on some image patch  <=>  some object of the scene has the attribute
    patch  it fires on an image patch    <=>  half of that patch or more shows such an object
    word   it fires on a word piece      <=>  the word is the attribute's name
Image tokens come before the instruction, so in the first two readings no word can give the attribute away.
"""

from dataclasses import asdict
from functools import cache

import numpy as np
import torch
from tqdm import tqdm

from segcompass.loaders import load_rows
from segcompass.loaders.scene_drawing import COLOURS, SHAPES, SIZES, Scene
from segcompass.loaders.scenes import scene_question
from segcompass.modeling_segcompass.token_layout import IMAGE

from .detectors import best_detectors, score_all
from .dictionary_reader import TokenReader

ATTRIBUTES = (*COLOURS, *SHAPES, *SIZES)
READINGS = ("scene", "patch", "word")
NAMES_F1, NAMES_LIFT = 0.8, 0.5
"""What a detector's held-out scores must reach, for the attribute to be its concept's name."""
COVERED = 0.5  # a patch shows an object from this share of it on

Labelled = dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""reading -> (activations float (N, d_sae), {attribute: bool (N,)})."""


def patch_shares(scene: Scene, grid: tuple[int, int]) -> np.ndarray:
    """Share of each patch that shows an object with each attribute.

    Args:
        scene: whose sides are multiples of the grid's.
        grid: (rows, columns) of the image patches.

    Returns:
        float (A, rows * columns), A the number of `ATTRIBUTES`.
    """
    rows, columns = grid
    height, width = scene.image.shape[:2]
    shares = np.zeros((len(ATTRIBUTES), rows, columns))
    for thing, mask in zip(scene.objects, scene.masks, strict=True):
        covered = mask.reshape(rows, height // rows, columns, width // columns).mean((1, 3))  # (rows, columns)
        for word in (thing.colour, thing.shape, thing.size):
            shares[ATTRIBUTES.index(word)] += covered
    return shares.reshape(len(ATTRIBUTES), -1)


@cache
def patch_words(split: str, seed: int, number: int, grid: tuple[int, int]) -> list[str]:
    """What each patch of a scene shows: "large red ball", or "ground" where nothing covers half of it.

    Args:
        split: of the scenes.
        seed: of the scenes.
        number: of the scene.
        grid: (rows, columns) of the image patches.

    Returns:
        rows * columns texts.
    """
    scene, _ = scene_question(split, seed, number)
    shares = patch_shares(scene, grid)  # (A, rows * columns)
    words = []
    for patch in range(shares.shape[1]):
        seen = {ATTRIBUTES[place] for place in np.flatnonzero(shares[:, patch] >= COVERED)}
        words.append(" ".join(word for table in (SIZES, COLOURS, SHAPES) for word in table if word in seen) or "ground")
    return words


def labelled_activations(reader: TokenReader, split: str, seed: int, count: int, batch_size: int = 32) -> Labelled:
    """The concepts of scenes beside what is true of them.

    Args:
        reader: of the model.
        split: of the scenes.
        seed: of the scenes.
        count: how many scenes.
        batch_size: scenes read at a time.

    Returns:
        For each reading the activations and the attributes.
    """
    values: dict[str, list[torch.Tensor]] = {reading: [] for reading in READINGS}
    truths: dict[str, list[torch.Tensor]] = {reading: [] for reading in READINGS}
    rows = load_rows("scenes", split, seed, count)
    for start in tqdm(range(0, count, batch_size), unit="batch", desc=f"{split} scenes", dynamic_ncols=True):
        batch = [rows[index] for index in range(start, min(start + batch_size, count))]
        for number, tokens in enumerate(reader.read(batch), start):
            scene, _ = scene_question(split, seed, number)
            image = tokens.activations[tokens.types == IMAGE]  # (rows * columns, d_sae)
            shares = torch.from_numpy(patch_shares(scene, tokens.grid))  # (A, rows * columns)
            values["scene"].append(image.amax(0, keepdim=True))  # (1, d_sae)
            truths["scene"].append((shares > 0).any(1)[None])  # (1, A)
            clear = ((shares == 0) | (shares >= COVERED)).all(0)  # a patch that an object just touches is neither
            values["patch"].append(image[clear].half())
            truths["patch"].append((shares[:, clear] >= COVERED).T)
            text = tokens.types != IMAGE
            words = reader.words([token for token, chosen in zip(tokens.ids, text.tolist(), strict=True) if chosen])
            values["word"].append(tokens.activations[text].half())
            said = [[word == name for name in ATTRIBUTES] for word in words]
            truths["word"].append(torch.tensor(said, dtype=torch.bool).reshape(-1, len(ATTRIBUTES)))
    return {
        reading: (
            torch.cat(values[reading]).float(),
            dict(zip(ATTRIBUTES, torch.cat(truths[reading]).T, strict=True)),
        )
        for reading in READINGS
    }


def score_attributes(chosen: Labelled, held_out: Labelled) -> dict[str, dict[str, dict[str, float]]]:
    """The best detector of each attribute. What never, or always, holds in a set of scenes is left out.

    Args:
        chosen: scenes that features and thresholds are chosen on.
        held_out: scenes that they are scored on.

    Returns:
        reading -> attribute -> the fields of a Detector.
    """
    scores = {}
    for reading in READINGS:
        (values, truth), (other_values, other_truth) = chosen[reading], held_out[reading]
        known = [name for name in ATTRIBUTES if all(0 < t[name].float().mean() < 1 for t in (truth, other_truth))]
        truth, other_truth = ({name: table[name] for name in known} for table in (truth, other_truth))
        found = best_detectors(values, truth, other_values, other_truth) if known else {}
        scores[reading] = {name: asdict(detector) for name, detector in found.items()}
    return scores


def detected_attributes(chosen: Labelled, held_out: Labelled) -> dict[int, str]:
    """The concepts that detect an attribute, by name: what they say on patches counts before words.

    Args:
        chosen: scenes that thresholds are chosen on.
        held_out: scenes that F1 and lift are measured on; 0.8 and 0.5 or more of them make a name.

    Returns:
        {feature index: attribute}.
    """
    names: dict[int, str] = {}
    for reading in ("patch", "word"):
        (values, truth), (other_values, other_truth) = chosen[reading], held_out[reading]
        present, other_present = (
            torch.stack([table[name] for name in ATTRIBUTES], 1) for table in (truth, other_truth)
        )
        f1, lift = score_all(values, present, other_values, other_present)  # (A, d_sae)
        best, rows = torch.where((f1 >= NAMES_F1) & (lift >= NAMES_LIFT), f1, 0).max(0)
        for index in best.nonzero()[:, 0].tolist():
            names.setdefault(index, ATTRIBUTES[int(rows[index])])
    return names
