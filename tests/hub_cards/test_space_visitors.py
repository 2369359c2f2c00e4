"""A visitor of the Space who leaves in the middle of an answer: the model stops, and nobody else's answer changes.

The page's logic runs on a tiny model. Of gradio only the words it returns to the page are needed; where it is not
installed, plain objects stand for them.
"""

import importlib.util
import sys
import threading
import types

import pytest
import torch

from tests.support.hub_client import ROOT
from tests.support.scripted import INSTRUCTIONS, Script, lively_segcompass, noise_images
from tests.support.tiny import BACKBONES

ANSWER = "<think>left of it</think><REF_POS><REF_POS><REF_POS>"


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("matplotlib")
    stand_in = importlib.util.find_spec("gradio") is None
    if stand_in:
        words = {"skip": lambda: None, "Radio": dict, "Slider": dict, "Error": RuntimeError, "Blocks": object}
        sys.modules["gradio"] = types.SimpleNamespace(**words)
    spec = importlib.util.spec_from_file_location("space_app", ROOT / "hub_cards" / "space" / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    if stand_in:
        del sys.modules["gradio"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_next_visitor_gets_the_same_answer_after_one_who_left(app, backbone):
    demo = app.Demo.__new__(app.Demo)
    demo.model, demo.processor = lively_segcompass(backbone)
    reason, passes = demo.model.reason, []

    def scripted(**inputs):  # a tiny model writes no sense by itself
        inputs["stopping_criteria"].append(lambda ids, scores: passes.append(1) or torch.zeros(1, dtype=torch.bool))
        script = Script(demo.processor.tokenizer, [ANSWER])
        return reason(**inputs, logits_processor=[script], max_new_tokens=60)

    demo.model.reason = scripted
    image = noise_images()[1]
    alone = list(demo.ask(image, INSTRUCTIONS[2], 0.0))[-1]
    length = len(passes)
    assert alone[0] == ANSWER and alone[2].startswith("3 instances")
    for _ in range(3):
        passes.clear()
        first = demo.ask(noise_images()[0], INSTRUCTIONS[0], 0.0)
        next(first)
        first.close()  # gradio closes the generator when the page is gone
        after = list(demo.ask(image, INSTRUCTIONS[2], 0.0))[-1]
        assert after[0] == alone[0] and after[2] == alone[2] and (after[1] == alone[1]).all()
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join(30)
        assert len(passes) < 2 * length  # the one that was left did not go on to its end
