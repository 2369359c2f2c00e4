"""Scenes: drawing bounds, disjoint splits, questions solved again from instruction and scan alone, rows."""

import re
from collections import Counter
from functools import cache
from itertools import combinations

import datasets
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from segcompass.loaders import scene_drawing
from segcompass.loaders.scene_drawing import COLOURS, SHAPES, SIZES, SPLITS, choose_size, draw_scene, split_of_pair
from segcompass.loaders.scene_questions import BY_LOOK, KINDS, ask, word_kind
from segcompass.loaders.scenes import NUM_SHARDS, load_mixed_scenes, load_scenes, load_twin_scenes, scene_question

NUM_CHECKED = 500
RANK = {"small": 0, "large": 1}


@cache
def drawn(split: str) -> list:
    return [scene_question(split, 11, index) for index in range(NUM_CHECKED)]


@cache
def drawn_mixed() -> list:
    return [scene_question("train", 12, index, "mixed", "fitting", 0.3) for index in range(200)]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


# ---------------------------------------------------------------------------------------------------------------------
# A second solver. It reads only the instruction and the scan; board places stand for pixels.
# ---------------------------------------------------------------------------------------------------------------------

SINGULAR = {"boxes": "box"} | {shape + "s": shape for shape in SHAPES if shape != "box"}

MEANINGS = {
    "kick": "ball",
    "game": "ball",
    "finger": "ring",
    "hole": "ring",
    "pack": "box",
    "four corners": "box",
    "road works": "cone",
    "three corners": "cone",
    "five points": "star",
    "shines at night": "star moon",
    "night sky": "star moon",
    "space": "star moon",
    "roll": "ball ring",
}


def described(words: list[str]) -> set[str]:
    """The attribute words of a description; "thing", "all" and the like say nothing."""
    words = [SINGULAR.get(word, word) for word in words]
    return {word for word in words if word in SHAPES or word in COLOURS or word in SIZES}


def matching(scan: list[list[str]], text: str) -> list[int]:
    wanted = described(text.split())
    assert wanted, text
    return [i for i, words in enumerate(scan) if wanted <= set(words)]


def solve_attribute(scan, text):
    return matching(scan, text)


def solve_relation(scan, text):
    axis, less = {"left": (0, True), "right": (0, False), "above": (1, True), "higher": (1, True)}.get(
        next((w for w in text.split() if w in ("left", "right", "above", "higher")), None), (1, False)
    )
    anchors = matching(scan, text)
    if not anchors:
        return []
    (anchor,) = anchors
    position = [(i, int(words[3][1])) for i, words in enumerate(scan)]
    if axis == 1:
        assert all(position[i][1] != position[anchor][1] for i in range(len(scan)) if i != anchor)
    here = position[anchor][axis]
    return [i for i, p in enumerate(position) if (p[axis] < here if less else p[axis] > here)]


def solve_extreme(scan, text):
    count = 2 if "two" in text.split() else 1
    word = re.search(r"leftmost|rightmost|highest|lowest|smallest|largest|biggest", text).group()
    pool = matching(scan, text) if described(text.split()) else list(range(len(scan)))
    if not pool:
        return []
    keys = {
        "leftmost": lambda i: i,
        "rightmost": lambda i: -i,
        "highest": lambda i: int(scan[i][3][1]),
        "lowest": lambda i: -int(scan[i][3][1]),
        "smallest": lambda i: RANK[scan[i][0]],
        "largest": lambda i: -RANK[scan[i][0]],
        "biggest": lambda i: -RANK[scan[i][0]],
    }
    ranked = sorted(pool, key=keys[word])
    assert len(ranked) > count and keys[word](ranked[count - 1]) < keys[word](ranked[count])
    return sorted(ranked[:count])


def solve_comparison(scan, text):
    question, reference = re.fullmatch(r"(.*) (?:as|than) the (.*)", text).groups()
    anchors = matching(scan, reference)
    if not anchors:
        return []
    (anchor,) = anchors
    others = [i for i in range(len(scan)) if i != anchor]
    rank = RANK[scan[anchor][0]]
    if "same" in question:
        column = ("size", "colour", "shape").index(question.split()[-1])
        return [i for i in others if scan[i][column] == scan[anchor][column]]
    if question.endswith("smaller"):
        return [i for i in others if RANK[scan[i][0]] < rank]
    return [i for i in others if RANK[scan[i][0]] > rank]


