"""Options of `generate`: masks equal those of one pass over the sequence that was written, or the option is refused.

The reference is always a teacher-forced forward over the returned sequence, which shares nothing with generation.
"""

import copy
import pickle

import pytest
import torch
from transformers import GenerationConfig

from segcompass.modeling_segcompass import SegCompassModel
from tests.support.scripted import INSTRUCTIONS, Script, lively_segcompass, noise_images
from tests.support.tiny import BACKBONES

RESPONSES = ["<think>left of it</think><REF_POS><REF_POS><REF_POS>", "<think>right</think><REF_POS><REF_POS>"]
END = 2


@pytest.fixture(scope="module", params=BACKBONES)
def parts(request):
    return lively_segcompass(request.param)


@pytest.fixture
def own_config(parts):
    """The model's own generation_config, to be changed; another one afterwards."""
    model, _ = parts
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    yield model.generation_config
    model.generation_config = before


def ask(parts, responses=RESPONSES, **options):
    model, processor = parts
    inputs = processor(images=noise_images()[: len(responses)], text=INSTRUCTIONS[: len(responses)])
    script = Script(processor.tokenizer, responses)
    return inputs, model.segment(**inputs, **{"logits_processor": [script], "max_new_tokens": 60, **options})


@torch.no_grad()
def forced(model, inputs, sequences, ends=(END,)):
    """One pass over what was written; a row's response ends after the first of `ends`."""
    start = inputs["input_ids"].shape[1]
    written = torch.zeros_like(sequences, dtype=torch.bool)
    for row, response in enumerate(sequences[:, start:].tolist()):
        places = [place for place, token in enumerate(response) if token in ends]
        written[row, start : start + (places[0] + 1 if places else len(response))] = True
    given = dict(inputs, input_ids=sequences, response_mask=written)
    given["attention_mask"] = torch.cat([inputs["attention_mask"], written[:, start:].long()], 1)
    if "mm_token_type_ids" in given:
        model.backbone.append_text(given, sequences.shape[1] - start)
    return model(**given)


FOLLOWED = {
    "default": {},
    "use_cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "dynamic": {"cache_implementation": "dynamic"},
    "prefill in chunks": {"prefill_chunk_size": 8},
    "return_dict": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 5},
    "other ends": {"eos_token_id": [END, 5]},
    "config": {"generation_config": GenerationConfig(use_cache=False, max_new_tokens=60), "max_new_tokens": None},
}


@pytest.mark.parametrize("options", FOLLOWED.values(), ids=FOLLOWED)
def test_masks_are_those_of_the_sequence_that_was_written(parts, options):
    model, _ = parts
    inputs, outputs = ask(parts, **options)
    expected = forced(model, inputs, outputs.sequences)
    assert outputs.slot_mask.sum(1).tolist() == [3, 2]
    assert torch.equal(outputs.slot_mask, expected.slot_mask)
    # another order of float32 sums; masks of other states differ by more than 0.1
    assert (outputs.pred_masks - expected.pred_masks).abs().max() < 1e-3
    assert (outputs.pred_logits - expected.pred_logits).abs().max() < 1e-3


@pytest.mark.parametrize("without_cache", [False, True])
def test_a_response_cut_right_after_its_last_concentration_token_has_all_its_slots(parts, without_cache):
    """That token is written and no pass of the generation reads it; its state is read all the same."""
    length = len(parts[1].tokenizer(RESPONSES[0], add_special_tokens=False).input_ids)
    inputs, outputs = ask(parts, max_new_tokens=length, use_cache=not without_cache)
    assert outputs.sequences[0, -1] == parts[1].ref_token_id
    expected = forced(parts[0], inputs, outputs.sequences)
    assert outputs.slot_mask.sum(1).tolist() == [3, 2]
    assert torch.equal(outputs.slot_mask, expected.slot_mask)
    assert (outputs.pred_masks - expected.pred_masks).abs().max() < 1e-3


