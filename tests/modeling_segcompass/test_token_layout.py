"""Which token is what, on sequences written out by hand. Slots on real prompts: test_modeling.py."""

import torch

from segcompass.modeling_segcompass.token_layout import (
    IMAGE,
    INSTRUCTION,
    RESPONSE,
    concept_token_mask,
    distance_to_slots,
    token_types,
)

PAD, BOS, PICTURE, WORD, REF = 0, 1, 2, 3, 4
IDS = torch.tensor(
    [[PAD, BOS, PICTURE, PICTURE, WORD, WORD, REF, REF], [BOS, PICTURE, PICTURE, WORD, WORD, WORD, REF, PAD]]
)
ATTENTION = (IDS != PAD).long()
IN_RESPONSE = torch.tensor([[False] * 5 + [True] * 3, [False] * 4 + [True] * 4])


def test_types_are_image_instruction_and_response():
    types = token_types(IDS, IN_RESPONSE, PICTURE)
    image, text, answer = IMAGE, INSTRUCTION, RESPONSE
    assert types.tolist() == [
        [text, text, image, image, text, answer, answer, answer],
        [text, image, image, text, answer, answer, answer, answer],
    ]


def test_an_image_token_that_the_model_wrote_is_no_patch():
    written = IDS.masked_fill(IN_RESPONSE & (IDS == WORD), PICTURE)
    assert torch.equal(token_types(written, IN_RESPONSE, PICTURE), token_types(IDS, IN_RESPONSE, PICTURE))


def test_padding_and_special_tokens_may_not_fire():
    mask = concept_token_mask(IDS, ATTENTION, [BOS, REF])
    assert mask.tolist() == [[False, False, True, True, True, True, False, False], [False] + [True] * 5 + [False] * 2]
    assert torch.equal(concept_token_mask(IDS, ATTENTION, []), ATTENTION.bool())


def test_distance_runs_down_to_the_first_concentration_token_or_the_last_token():
    positions, found = torch.tensor([[6, 7], [0, 0]]), torch.tensor([[True, True], [False, False]])
    distance = distance_to_slots(ATTENTION, positions, found)
    assert distance.tolist() == [[6, 5, 4, 3, 2, 1, 0, 0], [6, 5, 4, 3, 2, 1, 0, 0]]
