"""How well a sparse autoencoder does: explained variance, L0, dead features and the like, and its mean activations.

Reads batches of hidden states, with or without token types; knows nothing about where they come from, or of training.
"""

from collections.abc import Callable, Iterable

import torch

from segcompass.modeling_segcompass.modeling_sparse_autoencoder import SparseAutoencoder

from .activations import SPECIAL, TOKEN_TYPES, Batch, keep_finite, split_batch

Reduce = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def evaluate_sae(sae: SparseAutoencoder, activations: Iterable[Batch], reduce: Reduce | None = None) -> dict:
    """Score an autoencoder on hidden states it has not been trained on.

    Args:
        sae: the autoencoder, which reads raw hidden states.
        activations: batches (N, d_in), or pairs of them and their token types (N,).
        reduce: sums a tensor over the processes, where each has its own share of the activations; all of them then
            return one result.

    Returns:
        `explained_variance` 1 - Σ_d Var(z - ẑ) / Σ_d Var(z), variances over all tokens (a constant bias of ẑ is
        forgiven); `fvu` Σ ||z - ẑ||² / Σ ||z - mean||² (it is counted); `l0` active features per token; `l0_share`
        l0 / d_sae; `dead_share` share of features active on none of the tokens; `mse` mean of ||z - ẑ||²; `l2_ratio`
        mean of ||ẑ|| / ||z||; `relative_reconstruction_bias` Σ ||ẑ||² / Σ z·ẑ, below 1 where ẑ is too short;
        `density_histogram` features by the decade of the share of tokens on which they are active, from the rarest
        (`never`, then `1e-06` for [1e-6, 1e-5), ...); `tokens` how many were seen, without which `dead_share` says
        little. Where the batches name token types, `by_type` holds the same of each type that occurs, and special
        tokens, which no SAE here is trained on, count only there.

    Raises:
        ValueError: `activations` is empty, of another width than the autoencoder's, or not finite.
    """
    groups_there_are = 1 + len(TOKEN_TYPES)
    # In the shape of any batch's sums, so that a process whose share is empty takes part.
    none = torch.zeros(0, sae.config.d_in, dtype=torch.float64, device=sae.device)
    sums = moments(none, none, none.sum(1), none.new_zeros(0, groups_there_are))
    fired = none.new_zeros(groups_there_are, sae.config.d_sae)
    typed = False
    for number, batch in enumerate(activations):
        z, types = split_batch(batch)
        keep_finite(z, f"batch {number} of the hidden states", "stop")
        z = z.to(sae.device)
        h = sae.encode(z)  # (N, d_sae)
        groups = token_groups(types, z, torch.float64)  # (N, 1 + len(TOKEN_TYPES)), or (N, 1) without types
        groups = torch.nn.functional.pad(groups, (0, groups_there_are - groups.shape[1]))
        on = (h > 0).double()
        z = z.double()
        add_moments(sums, moments(z, sae.decode(h).double(), on.sum(1), groups))
        fired = fired + groups.T @ on  # (G, d_sae)
        typed |= types is not None
    if reduce is not None:
        sums, fired = {name: reduce(value) for name, value in sums.items()}, reduce(fired)
        typed = bool(reduce(torch.tensor(int(typed), device=sae.device)))
    if not sums["tokens"].any():
        raise ValueError(
            "there are 0 activations to evaluate on; give an iterable of (N, d_in) tensors, N of at least 1."
        )
    quality = _quality(sums, fired, 0)
    if typed:
        quality["by_type"] = {
            name: _quality(sums, fired, group) for group, name in enumerate(TOKEN_TYPES, 1) if sums["tokens"][group] > 0
        }
    return quality


@torch.no_grad()
def measure_mean_active_activation(
    sae: SparseAutoencoder, activations: Iterable[Batch], reduce: Reduce | None = None
) -> None:
    """Set `sae.mean_active_activation` to each feature's mean activation over the tokens where it is active.

    A feature that is never active gets the median of the others, so that it is ranked on their scale when it fires
    after all; where none is active, all keep 1.

    Args:
        sae: the autoencoder, which reads raw hidden states.
        activations: batches (N, d_in), or pairs of them and their token types (N,).
        reduce: sums a tensor over the processes, where each has its own share of the activations.
    """
    total = torch.zeros(sae.config.d_sae, dtype=torch.float64, device=sae.device)
    counts = torch.zeros_like(total)
    for batch in activations:
        h = sae.encode(split_batch(batch)[0].to(sae.device))  # (N, d_sae)
        total += h.sum(0)
        counts += torch.count_nonzero(h, dim=0)
    if reduce is not None:
        total, counts = reduce(total), reduce(counts)
    means = (total / counts)[counts > 0]
    usual = means.median() if len(means) else 1.0
    sae.mean_active_activation.copy_(torch.where(counts > 0, total / counts.clamp(min=1), usual))


