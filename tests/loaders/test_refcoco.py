"""RefCOCO and gRefCOCO in the released formats, with the odd cases of tests/support/refer.py."""

import json
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from segcompass.loaders import load_refcoco
from segcompass.loaders.masks import coco_rle
from segcompass.loaders.rows import FEATURES
from tests.support.refer import (
    ANNOTATIONS,
    HEIGHT,
    WIDTH,
    image_name,
    python2_pickle,
    ref,
    write_images,
    write_instances,
)

REFS = [
    ref(1, 10, ["the box", "left box"]),
    ref(2, 11, ["two parts", " ", "the other"]),
    ref(3, 12, ["degenerate polygons beside"]),
    ref(4, 13, ["a crowd"]),
    ref(5, 14, ["leaves the image"]),
    ref(6, 15, ["run lengths"]),
    ref(7, 10, ["of another split"], split="testA"),
]
GREFS = [
    ref(1, [10], ["one"], image_id=1),
    ref(2, [-1], ["nothing", "nobody"], image_id=0),
    ref(3, [10, 13, 16], ["one of three is usable"], image_id=1),
    ref(4, [11, 14], ["two", "both"], image_id=2),
]


@pytest.fixture
def root(tmp_path):
    """RefCOCO as Python 2 pickled it, and gRefCOCO as JSON."""
    write_images(tmp_path / "train2014")
    for name in ("refcoco", "grefcoco"):
        write_instances(tmp_path / name)
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(python2_pickle(REFS))
    (tmp_path / "grefcoco" / "grefs(unc).json").write_text(json.dumps(GREFS))
    return tmp_path


def load(root, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return load_refcoco(root, **{"image_dir": root / "train2014", **options})


def union(rles):
    if not rles:
        return np.zeros((HEIGHT, WIDTH), dtype=bool)
    return np.any([coco_mask.decode(rle).astype(bool) for rle in rles], axis=0)


def test_rows_have_the_one_schema_and_the_right_masks(root):
    rows = load(root)
    assert rows.features == FEATURES
    assert list(rows["instruction"]) == [
        *("the box", "left box", "two parts", "the other", "degenerate polygons beside", "a crowd"),
        *("leaves the image", "run lengths"),
    ]
    wanted = [10, 10, 11, 11, 12, 13, 14, 15]
    for row, annotation in zip(rows, wanted, strict=True):
        assert len(row["masks"]) == 1, "the polygons of an instance are one mask"
        assert (union(row["masks"]) == ANNOTATIONS[annotation][2]).all()
        assert row["image_id"] == str(annotation % 3)
        assert row["image"].filename.endswith(image_name(annotation % 3)), "the name is that of instances.json"
        assert row["image"].size == (row["width"], row["height"]) == (WIDTH, HEIGHT)
    first = {name: value for name, value in rows[0].items() if name not in ("image", "masks")}
    assert first == {
        "image_id": "1",
        "sample_id": "refcoco-unc-val-1-100",
        "dataset": "refcoco",
        "split": "val",
        "instruction": "the box",
        "reasoning": None,
        "ignore": None,
        "height": HEIGHT,
        "width": WIDTH,
        "kind": "single",
    }
    assert len(set(rows["sample_id"])) == len(rows)


def test_no_target_several_targets_and_crowds_of_grefcoco(root):
    rows = load(root, name="grefcoco")
    assert list(rows["kind"]) == ["single", "none", "none", "single", "multi", "multi"]
    assert rows[1]["masks"] == [] and rows[1]["instruction"] == "nothing"
    (mask,) = rows[3]["masks"]
    assert (union([mask]) == ANNOTATIONS[10][2]).all(), "the crowd and the instance without a polygon are left out"
    assert [bool((union([rle]) == ANNOTATIONS[a][2]).all()) for rle, a in zip(rows[4]["masks"], (11, 14), strict=True)]
    assert (union(rows[4]["masks"]) == ANNOTATIONS[11][2] | ANNOTATIONS[14][2]).all()


def test_units(root):
    refs = load(root, unit="ref")
    assert list(refs["instruction"])[:2] == ["the box", "two parts"] and len(refs) == 6
    merged = load(root, unit="merged")
    assert merged[0]["instruction"] == "Meet all the descriptions: 1. the box. 2. left box."
    assert merged[1]["instruction"] == "Meet all the descriptions: 1. two parts. 2. the other."
    assert merged[1]["masks"] == refs[1]["masks"] and len(merged) == 6
    with pytest.raises(ValueError, match="unit='image' is not one of sentence, ref, merged"):
        load(root, unit="image")


def test_what_is_left_out_is_counted(root):
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([*REFS, ref(8, 16, ["x"]), ref(9, 17, ["y"])]))
    with pytest.warns(UserWarning) as warned:
        rows = load_refcoco(root, image_dir=root / "train2014")
    messages = [str(each.message) for each in warned if "left out" in str(each.message)]
    assert messages == [
        "1 left out, blank expressions: ref 2",
        "2 left out, refs without a usable mask: ref 8, ref 9",
    ]
    assert len(rows) == 8
    with pytest.warns(UserWarning, match="1 left out, instances without a polygon inside the image: annotation 16"):
        load_refcoco(root, "grefcoco", image_dir=root / "train2014")


