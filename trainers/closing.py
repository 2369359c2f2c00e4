"""Responses that are closed by force, for a policy that has not learned to write concentration tokens.

While it reasons the policy is free; once it writes `</think>`, or would end, or has only room left for it, the sampler
writes the K_s concentration tokens and the end of the sequence. Knows nothing about rewards or losses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


class CloseResponse(LogitsProcessor):
    """Closes the responses of one call to `generate`.

    Args:
        think_end_id: the id of `</think>`.
        ref_token_id: the id of the concentration token.
        end_ids: the ids that end a sequence.
        num_slots: K_s.
        max_new_tokens: length of the longest response, more than K_s + 2.

    Raises:
        ValueError: a response of that length has no room to reason.

    Example:
        >>> close = CloseResponse(think_end_id=5, ref_token_id=6, end_ids=[2], num_slots=4, max_new_tokens=128)
        >>> outputs = model.segment(**inputs, logits_processor=[close], max_new_tokens=128)
    """

    def __init__(
        self, think_end_id: int, ref_token_id: int, end_ids: Sequence[int], num_slots: int, max_new_tokens: int
    ):
        self.think_end_id, self.ref_token_id, self.end_ids = think_end_id, ref_token_id, list(end_ids)
        self.num_slots = num_slots
        self.last_place = max_new_tokens - num_slots - 2
        """The place in a response at which `</think>` stands at the latest."""
        if self.last_place < 1:
            raise ValueError(
                f"a response of {max_new_tokens} tokens has no room to reason: </think>, {num_slots} concentration "
                "tokens and the end follow; raise max_completion_length."
            )
        self.prompt_length: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores with which the next token is sampled.

        Args:
            input_ids: long (B, T), prompts and what was written; the first call of a generation has no response yet.
            scores: float (B, V), the policy's.

        Returns:
            float (B, V): one token alone where it is forced. Elsewhere the end of the sequence counts as `</think>`,
            and the concentration token is not written.
        """
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        written = input_ids[:, self.prompt_length :]  # (B, t)
        length, closes = written.shape[1], written == self.think_end_id
        closed = closes.any(1) if length else torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        after = length - 1 - closes.int().argmax(1) if length else torch.zeros(len(scores), device=scores.device)
        free = scores.clone()
        ends = [self.think_end_id, *self.end_ids]
        free[:, self.think_end_id] = scores[:, ends].logsumexp(1)
        free[:, [*self.end_ids, self.ref_token_id]] = -torch.inf
        forced = scores.new_full((len(scores),), self.think_end_id, dtype=torch.long)
        forced[closed & (after < self.num_slots)] = self.ref_token_id
        forced[closed & (after >= self.num_slots)] = self.end_ids[0]
        alone = torch.full_like(scores, -torch.inf).scatter_(1, forced[:, None], 0.0)
        return torch.where((closed | (length >= self.last_place))[:, None], alone, free)

    def actions(self, response: Sequence[int]) -> list[int]:
        """Which tokens of a response the policy chose.

        Args:
            response: the ids that were written.

        Returns:
            1 where it did and 0 where a token was forced.
        """
        ids = list(response)
        place = ids.index(self.think_end_id) if self.think_end_id in ids else len(ids)
        chosen = place + (place < min(len(ids), self.last_place))  # </think> too, unless the limit forced it
        return [1] * chosen + [0] * (len(ids) - chosen)


def closing(model: Any, max_new_tokens: int) -> CloseResponse:
    """What closes the responses of one generation with a model.

    Args:
        model: a SegCompassModel.
        max_new_tokens: length of the longest response.

    Returns:
        A new processor of scores.

    Raises:
        ValueError: a response of that length has no room to reason.
    """
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = model.mllm.generation_config.eos_token_id
    config = model.config
    return CloseResponse(
        config.think_end_id,
        config.ref_token_id,
        ends if isinstance(ends, (list, tuple)) else [ends],
        config.num_slots,
        max_new_tokens,
    )


@contextmanager
def closed_generation(model: Any, max_new_tokens: int) -> Iterator[CloseResponse]:
    """Close every response that the model generates while this is open.

    Args:
        model: a SegCompassModel.
        max_new_tokens: length of the longest response.

    Yields:
        The processor of scores that tells actions from forced tokens.

    Raises:
        ValueError: a response of that length has no room to reason.
    """
    generate = model.generate

    def closed(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop("logits_processor", None) or []
        processors = LogitsProcessorList([*given, closing(model, max_new_tokens)])
        return generate(*args, logits_processor=processors, **kwargs)

    model.generate = closed
    try:
        yield closing(model, max_new_tokens)
    finally:
        del model.generate
