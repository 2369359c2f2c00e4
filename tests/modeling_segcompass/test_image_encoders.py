"""Every kind of image encoder: preprocessing, keys, places, and the start of the mask decoder.

The columns of the table in docs/encoders.md that take no training run here for every kind, and a step of each trainer
for one that pads and one that stretches; all of them: `python benchmarks/image_encoders.py`.
"""

import json
import logging

import pytest
import torch
import transformers as T
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from segcompass.modeling_segcompass import SegCompassConfig, SegCompassModel
from segcompass.modeling_segcompass.image_encoder import (
    Frame,
    ImageEncoder,
    check_frame,
    encoder_of,
    frame_of,
    image_processor_of,
    load_image_encoder,
)
from segcompass.trainers import SegCompassSFTConfig, SegCompassSFTTrainer
from tests.support.encoders import CHECKS, HIERA, SAM, SAM2, SAM3, SAM3_VIT, TINY, tiny_encoder
from tests.support.tiny import tiny_mllm, tiny_processor, tiny_segcompass

TRAINING = ("SFT step", "GRPO step")
FAST = [(name, column) for name in TINY for column in CHECKS if column not in TRAINING]
FAST += [(name, column) for name in ("SAM 2", "DINOv3 ViT") for column in TRAINING]


@pytest.mark.parametrize(("name", "column"), FAST, ids=[f"{name}, {column}" for name, column in FAST])
def test_every_kind_of_encoder(name, column, tmp_path):
    CHECKS[column](name, tmp_path)


