"""The query codebook C: from sparse SAE features to K_s concept representations r_k (section 3.2, Eq. 4).

Notable: the T x d_sae activations are never held with gradients. The M concepts of a sample are chosen in chunks
without gradients, then only their columns of the SAE encoder are evaluated again, differentiably: value and gradient
are those of the dense computation. Every step keeps its provenance: which concepts, fired by which tokens, weigh how
much in which slot.
It knows nothing about masks or images; it sees hidden states, where each token sits, and a frozen SAE.
"""

from typing import NamedTuple, cast

import torch
from torch import nn

from .configuration_segcompass import SegCompassConfig
from .modeling_sparse_autoencoder import SparseAutoencoder
from .token_layout import TOKEN_POSITION_DIM


class Concepts(NamedTuple):
    """The concept representations of a batch with their provenance."""

    representations: torch.Tensor | None
    """r_k, float (B, K_s, d_c)."""
    indices: torch.Tensor | None = None
    """j in S(z): long (B, M), features of the SAE, strongest relative to their mean active activation first."""
    values: torch.Tensor | None = None
    """h_j: float (B, M), each concept's strength, the maximum over tokens; 0 marks padding."""
    weights: torch.Tensor | None = None
    """slot -> concept: float (B, K_s, M); each slot's weights sum to 1 (all 0 when no concept is active)."""
    activations: torch.Tensor | None = None
    """concept -> token: float (B, T, M), h_j at each token."""


class EncoderBlock(nn.Module):
    """Pre-norm transformer encoder block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, token_mask: torch.Tensor) -> torch.Tensor:
        """Mix the tokens that count: x float (B, N, width), token_mask bool (B, N) -> float (B, N, width)."""
        q, k, v = self._project(x)
        return self._finish(x, nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=token_mask[:, None, None]))

    def read(self, x: torch.Tensor, token_mask: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `rows` elements of `forward`, and their attention (B, rows, N), averaged over heads."""
        q, k, v = self._project(x)
        scores = (q[:, :, :rows] @ k.mT) * q.shape[-1] ** -0.5  # (B, heads, rows, N)
        scores = scores.masked_fill(~token_mask[:, None, None], float("-inf"))
        attention = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return self._finish(x[:, :rows], attention.to(v.dtype) @ v), attention.mean(1)  # (B, rows, N)

    def _project(self, x):
        """q, k, v: each (B, heads, N, width / heads)."""
        return self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def _finish(self, x, mixed):
        x = x + self.out(mixed.transpose(1, 2).flatten(2))  # (B, heads, N, width / heads) -> (B, N, width)
        return x + self.mlp_out(nn.functional.gelu(self.mlp_in(self.mlp_norm(x))))


