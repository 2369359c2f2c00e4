"""Published SAEs, in tiny files of the published layouts (key, shape and dtype), against formulas written out here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from segcompass.modeling_segcompass import SegCompassModel, SparseAutoencoder
from segcompass.modeling_segcompass.backbone import backbone_of
from segcompass.trainers.activations import layer_hidden_states
from tests.support.tiny import tiny_mllm, tiny_processor, tiny_sam

ROOT = Path(__file__).parents[2]
D, N, K = 32, 1024, 7
QWEN = "SAE-Res-Qwen3.5-2B-Base-W1K-L0_7"
GEMMA = "gemma-scope-2-4b-it/resid_post/layer_2_width_1k_l0_small"
HOOK = "model.layers.2.output"


def numbers(*shape, seed=0, scale=0.2, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


Z = numbers(5, D, seed=9, scale=1.0)
THRESHOLD = numbers(N, seed=4).abs() + 0.3


# -- the layouts: each writes a folder as its authors publish it -------------------------------------------------------


def write_json(path, fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fields))


def qwen_scope(root, blocks=(2,), name=QWEN, **changes):
    """PyTorch pickles of four float32 tensors, one a decoder block; nothing beside them."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        tensors = {"W_enc": numbers(N, D, seed=1 + block), "W_dec": numbers(D, N, seed=2)}
        tensors |= {"b_enc": numbers(N, seed=3), "b_dec": numbers(D, seed=5)}
        torch.save(altered(tensors, changes), folder / f"layer{block}.sae.pt")
    return folder


def gemma_scope_2(root, name=GEMMA, config=None, **changes):
    """`params.safetensors` of five float32 tensors, `config.json` with the place in the model."""
    folder = root / name
    fields = {"hf_hook_point_in": HOOK, "hf_hook_point_out": HOOK, "width": N, "model_name": "gemma-v3-4b-it"}
    fields |= {"architecture": "jump_relu", "l0": 20, "affine_connection": False, "type": "sae"}
    write_json(folder / "config.json", altered(fields, config or {}))
    tensors = {"w_enc": numbers(D, N, seed=1), "w_dec": numbers(N, D, seed=2), "b_enc": numbers(N, seed=3)}
    tensors |= {"b_dec": numbers(D, seed=5), "threshold": THRESHOLD}
    save_file(altered(tensors, changes), folder / "params.safetensors")
    return folder


def sparsify(root, name="sae-tiny-32x/layers.2", config=None, **changes):
    """`sae.safetensors` of four bfloat16 tensors and `cfg.json`; the run's `config.json` lies above."""
    folder = root / name
    fields = {"activation": "topk", "expansion_factor": N // D, "normalize_decoder": True, "num_latents": 0, "k": K}
    fields |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}
    write_json(folder / "cfg.json", altered(fields, config or {}))
    write_json(folder.parent / "config.json", {"model": "tiny/llama", "dataset": "tiny/text", "ctx_len": 77})
    tensors = {"encoder.weight": numbers(N, D, seed=1, dtype=torch.bfloat16)}
    tensors |= {"encoder.bias": numbers(N, seed=3, dtype=torch.bfloat16)}
    tensors |= {"W_dec": numbers(N, D, seed=2, dtype=torch.bfloat16), "b_dec": numbers(D, seed=5, dtype=torch.bfloat16)}
    save_file(altered(tensors, changes), folder / "sae.safetensors")
    return folder


