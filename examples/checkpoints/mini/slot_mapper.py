"""The slot mapper F_slot: slot queries attend to image keys and leave a heatmap and a confidence each (Eq. 2 and 5).

It reads the concentration tokens' embeddings e_k, the concept representations r_k and the image keys K. What it returns
depends on the image only through the attention scores S, so the heatmap is the whole interface to the decoder.
"""

from typing import Any

import torch
from torch import nn


class SlotMapper(nn.Module):
    """Fuses e_k and r_k into Q_k, attends to K, and reads heatmap and confidence off the scores S.

    Args:
        config: SegCompassConfig.

    Example:
        slot_mapper = SlotMapper(config)
        heatmaps, confidences = slot_mapper(e, r, keys, cell_mask)  # (B, K_s, h, w), (B, K_s)
        likeliest = confidences.argmax(1)
    """

    def __init__(self, config: Any):
        super().__init__()
        d_pi = config.get_text_config().hidden_size
        d_k = config.key_channels
        self.heads, self.head_dim = config.slot_heads, config.slot_head_dim
        self.token_norm = nn.LayerNorm(d_pi)
        self.concept_norm = nn.LayerNorm(config.d_c)
        self.fuse_in = nn.Linear(d_pi + config.d_c, d_pi)
        self.fuse_out = nn.Linear(d_pi, d_pi)
        self.query = nn.Linear(d_pi, self.heads * self.head_dim)
        self.key = nn.Linear(d_k, self.heads * self.head_dim)
        self.map_in = nn.Conv2d(self.heads, 4 * self.heads, 3, padding=1)
        self.map_out = nn.Conv2d(4 * self.heads, 1, 3, padding=1, bias=False)
        self.map_bias = nn.Parameter(torch.empty(1))
        self.conf_norm = nn.LayerNorm(3 * self.heads)
        self.conf_in = nn.Linear(3 * self.heads, 16 * self.heads)
        self.conf_out = nn.Linear(16 * self.heads, 1)

    def forward(
        self,
        e: torch.Tensor,
        r: torch.Tensor,
        keys: torch.Tensor,
        cell_mask: torch.Tensor,
        keep_tokens: torch.Tensor | None = None,
        keep_concepts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map slots to the image.

        Args:
            e: float (B, K_s, d_π), concentration token embeddings.
            r: float (B, K_s, d_c), concept representations.
            keys: float (B, d_k, h, w), image keys K with their positions.
            cell_mask: bool (B, h, w), False where the frame is padding.
            keep_tokens: float (B,), 0 removes e of that sample from the query; None keeps all.
            keep_concepts: float (B,), 0 removes r of that sample from the query; None keeps all.

        Returns:
            tuple: heatmaps H_k, float (B, K_s, h, w) logits, and confidences c_k, float (B, K_s) logits.
        """
        batch, slots, _ = e.shape
        e, r = self.token_norm(e), self.concept_norm(r)
        if keep_tokens is not None:
            e = e * keep_tokens[:, None, None]
        if keep_concepts is not None:
            r = r * keep_concepts[:, None, None]
        q = self.fuse_out(nn.functional.silu(self.fuse_in(torch.cat([e, r], -1))))
        height, width = keys.shape[-2:]
        q = self.query(q).view(batch, slots, self.heads, self.head_dim).permute(0, 2, 1, 3)  # (B, N_h, K_s, d_h)
        k = self.key(keys.flatten(2).mT)  # (B, h·w, N_h·d_h)
        k = k.view(batch, height * width, self.heads, self.head_dim).permute(0, 2, 3, 1)  # (B, N_h, d_h, h·w)
        scores = (q @ k) * self.head_dim**-0.5  # S (B, N_h, K_s, h·w)

        s = scores.transpose(1, 2).reshape(batch * slots, self.heads, height, width)  # (B·K_s, N_h, h, w)
        heatmaps = self.map_out(nn.functional.silu(self.map_in(s))) + self.map_bias
        heatmaps = heatmaps.view(batch, slots, height, width)  # H_k

        s = scores.float().transpose(1, 2)  # (B, K_s, N_h, h·w)
        inside = cell_mask.flatten(1)[:, None, None]  # (B, 1, 1, h·w)
        count = inside.sum(-1)
        inside_scores = s.masked_fill(~inside, float("-inf"))
        mean = s.masked_fill(~inside, 0).sum(-1) / count
        summary = [inside_scores.amax(-1), inside_scores.logsumexp(-1) - count.log(), mean]
        conf = self.conf_norm(torch.cat(summary, -1).to(e.dtype))  # (B, K_s, 3·N_h)
        conf = self.conf_out(nn.functional.silu(self.conf_in(conf)))[..., 0]  # c_k (B, K_s)
        return heatmaps, conf
