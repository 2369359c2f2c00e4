"""Steering while the response is written: what the MLLM reads from the SAE's layer on, against a loop of our own."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from segcompass.loaders.scenes import load_scenes
from segcompass.loading import load
from segcompass.modeling_segcompass.interventions import Steering
from segcompass.shipped import MODEL
from segcompass.white_box.steered_reasoning import VARIANTS, conclusion_of, measure_steered_reasoning
from tests.support.scripted import INSTRUCTIONS, lively_segcompass, noise_images
from tests.support.tiny import BACKBONES


@pytest.fixture(scope="module", params=BACKBONES)
def parts(request):
    model, processor = lively_segcompass(request.param)
    with torch.no_grad():  # as if it had been trained: strengths differ from feature to feature
        model.sae.mean_active_activation.copy_(torch.linspace(0.5, 2.0, model.config.sae_config.d_sae))
    return model, processor


def by_hand(model, inputs, change, length):
    """Greedy writing without a cache; `change` turns the output of block L into what the later blocks get."""
    block = model.backbone.blocks(model.mllm)[model.config.sae_config.layer - 1]

    def replaced(module, given, output):
        z = output[0] if isinstance(output, tuple) else output
        return (change(z), *output[1:]) if isinstance(output, tuple) else change(z)

    ids, asked = inputs["input_ids"], dict(inputs)
    for name in ("encoder_pixel_values", "original_sizes", "reshaped_input_sizes"):
        asked.pop(name, None)
    hook = block.register_forward_hook(replaced)
    try:
        for _ in range(length):
            asked["input_ids"], asked["attention_mask"] = ids, torch.ones_like(ids)
            if "mm_token_type_ids" in asked:
                missing = ids.shape[1] - asked["mm_token_type_ids"].shape[1]
                asked["mm_token_type_ids"] = torch.nn.functional.pad(asked["mm_token_type_ids"], (0, missing))
            with torch.no_grad():
                logits = model.mllm(**asked, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    finally:
        hook.remove()
    return ids


def test_the_response_is_the_one_of_changed_hidden_states(parts):
    model, processor = parts
    inputs = processor(images=noise_images()[0], text=INSTRUCTIONS[0])
    factors = torch.ones(model.config.sae_config.d_sae)
    factors[::2] = 12.0
    limit = dict(max_new_tokens=6, min_new_tokens=6)

    def change(z):
        return z + torch.einsum("bts,sd->btd", model.sae.encode(z) * (factors - 1), model.sae.W_dec)

    plain, _ = model.reason(**inputs, **limit)
    steered, states = model.reason(**inputs, **limit, concept_scale=factors)
    assert not torch.equal(plain, steered)
    with torch.no_grad():
        assert torch.equal(steered, by_hand(model, inputs, change, 6))
    # what is kept is the output of block L itself: masks are steered where they are decoded, once
    _, again = model.reason(**inputs, **limit)
    prompt = inputs["input_ids"].shape[1]
    assert torch.allclose(states.z[:, :prompt], again.z[:, :prompt], atol=1e-5)
    assert not torch.allclose(states.last_hidden[:, :prompt], again.last_hidden[:, :prompt], atol=1e-3)


def test_factors_of_one_change_nothing_and_masks_alone_can_be_steered(parts):
    model, processor = parts
    inputs = processor(images=noise_images()[1], text=INSTRUCTIONS[1])
    limit = dict(max_new_tokens=6, min_new_tokens=6)
    plain, _ = model.reason(**inputs, **limit)
    assert torch.equal(model.reason(**inputs, **limit, concept_scale={3: 1.0})[0], plain)
    factors = torch.full((model.config.sae_config.d_sae,), 12.0)
    assert torch.equal(model.segment(**inputs, **limit, concept_scale=factors).sequences, plain)
    assert not torch.equal(
        model.segment(**inputs, **limit, concept_scale=factors, steer_reasoning=True).sequences, plain
    )
    with pytest.raises(ValueError, match="99999"):
        model.reason(**inputs, **limit, concept_scale={99999: 0.0})


def test_replaced_and_added_concepts_by_hand(parts):
    model, _ = parts
    sae, z = model.sae, torch.randn(2, 5, model.config.sae_config.d_in)
    h, usual = sae.encode(z).detach().numpy(), sae.mean_active_activation.numpy()
    wanted = h.copy()
    taken = np.maximum(h[..., 1] / usual[1], h[..., 4] / usual[4])
    wanted[..., [1, 4]] = 0
    wanted[..., 7] = np.maximum(wanted[..., 7], taken * usual[7])
    wanted[..., 9] = wanted[..., 9] * 0.5 + 3.0 * usual[9]
    scale = torch.ones(sae.config.d_sae)
    scale[9] = 0.5
    steered = Steering(scale, [([9], 3.0)], [([1, 4], [7])]).on_states(sae, z)
    expected = z.numpy() + (wanted - h) @ sae.W_dec.detach().numpy()
    assert np.allclose(steered.numpy(), expected, atol=1e-4)


def test_two_calls_at_once_are_steered_apart(parts):
    model, processor = parts
    inputs = [processor(images=noise_images()[n], text=INSTRUCTIONS[n]) for n in (0, 1)]
    factors = [torch.full((model.config.sae_config.d_sae,), factor) for factor in (12.0, 1.0)]

    def answer(number):
        return model.reason(**inputs[number], max_new_tokens=8, min_new_tokens=8, concept_scale=factors[number])[0]

    alone = [answer(number) for number in (0, 1)]
    with ThreadPoolExecutor(2) as threads:
        for number, sequence in zip([0, 1] * 8, threads.map(answer, [0, 1] * 8), strict=True):
            assert torch.equal(sequence, alone[number])


def test_the_small_model_writes_the_colour_that_it_is_made_to_see():
    model, processor = load(str(MODEL))
    row = next(
        row for row in load_scenes("test", 501, 40) if "blue" in conclusion_of(row["reasoning"])
        and "red" not in row["reasoning"] + row["instruction"]
    )  # fmt: skip
    inputs = processor(images=[row["image"]], text=[row["instruction"]])
    said = []
    for told in ({}, {"concept_replace": {"blue": "red"}}):
        outputs = model.segment(**inputs, **told, steer_reasoning=True)
        text = processor.tokenizer.decode(outputs.sequences[0, outputs.prompt_length :], skip_special_tokens=True)
        said.append(conclusion_of(text))
    assert "blue" in said[0] and "red" not in said[0]
    assert "red" in said[1] and "blue" not in said[1]


def test_measured_with_its_controls():
    model, processor = load(str(MODEL))
    labels: dict[str, list[int]] = {}
    for index, name in model.concept_labels.items():
        labels.setdefault(name, []).append(index)
    rows = load_scenes("test", 501, 6)
    found = [measure_steered_reasoning(model, processor, row, labels, np.random.default_rng(0)) for row in rows]
    found = [record for record in found if record is not None]
    assert len(found) >= 4 and all(tuple(record) == VARIANTS for record in found)
    mean = {name: np.mean([record[name] for record in found]) for name in VARIANTS}
    assert mean["swap"] >= 0.6 and mean["swap_control"] <= 0.2 and mean["off"] > mean["off_control"]
    assert measure_steered_reasoning(model, processor, rows[0], {}, np.random.default_rng(0)) is None
