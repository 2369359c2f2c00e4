"""Data of one's own whose folder was signed: what changed since is refused by name; what nobody signed is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from segcompass.commands import verify
from segcompass.loaders import load_rows
from segcompass.loaders.image_text import image_text
from segcompass.loaders.rows import row_image
from segcompass.modeling_segcompass import SparseAutoencoder, SparseAutoencoderConfig
from segcompass.modeling_segcompass.manifest import MANIFEST, sign
from segcompass.trainers.activation_cache import CachedActivations, cache_activations
from segcompass.trainers.collator import ImageTextCollator
from tests.support.refer import ref, write_images, write_instances
from tests.support.tiny import tiny_mllm, tiny_processor


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A JSONL with two images in a folder of their own, signed."""
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(2):
        Image.new("RGB", (28, 28), (10 * number, 90, 10)).save(tmp_path / "images" / f"{number}.png")
        lines.append({"image": f"images/{number}.png", "instruction": "the mug", "polygons": [[2, 2, 9, 2, 9, 9]]})
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    verify.main(["--sign", str(tmp_path)])
    return tmp_path


def test_a_changed_line_and_a_changed_image_are_refused_until_signed_anew(mine):
    assert len(load_rows(str(mine / "mine.jsonl"))) == 2
    text = (mine / "mine.jsonl").read_text()
    (mine / "mine.jsonl").write_text(text.replace("9, 9", "9, 8"))
    with pytest.raises(ValueError, match=r"is not what was signed: mine.jsonl \(its content changed\)"):
        load_rows(str(mine / "mine.jsonl"))
    (mine / "mine.jsonl").write_text(text)
    Image.new("RGB", (28, 28), (1, 2, 3)).save(mine / "images" / "1.png")
    with pytest.raises(ValueError, match=r"images/1.png"):
        load_rows(str(mine / "mine.jsonl"))
    verify.main(["--sign", str(mine)])
    assert len(load_rows(str(mine / "mine.jsonl"))) == 2


def test_a_sample_that_was_deleted_is_missed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "val").mkdir(exist_ok=True)
        Image.new("RGB", (32, 24)).save(tmp_path / "val" / f"{name}.jpg")
        shapes = [{"label": "target", "points": [[2, 2], [12, 2], [12, 9]], "shape_type": "polygon"}]
        content = {"text": ["it"], "is_sentence": True, "shapes": shapes}
        (tmp_path / "val" / f"{name}.json").write_text(json.dumps(content))
    sign(tmp_path)
    for suffix in (".jpg", ".json"):
        (tmp_path / "val" / f"a{suffix}").unlink()
    with pytest.raises(ValueError, match=r"val/a.jpg \(missing\)"):
        load_rows("reasonseg", "val", root=tmp_path)
    (tmp_path / MANIFEST).unlink()
    assert len(load_rows("reasonseg", "val", root=tmp_path)) == 1


def test_a_shard_that_is_lost_is_missed(tmp_path):
    torch.manual_seed(0)
    processor = tiny_processor("llava")
    rows = [{"image": Image.new("RGB", (28, 28)), "text": f"mug {number}"} for number in range(4)]
    collate = ImageTextCollator(processor, image_text)

    class Rows(list):
        def select(self, indices):
            return Rows(self[index] for index in indices)

    cache_activations(tmp_path, tiny_mllm("llava", processor), Rows(rows), collate, 2, {}, 1, 1)
    CachedActivations(tmp_path)
    (tmp_path / "shard-00001.json").unlink()
    with pytest.raises(ValueError, match="lacks 1 of its 4 shards .* shard-00001.safetensors and shard-00001.json"):
        CachedActivations(tmp_path)


def test_whole_numbers_are_no_weights(tmp_path):
    SparseAutoencoder(SparseAutoencoderConfig(d_in=8, d_sae=16, activation="topk", k=4, layer=1)).save_pretrained(
        tmp_path
    )
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["W_enc"] = tensors["W_enc"].to(torch.int32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    sign(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors holds whole numbers in 1 tensors of real ones \(W_enc\)"):
        SparseAutoencoder.from_pretrained(tmp_path)
    save_file({**tensors, "W_enc": torch.zeros(8, 15)}, tmp_path / "model.safetensors", {"format": "pt"})
    sign(tmp_path)
    with pytest.raises(ValueError, match=r"\(model.safetensors\) does not match this model .mismatched_keys: 1.*W_enc"):
        SparseAutoencoder.from_pretrained(tmp_path)


def test_whole_numbers_are_no_weights_of_another_layout_either(tmp_path):
    SparseAutoencoder(SparseAutoencoderConfig(d_in=8, d_sae=16, activation="topk", k=4, layer=1)).save_saelens(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "W_dec": tensors["W_dec"].to(torch.int32)}, path)
    sign(tmp_path)
    with pytest.raises(ValueError, match="sae_weights.safetensors holds W_dec as torch.int32"):
        SparseAutoencoder.from_saelens(tmp_path)


def test_an_image_path_that_leads_out_of_its_folder_is_refused(tmp_path):
    import pickle

    write_instances(tmp_path / "data" / "refcoco")
    write_images(tmp_path / "data" / "images")
    Image.new("RGB", (32, 24)).save(tmp_path / "secret.jpg")
    path = tmp_path / "data" / "refcoco" / "instances.json"
    content = json.loads(path.read_text())
    content["images"][1]["file_name"] = "../../secret.jpg"
    path.write_text(json.dumps(content))
    (tmp_path / "data" / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([ref(1, 10, ["it"])]))
    with pytest.raises(ValueError, match=r"instances.json, image 1: '../../secret.jpg' lies outside"):
        load_rows("refcoco", "val", root=tmp_path / "data", image_dir=tmp_path / "data" / "images")
    shutil.rmtree(tmp_path / "data")


def test_a_row_fetches_no_archive(tmp_path):
    row = {"image": {"path": "zip://a.png::http://127.0.0.1:1/a.zip", "bytes": None}, "sample_id": "a"}
    with pytest.raises(ValueError, match="within an archive at an address"):
        row_image(row)
    assert not list(Path(tmp_path).iterdir())
