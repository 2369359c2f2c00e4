"""The white-box commands on tiny real models: what they write, resume after a kill, print and refuse."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import concatenate_datasets
from PIL import Image
from scipy import stats

from segcompass import cli
from segcompass.commands import dictionary, explain, faithfulness, interpret, segment
from segcompass.loaders import load_scenes
from segcompass.white_box.concept_dictionary import ConceptDictionary
from segcompass.white_box.examination import read_rows
from segcompass.white_box.faithfulness import FRACTIONS, ORDERS
from segcompass.white_box.figure_records import KINDS, LEVELS, RANKINGS
from segcompass.white_box.scene_attributes import ATTRIBUTES

ROOT = Path(__file__).parents[3]

GOOD = "<think>a red ball</think>" + "<REF_POS>" * 3
N = 3


# -- explain, and segment --explain ------------------------------------------------------------------------------------


@pytest.fixture
def arguments(saved, tmp_path):
    """What to explain: a picture of noise."""
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(photo)
    return [str(photo), "the ball", "--model", str(saved[0]), "--threshold", "0"]


def test_segment_explains_with_labels_when_the_model_has_a_dictionary(saved, arguments, tmp_path, writes):
    folder, processor = saved
    writes(GOOD, processor)
    segment.main([*arguments, "--explain", "--output", str(tmp_path / "plain")])
    index = json.loads((tmp_path / "plain" / "result.json").read_text())["concepts"][0]["index"]
    page = (tmp_path / "plain" / "explanation.html").read_text()
    assert f"<h3>concept {index}</h3>" in page and "roundness" not in page and "http" not in page
    assert Image.open(tmp_path / "plain" / "explanation.png").width > 1000
    entry = {"index": index, "label": "roundness", "density": 0.1, "strength": 1.0, "profile": {}, "contexts": []}
    content = {"tokens": 1, "source": "", "features": 128, "concepts": [entry]}
    (folder / "concepts.json").write_text(json.dumps(content))
    try:
        segment.main([*arguments, "--explain", "--output", str(tmp_path / "labelled")])
        page = (tmp_path / "labelled" / "explanation.html").read_text()
        assert f"<h3>roundness <span class='soft'>concept {index}</span></h3>" in page
    finally:
        (folder / "concepts.json").unlink()


def test_response_without_slots_is_not_explained(saved, arguments, tmp_path, writes, capsys):
    writes("<think>none</think>", saved[1])
    for command, options in ((segment, ["--explain"]), (explain, [])):
        command.main([*arguments, *options, "--output", str(tmp_path / "none")])
        assert "nothing to explain" in capsys.readouterr().out
        assert not (tmp_path / "none" / "explanation.html").exists()


def test_explain_writes_the_page_that_segment_writes(saved, arguments, tmp_path, writes):
    writes(GOOD, saved[1])
    segment.main([*arguments, "--explain", "--output", str(tmp_path / "segment")])
    explain.main([*arguments, "--output", str(tmp_path / "explain")])
    pages = [(tmp_path / name / "explanation.html").read_text() for name in ("segment", "explain")]
    assert pages[0] == pages[1]
    assert sorted(file.name for file in (tmp_path / "explain").iterdir()) == ["explanation.html", "explanation.png"]
    explain.main([*arguments, "--threshold", "1", "--output", str(tmp_path / "none_kept")])
    page = (tmp_path / "none_kept" / "explanation.html").read_text()
    assert page.count("<h2>") == 1, "the most confident slot is shown when none is kept"


# -- faithfulness ---------------------------------------------------------------------------------------------------


def measure(saved, output, *options):
    arguments = ["--model", str(saved[0]), "--seed", "3", "--num-samples", str(N), "--batch-size", "2", "--draws", "2"]
    return faithfulness.main([*arguments, "--output", str(output), *options])


def test_right_masks_are_measured_and_a_killed_run_goes_on(saved, tmp_path, writes, monkeypatch, capsys):
    writes(GOOD, saved[1])
    for name in ("RIGHT", "CONFIDENT"):  # a random model's masks are never right
        monkeypatch.setattr(f"segcompass.white_box.faithfulness_records.{name}", 0.0)
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
    monkeypatch.setattr("segcompass.loading.load", None)  # a finished run needs no model
    assert measure(saved, parts) == whole
    assert "ratio of medians" in capsys.readouterr().out
    with pytest.raises(ValueError, match="draws=2, this run has 3"):
        measure(saved, parts, "--draws", "3")


def test_without_a_right_mask_only_the_ablation_is_reported(saved, tmp_path, writes, capsys):
    writes("<think>nothing</think>", saved[1])
    metrics = measure(saved, tmp_path)
    said = capsys.readouterr().out
    assert metrics["masks"] == 0 and "0 right masks in 0 scenes" in said and "no curves are written" in said


def test_script_finds_the_metrics_library_that_shares_a_name_with_its_neighbour():
    command = [sys.executable, "examples/faithfulness.py", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "metrics.json" in done.stdout


# -- interpret ------------------------------------------------------------------------------------------------------


def test_figures_come_with_their_data(saved, tmp_path, writes, capsys):
    writes(GOOD, saved[1])
    arguments = ["--model", str(saved[0]), "--seed", "3", "--num-samples", "18", "--batch-size", "6", "--panels", "2"]
    summary = interpret.main([*arguments, "--output", str(tmp_path)])
    for name in ("figure4", "figure5", "figure8", "figure9"):
        assert Image.open(tmp_path / f"{name}.png").width > 300
    rows = list(csv.DictReader((tmp_path / "figure4.csv").open()))
    assert len(rows) == len(KINDS) * len(LEVELS)
    for kind in KINDS:
        curve = summary["figure4"][kind]
        assert curve == sorted(curve, reverse=True) and curve[0] > 0, "a higher threshold leaves fewer features"
    for ranking in RANKINGS:
        curve = summary["figure5"][ranking]
        assert curve == sorted(curve) and 0 <= curve[0] < curve[-1] <= 1
    # all image tokens cover what the MLLM sees: the whole of a square scene
    assert summary["figure5"]["random"][-1] == pytest.approx(1)
    records = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    pairs = [pair for item in records for pair in item["pairs"]]
    points = list(csv.DictReader((tmp_path / "figure8_heatmap.csv").open()))
    assert [[float(value) for value in row.values()] for row in points] == pairs
    assert "sae" not in summary["figure8"], "18 samples are two points"
    assert re.search(r"^sae +not measured: fewer than three points", capsys.readouterr().out, re.M)
    if "heatmap" in summary["figure8"]:
        expected = stats.pearsonr(*np.array(pairs).T)
        assert summary["figure8"]["heatmap"]["r"] == pytest.approx(expected.statistic)
        assert summary["figure8"]["heatmap"]["p"] == pytest.approx(expected.pvalue)


# -- dictionary ---------------------------------------------------------------------------------------------


def test_dictionary_is_built_resumed_saved_and_scored(saved, tmp_path, writes, capsys):
    folder, _ = saved
    small = ["--num-samples", "40", "--held-out-samples", "40", "--batch-size", "20", "--contexts", "3"]
    arguments = ["--model", str(folder), *small]
    scores = dictionary.main([*arguments, "--output", str(tmp_path / "whole"), "--save-to", str(tmp_path)])
    assert scores["word"] == {}, "this tokenizer's pieces are letters"
    for reading in ("scene", "patch"):
        assert len(scores[reading]) > 10
        assert all(0 <= cell["f1"] <= 1 for cell in scores[reading].values())
    printed = capsys.readouterr().out
    assert f"of {len(ATTRIBUTES)} attributes with F1 >= 0.8" in printed
    concepts = ConceptDictionary.from_pretrained(str(tmp_path))
    assert (tmp_path / "whole" / "partial.pt").exists() and not (tmp_path / "whole" / "partial.new").exists()
    assert len(concepts.entries) == 128 and concepts.labels
    page = (tmp_path / "whole" / "dictionary.html").read_text()
    assert "data:image/jpeg;base64" in page and "http" not in page
    patches = [c for entry in concepts.entries for c in entry.contexts if c.part == "image"]
    assert patches and all(c.text for c in patches)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["faithfulness", "interpret", "dictionary"])
@pytest.mark.parametrize(
    "options, message",
    [
        (["--num-samples", "0"], "argument --num-samples: it is '0'; it must be a whole number of at least 1"),
        (["--split", "dev"], "split='dev'"),
        (["--dataset", "nowhere"], "is not known; give one of"),
        (["--model", "nowhere"], "nowhere' is no folder or Hub id of a SegCompass model"),
    ],
)
def test_wrong_arguments_are_named(command, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--model", "nowhere", "--num-samples", "2", "--output", str(tmp_path), *options])
    assert message in capsys.readouterr().err and stopped.value.code in (1, 2)


def test_rows_that_repeat_a_sample_id_are_refused(tmp_path):
    rows = load_scenes("test", 3, 2)
    concatenate_datasets([rows, rows]).save_to_disk(tmp_path / "twice")
    with pytest.raises(ValueError, match=r"repeats sample ids \(2 in 4 rows\)"):
        read_rows(str(tmp_path / "twice"), "test", 0, 10)
