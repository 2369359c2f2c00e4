"""The tokens of a response are found, decoded and given rows on tokenizers as the Hub has them."""

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers
from transformers import AddedToken, PreTrainedTokenizerFast

from segcompass import SegCompassModel, SegCompassProcessor, SparseAutoencoderConfig
from segcompass.modeling_segcompass.tokens import (
    REF_TOKEN,
    THINK,
    THINK_END,
    add_response_tokens,
    check_response_tokens,
    give_rows,
)
from tests.support.tiny import BACKBONES, tiny_mllm, tiny_processor, tiny_segcompass

RESPONSE = f"{THINK}ok.{THINK_END}{REF_TOKEN * 6}"


def llama_like():
    """A tokenizer with the normalizer of Llama-2's tokenizer.json: "▁" before the text and for every space."""
    letters = {letter: number for number, letter in enumerate("▁abcdefghijklmnopqrstuvwxyzN.,4B<>/_REFPOS")}
    vocabulary = {"<unk>": 0, **{letter: number + 1 for number, letter in enumerate(dict.fromkeys(letters))}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def count(tokenizer, token):
    return tokenizer(RESPONSE, add_special_tokens=False)["input_ids"].count(tokenizer.convert_tokens_to_ids(token))


def test_a_llama_normalizer_hides_plainly_added_tokens_and_ours_are_found():
    plain, ours = llama_like(), llama_like()
    plain.add_tokens([THINK, THINK_END, REF_TOKEN])
    assert count(plain, REF_TOKEN) < 6  # what this is about
    assert add_response_tokens(ours) == [THINK, THINK_END, REF_TOKEN]
    assert (count(ours, THINK), count(ours, THINK_END), count(ours, REF_TOKEN)) == (1, 1, 6)
    assert add_response_tokens(ours) == []


def test_a_tokenizer_that_misses_the_tokens_is_refused_with_the_counts():
    tokenizer = llama_like()
    tokenizer.add_tokens([THINK, THINK_END, REF_TOKEN])
    with pytest.raises(ValueError, match=r"'<REF_POS>': \d+.*must find.*'<REF_POS>': 6.*MLLM's own tokenizer"):
        check_response_tokens(tokenizer, RESPONSE, 6)


def test_tokens_that_decoding_strips_are_refused():
    tokenizer = llama_like()
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in (THINK, THINK_END, REF_TOKEN)])
    with pytest.raises(ValueError, match="decodes a well-formed response as"):
        check_response_tokens(tokenizer, RESPONSE, 6)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("rows", ["identical padding rows", "zero rows"])
def test_rows_of_a_padded_vocabulary_become_the_mean_of_the_others(backbone, rows):
    processor = tiny_processor(backbone)
    mllm, known = tiny_mllm(backbone, processor), len(processor.tokenizer)
    mllm.resize_token_embeddings(known + 60)
    ids = processor.tokenizer.convert_tokens_to_ids([THINK, THINK_END, REF_TOKEN])
    others = [number for number in range(known) if number not in ids]
    with torch.no_grad():
        for part in (mllm.get_input_embeddings(), mllm.get_output_embeddings()):
            part.weight[ids] = part.weight[known:] = 0.5 if rows.startswith("identical") else 0.0
    give_rows(mllm, processor.tokenizer, [])
    for part in (mllm.get_input_embeddings(), mllm.get_output_embeddings()):
        mean = part.weight[others].mean(0)
        torch.testing.assert_close(part.weight[ids], mean.expand(3, -1))
        assert part.num_embeddings if hasattr(part, "num_embeddings") else part.out_features == known + 60


def test_trained_rows_stay_and_tokens_added_just_now_get_the_mean():
    processor = tiny_processor("llava")
    mllm = tiny_mllm("llava", processor)
    before = mllm.get_input_embeddings().weight.clone()
    give_rows(mllm, processor.tokenizer, [])
    assert torch.equal(mllm.get_input_embeddings().weight, before)
    give_rows(mllm, processor.tokenizer, [REF_TOKEN])
    changed = (mllm.get_input_embeddings().weight != before).any(1).nonzero()[:, 0].tolist()
    assert changed == [processor.ref_token_id]


def test_a_model_from_backbones_has_the_mean_rows():
    processor = tiny_processor("llava")
    mllm, known = tiny_mllm("llava", processor), len(processor.tokenizer)
    mllm.resize_token_embeddings(known + 61)
    with torch.no_grad():
        mllm.get_input_embeddings().weight[known - 3 :] = 0.5
    shape = {
        "d_c": 16,
        "num_concepts": 24,
        "codebook_heads": 4,
        "slot_heads": 4,
        "slot_head_dim": 8,
        "decoder_heads": 4,
    }
    sae = SparseAutoencoderConfig(d_in=32, d_sae=128, layer=2)
    encoder = tiny_segcompass("llava")[0].image_encoder
    model = SegCompassModel.from_backbones(mllm, encoder, processor=processor, sae_config=sae, **shape)
    assert not (model.get_input_embeddings().weight[processor.ref_token_id] == 0.5).any()


@pytest.mark.parametrize(
    "template", ['Answer as {"a": 1}: {instruction}', "segment it", "{instruction.__class__}", "{"]
)
def test_a_template_with_other_fields_is_refused_when_the_processor_is_made(template):
    given = tiny_processor("llava")
    with pytest.raises(ValueError, match="prompt_template"):
        SegCompassProcessor(
            given.image_processor,
            given.tokenizer,
            given.encoder_image_processor,
            chat_template=given.chat_template,
            prompt_template=template,
        )
    with pytest.raises(ValueError, match="format '3000000000d'"):
        SegCompassProcessor(
            given.image_processor,
            given.tokenizer,
            given.encoder_image_processor,
            prompt_template="{instruction} {num_slots:3000000000d}",
        )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_typed_control_tokens_are_refused_and_finished_prompts_are_not_mistaken(backbone):
    processor = tiny_processor(backbone)
    image = Image.new("RGB", (40, 40))
    for token in (processor.image_token, processor.tokenizer.eos_token, REF_TOKEN, THINK_END):
        with pytest.raises(ValueError, match="reserved"):
            processor(images=image, text=f"the {token} sign")
    finished = processor.apply_chat_template(
        processor.build_messages("the box"), tokenize=False, add_generation_prompt=True
    )
    assert "encoder_pixel_values" not in processor(images=image, text=[finished], return_tensors="pt")
    with pytest.raises(ValueError, match="finished prompt"):
        processor(images=image, text=[finished], response=["<think></think>"])


def test_what_was_added_is_not_saved_as_if_it_were_new_again(tmp_path):
    processor = tiny_segcompass("llava")[1]
    processor.save_pretrained(tmp_path)
    assert SegCompassProcessor.from_pretrained(tmp_path).new_tokens == []
    assert "new_tokens" not in (tmp_path / "processor_config.json").read_text()
