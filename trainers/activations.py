"""Hidden states of one decoder block of an MLLM, streamed and shuffled: what a sparse autoencoder is trained on.

Blocks above the one asked for are never computed and nothing is written to disk (`trainers.activation_cache` does
that). Knows nothing about the autoencoder.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel

from segcompass.modeling_segcompass import token_layout
from segcompass.modeling_segcompass.backbone import backbone_of
from segcompass.modeling_segcompass.token_layout import IMAGE, INSTRUCTION, RESPONSE

SPECIAL = RESPONSE + 1
"""A token kind beside the model's IMAGE, INSTRUCTION and RESPONSE: attention sinks and separators, never trained on."""

_NAMES = {IMAGE: "image", INSTRUCTION: "instruction", RESPONSE: "response", SPECIAL: "special"}
TOKEN_TYPES = tuple(_NAMES[kind] for kind in range(len(_NAMES)))
"""Names of the kinds of tokens; a token's kind is a place here. Caches on disk hold these numbers."""

Batch = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""A batch as datasets give it: hidden states (N, d_in), alone or with their token types (N,)."""

logger = logging.getLogger(__name__)


def mllm_of(model: nn.Module) -> PreTrainedModel:
    """The MLLM of a SegCompass model; a bare MLLM is its own."""
    return cast(PreTrainedModel, getattr(model, "mllm", model))


class _LayerReached(Exception):
    """Carries the hidden states out of the forward pass and ends it."""

    def __init__(self, hidden_states):
        self.hidden_states = hidden_states


@torch.no_grad()
def layer_hidden_states(model: nn.Module, inputs: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """Run an MLLM up to its `layer`-th decoder block and return that block's output, `hidden_states[layer]`.

    At the last block this is the block's own output, before the final norm that `hidden_states[-1]` has passed.

    Args:
        model: a SegCompass model or a bare transformers MLLM, in evaluation mode.
        inputs: what the processor gives; entries the MLLM does not take, and labels, are left out.
        layer: L, from 1 to the number of decoder blocks.

    Returns:
        (B, T, d_in) hidden states in the MLLM's dtype, on its device.

    Raises:
        ValueError: the MLLM has no such block.
    """
    mllm = mllm_of(model)
    blocks = backbone_of(mllm).blocks(mllm)
    if not 1 <= layer <= len(blocks):
        raise ValueError(
            f"layer is {layer}, but the MLLM has {len(blocks)} decoder blocks; choose one from 1 to {len(blocks)}."
        )
    inputs = {name: value.to(mllm.device) for name, value in backbone_of(mllm).mllm_inputs(mllm, inputs).items()}

    def stop(block, args, output):
        raise _LayerReached(output[0] if isinstance(output, tuple) else output)

    hook = blocks[layer - 1].register_forward_hook(stop)
    try:
        mllm(**inputs, use_cache=False)
    except _LayerReached as reached:
        return reached.hidden_states
    finally:
        hook.remove()
    raise RuntimeError(f"the MLLM's forward pass never ran decoder block {layer}.")


def token_types(model: nn.Module, inputs: dict[str, torch.Tensor], special_token_ids: Iterable[int]) -> torch.Tensor:
    """The type of every token, as the model sees it, or SPECIAL; padding gets one too.

    Args:
        model: a SegCompass model or a bare transformers MLLM.
        inputs: what the processor gives: `input_ids` (B, T) and, if there is a response, `response_mask` (B, T).
        special_token_ids: ids that are SPECIAL, unless they are the image token's.

    Returns:
        uint8 (B, T), indices into `TOKEN_TYPES`.
    """
    ids = inputs["input_ids"]
    response = inputs.get("response_mask")
    response = torch.zeros_like(ids, dtype=torch.bool) if response is None else response.bool()
    types = token_layout.token_types(ids, response, mllm_of(model).config.image_token_id)
    special = torch.isin(ids, torch.tensor(sorted(special_token_ids), dtype=torch.long, device=ids.device))
    return types.masked_fill(special & (types != IMAGE), SPECIAL).to(torch.uint8)


def keep_finite(z: torch.Tensor, name: str, on_nonfinite: str) -> bool:
    """Whether a batch of hidden states has neither NaN nor infinity.

    Args:
        z: (..., d_in), the batch.
        name: what the error or the warning calls the batch.
        on_nonfinite: "stop" raises, "skip" warns and returns False.

    Returns:
        False where it has some and is to be skipped.

    Raises:
        ValueError: it has some and `on_nonfinite` is "stop", or `on_nonfinite` is neither.
    """
    if on_nonfinite not in ("stop", "skip"):
        raise ValueError(f"on_nonfinite is {on_nonfinite!r}; choose 'stop' or 'skip'.")
    # least and greatest are NaN where any number is: one pass without memory, several times as fast as `isfinite`
    if not z.numel() or torch.stack(z.aminmax()).isfinite().all():
        return True
    bad = int((~torch.isfinite(z)).flatten(0, -2).any(-1).sum())
    found = f"{name}: {bad} of {z[..., 0].numel()} tokens have NaN or infinite hidden states"
    if on_nonfinite == "stop":
        raise ValueError(f"{found}; compute in float32 or bfloat16, or leave such batches out: on_nonfinite='skip'.")
    logger.warning("%s; the batch is skipped", found)
    return False


def batch_activations(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    layer: int,
    special_token_ids: Iterable[int],
    keep_special: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (n, d_in) float32 and types (n,) uint8 of a batch's tokens in order, without padding.

    Special tokens are left out too, unless `keep_special`.
    """
    types = token_types(model, inputs, special_token_ids)
    keep = torch.ones_like(types, dtype=torch.bool) if keep_special else types != SPECIAL
    if inputs.get("attention_mask") is not None:
        keep &= inputs["attention_mask"].bool()
    hidden_states = layer_hidden_states(model, inputs, layer)
    keep = keep.to(hidden_states.device)
    return hidden_states[keep].float(), types.to(hidden_states.device)[keep]


