"""The six criteria on arrays and toy readings with known answers, the attention read-out's changes, and the command."""

import json

import numpy as np
import pytest
import torch

from segcompass.commands import white_box
from segcompass.loaders.scene_drawing import SHAPES
from segcompass.loaders.scenes import load_scenes, scene_question
from segcompass.modeling_segcompass.explanation_page import UNUSED_PATCHES
from segcompass.white_box import concept_access, criteria, criteria_records
from segcompass.white_box.concept_access import READINGS, AttentionReading, ConceptMeans, PlacesReading, reading_of
from segcompass.white_box.concept_dictionary import ConceptDictionary
from segcompass.white_box.criteria import (
    Change,
    Labels,
    Truth,
    area_against,
    energy_inside,
    measure_slot,
    named_share,
    pointing,
    summarise_criteria,
)
from segcompass.white_box.criteria_records import interchange
from segcompass.white_box.decoding import decode, single_sample
from segcompass.white_box.detectors import best_detectors, lift, score_all
from segcompass.white_box.scene_truth import NAMED, SceneTruths, said_of_scene, two_questions
from tests.support.scripted import Script, lively_segcompass, noise_image

GOOD = "<think>a red ball</think>" + "<REF_POS>" * 3
KEYS = list(white_box.KEYS)

# -- a world of 4 x 4 patches: a red ball at the top left, a blue box at the bottom right ------------------------------

COVER = np.zeros((2, 16))
COVER[0, [0, 1, 4, 5]] = 1
COVER[1, [10, 11, 14, 15]] = 1
TRUTH = Truth(
    masks=torch.from_numpy(COVER.reshape(2, 4, 4) > 0),
    cover=COVER,
    looks=[{"colour": "red", "shape": "ball", "size": "small"}, {"colour": "blue", "shape": "box", "size": "small"}],
    places=[("A1", "column A"), ("D4", "column D")],
    targets=[0],
)
D_SAE = 12
RED, BALL, BLUE, BOX, SWITCH = 0, 1, 2, 3, 11


def only(*features):
    return np.isin(np.arange(D_SAE), features)


LABELS = Labels(
    names={"red": only(RED), "ball": only(BALL), "blue": only(BLUE), "box": only(BOX)},
    steers={"red": (RED,), "ball": (BALL,), "blue": (BLUE,), "box": (BOX,)},
    hands={"red": (RED,), "ball": (BALL,), "blue": (BLUE,), "box": (BOX,)},
)


class Additive:
    """Masks are the patches where the weighted concepts' maps are above a half: the concepts do all the work."""

    def __init__(self):
        self.indices = np.arange(D_SAE)
        self.active = np.ones(D_SAE, bool)
        self.fired = np.arange(D_SAE)
        self.weights = np.zeros((1, D_SAE))
        self.weights[0, [RED, BALL]] = 0.5
        self.maps = np.random.default_rng(0).random((D_SAE, 16)) * 0.2
        self.maps[[RED, BALL]] = COVER[0]
        self.maps[[BLUE, BOX]] = COVER[1]

    def shown(self, weights):
        return weights @ self.maps

    def sum_error(self, slot):
        return 0.0

    def masks(self, slot, changes):
        masks = []
        for change in changes:
            weights, maps = self.weights[slot].copy(), self.maps.copy()
            freed = weights[list(change.off)].sum()
            weights[list(change.off)] = 0
            if change.to:
                weights[list(change.to)] += freed / len(change.to)
            maps[list(change.mean)] = 0
            if change.silent == "image":
                maps[:] = 0
            masks.append((weights @ maps > 0.4).reshape(4, 4))
        return torch.from_numpy(np.stack(masks))


class TripWire(Additive):
    """The mask is right as long as concept 11 is present, whatever it says and wherever it fires."""

    def __init__(self):
        super().__init__()
        self.weights = np.zeros((1, D_SAE))
        self.weights[0, SWITCH] = 1

    def masks(self, slot, changes):
        there = torch.tensor([SWITCH not in change.off for change in changes])
        return TRUTH.masks[0] & there[:, None, None]


def measured(reading, count=20):
    slots = [measure_slot(reading, 0, 0, TRUTH, LABELS, np.random.default_rng(seed)) for seed in range(count)]
    return summarise_criteria(slots, [str(number) for number in range(count)])


