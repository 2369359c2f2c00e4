"""The tokens of a response are learned and checked on MLLMs as the Hub has them: tied, padded, adapted, in 4 bits."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig

from segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoderConfig
from segcompass.loaders import load_scenes
from segcompass.loading import load_mllm
from segcompass.trainers import (
    SegCompassGRPOConfig,
    SegCompassGRPOTrainer,
    SegCompassSFTConfig,
    SegCompassSFTTrainer,
)
from segcompass.trainers.checks import check_adapters
from segcompass.trainers.joint_forward import add_fused_head
from segcompass.trainers.policy import is_tied, lora_config
from tests.support.grpo import scenes
from tests.support.hub_world import LLAVA, QWEN, QWEN_TIED, SAM, make_world
from tests.support.scripted import noise_image

SMALL = dict(d_c=16, num_concepts=24, codebook_heads=4, slot_heads=4, slot_head_dim=8, decoder_heads=4)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    make_world(folder)
    return folder


@pytest.fixture(scope="module")
def rows():
    return load_scenes("train", seed=5, num_samples=4, size=64).map(lambda row: {"reasoning": "the red box"})


def build(hub, mllm):
    torch.manual_seed(0)
    limits = {} if mllm == LLAVA else {"min_pixels": 784, "max_pixels": 12_544}
    processor = SegCompassProcessor.from_backbones(
        hub / mllm, hub / SAM, num_slots=3, prompt_template="{instruction}", **limits
    )
    sae = SparseAutoencoderConfig(d_in=64, d_sae=64, layer=2)
    model = SegCompassModel.from_backbones(
        str(hub / mllm), str(hub / SAM), processor=processor, sae_config=sae, **SMALL
    )
    model.config.max_response_length = 24
    return model, processor


def settings(folder, **changes):
    return dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **changes,
    )


@pytest.mark.parametrize(("mllm", "rank"), [(QWEN_TIED, None), (QWEN_TIED, 8), (LLAVA, None)])
def test_the_cold_start_teaches_think_whether_or_not_embedding_and_head_are_one(mllm, rank, hub, rows, tmp_path):
    model, processor = build(hub, mllm)
    assert is_tied(model) == (mllm == QWEN_TIED)
    before = model.get_input_embeddings().weight.clone()
    args = SegCompassSFTConfig(**settings(tmp_path, max_steps=80, lambda_s=0.0, lambda_c=0.0))
    adapters = lora_config(model, r=rank) if rank else None
    trainer = SegCompassSFTTrainer(model, args, processor, peft_config=adapters, train_dataset=rows.select(range(2)))
    trainer.train()
    if rank:
        model = trainer.model.merge_and_unload()
    inputs = processor(
        images=rows[0]["image"], text=rows[0]["instruction"], response=processor.format_response("the red box")
    )
    with torch.no_grad():
        probability = model.eval()(**inputs).logits[0, :-1].softmax(-1)
    labels = inputs["labels"][0, 1:]
    for token in (processor.think_id, processor.think_end_id, processor.ref_token_id):
        places = (labels == token).nonzero()[:, 0]
        assert probability[places, token].min() > 0.9, (token, probability[places, token])
    changed = (model.get_input_embeddings().weight != before).any(1).nonzero()[:, 0].tolist()
    ours = {processor.think_end_id, processor.ref_token_id}
    assert set(changed) == (ours | {processor.think_id} if mllm == QWEN_TIED else ours)


def test_what_an_sae_reads_of_a_plain_mllm_has_the_mean_in_the_new_rows(hub):
    mllm, processor = load_mllm(str(hub / QWEN), device="cpu")
    ids = [processor.think_id, processor.think_end_id, processor.ref_token_id]
    weight = mllm.get_input_embeddings().weight
    others = [number for number in range(len(processor.tokenizer)) if number not in ids]
    torch.testing.assert_close(weight[ids], weight[others].mean(0).expand(3, -1))


def test_slots_found_stand_in_the_log_of_the_cold_start(hub, rows, tmp_path):
    model, processor = build(hub, LLAVA)
    args = SegCompassSFTConfig(**settings(tmp_path, max_steps=1))
    trainer = SegCompassSFTTrainer(model, args, processor, train_dataset=rows)
    trainer.train()
    assert [entry["seg/slots_found"] for entry in trainer.state.log_history if "seg/slots_found" in entry] == [3.0]


def perturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.mark.parametrize("mllm", [QWEN_TIED, QWEN])
def test_adapted_rows_are_one_matrix_in_sampling_scoring_and_merging_where_it_was_one(mllm, hub, tmp_path):
    model, processor = build(hub, mllm)
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, lora_config(model, r=2)).eval()
    check_adapters(adapted)
    add_fused_head(model.mllm, 1.0)
    perturb(adapted)
    inputs = processor(images=noise_image(40, 60), text="the box", response=processor.format_response("the red box"))
    labels = inputs["labels"][:, 1:]
    used = labels != -100
    logits = adapted(**inputs).logits  # what sampling reads
    scored = model(**inputs, fused_lm_head=True).log_probs  # what the loss reads
    expected = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(scored[used], expected[used], atol=2e-5, rtol=0)  # float32, two orders of summation
    rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    assert len(rows) == (3 if mllm == QWEN_TIED else 2)
    by_logits, by_scores = (
        torch.autograd.grad(-value[used].mean(), rows, retain_graph=True)[0] for value in (expected, scored)
    )
    torch.testing.assert_close(by_scores, by_logits, atol=1e-5, rtol=1e-3)
    assert (by_logits != 0).any(1).all()

    adapted.save_pretrained(tmp_path / "adapters")
    base = SegCompassModel.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "adapters").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = SegCompassModel.from_pretrained(tmp_path / "merged").eval()
    assert is_tied(again) == (mllm == QWEN_TIED)
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [None, 4])
def test_joint_training_moves_the_three_rows_of_a_tied_mllm_and_no_other(bits, hub, rows, tmp_path):
    model, processor = build(hub, QWEN_TIED)
    peft_config = None
    if bits:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing: pip install -e '.[test]'")
        model.save_pretrained(tmp_path / "model")
        low = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = SegCompassModel.from_pretrained(tmp_path / "model", dtype="float32", quantization_config=low)
        assert is_tied(model)
        peft_config = lora_config(model, r=2)
    rewards = {"lambda_s": 1.0, "max_completion_length": 12, "num_generations": 2, "beta": 0.0}
    args = SegCompassGRPOConfig(**settings(tmp_path, max_steps=1, bf16=False, **rewards))
    trainer = SegCompassGRPOTrainer(
        model, args=args, train_dataset=rows, processing_class=processor, peft_config=peft_config
    )
    learned = {processor.think_id, processor.think_end_id, processor.ref_token_id}
    embeddings = trainer.core.get_input_embeddings()
    if bits:
        assert set(embeddings.token_adapter.token_indices["default"]) == learned
        assert embeddings.token_adapter.trainable_tokens_delta["default"].requires_grad
        before = embeddings.token_adapter.base_layer.weight.clone()
        trainer.train()
        assert torch.equal(before, embeddings.token_adapter.base_layer.weight)
        return
    before = embeddings.weight.clone()
    trainer.train()
    assert set((embeddings.weight != before).any(1).nonzero()[:, 0].tolist()) <= learned
    assert trainer.core.get_output_embeddings().weight is embeddings.weight


@pytest.mark.parametrize("mllm", [LLAVA, QWEN])
def test_prompts_of_several_lengths_keep_their_token_types_in_joint_training(mllm, hub, tmp_path):
    """TRL makes prompts twice: their ids, which it pads left, and what else belongs to them, which the processor pads.
    Qwen's tokenizer pads right where nobody asks, and its positions follow the token types."""
    model, processor = build(hub, mllm)
    words = [
        "the red box",
        "the ball that is on the right of the two blue boxes and left of the yellow ball",
        "it",
        "a",
    ]
    data = scenes(4).map(lambda row, number: {"instruction": words[number]}, with_indices=True)
    args = SegCompassGRPOConfig(
        **settings(tmp_path, max_steps=1, num_generations=2, gradient_accumulation_steps=4, beta=0.1),
        max_completion_length=24,
    )
    trainer = SegCompassGRPOTrainer(model, args=args, train_dataset=data, processing_class=processor)
    seen = []
    own = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (
        seen.append((args, kwargs)) or own(*args, **kwargs)
    )
    trainer.train()
    lengths = set()
    for (_, ids, mask, *_), options in seen:
        lengths |= set(mask.sum(1).tolist())
        types = options.get("mm_token_type_ids")
        assert (types is None) == (mllm == LLAVA)
        if types is not None:
            assert torch.equal(types == 1, ids == processor.image_token_id)
            assert not types[mask == 0].any()
    assert len(lengths) > 2, "prompts of one length show nothing"


