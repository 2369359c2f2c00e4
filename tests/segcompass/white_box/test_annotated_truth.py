"""What is true of annotated images, against what the fixtures' files say, and the commands on them."""

import json
import pickle
import warnings

import numpy as np
import pytest
from datasets import concatenate_datasets
from pycocotools import mask as coco_mask

from segcompass.commands import dictionary, white_box
from segcompass.loaders import load_jsonl, load_refcoco, load_rows
from segcompass.loaders.identity import rows_digest
from segcompass.loaders.rows import FEATURES, INSTANCES
from segcompass.white_box import annotated_truth, criteria, criteria_records
from segcompass.white_box.annotated_truth import AnnotatedTruths, colour_of, label_rows, places_of
from segcompass.white_box.dictionary_reader import TokenReader
from segcompass.white_box.examination import annotated_rows
from segcompass.white_box.image_truth import attributes_of
from tests.support.refer import CROWD, HEIGHT, WIDTH, box, rectangle, ref, run_lengths, write_images, write_instances
from tests.support.tiny import tiny_segcompass

GOOD = "<think>a red ball</think>" + "<REF_POS>" * 3
THINGS = [  # category, box (left, top, right, bottom); the image is 24 high and 32 wide
    (1, (2, 3, 10, 9)),
    (2, (20, 12, 30, 22)),
    (1, (12, 2, 18, 8)),
]
SAID = ["the red cup", "orange orange on the right", "the cup next to the red cup"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """RefCOCO with six images of three things and a crowd each: four to train on, two of val."""
    folder = tmp_path_factory.mktemp("refer")
    write_images(folder / "train2014", 6)
    write_instances(folder / "refcoco", count=6)
    file = folder / "refcoco" / "instances.json"
    content = json.loads(file.read_text())
    content["categories"] = [{"id": n, "name": name} for n, name in ((1, "cup"), (2, "orange"), (3, "traffic light"))]
    content["annotations"], refs = [], []
    for image in range(6):
        for number, (category, corners) in enumerate(THINGS):
            shape = {"id": 10 * image + number, "image_id": image, "category_id": category, "iscrowd": 0}
            content["annotations"].append({**shape, "segmentation": [rectangle(*corners)]})
            split = "train" if image < 4 else "val"
            refs.append(ref(len(refs), 10 * image + number, [SAID[number]], split, image))
        shape = {"id": 10 * image + 9, "image_id": image, "category_id": 1, "iscrowd": 1}
        content["annotations"].append({**shape, "segmentation": run_lengths(CROWD)})
    refs.append(ref(len(refs), 49, ["all these cups"], "val", 4))
    file.write_text(json.dumps(content))
    (folder / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, 2))
    return folder


def load(root, split="val", **options):
    return load_refcoco(root, "refcoco", split=split, image_dir=root / "train2014", instances=True, **options)


@pytest.fixture
def truths(root, monkeypatch):
    monkeypatch.setattr(annotated_truth, "SHOWN_IN", 2)
    return AnnotatedTruths(*label_rows(lambda split, n: load(root, split), "train", "train", 2, 2, ()))


# -- rows that carry their image's instances ---------------------------------------------------------------------------


def test_rows_carry_all_things_of_their_image(root):
    rows = load(root)
    assert rows.features == {**FEATURES, **INSTANCES} and "instances" not in load_refcoco(root).features
    assert rows_digest(rows) != rows_digest(load_refcoco(root, image_dir=root / "train2014"))
    for row in rows:
        assert [each["category"] for each in row["instances"]] == ["cup", "orange", "cup", "cup"]
        assert [each["crowd"] for each in row["instances"]] == [False, False, False, True]
        assert [each["expressions"] for each in row["instances"][:3]] == [[text] for text in SAID]
        wanted = [*(box(*corners) for _, corners in THINGS), CROWD]
        for each, mask in zip(row["instances"], wanted, strict=True):
            assert (coco_mask.decode({**each["mask"], "counts": each["mask"]["counts"].encode()}) == mask).all()
    assert load_rows("refcoco", "val", root=root, image_dir=root / "train2014", instances=True)[0] == rows[0]


