"""`segcompass dashboard` on the shipped model and a few scenes: what is shown is measured, and measured right."""

import gzip
import json
import re

import pytest
import torch

from segcompass.commands import dashboard, dictionary
from segcompass.hub_cards.push import copy_dashboard
from segcompass.loaders import load_scenes
from segcompass.loading import load
from segcompass.shipped import MODEL
from segcompass.white_box import ConceptDictionary
from segcompass.white_box.concept_dictionary import ConceptEntry, Context
from segcompass.white_box.dashboard import Steered, dashboard_page, feature_cards, promoted_words, summarise_steering


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of a dictionary and a dashboard of five scenes, read as rows of a data set of one's own."""
    folder = tmp_path_factory.mktemp("dashboard")
    load_scenes("test", seed=3, num_samples=5).save_to_disk(folder / "rows")
    options = ["--model", str(MODEL), "--output"]
    rows = ["--dataset", str(folder / "rows"), "--split", "test", "--num-samples", "5", "--contexts", "2"]
    dictionary.main([*options, str(folder / "dictionary"), *rows])
    told = ["--dictionary", str(folder / "dictionary"), "--num-masks", "2", "--num-features", "40"]
    dashboard.main([*options, str(folder / "out"), *told, "--name", "me/my-sae"])
    return folder


@pytest.fixture(scope="module")
def model():
    return load(MODEL, "cpu")


def read(path):
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_what_is_lost_is_what_switching_the_concept_off_loses(made, model):
    model, processor = model
    rows = load_scenes("test", seed=3, num_samples=2)
    records = [json.loads(line) for line in (made / "out" / "items.jsonl").read_text().splitlines()]
    assert [record["sample_id"] for record in records] == list(rows["sample_id"])
    inputs = processor(images=rows[0]["image"], text=rows[0]["instruction"])
    plain = model.segment(**inputs)
    slot = int(plain.pred_logits[0].masked_fill(~plain.slot_mask[0], -9e9).argmax())
    before = plain.pred_masks[0, slot] > 0
    weights = dict(zip(plain.concept_indices[0].tolist(), plain.concept_weights[0, slot].tolist(), strict=True))
    seen = 0
    for index, weight, lost in records[0]["switched_off"]:
        if weight != pytest.approx(weights.get(index, -1), abs=1e-5):
            continue  # of another slot
        changed = model.segment(**inputs, concept_scale={index: 0.0})
        gone = float((before & ~(changed.pred_masks[0, slot] > 0)).sum() / before.sum())
        assert lost == pytest.approx(1.0 if changed.pred_logits[0, slot] < 0 else gone, abs=1e-3)
        seen += 1
    assert seen >= 3
    shown = {one["index"]: one["steers"] for one in json.loads((made / "out" / "features.json").read_text())}
    for index, steered in summarise_steering(records).items():
        assert shown[index] == pytest.approx(vars(steered))


