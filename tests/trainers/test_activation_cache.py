import errno
import json
import logging

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from segcompass.loaders.image_text import image_text
from segcompass.trainers import activation_cache
from segcompass.trainers.activation_cache import CachedActivations, cache_activations
from segcompass.trainers.activations import SPECIAL, batch_activations
from segcompass.trainers.collator import ImageTextCollator
from tests.support.tiny import tiny_mllm, tiny_processor

LAYER, HIDDEN, SAMPLES = 2, 32, 10


class Rows(list):
    """What cache_activations asks of a datasets.Dataset."""

    def select(self, indices):
        return Rows(self[index] for index in indices)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    processor = tiny_processor("llava")
    mllm = tiny_mllm("llava", processor).eval()
    mllm.config.special_token_ids = processor.model_tokens()["special_token_ids"]
    rows = Rows(
        {
            "image": Image.new("RGB", (28, 28), (20 * number, 90, 10)),
            "text": f"find mug {number}",
            "response": f"<think>{'so ' * number}</think>",
        }
        for number in range(SAMPLES)
    )
    return mllm, rows, ImageTextCollator(processor, image_text)


def cache(folder, parts, rows=None, **options):
    mllm, all_rows, collate = parts
    options = {"samples_per_batch": 2, "samples_per_shard": 4, "dtype": torch.float32, "description": {}} | options
    return cache_activations(folder, mllm, all_rows if rows is None else rows, collate, LAYER, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("shard-*"))}


def tokens(dataset):
    return sorted(tuple(row) for z, _ in dataset for row in z.tolist())


def test_a_cache_holds_every_token_once_with_its_type(parts, tmp_path):
    mllm, rows, collate = parts
    report = cache(tmp_path, parts)
    assert (report["samples"], report["shards"], report["capped"]) == (SAMPLES, 3, 0)
    expected, kinds = [], []
    for start in range(0, SAMPLES, 2):
        z, types = batch_activations(mllm, collate(rows[start : start + 2]), LAYER, mllm.config.special_token_ids, True)
        expected.append(z)
        kinds.append(types)
    expected, kinds = torch.cat(expected), torch.cat(kinds)
    assert report["tokens"] == len(expected)
    assert report["bytes"] == pytest.approx(len(expected) * (4 * HIDDEN + 1), rel=0.1)
    stored = [load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert torch.equal(torch.cat([shard["hidden_states"] for shard in stored]), expected)
    assert torch.equal(torch.cat([shard["token_types"] for shard in stored]), kinds)
    dataset = CachedActivations(tmp_path, HIDDEN, batch_size=16, buffer_size=64)
    assert tokens(dataset) == sorted(map(tuple, expected[kinds != SPECIAL].tolist()))


def test_passes_differ_and_repeat_when_told_which(parts, tmp_path):
    cache(tmp_path, parts)
    dataset = CachedActivations(tmp_path, batch_size=16, buffer_size=64)
    passes = [torch.cat([z for z, _ in dataset]) for _ in range(2)]
    assert not torch.equal(*passes)
    dataset.set_epoch(1)
    assert torch.equal(torch.cat([z for z, _ in dataset]), passes[1])


def test_going_on_after_an_interruption_gives_the_same_bytes(parts, tmp_path, monkeypatch):
    cache(tmp_path / "whole", parts)
    calls = []

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return batch_activations(*args[:4], keep_special=True)

    monkeypatch.setattr(activation_cache, "batch_activations", lambda *args, keep_special: killed(*args))
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path / "cut", parts)
    assert len(list((tmp_path / "cut").glob("shard-*.json"))) == 1
    # A shard without its record was never finished: whatever it holds is written again.
    (tmp_path / "cut" / "shard-00001.safetensors").write_bytes(b"half")
    before = len(calls)
    cache(tmp_path / "cut", parts)
    assert len(calls) - before == 3  # 5 batches, of which the first shard's 2 were there
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_other_numbers_of_processes_write_and_read_the_same(parts, tmp_path, monkeypatch):
    cache(tmp_path / "one", parts)
    for rank in (1, 0):
        monkeypatch.setattr(activation_cache, "process_share", lambda rank=rank: (rank, 2))
        cache(tmp_path / "two", parts)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    shares = []
    for rank in range(3):
        monkeypatch.setattr(activation_cache, "process_share", lambda rank=rank: (rank, 3))
        shares += tokens(CachedActivations(tmp_path / "two", batch_size=8, buffer_size=32))
    monkeypatch.setattr(activation_cache, "process_share", lambda: (0, 1))
    assert sorted(shares) == tokens(CachedActivations(tmp_path / "one", batch_size=8, buffer_size=32))
    monkeypatch.setattr(activation_cache, "process_share", lambda: (0, 4))
    with pytest.raises(ValueError, match="3 shards for 4 processes"):
        tokens(CachedActivations(tmp_path / "one", batch_size=8, buffer_size=32))