def model_special_tokens(model: nn.Module) -> tuple[int, ...]:
    """Ids that never enter the concept path: `model.config.special_token_ids`, or none where there are none."""
    return tuple(getattr(model.config, "special_token_ids", None) or ())


def shuffle_tokens(
    chunks: Iterator[tuple[torch.Tensor, torch.Tensor]], batch_size: int, buffer_size: int, seed: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a stream of (hidden states, types) into batches whose tokens come from all over a buffer.

    The buffer is filled to `buffer_size` tokens, shuffled, emptied by half and filled again. It takes
    `4 * buffer_size * d_in` bytes on the device of the chunks, twice that while it is refilled.

    Args:
        chunks: hidden states (n, d_in) and types (n,) of any number of tokens at a time.
        batch_size: tokens per batch; the last one may be smaller.
        buffer_size: tokens mixed with one another, at least `2 * batch_size`.
        seed: of the shuffling.

    Yields:
        Hidden states (batch_size, d_in) and types (batch_size,).

    Raises:
        ValueError: the buffer is too small for the batch.
    """
    if buffer_size < 2 * batch_size:
        raise ValueError(
            f"buffer_size is {buffer_size} tokens, but mixing batches of {batch_size} takes at least {2 * batch_size}; "
            "raise buffer_size or lower batch_size."
        )
    generator = torch.Generator().manual_seed(seed)
    buffer: tuple[torch.Tensor, torch.Tensor] | None = None
    exhausted = False
    while not exhausted:
        held = [] if buffer is None else [buffer]
        size = sum(len(chunk[0]) for chunk in held)
        while size < buffer_size and not exhausted:
            chunk = next(chunks, None)
            if chunk is None:
                exhausted = True
                continue
            held.append(chunk)
            size += len(chunk[0])
        if not size:
            return
        order = torch.randperm(size, generator=generator)
        z, types = (torch.cat(parts)[order.to(parts[0].device)] for parts in zip(*held, strict=True))
        while len(z) > (0 if exhausted else buffer_size // 2):
            yield z[:batch_size], types[:batch_size]
            z, types = z[batch_size:], types[batch_size:]
        buffer = z, types


def stream_activations(
    model: nn.Module,
    dataloader: Iterable[dict[str, torch.Tensor]],
    layer: int,
    batch_size: int = 2048,
    buffer_size: int = 32768,
    special_token_ids: Iterable[int] | None = None,
    seed: int = 0,
    with_types: bool = False,
    keep_special: bool = False,
    on_nonfinite: str = "stop",
    report: Counter | None = None,
) -> Iterator[Batch]:
    """Yield shuffled hidden states of every image, prompt and response token of the samples, one pass over them.

    Tokens are mixed across samples (`shuffle_tokens`). Padding (attention mask 0) and special tokens are dropped: their
    hidden states are attention sinks or noise. The model is put in evaluation mode and left in it.

    Args:
        model: a SegCompass model, or a bare transformers MLLM.
        dataloader: batches as the processor gives them (`input_ids` (B, T), `attention_mask`, `pixel_values`, ...). A
            batch's `skipped`, a Counter of samples that could not be used and why, goes to the report.
        layer: L, the decoder block to read, from 1.
        batch_size: tokens yielded at a time; the last batch may be smaller.
        buffer_size: tokens mixed with one another, at least `2 * batch_size`.
        special_token_ids: ids to drop; by default `model.config.special_token_ids`, or none where there are none.
        seed: of the shuffling.
        with_types: yield pairs with the tokens' types (N,) uint8, indices into `TOKEN_TYPES`.
        keep_special: do not drop special tokens.
        on_nonfinite: "stop" at an MLLM batch with NaN or infinite hidden states, or "skip" it whole.
        report: counts `samples` read, and what was skipped, by reason.

    Yields:
        (batch_size, d_in) float32 tensors on the model's device, with their types if asked for.

    Raises:
        ValueError: the buffer is too small for the batch, the MLLM has no such layer, or hidden states are not finite.
    """
    special = model_special_tokens(model) if special_token_ids is None else special_token_ids
    model.eval()
    report = Counter() if report is None else report

    def chunks():
        for index, inputs in enumerate(dataloader):
            report.update(inputs.get("skipped", ()))
            if "input_ids" not in inputs:
                continue
            z, types = batch_activations(model, inputs, layer, special, keep_special)
            if keep_finite(z, f"batch {index} of the samples", on_nonfinite):
                report["samples"] += len(inputs["input_ids"])
                yield z, types
            else:
                report["not finite"] += len(inputs["input_ids"])

    for z, types in shuffle_tokens(chunks(), batch_size, buffer_size, seed):
        yield (z, types) if with_types else z


def take_tokens(activations: Iterable[Batch], num_tokens: int) -> Iterator[Batch]:
    """Yield batches until they hold `num_tokens` tokens or run out; the last batch is not cut."""
    for batch in activations:
        yield batch
        num_tokens -= len(split_batch(batch)[0])
        if num_tokens <= 0:
            return


def split_batch(batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states (N, d_in) and token types (N,) of a batch; the types are None where the data do not name them."""
    if torch.is_tensor(batch):
        return batch, None
    z, types = batch
    return z, types


class ActivationDataset(IterableDataset):
    """The stream of `stream_activations` as a dataset that `SparseAutoencoderTrainer` reads, batches ready made.

    Each pass runs the MLLM again over the samples and shuffles differently: pass n with seed + n. On several processes
    each one runs the MLLM on its own share of the batches. `report` counts the samples of all passes, and the skipped.

    Args:
        model: a SegCompass model, or a bare transformers MLLM.
        dataloader: batches that can be read more than once (a `DataLoader` or a list, not a generator).
        layer: L, the decoder block to read, from 1.
        seed: of the first pass.
        **options: the rest of `stream_activations`' arguments.

    Raises:
        ValueError: `dataloader` can be read only once.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[dict[str, torch.Tensor]],
        layer: int,
        seed: int = 0,
        **options: Any,
    ):
        if isinstance(dataloader, Iterator):
            raise ValueError(
                f"dataloader is a {type(dataloader).__name__}, which can be read once, but training reads it once to "
                "measure the activations and once per epoch; give a DataLoader or a list of batches."
            )
        self.model = model
        self.dataloader = dataloader
        self.layer = layer
        self.seed = seed
        self.options = options
        self.report: Counter = Counter()
        self.passes = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass pass number `epoch`, whose shuffling it then has."""
        self.passes = epoch

    def __iter__(self):
        seed = self.seed + self.passes
        self.passes += 1
        return stream_activations(self.model, self._share(), self.layer, seed=seed, report=self.report, **self.options)

    def _share(self):
        rank, processes = process_share()
        return (inputs for index, inputs in enumerate(self.dataloader) if index % processes == rank)


def process_share() -> tuple[int, int]:
    """(rank, number) of this process among those that train together; (0, 1) alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