PUBLISHED = {
    "SAM": (T.SamVisionConfig, 64, 256, Frame(1024)),
    "SAM-HQ": (T.SamHQVisionConfig, 64, 256, Frame(1024)),
    "SAM 2": (T.Sam2VisionConfig, 64, 256, Frame(1024, stretched=True)),
    "SAM 3": (T.Sam3VisionConfig, 72, 256, Frame(1008, stretched=True)),
    "DINOv2": (lambda: T.Dinov2Config(image_size=518, patch_size=14), 37, 768, Frame(518)),
    "DINOv3 ViT": (T.DINOv3ViTConfig, 14, 384, Frame(224)),
    "DINOv3 ConvNeXt": (T.DINOv3ConvNextConfig, 7, 768, Frame(224)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_of_the_published_sizes(name):
    make, grid, channels, frame = PUBLISHED[name]
    config = make()
    encoder = encoder_of(config)
    assert (encoder.key_grid(config), encoder.channels(config), encoder.frame(config)) == (grid, channels, frame)
    assert frame_of(image_processor_of(config)) == frame


# -- whole models ------------------------------------------------------------------------------------------------------

PROMPT = dict(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=16)
DECODER = dict(hidden_size=16, mlp_dim=32, num_attention_heads=4, iou_head_hidden_dim=16)


def whole(kind):
    torch.manual_seed(0)
    if kind == "sam_hq":
        parts = dict(vision_config=SAM | {"num_pos_feats": 8}, prompt_encoder_config=PROMPT | {"image_size": 32})
        model = T.SamHQModel(T.SamHQConfig(**parts, mask_decoder_config=DECODER | {"vit_dim": 16}))
    elif kind == "sam2":
        model = T.Sam2Model(T.Sam2Config(vision_config=SAM2, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER))
    elif kind == "sam2_video":
        memory = dict(
            memory_attention_hidden_size=16,
            memory_attention_feed_forward_hidden_size=16,
            memory_attention_num_layers=1,
            memory_encoder_hidden_size=16,
            memory_encoder_output_channels=8,
            mask_downsampler_embed_dim=16,
            memory_fuser_embed_dim=16,
            memory_fuser_intermediate_dim=16,
        )
        parts = dict(vision_config=SAM2, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER)
        model = T.Sam2VideoModel(T.Sam2VideoConfig(**parts, **memory))
    else:
        parts = dict(vision_config=SAM3, prompt_encoder_config=PROMPT | {"image_size": 56, "patch_size": 7})
        model = T.Sam3TrackerModel(T.Sam3TrackerConfig(**parts, mask_decoder_config=DECODER))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model.eval()


def built_on(image_encoder):
    processor = tiny_processor("llava")
    processor.encoder_image_processor = image_processor_of(image_encoder)
    fields = dict(d_c=16, num_concepts=8, codebook_heads=4, decoder_heads=4, decoder_mlp_dim=32)
    return SegCompassModel.from_backbones(tiny_mllm("llava", processor), image_encoder, processor=processor, **fields)


@pytest.mark.parametrize("kind", ["sam_hq", "sam2", "sam2_video", "sam3_tracker"])
def test_the_mask_decoder_starts_as_that_of_the_whole_model(kind, tmp_path, caplog):
    """Fed the same tokens and keys, our transformer gives what theirs gives; the log says what is new."""
    theirs = whole(kind)
    theirs.save_pretrained(tmp_path)
    model = built_on(str(tmp_path)).eval()
    ours = model.mask_decoder
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "mask decoder" in r.getMessage()]
    grid = model.config.key_grid
    pixels = torch.randn(1, 3, model.config.frame.side, model.config.frame.side)
    tokens, positions = torch.randn(1, 1, 2, 16), model._key_positions((grid, grid))
    heat = torch.randn(1, 1, 4 * grid, 4 * grid)
    with torch.no_grad():
        keys = model.get_image_embeddings(pixels)
        mask = theirs.prompt_encoder.mask_embed(heat)
        if kind == "sam_hq":
            their_keys = theirs.vision_encoder(pixels).last_hidden_state
        else:
            their_keys = theirs.vision_encoder(pixels).fpn_hidden_states
            their_keys = their_keys[model.config.image_encoder_config.scale_factors.index(1.0) if "3" in kind else -1]
            mask = mask + theirs.no_memory_embedding[..., None].mT.reshape(1, -1, 1, 1)  # SAM 2 adds it to the keys
        torch.testing.assert_close(keys, their_keys)
        torch.testing.assert_close(ours.mask_embed(heat), mask)
        torch.testing.assert_close(positions, theirs.get_image_wide_positional_embeddings(), atol=1e-5, rtol=1e-5)
        for one, other in zip(
            ours.transformer(tokens, keys, positions, None),
            theirs.mask_decoder.transformer(tokens, keys, positions, None),
            strict=True,
        ):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        state = torch.randn(1, 16)
        torch.testing.assert_close(ours.hypernetwork(state), theirs.mask_decoder.output_hypernetworks_mlps[0](state))
    assert torch.equal(ours.upscale_conv2.weight, theirs.mask_decoder.upscale_conv2.weight)


def test_the_log_says_that_the_decoder_starts_from_nothing_or_in_part(caplog):
    built_on(tiny_encoder("DINOv2"))
    assert "the mask decoder starts from nothing: Dinov2Model brings none of its own" in caplog.text
    caplog.clear()
    processor = tiny_processor("llava")
    theirs = whole("sam2")
    processor.encoder_image_processor = image_processor_of(theirs)
    fields = dict(d_c=16, num_concepts=8, codebook_heads=4, decoder_heads=4, decoder_mlp_dim=64)
    SegCompassModel.from_backbones(tiny_mllm("llava", processor), theirs, processor=processor, **fields)
    # the wider layers do not fit: of two blocks two weights and a bias each; and the confidence is ours
    assert "starts from that of Sam2VisionModel; 8 of its 107" in caplog.text
    assert "mask_decoder.transformer.layers.0.mlp.lin1.weight" in caplog.text


# -- what is refused, and what a repository says of itself -------------------------------------------------------------


def test_a_repositorys_own_normalisation_is_kept_and_its_geometry_is_not(tmp_path):
    tiny_encoder("DINOv2").save_pretrained(tmp_path)
    assert list(image_processor_of(str(tmp_path)).image_mean) == [0.485, 0.456, 0.406]
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5], "crop_size": 5, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    made = image_processor_of(str(tmp_path))
    assert list(made.image_mean) == [0.1, 0.2, 0.3] and list(made.image_std) == [0.5] * 3
    assert frame_of(made) == Frame(32) and not made.do_center_crop


