"""Interventions on cached states do what `segment(concept_scale=...)` does, and the sums over them are right."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from segcompass.modeling_segcompass.states import ReasoningStates
from segcompass.white_box.decoding import decode_with, overlap, single_sample
from segcompass.white_box.faithfulness import ORDERS, slot_faithfulness
from tests.support.scripted import Script, lively_segcompass, noise_image
from tests.support.tiny import BACKBONES

RESPONSES = ["<think>a red box</think><REF_POS><REF_POS><REF_POS>", "<think>b</think><REF_POS>"]
SIZES = [(40, 40), (30, 44)]


@pytest.fixture(scope="module", params=BACKBONES)
def parts(request):
    """A model all of whose features are concepts, its inputs for two samples, sequences and states."""
    model, processor = lively_segcompass(request.param, num_concepts=128)
    images = [noise_image(*size, seed) for seed, size in enumerate(SIZES)]
    inputs = processor(images=images, text=["the red box", "it"])
    generation = dict(logits_processor=[Script(processor.tokenizer, RESPONSES)], max_new_tokens=80)
    sequences, states = model.reason(**inputs, **generation)
    return model, processor, inputs, sequences, states


@torch.no_grad()
def test_masks_from_kept_states_are_those_of_segment(parts):
    model, processor, inputs, sequences, states = parts
    script = Script(processor.tokenizer, RESPONSES)
    outputs = model.segment(**inputs, logits_processor=[script], max_new_tokens=80)
    again = model.decode_masks(**states._asdict())
    assert torch.equal(outputs.sequences, sequences)
    for name in ("pred_masks", "pred_logits", "heatmaps", "concept_weights"):
        assert torch.equal(getattr(outputs, name), getattr(again, name)), name


@torch.no_grad()
def test_taking_concepts_away_equals_the_users_concept_scale(parts):
    model, _, _, _, states = parts
    for sample in (0, 1):
        one = single_sample(states, sample)
        whole = model.decode_masks(**one._asdict())
        indices = whole.concept_indices[0]
        taken = [0, 3, 7]
        kept = [place for place in range(len(indices)) if place not in taken]
        masks = decode_with(model, one, indices, [np.arange(len(indices)), np.array(kept)], 0)
        scaled = model.decode_masks(**one._asdict(), concept_scale={int(indices[place]): 0.0 for place in taken})
        assert torch.equal(masks[0], whole.pred_masks[0, 0] > 0)
        assert torch.equal(masks[1], scaled.pred_masks[0, 0] > 0)


@torch.no_grad()
def test_what_is_taken_away_is_not_replaced(parts):
    model, _, _, _, states = parts
    one = single_sample(states, 0)
    codebook = model.query_codebook
    whole, codebook.num_concepts = codebook.num_concepts, 10
    try:
        indices = model.decode_masks(**one._asdict()).concept_indices[0]
        scale = torch.zeros(1, model.config.sae_config.d_sae)
        scale[0, indices[4:]] = 1
        left = model.decode_masks(**one._asdict(), concept_scale=scale)
        assert set(left.concept_indices[0, left.concept_values[0] > 0].tolist()) <= set(indices[4:].tolist())
    finally:
        codebook.num_concepts = whole


def test_batches_of_variants_change_nothing(parts):
    model, _, _, _, states = parts
    first, second = (slot_faithfulness(model, states, 0, draws=2, batch_size=size) for size in (3, 64))
    for a, b in zip(first, second, strict=True):
        if isinstance(a, dict):
            assert all(np.array_equal(a[order], b[order]) for order in ORDERS)
        else:
            assert a == b
    assert first.full == 1.0, "without a target a mask is compared with itself"


@pytest.mark.parametrize(
    "arguments, message", [(dict(slot=2, sample=1), "slot 2 of sample 1"), (dict(slot=0, sample=2), "sample 2 is out")]
)
def test_bad_requests_are_named(parts, arguments, message):
    model, _, _, _, states = parts
    with pytest.raises(ValueError, match=message):
        slot_faithfulness(model, states, **arguments)
    with pytest.raises(ValueError, match="no mask made of concepts"):
        slot_faithfulness(model, states, 0, query_source="tokens")


class Row:
    """A model whose mask is a row of cells, one lit by each concept that is kept. Concept j weighs 8 - j."""

    config = SimpleNamespace(sae_config=SimpleNamespace(d_sae=12))

    def decode_masks(self, concept_scale=None, query_source="both", **states):
        indices = torch.arange(2, 10)
        scale = torch.ones(1, 12) if concept_scale is None else concept_scale
        lit = scale[:, indices]
        return SimpleNamespace(
            concept_weights=(8.0 - torch.arange(8)).expand(1, 1, 8) / 36,
            concept_values=torch.ones(1, 8),
            concept_indices=indices[None],
            slot_mask=torch.ones(1, 1, dtype=torch.bool),
            pred_masks=(lit - 0.5)[:, None, None],
        )


def test_numbers_of_a_mask_whose_cells_are_its_concepts():
    words = torch.zeros(1, 3)
    states = ReasoningStates(words, words, words, z=torch.zeros(1, 3, 2), last_hidden=torch.zeros(1, 3, 2))
    target = torch.tensor([[True, True, True, True, False, False, False, False]])
    measured = slot_faithfulness(Row(), states, 0, target=target, top=2, draws=400, fractions=(0.0, 0.5, 1.0))
    assert measured.full == 0.5
    assert measured.deletion["weight"].tolist() == [0.5, 0.0, 0.0]
    assert measured.deletion["reverse"].tolist() == [0.5, 1.0, 0.0]
    assert measured.insertion["weight"].tolist() == [0.0, 1.0, 0.5]
    assert measured.insertion["reverse"].tolist() == [0.0, 0.0, 0.5]
    assert measured.without_top == pytest.approx(2 / 8) and measured.only_top == pytest.approx(2 / 4)
    # two random cells of eight: how many of the four wanted ones are hit is hypergeometric
    hits = stats.hypergeom(8, 4, 2).pmf([0, 1, 2])
    without = sum(share * (4 - hit) / (6 + hit) for hit, share in enumerate(hits))
    only = sum(share * hit / (6 - hit) for hit, share in enumerate(hits))
    assert measured.without_random == pytest.approx(without, abs=0.03)
    assert measured.only_random == pytest.approx(only, abs=0.03)


def test_overlap_of_empty_masks_is_one():
    masks = torch.tensor([[[False, False]], [[True, False]], [[True, True]]])
    assert overlap(masks, torch.tensor([[False, False]])).tolist() == [1, 0, 0]
    assert overlap(masks, torch.tensor([[True, False]])).tolist() == [0, 1, 0.5]
