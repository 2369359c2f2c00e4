"""`segcompass segment` on tiny real models, its main function called as the command line would."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from segcompass.commands import segment
from segcompass.modeling_segcompass import SegCompassModel

EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD = "<think>a red ball</think>" + "<REF_POS>" * 3


@pytest.fixture
def photo(tmp_path):
    """A wide picture of noise."""
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def run(photo, folder, output, *options):
    segment.main([str(photo), "the ball", "--model", str(folder), "--output", str(output), *options])
    return json.loads((output / "result.json").read_text())


def test_confident_slots_become_instances_in_every_file(saved, photo, tmp_path, writes, capsys):
    folder, processor = saved
    writes(GOOD, processor)
    result = run(photo, folder, tmp_path, "--threshold", "0")
    assert set(result) == {"instruction", "text", "no_target", "instances", "concepts", "unknown_words"}
    assert (result["instruction"], result["text"], result["no_target"]) == ("the ball", GOOD, False)
    assert result["instances"], "a threshold of 0 keeps every slot whose mask has a pixel"
    for instance in result["instances"]:
        assert set(instance) == {"slot", "score", "box", "segmentation"}
        mask = coco_mask.decode(instance["segmentation"]).astype(bool)
        assert mask.shape == (40, 60)
        left, top, right, bottom = instance["box"]
        assert mask[top:bottom, left:right].sum() == mask.sum() > 0
    kept = {instance["slot"] for instance in result["instances"]}
    assert {concept["slot"] for concept in result["concepts"]} == kept
    assert all(set(concept) == {"slot", "index", "weight", "value"} for concept in result["concepts"])
    for slot in kept:
        weights = [concept["weight"] for concept in result["concepts"] if concept["slot"] == slot]
        assert weights == sorted(weights, reverse=True) and 0 < sum(weights) <= 1 + 1e-5

    labels = Image.open(tmp_path / "masks.png")
    assert (labels.mode, labels.size) == ("P", (60, 40))
    assert set(np.unique(labels)) <= set(range(len(kept) + 1))
    best = max(range(len(kept)), key=lambda index: result["instances"][index]["score"])
    shown = np.asarray(labels) == best + 1
    assert (shown == coco_mask.decode(result["instances"][best]["segmentation"])).all(), (
        "the most confident instance is on top"
    )
    assert Image.open(tmp_path / "overlay.jpg").width == 1600
    printed = capsys.readouterr().out
    assert "a red ball" in printed and f"slot {result['instances'][0]['slot']}  score" in printed


def test_explanations_are_made_only_where_they_are_shown(saved, photo, tmp_path, writes, monkeypatch):
    folder, processor = saved
    writes(GOOD, processor)
    explained, explain = [], SegCompassModel.explain
    monkeypatch.setattr(
        SegCompassModel, "explain", lambda *args, **options: explained.append(args[2]) or explain(*args, **options)
    )
    without = run(photo, folder, tmp_path / "without", "--threshold", "0")
    assert not explained, "the overlay of a read-out that is not grounded shows no explanation"
    page = np.asarray(Image.open(tmp_path / "without" / "overlay.jpg"))
    assert without == run(photo, folder, tmp_path / "with", "--threshold", "0", "--explain")
    assert explained == [instance["slot"] for instance in without["instances"]]
    assert (np.asarray(Image.open(tmp_path / "with" / "overlay.jpg")) == page).all()


def test_nothing_of_an_earlier_answer_stays_beside_a_new_one(saved, photo, tmp_path, writes):
    folder, processor = saved
    writes(GOOD, processor)
    output = tmp_path / "out"
    output.mkdir()
    (output / "overlay.png").write_bytes(b"of an earlier version")
    (output / "notes.txt").write_text("the user's")
    of_each = {"result.json", "masks.png", "overlay.jpg", "notes.txt"}
    for options, more in ((["--explain"], {"explanation.html", "explanation.png"}), ([], set())):
        run(photo, folder, output, "--threshold", "0", *options)
        assert {path.name for path in output.iterdir() if not path.name.startswith(".")} == of_each | more


def test_a_large_photographs_explanation_is_no_larger_than_a_screen(saved, tmp_path, writes):
    folder, processor = saved
    writes(GOOD, processor)
    Image.new("RGB", (4000, 1000), "grey").save(tmp_path / "large.png")
    result = run(tmp_path / "large.png", folder, tmp_path / "out", "--threshold", "0", "--explain")
    assert result["instances"][0]["segmentation"]["size"] == [1000, 4000], "masks are of the photograph's own size"
    page = (tmp_path / "out" / "explanation.html").read_text()
    assert 'width="1600" height="400"' in page and "4000" not in page.partition("<svg")[2][:200]


def test_no_confident_slot_is_said_to_be_no_target(saved, photo, tmp_path, writes, capsys):
    folder, processor = saved
    writes(GOOD, processor)
    result = run(photo, folder, tmp_path, "--threshold", "1")
    assert result["no_target"] is True
    assert result["instances"] == result["concepts"] == []
    assert not np.asarray(Image.open(tmp_path / "masks.png")).any()
    assert Image.open(tmp_path / "overlay.jpg").width == 1600
    assert "no target" in capsys.readouterr().out


def test_missing_concentration_tokens_are_named_and_give_no_mask(saved, photo, tmp_path, writes, capsys):
    folder, processor = saved
    writes("<think>$x_1$</think>", processor)
    result = run(photo, folder, tmp_path, "--threshold", "0")
    assert result["no_target"] is False, "the model did not say that there is nothing"
    assert result["instances"] == result["concepts"] == []
    assert (tmp_path / "overlay.jpg").exists()
    assert "no mask: the response had no concentration tokens" in capsys.readouterr().out


def test_unreadable_image_is_named(saved, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for path in (broken, tmp_path / "missing.png"):
        with pytest.raises(OSError, match=path.name):
            run(path, saved[0], tmp_path)


def test_missing_model_is_named(photo, tmp_path):
    with pytest.raises(ValueError, match="nowhere' is no folder or Hub id of a SegCompass model"):
        run(photo, tmp_path / "nowhere", tmp_path)
    (tmp_path / "photographs").mkdir()
    with pytest.raises(ValueError, match="photographs' is no folder or .* holds no config.json, so that nobody knows"):
        run(photo, tmp_path / "photographs", tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [(["photo.png"], "no instruction"), (["photo.png", "a", "--threshold", "1.5"], "--threshold: it is '1.5'")],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        segment.main(arguments)
    assert message in capsys.readouterr().err


def test_too_long_instruction_is_refused(saved, photo, tmp_path):
    with pytest.raises(ValueError, match="the limit is 300"):
        segment.main([str(photo), "x" * 400, "--model", str(saved[0]), "--output", str(tmp_path)])


def test_default_scene_is_the_row_it_says():
    from segcompass.loaders.scenes import scene_question

    noted = json.loads((EXAMPLES / "scene.json").read_text())
    scene, question = scene_question(noted["split"], noted["seed"], noted["index"])
    assert noted["instruction"] == question.instruction
    assert (np.asarray(Image.open(EXAMPLES / noted["image"])) == scene.image).all()


def test_example_is_the_command():
    command = [sys.executable, str(EXAMPLES / "segment.py"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "segcompass segment photo.jpg" in shown