def test_a_processor_that_places_images_otherwise_is_refused(tmp_path):
    for name, other in (("SAM 2", "DINOv2"), ("DINOv2", "SAM 2"), ("SAM", "DINOv3 ConvNeXt")):
        processor = tiny_processor("llava")
        processor.encoder_image_processor = image_processor_of(tiny_encoder(other))
        with pytest.raises(ValueError, match="the processor makes images of .* reads .*image_processor_of"):
            SegCompassModel.from_backbones(tiny_mllm("llava", processor), tiny_encoder(name), processor=processor)
    model, processor = tiny_segcompass("llava", image_encoder=tiny_encoder("SAM 2"))
    processor.encoder_image_processor = SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}
    )
    with pytest.raises(ValueError, match="makes images of 64 pixels, padded, .* reads 64 pixels, stretched"):
        SegCompassSFTTrainer(model, SegCompassSFTConfig(str(tmp_path), use_cpu=True, report_to="none"), processor)


def test_an_image_processor_that_crops_or_pads_to_another_side_is_refused():
    crops = CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 28, "width": 28})
    pads = SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 64, "width": 64})
    for images in (crops, pads, CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)):
        with pytest.raises(ValueError, match="must scale the longest side and pad to a square of that side"):
            frame_of(images)


def test_sizes_that_leave_no_square_grid_are_refused():
    for config, message in (
        (
            T.Dinov2Config(image_size=30, patch_size=4),
            "30 pixels a side, .* stride of 4; set image_size .* to 28 or 32",
        ),
        (T.Dinov2Config(image_size=[32, 64], patch_size=4), r"image_size is \(32, 64\); only squares"),
        (T.Sam2VisionConfig(backbone_config=HIERA | {"image_size": [64, 128]}), "only squares are supported"),
        (T.Sam3VisionConfig(backbone_config=SAM3_VIT | {"image_size": 60}), "no multiple of its stride of 7"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder_of(config).key_grid(config)


def test_pixels_of_another_size_are_refused():
    model, _ = tiny_segcompass("llava", image_encoder=tiny_encoder("DINOv3 ViT"))
    with pytest.raises(ValueError, match="keys of shape .* where .B, 16, 8, 8. is needed; give it images of 32 x 32"):
        model.get_image_embeddings(torch.zeros(1, 3, 64, 64))


def test_a_class_that_this_transformers_lacks_is_named():
    class Later(ImageEncoder):
        """A kind that transformers does not have yet."""

        model_class = "Sam9VisionModel"

    with pytest.raises(ValueError, match=f"transformers {T.__version__} has no Sam9VisionModel, .* later version"):
        Later().build(T.Sam2VisionConfig())


def test_a_stretched_frame_refuses_mllms_that_see_a_square_of_the_image():
    with pytest.raises(ValueError, match="the image encoder stretches the image and the MLLM sees it as 'center_crop'"):
        Frame(64, stretched=True).place_patches(torch.rand(1, 4, 2), torch.tensor([[64, 64]]), "center_crop")


def test_check_frame_passes_what_fits():
    config = SegCompassConfig(image_encoder_config=T.Sam2VisionConfig())
    check_frame(config, image_processor_of(config.image_encoder_config))


def test_any_kind_is_loaded_from_a_loaded_whole_model():
    theirs = whole("sam2")
    encoder, weights = load_image_encoder(theirs)
    assert encoder is theirs.vision_encoder and "mask_decoder.transformer.layers.0.mlp.lin1.weight" in weights
