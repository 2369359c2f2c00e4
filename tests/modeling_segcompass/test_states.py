"""States belong to one call: kept apart between threads, read from whatever MLLM is there, and no hook stays behind."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from segcompass.modeling_segcompass.states import ReasoningStates, StateRecorder, open_recorder
from tests.support.scripted import INSTRUCTIONS, Script, lively_segcompass, noise_images
from tests.support.tiny import BACKBONES

RESPONSES = ["<think>left of it</think><REF_POS><REF_POS><REF_POS>", "<think>right side</think><REF_POS><REF_POS>"]


@pytest.fixture(scope="module", params=BACKBONES)
def parts(request):
    return lively_segcompass(request.param)


def question(processor, number):
    return processor(images=noise_images()[number], text=INSTRUCTIONS[number])


def hooks(model):
    """How many hooks of ours there are; transformers leaves some of its own."""
    found = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return sum(isinstance(getattr(hook, "__self__", None), StateRecorder) for hook in found)


class InStep(Script):
    """A script whose writer waits at each token until the other thread has come as far."""

    barrier = None

    def __call__(self, input_ids, scores):
        self.barrier.wait(timeout=30)
        return super().__call__(input_ids, scores)


def test_two_calls_at_once_each_get_their_own_states():
    model, processor = lively_segcompass("llava")
    responses = [RESPONSES[0], RESPONSES[0].replace("left", "near")]  # of one length, so that both keep in step

    def answer(number, script):
        script = script(processor.tokenizer, [responses[number]])
        return model.segment(**question(processor, number), logits_processor=[script], max_new_tokens=60)

    alone = [answer(number, Script) for number in (0, 1)]
    assert (alone[0].heatmaps - alone[1].heatmaps).abs().max() > 0.1
    InStep.barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda number: answer(number, InStep), (0, 1)))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one.sequences, other.sequences)
        assert torch.equal(one.pred_masks, other.pred_masks)
    assert hooks(model) == 0


def test_many_forwards_in_two_threads_equal_single_ones(parts):
    model, processor = parts
    inputs = [
        processor(images=noise_images()[number], text=INSTRUCTIONS[number], response=RESPONSES[number])
        for number in (0, 1)
    ]

    @torch.no_grad()
    def masks(number):
        return model(**inputs[number % 2]).pred_masks

    alone = [masks(number) for number in (0, 1)]
    with ThreadPoolExecutor(2) as threads:
        for number, found in enumerate(threads.map(masks, range(20))):
            assert torch.equal(found, alone[number % 2])
    assert hooks(model) == 0


def test_forty_generations_from_two_threads_equal_forty_single_ones(parts):
    """Two images of unlike sizes, so that Qwen2.5-VL's position offsets differ between the calls that meet."""
    model, processor = parts
    responses = ["<think>a</think><REF_POS><REF_POS>", "<think>bcd</think><REF_POS><REF_POS><REF_POS>"]

    def answer(number):
        question_number, written_by = number % 2, number // 2 % 2
        script = [[], [Script(processor.tokenizer, [responses[question_number]])]][written_by]
        return model.segment(**question(processor, question_number), logits_processor=script, max_new_tokens=12)

    alone = [answer(number) for number in range(4)]
    assert not torch.equal(alone[0].sequences, alone[1].sequences)
    assert alone[2].slot_mask.sum() == 2 and alone[3].slot_mask.sum() == 3
    with ThreadPoolExecutor(2) as threads:
        for number, found in enumerate(threads.map(answer, range(40))):
            expected = alone[number % 4]
            assert torch.equal(found.sequences, expected.sequences)
            assert torch.equal(found.pred_masks, expected.pred_masks)
            assert torch.equal(found.slot_mask, expected.slot_mask)
    assert hooks(model) == 0


def test_one_who_leaves_in_the_middle_of_an_answer_breaks_no_other_answer(parts):
    """A streamer's consumer that raises ends its own call only."""
    model, processor = parts

    def answer(**options):
        script = [Script(processor.tokenizer, ["<think>bcd</think><REF_POS><REF_POS>"])]
        return model.segment(**question(processor, 1), logits_processor=script, max_new_tokens=12, **options)

    class Leaves:
        def __init__(self):
            self.heard = 0

        def put(self, value):
            self.heard += 1
            if self.heard == 4:
                raise BrokenPipeError("left")

        def end(self):
            pass

    expected = answer()
    for _ in range(3):
        with ThreadPoolExecutor(2) as threads:
            left = threads.submit(lambda: answer(streamer=Leaves()))
            other = threads.submit(answer)
            with pytest.raises(BrokenPipeError):
                left.result()
            assert torch.equal(other.result().pred_masks, expected.pred_masks)
    assert torch.equal(answer().pred_masks, expected.pred_masks) and hooks(model) == 0


def test_no_hook_stays_behind_when_a_call_fails(parts):
    model, processor = parts
    inputs = processor(images=noise_images()[0], text="it", response="no")
    with pytest.raises(IndexError):
        model(**{**inputs, "input_ids": inputs["input_ids"] + 10_000})
    assert hooks(model) == 0 and open_recorder(model.mllm) is None


def test_copies_of_the_model_and_another_mllm_in_it_work(parts):
    model, processor = parts
    inputs = processor(images=noise_images()[0], text=INSTRUCTIONS[0], response=RESPONSES[0])
    with torch.no_grad():
        expected = model(**inputs).pred_masks
        assert torch.equal(copy.copy(model)(**inputs).pred_masks, expected)
        own, model.mllm = model.mllm, copy.deepcopy(model.mllm)
        try:
            assert torch.equal(model(**inputs).pred_masks, expected)
            for weight in model.mllm.parameters():
                weight.mul_(0.5)
            assert not torch.equal(model(**inputs).pred_masks, expected)
        finally:
            model.mllm = own


def test_a_recorder_hears_its_own_model_only_and_not_what_an_inner_one_hears(parts):
    model, processor = parts
    inputs = processor(images=noise_images()[0], text=INSTRUCTIONS[0], response=RESPONSES[0])
    other, _ = lively_segcompass("llava")
    with torch.no_grad(), model.reading_states() as recorder:
        assert hooks(model) == 3
        assert open_recorder(model.mllm) is recorder and open_recorder(other.mllm) is None
        model(**inputs)  # opens its own
        assert recorder.z == recorder.last_hidden == []
        model.mllm(**model.backbone.mllm_inputs(model.mllm, inputs))
    assert len(recorder.z) == len(recorder.last_hidden) == 1 and recorder.states is None


def test_kept_states_decode_to_what_segment_gives(parts):
    model, processor = parts
    inputs = processor(images=noise_images()[:2], text=INSTRUCTIONS[:2])

    def script():
        return dict(logits_processor=[Script(processor.tokenizer, RESPONSES)], max_new_tokens=60)

    outputs = model.segment(**inputs, **script())
    sequences, states = model.reason(**inputs, **script())
    assert isinstance(states, ReasoningStates) and torch.equal(sequences, outputs.sequences)
    with torch.no_grad():
        assert torch.equal(model.decode_masks(**states._asdict()).pred_masks, outputs.pred_masks)
        for row in (0, 1):
            alone = model.decode_masks(**states.rows([row]).trimmed()._asdict())
            torch.testing.assert_close(alone.pred_masks[0], outputs.pred_masks[row], atol=1e-4, rtol=0)
    assert states.rows([0]).trimmed().z.shape[1] <= states.z.shape[1]
    shared = states._replace(image_embeddings=states.image_embeddings[:1])
    assert shared.rows([1]).image_embeddings is shared.image_embeddings