def test_streamed_rows_give_the_same_cache(parts, tmp_path):
    cache(tmp_path / "indexed", parts)
    cache(tmp_path / "streamed", parts, rows=iter(parts[1]))
    assert contents(tmp_path / "indexed") == contents(tmp_path / "streamed")


def test_the_size_is_bounded_and_what_is_there_can_be_used(parts, tmp_path, caplog):
    whole = cache(tmp_path / "whole", parts)
    limit = 0.8 * whole["bytes"] / 1e9
    report = cache(tmp_path / "small", parts, max_gb=limit)
    assert report["capped"] == 1 and report["shards"] == 2 and report["bytes"] <= limit * 1e9
    assert "caching stops" in caplog.text and "higher max_gb" in caplog.text
    assert tokens(CachedActivations(tmp_path / "small", batch_size=8, buffer_size=32))
    cache(tmp_path / "small", parts)
    assert contents(tmp_path / "small") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_a_damaged_shard_is_named_and_written_again_when_deleted(parts, tmp_path, damage):
    cache(tmp_path, parts)
    before = contents(tmp_path)
    path = tmp_path / "shard-00001.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        shard = load_file(path)
        shard["hidden_states"][3, 3] += 1
        save_file(shard, path)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors was truncated or altered.*delete it"):
        tokens(CachedActivations(tmp_path, batch_size=8, buffer_size=32))
    path.unlink()
    path.with_suffix(".json").unlink()
    cache(tmp_path, parts)
    assert contents(tmp_path) == before


def test_a_full_disk_is_said_and_costs_nothing_already_cached(parts, tmp_path, monkeypatch):
    def full(tensors, path):
        if "00001" in str(path):
            path.write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(activation_cache, "save_file", full)
    with pytest.raises(OSError, match="disk is full while writing .*shard-00001.*repeat the command") as caught:
        cache(tmp_path, parts)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache.json",
        "shard-00000.json",
        "shard-00000.safetensors",
    ]
    monkeypatch.undo()
    assert cache(tmp_path, parts)["samples"] == SAMPLES


def test_a_folder_with_another_cache_is_refused(parts, tmp_path):
    cache(tmp_path, parts, description={"dataset": "mugs"})
    with pytest.raises(ValueError, match="dataset='mugs', but 'cats' is asked for; choose another folder"):
        cache(tmp_path, parts, description={"dataset": "cats"})


def test_rows_that_give_no_token_are_refused(parts, tmp_path):
    with pytest.raises(ValueError, match="no token was cached.*rows are empty"):
        cache(tmp_path / "empty", parts, rows=Rows())
    with pytest.raises(ValueError, match="no token was cached.*'image does not open': 2"):
        cache(tmp_path / "bad", parts, rows=Rows([{"image": "nowhere.png", "text": "a mug"}] * 2))


def test_an_image_that_does_not_open_is_counted_named_and_skipped(parts, tmp_path, caplog):
    rows = Rows(parts[1])
    rows[3] = {**rows[3], "image": str(tmp_path / "gone.png")}
    with caplog.at_level(logging.WARNING):
        report = cache(tmp_path / "cache", parts, rows=rows)
    assert report["image does not open"] == 1 and report["samples"] == SAMPLES - 1
    assert "gone.png" in caplog.text


def test_hidden_states_that_are_not_finite_stop_or_are_skipped_and_never_stored(parts, tmp_path, monkeypatch):
    def broken(*args, **options):
        z, types = batch_activations(*args, **options)
        broken.calls += 1
        if broken.calls == 4:
            z[0, 0] = torch.inf
        return z, types

    monkeypatch.setattr(activation_cache, "batch_activations", broken)
    broken.calls = 0
    with pytest.raises(ValueError, match="batch of samples 6 to 7: 1 of"):
        cache(tmp_path / "stop", parts)
    broken.calls = 0
    report = cache(tmp_path / "skip", parts, on_nonfinite="skip")
    assert report["not finite"] == 2 and report["samples"] == SAMPLES - 2
    assert all(torch.isfinite(z).all() for z, _ in CachedActivations(tmp_path / "skip", batch_size=8, buffer_size=32))


def test_a_cache_of_another_width_or_none_is_refused(parts, tmp_path):
    with pytest.raises(ValueError, match=r"no cache\.json"):
        CachedActivations(tmp_path)
    cache(tmp_path, parts)
    with pytest.raises(ValueError, match="width 32, but 4096"):
        CachedActivations(tmp_path, 4096)
    assert json.loads((tmp_path / "cache.json").read_text())["layer"] == LAYER
