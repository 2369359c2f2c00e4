"""Does the white box mean what it shows? Six questions to a mask, as numbers, each beside a control.

    name     do the slot's heavy concepts detect attributes of the object it shows, rather than of the others?
    locate   does the map that is shown lie on the object?
    move     do other concepts move the mask, or does the concentration token decide? (`criteria_records`)
    steer    does the mask follow when named concepts are switched off or replaced?
    content  is what the heavy concepts carry used, or only that they are there?
    shown    is what is shown used at all?

A mask is made again under a `Change` by a `Reading`, so that nothing here knows how a model reads its concepts; the
models' readings are in `concept_access`. Knows nothing about data sets: `criteria_records` applies this to images.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from .decoding import overlap
from .intervals import bootstrap

TOP = 5
"""How many of a slot's heaviest concepts are taken together."""
SHOWS = 0.5
"""IoU from which a mask shows an object."""
COVERED = 0.5
"""Share of a patch from which it shows an object."""


class Change(NamedTuple):
    """What is different when a mask is made again; concepts are features of the SAE."""

    off: tuple[int, ...] = ()
    """concepts that are switched off; no other takes their place."""
    to: tuple[int, ...] = ()
    """concepts that get the weight of those switched off."""
    mean: tuple[int, ...] = ()
    """concepts whose content (strength and place) is replaced by their mean over a data set; they stay present."""
    silent: str = ""
    """"image" or "text": what fires there counts as not fired; "" leaves all."""


class Reading(Protocol):
    """One sample's concepts, and its masks under changes. M concepts, K slots."""

    indices: np.ndarray
    """long (M,), features of the SAE."""
    weights: np.ndarray
    """float (K, M), how much each concept weighs in each slot."""
    active: np.ndarray
    """bool (M,), those of them that fired."""
    fired: np.ndarray
    """long (F,), all features that can have a weight in this sample."""
    patch_boxes: torch.Tensor
    """float (patches, 4), the part of the image that each patch of `shown` shows."""

    def shown(self, weights: np.ndarray) -> np.ndarray:
        """The map that is shown of concepts with these weights, float (M,) -> float (patches,)."""

    def sum_error(self, slot: int) -> float:
        """How far the shown contributions' sum is from the slot's heatmap, the greatest difference of logits."""

    def masks(self, slot: int, changes: Sequence[Change]) -> torch.Tensor:
        """The slot's mask under each change, bool (V, H, W); empty where the slot is not confident any more."""


class Labels(NamedTuple):
    """Which concepts detect which attributes, found on other samples than those that are examined."""

    names: Mapping[str, np.ndarray]
    """attribute -> bool (d_sae,), concepts that name it (F1 of 0.8 or more and lift of 0.5 or more in a reading)."""
    steers: Mapping[str, tuple[int, ...]]
    """look -> concepts that detect it on patches well enough to be switched off for it (F1 of 0.3 or more)."""
    hands: Mapping[str, tuple[int, ...]]
    """look -> concepts that detect it on patches well enough to be given weight (F1 of 0.5 or more)."""


class Truth(NamedTuple):
    """What is true of a sample with n objects."""

    masks: torch.Tensor
    """bool (n, H, W), on the frame of the mask logits."""
    cover: np.ndarray
    """float (n, patches), how much of each patch shows each object."""
    looks: list[dict[str, str]]
    """of each object, kind -> attribute, such as {"colour": "red"}; a kind that is not known of it is missing."""
    places: list[tuple[str, ...]]
    """of each object, the attributes that say where it is."""
    targets: list[int]
    """the objects that were asked for."""
    steered: tuple[str, ...] = ("colour", "shape")
    """the kinds by which one object is turned into another."""

    def attributes(self, thing: int) -> set[str]:
        """All attributes of an object."""
        return {*self.looks[thing].values(), *self.places[thing]}


def named_share(
    weights: np.ndarray, indices: np.ndarray, attributes: set[str], names: Mapping[str, np.ndarray]
) -> float:
    """Share of a slot's weight on concepts that name one of some attributes.

    Args:
        weights: float (M,).
        indices: long (M,), their features.
        attributes: what counts.
        names: see `Labels`.

    Returns:
        The share, in [0, 1]; nan without weight.
    """
    hits = np.zeros(len(indices), bool)
    for attribute in attributes & set(names):
        hits |= names[attribute][indices]
    total = float(weights.sum())
    return float(weights[hits].sum()) / total if total > 0 else float("nan")


def pointing(shown: np.ndarray, cover: np.ndarray) -> float:
    """Whether a map's maximum lies on a patch that the object touches; among several maxima, the share that does."""
    return float((cover > 0)[shown == shown.max()].mean())


