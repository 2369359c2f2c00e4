"""Sparse autoencoders from and for SAELens: `cfg.json` and `sae_weights.safetensors` in a folder.

What SAELens calls the architecture of an activation is the activation's business, see `sae_activations`.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .configuration_segcompass import SparseAutoencoderConfig
from .sae_activations import SAE_ACTIVATIONS

if TYPE_CHECKING:
    from .modeling_sparse_autoencoder import SparseAutoencoder

    Autoencoder = TypeVar("Autoencoder", bound=SparseAutoencoder)

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
"""Names that both have for the same tensors of the same shape."""


def load_saelens(
    sae_class: "type[Autoencoder]", folder: str | Path, layer: int | None = None, dtype: str = "float32"
) -> "Autoencoder":
    """Load an SAE that SAELens saved, see `SparseAutoencoder.from_saelens`.

    Args:
        sae_class: `SparseAutoencoder`, or a subclass of it.
        folder: where the two files are.
        layer: L, when SAELens' configuration does not name a residual stream hook.
        dtype: name of the weights' dtype.

    Returns:
        An autoencoder that computes what SAELens' does.

    Raises:
        ValueError: an architecture or a normalisation that cannot be expressed here, or no layer.
        OSError: a file is missing.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    theirs = json.loads((folder / "cfg.json").read_text())
    weights = load_file(folder / "sae_weights.safetensors")
    sae = sae_class(_config(folder, theirs, layer))
    with torch.no_grad():
        for name in (*WEIGHTS, *sae.activation.tensors):
            getattr(sae, name).copy_(weights[name])
        if theirs.get("apply_b_dec_to_input", False):
            sae.b_enc.sub_(sae.b_dec @ sae.W_enc)
        if theirs.get("rescale_acts_by_decoder_norm", False):
            norm = sae.W_dec.norm(dim=1)  # (d_sae,)
            sae.W_enc.mul_(norm)
            sae.b_enc.mul_(norm)
            sae.W_dec.div_(norm[:, None])
        ours = folder / "mean_active_activation.safetensors"
        if ours.exists():
            sae.mean_active_activation.copy_(load_file(ours)["mean_active_activation"])
    return sae.to(getattr(torch, dtype))


def save_saelens(sae: "SparseAutoencoder", folder: str | Path) -> None:
    """Write an SAE as SAELens does, see `SparseAutoencoder.save_saelens`.

    Args:
        sae: the autoencoder.
        folder: where the files go; made if there is none.

    Raises:
        ValueError: SAELens has no architecture for the SAE's activation.
    """
    from safetensors.torch import save_file

    config = sae.config
    if sae.activation.saelens_architecture is None:
        raise ValueError(
            f"the SAE's activation is {config.activation!r}, for which SAELens has no architecture; "
            f"{', '.join(name for name, known in SAE_ACTIVATIONS.items() if known.saelens_architecture)} can be saved."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cfg: dict[str, Any] = {
        "architecture": sae.activation.saelens_architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "model_name": config.backbone,
            "hook_name": f"blocks.{config.layer - 1}.hook_resid_post",
            "dataset_path": config.dataset,
            "context_size": config.token_window,
            "prepend_bos": True,
        },
    }
    cfg |= sae.activation.saelens_fields(config)
    names = (*WEIGHTS, *sae.activation.tensors)
    save_file(
        {name: getattr(sae, name).detach().cpu().contiguous() for name in names}, folder / "sae_weights.safetensors"
    )
    save_file(
        {"mean_active_activation": sae.mean_active_activation.cpu()}, folder / "mean_active_activation.safetensors"
    )
    (folder / "cfg.json").write_text(json.dumps(cfg, indent=2) + "\n")


def _config(folder, theirs, layer):
    """Our configuration for theirs. Raises ValueError where something cannot be expressed or is missing."""
    metadata = theirs.get("metadata") or theirs  # releases before 6 had no metadata
    read = {name: known.from_saelens(theirs) for name, known in SAE_ACTIVATIONS.items()}
    activation = next((name for name, fields in read.items() if fields is not None), None)
    if activation is None:
        known = dict.fromkeys(known.saelens_architecture for known in SAE_ACTIVATIONS.values())
        raise ValueError(
            f"{folder} holds a SAELens {theirs['architecture']!r} SAE; {', '.join(map(repr, filter(None, known)))} "
            "can be loaded."
        )
    for name in ("normalize_activations", "reshape_activations"):
        if theirs.get(name, "none") != "none":
            raise ValueError(
                f"{folder} was saved with {name}={theirs[name]!r}; only 'none' can be loaded: fold it into the "
                "weights with SAELens first."
            )
    layer = layer or _layer_of(metadata.get("hook_name") or "")
    if layer is None:
        raise ValueError(
            f"{folder} was trained at {metadata.get('hook_name')!r}, which names no residual stream after a "
            "decoder block; say which block with layer=."
        )
    return SparseAutoencoderConfig(
        d_in=theirs["d_in"],
        d_sae=theirs["d_sae"],
        activation=activation,
        backbone=metadata.get("model_name"),
        layer=layer,
        dataset=metadata.get("dataset_path"),
        token_window=metadata.get("context_size"),
        **read[activation],
    )


def _layer_of(hook):
    """L of a hook's name as TransformerLens or transformers write it: the residual stream after the L-th block."""
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_post|(?:\w+\.)*layers\.(\d+)", hook):
        return int(found[1] or found[2]) + 1
    if found := re.fullmatch(r"blocks\.([1-9]\d*)\.hook_resid_pre", hook):
        return int(found[1])
    return None
