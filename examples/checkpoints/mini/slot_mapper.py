"""The slot mapper F_slot: slot queries attend to image keys and leave a heatmap and a confidence each (Eq. 2 and 5).

It reads the concentration tokens' embeddings e_k, the concept representations r_k and the image keys K. What it returns
depends on the image only through the attention scores S, so the heatmap is the whole interface to the decoder.
"""

import torch
from torch import nn


class SlotMapper(nn.Module):
    """Fuses e_k and r_k into Q_k, attends to K, and reads heatmap and confidence off the scores S."""

    def __init__(self, config):
        super().__init__()
        d_pi = config.get_text_config().hidden_size
        d_k = config.image_encoder_config.output_channels
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

    def forward(self, e, r, keys, valid, keep_tokens=None, keep_concepts=None):
        """Map slots to the image.

        Args:
            e: float (B, K_s, d_π), concentration token embeddings.
            r: float (B, K_s, d_c), concept representations.
            keys: float (B, d_k, h, w), image keys K with their positions.
            valid: bool (B, h, w), False where the frame is padding.
            keep_tokens, keep_concepts: optional float (B,), 0 removes e or r of that sample from the query.

        Returns:
            heatmaps H_k (B, K_s, h, w) logits and confidences c_k (B, K_s) logits.
        """
        batch, slots, _ = e.shape
        e, r = self.token_norm(e), self.concept_norm(r)
        if keep_tokens is not None:
            e = e * keep_tokens[:, None, None]
        if keep_concepts is not None:
            r = r * keep_concepts[:, None, None]
        q = self.fuse_out(nn.functional.silu(self.fuse_in(torch.cat([e, r], -1))))
        height, width = keys.shape[-2:]
        q = self.query(q).view(batch, slots, self.heads, self.head_dim).permute(0, 2, 1, 3)
        k = self.key(keys.flatten(2).mT).view(batch, height * width, self.heads, self.head_dim).permute(0, 2, 3, 1)
        scores = (q @ k) * self.head_dim**-0.5  # S (B, N_h, K_s, h·w)

        s = scores.transpose(1, 2).reshape(batch * slots, self.heads, height, width)
        heatmaps = self.map_out(nn.functional.silu(self.map_in(s))) + self.map_bias
        heatmaps = heatmaps.view(batch, slots, height, width)

        s = scores.float().transpose(1, 2)  # (B, K_s, N_h, h·w)
        inside = valid.flatten(1)[:, None, None]
        count = inside.sum(-1)
        outside = s.masked_fill(~inside, float("-inf"))
        summary = [outside.amax(-1), outside.logsumexp(-1) - count.log(), s.masked_fill(~inside, 0).sum(-1) / count]
        conf = self.conf_norm(torch.cat(summary, -1).to(e.dtype))
        conf = self.conf_out(nn.functional.silu(self.conf_in(conf)))[..., 0]
        return heatmaps, conf
