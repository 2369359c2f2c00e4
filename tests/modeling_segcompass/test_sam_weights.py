"""Original SAM checkpoints are read key for key, and the mask decoder starts from SAM's.

The key names and shapes of ViT-B were recorded from the `segment-anything` package (sam_vit_b_keys.json). Where that
package is installed its own modules are compared with; it is imported without its predictor, so without torchvision.
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import SamConfig, SamModel, SamVisionModel

from segcompass.modeling_segcompass import SegCompassModel
from segcompass.modeling_segcompass.image_encoder import image_processor_of, load_image_encoder
from segcompass.modeling_segcompass.sam_weights import (
    convert_original_sam,
    sam_vision_config,
    start_mask_decoder,
)
from tests.support.tiny import tiny_mllm, tiny_processor

RECORDED = json.loads(Path(__file__).with_name("sam_vit_b_keys.json").read_text())
WIDTH = 16


def recorded_state():
    with torch.device("meta"):
        return {name: torch.empty(shape) for name, shape in RECORDED.items()}


def test_every_recorded_key_finds_its_place_in_transformers_sam():
    converted = convert_original_sam(recorded_state())
    assert len(converted) == len(RECORDED), "two keys became one"
    with torch.device("meta"):
        theirs = SamModel(SamConfig()).state_dict()  # transformers' default is ViT-B
    tied = {"prompt_encoder.shared_embedding.positional_embedding"}
    assert converted.keys() == theirs.keys() - tied
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items() if name not in tied
    }


def test_configuration_is_read_off_the_shapes():
    config = sam_vision_config(convert_original_sam(recorded_state()))
    default = SamConfig().vision_config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size", "mlp_dim"):
        assert getattr(config, name) == getattr(default, name), name
    assert list(config.global_attn_indexes) == list(default.global_attn_indexes) == [2, 5, 8, 11]
    assert (config.window_size, config.output_channels) == (14, 256)


def test_foreign_keys_are_named():
    with pytest.raises(ValueError, match="1 of 2 weights have no place in SAM, the first 'backbone.conv.weight'"):
        convert_original_sam({"mask_decoder.iou_token.weight": torch.ones(1), "backbone.conv.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="no whole SAM vision encoder"):
        sam_vision_config({"mask_decoder.iou_token.weight": torch.ones(1)})


def tiny_sam(seed=0):
    torch.manual_seed(seed)
    vision = dict(
        hidden_size=16,
        output_channels=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        window_size=4,
        global_attn_indexes=[1],
        mlp_dim=32,
        num_pos_feats=WIDTH // 2,
    )
    prompt = dict(hidden_size=WIDTH, image_size=64, patch_size=8)
    decoder = dict(hidden_size=WIDTH, mlp_dim=32, num_attention_heads=4, iou_head_hidden_dim=16)
    sam = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter.normal_(std=0.3)
    return sam.eval()


def fresh(sam, **config):
    processor = tiny_processor("llava")
    processor.encoder_image_processor = image_processor_of(sam)
    fields = dict(d_c=16, num_concepts=8, codebook_heads=4, decoder_heads=4, decoder_mlp_dim=32)
    return SegCompassModel.from_backbones(tiny_mllm("llava", processor), sam, processor=processor, **fields, **config)


def test_mask_decoder_starts_as_sams_own(tmp_path):
    """Fed what SAM's mask branch gets, our decoder's parts give what SAM's give."""
    sam = tiny_sam()
    sam.save_pretrained(tmp_path)
    for source in (sam, str(tmp_path)):
        model = fresh(source).eval()
        decoder = model.mask_decoder
        mask = torch.randn(1, 1, 32, 32)
        assert torch.equal(decoder.mask_embed(mask), sam.prompt_encoder.mask_embed(mask))
        assert torch.equal(decoder.mask_token, sam.mask_decoder.mask_tokens.weight[:1])
        image = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(model.get_image_embeddings(image), sam.vision_encoder(image).last_hidden_state)
        torch.testing.assert_close(
            model.key_positions((8, 8)), sam.get_image_wide_positional_embeddings(), atol=1e-6, rtol=1e-5
        )
        assert not model.image_positions.positional_embedding.requires_grad
        tokens, keys = torch.randn(1, 1, 2, WIDTH), torch.randn(1, WIDTH, 8, 8)
        positions = model.key_positions((8, 8))
        for ours, theirs in zip(
            decoder.transformer(tokens, keys, positions, None),
            sam.mask_decoder.transformer(tokens, keys, positions, None),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
        state = torch.randn(1, WIDTH)
        assert torch.equal(decoder.hypernetwork(state), sam.mask_decoder.output_hypernetworks_mlps[0](state))
        assert torch.equal(decoder.upscale_conv2.weight, sam.mask_decoder.upscale_conv2.weight)


def test_all_of_the_decoder_but_the_confidence_is_started():
    model = fresh(SamVisionModel._from_config(tiny_sam().config.vision_config))
    _, weights = load_image_encoder(tiny_sam())
    copied = set(start_mask_decoder(model, weights))
    parts = {name for name, _ in model.named_parameters() if name.startswith("mask_decoder.")}
    assert parts - copied == {"mask_decoder.confidence.weight", "mask_decoder.confidence.bias"}
    assert copied - parts == {"image_positions.positional_embedding"}


def test_what_does_not_fit_keeps_its_own_start():
    model = fresh(tiny_sam(), decoder_layers=1)
    assert torch.equal(model.mask_decoder.mask_token, tiny_sam().mask_decoder.mask_tokens.weight[:1])
    _, weights = load_image_encoder(tiny_sam())
    other = fresh(SamVisionModel._from_config(tiny_sam().config.vision_config))
    before = other.mask_decoder.mask_token.clone()
    weights["mask_decoder.mask_tokens.weight"] = torch.zeros(4, WIDTH + 1)
    assert "mask_decoder.mask_token" not in start_mask_decoder(other, weights)
    assert torch.equal(other.mask_decoder.mask_token, before)


# -- the package itself ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original():
    """`segment_anything.modeling`, without the package's __init__, which wants torchvision for its predictor."""
    found = importlib.util.find_spec("segment_anything")
    if found is None:
        pytest.skip("segment-anything is not installed")
    before = sys.modules.get("segment_anything")
    package = types.ModuleType("segment_anything")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["segment_anything"] = package
    yield importlib.import_module("segment_anything.build_sam")
    if before is None:
        del sys.modules["segment_anything"]
    else:
        sys.modules["segment_anything"] = before


def test_recorded_keys_are_the_packages(original):
    with torch.device("meta"):
        state = original.build_sam_vit_b().state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == RECORDED


@torch.no_grad()
def test_pth_file_gives_what_the_package_gives(original, tmp_path):
    """A small Sam of the package's own classes, random weights: encoder, mask branch and decoder agree."""
    torch.manual_seed(0)
    sam = original.Sam(
        original.ImageEncoderViT(
            img_size=64,
            patch_size=8,
            embed_dim=16,
            depth=2,
            num_heads=2,
            out_chans=WIDTH,
            use_rel_pos=True,
            window_size=4,
            global_attn_indexes=(1,),
            norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
        ),
        original.PromptEncoder(WIDTH, (8, 8), (64, 64), 16),
        original.MaskDecoder(
            transformer_dim=WIDTH,
            transformer=original.TwoWayTransformer(2, WIDTH, 4, 32),
            iou_head_hidden_dim=WIDTH,
        ),
    ).eval()
    for parameter in sam.parameters():
        parameter.normal_(std=0.3)
    path = tmp_path / "sam_vit_x.pth"
    torch.save(sam.state_dict(), path)
    model = fresh(str(path)).eval()
    image, mask = torch.randn(1, 3, 64, 64), torch.randn(1, 1, 32, 32)
    # the package and transformers sum in another order: float32 rounding through two blocks
    torch.testing.assert_close(model.get_image_embeddings(image), sam.image_encoder(image), atol=1e-4, rtol=1e-4)
    keys, dense = sam.image_encoder(image), sam.prompt_encoder(None, None, mask)[1]
    torch.testing.assert_close(model.mask_decoder.mask_embed(mask), dense, atol=1e-5, rtol=1e-4)
    positions = sam.prompt_encoder.get_dense_pe()
    torch.testing.assert_close(model.key_positions((8, 8)), positions, atol=1e-5, rtol=1e-4)
    tokens = torch.randn(1, 2, WIDTH)
    point, spread = sam.mask_decoder.transformer(keys + dense, positions, tokens)
    ours = model.mask_decoder.transformer(tokens[:, None], keys + dense, positions, None)
    torch.testing.assert_close(ours[0][:, 0], point, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ours[1][:, 0], spread, atol=1e-4, rtol=1e-3)
    grid = spread.mT.reshape(1, WIDTH, 8, 8)
    decoder = model.mask_decoder
    up = torch.nn.functional.gelu(decoder.upscale_layer_norm(decoder.upscale_conv1(grid)))
    up = torch.nn.functional.gelu(decoder.upscale_conv2(up))
    torch.testing.assert_close(up, sam.mask_decoder.output_upscaling(grid), atol=1e-4, rtol=1e-3)
    kernel = sam.mask_decoder.output_hypernetworks_mlps[0](point[:, 0])
    torch.testing.assert_close(decoder.hypernetwork(point[:, 0]), kernel, atol=1e-4, rtol=1e-3)
