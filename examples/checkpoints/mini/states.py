"""Reading the MLLM's hidden states while it runs: layer L for the SAE, the last layer for the concentration tokens.

A `StateRecorder` belongs to one call and hears only the passes made in its own thread, so that several calls at once
on one model keep their states apart. Its hooks are gone when the call is over. States must have the shape of what was
written; `generation_options.py` says which options of `generate` can be followed.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from .finite import refuse_non_finite


class ReasoningStates(NamedTuple):
    """What masks are decoded from, again and again: `model.decode_masks(**states._asdict())`.

    Example:
        sequences, states = model.reason(**inputs)
        outputs = model.decode_masks(**states._asdict(), concept_scale={4711: 0.0})
        first = model.decode_masks(**states.rows([0])._asdict())
    """

    input_ids: torch.Tensor
    """long (B, T), prompt and response, but for the last token, which was written and never read back."""
    attention_mask: torch.Tensor
    """long (B, T), 0 at padding and after the end of a response."""
    response_mask: torch.Tensor
    """bool (B, T), True at response tokens."""
    z: torch.Tensor
    """float (B, T, d_π), hidden states at the SAE's layer."""
    last_hidden: torch.Tensor
    """float (B, T, d_π), the last hidden states."""
    image_embeddings: torch.Tensor | None = None
    """float (B, d_k, h, w) image keys K, or (1, d_k, h, w) when all questions share one image."""
    reshaped_input_sizes: torch.Tensor | None = None
    """long (B, 2), the image's (H, W) inside F_enc's frame; None = the whole frame."""
    patch_boxes: torch.Tensor | None = None
    """float (B, P, 4), which part of the image each image token shows (`patch_boxes.py`)."""

    def rows(self, rows: slice | Sequence[int]) -> "ReasoningStates":
        """The states of some of the samples; embeddings of an image that all questions share stay as they are."""
        shared = [name for name, value in self._asdict().items() if value is None or len(value) < len(self.input_ids)]
        return self._replace(
            **{name: value[rows] for name, value in self._asdict().items() if name not in shared},
        )

    def trimmed(self) -> "ReasoningStates":
        """The same states without the tokens that are padding in every sample."""
        used = self.attention_mask.any(0).nonzero()[:, 0]
        columns = slice(int(used[0]), int(used[-1]) + 1)
        per_token = ("input_ids", "attention_mask", "response_mask", "z", "last_hidden")
        return self._replace(**{name: getattr(self, name)[:, columns] for name in per_token})