def test_concepts_that_do_all_the_work_score_high():
    result = measured(Additive())
    for name in ("name", "name_look", "pointing", "auc_others", "steer_own", "steer_flip", "content", "shown"):
        assert result[name] == [1, 1, 1], name
    assert result["steer_others"] == [0, 0, 0] and result["sum_error"] == 0
    assert result["selectivity"][0] >= 100
    controls = result["controls"]
    assert controls["name"][0] == pytest.approx(2 / D_SAE, abs=1e-4), "two of twelve concepts name the target"
    assert controls["selectivity"][0] == pytest.approx(1) and controls["auc_others"][0] < 0.6
    assert controls["steer_flip"] == [0, 0, 0], "weight on random concepts shows no other object"
    assert controls["content"] == [0, 0, 0] and controls["shown"] == [0, 0, 0]


def test_trip_wire_passes_deletion_and_fails_every_criterion():
    result = measured(TripWire())
    assert result["iou"]["without_top"] == [0, 0, 0], "by deletion alone it looks faithful"
    assert result["content"] == [0, 0, 0] and result["shown"] == [0, 0, 0]
    assert result["name"] == [0, 0, 0] and result["steer_own"][0] <= 0 and result["steer_flip"] == [0, 0, 0]


# -- each formula ------------------------------------------------------------------------------------------------------


def test_named_share_counts_a_concept_once():
    weights, indices = np.array([0.5, 0.3, 0.2]), np.array([RED, 7, BOX])
    assert named_share(weights, indices, {"red"}, LABELS.names) == pytest.approx(0.5)
    assert named_share(weights, indices, {"red", "box", "unknown"}, LABELS.names) == pytest.approx(0.7)
    both = {"red": only(RED), "ball": only(RED)}
    assert named_share(weights, indices, {"red", "ball"}, both) == pytest.approx(0.5)
    assert np.isnan(named_share(np.zeros(3), indices, {"red"}, LABELS.names))


def test_map_measures_by_hand():
    shown = np.zeros(16)
    assert pointing(shown, COVER[0]) == pytest.approx(4 / 16), "an empty map points by chance"
    assert energy_inside(shown, COVER[0]) == 0 and area_against(shown, COVER[0], COVER[1]) == 0.5
    shown[0], shown[15] = 1, 3
    assert pointing(shown, COVER[0]) == 0 and pointing(shown, COVER[1]) == 1
    assert energy_inside(shown, COVER[0]) == pytest.approx(1 / 4)
    # of 16 pairs: the 1 beats three zeros and loses to the 3; three zeros tie with three zeros and lose to the 3
    assert area_against(shown, COVER[0], COVER[1]) == pytest.approx((3 + 9 * 0.5) / 16)
    assert np.isnan(area_against(shown, COVER[0], np.zeros(16)))


def test_ratios_are_ratios_of_means_with_groups_drawn_together():
    slots = [{"own": 0.2, "others": 0.1}, {"own": 0.6, "others": 0.1}, {"own": 0.5, "others": None}]
    result = summarise_criteria(slots, ["a", "a", "b"])
    assert result["selectivity"][0] == pytest.approx(4), "the slot without others is left out"
    nothing = summarise_criteria([{"own": 0.0, "others": 0.0}], ["a"])
    assert nothing["selectivity"] is None, "nothing over nothing is no ratio"
    assert summarise_criteria([{"own": 0.0, "others": 0.1}], ["a"])["selectivity"][0] == 0
    moves = [{"move": 1.0, "move_control": 0.0}, {"move": 0.0, "move_control": 1.0}]
    same, apart = (summarise_criteria([], [], moves, groups)["move"] for groups in (["a", "a"], ["a", "b"]))
    assert same == [0.5, 0.5, 0.5] and apart == [0.5, 0, 1]


def test_nothing_measured_is_none_not_zero():
    result = summarise_criteria([], [])
    assert all(result[name] is None for name in KEYS)


def test_equal_objects_are_not_steered():
    twins = TRUTH._replace(looks=[TRUTH.looks[0]] * 2)
    assert "steer_own" not in measure_slot(Additive(), 0, 0, twins, LABELS, np.random.default_rng(0))


# -- labels ------------------------------------------------------------------------------------------------------------


