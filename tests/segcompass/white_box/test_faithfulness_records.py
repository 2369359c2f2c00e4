"""What is summed up over the masks of a data set."""

import pytest

from segcompass.white_box.faithfulness import FRACTIONS, ORDERS
from segcompass.white_box.faithfulness_records import SOURCES, summarise_records


def record(name, drops):
    """A sample whose slots fall by these (top, random) amounts."""
    curve = {order: [1.0] * len(FRACTIONS) for order in ORDERS}
    slots = [
        {
            "slot": 0,
            "full": 0.8,
            "deletion": curve,
            "insertion": curve,
            "without_top": 0.8 - top,
            "without_random": 0.8 - random,
            "only_top": 0.7,
            "only_random": 0.2,
        }
        for top, random in drops
    ]
    counts = {"I": 1, "U": 2, "pred_empty": False, "ref_empty": False}
    return {"sample_id": name, "counts": dict.fromkeys(SOURCES, counts), "slots": slots}


def test_ratio_is_of_the_medians_and_of_the_means():
    metrics = summarise_records([record("a", [(0.6, 0.1), (0.2, 0.1)]), record("b", [(0.4, 0.1)])], 5)
    assert (metrics["masks"], metrics["scenes_with_masks"]) == (3, 2)
    assert metrics["drop_top_median"][0] == pytest.approx(0.4)
    assert metrics["ratio_of_medians"][0] == pytest.approx(4)
    assert metrics["ratio_of_means"][0] == pytest.approx(4)
    assert metrics["sufficiency"][0] == pytest.approx(0.1)
    assert metrics["sufficiency_random"][0] == pytest.approx(0.6)
    assert metrics["deletion"]["weight"]["auc"][0] == pytest.approx(1)
    low, high = metrics["ratio_of_medians"][1:]
    assert low <= 4 + 1e-9 and high >= 4 - 1e-9
