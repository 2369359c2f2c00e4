"""Visitors of the Space: one who leaves, one who waits, too many, and what each may ask for.

The page's logic runs on a tiny model. Of gradio only its error is needed; where it is not installed, plain objects
stand for it.
"""

import copy
import gc
import threading
import time
import types
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from segcompass.loaders.scene_drawing import COLOURS, SHAPES, SIZES, draw_scene
from segcompass.loaders.scene_questions import KINDS, ask
from segcompass.loading import load
from tests.support.hub_client import ROOT
from tests.support.scripted import INSTRUCTIONS, Script, lively_segcompass, noise_images
from tests.support.space import borrowed_space, demo_of
from tests.support.tiny import BACKBONES

ANSWER = "<think>left of it</think><REF_POS><REF_POS><REF_POS>"


@pytest.fixture(scope="module")
def space():
    with borrowed_space() as modules:
        yield modules


def visitor(name):
    return types.SimpleNamespace(session_hash=name)


def make_demo(space, backbone="llava"):
    """A demo of a tiny model that writes `ANSWER`; `demo.passes` counts the tokens it has begun."""
    demo = demo_of(space, *lively_segcompass(backbone))
    demo.passes = []
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
def demo(space):
    return make_demo(space)


@pytest.fixture(scope="module")
def mini(space):
    return demo_of(space, *load(ROOT / "examples" / "checkpoints" / "mini"))


