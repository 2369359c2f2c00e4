"""What `segcompass train sft` is told of a model is followed, or named: nothing is left aside without a word."""

import json

import pytest
from trl import ModelConfig

from segcompass.commands.train_sft import SFTArguments, check_fields, start
from segcompass.modeling_segcompass import SegCompassModel
from segcompass.trainers import SegCompassSFTConfig
from tests.support.tiny import tiny_segcompass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"d_see": 4}, "'d_see', which is no field of SegCompassConfig"),
        ({"look_concept": 4}, "'look_concept', which is no field of SegCompassConfig; 'look_concepts' is"),
        ({"token_dropout": 0.5}, "token_dropout=0.5, but training sets it from the option of that name"),
    ],
)
def test_fields_that_would_change_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        check_fields(given)
    check_fields({"d_c": 64, "concept_reading": "feature", "sam_config": None, "token_dropout": 0.0})


def test_what_is_said_of_building_beside_a_model_is_named(tmp_path, capsys):
    model, processor = tiny_segcompass("llava", concept_reading="grounded")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    training, plain = SegCompassSFTConfig(str(tmp_path / "run"), use_cpu=True), ModelConfig()
    options = {"mllm": "nowhere/x", "model_config": json.dumps({"concept_reading": "feature"})}
    loaded, _ = start(SFTArguments(model=str(tmp_path), **options), training, plain)
    assert loaded.grounded
    assert "goes on from model=" in (said := capsys.readouterr().out) and "not followed: mllm, model_config" in said
    start(SFTArguments(model=str(tmp_path)), training, plain)
    assert "not followed" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="merged into that model as it is saved, with its own SAE; leave sae out"):
        start(SFTArguments(model=str(tmp_path), sae="runs/sae"), training, ModelConfig(use_peft=True))


def test_an_sae_of_another_shape_than_the_configuration_says_is_refused():
    model, processor = tiny_segcompass("llava")
    parts = dict(mllm=model.mllm, image_encoder=model.image_encoder, sae=model.sae, processor=processor)
    shape = {"d_c": 16, "decoder_heads": 4, "codebook_heads": 4}
    with pytest.raises(ValueError, match="sae_config has d_sae=256, but the SAE that is given has 128"):
        SegCompassModel.from_backbones(**parts, **shape, sae_config={"d_in": 32, "d_sae": 256, "layer": 2})
    with pytest.raises(ValueError, match="num_slots=4, but the processor writes 3 concentration tokens; leave it out"):
        SegCompassModel.from_backbones(**parts, **shape, num_slots=4)
    SegCompassModel.from_backbones(**parts, **shape, sae_config={"d_in": 32, "d_sae": 128, "layer": 2}, num_slots=3)
