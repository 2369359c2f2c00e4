"""Training of the grounded read-out on cached states: the cache is the model's own reading, and training resumes."""

import math

import pytest
import torch
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from segcompass.loaders.scene_questions import word_kind
from segcompass.loaders.scenes import load_scenes
from segcompass.trainers.collator import SegCompassCollator
from segcompass.trainers.grounded_masks import CachedStates, GroundedMasksConfig, cache_states, train_grounded
from tests.support.tiny import tiny_segcompass

SETTINGS = dict(patch_steps=4, patch_images=2, mask_steps=4, mask_images=2, save_steps=3, lambda_name=0.1)


def build():
    model, processor = tiny_segcompass("llava", concept_reading="grounded", image_view="frame", max_response_length=200)
    processor.image_processor = SamImageProcessorPil(
        size={"longest_edge": 28}, pad_size={"height": 28, "width": 28}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    with torch.no_grad():
        model.sae.mean_active_activation.fill_(0.5)
    return model, processor


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    model, processor = build()
    rows = list(load_scenes("train", 3, 9, "mixed", True, answers="fitting", questions=3))
    cache_states(model, processor, rows, folder, word_kind, batch_size=5)
    return folder, rows


def test_cached_reading_is_the_models_own(cache):
    folder, rows = cache
    model, processor = build()
    batch = SegCompassCollator(processor, 4 * model.config.key_grid)(rows[:2])
    batch.pop("mask_targets")
    with torch.no_grad():
        outputs = model(**batch)
        read = model.grounded_reading(**CachedStates(folder).batch([0, 1])["inputs"])
    inside = outputs.grounding.patch_mask[:, None].expand_as(read.heatmaps)
    # Codes and states are kept in half precision.
    assert torch.allclose(read.heatmaps[inside], outputs.grounding.patch_heatmaps[inside], atol=0.05)
    assert torch.allclose(read.confidences, outputs.pred_logits, atol=0.05)


def test_a_cache_continues_where_it_ended_and_is_needed(cache, tmp_path):
    folder, rows = cache
    (path,) = folder.glob("*.pt")
    before = path.stat().st_mtime_ns
    model, processor = build()
    cache_states(model, processor, rows, folder, word_kind)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds no cached states"):
        CachedStates(tmp_path)
    plain, _ = tiny_segcompass("llava")
    with pytest.raises(ValueError, match="concept_reading is 'feature'"):
        cache_states(plain, processor, rows, tmp_path)


def test_interrupted_training_ends_as_the_uninterrupted_one(cache, tmp_path):
    folder, _ = cache
    config = GroundedMasksConfig(**SETTINGS)

    def learned(model):
        parts = (model.grounded_reading, model.mask_decoder)
        return torch.cat([p.detach().flatten() for part in parts for p in part.parameters()])

    model, _ = build()
    start = learned(model)
    logged = list(train_grounded(model, folder, tmp_path / "whole.pt", config))
    assert [(entry["phase"], entry["step"]) for entry in logged] == [(p, s) for p in (1, 2) for s in (1, 2, 3, 4)]
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in logged)
    whole = learned(model)
    assert not torch.equal(whole, start)
    for stop in (3, 7):  # in each phase, once at a saved step
        model, path = build()[0], tmp_path / f"{stop}.pt"
        running = train_grounded(model, folder, path, config)
        for _ in range(stop + 1 if stop == 3 else stop):
            next(running)
        running.close()
        model, _ = build()
        list(train_grounded(model, folder, path, config))
        assert torch.equal(learned(model), whole)


def test_other_parts_stay_as_they_are(cache, tmp_path):
    model, _ = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    list(train_grounded(model, cache[0], tmp_path / "state.pt", GroundedMasksConfig(**SETTINGS)))
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"grounded_reading", "mask_decoder"}


def test_rows_of_several_ratios_that_name_nothing_train_too(tmp_path):
    """Qwen2.5-VL sees each image in a grid of its own, and benchmarks have no phrases."""
    model, processor = tiny_segcompass("qwen2_5_vl", concept_reading="grounded")
    with torch.no_grad():
        model.sae.mean_active_activation.fill_(0.5)
    rows = [row for size in ((64, 64), (64, 128), (96, 64)) for row in load_scenes("train", 3, 2, size, True)]
    rows = [{name: value for name, value in row.items() if name != "phrases"} for row in rows]
    rows = [{**row, "image_id": f"{place}-{row['image_id']}"} for place, row in enumerate(rows)]
    cache_states(model, processor, rows, tmp_path / "states")
    cached = CachedStates(tmp_path / "states")
    assert len({len(record["patch_mask"]) for record in cached.records}) > 1 and cached.detectors(())[0] == []
    logged = list(train_grounded(model, tmp_path / "states", tmp_path / "state.pt", GroundedMasksConfig(**SETTINGS)))
    assert all(math.isfinite(entry["loss"]) for entry in logged)


def test_where_a_concept_is_at_home_is_measured_over_grids_of_any_shape(cache):
    cached = CachedStates(cache[0])
    kept = cached.records[0]

    def seen(name, lines, columns):
        """An image with one concept in its left half, one everywhere but in a corner, and one that never fires."""
        down, across = torch.meshgrid(torch.arange(lines), torch.arange(columns), indexing="ij")
        xy = torch.stack([(across.flatten() + 0.5) / columns, (down.flatten() + 0.5) / lines], -1)
        codes = torch.zeros(lines * columns, 3)
        codes[xy[:, 0] < 0.5, 0] = 1.0
        codes[1:, 1] = 1.0
        inside = torch.ones(lines * columns, dtype=torch.bool)
        return {**kept, "image": name, "patch_codes": codes.to_sparse(), "patch_mask": inside, "patch_xy": xy}

    cached.records = [seen("a", 8, 8), seen("b", 16, 8), seen("c", 8, 24)]
    cached.images = [[0], [1], [2]]
    spread, _ = cached.spread_and_start()
    torch.testing.assert_close(spread, torch.tensor([0.5, 1.0, 1.0]), atol=0.03, rtol=0)
