"""The query codebook C: from sparse SAE features to K_s concept representations r_k (section 3.2, Eq. 4).

Notable: the T x d_sae activations are never held with gradients. The M concepts of a sample are chosen in chunks
without gradients, then only their columns of the SAE encoder are evaluated again, differentiably: value and gradient
are those of the dense computation. Every step keeps its provenance: which concepts, fired by which tokens, weigh how
much in which slot.
It knows nothing about masks or images; it sees hidden states, where each token sits, and a frozen SAE.
"""

from typing import NamedTuple

import torch
from torch import nn

from .token_layout import TOKEN_POSITION_DIM


class Concepts(NamedTuple):
    """The concept representations of a batch with their provenance."""

    representations: torch.Tensor | None
    """r_k, float (B, K_s, d_c)."""
    indices: torch.Tensor | None = None
    """j in S(z): long (B, M), features of the SAE, strongest relative to their usual strength first."""
    values: torch.Tensor | None = None
    """h_j: float (B, M), each concept's strength, the maximum over tokens; 0 marks padding."""
    weights: torch.Tensor | None = None
    """slot -> concept: float (B, K_s, M); each slot's weights sum to 1 (all 0 when no concept is active)."""
    activations: torch.Tensor | None = None
    """concept -> token: float (B, T, M), h_j at each token."""


