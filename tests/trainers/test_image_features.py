"""The cache of SAM features: found by content, refused by name, resumable, checksummed; trainers read it unchanged."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segcompass.modeling_segcompass.image_encoder import Frame
from segcompass.modeling_segcompass.whole_files import PART
from segcompass.trainers.collator import SegCompassCollator
from segcompass.trainers.image_features import (
    ImageFeatures,
    ImageFeatureWriter,
    encoder_id,
    image_key,
    open_image_features,
)
from tests.support.grpo import make_trainer, scenes
from tests.support.tiny import tiny_segcompass

ROOT = Path(__file__).resolve().parents[2]


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (20 + n, 30, 3), dtype=np.uint8)) for n in range(count)]


def write(folder, images, model, processor, shard_size=2):
    sam_id = encoder_id(model.image_encoder, processor.encoder_image_processor)
    writer = ImageFeatureWriter(folder, sam_id, model.config.frame, shard_size)
    for image in images:
        if (key := image_key(image)) not in writer:
            with torch.no_grad():
                writer.add(
                    key, model.get_image_embeddings(processor.encoder_inputs([image])["encoder_pixel_values"])[0]
                )
    writer.close()
    return writer


def test_cached_inputs_are_what_the_encoder_gives(tmp_path):
    model, processor = tiny_segcompass("llava")
    images = pictures(5)
    write(tmp_path, images, model, processor)
    cache = open_image_features(tmp_path, model, processor)
    assert len(cache) == 5 and len(list(tmp_path.glob("shard-*.npy"))) == 3
    inputs = cache.inputs([images[3], images[0]])
    direct = processor.encoder_inputs([images[3], images[0]])
    with torch.no_grad():
        expected = model.get_image_embeddings(direct["encoder_pixel_values"])
    assert inputs["image_embeddings"].dtype == torch.float16
    assert torch.allclose(inputs["image_embeddings"].float(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(inputs["reshaped_input_sizes"], direct["reshaped_input_sizes"])
    assert torch.equal(inputs["original_sizes"], direct["original_sizes"])


def test_an_image_is_known_by_what_it_shows(tmp_path):
    image = pictures(1)[0]
    image.save(tmp_path / "renamed.png")
    assert image_key(Image.open(tmp_path / "renamed.png")) == image_key(image)
    changed = image.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    keys = {image_key(changed), image_key(image), image_key(image.transpose(Image.Transpose.ROTATE_90))}
    assert len(keys) == 3


def test_features_of_another_encoder_are_refused_by_name(tmp_path):
    model, processor = tiny_segcompass("llava")
    write(tmp_path, pictures(2), model, processor)
    ours = encoder_id(model.image_encoder, processor.encoder_image_processor)
    with torch.no_grad():
        next(model.image_encoder.parameters()).flatten()[0] += 1e-3
    theirs = encoder_id(model.image_encoder, processor.encoder_image_processor)
    with pytest.raises(ValueError, match=f"features of encoder '{ours}', this model's is '{theirs}'"):
        open_image_features(tmp_path, model, processor)
    with pytest.raises(ValueError, match=f"features of encoder '{ours}'"):
        ImageFeatureWriter(tmp_path, theirs, Frame(32))


def test_the_encoder_id_covers_weights_and_preparation_but_not_dtype():
    model, processor = tiny_segcompass("llava")
    first = encoder_id(model.image_encoder, processor.encoder_image_processor)
    half = model.image_encoder.to(torch.bfloat16)
    rounded = encoder_id(half, processor.encoder_image_processor)
    assert rounded == encoder_id(half.float(), processor.encoder_image_processor) != first
    processor.encoder_image_processor.image_mean = [0.0, 0.0, 0.0]
    assert encoder_id(half, processor.encoder_image_processor) != rounded


def test_what_is_missing_or_damaged_is_said(tmp_path):
    model, processor = tiny_segcompass("llava")
    images = pictures(3)
    write(tmp_path, images[:2], model, processor)
    cache = open_image_features(tmp_path, model, processor)
    with pytest.raises(KeyError, match="30 x 22 pixels .* is not among the 2 in"):
        cache.inputs(images[2:])
    path = tmp_path / "shard-00000.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    cache = open_image_features(tmp_path, model, processor)
    cache[images[0]]
    with pytest.raises(ValueError, match="row 1 of .*shard-00000.npy is damaged"):
        cache[images[1]]
    np.save(path, np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"has shape \(1, 2\), its list says"):
        open_image_features(tmp_path, model, processor)
    with pytest.raises(ValueError, match="is no image feature cache"):
        ImageFeatures(tmp_path / "nothing", "any")


def test_a_lost_or_exchanged_list_is_named(tmp_path):
    model, processor = tiny_segcompass("llava")
    images = pictures(2)
    write(tmp_path, images[:1], model, processor)
    write(tmp_path, images, model, processor)
    lists = [tmp_path / f"shard-0000{number}.json" for number in range(2)]
    second = lists[1].read_bytes()
    lists[1].write_bytes(lists[0].read_bytes())
    with pytest.raises(ValueError, match="shard-00001.json lists the images of shard-00000.json"):
        open_image_features(tmp_path, model, processor)
    lists[1].unlink()
    with pytest.raises(KeyError, match="where shard-00001.npy lacks its shard-00001.json; run"):
        open_image_features(tmp_path, model, processor).inputs(images)
    lists[1].write_bytes(second)
    assert len(open_image_features(tmp_path, model, processor).inputs(images)["image_embeddings"]) == 2


def test_a_second_run_adds_only_what_is_new_and_clears_what_was_left(tmp_path):
    model, processor = tiny_segcompass("llava")
    images = pictures(5)
    write(tmp_path, images[:2], model, processor)
    (tmp_path / f"{PART}1-shard-00001.npy").write_bytes(b"half a shard")
    (tmp_path / "shard-00001.npy").write_bytes(b"a shard whose list was never written")
    before = (tmp_path / "shard-00000.npy").stat().st_mtime_ns
    write(tmp_path, images, model, processor)
    assert (tmp_path / "shard-00000.npy").stat().st_mtime_ns == before
    assert not list(tmp_path.glob(f"{PART}*"))
    cache = open_image_features(tmp_path, model, processor)
    assert len(cache) == 5 and all(cache[image].shape == (16, 8, 8) for image in images)


WORKER = """
import sys, time, torch
from segcompass.modeling_segcompass.image_encoder import Frame
from segcompass.trainers.image_features import ImageFeatureWriter
writer = ImageFeatureWriter(sys.argv[1], "encoder", Frame(32), shard_size=2)
for number in range(1000):
    if (key := f"{number:032x}") not in writer:
        writer.add(key, torch.full((4, 2, 2), float(number)))
        print(number, flush=True)
        time.sleep(0.002)
