"""The sparse autoencoder E_sae, D_sae (section 3.2, Eq. 7): hidden states in, a few active dictionary atoms out.

It reads the raw hidden states of one MLLM layer, whatever their scale. It knows nothing about tokens, images or how
those hidden states were gathered, and it does not train itself: see `trainers.sae_trainer`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_segcompass import SparseAutoencoderConfig


@dataclass
class SparseAutoencoderOutput(ModelOutput):
    """What one pass of the autoencoder gives; every scalar is a mean over the N tokens."""

    loss: torch.FloatTensor | None = None
    """Eq. 7, scalar: `mse + l1_coefficient * l1` with "relu", `mse` with "topk"."""
    reconstruction: torch.FloatTensor | None = None
    """ẑ, (..., d_in)."""
    feature_acts: torch.FloatTensor | None = None
    """h(z), (..., d_sae), non-negative."""
    mse: torch.FloatTensor | None = None
    """||z - ẑ||², scalar: squared error summed over the d_in dimensions."""
    l1: torch.FloatTensor | None = None
    """Σ_j h_j ||W_dec[j]||, scalar, before `l1_coefficient`."""
    l0: torch.FloatTensor | None = None
    """|S(z)| of Eq. 4, scalar: features different from zero."""


class SparseAutoencoder(PreTrainedModel):
    """Sparse autoencoder of section 3.2: h = act(z W_enc + b_enc), ẑ = h W_dec + b_dec.

    Parameters are `W_enc` (d_in, d_sae), `b_enc` (d_sae,), `W_dec` (d_sae, d_in), whose rows are the dictionary atoms,
    and `b_dec` (d_in,). The buffer `usual_strength` (d_sae,) is each feature's mean activation over the tokens where it
    is active: ones until it is measured. A concept's strength means little beside another's; its ratio to the usual
    strength does, so concepts are ranked by it.
    """

    config_class = SparseAutoencoderConfig
    base_model_prefix = "sae"
    main_input_name = "hidden_states"
    _supports_sdpa = _supports_flash_attn = True  # it has no attention, so it stands in no model's way

    def __init__(self, config: SparseAutoencoderConfig):
        super().__init__(config)
        self.W_enc = nn.Parameter(torch.empty(config.d_in, config.d_sae))
        self.b_enc = nn.Parameter(torch.empty(config.d_sae))
        self.W_dec = nn.Parameter(torch.empty(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.empty(config.d_in))
        self.register_buffer("usual_strength", torch.empty(config.d_sae))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        """Atoms are random directions of norm 1 and the encoder their transpose; biases are zero."""
        if isinstance(module, SparseAutoencoder):
            init.normal_(module.W_dec)
            init.copy_(module.W_dec, nn.functional.normalize(module.W_dec, dim=1))
            init.copy_(module.W_enc, module.W_dec.T)
            init.zeros_(module.b_enc)
            init.zeros_(module.b_dec)
            init.ones_(module.usual_strength)

    def encode(self, z: torch.Tensor) -> torch.Tensor:
        """Encode hidden states into sparse activations, h(z) of section 3.2.

        Args:
            z: (..., d_in) hidden states of any floating dtype; computed in the dtype of `W_enc`.

        Returns:
            (..., d_sae) non-negative activations. With "topk" at most `k` of a token's differ from zero.

        Raises:
            ValueError: the last dimension of `z` is not `d_in`.
        """
        h = torch.relu(self._checked(z) @ self.W_enc + self.b_enc)
        if self.config.activation == "topk":
            values, indices = h.topk(self.config.k, dim=-1, sorted=False)
            h = torch.zeros_like(h).scatter(-1, indices, values)
        return h

    def decode(self, h: torch.Tensor) -> torch.Tensor:
        """Reconstruct hidden states (..., d_in) from activations `h` (..., d_sae)."""
        return h @ self.W_dec + self.b_dec

    def encode_selected(self, z: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Encode some features only, differentiably: the columns `indices` of `encode(z)`, never the whole of it.

        Args:
            z: (N, d_in) hidden states.
            indices: (M,) long, features in [0, d_sae).

        Returns:
            (N, M) non-negative activations, equal to `encode(z)[:, indices]` in value and gradient with "relu". With
            "topk" a feature is returned even where it is not among a token's k largest: mask it there.

        Raises:
            ValueError: the last dimension of `z` is not `d_in`.
        """
        return torch.relu(self._checked(z) @ self.W_enc[:, indices] + self.b_enc[indices])

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
        kept = min(max_active, self.config.k) if self.config.activation == "topk" else max_active
        for start in range(0, len(z), chunk_size):
            rows = slice(start, start + chunk_size)
            h = torch.relu(z[rows] @ self.W_enc + self.b_enc)
            strongest, features = h.topk(kept, dim=-1)
            values[rows, :kept] = strongest
            indices[rows, :kept] = features.masked_fill(strongest == 0, 0)
        return indices, values

    def forward(self, hidden_states: torch.Tensor) -> SparseAutoencoderOutput:
        """Encode, decode and score (Eq. 7, its penalty weighted by the decoder norms).

        A plain Σ_j h_j is gamed by shrinking h and growing W_dec; Σ_j h_j ||W_dec[j]|| is not.

        Args:
            hidden_states: (N, d_in) hidden states of the configured layer, as the MLLM gives them.

        Raises:
            ValueError: the last dimension of `hidden_states` is not `d_in`.
        """
        z = self._checked(hidden_states)
        h = self.encode(z)
        z_hat = self.decode(h)
        mse = (z - z_hat).square().sum(-1).mean()
        l1 = (h @ self.W_dec.norm(dim=1)).mean()
        loss = mse if self.config.activation == "topk" else mse + self.config.l1_coefficient * l1
        l0 = h.detach().sign().sum(-1, dtype=torch.float32).mean()  # count_nonzero is three times slower on a CPU
        return SparseAutoencoderOutput(loss=loss, reconstruction=z_hat, feature_acts=h, mse=mse, l1=l1, l0=l0)

    def _checked(self, z):
        if z.shape[-1] != self.config.d_in:
            raise ValueError(
                f"hidden states are {z.shape[-1]} wide, but this SAE reads {self.config.d_in}; give it layer "
                f"{self.config.layer} of {self.config.backbone or 'its backbone'}, or load the SAE of your backbone."
            )
        return z.to(self.W_enc.dtype)


SparseAutoencoderConfig.register_for_auto_class()
SparseAutoencoder.register_for_auto_class("AutoModel")
