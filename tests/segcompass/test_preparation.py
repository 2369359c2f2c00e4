"""`segcompass prepare-data` on small files in the released formats."""

import functools
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from segcompass import preparation
from segcompass.commands import prepare_data
from segcompass.loaders import load_obelics, load_refcoco, load_rows
from segcompass.loaders.obelics import image_name as stored_name
from segcompass.loaders.published import compare
from tests.support.refer import image_name, ref, write_images, write_instances

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def arguments(tmp_path):
    write_images(tmp_path / "train2014")
    write_instances(tmp_path / "grefcoco")
    refs = [ref(n, [10], [f"sentence {n}", f"other {n}"], image_id=1) for n in range(5)]
    refs += [ref(5, [-1], ["nothing"], image_id=0), ref(6, [11, 14], ["both"], "testA", image_id=2)]
    (tmp_path / "grefcoco" / "grefs(unc).json").write_text(json.dumps(refs))
    return ["grefcoco", "--root", str(tmp_path), "--image-dir", str(tmp_path / "train2014"), "--split", "val", "testA"]


@pytest.mark.parametrize("images", ["paths", "bytes"])
def test_converted_rows_are_those_of_the_loader(arguments, tmp_path, images, capsys):
    folder = tmp_path / "out"
    prepare_data.main([*arguments, "--images", images, "--rows-per-file", "4", "--output", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [
        "held_out.json",
        "manifest.json",
        "prepared.json",
        "testA-00000-of-00001.parquet",
        "testA.json",
        *(f"val-0000{n}-of-00003.parquet" for n in range(3)),
        "val.json",
    ]
    direct = load_refcoco(tmp_path, "grefcoco", split="val", image_dir=tmp_path / "train2014")
    if images == "bytes":
        for number in range(3):
            (tmp_path / "train2014" / image_name(number)).rename(tmp_path / image_name(number))
    rows = load_rows(str(folder), "val")
    assert rows.features == direct.features
    for name in set(direct.column_names) - {"image"}:
        assert list(rows[name]) == list(direct[name])
    assert np.asarray(rows[0]["image"]).shape == (24, 32, 3)
    assert len(load_rows(str(folder), "val", num_samples=3)) == 3
    assert len(list(load_rows(str(folder), "val", streaming=True))) == 11
    table = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert table[0] == ["split", "rows", "refs", "images", "no", "target", "multi-target", "check"]
    assert table[1][:6] == ["val", "11", "6", "2", "1", "0"] and table[2][:6] == ["testA", "1", "1", "1", "0", "1"]
    assert " ".join(table[1][6:]) == "2 images, published 1,500"


def test_interrupted_conversion_resumes(arguments, tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, str(ROOT / "examples" / "prepare_data.py"), *arguments, "--rows-per-file", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen([*command, "--output", str(folder)], env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(folder.glob("val-*.parquet"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("val-*.parquet")}  # whole files
    assert len(done) >= 2
    prepare_data.main([*arguments, "--rows-per-file", "1", "--output", str(folder)])
    assert len(list(folder.glob("*.parquet"))) == 12 and not list(folder.glob("*.part"))
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what was written is not written again"
    assert len(set(load_rows(str(folder), "val")["sample_id"])) == 11
    with pytest.raises(ValueError, match="holds a conversion with unit='sentence', this run has 'ref'"):
        prepare_data.main([*arguments, "--rows-per-file", "1", "--unit", "ref", "--output", str(folder)])


def test_image_of_another_size_than_its_masks_is_named(arguments, tmp_path):
    Image.new("RGB", (24, 32)).save(tmp_path / "train2014" / image_name(1))
    with pytest.raises(ValueError, match=r"000000000001\.jpg has \(height, width\) \(32, 24\), the masks of sample"):
        prepare_data.main([*arguments, "--output", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="needs its root"):
        prepare_data.main(["reasonseg", "--output", str(tmp_path / "rootless")])


def test_published_sizes():
    found = {"rows": 10_834, "refs": 3_811, "images": 1_500}
    assert compare("refcoco", "unc", "val", "sentence", found) == "as published"
    assert compare("refcoco", "unc", "val", "ref", found) == "10,834 rows, published 3,811"
    assert compare("refcoco", "google", "val", "ref", found) == "nothing published"
    assert compare("grefcoco", "unc", "testA", "ref", found) == "1,500 images, published 750"


def test_all_splits_of_a_jsonl_are_converted_and_shared_images_told(tmp_path, capsys):
    for name in "abc":
        Image.new("RGB", (30, 20)).save(tmp_path / f"{name}.png")

    def convert(*lines, output="out", more=()):
        lines = [{"image": f"{image}.png", "instruction": "it", "masks": [], **more} for image, more in lines]
        (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return prepare_data.main([str(tmp_path / "mine.jsonl"), "--output", str(tmp_path / output), *more])

    table = convert(*[("a", {"split": "train"}), ("b", {"split": "train"}), ("a", {"split": "val"})])
    assert [(line["split"], line["rows"]) for line in table] == [("train", 2), ("val", 1)] and "check" not in table[0]
    assert "train and val share 1 image (a.png): results on val then are of images that" in capsys.readouterr().out
    assert len(load_rows(str(tmp_path / "out"), "val")) == 1
    convert(*[("a", {"split": "train"}), ("b", {"split": "val"})], output="apart")
    assert "share" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="'train' and 'val' of .*mine.jsonl both hold the sample 'mine-1'.*Say on"):
        convert(("a", {}), ("b", {}), output="both", more=["--split", "train", "val"])


def test_a_changed_source_is_not_mixed_into_a_conversion(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    Image.new("L", (30, 20), 255).save(tmp_path / "m.png")
    lines = [{"image": "a.png", "instruction": f"old {n}", "mask": "m.png"} for n in range(2)]

    def convert(lines, output="out", images="paths"):
        (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = [str(tmp_path / "mine.jsonl"), "--output", str(tmp_path / output), "--rows-per-file", "1"]
        prepare_data.main([*command, "--images", images])

    convert(lines)
    convert(lines)
    for changed in (
        [{**line, "instruction": "new"} for line in lines],
        [{**line, "reasoning": "new"} for line in lines],
        [*lines, {**lines[0], "instruction": "one more"}],
    ):
        with pytest.raises(ValueError, match="holds a conversion of 'train' with .*choose another --output"):
            convert(changed)
    assert load_rows(str(tmp_path / "out"))["instruction"][:] == ["old 0", "old 1"]
    Image.fromarray(np.eye(20, 30, dtype=bool)).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="holds a conversion of 'train' with content="):
        convert(lines)
    convert(lines, "bytes", "bytes")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="holds a conversion of 'train' with content="):
        convert(lines, "bytes", "bytes")
    for gone, message in (("train-00001-of-00002.parquet", "holds 1 of the 2 files train-*"), ("train.json", "but no")):
        (tmp_path / "out" / gone).unlink()
        with pytest.raises(ValueError, match=message.replace("*", r"\*")):
            convert(lines) if gone == "train.json" else load_rows(str(tmp_path / "out"))


def test_obelics_images_are_fetched_and_become_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SEGCOMPASS_LOCAL_URLS", "1")
    web = tmp_path / "web"
    write_images(web)
    (web / "broken.jpg").write_bytes(b"no picture")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(web))
    handler.log_message = lambda *args: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}"
    pictures = [f"{site}/{image_name(0)}", f"{site}/{image_name(1)}", f"{site}/broken.jpg", f"{site}/gone.jpg"]
    documents = {
        "images": [[None, pictures[0], None, pictures[1]], [pictures[2], None, pictures[3], None], [pictures[0]]],
        "texts": [["before  the first", None, "between them", None], [None, "a", None, "b"], [None]],
    }
    (tmp_path / "docs").mkdir()
    pq.write_table(pa.table(documents), tmp_path / "docs" / "train-00000-of-00001.parquet")
    arguments = ["obelics", "--root", str(tmp_path / "docs"), "--image-dir", str(tmp_path / "pictures")]
    prepare_data.main([*arguments, "--download", "10", "--output", str(tmp_path / "out")])
    monkeypatch.delenv("SEGCOMPASS_LOCAL_URLS")
    assert not preparation.fetch(pictures[0], tmp_path), "not from this machine, unless asked"
    assert not preparation.fetch((web / image_name(0)).as_uri(), tmp_path), "no files"
    server.shutdown()
    assert "fetched 2 of 4 images; 0 were there" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {stored_name(each) for each in pictures[:2]}
    first, second = load_rows(str(tmp_path / "out"))
    assert (first["instruction"], first["reasoning"]) == ("before the first", "between them")
    assert (second["instruction"], second["reasoning"]) == ("between them", "between them")
    assert first["image"].size == (first["width"], first["height"]) == (32, 24)
    with pytest.warns(UserWarning, match="left out, image not on disk or not readable: obelics-1-0, obelics-1-2"):
        rows = load_obelics(tmp_path / "docs", tmp_path / "pictures", num_samples=None, max_characters=9)
    assert (rows[0]["instruction"], rows[0]["reasoning"]) == ("first", "between")
