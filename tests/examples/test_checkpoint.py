"""The embedded checkpoint is whole, small, current, and right about the scene that ships with it."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from segcompass.loaders.scenes import scene_question
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.manifest import findings, unlisted

EXAMPLES = Path(__file__).parents[2] / "examples"
MINI = EXAMPLES / "checkpoints" / "mini"
RENEW = (
    "renew the copies: python examples/recipes/mini/save_checkpoint.py --code-only --output examples/checkpoints/mini"
)


def test_the_code_beside_the_weights_is_this_packages():
    ours, copies = (
        {path.name: path.read_text() for path in folder.glob("*.py") if path.name != "__init__.py"}
        for folder in (EXAMPLES.parent / "modeling_segcompass", MINI)
    )
    assert copies.keys() == ours.keys(), RENEW
    for name, code in ours.items():
        assert copies[name] == code, f"{name} differs; {RENEW}"


def test_the_folder_is_as_signed():
    assert (findings(MINI), unlisted(MINI)) == ([], []), RENEW


def test_weights_are_small():
    assert (MINI / "model.safetensors").stat().st_size <= 12_000_000


def test_default_scene_is_segmented_right():
    noted = json.loads((EXAMPLES / "scene.json").read_text())
    scene, question = scene_question(noted["split"], noted["seed"], noted["index"])
    model = SegCompassModel.from_pretrained(MINI)
    assert model.dtype == torch.float32
    processor = SegCompassProcessor.from_pretrained(MINI)
    inputs = processor(images=Image.open(EXAMPLES / noted["image"]), text=noted["instruction"])
    outputs = model.segment(**inputs)
    (mask,) = processor.post_process_semantic_segmentation(outputs, target_sizes=inputs["original_sizes"])
    truth = scene.masks[question.targets].any(0)
    overlap = np.logical_and(mask.numpy(), truth).sum() / np.logical_or(mask.numpy(), truth).sum()
    assert overlap > 0.8
