"""The sparse autoencoder E_sae, D_sae (section 3.2, Eq. 7): hidden states in, a few active dictionary atoms out.

It reads the raw hidden states of one MLLM layer, whatever their scale. It knows nothing about tokens, images or how
those hidden states were gathered; what its activation decides is in `sae_activations`, and it does not train itself:
see `trainers.sae_trainer`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_segcompass import SparseAutoencoderConfig
from .old_names import OLD_WEIGHTS
from .public_saes import load_public
from .sae_activations import SAE_ACTIVATIONS
from .saelens import load_saelens, save_saelens
from .saved_folders import check_given, check_loaded, check_saved, own_config, signing_saved


@dataclass
class SparseAutoencoderOutput(ModelOutput):
    """What one pass of the autoencoder gives; every scalar is a mean over the N tokens."""

    loss: torch.Tensor | None = None
    """Eq. 7, scalar: `misfit`, and where the activation has a penalty, its coefficient times `penalty`."""
    reconstruction: torch.Tensor | None = None
    """ẑ, (..., d_in)."""
    feature_acts: torch.Tensor | None = None
    """h(z), (..., d_sae), non-negative; None when not asked for."""
    mse: torch.Tensor | None = None
    """||z - ẑ||², scalar: squared error summed over the d_in dimensions."""
    misfit: torch.Tensor | None = None
    """What training makes small beside the penalty, scalar: `mse`; with "matryoshka" in training, the mean of the same
    over the nested dictionaries."""
    penalty: torch.Tensor | None = None
    """Scalar, before its coefficient: Σ_j h_j ||W_dec[j]|| with "relu", `l0` with "jumprelu"; None without penalty."""
    l0: torch.Tensor | None = None
    """|S(z)| of Eq. 4, scalar: features different from zero. With "jumprelu" it has a gradient for the thresholds."""
    active: torch.Tensor | None = None
    """(...,) features active at each token."""
    fired: torch.Tensor | None = None
    """(d_sae,) tokens at which each feature is active."""


class SparseAutoencoder(PreTrainedModel):
    """Sparse autoencoder of section 3.2: h = act(z W_enc + b_enc), ẑ = h W_dec + b_dec.

    Parameters are `W_enc` (d_in, d_sae), `b_enc` (d_sae,), `W_dec` (d_sae, d_in), whose rows are the dictionary atoms,
    and `b_dec` (d_in,); `activation` may add its own, as the `threshold` (d_sae,) of "batchtopk" and others. The
    buffer `mean_active_activation` (d_sae,) is each feature's mean activation over the tokens where it is active: ones
    until it is measured. A concept's strength means little beside another's; its ratio to this mean does, so concepts
    are ranked by it.

    Args:
        config: its shape and activation.

    Example:
        >>> sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=64, d_sae=1024, activation="topk", k=8))
        >>> indices, values = sae.encode_sparse(torch.randn(5, 64), max_active=8)  # (5, 8) each
        >>> loss = sae(torch.randn(5, 64)).loss
    """

    config_class = SparseAutoencoderConfig
    base_model_prefix = "sae"
    main_input_name = "hidden_states"
    _supports_sdpa = _supports_flash_attn = True  # it has no attention, so it stands in no model's way

    config: SparseAutoencoderConfig
    mean_active_activation: torch.Tensor

    def __init__(self, config: SparseAutoencoderConfig):
        super().__init__(config)
        self.activation = SAE_ACTIVATIONS[config.activation]()
        self.W_enc = nn.Parameter(torch.empty(config.d_in, config.d_sae))
        self.b_enc = nn.Parameter(torch.empty(config.d_sae))
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.empty(config.d_in))
        self.activation.add_tensors(self)
        self.register_buffer("mean_active_activation", torch.ones(config.d_sae))
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load a saved SAE, also an earlier version's; unlike transformers' default, wrong weights are an error.

        Args:
            pretrained_model_name_or_path: folder or Hub id, or None with `config` and `state_dict`.
            *args: as transformers'.
            output_loading_info: also return transformers' report on the weights.
            **kwargs: as transformers' (`dtype`, `revision`, ...).

        Returns:
            SparseAutoencoder: in evaluation mode; with `output_loading_info` a tuple of it and the report.

        Raises:
            ValueError: the folder is another model's or not what was saved; it lacks a weight of the SAE, or holds
                others, or numbers that are not finite.
            OSError: there is no such folder, or it has no config.json.
        """
        path = pretrained_model_name_or_path
        if path is None:
            check_given(kwargs)
        else:
            folder = check_saved(path, kwargs)
            own_config(path, PreTrainedConfig.get_config_dict(folder)[0], cls.config_class.model_type)
        keywords = {"key_mapping": OLD_WEIGHTS, **kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = super().from_pretrained(path, *args, **keywords)
        sae, info = loaded
        check_loaded(sae, info, path)
        return (sae, info) if output_loading_info else sae

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', under today's names; the folder is signed.

        Args:
            save_directory: made if absent.
            *args: as transformers'.
            **kwargs: as transformers', but for `push_to_hub` and `save_original_format`.

        Raises:
            ValueError: `push_to_hub`, which would upload the folder before it is signed; `save_original_format`.
        """
        with signing_saved(save_directory, kwargs):
            super().save_pretrained(save_directory, *args, **{**kwargs, "save_original_format": False})

    @torch.no_grad()
    def _init_weights(self, module):
        """Atoms are random directions of norm 1 and the encoder their transpose; biases are zero."""
        if isinstance(module, SparseAutoencoder):
            init.normal_(module.W_dec)
            init.copy_(module.W_dec, nn.functional.normalize(module.W_dec, dim=1))
            init.copy_(module.W_enc, module.W_dec.T)
            init.zeros_(module.b_enc)
            init.zeros_(module.b_dec)
            module.activation.init_tensors(module)
            init.ones_(module.mean_active_activation)

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Encode hidden states into sparse activations, h(z) of section 3.2.

        Args:
            z: (..., d_in) hidden states of any floating dtype; computed in the dtype of `W_enc`.

        Returns:
            (..., d_sae) non-negative activations. With "topk" at most `k` of a token's differ from zero.

        Raises:
            ValueError: the last dimension of `z` is not `d_in`.
        """
        return self.activation.encode(self, self._pre_activations(z))

    def decode(self, h: torch.Tensor) -> torch.Tensor:
        """Reconstruct hidden states (..., d_in) from activations `h` (..., d_sae)."""
        return h @ self.W_dec + self.b_dec

    def encode_selected(
        self, z: torch.Tensor, indices: torch.Tensor, smallest: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode some features only, differentiably: the columns `indices` of `encode(z)`, never the whole of it.

        Args:
            z: (..., N, d_in) hidden states, of one sample or a batch of them.
            indices: (..., M) long, features in [0, d_sae) of each sample.
            smallest: (..., N), the smallest activation that counts at each token, from `max_over_tokens`. Where a
                token's features compete ("topk") and it is None, activations are returned even where they lose.

        Returns:
            (..., N, M) non-negative activations, equal to `encode(z)[..., indices]` in value and gradient.

        Raises:
            ValueError: the last dimension of `z` is not `d_in`.
        """
        z = self._checked(z)
        encoder = self.W_enc[:, indices].movedim(
            0, -2
        )  # (..., d_in, M); along the rows of W_enc, as they lie in memory
        indices = indices[..., None, :]  # (..., 1, M)
        h = self.activation.activate(self, z @ encoder + self.b_enc[indices], indices)  # (..., N, M)
        if smallest is None:
            return h
        return h * (h >= smallest[..., None] * (1 - 1e-5))  # the other product's sums may be in another order

    @torch.no_grad()
    def max_over_tokens(
        self, z: torch.Tensor, token_mask: torch.Tensor, max_elements: int = 2**23
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Find each feature's greatest activation in each sample, in chunks, without gradients.

        Args:
            z: (B, T, d_in) hidden states.
            token_mask: bool (B, T), tokens to look at.
            max_elements: about how many numbers to hold at once.

        Returns:
            Activations (B, d_sae), 0 where a feature is active at none of the tokens, and the smallest activation that
            wins at each token, (B, T), where a token's features compete ("topk"). Elsewhere the latter is None and the
            activations may be rounded to half precision; measure those that matter with `encode_selected`.
        """
        return self.activation.max_over_tokens(self, z, token_mask, max_elements)

    @torch.no_grad()
    def encode_sparse(
        self, z: torch.Tensor, max_active: int, chunk_size: int = 4096
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """List each token's strongest features as index-activation pairs (Eq. 4), without gradients.

        Holds activations of `chunk_size` tokens at a time, never all N of them.

        Args:
            z: (N, d_in) hidden states.
            max_active: A, how many features of a token to list at most, in [1, d_sae]. Weaker ones are left out.
            chunk_size: tokens encoded at a time.

        Returns:
            indices (N, A) long and values (N, A), strongest first. Places beyond a token's last active feature hold
            index 0 and value 0.

        Raises:
            ValueError: the last dimension of `z` is not `d_in`, or `max_active` is out of range.
        """
        if not 1 <= max_active <= self.config.d_sae:
            raise ValueError(
                f"max_active is {max_active}, but the SAE has {self.config.d_sae} features; "
                f"choose a number from 1 to {self.config.d_sae}."
            )
        z = self._checked(z)
        indices = torch.zeros(len(z), max_active, dtype=torch.long, device=z.device)
        values = torch.zeros(len(z), max_active, dtype=z.dtype, device=z.device)
        for start in range(0, len(z), chunk_size):
            rows = slice(start, start + chunk_size)
            strongest, features = self.activation.strongest(self, self._pre_activations(z[rows]), max_active)
            found = slice(strongest.shape[1])
            values[rows, found] = strongest
            indices[rows, found] = features.masked_fill(strongest == 0, 0)
        return indices, values

    def forward(self, hidden_states: torch.Tensor, output_feature_acts: bool = True) -> SparseAutoencoderOutput:
        """Encode, decode and score (Eq. 7). With "topk", "batchtopk" and "matryoshka" gradients touch the kept only.

        Args:
            hidden_states: (..., d_in) hidden states of the configured layer, as the MLLM gives them.
            output_feature_acts: False leaves out `feature_acts`, which nothing else needs.

        Returns:
            SparseAutoencoderOutput.

        Raises:
            ValueError: the last dimension of `hidden_states` is not `d_in`.
        """
        z = self._checked(hidden_states)
        code = self.activation.forward(self, z, output_feature_acts)
        mse = (z - code.reconstruction).square().sum(-1).mean()  # (..., d_in) -> scalar
        loss = misfit = mse if code.nested is None else (z[..., None, :] - code.nested).square().sum(-1).mean()
        penalty = self.activation.penalty(self, code)
        if self.activation.coefficient is not None:
            loss = misfit + getattr(self.config, self.activation.coefficient) * penalty
        return SparseAutoencoderOutput(
            loss=loss,
            reconstruction=code.reconstruction,
            feature_acts=code.feature_acts if output_feature_acts else None,
            mse=mse,
            misfit=misfit,
            penalty=penalty,
            l0=code.active.mean(),
            active=code.active.detach(),
            fired=code.fired,
        )

    @classmethod
    def from_public(
        cls,
        source: str | Path,
        layer: int | None = None,
        k: int | None = None,
        dtype: str = "float32",
        revision: str | None = None,
        **hub: Any,
    ) -> Self:
        """Load an SAE that others published: Qwen-Scope, Gemma Scope 2, sparsify, dictionary_learning or SAELens.

        It computes what the authors' code does. `layer` counts as everywhere here: the authors' block n, counted from
        0, is layer n + 1, so that layer 13 of Qwen-Scope is the file `layer12.sae.pt`.

        Args:
            source: a folder, the file of the tensors, or a place on the Hub: `ORG/REPO`, `ORG/REPO/FOLDER`,
                `hf://ORG/REPO/FILE`, `ORG/REPO@REVISION/FOLDER`.
            layer: L, which of several SAEs in it; where files do not say which block they read, what to note.
            k: features that a token keeps, where neither the files nor the repository's name says so.
            dtype: name of the weights' dtype.
            revision: branch, tag or commit on the Hub.
            **hub: how to reach it: `token`, `cache_dir`, `force_download`, `local_files_only`.

        Returns:
            The autoencoder. Its `mean_active_activation`, which nobody publishes, is 1 until it is measured.

        Raises:
            ValueError: the layout is not known, or has a field, a place in the model or an activation that cannot be
                expressed here; a tensor is missing, unknown, of another shape or not finite; files disagree with each
                other or with an argument; or several SAEs are meant.
            OSError: there is no such file, or the Hub cannot be reached and its cache does not hold it.
        """
        return load_public(cls, source, layer, k, dtype, revision, **hub)

    @classmethod
    def from_saelens(cls, folder: str | Path, layer: int | None = None, dtype: str = "float32") -> Self:
        """Load an SAE that SAELens saved (`cfg.json` and `sae_weights.safetensors`), as exactly as it computes.

        SAELens' subtraction of b_dec from the input, and its ranking by decoder norm, are folded into the weights.

        Args:
            folder: where the two files are.
            layer: L, when the configuration does not name a residual stream hook.
            dtype: name of the weights' dtype.

        Returns:
            The autoencoder.

        Raises:
            ValueError: an architecture or a normalisation that cannot be expressed here, or no layer.
            OSError: a file is missing.
        """
        return load_saelens(cls, folder, layer, dtype)

    def save_saelens(self, folder: str | Path) -> None:
        """Write the SAE so that SAELens loads it (`SAE.load_from_disk`), and all that is built on SAELens.

        "batchtopk" and "matryoshka" become SAELens' "jumprelu", as SAELens saves its own. `mean_active_activation`,
        which SAELens does not have, goes to a third file, from which `from_saelens` takes it back.

        Args:
            folder: where the files go; made if there is none.

        Raises:
            ValueError: SAELens has no architecture for the SAE's activation.
        """
        save_saelens(self, folder)

    def _pre_activations(self, z):
        """(..., d_in) -> (..., d_sae)."""
        return self._checked(z) @ self.W_enc + self.b_enc

    def _checked(self, z):
        if z.shape[-1] != self.config.d_in:
            raise ValueError(
                f"hidden states are {z.shape[-1]} wide, but this SAE reads {self.config.d_in}; give it layer "
                f"{self.config.layer} of {self.config.backbone or 'its backbone'}, or load the SAE of your backbone."
            )
        return z.to(self.W_enc.dtype)


SparseAutoencoderConfig.register_for_auto_class()
SparseAutoencoder.register_for_auto_class("AutoModel")