"""


def test_a_killed_run_is_gone_on_with(tmp_path):
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    while int(process.stdout.readline()) < 20:
        pass
    time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    writer = ImageFeatureWriter(tmp_path, "encoder", Frame(32), shard_size=2)
    kept = len(writer.known)
    assert kept >= 20 and kept % 2 == 0
    writer.add(f"{kept:032x}", torch.full((4, 2, 2), float(kept)))
    writer.close()
    listings = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("shard-*.json"))]
    keys = [key for listing in listings for key in listing["keys"]]
    assert keys == [f"{number:032x}" for number in range(kept + 1)]
    for number, path in enumerate(sorted(tmp_path.glob("shard-*.npy"))):
        assert np.load(path)[0, 0, 0, 0] == 2 * number


def test_joint_training_with_a_cache_encodes_nothing_and_learns_the_same(tmp_path):
    model, processor = tiny_segcompass("llava")
    write(tmp_path / "cache", list(scenes(8)["image"]), model, processor)
    logs = []
    for features in (None, str(tmp_path / "cache")):
        trainer = make_trainer(tmp_path / "run", beta=0.0, max_steps=1, image_features=features)
        encoded = []
        trainer.model.image_encoder.register_forward_hook(lambda *_, encoded=encoded: encoded.append(1))
        trainer.train()
        assert bool(encoded) == (features is None)
        logs.append(trainer.state.log_history[0])
    plain, cached = logs
    # the cache rounds to float16: 1e-7, 5e-6 and 0.01; with the features of two images exchanged: 1e-3, 7e-3 and 0.25
    for name, tolerance in (("loss", 1e-4), ("seg/conf_bce", 1e-3), ("grad_norm", 0.05)):
        assert cached[name] == pytest.approx(plain[name], rel=tolerance), name
    assert cached["reward"] == pytest.approx(plain["reward"], abs=2e-3)


def test_the_supervised_collator_reads_a_cache(tmp_path):
    model, processor = tiny_segcompass("llava")
    rows = [{**row, "reasoning": "a box"} for row in scenes(3)]
    write(tmp_path, [row["image"] for row in rows], model, processor)
    side = 4 * model.config.key_grid
    plain = SegCompassCollator(processor, side)(rows)
    cached = SegCompassCollator(processor, side, open_image_features(tmp_path, model, processor))(rows)
    assert "encoder_pixel_values" not in cached and torch.equal(cached["input_ids"], plain["input_ids"])
    for batch in (plain, cached):
        batch.pop("mask_targets")
    with torch.no_grad():
        masks, expected = model(**cached).pred_masks, model(**plain).pred_masks
    assert torch.allclose(masks, expected, atol=2e-2)
