"""The Space: ask for something in an image, watch the reasoning, look into the slots, switch concepts off.

    segcompass demo                                                       # this page, where the project is installed
    SEGCOMPASS_MODEL=ORG/MODEL GRADIO_SERVER_PORT=7861 python app.py      # as a Space runs it

As a Space, with this folder as its repository, set SEGCOMPASS_MODEL to a Hub id; elsewhere the small model that ships
with the project is used. It takes the model as remote code, so it needs transformers and not this project. Moving a
concept's slider decodes the masks again from the states that generation left behind; the MLLM does not run again.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import gradio as gr
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from transformers import AutoModel, AutoProcessor, TextIteratorStreamer

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parents[1] / "examples" if len(HERE.parents) > 1 else HERE
COLOURS = np.array(  # those of modeling_segcompass/palette.py, which a Space's own repository does not hold
    [
        (230, 60, 50),
        (50, 120, 230),
        (60, 180, 75),
        (245, 190, 40),
        (160, 80, 200),
        (40, 190, 200),
        (232, 51, 139),
        (192, 116, 74),
    ]
)
TOP_CONCEPTS = 8
STYLE = (
    "#image img, #overlay img, #fired img {width: 100%; height: 100%; object-fit: contain}"  # small images too
    "#concepts label:has(input:checked) {outline: 2px solid currentcolor}"
)
ABOUT = (
    "# SegCompass\nAsk for something in the image. The model reasons, turns what it thought into concepts, the "
    "concepts into one heatmap per slot, and the heatmaps into masks. Choose a concept to see where it fired; move its "
    "slider and the masks follow, while the reasoning stays as it is."
)


class Answer:
    """What one question left behind: the inputs, what masks are decoded from, and the concepts' factors.

    Args:
        image: PIL image, RGB.
        inputs: what the processor made of it.
    """

    def __init__(self, image: Image.Image, inputs: Any):
        self.image, self.inputs = image, inputs
        self.states: Any = None  # what masks are decoded from
        self.outputs: Any = None  # of the response as it was written, before any intervention
        self.factors: dict[int, float] = {}

    def __deepcopy__(
        self, memo: dict
    ) -> "Answer":  # gradio copies a state's first value; this one is large and never shared
        return self


class Demo:
    """The model, and what each part of the page shows of an answer. It knows nothing about gradio's layout.

    Args:
        path: SegCompass folder or Hub id.
    """

    def __init__(self, path: str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)

    # -- asking ------------------------------------------------------------------------------------------------------

    def ask(self, image: Image.Image | None, instruction: str, threshold: float) -> Iterator[tuple]:
        """Yield what the page shows: first the reasoning as it grows, then everything."""
        if image is None:
            raise gr.Error("No image yet: upload one, or take an example.")
        try:
            image = image.convert("RGB")
            inputs = self.processor(images=image, text=instruction, return_tensors="pt").to(self.model.device)
        except ValueError as error:  # an empty or too long instruction
            raise gr.Error(str(error)) from error
        answer = Answer(image, inputs)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed = []
        left = Event()

        def stop(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), left.is_set(), dtype=torch.bool, device=input_ids.device)

        def write() -> None:
            try:
                _, answer.states = self.model.reason(**inputs, streamer=streamer, stopping_criteria=[stop])
                if not left.is_set():
                    answer.outputs = self.decode(answer)
            except Exception as error:
                failed.append(error)
                streamer.end()

        writer = Thread(target=write)
        writer.start()
        text = ""
        try:
            for piece in streamer:
                text += piece
                yield text, *[gr.skip()] * 6
        except GeneratorExit:  # the visitor left: the model stops at the next token
            left.set()
            raise
        writer.join()
        if failed:
            raise gr.Error(f"The model failed: {failed[0]}")
        concepts = self.concepts(answer, threshold)
        choices = gr.Radio(choices=concepts, value=None)
        yield text, *self.show(answer, answer.outputs, threshold), answer, choices, gr.Slider(value=1.0)

    @torch.no_grad()
    def decode(self, answer: Answer) -> Any:
        """The masks with the concepts scaled as they are now: a SegCompassOutput."""
        return self.model.decode_masks(**answer.states._asdict(), concept_scale=answer.factors)

    def scale(self, answer: Answer | None, concept: int | None, factor: float, threshold: float) -> tuple:
        """Masks with the chosen concept scaled, beside those scaled before; the response stays."""
        if answer is None or concept is None:
            raise gr.Error("Ask something first, then choose a concept.")
        answer.factors[int(concept)] = float(factor)
        return self.show(answer, self.decode(answer), threshold)

    def restore(self, answer: Answer | None, threshold: float) -> tuple:
        """The masks with no concept scaled."""
        if answer is None:
            raise gr.Error("Ask something first.")
        answer.factors = {}
        return *self.show(answer, answer.outputs, threshold), gr.Slider(value=1.0)

    def rethreshold(self, answer: Answer | None, threshold: float) -> tuple | list:
        """The same masks, other slots kept."""
        if answer is None:
            return [gr.skip()] * 3
        return self.show(answer, self.decode(answer) if answer.factors else answer.outputs, threshold)

    # -- showing -----------------------------------------------------------------------------------------------------

    def show(self, answer: Answer, outputs: Any, threshold: float) -> tuple[np.ndarray, str, list]:
        """(overlay, verdict, gallery of a heatmap and a mask for each slot)."""
        sizes = answer.inputs["original_sizes"]
        kept = self.processor.post_process_instance_segmentation(outputs, threshold, target_sizes=sizes)[0]
        masks = dict(zip(kept["slots"].tolist(), kept["masks"].cpu().numpy(), strict=True))
        picture = np.asarray(answer.image).astype(np.float32)
        covered = np.zeros(picture.shape[:2], bool)
        for slot, mask in masks.items():
            picture[mask] = 0.4 * picture[mask] + 0.6 * COLOURS[slot % len(COLOURS)]
            covered |= mask
        found = outputs.slot_mask[0].nonzero()[:, 0].tolist()
        if not found:
            verdict = "no mask: the response had no concentration tokens"
        elif not masks:
            verdict = "no target: no slot is confident enough"
        else:
            verdict = f"{len(masks)} instance{'s' * (len(masks) > 1)}, {covered.sum()} pixels"
        return picture.astype(np.uint8), verdict, self.slots(answer, outputs, found, masks)

    def slots(self, answer: Answer, outputs: Any, found: list[int], masks: dict[int, np.ndarray]) -> list:
        """(picture, caption) of each found slot's heatmap, and of its mask where it is kept."""
        sizes = answer.inputs["original_sizes"]
        heatmaps = self.processor.post_process_masks(outputs.heatmaps, sizes)[0].sigmoid().cpu().numpy()
        confidences = outputs.pred_logits[0].sigmoid().tolist()
        gallery = []
        for slot in found:
            gallery.append((self.heat_over(answer.image, heatmaps[slot]), f"slot {slot}: {confidences[slot]:.2f}"))
            if slot in masks:
                gallery.append((masks[slot].astype(np.uint8) * 255, f"mask {slot}"))
        return gallery

    @staticmethod
    def heat_over(image: Image.Image, heat: np.ndarray) -> np.ndarray:
        """A heat, float (H, W) in [0, 1] in colour over the image."""
        colour = colormaps["inferno"](heat)[..., :3] * 255
        return (0.35 * np.asarray(image) + 0.65 * colour).astype(np.uint8)

    def concepts(self, answer: Answer, threshold: float) -> list[tuple[str, int]]:
        """(label, index) of the concepts that weigh most in the kept slots, or in all found ones if none is kept."""
        outputs = answer.outputs
        if outputs.concept_indices is None or not outputs.slot_mask[0].any():
            return []
        kept = outputs.slot_mask[0] & (outputs.pred_logits[0].sigmoid() >= threshold)
        weights = outputs.concept_weights[0, kept if kept.any() else outputs.slot_mask[0]].amax(0)
        columns = weights.topk(min(TOP_CONCEPTS, len(weights))).indices
        columns = columns[weights[columns] > 0].tolist()
        indices = outputs.concept_indices[0].tolist()
        return [(f"concept {indices[column]}, weight {weights[column]:.2f}", indices[column]) for column in columns]

    def where(self, answer: Answer | None, concept: int | None) -> tuple:
        """Where a concept fired: over the image, and on the tokens of the response. Also its present factor."""
        if answer is None or concept is None:
            return gr.skip(), gr.skip(), gr.skip()
        outputs = answer.outputs
        column = outputs.concept_indices[0].tolist().index(int(concept))
        fired = outputs.concept_activations[0, :, column].float()
        start = answer.inputs["input_ids"].shape[1]
        ids = outputs.sequences[0, : len(fired)]
        patches = fired[ids == self.model.config.image_token_id]
        heat = self.over_image(answer, (patches / patches.max().clamp_min(1e-6)).cpu().numpy())
        response = fired[start:]
        response = (response / response.max().clamp_min(1e-6)).tolist()
        words = self.words(ids[start:].tolist())
        tokens = [(word, round(value, 3) or None) for word, value in zip(words, response, strict=True)]
        return self.heat_over(answer.image, heat), tokens, gr.Slider(value=answer.factors.get(int(concept), 1.0))

    def words(self, ids: list[int]) -> list[str]:
        """Each token's text with its space before it, which a token decoded alone would lose."""
        words = [self.processor.decode(ids[:1])]
        for before, token in zip(ids, ids[1:], strict=False):
            words.append(self.processor.decode([before, token])[len(self.processor.decode([before])) :])
        return words

    def over_image(self, answer: Answer, patches: np.ndarray) -> np.ndarray:
        """Values of the MLLM's image tokens as float (H, W) over the image; 0 where it did not look."""
        width, height = answer.image.size
        boxes = answer.outputs.patch_boxes[0, : len(patches)].float().cpu().numpy()  # in fractions of the image
        edges = np.rint(boxes * [width, height, width, height]).astype(int).clip(0, [width, height, width, height])
        canvas = np.zeros((height, width), np.float32)
        for value, (left, top, right, bottom) in zip(patches, edges, strict=True):
            canvas[top:bottom, left:right] = np.maximum(canvas[top:bottom, left:right], value)
        return canvas.clip(0, 1)