def solve_knowledge(scan, text):
    (meaning,) = [shapes for key, shapes in MEANINGS.items() if key in text]
    return [i for i, words in enumerate(scan) if words[2] in meaning.split()]


def solve_counting(scan, text):
    if "appears exactly" in text:
        (column,) = [i for i, name in enumerate(("size", "colour", "shape")) if name in text.split()]
        count = {"once": 1, "twice": 2}[text.split()[-1]]
        occurrences = Counter(words[column] for words in scan)
        return [i for i, words in enumerate(scan) if occurrences[words[column]] == count]
    excluded = matching(scan, text)
    return [i for i in range(len(scan)) if i not in excluded]


SOLVERS = {
    "attribute": solve_attribute,
    "relation": solve_relation,
    "extreme": solve_extreme,
    "comparison": solve_comparison,
    "knowledge": solve_knowledge,
    "counting": solve_counting,
}


def solved(question):
    """The second solver's scan, [size, colour, shape, place] of each object, and its targets; and the answer."""
    scan_text, *_, answer = question.reasoning.split(". ")
    places, *rest = zip(*(words.split() for words in scan_text.split(", ")), strict=True)
    scan = [list(words) for words in zip(*rest, places, strict=True)]
    targets = SOLVERS[question.kind](scan, question.instruction)
    assert targets == question.targets, (question, targets)
    return scan, targets, answer.removeprefix("answer: ").removesuffix(".")


@pytest.mark.parametrize("split", SPLITS)
def test_second_solver_finds_the_same_targets_from_instruction_and_scan(split):
    for _, question in drawn(split):
        scan, targets, answer = solved(question)
        named = ", ".join(" ".join([scan[target][3], *scan[target][1:3]]) for target in targets) or "none"
        assert answer == named


def test_fitting_answers_name_each_target_once_by_look_or_by_place():
    numbered = 0
    for _, question in drawn_mixed():
        scan, targets, answer = solved(question)
        if question.kind not in BY_LOOK or not targets:
            assert answer == (", ".join(" ".join([scan[t][3], *scan[t][1:3]]) for t in targets) or "none")
            continue
        counted = Counter()
        for phrase in answer.split(", "):
            number, *words = phrase.split() if phrase.split()[0] in ("two", "three") else ("one", *phrase.split())
            assert (words[-1] in SINGULAR) == (number != "one")
            look = (*words[:-1], SINGULAR.get(words[-1], words[-1]))
            assert look not in counted
            counted[look] = {"one": 1, "two": 2, "three": 3}[number]
            numbered += number != "one"
        assert counted == Counter(tuple(scan[t][:3]) for t in targets)
    assert numbered > 3


def test_the_way_to_answer_changes_neither_question_nor_targets():
    for index in range(40):
        (first, by_place), (second, fitting) = (
            scene_question("train", 3, index, answers=answers) for answers in ("place", "fitting")
        )
        assert np.array_equal(first.image, second.image)
        assert (by_place.instruction, by_place.targets) == (fitting.instruction, fitting.targets)
        assert by_place.reasoning.split("answer: ")[0] == fitting.reasoning.split("answer: ")[0]


def test_phrases_stand_in_the_trace_and_say_what_is_true_of_the_objects_they_name():
    for scene, question in [*drawn_mixed(), *drawn("val")[:100]]:
        named = [phrase.objects for phrase in question.phrases]
        count = len(scene.objects)
        assert named[:count] == [(index,) for index in range(count)]
        assert sorted(index for objects in named[count:] for index in objects) == question.targets
        for phrase in question.phrases:
            assert question.reasoning[phrase.start :][: len(phrase.text)] == phrase.text
            for word in re.findall(r"[A-Za-z]+|\d", phrase.text):
                for thing in (scene.objects[index] for index in phrase.objects):
                    facts = {"column": thing.place[0], "row": thing.place[1]}
                    facts |= {"size": thing.size, "colour": thing.colour, "shape": thing.shape}
                    assert word in ("two", "three") or facts[word_kind(word)[0]] == word_kind(word)[1]


VERDICTS = re.compile(r"(?:[A-D][1-4](?: [a-z]+)* (?:yes|no))(?:, |$)")


