"""Questions that come as JSON: answered together as alone, whatever the family, with interventions and by whoever is
left."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from segcompass.modeling_segcompass import ReasoningSegmentationPipeline
from segcompass.modeling_segcompass.answering import Limits, Question, Refusal, answer_questions, read_question
from tests.support.scripted import INSTRUCTIONS, Script, lively_segcompass, noise_images
from tests.support.tiny import BACKBONES

TEXTS = ["<think>a</think>", "<think>left of it</think>", "<think>the ring, and the ball</think>", "none"]
TEXTS = [text + "<REF_POS>" * 3 for text in TEXTS[:3]] + TEXTS[3:]
BY_LENGTH = sorted(range(4), key=lambda number: -len(INSTRUCTIONS[number]))


def encoded(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(params=BACKBONES)
def scripted(request):
    """A tiny model that answers each of the four instructions with its own text, together or alone."""
    model, processor = lively_segcompass(request.param)
    model.concept_labels = {}
    reason = model.reason

    def write(**inputs):
        prompts = processor.batch_decode(inputs["input_ids"])
        asked = [next(number for number in BY_LENGTH if INSTRUCTIONS[number] in prompt) for prompt in prompts]
        script = Script(processor.tokenizer, [TEXTS[number] for number in asked])
        return reason(**inputs, logits_processor=[script], max_new_tokens=60)

    model.reason = write
    return model.eval(), processor


def questions(model, **fields):
    return [
        read_question({"image": encoded(image), "instruction": text, "threshold": 0, **fields}, model)
        for image, text in zip(noise_images(), INSTRUCTIONS, strict=True)
    ]


def test_together_they_get_what_each_gets_alone(scripted):
    model, processor = scripted
    asked = questions(model)
    together = answer_questions(model, processor, asked)
    for question, answer, text in zip(asked, together, TEXTS, strict=True):
        (alone,) = answer_questions(model, processor, [question])
        assert answer["text"] == alone["text"] == text
        assert answer["size"] == [question.image.height, question.image.width]
        for ours, theirs in zip(answer["instances"], alone["instances"], strict=True):
            assert (ours["slot"], ours["box"]) == (theirs["slot"], theirs["box"])
            masks = [coco_mask.decode(one["segmentation"]) for one in (ours, theirs)]
            assert (masks[0] != masks[1]).mean() < 1e-3  # a pixel at a tie, where padding rounds the last bit
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
    assert [len(answer["instances"]) for answer in together] == [3, 3, 3, 0]
    assert together[3]["verdict"].startswith("no mask") and not together[3]["no_target"]


def test_each_question_has_its_own_interventions_and_its_own_errors(scripted):
    model, processor = scripted
    asked = questions(model)
    plain = answer_questions(model, processor, asked)
    heaviest = plain[1]["instances"][0]["concepts"][0]["index"]
    asked[1].steering = {"concept_scale": {heaviest: 0.0}}
    asked[2] = Question(asked[2].image, "the " * 3000)
    asked.append(Question(Image.new("RGB", (9000, 2)), INSTRUCTIONS[0]))
    answers = answer_questions(model, processor, asked)
    listed = {one["index"] for each in answers[1]["instances"] for one in each["concepts"]}
    assert heaviest not in listed and answers[0]["text"] == plain[0]["text"]
    assert answers[0]["instances"][0]["box"] == plain[0]["instances"][0]["box"]
    assert isinstance(answers[2], Refusal) and answers[2].status == 422 and "tokens" in str(answers[2])
    assert isinstance(answers[4], Refusal) and "9000 x 2 pixels" in str(answers[4])


def test_who_has_left_gets_nothing_and_the_text_of_the_others_grows(scripted):
    model, processor = scripted
    asked = questions(model)
    grown, tokens = [], []
    asked[0].has_left = lambda: tokens.append(1) or len(tokens) > 2
    asked[2].on_text = grown.append
    answers = answer_questions(model, processor, asked)
    assert answers[0] is None and [answer["text"] for answer in answers[1:]] == TEXTS[1:]
    assert len(set(grown)) > 5 and grown[-1] == TEXTS[2]
    assert all(after.startswith(before) for before, after in zip(grown, grown[1:], strict=False))


def test_the_pipeline_answers_a_request(scripted):
    model, processor = scripted
    pipe = ReasoningSegmentationPipeline(model=model, processor=processor)
    request = {"image": encoded(noise_images()[1]), "instruction": INSTRUCTIONS[1]}
    answer = pipe.answer_request({"inputs": request, "parameters": {"threshold": 0}})
    assert answer == answer_questions(model, processor, [questions(model)[1]])[0]
    with pytest.raises(ValueError, match="threshold is 7; it must be a number from 0 to 1"):
        pipe.answer_request({**request, "threshold": 7})


def test_an_image_is_read_upright_and_no_other_program_reads_it(scripted):
    model, _ = scripted
    file, photo = io.BytesIO(), Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(file, "JPEG", exif=exif)
    assert read_question({"image": file.getvalue(), "instruction": "it"}, model).image.size == (20, 30)
    text = base64.b64encode(file.getvalue()).decode()
    assert text.startswith("/9j/")  # which looks like a path
    assert read_question({"image": text, "instruction": "it"}, model).image.size == (20, 30)
    refused = {
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n": "cannot be read as an image",
        "/9j/../etc/passwd": "base64|cannot be read",
        "C:\\x.png": "an address or a path",
        "data:image/png,abc": "without base64",
    }
    for image, said in refused.items():
        with pytest.raises(Refusal, match=said):
            read_question({"image": image, "instruction": "it"}, model)
    with pytest.raises(Refusal, match="20 x 30 pixels|30 x 20 pixels") as large:
        read_question({"image": text, "instruction": "it"}, model, Limits(pixels=500))
    assert large.value.status == 413 and large.value.as_json()["error"]["needed"] == "the limit is 500 pixels"