def same_masks(first, second):
    """Whether two accounts show the same masks, and the same as changed."""
    sides = [(first.slots, second.slots), (list(first.after.values()), list(second.after.values()))]
    return all(
        [one.number for one in left] == [one.number for one in right]
        and all((one.mask == other.mask).all() for one, other in zip(left, right, strict=True))
        for left, right in sides
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_next_visitor_gets_the_same_answer_after_one_who_left(space, backbone):
    demo = make_demo(space, backbone)
    image = noise_images()[1]
    alone = list(demo.ask(image, INSTRUCTIONS[2], 0.0))[-1]
    length = len(demo.passes)
    assert alone.text == ANSWER and alone.why.verdict.startswith("3 masks")
    for _ in range(3):
        demo.passes.clear()
        first = demo.ask(noise_images()[0], INSTRUCTIONS[0], 0.0, visitor("first"))
        next(first)
        first.close()  # gradio closes the generator when the page is gone
        assert len(demo.passes) < length  # it did not go on to its end
        after = list(demo.ask(image, INSTRUCTIONS[2], 0.0, visitor("second")))[-1]
        assert after.text == alone.text and after.why.verdict == alone.why.verdict
        assert same_masks(after.why, alone.why)


def test_a_closed_page_stops_its_answer_and_frees_what_it_left(demo):
    image = noise_images()[1]
    shown = list(demo.ask(image, INSTRUCTIONS[2], 0.0, visitor("a")))[-1].question
    answer = weakref.ref(demo.answers.get("a", shown))
    asking = demo.ask(image, INSTRUCTIONS[2], 0.0, visitor("a"))
    next(asking)
    demo.leave(visitor("a"))
    rest = list(asking)
    assert not any(piece.why for piece in rest)  # pieces of text at most, no masks
    gc.collect()
    assert answer() is None and len(demo.answers) == 0
    assert not [thread for thread in threading.enumerate() if "write" in thread.name]


def test_words_concepts_and_places_of_a_grounded_model_belong_together(space, mini):
    image = Image.open(ROOT / "examples" / "scene.png").convert("RGB")
    shown = list(mini.ask(image, "find the blue star", 0.5))[-1]
    (slot,) = shown.why.slots
    assert slot.kept and shown.why.verdict.startswith("1 mask")
    blue = slot.concepts[0]
    assert blue.name == "blue" and blue.kind == "look"
    assert blue.share + sum(each.share for each in slot.concepts[1:]) + slot.rest == pytest.approx(1, abs=1e-4)
    assert {"blue", "star"} & {shown.why.words[word].strip() for word in blue.words}
    row, column = np.unravel_index(blue.heat.argmax(), blue.heat.shape)
    x, y = (column + 0.5) / blue.heat.shape[1] * 128, (row + 0.5) / blue.heat.shape[0] * 128
    assert 81 <= x <= 121 and 64 <= y <= 96, "on the star, whose box this is"
    off = mini.change(shown.question, shown.answer.concepts.index("blue"), 0.0, 0.5)
    assert not off.why.after[slot.number].kept
    assert off.why.moved(slot).startswith("blue off: no mask is left (")
    assert off.why.verdict == "After: mask 1: no mask left."
    again = mini.restore(shown.question, 0.5)
    assert not again.why.after and same_masks(again.why, shown.why)


def test_a_swapped_concept_moves_the_mask_to_the_other_thing(mini):
    image = Image.open(ROOT / "examples" / "scene.png").convert("RGB")
    shown = list(mini.ask(image, "find the blue star", 0.5))[-1]
    star = np.zeros((128, 128), bool)
    star[64:96, 81:121] = True  # its box
    moved = mini.change(shown.question, shown.answer.concepts.index("blue"), "purple", 0.5)
    before, after = moved.why.slots[0], moved.why.after[moved.why.slots[0].number]
    assert (before.mask & star).sum() > 0.9 * before.mask.sum()
    assert after.mask.any() and not (after.mask & star).any()
    assert moved.why.changes == {"blue": "purple"}
    blue, purple = (next(each for each in after.concepts if each.key == key) for key in ("blue", "purple"))
    assert purple.share > 0.2 and purple.off is not None and blue.share == 0  # what is gone can still be chosen
    row, column = np.unravel_index(blue.heat.argmax(), blue.heat.shape)
    height, width = blue.heat.shape
    assert not star[int((row + 0.5) / height * 128), int((column + 0.5) / width * 128)]
    assert sum(each.share for each in after.concepts) + after.rest == pytest.approx(1, abs=1e-4)
    assert moved.why.verdict == "After: mask 1: it moves to C2."
    assert "blue" in moved.answer.concepts
    key = next(each.key for each in before.concepts if each.kind == "place")
    place = shown.answer.concepts.index(key)
    both = mini.change(shown.question, place, 0.0, 0.5)
    assert both.why.names["blue"] == "blue" and list(both.why.changes) == ["blue", key]
    one = mini.restore(shown.question, 0.5, concept=place)  # the other change stays
    assert one.why.changes == {"blue": "purple"} and same_masks(one.why, moved.why)
    with pytest.raises(Exception, match="none of this answer"):
        mini.restore(shown.question, 0.5, concept=99)


def test_names_say_what_a_concept_means_or_its_number(space):
    labels = {3: ", (word)", 5: ", (word)", 6: "A (word)", 7: "is (word)", 8: "(word)", 9: "./the (word)", 10: "C/is"}
    names = [space.why.shown_name(label, labels) for label in labels.values()]
    assert names[:4] == ["unnamed 3 (at “,”)", "unnamed 3 (at “,”)", "word “A”", "unnamed 7 (at “is”)"]
    assert names[4:] == ["unnamed 8", "unnamed 9 (at “./the”)", "C/is"] and space.why.shown_name(2, {}) == "unnamed 2"
    board = space.small_model.BOARD
    assert [space.why.shown_name(label, labels, board) for label in ("A (word)", "C/is")] == ["column A", "C/is"]
    assert space.why.shown_name("C/large (word)", labels, board) == "words “C”, “large”"  # where it fires is no name
    about = [space.why.about_name(key, kind, board) for key, kind in ((2, "look"), (", (word)", ""), ("blue", "look"))]
    assert about[0] == "It says how a thing looks; it has no name: nothing was found that it stands for"
    assert about[1] == "It has no name: it fires at “,”, which tells nothing"
    assert about[2].endswith("it is named after what it was found to detect in images")
    assert space.why.about_name("C (word)", "place", board).startswith("It says where a thing is; it is named after")


def test_names_to_swap_are_in_order_places_after_looks(space):
    labels = {0: "red", 1: "top", 2: "Blue", 3: "bottom", 4: ", (word)", 5: "top"}
    swaps = space.why.swap_names(labels, [False, True, False, True, False, True])
    assert list(swaps.items()) == [("Blue", "look"), ("red", "look"), ("bottom", "place"), ("top", "place")]
    labels |= {6: "A (word)", 7: "A (word)", 8: "B (word)", 9: "C (patch)", 10: "D/A (word)"}
    is_place = [False, True, False, True, False, True, True, False, False, True, True]
    board = space.small_model.board_names(labels, is_place)  # “B” is no place to this model
    assert board == {"A": "column A"}
    swaps = space.why.swap_names(labels, is_place, board)
    assert [label for label, kind in swaps.items() if kind == "place"] == ["bottom", "A (word)", "top"]


@pytest.mark.parametrize(
    ("text", "kept", "said"),
    [
        ("so. answer: none.</think>", False, "No target: it answered that nothing fits (“answer: none”), confidence"),
        (
            "so. Answer: nothing here</think>",
            False,
            "No target: it answered that nothing fits (“Answer: nothing here”)",
        ),
        ("answer: a ball, none other.", False, "No target: not sure enough. Confidence 0.30, a mask needs 0.50."),
        ("answer: none.", True, "1 mask, 100% of the image, though it wrote “answer: none”."),
        ("answer: a ball.", True, "1 mask, 100% of the image."),
    ],
)
def test_the_verdict_says_first_what_was_answered(space, text, kept, said):
    slot = space.why.Slot(0, 0.3, kept, np.ones((2, 2), bool), np.ones((2, 2)))
    assert space.why.Why([text], [slot], found=1, threshold=0.5, additive=True).verdict.startswith(said)


def test_where_it_is_sure_and_nothing_is_drawn_heat_is_missing_and_not_confidence(space):
    slot = space.why.Slot(0, 0.97, False, np.zeros((2, 2), bool), np.ones((2, 2)))
    given = dict(found=1, threshold=0.5, additive=True)
    why, none = (space.why.Why([text], [slot], **given) for text in ("answer: a ball.", "answer: none."))
    sure = "confidence 0.97 is enough, heat to draw a mask is missing."
    assert why.verdict == f"No target: {sure} It looked here."
    assert none.verdict == f"No target: it answered that nothing fits (“answer: none”), {sure}"
    html = space.why_page.answer_page(why, Image.new("RGB", (2, 2)), [], {}, "x")
    assert "<small>no mask</small>" in html and "no mask left" not in html  # there was none before


def test_the_forecast_of_a_concept_is_what_switching_it_off_shows(space, mini):
    """To the last digit, and in the same words; also beside a change that is in force."""
    image = Image.open(ROOT / "examples" / "scene.png").convert("RGB")
    shown = list(mini.ask(image, "everything to the left of the blue star", 0.5))[-1]
    asked = 0
    for slot in shown.why.slots:
        for concept in slot.concepts[:2]:
            off = mini.change(shown.question, shown.answer.concepts.index(concept.key), 0.0, 0.5)
            result = off.why.effect(slot)
            assert result == concept.off and concept.off.brief in off.why.verdict
            assert off.why.moved(slot) == f"{concept.name} off: {concept.off.sentence}."
            gone = (slot.mask & ~off.why.after[slot.number].mask).sum() / slot.mask.sum()
            assert result.gone == pytest.approx(gone if off.why.after[slot.number].kept else 1.0)
            asked += 1
            mini.restore(shown.question, 0.5)
    assert asked == 4
    swapped = mini.change(shown.question, shown.answer.concepts.index("purple"), "blue", 0.5)
    now = swapped.why.after[shown.why.slots[0].number]
    for concept in [each for each in now.concepts if each.off is not None][:2]:
        both = mini.change(shown.question, shown.answer.concepts.index(concept.key), 0.0, 0.5)
        assert both.why.moved(shown.why.slots[0]).startswith(f"{concept.name} off: {concept.off.sentence}.")
        mini.restore(shown.question, 0.5, concept=shown.answer.concepts.index(concept.key))


def test_what_a_swap_or_doubling_would_do_is_told_in_the_words_of_the_click(space, mini):
    image = Image.open(ROOT / "examples" / "scene.png").convert("RGB")
    shown = list(mini.ask(image, "everything to the left of the blue star", 0.5))[-1]
    first, second = shown.why.slots
    place = shown.answer.concepts.index(first.concepts[0].key)
    told = mini.foretell(shown.question, place, 0.5)
    assert not shown.answer.changes and mini.restore(shown.question, 0.5).why.verdict == shown.why.verdict
    swaps, names = told[first.number]["swaps"], set(mini.swaps) - {first.concepts[0].key}
    assert sorted(name for _, listed in swaps for name in listed) == sorted(names)
    assert swaps[0][0].startswith("it moves to ") and "blue" in swaps[0][1]  # what moves it most comes first
    for does, listed in [*swaps, (told[first.number]["double"], [2.0])]:
        changed = mini.change(shown.question, place, listed[0], 0.5)
        made = changed.why.effect(first)
        assert made.brief == does or (does == "under 30% changes" and made.has and made.size < 0.3)
        others = next(told_as for told_as, each in told[second.number]["swaps"] if listed[0] in (*each, 2.0))
        assert changed.why.effect(second).brief == others or others == "under 30% changes"
    mini.change(shown.question, place, "blue", 0.5)  # it stands where the blue star is
    beside = mini.foretell(shown.question, place, 0.5)[first.number]
    assert "blue" not in [name for _, listed in beside["swaps"] for name in listed] and beside["double"]
    does = next(told_as for told_as, listed in beside["swaps"] if "star" in listed)
    assert mini.change(shown.question, place, "star", 0.5).why.effect(first).brief == does  # in place of the last
    look = next(number for number, key in enumerate(shown.answer.concepts) if key == "box")
    does, listed = mini.foretell(shown.question, look, 0.5)[first.number]["swaps"][0]
    two = mini.change(shown.question, look, listed[0], 0.5).why
    step = space.why.effect_on(two.earlier[first.number], two.after[first.number], 0.5)
    assert len(two.changes) == 2 and (step.brief == does or (does == "under 30% changes" and step.size < 0.3))
    mini.restore(shown.question, 0.5)
    for wrong in (99, None, "0", True):
        with pytest.raises(Exception, match="none of this answer"):
            mini.foretell(shown.question, wrong, 0.5)
    with pytest.raises(Exception, match="put away"):
        mini.foretell("another", 0, 0.5)


def test_what_is_foretold_takes_its_time_and_no_more(space, mini, monkeypatch, demo):
    monkeypatch.setattr(space.asking, "FORETELLING", 0.0)
    image = Image.open(ROOT / "examples" / "scene.png").convert("RGB")
    shown = list(mini.ask(image, "find the blue star", 0.5))[-1]
    told = mini.foretell(shown.question, 0, 0.5)[shown.why.slots[0].number]
    assert told == {"double": "", "swaps": []}
    other = list(demo.ask(noise_images()[0], INSTRUCTIONS[0], 0.0))[-1]
    assert demo.foretell(other.question, 0, 0.5) == {}  # its read-out is not grounded


def test_a_place_has_a_name(space):
    """Cells and sides, against places that were put there by hand."""
    mask = np.zeros((96, 128), bool)  # three rows of cells
    mask[40:60, 33:60] = True
    where = space.whereabouts.whereabouts
    assert where(mask, True) == "B2" and where(mask, False) == "the middle"
    mask[70:90, 100:120] = True
    assert where(mask, True) == "B2 and D3" and where(mask, False) == "the middle and the lower right"
    mask[2:4, 2:4] = True  # a speck is not named
    assert where(mask, True) == "B2 and D3"
    tall = np.zeros((900, 300), bool)
    tall[:200, 50:250] = True
    assert where(tall, False) == "the top" and where(tall.T, False) == "the left"
    assert where(tall[::-1], False) == "the bottom" and where(tall[::-1], True) == "A4"
    speck = np.zeros((900, 900), bool)
    speck[450, 899] = True
    assert where(speck, False) == "the right" and where(np.zeros((5, 5), bool), True) == ""


def test_what_tells_a_place_from_the_next_hottest_is_said(space, mini):
    image = Image.open(ROOT / "examples" / "scene.png").convert("RGB")
    shown = list(mini.ask(image, "everything to the left of the blue star", 0.5))[-1]
    said = [space.why.apart(slot) for slot in shown.why.slots]
    assert said[0] == "“purple” and “box” heat B4 too; “column C” makes the difference."
    assert said[1] == "“purple” and “box” heat C2 too; “row 4” makes the difference."
    assert "“box” heat B4 too" in space.why_page.answer_page(shown.why, image, shown.answer.concepts, {}, "x")
    (before,) = slots_of(space, np.eye(10, dtype=bool))

    def told(**heats):  # name -> what it adds at the mask and at another place
        concepts = []
        for name, (own, other) in heats.items():
            heat = np.zeros((5, 5))
            heat[0, 0], heat[0, 4] = own, other
            concepts.append(space.why.Concept(name, name, "look", 0.5, {}, heat))
        return space.why.apart(replace(before, concepts=concepts))

    assert told(a=(3, 3), b=(2, 0)) == "“a” heats the upper right too; “b” makes the difference."
    assert told(a=(3, 2), b=(2, 1)) == "“a” and “b” heat the upper right too, but less."
    assert told(a=(3, 0), b=(2, 0.2)) == told() == told(a=(3, 3.5)) == ""
    assert space.why.apart(replace(before, kept=False, concepts=shown.why.slots[0].concepts)) == ""


def test_the_small_model_is_known_by_its_weights_and_no_other_is_taken_for_it(space, mini, demo):
    known = space.small_model
    assert known.is_small(mini.model), "another model ships: put its fingerprint() and its size into small_model.py"
    assert mini.small and not demo.small and demo.unknown("the dog") == []  # small too, and somebody else's
    assert sum(weight.numel() for weight in demo.model.parameters()) < 20e6
    assert known.is_small(copy.deepcopy(mini.model).half())
    trained = copy.deepcopy(mini.model)
    learning = [weight for name, weight in trained.named_parameters() if "grounded_reading" in name]
    sum(weight.square().sum() for weight in learning).backward()
    torch.optim.SGD(learning, lr=1e-3).step()
    assert not known.is_small(trained)
    words = [*known.SHAPES, *known.COLOURS, *SIZES, *["left", "right", "above", "below", "larger"]]
    assert sorted((*SHAPES, *COLOURS)) == sorted((*known.SHAPES, *known.COLOURS))
    assert not [word for word in words if word not in known.TAUGHT or mini.unknown(f"the {word}")]


def test_an_effect_counts_what_goes_and_what_is_added(space):
    """Against counting by hand on masks of a hundred pixels and more."""
    effects = space.effects
    mask = np.zeros((40, 40), bool)
    mask[:10, :10] = True
    half, grown, away = mask.copy(), mask.copy(), np.roll(mask, 20, 0)
    half[:5], grown[20, :25] = False, True
    told = [effects.effect(mask, after) for after in (mask, half, grown, away)]
    assert [(each.gone, each.added) for each in told] == [(0, 0), (0.5, 0), (0, 0.25), (1, 1)]
    assert [each.brief for each in told] == ["no change", "50% goes", "25% added", "it moves away"]
    assert told[1].sentence == "50% of the mask goes" and told[3].sentence == "the mask moves away"
    assert replace(told[3], to="B2").sentence == "the mask moves to B2"
    large = np.repeat(np.repeat(mask, 8, 0), 8, 1)
    dotted = large.copy()
    dotted[0, 0] = False  # one of 6,400
    assert effects.effect(large, dotted).brief == "under 1% changes"
    gone, came = effects.effect(mask, None, "too little heat"), effects.effect(None, mask)
    assert gone.brief == "no mask left" and gone.sentence == "no mask is left (too little heat)" and gone.size == 1
    assert came.brief == "a mask appears" and effects.effect(None, None, "x").brief == "still no mask"
    shares = (0, 0.001, 0.5, 0.996, 1, 2.5)
    assert [effects.percent(share) for share in shares] == ["0%", "under 1%", "50%", "over 99%", "100%", "250%"]


def slots_of(space, *masks, confidence=0.99):
    """Slots of 10 x 10 masks, each kept if it has pixels and is sure enough for 0.5."""
    return [
        space.why.Slot(number, confidence, bool(mask.any()) and confidence >= 0.5, mask, mask.astype(float))
        for number, mask in enumerate(masks)
    ]


def test_after_a_change_the_page_says_what_became_of_each_mask_asked_about(space):
    first, second, none = (np.zeros((10, 10), bool) for _ in range(3))
    first[:4], second[6:] = True, True
    halved = second.copy()
    halved[8:] = False
    before, after = slots_of(space, first, second, none), slots_of(space, none, halved, first)
    changes = {"a": 0.0}
    given = dict(found=3, threshold=0.5, additive=True, changes=changes, names={"a": "a"})
    why = space.why.Why(["so"], before, after=dict(enumerate(after)), **given)
    assert why.titles == {0: "mask 1", 1: "mask 2", 2: "new mask"}
    assert why.verdict == "After: mask 1: no mask left; mask 2: 50% goes; new mask: a mask appears at the top."
    assert why.moved(before[0]) == "a off: no mask is left (too little heat)."
    html = space.why_page.answer_page(why, Image.new("RGB", (10, 10)), [], {}, "x")
    tabs = html.split("class='tabs'")[1].split("class='chain'")[0]
    assert tabs.count("no mask left") == 1 and tabs.count("confidence 0.99") == 2  # sure, yet nothing is drawn
    unsure = slots_of(space, first, confidence=0.3)
    tab = space.why_page.answer_page(
        space.why.Why(["so"], unsure, found=1, threshold=0.5, additive=True), Image.new("RGB", (10, 10)), [], {}, "x"
    )
    assert "confidence 0.30, needs 0.50" in tab


def test_two_changes_tell_the_last_and_all_together(space):
    mask, half, none = (np.zeros((10, 10), bool) for _ in range(3))
    mask[:4], half[:2] = True, True
    (before,), (now,) = slots_of(space, mask), slots_of(space, none)
    given = dict(found=1, threshold=0.5, additive=True, changes={"a": 2.0, "b": "c"}, names={"a": "a", "b": "b"})
    why = space.why.Why(["so"], [before], after={0: now}, earlier={0: slots_of(space, half)[0]}, **given)
    assert why.moved(before) == "b → c: no mask is left (too little heat)."  # both say the same
    why = space.why.Why(["so"], [before], after={0: slots_of(space, half)[0]}, earlier={0: before}, **given)
    assert why.moved(before) == "b → c: 50% of the mask goes."
    why = space.why.Why(["so"], [before], after={0: before}, earlier={0: slots_of(space, half)[0]}, **given)
    assert why.moved(before) == "b → c: 100% of its size is added. All changes: no change."


def test_words_that_the_small_model_never_learned_are_named_before_and_with_the_answer(space, mini):
    unknown, tokenizer = space.small_model.unknown_words, mini.processor.tokenizer
    rng = np.random.default_rng(3)
    for _ in range(60):  # what it was taught is never called unknown
        scene = draw_scene(rng, "train")
        asked = [ask(rng, scene, kind).instruction for kind in KINDS]
        assert [unknown(tokenizer, each) for each in asked] == [[]] * len(asked)
    assert unknown(tokenizer, "find the Dog, the cat and a cat") == ["Dog", "cat"]
    for odd in ("", "  ", "?!", "\ud800", "🧭"):
        assert unknown(tokenizer, odd) == []
    with pytest.raises(Exception, match="half a character"):
        list(mini.ask(Image.new("RGB", (64, 64)), "find \ud800", 0.5))
    assert unknown(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())), "dog") == []  # another small model's
    assert unknown(tokenizer, "stars") == ["stars"] and unknown(tokenizer, "find all stars") == []
    warned = space.small_model.warning(["dog", "cat"])
    assert warned.startswith("It never learned “dog” and “cat” (as written)") and space.small_model.warning([]) == ""
    image = Image.open(ROOT / "examples" / "scene.png").convert("RGB")
    first, *_, last = mini.ask(image, "the dog", 0.5)
    assert first.unknown == last.unknown == ["dog"] and first.why is None
    restored = mini.restore(last.question, 0.5)  # it stays beside the answer
    assert restored.unknown == ["dog"]
    assert space.asking.Tools(mini).segment(image, "the dog")["unknown_words"] == ["dog"]
    assert "“dog” and “cat”" in space.why_page.waiting_page("so", "", warned)