def verdicts_of(step):
    """[(place, words between, yes or no)] of a step of verdicts, None for a clause."""
    words = [part.split() for part in step.split(", ")]
    return [(w[0], w[1:-1], w[-1] == "yes") for w in words] if VERDICTS.match(step) else None


@pytest.mark.parametrize("split", SPLITS)
def test_verdicts_repeat_facts_of_the_scan_and_end_with_the_targets(split):
    ended_with_verdicts = Counter()
    for scene, question in drawn(split):
        scan, *steps, _ = question.reasoning.split(". ")
        judged = [verdicts for verdicts in map(verdicts_of, steps) if verdicts]
        for verdicts in judged:
            assert [place for place, _, _ in verdicts] == [thing.place for thing in scene.objects]
            for (_, words, _), thing in zip(verdicts, scan.split(", "), strict=True):
                assert [word for word in thing.split() if word in words] == words
        if last := verdicts_of(steps[-1]):
            assert [i for i, (_, _, yes) in enumerate(last) if yes] == question.targets
        ended_with_verdicts[question.kind] += last is not None
        assert last or question.kind == "extreme"
    assert set(ended_with_verdicts) == set(KINDS)


def test_searches_are_judged_by_the_description():
    searched = 0
    for scene, question in drawn("test"):
        steps = question.reasoning.split(". ")[1:-1]
        for clause, verdicts in zip(steps, map(verdicts_of, steps[1:]), strict=False):
            if clause.startswith("look for "):
                wanted = described(clause.split())
                assert wanted == described(question.instruction.split())
                assert [yes for _, _, yes in verdicts] == [
                    wanted <= {thing.size, thing.colour, thing.shape} for thing in scene.objects
                ]
                searched += 1
    assert searched > NUM_CHECKED / 3


def test_extremes_list_the_candidates_before_they_choose():
    for scene, question in drawn("train"):
        if question.kind == "extreme" and question.targets:
            clause = question.reasoning.split(". ")[-2]
            listed, chosen = re.fullmatch(r"[a-z ]+ of (.*) (?:is|are) (.*)", clause).groups()
            wanted = described(question.instruction.split())
            pool = [i for i, o in enumerate(scene.objects) if wanted <= {o.colour, o.shape}]
            assert [words[:2] for words in listed.split(", ")] == [scene.objects[i].place for i in pool]
            assert chosen.split(", ") == [scene.objects[i].place for i in question.targets]


def test_every_kind_can_be_asked_of_every_scene_and_reaches_every_outcome():
    rng = np.random.default_rng(0)
    seen = Counter()
    for scene, _ in drawn("train")[:80]:
        for kind in KINDS:
            question = ask(rng, scene, kind)
            assert question.kind == kind
            seen[kind, min(len(question.targets), 2)] += 1
    assert all(seen[kind, outcome] > 0 for kind in KINDS for outcome in range(3))


def test_position_questions_keep_a_pixel_margin():
    for scene, question in drawn("train"):
        centres = np.array([thing.centre for thing in scene.objects])
        found = re.search(r"\. (?:left of|right of|above|below) (\w\d)\.", question.reasoning)
        if question.kind == "relation" and found:
            place = found.group(1)
            axis = 0 if " of " in question.reasoning else 1
            anchors = [i for i, thing in enumerate(scene.objects) if thing.place == place]
            gaps = [
                min(abs(centres[i, axis] - centres[j, axis]) for j in range(len(centres)) if j != i) for i in anchors
            ]
            assert max(gaps) >= 12
        word = re.search(r"(left|right)most|highest|lowest", question.instruction)
        if question.kind == "extreme" and word and question.targets:
            axis, sign = (0 if "most" in word.group() else 1), (1 if word.group() in ("leftmost", "highest") else -1)
            wanted = described(question.instruction.split())
            pool = [i for i, o in enumerate(scene.objects) if wanted <= {o.colour, o.shape, o.size}]
            chosen = max(sign * centres[i, axis] for i in question.targets)
            assert min(sign * centres[i, axis] for i in pool if i not in question.targets) - chosen >= 12


def test_trace_scans_all_objects_from_left_to_right_with_their_places():
    for scene, question in drawn("test"):
        scan = question.reasoning.split(". ")[0].split(", ")
        assert scan == [f"{o.place} {o.size} {o.colour} {o.shape}" for o in scene.objects]
        columns = [o.centre[0] for o in scene.objects]
        assert columns == sorted(columns)
        assert len({o.place for o in scene.objects}) == len(scene.objects)