def test_both_trainers_refuse_a_processor_whose_tokens_or_view_are_not_the_models(hub, rows, tmp_path):
    model, processor = build(hub, LLAVA)
    sft = SegCompassSFTConfig(**settings(tmp_path, max_steps=1))
    grpo = SegCompassGRPOConfig(**settings(tmp_path, max_steps=1, num_generations=2, bf16=False))
    starts = (
        lambda: SegCompassSFTTrainer(model, sft, processor, train_dataset=rows),
        lambda: SegCompassGRPOTrainer(model, args=grpo, train_dataset=rows, processing_class=processor),
    )
    other, _ = build(hub, QWEN)
    whole = SegCompassProcessor.from_backbones(hub / LLAVA, hub / SAM, num_slots=3, whole_image=False)
    for start in starts:
        model.config.think_id += 1
        with pytest.raises(ValueError, match="the processor's id of <think> is"):
            start()
        model.config.think_id = None  # as in a model that an earlier version saved
        start()
        assert model.config.think_id == processor.think_id
        processor, kept = whole, processor
        with pytest.raises(ValueError, match="shows the MLLM an image as 'center_crop', the model was built for 'fr"):
            start()
        processor, model, own = kept, other, model
        with pytest.raises(ValueError, match="the processor's id of <REF_POS> is"):
            start()
        model = own