def test_a_cache_switched_off_in_the_models_own_config_is_followed(parts, own_config):
    own_config.use_cache = False
    inputs, outputs = ask(parts)
    expected = forced(parts[0], inputs, outputs.sequences)
    assert (outputs.pred_masks - expected.pred_masks).abs().max() < 1e-3


def test_a_row_ended_by_a_stop_string_ends_there(parts):
    model, processor = parts
    _, outputs = ask(parts, stop_strings=["right"], tokenizer=processor.tokenizer)
    texts = processor.batch_decode(outputs.sequences[:, outputs.prompt_length :], skip_special_tokens=True)
    assert texts[1] == "<think>right" and texts[0] == RESPONSES[0]
    inputs, states = ask_states(parts, stop_strings=["right"], tokenizer=processor.tokenizer)
    written = states.response_mask[1, inputs["input_ids"].shape[1] :]
    assert processor.decode(states.input_ids[1, inputs["input_ids"].shape[1] :][written]) == "<think>right"


def ask_states(parts, **options):
    model, processor = parts
    inputs = processor(images=noise_images()[:2], text=INSTRUCTIONS[:2])
    script = Script(processor.tokenizer, RESPONSES)
    return inputs, model.reason(**inputs, logits_processor=[script], max_new_tokens=60, **options)[1]


REFUSED = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "prompt_lookup_num_tokens": 3,
    "guidance_scale": 1.5,
    "penalty_alpha": 0.6,
    "token_healing": True,
    "dola_layers": "low",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("place", ["keyword", "argument", "model"])
def test_an_option_that_masks_cannot_follow_is_refused_wherever_it_is_set(parts, own_config, name, place):
    options = {}
    if place == "keyword":
        options[name] = REFUSED[name]
    elif place == "argument":
        options["generation_config"] = GenerationConfig(do_sample=True, **{name: REFUSED[name]})
    else:
        setattr(own_config, name, REFUSED[name])
    with pytest.raises(ValueError, match=f"{name} is {REFUSED[name]}; .*use {name}="):
        ask(parts, query_source="tokens", **options)


def test_other_inputs_and_helpers_that_masks_cannot_follow_are_refused(parts):
    model, processor = parts
    with pytest.raises(ValueError, match="assistant_model is a .*use assistant_model=None"):
        ask(parts, RESPONSES[:1], assistant_model=model.mllm)
    with pytest.raises(ValueError, match="inputs_embeds is a Tensor"):
        ask(parts, inputs_embeds=torch.zeros(2, 3, 32))
    with pytest.raises(ValueError, match="cache_implementation is paged"):
        ask(parts, cache_implementation="paged")


def test_passes_that_are_not_those_of_the_sequence_are_refused(parts):
    """Whatever the options: here the MLLM is run once more behind generation's back."""
    model, processor = parts
    inputs = processor(images=noise_images()[0], text=INSTRUCTIONS[0])

    def again(input_ids, scores):
        if input_ids.shape[1] == inputs["input_ids"].shape[1]:
            model.mllm(**model.backbone.mllm_inputs(model.mllm, inputs))
        return scores

    with pytest.raises(ValueError, match="1 sequences of .* tokens were written, but the MLLM's passes heard"):
        model.segment(**inputs, logits_processor=[again], max_new_tokens=4)


def test_plain_generate_keeps_all_of_transformers_options(parts):
    model, processor = parts
    inputs = processor(images=noise_images()[0], text=INSTRUCTIONS[0])
    beams = model.generate(**inputs, num_beams=2, num_return_sequences=2, max_new_tokens=3, do_sample=False)
    assert len(beams) == 2