def test_questions_use_few_lower_case_words():
    words, traces = set(), set()
    for split in SPLITS:
        for _, question in drawn(split):
            assert re.fullmatch(r"[a-z]+( [a-z]+)*", question.instruction)
            words |= set(question.instruction.split())
            traces |= set(re.findall(r"[a-z]+\b", re.sub(r"[A-D][1-4]", "", question.reasoning)))
            assert len(question.instruction.split()) <= 14
            assert len(question.reasoning.split()) <= 60
    assert len(words | traces) <= 130


def test_shares_of_kinds_and_outcomes():
    kinds, outcomes = Counter(), Counter()
    questions = [question for split in SPLITS for _, question in drawn(split)]
    for question in questions:
        kinds[question.kind] += 1
        outcomes[min(len(question.targets), 2)] += 1
    total = len(questions)
    # Four standard deviations of a share of 1500 draws are at most 0.052.
    assert set(kinds) == set(KINDS)
    assert all(abs(kinds[kind] / total - 1 / 6) < 0.045 for kind in KINDS)
    assert abs(outcomes[1] / total - 0.58) < 0.06
    assert abs(outcomes[2] / total - 0.23) < 0.06
    assert abs(outcomes[0] / total - 0.19) < 0.06


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def pairs_of(scene):
    looks = [(thing.colour, thing.shape) for thing in scene.objects]
    return [split_of_pair(*pair) for pair in combinations(looks, 2)]


def test_splits_differ_by_the_pairs_of_looks_that_meet():
    for split in SPLITS:
        for scene, _ in drawn(split):
            shown = set(pairs_of(scene))
            assert shown <= {"train", split} and split in shown | ({"train"} if split == "train" else set())


def test_shares_of_the_pairs_and_their_symmetry():
    looks = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = list(combinations(looks, 2))
    counts = Counter(split_of_pair(*pair) for pair in pairs)
    # Four standard deviations of shares 0.1 and 0.05 of 630 pairs are 0.048 and 0.035.
    assert abs(counts["test"] / len(pairs) - 0.1) < 0.048 and abs(counts["val"] / len(pairs) - 0.05) < 0.035
    assert all(split_of_pair(a, b) == split_of_pair(b, a) for a, b in pairs)
    assert {split_of_pair(look, look) for look in looks} == {"train"}


def test_every_look_is_drawn_in_every_split():
    looks = len(COLOURS) * len(SHAPES)
    for split in SPLITS:
        assert len({(thing.colour, thing.shape) for scene, _ in drawn(split) for thing in scene.objects}) == looks
    assert len({(t.size, t.colour, t.shape) for scene, _ in drawn("train") for t in scene.objects}) == 2 * looks


def test_mixed_sizes_stay_within_their_ratios_and_sides():
    rng = np.random.default_rng(8)
    sizes = np.array([choose_size(rng) for _ in range(800)])
    square = (sizes == 128).all(1)
    assert abs(square.mean() - 0.5) < 0.08  # more than four standard deviations of a share of 800 draws
    others = sizes[~square]
    assert others.max(1).min() >= 96 and others.max(1).max() <= 256 and others.max(1).std() > 30
    ratios = np.log2(others[:, 1] / others[:, 0])
    assert np.abs(ratios).max() <= 1 and abs(ratios.mean()) < 0.15 and abs(ratios.std() - 1 / np.sqrt(3)) < 0.08


def test_twins_repeat_looks_and_nothing_else_hangs_on_them_at_zero():
    def repeats(twins):
        rng = np.random.default_rng(4)
        looks = [[(t.colour, t.shape) for t in draw_scene(rng, "train", 128, twins).objects] for _ in range(120)]
        return sum(len(set(scene)) < len(scene) for scene in looks)

    assert repeats(0.0) + 30 < repeats(0.6)


