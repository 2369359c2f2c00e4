"""Write a tiny saved folder of today's format, with what it answers, for tests of all later versions to load.

    python -m tests.support.saved_folder tests/modeling_segcompass/saved/format-2

Whoever raises `FORMAT_VERSION` in modeling_segcompass/manifest.py runs this once, at the commit that raises it, and
commits the folder and the `.safetensors` beside it. Neither is ever written again: they are what users have on disk.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import SamVisionConfig, SamVisionModel

from segcompass.modeling_segcompass import SegCompassModel, SparseAutoencoderConfig
from segcompass.modeling_segcompass.image_encoder import image_processor_of
from segcompass.modeling_segcompass.manifest import MANIFEST, signing
from tests.support.encoders import SAM
from tests.support.tiny import tiny_mllm, tiny_processor


def question(processor):
    """Inputs of a teacher-forced pass over an image that is drawn here, of 40 x 56 pixels."""
    rows, columns = np.mgrid[:40, :56]
    image = Image.fromarray(np.stack([rows * 6, columns * 4, (rows + columns) * 2], -1).astype(np.uint8))
    return processor(images=image, text="the box", response="<think>a box</think>" + "<REF_POS>" * 3)


def answers(model, processor):
    """What must not change: the tokens, the masks, the confidences and the concepts."""
    inputs = question(processor)
    with torch.no_grad():
        made = model(**inputs)
    kept = {name: made[name].contiguous() for name in ("pred_masks", "pred_logits", "concept_indices")}
    return {"input_ids": inputs["input_ids"], **kept}


def save(folder):
    """A LLaVA, a SAM and an SAE, of a few thousand weights, without the code that a folder for the Hub carries."""
    torch.manual_seed(0)
    processor = tiny_processor("llava")
    sam = SamVisionModel(SamVisionConfig(**SAM))
    with torch.no_grad():
        for weight in sam.parameters():
            weight.normal_(std=0.2)
    processor.encoder_image_processor = image_processor_of(sam)
    model = SegCompassModel.from_backbones(
        tiny_mllm("llava", processor, hidden=16, layers=2),
        sam,
        processor=processor,
        sae_config=SparseAutoencoderConfig(d_in=16, d_sae=32, layer=1),
        d_c=8,
        num_concepts=8,
        codebook_layers=1,
        codebook_heads=2,
        slot_heads=2,
        slot_head_dim=4,
        decoder_layers=1,
        decoder_heads=2,
        decoder_mlp_dim=16,
    ).eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with signing(folder):
        for code in Path(folder).glob("*.py"):
            code.unlink()
    save_file(answers(model, processor), f"{folder}.safetensors")
    return json.loads(Path(folder, MANIFEST).read_text())["format_version"]


if __name__ == "__main__":
    print("format version", save(sys.argv[1]))
