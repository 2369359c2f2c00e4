"""The sparse autoencoder E_sae, D_sae (section 3.2, Eq. 7): hidden states in, a few active dictionary atoms out.

It reads the raw hidden states of one MLLM layer, whatever their scale. It knows nothing about tokens, images or how
those hidden states were gathered, and it does not train itself: see `trainers.sae_trainer`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_segcompass import SparseAutoencoderConfig
from .old_names import OLD_WEIGHTS

THRESHOLD_RATE = 0.01
"""How far "batchtopk" moves its threshold towards that of each training batch."""


@dataclass
class SparseAutoencoderOutput(ModelOutput):
    """What one pass of the autoencoder gives; every scalar is a mean over the N tokens."""

    loss: torch.FloatTensor | None = None
    """Eq. 7, scalar: `mse`, with "relu" plus `l1_coefficient * l1`, with "jumprelu" plus `l0_coefficient * l0`."""
    reconstruction: torch.FloatTensor | None = None
    """ẑ, (..., d_in)."""
    feature_acts: torch.FloatTensor | None = None
    """h(z), (..., d_sae), non-negative; None when not asked for."""
    mse: torch.FloatTensor | None = None
    """||z - ẑ||², scalar: squared error summed over the d_in dimensions."""
    l1: torch.FloatTensor | None = None
    """Σ_j h_j ||W_dec[j]||, scalar, before `l1_coefficient`; None where it is no part of the loss."""
    l0: torch.FloatTensor | None = None
    """|S(z)| of Eq. 4, scalar: features different from zero. With "jumprelu" it has a gradient for the thresholds."""
    active: torch.FloatTensor | None = None
    """(...,) features active at each token."""
    fired: torch.FloatTensor | None = None
    """(d_sae,) tokens at which each feature is active."""


class SparseAutoencoder(PreTrainedModel):
    """Sparse autoencoder of section 3.2: h = act(z W_enc + b_enc), ẑ = h W_dec + b_dec.

    Parameters are `W_enc` (d_in, d_sae), `b_enc` (d_sae,), `W_dec` (d_sae, d_in), whose rows are the dictionary atoms,
    and `b_dec` (d_in,). "batchtopk" and "jumprelu" also have `threshold` (d_sae,): features at or below it are off. The
    buffer `mean_active_activation` (d_sae,) is each feature's mean activation over the tokens where it is active: ones
    until it is measured. A concept's strength means little beside another's; its ratio to this mean does, so concepts
    are ranked by it.
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
        if config.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.empty(config.d_sae))
        elif config.activation == "batchtopk":
            self.register_buffer("threshold", torch.empty(config.d_sae))
        self.register_buffer("mean_active_activation", torch.empty(config.d_sae))
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As transformers', and reads what earlier versions saved."""
        return super().from_pretrained(*args, **{"key_mapping": OLD_WEIGHTS, **kwargs})

    def save_pretrained(self, *args, **kwargs):
        """As transformers', under today's names."""
        super().save_pretrained(*args, **{**kwargs, "save_original_format": False})

    @torch.no_grad()
    def _init_weights(self, module):
        """Atoms are random directions of norm 1 and the encoder their transpose; biases are zero.

        Thresholds start at zero ("batchtopk", where the first batch sets them) or at the bandwidth ("jumprelu").
        """
        if isinstance(module, SparseAutoencoder):
            init.normal_(module.W_dec)
            init.copy_(module.W_dec, nn.functional.normalize(module.W_dec, dim=1))
            init.copy_(module.W_enc, module.W_dec.T)
            init.zeros_(module.b_enc)
            init.zeros_(module.b_dec)
            if module.config.activation == "jumprelu":
                init.constant_(module.threshold, module.config.bandwidth)
            elif module.config.activation == "batchtopk":
                init.zeros_(module.threshold)
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
        h = self.gate(torch.relu(self._checked(z) @ self.W_enc + self.b_enc))
        if self.config.activation == "topk":
            values, indices = h.topk(self.config.k, dim=-1, sorted=False)
            h = torch.zeros_like(h).scatter(-1, indices, values)
        return h

    def gate(self, h: torch.Tensor, indices: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Switch off what does not exceed its feature's threshold, where the activation has thresholds.

        Args:
            h: (..., M) non-negative pre-activations of the features `indices`, which broadcasts against h.
        """
        if self.config.activation not in ("batchtopk", "jumprelu"):
            return h
        return h * (h > self.threshold[indices])

    def decode(self, h: torch.Tensor) -> torch.Tensor:
        """Reconstruct hidden states (..., d_in) from activations `h` (..., d_sae)."""
        return h @ self.W_dec + self.b_dec

    def encode_selected(self, z: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Encode some features only, differentiably: the columns `indices` of `encode(z)`, never the whole of it.

        Args:
            z: (N, d_in) hidden states.
            indices: (M,) long, features in [0, d_sae).

        Returns:
            (N, M) non-negative activations, equal to `encode(z)[:, indices]` in value and gradient. Only with "topk" a
            feature is returned even where it is not among a token's k largest: mask it there.

        Raises:
            ValueError: the last dimension of `z` is not `d_in`.
        """
        return self.gate(torch.relu(self._checked(z) @ self.W_enc[:, indices] + self.b_enc[indices]), indices)

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
            h = self.gate(torch.relu(z[rows] @ self.W_enc + self.b_enc))
            strongest, features = h.topk(kept, dim=-1)
            values[rows, :kept] = strongest
            indices[rows, :kept] = features.masked_fill(strongest == 0, 0)
        return indices, values

    def forward(self, hidden_states: torch.Tensor, output_feature_acts: bool = True) -> SparseAutoencoderOutput:
        """Encode, decode and score (Eq. 7, its penalty weighted by the decoder norms).

        A plain Σ_j h_j is gamed by shrinking h and growing W_dec; Σ_j h_j ||W_dec[j]|| is not. With "topk" and
        "batchtopk" the decoder and all gradients touch the kept features only, which is what makes training fast.

        Args:
            hidden_states: (..., d_in) hidden states of the configured layer, as the MLLM gives them.
            output_feature_acts: False leaves out `feature_acts`, which nothing else needs.

        Raises:
            ValueError: the last dimension of `hidden_states` is not `d_in`.
        """
        z = self._checked(hidden_states)
        if self.config.activation == "topk" or (self.config.activation == "batchtopk" and self.training):
            return self._forward_kept(z, output_feature_acts)
        pre = z @ self.W_enc + self.b_enc
        if self.config.activation == "jumprelu":
            h, on = _Jump.apply(pre, self.threshold, self.config.bandwidth)
        else:
            h = self.gate(torch.relu(pre))
            on = h.detach().sign()  # count_nonzero is three times slower on a CPU
        z_hat = self.decode(h)
        active = on.sum(-1, dtype=torch.float32)
        loss = mse = (z - z_hat).square().sum(-1).mean()
        l1, l0 = None, active.mean()
        if self.config.activation == "relu":
            l1 = (h @ self.W_dec.norm(dim=1)).mean()
            loss = mse + self.config.l1_coefficient * l1
        elif self.config.activation == "jumprelu":
            loss = mse + self.config.l0_coefficient * l0
        return SparseAutoencoderOutput(
            loss=loss,
            reconstruction=z_hat,
            feature_acts=h if output_feature_acts else None,
            mse=mse,
            l1=l1,
            l0=l0,
            active=active.detach(),
            fired=on.detach().flatten(0, -2).sum(0, dtype=torch.float32),
        )

    def _forward_kept(self, z, output_feature_acts):
        """`forward` where a fixed number of features is kept: P = k N pairs (token, feature) instead of N x d_sae."""
        flat = z.flatten(0, -2)
        tokens, d_sae = len(flat), self.config.d_sae
        with torch.no_grad():
            pre = flat @ self.W_enc + self.b_enc
            if self.config.activation == "topk":
                values, features = (kept.flatten() for kept in pre.topk(self.config.k, dim=-1, sorted=False))
                rows = torch.arange(tokens, device=z.device).repeat_interleave(self.config.k)
            else:
                places = pre.flatten().topk(self.config.k * tokens, sorted=False).indices.sort().values
                values, rows, features = pre.flatten()[places], places // d_sae, places % d_sae
                self._follow_threshold(values)
            values = values.relu().to(z.dtype)
            on = (values > 0).float()
            active = on.new_zeros(tokens).index_add_(0, rows, on)
            fired = on.new_zeros(d_sae).index_add_(0, features, on)
            offsets = torch.searchsorted(rows, torch.arange(tokens, device=z.device))
        values = _Kept.apply(flat, self.W_enc, self.b_enc, values, rows, features)
        z_hat = nn.functional.embedding_bag(
            features, self.W_dec, offsets, mode="sum", per_sample_weights=values.to(self.W_dec.dtype)
        )
        z_hat = (z_hat + self.b_dec).view(z.shape)
        h = None
        if output_feature_acts:
            h = values.new_zeros(tokens * d_sae).scatter(0, rows * d_sae + features, values).view(*z.shape[:-1], d_sae)
        mse = (z - z_hat).square().sum(-1).mean()
        return SparseAutoencoderOutput(
            loss=mse,
            reconstruction=z_hat,
            feature_acts=h,
            mse=mse,
            l0=active.mean(),
            active=active.view(z.shape[:-1]),
            fired=fired,
        )

    def _follow_threshold(self, values):
        """Move the threshold towards the smallest activation kept in this batch; the first batch sets it."""
        smallest = values.amin().clamp(min=0).to(self.threshold.dtype)
        followed = self.threshold.lerp(smallest.expand_as(self.threshold), THRESHOLD_RATE)
        self.threshold.copy_(torch.where(self.threshold > 0, followed, smallest))

    @classmethod
    def from_saelens(cls, folder: str | Path, layer: int | None = None, dtype="float32") -> "SparseAutoencoder":
        """Load an SAE that SAELens saved (`cfg.json` and `sae_weights.safetensors`), as exactly as it computes.

        SAELens' subtraction of b_dec from the input, and its ranking by decoder norm, are folded into the weights.

        Args:
            folder: where the two files are.
            layer: L, when the configuration does not name a residual stream hook.

        Raises:
            ValueError: an architecture or a normalisation that cannot be expressed here, or no layer.
            OSError: a file is missing.
        """
        from safetensors.torch import load_file

        folder = Path(folder)
        theirs = json.loads((folder / "cfg.json").read_text())
        weights = load_file(folder / "sae_weights.safetensors")
        metadata = theirs.get("metadata") or theirs  # releases before 6 had no metadata
        activation = _OURS.get(theirs.get("architecture", "standard"))
        if activation == "relu" and theirs.get("activation_fn_str", "relu") == "topk":
            activation, theirs["k"] = "topk", theirs["activation_fn_kwargs"]["k"]
        if activation is None:
            raise ValueError(
                f"{folder} holds a SAELens {theirs['architecture']!r} SAE; {', '.join(map(repr, _OURS))} can be loaded."
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
        sae = cls(
            SparseAutoencoderConfig(
                d_in=theirs["d_in"],
                d_sae=theirs["d_sae"],
                activation=activation,
                k=int(theirs.get("k", 64)),
                backbone=metadata.get("model_name"),
                layer=layer,
                dataset=metadata.get("dataset_path"),
                token_window=metadata.get("context_size"),
            )
        )
        with torch.no_grad():
            for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
                if hasattr(sae, name):
                    getattr(sae, name).copy_(weights[name])
            if theirs.get("apply_b_dec_to_input", False):
                sae.b_enc.sub_(sae.b_dec @ sae.W_enc)
            if theirs.get("rescale_acts_by_decoder_norm", False):
                norm = sae.W_dec.norm(dim=1)
                sae.W_enc.mul_(norm)
                sae.b_enc.mul_(norm)
                sae.W_dec.div_(norm[:, None])
            strength = folder / "mean_active_activation.safetensors"
            if strength.exists():
                sae.mean_active_activation.copy_(load_file(strength)["mean_active_activation"])
        return sae.to(getattr(torch, dtype))

    def save_saelens(self, folder: str | Path) -> None:
        """Write the SAE so that SAELens loads it (`SAE.load_from_disk`), and all that is built on SAELens.

        "batchtopk" becomes SAELens' "jumprelu", as SAELens saves its own. `mean_active_activation`, which SAELens
        does not have, goes to a third file, from which `from_saelens` takes it back.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config
        architecture = {"relu": "standard", "topk": "topk"}.get(config.activation, "jumprelu")
        cfg = {
            "architecture": architecture,
            "d_in": config.d_in,
            "d_sae": config.d_sae,
            "dtype": str(self.dtype).removeprefix("torch."),
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
        if architecture == "topk":
            cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
        names = ["W_enc", "b_enc", "W_dec", "b_dec"] + ["threshold"] * (architecture == "jumprelu")
        save_file(
            {name: getattr(self, name).detach().cpu().contiguous() for name in names},
            folder / "sae_weights.safetensors",
        )
        save_file(
            {"mean_active_activation": self.mean_active_activation.cpu()}, folder / "mean_active_activation.safetensors"
        )
        (folder / "cfg.json").write_text(json.dumps(cfg, indent=2) + "\n")

    def _checked(self, z):
        if z.shape[-1] != self.config.d_in:
            raise ValueError(
                f"hidden states are {z.shape[-1]} wide, but this SAE reads {self.config.d_in}; give it layer "
                f"{self.config.layer} of {self.config.backbone or 'its backbone'}, or load the SAE of your backbone."
            )
        return z.to(self.W_enc.dtype)


_OURS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu"}
"""SAELens' name of an architecture -> ours."""


def _layer_of(hook):
    """L of a hook's name as TransformerLens or transformers write it: the residual stream after the L-th block."""
    if found := re.fullmatch(r"blocks\.(\d+)\.hook_resid_post|(?:\w+\.)*layers\.(\d+)", hook):
        return int(found[1] or found[2]) + 1
    if found := re.fullmatch(r"blocks\.([1-9]\d*)\.hook_resid_pre", hook):
        return int(found[1])
    return None


class _Kept(torch.autograd.Function):
    """The kept pre-activations as a function of the encoder: values (P,), whose gradient touches kept features only.

    dW_enc[:, j] is the sum of dh z over the tokens that kept j, so it is a bag of rows of z.
    """

    @staticmethod
    def forward(ctx, z, W_enc, b_enc, values, rows, features):
        ctx.save_for_backward(z, W_enc, values, rows, features)
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient):
        z, W_enc, values, rows, features = ctx.saved_tensors
        gradient = (gradient * (values > 0)).to(z.dtype)
        features, order = features.sort(stable=True)
        bag = {"mode": "sum", "per_sample_weights": gradient[order]}
        starts = torch.searchsorted(features, torch.arange(W_enc.shape[1], device=z.device))
        encoder = nn.functional.embedding_bag(rows[order], z, starts, **bag).T
        bias = gradient.new_zeros(W_enc.shape[1]).index_add_(0, features, gradient[order])
        inputs = None
        if ctx.needs_input_grad[0]:
            inputs = torch.zeros_like(z).index_add_(0, rows[order], gradient[order, None] * W_enc.T[features])
        return inputs, encoder, bias, None, None, None


class _Jump(torch.autograd.Function):
    """(h, on) of "jumprelu": h = pre where pre > θ, on = 1 there.

    Neither has a gradient for θ, so θ gets that of the expected loss, estimated from the pre-activations within a
    window of width `bandwidth` around it.
    """

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        on = ((pre > threshold) & (pre > 0)).to(pre.dtype)
        ctx.save_for_backward(pre, threshold, on)
        ctx.bandwidth = bandwidth
        return pre * on, on

    @staticmethod
    def backward(ctx, gradient, gradient_on):
        pre, threshold, on = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(gradient.dtype)
        pull = near * (threshold * gradient + gradient_on)
        return gradient * on, -pull.flatten(0, -2).sum(0) / ctx.bandwidth, None


SparseAutoencoderConfig.register_for_auto_class()
SparseAutoencoder.register_for_auto_class("AutoModel")
