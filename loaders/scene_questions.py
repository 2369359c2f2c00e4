"""Questions about drawn scenes, with short reasoning traces that a tiny model can learn to write.

A question asks for one object, several or none. Each word of its trace follows from few earlier ones: a scan of all
objects from left to right, then one or two steps (a clause that says what to look for, and a verdict on each object),
then the answer: the targets by place, or, where the question asks for looks and `answers` is "fitting", by look.

This module knows nothing about pixels beyond an object's centre, nor about rows or models.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .scene_drawing import COLOURS, LOOKS, SHAPES, SIZES, Scene, SceneObject

KINDS = ("attribute", "relation", "extreme", "comparison", "knowledge", "counting")
"""The kinds of question."""

ANSWERS = ("place", "fitting")
"""How answers name their targets: by place always; or by look where the kind is one of `BY_LOOK`, else by place."""

BY_LOOK = ("attribute", "knowledge", "counting")
"""The kinds that ask for looks alone."""

# Pixels of a 128-pixel image: how clearly objects differ on an axis that a question decides by.
_DECISION_GAP = 12.0
_SIZE_RANK = {name: rank for rank, name in enumerate(SIZES)}
_PLURALS = {shape: "boxes" if shape == "box" else shape + "s" for shape in SHAPES}
_NUMBERS = {2: "two", 3: "three"}
_OUTCOME_SHARES = {"single": 0.52, "multi": 0.33, "none": 0.15}  # asked for; scenes do not allow all

_ONE = ("the {}", "find the {}", "segment the {}", "where is the {}")
_ALL = ("all {s}", "every {}", "find all {s}", "segment every {}")

_DIRECTIONS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}
_RELATION = ("what is {} the {}", "everything {} the {}", "find all things {} the {}", "which things are {} the {}")

# word -> (axis of the centre, or None for the size; sign: +1 when the smallest value is meant)
_EXTREMES: dict[str, tuple[int | None, int]] = {
    "leftmost": (0, 1),
    "rightmost": (0, -1),
    "highest": (1, 1),
    "lowest": (1, -1),
    "smallest": (None, 1),
    "largest": (None, -1),
}
_SYNONYMS = {"largest": ("largest", "biggest")}
_EXTREME = ("the {} {}", "find the {} {}", "segment the {} {}", "which is the {} {}")
_TWO_EXTREME = ("the two {} {}", "find the two {} {}", "segment the two {} {}", "which are the two {} {}")

_SAME = (
    "the other things with the same {} as the {}",
    "everything else with the same {} as the {}",
    "find all other things of the same {} as the {}",
    "which other things are of the same {} as the {}",
)
_THAN = ("everything {} than the {}", "find all things {} than the {}", "which things are {} than the {}")
_THAN_WORDS = {"larger": ("larger", "bigger"), "smaller": ("smaller",)}

# (what to ask, the words the reasoning repeats, the shapes meant)
_KNOWLEDGE = (
    ("to kick", "kick", ("ball",)),
    ("to play a game with", "game", ("ball",)),
    ("worn on a finger", "finger", ("ring",)),
    ("with a hole", "hole", ("ring",)),
    ("to pack things in", "pack", ("box",)),
    ("with four corners", "four corners", ("box",)),
    ("used at road works", "road works", ("cone",)),
    ("with three corners", "three corners", ("cone",)),
    ("with five points", "five points", ("star",)),
    ("that shines at night", "shines", ("star", "moon")),
    ("seen in the night sky", "night sky", ("star", "moon")),
    ("far away in space", "space", ("star", "moon")),
    ("that can roll", "roll", ("ball", "ring")),
)
_KNOWLEDGE_ONE = ("something {}", "find something {}", "segment the thing {}", "where is the thing {}")
_KNOWLEDGE_ALL = ("everything {}", "all things {}", "find all things {}", "segment everything {}")

_EXCEPT = ("everything except the {s}", "find everything but the {s}", "all things except the {s}")
_NOT = ("all things that are not {}", "find everything that is not {}", "which things are not {}")
_TIMES = (
    "all things whose {} appears exactly {}",
    "find everything whose {} appears exactly {}",
    "which things have a {} that appears exactly {}",
)


@dataclass(frozen=True)
class Phrase:
    """Some words of a trace that name objects."""

    text: str
    """The words, as they stand in `Question.reasoning`."""
    start: int
    """Where they begin there."""
    objects: tuple[int, ...]
    """Indices into `Scene.objects`, rising."""


@dataclass(frozen=True)
class Question:
    """A question about a scene and its answer."""

    kind: str
    """One of `KINDS`."""
    instruction: str
    """Lower case, without final punctuation."""
    reasoning: str
    """"<scan of all objects>. <steps>. answer: <targets>." as written between <think> and </think>.

    An object of the scan is "<place> <size> <colour> <shape>", a target "<place> <colour> <shape>", or by look "<size>
    <colour> <shape>" with equal looks in one phrase ("two small red balls"). A step is a clause
    that ends with what counts, and most often, after a full stop, a verdict on each object: "<place> <what counts> yes"
    or "... no". Questions about some object, or about the extreme of some, look for these first.
    """
    targets: list[int]
    """Indices into `Scene.objects`, rising; [] when nothing is asked for."""
    phrases: tuple[Phrase, ...] = ()
    """Those of the scan, then those of the answer: every object is named by the first, every target by the second."""


@dataclass(frozen=True)
class _Candidate:
    """A question that can be asked of a scene."""

    instructions: list[str]
    """Ways to ask it."""
    steps: list[str]
    """What the trace says between scan and answer."""
    targets: list[int]


def _noun_phrase(wanted: dict[str, str], plural: bool = False) -> str:
    """Words of a description, e.g. {"colour": "red"} -> "red thing"."""
    shape = wanted.get("shape", "thing")
    if plural:
        shape = _PLURALS.get(shape, "things")
    return " ".join([wanted[name] for name in ("size", "colour") if name in wanted] + [shape])


def _matching(objects: list[SceneObject], wanted: dict[str, str]) -> list[int]:
    return [i for i, thing in enumerate(objects) if all(getattr(thing, name) == v for name, v in wanted.items())]


def _listed(objects: list[SceneObject], chosen: Iterable[int], names: tuple[str, ...]) -> str:
    """The named attributes of the chosen objects, "B2 small, E5 large" for ("place", "size")."""
    return ", ".join(" ".join(getattr(objects[i], name) for name in names) for i in chosen)


def _judged(objects: list[SceneObject], names: tuple[str, ...], chosen: list[int]) -> str:
    """A verdict on each object, after the named attributes."""
    facts = [_listed(objects, [i], ("place", *names)) for i in range(len(objects))]
    return ", ".join(f"{fact} {'yes' if i in chosen else 'no'}" for i, fact in enumerate(facts))


def _search(objects: list[SceneObject], wanted: dict[str, str]) -> list[str]:
    """The steps that find what fits a description; none for the description that fits everything."""
    if not wanted:
        return []
    return ["look for " + " ".join(wanted.values()), _judged(objects, tuple(wanted), _matching(objects, wanted))]


def _forms(templates: tuple[str, ...], wanted: dict[str, str]) -> list[str]:
    return [template.format(_noun_phrase(wanted), s=_noun_phrase(wanted, plural=True)) for template in templates]


def _absent(rng: np.random.Generator, scene: Scene, names: tuple[str, ...], count: int) -> list[dict[str, str]]:
    """Up to `count` descriptions by the named attributes that fit no object; most share an attribute with one."""
    found = []
    for _ in range(3 * count):
        colour, shape = LOOKS[rng.integers(len(LOOKS))]
        wanted = {"size": list(SIZES)[rng.integers(len(SIZES))], "colour": colour, "shape": shape}
        near = scene.objects[rng.integers(len(scene.objects))]
        if len(names) > 1 and rng.random() < 0.7:
            kept = names[rng.integers(len(names))]
            wanted[kept] = getattr(near, kept)
        wanted = {name: wanted[name] for name in names}
        if not _matching(scene.objects, wanted) and wanted not in found:
            found.append(wanted)
            if len(found) == count:
                break
    return found


def _references(scene: Scene) -> list[tuple[int, dict[str, str]]]:
    """(index, description) of every short description that names one object of the scene."""
    found = []
    for index, thing in enumerate(scene.objects):
        for names in (("shape",), ("colour", "shape"), ("colour",), ("size", "shape")):
            wanted = {name: getattr(thing, name) for name in names}
            if len(_matching(scene.objects, wanted)) == 1:
                found.append((index, wanted))
    return found


def _missing_references(rng: np.random.Generator, scene: Scene) -> list[dict[str, str]]:
    return _absent(rng, scene, ("shape",), 1) + _absent(rng, scene, ("colour", "shape"), 1)


def _attribute(rng: np.random.Generator, scene: Scene) -> Iterator[_Candidate]:
    subsets: list[tuple[str, ...]] = [("shape",), ("colour",), ("colour", "shape"), ("size",), ("size", "shape")]
    subsets += [("size", "colour"), ("size", "colour", "shape")]
    present: list[dict[str, str]] = []
    for thing in scene.objects:
        present += [{name: getattr(thing, name) for name in names} for names in subsets]
    absent = [wanted for names in subsets for wanted in _absent(rng, scene, names, 1)]
    for position, wanted in enumerate(present + absent):
        if wanted in present[:position]:
            continue
        targets = _matching(scene.objects, wanted)
        templates = (_ONE if len(targets) < 2 else ()) + _ALL
        yield _Candidate(_forms(templates, wanted), _search(scene.objects, wanted), targets)


def _gap_seen(first: SceneObject, second: SceneObject, axis: int, gap: float) -> bool:
    """Whether the centres differ clearly on the axis: by `gap` pixels and, for rows, by the places in the trace."""
    far = abs(first.centre[axis] - second.centre[axis]) >= gap
    return far and (axis == 0 or first.place[1] != second.place[1])


def _relation(rng: np.random.Generator, scene: Scene) -> Iterator[_Candidate]:
    objects, gap = scene.objects, _DECISION_GAP * max(scene.image.shape[:2]) / 128
    for index, wanted in _references(scene):
        anchor, name = objects[index], _noun_phrase(wanted)
        for direction, words in _DIRECTIONS.items():
            axis, sign = (0 if "of" in direction else 1), (-1 if direction in ("left of", "above") else 1)
            others = [i for i in range(len(objects)) if i != index]
            if not all(_gap_seen(objects[i], anchor, axis, gap) for i in others):
                continue
            targets = [i for i in others if sign * (objects[i].centre[axis] - anchor.centre[axis]) > 0]
            asked = [template.format(word, name) for template in _RELATION for word in words]
            steps = [*_search(objects, wanted), f"{direction} {anchor.place}", _judged(objects, (), targets)]
            yield _Candidate(asked, steps, targets)
    for wanted in _missing_references(rng, scene):
        name = _noun_phrase(wanted)
        words = list(_DIRECTIONS.values())[rng.integers(len(_DIRECTIONS))]
        asked = [t.format(word, name) for t in _RELATION for word in words]
        yield _Candidate(asked, _search(scene.objects, wanted), [])


def _extreme(rng: np.random.Generator, scene: Scene) -> Iterator[_Candidate]:
    objects, gap = scene.objects, _DECISION_GAP * max(scene.image.shape[:2]) / 128
    descriptions: list[dict[str, str]] = [{}]  # of everything
    descriptions += [{"shape": shape} for shape in SHAPES] + [{"colour": colour} for colour in COLOURS]
    for wanted in descriptions:
        pool = _matching(objects, wanted)
        for word, (axis, sign) in _EXTREMES.items():
            words = _SYNONYMS.get(word, (word,))
            values = [_SIZE_RANK[thing.size] if axis is None else thing.centre[axis] for thing in objects]
            ranked = sorted(pool, key=[sign * value for value in values].__getitem__)
            for count in (1, 2):
                if len(pool) <= count:
                    continue
                last, after = objects[ranked[count - 1]], objects[ranked[count]]
                if not (last.size != after.size if axis is None else _gap_seen(last, after, axis, gap)):
                    continue
                targets = sorted(ranked[:count])
                phrase = _noun_phrase(wanted, plural=count == 2)
                asked = [t.format(w, phrase) for t in (_EXTREME, _TWO_EXTREME)[count - 1] for w in words]
                shown = ("place", "size") if axis is None else ("place",)
                among, found = _listed(objects, pool, shown), _listed(objects, targets, ("place",))
                which = f"{word} of {among} is {found}" if count == 1 else f"two {word} of {among} are {found}"
                yield _Candidate(asked, [*_search(objects, wanted), which], targets)
    absent = _absent(rng, scene, ("shape",), 2) + _absent(rng, scene, ("colour",), 1)
    for wanted in absent + _absent(rng, scene, ("colour", "shape"), 2):
        word = list(_EXTREMES)[rng.integers(len(_EXTREMES))]
        phrase = _noun_phrase(wanted)
        asked = [t.format(w, phrase) for t in _EXTREME for w in _SYNONYMS.get(word, (word,))]
        yield _Candidate(asked, _search(objects, wanted), [])


def _comparison(rng: np.random.Generator, scene: Scene) -> Iterator[_Candidate]:
    objects = scene.objects
    for index, wanted in _references(scene):
        anchor, name, search = objects[index], _noun_phrase(wanted), _search(objects, wanted)
        for attribute in ("colour", "shape", "size"):
            value = getattr(anchor, attribute)
            if value in name.split():
                continue  # "the same colour as the red ball" compares nothing
            targets = [i for i in _matching(objects, {attribute: value}) if i != index]
            asked = [template.format(attribute, name) for template in _SAME]
            steps = [*search, f"same {attribute} as {anchor.place}, {value}", _judged(objects, (attribute,), targets)]
            yield _Candidate(asked, steps, targets)
        if anchor.size in name.split():
            continue
        for word, sign in (("larger", 1), ("smaller", -1)):
            rank = _SIZE_RANK[anchor.size]
            targets = [i for i, thing in enumerate(objects) if sign * (_SIZE_RANK[thing.size] - rank) > 0]
            asked = [template.format(w, name) for template in _THAN for w in _THAN_WORDS[word]]
            steps = [*search, f"{word} than {anchor.place}, {anchor.size}", _judged(objects, ("size",), targets)]
            yield _Candidate(asked, steps, targets)
    for wanted in _missing_references(rng, scene):
        name = _noun_phrase(wanted)
        attribute = "size" if rng.random() < 0.5 else "colour"
        asked = [t.format(attribute, name) for t in _SAME]
        asked += [t.format(word, name) for t in _THAN for words in _THAN_WORDS.values() for word in words]
        yield _Candidate(asked, _search(objects, wanted), [])


def _knowledge(rng: np.random.Generator, scene: Scene) -> Iterator[_Candidate]:
    for phrase, key, shapes in _KNOWLEDGE:
        targets = [i for i, thing in enumerate(scene.objects) if thing.shape in shapes]
        templates = (_KNOWLEDGE_ONE if len(targets) < 2 else ()) + _KNOWLEDGE_ALL
        steps = [f"{key} means {' or '.join(shapes)}", _judged(scene.objects, ("shape",), targets)]
        yield _Candidate([t.format(phrase) for t in templates], steps, targets)


def _counting(rng: np.random.Generator, scene: Scene) -> Iterator[_Candidate]:
    objects = scene.objects
    for attribute, templates in (("shape", _EXCEPT), ("colour", _EXCEPT + _NOT), ("size", _NOT)):
        for value in dict.fromkeys(getattr(thing, attribute) for thing in objects):
            targets = [i for i, thing in enumerate(objects) if getattr(thing, attribute) != value]
            asked = _forms(templates, {attribute: value}) if attribute == "shape" else []
            if attribute != "shape":
                asked = [t.format(value, s=f"{value} things") for t in templates]
            yield _Candidate(asked, [f"not {value}", _judged(objects, (attribute,), targets)], targets)
    for attribute in ("colour", "shape", "size"):
        values = [getattr(thing, attribute) for thing in objects]
        for count, word in ((1, "once"), (2, "twice")):
            named = [value for value in dict.fromkeys(values) if values.count(value) == count]
            if len(named) > 2:
                continue  # keeps the traces short
            targets = [i for i, value in enumerate(values) if value in named]
            asked = [template.format(attribute, word) for template in _TIMES]
            clause = f"{', '.join(values)}, {word} is {' and '.join(named) or 'no ' + attribute}"
            yield _Candidate(asked, [clause, _judged(objects, (attribute,), targets)], targets)


_BUILDERS: dict[str, Callable[[np.random.Generator, Scene], Iterator[_Candidate]]] = {
    "attribute": _attribute,
    "relation": _relation,
    "extreme": _extreme,
    "comparison": _comparison,
    "knowledge": _knowledge,
    "counting": _counting,
}


def _outcome(targets: list[int]) -> str:
    return ("none", "single", "multi")[min(len(targets), 2)]


def check_answers(answers: str) -> None:
    """Raises ValueError for an unknown way to answer."""
    if answers not in ANSWERS:
        raise ValueError(f"answers={answers!r} is not one of {', '.join(ANSWERS)}; choose one of these.")


def ask(rng: np.random.Generator, scene: Scene, kind: str | None = None, answers: str = "place") -> Question:
    """Ask a question about a scene.

    About 58 % of the questions have one target, 23 % several, 19 % none. Only questions whose answer follows from
    the scan in `Question.reasoning` are asked: size questions compare size names, left and right follow the order
    of the scan, above and below its rows.

    Args:
        rng: source of all randomness.
        scene: what `draw_scene` returned.
        kind: one of `KINDS`; drawn uniformly when None.
        answers: one of `ANSWERS`. Questions and targets do not hang on it.

    Returns:
        Question: its targets index `scene.objects` from left to right.

    Raises:
        ValueError: an unknown kind, or an unknown way to answer.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> ask(rng, scene_drawing.draw_scene(rng, "train"), "counting").instruction
        'which things have a shape that appears exactly twice'
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}; choose one of these or None for any.")
    check_answers(answers)
    names, shares = list(_OUTCOME_SHARES), list(_OUTCOME_SHARES.values())
    kind = kind or KINDS[rng.integers(len(KINDS))]
    wanted = rng.choice(names, size=len(names), replace=False, p=shares).tolist()
    candidates = list(_BUILDERS[kind](rng, scene))
    outcome = min((_outcome(candidate.targets) for candidate in candidates), key=wanted.index)
    fitting = [candidate for candidate in candidates if _outcome(candidate.targets) == outcome]
    chosen = fitting[rng.integers(len(fitting))]
    instruction = chosen.instructions[rng.integers(len(chosen.instructions))]
    by_look = answers == "fitting" and kind in BY_LOOK
    reasoning, phrases = _trace(scene.objects, chosen, by_look)
    return Question(kind, instruction, reasoning, chosen.targets, phrases)


