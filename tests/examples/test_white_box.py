"""The white-box commands on tiny real models: what they write, resume after a kill, refuse, and the sums they print."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import concept_dictionary
import faithfulness
import interpret
import journal
import numpy as np
import pytest
import segment
from PIL import Image
from scipy import stats

from segcompass.loaders.scene_drawing import draw_scene
from segcompass.loaders.scenes import scene_question
from segcompass.modeling_segcompass.concept_dictionary import ConceptDictionary
from segcompass.modeling_segcompass.faithfulness import FRACTIONS, ORDERS

GOOD = "<think>a red ball</think>" + "<REF_POS>" * 3
N = 3


# -- segment.py --explain ----------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(saved, tmp_path):
    """Of segment.py, to explain a picture of noise."""
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(photo)
    return [str(photo), "the ball", "--model", str(saved[0]), "--threshold", "0", "--explain"]


def test_segment_explains_with_labels_when_the_model_has_a_dictionary(saved, arguments, tmp_path, writes):
    folder, processor = saved
    writes(GOOD, processor)
    segment.main([*arguments, "--output", str(tmp_path / "plain")])
    index = json.loads((tmp_path / "plain" / "result.json").read_text())["concepts"][0]["index"]
    page = (tmp_path / "plain" / "explanation.html").read_text()
    assert f"concept {index}</b>" in page and "roundness" not in page and "http" not in page
    assert Image.open(tmp_path / "plain" / "explanation.png").width > 1000
    entry = {"index": index, "label": "roundness", "density": 0.1, "strength": 1.0, "profile": {}, "contexts": []}
    content = {"tokens": 1, "source": "", "features": 128, "concepts": [entry]}
    (folder / "concepts.json").write_text(json.dumps(content))
    try:
        segment.main([*arguments, "--output", str(tmp_path / "labelled")])
        assert f"concept {index}</b> roundness" in (tmp_path / "labelled" / "explanation.html").read_text()
    finally:
        (folder / "concepts.json").unlink()


def test_response_without_slots_is_not_explained(saved, arguments, tmp_path, writes, capsys):
    writes("<think>none</think>", saved[1])
    segment.main([*arguments, "--output", str(tmp_path / "none")])
    assert "nothing to explain" in capsys.readouterr().out and not (tmp_path / "none" / "explanation.html").exists()


# -- faithfulness.py ---------------------------------------------------------------------------------------------------


def measure(saved, output, *options):
    arguments = ["--model", str(saved[0]), "--seed", "3", "--num-samples", str(N), "--batch-size", "2", "--draws", "2"]
    return faithfulness.main([*arguments, "--output", str(output), *options])


def test_right_masks_are_measured_and_a_killed_run_goes_on(saved, tmp_path, writes, monkeypatch, capsys):
    writes(GOOD, saved[1])
    monkeypatch.setattr(faithfulness, "RIGHT", 0.0)  # a random model's masks are never right
    monkeypatch.setattr(faithfulness, "CONFIDENT", 0.0)
    whole = measure(saved, tmp_path / "whole")
    assert whole["scenes"] == N and whole["masks"] > 0
    assert whole["ablation"].keys() == {"both", "tokens", "concepts"}
    rows = list(csv.DictReader((tmp_path / "whole" / "curves.csv").open()))
    assert len(rows) == 2 * len(ORDERS) * len(FRACTIONS)
    assert (tmp_path / "whole" / "curves.png").exists()
    items = (tmp_path / "whole" / "items.jsonl").read_text().splitlines()
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "run.json").write_text((tmp_path / "whole" / "run.json").read_text())
    (parts / "items.jsonl").write_text("\n".join(items[:2]) + "\n" + items[2][:50])  # the third was being written
    assert measure(saved, parts) == whole
    assert (parts / "items.jsonl").read_text().splitlines() == items
    monkeypatch.setattr(faithfulness, "load", None)  # a finished run needs no model
    assert measure(saved, parts) == whole
    assert "ratio of medians" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="draws=2, this run has 3"):
        measure(saved, parts, "--draws", "3")


def test_without_a_right_mask_only_the_ablation_is_told(saved, tmp_path, writes, capsys):
    writes("<think>nothing</think>", saved[1])
    metrics = measure(saved, tmp_path)
    assert metrics["masks"] == 0 and "0 right masks in 0 scenes" in capsys.readouterr().out


def record(name, drops):
    """A sample whose slots fall by these (top, random) amounts."""
    curve = {order: [1.0] * len(FRACTIONS) for order in ORDERS}
    slots = [
        {
            "slot": 0,
            "full": 0.8,
            "deletion": curve,
            "insertion": curve,
            "without_top": 0.8 - top,
            "without_random": 0.8 - random,
            "only_top": 0.7,
            "only_random": 0.2,
        }
        for top, random in drops
    ]
    counts = {"I": 1, "U": 2, "pred_empty": False, "ref_empty": False}
    return {"sample_id": name, "counts": dict.fromkeys(faithfulness.SOURCES, counts), "slots": slots}


def test_ratio_is_of_the_medians_and_of_the_means():
    metrics = faithfulness.analyse([record("a", [(0.6, 0.1), (0.2, 0.1)]), record("b", [(0.4, 0.1)])], 5)
    assert (metrics["masks"], metrics["scenes_with_masks"]) == (3, 2)
    assert metrics["drop_top_median"][0] == pytest.approx(0.4)
    assert metrics["ratio_of_medians"][0] == pytest.approx(4)
    assert metrics["ratio_of_means"][0] == pytest.approx(4)
    assert metrics["sufficiency"][0] == pytest.approx(0.1)
    assert metrics["sufficiency_random"][0] == pytest.approx(0.6)
    assert metrics["deletion"]["weight"]["auc"][0] == pytest.approx(1)
    low, high = metrics["ratio_of_medians"][1:]
    assert low <= 4 + 1e-9 and high >= 4 - 1e-9


def test_ratio_over_nothing_is_infinite_or_unknown():
    assert faithfulness.ratio(0.3, 0.0) == float("inf") and np.isnan(faithfulness.ratio(0.0, 0.0))


def test_script_finds_the_metrics_library_that_shares_a_name_with_its_neighbour():
    root = Path(faithfulness.__file__).parents[1]
    command = [sys.executable, "examples/faithfulness.py", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "metrics.json" in done.stdout


# -- interpret.py ------------------------------------------------------------------------------------------------------


def test_figures_come_with_their_data(saved, tmp_path, writes):
    writes(GOOD, saved[1])
    arguments = ["--model", str(saved[0]), "--seed", "3", "--num-samples", "18", "--batch-size", "6", "--panels", "2"]
    summary = interpret.main([*arguments, "--output", str(tmp_path)])
    for name in ("figure4", "figure5", "figure8", "figure9"):
        assert Image.open(tmp_path / f"{name}.png").width > 300
    rows = list(csv.DictReader((tmp_path / "figure4.csv").open()))
    assert len(rows) == len(interpret.KINDS) * len(interpret.LEVELS)
    for kind in interpret.KINDS:
        curve = summary["figure4"][kind]
        assert curve == sorted(curve, reverse=True) and curve[0] > 0, "a higher threshold leaves fewer features"
    for ranking in interpret.RANKINGS:
        curve = summary["figure5"][ranking]
        assert curve == sorted(curve) and 0 <= curve[0] < curve[-1] <= 1
    # all image tokens cover what the MLLM sees: the whole of a square scene
    assert summary["figure5"]["random"][-1] == pytest.approx(1)
    records = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    pairs = [pair for item in records for pair in item["pairs"]]
    points = list(csv.DictReader((tmp_path / "figure8_heatmap.csv").open()))
    assert [[float(value) for value in row.values()] for row in points] == pairs
    if "heatmap" in summary["figure8"]:
        expected = stats.pearsonr(*np.array(pairs).T)
        assert summary["figure8"]["heatmap"]["r"] == pytest.approx(expected.statistic)
        assert summary["figure8"]["heatmap"]["p"] == pytest.approx(expected.pvalue)


def test_band_of_the_regression_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        x = rng.uniform(size=25)
        y = 1 + 2 * x + rng.normal(size=25)
        at, low, high = interpret.confidence_band(x, y, stats.linregress(x, y))
        covered.append(low[20] <= 1 + 2 * at[20] <= high[20])
    assert np.mean(covered) == pytest.approx(0.95, abs=0.035)  # three standard errors of 400 trials


def test_pixels_belong_to_the_patch_that_sees_them(saved):
    image = Image.new("RGB", (60, 40))
    patches = interpret.patches_of_pixels(saved[1].image_processor, image, (4, 4))
    assert patches.shape == (40, 60)
    crops = getattr(saved[1].image_processor, "do_center_crop", False)
    assert patches[0, 0] == (-1 if crops else 0)
    assert (patches[0, 10], patches[39, 49]) == ((0, 15) if crops else (0, 15))
    shown = np.bincount(patches[patches >= 0], minlength=16)
    assert (shown == shown[0]).all(), "equal patches"


# -- concept_dictionary.py ---------------------------------------------------------------------------------------------


def test_dictionary_is_built_resumed_saved_and_scored(saved, tmp_path, writes, capsys):
    folder, _ = saved
    small = ["--num-samples", "40", "--held-out-samples", "40", "--batch-size", "20", "--contexts", "3"]
    arguments = ["--model", str(folder), *small]
    scores = concept_dictionary.main([*arguments, "--output", str(tmp_path / "whole"), "--save-to", str(tmp_path)])
    assert scores["word"] == {}, "this tokenizer's pieces are letters"
    for reading in ("scene", "patch"):
        assert len(scores[reading]) > 10
        assert all(0 <= cell["f1"] <= 1 for cell in scores[reading].values())
    printed = capsys.readouterr().out
    assert f"of {len(concept_dictionary.ATTRIBUTES)} attributes with F1 >= 0.8" in printed
    dictionary = ConceptDictionary.from_pretrained(str(tmp_path))
    assert (tmp_path / "whole" / "partial.pt").exists() and not (tmp_path / "whole" / "partial.new").exists()
    assert len(dictionary.entries) == 128 and dictionary.labels
    page = (tmp_path / "whole" / "dictionary.html").read_text()
    assert "data:image/jpeg;base64" in page and "http" not in page
    patches = [c for entry in dictionary.entries for c in entry.contexts if c.part == "image"]
    assert patches and all(c.text for c in patches)


def test_shares_of_patches_are_those_of_the_masks():
    scene = draw_scene(np.random.default_rng(0), "train")
    shares = concept_dictionary.patch_shares(scene, (4, 8))
    for place, word in enumerate(concept_dictionary.ATTRIBUTES):
        wanted = [word in (thing.colour, thing.shape, thing.size) for thing in scene.objects]
        union = scene.masks[wanted].any(0) if any(wanted) else np.zeros((128, 128), bool)
        assert shares[place].reshape(4, 8)[1, 2] == pytest.approx(union[32:64, 32:48].mean())
    number = next(n for n in range(50) if len(scene_question("train", 0, n)[0].objects) == 3)
    words = concept_dictionary.patch_words("train", 0, number, (8, 8))
    assert len(words) == 64 and "ground" in words and any(len(word.split()) == 3 for word in words)


# -- journal -----------------------------------------------------------------------------------------------------------


def test_damaged_line_is_named(tmp_path):
    journal.Journal(tmp_path, {"a": 1}).add([{"sample_id": "x"}])
    (tmp_path / "items.jsonl").write_text('{"sample_id": "x"}\n{oops\n')
    with pytest.raises(SystemExit, match="line 2 is damaged"):
        journal.Journal(tmp_path, {"a": 1})
    with pytest.raises(SystemExit, match="a=1, this run has 2"):
        journal.Journal(tmp_path, {"a": 2})


@pytest.mark.parametrize("script", [faithfulness, interpret, concept_dictionary])
@pytest.mark.parametrize(
    "options, message",
    [
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--split", "dev"], "split='dev'"),
        (["--dataset", "nowhere"], "is not known; give one of"),
        (["--model", "nowhere"], "nowhere' is no folder or Hub id of a SegCompass model"),
    ],
)
def test_wrong_arguments_are_named(script, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--model", "nowhere", "--num-samples", "2", "--output", str(tmp_path), *options])
    assert message in capsys.readouterr().err + str(stopped.value)