def area_against(shown: np.ndarray, cover: np.ndarray, others: np.ndarray) -> float:
    """Area under the ROC curve of a map for the object's patches against those of other objects.

    Args:
        shown: float (patches,).
        cover: float (patches,), how much of each patch shows the object.
        others: the same of the other objects.

    Returns:
        0.5 is chance; nan where the object or the others cover no patch by half.
    """
    inside, outside = shown[cover >= COVERED], shown[(others >= COVERED) & (cover == 0)]
    if not len(inside) or not len(outside):
        return float("nan")
    above = (inside[:, None] > outside) + 0.5 * (inside[:, None] == outside)
    return float(above.mean())


def energy_inside(shown: np.ndarray, cover: np.ndarray) -> float:
    """Share of a map's mass that lies on the object; 0 for an empty map."""
    total = float(np.maximum(shown, 0).sum())
    return float((np.maximum(shown, 0) * cover).sum()) / total if total > 0 else 0.0


def measure_slot(
    reading: Reading, slot: int, target: int, truth: Truth, labels: Labels, rng: np.random.Generator
) -> dict[str, float]:
    """Everything but `move`, of one slot.

    Args:
        reading: of the slot's sample.
        slot: k.
        target: the object that the slot's mask shows.
        truth: of the sample.
        labels: from other samples.
        rng: for the random concepts.

    Returns:
        Name -> number, nan where there is nothing to measure. Names that end with "_control" are measured alike with
        random or equally weighted concepts.
    """
    weights, indices = reading.weights[slot], reading.indices
    equal = reading.active.astype(float)  # (M,)
    others = [thing for thing in range(len(truth.looks)) if thing != target]
    cover = truth.cover[target]
    elsewhere = truth.cover[others].max(0) if others else np.zeros_like(cover)
    record: dict[str, float] = {}
    for suffix, chosen in (("", weights), ("_control", equal)):
        shares = _name_shares(chosen, indices, target, others, truth, labels)
        shown = reading.shown(chosen)
        record |= {name + suffix: value for name, value in shares.items()}
        record["pointing" + suffix] = pointing(shown, cover)
        record["auc_others" + suffix] = area_against(shown, cover, elsewhere)
        record["energy" + suffix] = energy_inside(shown, cover)
    record["sum_error"] = reading.sum_error(slot)

    fired = reading.fired
    order = np.argsort(-weights, kind="stable")[:TOP]
    heavy = indices[order[reading.active[order] & (weights[order] > 0)]]
    rest = np.setdiff1d(fired, heavy)
    drawn = rng.permutation(rest)[: len(heavy)]
    changes = {
        "full": Change(),
        "without_top": Change(off=_ids(heavy)),
        "mean_top": Change(mean=_ids(heavy)),
        "without_random": Change(off=_ids(drawn)),
        "mean_random": Change(mean=_ids(drawn)),
        "without_shown": Change(silent="image"),
        "without_words": Change(silent="text"),
    }
    rival = _rival(target, others, truth) if len(truth.targets) == 1 else None
    if rival is not None:
        changes |= _steering(target, rival, truth, labels, fired, rng)
    masks = reading.masks(slot, list(changes.values()))  # (V, H, W)
    ious = dict(zip(changes, overlap(masks, truth.masks[target]).tolist(), strict=True))
    record |= {f"iou_{name}": value for name, value in ious.items()}
    if rival is not None:
        of_rival = dict(zip(changes, overlap(masks, truth.masks[rival]).tolist(), strict=True))
        record["steer_own"] = ious["random_off"] - ious["own_off"]
        record["steer_others"] = ious["full"] - ious["others_off"]
        record["steer_flip"] = float(of_rival["handed"] >= SHOWS)
        record["steer_flip_control"] = float(of_rival["handed_random"] >= SHOWS)
    return record


def _name_shares(weights, indices, target, others, truth, labels):
    mine = truth.attributes(target)
    theirs = [truth.attributes(thing) for thing in others]
    share = lambda attributes: named_share(weights, indices, attributes, labels.names)  # noqa: E731
    rivals = [share(attributes - mine) for attributes in theirs if attributes - mine]
    return {
        "name": share(mine),
        "name_look": share(set(truth.looks[target].values())) if truth.looks[target] else float("nan"),
        "own": share(mine.difference(*theirs)) if others else float("nan"),
        "others": float(np.mean(rivals)) if rivals else float("nan"),
    }


def _differing(own: Mapping[str, str], other: Mapping[str, str], truth: Truth) -> list[str]:
    """The kinds of look that are known of two objects, and differ."""
    return [kind for kind in truth.steered if kind in own and kind in other and own[kind] != other[kind]]


def _rival(target: int, others: Sequence[int], truth: Truth) -> int | None:
    """The object that differs most in the looks that steering exchanges; None when none differs."""

    def differs(thing):
        return len(_differing(truth.looks[target], truth.looks[thing], truth))

    rival = max(others, key=differs, default=None)
    return rival if rival is not None and differs(rival) else None