def test_lift_is_zero_for_what_always_fires_and_one_for_what_is_right():
    present = torch.arange(10) < 8
    assert lift(2 * 0.8 / 1.8, 0.8) == pytest.approx(0) and lift(1, 0.8) == 1
    h = torch.stack([torch.ones(10), present.float()], 1)
    f1, gain = score_all(h, present[:, None], h, present[:, None])
    assert f1[0].tolist() == pytest.approx([16 / 18, 1]) and gain[0].tolist() == pytest.approx([0, 1], abs=1e-6)
    found = best_detectors(h, {"x": present}, h, {"x": present})["x"]
    assert (found.index, found.lift) == (1, 1)


def test_dictionary_page_shows_lift_beside_f1():
    detector = {"f1": 0.9, "lift": -0.01, "index": 7, "precision": 0.8, "recall": 1.0, "threshold": 0.0}
    page = ConceptDictionary([], 0, "scenes").to_html(scores={"scene": {"small": detector}, "word": {}})
    assert "scene: F1</th><th>lift" in page
    assert "<td>0.900</td><td>-0.01</td><td><a href='#c7'>7</a></td><td>–</td>" in page
    assert "lift" not in ConceptDictionary([], 0, "scenes").to_html()


def test_all_scores_contain_the_best_detectors_scores():
    torch.manual_seed(0)
    h, present = torch.rand(60, 5).relu(), torch.rand(60, 2) < 0.4
    other, there = torch.rand(40, 5).relu(), torch.rand(40, 2) < 0.4
    f1, gain = score_all(h, present, other, there)
    best = best_detectors(h, dict(zip("ab", present.T, strict=True)), other, dict(zip("ab", there.T, strict=True)))
    for row, name in enumerate("ab"):
        assert float(f1[row, best[name].index]) == pytest.approx(best[name].f1, abs=1e-6)
        assert float(gain[row, best[name].index]) == pytest.approx(best[name].lift, abs=1e-6)
    never = torch.zeros(40, 2, dtype=torch.bool)
    assert not score_all(h, present, other, never)[0].any()


def test_phrases_and_places_are_read_from_the_reasoning():
    number = next(n for n in range(50) if len(scene_question("train", 0, n)[0].objects) == 2)
    scene, question = scene_question("train", 0, number)
    thing = scene.objects[0]
    words = ["find", *thing.place, thing.size, thing.colour, thing.shape, ",", "look", *thing.place]
    place_of = {name: number for number, name in enumerate(NAMED)}
    truth = SceneTruths("scenes", "test", 0, 1, 1).of({"image_id": f"scenes-train-0-{number}"})
    assert truth.targets == question.targets and np.array_equal(truth.masks, scene.masks)
    word, phrase = said_of_scene(words, [False] + [True] * (len(words) - 1), truth)
    assert word[1, place_of[f"column {thing.place[0]}"]] and word[2, place_of[f"row {thing.place[1]}"]]
    assert word[4, place_of[thing.colour]] and word.sum() == 7
    assert phrase.any(1).tolist() == [False, *[True] * 5, False, False, True, True]
    assert phrase[5, place_of[thing.colour]] and phrase[1, place_of[thing.shape]]


def test_two_questions_each_mean_one_object():
    for number in range(30):
        scene, _ = scene_question("test", 3, number)
        pair = two_questions(scene)
        looks = [(thing.colour, thing.shape) for thing in scene.objects]
        if pair is None:
            assert len(set(looks)) < len(looks)
            continue
        for thing, text in pair:
            words = text.split()[2:]
            fits = [all(word in (*look, "thing") for word in words) for look in looks]
            assert fits.count(True) == 1 and fits[thing]
            assert any(word in SHAPES for word in words) or words[-1] == "thing"


# -- the attention read-out --------------------------------------------------------------------------------------------


def read_with(reading_class, **config):
    """A tiny model, the states of two questions about one image, concept means, and the batch they are of."""
    model, processor = lively_segcompass("llava", num_slots=3, **config)
    image = load_scenes("test", seed=1, num_samples=1)[0]["image"]
    inputs = processor(images=[image] * 2, text=["the ball", "a box"])
    generate = model.mllm.generate
    model.mllm.generate = lambda input_ids, **kwargs: generate(
        input_ids=input_ids, logits_processor=[Script(processor.tokenizer, [GOOD] * 2)], **kwargs
    )
    _, states = model.reason(**inputs)
    rows = load_scenes("train", seed=1, num_samples=3)
    batch = processor(
        images=[row["image"] for row in rows],
        text=[row["instruction"] for row in rows],
        response=[processor.format_response(row["reasoning"]) for row in rows],
    )
    means = reading_class.gather_means(model, iter([dict(batch)]))
    return model, states, means, dict(batch)


