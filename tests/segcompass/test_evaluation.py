"""`segcompass evaluate` on tiny real models and drawn scenes, its main function called as the command line would."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from pycocotools import mask as coco_mask

from segcompass import evaluation
from segcompass.commands import evaluate
from segcompass.loaders import load_scenes
from segcompass.loading import load
from segcompass.modeling_segcompass import SegCompassModel
from tests.support.refer import image_name, ref, write_images, write_instances
from tests.support.scripted import noise_image

N = 14
GOOD = "<think>a red ball</think>" + "<REF_POS>" * 3
KEYS = {"sample_id", "kind", "instruction", "text", "format", "slots", "I", "U", "pred_empty", "ref_empty", "seconds"}
KEYS |= {"checksum"}


@pytest.fixture
def run(saved, tmp_path):
    """Runs the command on the first scenes of a seed and returns its metrics."""

    def run(*options, output="run"):
        arguments = ["--model", str(saved[0]), "--split", "test", "--seed", "3", "--num-samples", str(N)]
        evaluate.main([*arguments, "--batch-size", "4", "--output", str(tmp_path / output), *options])
        return json.loads((tmp_path / output / "metrics.json").read_text())

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


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
    assert (metrics["protocol"], metrics["unit"]) == ("rela", "sentence")
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


def test_killed_and_resumed_run_equals_an_uninterrupted_one(run, saved, tmp_path, writes, monkeypatch):
    writes(GOOD, saved[1])
    options = ("--threshold", "0")  # keeps every slot, so that there are masks to compare
    whole = run(*options, output="whole")
    predict = evaluation.predict

    def killed(settings, model, processor, batch, *features):
        if batch[0]["sample_id"].startswith("scenes-test-3-8-"):
            raise KeyboardInterrupt
        return predict(settings, model, processor, batch, *features)

    monkeypatch.setattr(evaluation, "predict", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*options, output="parts")
    monkeypatch.setattr(evaluation, "predict", predict)
    path = tmp_path / "parts" / "predictions.jsonl"
    assert len(lines(path)) == 8 and not (tmp_path / "parts" / "metrics.json").exists()
    torn = path.read_text()[:-40]  # the eighth line was being written
    path.write_text(torn)

    assert run(*options, output="parts") == whole
    written = lines(path)
    assert len(written) == N, "nothing is written twice"
    timed = {"seconds": 0, "checksum": ""}
    assert [record | timed for record in written] == [
        record | timed for record in lines(tmp_path / "whole" / "predictions.jsonl")
    ]
    monkeypatch.setattr(evaluation, "predict", killed)  # a finished run needs no model
    assert run(*options, output="parts") == whole


def test_an_image_that_several_rows_ask_about_is_encoded_once(saved, monkeypatch):
    model, processor = load(saved[0])
    first, second = noise_image(30, 44), noise_image(50, 40)
    images = [first, second, first.copy(), first]
    wanted = processor.encoder_inputs(images)
    with torch.no_grad():
        wanted["image_embeddings"] = model.get_image_embeddings(wanted.pop("encoder_pixel_values"))
    encode, seen = SegCompassModel.get_image_embeddings, []
    monkeypatch.setattr(
        SegCompassModel, "get_image_embeddings", lambda self, pixels: seen.append(len(pixels)) or encode(self, pixels)
    )
    found = evaluation.encode_once(model, processor, images, list("abcd"))
    assert seen == [2] and found.keys() == wanted.keys()
    for name, value in wanted.items():  # a batch of another size may be summed in another order
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="sample 'c': the image is 2000 x 1 pixels"):
        evaluation.encode_once(model, processor, [first, first, noise_image(1, 2000)], list("abc"))


def test_what_another_process_wrote_is_taken_up(run, saved, tmp_path, writes, monkeypatch):
    writes(GOOD, saved[1])
    whole = run("--threshold", "0")
    path = tmp_path / "run" / "predictions.jsonl"
    records = path.read_text().splitlines(keepends=True)
    path.write_text("".join(records[8:] + records[:4]))
    other = path.with_name("predictions.rank1.jsonl")
    other.write_text("".join(records[4:8]) + records[8])  # one was written twice
    (tmp_path / "run" / "metrics.json").unlink()
    monkeypatch.setattr(evaluation, "predict", None)  # nothing is left to predict
    assert run("--threshold", "0") == whole
    assert path.read_text() == "".join(records) and not other.exists()


def test_gallery_and_model_index(run, saved, tmp_path, writes):
    writes(GOOD.replace("red", "<b>red</b>"), saved[1])
    metrics = run("--threshold", "0")
    page = (tmp_path / "run" / "gallery.html").read_text()
    assert page.count("<figure>") == 3 * 12 and page.count("data:image/jpeg;base64,") == 3 * 12
    assert "&lt;b&gt;red" in page and "<b>red" not in page, "what a model writes is no markup"
    (entry,) = yaml.safe_load((tmp_path / "run" / "model-index.yml").read_text())["model-index"]
    assert entry["name"] == saved[0].name
    (result,) = entry["results"]
    assert result["dataset"] == {
        "name": "scenes",
        "type": "scenes",
        "split": "test",
        "args": {"unit": "sentence", "num_samples": N},
    }
    on_card = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert on_card == {f"{name} (rela)": metrics[name] for name in ("gIoU", "cIoU", "N-acc", "T-acc")}
    assert all(metric["args"] == {"protocol": "rela"} for metric in result["metrics"])
    card = ModelCard(f"---\n{yaml.safe_dump({'model-index': [entry]})}---\n")
    assert len(card.data.eval_results) == 4, "the Hub reads it"


def test_predictions_of_any_model_are_scored_by_the_same_path(run, saved, tmp_path, writes):
    writes(GOOD, saved[1])
    metrics = run("--threshold", "0")
    records = lines(tmp_path / "run" / "predictions.jsonl")

    def score(lines, *options, output):
        path = tmp_path / f"{output}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        arguments = ["--predictions", str(path), "--split", "test", "--seed", "3", "--num-samples", str(N)]
        return evaluate.main([*arguments, *options, "--output", str(tmp_path / output)])

    own = score(records, output="own")
    assert own == {name: value for name, value in metrics.items() if name != "n_format_fail"}
    theirs = [
        {"sample_id": each["sample_id"], "masks": [slot["segmentation"] for slot in each["slots"]]} for each in records
    ]
    assert score(theirs[::-1], output="theirs") == own
    assert lines(tmp_path / "theirs" / "predictions.jsonl")[0]["sample_id"] == records[0]["sample_id"]
    refused = [{"sample_id": each["sample_id"], "masks": each["masks"], "no_target": True} for each in theirs]
    assert score(refused, output="refused")["T-acc"] == 0 and own["T-acc"] == 1
    assert score(refused, "--protocol", "lisa", output="lisa")["T-acc"] == 1, "it knows the mask alone"
    assert score(theirs, "--protocol", "segcompass_released", output="released")["n_skipped"] == own["n_no_target"]

    bad = {"size": [5, 5], "counts": [25]}
    for odd, message in (
        (theirs[1:], "1 of 14 samples without a prediction"),
        ([*theirs, {"sample_id": "else", "masks": []}], "1 of 14 samples unknown, the first 'else'"),
        ([*theirs, theirs[0]], "line 15: the sample id .* repeats"),
        ([*theirs[1:], {"sample_id": theirs[0]["sample_id"], "mask": bad}], r"size \[5, 5\], its image \[128, 128\]"),
        ([*theirs[1:], {"sample_id": theirs[0]["sample_id"]}], "needs one of masks, mask, slots"),
        ([*theirs, {"masks": []}], "line 15 is no prediction"),
    ):
        with pytest.raises(ValueError, match=message):
            score(odd, output="odd")
        (tmp_path / "odd" / "run.json").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        evaluate.main(["--predictions", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "none")])


def test_a_benchmark_in_its_original_files(saved, tmp_path, writes):
    writes(GOOD, saved[1])
    write_images(tmp_path / "train2014")
    write_instances(tmp_path / "grefcoco")
    refs = [ref(1, [10], ["one", "uno"], image_id=1), ref(2, [-1], ["none"], image_id=0)]
    (tmp_path / "grefcoco" / "grefs(unc).json").write_text(json.dumps(refs))
    arguments = ["--model", str(saved[0]), "--dataset", "grefcoco", "--split", "val", "--root", str(tmp_path)]

    def score(*options, output="run"):
        return evaluate.main([*arguments, *options, "--output", str(tmp_path / output)])

    metrics = score("--image-dir", str(tmp_path / "train2014"))
    assert (metrics["n"], metrics["n_no_target"], metrics["unit"]) == (3, 1, "sentence")
    assert set(metrics["by_kind"]) == {"single", "none"}
    metrics = score("--image-dir", str(tmp_path / "train2014"), "--protocol", "himtok", output="himtok")
    assert (metrics["n"], metrics["protocol"], metrics["unit"]) == (2, "himtok", "merged")
    with pytest.raises(ValueError, match="has no image; give --image-dir"):
        score(output="blind")
    with pytest.raises(ValueError, match="cannot load split 'val' of 'grefcoco': dataset 'grefcoco' needs its root"):
        evaluate.main([*arguments[:6], "--output", str(tmp_path / "rootless")])
    Image.new("RGB", (9, 9)).save(tmp_path / "train2014" / image_name(1))
    with pytest.raises(ValueError, match=r"image of sample 'grefcoco-unc-val-1-100' has \(width, height\) \(9, 9\)"):
        score("--image-dir", str(tmp_path / "train2014"), output="small")


def test_predictions_of_another_run_are_refused_by_name(run, saved, writes):
    writes(GOOD, saved[1])
    run()
    with pytest.raises(ValueError, match=r"threshold=0\.5, this run has 0\.25"):
        run("--threshold", "0.25")
    with pytest.raises(ValueError, match="query_source='both', this run has 'tokens'"):
        run("--query-source", "tokens")
    with pytest.raises(ValueError, match="seed=3, this run has 4"):
        run("--seed", "4")


def test_closed_responses_have_their_tokens_whatever_the_model_writes(run, tmp_path):
    """The tiny random model writes none by itself, as one does that was trained with close_response."""
    run(output="open")
    run("--close-response", output="closed")
    counts = {
        name: [record["text"].count("<REF_POS>") for record in lines(tmp_path / name / "predictions.jsonl")]
        for name in ("open", "closed")
    }
    assert counts["closed"] == [3] * N and counts["open"] != counts["closed"]
    with pytest.raises(ValueError, match="close_response"):
        run("--close-response", output="open")


def test_damaged_line_is_named(run, saved, tmp_path, writes):
    writes(GOOD, saved[1])
    run()
    path = tmp_path / "run" / "predictions.jsonl"
    path.write_text(path.read_text().replace("\n", "\n{oops\n", 1))
    with pytest.raises(ValueError, match="line 2 is damaged"):
        run()


def test_folder_of_rows_without_kinds(saved, tmp_path, writes):
    writes(GOOD, saved[1])
    rows = load_scenes("val", seed=1, num_samples=3).remove_columns("kind")
    rows.save_to_disk(tmp_path / "rows")
    arguments = ["--dataset", str(tmp_path / "rows"), "--split", "val", "--query-source", "tokens"]
    metrics = evaluate.main(["--model", str(saved[0]), *arguments, "--output", str(tmp_path / "run")])
    assert metrics["n"] == 3 and "by_kind" not in metrics


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num-samples", "0"], "--num-samples: it is '0'"),
        (["--threshold", "2"], "--threshold: it is '2'"),
        (["--split", "dev"], "split='dev'"),
        (["--dataset", "nowhere"], "is not known; give one of obelics, reasonseg, refcoco"),
        (["--protocol", "mine"], "the protocol is 'mine'; choose one of rela, lisa"),
    ],
)
def test_wrong_arguments_are_named(run, options, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as stopped:
        run(*options)
    assert message in capsys.readouterr().err + str(stopped.value)


def test_a_finished_evaluation_notices_what_was_changed_since(saved, tmp_path, writes):
    """Images, masks and weights are replaced in place, some with their time and size; nothing old passes for new."""
    writes(GOOD, saved[1])
    model = tmp_path / "model"
    shutil.copytree(saved[0], model)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 10:30] = 255
    pictures = {"a.png": np.full((40, 60, 3), 90, np.uint8), "b.png": np.full((40, 60, 3), 9, np.uint8), "m.png": mask}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(tmp_path / name)
    rows = [{"image": f"{name}.png", "instruction": "the box", "mask": "m.png"} for name in "ab"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", model, "--dataset", tmp_path / "test.jsonl", "--output", tmp_path / "run"]

    def run():
        evaluate.main(list(map(str, options)))
        return json.loads((tmp_path / "run" / "metrics.json").read_text())

    first = run()
    assert run() == first
    shifted = Image.fromarray(np.roll(mask, 5, 1))
    for name, picture in (("a.png", Image.new("RGB", (60, 40))), ("m.png", shifted)):
        whole, stat = (tmp_path / name).read_bytes(), (tmp_path / name).stat()
        picture.save(tmp_path / name)
        with pytest.raises(ValueError, match="holds predictions made with rows="):
            run()
        (tmp_path / name).write_bytes(whole)
        os.utime(tmp_path / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert run() == first, "put back"
    for name in ("model.safetensors", "processor_config.json"):
        path = model / name
        whole, stat = path.read_bytes(), path.stat()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(ValueError, match="holds predictions made with weights="):
            run()
        path.write_bytes(whole)
    os.utime(model / "model.safetensors")
    assert run() == first, "a touched file is the same file"