def test_generate_takes_whatever_the_processor_returns(parts):
    model, processor = parts
    given = dict(images=noise_images()[0], text=INSTRUCTIONS[0])
    whole = processor(**given, response="no")
    written = model.generate(**whole, max_new_tokens=3, do_sample=False)
    assert torch.equal(written[:, : whole["input_ids"].shape[1]], whole["input_ids"])  # the response is gone on with
    with pytest.raises(ValueError, match="the inputs hold a response .*without response="):
        model.segment(**whole)
    uneven = processor(images=noise_images()[:2], text=INSTRUCTIONS[:2], response=["no", "no no no"])
    with pytest.raises(ValueError, match="sample 0 ends in padding"):
        model.generate(**uneven)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_train_mode_with_gradient_checkpointing_is_right_or_refused(backbone):
    model, processor = lively_segcompass(backbone)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient checkpointing.*call model.eval\(\)"):
        ask((model, processor))
    inputs, outputs = ask((model, processor), use_cache=False)
    model.eval()
    assert (outputs.pred_masks - forced(model, inputs, outputs.sequences).pred_masks).abs().max() < 1e-3


def test_a_generation_config_argument_decides_length_and_sampling(parts):
    model, processor = parts
    inputs = processor(images=noise_images()[0], text=INSTRUCTIONS[0])
    start = inputs["input_ids"].shape[1]
    given = GenerationConfig(max_new_tokens=3)
    assert model.segment(**inputs, generation_config=given, eos_token_id=None).sequences.shape[1] == start + 3
    calls = []

    def generate(**kwargs):
        calls.append(kwargs.get("do_sample"))
        raise KeyboardInterrupt

    model.mllm.generate = generate
    try:
        for options in ({}, {"generation_config": GenerationConfig(do_sample=True)}, {"do_sample": True}):
            with pytest.raises(KeyboardInterrupt):
                model.reason(**inputs, **options)
    finally:
        del model.mllm.generate
    assert calls == [False, None, True]  # None leaves it to the argument


def test_generation_config_is_one_object_and_survives_saving(parts, own_config, tmp_path):
    model, processor = parts
    own_config.eos_token_id = [END, 10]
    own_config.repetition_penalty = 1.05
    own_config.max_new_tokens = 7
    assert model.generation_config is model.mllm.generation_config is own_config
    model.save_pretrained(tmp_path)
    loaded = SegCompassModel.from_pretrained(tmp_path)
    found = loaded.generation_config
    assert found is loaded.mllm.generation_config
    assert (found.eos_token_id, found.repetition_penalty, found.max_new_tokens) == ([END, 10], 1.05, 7)
    inputs = processor(images=noise_images()[0], text=INSTRUCTIONS[0])
    script = Script(processor.tokenizer, ["abcdefghijklmnop"])
    assert loaded.generate(**inputs, logits_processor=[script]).shape[1] == inputs["input_ids"].shape[1] + 7
    assert loaded.segment(**inputs, logits_processor=[script]).sequences.shape[1] == inputs["input_ids"].shape[1] + 7
    loaded.generation_config = GenerationConfig(eos_token_id=END, max_new_tokens=2)
    assert loaded.generate(**inputs).shape[1] <= inputs["input_ids"].shape[1] + 2


def test_the_models_own_second_end_token_ends_the_response(parts, own_config):
    model, processor = parts
    own_config.eos_token_id = [END, processor.tokenizer.convert_tokens_to_ids("g")]
    inputs, outputs = ask(parts, ["<think>right</think><REF_POS>"])
    assert processor.decode(outputs.sequences[0, outputs.prompt_length :]) == "<think>rig"
    assert not outputs.slot_mask.any()


def test_a_model_can_be_pickled_and_copied_after_use(parts):
    model, processor = parts
    inputs = processor(images=noise_images()[0], text=INSTRUCTIONS[0], response=RESPONSES[0])
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model), model):
            found = other(**inputs, output_hidden_states=True)
            assert torch.equal(found.pred_masks, expected.pred_masks)
            assert len(found.hidden_states) == len(expected.hidden_states) == 5
            assert other.generation_config is other.mllm.generation_config
