"""Tiny saved models for the scripts, and a way to make them write a given response."""

import pytest
import torch

from modeling_segcompass import SegCompassModel
from tests.tiny import BACKBONES, tiny_segcompass


class ForceTokens:
    """A logits processor that makes the model write the given ids after the prompt."""

    def __init__(self, ids, prompt_length):
        self.ids, self.prompt_length = ids, prompt_length

    def __call__(self, input_ids, scores):
        step = min(input_ids.shape[1] - self.prompt_length, len(self.ids) - 1)
        scores = torch.full_like(scores, float("-inf"))
        scores[:, self.ids[step]] = 0
        return scores


@pytest.fixture
def writes(monkeypatch):
    """Makes every model loaded from now on write this response: a tiny random one writes no sense by itself."""

    def force(response, processor):
        ids = processor.tokenizer(response, add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id]
        load = SegCompassModel.from_pretrained

        def load_and_force(*args, **kwargs):
            model = load(*args, **kwargs)
            generate = model.mllm.generate
            model.mllm.generate = lambda input_ids, **kwargs: generate(
                input_ids=input_ids, logits_processor=[ForceTokens(ids, input_ids.shape[1])], **kwargs
            )
            return model

        monkeypatch.setattr(SegCompassModel, "from_pretrained", load_and_force)

    return force


@pytest.fixture(scope="module", params=BACKBONES)
def saved(request, tmp_path_factory):
    """A tiny model's folder and its processor."""
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = tiny_segcompass(request.param, num_slots=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, processor
