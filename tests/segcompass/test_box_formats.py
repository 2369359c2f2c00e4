"""What MLLMs write as boxes, in each family's documented form and in broken ones, and where in the image it is."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig

from segcompass.box_formats import (
    CUT,
    FORMATS,
    NO_BOX,
    UNUSABLE,
    after_reasoning,
    format_of,
    known_format,
    possible_boxes,
)

WIDE, TALL = (640, 480), (300, 900)
SHOWN = {WIDE: (644, 476), TALL: (308, 896)}  # what Qwen2.5-VL's image processor makes of them: multiples of 28


def thousandths(size, box):
    """As InternVL's documentation and Qwen3-VL's say it, on its own."""
    return [round(edge / size[n % 2] * 1000) for n, edge in enumerate(box)]


def pixels(size, box):
    return [round(edge * SHOWN[size][n % 2] / size[n % 2]) for n, edge in enumerate(box)]


def shares(size, box):
    """LLaVA-1.5: the image is pasted into the middle of a square first."""
    side = max(size)
    offset = [(side - length) // 2 for length in size]
    return [round((edge + offset[n % 2]) / side, 2) for n, edge in enumerate(box)]


def locations(size, box):
    left, top, right, bottom = (min(1023, int(edge / size[n % 2] * 1024)) for n, edge in enumerate(box))
    return "".join(f"<loc{number:04d}>" for number in (top, left, bottom, right))


def listed(size, boxes, count):
    return json.dumps([{"bbox_2d": count(size, box), "label": "mug"} for box in boxes])


SAYS = {
    "qwen3_vl": lambda size, boxes: "```json\n" + listed(size, boxes, thousandths) + "\n```",
    "qwen3_5": lambda size, boxes: f"The mugs: {listed(size, boxes, thousandths)}",
    "qwen2_5_vl": lambda size, boxes: "```json\n" + listed(size, boxes, pixels) + "\n```",
    "qwen2_vl": lambda size, boxes: "".join(
        "<|object_ref_start|>mug (1)<|object_ref_end|><|box_start|>({},{}),({},{})<|box_end|>".format(
            *thousandths(size, box)
        )
        for box in boxes
    ),
    "internvl": lambda size, boxes: f"<ref>mug [2]</ref><box>{[thousandths(size, box) for box in boxes]}</box>",
    "llava": lambda size, boxes: " ".join(str(shares(size, box)) for box in boxes),
    "paligemma": lambda size, boxes: " ; ".join(f"{locations(size, box)} mug" for box in boxes),
}
STEP = {"llava": 0.01, "paligemma": 1 / 1024, "qwen2_5_vl": 1 / 300}
"""The format's own coarseness, as a share of what it counts over; thousandths otherwise."""
SOME = {
    WIDE: [(64, 96, 320, 288), (0, 0, 630, 470), (400, 20, 500, 470)],
    TALL: [(30, 90, 150, 540), (0, 0, 295, 890), (200, 700, 290, 880)],
}


@pytest.mark.parametrize("size", [WIDE, TALL])
@pytest.mark.parametrize("name", SAYS)
def test_each_familys_own_form_is_read(name, size):
    boxes = SOME[size]
    for wanted in (boxes[:1], boxes):
        answer = FORMATS[name].read(SAYS[name](size, wanted), size, SHOWN[size])
        assert (answer.nothing, answer.fault, answer.left_out) == (False, None, 0)
        found = [region.box for region in answer.regions]
        off = np.abs(np.array(found) - np.array(wanted)).max()
        assert off <= STEP.get(name, 1 / 1000) * max(size)
        assert all(region.point is None for region in answer.regions)


@pytest.mark.parametrize("name", SAYS)
def test_special_tokens_do_not_matter(name):
    """A tokenizer may drop them when it decodes; PaliGemma's locations are no special tokens."""
    text = SAYS[name](WIDE, SOME[WIDE])
    bare = text
    for token in ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"):
        bare = bare.replace(token, "")
    for token in ("<ref>", "</ref>", "<box>", "</box>"):
        bare = bare.replace(token, "")
    read = FORMATS[name].read
    assert read(bare, WIDE, SHOWN[WIDE]).regions == read(text, WIDE, SHOWN[WIDE]).regions