class EncoderBlock(nn.Module):
    """Pre-norm transformer encoder block."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x, valid):
        """x (B, N, width), valid (B, N) bool -> x."""
        q, k, v = self._project(x)
        return self._finish(x, nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None]))

    def read(self, x, valid, rows):
        """The first `rows` elements of `forward`, and their attention (B, rows, N), averaged over heads."""
        q, k, v = self._project(x)
        scores = (q[:, :, :rows] @ k.mT) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~valid[:, None, None], float("-inf"))
        attention = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return self._finish(x[:, :rows], attention.to(v.dtype) @ v), attention.mean(1)

    def _project(self, x):
        """q, k, v: each (B, heads, N, width / heads)."""
        return self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def _finish(self, x, mixed):
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp_out(nn.functional.gelu(self.mlp_in(self.mlp_norm(x))))


class QueryCodebook(nn.Module):
    """C ∈ R^{d_sae x d_c} and the encoder blocks that gather the active concepts into r_1 ... r_{K_s}."""

    def __init__(self, config):
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

    def forward(self, sae, z, mask, where, scale=None):
        """Select, decode and gather the active concepts of each sample.

        Args:
            sae: the frozen SparseAutoencoder.
            z: float (B, T, d_π), hidden states at the SAE's layer.
            mask: bool (B, T), tokens that may fire concepts (no padding, no special tokens).
            where: float (B, T, TOKEN_POSITION_DIM) from `token_position_features`.
            scale: optional float (d_sae,) or (B, d_sae) factors on h_j, 1 but at the concepts intervened on.

        Returns:
            Concepts.
        """
        tokens, valid, concepts = self.concept_tokens(sae, z, mask, where, scale)
        batch, slots = len(z), len(self.slot_queries)
        x = torch.cat([self.slot_queries.expand(batch, -1, -1), tokens], 1)
        valid = torch.cat([valid.new_ones(batch, slots), valid], 1)
        for block in self.blocks[:-1]:
            x = block(x, valid)
        r, attention = self.blocks[-1].read(x, valid, slots)
        weights = attention[:, :, slots:]
        if self.reading == "token":
            strength = self.codebook[concepts.indices].norm(dim=-1)
            share = (concepts.activations * strength[:, None]).to(weights.dtype)
            weights = weights @ (share / share.sum(-1, keepdim=True).clamp_min(1e-6))
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        return concepts._replace(representations=self.norm(r), weights=weights)

    def concept_tokens(self, sae, z, mask, where, scale=None):
        """Eq. 4's decoding of the active features, up to the encoder blocks; arguments as `forward`'s.

        Returns:
            tokens: float (B, N, d_c), h_j C_j and where it fired for each of N = M features, or, with the "token"
            reading, the sum of the codes of each of N = T tokens; valid: bool (B, N), those with something active;
            Concepts without `representations` and `weights`.
        """
        indices, threshold = self.select(sae, z, mask, scale)
        activations = self.activate(sae, z, mask, indices, threshold, scale)
        values = activations.amax(1)
        codes = self.codebook[indices]
        where = where.to(codes.dtype)
        if self.reading == "feature":
            fired_at = (activations.mT @ where) / activations.sum(1).clamp_min(1e-6)[..., None]
            tokens, valid = values[..., None] * codes + self.where(fired_at), values > 0
        else:
            tokens, valid = activations @ codes + self.where(where), mask & (activations > 0).any(-1)
        return tokens, valid, Concepts(None, indices, values, None, activations)

    @torch.no_grad()
    def select(self, sae, z, mask, scale=None, max_elements=2**23):
        """Choose each sample's M concepts by strength relative to the feature's usual strength, a chunk at a time.

        With a "relu" SAE only the maximum over tokens of each feature counts, and it is found in half precision where
        the machine multiplies faster in it; the best 2 M are then measured exactly, and of these the best M taken.

        Returns:
            indices: long (B, M); threshold: None, or float (B, T), the smallest activation that counts as active at
            each token (for SAEs that keep the k largest).
        """
        search = self._search_topk if sae.config.activation == "topk" else self._search_relu
        strength, threshold = search(sae, z, mask, max_elements)
        relative = strength / sae.mean_active_activation.clamp_min(1e-6)
        if scale is not None:
            relative = relative * scale
        if threshold is not None:
            return relative.topk(self.num_concepts, dim=-1).indices, threshold
        likely = relative.topk(min(2 * self.num_concepts, sae.config.d_sae), dim=-1).indices
        relative = self.activate(sae, z, mask, likely, scale=scale).amax(1) / sae.mean_active_activation[
            likely
        ].clamp_min(1e-6)
        return likely.gather(1, relative.topk(self.num_concepts, dim=-1).indices), None

    @staticmethod
    def _search_relu(sae, z, mask, max_elements):
        """Each feature's greatest activation, (B, d_sae), in chunks of features."""
        batch, length, _ = z.shape
        halves = z.is_cuda or torch.cpu._is_avx512_bf16_supported()
        # A masked token stands in as the first valid one, which leaves the maximum as it is.
        stand_in = torch.where(mask, torch.arange(length, device=z.device), mask.int().argmax(1, keepdim=True))
        low = z.to(torch.bfloat16 if halves else sae.W_enc.dtype).gather(1, stand_in[..., None].expand_as(z))
        strength = sae.b_enc.masked_fill(~mask.any(1, keepdim=True), float("-inf"))
        step = max(1, max_elements // (batch * length))
        for start in range(0, sae.config.d_sae, step):
            columns = slice(start, start + step)
            strength[:, columns] += (low @ sae.W_enc[:, columns].to(low.dtype)).amax(1)
        return sae.gate(strength.relu_()), None

    @staticmethod
    def _search_topk(sae, z, mask, max_elements):
        """The same in chunks of tokens, and each token's k-th largest activation, (B, T)."""
        batch, length, _ = z.shape
        step = max(1, max_elements // (batch * sae.config.d_sae))
        strength, threshold = z.new_zeros(batch, sae.config.d_sae, dtype=sae.W_enc.dtype), []
        for start in range(0, length, step):
            h = sae.encode(z[:, start : start + step])
            threshold.append(h.masked_fill(h == 0, float("inf")).amin(-1))
            h = h.masked_fill(~mask[:, start : start + step, None], 0)
            strength = torch.maximum(strength, h.amax(1))
        return strength, torch.cat(threshold, 1)

    def activate(self, sae, z, mask, indices, threshold=None, scale=None):
        """h_j(z_t) of the selected concepts only, differentiable in z: float (B, T, M)."""
        encoder = sae.W_enc[:, indices].transpose(0, 1)  # (B, d_π, M); along the rows of W_enc, as they lie in memory
        h = torch.relu(z.to(encoder.dtype) @ encoder + sae.b_enc[indices][:, None])
        h = sae.gate(h, indices[:, None])
        if threshold is not None:
            h = h * (h >= threshold[..., None] * (1 - 1e-5))
        h = h * mask[..., None]
        return h if scale is None else h * scale.expand(len(indices), -1).gather(1, indices)[:, None]
