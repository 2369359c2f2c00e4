"""Visitors of the Space: one who leaves, one who waits, too many, and what each may ask for.

The page's logic runs on a tiny model. Of gradio only the words it returns to the page are needed; where it is not
installed, plain objects stand for them.
"""

import gc
import importlib.util
import sys
import threading
import time
import types
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from segcompass.loading import load
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
        sys.modules["gradio"] = types.SimpleNamespace(**words, Request=object)
    spec = importlib.util.spec_from_file_location("space_app", ROOT / "hub_cards" / "space" / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    if stand_in:
        del sys.modules["gradio"]


def visitor(name):
    return types.SimpleNamespace(session_hash=name)


def make_demo(app, backbone="llava"):
    """A demo of a tiny model that writes `ANSWER`; `demo.passes` counts the tokens it has begun."""
    demo = app.Demo.__new__(app.Demo)
    demo.model, demo.processor = lively_segcompass(backbone)
    demo.line, demo.answers, demo._asking, demo.passes = app.Line(), app.Answers(), {}, []
    reason = demo.model.reason

    def scripted(**inputs):  # a tiny model writes no sense by itself
        inputs["stopping_criteria"].append(
            lambda ids, scores: demo.passes.append(1) or torch.zeros(len(ids), dtype=torch.bool)
        )
        script = Script(demo.processor.tokenizer, [ANSWER])
        return reason(**inputs, logits_processor=[script], max_new_tokens=60)

    demo.model.reason = scripted
    return demo


@pytest.fixture(scope="module")
def demo(app):
    return make_demo(app)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_next_visitor_gets_the_same_answer_after_one_who_left(app, backbone):
    demo = make_demo(app, backbone)
    image = noise_images()[1]
    alone = list(demo.ask(image, INSTRUCTIONS[2], 0.0))[-1]
    length = len(demo.passes)
    assert alone[0] == ANSWER and alone[2].startswith("3 instances")
    for _ in range(3):
        demo.passes.clear()
        first = demo.ask(noise_images()[0], INSTRUCTIONS[0], 0.0, visitor("first"))
        next(first)
        first.close()  # gradio closes the generator when the page is gone
        assert len(demo.passes) < length  # it did not go on to its end
        after = list(demo.ask(image, INSTRUCTIONS[2], 0.0, visitor("second")))[-1]
        assert after[0] == alone[0] and after[2] == alone[2] and (after[1] == alone[1]).all()


def test_a_closed_page_stops_its_answer_and_frees_what_it_left(demo):
    image = noise_images()[1]
    shown = list(demo.ask(image, INSTRUCTIONS[2], 0.0, visitor("a")))[-1]
    answer = weakref.ref(demo.answers.get("a", shown[4]))
    asking = demo.ask(image, INSTRUCTIONS[2], 0.0, visitor("a"))
    next(asking)
    demo.leave(visitor("a"))
    rest = list(asking)
    assert not any(isinstance(piece[2], str) for piece in rest)  # pieces of text at most, no verdict
    gc.collect()
    assert answer() is None and len(demo.answers) == 0
    assert not [thread for thread in threading.enumerate() if "write" in thread.name]


def test_concepts_of_a_grounded_model_have_names_and_their_own_place(app):
    demo = app.Demo.__new__(app.Demo)
    demo.model, demo.processor = load(ROOT / "examples" / "checkpoints" / "mini")
    demo.line, demo.answers, demo._asking = app.Line(), app.Answers(), {}
    image = Image.open(ROOT / "examples" / "scene.png").convert("RGB")
    *_, verdict, _, question, radio, _ = list(demo.ask(image, "find the blue star", 0.5))[-1]
    assert verdict.startswith("1 instance")
    choices = radio["choices"] if isinstance(radio, dict) else radio.choices
    name, concept = choices[0]
    assert name.startswith("blue, weight 0.")
    heat = np.asarray(demo.where(question, concept)[0], float)
    added = (heat - 0.35 * np.asarray(image, float)).sum(-1)  # what is drawn over the image
    y, x = np.unravel_index(added.argmax(), added.shape)
    assert 81 <= x <= 121 and 64 <= y <= 96, "on the star, whose box this is"
    assert demo.scale(question, concept, 0.0, 0.5)[1].startswith("no target")


def test_each_visitor_decodes_from_an_answer_of_its_own(demo, app):
    image, other = noise_images()[1], noise_images()[0]
    mine = list(demo.ask(image, INSTRUCTIONS[2], 0.0, visitor("mine")))[-1]
    theirs = list(demo.ask(other, INSTRUCTIONS[0], 0.0, visitor("theirs")))[-1]
    concept = mine[5]["choices"][0][1] if isinstance(mine[5], dict) else mine[5].choices[0][1]
    switched = demo.scale(mine[4], concept, 0.0, 0.0, visitor("mine"))
    assert (switched[0] != mine[1]).any()
    again = demo.restore(theirs[4], 0.0, visitor("theirs"))
    assert (again[0] == theirs[1]).all()
    assert (demo.restore(mine[4], 0.0, visitor("mine"))[0] == mine[1]).all()
    for stranger in (mine[4], "0", ""):
        with pytest.raises(Exception, match="put away"):
            demo.restore(stranger, 0.0, visitor("theirs"))


def test_answers_are_capped_in_number_bytes_and_time(app):
    class Kept:
        def __init__(self, size=1):
            self.size, self.name, self.used = size, "name", time.monotonic()

        def bytes(self):
            return self.size

    answers = app.Answers(limit=3, limit_bytes=100, seconds=60)
    for number in range(1000):
        answers.put(f"visitor {number}", Kept())
    assert len(answers) == 3
    answers.put("large", Kept(99))
    assert len(answers) == 2  # it and the newest of the others
    answers.put("larger", Kept(1000))
    assert len(answers) == 1  # the newest is kept however large
    answers.get("larger", "name").used -= 61
    answers.put("later", Kept())
    assert len(answers) == 1
    answers.forget("later")
    assert len(answers) == 0


def test_the_line_is_limited_and_serves_in_order(app):
    line = app.Line(at_once=1, waiting=2)
    first, second, third = (line.enter() for _ in range(3))
    with pytest.raises(Exception, match="2 questions are waiting already"):
        line.enter()
    assert line.wait(first, 0) and not line.wait(third, 0) and line.before(third) == 2
    line.leave(second)  # one who waited no longer
    line.leave(first)
    assert line.wait(third, 0)


def test_a_visitor_who_waits_too_long_is_told(demo, app, monkeypatch):
    monkeypatch.setattr(app, "PATIENCE", 0.05)
    ticket = demo.line.enter()
    try:
        with pytest.raises(Exception, match="so many are asking"):
            for said in demo.ask(noise_images()[0], "it", 0.0, visitor("late")):
                assert said[0] == "1 question before yours …"
    finally:
        demo.line.leave(ticket)
    assert demo.line._tickets == []


def test_what_is_too_much_is_refused_before_it_waits(demo, app, tmp_path, monkeypatch):
    image = noise_images()[0]
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(tmp_path / "large.png")
    monkeypatch.setattr(app, "MAX_PIXELS", 3000)
    (tmp_path / "odd.png").write_bytes(b"<svg onload=alert(1)>")
    refused = {
        "limit is 1,000": (image, "x" * 1001, 0.5),
        "is no text": (image, 7, 0.5),
        "The confidence is nan": (image, "it", float("nan")),
        "The confidence is &#x27;&lt;b&gt;": (image, "it", "<b>"),
        "No image yet": (None, "it", 0.5),
        "60 x 60 pixels, the limit is 3,000": (str(tmp_path / "large.png"), "it", 0.5),
        "the image cannot be read": (str(tmp_path / "odd.png"), "it", 0.5),
    }
    for said, question in refused.items():
        with pytest.raises(Exception, match=said):
            list(demo.ask(*question, visitor("odd")))
    assert demo.line._tickets == [] and demo._asking == {}
    shown = list(demo.ask(image, "it", 0.0, visitor("b")))[-1]
    for concept, factor in ((10**9, 0.0), ("0", 0.0), (None, 0.0), (True, 0.0), (0, float("nan"))):
        with pytest.raises(Exception, match="none of this answer|choose a number"):
            demo.scale(shown[4], concept, factor, 0.5, visitor("b"))