def test_lines_of_a_jsonl_carry_instances_in_any_form(root, tmp_path):
    image = str(next((root / "train2014").iterdir()))
    things = [
        {"category": "cup", "polygons": [rectangle(2, 3, 10, 9)], "expressions": ["the red cup"]},
        {"category": " orange ", "rle": run_lengths(CROWD), "crowd": True},
    ]
    line = {"image": image, "instruction": "the cup", "polygons": [rectangle(2, 3, 10, 9)], "instances": things}
    path = tmp_path / "mine.jsonl"
    lines = [line, {**line, "instances": None}]
    path.write_text("\n".join(map(json.dumps, lines)))
    rows = load_jsonl(path, image_dir=root / "train2014")
    assert rows[1]["instances"] is None and [each["category"] for each in rows[0]["instances"]] == ["cup", "orange"]
    assert rows[0]["instances"][0]["mask"] == rows[0]["masks"][0] and rows[0]["instances"][1]["crowd"]
    for change, message in (
        ({"category": " "}, "instance 1 has no 'category'"),
        ({"polygons": [[1, 1]]}, "instance 1: a polygon needs at least three points"),
        ({"mask": "x.png"}, "instance 1 needs exactly one of polygons, rle, mask"),
        ({"expressions": "red"}, "'expressions' must be a list of texts"),
    ):
        path.write_text(json.dumps({**line, "instances": [{**things[0], **change}]}))
        with pytest.raises(ValueError, match=f"line 1: .*{message}"):
            load_jsonl(path, image_dir=root / "train2014")


def test_coco_asks_for_each_category_of_an_image(root, tmp_path):
    (tmp_path / "annotations").mkdir()
    content = json.loads((root / "refcoco" / "instances.json").read_text())
    gone = (9, 12, 19)  # two crowds, and a cup of image 1
    content["annotations"] = [each for each in content["annotations"] if each["id"] not in gone]
    file = tmp_path / "annotations" / "instances_mine.json"
    file.write_text(json.dumps(content))
    rows = load_rows("coco", "mine", root=tmp_path, image_dir=root / "train2014")
    assert rows["instruction"][:5] == ["every cup", "the orange", "the cup", "the orange", "the orange"], (
        "of image 2's crowd of cups nobody told the cups apart"
    )
    assert rows["sample_id"][:2] == ["coco-mine-0-cup", "coco-mine-0-orange"]
    assert rows["kind"][:3] == ["multi", "single", "single"] and len(rows) == 8
    first = load(root, "train")[0]
    cups = [each["mask"] for each in first["instances"] if each["category"] == "cup" and not each["crowd"]]
    assert rows[0]["masks"] == cups and rows[0]["image"] == first["image"]
    assert [each["crowd"] for each in rows[4]["instances"]] == [False, False, False, True]
    content["annotations"][0]["category_id"] = 9
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation 0: it has no category that the file names"):
        load_rows("coco", "mine", root=tmp_path, image_dir=root / "train2014")
    content["annotations"][0]["category_id"] = 1
    box = {"bbox": [1, 1, 5, 5], "segmentation": []}
    for place, change, message in (
        ("annotations", {"image_id": "0"}, "annotation 0: its image_id is '0', and the image's id is a number or text"),
        ("annotations", box, r"annotation 0: its segmentation is \[\]. A box alone is no mask"),
        ("annotations", {"segmentation": None}, r"annotations\[0\] \(id 0\): it has no 'segmentation'. A box alone"),
        (
            "images",
            {"height": None, "width": None},
            "it has no 'height' and no 'width'. Each image needs its file, and",
        ),
        ("images", {"id": 1}, "lists the image id 1 more than once; renumber"),
        ("images", {"height": "24"}, "image 0: its height and width are '24' and 32; give numbers of pixels"),
        ("categories", {"name": " "}, "its name is ' '; give the word that people say"),
        ("categories", {"name": "</think>"}, "its name is '</think>'; give the word"),
        ("annotations", {"segmentation": [[[1, 1], [9, 1], [9, 9]]]}, "annotation 0: a polygon must be flat"),
        (
            "annotations",
            {"segmentation": [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]},
            "annotation 0: all coordinates .* from 0 to 1",
        ),
        (
            "annotations",
            {"segmentation": [[90, 90, 99, 90, 99, 99]]},
            "annotation 0: a polygon reaches from .* Scale it",
        ),
    ):
        first, *others = content[place]
        file.write_text(json.dumps({**content, place: [{**first, **change}, *others]}))
        with pytest.raises(ValueError, match=f"instances_mine.json.*{message}"):
            load_rows("coco", "mine", root=tmp_path, image_dir=root / "train2014")
    first, *others = content["annotations"]
    line, again = {**first, "segmentation": [[1, 1, 9, 1, 5, 1]]}, {**first, "id": 90}
    for given, why in (
        ([line], "without a pixel .*annotation 0"),
        ([first, again], "that are another's.*annotation 90"),
    ):
        file.write_text(json.dumps({**content, "annotations": [*given, *others]}))
        with pytest.warns(UserWarning, match=f"1 left out, instances of instances_mine.json {why}"):
            load_rows("coco", "mine", root=tmp_path, image_dir=root / "train2014")
    with pytest.raises(FileNotFoundError, match=r"instances_val2017.json is missing.*annotations/"):
        load_rows("coco", "val2017", root=tmp_path)