def test_the_page_needs_nothing_else_and_has_every_feature(made):
    page = (made / "out" / "dashboard.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "http" not in page
    features = json.loads((made / "out" / "features.json").read_text())
    assert len(features) == 40 and page.count("<article") == 40
    for feature in features:
        assert f"id='f{feature['index']}'" in page
    assert page.count("<img src=") > 5 and "gone without it" in page and "promotes" in page


def test_promoted_words_are_the_heads_own(model):
    model, processor = model
    found = promoted_words(model, processor, [7, 226], count=3)
    norm = model.backbone.language_model(model.mllm).norm.weight
    for index, (most, least) in found.items():
        logits = model.get_output_embeddings()(model.sae.W_dec[index] * norm)[: len(processor.tokenizer)]
        assert most[0][1] == pytest.approx(logits.max().item(), abs=1e-4)
        assert most[0][0] == processor.tokenizer.decode([int(logits.argmax())])
        assert least[0][1] == pytest.approx(logits.min().item(), abs=1e-4)


def test_files_for_neuronpedia_hold_the_activations_of_the_samples(made, model):
    folder = made / "out" / "neuronpedia"
    features = read(folder / "features" / "batch-0.jsonl.gz")
    activations = read(folder / "activations" / "batch-0.jsonl.gz")
    labels = read(folder / "explanations" / "batch-0.jsonl.gz")
    (source,), (of_set,) = read(folder / "source.jsonl"), read(folder / "sourceset.jsonl")
    (about,), (release,) = read(folder / "model.jsonl"), read(folder / "release.jsonl")
    assert (source["id"], source["modelId"], source["setName"]) == ("3-my-sae-1024", about["id"], of_set["name"])
    assert of_set["releaseName"] == release["name"] == "my-sae" and source["hfRepoId"] == "me/my-sae"
    for lines in (features, activations, labels):  # the import reads the columns off the first line
        assert len({tuple(line) for line in lines}) == 1
        assert {(line["modelId"], line["layer"]) for line in lines} == {(about["id"], source["id"])}
    assert len({line["id"] for line in activations}) == len(activations)
    entries = {str(entry.index): entry for entry in ConceptDictionary.from_pretrained(made / "dictionary").entries}
    assert len(features) == 40 and {line["index"] for line in activations} == {line["index"] for line in features}
    rows = {row["sample_id"]: row for row in load_scenes("test", seed=3, num_samples=5)}
    for line in activations:
        assert len(line["tokens"]) == len(line["values"]) and max(line["values"]) == line["maxValue"] > 0
        assert line["values"][line["maxValueTokenIndex"]] == line["maxValue"]
        words = "".join(token for token in line["tokens"] if not token.startswith("[patch"))
        assert rows[line["dataSource"]]["instruction"] in words
    for line in features:
        entry = entries[line["index"]]
        of_feature = [one["maxValue"] for one in activations if one["index"] == line["index"]]
        assert max(of_feature) == pytest.approx(entry.contexts[0].strength, abs=2e-3)
        assert line["maxActApprox"] == entry.contexts[0].strength and line["frac_nonzero"] == entry.density
        assert torch.allclose(torch.tensor(line["vector"]), model[0].sae.W_dec[entry.index], atol=1e-4)
    assert {line["index"]: line["description"] for line in labels} == {
        line["index"]: entries[line["index"]].label for line in features
    }


def test_features_that_steer_or_detect_come_first_and_text_is_escaped():
    entries = [
        ConceptEntry(number, "<b>", density, 1.0, {"image": 1.0}, [Context("s", 1.0, "response", "<i>", "a & b")])
        for number, density in enumerate((0.5, 0.4, 0.3, 0.2, 0.0))
    ]
    scores = {"patch": {"red": {"index": 2, "f1": 0.9, "lift": 0.8}}, "word": {"red": {"index": 2, "f1": 1, "lift": 1}}}
    cards = feature_cards(ConceptDictionary(entries, 10, "x"), scores, {3: Steered(2, 0.5, 0.25)}, 3)
    assert [card.entry.index for card in cards] == [3, 2, 0]  # 4 never fired, 1 is one too many
    assert [one["reading"] for one in cards[1].detects] == ["word", "patch"]
    page = dashboard_page(ConceptDictionary(entries, 10, "x"), cards, "<title>")
    assert "&lt;b&gt;" in page and "<b>&lt;i&gt;</b>" in page and "red (patch): F1 0.90, lift 0.80" in page
    assert "2 masks, share 0.50; 25% gone without it" in page and "<title>&lt;title&gt;</title>" in page


def test_what_does_not_fit_is_refused(made, tmp_path):
    options = ["--model", str(MODEL), "--output", str(tmp_path / "out"), "--dictionary"]
    with pytest.raises(ValueError, match="is no output folder of `segcompass dictionary`"):
        dashboard.main([*options, str(tmp_path)])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds other files; run `segcompass dictionary` on this model"):
        dashboard.main(["--model", str(tmp_path / "other"), *options[2:], str(made / "dictionary")])
    with pytest.raises(ValueError, match=r"holds no dashboard.html; name the output folder"):
        copy_dashboard(made / "dictionary", tmp_path, 1024)
    with pytest.raises(ValueError, match="this one has 16 features"):
        copy_dashboard(made / "out", tmp_path, 16)
