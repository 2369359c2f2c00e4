"""NaN and infinity, wherever they come from, are errors that name the tensor, the sample and the weight."""

import pytest
import torch

from segcompass.modeling_segcompass import ReasoningSegmentationPipeline
from segcompass.modeling_segcompass.finite import refuse_non_finite
from tests.support.operators import OperatorsCalled
from tests.support.scripted import INSTRUCTIONS, Script, lively_segcompass, noise_images
from tests.support.tiny import BACKBONES

RESPONSES = ["<think>left of it</think><REF_POS><REF_POS><REF_POS>", "<think>right</think><REF_POS><REF_POS>"]


@pytest.fixture(scope="module", params=BACKBONES)
def parts(request):
    return lively_segcompass(request.param)


@pytest.fixture
def spoilt(parts):
    """Call with a weight's name: its values are NaN until the test is over."""
    weights = dict(parts[0].named_parameters())
    kept = []

    def spoil(name, value=float("nan")):
        kept.append((weights[name], weights[name].detach().clone()))
        with torch.no_grad():
            weights[name].fill_(value)

    yield spoil
    with torch.no_grad():
        for weight, before in kept:
            weight.copy_(before)


def forward_inputs(processor):
    return processor(images=noise_images()[:2], text=INSTRUCTIONS[:2], response=RESPONSES)


def segment(parts):
    model, processor = parts
    inputs = processor(images=noise_images()[:2], text=INSTRUCTIONS[:2])
    return model.segment(**inputs, logits_processor=[Script(processor.tokenizer, RESPONSES)], max_new_tokens=60)


@pytest.mark.parametrize(
    "name", ["slot_mapper.key.bias", "mask_decoder.mask_token", "query_codebook.codebook", "slot_mapper.conf_out.bias"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_of_the_segmentation_modules_is_named(parts, spoilt, name, value):
    spoilt(name, value)
    model, processor = parts
    with torch.no_grad(), pytest.raises(ValueError, match=f"holds NaN or infinity; the weight {name} does so too"):
        model(**forward_inputs(processor))


def test_a_weight_of_the_mllm_is_named_while_it_writes(parts, spoilt):
    spoilt("mllm.lm_head.weight")
    with pytest.raises(
        ValueError, match="next-token logits: sample 0 holds NaN or infinity; the weight lm_head.weight"
    ):
        segment(parts)


def test_a_weight_of_a_decoder_block_is_named(parts, spoilt):
    model, processor = parts
    name = next(name for name, _ in model.named_parameters() if name.endswith("layers.0.input_layernorm.weight"))
    spoilt(name)
    with torch.no_grad(), pytest.raises(ValueError, match=rf"z: sample 0, token \d+ holds .*the weight {name}"):
        model(**forward_inputs(processor))


def test_the_pipeline_never_answers_no_target_from_nan(parts, spoilt):
    model, processor = parts
    spoilt("slot_mapper.key.bias")
    pipe = ReasoningSegmentationPipeline(model=model, processor=processor, device=-1)
    script = Script(processor.tokenizer, RESPONSES[:1])
    with pytest.raises(ValueError, match="the weight slot_mapper.key.bias"):
        pipe(noise_images()[0], INSTRUCTIONS[0], logits_processor=[script], max_new_tokens=60)


@pytest.mark.parametrize("name", ["pixel_values", "encoder_pixel_values"])
def test_an_input_is_named_with_its_sample(parts, name):
    model, processor = parts
    inputs = forward_inputs(processor)
    inputs[name][-1] = float("inf")  # of the last sample, or of its last patch
    with torch.no_grad(), pytest.raises(ValueError, match=f"^{name}: sample 1 holds NaN or infinity"):
        model(**inputs)
    for answer in ("labels", "response_mask"):
        inputs.pop(answer)
    with pytest.raises(ValueError, match=f"^{name}: sample 1 holds NaN or infinity"):
        model.segment(**inputs)


def test_a_state_is_named_with_its_token_and_padding_may_hold_anything(parts):
    model, processor = parts
    _, states = model.reason(
        **processor(images=noise_images()[:2], text=INSTRUCTIONS[:2]),
        logits_processor=[Script(processor.tokenizer, RESPONSES)],
        max_new_tokens=60,
    )
    row, token = (states.attention_mask == 0).nonzero()[-1].tolist()
    with torch.no_grad():
        z = states.z.clone()
        z[row, token] = float("nan")
        model.decode_masks(
            **states._replace(z=z, last_hidden=states.last_hidden.clone())._asdict(), query_source="tokens"
        )
        z[1, 7 + int((states.attention_mask[1] == 0).sum())] = float("nan")
        with pytest.raises(ValueError, match=r"^z: sample 1, token \d+ holds NaN"):
            model.decode_masks(**states._replace(z=z)._asdict())
        keys = states.image_embeddings.clone()
        keys[0, 0, 0, 0] = float("-inf")
        with pytest.raises(ValueError, match="^image_embeddings: sample 0 holds"):
            model.decode_masks(**states._replace(image_embeddings=keys)._asdict())


def test_half_precision_that_overflows_says_so():
    with pytest.raises(ValueError, match="masks: sample 1 .*float16 ends at 65504: use bfloat16 or float32"):
        refuse_non_finite({"masks": torch.tensor([1.0, 7e4]).half()[:, None]})


def test_looking_at_finite_tensors_waits_for_the_device_once():
    """Each written token is looked at, and a GPU waits for Python meanwhile."""
    values = {"a": torch.randn(2, 7, 3), "b": torch.full((2, 5), 3e38), "c": torch.full((2,), 6e4).half(), "d": None}
    values["c"][1] = -0.0
    with OperatorsCalled() as called:
        refuse_non_finite(values, token_mask=torch.ones(2, 7))
    assert called.times["_local_scalar_dense"] == 1
    assert called.times.total() <= 3 * len(values) + 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite_is_found_among_many(value, dtype):
    values = torch.randn(3, 1000).to(dtype)
    values[2, 999] = value
    with pytest.raises(ValueError, match="^x: sample 2 holds NaN"):
        refuse_non_finite({"fine": torch.ones(3), "x": values})