@pytest.fixture(scope="module")
def read():
    """Of the attention read-out."""
    return read_with(AttentionReading)


def test_unchanged_mask_is_the_models(read):
    model, states, means, _ = read
    reading = AttentionReading(model, single_sample(states, 0), means)
    whole = decode(model, single_sample(states, 0))
    for slot in range(3):
        expected = (whole.pred_masks[0, slot] > 0) & (whole.pred_logits[0, slot] >= 0)
        assert torch.equal(reading.masks(slot, [Change()])[0], expected)
    assert "concept_tokens" not in vars(model.query_codebook), "the codebook is as it was"
    report = model.explain(whole, slot=1)
    assert UNUSED_PATCHES in report.to_html(np.zeros((8, 8, 3), np.uint8)), "the page says what is causally empty"
    shown = reading.shown(reading.weights[1])
    assert np.allclose(shown, report.patch_map.ravel(), atol=1e-5)


def test_changes_reach_the_concepts(read, monkeypatch):
    model, states, means, _ = read
    reading = AttentionReading(model, single_sample(states, 0), means)
    seen = {}
    monkeypatch.setattr(
        "segcompass.white_box.concept_access.decode",
        lambda *args, **kwargs: seen.setdefault("out", decode(*args, **kwargs)),
    )
    first, second = (int(j) for j in reading.indices[reading.active][:2])
    reading.masks(0, [Change(), Change(off=(first,)), Change(mean=(second,)), Change(silent="image"), Change("", "")])
    out = seen["out"]
    value = lambda row, j: float(out.concept_values[row][out.concept_indices[row] == j].sum())  # noqa: E731
    assert value(0, first) > 0 and value(1, first) == 0 and value(1, second) == pytest.approx(value(0, second))
    assert value(2, second) == pytest.approx(float(means.value[second]), rel=1e-5)
    assert set(out.concept_indices[1][out.concept_values[1] > 0].tolist()) < set(reading.indices.tolist())
    assert not out.concept_activations[3][reading.on_image].any() and out.concept_activations[3].any()


def test_means_are_those_of_the_outputs(read):
    model, _, means, batch = read
    with torch.no_grad():
        out = model(**batch)
    fired = out.concept_values > 0
    feature = int(out.concept_indices[fired].mode().values)
    expected = out.concept_values[fired & (out.concept_indices == feature)].mean()
    assert float(means.value[feature]) == pytest.approx(float(expected), rel=1e-5)


def test_own_mean_as_content_changes_nothing(read):
    """With means gathered from the sample itself, replacing every concept's content is the identity."""
    model, states, _, _ = read
    one = single_sample(states, 0)
    inputs = {name: value for name, value in one._asdict().items() if value is not None}
    seen = []
    plain = AttentionReading(model, one, ConceptMeans(torch.zeros(128), torch.zeros(128, 1)))

    def listen(indices, activations, positions):
        seen.append((indices, *concept_access._content(activations, positions)))
        return *seen[-1][1:], activations

    with concept_access._changed_tokens(model.query_codebook, listen), torch.no_grad():
        model.decode_masks(**inputs)
    indices, values, places = (part[0] for part in seen[0])
    value, place = torch.zeros(128), torch.zeros(128, places.shape[-1])
    value[indices], place[indices] = values, places
    reading = AttentionReading(model, one, ConceptMeans(value, place))
    everything = Change(mean=tuple(plain.indices.tolist()))
    assert torch.equal(*reading.masks(0, [Change(), everything]))


