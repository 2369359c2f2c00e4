"""Learning to tell equal things apart: which images ask for them, what it learns, that it resumes."""

import pytest
import torch

from segcompass.loaders.scene_questions import word_kind
from segcompass.loaders.scenes import load_scenes, scene_question
from segcompass.modeling_segcompass.grounded_reading import GroundedReading
from segcompass.trainers.grounded_masks import CachedStates, cache_states
from segcompass.trainers.grounded_ties import TiesConfig, asks_for_twins, learn_ties
from tests.support.tiny import tiny_segcompass

from .test_grounded_masks import build

TWINS = dict(answers="fitting", questions=3, twins=1.0)


def with_map():
    model, processor = build()
    model.config.grounded_rank, model.config.grounded_map = 4, "places"
    torch.manual_seed(0)
    model.grounded_reading = GroundedReading(model.config)
    model.grounded_reading.init_weights()
    model.grounded_reading.spread[::2] = 0.2
    torch.nn.init.zeros_(model.grounded_reading.patch_side)
    return model, processor


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """States of ordinary scenes, and of scenes whose objects all look alike."""
    folders = [tmp_path_factory.mktemp(name) for name in ("states", "twins")]
    model, processor = with_map()
    for folder, rows in zip(
        folders,
        (load_scenes("train", 3, 6, 128, True, questions=3, answers="fitting"), load_scenes("train", 4, 12, **TWINS)),
        strict=True,
    ):
        cache_states(model, processor, list(rows), folder, word_kind, batch_size=6)
    return folders


def learned(model):
    return torch.cat([value.detach().flatten() for value in model.grounded_reading.parameters()])


def test_twins_are_targets_that_bear_the_same_words(caches):
    assert asks_for_twins([["red", "ball"], ["ball", "red", "red"]])
    assert not asks_for_twins([["red", "ball"], ["blue", "ball"]])
    assert not asks_for_twins([["red", "ball"]]) and not asks_for_twins([]) and not asks_for_twins([[], []])
    for record in CachedStates(caches[1]).records:
        *_, seed, number = record["image"].split("-")
        scene, _ = scene_question("train", int(seed), int(number), size=128, twins=1.0, answers="fitting")
        assert len({(thing.colour, thing.shape) for thing in scene.objects}) == 1


GRID = ("upsampling.", "key_")


