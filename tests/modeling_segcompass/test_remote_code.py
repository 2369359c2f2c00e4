"""A saved folder carries its own code: it works in a process that has transformers but not this project."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

import segcompass.modeling_segcompass as modeling_segcompass
from segcompass.modeling_segcompass import SegCompassConfig, SegCompassModel, SegCompassProcessor
from tests.support.scripted import INSTRUCTIONS, lively_segcompass, noise_images
from tests.support.tiny import BACKBONES

PACKAGE = Path(modeling_segcompass.__file__).parent
RESPONSES = ["<think>left of it</think><REF_POS><REF_POS><REF_POS>"] * 4
ELSEWHERE = """
import importlib.util, json, sys
sys.path += json.loads(sys.argv[1])
for name in ("segcompass", "modeling_segcompass", "trainers"):
    assert importlib.util.find_spec(name) is None, f"{name} can be imported here"

import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

torch.set_num_threads(int(sys.argv[2]))
for folder in sys.argv[3:]:
    saved = torch.load(f"{folder}/expected.pt", weights_only=True)
    images = [Image.open(f"{folder}/image{number}.png") for number in range(len(saved["text"]))]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=images, text=saved["text"], response=saved["response"], return_tensors="pt")
    for loader in (AutoModel, AutoModelForImageTextToText):
        model, info = loader.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert type(model.config).__name__ == type(config).__name__ == "SegCompassConfig"
        with torch.no_grad():
            masks = model.eval()(**inputs).pred_masks
        assert torch.equal(masks, saved["pred_masks"]), (masks - saved["pred_masks"]).abs().max()
    print(type(model).__module__)
"""


def save(folder, backbone, **config):
    """A saved model and processor, with the images and the masks to be found again."""
    model, processor = lively_segcompass(backbone, **config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for number, image in enumerate(noise_images()):
        image.save(folder / f"image{number}.png")
    with torch.no_grad():
        masks = model(**processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES)).pred_masks
    torch.save({"text": INSTRUCTIONS, "response": RESPONSES, "pred_masks": masks}, folder / "expected.pt")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {backbone: tmp_path_factory.mktemp(backbone) for backbone in BACKBONES}
    for backbone, folder in folders.items():
        save(folder, backbone)
    folders["grounded"] = tmp_path_factory.mktemp("grounded")
    save(folders["grounded"], "llava", concept_reading="grounded")
    return folders


def load_elsewhere(python, libraries, folders, tmp_path):
    """Run ELSEWHERE with an interpreter that sees these libraries only; returns the finished process."""
    # -I -S: neither the working folder nor an editable install is importable, installed libraries are given by path
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    environment.pop("HF_MODULES_CACHE", None)
    return subprocess.run(
        [python, "-I", "-S", "-c", ELSEWHERE, json.dumps(libraries), str(torch.get_num_threads()), *map(str, folders)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_saved_folder_works_where_the_project_cannot_be_imported(saved, tmp_path):
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    result = load_elsewhere(sys.executable, libraries, saved.values(), tmp_path)
    assert result.returncode == 0, result.stderr
    assert [line.split(".")[0] for line in result.stdout.split()] == ["transformers_modules"] * len(saved)
    for word in ("Do you wish to run", "newly initialized", "not used when", "You are using a model of type"):
        assert word not in result.stdout + result.stderr, result.stderr


@pytest.mark.skipif("OTHER_PYTHONS" not in os.environ, reason="on demand: OTHER_PYTHONS=VENV/bin/python:...")
def test_saved_folder_works_with_other_versions_of_transformers(saved, tmp_path):
    for python in os.environ["OTHER_PYTHONS"].split(":"):
        site = "import sysconfig, json; print(json.dumps([sysconfig.get_path('purelib')]))"
        libraries = json.loads(subprocess.check_output([python, "-c", site], text=True))
        result = load_elsewhere(python, libraries, saved.values(), tmp_path)
        assert result.returncode == 0, f"{python}: {result.stderr}"


def test_auto_classes_know_the_imported_package_without_remote_code(saved):
    for folder in saved.values():
        assert isinstance(AutoConfig.from_pretrained(folder), SegCompassConfig)
        assert isinstance(AutoProcessor.from_pretrained(folder), SegCompassProcessor)
        for loader in (AutoModel, AutoModelForImageTextToText):
            assert isinstance(loader.from_pretrained(folder), SegCompassModel)


def test_saved_folder_names_its_classes_and_holds_their_code(saved):
    for folder in saved.values():
        named = json.loads((folder / "config.json").read_text())["auto_map"]
        named |= json.loads((folder / "processor_config.json").read_text())["auto_map"]
        assert set(named) >= {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor"}
        for reference in named.values():
            module, name = reference.split(".")
            tree = ast.parse((folder / f"{module}.py").read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
        code = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
        assert {path.name for path in folder.glob("*.py")} == code


def imports(tree):
    """Every import: (top-level name, level of a relative import, inside a function?). What a `try` block imports is
    left out: transformers does not ask users of a served model for it."""
    tried = {n for t in ast.walk(tree) if isinstance(t, ast.Try) for n in ast.walk(t)}
    functions = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in set(ast.walk(tree)) - (tried & functions):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, node in functions) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node.level, node in functions


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_package_imports_only_what_the_hub_can_serve(path):
    for module, level, inside in imports(ast.parse(path.read_text())):
        if level:
            assert level == 1 and (PACKAGE / f"{module}.py").exists(), f"{module}: only files of this folder are served"
            continue
        allowed = {"torch", "transformers", "numpy"} | ({"PIL", "safetensors", "huggingface_hub"} if inside else set())
        assert module.split(".")[0] in allowed | sys.stdlib_module_names, f"{path.name} imports {module}"
