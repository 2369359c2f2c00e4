"""An SAE goes into the MLLM that it was trained on; the commit on the Hub decides, not a folder's name."""

import logging

import pytest

from segcompass.modeling_segcompass import SegCompassModel, SparseAutoencoder, SparseAutoencoderConfig
from segcompass.modeling_segcompass.sae_origin import Origin, check_origin, origin_of
from tests.support.tiny import tiny_segcompass

ONE, OTHER = "1" * 40, "2" * 40
LLAVA = "llava-hf/llava-1.5-7b-hf"


def sae_of(backbone, revision=None):
    return SparseAutoencoder(
        SparseAutoencoderConfig(d_in=32, d_sae=128, layer=2, backbone=backbone, backbone_revision=revision)
    )


def test_load_sae_refuses_another_backbones():
    model, _ = tiny_segcompass("llava")
    model.config.sae_config.backbone = LLAVA
    with pytest.raises(ValueError, match=f"trained on 'lmsys/vicuna-7b', but the MLLM is '{LLAVA}'"):
        model.load_sae(sae_of("lmsys/vicuna-7b"))
    for backbone in (LLAVA, None):
        model.load_sae(sae_of(backbone))
        model.config.sae_config.backbone = LLAVA


def test_load_sae_takes_the_backbone_that_the_mllm_is_called_after():
    model, _ = tiny_segcompass("llava")
    model.config.sae_config.backbone = "llava"
    model.config.mllm_config._name_or_path = LLAVA
    model.load_sae(sae_of(LLAVA))


def test_load_sae_refuses_numbers_that_are_not_finite():
    model, _ = tiny_segcompass("llava")
    sae = sae_of(None)
    sae.state_dict()["W_dec"][3, 4] = float("nan")
    with pytest.raises(ValueError, match="the SAE holds NaN or infinity in 1 tensors .W_dec"):
        model.load_sae(sae)


def test_from_backbones_refuses_another_backbones_by_name_and_takes_the_same_commit():
    model, processor = tiny_segcompass("llava")
    model.mllm.config._name_or_path, model.mllm.config._commit_hash = "/data/copy", ONE
    fields = {"processor": processor, "d_c": 16, "codebook_heads": 4, "slot_head_dim": 8, "decoder_heads": 4}
    built = SegCompassModel.from_backbones(model.mllm, model.image_encoder, sae=sae_of(LLAVA, ONE), **fields)
    assert built.config.sae_config.backbone_revision == ONE
    with pytest.raises(ValueError, match=f"'{LLAVA}' at 2222222, but the MLLM is '/data/copy' at 1111111"):
        SegCompassModel.from_backbones(model.mllm, model.image_encoder, sae=sae_of(LLAVA, OTHER), **fields)
    fresh = SegCompassModel.from_backbones(model.mllm, model.image_encoder, **fields)
    assert (fresh.config.sae_config.backbone, fresh.config.sae_config.backbone_revision) == ("/data/copy", ONE)


def test_another_commit_of_the_same_name_is_taken_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        check_origin(sae_of(LLAVA, ONE).config, Origin(LLAVA, OTHER))
    assert "at 1111111" in caplog.text and "at 2222222" in caplog.text


def test_one_folder_under_two_names_is_one_backbone(tmp_path, monkeypatch):
    (tmp_path / "mllm").mkdir()
    monkeypatch.chdir(tmp_path)
    check_origin(sae_of("mllm").config, Origin(str(tmp_path / "mllm"), None))
    with pytest.raises(ValueError, match="was trained on 'mllm', but"):
        check_origin(sae_of("mllm").config, Origin(str(tmp_path / "other"), None))


def test_a_folder_of_the_hubs_cache_or_client_knows_its_commit(tmp_path):
    config = tiny_segcompass("llava")[0].mllm.config
    cached = tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / ONE
    noted = tmp_path / "copy" / ".cache" / "huggingface" / "download"
    for folder in (cached, noted):
        folder.mkdir(parents=True)
    (noted / "config.json.metadata").write_text(f"{OTHER}\nabcdef\n1700000000.0\n")
    config._name_or_path = str(cached)
    assert origin_of(config) == (LLAVA, ONE)
    config._name_or_path = str(tmp_path / "copy")
    assert origin_of(config) == (str(tmp_path / "copy"), OTHER)
    config._name_or_path = LLAVA
    assert origin_of(config) == (LLAVA, None)


def test_a_folder_without_a_commit_is_known_by_its_weights_wherever_it_lies(tmp_path):
    model, _ = tiny_segcompass("llava")
    config, origins = model.mllm.config, []
    for name in ("first", "moved", "trained"):
        if name == "trained":
            model.mllm.lm_head.weight.data += 0.01
        model.mllm.save_pretrained(tmp_path / name)
        config._name_or_path, config._commit_hash = str(tmp_path / name), None
        origins.append(origin_of(config))
    first, moved, trained = origins
    assert first.revision and first.name != moved.name
    check_origin(sae_of(*first).config, moved)
    with pytest.raises(ValueError, match="was trained on .*first' at .*, but the MLLM is .*trained' at"):
        check_origin(sae_of(*first).config, trained)


def test_the_revision_is_saved(tmp_path):
    sae_of(LLAVA, ONE).save_pretrained(tmp_path)
    assert SparseAutoencoder.from_pretrained(tmp_path).config.backbone_revision == ONE
