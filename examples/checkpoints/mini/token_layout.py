"""Which token is what, and where it sits: concentration tokens, tokens that may fire concepts, conclusion, positions.

Pure functions of token ids and masks. Families of MLLMs differ in how image tokens lie on the image: `backbone.py`.
"""

from typing import Any

import torch
from torch import nn

IMAGE, INSTRUCTION, RESPONSE = 0, 1, 2
TEXT_FREQUENCIES = 6
IMAGE_FREQUENCIES = 5
TOKEN_POSITION_DIM = 3 + 2 * TEXT_FREQUENCIES + 4 * IMAGE_FREQUENCIES


def find_slots(input_ids: torch.Tensor, response_mask: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Locate the first K_s concentration tokens of the response, after `</think>`.

    Args:
        input_ids: long (B, T).
        response_mask: bool (B, T), True at response tokens.
        config: SegCompassConfig, for `ref_token_id`, `think_end_id` and `num_slots`.

    Returns:
        tuple: positions, long (B, K_s), 0 where missing, and slot_mask, bool (B, K_s), True where found.

    Raises:
        ValueError: the config does not know the tokens' ids.
    """
    if config.ref_token_id is None or config.think_end_id is None:
        raise ValueError(
            "config.ref_token_id and config.think_end_id are None, so concentration tokens cannot be found; build "
            "the model with SegCompassModel.from_backbones(..., processor=processor) or set both ids."
        )
    after_thought = ((input_ids == config.think_end_id) & response_mask).cumsum(1) > 0
    found = (input_ids == config.ref_token_id) & response_mask & after_thought
    rank = found.cumsum(1) - 1
    slots = torch.arange(config.num_slots, device=input_ids.device)
    hit = found[:, None] & (rank[:, None] == slots[:, None])  # (B, K_s, T)
    return hit.int().argmax(-1), hit.any(-1)


def last_labels(labels: torch.Tensor, logits_to_keep: Any) -> torch.Tensor:
    """The labels that belong to the logits of the last tokens.

    Args:
        labels: long (B, T), -100 where nothing is to be predicted.
        logits_to_keep: of how many tokens there are logits; each but the last predicts the next one's label.

    Returns:
        long (B, logits_to_keep).

    Raises:
        ValueError: no number of tokens, or a label that none of these logits predicts.
    """
    if not isinstance(logits_to_keep, int) or logits_to_keep < 1:
        raise ValueError(
            "logits_to_keep is given with labels; beside labels it is a whole number above 0, and without the fused "
            "head. Leave one of them out."
        )
    dropped = labels.shape[1] - logits_to_keep
    unpredicted = labels[:, : dropped + 1 if dropped > 0 else 0] != -100
    if unpredicted.any():
        row, column = unpredicted.nonzero()[0].tolist()
        raise ValueError(
            f"logits_to_keep={logits_to_keep} of {labels.shape[1]} tokens, but row {row} has a label at token "
            f"{column}, which none of these logits predicts; keep more, or set the label to -100."
        )
    return labels[:, -logits_to_keep:]


def concept_token_mask(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, special_token_ids: list[int]
) -> torch.Tensor:
    """The tokens that may fire concepts: no padding and no special tokens, which are attention sinks.

    Args:
        input_ids: long (B, T).
        attention_mask: (B, T), 0 at padding.
        special_token_ids: ids that never fire.

    Returns:
        bool (B, T).
    """
    special = torch.tensor(special_token_ids, dtype=input_ids.dtype, device=input_ids.device)
    return attention_mask.bool() & ~torch.isin(input_ids, special)


def conclusion_mask(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, response_mask: torch.Tensor, config: Any
) -> torch.Tensor:
    """The words of the reasoning's last sentence, before `</think>`; of all the reasoning when it has one sentence.

    The stop that ends it, tokens that end sentences in general, and special tokens are left out. A decimal point that
    is a token of its own ends a sentence too.

    Args:
        input_ids: long (B, T).
        attention_mask: (B, T), 0 at padding.
        response_mask: bool (B, T), True at response tokens.
        config: SegCompassConfig, for `sentence_end_ids`, `think_end_id` and `special_token_ids`.

    Returns:
        bool (B, T), all False for a response without words.

    Raises:
        ValueError: the config does not know the tokens that end a sentence.
    """
    if not config.sentence_end_ids or config.think_end_id is None:
        raise ValueError(
            "config.sentence_end_ids is empty or config.think_end_id None, so the conclusion of the reasoning cannot "
            "be found; build the model with SegCompassModel.from_backbones(..., processor=processor) or set both."
        )
    thought_over = ((input_ids == config.think_end_id) & response_mask).cumsum(1) > 0
    reasoning = concept_token_mask(input_ids, attention_mask, config.special_token_ids) & response_mask & ~thought_over
    ends = torch.isin(input_ids, torch.tensor(config.sentence_end_ids, device=input_ids.device)) & reasoning
    words = reasoning & ~ends
    sentence = ends.cumsum(1)
    last = sentence.masked_fill(~words, -1).amax(1, keepdim=True)  # (B, 1)
    return words & (sentence == last)


def gather_positions(token_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the marked tokens are, in order.

    Args:
        token_mask: bool (B, T).

    Returns:
        tuple: positions, long (B, N), N the greatest number in a sample and at least 1, and which of them are marked
            tokens, bool (B, N); these come first.
    """
    count = token_mask.sum(1)
    longest = max(1, int(count.max()))
    positions = token_mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    return positions, torch.arange(longest, device=token_mask.device) < count[:, None]


def token_types(input_ids: torch.Tensor, response_mask: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """What each token is.

    Args:
        input_ids: long (B, T).
        response_mask: bool (B, T), True at response tokens.
        image_token_id: the MLLM's image token.

    Returns:
        long (B, T), IMAGE, INSTRUCTION (with the words of the chat template) or RESPONSE. An image token that the
        model wrote shows nothing of the image, so it is RESPONSE.
    """
    is_image = (input_ids == image_token_id) & ~response_mask
    return torch.where(response_mask, RESPONSE, INSTRUCTION).masked_fill(is_image, IMAGE)


def distance_to_slots(attention_mask: torch.Tensor, positions: torch.Tensor, slot_mask: torch.Tensor) -> torch.Tensor:
    """How many tokens come between each token and the first concentration token (without one, the last token).

    Args:
        attention_mask: (B, T), 0 at padding.
        positions: long (B, K_s) from `find_slots`.
        slot_mask: bool (B, K_s) from `find_slots`.

    Returns:
        long (B, T), 0 from the first concentration token on.
    """
    steps = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (attention_mask * steps).amax(1)  # (B,)
    end = torch.where(slot_mask[:, 0], positions[:, 0], last)[:, None]
    return (end - steps).clamp_min(0)


def token_position_features(
    token_types: torch.Tensor, image_xy: torch.Tensor, distance: torch.Tensor, placed: torch.Tensor | None = None
) -> torch.Tensor:
    """Describe where each token sits, so that a concept can carry where it fired.

    Args:
        token_types: long (B, T), IMAGE, INSTRUCTION or RESPONSE.
        image_xy: float (B, T, 2), centre of an image token's patch in [0, 1]; ignored for text.
        distance: float (B, T), tokens from here to the first concentration token; ignored for image tokens.
        placed: bool (B, T), the image tokens that show a patch, others have no position; None = all.

    Returns:
        float (B, T, TOKEN_POSITION_DIM): type indicator, Fourier features of the patch position, of the text distance.
    """
    kind = nn.functional.one_hot(token_types, 3).to(image_xy.dtype)  # (B, T, 3)
    octaves = 2.0 ** torch.arange(IMAGE_FREQUENCIES, device=image_xy.device) * torch.pi / 2
    xy = (image_xy[..., None] * octaves).flatten(-2)  # (B, T, 2 · IMAGE_FREQUENCIES)
    steps = torch.pi / 2.0 ** torch.arange(TEXT_FREQUENCIES, device=image_xy.device)
    text = distance[..., None] * steps  # (B, T, TEXT_FREQUENCIES)
    is_image = kind[..., :1]
    shows = is_image if placed is None else is_image * placed[..., None]
    return torch.cat(
        [kind, shows * xy.sin(), shows * xy.cos(), (1 - is_image) * text.sin(), (1 - is_image) * text.cos()], -1
    )
