"""`pipeline("reasoning-segmentation")` gives what processor and model give by hand, for one, many and streamed rows."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import pipeline

from tests.support.scripted import INSTRUCTIONS, Script, lively_segcompass, noise_images
from tests.support.tiny import BACKBONES

TASK = "reasoning-segmentation"
ANSWER = "<think>left of it</think><REF_POS><REF_POS><REF_POS>"
CONVENTION = {"score", "label", "mask"}


@pytest.fixture(scope="module", params=BACKBONES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = lively_segcompass(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write(model, processor, response=ANSWER):
    """Make the model write this response to whatever it is asked: a tiny random one writes no sense by itself."""
    generate = type(model.mllm).generate

    def forced(input_ids, **inputs):
        script = Script(processor.tokenizer, [response] * len(input_ids))
        return generate(model.mllm, input_ids=input_ids, logits_processor=[script], **inputs)

    model.mllm.generate = forced


@pytest.fixture
def pipe(saved):
    loaded = pipeline(TASK, model=str(saved), trust_remote_code=True, device="cpu")
    write(loaded.model, loaded.processor)
    return loaded


def same(ours, theirs):
    assert len(ours) == len(theirs) > 0 and ours.text == theirs.text
    for one, other in zip(ours, theirs, strict=True):
        assert one["slot"] == other["slot"] and one["box"] == other["box"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert np.array_equal(np.asarray(one["mask"]), np.asarray(other["mask"]))


def test_one_question_gives_the_masks_that_processor_and_model_give(pipe):
    image, text = noise_images()[1], INSTRUCTIONS[0]
    answer = pipe(image, text, threshold=0.0)
    inputs = pipe.processor(images=image, text=text)
    outputs = pipe.model.segment(**inputs)
    by_hand = pipe.processor.post_process_instance_segmentation(outputs, 0.0, target_sizes=inputs["original_sizes"])[0]
    assert answer.text == ANSWER and not answer.no_target
    assert len(answer) == len(by_hand["scores"]) == 3
    assert [segment["score"] for segment in answer] == sorted(by_hand["scores"].tolist(), reverse=True)
    for segment in answer:
        assert segment.keys() >= CONVENTION and "concepts" not in segment
        assert segment["label"] == text and segment["mask"].mode == "L" and segment["mask"].size == image.size
        mask = by_hand["masks"][by_hand["slots"].tolist().index(segment["slot"])].numpy()
        assert np.array_equal(np.asarray(segment["mask"]), mask * np.uint8(255))


def test_a_batch_answers_as_single_questions_do(pipe):
    images = noise_images()
    batched = pipe(images, INSTRUCTIONS, threshold=0.0, batch_size=3)
    assert len(batched) == len(images)
    for answer, image, text in zip(batched, images, INSTRUCTIONS, strict=True):
        same(answer, pipe(image, text, threshold=0.0))


def test_one_image_goes_with_many_instructions_and_the_other_way_round(pipe):
    image = noise_images()[0]
    labels = [s["label"] for a in pipe(image, INSTRUCTIONS[:2], threshold=0.0) for s in a]
    assert set(labels) == set(INSTRUCTIONS[:2])
    answers = pipe(noise_images()[:2], "a mug", threshold=0.0)
    assert [answer[0]["mask"].size for answer in answers] == [picture.size for picture in noise_images()[:2]]


def test_a_data_set_is_streamed_not_read_ahead(pipe):
    seen = []

    def rows():
        for image, text in zip(noise_images(), INSTRUCTIONS, strict=True):
            seen.append(text)
            yield {"image": image, "instruction": text}

    answers = pipe(rows(), threshold=0.0, batch_size=2)
    first = next(answers)
    assert first[0]["label"] == INSTRUCTIONS[0] and len(seen) <= 3
    assert len(list(answers)) == 3
    table = Dataset.from_dict({"image": noise_images(), "instruction": INSTRUCTIONS})
    streamed = pipe(table, threshold=0.0)
    same(next(streamed), first)


def test_explain_names_the_concepts_that_weigh_most(pipe):
    image, text = noise_images()[0], INSTRUCTIONS[0]
    answer = pipe(image, text, threshold=0.0, explain=True)
    inputs = pipe.processor(images=image, text=text)
    outputs = pipe.model.segment(**inputs)
    for segment in answer:
        concepts = segment["concepts"]
        weights = [concept["weight"] for concept in concepts]
        assert weights == sorted(weights, reverse=True) and min(weights) > 0
        heaviest = outputs.concept_weights[0, segment["slot"]].argmax()
        assert concepts[0]["index"] == int(outputs.concept_indices[0, heaviest])
    off = {concepts[0]["index"]: 0.0}
    changed = pipe(image, text, threshold=0.0, concept_scale=off)
    assert [s["score"] for s in changed] != [s["score"] for s in answer]


def test_no_answer_and_nothing_there_are_told_apart(pipe):
    image = noise_images()[0]
    unsure = pipe(image, "it", threshold=1.0)
    assert list(unsure) == [] and unsure.no_target and unsure.text == ANSWER
    write(pipe.model, pipe.processor, "no idea")
    malformed = pipe(image, "it")
    assert list(malformed) == [] and not malformed.no_target and malformed.text == "no idea"


def test_bad_calls_say_what_to_give(pipe):
    image = noise_images()[0]
    for arguments, message in (
        ((image,), "no instruction"),
        (([image], ["a", "b"]), "1 images but 2 instructions"),
        (([], []), "0 images"),
        (([image], [""]), "say what to segment"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(*arguments)
    for options, told in (
        ({"batch_size": 0}, "batch_size is 0; .* use 1 or more"),
        ({"explain": True, "query_source": "tokens"}, "explain is set with query_source='tokens'"),
        ({"num_beams": 2}, "num_beams is 2"),
    ):
        with pytest.raises(ValueError, match=told):
            pipe([image], ["it"], **options)
    with pytest.raises(ValueError, match="must hold 'image' and 'instruction'"):
        list(pipe([{"image": image}]))


def test_installed_package_builds_it_around_a_loaded_model():
    model, processor = lively_segcompass("llava")
    write(model, processor)
    answer = pipeline(TASK, model=model, processor=processor, device="cpu")(noise_images()[0], "it")
    assert answer.text == ANSWER


# -- the same questions in the words of another family --------------------------------------------------------------


@pytest.fixture(params=BACKBONES)
def answering(request):
    """A tiny model that writes the answer above, and its processor."""
    model, processor = lively_segcompass(request.param)
    write(model, processor)
    return model, processor


def test_predict_forward_serves_a_program_written_for_sa2va(answering):
    model, processor = answering
    image = noise_images()[1]
    question = {"image": image, "text": "<image>the red box", "past_text": "", "mask_prompts": None}
    answer = model.predict_forward(**question, processor=processor, threshold=0.0)
    assert answer.keys() == {"prediction", "prediction_masks"}
    assert answer["prediction"] == "<think>left of it</think>" + "[SEG]" * 3
    canvas = np.zeros((image.height, image.width), bool)
    for mask in answer["prediction_masks"]:  # as such programs do: the first frame of each mask
        assert mask.dtype == bool and mask.shape == (1, image.height, image.width)
        canvas |= mask[0]
    inputs = processor(images=image, text="the red box")
    union = processor.post_process_semantic_segmentation(
        model.segment(**inputs), target_sizes=inputs["original_sizes"], threshold=0.0
    )[0]
    assert np.array_equal(canvas, union.numpy()) and canvas.any()
    nothing = model.predict_forward(image=image, text="it", tokenizer=processor, threshold=1.0)
    assert nothing["prediction_masks"] == [] and "[SEG]" not in nothing["prediction"]


def test_predict_forward_refuses_what_it_cannot_do(answering):
    model, processor = answering
    image = Image.new("RGB", (32, 32))
    for keyword, value in (("video", [image]), ("past_text", "hello"), ("mask_prompts", [1])):
        with pytest.raises(ValueError, match=keyword):
            model.predict_forward(image=image, text="it", processor=processor, **{keyword: value})
    with pytest.raises(ValueError, match="pass AutoProcessor"):
        model.predict_forward(image=image, text="it", tokenizer=processor.tokenizer)


def test_the_processor_of_another_model_is_refused():
    """Its tokens have other ids: no slot would be found, and the answer would be that nothing is there."""
    model, _ = lively_segcompass("llava")
    for backbone, changes, message in (
        ("llava", {"num_slots": 2}, "num_slots is 2 and 3"),
        ("qwen2_5_vl", {}, "image_token_id is"),
    ):
        _, processor = lively_segcompass(backbone, **changes)
        with pytest.raises(ValueError, match=f"processor and model do not fit each other .{message}"):
            pipeline(TASK, model=model, processor=processor, device="cpu")
        with pytest.raises(ValueError, match="do not fit"):
            model.predict_forward(image=noise_images()[0], text="it", processor=processor)
