"""Configurations build with no network, survive a round trip, and refuse parts that do not fit."""

import json

import pytest
from transformers import LlavaConfig, Qwen2_5_VLConfig, SamVisionConfig

from segcompass.modeling_segcompass import SegCompassConfig, SparseAutoencoderConfig

FULL_SIZE = {
    "llava-1.5-7b": (LlavaConfig(), SparseAutoencoderConfig(d_in=4096, layer=16)),
    "qwen2.5-vl-7b": (
        Qwen2_5_VLConfig(
            text_config=dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
        ),
        SparseAutoencoderConfig(d_in=3584, layer=13),
    ),
}


def test_default_config_has_the_papers_shape_and_needs_no_network():
    config = SegCompassConfig()
    assert config.mllm_config.model_type == "llava"
    assert (config.num_slots, config.num_concepts, config.key_grid) == (6, 256, 64)
    assert (config.sae_config.d_in, config.sae_config.d_sae, config.sae_config.layer) == (4096, 65536, 16)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_config_round_trips(name, tmp_path):
    mllm, sae = FULL_SIZE[name]
    config = SegCompassConfig(
        mllm_config=mllm,
        image_encoder_config=SamVisionConfig(),
        sae_config=sae,
        num_slots=4,
        ref_token_id=7,
        think_end_id=6,
        special_token_ids=(1, 2, 7),
    )
    config.save_pretrained(tmp_path)
    loaded = SegCompassConfig.from_pretrained(tmp_path)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.mllm_config.model_type == mllm.model_type
    assert loaded.sae_config.layer == sae.layer and loaded.special_token_ids == [1, 2, 7]
    json.loads((tmp_path / "config.json").read_text())


def test_sub_configs_may_be_plain_dicts():
    mllm = {"model_type": "qwen2_5_vl", "text_config": {"hidden_size": 64, "num_hidden_layers": 4}}
    config = SegCompassConfig(mllm_config=mllm, sae_config={"d_in": 64, "d_sae": 256, "layer": 2})
    assert isinstance(config.mllm_config, Qwen2_5_VLConfig) and isinstance(config.sae_config, SparseAutoencoderConfig)
    assert config.get_text_config().hidden_size == 64


def test_the_saes_part_of_a_whole_models_folder_is_read(tmp_path):
    mllm, sae = FULL_SIZE["qwen2.5-vl-7b"]
    SegCompassConfig(mllm_config=mllm, sae_config=sae).save_pretrained(tmp_path)
    assert SparseAutoencoderConfig.from_pretrained(tmp_path).to_diff_dict() == sae.to_diff_dict()
    mllm.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'qwen2_5_vl' model, where 'segcompass_sae' is needed"):
        SparseAutoencoderConfig.from_pretrained(tmp_path)


def test_whether_embeddings_are_tied_is_the_mllms_answer(tmp_path):
    config = SegCompassConfig(mllm_config=LlavaConfig(tie_word_embeddings=True))
    assert config.tie_word_embeddings is True
    config.tie_word_embeddings = False
    assert config.mllm_config.tie_word_embeddings is False
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    assert SegCompassConfig.from_pretrained(tmp_path).mllm_config.tie_word_embeddings is True


def test_sae_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"width 3584.*4096 wide.*train or load an SAE of this backbone"):
        SegCompassConfig(sae_config=SparseAutoencoderConfig(d_in=3584))


def test_sae_of_a_layer_the_mllm_lacks_is_refused():
    with pytest.raises(ValueError, match=r"layer 33.*32 decoder blocks.*from 1 to 32"):
        SegCompassConfig(sae_config=SparseAutoencoderConfig(layer=33))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_slots", 0, "num_slots is 0.*at least 1"),
        ("num_slots", "four", "num_slots is 'four'; it must be an integer of at least 1"),
        ("d_c", "wide", "d_c is 'wide'; it must be an integer"),
        ("decoder_heads", 1.5, "decoder_heads is 1.5; it must be an integer"),
        ("concept_reading", "words", r"concept_reading is 'words'.*feature"),
        ("codebook_heads", 7, "d_c=512 is not divisible by codebook_heads=7"),
    ],
)
def test_bad_model_fields_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        SegCompassConfig(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_sae": 0}, "d_sae is 0.*at least 1"),
        ({"layer": 0}, "layer is 0.*at least 1"),
        ({"activation": "gelu"}, "activation is 'gelu'.*relu"),
        ({"activation": "topk", "d_sae": 8, "k": 9}, "k is 9.*8 features.*at most"),
    ],
)
def test_bad_sae_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoderConfig(**fields)
