"""`segcompass merge` makes a model of adapters, and says what it needs."""

import json
import shutil

import pytest
import torch
from peft import get_peft_model

from segcompass import SegCompassModel
from segcompass.cli import main
from segcompass.commands import merge
from segcompass.trainers.adapter_base import base_of, note_base
from segcompass.trainers.policy import lora_config
from tests.support.scripted import noise_image
from tests.support.tiny import tiny_segcompass


def test_the_merged_model_is_the_adapted_one(tmp_path, capsys):
    model, processor = tiny_segcompass("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    adapted = get_peft_model(model, lora_config(model, r=2)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02 * parameter.requires_grad)
    adapted.save_pretrained(tmp_path / "adapters")
    named = {"index": 3, "label": "red", "density": 0.1}
    dictionary = {"features": model.config.sae_config.d_sae, "concepts": [named]}
    (tmp_path / "model" / "concepts.json").write_text(json.dumps(dictionary))
    merge.main([str(tmp_path / "adapters"), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "merged")])
    said = capsys.readouterr().out
    assert f"segcompass dictionary --model {tmp_path / 'merged'}" in said and "names of the concepts" in said
    with pytest.raises(OSError, match="adapters holds adapters and no model; put them into .*segcompass merge"):
        SegCompassModel.from_pretrained(tmp_path / "adapters")
    merged = SegCompassModel.from_pretrained(tmp_path / "merged").eval()
    inputs = processor(images=noise_image(40, 60), text="it", response=processor.format_response("a box"))
    with torch.no_grad():
        ours, theirs = merged(**inputs), adapted(**inputs)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=0)  # B A is added once and not per token
    torch.testing.assert_close(ours.pred_masks, theirs.pred_masks, atol=1e-3, rtol=0)


def test_a_folder_without_adapters_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["merge", str(tmp_path), "--model", "x", "--output", str(tmp_path / "out")])
    assert "holds no adapters (adapter_config.json)" in capsys.readouterr().err


def test_adapters_go_into_the_weights_that_they_were_trained_on_and_no_others(tmp_path, monkeypatch, capsys):
    """Merged into another training's model they wrote garbage, without a word."""
    monkeypatch.chdir(tmp_path)

    def saved(name, number):
        model, processor = tiny_segcompass("llava")
        with torch.no_grad():
            model.mask_decoder.mask_token.fill_(number)
        model.save_pretrained(name)
        processor.save_pretrained(name)

    def merged(model, adapters="adapters"):
        capsys.readouterr()
        merge.main([adapters, "--model", model, "--output", f"merged-{len(list(tmp_path.glob('merged-*')))}"])
        return "is not known" not in capsys.readouterr().out

    saved("base", 1)
    saved("other", 2)
    model = SegCompassModel.from_pretrained("base")
    adapted = get_peft_model(model, lora_config(model, r=2))
    adapted.save_pretrained("adapters")
    adapted.save_pretrained("noted")
    note_base(base_of(adapted), "noted")  # as our trainers do: tests/trainers/test_nothing_hidden.py
    for adapters in ("adapters", "noted"):
        with pytest.raises(ValueError, match=f"{adapters} were trained on base .*, and other has other weights"):
            merged("other", adapters)
    assert not list(tmp_path.glob("merged-*"))
    shutil.copytree("base", "copy")
    assert all(merged(name) for name in ("base", str(tmp_path / "base"), "copy"))
    (tmp_path / "base").rename("moved")
    assert not merged("moved"), "nobody knows what base was"
    assert merged("moved", "noted")
    saved("base", 3)  # trained anew
    with pytest.raises(ValueError, match="trained on base as it was then, and base has other weights"):
        merged("base", "noted")
    path = tmp_path / "noted" / "base_model.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="base_model.json cannot be read"):
        merged("moved", "noted")
