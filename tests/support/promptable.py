"""Whole tiny SAMs that take boxes and points: transformers' own classes, random weights that let something through."""

import json

import torch
import transformers as T
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.sam.processing_sam import SamProcessor

from tests.support.encoders import SAM, SAM2
from tests.support.hub_world import make_sam

SIDE = 64
PROMPTS = dict(hidden_size=16, image_size=SIDE, patch_size=4, image_embedding_size=SIDE // 4)
DECODER = dict(hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16)
VISION = {**SAM, "image_size": SIDE, "num_pos_feats": 8}
HIERA_PROMPTS = dict(hidden_size=16, image_size=64, patch_size=16)

WHOLE = {
    "SAM": lambda: T.SamModel(
        T.SamConfig(vision_config=VISION, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER)
    ),
    "SAM-HQ": lambda: T.SamHQModel(
        T.SamHQConfig(
            vision_config=VISION, prompt_encoder_config=PROMPTS, mask_decoder_config={**DECODER, "vit_dim": 16}
        )
    ),
    "SAM 2": lambda: T.Sam2Model(
        T.Sam2Config(vision_config=SAM2, prompt_encoder_config=HIERA_PROMPTS, mask_decoder_config=DECODER)
    ),
}


def save_promptable(name, folder):
    """Save one into a folder, in the Hub's layout."""
    torch.manual_seed(0)
    model = WHOLE[name]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.3)
    if name == "SAM":  # with its preprocessor_config.json; the others have what image_processor_of takes
        make_sam(folder, SIDE)
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] in ("sam", "sam_hq", "sam2")
    return model


def by_transformers(folder, image, box):
    """Mask, estimated IoU and prompt as transformers' own processor and SamModel make them of a box in the image."""
    sam = T.SamModel.from_pretrained(folder).eval()
    images = SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})
    processor = SamProcessor(images)
    inputs = processor(images=image, input_boxes=[[box]], return_tensors="pt")
    sizes = [inputs.pop(name) for name in ("original_sizes", "reshaped_input_sizes")]
    inputs["input_boxes"] = inputs["input_boxes"].float()
    with torch.no_grad():
        made = sam(**inputs, multimask_output=False)
    (mask,) = images.post_process_masks(made.pred_masks, *sizes)
    return mask[0, 0].numpy(), float(made.iou_scores[0, 0, 0]), inputs["input_boxes"][0, 0]