def test_interchange_follows_the_concepts_where_tokens_are_not_read(read, monkeypatch):
    """A model that builds its masks from concepts alone moves; one that uses tokens alone does not."""
    model, states, _, _ = read
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, :16], masks[1, 16:] = True, True
    both = [single_sample(states, place) for place in (0, 1)]

    def toy(by):
        def toy_decode(model, states):
            out = decode(model, states)
            if by == "concepts":
                asked = next(place for place, x in enumerate(both) if torch.equal(x.z, states.z))
            else:
                positions, _ = criteria_records.find_slots(states.input_ids, states.response_mask, model.config)
                own = states.last_hidden[0, positions[0]]
                tokens = [
                    x.last_hidden[0, criteria_records.find_slots(x.input_ids, x.response_mask, model.config)[0][0]]
                    for x in both
                ]
                asked = next(place for place, token in enumerate(tokens) if torch.equal(own, token))
            out.pred_masks = masks[asked].float()[None, None].expand(1, 3, -1, -1) - 0.5
            out.pred_logits = torch.ones(1, 3)
            return out

        return toy_decode

    for by, expected in (("concepts", (1, 0)), ("tokens", (0, 1))):
        monkeypatch.setattr(criteria_records, "decode", toy(by))
        moves = interchange(model, both, [0, 1], masks)
        assert [(move["move"], move["move_control"]) for move in moves] == [expected] * 2
    assert interchange(model, both, [1, 0], masks) == [], "pairs that were wrong beforehand do not count"


def test_unknown_read_out_is_refused_by_name(read):
    model = read[0]
    model.config.concept_reading, before = "token", model.config.concept_reading
    try:
        with pytest.raises(ValueError, match=r"concept_reading is 'token'.*'feature'"):
            reading_of(model)
    finally:
        model.config.concept_reading = before
    assert reading_of(model) is READINGS["feature"]


def test_grounded_read_out_is_examined_too():
    """Its contributions are the heatmap; unchanged masks are the model's; what is shown is all that is used."""
    model, states, means, _ = read_with(PlacesReading, concept_reading="grounded")
    with torch.no_grad():  # words choose by chance, and every slot is confident
        model.grounded_reading.concept_bias.normal_(std=0.3)
        model.grounded_reading.confidence_bias.fill_(99.0)
    one = single_sample(states, 0)
    reading = reading_of(model)(model, one, means)
    whole = decode(model, one)
    heavy = int(reading.indices[reading.weights[0].argmax()])
    free = [int(j) for j in reading.fired if j not in reading.indices]
    changes = [Change(), Change(mean=(-1,)), Change(silent="image"), Change(off=tuple(reading.indices.tolist()))]
    same, again, unshown, off = reading.masks(0, changes)
    expected = whole.pred_masks[0, 0] > 0
    assert whole.pred_logits[0, 0] > 0 and torch.equal(same, expected) and torch.equal(again, expected)
    assert reading.sum_error(0) <= 1e-5
    shown = reading.shown(reading.weights[0])
    assert np.allclose(shown, model.explain(whole, slot=0).patch_map.ravel(), atol=1e-5)
    assert UNUSED_PATCHES not in model.explain(whole, slot=0).to_html(np.zeros((8, 8, 3), np.uint8))
    assert torch.equal(unshown, off), "without what is shown there is nothing but the offset"
    assert reading.masks(0, [Change(off=(heavy,), to=tuple(free[:2]))]).shape[0] == 1


def test_mean_places_of_images_of_several_ratios_lie_on_one_grid():
    """As Qwen2.5-VL sees them: more patches in a row for a wide image, and padding where a batch holds both."""
    model, processor = lively_segcompass("qwen2_5_vl", num_slots=3, concept_reading="grounded")
    images = [noise_image(28, 56), noise_image(56, 28, 1)]

    def batch(*chosen):
        response = processor.format_response("a red ball")
        return dict(processor(images=list(chosen), text=["it"] * len(chosen), response=[response] * len(chosen)))

    together = PlacesReading.gather_means(model, iter([batch(*images)]))
    apart = PlacesReading.gather_means(model, iter([batch(image) for image in images]))
    rows, columns = together.grid
    assert rows < columns and torch.allclose(together.maps, apart.maps, atol=1e-5)
    assert torch.equal(together.on(together.grid), together.maps)
    assert together.on((columns, rows)).shape == together.maps.shape
    even = together._replace(maps=torch.ones_like(together.maps))
    assert torch.allclose(even.on((5, 3)), torch.ones(len(even.maps), 15))