def test_the_reasoning_is_shown_in_stages_and_concepts_read_the_last(space, mini):
    image = Image.open(ROOT / "examples" / "scene.png").convert("RGB")
    shown = list(mini.ask(image, "everything to the left of the blue star", 0.5))[-1]
    second, third = shown.why.stages
    words = shown.why.words
    assert "".join(words[second:third]).strip().startswith("look for blue star.")
    assert "left of" in "".join(words[second:third]) and "".join(words[third:]).strip().startswith("answer:")
    assert all(third <= word for slot in shown.why.slots for word in slot.read)
    html = space.why_page.answer_page(shown.why, image, shown.answer.concepts, {}, "x")
    assert html.count("<small>it decides") == html.count("<small>it concludes") == len(shown.why.slots)


def test_masks_of_a_large_image_are_measured_as_the_page_shows_them(mini):
    image = Image.open(ROOT / "examples" / "scene.png").convert("RGB").resize((1280, 1280))
    shown = list(mini.ask(image, "find the blue star", 0.5))[-1]
    (slot,) = shown.why.slots
    assert slot.mask.shape == (640, 640) and 0.02 < slot.mask.mean() < 0.08  # a star of 8 % fills half of its box


def test_each_visitor_decodes_from_an_answer_of_its_own(demo):
    image, other = noise_images()[1], noise_images()[0]
    mine = list(demo.ask(image, INSTRUCTIONS[2], 0.0, visitor("mine")))[-1]
    theirs = list(demo.ask(other, INSTRUCTIONS[0], 0.0, visitor("theirs")))[-1]
    switched = demo.change(mine.question, 0, 0.0, 0.0, visitor("mine"))
    assert any((switched.why.after[slot.number].mask != slot.mask).any() for slot in mine.why.slots)
    assert same_masks(demo.restore(theirs.question, 0.0, visitor("theirs")).why, theirs.why)
    assert same_masks(demo.restore(mine.question, 0.0, visitor("mine")).why, mine.why)
    for stranger in (mine.question, "0", ""):
        with pytest.raises(Exception, match="put away"):
            demo.restore(stranger, 0.0, visitor("theirs"))