def dictionary_learning(dict_class):
    def write(root, name="tiny_saes/resid_post_layer_2/trainer_0", config=None, buffer=None, **changes):
        """`ae.pt`, the state of one of dictionary_learning's classes, and `config.json`."""
        folder = root / name
        trainer = {"trainer_class": "T", "dict_class": dict_class, "activation_dim": D, "dict_size": N, "lr": 1e-4}
        trainer |= {"layer": 2, "lm_name": "tiny/llama", "submodule_name": "resid_post_layer_2", "steps": 10}
        if "TopK" in dict_class:
            trainer["k"] = K
        data = {"d_submodule": D, "io": "out", "n_ctxs": 3, "ctx_len": 128, "device": "cuda:0"}
        fields = {"trainer": altered(trainer, config or {}), "buffer": altered(data, buffer or {})}
        write_json(folder / "config.json", fields)
        linear = {"encoder.weight": numbers(N, D, seed=1), "encoder.bias": numbers(N, seed=3)}
        linear["decoder.weight"] = numbers(D, N, seed=2)
        matrices = {"W_enc": numbers(D, N, seed=1), "b_enc": numbers(N, seed=3)}
        matrices |= {"W_dec": numbers(N, D, seed=2), "b_dec": numbers(D, seed=5)}
        kept = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.6)}
        bias = numbers(D, seed=5)
        tensors = {
            "AutoEncoder": linear | {"bias": bias},
            "AutoEncoderNew": linear | {"decoder.bias": bias},
            "AutoEncoderTopK": linear | {"b_dec": bias} | kept,
            "BatchTopKSAE": linear | {"b_dec": bias} | kept,
            "MatryoshkaBatchTopKSAE": matrices | kept | {"group_sizes": torch.tensor([24, 1000])},
            "JumpReluAutoEncoder": matrices | {"threshold": THRESHOLD},
        }
        torch.save(altered(tensors[dict_class], changes), folder / "ae.pt")
        return folder

    return write


def altered(held, changes):
    """A copy with some entries replaced, removed (None) or made anew from what they were (a function)."""
    held = dict(held)
    for name, change in changes.items():
        name = name.replace("__", ".")
        if change is None:
            held.pop(name)
        else:
            held[name] = change(held[name]) if callable(change) else change
    return {name: value.contiguous() if torch.is_tensor(value) else value for name, value in held.items()}


# -- what their authors' code computes ---------------------------------------------------------------------------------


def largest(pre):
    """Of each token the K largest, by a loop."""
    h = torch.zeros_like(pre)
    for token, row in enumerate(pre):
        for feature in row.argsort(descending=True)[:K]:
            h[token, feature] = row[feature].clamp(min=0)
    return h


