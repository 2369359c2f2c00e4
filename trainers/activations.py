"""Hidden states of one decoder block of an MLLM, streamed and shuffled: what a sparse autoencoder is trained on.

Blocks above the one asked for are never computed and nothing is written to disk. Knows nothing about the autoencoder.
"""

import inspect
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.utils.data import IterableDataset


class _LayerReached(Exception):
    """Carries the hidden states out of the forward pass and ends it."""

    def __init__(self, hidden_states):
        self.hidden_states = hidden_states


@torch.no_grad()
def layer_hidden_states(model: nn.Module, inputs: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """Run an MLLM up to its `layer`-th decoder block and return that block's output, `hidden_states[layer]`.

    At the last block this is the block's own output, before the final norm that `hidden_states[-1]` has passed.

    Args:
        model: a SegCompass model or a bare transformers LLaVA / Qwen2.5-VL model, in evaluation mode.
        inputs: what the processor gives; entries the MLLM does not take, and labels, are left out.
        layer: L, from 1 to the number of decoder blocks.

    Returns:
        (B, T, d_in) hidden states in the MLLM's dtype, on its device.

    Raises:
        ValueError: the MLLM has no such block.
    """
    mllm = getattr(model, "mllm", model)
    blocks = mllm.get_decoder().layers
    if not 1 <= layer <= len(blocks):
        raise ValueError(
            f"layer is {layer}, but the MLLM has {len(blocks)} decoder blocks; choose one from 1 to {len(blocks)}."
        )
    taken = set(inspect.signature(mllm.forward).parameters) - {"labels"}
    inputs = {name: value.to(mllm.device) for name, value in inputs.items() if name in taken and value is not None}

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


def stream_activations(
    model: nn.Module,
    dataloader: Iterable[dict[str, torch.Tensor]],
    layer: int,
    batch_size: int = 2048,
    buffer_size: int = 32768,
    special_token_ids: Iterable[int] | None = None,
    seed: int = 0,
) -> Iterator[torch.Tensor]:
    """Yield shuffled hidden states of every image, prompt and response token of the samples, one pass over them.

    Tokens are mixed across samples in a buffer that is filled to `buffer_size`, shuffled, emptied by half and filled
    again. Padding (attention mask 0) and special tokens are dropped: their hidden states are attention sinks or noise.
    The model is put in evaluation mode and left in it.

    Args:
        model: a SegCompass model, or a bare transformers LLaVA / Qwen2.5-VL model.
        dataloader: batches as the processor gives them (`input_ids` (B, T), `attention_mask`, `pixel_values`, ...).
        layer: L, the decoder block to read, from 1.
        batch_size: tokens yielded at a time; the last batch may be smaller.
        buffer_size: tokens mixed with one another, at least `2 * batch_size`. The buffer takes
            `4 * buffer_size * d_in` bytes on the model's device, twice that while it is refilled.
        special_token_ids: ids to drop; by default `model.config.special_token_ids`, or none where there are none.
        seed: of the shuffling.

    Yields:
        (batch_size, d_in) float32 tensors on the model's device.

    Raises:
        ValueError: the buffer is too small for the batch, or the MLLM has no such layer.
    """
    if buffer_size < 2 * batch_size:
        raise ValueError(
            f"buffer_size is {buffer_size} tokens, but mixing batches of {batch_size} takes at least {2 * batch_size}; "
            "raise buffer_size or lower batch_size."
        )
    if special_token_ids is None:
        special_token_ids = getattr(model.config, "special_token_ids", None) or ()
    model.eval()
    special = torch.tensor(sorted(special_token_ids), dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    batches = iter(dataloader)
    buffer, exhausted = None, False
    while not exhausted:
        chunks = [] if buffer is None else [buffer]
        held = sum(map(len, chunks))
        while held < buffer_size and not exhausted:
            inputs = next(batches, None)
            if inputs is None:
                exhausted = True
                continue
            keep = ~torch.isin(inputs["input_ids"], special.to(inputs["input_ids"].device))
            if inputs.get("attention_mask") is not None:
                keep &= inputs["attention_mask"].bool()
            hidden_states = layer_hidden_states(model, inputs, layer)
            chunks.append(hidden_states[keep.to(hidden_states.device)].float())
            held += len(chunks[-1])
        if not held:
            return
        buffer = torch.cat(chunks)
        buffer = buffer[torch.randperm(held, generator=generator).to(buffer.device)]
        while len(buffer) > (0 if exhausted else buffer_size // 2):
            yield buffer[:batch_size]
            buffer = buffer[batch_size:]


class ActivationDataset(IterableDataset):
    """The stream of `stream_activations` as a dataset that `SparseAutoencoderTrainer` reads, batches ready made.

    Each pass runs the MLLM again over the samples and shuffles differently. On several processes each one runs the
    MLLM on its own share of the batches.

    Args:
        model, layer, batch_size, buffer_size, special_token_ids, seed: as in `stream_activations`.
        dataloader: batches that can be gone through more than once (a `DataLoader` or a list, not a generator).

    Raises:
        ValueError: `dataloader` can be read only once.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[dict[str, torch.Tensor]],
        layer: int,
        batch_size: int = 2048,
        buffer_size: int = 32768,
        special_token_ids: Iterable[int] | None = None,
        seed: int = 0,
    ):
        if isinstance(dataloader, Iterator):
            raise ValueError(
                f"dataloader is a {type(dataloader).__name__}, which can be read once, but training reads it once to "
                "measure the activations and once an epoch; give a DataLoader or a list of batches."
            )
        self.model = model
        self.dataloader = dataloader
        self.layer = layer
        self.batch_size = batch_size
        self.buffer_size = buffer_size
        self.special_token_ids = special_token_ids
        self.seed = seed
        self.passes = 0

    def __iter__(self):
        seed = self.seed + self.passes
        self.passes += 1
        return stream_activations(
            self.model,
            self._share(),
            self.layer,
            batch_size=self.batch_size,
            buffer_size=self.buffer_size,
            special_token_ids=self.special_token_ids,
            seed=seed,
        )

    def _share(self):
        rank, processes = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return (inputs for index, inputs in enumerate(self.dataloader) if index % processes == rank)