def test_a_prompt_that_its_image_makes_too_long_names_the_sample_and_the_image(hub, rows, tmp_path):
    model, processor = build(hub, QWEN)
    processor.max_prompt_length = 20
    for trainer in (
        SegCompassSFTTrainer(
            model, SegCompassSFTConfig(**settings(tmp_path, max_steps=1)), processor, train_dataset=rows
        ),
        SegCompassGRPOTrainer(
            model,
            args=SegCompassGRPOConfig(**settings(tmp_path, max_steps=1, num_generations=2, bf16=False)),
            train_dataset=rows,
            processing_class=processor,
        ),
    ):
        with pytest.raises(ValueError, match=r"sample '.*': the prompt has \d+ tokens, \d+ of them for its image"):
            trainer.train()


def test_a_cold_start_in_4_bits_needs_adapters_and_saves_them_alone(hub, rows, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing: pip install -e '.[test]'")
    model, processor = build(hub, QWEN_TIED)
    model.save_pretrained(tmp_path / "base")
    low = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = SegCompassModel.from_pretrained(tmp_path / "base", dtype="float32", quantization_config=low)
    args = SegCompassSFTConfig(**settings(tmp_path / "run", max_steps=1))
    with pytest.raises(ValueError, match="the MLLM is quantised"):
        SegCompassSFTTrainer(model, args, processor, train_dataset=rows)
    with pytest.raises(ValueError, match="train_vision_tower is True, but with adapters only they"):
        towers = SegCompassSFTConfig(**settings(tmp_path / "run", max_steps=1, train_vision_tower=True))
        SegCompassSFTTrainer(model, towers, processor, peft_config=lora_config(model, r=2), train_dataset=rows)
    model = SegCompassModel.from_pretrained(tmp_path / "base", dtype="float32", quantization_config=low)
    trainer = SegCompassSFTTrainer(model, args, processor, peft_config=lora_config(model, r=2), train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_config.json").is_file() and not (
        tmp_path / "run" / "model.safetensors"
    ).exists()
    base = SegCompassModel.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "run").merge_and_unload()
    assert is_tied(merged)
    trained = trainer.model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    assert torch.equal(merged.get_input_embeddings().weight[[processor.think_id]], trained[:1])