@pytest.mark.parametrize("reading_class", [AttentionReading, PlacesReading])
def test_images_of_several_ratios_read_together_as_they_do_alone(reading_class):
    """A batch pads the patches of its smaller images: padding is no patch, neither shown nor asked for."""
    kind = next(name for name, each in READINGS.items() if each is reading_class)
    model, processor = lively_segcompass("qwen2_5_vl", num_slots=3, concept_reading=kind)
    if kind == "grounded":  # words choose by chance
        model.grounded_reading.concept_bias.data.normal_(std=0.3)
    images = [noise_image(28, 56), noise_image(28, 28, 1)]

    def reason(*chosen):
        generate = model.mllm.generate
        script = [Script(processor.tokenizer, [GOOD] * len(chosen))]
        model.mllm.generate = lambda input_ids, **kwargs: generate(
            input_ids=input_ids, logits_processor=script, **kwargs
        )
        try:
            return model.reason(**processor(images=list(chosen), text=["it"] * len(chosen)))[1]
        finally:
            model.mllm.generate = generate

    response = [processor.format_response("a red ball")] * 2
    batch = dict(processor(images=images, text=["it"] * 2, response=response))
    means = reading_class.gather_means(model, iter([batch]))
    together = reason(*images)
    assert together.patch_boxes.shape[1] > len(reason(images[1]).patch_boxes[0]), "the second image is padded"
    for place, image in enumerate(images):
        padded = reading_class(model, single_sample(together, place), means)
        alone = reading_class(model, single_sample(reason(image), 0), means)
        assert torch.equal(padded.patch_boxes, alone.patch_boxes)
        assert padded.indices.tolist() == alone.indices.tolist()
        shown = padded.shown(padded.weights[0])
        assert np.allclose(shown, alone.shown(alone.weights[0]), atol=1e-4) and len(shown) == len(padded.patch_boxes)
        changes = [Change(), Change(mean=tuple(padded.indices[:3].tolist())), Change(silent="image")]
        assert torch.equal(padded.masks(0, changes), alone.masks(0, changes))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", ["llava"], indirect=True)
def test_command_end_to_end_and_resumed(saved, tmp_path, writes, monkeypatch, capsys):
    writes(GOOD, saved[1])
    for module in (criteria_records, criteria):  # a random model's masks are never right: examine them all
        monkeypatch.setattr(module, "SHOWS", -1.0)
    monkeypatch.setattr(criteria_records, "CONFIDENT", 0.0)
    options = ["--model", str(saved[0]), "--seed", "2", "--num-samples", "4", "--label-samples", "8"]
    metrics = white_box.main([*options, "--batch-size", "2", "--output", str(tmp_path / "run")])
    *_, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last.removeprefix("RESULT "))
    assert list(result) == KEYS and {name: metrics[name] for name in KEYS} == result
    measured = {name for name in KEYS if result[name] is not None}
    assert measured >= {"name", "name_look", "pointing", "move", "content", "shown", "sum_error"}
    for name in measured - {"sum_error"}:
        mean, low, high = result[name]
        assert low <= mean <= high, name
    assert metrics["masks"] > 0 and metrics["pairs"] > 0
    page = (tmp_path / "run" / "report.md").read_text()
    assert all(f"| {name} |" in page for name in KEYS)

    # killed after two samples, and started again
    lines = (tmp_path / "run" / "items.jsonl").read_text().splitlines()
    (tmp_path / "run" / "items.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])
    assert white_box.main([*options, "--batch-size", "2", "--output", str(tmp_path / "run")]) == metrics
    with pytest.raises(ValueError, match="seed"):
        white_box.main([*options[:2], "--seed", "3", *options[4:], "--output", str(tmp_path / "run")])


def test_other_data_is_refused_before_anything_is_read(capsys):
    with pytest.raises(SystemExit):
        white_box.parse(["--model", "x", "--dataset", "reasonseg"])
    assert "use 'scenes'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        white_box.parse(["--model", "x", "--label-split", "val"])
    assert "scenes are labelled on their training split" in capsys.readouterr().err


@pytest.mark.parametrize("examined", [["--split", "train", "--seed", "4"], ["--split", "test", "--seed", "5"]])
def test_scenes_that_gave_the_labels_are_not_examined(examined, capsys):
    with pytest.raises(SystemExit):
        white_box.parse(["--model", "x", "--label-seed", "4", *examined])
    assert "choose another --seed" in capsys.readouterr().err