def test_rows_that_do_not_know_their_images_are_refused_by_name(root, tmp_path):
    load_refcoco(root, image_dir=root / "train2014").save_to_disk(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"plain' do not say what else is in their images.*--instances"):
        annotated_rows(str(tmp_path / "plain"), "val", 4)
    rows = load_refcoco(root, "refcoco", split="val", image_dir=root / "train2014", instances=True)
    listed = [each if number else None for number, each in enumerate(rows["instances"])]
    silent = rows.remove_columns("instances").add_column("instances", listed, feature=rows.features["instances"])
    silent.save_to_disk(tmp_path / "silent")
    with pytest.raises(ValueError, match=rf"1 of {len(rows)} rows of .*silent' \(split 'val'\) .*as ground. Give"):
        annotated_rows(str(tmp_path / "silent"), "val", 100)
    with pytest.raises(ValueError, match=r"'refcoco' have no image, such as 'refcoco-unc-val-12-1200'; give --image-d"):
        annotated_rows("refcoco", "val", 4, root=root)


# -- truth -------------------------------------------------------------------------------------------------------------


def test_truth_of_a_row_is_what_the_files_say(root, truths):
    row = load(root)[2]
    truth = truths.of(row)
    assert row["instruction"] == SAID[2] and truth.targets == [2]
    assert np.array_equal(truth.masks, [box(*corners) for _, corners in THINGS])
    assert truths.kinds == {"category": ("cup", "orange"), "colour": ("colour orange", "red")}
    assert truth.looks == [
        {"category": "cup", "colour": "red"},
        {"category": "orange", "colour": "colour orange"},
        {"category": "cup"},  # its expression says a colour of another cup
    ]
    assert truth.known == [{"category", "colour"}, {"category", "colour"}, {"category"}]
    assert truth.has_twin(0) and truth.has_twin(2) and not truth.has_twin(1)
    assert np.array_equal(truth.unclear, CROWD)
    assert truth.places[1] == ("D3", "column D", "row 3", "right", "bottom")
    assert truth.questions == [(2, SAID[2]), (0, SAID[0])], "the row's own target first"
    crowd = truths.of(load(root)[6])
    assert crowd.targets == [3] and np.array_equal(crowd.masks[3], CROWD) and crowd.unclear is None


def test_what_nobody_named_is_asked_for_and_has_no_looks(root, truths):
    row = {**load(root)[0], "instances": None}
    truth = truths.of(row)
    assert truth.targets == [0] and truth.looks == [{"colour": "red"}] and truth.names == [None]
    assert not truth.has_twin(0) and truth.questions == []
    nothing = truths.of({**row, "masks": []})
    assert nothing.masks.shape == (0, HEIGHT, WIDTH) and nothing.targets == [] and nothing.questions == []


def test_question_by_category_needs_the_only_one(root, truths):
    row = load(root)[0]
    silent = [{**each, "expressions": []} for each in row["instances"]]
    assert truths.of({**row, "instances": silent}).questions == [(0, SAID[0]), (1, "the orange")]
    assert truths.of({**row, "instances": [*silent, silent[1]]}).questions == [], "two oranges"


@pytest.mark.parametrize(
    "said, colour",
    [
        (["red cup", "the Red one", "cup"], "red"),
        (["gray cat"], "grey"),
        (["cup next to the blue plate", "man in red"], None),
        (["red and white bus"], "red"),  # "and" begins another thing
        (["blue white bus"], None),
        (["red bus", "blue bus"], None),
        (["bored man"], None),
        ([], None),
    ],
)
def test_colour_is_what_expressions_say_of_the_thing_itself(said, colour):
    assert colour_of(said) == colour


def test_places_follow_the_centre_of_the_mask():
    mask = np.zeros((100, 200), bool)
    mask[45:55, 95:105] = True
    assert places_of(mask) == ("C3", "column C", "row 3", "middle")
    mask = np.zeros((100, 200), bool)
    mask[0, 0] = True
    assert places_of(mask) == ("A1", "column A", "row 1", "left", "top")
    assert set(places_of(mask)) <= set(AnnotatedTruths.places)


def test_words_and_phrases_are_found_across_tokens(root, truths):
    row = {**load(root)[1], "instruction": "orange orange on the right"}
    reader = TokenReader(*tiny_segcompass("llava"))  # a token per character
    text = "cups? orange orange on the right, cup"
    ids = reader.processor.tokenizer(text, add_special_tokens=False).input_ids
    written = [place >= 6 for place in range(len(ids))]
    assert reader.spans(ids) == (text, [(n, n + 1) for n in range(len(text))])
    said = truths.said(reader, ids, written, row, truths.of(row))
    names = list(attributes_of(truths))
    assert "".join(np.array(list(text))[said.word[:, names.index("cup")]]) == "cupscup"
    for name in ("orange", "colour orange"):
        assert said.word[:, names.index(name)].sum() == 12
    assert "".join(np.array(list(text))[said.word[:, names.index("right")]]) == "right"
    phrase = said.phrase[:, names.index("D3")]
    assert "".join(np.array(list(text))[phrase]) == "orange orange on the right"
    assert said.known[phrase].all() and not said.known[~phrase][:, 1].any(), "elsewhere no colour is known"
    assert said.names[0] == "cup" and said.names[6] == "orange" and said.names[4] == "?"


