"""`segcompass train sae` and `segcompass evaluate-sae` on tiny real models."""

import json

import pytest
import torch
from PIL import Image
from transformers import BertConfig

from segcompass.commands import evaluate_sae, train_sae
from segcompass.loaders.image_text import image_text, load_image_text
from segcompass.modeling_segcompass import SparseAutoencoder
from segcompass.modeling_segcompass.sae_origin import check_origin, origin_of
from segcompass.sae_evaluation import language_losses, next_token_loss
from segcompass.trainers.activations import TOKEN_TYPES, token_types
from segcompass.trainers.collator import ImageTextCollator
from tests.support.tiny import BACKBONES, tiny_segcompass


@pytest.fixture(scope="module", params=BACKBONES)
def parts(request):
    model, processor = tiny_segcompass(request.param)
    rows = list(load_image_text("scenes", "val", num_samples=3))
    inputs = ImageTextCollator(processor, image_text)(rows)
    inputs.pop("skipped")
    return model, inputs


def test_clean_loss_is_the_models_own(parts):
    model, inputs = parts
    losses = language_losses(model, model.sae, inputs, model.config.special_token_ids)
    names = {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids", "labels"}
    with torch.no_grad():
        own = model.mllm(**{name: value for name, value in inputs.items() if name in names}).loss
    assert losses["tokens"] == (inputs["labels"][:, 1:] != -100).sum()
    assert losses["clean"] / losses["tokens"] == pytest.approx(own.item(), rel=1e-4)
    assert {name for name, end in (key for key in losses if isinstance(key, tuple))} == {"all", *TOKEN_TYPES}


class Perfect(torch.nn.Module):
    """An autoencoder that loses nothing, or all."""

    def __init__(self, config, factor):
        super().__init__()
        self.config, self.factor = config, factor

    def encode(self, z):
        return z

    def decode(self, h):
        return self.factor * h


def test_a_perfect_reconstruction_loses_nothing_and_zeros_are_the_other_end(parts):
    model, inputs = parts
    special = model.config.special_token_ids
    perfect = language_losses(model, Perfect(model.sae.config, 1), inputs, special)
    nothing = language_losses(model, Perfect(model.sae.config, 0), inputs, special)
    for name in ("all", *TOKEN_TYPES):
        assert perfect[name, "spliced"] == pytest.approx(perfect["clean"], rel=1e-5)
        assert nothing[name, "spliced"] == nothing[name, "zero"] == perfect[name, "zero"]
    assert abs(perfect["all", "zero"] - perfect["clean"]) > 1e-4 * perfect["clean"]


def test_only_the_named_tokens_are_replaced(parts):
    model, inputs = parts
    types = token_types(model, inputs, model.config.special_token_ids)
    where = types == TOKEN_TYPES.index("image")
    seen = {}
    block = model.mllm.get_decoder().layers[model.sae.config.layer]
    hook = block.register_forward_pre_hook(lambda module, args: seen.setdefault(len(seen), args[0].detach()))
    predicted = torch.ones_like(inputs["input_ids"][:, 1:], dtype=torch.bool)
    with torch.no_grad():
        next_token_loss(model.mllm, inputs, predicted)
        next_token_loss(model.mllm, inputs, predicted, model.sae, where, "zero")
    hook.remove()
    assert not seen[1][where].any()
    assert torch.equal(seen[0][~where], seen[1][~where])


def test_commands_train_cache_and_judge(tmp_path):
    model, processor = tiny_segcompass("llava")
    model.config.mllm_config._name_or_path = "someone/llava"
    model.config.sae_config.backbone = None  # as a model has it whose SAE is not trained yet
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = {
        "model": tmp_path / "model",
        "dataset": "scenes",
        "num_samples": 16,
        "samples_per_batch": 4,
        "samples_per_shard": 8,
        "tokens_per_batch": 128,
        "buffer_size": 512,
        "activation": "batchtopk",
        "k": 8,
        "d_sae": 64,
        "evaluation_tokens": 500,
        "calibration_tokens": 1000,
        "strength_tokens": 1000,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "use_cpu": "true",
        "report_to": "none",
        "output_dir": tmp_path / "sae",
        "cache_dir": tmp_path / "cache",
    }
    train_sae.main([f"--{name}={value}" for name, value in options.items()])
    sae = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    config = sae.config
    assert (config.activation, config.k, config.d_sae, config.layer) == ("batchtopk", 8, 64, 2)
    assert (config.dataset, config.token_window, config.backbone) == ("scenes", 3400, "someone/llava")
    check_origin(config, origin_of(model.config.mllm_config))  # it may be put into the model that it was trained on
    quality = json.loads((tmp_path / "sae" / "quality.json").read_text())
    assert {"image", "instruction", "response"} == quality["by_type"].keys()
    assert len(list((tmp_path / "cache").glob("shard-*.safetensors"))) == 2

    arguments = ["--model", str(tmp_path / "model"), "--sae", str(tmp_path / "sae"), "--output", str(tmp_path / "out")]
    judged = evaluate_sae.main([*arguments, "--num-samples", "4", "--batch-size", "2"])
    assert judged == json.loads((tmp_path / "out" / "quality.json").read_text())
    assert judged["by_type"].keys() == set(TOKEN_TYPES) and judged["language_model"]["all"].keys() >= {"recovered"}
    lines = (tmp_path / "out" / "quality.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["all", *TOKEN_TYPES]
    assert (tmp_path / "out" / "quality.png").stat().st_size > 1000


def test_a_sweep_trains_one_autoencoder_for_each_value_and_draws_the_curve(tmp_path, capsys):
    model, processor = tiny_segcompass("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    options = dict(model=tmp_path / "model", num_samples=8, samples_per_batch=4, tokens_per_batch=128, buffer_size=512)
    options |= dict(activation="topk", d_sae=64, evaluation_tokens=500, calibration_tokens=500, strength_tokens=500)
    options |= dict(max_steps=4, use_cpu="true", report_to="none", output_dir=tmp_path / "sae", save_strategy="no")
    arguments = [f"--{name}={value}" for name, value in options.items()]
    train_sae.main([*arguments, "--sweep", "2", "16"])
    summary = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert summary["field"] == "k" and summary["values"] == [2, 16]
    for value, l0, variance in zip((2, 16), summary["l0"], summary["explained_variance"], strict=True):
        sae = SparseAutoencoder.from_pretrained(tmp_path / "sae" / f"k-{value}")
        quality = json.loads((tmp_path / "sae" / f"k-{value}" / "quality.json").read_text())
        assert sae.config.k == value and 0 < l0 <= value
        assert (quality["l0"], quality["explained_variance"]) == (l0, variance)
    assert summary["l0"][0] < summary["l0"][1] and len(summary["image"]["l0"]) == 2
    assert (tmp_path / "sae" / "sweep.png").stat().st_size > 1000
    assert json.loads((tmp_path / "sae" / "sweep.json").read_text()).keys() == {"k"}
    for sweep, activation, message in (
        (["2", "2"], "topk", "each value must stand once"),
        (["2.5"], "topk", "whole numbers from 1 to d_sae=64"),
        (["65"], "matryoshka", "whole numbers from 1 to d_sae=64"),
        (["0"], "relu", "over l1_coefficient; its values must be more than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train_sae.main([*arguments, "--activation", activation, "--sweep", *sweep])


def test_what_is_no_mllm_is_named_before_anything_is_read(tmp_path):
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    options = ["--dataset", "nowhere.jsonl", "--output-dir", str(tmp_path / "sae"), "--use-cpu", "true"]
    with pytest.raises(
        ValueError, match="model='.*bert' is of type 'bert' and cannot be used: it is no MLLM, which re"
    ):
        train_sae.main(["--model", str(tmp_path / "bert"), *options])
    with pytest.raises(ValueError, match="model='.*empty' is no folder or Hub id of a model: Unrecognized model"):
        train_sae.main(["--model", str(tmp_path / "empty"), *options])


def test_an_autoencoder_of_another_backbone_is_refused(tmp_path):
    model, processor = tiny_segcompass("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    other = model.sae.config
    other.d_in = 16
    SparseAutoencoder(other).save_pretrained(tmp_path / "sae")
    arguments = ["--model", str(tmp_path / "model"), "--sae", str(tmp_path / "sae"), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="reads 16 numbers of layer 2, but the MLLM is 32 wide"):
        evaluate_sae.main(arguments)


def test_an_autoencoder_of_another_backbone_of_the_same_size_is_refused(tmp_path):
    model, processor = tiny_segcompass("llava")
    model.config.sae_config.backbone = model.sae.config.backbone = "org/llava-one"
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model.sae.config.backbone = "org/llava-two"
    model.sae.save_pretrained(tmp_path / "sae")
    arguments = ["--model", str(tmp_path / "model"), "--sae", str(tmp_path / "sae"), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="trained on 'org/llava-two', but the MLLM is 'org/llava-one'"):
        evaluate_sae.main(arguments)


def test_a_cache_of_activations_notices_what_was_changed_since(tmp_path):
    """Images that the rows name and weights, replaced under their names: the states would be those of the old ones."""
    model, processor = tiny_segcompass("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for name in "ab":
        Image.new("RGB", (30, 30), {"a": "red", "b": "blue"}[name]).save(tmp_path / f"{name}.png")
    lines = [{"image": f"{name}.png", "text": "the box", "response": "it is there"} for name in "ababab"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {
        "model": tmp_path / "model",
        "dataset": tmp_path / "rows.jsonl",
        "evaluation_split": "null",
        "evaluation_samples": 2,
        "max_steps": 1,
        "tokens_per_batch": 16,
        "buffer_size": 64,
        "evaluation_tokens": 50,
        "calibration_tokens": 50,
        "strength_tokens": 50,
        "use_cpu": "true",
        "report_to": "none",
        "output_dir": tmp_path / "sae",
        "cache_dir": tmp_path / "cache",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with pytest.raises(ValueError, match="is not divided into splits, and the SAE would be scored on the rows that"):
        train_sae.main([*arguments, "--evaluation_split=val"])
    with pytest.raises(ValueError, match="has no more rows than the 6 that evaluation_samples holds out, so that"):
        train_sae.main([*arguments, "--evaluation_samples=6"])
    train_sae.main(arguments)
    image = (tmp_path / "a.png").read_bytes()
    Image.new("RGB", (30, 30), "lime").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="holds a cache with content="):
        train_sae.main(arguments)
    (tmp_path / "a.png").write_bytes(image)
    train_sae.main(arguments)
    model.get_output_embeddings().weight.data[0] += 1
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a cache with weights="):
        train_sae.main(arguments)
