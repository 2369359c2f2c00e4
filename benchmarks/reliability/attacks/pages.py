"""HTML in every string that reaches a page: what a browser would take for markup must arrive as text."""

import html
from collections.abc import Iterator

from benchmarks.reliability.space import space
from segcompass.gallery import write_gallery
from segcompass.hub_cards.cards import dataset_card
from segcompass.modeling_segcompass.explanation_page import render_html
from segcompass.white_box.concept_dictionary import ConceptDictionary, ConceptEntry, Context
from tests.support.grpo import scenes
from tests.support.scripted import INSTRUCTIONS, noise_image

from . import Attack

PAYLOADS = {
    "a script": "<script>alert(1)</script>",
    "an image": "<img src=x onerror=alert(1)>",
    "an end of an attribute": "\"'><svg onload=alert(1)>",
    "an end of the page": "</figcaption></td></title></style><iframe src=javascript:alert(1)>",
    "a comment": "<!--<b>--><b onmouseover=alert(1)>",
}


def harmless(page: str, payload: str) -> bool:
    """Whether a page holds a payload as text alone."""
    return payload not in page and html.escape(payload) in page


def attacks() -> Iterator[Attack]:
    """Yields the attacks."""
    for name, payload in PAYLOADS.items():
        for place in ("instruction", "sample_id", "text", "title"):

            def gallery(folder, place=place, payload=payload):
                rows = scenes(3).to_list()
                import datasets

                records = [{"sample_id": row["sample_id"], "text": "it", "slots": [], "I": 1, "U": 2} for row in rows]
                for record, row in zip(records, rows, strict=True):
                    record |= {"pred_empty": False, "ref_empty": False}
                    row["ignore"] = None
                    if place == "instruction":
                        row["instruction"] = payload
                    elif place != "title":
                        record[place] = payload
                data = datasets.Dataset.from_list(rows, features=scenes(3).features)
                path = folder / "gallery.html"
                write_gallery(path, data, records, "rela", payload if place == "title" else "a title")
                return harmless(path.read_text(), payload)

            yield Attack(f"{name} as a gallery's {place}", gallery)

        for place in (
            "label",
            "profile",
            "text",
            "around",
            "sample",
            "title",
            "source",
            "reading",
            "attribute",
            "link",
        ):

            def dictionary(folder, place=place, payload=payload):
                def put(where, plain, place=place, payload=payload):
                    return payload if place == where else plain

                context = Context(put("sample", "s"), 1.5, "response", put("text", "mug"), put("around", "a mug"))
                entry = ConceptEntry(0, put("label", "mug"), 0.1, 1.0, {put("profile", "response"): 1.0}, [context])
                made = ConceptDictionary([entry], 100, put("source", "scenes"))
                detector = {"f1": 0.9, "lift": 0.5, "precision": 1.0, "recall": 1.0, "index": 0, "threshold": 0.5}
                scores = {put("reading", "word"): {put("attribute", "red"): detector}}
                picture = (lambda context: payload) if place == "link" else None
                page = made.to_html(picture, put("title", "a title"), scores)
                return payload not in page

            yield Attack(f"{name} as a dictionary's {place}", dictionary)

        for place in ("instruction", "label", "word"):

            def explanation(folder, place=place, payload=payload):
                from tests.support.scripted import Script, lively_segcompass

                model, processor = lively_segcompass("llava", num_slots=3)
                image = noise_image(30, 44)
                inputs = processor(images=image, text=INSTRUCTIONS[0])
                response = f"<think>{payload if place == 'word' else 'a mug'}</think>" + "<REF_POS>" * 3
                script = Script(processor.tokenizer, [response])
                outputs = model.segment(**inputs, logits_processor=[script], max_new_tokens=200)
                labels = {number: payload if place == "label" else "mug" for number in range(128)}
                explained = [model.explain(outputs, slot=0, labels=labels, processor=processor)]
                mask = (processor.post_process_masks(outputs.pred_masks, [(30, 44)])[0][:1] > 0).numpy()
                page = render_html(explained, image, mask, payload if place == "instruction" else "a mug")
                return payload not in page

            yield Attack(f"{name} as an explanation's {place}", explanation)

        def card(folder, payload=payload):
            """The Hub cleans a card's markup; what must hold is that its metadata stay the writer's own."""
            card = dataset_card("me/data", "test", description=f"---\nlicense: evil\n---\n{payload}")
            return card.data.license == "apache-2.0" and card.content.count("\nlicense:") <= 2

        yield Attack(f"{name} and metadata in a card's description", card)

        def refused(folder, payload=payload):
            """The Space shows errors as markup; what a visitor wrote must not be any."""
            try:
                space().check_threshold(payload)
            except Exception as error:
                return payload[:30] not in str(error)

        yield Attack(f"{name} in an error of the Space", refused)