def read(text, name="qwen3_vl", size=(1000, 1000)):
    return FORMATS[name].read(text, size, (1000, 1000))


ONE = (100.0, 200.0, 300.0, 400.0)


@pytest.mark.parametrize(
    ("text", "boxes", "left_out"),
    [
        ('[{"bbox_2d": [100, 200, 300, 400], "label": "a"}, {"bbox_2d": [500, 60', [ONE], 0),  # cut
        ('[{"bbox_2d": [100, 200, 300, 400', [], 0),  # cut inside the only one
        ("Sure! It is at [100, 200, 300, 400], I think.", [ONE], 0),
        ('```json\n{"bbox_2d": ["100", "200", "300", "400"]}\n```', [ONE], 0),
        ("[300, 400, 100, 200]", [ONE], 0),  # reversed corners
        ("[300, 200, 100, 400]", [ONE], 0),
        ("[100, 200, 300, 400] [100, 200, 300, 400]", [ONE], 0),  # repeated, as models in a loop do
        ("[-20, 200, 300, 1040]", [(0, 200, 300, 1000)], 0),  # over the edge
        ("[100, 200, 300, 400] [2100, 200, 2300, 400]", [ONE], 1),  # outside
        ("[100, 200, 3000, 400]", [], 1),  # not these thousandths
        ("[0.1, 0.2, 0.3, 0.4]", [], 1),  # shares, where thousandths are the format
        ("[100, 200, 100, 400]", [], 1),  # no area
        ("[100, 200, 300, 400, 500, 600]", [], 0),  # a polygon
        ("100, 200, 300, 400", [], 0),
        ("<answer>[100, 200, 300, 400]</answer>", [ONE], 0),
        ("<think>[1, 2, 30, 40]?</think>[100, 200, 300, 400]", [ONE], 0),
        ("<think>[1, 2, 30, 40] or so", [], 0),
    ],
)
def test_what_is_broken_is_left_out_and_nothing_is_guessed(text, boxes, left_out):
    answer = read(text)
    assert [region.box for region in answer.regions] == boxes and answer.left_out == left_out
    assert not answer.nothing
    wanted = None if boxes else UNUSABLE if left_out else CUT if "<think>" in text else NO_BOX
    assert answer.fault == wanted


@pytest.mark.parametrize(
    ("text", "nothing"),
    [
        ("[]", True),
        ("```json\n[]\n```", True),
        ("None.", True),
        ("Answer: none", True),
        ("There is no cat in this image.", True),
        ("The cat is not visible in the image.", True),
        ("No such object.", True),
        ("", False),
        ("I cannot help with that.", False),
        ("Nothing in the image matches.", True),
        ("None of the others, but the mug at the left", False),
        ("The mug stands at the left. Nothing else does.", False),
    ],
)
def test_no_box_is_told_from_nothing_there(text, nothing):
    answer = read(text)
    assert (answer.regions, answer.nothing, answer.fault) == ([], nothing, None if nothing else NO_BOX)


def test_paligemma_says_nothing_by_saying_nothing():
    assert read("", "paligemma").nothing and read(" ", "paligemma").fault is None
    assert read("<loc0100><loc0200>", "paligemma").fault == NO_BOX
    assert read("a mug", "paligemma").fault == NO_BOX
    (region,) = read("<loc0000><loc0000><loc1023><loc1023><seg001><seg002> mug", "paligemma", (1024, 512)).regions
    assert region.box == (0, 0, 1023, 511.5)


