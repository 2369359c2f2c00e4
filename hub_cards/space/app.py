"""The Space: ask for something in an image, watch the reasoning, look into the slots, switch concepts off.

    segcompass demo                                                       # this page, where the project is installed
    SEGCOMPASS_MODEL=ORG/MODEL GRADIO_SERVER_PORT=7861 python app.py      # as a Space runs it

As a Space, with this folder as its repository, set SEGCOMPASS_MODEL to a Hub id; elsewhere the small model that ships
with the project is used. It takes the model as remote code, so it needs transformers and not this project. Moving a
concept's slider decodes the masks again from the states that generation left behind; the MLLM does not run again.

Visitors are many and memory is not: questions wait in a line of limited length (`Line`), images, texts and waiting have
limits, and what an answer leaves behind is kept for a while, of the latest visitors alone (`Answers`), and let go when
its visitor leaves.
"""

import html
import json
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Condition, Event, Lock, Thread
from typing import Any

import gradio as gr
import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageOps
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
MAX_TEXT = 1000
"""Characters of an instruction."""
MAX_PIXELS = 25_000_000
"""Of an image; a larger one is refused before it is decoded."""
MAX_FILE = "20mb"
"""Of an upload."""
AT_ONCE, MAX_WAITING, PATIENCE = 1, 16, 120.0
"""Questions that are answered at a time, that wait for it, and how many seconds they wait at most."""
MAX_ANSWERS, MAX_BYTES, KEPT_SECONDS = 64, 2**30, 1800.0
"""How many answers are kept for their visitors to look into, in how many bytes, and for how long."""
STYLE = (
    "#image img, #overlay img, #fired img {width: 100%; height: 100%; object-fit: contain}"  # small images too
    "#concepts label:has(input:checked) {outline: 2px solid currentcolor}"
)
ABOUT = (
    "# SegCompass\nAsk for something in the image. The model reasons, turns what it thought into concepts, the "
    "concepts into one heatmap per slot, and the heatmaps into masks. Choose a concept to see where it fired; move its "
    "slider and the masks follow, while the reasoning stays as it is."
)


def refusal(message: Any) -> gr.Error:
    """An error that the page shows as text, whatever a visitor wrote into it."""
    return gr.Error(html.escape(str(message)))


class Line:
    """Questions that wait for the model, first come, first served.

    Args:
        at_once: how many are answered at a time.
        waiting: how many may wait.
    """

    def __init__(self, at_once: int = AT_ONCE, waiting: int = MAX_WAITING):
        self.at_once, self.waiting = at_once, waiting
        self._tickets: list[object] = []
        self._moved = Condition()

    def enter(self) -> object:
        """A ticket, to be given back with `leave`. Raises gr.Error when the line is full."""
        with self._moved:
            if len(self._tickets) >= self.at_once + self.waiting:
                raise refusal(f"{self.waiting} questions are waiting already, which is the limit; try again later.")
            ticket = object()
            self._tickets.append(ticket)
            return ticket

    def before(self, ticket: object) -> int:
        """How many must be answered before it is this one's turn."""
        with self._moved:
            place = self._tickets.index(ticket) if ticket in self._tickets else 0
            return max(0, place + 1 - self.at_once)

    def wait(self, ticket: object, seconds: float) -> bool:
        """Whether it is this one's turn, after so many seconds at most."""
        with self._moved:
            return self._moved.wait_for(lambda: ticket not in self._tickets[self.at_once :], seconds)

    def leave(self, ticket: object) -> None:
        """Make room for the next; nothing where that was done before."""
        with self._moved:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                self._moved.notify_all()


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
        self.name, self.used = secrets.token_hex(8), time.monotonic()

    def bytes(self) -> int:
        """About how much memory it takes."""
        tensors = [*self.inputs.values(), *(self.states or ()), *(self.outputs or {}).values()]
        known = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in tensors
            if torch.is_tensor(value)
        }
        return 3 * self.image.width * self.image.height + sum(known.values())