@pytest.mark.parametrize("size", [128, 96, (128, 64), (100, 200), (192, 150)])
def test_masks_are_disjoint_centred_and_inside_the_image(size):
    rng = np.random.default_rng(5)
    counts = Counter()
    sides = (size, size) if isinstance(size, int) else size
    for _ in range(150 if isinstance(size, int) else 40):
        scene, unit = draw_scene(rng, "train", size), max(sides)
        assert scene.image.shape == (*sides, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (len(scene.objects), *sides) and scene.masks.dtype == bool
        assert scene.masks.sum(0).max() == 1
        counts[len(scene.objects)] += 1
        centres = []
        for thing, mask in zip(scene.objects, scene.masks, strict=True):
            rows, columns = np.nonzero(mask)
            centre = (columns.mean() + 0.5, rows.mean() + 0.5)
            assert centre == pytest.approx(thing.centre)
            assert thing.place == "ABCD"[int(centre[0] * 4 // unit)] + "1234"[int(centre[1] * 4 // unit)]
            to_lines = [abs(c - line * unit / 4) for c in centre for line in range(5)]
            assert min(to_lines) >= 3 * unit / 128 - 1e-4
            centres.append(centre)
        for axis in (0, 1):
            assert np.diff(np.sort(np.array(centres)[:, axis])).min() >= 10 * unit / 128
    assert set(counts) == {2, 3} or min(sides) < unit


def test_objects_keep_their_visible_share_and_their_size(monkeypatch):
    """The area of each object is measured again with the object alone in the image."""
    kept = []
    arrange = scene_drawing._arrange

    def recording_arrange(rng, sprites, size):
        arranged = arrange(rng, sprites, size)
        if arranged is not None:
            kept.append((sprites, *arranged))
        return arranged

    monkeypatch.setattr(scene_drawing, "_arrange", recording_arrange)
    rng = np.random.default_rng(6)
    occluded = 0
    for _ in range(200):
        draw_scene(rng, "train")
        sprites, windows, masks, _ = kept.pop()
        for sprite, (_, _, distance), mask in zip(sprites, windows, masks, strict=True):
            whole = distance <= 0
            assert mask.sum() >= 0.6 * whole.sum()
            occluded += mask.sum() < whole.sum()
            rows, columns = np.nonzero(whole)
            extent = max(np.ptp(rows), np.ptp(columns)) + 1
            low, high = SIZES[sprite.size]
            # Tilt and the star's points move the longer side by at most an eighth; the edge by one pixel.
            assert 0.86 * low - 1 <= extent <= 1.12 * high + 1
    assert occluded > 20


def test_object_pixels_show_the_named_colour():
    for scene, _ in drawn("train")[:150]:
        for thing, mask in zip(scene.objects, scene.masks, strict=True):
            colour = np.median(scene.image[mask].astype(float), axis=0)
            if thing.colour == "white":
                assert np.ptp(colour) < 45
                continue
            hue = colour / colour.max()
            distances = {}
            for name, rgb in COLOURS.items():
                distances[name] = np.abs(hue - np.array(rgb) / max(rgb)).sum()
            assert min(distances, key=distances.get) == thing.colour


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def test_row_depends_on_split_seed_and_index_only():
    short, long = load_scenes("val", seed=3, num_samples=6), load_scenes("val", seed=3, num_samples=9)
    for first, second in zip(short, long, strict=False):
        assert np.array_equal(np.asarray(first.pop("image")), np.asarray(second.pop("image")))
        assert first == second
    other = load_scenes("val", seed=4, num_samples=6)
    assert [row["reasoning"] for row in other] != [row["reasoning"] for row in short]
    assert load_scenes("val", seed=3, num_samples=6)._fingerprint == short._fingerprint


def test_rows_hold_the_scene_and_the_masks_of_its_targets():
    rows = load_scenes("test", seed=2, num_samples=40)
    assert set(rows.column_names) == {
        "image", "image_id", "sample_id", "dataset", "split", "instruction", "reasoning", "masks", "ignore", "height",
        "width", "kind", "phrases",
    }  # fmt: skip
    assert len(set(rows["sample_id"])) == len(set(rows["image_id"])) == 40
    seen = Counter()
    for index, row in enumerate(rows):
        scene, question = scene_question("test", 2, index)
        assert np.array_equal(np.asarray(row["image"]), scene.image)
        assert row["image"].mode == "RGB"
        assert (row["height"], row["width"]) == scene.image.shape[:2] == (128, 128)
        assert (row["dataset"], row["split"], row["ignore"]) == ("scenes", "test", None)
        assert (row["instruction"], row["reasoning"], row["kind"]) == (
            question.instruction,
            question.reasoning,
            question.kind,
        )
        assert len(row["masks"]) == len(question.targets)
        for rle, target in zip(row["masks"], question.targets, strict=True):
            assert rle["size"] == [128, 128] and isinstance(rle["counts"], str)
            assert np.array_equal(coco_mask.decode(rle).astype(bool), scene.masks[target])
        for phrase, expected in zip(row["phrases"], question.phrases, strict=True):
            assert (phrase["text"], phrase["start"]) == (expected.text, expected.start)
            shown = [coco_mask.decode(rle).astype(bool) for rle in phrase["masks"]]
            assert np.array_equal(shown, scene.masks[list(expected.objects)])
        seen[min(len(row["masks"]), 2)] += 1
    assert len(seen) == 3


def test_mixed_rows_have_the_image_and_mask_sizes_of_their_scene():
    sizes = set()
    for index, row in enumerate(load_mixed_scenes("val", seed=1, num_samples=12)):
        scene, question = scene_question("val", 1, index, "mixed", "fitting", 0.04)
        assert (row["height"], row["width"]) == scene.image.shape[:2] == row["image"].size[::-1]
        assert row["reasoning"] == question.reasoning and row["image_id"].startswith("mixed-scenes-val-1-")
        assert all(rle["size"] == [row["height"], row["width"]] for phrase in row["phrases"] for rle in phrase["masks"])
        sizes.add(scene.image.shape)
    assert len(sizes) > 3


def test_third_objects_of_twin_scenes_mostly_have_a_twin():
    twins = threes = 0
    for index, row in enumerate(load_twin_scenes("test", seed=1, num_samples=40)):
        scene, question = scene_question("test", 1, index, 128, "fitting", 0.9)
        assert row["reasoning"] == question.reasoning and row["image_id"] == f"twin-scenes-test-1-{index}"
        looks = [(thing.colour, thing.shape) for thing in scene.objects]
        twins += len(looks) > len(set(looks))
        threes += len(looks) == 3
    assert threes >= 10 and twins > 0.7 * threes


def test_several_questions_about_a_scene_differ_in_kind_and_share_the_image():
    rows = load_scenes("train", seed=2, num_samples=9, questions=3)
    for start in range(0, 9, 3):
        three = [rows[index] for index in range(start, start + 3)]
        assert len({row["image_id"] for row in three}) == 1 and len({row["kind"] for row in three}) == 3
        assert all(np.array_equal(np.asarray(row["image"]), np.asarray(three[0]["image"])) for row in three)
        assert len({row["reasoning"].split(". ")[0] for row in three}) == 1
    assert len(set(rows["image_id"])) == 3 and len(set(rows["sample_id"])) == 9


def test_streamed_rows_equal_stored_rows():
    stored = load_scenes("train", seed=1, num_samples=20)
    streamed = load_scenes("train", seed=1, num_samples=20, streaming=True)
    for first, second in zip(stored, streamed, strict=True):
        assert np.array_equal(np.asarray(first.pop("image")), np.asarray(second.pop("image")))
        assert first == second


def test_dataloader_workers_stream_disjoint_rows():
    streamed = load_scenes("train", num_samples=50, streaming=True)
    assert streamed.num_shards == NUM_SHARDS
    loader = DataLoader(streamed, batch_size=None, num_workers=2)
    ids = [row["image_id"] for row in loader]
    assert sorted(ids) == sorted(f"scenes-train-0-{index}" for index in range(50))


def test_fewer_rows_than_shards_are_streamed_once():
    assert len(list(load_scenes("train", num_samples=3, streaming=True))) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split='dev'.*train, val, test"),
        ({"num_samples": 0}, "num_samples=0 is below 1"),
        ({"seed": -1}, "seed=-1 is negative"),
        ({"size": 32}, "size=32 is below 64"),
        ({"size": (200, 90)}, r"size=\(200, 90\) is narrower than 1:2"),
        ({"size": "large"}, "size='large' is no size"),
        ({"answers": "loud"}, "answers='loud' is not one of place, fitting"),
        ({"questions": 7}, "questions=7 is not in 1 to 6"),
        ({"twins": 1.5}, "twins=1.5 is no probability"),
    ],
)
def test_wrong_arguments_name_value_and_limit(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_scenes(**arguments)


def test_unknown_kind_and_split_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="split='all'"):
        draw_scene(rng, "all")
    with pytest.raises(ValueError, match="kind='colour'.*attribute"):
        ask(rng, draw_scene(rng, "train"), "colour")