def _trace(objects: list[SceneObject], chosen: _Candidate, by_look: bool) -> tuple[str, tuple[Phrase, ...]]:
    """The reasoning, and the phrases of its scan and of its answer."""
    scan = [(_listed(objects, [i], ("place", "size", "colour", "shape")), (i,)) for i in range(len(objects))]
    answer = (_looks if by_look else _places)(objects, chosen.targets)
    before = ". ".join([", ".join(text for text, _ in scan), *chosen.steps, "answer: "])
    reasoning = before + (", ".join(text for text, _ in answer) or "none") + "."
    phrases = []
    for start, named in ((0, scan), (len(before), answer)):
        for text, indices in named:
            phrases.append(Phrase(text, start, indices))
            start += len(text) + len(", ")
    return reasoning, tuple(phrases)


def _places(objects: list[SceneObject], targets: list[int]) -> list[tuple[str, tuple[int, ...]]]:
    """A phrase for each target, by place."""
    return [(_listed(objects, [i], ("place", "colour", "shape")), (i,)) for i in targets]


def _looks(objects: list[SceneObject], targets: list[int]) -> list[tuple[str, tuple[int, ...]]]:
    """A phrase for each look among the targets, with their number where they are several."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for index in targets:
        groups.setdefault((objects[index].size, objects[index].colour, objects[index].shape), []).append(index)
    named = []
    for (size, colour, shape), group in groups.items():
        words = [size, colour, shape] if len(group) == 1 else [_NUMBERS[len(group)], size, colour, _PLURALS[shape]]
        named.append((" ".join(words), tuple(group)))
    return named


_SINGULARS = {plural: shape for shape, plural in _PLURALS.items()}


def word_kind(word: str) -> tuple[str, str] | None:
    """What a word of a phrase says of the objects that it names.

    Args:
        word: of a phrase; a place's column and row are two words.

    Returns:
        (kind, meaning), such as ("shape", "ball") for "balls"; None for a word that says nothing of each, like "two".

    Example:
        >>> [word_kind(word) for word in ("A", "3", "balls", "two")]
        [('column', 'A'), ('row', '3'), ('shape', 'ball'), None]
    """
    word = _SINGULARS.get(word, word)
    kinds = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "column": "ABCD", "row": "1234"}
    return next(((kind, word) for kind, words in kinds.items() if word in words), None)
