"""The dictionary says where features fire, in any batches, and keeps what it says when it is saved."""

import json

import numpy as np
import pytest
import torch

from segcompass.modeling_segcompass.token_layout import IMAGE, INSTRUCTION, RESPONSE
from segcompass.white_box.concept_dictionary import ConceptDictionary, Context, DictionaryBuilder, short_label

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
    h, token_types = activations()
    builder = DictionaryBuilder(FEATURES, contexts=4)
    for start in range(0, TOKENS, batch):
        builder.add(h[start : start + batch], token_types[start : start + batch])
    return builder.finish(describe, "a test")


def test_entries_are_what_a_look_at_all_activations_says():
    h, token_types = activations()
    for index, entry in enumerate(build(TOKENS).entries):
        column = h[:, index].numpy()
        fires = column > 0
        assert entry.index == index and entry.density == pytest.approx(fires.mean())
        if not fires.any():
            assert entry.label is None and entry.contexts == [] and not any(entry.profile.values())
            continue
        assert entry.strength == pytest.approx(column[fires].mean())
        for name, kind in (("image", IMAGE), ("instruction", INSTRUCTION), ("response", RESPONSE)):
            assert entry.profile[name] == pytest.approx((token_types.numpy()[fires] == kind).mean())
        order = np.argsort(-column)[:4]
        assert [context.around for context in entry.contexts] == [f"token {place}" for place in order]
        assert [context.strength for context in entry.contexts] == pytest.approx(column[order], abs=1e-4)


@pytest.mark.parametrize("batch", [1, 7, 60])
def test_batches_change_nothing(batch):
    assert build(batch).entries == build(13).entries


def test_building_can_be_cut_off_and_go_on(tmp_path):
    h, token_types = activations()
    builder = DictionaryBuilder(FEATURES, contexts=4)
    builder.add(h[:25], token_types[:25])
    torch.save(builder.state_dict(), tmp_path / "partial.pt")
    resumed = DictionaryBuilder(FEATURES, contexts=4)
    resumed.load_state_dict(torch.load(tmp_path / "partial.pt", weights_only=True))
    resumed.add(h[25:], token_types[25:])
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


def test_a_dictionary_of_somebody_else_brings_no_markup_into_the_page():
    dictionary = build(TOKENS)
    entry = next(entry for entry in dictionary.entries if entry.density)
    entry.profile["<script>alert(1)</script>"] = 1.0
    page = dictionary.to_html(lambda context: '"><script>alert(2)</script>')
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


def test_page_shows_every_feature_that_fired():
    page = build(TOKENS).to_html(lambda context: "data:image/png;base64,AA==" if "token 3" in context.around else None)
    assert page.count("<tr id=") == FEATURES - 1 and "<tr id='c5'" not in page
    assert "data:image/png" in page and "6 of 7 features fired on 60 tokens" in page and "http" not in page
