"""Sparse autoencoders from and for SAELens: `cfg.json` and `sae_weights.safetensors` in a folder.

What SAELens calls the architecture of an activation is the activation's business, see `sae_activations`.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .configuration_segcompass import SparseAutoencoderConfig
from .manifest import check, signing
from .sae_activations import SAE_ACTIVATIONS
from .weights import check_finite
from .whole_files import write_whole

if TYPE_CHECKING:
    from .modeling_sparse_autoencoder import SparseAutoencoder

    Autoencoder = TypeVar("Autoencoder", bound=SparseAutoencoder)

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
"""Names that both have for the same tensors of the same shape."""

KNOWN_FIELDS = {
    *("architecture", "d_in", "d_sae", "k", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "metadata"),
    *("normalize_activations", "reshape_activations", "finetuning_scaling_factor", "d_out"),
    *("activation_fn", "activation_fn_str", "activation_fn_kwargs"),
    *("dtype", "device", "use_error_term", "sae_lens_version", "sae_lens_training_version"),  # change no activation
}
"""Fields of SAELens' configuration since release 6 that are read here, or change nothing of what an SAE computes."""


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
        ValueError: an architecture, an activation function or a normalisation that cannot be expressed here, a field
            or a tensor that is not known, numbers that are not finite, or no layer.
        OSError: a file is missing.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    check(folder)
    theirs = json.loads((folder / "cfg.json").read_text())
    weights = load_file(folder / "sae_weights.safetensors")
    sae = sae_class(_config(folder, theirs, layer))
    factor = _scaling_factor(folder, theirs, weights)
    with torch.no_grad():
        put_weights(sae, weights, folder / "sae_weights.safetensors")
        if factor is not None:  # of the activations, where they are decoded
            sae.W_dec.mul_(factor[:, None])
        if theirs.get("apply_b_dec_to_input", True):
            fold_input_bias(sae)
        if theirs.get("rescale_acts_by_decoder_norm", False):
            norm = sae.W_dec.norm(dim=1)  # (d_sae,)
            sae.W_enc.mul_(norm)
            sae.b_enc.mul_(norm)
            sae.W_dec.div_(norm[:, None])
        ours = folder / "mean_active_activation.safetensors"
        if ours.exists():
            put_weights(sae, load_file(ours), ours, ("mean_active_activation",))
    check_finite(sae, folder)
    return sae.to(getattr(torch, dtype)).eval()


def save_saelens(sae: "SparseAutoencoder", folder: str | Path) -> None:
    """Write an SAE as SAELens does, see `SparseAutoencoder.save_saelens`.

    Args:
        sae: the autoencoder.
        folder: where the files go; made if there is none.

    Raises:
        ValueError: SAELens has no architecture for the SAE's activation.
    """
    if sae.activation.saelens_architecture is None:
        raise ValueError(
            f"the SAE's activation is {sae.config.activation!r}, for which SAELens has no architecture; "
            f"{', '.join(name for name, known in SAE_ACTIVATIONS.items() if known.saelens_architecture)} can be saved."
        )
    with signing(folder):
        _write(sae, Path(folder))


def put_weights(
    sae: "SparseAutoencoder", weights: dict[str, torch.Tensor], source: Any, names: tuple[str, ...] | None = None
) -> None:
    """Copy tensors into an SAE, all that it needs and nothing else.

    Args:
        sae: the autoencoder.
        weights: tensors by name.
        source: their file, for the error.
        names: which are needed; None = W_enc, b_enc, W_dec, b_dec and those of the activation.

    Raises:
        ValueError: one is missing, unknown, of another shape, or of whole numbers.
    """
    names = names or (*WEIGHTS, *sae.activation.tensors)
    for what, found in (("lacks", set(names) - weights.keys()), ("also holds", weights.keys() - set(names))):
        if found:
            raise ValueError(
                f"{source} {what} {', '.join(sorted(found))}; an SAE with activation {sae.config.activation!r} has "
                f"{', '.join(names)}."
            )
    for name in names:
        ours, theirs = getattr(sae, name), weights[name]
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{source} holds {name} of shape {tuple(theirs.shape)}, but the configuration beside it means "
                f"{tuple(ours.shape)}; take both from one SAE."
            )
        if not theirs.is_floating_point():
            raise ValueError(f"{source} holds {name} as {theirs.dtype}, where real numbers are needed; fetch it again.")
        with torch.no_grad():
            ours.copy_(theirs)


@torch.no_grad()
def fold_input_bias(sae: "SparseAutoencoder") -> None:
    """Make an autoencoder that reads z - b_dec into one that reads z, by its `b_enc`."""
    sae.b_enc.sub_(sae.b_dec @ sae.W_enc)


