"""SAM's weights, and its successors', from transformers or from original `.pth` files, as this model uses them.

The vision encoder is taken whole. The mask decoder starts from SAM's mask branch and decoder where shapes match: a
heatmap enters as SAM's mask prompts do, and one mask comes out as its single-mask token makes it.
"""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, SamVisionConfig, SamVisionModel

# Original name -> transformers' name, first match counts; what no rule changes keeps its name.
RULES = (
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.patch_embed.projection."),
    (r"^image_encoder\.pos_embed$", "vision_encoder.pos_embed"),
    (r"^image_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_encoder.layers.\1.layer_norm\2."),
    (r"^image_encoder\.blocks\.(\d+)\.(attn|mlp)\.", r"vision_encoder.layers.\1.\2."),
    (r"^image_encoder\.neck\.0\.", "vision_encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "vision_encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "vision_encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "vision_encoder.neck.layer_norm2."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", "shared_image_embedding.positional_embedding"),
    (r"^prompt_encoder\.point_embeddings\.(\d+)\.", r"prompt_encoder.point_embed.\1."),
    (r"^prompt_encoder\.mask_downscaling\.0\.", "prompt_encoder.mask_embed.conv1."),
    (r"^prompt_encoder\.mask_downscaling\.1\.", "prompt_encoder.mask_embed.layer_norm1."),
    (r"^prompt_encoder\.mask_downscaling\.3\.", "prompt_encoder.mask_embed.conv2."),
    (r"^prompt_encoder\.mask_downscaling\.4\.", "prompt_encoder.mask_embed.layer_norm2."),
    (r"^prompt_encoder\.mask_downscaling\.6\.", "prompt_encoder.mask_embed.conv3."),
    (r"^(prompt_encoder\.(?:not_a_point|no_mask)_embed\.)", r"\1"),
    (r"^mask_decoder\.transformer\.layers\.(\d+)\.norm(\d)\.", r"mask_decoder.transformer.layers.\1.layer_norm\2."),
    (r"^mask_decoder\.transformer\.norm_final_attn\.", "mask_decoder.transformer.layer_norm_final_attn."),
    (r"^(mask_decoder\.transformer\.(?:layers\.\d+\.(?:self|cross)_attn|layers\.\d+\.mlp|final_attn))", r"\1"),
    (r"^(mask_decoder\.(?:iou_token|mask_tokens)\.)", r"\1"),
    (r"^mask_decoder\.output_upscaling\.0\.", "mask_decoder.upscale_conv1."),
    (r"^mask_decoder\.output_upscaling\.1\.", "mask_decoder.upscale_layer_norm."),
    (r"^mask_decoder\.output_upscaling\.3\.", "mask_decoder.upscale_conv2."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.0\.", r"\1.proj_in."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.1\.", r"\1.layers.0."),
    (r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))\.layers\.2\.", r"\1.proj_out."),
)

# Where each weight of our mask decoder comes from in transformers' SamModel.
DECODER_PARTS = (
    ("mask_decoder.mask_embed.", "prompt_encoder.mask_embed."),
    ("mask_decoder.transformer.", "mask_decoder.transformer."),
    ("mask_decoder.upscale_", "mask_decoder.upscale_"),
    ("mask_decoder.hypernetwork.", "mask_decoder.output_hypernetworks_mlps.0."),
    ("mask_decoder.mask_token", "mask_decoder.mask_tokens.weight"),
    ("image_positions.positional_embedding", "shared_image_embedding.positional_embedding"),
)


