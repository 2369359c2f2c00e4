"""F_enc's answers and its frame, against transformers' own encoder and image processor."""

from enum import Enum

import pytest
import torch
from transformers import BertConfig, BertModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from segcompass.modeling_segcompass import SegCompassConfig, SegCompassModel
from segcompass.modeling_segcompass.image_encoder import (
    ENCODERS,
    Frame,
    ImageEncoder,
    encoder_of,
    frame_of,
    image_processor_of,
    load_image_encoder,
    prepare_pixels,
    without_torchvision,
)
from tests.support.scripted import noise_image
from tests.support.tiny import tiny_mllm, tiny_segcompass

SIZES = [(32, 32), (38, 61), (61, 37), (11, 13), (200, 150), (1, 64), (333, 500)]


@pytest.mark.parametrize("size", SIZES)
def test_image_lies_in_the_frame_where_the_image_processor_puts_it(size):
    images = SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32})
    prepared = images([noise_image(*size)], return_tensors="pt")
    frame = frame_of(images)
    assert list(frame.reshaped_size(*size)) == torch.as_tensor(prepared["reshaped_input_sizes"])[0].tolist()


class Interpolation(Enum):
    """As torchvision's, which transformers' image processors take too."""

    BICUBIC = "bicubic"


@pytest.mark.parametrize(
    "images",
    [
        SamImageProcessorPil(size={"longest_edge": 48}, pad_size={"height": 48, "width": 48}),
        SamImageProcessorPil(
            size={"longest_edge": 32},
            pad_size={"height": 32, "width": 32},
            image_mean=[0.1, 0.9, 0.5],
            rescale_factor=0.01,
        ),
        SamImageProcessorPil(size={"longest_edge": 32}, pad_size={"height": 32, "width": 32}, do_normalize=False),
        ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=3, image_std=[0.2, 0.3, 1.7]),
        ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=Interpolation.BICUBIC),
    ],
    ids=["padded", "own values", "not normalised", "stretched", "another library's"],
)
def test_pixels_are_the_image_processors_own_bit_for_bit(images):
    rows = [noise_image(*size) for size in SIZES]
    prepared = prepare_pixels(images, rows)
    assert prepared.dtype == torch.float32
    assert torch.equal(prepared, images(rows, return_tensors="pt")["pixel_values"])


def test_an_image_processor_of_another_class_is_asked_for_its_pixels():
    class Doubled(SamImageProcessorPil):
        def normalize(self, image, *args, **kwargs):
            return 2 * image if image.shape[-1] > 256 else image  # its values depend on more than the level

    images = Doubled(size={"longest_edge": 300}, pad_size={"height": 300, "width": 300})
    rows = [noise_image(200, 300)]
    assert torch.equal(prepare_pixels(images, rows), images(rows, return_tensors="pt")["pixel_values"])


def test_a_cell_counts_when_some_of_it_is_image():
    frame = Frame(32)
    sizes = torch.tensor([[32, 32], [22, 32], [32, 20], [1, 17]])
    mask = frame.cell_mask(sizes, 8)
    for (height, width), cells, extent in zip(sizes.tolist(), mask, frame.valid_extent(sizes, 8).tolist(), strict=True):
        pixels = torch.zeros(32, 32)
        pixels[:height, :width] = 1
        some = pixels.unflatten(0, (8, 4)).unflatten(2, (8, 4)).amax((1, 3)) > 0
        assert torch.equal(cells, some)
        assert extent == [int(some.any(1).sum()), int(some.any(0).sum())]


def test_keys_are_the_encoders_output_and_the_config_knows_their_shape():
    model, processor = tiny_segcompass("llava")
    pixels = processor.encoder_inputs(noise_image(30, 44))["encoder_pixel_values"]
    keys = encoder_of(model).encode(model.image_encoder, pixels)
    assert torch.equal(keys, model.image_encoder(pixels).last_hidden_state)
    config = model.config
    assert keys.shape == (1, config.key_channels, config.key_grid, config.key_grid)
    assert config.frame == processor.frame == Frame(32)
    assert encoder_of(model) is encoder_of(config) is encoder_of(model.image_encoder)


def test_default_is_sam_at_1024_pixels():
    config = SegCompassConfig()
    assert (config.key_grid, config.key_channels, config.frame.side) == (64, 256, 1024)


def test_an_encoder_without_a_spatial_map_is_refused_by_name(tmp_path):
    encoder = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    encoder.save_pretrained(tmp_path)
    for source, name in ((encoder, "BertModel"), (str(tmp_path), str(tmp_path))):
        for ask in (load_image_encoder, image_processor_of):
            with pytest.raises(
                ValueError, match=f"{name}.* is of type 'bert'.* spatial map is needed: SAM, SAM-HQ, SA"
            ):
                ask(source)


class ToyEncoder(ImageEncoder):
    """SigLIP's tokens as a grid."""

    model_class = "SiglipVisionModel"

    def encode(self, encoder, pixels):
        tokens = encoder(pixels).last_hidden_state  # (B, h·w, C)
        side = self.key_grid(encoder.config)
        return tokens.mT.unflatten(2, (side, side))


def test_a_new_encoder_is_a_class_and_an_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(ENCODERS, "siglip_vision_model", ToyEncoder())
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    siglip = SiglipVisionConfig(image_size=32, patch_size=4, **shape)
    _, processor = tiny_segcompass("llava")
    model = SegCompassModel.from_backbones(
        tiny_mllm("llava", processor),
        SiglipVisionModel(siglip),
        processor=processor,
        d_c=16,
        decoder_heads=4,
        num_concepts=8,
    ).eval()
    model.save_pretrained(tmp_path)
    again = SegCompassModel.from_pretrained(tmp_path)
    inputs = processor(images=noise_image(30, 44), text="it", response="<think>a</think><REF_POS>")
    with torch.no_grad():
        assert model(**inputs).heatmaps.shape == (1, 3, 8, 8)
        # weights that lie elsewhere in memory may be summed in another order
        assert torch.allclose(again(**inputs).pred_masks, model(**inputs).pred_masks, atol=1e-5)


@pytest.mark.parametrize("name", ["SamImageProcessor", "SamImageProcessorPil", "SamImageProcessorFast"])
def test_saved_image_processors_are_read_without_torchvision(name):
    settings = without_torchvision({"image_processor_type": name, "do_pad": True})
    assert settings == {"image_processor_type": "SamImageProcessorPil", "do_pad": True}