class Answers:
    """The last answer of each visitor, as long as there is room and the visitor is there.

    Args:
        limit: how many are kept.
        limit_bytes: in how much memory; the newest is kept however large.
        seconds: how long one is kept that is not looked into.
    """

    def __init__(self, limit: int = MAX_ANSWERS, limit_bytes: int = MAX_BYTES, seconds: float = KEPT_SECONDS):
        self.limit, self.limit_bytes, self.seconds = limit, limit_bytes, seconds
        self._kept: OrderedDict[str, Answer] = OrderedDict()  # by visitor, the one used last at the end
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, visitor: str, answer: Answer) -> None:
        """Keep an answer in place of the visitor's last one."""
        with self._lock:
            self._kept.pop(visitor, None)
            self._kept[visitor] = answer
            size = sum(each.bytes() for each in self._kept.values())
            oldest = time.monotonic() - self.seconds
            for other, each in list(self._kept.items())[:-1]:
                if len(self._kept) > self.limit or size > self.limit_bytes or each.used < oldest:
                    size -= each.bytes()
                    del self._kept[other]

    def get(self, visitor: str, question: str | None) -> Answer:
        """The visitor's answer. Raises gr.Error when there is none to this question."""
        with self._lock:
            answer = self._kept.get(visitor)
            if question is None:
                raise refusal("Ask something first.")
            if answer is None or answer.name != question:
                raise refusal("This answer was put away to make room for others; ask again.")
            answer.used = time.monotonic()
            self._kept.move_to_end(visitor)
            return answer

    def forget(self, visitor: str) -> None:
        """Let go of what a visitor left behind."""
        with self._lock:
            self._kept.pop(visitor, None)


def visitor_of(request: Any) -> str:
    """Whose request it is: one open page each."""
    return getattr(request, "session_hash", None) or ""


