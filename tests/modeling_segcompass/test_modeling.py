"""The model on tiny real LLaVA and Qwen2.5-VL backbones: one pass, the right slots, batches, gradients, checkpoints."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from segcompass.modeling_segcompass import SegCompassModel, SparseAutoencoder, SparseAutoencoderConfig
from segcompass.modeling_segcompass.manifest import sign
from segcompass.modeling_segcompass.token_layout import find_slots
from tests.support.scripted import INSTRUCTIONS, Script, lively_segcompass, noise_image, noise_images
from tests.support.tiny import BACKBONES, tiny_mllm, tiny_processor, tiny_segcompass

MASKS = ("pred_masks", "pred_logits", "heatmaps")
RESPONSES = [
    "<think>left of it</think><REF_POS><REF_POS><REF_POS>",
    "<think>a</think><REF_POS><REF_POS><REF_POS>",
    "<think>one token is missing</think><REF_POS><REF_POS>",
    "<think>b c</think><REF_POS><REF_POS><REF_POS>",
]


@pytest.fixture(scope="module", params=BACKBONES)
def parts(request):
    return lively_segcompass(request.param)


def segment(model, processor, images, texts, responses, **kwargs):
    script = Script(processor.tokenizer, responses)
    return model.segment(**processor(images=images, text=texts), logits_processor=[script], max_new_tokens=80, **kwargs)


# -- slots -------------------------------------------------------------------------------------------------------------


def slots_of(parts, text, prompt="where"):
    """find_slots on a prompt and a response: positions in the response and slot_mask, as lists."""
    model, processor = parts
    ids = [processor.tokenizer(part, add_special_tokens=False).input_ids for part in (prompt, text)]
    response_mask = torch.tensor([[False] * len(ids[0]) + [True] * len(ids[1])])
    positions, slot_mask = find_slots(torch.tensor([ids[0] + ids[1]]), response_mask, model.config)
    return (positions[slot_mask] - len(ids[0])).tolist(), slot_mask[0].tolist()


def test_slots_are_the_first_concentration_tokens_after_the_thought(parts):
    # "<think>a</think>" is 3 tokens
    assert slots_of(parts, "<think>a</think>" + "<REF_POS>" * 5) == ([3, 4, 5], [True] * 3)
    assert slots_of(parts, "<think>a</think><REF_POS>b<REF_POS><REF_POS>") == ([3, 5, 6], [True] * 3)


def test_missing_concentration_tokens_are_invalid_slots(parts):
    assert slots_of(parts, "<think>a</think><REF_POS>") == ([3], [True, False, False])
    assert slots_of(parts, "<think>a</think>none") == ([], [False] * 3)


def test_concentration_tokens_inside_the_thought_do_not_count(parts):
    assert slots_of(parts, "<think><REF_POS></think><REF_POS>") == ([3], [True, False, False])
    assert slots_of(parts, "<think><REF_POS><REF_POS><REF_POS>") == ([], [False] * 3)


def test_prompt_positions_are_never_slots(parts):
    prompt = "<think>a</think><REF_POS><REF_POS><REF_POS>"
    assert slots_of(parts, "<REF_POS>", prompt) == ([], [False] * 3)
    assert slots_of(parts, "</think><REF_POS>", prompt) == ([1], [True, False, False])


def test_response_without_concentration_tokens_gives_no_instance(parts):
    model, processor = parts
    image = noise_image(30, 44)
    outputs = segment(model, processor, image, "the box", ["I see nothing"])
    assert not outputs.slot_mask.any() and outputs.pred_masks.isfinite().all()
    (result,) = processor.post_process_instance_segmentation(outputs, threshold=0.0, target_sizes=[(30, 44)])
    assert result["masks"].shape == (0, 30, 44)


def test_unknown_token_ids_are_refused(parts):
    model, _ = parts
    config = model.config
    ref_token_id, config.ref_token_id = config.ref_token_id, None
    try:
        with pytest.raises(ValueError, match="ref_token_id and config.think_end_id are None.*from_backbones"):
            find_slots(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool), config)
    finally:
        config.ref_token_id = ref_token_id


# -- passes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def passes(parts):
    """The number of tokens of each pass through the language model, and the passes of the image encoder."""
    model, _ = parts
    lengths, encoded = [], []
    handles = [
        model.mllm.model.language_model.register_forward_hook(
            lambda module, inputs, output: lengths.append(output.last_hidden_state.shape[1])
        ),
        model.image_encoder.register_forward_hook(lambda *_: encoded.append(1)),
    ]
    yield lengths, encoded
    for handle in handles:
        handle.remove()


def test_forward_is_one_pass(parts, passes):
    model, processor = parts
    inputs = processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES)
    outputs = model(**inputs)
    assert passes == ([inputs["input_ids"].shape[1]], [1])
    assert outputs.logits.shape[:2] == inputs["input_ids"].shape and outputs.loss.isfinite()
    assert outputs.pred_masks.shape == (4, 3, 32, 32) and outputs.heatmaps.shape == (4, 3, 8, 8)
    assert outputs.pred_logits.shape == outputs.slot_mask.shape == (4, 3)


def test_states_are_those_of_the_concentration_tokens_and_of_the_saes_layer(parts):
    model, processor = parts
    inputs = processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES)
    read = {}
    handles = [
        model.slot_mapper.register_forward_pre_hook(lambda module, args: read.update(e=args[0])),
        model.query_codebook.register_forward_pre_hook(lambda module, args: read.update(z=args[1])),
    ]
    with torch.no_grad():
        model(**inputs)
        language = {name: inputs[name] for name in inputs if name in ("image_grid_thw", "mm_token_type_ids")}
        states = model.mllm(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"],
            output_hidden_states=True,
            **language,
        ).hidden_states
    for handle in handles:
        handle.remove()
    attended = inputs["attention_mask"].bool()
    torch.testing.assert_close(read["z"][attended], states[2][attended], atol=0, rtol=0)  # the output of block 2
    for row in range(4):
        own = states[-1][row, inputs["input_ids"][row] == processor.ref_token_id]
        torch.testing.assert_close(read["e"][row, : len(own)], own, atol=0, rtol=0)
        assert not read["e"][row, len(own) :].any()


def test_segment_runs_nothing_twice(parts, passes):
    model, processor = parts
    outputs = segment(model, processor, noise_images(), INSTRUCTIONS, RESPONSES)
    written = outputs.sequences.shape[1] - outputs.prompt_length
    # the prompt once, then one token a pass; the last token is written and never read back
    assert passes == ([outputs.prompt_length] + [1] * (written - 1), [1])


def test_language_alone_needs_no_image_encoder(parts, passes):
    model, processor = parts
    outputs = model(**processor(images=noise_image(8, 8), text="it", response="no", image_encoder=False))
    assert outputs.pred_masks is None and outputs.loss.isfinite() and passes[1] == []


def test_masks_without_the_lm_head_are_the_same(parts):
    model, processor = parts
    inputs = processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES)
    with torch.no_grad():
        full, headless = model(**inputs), model(**inputs, skip_lm_head=True)
    assert headless.logits is None and headless.loss is None
    assert torch.equal(full.pred_masks, headless.pred_masks)


# -- equalities --------------------------------------------------------------------------------------------------------


def assert_same(ours, theirs, row=slice(None)):
    """Masks of every slot that exists, and the concepts behind them. 1e-4: float32 summed over other paddings."""
    assert ours.pred_masks.std(0).mean() > 0.03, "the samples' masks are alike, so this comparison means nothing"
    found = ours.slot_mask[row]
    assert torch.equal(found, theirs.slot_mask)
    for name in MASKS:
        torch.testing.assert_close(ours[name][row][found], theirs[name][found], atol=1e-4, rtol=0)
    ours, theirs = ours.concept_indices[row].sort().values, theirs.concept_indices.sort().values
    assert torch.equal(ours, theirs)


def test_segment_equals_a_teacher_forced_forward(parts):
    model, processor = parts
    written = segment(model, processor, noise_images(), INSTRUCTIONS, RESPONSES)
    with torch.no_grad():
        forced = model(**processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES))
    assert written.slot_mask.sum(1).tolist() == [3, 3, 2, 3]
    assert_same(written, forced)


def test_forward_of_four_equals_four_forwards_of_one(parts):
    model, processor = parts
    with torch.no_grad():
        together = model(**processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES))
        for row, image in enumerate(noise_images()):
            inputs = processor(images=image, text=INSTRUCTIONS[row], response=RESPONSES[row])
            alone = model(**inputs)
            assert_same(together, alone, slice(row, row + 1))
            response = inputs["response_mask"][0].nonzero()[:, 0]
            start = together.logits.shape[1] - max(len(processor.tokenizer(r).input_ids) + 1 for r in RESPONSES)
            torch.testing.assert_close(
                together.logits[row, start : start + len(response)], alone.logits[0, response], atol=1e-4, rtol=0
            )


def test_segment_of_four_equals_four_segments_of_one(parts):
    model, processor = parts
    together = segment(model, processor, noise_images(), INSTRUCTIONS, RESPONSES)
    for row, image in enumerate(noise_images()):
        alone = segment(model, processor, image, INSTRUCTIONS[row], [RESPONSES[row]])
        assert_same(together, alone, slice(row, row + 1))
        answers = processor.batch_decode([together.sequences[row], alone.sequences[0]], skip_special_tokens=True)
        assert answers[0].endswith(RESPONSES[row]) and answers[1].endswith(RESPONSES[row])


def test_greedy_segment_of_four_writes_what_four_of_one_write(parts):
    model, processor = parts
    inputs = processor(images=noise_images(), text=INSTRUCTIONS)
    together = model.segment(**inputs, max_new_tokens=6)
    assert torch.equal(together.sequences, model.generate(**inputs, max_new_tokens=6, do_sample=False))
    for row, image in enumerate(noise_images()):
        alone = model.segment(**processor(images=image, text=INSTRUCTIONS[row]), max_new_tokens=6)
        length = alone.sequences.shape[1] - alone.prompt_length
        assert torch.equal(
            together.sequences[row, together.prompt_length :][:length], alone.sequences[0, alone.prompt_length :]
        )


def test_one_image_embedding_serves_many_questions(parts):
    model, processor = parts
    image = noise_image(30, 44)
    inputs = processor(images=[image] * 2, text=INSTRUCTIONS[:2], response=RESPONSES[:2])
    with torch.no_grad():
        expected = model(**inputs)
        embedding = model.get_image_embeddings(inputs["encoder_pixel_values"][:1])
        assert embedding.shape == (1, 16, 8, 8)
        shared = model(**{**inputs, "encoder_pixel_values": None}, image_embeddings=embedding)
    torch.testing.assert_close(shared.pred_masks, expected.pred_masks, atol=1e-5, rtol=0)


def test_padding_of_the_frame_does_not_reach_the_confidences(parts):
    model, processor = parts
    inputs = processor(images=noise_image(20, 64), text="it", response=RESPONSES[0])  # 10 x 32 of the 32 x 32 frame
    embedding = model.get_image_embeddings(inputs.pop("encoder_pixel_values")).detach()
    changed = {}
    for row in (2, 3):  # 10 pixels are 2.5 cells of the key grid: rows 0, 1 and 2
        other = embedding.clone()
        other[:, :, row:] = torch.randn(other[:, :, row:].shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before, after = (model(**inputs, image_embeddings=keys).pred_logits for keys in (embedding, other))
        changed[row] = bool((after - before).abs().max() > 1e-5)
    assert changed == {2: True, 3: False}


# -- concepts ----------------------------------------------------------------------------------------------------------


def test_padding_and_special_tokens_never_fire_concepts(parts):
    model, processor = parts
    inputs = processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES)
    with torch.no_grad():
        fired = (model(**inputs).concept_activations > 0).any(-1)
    ids, image_token = inputs["input_ids"], processor.image_token_id
    special = torch.isin(ids, torch.tensor([*processor.tokenizer.all_special_ids, processor.ref_token_id]))
    silent = (special & (ids != image_token)) | (inputs["attention_mask"] == 0)
    assert not fired[silent].any()
    assert fired[ids == image_token].any() and fired[~silent & (ids != image_token)].any()


def test_concept_scaled_to_zero_is_removed_and_changes_the_mask(parts):
    model, processor = parts
    inputs = processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES)
    with torch.no_grad():
        before = model(**inputs)
        weight = before.concept_weights[0, 0]
        index = int(before.concept_indices[0, weight.argmax()])
        after = model(**inputs, concept_scale={index: 0.0})
        unchanged = model(**inputs, concept_scale={index: 1.0})
    assert not after.concept_values[after.concept_indices == index].any()
    assert not after.concept_weights.mT[after.concept_indices == index].any()
    assert (after.heatmaps[0] - before.heatmaps[0]).abs().max() > 1e-3
    assert torch.equal(unchanged.pred_masks, before.pred_masks)
    torch.testing.assert_close(before.concept_weights.sum(-1), torch.ones(4, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({128: 0.0}, "concept 128 is out of range.*0 to 127"),
        ({-1: 0.0}, "concept -1 is out of range.*0 to 127"),
        ({3: -1.0}, "the factor of concept 3 is -1.0; it must be finite and at least 0"),
        ({3: float("nan")}, "the factor of concept 3 is nan"),
        ({3: float("inf")}, "the factor of concept 3 is inf"),
    ],
)
def test_bad_interventions_are_refused(parts, scale, message):
    model, processor = parts
    with pytest.raises(ValueError, match=message):
        model(**processor(images=noise_image(8, 8), text="it", response="no"), concept_scale=scale)


def test_factors_of_all_concepts_can_differ_by_sample(parts):
    model, processor = parts
    inputs = processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES)
    with torch.no_grad():
        whole = model(**inputs)
        index = int(whole.concept_indices[1, 0])
        scale = torch.ones(4, 128)
        scale[1, index] = 0
        mixed, alone = model(**inputs, concept_scale=scale), model(**inputs, concept_scale={index: 0.0})
        row = model(**inputs, concept_scale=scale[1])
    assert torch.equal(mixed.concept_indices[[0, 2, 3]], whole.concept_indices[[0, 2, 3]])
    assert torch.equal(mixed.heatmaps[[0, 2, 3]], whole.heatmaps[[0, 2, 3]])
    assert torch.equal(mixed.concept_indices[1], alone.concept_indices[1])
    assert torch.equal(mixed.heatmaps[1], alone.heatmaps[1])
    assert torch.equal(row.heatmaps, alone.heatmaps)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(4, 64), r"shape \(4, 64\); it holds a factor of each of the 128 concepts, \(128,\) or \(1, 128\)"),
        (torch.full((128,), -1.0), "negative or not finite"),
        (torch.full((128,), float("nan")), "negative or not finite"),
    ],
)
def test_bad_factors_of_all_concepts_are_refused(parts, scale, message):
    model, processor = parts
    with pytest.raises(ValueError, match=message):
        model(**processor(images=noise_image(8, 8), text="it", response="no"), concept_scale=scale)


def test_erasing_is_decoding_without_the_heaviest_concepts_of_the_sure_slots(parts):
    model, processor = parts
    inputs = processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES)
    with torch.no_grad():
        outputs = model(**inputs, num_erased_concepts=2)
        for sample in range(4):
            sure = [k for k in range(3) if outputs.slot_mask[sample, k] and outputs.pred_logits[sample, k] >= 0]
            found = [k for k in range(3) if outputs.slot_mask[sample, k]]
            sure = sorted({*sure, max(found, key=lambda k: outputs.pred_logits[sample, k])})
            assert outputs.erased_slots[sample].nonzero()[:, 0].tolist() == sure
            heaviest = {
                int(outputs.concept_indices[sample, place])
                for slot in sure
                for place in outputs.concept_weights[sample, slot].argsort(descending=True)[:2]
            }
            scaled = model(**inputs, concept_scale=dict.fromkeys(heaviest, 0.0))
            torch.testing.assert_close(outputs.erased.heatmaps[sample], scaled.heatmaps[sample])
            torch.testing.assert_close(outputs.erased.pred_logits[sample], scaled.pred_logits[sample])
        with pytest.raises(ValueError, match="num_erased_concepts needs concepts"):
            model(**inputs, num_erased_concepts=2, query_source="tokens")


@pytest.mark.parametrize("source", ["tokens", "concepts"])
def test_queries_can_be_built_from_one_source(parts, source):
    model, processor = parts
    inputs = processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES)
    with torch.no_grad():
        alone, both = model(**inputs, query_source=source), model(**inputs)
    assert (alone.concept_indices is None) == (source == "tokens")
    assert (alone.heatmaps - both.heatmaps).abs().max() > 0.1


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_forward_without_a_response_is_refused(parts):
    model, processor = parts
    with pytest.raises(ValueError, match=r"pass labels or response_mask .*model.segment\(\.\.\.\)"):
        model(**processor(images=noise_image(8, 8), text="it"))


def test_segment_without_the_image_is_refused(parts):
    model, processor = parts
    with pytest.raises(ValueError, match="pass encoder_pixel_values or image_embeddings"):
        model.segment(**processor(images=noise_image(8, 8), text="it", image_encoder=False))


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_segment_of_several_sequences_is_refused(parts, name):
    model, processor = parts
    with pytest.raises(ValueError, match=f"{name} is 2; .*use {name}=1"):
        model.segment(**processor(images=noise_image(8, 8), text="it"), **{name: 2})


def test_unknown_query_source_is_refused(parts):
    model, processor = parts
    with pytest.raises(ValueError, match="query_source is 'words'; choose one of"):
        model(**processor(images=noise_image(8, 8), text="it", response="no"), query_source="words")


# -- gradients ---------------------------------------------------------------------------------------------------------


def gradients_of_masks(backbone, source="both", **config):
    """Which named parameters the masks alone (no language loss) give a gradient other than zero."""
    model, processor = lively_segcompass(backbone, **config)
    model.train()
    outputs = model(**processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES), query_source=source)
    probe = torch.linspace(-1, 1, outputs.pred_masks.numel()).view_as(outputs.pred_masks)
    ((outputs.pred_masks * probe).sum() + outputs.pred_logits.sum() + outputs.heatmaps.sum()).backward()
    return {
        name: parameter.grad is not None and bool(parameter.grad.any()) for name, parameter in model.named_parameters()
    }, model


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradient_of_the_masks_reaches_all_but_the_frozen(backbone):
    reached, model = gradients_of_masks(backbone)
    for group in ("query_codebook.", "slot_mapper.", "mask_decoder.", "mllm.model.language_model.layers.3."):
        missed = [name for name, hit in reached.items() if name.startswith(group) and not hit]
        # a bias that softmax cancels, or a unit that ReLU silenced, may have none; whole weights may not
        assert not [name for name in missed if name.endswith("weight") and "conv" not in name], missed
    assert reached["query_codebook.codebook"] and reached["query_codebook.slot_queries"]
    assert reached["mask_decoder.mask_token"] and reached["slot_mapper.map_in.weight"]
    frozen = [name for name in reached if name.startswith(("sae.", "image_encoder.", "image_positions."))]
    assert frozen and not any(reached[name] for name in frozen)
    assert not any(p.requires_grad for module in (model.sae, model.image_encoder) for p in module.parameters())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_concepts_alone_teach_the_blocks_up_to_the_saes_layer(backbone):
    reached, _ = gradients_of_masks(backbone, source="concepts")
    layers = [reached[f"mllm.model.language_model.layers.{n}.mlp.down_proj.weight"] for n in range(4)]
    assert layers == [True, True, False, False], "the SAE reads the output of block 2"


@pytest.mark.parametrize("reading", ["feature", "token"])
def test_topk_sae_and_both_readings_train(reading):
    sae = SparseAutoencoderConfig(d_in=32, d_sae=128, layer=2, activation="topk", k=8)
    reached, _ = gradients_of_masks("llava", source="concepts", sae_config=sae, concept_reading=reading)
    assert reached["query_codebook.codebook"] and reached["query_codebook.where.weight"]
    assert reached["mllm.model.language_model.layers.0.mlp.down_proj.weight"]


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", ["feature", "token", "grounded"])
@pytest.mark.parametrize("low", [("mllm",), ("sae",), ("mllm", "image_encoder", "sae")], ids="+".join)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_half_precision_parts_work_with_full_precision_masks(backbone, low, reading):
    model, processor = lively_segcompass(backbone, concept_reading=reading)
    for part in low:
        getattr(model, part).to(torch.bfloat16)
    outputs = segment(model, processor, noise_images(), INSTRUCTIONS, RESPONSES)
    assert outputs.pred_masks.dtype == torch.float32 and outputs.pred_masks.isfinite().all()


@pytest.mark.parametrize("reading", ["feature", "token"])
def test_whole_model_works_in_half_precision(reading):
    model, processor = lively_segcompass("llava", concept_reading=reading)
    inputs = processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES)
    with torch.no_grad():
        outputs = model.to(torch.bfloat16)(**inputs)
    assert outputs.pred_masks.dtype == torch.bfloat16 and outputs.pred_masks.isfinite().all()


def test_backbones_are_loaded_with_float32_master_weights(tmp_path):
    mllm, sam, processor = backbones()
    mllm.to(torch.bfloat16).save_pretrained(tmp_path / "mllm")
    sam.to(torch.float16).save_pretrained(tmp_path / "image_encoder")
    model = SegCompassModel.from_backbones(
        str(tmp_path / "mllm"), str(tmp_path / "image_encoder"), processor=processor, d_c=16, decoder_heads=4
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# -- building and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
def test_checkpoint_loads_bit_identical_every_time(backbone, tmp_path):
    model, processor = tiny_segcompass(backbone)
    model.save_pretrained(tmp_path / "first")
    once, info = SegCompassModel.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    twice = SegCompassModel.from_pretrained(tmp_path / "first")
    once.save_pretrained(tmp_path / "second")
    again = SegCompassModel.from_pretrained(tmp_path / "second")
    expected = model.state_dict()
    for loaded in (once, twice, again):
        state = loaded.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert not any(p.requires_grad for module in (once.sae, once.image_encoder) for p in module.parameters())
    files = [tmp_path / name / "model.safetensors" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()
    inputs = processor(images=noise_images(), text=INSTRUCTIONS, response=RESPONSES)
    with torch.no_grad():
        assert torch.equal(once.eval()(**inputs).pred_masks, model(**inputs).pred_masks)


def test_checkpoint_with_other_keys_is_refused(tmp_path):
    model, _ = tiny_segcompass("llava")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "query_codebook.slot_queries"
    for changed, message in (
        ({key: value for key, value in weights.items() if key != name}, f"missing_keys: 1 .*{name}"),
        ({**weights, "query_codebook.old": torch.zeros(2)}, "unexpected_keys: 1 .*query_codebook.old"),
    ):
        save_file(changed, path, metadata={"format": "pt"})
        sign(tmp_path)
        named = f"model.safetensors.*does not match this model.*{message}.*save_pretrained wrote"
        with pytest.raises(ValueError, match=named):
            SegCompassModel.from_pretrained(tmp_path)


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    model, _ = tiny_segcompass("llava")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "query_codebook.slot_queries": torch.zeros(4, 16)}, path, metadata={"format": "pt"})
    sign(tmp_path)
    named = r"\(model.safetensors\) does not match this model .mismatched_keys: 1.*slot_queries"
    with pytest.raises(ValueError, match=named):
        SegCompassModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_new_tokens_get_embeddings(backbone):
    model, processor = tiny_segcompass(backbone)
    vocabulary = len(processor.tokenizer)
    assert model.get_input_embeddings().num_embeddings >= vocabulary
    assert model.get_output_embeddings().out_features >= vocabulary
    assert processor.ref_token_id in model.config.special_token_ids
    assert model.config.num_slots == processor.num_slots


def backbones(name=None):
    processor = tiny_processor("llava")
    mllm = tiny_mllm("llava", processor)
    if name:
        mllm.config._name_or_path = name
    return mllm, tiny_segcompass("llava")[0].image_encoder, processor


def test_sae_of_another_backbone_is_refused():
    mllm, sam, processor = backbones("org/llava-a")
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=32, d_sae=64, layer=2, backbone="org/llava-b"))
    with pytest.raises(ValueError, match="trained on 'org/llava-b', but the MLLM is 'org/llava-a'; load an SAE"):
        SegCompassModel.from_backbones(mllm, sam, sae, processor=processor)


def test_sae_of_another_width_or_layer_is_refused():
    mllm, sam, processor = backbones()
    for fields, message in (
        (dict(d_in=48, layer=2), "width 48.*32 wide"),
        (dict(d_in=32, layer=5), "layer 5.*4 decoder blocks.*1 to 4"),
    ):
        sae = SparseAutoencoder(SparseAutoencoderConfig(d_sae=64, **fields))
        with pytest.raises(ValueError, match=message):
            SegCompassModel.from_backbones(mllm, sam, sae, processor=processor)


def test_sae_that_does_not_fit_the_built_model_is_refused():
    model, _ = tiny_segcompass("llava")
    for name, value in (("d_in", 48), ("d_sae", 64), ("layer", 3)):
        config = SparseAutoencoderConfig(**{"d_in": 32, "d_sae": 128, "layer": 2, name: value})
        with pytest.raises(ValueError, match=f"the SAE has {name}={value}, this model was built for"):
            model.load_sae(SparseAutoencoder(config))


def test_trained_sae_can_be_put_in(tmp_path):
    model, processor = tiny_segcompass("llava")
    sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=32, d_sae=128, layer=2, backbone="org/llava-a"))
    sae.save_pretrained(tmp_path)
    model.load_sae(str(tmp_path))
    assert torch.equal(model.sae.W_enc, sae.W_enc) and model.config.sae_config.backbone == "org/llava-a"
    assert not any(parameter.requires_grad for parameter in model.sae.parameters())
