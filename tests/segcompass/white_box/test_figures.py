"""The figures' numbers: bands, patches, and records that do not depend on the batch."""

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from segcompass.loaders.scenes import load_scenes
from segcompass.loading import load
from segcompass.white_box.figure_records import measure, patches_of_pixels
from segcompass.white_box.figures import confidence_band


def test_band_of_the_regression_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(400):
        x = rng.uniform(size=25)
        y = 1 + 2 * x + rng.normal(size=25)
        at, low, high = confidence_band(x, y, stats.linregress(x, y))
        covered.append(low[20] <= 1 + 2 * at[20] <= high[20])
    assert np.mean(covered) == pytest.approx(0.95, abs=0.035)  # three standard errors of 400 trials


def test_pixels_belong_to_the_patch_that_sees_them(saved):
    image = Image.new("RGB", (60, 40))
    boxes = saved[1].patch_boxes(image)[0].numpy()
    patches = patches_of_pixels(boxes, *image.size)
    assert patches.shape == (40, 60)
    crops = getattr(saved[1].image_processor, "do_center_crop", False)
    assert patches[0, 0] == (-1 if crops else 0)
    assert (patches[0, 10], patches[39, 49]) == (0, len(boxes) - 1)
    shown = np.bincount(patches[patches >= 0], minlength=len(boxes))
    assert shown.max() - shown.min() <= 15, "equal patches, but for a row of pixels"


def test_records_do_not_depend_on_the_batch(saved, writes):
    folder, processor = saved
    writes("<think>a red ball</think>" + "<REF_POS>" * 3, processor)
    model, processor = load(folder)
    rows = list(load_scenes(split="test", seed=3, num_samples=4))
    together = [record["coverage"]["random"] for record in measure(model, processor, rows, seed=1)]
    alone = [record["coverage"]["random"] for row in rows for record in measure(model, processor, [row], seed=1)]
    assert together == alone and any(together)
    other = [record["coverage"]["random"] for record in measure(model, processor, rows, seed=2)]
    assert other != together, "another seed draws another ranking"
    firsts = [curves[0] for curves in together if curves]
    assert len(firsts) > 1 and firsts[0] != firsts[1], "each sample has a ranking of its own"
