"""Tiny saved models for the scripts, and a way to make them write a given response."""

import pytest
from transformers import AutoModelForImageTextToText, AutoTokenizer

from segcompass.modeling_segcompass import SegCompassModel
from tests.support.scripted import Script, lively_segcompass
from tests.support.tiny import BACKBONES


@pytest.fixture
def writes(monkeypatch):
    """Makes every model loaded from now on write this response: a tiny random one writes no sense by itself."""

    def force(response, processor):
        load = SegCompassModel.from_pretrained

        def load_and_force(*args, **kwargs):
            model = load(*args, **kwargs)
            generate = model.mllm.generate
            model.mllm.generate = lambda input_ids, **inputs: generate(
                input_ids=input_ids,
                logits_processor=[Script(processor.tokenizer, [response] * len(input_ids))],
                **inputs,
            )
            return model

        monkeypatch.setattr(SegCompassModel, "from_pretrained", load_and_force)

    return force


@pytest.fixture(scope="module", params=BACKBONES)
def saved(request, tmp_path_factory):
    """A tiny model's folder and its processor."""
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = lively_segcompass(request.param, num_slots=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, processor


@pytest.fixture
def says(monkeypatch):
    """Makes every MLLM that is loaded from now on write the given answers, one per row of a batch, and over again."""
    answers = []
    load = AutoModelForImageTextToText.from_pretrained

    def load_and_force(path, **kwargs):
        model, info = load(path, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(path)
        generate = model.generate

        def scripted(input_ids, **inputs):
            rows = [answers[row % len(answers)] for row in range(len(input_ids))]
            return generate(input_ids=input_ids, logits_processor=[Script(tokenizer, rows)], **inputs)

        model.generate = scripted
        return model, info

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", load_and_force)

    def script(*texts):
        answers[:] = texts

    return script