class QueryCodebook(nn.Module):
    """C ∈ R^{d_sae x d_c} and the encoder blocks that gather the active concepts into r_1 ... r_{K_s}."""

    def __init__(self, config: SegCompassConfig):
        super().__init__()
        self.reading = config.concept_reading
        self.num_concepts = min(config.num_concepts, config.sae_config.d_sae)
        self.codebook = nn.Parameter(torch.empty(config.sae_config.d_sae, config.d_c))
        self.slot_queries = nn.Parameter(torch.empty(config.num_slots, config.d_c))
        self.where = nn.Linear(TOKEN_POSITION_DIM, config.d_c)
        self.blocks = nn.ModuleList(
            EncoderBlock(config.d_c, config.codebook_heads) for _ in range(config.codebook_layers)
        )
        self.norm = nn.LayerNorm(config.d_c)

    def forward(
        self,
        sae: SparseAutoencoder,
        z: torch.Tensor,
        may_fire: torch.Tensor,
        token_positions: torch.Tensor,
        scale: torch.Tensor | None = None,
    ) -> Concepts:
        """Select, decode and gather the active concepts of each sample.

        Args:
            sae: the frozen SAE.
            z: float (B, T, d_π), hidden states at the SAE's layer.
            may_fire: bool (B, T), tokens that may fire concepts (no padding, no special tokens).
            token_positions: float (B, T, TOKEN_POSITION_DIM), from `token_position_features`.
            scale: float (d_sae,) or (B, d_sae), factors on h_j, 1 but at the concepts intervened on; None leaves all.

        Returns:
            Concepts, with all fields.
        """
        tokens, token_mask, concepts = self.concept_tokens(sae, z, may_fire, token_positions, scale)
        batch, slots = len(z), len(self.slot_queries)
        x = torch.cat([self.slot_queries.expand(batch, -1, -1), tokens], 1)  # (B, K_s + N, d_c)
        token_mask = torch.cat([token_mask.new_ones(batch, slots), token_mask], 1)  # (B, K_s + N)
        for block in self.blocks[:-1]:
            x = block(x, token_mask)
        last = cast(EncoderBlock, self.blocks[-1])
        r, attention = last.read(x, token_mask, slots)  # (B, K_s, d_c), (B, K_s, K_s + N)
        weights = attention[:, :, slots:]  # (B, K_s, N)
        if self.reading == "token":
            strength = self.codebook[concepts.indices].norm(dim=-1)  # (B, M)
            share = (concepts.activations * strength[:, None]).to(weights.dtype)  # (B, T, M)
            weights = weights @ (share / share.sum(-1, keepdim=True).clamp_min(1e-6))  # (B, K_s, M)
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        return concepts._replace(representations=self.norm(r), weights=weights)

    def concept_tokens(
        self,
        sae: SparseAutoencoder,
        z: torch.Tensor,
        may_fire: torch.Tensor,
        token_positions: torch.Tensor,
        scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Concepts]:
        """Eq. 4's decoding of the active features, up to the encoder blocks.

        Args:
            sae: the frozen SAE.
            z: float (B, T, d_π), hidden states at the SAE's layer.
            may_fire: bool (B, T), tokens that may fire concepts.
            token_positions: float (B, T, TOKEN_POSITION_DIM), from `token_position_features`.
            scale: float (d_sae,) or (B, d_sae), factors on h_j, or None.

        Returns:
            The concept tokens, float (B, N, d_c): h_j C_j and where it fired for each of N = M features, or, with the
            "token" reading, the sum of the codes of each of N = T tokens. Those with something active, bool (B, N).
            Concepts without `representations` and `weights`.
        """
        indices, smallest = self.select(sae, z, may_fire, scale)
        activations = self.activate(sae, z, may_fire, indices, smallest, scale).to(self.codebook.dtype)
        values = activations.amax(1)  # (B, T, M) -> (B, M)
        codes = self.codebook[indices]  # (B, M, d_c)
        token_positions = token_positions.to(codes.dtype)
        if self.reading == "feature":
            fired_at = activations.mT @ token_positions  # (B, M, TOKEN_POSITION_DIM)
            fired_at = fired_at / activations.sum(1).clamp_min(1e-6)[..., None]
            tokens, token_mask = values[..., None] * codes + self.where(fired_at), values > 0
        else:
            tokens = activations @ codes + self.where(token_positions)  # (B, T, d_c)
            token_mask = may_fire & (activations > 0).any(-1)
        return tokens, token_mask, Concepts(None, indices, values, None, activations)

    @torch.no_grad()
    def select(
        self,
        sae: SparseAutoencoder,
        z: torch.Tensor,
        may_fire: torch.Tensor,
        scale: torch.Tensor | None = None,
        max_elements: int = 2**23,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose each sample's M concepts by strength relative to the feature's mean active activation.

        Where the SAE's search may round to half precision, the best 2 M are measured exactly and the best M of them
        taken.

        Args:
            sae: the frozen SAE.
            z: float (B, T, d_π), hidden states at the SAE's layer.
            may_fire: bool (B, T), tokens that may fire concepts.
            scale: float (d_sae,) or (B, d_sae), factors on h_j, or None.
            max_elements: about how many numbers to hold at once.

        Returns:
            The concepts, long (B, M), strongest first, and the smallest activation that counts at each token, float
            (B, T), or None where the features of a token do not compete.
        """
        strength, smallest = sae.max_over_tokens(z, may_fire, max_elements)  # (B, d_sae)
        relative = strength / sae.mean_active_activation.clamp_min(1e-6)
        if scale is not None:
            relative = relative * scale
        if smallest is not None:  # the search was exact
            return relative.topk(self.num_concepts, dim=-1).indices, smallest
        likely = relative.topk(min(2 * self.num_concepts, sae.config.d_sae), dim=-1).indices  # (B, 2 M)
        strength = self.activate(sae, z, may_fire, likely, scale=scale).amax(1)  # (B, 2 M)
        relative = strength / sae.mean_active_activation[likely].clamp_min(1e-6)
        return likely.gather(1, relative.topk(self.num_concepts, dim=-1).indices), None

    def activate(
        self,
        sae: SparseAutoencoder,
        z: torch.Tensor,
        may_fire: torch.Tensor,
        indices: torch.Tensor,
        smallest: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Activations h_j(z_t) of the selected concepts only, differentiable in z.

        Args:
            sae: the frozen SAE.
            z: float (B, T, d_π), hidden states at the SAE's layer.
            may_fire: bool (B, T), tokens that may fire concepts.
            indices: long (B, M), the concepts.
            smallest: float (B, T), the smallest activation that counts at each token, or None.
            scale: float (d_sae,) or (B, d_sae), factors on h_j, or None.

        Returns:
            float (B, T, M), 0 at tokens that may not fire.
        """
        h = sae.encode_selected(z, indices, smallest) * may_fire[..., None]  # (B, T, M)
        return h if scale is None else h * scale.expand(len(indices), -1).gather(1, indices)[:, None]
