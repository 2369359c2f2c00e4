"""Explanations say what the provenance says, in words, patches and weights that add up."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from segcompass.modeling_segcompass.explanation import TOP_CONCEPTS, heaviest_concepts
from segcompass.modeling_segcompass.explanation_page import render_html
from segcompass.modeling_segcompass.palette import SLOT_COLOURS, css_colour, slot_colour
from tests.support.scripted import lively_segcompass, noise_image
from tests.support.tiny import BACKBONES

RESPONSES = ["<think>a red box</think><REF_POS><REF_POS><REF_POS>", "<think>b</think><REF_POS>"]
SIZES = [(40, 40), (30, 44)]


@pytest.fixture(scope="module", params=BACKBONES)
def explained(request):
    """Model, processor, images and teacher-forced outputs of two samples."""
    model, processor = lively_segcompass(request.param)
    images = [noise_image(*size, seed) for seed, size in enumerate(SIZES)]
    inputs = processor(images=images, text=["the red box", "it"], response=RESPONSES)
    with torch.no_grad():
        outputs = model(**inputs)
    return model, processor, images, inputs, outputs


def test_weights_of_the_concepts_and_the_rest_sum_to_one(explained):
    model, _, _, _, outputs = explained
    for slot in range(3):
        report = model.explain(outputs, slot=slot, top=4)
        weights = [concept.weight for concept in report.concepts]
        assert weights == sorted(weights, reverse=True) and len(weights) == 4
        assert sum(weights) + report.rest == pytest.approx(1, abs=1e-5)
        whole = model.explain(outputs, slot=slot, top=10**6)
        assert sum(concept.weight for concept in whole.concepts) == pytest.approx(1, abs=1e-5)
        assert [c.index for c in whole.concepts[:4]] == [c.index for c in report.concepts]


def test_tokens_and_patches_are_where_the_sae_fires(explained):
    """Against the SAE run densely on the layer's hidden states, token by token."""
    model, processor, images, inputs, outputs = explained
    with torch.no_grad():
        hidden = model.mllm(
            **{
                name: value
                for name, value in inputs.items()
                if name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "mm_token_type_ids")
            },
            output_hidden_states=True,
        ).hidden_states[model.config.sae_config.layer]
        dense = model.sae.encode(hidden)
    special = set(model.config.special_token_ids)
    for sample in (0, 1):
        ids = inputs["input_ids"][sample].tolist()
        image_at = [place for place, token in enumerate(ids) if token == model.config.image_token_id]
        report = model.explain(outputs, slot=0, sample=sample, top=6, processor=processor)
        assert len(report.patch_boxes) == len(image_at)
        assert np.allclose(report.patch_boxes, inputs["patch_boxes"][sample, : len(image_at)])
        for concept in report.concepts:
            h = dense[sample, :, concept.index]
            text_at = {
                place
                for place, token in enumerate(ids)
                if token not in special and place not in image_at and inputs["attention_mask"][sample, place]
            }
            fired = {place for place in text_at if h[place] > 1e-5}
            assert {hit.position for hit in concept.tokens if hit.strength > 1e-5} == fired
            for hit in concept.tokens:
                assert hit.strength == pytest.approx(float(h[hit.position]), abs=1e-4)
                assert hit.text == processor.tokenizer.decode([ids[hit.position]])
                is_response = bool(inputs["response_mask"][sample, hit.position])
                assert hit.part == ("response" if is_response else "instruction")
            on_image = {hit.number: hit.strength for hit in concept.patches}
            assert all(hit.box == tuple(report.patch_boxes[hit.number].tolist()) for hit in concept.patches)
            for order, place in enumerate(image_at):
                strength = on_image.get(order, 0.0)
                assert strength == pytest.approx(float(h[place]), abs=1e-4)
            for hits in (concept.tokens, concept.patches):
                strengths = [hit.strength for hit in hits]
                assert strengths == sorted(strengths, reverse=True)


def test_words_are_the_whole_text(explained):
    model, processor, _, _, outputs = explained
    report = model.explain(outputs, slot=0, processor=processor)
    text = "".join(word.text for word in report.words if word.part == "response")
    assert text.startswith(RESPONSES[0])
    assert "the red box" in "".join(word.text for word in report.words if word.part == "instruction")
    assert model.explain(outputs, slot=0).words[0].text.startswith("["), "ids stand in for words without a processor"
    shorter = model.explain(outputs, slot=0, sample=1, processor=processor)
    assert (outputs.sequences[1] == processor.tokenizer.pad_token_id).any()
    assert not any(processor.tokenizer.pad_token in word.text for word in shorter.words), "padding is no word"
    numbers = [word.text for word in model.explain(outputs, slot=0, sample=1).words]
    assert len(numbers) == len(shorter.words) and f"[{processor.tokenizer.pad_token_id}]" not in numbers


