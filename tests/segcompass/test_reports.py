"""Pages of one look: whole, self-contained, safe, and drawn to scale."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from segcompass import charts, drawing
from segcompass.commands import curves, segment, white_box
from segcompass.drawing import ConceptTile, draw_overlay
from segcompass.gallery import write_gallery
from segcompass.modeling_segcompass.explanation import ConceptShare, Explanation, PatchHit, TokenHit
from segcompass.modeling_segcompass.palette import PAGE_COLOURS
from segcompass.modeling_segcompass.report_page import STYLE, page
from segcompass.training_curves import curves_page, find_state, read_run
from segcompass.white_box.concept_dictionary import ConceptDictionary, ConceptEntry, Context
from segcompass.white_box.criteria_page import QUESTIONS, criteria_page
from tests.support.grpo import scenes
from tests.support.scripted import lively_segcompass

HOSTILE = "\"'></title></style><script>alert(1)</script><img src=http://evil/x.png onerror=alert(1)>"
VOID = {"meta", "br", "img"}


class Reader(HTMLParser):
    """Tags, attributes and texts of a page; every tag must be closed by its own kind."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def metrics(**changed):
    """metrics.json as the command writes it."""
    values = {name: [0.7, 0.65, 0.75] for _, measures in QUESTIONS.values() for name in measures}
    values |= {"selectivity": [70.0, 50.0, 110.0], "steer_others": [0.01, 0.0, 0.03], "sum_error": 2e-6}
    controls = {"name": [0.2, 0.1, 0.3], "selectivity": [4.5, 3.8, 5.4], "steer_flip": None}
    return {**values, "controls": controls, "masks": 9, "scenes": 8, "scenes_with_masks": 7, **changed}


def explained(text):
    words = [TokenHit(0, "instruction", text, 0.0), TokenHit(1, "response", text, 1.0, text)]
    boxes = [(0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0)]
    patches = [PatchHit(0, boxes[0], 2.0)]
    concept = ConceptShare(3, text, 0.6, 1.5, [words[1]], patches, np.ones((2, 2), np.float32), 0.25)
    return Explanation(0, 0, 0.9, [concept], 0.4, np.ones((2, 2)), np.array(boxes), np.ones(2), words)


def every_page(tmp_path, text):
    """Kind of page -> its text, with `text` wherever a model's or a user's words go."""
    from segcompass.modeling_segcompass.explanation_page import render_html

    rows = scenes(2)
    rows = rows.map(lambda row: {"instruction": text, "ignore": None}, features=rows.features)
    record = {"sample_id": text, "text": text, "slots": [], "I": 1, "U": 2, "pred_empty": False, "ref_empty": False}
    (tmp_path / "run").mkdir(parents=True)
    write_gallery(tmp_path / "gallery.html", rows, [record] * 2, "rela", text)
    entry = ConceptEntry(0, text, 0.1, 1.0, {text: 1.0}, [Context(text, 1.5, "response", text, text)])
    detector = {"f1": 0.9, "lift": 0.5, "precision": 1.0, "recall": 1.0, "index": 0, "threshold": 0.5}
    (tmp_path / "run" / "trainer_state.json").write_text(
        json.dumps({"log_history": [{"step": 1, f"eval_{text}": 1.0}]})
    )
    return {
        "gallery": (tmp_path / "gallery.html").read_text(),
        "explanation": render_html([explained(text)], np.zeros((8, 8, 3), np.uint8), title=text),
        "dictionary": ConceptDictionary([entry], 9, text).to_html(lambda c: text, text, {text: {text: detector}}),
        "criteria": criteria_page(metrics(), text, white_box.BARS, dict.fromkeys(white_box.CONTROLS, text)),
        "curves": curves_page([read_run(tmp_path / "run")], text),
    }


def test_every_report_is_one_whole_page_of_the_one_look_and_needs_nothing_else(tmp_path):
    for kind, text in every_page(tmp_path, "the red box").items():
        read = Reader(text)
        assert STYLE in text and "script" not in read.tags, kind
        links = [value for name, value in read.attributes if name in ("src", "href", "srcset", "action")]
        assert all(link.startswith(("data:image/", "#")) or link == "the red box" for link in links), kind
        assert not re.search(r"https?:|@import|url\(", text), kind
        assert ("name", "viewport") in read.attributes and ("lang", "en") in read.attributes, kind
        assert read.text.count("the red box") >= 2, kind