def test_answers_are_capped_in_number_bytes_and_time(space):
    class Kept:
        def __init__(self, size=1):
            self.size, self.name, self.used = size, "name", time.monotonic()

        def bytes(self):
            return self.size

    answers = space.visitors.Answers(limit=3, limit_bytes=100, seconds=60)
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


def test_the_line_is_limited_and_serves_in_order(space):
    line = space.visitors.Line(at_once=1, waiting=2)
    first, second, third = (line.enter() for _ in range(3))
    with pytest.raises(Exception, match="2 questions are waiting already"):
        line.enter()
    assert line.wait(first, 0) and not line.wait(third, 0) and line.before(third) == 2
    line.leave(second)  # one who waited no longer
    line.leave(first)
    assert line.wait(third, 0)


def test_a_visitor_who_waits_too_long_is_told(demo, space, monkeypatch):
    monkeypatch.setattr(space.visitors, "PATIENCE", 0.05)
    ticket = demo.line.enter()
    try:
        with pytest.raises(Exception, match="so many are asking"):
            for said in demo.ask(noise_images()[0], "it", 0.0, visitor("late")):
                assert said.note == "1 question before yours …"
    finally:
        demo.line.leave(ticket)
    assert len(demo.line) == 0


def test_what_is_too_much_is_refused_before_it_waits(demo, space, tmp_path, monkeypatch):
    image = noise_images()[0]
    Image.fromarray(np.zeros((60, 60, 3), np.uint8)).save(tmp_path / "large.png")
    monkeypatch.setattr(space.visitors, "MAX_PIXELS", 3000)
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
        with pytest.raises(Exception, match=said):
            space.asking.Tools(demo).segment(*question)
    assert len(demo.line) == 0 and demo._asking == {}
    shown = list(demo.ask(image, "it", 0.0, visitor("b")))[-1]
    changes = ((10**9, 0.0), (-1, 0.0), ("0", 0.0), (None, 0.0), (True, 0.0), (0, float("nan")), (0, 3.0), (0, "<b>"))
    for concept, change in changes:
        with pytest.raises(Exception, match="none of this answer|choose a number|is no name"):
            demo.change(shown.question, concept, change, 0.5, visitor("b"))
    assert shown.answer.changes == {}