def examples() -> list[list[str]]:
    """[[image path, instruction]] of the scene that ships beside this file or with the project."""
    for folder in (HERE, EXAMPLES):
        if (folder / "scene.json").exists():
            scene = json.loads((folder / "scene.json").read_text())
            return [[str(folder / scene["image"]), scene["instruction"]]]
    return []


def page(demo: Demo) -> gr.Blocks:
    """The page, wired to the demo. Elements that a visitor or a test looks for carry an elem_id."""
    with gr.Blocks(title="SegCompass", analytics_enabled=False) as blocks:
        gr.Markdown(ABOUT)
        answer = gr.State()
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="pil", label="Image", height=260, elem_id="image")
                instruction = gr.Textbox(label="Instruction", elem_id="instruction")
                threshold = gr.Slider(0, 1, 0.5, step=0.05, label="Confidence from which a slot is kept")
                ask = gr.Button("Segment", variant="primary", elem_id="ask")
                if shown := examples():
                    gr.Examples(shown, [image, instruction], cache_examples=False)
            with gr.Column():
                reasoning = gr.Textbox(label="Reasoning", lines=4, elem_id="reasoning")
                overlay = gr.Image(label="Masks", format="png", height=260, elem_id="overlay")
                verdict = gr.Textbox(label="Result", elem_id="verdict")
                slots = gr.Gallery(label="Slots", columns=4, height=200, format="png", elem_id="slots")
        with gr.Row():
            with gr.Column():
                concept = gr.Radio([], label="Concepts, heaviest first", elem_id="concepts")
                factor = gr.Slider(0, 2, 1.0, step=0.1, label="Strength of the chosen concept", elem_id="factor")
                restore = gr.Button("All concepts as they were", elem_id="restore")
            with gr.Column():
                fired = gr.Image(label="Where it fired", format="png", height=260, elem_id="fired")
                tokens = gr.HighlightedText(label="Where it fired in the response", elem_id="tokens")

        shows = [overlay, verdict, slots]
        asked = [reasoning, *shows, answer, concept, factor]
        gr.on([ask.click, instruction.submit], demo.ask, [image, instruction, threshold], asked)
        concept.input(demo.where, [answer, concept], [fired, tokens, factor])
        factor.release(demo.scale, [answer, concept, factor, threshold], shows)
        restore.click(demo.restore, [answer, threshold], [*shows, factor])
        threshold.release(demo.rethreshold, [answer, threshold], shows)
    return blocks


def launch(model: str, port: int | None = None) -> None:
    """Serve the page until it is stopped.

    Args:
        model: SegCompass folder or Hub id.
        port: None takes `GRADIO_SERVER_PORT`, or 7860 or the next free one.
    """
    plain = gr.themes.Default(font=["sans-serif"], font_mono=["monospace"])  # no fonts from the network
    page(Demo(model)).launch(server_port=port, theme=plain, css=STYLE)


if __name__ == "__main__":
    launch(os.environ.get("SEGCOMPASS_MODEL", str(EXAMPLES / "checkpoints" / "mini")))
