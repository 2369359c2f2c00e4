"""`examples/evaluate.py` on tiny real models and drawn scenes, its main function called as the command line would."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from loaders import load_scenes

ROOT = Path(__file__).parents[2]
N = 14
GOOD = "<think>a red ball</think>" + "<REF_POS>" * 3
KEYS = {"sample_id", "kind", "instruction", "text", "format", "slots", "I", "U", "pred_empty", "ref_empty", "seconds"}


@pytest.fixture(scope="module")
def script():
    """The script as a module; by path, because its name is also a library's."""
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "examples" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, saved, tmp_path):
    """Runs the script on the first scenes of a seed and returns its metrics."""

    def run(*options, output="run"):
        arguments = ["--model", str(saved[0]), "--split", "test", "--seed", "3", "--num-samples", str(N)]
        script.main([*arguments, "--batch-size", "4", "--output", str(tmp_path / output), *options])
        return json.loads((tmp_path / output / "metrics.json").read_text())

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_seconds(metrics):
    return {name: value for name, value in metrics.items() if name != "seconds"}


def union(rles):
    return np.any([coco_mask.decode(rle).astype(bool) for rle in rles], axis=0) if rles else np.zeros((128, 128), bool)


def test_metrics_are_those_of_the_written_masks(run, saved, tmp_path, writes, capsys):
    writes(GOOD, saved[1])
    run("--threshold", "0", output="all")
    scores = [slot["score"] for record in lines(tmp_path / "all" / "predictions.jsonl") for slot in record["slots"]]
    metrics = run("--threshold", str(np.median(scores)))
    rows = load_scenes("test", seed=3, num_samples=N)
    records = lines(tmp_path / "run" / "predictions.jsonl")
    assert [record["sample_id"] for record in records] == list(rows["sample_id"])
    kept = [slot["score"] for record in records for slot in record["slots"]]
    assert 0 < len(kept) < len(scores) and min(kept) >= np.median(scores)
    ious, overlap, covered, rejected = [], 0, 0, []
    for row, record in zip(rows, records, strict=True):
        assert set(record) == KEYS and (record["text"], record["format"]) == (GOOD, 1.0)
        wanted, predicted = union(row["masks"]), union([slot["segmentation"] for slot in record["slots"]])
        both, either = int((wanted & predicted).sum()), int((wanted | predicted).sum())
        assert (record["I"], record["U"]) == (both, either)
        ious.append(both / either if wanted.any() else float(not predicted.any()))
        overlap, covered = overlap + both, covered + either
        rejected += [] if wanted.any() else [not predicted.any()]
    assert metrics["gIoU"] == pytest.approx(np.mean(ious))
    assert overlap > 0, "a test of masks that never touch says nothing"
    assert metrics["cIoU"] == pytest.approx(overlap / covered)
    assert metrics["N-acc"] == pytest.approx(np.mean(rejected))
    assert (metrics["n"], metrics["n_no_target"], metrics["n_format_fail"]) == (N, len(rejected), 0)
    assert metrics["protocol"] == "rela" and metrics["seconds"] > 0
    assert {kind: part["n"] for kind, part in metrics["by_kind"].items()} == {
        kind: list(rows["kind"]).count(kind) for kind in set(rows["kind"])
    }
    shares = [part["gIoU"] * part["n"] for part in metrics["by_kind"].values()]
    assert sum(shares) == pytest.approx(metrics["gIoU"] * N)
    assert f"gIoU          {metrics['gIoU']:.4f}" in capsys.readouterr().out


def test_response_without_concentration_tokens_fails_the_format_and_predicts_nothing(run, saved, tmp_path, writes):
    writes("<think>a red ball</think>", saved[1])
    metrics = run("--threshold", "0")
    assert metrics["n_format_fail"] == N
    assert (metrics["cIoU"], metrics["N-acc"], metrics["T-acc"]) == (0.0, 1.0, 0.0)
    assert not any(record["slots"] for record in lines(tmp_path / "run" / "predictions.jsonl"))


def test_killed_and_resumed_run_equals_an_uninterrupted_one(script, run, saved, tmp_path, writes, monkeypatch):
    writes(GOOD, saved[1])
    options = ("--threshold", "0")  # keeps every slot, so that there are masks to compare
    whole = run(*options, output="whole")
    predict = script.predict

    def killed(args, model, processor, batch):
        if batch[0]["sample_id"].startswith("scenes-test-3-8-"):
            raise KeyboardInterrupt
        return predict(args, model, processor, batch)

    monkeypatch.setattr(script, "predict", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*options, output="parts")
    monkeypatch.setattr(script, "predict", predict)
    path = tmp_path / "parts" / "predictions.jsonl"
    assert len(lines(path)) == 8 and not (tmp_path / "parts" / "metrics.json").exists()
    torn = path.read_text()[:-40]  # the eighth line was being written
    path.write_text(torn)

    assert without_seconds(run(*options, output="parts")) == without_seconds(whole)
    written = lines(path)
    assert len(written) == N, "nothing is written twice"
    assert [{**record, "seconds": 0} for record in written] == [
        {**record, "seconds": 0} for record in lines(tmp_path / "whole" / "predictions.jsonl")
    ]
    monkeypatch.setattr(script, "predict", killed)  # a finished run needs no model
    assert without_seconds(run(*options, output="parts")) == without_seconds(whole)


def test_predictions_of_another_run_are_refused_by_name(run, saved, writes):
    writes(GOOD, saved[1])
    run()
    with pytest.raises(SystemExit, match=r"threshold=0\.5, this run has 0\.25"):
        run("--threshold", "0.25")
    with pytest.raises(SystemExit, match="query_source='both', this run has 'tokens'"):
        run("--query-source", "tokens")
    with pytest.raises(SystemExit, match="seed=3, this run has 4"):
        run("--seed", "4")
    for weights in saved[0].glob("*.safetensors"):
        os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 10**9))
    with pytest.raises(SystemExit, match="weights="):
        run()


def test_damaged_line_is_named(run, saved, tmp_path, writes):
    writes(GOOD, saved[1])
    run()
    path = tmp_path / "run" / "predictions.jsonl"
    path.write_text(path.read_text().replace("\n", "\n{oops\n", 1))
    with pytest.raises(SystemExit, match="line 2 is damaged"):
        run()


def test_folder_of_rows_without_kinds(script, saved, tmp_path, writes):
    writes(GOOD, saved[1])
    rows = load_scenes("val", seed=1, num_samples=3).remove_columns("kind")
    rows.save_to_disk(tmp_path / "rows")
    arguments = ["--dataset", str(tmp_path / "rows"), "--split", "val", "--query-source", "tokens"]
    metrics = script.main(["--model", str(saved[0]), *arguments, "--output", str(tmp_path / "run")])
    assert metrics["n"] == 3 and "by_kind" not in metrics


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num-samples", "0"], "--num-samples is 0"),
        (["--threshold", "2"], "--threshold is 2.0"),
        (["--split", "dev"], "split='dev'"),
        (["--dataset", "nowhere"], "neither 'scenes' nor a folder"),
    ],
)
def test_wrong_arguments_are_named(run, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert message in capsys.readouterr().err + str(stopped.value)


def test_script_finds_the_library_that_shares_its_name():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "examples/evaluate.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "predictions.jsonl" in done.stdout
