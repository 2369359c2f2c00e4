"""Exchange with SAELens: against what the real package computed (recorded), and against the package where it is."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from segcompass.modeling_segcompass import SparseAutoencoder
from segcompass.modeling_segcompass.manifest import findings, unlisted
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


# -- every field is honoured or refused: against SAELens' formulas, written out ----------------------------------------

D, N = 8, 32
RANDOM = torch.Generator().manual_seed(5)
WEIGHTS = {
    "W_enc": torch.randn(D, N, generator=RANDOM),
    "b_enc": torch.randn(N, generator=RANDOM),
    "W_dec": torch.randn(N, D, generator=RANDOM),
    "b_dec": 3 * torch.randn(D, generator=RANDOM),
}
FACTOR, THRESHOLD = 1.5 + torch.rand(N, generator=RANDOM), torch.rand(N, generator=RANDOM)
Z = torch.randn(5, D, generator=RANDOM)
OLD = {"d_in": D, "d_sae": N, "architecture": "standard", "hook_name": "blocks.4.hook_resid_post", "model_name": "x"}
NEW = {**OLD, "metadata": {"model_name": "x", "hook_name": "blocks.4.hook_resid_post"}}


def written(folder, fields, **more):
    (folder / "cfg.json").write_text(json.dumps(fields))
    save_file({**WEIGHTS, **more}, folder / "sae_weights.safetensors")
    return folder


def topk_of(pre, k):
    return pre.relu() * (pre >= pre.sort(-1, descending=True).values[:, k - 1 : k])


@pytest.mark.parametrize(
    ("fields", "more", "activation", "subtract", "factor"),
    [
        ({}, {}, torch.relu, 1, 1),  # SAELens subtracts b_dec unless it is told not to
        ({"apply_b_dec_to_input": True}, {}, torch.relu, 1, 1),
        ({"apply_b_dec_to_input": False}, {}, torch.relu, 0, 1),
        ({"finetuning_scaling_factor": True}, {"scaling_factor": FACTOR}, torch.relu, 1, FACTOR),
        ({"finetuning_scaling_factor": True}, {"finetuning_scaling_factor": FACTOR}, torch.relu, 1, FACTOR),
        ({"finetuning_scaling_factor": False}, {"scaling_factor": torch.ones(N)}, torch.relu, 1, 1),
        ({"activation_fn_str": "relu", "normalize_activations": None}, {}, torch.relu, 1, 1),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}, {}, lambda pre: topk_of(pre, 3), 1, 1),
        ({"architecture": "topk", "k": 4}, {}, lambda pre: topk_of(pre, 4), 1, 1),
        (
            {"architecture": "jumprelu", "activation_fn": "relu"},
            {"threshold": THRESHOLD},
            lambda pre: pre.relu() * (pre > THRESHOLD),
            1,
            1,
        ),
    ],
)
@pytest.mark.parametrize("base", [OLD, NEW], ids=["before 6", "since 6"])
def test_fields_are_honoured(fields, more, activation, subtract, factor, base, tmp_path):
    if base is NEW:
        base = {name: value for name, value in NEW.items() if name not in ("hook_name", "model_name")}
    sae = SparseAutoencoder.from_saelens(written(tmp_path, {**base, **fields}, **more))
    h = activation((Z - subtract * WEIGHTS["b_dec"]) @ WEIGHTS["W_enc"] + WEIGHTS["b_enc"])
    torch.testing.assert_close(sae.encode(Z), h, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        sae.decode(sae.encode(Z)), (h * factor) @ WEIGHTS["W_dec"] + WEIGHTS["b_dec"], rtol=1e-5, atol=1e-4
    )
    assert h.any() and not sae.training


@pytest.mark.parametrize(
    ("fields", "more", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, {}, "activation function 'tanh-relu'"),
        ({"activation_fn_kwargs": {"k": 3, "postact_fn": "tanh"}}, {}, "postact_fn"),
        ({"normalize_activations": "expected_average_only_in"}, {}, "normalize_activations='expected_average_only_in'"),
        ({"normalize_activations": "constant_norm_rescale"}, {}, "normalize_activations='constant_norm_rescale'"),
        ({"reshape_activations": "hook_z"}, {}, "reshape_activations='hook_z'"),
        ({"hook_head_index": 3}, {}, "hook_head_index=3"),
        ({"d_out": 7}, {}, "d_out=7"),
        ({"hook_name_out": "blocks.4.hook_mlp_out"}, {}, "hook_name_out"),
        ({"architecture": "gated"}, {}, "'gated' SAE"),
        ({"architecture": "topk"}, {}, "has no k"),
        ({"finetuning_scaling_factor": True}, {}, "its weights hold 0 of them"),
        ({}, {"scaling_factor": FACTOR}, "saved without finetuning_scaling_factor"),
        ({"finetuning_scaling_factor": True}, {"scaling_factor": FACTOR[:3]}, "shape .3,."),
        ({}, {"W_skip": torch.ones(2)}, "also holds W_skip"),
        ({"architecture": "jumprelu"}, {}, "lacks threshold"),
        ({"architecture": "jumprelu"}, {"threshold": torch.ones(1)}, r"threshold of shape \(1,\)"),
        ({"architecture": "jumprelu", "rescale_acts_by_decoder_norm": True}, {"threshold": THRESHOLD}, "rescale_acts"),
        ({"d_sae": N - 1}, {}, r"b_enc of shape|W_enc of shape"),
        ({"metadata": {"hook_name": "blocks.4.hook_resid_post"}, "temporal": 2}, {}, "not known here: .*temporal=2"),
        ({}, {"b_enc": WEIGHTS["b_enc"] / 0}, "NaN or infinity in 1 tensors .b_enc"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(fields, more, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_saelens(written(tmp_path, {**OLD, **fields}, **more))


def test_an_exported_folder_is_signed_and_checked(tmp_path):
    export("topk", tmp_path)
    assert findings(tmp_path) == [] and unlisted(tmp_path) == []
    path = tmp_path / "sae_weights.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="sae_weights.safetensors .its content changed"):
        SparseAutoencoder.from_saelens(tmp_path)