def _steering(target, rival, truth, labels, fired, rng):
    """The changes of the steering criterion: by the looks in which the two objects differ."""
    own, other = truth.looks[target], truth.looks[rival]
    differing = _differing(own, other, truth)
    detect = lambda table, looks: {j for name in differing for j in table.get(looks[name], ())}  # noqa: E731
    up = detect(labels.steers, other)
    off = detect(labels.steers, own) - up
    others_off = up - off
    count = max(1, int(np.isin(fired, sorted(off)).sum()))
    drawn = rng.permutation(np.setdiff1d(fired, sorted(off)))
    to = [j for j in sorted(detect(labels.hands, other) - off) if j in fired]
    to_random = rng.permutation(np.setdiff1d(fired, [*off, *up]))[: len(to)]
    return {
        "own_off": Change(off=_ids(sorted(off))),
        "random_off": Change(off=_ids(drawn[:count])),
        "others_off": Change(off=_ids(sorted(others_off))),
        "handed": Change(off=_ids(sorted(off)), to=_ids(to)),
        "handed_random": Change(off=_ids(sorted(off)), to=_ids(to_random)),
    }


def _ids(features: Any) -> tuple[int, ...]:
    return tuple(int(feature) for feature in features)


# -- summing up ---------------------------------------------------------------------------------------------------


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _mean_ratio(values: np.ndarray) -> float:
    """Mean of the first column over the mean of the second, of the rows that have both; nan of nothing over nothing."""
    known = values[~np.isnan(values).any(1)]
    if not known.any():
        return float("nan")
    above, below = known.mean(0)
    return float(above / max(below, 1e-3))


def summarise_criteria(
    slots: Sequence[Mapping[str, float]],
    groups: Sequence[str],
    moves: Sequence[Mapping[str, float]] = (),
    move_groups: Sequence[str] = (),
    twins: Sequence[float] = (),
    twin_groups: Sequence[str] = (),
    steered: Sequence[Mapping[str, float]] = (),
    steered_groups: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """The criteria with 95 % bootstrap intervals over images.

    Args:
        slots: what `measure_slot` returned of each slot; None stands for nan.
        groups: the image of each slot.
        moves: of each pair of questions, `move` and `move_control`, 0 or 1.
        move_groups: the image of each pair.
        twins: of each target whose looks another object has too, 1 if a right mask shows it, else 0.
        twin_groups: the image of each of those.
        steered: what `measure_steered_reasoning` returned of each response.
        steered_groups: the image of each of those.
        seed: of the bootstrap.

    Returns:
        Criterion -> [mean, low, high], or None where nothing was measured; `sum_error`, the greatest; `controls`, the
        same of random concepts; `iou`, the masks' IoU under the changes behind `content` and `shown`.
    """

    def column(name, rows=slots):
        return np.array([np.nan if row.get(name) is None else row[name] for row in rows], dtype=float)

    def interval(values, statistic=_mean, of=groups):
        if not len(values) or np.isnan(statistic(values)):
            return None
        return [round(value, 4) for value in bootstrap(values, statistic, of, resamples=1000, seed=seed)]

    def lost(name):  # IoU that a change costs
        return column("iou_full") - column(f"iou_{name}")

    pair = lambda above, below: np.stack([above, below], 1)  # noqa: E731
    controls = {
        name: interval(column(f"{name}_control"))
        for name in ("name", "name_look", "pointing", "auc_others", "energy", "steer_flip")
    }
    controls["selectivity"] = interval(pair(column("own_control"), column("others_control")), _mean_ratio)
    controls["move"] = interval(column("move_control", moves), of=move_groups)
    controls["content"] = interval(pair(lost("mean_random"), lost("without_top")), _mean_ratio)
    for name in ("swap", "off"):
        controls[f"write_{name}"] = interval(column(f"{name}_control", steered), of=steered_groups)
    controls["shown"] = interval(pair(lost("without_words"), column("iou_full")), _mean_ratio)
    errors = column("sum_error")
    return {
        "name": interval(column("name")),
        "name_look": interval(column("name_look")),
        "selectivity": interval(pair(column("own"), column("others")), _mean_ratio),
        "pointing": interval(column("pointing")),
        "auc_others": interval(column("auc_others")),
        "energy": interval(column("energy")),
        "move": interval(column("move", moves), of=move_groups),
        "steer_own": interval(column("steer_own")),
        "steer_others": interval(column("steer_others")),
        "steer_flip": interval(column("steer_flip")),
        "content": interval(pair(lost("mean_top"), lost("without_top")), _mean_ratio),
        "shown": interval(pair(lost("without_shown"), column("iou_full")), _mean_ratio),
        "write_swap": interval(column("swap", steered), of=steered_groups),
        "write_off": interval(column("off", steered), of=steered_groups),
        "write_doubled": interval(column("doubled", steered), of=steered_groups),
        "twins": interval(np.array(twins, float), of=twin_groups),
        "sum_error": float(f"{errors.max():.3g}") if len(errors) else None,
        "controls": controls,
        "iou": {
            name: interval(column(f"iou_{name}"))
            for name in ("full", "without_top", "mean_top", "without_random", "without_shown", "own_off", "random_off")
        },
        "masks": len(slots),
        "pairs": len(moves),
        "steered responses": len(steered),
    }
