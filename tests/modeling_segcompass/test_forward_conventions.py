"""`forward` as transformers' models have it: named inputs, attentions on request, and nothing swallowed."""

import inspect

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.support.scripted import INSTRUCTIONS, lively_segcompass, noise_images
from tests.support.tiny import BACKBONES

RESPONSE = "<think>left of it</think><REF_POS><REF_POS>"
STANDARD = (
    "input_ids attention_mask pixel_values position_ids past_key_values inputs_embeds labels use_cache "
    "output_attentions output_hidden_states return_dict logits_to_keep image_grid_thw mm_token_type_ids"
)


@pytest.fixture(scope="module", params=BACKBONES)
def parts(request):
    return lively_segcompass(request.param)


def given(processor, **changes):
    inputs = dict(processor(images=noise_images()[1], text=INSTRUCTIONS[0], response=RESPONSE))
    inputs.update(changes)
    return {name: value for name, value in inputs.items() if value is not None}


LANGUAGE_ONLY = {"encoder_pixel_values": None, "response_mask": None, "labels": None}


def bare(model, inputs, **options):
    return model.mllm(**model.backbone.mllm_inputs(model.mllm, inputs), **options)


@torch.no_grad()
def test_forward_names_the_standard_arguments_and_all_that_the_families_take(parts):
    model, processor = parts
    names = set(inspect.signature(model.forward).parameters)
    assert set(STANDARD.split()) <= names
    assert set(given(processor)) <= names


@torch.no_grad()
def test_attentions_and_hidden_states_come_back_when_asked_for(parts):
    model, processor = parts
    model.set_attn_implementation("eager")
    try:
        inputs = given(processor)
        expected = bare(model, inputs, output_attentions=True, output_hidden_states=True)
        found = model(**inputs, output_attentions=True, output_hidden_states=True)
        model.config.output_attentions = model.config.output_hidden_states = True
        configured, refused = model(**inputs), model(**inputs, output_attentions=False, output_hidden_states=False)
    finally:
        model.config.output_attentions = model.config.output_hidden_states = False
        model.set_attn_implementation("sdpa")
    for output in (found, configured):
        assert len(output.attentions) == 4 and len(output.hidden_states) == 5
        for ours, theirs in zip(output.attentions, expected.attentions, strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(ours, theirs)
    assert refused.attentions is None and refused.hidden_states is None
    assert model(**inputs).attentions is None


@torch.no_grad()
def test_a_tuple_holds_what_the_output_holds(parts):
    model, processor = parts
    inputs = given(processor)
    whole = model(**inputs).to_tuple()
    model.config.return_dict = False
    try:
        pairs = [(whole, model(**inputs)), (whole, model(**inputs, return_dict=False))]
        assert not isinstance(model(**inputs, return_dict=True), tuple)
    finally:
        model.config.return_dict = True
    for one, other in pairs:
        assert isinstance(other, tuple) and len(one) == len(other)
        tensors = [(a, b) for a, b in zip(one, other, strict=True) if isinstance(a, torch.Tensor)]
        assert all(torch.equal(a, b) for a, b in tensors) and len(tensors) > 8


@torch.no_grad()
def test_language_inputs_reach_the_mllm(parts):
    model, processor = parts
    inputs = given(processor, **LANGUAGE_ONLY)
    whole = model(**inputs).logits
    last = model(**inputs, logits_to_keep=3).logits
    torch.testing.assert_close(last, whole[:, -3:], atol=1e-5, rtol=0)  # a product of another size, in other blocks
    length = whole.shape[1]
    shifted = torch.arange(length)[None] * 2
    assert (model(**inputs, position_ids=shifted).logits - whole).abs().max() > 1e-3
    text = {"input_ids": inputs["input_ids"][:, -12:], "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    embeds = model.get_input_embeddings()(text["input_ids"])
    found = model(inputs_embeds=embeds, attention_mask=text["attention_mask"]).logits
    torch.testing.assert_close(found, model(**text).logits, atol=1e-4, rtol=0)
    first = model(input_ids=text["input_ids"][:, :8], use_cache=True)
    places = torch.arange(8, 12)[None]  # else Qwen2.5-VL would take the position offsets of the image before
    rest = model(input_ids=text["input_ids"][:, 8:], past_key_values=first.past_key_values, position_ids=places).logits
    torch.testing.assert_close(rest, model(**text).logits[:, 8:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonsense": 1}, "takes no nonsense; leave it out"),
        ({"inputs_embeds": torch.zeros(1, 4, 32), "input_ids": None}, "input_ids is None; masks need"),
        ({"past_key_values": object()}, "past_key_values is given; masks need"),
        ({"logits_to_keep": 1}, r"row 0 has a label at token \d+, which none of these logits predicts"),
        ({"logits_to_keep": torch.tensor([1])}, "logits_to_keep is given with labels"),
        (
            {"attention_mask": torch.ones(1, 3, dtype=torch.long), "labels": None},
            r"attention_mask has shape \(1, 3\), input_ids",
        ),
        ({"response_mask": torch.ones(1, 3, dtype=torch.bool)}, r"response_mask has shape \(1, 3\), input_ids"),
        ({"query_source": "tokens", "concept_scale": {3: 0.0}}, "whose masks are made without concepts"),
    ],
)
def test_what_would_be_swallowed_or_break_inside_is_refused(parts, changes, message):
    model, processor = parts
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**given(processor, **changes))


def test_an_input_of_another_family_is_refused_by_name():
    model, processor = lively_segcompass("llava")
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration takes no image_grid_thw, mm_token_type_ids"):
        model(**given(processor, image_grid_thw=torch.ones(1, 3), mm_token_type_ids=torch.ones(1, 3)))


def test_resizing_the_vocabulary_is_seen_everywhere(parts, tmp_path):
    model, processor = lively_segcompass(parts[0].config.mllm_config.model_type)
    before = model.vocab_size
    model.resize_token_embeddings(before + 7)
    assert model.vocab_size == model.config.get_text_config().vocab_size == before + 7
    assert model.get_output_embeddings().weight.shape[0] == before + 7
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).vocab_size == before + 7


def test_static_caches_are_declared_as_the_mllms(parts):
    model, _ = parts
    assert model._can_compile_fullgraph is type(model.mllm)._can_compile_fullgraph is True
    assert issubclass(type(model.mllm), AutoModelForImageTextToText._model_mapping[type(model.config.mllm_config)])