# -- sums over the tokens of a group, from which all measures come -----------------------------------------------------


def token_groups(types: torch.Tensor | None, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Which tokens each group sums over.

    Args:
        types: (N,), indices into `TOKEN_TYPES`, or None.
        z: (N, d_in), the tokens' hidden states.
        dtype: of the result.

    Returns:
        (N, G), 1 or 0. Group 0 holds all tokens but special ones; groups from 1 on hold each type's tokens, where types
        are known.
    """
    if types is None:
        return torch.ones(len(z), 1, dtype=dtype, device=z.device)
    types = types.to(z.device)
    kinds = torch.arange(len(TOKEN_TYPES), device=z.device)
    return torch.cat([(types != SPECIAL)[:, None], types[:, None] == kinds], 1).to(dtype)  # (N, 1 + len(TOKEN_TYPES))


def moments(
    z: torch.Tensor, z_hat: torch.Tensor, active: torch.Tensor, groups: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sum up a batch.

    Args:
        z: (N, d_in), hidden states.
        z_hat: (N, d_in), their reconstructions.
        active: (N,), features active at each token.
        groups: (N, G), from `token_groups`.

    Returns:
        Sums over the tokens of each group, (G,) or (G, d_in) each.
    """
    square, reconstruction_square = z.square().sum(1), z_hat.square().sum(1)
    columns = {
        "reconstruction_square": reconstruction_square,
        "product": (z * z_hat).sum(1),
        "ratio": (reconstruction_square / square.clamp_min(1e-30)).sqrt(),
    }
    sums = {name: groups.T @ column for name, column in columns.items()}  # (N,) -> (G,)
    return sums | variance_moments(z, z - z_hat, active, groups)


def variance_moments(
    z: torch.Tensor, residual: torch.Tensor, active: torch.Tensor, groups: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sum up of a batch what `variances` and L0 are made from.

    Args:
        z: (N, d_in), hidden states.
        residual: (N, d_in), z - ẑ.
        active: (N,), features active at each token.
        groups: (N, G), from `token_groups`.

    Returns:
        Sums over the tokens of each group, (G,) or (G, d_in) each.
    """
    columns = {
        "square": z.square().sum(1),
        "residual_square": residual.square().sum(1),
        "active": active.to(groups.dtype),
    }
    sums = {name: groups.T @ column for name, column in columns.items()}  # (N,) -> (G,)
    return sums | {"tokens": groups.sum(0), "sum": groups.T @ z, "residual_sum": groups.T @ residual}


def add_moments(sums: dict[str, torch.Tensor], more: dict[str, torch.Tensor]) -> None:
    """Add the `moments` of another batch to `sums`, which may be empty."""
    for name, value in more.items():
        sums[name] = sums.get(name, 0) + value


def variances(sums: dict[str, torch.Tensor], group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance of z and of z - ẑ over the tokens of a group, summed over dimensions: two scalars."""
    tokens = sums["tokens"][group]
    variance, residual_variance = (
        sums[square][group] / tokens - (sums[mean][group] / tokens).square().sum()
        for square, mean in (("square", "sum"), ("residual_square", "residual_sum"))
    )
    return variance, residual_variance


def _quality(sums, fired, group):
    tokens = sums["tokens"][group]
    variance, residual_variance = variances(sums, group)
    l0 = (sums["active"][group] / tokens).item()
    density = fired[group] / tokens  # (d_sae,)
    decades = density[density > 0].log10().floor().clamp(-6, -1).long()
    return {
        "explained_variance": 1 - (residual_variance / variance).item(),
        "fvu": (sums["residual_square"][group] / tokens / variance).item(),
        "l0": l0,
        "l0_share": l0 / len(density),
        "dead_share": (density == 0).double().mean().item(),
        "mse": (sums["residual_square"][group] / tokens).item(),
        "l2_ratio": (sums["ratio"][group] / tokens).item(),
        "relative_reconstruction_bias": (sums["reconstruction_square"][group] / sums["product"][group]).item(),
        "density_histogram": {"never": int((density == 0).sum())}
        | {f"1e-{-decade:02d}": int((decades == decade).sum()) for decade in range(-6, 0)},
        "tokens": int(tokens),
    }
