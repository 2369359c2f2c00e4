"""The examples in docstrings that can be run give what they say."""

import doctest
import tempfile
from importlib import import_module
from pathlib import Path

import evaluate
import numpy as np
import pytest

import segcompass
from segcompass import loaders
from segcompass.loaders import scene_drawing

METRIC = "segcompass.loaders.reasoning_segmentation.reasoning_segmentation"
MODULES = [f"segcompass.loaders.{path.stem}" for path in sorted(Path(loaders.__file__).parent.glob("[!_]*.py"))]
NAMES = {
    "evaluate": evaluate,
    "np": np,
    "scene_drawing": scene_drawing,
    "segcompass": segcompass,
    "tempfile": tempfile,
}


@pytest.mark.parametrize("name", ["segcompass.loaders", *MODULES, METRIC, "segcompass.modeling_segcompass.images"])
def test_examples_are_right(name):
    failed, _ = doctest.testmod(import_module(name), extraglobs=NAMES)
    assert not failed