def _write(sae, folder):
    from safetensors.torch import save_file

    config = sae.config
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
    weights = {name: getattr(sae, name).detach().cpu().contiguous() for name in names}
    strength = {"mean_active_activation": sae.mean_active_activation.cpu()}
    write_whole(folder / "sae_weights.safetensors", lambda part: save_file(weights, part))
    write_whole(folder / "mean_active_activation.safetensors", lambda part: save_file(strength, part))
    write_whole(folder / "cfg.json", json.dumps(cfg, indent=2) + "\n")


def _config(folder, theirs, layer):
    """Our configuration for theirs. Raises ValueError where something cannot be expressed or is missing."""
    metadata = theirs.get("metadata") or theirs  # releases before 6 had no metadata
    unknown = {name for name in theirs.keys() - KNOWN_FIELDS if theirs[name]} if "metadata" in theirs else set()
    if unknown:
        raise ValueError(
            f"{folder} has fields that are not known here: "
            f"{', '.join(f'{name}={theirs[name]!r}' for name in sorted(unknown))}; if they change nothing that the SAE "
            "computes, remove them from cfg.json."
        )
    heads = ("hook_name_out", "hook_head_index", "hook_point_head_index")  # the last before release 3
    for fields, name in ((theirs, "d_out"), *((metadata, name) for name in heads)):
        if fields.get(name) not in (None, *((fields["d_in"],) if name == "d_out" else ())):
            raise ValueError(
                f"{folder} was saved with {name}={fields[name]!r}; only SAEs that read and rebuild one residual stream "
                "can be loaded."
            )
    function = theirs.get("activation_fn_str") or theirs.get("activation_fn")
    arguments = theirs.get("activation_fn_kwargs") or {}
    if function not in (None, "relu", "topk") or arguments.keys() - {"k"}:
        raise ValueError(
            f"{folder} has the activation function {function!r} {arguments or ''}; 'relu' and 'topk' can be loaded."
        )
    read = {name: known.from_saelens(theirs) for name, known in SAE_ACTIVATIONS.items()}
    activation = next((name for name, fields in read.items() if fields is not None), None)
    if activation is None:
        known = dict.fromkeys(known.saelens_architecture for known in SAE_ACTIVATIONS.values())
        raise ValueError(
            f"{folder} holds a SAELens {theirs['architecture']!r} SAE; {', '.join(map(repr, filter(None, known)))} "
            "can be loaded."
        )
    for name in ("normalize_activations", "reshape_activations"):
        if theirs.get(name) not in (None, False, "none", "None"):
            raise ValueError(
                f"{folder} was saved with {name}={theirs[name]!r}; only 'none' can be loaded: fold it into the "
                "weights with SAELens first."
            )
    hook = metadata.get("hook_name") or metadata.get("hook_point") or ""
    named = _layer_of(hook)
    if layer is not None and named not in (None, layer):
        raise ValueError(f"{folder} was trained at {hook!r}, which is layer {named} here; layer is {layer}.")
    layer = named or layer
    if layer is None:
        raise ValueError(
            f"{folder} was trained at {hook!r}, which names no residual stream after a "
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


def _scaling_factor(folder, theirs, weights):
    """The factor of each feature's activation, (d_sae,), taken out of the weights; None without one."""
    factors = [weights.pop(name) for name in ("scaling_factor", "finetuning_scaling_factor") if name in weights]
    if bool(theirs.get("finetuning_scaling_factor")) and len(factors) != 1:
        raise ValueError(
            f"{folder} was saved with finetuning_scaling_factor, but its weights hold {len(factors)} of them; fetch "
            "the folder again."
        )
    if factors and factors[0].shape != (theirs["d_sae"],):
        raise ValueError(f"{folder} holds a scaling factor of shape {tuple(factors[0].shape)}; d_sae is needed.")
    if theirs.get("finetuning_scaling_factor"):
        return factors[0]
    if any((factor != 1).any() for factor in factors):
        raise ValueError(
            f"{folder} holds a scaling factor, but was saved without finetuning_scaling_factor; set it to true in "
            "cfg.json if the SAE was fine-tuned, or remove the tensor."
        )
    return None


def _layer_of(hook):
    """L of a hook's name as TransformerLens or transformers write it: the residual stream after the L-th block."""
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_post|(?:\w+\.)*layers\.(\d+)", hook):
        return int(found[1] or found[2]) + 1
    if found := re.fullmatch(r"blocks\.([1-9]\d*)\.hook_resid_pre", hook):
        return int(found[1])
    return None