def changed_by(model, caches, path, config):
    """The names of what training changed, without "grounded_reading.", and what was logged."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logged = list(learn_ties(model, caches, path, config))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(name.startswith("grounded_reading.") for name in changed)
    return {name.removeprefix("grounded_reading.") for name in changed}, logged


def test_first_the_whole_choice_learns_then_that_of_places(caches, tmp_path):
    model, _ = with_map()
    changed, logged = changed_by(
        model, caches, tmp_path / "looks.pt", TiesConfig(look_steps=2, place_steps=0, images=3)
    )
    assert {"concept_bias", "slot_queries", "same_concept", "gain", "patch_side"} < changed
    assert not any(name.startswith(GRID) for name in changed)
    assert [(entry["phase"], entry["step"]) for entry in logged] == [(1, 1), (1, 2)]
    before = model.grounded_reading.concept_bias.detach().clone()
    changed, logged = changed_by(
        model, caches, tmp_path / "places.pt", TiesConfig(look_steps=0, place_steps=2, images=3)
    )
    assert changed == {"concept_bias", "slot_bias", "word_side", "patch_side"}
    assert [(entry["phase"], entry["step"]) for entry in logged] == [(2, 1), (2, 2)]
    moved = model.grounded_reading.concept_bias != before
    assert moved.any() and not (moved & ~model.grounded_reading.is_place).any()  # what chooses looks is what it was


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_interrupted_ties_end_as_uninterrupted_ones(stop, caches, tmp_path):
    config = TiesConfig(look_steps=4, place_steps=4, images=3, save_steps=3)
    model, _ = with_map()
    list(learn_ties(model, caches, tmp_path / "whole.pt", config))
    whole, (model, _) = learned(model), with_map()
    running = learn_ties(model, caches, tmp_path / "parts.pt", config)
    for _ in range(stop):
        next(running)
    running.close()
    model, _ = with_map()
    list(learn_ties(model, caches, tmp_path / "parts.pt", config))
    assert torch.equal(learned(model), whole)


def codes(rows):
    """Sparse codes (tokens, 128): of each token its concepts, all of strength 2."""
    dense = torch.zeros(len(rows), 128)
    for row, concepts in enumerate(rows):
        dense[row, list(concepts)] = 2.0
    return dense.to_sparse()


def twins(image, side):
    """A question whose words fire the look 1, and 100 for "left" or 102 for "right"; 2 is at home left, 4 right."""
    patches = [(2,) * (place < 5) + (4,) * (place >= 5) + (1,) * (place in (1, 8)) for place in range(10)]
    coverage = torch.zeros(2, 10)
    coverage[0, 1], coverage[1, 8] = 1.0, 1.0
    return {
        "image": image,
        "names": [["red"], ["red"]] if side == "both" else [["red"]],
        "shown": {"red": coverage.any(0)},
        "things": ["a", "b"],
        "word_codes": codes([{"left": (1, 100), "right": (1, 102), "both": (1,)}[side]]),
        "word_states": torch.zeros(1, 32),
        "patch_codes": codes(patches),
        "patch_mask": torch.ones(10, dtype=torch.bool),
        "patch_xy": torch.stack([torch.linspace(0.05, 0.95, 10), torch.full((10,), 0.5)], -1),
        "coverage": {"left": coverage[:1], "right": coverage[1:], "both": coverage}[side],
    }


def test_it_learns_that_a_word_of_another_concept_means_a_place(tmp_path):
    records = [twins(f"{number}", side) for number in range(4) for side in ("left", "right", "both")]
    torch.save(records, tmp_path / "00000.pt")
    model, _ = with_map()
    reading = model.grounded_reading
    batch = CachedStates(tmp_path).batch([0, 1])["inputs"]

    def shown():
        with torch.no_grad():
            return reading(**batch).heatmaps.argmax(-1)  # (2, K)

    assert torch.equal(shown()[0], shown()[1])  # no word moves a slot yet
    list(
        learn_ties(
            model,
            [tmp_path],
            tmp_path / "state.part",
            TiesConfig(look_steps=0, place_steps=80, images=4, rates=(1e-3, 2e-2)),
        )
    )
    assert (shown()[0] == 1).any() and not (shown()[0] == 8).all()
    assert (shown()[1] == 8).any() and not (shown()[1] == 1).all()
    assert not torch.equal(shown()[0], shown()[1])


def test_rows_without_twins_are_refused(caches, tmp_path):
    plain, _ = tiny_segcompass("llava")
    with pytest.raises(ValueError, match="concept_reading is 'feature'"):
        next(learn_ties(plain, caches, tmp_path / "state.pt", TiesConfig()))
    model, _ = with_map()
    with pytest.raises(ValueError, match="asks for two things of equal names; cache rows that do"):
        next(learn_ties(model, caches[:1], tmp_path / "state.pt", TiesConfig()))
    model.grounded_reading.maps_places_only = False
    with pytest.raises(ValueError, match="grounded_map is 'all', and the map would move looks"):
        next(learn_ties(model, caches, tmp_path / "state.pt", TiesConfig()))
    with pytest.raises(ValueError, match="holds no cached states"):
        next(learn_ties(model, [caches[1], tmp_path / "none"], tmp_path / "state.pt", TiesConfig()))


def test_a_state_of_another_training_is_refused(caches, tmp_path):
    """Before there were two phases, states held none."""
    model, _ = with_map()
    torch.save({"step": 2000, "reading": {}, "optimizer": {}}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt is no state of this training, .* holds step, reading, optimizer"):
        next(learn_ties(model, caches, tmp_path / "state.pt", TiesConfig()))