# What SAM 2 and SAM 3 call differently from SAM.
LATER_NAMES = (
    (r"^(mask_decoder\.transformer\..*_attn.*)\.o_proj\.", r"\1.out_proj."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.proj_in\.", r"\1.lin1."),
    (r"^(mask_decoder\.transformer\.layers\.\d+\.mlp)\.proj_out\.", r"\1.lin2."),
)
VISION = "vision_encoder."


def convert_original_sam(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of an original `segment-anything` checkpoint as transformers' `SamModel` names them.

    Args:
        state_dict: original name -> tensor, all of a checkpoint.

    Returns:
        dict: transformers' name -> the same tensor.

    Raises:
        ValueError: a name that no SAM checkpoint has.
    """
    converted, unknown = {}, []
    for name, tensor in state_dict.items():
        for pattern, target in RULES:
            renamed, hits = re.subn(pattern, target, name)
            if hits:
                converted[renamed] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(state_dict)} weights have no place in SAM, the first {unknown[0]!r}; give one of "
            "the files of the segment-anything project (sam_vit_b, sam_vit_l, sam_vit_h), or a SAM of transformers."
        )
    return converted


def sam_vision_config(weights: dict[str, torch.Tensor]) -> SamVisionConfig:
    """The SamVisionConfig that converted weights belong to, read off their shapes.

    Args:
        weights: as `convert_original_sam` returns them.

    Returns:
        SamVisionConfig: of a ViT-B, L or H, or of another shape.

    Raises:
        ValueError: weights of the vision encoder are missing.
    """
    try:
        channels, _, patch, _ = weights["vision_encoder.patch_embed.projection.weight"].shape
        grid = weights["vision_encoder.pos_embed"].shape[1]
        layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("vision_encoder.layers."))
        reach = [weights[f"vision_encoder.layers.{n}.attn.rel_pos_h"].shape for n in range(layers)]
        mlp_dim = len(weights["vision_encoder.layers.0.mlp.lin1.weight"])
        output_channels = len(weights["vision_encoder.neck.conv1.weight"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"these weights hold no whole SAM vision encoder: {error} is missing.") from error
    whole = 2 * grid - 1  # blocks that attend over the whole grid have one offset for each difference of places
    windows = [(length + 1) // 2 for length, _ in reach if length != whole]
    return SamVisionConfig(
        hidden_size=channels,
        output_channels=output_channels,
        num_hidden_layers=layers,
        num_attention_heads=channels // reach[0][1],
        image_size=grid * patch,
        patch_size=patch,
        mlp_dim=mlp_dim,
        window_size=windows[0] if windows else 0,
        global_attn_indexes=[n for n, (length, _) in enumerate(reach) if length == whole],
    )


def read_original_sam(path: str, dtype: str | torch.dtype = "auto") -> tuple[SamVisionModel, dict[str, torch.Tensor]]:
    """SAM's vision encoder out of an original `.pth` file, and what the mask decoder can start from.

    Args:
        path: of the file.
        dtype: "auto" keeps the file's own.

    Returns:
        tuple: the SamVisionModel, and SAM's other weights under transformers' names.

    Raises:
        ValueError: the weights are no SAM's.
    """
    weights = convert_original_sam(torch.load(path, map_location="cpu", weights_only=True))
    if dtype != "auto":
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    vision = SamVisionModel(sam_vision_config(weights))
    vision.to(weights["vision_encoder.pos_embed"].dtype)  # type: ignore[arg-type]
    part = {name: tensor for name, tensor in weights.items() if name.startswith(VISION)}
    vision.load_state_dict(part)
    vision.config._name_or_path = path
    return vision.eval(), {name: tensor for name, tensor in weights.items() if name not in part}


def take_apart(whole: Any, vision_class: Any) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The vision encoder of a whole SAM, SAM-HQ, SAM 2 or SAM 3, and what the mask decoder can start from.

    Args:
        whole: transformers' model; the encoder goes on sharing its weights.
        vision_class: of the encoder.

    Returns:
        tuple: a model of that class, and the other weights under SAM's names.
    """
    vision = whole.vision_encoder
    if not isinstance(vision, vision_class):  # SAM and SAM-HQ hold its inner part
        vision = vision_class._from_config(whole.config.vision_config, dtype=whole.dtype)
        vision.vision_encoder = whole.vision_encoder
    vision.config._name_or_path = whole.config._name_or_path
    rest = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith(VISION)}
    for later, sams in LATER_NAMES:
        rest = {re.sub(later, sams, name): tensor for name, tensor in rest.items()}
    if "no_memory_embedding" in rest:  # SAM 2 adds it to the keys, where our decoder adds the mask branch
        bias = "prompt_encoder.mask_embed.conv3.bias"
        rest[bias] = rest[bias] + rest["no_memory_embedding"].flatten()
    return vision.eval(), rest


@torch.no_grad()
def start_mask_decoder(model: nn.Module, weights: dict[str, torch.Tensor]) -> list[str]:
    """Copy SAM's mask branch, decoder and positional code into a SegCompassModel where names and shapes match.

    Args:
        model: a SegCompassModel.
        weights: as `load_image_encoder` returns them.

    Returns:
        list: the model's parameter names that now hold SAM's weights.
    """
    copied = []
    for name, parameter in model.named_parameters():
        for ours, theirs in DECODER_PARTS:
            if not name.startswith(ours):
                continue
            tensor = weights.get(theirs + name[len(ours) :])
            if ours.endswith("mask_token") and tensor is not None:
                tensor = tensor[:1]  # the token of the single-mask output
            if tensor is not None and tensor.shape == parameter.shape:
                parameter.copy_(tensor)
                copied.append(name)
    return copied
