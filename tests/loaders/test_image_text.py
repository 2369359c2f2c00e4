import json

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from segcompass.loaders.image_text import has_splits, image_text, load_image_text
from segcompass.preparation import Conversion, prepare_data
from segcompass.trainers.collator import ImageTextCollator, open_image
from tests.support.tiny import tiny_processor


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "mug.png"
    Image.new("RGB", (28, 28), (200, 10, 10)).save(path)
    return path


def test_rows_of_this_project_are_understood():
    rows = load_image_text("scenes", "val", seed=3, num_samples=2)
    row = image_text(next(iter(rows)))
    assert row["image"].size == (128, 128) and row["text"] and row["reasoning"] and row["response"] is None


def test_json_lines_with_paths_relative_to_the_file(tmp_path, picture):
    lines = [{"image": "mug.png", "text": "a red mug", "response": "yes"}, {"image": "no.png", "text": "none"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for streaming in (True, False):
        rows = list(map(image_text, load_image_text(str(tmp_path / "rows.jsonl"), streaming=streaming)))
        assert [row["text"] for row in rows] == ["a red mug", "none"]
        assert rows[0]["response"] == "yes" and rows[1]["response"] is None
        assert open_image(rows[0]["image"]).size == (28, 28)


def test_a_saved_data_set_with_an_image_that_does_not_open_can_still_be_read(tmp_path, picture):
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    data = {
        "image": [{"bytes": picture.read_bytes(), "path": None}, {"bytes": b"not an image", "path": None}],
        "caption": ["a", "b"],
    }
    Dataset.from_dict(data, features=features).save_to_disk(tmp_path / "rows")
    rows = [image_text(row) for row in load_image_text(str(tmp_path / "rows"))]
    assert open_image(rows[0]["image"]).size == (28, 28)
    with pytest.raises(OSError, match="cannot be read as an image"):
        open_image(rows[1]["image"])


@pytest.mark.parametrize("streaming", [False, True])
def test_lines_of_other_splits_are_not_read(tmp_path, picture, streaming):
    lines = [
        {"image": "mug.png", "instruction": name, "masks": [], "split": name} for name in ("train", "val", "train")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))

    def texts(split):
        return [image_text(row)["text"] for row in load_image_text(str(path), split, streaming=streaming)]

    assert has_splits(str(path)) and texts("train") == ["train", "train"] and texts("val") == ["val"]
    with pytest.raises(ValueError, match="rows.jsonl has no line of split 'test'; name one that its lines have"):
        texts("test")
    path.write_text("\n".join(json.dumps({**line, "split": None}) for line in lines))
    assert not has_splits(str(path)) and len(texts("val")) == 3


def test_rows_are_drawn_by_the_seed_and_are_not_the_first(tmp_path, picture):
    lines = [{"image": "mug.png", "instruction": f"mug {number}", "masks": []} for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def texts(dataset, seed, **options):
        rows = load_image_text(str(dataset), seed=seed, num_samples=5, **options)
        return [image_text(row)["text"] for row in rows]

    prepare_data(Conversion(str(tmp_path / "rows.jsonl"), tmp_path / "folder"))
    for dataset in (tmp_path / "rows.jsonl", tmp_path / "folder"):
        assert texts(dataset, 1) == [f"mug {number}" for number in range(5)]
        drawn = texts(dataset, 1, shuffled=True)
        assert drawn == texts(dataset, 1, shuffled=True) != texts(dataset, 2, shuffled=True)
        assert len(set(drawn)) == 5 and drawn != texts(dataset, 1)
    scenes = [image_text(row)["text"] for row in load_image_text("scenes", num_samples=3, shuffled=True)]
    assert scenes == [image_text(row)["text"] for row in load_image_text("scenes", num_samples=3)]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"images": [None, "a.png", None, "b.png"], "texts": ["intro", None, "of a", None]}, ("a.png", "of a")),
        ({"images": ["a.png", None, "b.png", None], "texts": [None, " ", None, "of b"]}, ("a.png", "of b")),
        ({"images": [None, "a.png"], "texts": ["before", None]}, ("a.png", "before")),
    ],
)
def test_interleaved_documents_give_an_image_and_the_text_after_it(document, expected):
    row = image_text(document)
    assert (row["image"], row["text"]) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "no image"),
        ({"image": "a.png", "text": " "}, "no text"),
        ({"images": [None], "texts": ["a"]}, "no image"),
        ({"images": ["a.png"], "texts": [None]}, "no text"),
    ],
)
def test_rows_without_image_or_text_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        image_text(row)


def test_impossible_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl' is no file"):
        load_image_text(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="num_samples is 0"):
        load_image_text("scenes", num_samples=0)


def collate(rows, **options):
    return ImageTextCollator(tiny_processor("llava"), image_text, **options)(rows)


def test_unusable_rows_are_left_out_of_the_batch_and_counted(tmp_path, picture):
    good = {"image": str(picture), "text": "a mug", "response": "here"}
    bad = [{"image": str(tmp_path / "no.png"), "text": "a"}, {"image": str(picture)}, {**good, "text": "a" * 500}]
    batch = collate([good, *bad, good], token_window=200)
    skipped = batch.pop("skipped")
    assert skipped == {"image does not open": 1, "no image or usable text": 1, "too long": 1}
    alone = collate([good, good])
    assert batch["input_ids"].tolist() == alone["input_ids"].tolist()
    assert collate(bad[:2]).keys() == {"skipped"}


def test_samples_longer_than_the_window_with_their_image_are_left_out(picture):
    rows = [{"image": str(picture), "text": text} for text in ("a mug", "a mug" + 40 * " so")]
    lengths = collate(rows)["attention_mask"].sum(1)
    batch = collate(rows, token_window=int(lengths.max()) - 1)
    assert batch["skipped"] == {"too long": 1} and batch["attention_mask"].sum() == lengths.min()


def test_a_row_without_response_gets_none_beside_one_that_has(picture):
    rows = [{"image": str(picture), "text": "a mug", "response": "here"}, {"image": str(picture), "text": "a mug"}]
    batch = collate(rows)
    alone = collate(rows[1:])
    assert "response_mask" not in alone
    assert batch["attention_mask"][1].sum() == alone["attention_mask"].sum()
    assert batch["attention_mask"][0].sum() == alone["attention_mask"].sum() + len("here") + 1


def test_our_own_rows_get_a_well_formed_response():
    processor = tiny_processor("llava")
    row = next(iter(load_image_text("scenes", num_samples=1)))
    batch = ImageTextCollator(processor, image_text)([row])
    text = processor.tokenizer.decode(batch["labels"][0][batch["response_mask"][0]])
    assert processor.format_response(row["reasoning"]) in text
