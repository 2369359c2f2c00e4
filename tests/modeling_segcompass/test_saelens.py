"""Exchange with SAELens: against what the real package computed (recorded), and against the package where it is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segcompass.modeling_segcompass import SparseAutoencoder
from tests.modeling_segcompass.saelens.ours import CASES, export

RECORDED = Path(__file__).parent / "saelens"
SAELENS_PYTHON = os.environ.get("SAELENS_PYTHON") or (sys.executable if importlib.util.find_spec("sae_lens") else None)


def compare(sae, folder):
    recorded = load_file(folder / "recorded.safetensors")
    h = sae.encode(recorded["z"])
    torch.testing.assert_close(h, recorded["feature_acts"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(h), recorded["reconstruction"], rtol=1e-5, atol=1e-5)
    assert recorded["feature_acts"].any()


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_what_saelens_saved_computes_the_same_here(architecture):
    folder = RECORDED / f"theirs-{architecture}"
    sae = SparseAutoencoder.from_saelens(folder)
    assert (sae.config.layer, sae.config.backbone) == (13, "tiny/backbone")
    compare(sae, folder)
    if architecture == "topk":  # ranked by activation times decoder norm, which is folded into the encoder
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(len(sae.W_dec)))


@pytest.mark.parametrize("activation", CASES)
def test_what_is_exported_is_what_saelens_was_seen_to_compute(activation, tmp_path):
    sae = export(activation, tmp_path)
    folder = RECORDED / f"ours-{activation}"
    assert json.loads((tmp_path / "cfg.json").read_text()) == json.loads((folder / "cfg.json").read_text())
    weights, recorded = (load_file(place / "sae_weights.safetensors") for place in (tmp_path, folder))
    assert weights.keys() == recorded.keys()
    assert all(torch.equal(weights[name], recorded[name]) for name in weights)
    compare(sae, folder)


@pytest.mark.parametrize("activation", CASES)
def test_export_and_import_give_the_same_autoencoder(activation, tmp_path):
    sae = export(activation, tmp_path)
    back = SparseAutoencoder.from_saelens(tmp_path)
    assert back.config.activation == {"batchtopk": "jumprelu"}.get(activation, activation)
    assert (back.config.layer, back.config.backbone, back.config.d_sae) == (13, "tiny/backbone", 24)
    for name, value in sae.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.skipif(SAELENS_PYTHON is None, reason="SAELens is not installed; SAELENS_PYTHON names an interpreter")
def test_the_recordings_are_what_the_installed_saelens_computes(tmp_path):
    command = [SAELENS_PYTHON, str(RECORDED / "record.py"), str(tmp_path)]
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": root}, capture_output=True)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == sorted(path.name for path in RECORDED.iterdir() if path.name.startswith(("ours-", "theirs-")))
    for folder in folders:
        fresh, recorded = (load_file(place / folder / "recorded.safetensors") for place in (tmp_path, RECORDED))
        for name, value in fresh.items():
            torch.testing.assert_close(value, recorded[name])


def change(folder, tmp_path, **changes):
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / name).write_bytes((RECORDED / folder / name).read_bytes())
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    for name, value in changes.items():
        (cfg["metadata"] if name == "hook_name" else cfg)[name] = value
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gated"}, "'gated' SAE; 'standard', 'topk', 'jumprelu' can be loaded"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'; only 'none'"),
        ({"hook_name": "blocks.3.attn.hook_z"}, "'blocks.3.attn.hook_z'.*layer="),
    ],
)
def test_what_cannot_be_expressed_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_saelens(change("theirs-standard", tmp_path, **changes))


@pytest.mark.parametrize(
    ("hook", "layer"),
    [("blocks.4.hook_resid_pre", 4), ("model.language_model.layers.6", 7), ("blocks.0.hook_resid_post", 1)],
)
def test_the_layer_is_read_from_the_hook(hook, layer, tmp_path):
    assert SparseAutoencoder.from_saelens(change("theirs-standard", tmp_path, hook_name=hook)).config.layer == layer


def test_the_layer_can_be_said(tmp_path):
    folder = change("theirs-standard", tmp_path, hook_name="somewhere")
    assert SparseAutoencoder.from_saelens(folder, layer=5).config.layer == 5