def test_python_3_pickles_other_splits_and_fewer_rows(root):
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(REFS))
    assert list(load(root, split="testA")["instruction"]) == ["of another split"]
    assert load(root, num_samples=3)["sample_id"] == load(root)["sample_id"][:3]
    with pytest.raises(ValueError, match="num_samples=0 is below 1"):
        load(root, num_samples=0)


def test_a_changed_file_is_read_again(root):
    assert len(load(root, name="grefcoco")) == 6
    (root / "grefcoco" / "grefs(unc).json").write_text(json.dumps(GREFS[:1]))
    assert len(load(root, name="grefcoco")) == 1


def test_streamed_rows_are_the_same(root):
    rows, streamed = load(root), list(load(root, streaming=True))
    assert [row["masks"] for row in streamed] == list(rows["masks"])
    assert [row["sample_id"] for row in streamed] == list(rows["sample_id"])
    assert streamed[0]["image"].size == (WIDTH, HEIGHT)
    assert len(list(load(root, streaming=True, num_samples=2))) == 2


def test_masks_alone_need_no_images(root):
    rows = load(root, image_dir=None)
    assert rows["image"][0] is None and rows["masks"] == load(root)["masks"]


def test_missing_files_are_named_with_where_to_find_them(root):
    for number in (0, 2):
        (root / "train2014" / image_name(number)).unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images are not in .*_000000000000\.jpg, .*train2014\.zip"):
        load(root)
    load(root, num_samples=1)  # needs image 1 only
    with pytest.raises(FileNotFoundError, match=r"nowhere is missing; `image_dir` is the folder of COCO's train2014"):
        load(root, image_dir=root / "nowhere")
    (root / "refcoco" / "refs(unc).p").unlink()
    with pytest.raises(FileNotFoundError, match=r"refs\(unc\)\.p is missing; .*refcoco\.zip.*REFER"):
        load(root)
    (root / "grefcoco" / "instances.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"instances\.json is missing; .*henghuiding/gRefCOCO"):
        load(root, name="grefcoco")


def test_wrong_names_are_told(root):
    with pytest.raises(ValueError, match="name='refclef' is not one of refcoco"):
        load(root, name="refclef")
    with pytest.raises(ValueError, match="split_by='umd' does not exist for refcoco; choose from unc, google"):
        load(root, split_by="umd")
    with pytest.raises(ValueError, match=r"has no split 'test'; it has testA, val"):
        load(root, split="test")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("instances.json", b'{"images": [', r"instances\.json is truncated or no JSON"),
        ("instances.json", b"[]", "is not a COCO annotation file"),
        ("refs(unc).p", pickle.dumps(REFS)[:-20], r"refs\(unc\)\.p is truncated"),
        ("refs(unc).p", pickle.dumps([{"ref_id": 1}]), "is not a list of refs with the keys ann_id"),
        ("refs(unc).p", pickle.dumps([ref(1, 10, ["x"]), ref(1, 10, ["x"])]), "'refcoco-unc-val-1-100' repeats"),
        ("refs(unc).p", pickle.dumps([ref(1, 99, ["x"])]), "ref 1 is about annotation 99 of image 0"),
        ("refs(unc).p", pickle.dumps([ref(1, 10, ["x"], image_id=2)]), "ref 1 is about annotation 10 of image 2"),
        ("refs(unc).p", pickle.dumps([ref(1, 10, ["x"], image_id=7)]), "ref 1 is about image 7"),
        ("refs(unc).p", pickle.dumps([ref(1, 16, ["x"])]), "no usable rows"),
    ],
)
def test_damaged_content_is_named(root, file, content, message):
    (root / "refcoco" / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(root)


def test_run_lengths_of_another_size_are_named(root):
    write_instances(root / "refcoco", {10: ({"size": [5, 5], "counts": [25]}, 0, None)})
    (root / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(REFS[:1]))
    with pytest.raises(ValueError, match=r"annotation 10: an RLE has size \[5, 5\], its image \[24, 32\]"):
        load(root)


@pytest.mark.parametrize("name", ["refcoco", "grefcoco"])
def test_annotations_are_read_in_a_few_times_their_size(tmp_path, name):
    """All of them as Python's objects would take five times the file; a third of them is asked for here."""
    generator = np.random.default_rng(0)
    write_images(tmp_path / "train2014")
    polygons = generator.uniform(2, 20, (6000, 50)).round(2).tolist()
    write_instances(tmp_path / name, {number: ([polygon], 0, None) for number, polygon in enumerate(polygons)})
    refs = [ref(n, [n] if name == "grefcoco" else n, ["it"], image_id=n % 3) for n in range(2000)]
    if name == "grefcoco":
        (tmp_path / name / "grefs(unc).json").write_text(json.dumps(refs))
    else:
        (tmp_path / name / "refs(unc).p").write_bytes(pickle.dumps(refs))
    size = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
    rows = load_refcoco(tmp_path, name, streaming=True, image_dir=tmp_path / "train2014")
    tracemalloc.start()
    try:
        first = next(iter(rows))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert first["masks"] == [coco_rle([polygons[0]], HEIGHT, WIDTH)]
    assert peak < 2.9 * size  # twice the file while its bytes become text, then what is kept
