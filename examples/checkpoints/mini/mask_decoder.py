"""The mask decoder F_dec: from heatmaps, confidences and image keys to masks (Eq. 3).

Built of SAM's own parts as transformers ships them: the mask branch of its prompt encoder (three convolutions) and
its two-way transformer with upscaling. The query Q_k does not enter: a mask is made of its heatmap, its confidence
and the image, nothing else.
"""

from typing import Any

import torch
from torch import nn
from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig
from transformers.models.sam.modeling_sam import SamFeedForward, SamLayerNorm, SamMaskEmbedding, SamTwoWayTransformer

PADDING_LOGIT = -50.0  # what a heatmap says of the frame's padding: surely not here


class MaskDecoder(nn.Module):
    """Three convolution blocks on the heatmap, a two-way transformer with the image keys, upscaling to 4x the grid.

    Args:
        config: SegCompassConfig.

    Example:
        decoder = MaskDecoder(config)
        masks = decoder(keys, positions, heatmaps, confidences, cell_mask)  # (B, K_s, 4h, 4w) logits
        probabilities = masks.sigmoid()
    """

    def __init__(self, config: Any):
        super().__init__()
        width = config.key_channels
        decoder = SamMaskDecoderConfig(
            hidden_size=width,
            num_hidden_layers=config.decoder_layers,
            num_attention_heads=config.decoder_heads,
            mlp_dim=config.decoder_mlp_dim,
        )
        decoder._attn_implementation = "eager"  # two tokens against the keys: nothing to fuse
        self.mask_embed = SamMaskEmbedding(SamPromptEncoderConfig(hidden_size=width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.confidence = nn.Linear(1, width)
        self.transformer = SamTwoWayTransformer(decoder)
        self.upscale_conv1 = nn.ConvTranspose2d(width, width // 4, kernel_size=2, stride=2)
        self.upscale_layer_norm = SamLayerNorm(width // 4, data_format="channels_first")
        self.upscale_conv2 = nn.ConvTranspose2d(width // 4, width // 8, kernel_size=2, stride=2)
        self.hypernetwork = SamFeedForward(width, width, width // 8, 3)

    def forward(
        self,
        keys: torch.Tensor,
        positions: torch.Tensor,
        heatmaps: torch.Tensor,
        confidences: torch.Tensor,
        cell_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Decode one mask per slot.

        Args:
            keys: float (B, d_k, h, w), image keys K.
            positions: float (1, d_k, h, w), their positional encoding.
            heatmaps: float (B, K_s, h, w) logits H_k.
            confidences: float (B, K_s) logits c_k.
            cell_mask: bool (B, h, w), False where the frame is padding.

        Returns:
            float (B, K_s, 4h, 4w) mask logits.
        """
        batch, slots, height, width = heatmaps.shape
        heat = heatmaps.masked_fill(~cell_mask[:, None], PADDING_LOGIT)
        heat = nn.functional.interpolate(heat, scale_factor=4, mode="bilinear", align_corners=False)  # (B, K_s, 4h, 4w)
        dense = self.mask_embed(heat.flatten(0, 1)[:, None])  # (B·K_s, d_k, h, w)
        image = keys.repeat_interleave(slots, 0) + dense  # (B·K_s, d_k, h, w)
        tokens = torch.stack(
            [
                self.mask_token.expand(batch * slots, -1),
                self.confidence(confidences.sigmoid().flatten().to(keys.dtype)[:, None]),
            ],
            1,
        )  # (B·K_s, 2, d_k)
        tokens, image = self.transformer(
            point_embeddings=tokens[:, None],
            image_embeddings=image,
            image_positional_embeddings=positions.expand(batch * slots, -1, -1, -1),
            attention_similarity=None,
        )
        image = image.transpose(2, 3).reshape(batch * slots, -1, height, width)  # (B·K_s, d_k, h, w)
        image = nn.functional.gelu(self.upscale_layer_norm(self.upscale_conv1(image)))
        image = nn.functional.gelu(self.upscale_conv2(image))  # (B·K_s, d_k/8, 4h, 4w)
        kernel = self.hypernetwork(tokens[:, 0, :1])  # (B·K_s, 1, d_k/8)
        return (kernel @ image.flatten(2)).view(batch, slots, 4 * height, 4 * width)
