"""The Space's repository: what is pushed, and what its front matter says."""

import re

import pytest
import yaml

from segcompass.hub_cards import space_card
from tests.support.hub_client import ROOT

FOLDER = ROOT / "hub_cards" / "space"

PUSH = """
import json
from pathlib import Path
from huggingface_hub import HfApi, RepoCard, snapshot_download
from segcompass.cli import main
from tests.support.space import borrowed_space
for model in ("tester/first", "tester/second"):
    main(["push", "space", model, "tester/why"])
card = RepoCard.load("tester/why", repo_type="space")
folder = Path(snapshot_download("tester/why", repo_type="space"))
with borrowed_space() as space:
    shown = space.asking.model_of_the_space(folder)
print(json.dumps([HfApi().list_repo_files("tester/why", repo_type="space"), card.data.to_dict(), shown]))
"""


def test_a_pushed_space_holds_every_file_and_names_its_model(hub):
    files, front, shown = hub.run(PUSH, home="space")
    written = {path.name for path in FOLDER.iterdir() if path.is_file()}
    assert set(files) - {".gitattributes"} == written
    assert front["models"] == front["preload_from_hub"] == ["tester/second"]
    assert shown == "tester/second"  # by its own code, however the head of README.md is laid out


def test_the_front_matter_is_what_the_hub_reads():
    front = space_card("me/mine").data.to_dict()
    assert front["sdk"] == "gradio" and (FOLDER / front["app_file"]).exists()
    assert len(front["short_description"]) <= 60 and front["models"] == ["me/mine"]
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(rf"^gradio=={re.escape(front['sdk_version'])}$", constraints, re.M), "tested with another gradio"
    text = (FOLDER / "README.md").read_text().split("---")[1]
    assert yaml.safe_load(text)["preload_from_hub"] == ["USER/segcompass-mini"]


@pytest.mark.parametrize("model", ["examples/checkpoints/mini", "mini", "/mini", ""])
def test_a_model_that_is_not_on_the_hub_is_refused(model):
    with pytest.raises(ValueError, match="no Hub id"):
        space_card(model)


def test_the_examples_are_what_their_command_draws(tmp_path, monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("space_examples", ROOT / "dev" / "space_examples.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    module.main()
    for path in tmp_path.iterdir():
        kept = FOLDER / path.name
        if path.suffix == ".json":
            assert kept.read_text() == path.read_text()
        else:
            from PIL import Image

            assert Image.open(kept).tobytes() == Image.open(path).tobytes()
