"""The activations of the sparse autoencoder: which pre-activations z W_enc + b_enc become features, one class each.

Whatever depends on the activation is in its class. The configuration, the autoencoder, the query codebook, the trainer,
the estimate and the exchange with SAELens look the class up in `SAE_ACTIVATIONS` and ask it. To add an activation,
subclass `SparseActivation`, override what differs, and add a line to `SAE_ACTIVATIONS`.

The classes hold no state: an activation's parameters and buffers are attributes of the autoencoder, which every method
takes as its first argument.
"""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import torch
from torch import nn
from transformers import initialization as init

if TYPE_CHECKING:
    from .configuration_segcompass import SparseAutoencoderConfig
    from .modeling_sparse_autoencoder import SparseAutoencoder

THRESHOLD_RATE = 0.01
"""How far "batchtopk" moves its threshold towards that of each training batch."""

GROUP = 64
"""Columns that a GPU multiplies together."""


def features_at_once(max_elements: int, tokens: int, on_gpu: bool) -> int:
    """How many features' activations are searched at a time.

    Args:
        max_elements: about how many numbers to hold at once.
        tokens: of the batch.
        on_gpu: whether a GPU multiplies: its fast units take columns in whole groups, and with one column more or less
            it falls back on slow ones.

    Returns:
        int: at least 1; on a GPU a multiple of GROUP.
    """
    step = max(1, max_elements // tokens)
    return max(GROUP, step // GROUP * GROUP) if on_gpu else step


class Code(NamedTuple):
    """What an activation's `forward` makes of hidden states (..., d_in)."""

    reconstruction: torch.Tensor
    """ẑ, float (..., d_in)."""
    feature_acts: torch.Tensor | None
    """h(z), float (..., d_sae); None where it was not needed and not asked for."""
    active: torch.Tensor
    """float32 (...,), features active at each token."""
    fired: torch.Tensor
    """float32 (d_sae,), tokens at which each feature is active; without gradient."""
    nested: torch.Tensor | None = None
    """Float (..., G, d_in), what each of G nested dictionaries makes of z alone, the whole one last; None where only ẑ
    is fitted."""
    price: torch.Tensor | None = None
    """Float (...,), Σ_j h_j ||W_dec[j]|| of each token ("relu" only)."""


class TrainingCost(NamedTuple):
    """What one training step takes."""

    flops: int
    """Operations per token, two per multiply-add."""
    arrays: int
    """Arrays of tokens x d_sae numbers that are held at a time."""


class SparseActivation:
    """Everything an activation decides. The base class is ReLU without a penalty; subclasses override what differs.

    Two cases are simple. Where each activation depends on its own pre-activation only and never decreases with it,
    override `activate`: encoding, training and search call it. Where the features of a token compete, override
    `encode`, which training calls, and `max_over_tokens`.

    The trainer's frame relies on homogeneity: without biases, and with `tensors` scaled along, h(c z) = c h(z), c > 0.
    """

    tensors: ClassVar[dict[str, int]] = {}
    """Parameters and buffers that `add_tensors` registers: name -> p, where the tensor grows with (scale of z)^p."""
    fields: ClassVar[dict[str, int]] = {}
    """Fields of the configuration that depend on the scale of z, likewise. The training arguments have fields of the
    same names, with values for hidden states of unit variance per dimension."""
    coefficient: ClassVar[str | None] = None
    """The field that multiplies `penalty`; None where there is no penalty."""
    keeps_k: ClassVar[bool] = False
    """Whether the configuration's `k` says how many features a token keeps."""
    saelens_architecture: ClassVar[str | None] = None
    """SAELens' name of the architecture it is saved as; None where SAELens has none."""

    # -- configuration and cost ----------------------------------------------------------------------------------------

    @classmethod
    def check_config(cls, config: "SparseAutoencoderConfig") -> None:
        """Refuse a configuration that this activation cannot work with.

        Args:
            config: with all its fields set.

        Raises:
            ValueError: a field is out of range.
        """

    @classmethod
    def training_cost(cls, config: "SparseAutoencoderConfig") -> TrainingCost:
        """Operations and memory of training; by default those of dense products."""
        # Encoder and decoder, forward and backward; pre-activations, activations and the gradient of one of them.
        return TrainingCost(flops=10 * config.d_in * config.d_sae, arrays=3)

    # -- extra tensors -------------------------------------------------------------------------------------------------

    def add_tensors(self, sae: "SparseAutoencoder") -> None:
        """Register the activation's own parameters and buffers, empty, on the autoencoder under their names."""

    def init_tensors(self, sae: "SparseAutoencoder") -> None:
        """Give them the values of a fresh autoencoder, through `transformers.initialization`."""

    # -- encoding ------------------------------------------------------------------------------------------------------

    def activate(
        self, sae: "SparseAutoencoder", pre: torch.Tensor, features: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        """Compute activations from their own pre-activations only, differentiably.

        Args:
            sae: the autoencoder.
            pre: float (..., M), pre-activations of the features `features`.
            features: long, broadcasts against `pre`; or a slice of all d_sae features.

        Returns:
            float (..., M), non-negative. Where a token's features compete, those of winners and losers alike.
        """
        return torch.relu(pre)

    def encode(self, sae: "SparseAutoencoder", pre: torch.Tensor) -> torch.Tensor:
        """Activations h(z), float (..., d_sae), from all pre-activations `pre` (..., d_sae), in use after training."""
        return self.activate(sae, pre)

    def strongest(self, sae: "SparseAutoencoder", pre: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """List each token's strongest features.

        Args:
            sae: the autoencoder.
            pre: float (N, d_sae), pre-activations.
            count: how many features to list per token, in [1, d_sae].

        Returns:
            Activations, float (N, A), strongest first, and their features, long (N, A). A is `count`, or less where a
            token never has as many.
        """
        return self.encode(sae, pre).topk(count, dim=-1)

    def max_over_tokens(
        self, sae: "SparseAutoencoder", z: torch.Tensor, token_mask: torch.Tensor, max_elements: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Find each feature's greatest activation in each sample; called without gradients.

        An activation that never decreases is greatest where the pre-activation is, so only the maximum of the latter is
        searched, in chunks of features, and in half precision where the machine multiplies faster in it. Where this
        does not hold, override it by calling `max_over_encoded_tokens`.

        Args:
            sae: the autoencoder.
            z: float (B, T, d_in), hidden states.
            token_mask: bool (B, T), tokens to look at.
            max_elements: about how many numbers to hold at once.

        Returns:
            Activations, float (B, d_sae), and the smallest activation that wins at each token, float (B, T), or None
            where a token's features do not compete. With None the activations may be rounded to half precision.
        """
        batch, length, _ = z.shape
        halves = z.is_cuda or torch.cpu._is_avx512_bf16_supported()
        # A masked token stands in as the first valid one, which leaves the maximum as it is.
        places = torch.arange(length, device=z.device)
        stand_in = torch.where(token_mask, places, token_mask.int().argmax(1, keepdim=True))  # (B, T)
        low = z.to(torch.bfloat16 if halves else sae.W_enc.dtype).gather(1, stand_in[..., None].expand_as(z))
        strongest = sae.b_enc.masked_fill(~token_mask.any(1, keepdim=True), float("-inf"))  # (B, d_sae)
        step = features_at_once(max_elements, batch * length, z.is_cuda)
        for start in range(0, sae.config.d_sae, step):
            columns = slice(start, start + step)
            strongest[:, columns] += (low @ sae.W_enc[:, columns].to(low.dtype)).amax(1)  # (B, T, step) -> (B, step)
        return self.activate(sae, strongest), None

    # -- training ------------------------------------------------------------------------------------------------------

    def forward(self, sae: "SparseAutoencoder", z: torch.Tensor, output_feature_acts: bool) -> Code:
        """Encode and decode, differentiably.

        Args:
            sae: the autoencoder.
            z: float (..., d_in), hidden states in the dtype of the weights.
            output_feature_acts: whether `feature_acts` is wanted.

        Returns:
            Code. In training its activations may differ from those of `encode`, as with "batchtopk".
        """
        h, on = self.activate_with_indicator(sae, z @ sae.W_enc + sae.b_enc)
        return Code(
            reconstruction=sae.decode(h),
            feature_acts=h,
            active=on.sum(-1, dtype=torch.float32),
            fired=on.detach().flatten(0, -2).sum(0, dtype=torch.float32),
        )

    def activate_with_indicator(self, sae: "SparseAutoencoder", pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations h, and 1 where they are on, else 0: float (..., d_sae) each. The dense `forward` calls it."""
        h = self.encode(sae, pre)
        return h, h.detach().sign()  # count_nonzero is three times slower on a CPU

    def penalty(self, sae: "SparseAutoencoder", code: Code) -> torch.Tensor | None:
        """The term that keeps features few, before its coefficient: scalar, a mean over tokens; None without one."""
        return None

    def start_training(self, sae: "SparseAutoencoder") -> None:
        """Set the extra tensors of an untrained autoencoder, in the trainer's frame of unit variance per dimension."""

    def follow_norms(self, sae: "SparseAutoencoder", norms: torch.Tensor) -> None:
        """Scale extra parameters after `W_enc` and `b_enc` were multiplied by the decoder rows' `norms` (d_sae,)."""

    def revive(self, sae: "SparseAutoencoder", features: torch.Tensor) -> list[nn.Parameter]:
        """Restart the extra parameters of dead features.

        Args:
            sae: the autoencoder.
            features: long (M,), the dead.

        Returns:
            The parameters that were set, (d_sae,) each; the trainer clears these features' optimizer state.
        """
        return []

    # -- SAELens -------------------------------------------------------------------------------------------------------

    @classmethod
    def saelens_fields(cls, config: "SparseAutoencoderConfig") -> dict[str, Any]:
        """Fields that `cfg.json` of SAELens needs for this architecture, beyond the common ones."""
        return {}

    @classmethod
    def from_saelens(cls, saelens_config: dict[str, Any]) -> dict[str, Any] | None:
        """Fields of our configuration for `cfg.json` of SAELens, or None if its SAE has another activation."""
        return {} if saelens_config.get("architecture", "standard") == cls.saelens_architecture else None


class Relu(SparseActivation):
    """Every positive pre-activation is a feature; Eq. 7's penalty, weighted by the decoder norms, makes them few.

    A plain Σ_j h_j is gamed by shrinking h and growing W_dec; Σ_j h_j ||W_dec[j]|| is not.
    """

    fields = {"l1_coefficient": 1}
    coefficient = "l1_coefficient"
    saelens_architecture = "standard"

    def forward(self, sae: "SparseAutoencoder", z: torch.Tensor, output_feature_acts: bool) -> Code:
        """As the dense `forward`, in value and gradient, with fewer arrays of N x d_sae written and read."""
        if torch.is_autocast_enabled(z.device.type):
            code = super().forward(sae, z, output_feature_acts)
            assert code.feature_acts is not None  # the dense `forward` always gives them
            return code._replace(price=code.feature_acts @ sae.W_dec.norm(dim=1))
        flat = z.reshape(-1, z.shape[-1])  # (N, d_in)
        h, z_hat, price = _Dense.apply(flat, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
        active, fired = _counts(h.detach())
        shape = z.shape[:-1]
        return Code(z_hat.view(z.shape), h.view(*shape, -1), active.view(shape), fired, price=price.view(shape))

    def penalty(self, sae: "SparseAutoencoder", code: Code) -> torch.Tensor:
        """Σ_j h_j ||W_dec[j]||."""
        assert code.price is not None
        return code.price.mean()

    @classmethod
    def from_saelens(cls, saelens_config: dict[str, Any]) -> dict[str, Any] | None:
        """SAELens before release 6 called "standard" also what has another activation function; that is not it."""
        relu = _activation_function(saelens_config) in (None, "relu")
        return super().from_saelens(saelens_config) if relu else None


class _KeepLargest(SparseActivation):
    """In training k features per token are kept; decoder and gradients touch only these, which makes it fast."""

    keeps_k = True

    @classmethod
    def check_config(cls, config: "SparseAutoencoderConfig") -> None:
        """Refuse a k beyond the number of features."""
        if config.k > config.d_sae:
            raise ValueError(f"k is {config.k}, but the SAE has {config.d_sae} features; choose k of at most d_sae.")

    @classmethod
    def training_cost(cls, config: "SparseAutoencoderConfig") -> TrainingCost:
        """The encoder forward; all else on kept features."""
        return TrainingCost(flops=2 * config.d_in * config.d_sae + 8 * config.k * config.d_in, arrays=1)

    def keep(self, sae: "SparseAutoencoder", pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose P = k N pairs (token, feature) from pre-activations (N, d_sae); without gradients.

        Args:
            sae: the autoencoder.
            pre: float (N, d_sae), pre-activations.

        Returns:
            The pairs' pre-activations, float (P,), tokens, long (P,), in order, and features, long (P,).
        """
        raise NotImplementedError

    def forward(self, sae: "SparseAutoencoder", z: torch.Tensor, output_feature_acts: bool) -> Code:
        """As the dense `forward`, in value and gradient, but on the P kept pairs instead of N x d_sae."""
        flat = z.reshape(-1, z.shape[-1])  # (N, d_in)
        tokens, d_sae = len(flat), sae.config.d_sae
        with torch.no_grad():
            values, rows, features = self.keep(sae, flat @ sae.W_enc + sae.b_enc)  # (P,) each
            values = values.relu().to(z.dtype)
            on = (values > 0).float()
            active = on.new_zeros(tokens).index_add_(0, rows, on)  # (N,)
            fired = on.new_zeros(d_sae).index_add_(0, features, on)  # (d_sae,)
        values = _Kept.apply(flat, sae.W_enc, sae.b_enc, values, rows, features)  # (P,) with gradient
        z_hat, nested = self.decode_kept(sae, values.to(sae.W_dec.dtype), rows, features, tokens)
        z_hat = z_hat.view(z.shape)  # (N, d_in) -> (..., d_in)
        nested = None if nested is None else nested.view(*z.shape[:-1], *nested.shape[1:])  # (..., G, d_in)
        h = None
        if output_feature_acts:
            h = values.new_zeros(tokens * d_sae).scatter(0, rows * d_sae + features, values)
            h = h.view(*z.shape[:-1], d_sae)  # (..., d_sae)
        return Code(z_hat, h, active.view(z.shape[:-1]), fired, nested)

    def decode_kept(
        self, sae: "SparseAutoencoder", values: torch.Tensor, rows: torch.Tensor, features: torch.Tensor, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reconstruct hidden states from the kept pairs.

        Args:
            sae: the autoencoder.
            values: float (P,), the pairs' activations.
            rows: long (P,), their tokens, in order.
            features: long (P,), their features.
            tokens: N.

        Returns:
            ẑ, float (N, d_in), and what nested dictionaries make of it, float (N, G, d_in), or None.
        """
        return _sums_of_atoms(sae, values, rows, features, tokens) + sae.b_dec, None


class TopK(_KeepLargest):
    """The k largest positive pre-activations of each token are its features; there is no penalty."""

    saelens_architecture = "topk"

    def encode(self, sae: "SparseAutoencoder", pre: torch.Tensor) -> torch.Tensor:
        """At most k of a token's activations differ from zero."""
        values, indices = torch.relu(pre).topk(sae.config.k, dim=-1, sorted=False)  # (..., k)
        return torch.zeros_like(pre).scatter(-1, indices, values)  # (..., d_sae)

    def strongest(self, sae: "SparseAutoencoder", pre: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """At most k features per token; nothing is chosen twice."""
        return torch.relu(pre).topk(min(count, sae.config.k), dim=-1)

    def max_over_tokens(
        self, sae: "SparseAutoencoder", z: torch.Tensor, token_mask: torch.Tensor, max_elements: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of a token compete, so that the maximum is taken over encoded tokens."""
        return max_over_encoded_tokens(sae, z, token_mask, max_elements)

    def keep(self, sae: "SparseAutoencoder", pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The k largest of each token."""
        values, features = (kept.flatten() for kept in pre.topk(sae.config.k, dim=-1, sorted=False))  # (N k,)
        return values, torch.arange(len(pre), device=pre.device).repeat_interleave(sae.config.k), features

    @classmethod
    def saelens_fields(cls, config: "SparseAutoencoderConfig") -> dict[str, Any]:
        """Its k, and that decoder norms take no part in the ranking."""
        return {"k": config.k, "rescale_acts_by_decoder_norm": False}

    @classmethod
    def from_saelens(cls, saelens_config: dict[str, Any]) -> dict[str, Any] | None:
        """SAELens before release 6 saved it as "standard", with another activation function."""
        function, arguments = _activation_function(saelens_config), saelens_config.get("activation_fn_kwargs") or {}
        architecture = saelens_config.get("architecture", "standard")
        if architecture != "topk" and (architecture, function) != ("standard", "topk"):
            return None
        k = saelens_config.get("k", arguments.get("k"))
        if k is None:
            raise ValueError("cfg.json of a SAELens 'topk' SAE has no k; add the k it was trained with.")
        return {"k": int(k)}


class BatchTopK(_KeepLargest):
    """In training the k N largest of a batch of N tokens are features, afterwards those above a threshold.

    The buffer `threshold` follows the smallest activation that was kept in training, and is the same for all features.
    """

    tensors = {"threshold": 1}
    saelens_architecture = "jumprelu"  # as SAELens saves its own

    def add_tensors(self, sae: "SparseAutoencoder") -> None:
        """The buffer `threshold` (d_sae,)."""
        sae.register_buffer("threshold", torch.zeros(sae.config.d_sae))

    def init_tensors(self, sae: "SparseAutoencoder") -> None:
        """Zero, which means that no batch has set it."""
        init.zeros_(_threshold(sae))

    def activate(
        self, sae: "SparseAutoencoder", pre: torch.Tensor, features: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        """Features at or below the threshold are off."""
        h = torch.relu(pre)
        return h * (h > _threshold(sae)[features])

    def forward(self, sae: "SparseAutoencoder", z: torch.Tensor, output_feature_acts: bool) -> Code:
        """In training the batch's largest, otherwise by the threshold."""
        if sae.training:
            return super().forward(sae, z, output_feature_acts)
        return SparseActivation.forward(self, sae, z, output_feature_acts)

    def keep(self, sae: "SparseAutoencoder", pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The k N largest of the batch; the threshold follows."""
        tokens, d_sae = pre.shape
        flat = pre.flatten()
        places = flat.topk(sae.config.k * tokens, sorted=False).indices.sort().values  # (N k,) in order of tokens
        values = flat[places]
        self._follow_threshold(sae, values)
        return values, places // d_sae, places % d_sae

    def start_training(self, sae: "SparseAutoencoder") -> None:
        """Zero: the first batch sets it."""
        _threshold(sae).zero_()

    @classmethod
    def from_saelens(cls, saelens_config: dict[str, Any]) -> dict[str, Any] | None:
        """Never: what SAELens calls "jumprelu" is loaded as "jumprelu"."""
        return None

    @staticmethod
    def _follow_threshold(sae, values):
        """Move the threshold towards the smallest activation kept in this batch; the first batch sets it."""
        threshold = _threshold(sae)
        smallest = values.amin().clamp(min=0).to(threshold.dtype)
        followed = threshold.lerp(smallest.expand_as(threshold), THRESHOLD_RATE)
        threshold.copy_(torch.where(threshold > 0, followed, smallest))


class Matryoshka(BatchTopK):
    """ "batchtopk" whose first features must do without the later ones: each nested dictionary is fitted to z alone.

    The nested dictionaries are the first `nested_widths` features. Early features stay general, where a plain
    dictionary splits them into special cases that hide the general one.
    """

    @classmethod
    def widths(cls, config: "SparseAutoencoderConfig") -> list[int]:
        """How many features each nested dictionary has, ascending; 1/32, 3/32, 7/32, 15/32 and all, if not said."""
        return config.nested_widths or sorted({max(1, config.d_sae * share // 32) for share in (1, 3, 7, 15, 32)})

    @classmethod
    def check_config(cls, config: "SparseAutoencoderConfig") -> None:
        """Refuse widths that do not grow up to the number of features."""
        super().check_config(config)
        widths = cls.widths(config)
        if widths != sorted({width for width in widths if width > 0}) or widths[-1] != config.d_sae:
            raise ValueError(
                f"nested_widths is {widths}; they must grow, from at least 1 to d_sae={config.d_sae}, the whole "
                "dictionary."
            )

    def decode_kept(
        self, sae: "SparseAutoencoder", values: torch.Tensor, rows: torch.Tensor, features: torch.Tensor, tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each nested dictionary's reconstruction is the one before it plus the atoms that it adds."""
        widths = torch.tensor(self.widths(sae.config), device=features.device)  # (G,)
        places, order = (rows * len(widths) + torch.bucketize(features, widths, right=True)).sort(stable=True)
        added = _sums_of_atoms(sae, values[order], places, features[order], tokens * len(widths))  # (N G, d_in)
        nested = added.view(tokens, len(widths), -1).cumsum(1) + sae.b_dec  # (N, G, d_in)
        return nested[:, -1], nested


class JumpRelu(SparseActivation):
    """Pre-activations above a threshold that is learned for each feature; a penalty on their number makes them few.

    The parameter `threshold` learns from the pre-activations within a window of width `bandwidth` around it.
    """

    tensors = {"threshold": 1}
    fields = {"l0_coefficient": 2, "bandwidth": 1}
    coefficient = "l0_coefficient"
    saelens_architecture = "jumprelu"

    def add_tensors(self, sae: "SparseAutoencoder") -> None:
        """The parameter `threshold` (d_sae,)."""
        sae.threshold = nn.Parameter(torch.empty(sae.config.d_sae))

    def init_tensors(self, sae: "SparseAutoencoder") -> None:
        """The bandwidth."""
        init.constant_(_threshold(sae), sae.config.bandwidth)

    def activate(
        self, sae: "SparseAutoencoder", pre: torch.Tensor, features: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        """Features at or below their threshold are off."""
        h = torch.relu(pre)
        return h * (h > _threshold(sae)[features])

    def activate_with_indicator(self, sae: "SparseAutoencoder", pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both with an estimated gradient for the thresholds."""
        return _Jump.apply(pre, _threshold(sae), sae.config.bandwidth)

    def penalty(self, sae: "SparseAutoencoder", code: Code) -> torch.Tensor:
        """The number of active features."""
        return code.active.mean()

    def start_training(self, sae: "SparseAutoencoder") -> None:
        """Half the bandwidth, so that the window around a threshold begins at zero."""
        _threshold(sae).fill_(sae.config.bandwidth / 2)

    def follow_norms(self, sae: "SparseAutoencoder", norms: torch.Tensor) -> None:
        """Thresholds grow with the pre-activations, and an optimizer's step leaves them at zero or more."""
        _threshold(sae).mul_(norms).clamp_(min=0)

    @classmethod
    def from_saelens(cls, saelens_config: dict[str, Any]) -> dict[str, Any] | None:
        """Thresholds are of activations as they are."""
        fields = super().from_saelens(saelens_config)
        if fields is not None and saelens_config.get("rescale_acts_by_decoder_norm"):
            raise ValueError(
                "cfg.json of a SAELens 'jumprelu' SAE sets rescale_acts_by_decoder_norm, which has no meaning beside "
                "thresholds; fold it into the weights with SAELens first."
            )
        return fields

    def revive(self, sae: "SparseAutoencoder", features: torch.Tensor) -> list[nn.Parameter]:
        """The threshold of a revived feature is zero."""
        _threshold(sae)[features] = 0
        return [cast(nn.Parameter, _threshold(sae))]


SAE_ACTIVATIONS: dict[str, type[SparseActivation]] = {
    "relu": Relu,
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpRelu,
}
"""`SparseAutoencoderConfig.activation` -> its class."""


def max_over_encoded_tokens(
    sae: "SparseAutoencoder", z: torch.Tensor, token_mask: torch.Tensor, max_elements: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`SparseActivation.max_over_tokens` for any activation: encodes tokens, in chunks.

    Args:
        sae: the autoencoder.
        z: float (B, T, d_in), hidden states.
        token_mask: bool (B, T), tokens to look at.
        max_elements: about how many numbers to hold at once.

    Returns:
        Each feature's greatest activation, float (B, d_sae), and each token's smallest one that is not zero, float
        (B, T), infinite where all are.
    """
    batch, length, _ = z.shape
    step = max(1, max_elements // (batch * sae.config.d_sae))
    strongest, smallest = z.new_zeros(batch, sae.config.d_sae, dtype=sae.W_enc.dtype), []
    for start in range(0, length, step):
        h = sae.encode(z[:, start : start + step])  # (B, step, d_sae)
        smallest.append(h.masked_fill(h == 0, float("inf")).amin(-1))  # (B, step)
        h = h.masked_fill(~token_mask[:, start : start + step, None], 0)
        strongest = torch.maximum(strongest, h.amax(1))
    return strongest, torch.cat(smallest, 1)  # (B, d_sae), (B, T)


def _sums_of_atoms(
    sae: "SparseAutoencoder", values: torch.Tensor, places: torch.Tensor, features: torch.Tensor, count: int
) -> torch.Tensor:
    """Σ value x atom over the pairs of each place: values and features (P,), places (P,) in order -> (count, d_in)."""
    starts = torch.searchsorted(places, torch.arange(count, device=places.device))  # (count,) each place's first pair
    return nn.functional.embedding_bag(features, sae.W_dec, starts, mode="sum", per_sample_weights=values)


def _activation_function(saelens_config: dict[str, Any]) -> str | None:
    """What SAELens before release 6 noted beside the architecture; None where nothing was noted."""
    return saelens_config.get("activation_fn_str") or saelens_config.get("activation_fn")


def _threshold(sae: "SparseAutoencoder") -> torch.Tensor:
    """The extra tensor of "batchtopk" (a buffer) and of "jumprelu" (a parameter), (d_sae,)."""
    return cast(torch.Tensor, sae.threshold)


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
        gradient = (gradient * (values > 0)).to(z.dtype)  # (P,)
        features, order = features.sort(stable=True)
        bag = {"mode": "sum", "per_sample_weights": gradient[order]}
        starts = torch.searchsorted(features, torch.arange(W_enc.shape[1], device=z.device))  # (d_sae,)
        encoder = nn.functional.embedding_bag(rows[order], z, starts, **bag).T  # (d_in, d_sae)
        bias = gradient.new_zeros(W_enc.shape[1]).index_add_(0, features, gradient[order])  # (d_sae,)
        inputs = None
        if ctx.needs_input_grad[0]:
            inputs = torch.zeros_like(z).index_add_(0, rows[order], gradient[order, None] * W_enc.T[features])
        return inputs, encoder, bias, None, None, None


def _counts(h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features active at each token, and tokens at which each is active, of h (N, d_sae): float32 (N,) and (d_sae,)."""
    active, fired = [], torch.zeros(h.shape[1], dtype=torch.float32, device=h.device)
    for rows in h.split(2**14 if h.is_cuda else 64):  # few enough that their signs stay in a CPU's cache
        on = rows > 0 if h.is_cuda else rows.sign()  # bytes are less to write; a CPU is three times slower at them
        active.append(on.sum(1, dtype=torch.float32))
        fired += on.sum(0, dtype=torch.float32)
    return torch.cat(active), fired


class _Dense(torch.autograd.Function):
    """(h, ẑ, Σ_j h_j ||W_dec[j]||) of "relu", each (N, ...): what autograd computes, in place wherever it can be."""

    @staticmethod
    def forward(ctx, z, W_enc, b_enc, W_dec, b_dec):
        h = torch.addmm(b_enc, z, W_enc).relu_()  # (N, d_sae)
        norm = W_dec.norm(dim=1)  # (d_sae,)
        ctx.save_for_backward(z, W_enc, W_dec, norm, h)
        ctx.set_materialize_grads(False)
        return h, torch.addmm(b_dec, h, W_dec), h @ norm

    @staticmethod
    def backward(ctx, gradient_h, gradient, gradient_price):
        z, W_enc, W_dec, norm, h = ctx.saved_tensors
        if gradient is None:
            gradient = torch.zeros_like(z)
        decoder, into_h = h.T @ gradient, gradient @ W_dec.T  # (d_sae, d_in), (N, d_sae)
        if gradient_price is not None:
            decoder.addcmul_((gradient_price @ h / norm.clamp_min(1e-30))[:, None], W_dec)
            into_h.addr_(gradient_price, norm)
        if gradient_h is not None:
            into_h += gradient_h
        torch.ops.aten.threshold_backward.grad_input(into_h, h, 0, grad_input=into_h)  # zero where h is
        inputs = into_h @ W_enc.T if ctx.needs_input_grad[0] else None
        return inputs, z.T @ into_h, into_h.sum(0), decoder, gradient.sum(0)


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
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(gradient.dtype)  # (..., d_sae)
        pull = near * (threshold * gradient + gradient_on)
        return gradient * on, -pull.flatten(0, -2).sum(0) / ctx.bandwidth, None  # (..., d_sae), (d_sae,)