def test_nothing_that_was_written_becomes_markup(demo, space, monkeypatch):
    """The words of the model, the names of concepts, what waits: each reaches the page as text."""
    evil = "<img src=x onerror=alert(1)>'\""
    shown = list(demo.ask(noise_images()[0], "it", 0.0, visitor("c")))[-1]
    monkeypatch.setattr(demo.model, "_concept_labels", {index: evil for index in range(4096)})
    page = space.why_page
    demo.restore(shown.question, 0.0, visitor("c"))
    named = demo.show(shown.answer, 0.0)
    changed = space.why.Why(
        **{**vars(named.why), "changes": {evil: evil}, "names": {}, "words": [evil] * len(named.why.words)}
    )
    html = page.answer_page(changed, shown.answer.image, shown.answer.concepts, {evil: "look"}, evil)
    html += page.waiting_page(evil) + page.waiting_page("", evil) + page.waiting_page("", "", evil)
    html += page.answer_page(named.why, shown.answer.image, shown.answer.concepts, {}, "x", evil)
    assert "<img" not in html and "onerror=alert(1)&gt;&#x27;&quot;" in html


def test_a_gpu_that_is_lent_by_the_call_gets_and_returns_what_can_travel(space, monkeypatch):
    """On ZeroGPU each call runs in a process of its own: what goes in and what comes out is pickled."""
    import pickle

    def lent(task):
        def called(*given):
            made = task(*pickle.loads(pickle.dumps(given)))
            travelled = lambda each: pickle.loads(pickle.dumps(each))  # noqa: E731
            return map_closing(travelled, made) if isinstance(made, types.GeneratorType) else travelled(made)

        return called

    def map_closing(travelled, made):
        try:
            for each in made:
                yield travelled(each)
        finally:
            made.close()

    alone = list(make_demo(space).ask(noise_images()[1], INSTRUCTIONS[2], 0.0, visitor("d")))[-1]
    monkeypatch.setattr(space.asking, "ZERO_GPU", True)
    monkeypatch.setattr(space.asking, "on_gpu", lent)
    demo = make_demo(space)
    shown = list(demo.ask(noise_images()[1], INSTRUCTIONS[2], 0.0, visitor("d")))[-1]
    assert shown.text == ANSWER and same_masks(shown.why, alone.why)
    assert demo.change(shown.question, 0, 0.0, 0.0, visitor("d")).why.after
    leaving = demo.ask(noise_images()[1], INSTRUCTIONS[2], 0.0, visitor("d"))
    next(leaving)
    demo.passes.clear()
    leaving.close()
    assert len(demo.passes) < 10 and len(demo.line) == 0