class StateRecorder:
    """Keeps the states of the MLLM's passes that this thread makes while the recorder is open.

    A recorder opened inside another one hears instead of it. `SegCompassModel.reading_states` makes one.

    Args:
        mllm: the MLLM whose passes are followed.
        block: its L-th decoder block.
        language_model: its decoder.

    Example:
        with model.reading_states() as recorder:
            sequences = model.generate(**inputs)
        outputs = model.decode_masks(**recorder.states._replace(image_embeddings=keys)._asdict())
    """

    def __init__(self, mllm: nn.Module, block: nn.Module, language_model: nn.Module):
        self.mllm, self.block, self.language_model = mllm, block, language_model
        self.z: list[torch.Tensor] = []
        """float (B, t, d_π) of each pass, the output of block L."""
        self.last_hidden: list[torch.Tensor] = []
        """float (B, t, d_π) of each pass."""
        self.states: Any = None
        """the ReasoningStates that `generate` left, without the image; None before."""
        self.generating = False
        """whether the passes heard are those of a generation."""
        self.whole_passes = False
        """whether each pass holds the whole sequence so far (no key-value cache), so that only the last one counts."""
        self.steer: Callable[[torch.Tensor], torch.Tensor] | None = None
        """what the blocks after block L get in the place of its output, float (B, t, d_π); None changes nothing. `z`
        keeps the output as it was, so that what is steered here is not steered again where masks are decoded."""

    def __enter__(self) -> "StateRecorder":
        self._hooks = [
            self.block.register_forward_hook(self._keep_z),
            self.language_model.register_forward_hook(self._keep_last_hidden),
            self.mllm.register_forward_hook(self._check_logits),
        ]
        self._outer = _OPEN.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _OPEN.reset(self._outer)
        for hook in self._hooks:
            hook.remove()

    def start_generation(self, whole_passes: bool) -> None:
        """Forget what was heard: the passes to come write a response.

        Args:
            whole_passes: each of them holds the whole sequence so far, as without a key-value cache.
        """
        self.generating, self.whole_passes, self.states = True, whole_passes, None
        self.z.clear()
        self.last_hidden.clear()

    def _keep(self, kept, states):
        if _OPEN.get() is self:
            if self.whole_passes:
                kept.clear()
            kept.append(states)

    def _keep_z(self, module, inputs, output):
        z = output[0] if isinstance(output, tuple) else output
        self._keep(self.z, z)
        if self.steer is None or _OPEN.get() is not self:
            return None
        steered = self.steer(z)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered

    def _keep_last_hidden(self, module, inputs, output):
        self._keep(self.last_hidden, output.last_hidden_state)

    def _check_logits(self, module, inputs, output):
        if self.generating and _OPEN.get() is self:  # -inf is a token switched off; NaN and +inf have no largest
            refuse_non_finite({"the MLLM's next-token logits": output.logits[:, -1].amax(-1)}, module)

    def states_of_pass(self, input_ids: Any, attention_mask: Any, response_mask: Any) -> ReasoningStates:
        """The states of the one pass over prompt and response, without the image.

        Args:
            input_ids: long (B, T).
            attention_mask: (B, T), 0 at padding.
            response_mask: bool (B, T), True at response tokens.

        Returns:
            ReasoningStates: without the image and the patches' boxes.

        Raises:
            ValueError: the pass did not hold these tokens, all of them.
        """
        (z,), (last_hidden,) = self.z, self.last_hidden
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}
        for name, value in given.items():
            if value.shape != z.shape[:2]:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, the MLLM's pass was over {tuple(z.shape[:2])} tokens; "
                    "masks need prompt and response in one pass, and one value of each of these per token."
                )
        return ReasoningStates(input_ids, attention_mask, response_mask, z, last_hidden)

    def states_of_generation(
        self,
        sequences: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        eos: Any,
        pad: Any = None,
    ) -> ReasoningStates:
        """The states of the passes in which a response was written, put together.

        Args:
            sequences: long (B, T + 1), prompt and response as generated.
            input_ids: long (B, T_prompt), the prompt.
            attention_mask: long (B, T_prompt), 0 at padding; None = no padding.
            eos: id or ids that end a response; None = nothing does.
            pad: id that fills a row which ended before the others did; None = no row did.

        Returns:
            ReasoningStates: without the image and the patches' boxes.

        Raises:
            ValueError: the passes heard are not those in which these sequences were written.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        heard = [tuple(z.shape[:2]) for z in self.z]
        batch, length = sequences.shape
        read_all = sum(tokens for _, tokens in heard) in (length - 1, length)
        if not read_all or any(rows != batch for rows, _ in heard) or len(self.last_hidden) != len(heard):
            raise ValueError(
                f"{batch} sequences of {length} tokens were written, but the MLLM's passes heard meanwhile (rows, "
                f"tokens) are {heard[:3]}{' ...' if len(heard) > 3 else ''}; masks need one sequence per prompt whose "
                "tokens are each read once, in this thread: leave out what makes generate work in another way."
            )
        z, last_hidden = torch.cat(self.z, 1), torch.cat(self.last_hidden, 1)  # (B, T, d_π)
        read = sequences[:, : z.shape[1]]  # the last token was written, but never read back
        start = input_ids.shape[1]
        written = _written(read[:, start:], eos) & ~_filled(sequences, pad)[:, start : z.shape[1]]
        return ReasoningStates(
            input_ids=read,
            attention_mask=torch.cat([attention_mask, written.to(attention_mask.dtype)], 1),
            response_mask=torch.cat([torch.zeros_like(attention_mask, dtype=torch.bool), written], 1),
            z=z,
            last_hidden=last_hidden,
        )


_OPEN: ContextVar[StateRecorder | None] = ContextVar("open state recorder", default=None)


def open_recorder(mllm: nn.Module) -> StateRecorder | None:
    """The recorder that is open in this thread, if it follows this MLLM."""
    recorder = _OPEN.get()
    return recorder if recorder is not None and recorder.mllm is mllm else None


def _written(response, eos):
    """True up to and including the end-of-sequence token: bool (B, T_response)."""
    if eos is None:
        return torch.ones_like(response, dtype=torch.bool)
    ended = torch.isin(response, torch.as_tensor(eos, device=response.device).flatten())
    return (ended.cumsum(1) - ended.int()) == 0


def _filled(sequences, pad):
    """True in the run of pad tokens at the end of a row that ended early (by a stop string, say): bool (B, T)."""
    if pad is None:
        return torch.zeros_like(sequences, dtype=torch.bool)
    return (sequences != pad).flip(1).cumsum(1).flip(1) == 0