@pytest.mark.parametrize(
    ("text", "regions"),
    [
        ('{"point_2d": [500, 250], "label": "mug"}', [(None, (500, 250))]),
        ('[{"point_2d": [500, 250]}, {"point_2d": [10, 20]}]', [(None, (500, 250)), (None, (10, 20))]),
        ('<points x1="500" y1="250" alt="mug">mug</points>', [(None, (500, 250))]),
        ("(500, 250)", [(None, (500, 250))]),
        ('[{"bbox_2d": [100, 200, 300, 400], "point_2d": [150, 250]}]', [(ONE, (150, 250))]),
        ('[{"point_2d": [150, 250], "bbox_2d": [100, 200, 300, 400]}]', [(ONE, (150, 250))]),
        ('[{"bbox_2d": [100, 200, 300, 400]}, {"point_2d": [150, 250]}]', [(ONE, None), (None, (150, 250))]),
        ('{"point_2d": [1500, 250]}', []),
        ("at (500, 250) or so", []),
    ],
)
def test_points_are_read_and_belong_to_the_box_of_their_object(text, regions):
    assert [tuple(region) for region in read(text).regions] == regions


def test_llavas_boxes_lie_on_the_square_that_it_is_shown():
    image = Image.new("RGB", (300, 900), "red")
    mean = type("Images", (), {"image_mean": [0.5, 0.25, 0.1]})
    square = np.asarray(FORMATS["llava"].picture(image, mean))
    assert square.shape == (900, 900, 3)
    assert (square[:, 300:600] == (255, 0, 0)).all() and (square[:, :300] == (127, 63, 25)).all()
    assert (square[:, 600:] == (127, 63, 25)).all()
    (region,) = read("[0.0, 0.0, 0.5, 1.0]", "llava", image.size).regions  # the left half of the square
    assert region.box == (0, 0, 150, 900)
    assert read("[0.0, 0.1, 0.3, 0.5]", "llava", image.size).fault == UNUSABLE  # beside the image


@pytest.mark.parametrize(
    "name, size, shown, text",
    [
        ("qwen2_5_vl", (1, 1), (1372, 784), '[{"bbox_2d": [55, 784, 0, 815]}]'),  # 784 / 784 was read as 1 - 1e-16
        ("qwen2_5_vl", (1999, 1124), (1260, 1260), '[{"bbox_2d": [1260, 0, 1300, 1255]}]'),
        ("llava", (300, 1000), None, "[0.10, 0.2, 0.35, 0.9]"),  # the image begins at 0.35 of the square
    ],
)
def test_a_box_that_only_touches_the_image_has_no_area_in_it_however_numbers_are_rounded(name, size, shown, text):
    answer = FORMATS[name].read(text, size, shown)
    assert not answer.regions and answer.left_out == 1


def test_pixels_need_the_size_that_was_shown():
    with pytest.raises(ValueError, match="give shown"):
        FORMATS["qwen2_5_vl"].read("[1, 2, 30, 40]", WIDE)


def test_the_page_lists_every_family():
    page = (Path(__file__).parents[2] / "docs" / "routes.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[1] for line in page.splitlines() if re.match(r"\| [A-Z][\w.-]+.*\| `\w+`", line)]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(FORMATS)


def test_an_unknown_family_is_refused_by_name():
    config = AutoConfig.for_model("gemma3")
    assert format_of(config) is None
    with pytest.raises(ValueError, match="mllm='x' is of type 'gemma3', of which it is not known .* choose one of"):
        known_format(config, "x")


def test_a_family_that_borrows_llavas_class_is_not_llava():
    config = AutoConfig.for_model("llava", vision_config={"model_type": "pixtral"})
    with pytest.raises(ValueError, match="is of type 'llava' with vision tower 'pixtral', of which it is not known"):
        known_format(config, "x")
    assert format_of(AutoConfig.for_model("llava")) is FORMATS["llava"]


def test_who_counts_in_an_unknown_way_is_read_in_every_way():
    assert possible_boxes("[100, 200, 300, 400]", (500, 800)) == [[ONE], [(50, 160, 150, 320)]]
    assert possible_boxes("[100, 200, 1300, 400]", (1500, 800)) == [[(100, 200, 1300, 400)]]
    assert possible_boxes("[0.1, 0.2, 0.5, 0.5]", (100, 10)) == [[(10, 2, 50, 5)]]
    assert possible_boxes("none", (100, 10)) == []
    assert after_reasoning("a</think>b") == "b"
