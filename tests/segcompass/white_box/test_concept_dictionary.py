"""The dictionary says where features fire, in any batches; detectors are scored on samples they were not chosen on."""

import json

import numpy as np
import pytest
import torch

from segcompass.modeling_segcompass.concept_dictionary import (
    ConceptDictionary,
    Context,
    DictionaryBuilder,
    best_detectors,
    score,
    short_label,
)
from segcompass.modeling_segcompass.token_layout import IMAGE, INSTRUCTION, RESPONSE

TOKENS, FEATURES = 60, 7
WORDS = ["red", "blue", "ball"]


def activations(seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.rand(TOKENS, FEATURES, generator=generator) * (torch.rand(TOKENS, FEATURES, generator=generator) > 0.6)
    h[:, 5] = 0  # never fires
    return h, torch.randint(0, 3, (TOKENS,), generator=generator)


def describe(place):
    return {"sample": f"s{place // 10}", "part": "response", "text": WORDS[place % 3], "around": f"token {place}"}


def build(batch):
    h, parts = activations()
    builder = DictionaryBuilder(FEATURES, contexts=4)
    for start in range(0, TOKENS, batch):
        builder.add(h[start : start + batch], parts[start : start + batch])
    return builder.finish(describe, "a test")


def test_entries_are_what_a_look_at_all_activations_says():
    h, parts = activations()
    for index, entry in enumerate(build(TOKENS).entries):
        column = h[:, index].numpy()
        fires = column > 0
        assert entry.index == index and entry.density == pytest.approx(fires.mean())
        if not fires.any():
            assert entry.label is None and entry.contexts == [] and not any(entry.profile.values())
            continue
        assert entry.strength == pytest.approx(column[fires].mean())
        for name, part in (("image", IMAGE), ("instruction", INSTRUCTION), ("response", RESPONSE)):
            assert entry.profile[name] == pytest.approx((parts.numpy()[fires] == part).mean())
        order = np.argsort(-column)[:4]
        assert [context.around for context in entry.contexts] == [f"token {place}" for place in order]
        assert [context.strength for context in entry.contexts] == pytest.approx(column[order], abs=1e-4)


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_batches_change_nothing(batch):
    assert build(batch).entries == build(13).entries


def test_building_can_be_cut_off_and_go_on(tmp_path):
    h, parts = activations()
    builder = DictionaryBuilder(FEATURES, contexts=4)
    builder.add(h[:25], parts[:25])
    torch.save(builder.state_dict(), tmp_path / "partial.pt")
    resumed = DictionaryBuilder(FEATURES, contexts=4)
    resumed.load_state_dict(torch.load(tmp_path / "partial.pt", weights_only=True))
    resumed.add(h[25:], parts[25:])
    assert resumed.finish(describe, "a test").entries == build(TOKENS).entries


def test_saved_dictionary_loads_the_same(tmp_path):
    dictionary = build(TOKENS)
    dictionary.save_pretrained(tmp_path)
    loaded = ConceptDictionary.from_pretrained(str(tmp_path))
    assert loaded.entries == dictionary.entries and loaded.labels == dictionary.labels
    assert (loaded.tokens, loaded.source) == (TOKENS, "a test")
    assert 5 not in loaded.labels and len(loaded.labels) == FEATURES - 1


def test_missing_dictionary_is_none_and_a_damaged_one_is_named(tmp_path):
    assert ConceptDictionary.from_pretrained(str(tmp_path)) is None
    (tmp_path / "concepts.json").write_text(json.dumps({"tokens": 3}))
    with pytest.raises(ValueError, match="concepts.json is no concept dictionary"):
        ConceptDictionary.from_pretrained(str(tmp_path))


def context(text, part="response"):
    return Context("s", 1.0, part, text, "")


@pytest.mark.parametrize(
    "contexts, label",
    [
        ([context("red")] * 3 + [context("blue")], "red (word)"),
        ([context("a"), context("b"), context("c")], "a/b/c (word)"),
        ([context("large red ball", "image"), context("small red ball", "image")], "red ball (patch)"),
        ([context("ground", "image")] * 3 + [context("red")], "ground (patch)"),
    ],
)
def test_labels_are_what_the_strongest_contexts_share(contexts, label):
    assert short_label(contexts) == label


def test_page_shows_every_feature_that_fired():
    page = build(TOKENS).to_html(lambda context: "data:image/png;base64,AA==" if "token 3" in context.around else None)
    assert page.count("<tr id=") == FEATURES - 1 and "<tr id='c5'" not in page
    assert "data:image/png" in page and "6 of 7 features fired on 60 tokens" in page and "http" not in page


def brute_force(h, present):
    """The best F1 over every feature and every threshold that separates its values."""
    best = 0.0
    for index in range(h.shape[1]):
        for level in [0.0, *h[:, index].tolist()]:
            best = max(best, score(h[:, index] > level, present)[2])
    return best


def test_detectors_are_the_best_feature_and_are_scored_elsewhere():
    generator = torch.Generator().manual_seed(1)
    h, other = (torch.rand(80, 9, generator=generator) for _ in range(2))
    present, present_other = h[:, 4] > 0.7, other[:, 4] > 0.6  # the held-out truth is shifted
    found = best_detectors(h, {"x": present}, other, {"x": present_other}, thresholds=80)["x"]
    assert found.index == 4 and found.chosen_f1 == pytest.approx(brute_force(h, present)) == 1
    fires = other[:, 4] > found.threshold
    hits = (fires & present_other).sum().item()
    assert found.precision == pytest.approx(hits / fires.sum().item())
    assert found.recall == pytest.approx(hits / present_other.sum().item())
    assert found.f1 < 1
    assert found.f1 == pytest.approx(2 * found.precision * found.recall / (found.precision + found.recall))


def test_noise_detects_nothing():
    generator = torch.Generator().manual_seed(2)
    h, other = (torch.rand(300, 20, generator=generator) for _ in range(2))
    truth, other_truth = (torch.rand(300, generator=generator) < 0.2 for _ in range(2))
    found = best_detectors(h, {"x": truth}, other, {"x": other_truth})["x"]
    assert found.f1 < 0.5


def test_attribute_that_never_or_always_holds_is_refused():
    h = torch.rand(4, 2)
    some = torch.tensor([True, False, True, False])
    for wrong, word in ((some & False, "never"), (some | True, "always")):
        with pytest.raises(ValueError, match=f"attribute 'x' is {word} present in the samples held out"):
            best_detectors(h, {"x": some}, h, {"x": wrong})