class Demo:
    """The model, and what each part of the page shows of an answer. It knows nothing about gradio's layout.

    Args:
        path: SegCompass folder or Hub id.
    """

    def __init__(self, path: str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.line, self.answers = Line(), Answers()
        self._asking: dict[str, tuple[Event, object]] = {}  # visitor -> (set when the visitor has left, its ticket)

    # -- asking ------------------------------------------------------------------------------------------------------

    def ask(self, image: Any, instruction: str, threshold: float, request: gr.Request | None = None) -> Iterator[tuple]:
        """Yield what the page shows: first the reasoning as it grows, then everything."""
        check_question(image, instruction, threshold)
        visitor, left = visitor_of(request), Event()
        ticket = self.line.enter()
        try:
            self._asking[visitor] = left, ticket
            patience = time.monotonic() + PATIENCE
            while not self.line.wait(ticket, min(1.0, PATIENCE)):
                if left.is_set():
                    return
                if time.monotonic() > patience:
                    raise refusal(f"No answer within {PATIENCE:.0f} seconds, so many are asking; try again later.")
                before = self.line.before(ticket)
                yield f"{before} question{'s' * (before > 1)} before yours …", *[gr.skip()] * 6
            if left.is_set():
                return
            yield from self._answer(image, instruction, threshold, visitor, left)
        finally:
            left.set()
            if self._asking.get(visitor) == (left, ticket):
                del self._asking[visitor]
            self.line.leave(ticket)

    def leave(self, request: gr.Request | None = None) -> None:
        """A visitor has closed the page: the model stops, and what the visitor left behind is let go."""
        visitor = visitor_of(request)
        left, ticket = self._asking.pop(visitor, (None, None))
        if left is not None:
            left.set()
            self.line.leave(ticket)  # nobody may ever ask for the rest of the answer
        self.answers.forget(visitor)

    def _answer(self, image: Any, instruction: str, threshold: float, visitor: str, left: Event) -> Iterator[tuple]:
        """As `ask`, when it is this question's turn."""
        try:
            image = read(image)
            inputs = self.processor(images=image, text=instruction, return_tensors="pt").to(self.model.device)
        except (ValueError, OSError) as error:  # an empty or too long instruction, an image that cannot be read
            raise refusal(error) from error
        answer = Answer(image, inputs)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        failed = []

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
        finally:
            writer.join()  # before the next is served
        if left.is_set():
            return
        if failed:
            raise refusal(f"The model failed: {failed[0]}")
        self.answers.put(visitor, answer)
        concepts = self.concepts(answer, threshold)
        choices = gr.Radio(choices=concepts, value=None)
        shown = self.show(answer, answer.outputs, threshold)
        yield text, *shown, answer.name, choices, gr.Slider(value=1.0)

    @torch.no_grad()
    def decode(self, answer: Answer, factors: dict[int, float] | None = None) -> Any:
        """The masks with concepts scaled by these factors (None: as they are now): a SegCompassOutput."""
        factors = answer.factors if factors is None else factors
        return self.model.decode_masks(**answer.states._asdict(), concept_scale=factors)

    def scale(
        self,
        question: str | None,
        concept: int | None,
        factor: float,
        threshold: float,
        request: gr.Request | None = None,
    ) -> tuple:
        """Masks with the chosen concept scaled, beside those scaled before; the response stays."""
        answer = self.answers.get(visitor_of(request), question)
        concept = self.chosen(answer, concept)
        if not 0 <= within(factor, "the strength") <= 2:
            raise refusal(f"The strength is {factor!r:.40}; choose a number from 0 to 2.")
        check_threshold(threshold)
        answer.factors = {**answer.factors, concept: float(factor)}
        return self.show(answer, self.decode(answer), threshold)

    def chosen(self, answer: Answer, concept: Any) -> int:
        """The number of a concept of the answer. Raises gr.Error when it is none of them."""
        known = [] if answer.outputs.concept_indices is None else answer.outputs.concept_indices[0].tolist()
        if isinstance(concept, bool) or not isinstance(concept, int) or concept not in known:
            raise refusal(f"The concept {concept!r:.40} is none of this answer's; choose one of the list.")
        return concept

    def restore(self, question: str | None, threshold: float, request: gr.Request | None = None) -> tuple:
        """The masks with no concept scaled."""
        answer = self.answers.get(visitor_of(request), question)
        check_threshold(threshold)
        answer.factors = {}
        return *self.show(answer, answer.outputs, threshold), gr.Slider(value=1.0)

    def rethreshold(self, question: str | None, threshold: float, request: gr.Request | None = None) -> tuple | list:
        """The same masks, other slots kept."""
        if question is None:
            return [gr.skip()] * 3
        check_threshold(threshold)
        answer = self.answers.get(visitor_of(request), question)
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
        names = self.model.concept_labels
        return [
            (
                f"{names.get(indices[column], f'concept {indices[column]}')}, weight {weights[column]:.2f}",
                indices[column],
            )
            for column in columns
        ]

    def where(self, question: str | None, concept: int | None, request: gr.Request | None = None) -> tuple:
        """Where a concept fired: over the image, and on the tokens of the response. Also its present factor."""
        if question is None or concept is None:
            return gr.skip(), gr.skip(), gr.skip()
        answer = self.answers.get(visitor_of(request), question)
        outputs = answer.outputs
        column = outputs.concept_indices[0].tolist().index(self.chosen(answer, concept))
        fired = outputs.concept_activations[0, :, column].float()
        start = answer.inputs["input_ids"].shape[1]
        ids = outputs.sequences[0, : len(fired)]
        boxes = outputs.patch_boxes[0].float().cpu()  # (P, 4), in fractions of the image
        shows = (boxes[:, 2:] > boxes[:, :2]).all(1)  # (P,), not the end of a row
        patches = fired[ids == self.model.config.image_token_id].cpu()[shows]
        if outputs.grounding is not None:
            patches = outputs.grounding.maps[0, :, column].float()  # what it adds to the heatmap, per unit of weight
        heat = over_image(answer.image, boxes[shows].numpy(), (patches / patches.max().clamp_min(1e-6)).cpu().numpy())
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


def over_image(image: Image.Image, boxes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values of the MLLM's patches, (P,), in their boxes, (P, 4), over the image: float (H, W), 0 where none is."""
    width, height = image.size
    edges = np.rint(boxes * [width, height, width, height]).astype(int).clip(0, [width, height, width, height])
    canvas = np.zeros((height, width), np.float32)
    for value, (left, top, right, bottom) in zip(values, edges, strict=True):
        canvas[top:bottom, left:right] = np.maximum(canvas[top:bottom, left:right], value)
    return canvas.clip(0, 1)


def within(number: Any, name: str) -> float:
    """A number that a visitor chose. Raises gr.Error when it is none."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number != number:
        raise refusal(f"{name.capitalize()} is {number!r:.40}; choose a number.")
    return number


def check_threshold(threshold: Any) -> None:
    """Raises gr.Error when it is no probability."""
    if not 0 <= within(threshold, "the confidence") <= 1:
        raise refusal(f"The confidence is {threshold!r:.40}; choose a number from 0 to 1.")


def check_question(image: Any, instruction: Any, threshold: Any) -> None:
    """What costs nothing to check, before a question waits. Raises gr.Error."""
    if image is None:
        raise refusal("No image yet: upload one, or take an example.")
    if not isinstance(instruction, str) or len(instruction) > MAX_TEXT:
        found = f"has {len(instruction):,} characters" if isinstance(instruction, str) else "is no text"
        raise refusal(f"The instruction {found}; the limit is {MAX_TEXT:,}.")
    check_threshold(threshold)


def read(image: Any) -> Image.Image:
    """A visitor's image.

    Args:
        image: a file's path, or a PIL image.

    Returns:
        PIL image of mode "RGB", upright.

    Raises:
        ValueError: it cannot be read, or has more than `MAX_PIXELS` pixels, which its header says.
    """
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(
                f"the image has {opened.width} x {opened.height} pixels, the limit is {MAX_PIXELS:,}; make it smaller."
            )
        return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, AttributeError, TypeError, KeyError, MemoryError) as error:
        raise ValueError(
            f"the image cannot be read ({type(error).__name__}); save it again, as PNG or JPEG."
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image has more than {MAX_PIXELS:,} pixels; make it smaller.") from error


def examples() -> list[list[str]]:
    """[[image path, instruction]] of the scene that ships beside this file or with the project."""
    for folder in (HERE, EXAMPLES):
        if (folder / "scene.json").exists():
            scene = json.loads((folder / "scene.json").read_text())
            return [[str(folder / scene["image"]), scene["instruction"]]]
    return []


def page(demo: Demo) -> gr.Blocks:
    """The page, wired to the demo. Elements that a visitor or a test looks for carry an elem_id."""
    with gr.Blocks(title="SegCompass", analytics_enabled=False, delete_cache=(600, 1800)) as blocks:
        gr.Markdown(ABOUT)
        answer = gr.State()  # names the visitor's answer, which the demo keeps
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="filepath", image_mode=None, label="Image", height=260, elem_id="image")
                instruction = gr.Textbox(label="Instruction", elem_id="instruction", max_length=MAX_TEXT)
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
        asking = {"concurrency_limit": AT_ONCE + MAX_WAITING, "concurrency_id": "ask"}
        gr.on([ask.click, instruction.submit], demo.ask, [image, instruction, threshold], asked, **asking)
        concept.input(demo.where, [answer, concept], [fired, tokens, factor])
        factor.release(demo.scale, [answer, concept, factor, threshold], shows)
        restore.click(demo.restore, [answer, threshold], [*shows, factor])
        threshold.release(demo.rethreshold, [answer, threshold], shows)
        blocks.unload(demo.leave)
    return blocks.queue(max_size=4 * (AT_ONCE + MAX_WAITING))


def launch(model: str, port: int | None = None) -> None:
    """Serve the page until it is stopped.

    Args:
        model: SegCompass folder or Hub id.
        port: None takes `GRADIO_SERVER_PORT`, or 7860 or the next free one.
    """
    plain = gr.themes.Default(font=["sans-serif"], font_mono=["monospace"])  # no fonts from the network
    page(Demo(model)).launch(
        server_port=port, theme=plain, css=STYLE, max_file_size=MAX_FILE, state_session_capacity=1000
    )


if __name__ == "__main__":
    launch(os.environ.get("SEGCOMPASS_MODEL", str(EXAMPLES / "checkpoints" / "mini")))