def test_labels_share_no_image_with_each_other_or_the_examined(root):
    asked = []

    def some(split, count):
        asked.append(count)
        rows = load(root, split)
        return rows.select(range(min(count, len(rows))))

    chosen, scored = label_rows(some, "train", "train", 4, 3, {"1"})
    assert len(chosen) + len(scored) == 3 and set(chosen["image_id"]).isdisjoint(scored["image_id"])
    assert {*chosen["image_id"], *scored["image_id"]} == {"0", "2", "3"}
    assert len(chosen) == 2, "in the proportion that was asked for"
    chosen, scored = label_rows(some, "train", "val", 4, 3, {"5"})
    assert len(chosen) == 4 and scored["image_id"] == ["4"]
    with pytest.raises(ValueError, match="--label-split"):
        label_rows(some, "val", "val", 4, 3, {"4", "5"})


def test_too_rare_attributes_have_no_labels_and_say_so(root):
    truths = AnnotatedTruths(*label_rows(lambda split, n: load(root, split), "train", "train", 2, 2, ()))
    assert truths.kinds == {} and attributes_of(truths) == truths.places
    assert [text.split(" have no labels")[0] for text in truths.missing] == ["categories", "colours"]


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", ["qwen2_5_vl"], indirect=True)
def test_criteria_and_dictionary_of_refcoco(root, saved, tmp_path, writes, monkeypatch, capsys):
    writes(GOOD, saved[1])
    monkeypatch.setattr(annotated_truth, "SHOWN_IN", 1)
    for module in (criteria_records, criteria):  # a random model's masks are never right: examine them all
        monkeypatch.setattr(module, "SHOWS", -1.0)
    monkeypatch.setattr(criteria_records, "CONFIDENT", 0.0)
    where = ["--dataset", "refcoco", "--root", str(root), "--image-dir", str(root / "train2014")]
    options = ["--model", str(saved[0]), *where, "--batch-size", "4"]
    examined = [*options, "--split", "val", "--num-samples", "3", "--label-samples", "4"]
    metrics = white_box.main([*examined, "--output", str(tmp_path / "run")])
    measured = {name for name in white_box.KEYS if metrics[name] is not None}
    assert measured >= {"name", "name_look", "pointing", "move", "steer_own", "steer_flip", "content", "shown"}
    assert metrics["pairs"] == 6 and metrics["twins"] is not None
    labels = metrics["labels"]
    assert (labels["training scenes"], labels["held-out scenes"], labels["looks"]) == (2, 2, 4)
    page = (tmp_path / "run" / "report.md").read_text()
    assert metrics["not measured"].keys() == {"auc_others", "write_swap", "write_off", "write_doubled"}
    assert "beside an object that fills half a patch" in page, "its patches are larger than the things"
    assert "no response's conclusion names an attribute" in page and "of 4 looks" in page
    assert white_box.main([*examined, "--output", str(tmp_path / "run")]) == metrics

    read = [*options, "--num-samples", "2", "--held-out-samples", "2", "--contexts", "3"]
    scores = dictionary.main([*read, "--output", str(tmp_path / "names")])
    assert scores["patch"].keys() == {"orange"}, "no cup fills half a patch"
    assert scores["word"].keys() == {"cup", "red"}, "across tokens, which are letters; the rows ask for the red cup"
    assert scores["scene"] == {}, "every image shows both categories"
    concepts = json.loads((tmp_path / "names" / "concepts.json").read_text())["concepts"]
    texts = {each["text"] for concept in concepts for each in concept["contexts"] if each["part"] == "image"}
    assert texts <= {"red cup", "cup", "orange orange", "ground"} and len(texts) > 1
    assert "orange" in capsys.readouterr().out


def test_prepared_folder_keeps_the_instances(root, tmp_path):
    from segcompass.commands import prepare_data

    where = ["refcoco", "--root", str(root), "--image-dir", str(root / "train2014"), "--split", "val"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare_data.main([*where, "--instances", "--output", str(tmp_path / "rows")])
    rows = annotated_rows(str(tmp_path / "rows"), "val", 100)
    direct = load(root)
    assert rows["instances"][:] == direct["instances"][:] and len(rows) == 7
    assert len(concatenate_datasets([rows, direct])) == 14
    with pytest.raises(ValueError, match="--instances is for refcoco"):
        prepare_data.main(["reasonseg", "--instances", "--output", str(tmp_path / "x")])
