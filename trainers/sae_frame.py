"""The frame z' = (z - mean) / scale in which a sparse autoencoder is trained, and the way in and out of it.

Hidden states come at any scale and with any offset, and both spoil the conditioning of the problem. In the frame their
variance is d_in. As activations are homogeneous, only biases, and what the activation adds, differ between the frames:

    h = scale * act(z' W_enc + b_enc'),  b_enc = scale * b_enc' - mean W_enc,  b_dec = scale * b_dec' + mean
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from segcompass.modeling_segcompass.modeling_sparse_autoencoder import SparseAutoencoder

from .activations import Batch, split_batch


@dataclass(frozen=True)
class Frame:
    """Mean and scale of hidden states, and what follows from them for an autoencoder that reads them."""

    mean: torch.Tensor
    """float32 (d_in,)."""
    scale: torch.Tensor
    """float32 scalar: the root of the variance per dimension."""

    @classmethod
    def measure(
        cls,
        activations: Iterable[Batch],
        d_in: int,
        device: torch.device,
        reduce: Callable[[torch.Tensor], torch.Tensor],
    ) -> "Frame":
        """Measure the frame of hidden states.

        Args:
            activations: batches (N, d_in), or pairs of them and their token types.
            d_in: width of the hidden states.
            device: where to sum up.
            reduce: sums a tensor over the processes.

        Returns:
            The frame, the same in all processes.

        Raises:
            ValueError: the hidden states do not vary.
        """
        moments = torch.zeros(2, d_in, dtype=torch.float64, device=device)
        tokens = torch.zeros((), dtype=torch.float64, device=device)
        for batch in activations:
            z = split_batch(batch)[0].to(device).double()
            moments += torch.stack([z.sum(0), z.square().sum(0)])  # (2, d_in)
            tokens += len(z)
        mean, square = reduce(moments) / reduce(tokens)
        scale = (square - mean.square()).mean().sqrt()
        if not scale > 0:
            raise ValueError(
                f"the activations' standard deviation is {scale.item()} over {int(tokens)} tokens; it must be "
                "positive: give a train_dataset with activations that vary."
            )
        return cls(mean.float(), scale.float())

    def to_frame(self, z: torch.Tensor) -> torch.Tensor:
        """Raw hidden states (..., d_in) as an autoencoder in the frame reads them."""
        return (z - self.mean) / self.scale

    @torch.no_grad()
    def enter(self, sae: SparseAutoencoder) -> None:
        """Make an autoencoder of raw hidden states into one that reads them in the frame, up to rounding."""
        sae.b_enc.add_(self.mean @ sae.W_enc).div_(self.scale)
        sae.b_dec.sub_(self.mean).div_(self.scale)
        for name, power in sae.activation.tensors.items():
            getattr(sae, name).div_(self.scale**power)
        for name, power in sae.activation.fields.items():
            setattr(sae.config, name, getattr(sae.config, name) / self.scale.item() ** power)

    @torch.no_grad()
    def leave(self, sae: SparseAutoencoder) -> None:
        """The way back."""
        sae.b_enc.mul_(self.scale).sub_(self.mean @ sae.W_enc)
        sae.b_dec.mul_(self.scale).add_(self.mean)
        for name, power in sae.activation.tensors.items():
            getattr(sae, name).mul_(self.scale**power)
        for name, power in sae.activation.fields.items():
            setattr(sae.config, name, getattr(sae.config, name) * self.scale.item() ** power)

    @contextmanager
    def left(self, sae: SparseAutoencoder) -> Iterator[None]:
        """Within it an autoencoder in the frame reads raw hidden states; afterwards it is bit for bit what it was."""
        tensors = tensors_in_frame(sae)
        fields = {name: getattr(sae.config, name) for name in sae.activation.fields}
        self.leave(sae)
        try:
            yield
        finally:
            put_back(sae, tensors)
            for name, value in fields.items():
                setattr(sae.config, name, value)


def tensors_in_frame(sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    """Copies of the tensors that differ between the frames, by name."""
    return {name: getattr(sae, name).detach().clone() for name in ("b_enc", "b_dec", *sae.activation.tensors)}


@torch.no_grad()
def put_back(sae: SparseAutoencoder, tensors: dict[str, torch.Tensor]) -> None:
    """Give an autoencoder the tensors that `tensors_in_frame` copied."""
    for name, value in tensors.items():
        getattr(sae, name).copy_(value)