def code_of(name):
    """h(Z) and ẑ, from the tensors as the writers above draw them."""
    rounded = torch.bfloat16 if name == "sparsify" else torch.float32
    features = numbers(N, D, seed=3 if name == "Qwen-Scope" else 1, dtype=rounded).float()  # a row a feature
    if name in ("Gemma Scope 2", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        features = numbers(D, N, seed=1).T
    atoms = numbers(N, D, seed=2, dtype=rounded).float()
    if name in ("Qwen-Scope", "AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"):
        atoms = numbers(D, N, seed=2).T
    b_enc, b_dec = (numbers(n, seed=seed, dtype=rounded).float() for n, seed in ((N, 3), (D, 5)))
    centred = name not in ("Qwen-Scope", "Gemma Scope 2", "AutoEncoderNew", "JumpReluAutoEncoder")
    pre = torch.stack([features @ (z - b_dec if centred else z) + b_enc for z in Z])
    if name in ("Qwen-Scope", "sparsify", "AutoEncoderTopK"):
        h = largest(pre)
    elif name in ("Gemma Scope 2", "JumpReluAutoEncoder"):
        h = torch.where((pre > THRESHOLD) & (pre > 0), pre, 0)
    elif name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        h = torch.where(pre > 0.6, pre, 0)
    else:
        h = pre.clamp(min=0)
    return h, torch.einsum("nf,fd->nd", h, atoms) + b_dec


DICTIONARIES = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
DICTIONARIES += ("JumpReluAutoEncoder",)
LAYOUTS = {"Qwen-Scope": qwen_scope, "Gemma Scope 2": gemma_scope_2, "sparsify": sparsify}
LAYOUTS |= {name: dictionary_learning(name) for name in DICTIONARIES}
KNOWN_AS = {
    "Qwen-Scope": ("topk", "Qwen/Qwen3.5-2B-Base", None),
    "Gemma Scope 2": ("jumprelu", "google/gemma-3-4b-it", None),
    "sparsify": ("topk", "tiny/llama", 77),
    "AutoEncoder": ("relu", "tiny/llama", 128),
    "AutoEncoderNew": ("relu", "tiny/llama", 128),
    "AutoEncoderTopK": ("topk", "tiny/llama", 128),
    "BatchTopKSAE": ("batchtopk", "tiny/llama", 128),
    "MatryoshkaBatchTopKSAE": ("matryoshka", "tiny/llama", 128),
    "JumpReluAutoEncoder": ("jumprelu", "tiny/llama", 128),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_gives_the_codes_of_its_authors_formula(name, tmp_path):
    folder = LAYOUTS[name](tmp_path)
    sae = SparseAutoencoder.from_public(folder)
    h, z_hat = code_of(name)
    torch.testing.assert_close(sae.encode(Z), h, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(Z)), z_hat, rtol=1e-5, atol=1e-4)
    assert 0 < (h > 0).sum() < h.numel() and not sae.training
    config = sae.config
    assert (config.activation, config.backbone, config.token_window) == KNOWN_AS[name]
    assert (config.d_in, config.d_sae, config.layer) == (D, N, 3)  # the output of block 2, counted from 0
    if "TopK" in name or config.activation == "topk":
        assert config.k == K
    if name == "MatryoshkaBatchTopKSAE":
        assert config.nested_widths == [24, 1024]
    weights = next(path for path in folder.iterdir() if path.suffix != ".json")
    again = SparseAutoencoder.from_public(weights, layer=3, dtype="bfloat16")  # the file itself, and its right layer
    assert again.dtype == torch.bfloat16 and again.config.layer == 3
    sae.save_pretrained(tmp_path / "ours")
    assert torch.equal(SparseAutoencoder.from_pretrained(tmp_path / "ours").encode(Z), sae.encode(Z))
    with pytest.raises(ValueError, match="saved by this project; load it with from_pretrained"):
        SparseAutoencoder.from_public(tmp_path / "ours")


def test_saelens_folders_are_read_as_by_from_saelens(tmp_path):
    recorded = tmp_path / "theirs"
    recorded.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        shutil.copy(Path(__file__).parent / "saelens" / "theirs-topk" / name, recorded)
    ours, theirs = SparseAutoencoder.from_public(recorded), SparseAutoencoder.from_saelens(recorded)
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    with pytest.raises(ValueError, match=f"which is layer {ours.config.layer} here; layer is 9"):
        SparseAutoencoder.from_public(recorded, layer=9)
    shutil.copy(recorded / "cfg.json", tmp_path)
    shutil.copy(gemma_scope_2(tmp_path) / "params.safetensors", tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match=r"sae_weights.safetensors (lacks|also holds) "):
        SparseAutoencoder.from_public(tmp_path)


# -- into a model of their family --------------------------------------------------------------------------------------

INTO = {"Qwen-Scope": "qwen2_5_vl", "Gemma Scope 2": "llava", "sparsify": "llava", "BatchTopKSAE": "llava"}


@pytest.mark.parametrize("name", INTO)
def test_they_drop_into_a_model_for_a_forward_pass(name, tmp_path):
    torch.manual_seed(0)
    processor = tiny_processor(INTO[name])
    model = SegCompassModel.from_backbones(
        tiny_mllm(INTO[name], processor),
        tiny_sam(),
        sae=SparseAutoencoder.from_public(LAYOUTS[name](tmp_path)),
        processor=processor,
        **dict(d_c=16, num_concepts=24, codebook_heads=4, slot_heads=4, slot_head_dim=8, decoder_heads=4),
        decoder_mlp_dim=32,
    ).eval()
    assert model.config.sae_config.layer == 3
    inputs = processor(images=torch.rand(3, 28, 28), text="a mug", response=processor.format_response("it is round"))
    outputs = model(**inputs)
    assert outputs.pred_masks.isfinite().all() and (outputs.concept_values > 0).any()


@pytest.mark.parametrize("block", [0, 2, 3])
def test_the_layer_is_the_output_of_the_block_that_the_file_names(block, tmp_path):
    """The authors hook decoder block n, counted from 0; block 3 is the last, whose output the final norm follows."""
    torch.manual_seed(0)
    processor = tiny_processor("qwen2_5_vl")
    mllm = tiny_mllm("qwen2_5_vl", processor).eval()
    sae = SparseAutoencoder.from_public(qwen_scope(tmp_path, blocks=range(4)), layer=block + 1)
    inputs = processor(images=torch.rand(3, 28, 28), text="a mug")
    read = []
    hook = mllm.model.language_model.layers[block].register_forward_hook(
        lambda module, args, output: read.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        states = mllm(**backbone_of(mllm).mllm_inputs(mllm, inputs), output_hidden_states=True).hidden_states
    hook.remove()
    ours = layer_hidden_states(mllm, inputs, sae.config.layer)
    assert torch.equal(ours, read[0])
    if block < 3:
        torch.testing.assert_close(ours, states[block + 1])
    b_enc, W_enc = numbers(N, seed=3), numbers(N, D, seed=1 + block)  # of this block's file
    torch.testing.assert_close(sae.encode(ours)[0], largest(read[0][0] @ W_enc.T + b_enc), rtol=1e-5, atol=1e-5)


# -- several in one place ----------------------------------------------------------------------------------------------


def test_of_several_one_must_be_meant(tmp_path):
    folder = qwen_scope(tmp_path, blocks=(0, 2, 11))
    assert SparseAutoencoder.from_public(folder, layer=12).config.layer == 12  # layer11.sae.pt, not layer1 or layer2
    with pytest.raises(ValueError, match=r"holds 3 SAEs: layer0.sae.pt, layer11.sae.pt, layer2.sae.pt; name one"):
        SparseAutoencoder.from_public(folder)
    with pytest.raises(
        ValueError, match=r"no SAE of layer 2 \(of block 1, counted from 0\); its layers are \[1, 3, 12\]"
    ):
        SparseAutoencoder.from_public(folder, layer=2)
    with pytest.raises(ValueError, match="layers count from 1"):
        SparseAutoencoder.from_public(folder, layer=0)
    with pytest.raises(ValueError, match=r"reads the output of block 2, .* is layer 3 here; layer is 2"):
        SparseAutoencoder.from_public(folder / "layer2.sae.pt", layer=2)


def test_of_several_widths_one_must_be_named(tmp_path):
    gemma_scope_2(tmp_path)
    gemma_scope_2(tmp_path, name=GEMMA.replace("small", "big"), threshold=lambda value: value + 1)
    root = tmp_path / "gemma-scope-2-4b-it"
    with pytest.raises(ValueError, match="holds 2 SAEs: resid_post/layer_2_width_1k_l0_big/params.safetensors, "):
        SparseAutoencoder.from_public(root, layer=3)
    big, small = (
        SparseAutoencoder.from_public(root / f"resid_post/layer_2_width_1k_l0_{size}") for size in ("big", "small")
    )
    assert (big.threshold > small.threshold).all()


def test_snapshots_of_training_beside_the_final_one_are_not_taken(tmp_path):
    folder = LAYOUTS["BatchTopKSAE"](tmp_path)
    LAYOUTS["BatchTopKSAE"](tmp_path / "other", encoder__weight=lambda weight: -weight)
    (folder / "checkpoints").mkdir()
    shutil.copy(tmp_path / "other" / folder.relative_to(tmp_path) / "ae.pt", folder / "checkpoints" / "ae_5.pt")
    torch.testing.assert_close(SparseAutoencoder.from_public(folder).encode(Z), code_of("BatchTopKSAE")[0])


def test_what_a_renamed_file_does_not_say_is_asked_for(tmp_path):
    folder = qwen_scope(tmp_path, name="mine")
    with pytest.raises(ValueError, match="does not say how many features a token keeps; say so with k="):
        SparseAutoencoder.from_public(folder)
    (folder / "layer2.sae.pt").rename(folder / "sae.pt")
    with pytest.raises(ValueError, match="does not say which decoder block it reads; say so with layer="):
        SparseAutoencoder.from_public(folder, k=K)
    sae = SparseAutoencoder.from_public(folder, layer=5, k=K)
    assert (sae.config.layer, sae.config.k, sae.config.backbone) == (5, K, None)
    torch.testing.assert_close(sae.encode(Z), code_of("Qwen-Scope")[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"k is 9, but .* has k=7"):
        SparseAutoencoder.from_public(sparsify(tmp_path), k=9)


# -- damaged, swapped and not understood -------------------------------------------------------------------------------


def nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


def turned(tensor):
    return tensor.T


HELD = {
    "Qwen-Scope": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "Gemma Scope 2": ("w_enc", "b_enc", "w_dec", "b_dec", "threshold"),
    "sparsify": ("encoder__weight", "encoder__bias", "W_dec", "b_dec"),
    "AutoEncoder": ("encoder__weight", "encoder__bias", "decoder__weight", "bias"),
    "BatchTopKSAE": ("encoder__weight", "encoder__bias", "decoder__weight", "b_dec", "threshold"),
    "MatryoshkaBatchTopKSAE": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "group_sizes"),
    "JumpReluAutoEncoder": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
}
TENSORS = [(layout, tensor) for layout, held in HELD.items() for tensor in held]


@pytest.mark.parametrize(("layout", "tensor"), TENSORS)
def test_a_missing_tensor_or_one_that_is_not_finite_is_refused_by_name(layout, tensor, tmp_path):
    named = tensor.replace("__", r"\.")
    folder = LAYOUTS[layout](tmp_path, **{tensor: None})
    with pytest.raises(ValueError, match=rf"(sae\.pt|ae\.pt|\.safetensors) lacks {named}; "):
        SparseAutoencoder.from_public(folder)
    if tensor == "group_sizes":
        return
    folder = LAYOUTS[layout](
        tmp_path, **{tensor: lambda held: nan(held.reshape(-1)).view(held.shape) if held.dim() else held / 0}
    )
    with pytest.raises(ValueError, match=r"(sae\.pt|ae\.pt|\.safetensors) holds NaN or infinity"):
        SparseAutoencoder.from_public(folder)


@pytest.mark.parametrize(
    ("layout", "tensor"), [pair for pair in TENSORS if "bias" not in pair[1] and pair[1][:2] != "b_"]
)
def test_a_tensor_of_another_shape_is_refused_by_name(layout, tensor, tmp_path):
    if tensor == "group_sizes" or (tensor == "threshold" and "TopK" in layout):
        wrong = [1, 2, 3] if tensor == "group_sizes" else [0.1, 0.2]
        with pytest.raises(ValueError, match="nested_widths|threshold of shape"):
            SparseAutoencoder.from_public(LAYOUTS[layout](tmp_path, **{tensor: torch.tensor(wrong)}))
        return
    changed = turned if tensor != "threshold" else (lambda held: torch.ones(3))
    with pytest.raises(ValueError, match=rf"{tensor.replace('__', '.')} of shape \(\d+,.*(transposed|damaged|Fetch)"):
        SparseAutoencoder.from_public(LAYOUTS[layout](tmp_path, **{tensor: changed}))


@pytest.mark.parametrize("layout", ["Qwen-Scope", "Gemma Scope 2", "sparsify", "AutoEncoder", "BatchTopKSAE"])
@pytest.mark.parametrize("other", ["Qwen-Scope", "Gemma Scope 2", "sparsify", "AutoEncoder", "JumpReluAutoEncoder"])
def test_another_layouts_tensors_under_the_same_file_name_are_refused(layout, other, tmp_path):
    if layout == other:
        return
    folder, swapped = LAYOUTS[layout](tmp_path / "a"), LAYOUTS[other](tmp_path / "b")
    ours, theirs = (
        next(path for path in place.iterdir() if path.suffix in (".pt", ".safetensors")) for place in (folder, swapped)
    )
    shutil.copy(theirs, ours)
    with pytest.raises(ValueError, match=r"(lacks|also holds) .* in the layout of .* has |no safetensors file"):
        SparseAutoencoder.from_public(folder)


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (gemma_scope_2, {"architecture": "gated"}, "architecture='gated'; only JumpReLU SAEs"),
        (gemma_scope_2, {"type": "transcoder"}, "type='transcoder'; only"),
        (gemma_scope_2, {"affine_connection": True}, "affine_connection=True; only"),
        (
            gemma_scope_2,
            {"hf_hook_point_in": "model.layers.2.self_attn.o_proj.input"},
            "hf_hook_point_in='model.layers.2.s",
        ),
        (gemma_scope_2, {"hf_hook_point_out": "model.layers.3.output"}, "hf_hook_point_out='model.layers.3.output'"),
        (gemma_scope_2, {"hf_hook_point_in": [HOOK, HOOK]}, "hf_hook_point_in="),
        (gemma_scope_2, {"width": 16384}, "says width=16384, its tensors 1024"),
        (
            gemma_scope_2,
            {"hf_hook_point_in": "model.layers.4.output", "hf_hook_point_out": None},
            "block 4, the folder's name block 2",
        ),
        (gemma_scope_2, {"normalize": "layer_norm"}, "not known here: normalize='layer_norm'"),
        (sparsify, {"activation": "groupmax"}, "activation='groupmax'; only 'topk'"),
        (sparsify, {"signed": True}, "signed=True; only False"),
        (sparsify, {"transcode": True}, "transcode=True; only False"),
        (sparsify, {"skip_connection": True}, "skip_connection=True; only False"),
        (sparsify, {"k": None}, "k=None; the number of features"),
        (sparsify, {"d_in": 64}, "says d_in=64, its tensors 32"),
        (sparsify, {"num_latents": 512}, "says num_latents=512, its tensors 1024"),
        (sparsify, {"groups": 3}, "not known here: groups=3"),
        (LAYOUTS["BatchTopKSAE"], {"dict_class": "GatedAutoEncoder"}, "dict_class='GatedAutoEncoder'; AutoEncoder, "),
        (LAYOUTS["BatchTopKSAE"], {"dict_class": "AutoEncoder"}, r"ae\.pt lacks bias;"),
        (LAYOUTS["BatchTopKSAE"], {"k": 9}, "says k=9, its tensors 7"),
        (LAYOUTS["BatchTopKSAE"], {"dict_size": 9}, "says dict_size=9, its tensors 1024"),
        (LAYOUTS["BatchTopKSAE"], {"activation_dim": 9}, "says activation_dim=9, its tensors 32"),
        (LAYOUTS["BatchTopKSAE"], {"submodule_name": "mlp_out_layer_2"}, "trained at 'mlp_out_layer_2'"),
        (LAYOUTS["BatchTopKSAE"], {"whiten": True}, "not known here: whiten=True"),
        (LAYOUTS["BatchTopKSAE"], {"layer": 5}, "layer=5, but submodule_name='resid_post_layer_2'"),
        (LAYOUTS["BatchTopKSAE"], {"layer": None}, "does not say which decoder block"),
    ],
)
def test_a_field_that_is_not_understood_is_refused_by_name(write, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder.from_public(write(tmp_path, config=changes))


def test_the_input_of_a_module_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trained at 'resid_post_layer_2', io='in'; only the output"):
        SparseAutoencoder.from_public(LAYOUTS["AutoEncoder"](tmp_path, buffer={"io": "in"}))
    with pytest.raises(ValueError, match=r"reads 'layers\.2\.mlp', which is not the output of a decoder block"):
        SparseAutoencoder.from_public(sparsify(tmp_path, name="x/layers.2.mlp"))


class Evil:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('ran').touch()",))


def test_files_that_are_no_tensors_are_refused_and_nothing_in_them_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = qwen_scope(tmp_path)
    path = folder / "layer2.sae.pt"
    whole = path.read_bytes()
    cases = {
        "cut": (whole[: len(whole) // 2], "is damaged, or holds more than tensors"),
        "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS"),
        "text": (b"<html>not found</html>" * 9, "is damaged or no safetensors file"),
        "empty": (b"", "is damaged or no safetensors file"),
    }
    for data, message in cases.values():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"layer2\.sae\.pt.*{message}"):
            SparseAutoencoder.from_public(folder)
    for held, message in (
        ({"W_enc": Evil()}, "holds more than tensors"),
        ([torch.zeros(2)], "no dictionary of tensors"),
        ({"state": {"W_enc": torch.zeros(2)}}, "no dictionary of tensors"),
    ):
        torch.save(held, path)
        with pytest.raises(ValueError, match=rf"layer2\.sae\.pt.*{message}"):
            SparseAutoencoder.from_public(folder)
    assert not Path("ran").exists()
    with pytest.raises(ValueError, match="holds W_enc as torch.int64"):
        SparseAutoencoder.from_public(qwen_scope(tmp_path, W_enc=lambda weight: weight.long()))
    with pytest.raises(ValueError, match="says d_sae=32768, its tensors 1024"):
        SparseAutoencoder.from_public(qwen_scope(tmp_path, name=QWEN.replace("W1K", "W32K")))


def test_configurations_that_are_none_are_refused_by_name(tmp_path):
    folder = gemma_scope_2(tmp_path)
    for text, message in (
        ("{", "is no JSON"),
        ("[]", "holds a list"),
        ('{"a": 1}', "the fields a, which are those of no"),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
            SparseAutoencoder.from_public(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no configuration lies beside it.*names are those of Gemma Scope 2"):
        SparseAutoencoder.from_public(folder)
    (folder / "params.safetensors").unlink()
    with pytest.raises(OSError, match=r"holds no file of tensors .* but nothing"):
        SparseAutoencoder.from_public(folder)


# -- the Hub -----------------------------------------------------------------------------------------------------------


def test_without_a_network_the_repository_is_named_and_what_to_do(tmp_path):
    with pytest.raises(
        OSError, match=r"Qwen/SAE-Res-X is no folder here, cannot be reached .*Offline.*hf download Qwen/SAE"
    ):
        SparseAutoencoder.from_public("Qwen/SAE-Res-X", layer=3, cache_dir=tmp_path)
    with pytest.raises(OSError, match=r"local_files_only"):
        SparseAutoencoder.from_public("hf://Qwen/SAE-Res-X", layer=3, cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(OSError, match="no folder or file here, and no place on the Hub"):
        SparseAutoencoder.from_public(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="subfolder is no option of from_public"):
        SparseAutoencoder.from_public("Qwen/SAE-Res-X", subfolder="x")
    with pytest.raises(ValueError, match="names the revision v1, revision= another"):
        SparseAutoencoder.from_public("Qwen/SAE-Res-X@v1", revision="v2")


SERVED = """
import json, sys
import torch
from huggingface_hub import HfApi
from segcompass.modeling_segcompass import SparseAutoencoder

root, z = sys.argv[1], torch.load(sys.argv[2])
api = HfApi()
for repo, folder in (("Qwen/%s", "%s"), ("google/gemma-scope-2-4b-it", "gemma-scope-2-4b-it")):
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=f"{root}/{folder}")
qwen = [SparseAutoencoder.from_public(source, layer=layer) for source, layer in (
    ("Qwen/%s", 3), ("hf://Qwen/%s/layer2.sae.pt", None), ("hf://Qwen/%s@main", 3))]
gemma = SparseAutoencoder.from_public("google/gemma-scope-2-4b-it/resid_post/layer_2_width_1k_l0_small")
found = [(sae.config.layer, sae.config.k, sae.config.backbone) for sae in qwen]
try:
    SparseAutoencoder.from_public("Qwen/absent", layer=3)
except OSError as error:
    refused = str(error)
torch.save([qwen[0].encode(z), gemma.encode(z)], sys.argv[3])
print(json.dumps({"found": found, "gemma": gemma.config.backbone, "refused": refused}))
""".replace("%s", QWEN)

OFFLINE = """
import sys, torch
from segcompass.modeling_segcompass import SparseAutoencoder
z = torch.load(sys.argv[1])
torch.save(SparseAutoencoder.from_public("Qwen/%s", layer=3).encode(z), sys.argv[2])
""".replace("%s", QWEN)


def test_they_come_from_the_hub_and_then_from_its_cache(tmp_path):
    from tests.support.hub_client import TOKEN, LocalHub

    qwen_scope(tmp_path, blocks=(2, 5))
    gemma_scope_2(tmp_path)
    torch.save(Z, tmp_path / "z.pt")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/support/hub_server.py"), "--token", TOKEN, "--log", str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        hub = LocalHub(url=server.stdout.readline().strip(), folder=tmp_path, log=tmp_path / "log", hold=None)
        said = hub.run(SERVED, tmp_path, tmp_path / "z.pt", tmp_path / "codes.pt")
    finally:
        server.terminate()
        server.wait()
    assert said["found"] == [[3, K, "Qwen/Qwen3.5-2B-Base"]] * 3
    assert said["gemma"] == "google/gemma-3-4b-it"
    assert "Qwen/absent cannot be read from the Hub" in said["refused"]
    for name, code in zip(("Qwen-Scope", "Gemma Scope 2"), torch.load(tmp_path / "codes.pt"), strict=True):
        torch.testing.assert_close(code, code_of(name)[0], rtol=1e-5, atol=1e-5)
    assert not any("layer5.sae.pt" in line for line in hub.requests() if "resolve" in line)  # only what was asked for
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", OFFLINE, str(tmp_path / "z.pt"), str(tmp_path / "again.pt")]
    subprocess.run(arguments, check=True, env=environment, capture_output=True, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "again.pt"), code_of("Qwen-Scope")[0], rtol=1e-5, atol=1e-5)