def test_nobody_elses_words_become_markup(tmp_path):
    harmless, hostile = every_page(tmp_path / "a", "words"), every_page(tmp_path / "b", HOSTILE)
    for kind, text in hostile.items():
        read, plain = Reader(text), Reader(harmless[kind])
        assert read.tags == plain.tags, f"{kind}: other tags"
        assert [name for name, _ in read.attributes] == [name for name, _ in plain.attributes], f"{kind}: attributes"
        assert HOSTILE in read.text, f"{kind}: the words themselves are shown"


def contrast(one, other):
    """WCAG's ratio of two colours "#rrggbb"."""

    def light(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_in_the_light_and_in_the_dark(place):
    for text in ("ink", "soft", "accent"):
        for ground in ("paper", "panel"):
            assert contrast(PAGE_COLOURS[text][place], PAGE_COLOURS[ground][place]) >= 4.5, (text, ground)
    for name, colours in PAGE_COLOURS.items():
        assert f"--{name}: {colours[place]}" in STYLE
    assert "prefers-color-scheme: dark" in STYLE and "@media print" in STYLE


def test_page_escapes_its_title_and_nothing_else():
    text = page("a < b & c", "<p>body</p>", "<b>lead</b>", ".x { color: red }")
    assert text.count("a &lt; b &amp; c") == 2 and "<p>body</p>" in text and "<p><b>lead</b></p>" in text
    assert ".x { color: red }</style>" in text


# -- charts ------------------------------------------------------------------------------------------------------------


def test_bars_are_as_long_as_their_values():
    bar = charts.Interval(0.5, 0.4, 0.6)
    svg = charts.interval_bars("x", bar, charts.Interval(0.25, 0.2, 0.3), wanted=0.75)
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    whole = charts.WIDTH - 12
    assert widths == pytest.approx([0.5 * whole, 0.25 * whole], abs=0.1)
    dashed = re.search(r'd="M([\d.]+) 2V[^>]*dasharray', svg)
    assert float(dashed[1]) == pytest.approx(6 + 0.75 * whole, abs=0.1)
    ratio = charts.interval_bars("x", charts.Interval(10.0, 5.0, 90.0), logarithmic=True)
    (width,) = re.findall(r'<rect [^>]*width="([\d.]+)"', ratio)
    assert float(width) == pytest.approx(whole * 2 / 3, abs=0.1), "10 lies two thirds of the way from 0.1 to 100"
    assert 'width="0.0"' in charts.interval_bars("x", charts.Interval(-0.2, -0.3, 0.1)), "below 0 there is no bar"


def test_lines_go_where_the_values_are():
    svg = charts.line_chart("x", {"a": [(0, 1.0), (5, 3.0), (10, 2.0)], "b": [(10, 1.0)], "c": []})
    (way,) = re.findall(r'polyline points="([^"]+)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, corner.split(",")) for corner in way.split())
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y1 == charts.TOP, "3 is the greatest"
    assert y2 == pytest.approx((y0 + y1) / 2, abs=0.11) and y0 == charts.LINES - charts.BOTTOM
    assert svg.count("<circle") == 1, "one value is a point"
    flat = charts.line_chart("x", {"a": [(1, 0.0), (2, 0.0)]})
    assert "nan" not in flat and "polyline" in flat


@pytest.mark.parametrize("low, high", [(0, 1), (0.13, 0.92), (-3, 5), (0, 9.9), (250, 460), (0.203, 0.204), (0, 1e-8)])
def test_ticks_are_few_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 7 and found == sorted(set(found))
    slack = 1e-6 * (high - low)
    assert low - slack <= found[0] and found[-1] <= high + slack
    step = found[1] - found[0]
    first_digit = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(first_digit - digit) for digit in (1, 2, 5)) < 1e-3


# -- criteria ----------------------------------------------------------------------------------------------------------


def test_criteria_page_judges_by_the_worse_end():
    bars = {"name": "≥ .60", "name_look": "≥ .70", "steer_others": "≤ .05", "content": "≥ .60", "sum_error": "≤ 1e-5"}
    text = Reader(criteria_page(metrics(content=[0.6, 0.55, 0.9]), "the model", bars, {"name": "chance"})).text
    assert "3 of 5 measures meet their bar" in text and "9 right masks in 7 of 8 scenes" in text
    few = "Of fewer than 20 images the figures say little"
    assert few in text and few not in criteria_page(metrics(scenes=30, scenes_with_masks=20), "the model", bars, {})
    assert text.count("not met") == 2 and "control 0.200 [0.100, 0.300]: chance" in text


def test_criteria_page_takes_the_result_line_and_refuses_what_is_none():
    result = {name: metrics()[name] for name in white_box.KEYS if name != "write_off"}
    text = Reader(criteria_page(result, "m", white_box.BARS, white_box.CONTROLS)).text
    assert "control" not in text.split("whiskers")[1] and "energy" in text and "not measured" in text
    with pytest.raises(ValueError, match="no 'pointing' among the metrics; give what `segcompass white-box` wrote"):
        criteria_page({name: value for name, value in result.items() if name != "pointing"}, "m", {}, {})
    with pytest.raises(ValueError, match="'name' is 'high'; it must be"):
        criteria_page(metrics(name="high"), "m", {}, {})
    assert "not measured" in criteria_page(metrics(move=None), "m", white_box.BARS, {})


def test_every_measure_of_the_command_has_its_place_on_the_page():
    placed = [name for _, measures in QUESTIONS.values() for name in measures]
    assert len(placed) == len(set(placed)) and set(placed) >= {*white_box.BARS, *white_box.KEYS}


# -- curves ------------------------------------------------------------------------------------------------------------


def state(folder, *entries):
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": list(entries)}))
    return folder


def test_curves_command_draws_the_newest_checkpoint_of_each_run(tmp_path, capsys):
    for number, loss in ((9, 5.0), (10, 2.0)):
        entries = [{"step": 1, "loss": 9.0}, {"step": number, "loss": loss, "seg/dice": 0.25, "eval_gIoU": 0.5}]
        state(tmp_path / "a" / f"checkpoint-{number}", *entries)
    state(tmp_path / "b", {"step": 1, "loss": float("nan")}, {"step": 2, "loss": 7.0, "train_runtime": 3.0})
    assert find_state(tmp_path / "a").parent.name == "checkpoint-10"
    curves.main([str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out")])
    read = Reader((tmp_path / "out" / "curves.html").read_text())
    assert "last 2" in read.text and "last 7" in read.text and "1 not finite, left out" in read.text
    assert [word in read.text for word in ("held-out rows", "seg/dice", "train_runtime")] == [True, True, False]
    assert "curves.html" in capsys.readouterr().out and str(tmp_path) not in read.text, "names are cut to what differs"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no trainer_state.json, and no checkpoint with one"),
        ("{", "is no trainer's state"),
        ('{"log_history": [{"loss": 1}]}', "is no trainer's state"),
        ('{"log_history": [{"step": 1, "epoch": 0.5}]}', "logged no values"),
    ],
)
def test_what_is_no_training_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_run(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_long_lines_are_cut_where_they_say_least():
    assert drawing._cut("by “answer: B2 blue box”", 16) == "by “…2 blue box”"
    assert drawing._cut("large star (patch)", 12) == "large star…"
    assert drawing._cut("short", 12) == "short"


# -- what the overlay shows --------------------------------------------------------------------------------------------


def test_masks_are_outlined_where_they_are_and_nothing_is_drawn_beside_the_picture():
    """A square mask at the right edge: its outline, box and score, found in the picture of the masks by its colour."""
    image, mask = Image.new("RGB", (200, 200), "grey"), np.zeros((200, 200), bool)
    mask[80:160, 120:200] = True
    instance = {"slot": 0, "score": 0.9, "box": [120, 80, 200, 160]}
    result = {"instruction": "x", "instances": [instance]}
    overlay = np.asarray(draw_overlay(image, result, "x", "1 instance", mask[None], [])).astype(int)
    panel, left = 520, 36 + 520 + 22  # the second of two panels, as high as a panel gets
    top = 36 + 40 + 14 + 32
    picture = overlay[top : top + panel, left : left + panel]
    red = np.abs(picture - np.array(drawing.slot_colour(0))).max(-1) < 12
    scale = panel / 200
    rows, columns = (np.flatnonzero(red.any(axis)) for axis in (1, 0))
    assert abs(columns.min() - 120 * scale) < 4 and abs(rows.max() - 160 * scale) < 4
    inside = red[round(95 * scale) : round(150 * scale), round(130 * scale) : round(190 * scale)]
    assert not inside.any(), "the mask is outlined, not filled"
    assert red[round(120 * scale), round(120 * scale) - 3 : round(120 * scale) + 4].sum() >= 2
    assert (overlay[top + 30 : top + panel, left + panel + 1 :] == 255).all(), "nothing right of the picture"


def test_a_mask_of_specks_is_outlined_too(monkeypatch):
    """Its outline has 70,000 points; the corner of each would be rounded by itself, which takes a second and more."""
    joints, line = [], drawing.ImageDraw.ImageDraw.line
    monkeypatch.setattr(
        drawing.ImageDraw.ImageDraw, "line", lambda pen, *a, **k: joints.append(k.get("joint")) or line(pen, *a, **k)
    )
    specks = np.random.default_rng(0).random((1, 300, 300)) > 0.5
    result = {"instruction": "x", "instances": [{"slot": 0, "score": 0.9, "box": [0, 0, 300, 300]}]}
    drawn = draw_overlay(Image.new("RGB", (300, 300)), result, "x", "1 instance", specks, [])
    assert len(joints) > 1000 and "curve" not in joints
    red = np.abs(np.asarray(drawn).astype(int) - np.array(drawing.slot_colour(0))).max(-1) < 12
    assert red.mean() > 0.1
    specks[:] = False
    specks[0, 100:200, 100:200] = True
    draw_overlay(Image.new("RGB", (300, 300)), result, "x", "1 instance", specks, [])
    assert "curve" in joints


@pytest.mark.parametrize("size", [(1, 1), (400, 1), (10, 3000), (3000, 10)])
def test_images_as_narrow_as_a_line_are_drawn(size):
    """Their answer was lost: nothing can be resized to no pixel."""
    width, height = size
    mask, tile = np.ones((1, height, width), bool), ConceptTile("x", (), np.ones(1), np.array([[0.0, 0.0, 1.0, 1.0]]))
    result = {"instruction": "x", "instances": [{"slot": 0, "score": 1.0, "box": [0, 0, width, height]}]}
    prompts = [{"slot": 0, "box": [3 * width, 0, 4 * width, height], "point": [width, height]}]
    heatmaps = [(0, 1.0, np.ones((3, 3)))]
    drawn = draw_overlay(Image.new("RGB", size), result, "x", "y", mask, heatmaps, None, {0: [tile]}, prompts)
    assert drawn.width == 1600 and drawn.height < 2000


@pytest.mark.parametrize(("width", "count"), [(50, 1), (50, 6), (300, 6)])
def test_titles_of_narrow_pictures_stand_beside_one_another(width, count, monkeypatch):
    """They were written over one another, and what became of the question was cut off by the picture's sides."""
    written, write = [], drawing.Page.write
    monkeypatch.setattr(
        drawing.Page,
        "write",
        lambda page, left, top, text, *a, **k: (
            written.append((text, left, top)) or write(page, left, top, text, *a, **k)
        ),
    )
    heatmaps = [(slot, 0.5, np.zeros((4, 4))) for slot in range(count)]
    masks = np.zeros((0, 4000, width), bool)
    result = {"instruction": "x", "instances": []}
    draw_overlay(Image.new("RGB", (width, 4000)), result, "x", "no target", masks, heatmaps)
    font = drawing._font(drawing.TEXT, False)
    titles = [entry for entry in written if entry[0] == "image" or entry[0].startswith(("slot", "masks"))]
    assert len(titles) == count + 2 and titles[-1][0] == "masks: no target"
    for (text, left, top), (_, following, below) in zip(titles, titles[1:], strict=False):
        assert below > top or left + font.getlength(text) < following
    assert all(left + font.getlength(text) < drawing.PAGE for text, left, _ in titles)


def test_what_the_font_cannot_show_is_said_to_be_so():
    """Arabic was drawn from left to right, Japanese as empty boxes."""
    for text in ("the müg № 3, “left” → right", "Ποιο είναι; какой?", "✓ π_θ\n", "a long answer with one 🦄 in it"):
        assert drawing.legible(text) == text
    for text in ("كل شيء", "青い星", "the 星", "🦄"):
        assert (
            drawing.legible(text) == f"({len(text)} letters that this picture's font cannot show; result.json has them)"
        )


def test_heat_has_the_colours_of_its_scale():
    """Clear where it is 0; at its greatest nine tenths of inferno's lightest colour."""
    from matplotlib import colormaps

    heat = np.array([[0.0, 0.5, 1.0]], np.float32)
    drawn = np.asarray(drawing._over(Image.new("RGB", (3, 1), (100, 150, 200)), heat))[0]
    for value, pixel in zip(heat[0], drawn, strict=True):
        colour = np.array(colormaps["inferno"](0.25 + 0.75 * float(value))[:3]) * 255
        wanted = (1 - 0.9 * value) * np.array([100, 150, 200]) + 0.9 * value * colour
        assert np.abs(pixel - wanted).max() <= 2.5


# -- names in the overlay ----------------------------------------------------------------------------------------------


def test_grounded_overlay_and_page_show_names_places_words_and_losses(tmp_path, writes, monkeypatch):
    """Each concept of the slot with its label, the phrase that called it, and what a decoding without it loses."""
    from segcompass import segmentation

    model, processor = lively_segcompass("llava", concept_reading="grounded", num_slots=3)
    d_sae = model.config.sae_config.d_sae
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    nowhere = {"image": 0.0, "instruction": 0.0, "response": 1.0}
    entries = [ConceptEntry(index, f"name {index}", 0.1, 1.0, nowhere, []) for index in range(d_sae)]
    ConceptDictionary(entries, 9, "test").save_pretrained(tmp_path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "i.png")
    writes("<think>a red ball</think>" + "<REF_POS>" * 3, processor)
    seen = {}
    draw = segmentation.draw_overlay
    monkeypatch.setattr(segmentation, "draw_overlay", lambda *drawn: seen.update(tiles=drawn[-1]) or draw(*drawn))
    words = [str(tmp_path / "i.png"), "the ball", "--model", str(tmp_path / "model"), "--threshold", "0", "--explain"]
    segment.main([*words, "--output", str(tmp_path / "out")])
    text = Reader((tmp_path / "out" / "explanation.html").read_text()).text
    assert seen["tiles"]
    for tiles in seen["tiles"].values():
        assert 1 <= len(tiles) <= 5
        for tile in tiles:
            assert re.fullmatch(r"name \d+", tile.name) and tile.name in text and tile.heat.max() > 0
            share, phrase, lost = tile.lines
            assert share.endswith("of the slot") and lost.startswith("without it")
            assert phrase.split("“")[1].strip("”") in "a red ball"
    assert "read in the conclusion" in text and "without it the mask loses" in text
    assert Image.open(tmp_path / "out" / "overlay.jpg").width == 1600


@pytest.mark.parametrize("size", [(300, 100), (120, 80), (80, 80), (60, 120)])
def test_what_a_mask_loses_without_a_concept_is_whole_beside_every_picture(size, monkeypatch):
    """Beside the pictures of a wide photograph the numbers were cut off."""
    width, height = size
    lines = ("100% of the slot", "by “the very long phrase that called it”", "without it −100%")
    tile = ConceptTile("concept 1023", lines, np.ones(1), np.array([[0.0, 0.0, 1.0, 1.0]]))
    image = Image.new("RGB", size)
    heatmaps = [(0, 1.0, np.zeros((4, 4)))]
    result = {"instruction": "x", "instances": []}
    written, write = set(), drawing.Page.write
    monkeypatch.setattr(drawing.Page, "write", lambda *given, **style: written.add(given[3]) or write(*given, **style))
    draw_overlay(image, result, "x", "no target", np.zeros((0, height, width)), heatmaps, None, {0: [tile]})
    assert {"concept 1023", lines[0], lines[2]} <= written and any(line.startswith("by “…") for line in written)