@torch.no_grad()
def test_heaviest_concepts_are_those_of_the_explanation_for_one_slot_and_the_maximum_for_several(explained):
    model, _, _, inputs, outputs = explained
    shares = model.explain(outputs, slot=2, top=5).concepts
    heavy = heaviest_concepts(outputs, 2, count=5)
    assert [(c.index, c.weight, c.value) for c in heavy] == [(c.index, c.weight, c.value) for c in shares]
    assert all(outputs.concept_indices[0, c.column] == c.index for c in heavy)
    several = heaviest_concepts(outputs, [0, 2])
    weights = outputs.concept_weights[0, [0, 2]].amax(0)
    assert [c.weight for c in several] == sorted(weights.tolist(), reverse=True)[: len(several)]
    assert len(several) == TOP_CONCEPTS
    assert heaviest_concepts(outputs, []) == heaviest_concepts(model(**inputs, query_source="tokens"), 0) == []


def test_labels_come_from_the_dictionary(explained):
    model, _, _, _, outputs = explained
    first = model.explain(outputs).concepts[0].index
    labelled = model.explain(outputs, labels={first: "roundness"}).concepts
    assert labelled[0].label == "roundness" and labelled[1].label is None


def test_heatmap_covers_the_image_without_the_padding(explained):
    model, _, _, inputs, outputs = explained
    report = model.explain(outputs, slot=0, sample=1)
    height, width = inputs["reshaped_input_sizes"][1].tolist()  # of a frame of 32 pixels, 8 cells a side
    assert report.heatmap.shape == (-(-height // 4), -(-width // 4)) == (6, 8)
    expected = outputs.heatmaps[1, 0, :6, :8].sigmoid()
    np.testing.assert_allclose(report.heatmap, expected, rtol=1e-6)
    assert report.confidence == pytest.approx(float(outputs.pred_logits[1, 0].sigmoid()))


def test_segment_can_be_explained(explained):
    model, processor, images, _, _ = explained
    from tests.support.scripted import Script

    inputs = processor(images=images, text=["the red box", "it"])
    script = Script(processor.tokenizer, RESPONSES)
    outputs = model.segment(**inputs, logits_processor=[script], max_new_tokens=80)
    report = model.explain(outputs, slot=2, processor=processor)
    assert "a red box" in "".join(word.text for word in report.words)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(slot=3), "slot 3 is out of range; these outputs have slots 0 to 2"),
        (dict(slot=-1), "slot -1 is out of range"),
        (dict(sample=2), "sample 2 is out of range; these outputs have samples 0 to 1"),
        (dict(slot=1, sample=1), "slot 1 made no mask.*slots with a token: \\[0\\]"),
        (dict(top=0), "top is 0"),
    ],
)
def test_bad_requests_are_named(explained, arguments, message):
    model, _, _, _, outputs = explained
    with pytest.raises(ValueError, match=message):
        model.explain(outputs, **arguments)


def test_outputs_without_concepts_are_refused(explained):
    model, _, _, inputs, _ = explained
    with torch.no_grad():
        tokens = model(**inputs, query_source="tokens")
        language = model(**{name: value for name, value in inputs.items() if name != "encoder_pixel_values"})
    for outputs in (tokens, language):
        with pytest.raises(ValueError, match="these outputs have no concepts"):
            model.explain(outputs)


class Checker(HTMLParser):
    """Collects tags and attributes, and notices tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("href", "src")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_needs_nothing_else(explained):
    model, processor, images, _, outputs = explained
    reports = [model.explain(outputs, slot=slot, processor=processor, labels={1: "<b>"}) for slot in (0, 2)]
    masks = [np.zeros((40, 40), bool)] * 2
    page = render_html(reports, images[0], masks, title="what is <this> & that?")
    checker = Checker()
    checker.feed(page)
    assert checker.open == [] and "what is <this> & that?" in checker.text
    assert all(link.startswith(("data:image/png;base64,", "#photo")) for link in checker.links)
    assert "<script" not in page and not re.search(r"https?:", page)
    for report in reports:
        assert f"slot {report.slot}" in checker.text and f'fill="{css_colour(slot_colour(report.slot))}"' in page
        for concept in report.concepts:
            assert f"concept {concept.index}" in checker.text and f"weight {concept.weight:.3f}" in checker.text


def test_figure_has_the_panels_of_the_paper(explained):
    model, processor, images, _, outputs = explained
    report = model.explain(outputs, slot=0, processor=processor)
    figure = report.to_figure(images[0], np.ones((40, 40), bool), "cost $5 to $6")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == ["image", "activated tokens"] and titles[2].startswith("heatmap") and titles[3] == "mask"
    assert len(figure.axes[4].patches) == len(report.concepts)
    figure.canvas.draw()


def test_slots_begin_the_palette_again_after_its_last_colour():
    assert css_colour(slot_colour(0)) == "#e63c32", "red"
    assert slot_colour(len(SLOT_COLOURS)) == slot_colour(0) and len(set(SLOT_COLOURS)) == len(SLOT_COLOURS)
