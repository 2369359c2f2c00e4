"""A question as JSON, and its answer: what `segcompass serve` and the endpoint's handler both speak.

`read_question` checks a request of a stranger before anything is decoded or waits; `answer_questions` answers one or
several together. An image is taken as bytes or base64 text alone: nothing is fetched and no path is read. Knows nothing
about HTTP but the status that a refusal has there.
"""

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import torch

from .explanation import heaviest_concepts
from .images import read_image
from .interventions import steer
from .mask_outlines import outlines, run_lengths

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Of image files that are read: none that Pillow hands on to another program, as it does with PostScript."""

STEERING = ("concept_scale", "concept_add", "concept_replace")

NO_TOKENS = "no mask: the response had no concentration tokens"


@dataclass(frozen=True)
class Limits:
    """What a question may be at most.

    Example:
        limits = Limits(pixels=4_000_000)
        question = read_question({"image": text, "instruction": "the mug"}, model, limits)
        (answer,) = answer_questions(model, processor, [question])
    """

    bytes: int = 20_000_000
    """of an image file."""
    pixels: int = 25_000_000
    """of an image; a larger one is refused before it is decoded."""
    characters: int = 1000
    """of an instruction."""
    concepts: int = 100
    """in each of concept_scale, concept_add and concept_replace."""


class Refusal(ValueError):
    """A question that is not answered, and why.

    Args:
        status: of HTTP: 413 too large, 422 wrong, 429 too many, 503 not now.
        field: of the request, or None.
        given: what was given, as a clause such as "the image has 40,000,000 pixels".
        needed: what is needed, as a clause such as "the limit is 25,000,000".
        remedy: what to do, such as "make it smaller".

    Example:
        try:
            question = read_question(request, model)
        except Refusal as refusal:
            print(refusal.status, refusal.as_json())
    """

    def __init__(self, status: int, field: str | None, given: str, needed: str, remedy: str):
        super().__init__("; ".join(part for part in (given, needed, remedy) if part) + ".")
        self.status, self.field = status, field
        self.given, self.needed, self.remedy = given, needed, remedy

    def as_json(self) -> dict[str, Any]:
        """{"error": {"status", "field", "message", "given", "needed", "remedy"}}."""
        names = ("status", "field", "given", "needed", "remedy")
        return {"error": {"message": str(self), **{name: getattr(self, name) for name in names}}}


@dataclass
class Question:
    """What is asked. Made by `read_question`.

    Example:
        question = read_question({"image": png_bytes, "instruction": "the mug", "threshold": 0.3}, model)
        question.on_text = print
        (answer,) = answer_questions(model, processor, [question])
    """

    image: Any
    """PIL image of mode "RGB"."""
    instruction: str
    threshold: float = 0.5
    """confidence from which a slot becomes an instance, in [0, 1]."""
    polygons: bool = True
    """whether the answer holds outlines beside run lengths."""
    steering: dict[str, dict] = field(default_factory=dict)
    """concept_scale, concept_add and concept_replace, those that were given."""
    on_text: Callable[[str], None] | None = None
    """called with the response so far, after each of its tokens."""
    has_left: Callable[[], bool] | None = None
    """asked after each token whether nobody waits for the answer any more; then no more is written."""


FIELDS = ("image", "instruction", "threshold", "polygons", *STEERING)


def flattened(request: Any) -> dict[str, Any]:
    """The fields of a request, also where they stand under "inputs" and "parameters" as endpoints have them.

    Args:
        request: what came.

    Returns:
        {field: value}.

    Raises:
        Refusal: it is no mapping, or names a field twice.
    """
    parts = [request]
    if isinstance(request, Mapping) and "inputs" in request:
        others = sorted(map(str, set(request) - {"inputs", "parameters"}))
        if others:
            raise _unknown(others, ("inputs", "parameters"))
        parts = [request["inputs"], request.get("parameters") or {}]
    fields: dict[str, Any] = {}
    for part in parts:
        if not isinstance(part, Mapping):
            raise Refusal(
                422, None, f"the request is {_shown(part)}", "it must be an object of fields", "send image, instruction"
            )
        twice = sorted(map(str, fields.keys() & part.keys()))
        if twice:
            raise Refusal(422, twice[0], f"{twice[0]} is given twice", "a field has one value", "leave one out")
        fields |= part
    return fields


def read_question(request: Any, model: Any, limits: Limits | None = None) -> Question:
    """Check a request, and read its image.

    Args:
        request: {"image": bytes, base64 text or data: URL, "instruction": text} and, if wanted, "threshold",
            "polygons", "concept_scale" {name or index: factor}, "concept_add" {name or index: weight} and
            "concept_replace" {name or index: name or index}; or the same under "inputs" and "parameters".
        model: the SegCompassModel that will answer, which knows its concepts.
        limits: None takes the defaults.

    Returns:
        The question.

    Raises:
        Refusal: naming the field, what was given, what is needed and what to do.
    """
    limits = limits or Limits()
    fields = flattened(request)
    unknown = sorted(set(map(str, fields)) - set(FIELDS))
    if unknown:
        raise _unknown(unknown, FIELDS)
    for name, example in (("image", "the file's bytes as base64"), ("instruction", "what to segment")):
        if fields.get(name) is None:
            raise Refusal(422, name, f"{name} is missing", f"it must be {example}", "send it")
    instruction = fields["instruction"]
    if not isinstance(instruction, str) or not instruction.strip():
        raise Refusal(
            422, "instruction", f"instruction is {_shown(instruction)}", "it must be text", "say what to segment"
        )
    if any("\ud800" <= character <= "\udfff" for character in instruction):  # JSON can write them
        raise Refusal(
            422,
            "instruction",
            f"instruction is {ascii(instruction)[:60]}",
            "it holds half a character",
            "send whole ones",
        )
    if len(instruction) > limits.characters:
        raise Refusal(
            413,
            "instruction",
            f"instruction has {len(instruction):,} characters",
            f"the limit is {limits.characters:,}",
            "shorten it",
        )
    threshold = fields.get("threshold", 0.5)
    if not _is_number(threshold) or not 0 <= threshold <= 1:
        raise Refusal(
            422, "threshold", f"threshold is {_shown(threshold)}", "it must be a number from 0 to 1", "choose one"
        )
    polygons = fields.get("polygons", True)
    if not isinstance(polygons, bool):
        raise Refusal(422, "polygons", f"polygons is {_shown(polygons)}", "it must be true or false", "choose one")
    steering = _read_steering(fields, model, limits)
    image = _read_sent_image(fields["image"], limits)
    return Question(image, instruction, float(threshold), polygons, steering)


def _unknown(names: Sequence[str], known: Sequence[str]) -> Refusal:
    shown = names[0][:40]
    return Refusal(422, shown, f"there is no field {shown!r}", f"the fields are {', '.join(known)}", "leave it out")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30  # so NaN is none


def _shown(value: Any) -> str:
    """A value that a stranger sent, in an error: short, and never a file."""
    if value is None or isinstance(value, (bool, int, float)):
        return f"{value!r:.40}"
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else f"a text of {len(value):,} characters"
    return f"of type {type(value).__name__}"


def _read_steering(fields: Mapping[str, Any], model: Any, limits: Limits) -> dict[str, dict]:
    """The interventions asked for, checked by what will apply them. Raises Refusal."""
    labels = model.concept_labels
    steering: dict[str, dict] = {}
    for name in STEERING:
        given = fields.get(name)
        if given is None or given == {}:
            continue
        replaces = name == "concept_replace"
        kind = "{concept: concept}" if replaces else "{concept: number}"
        remedy = 'send an object such as {"red": ' + ('"blue"}' if replaces else "0}")
        whole = isinstance(given, Mapping) and all(
            isinstance(value, (str, int)) and not isinstance(value, bool) if replaces else _is_number(value)
            for value in given.values()
        )
        if not whole or not all(isinstance(key, (str, int)) for key in given):
            raise Refusal(422, name, f"{name} is {_shown(given)}", f"it must be {kind}, of names or indices", remedy)
        if len(given) > limits.concepts:
            raise Refusal(
                413, name, f"{name} names {len(given):,} concepts", f"the limit is {limits.concepts:,}", "name fewer"
            )
        asked = {_concept(key, labels): _concept(value, labels) if replaces else value for key, value in given.items()}
        if len(asked) < len(given):
            raise Refusal(422, name, f"{name} names a concept twice", "a concept has one value", "leave one out")
        if name != "concept_scale" and not model.grounded:
            raise Refusal(
                422,
                name,
                f"{name} is given, and this model's read-out is not grounded",
                "it can only scale concepts",
                "use concept_scale",
            )
        try:
            alone: list[Any] = [asked if each == name else None for each in STEERING]
            steer(alone[0], alone[1], alone[2], torch.zeros(1, 1, 1), model.config.sae_config.d_sae, labels)
        except ValueError as error:
            raise Refusal(422, name, str(error).rstrip("."), "", "") from error
        steering[name] = asked
    return steering


def _concept(name: Any, labels: Mapping[int, str]) -> int | str:
    """A concept's index where JSON could only write it as text, or its label."""
    if isinstance(name, str) and name.isdecimal() and len(name) < 10 and name not in labels.values():
        return int(name)
    return name


def _read_sent_image(sent: Any, limits: Limits) -> Any:
    """Bytes or base64 text as a PIL image of mode "RGB". Raises Refusal."""
    from PIL import Image

    too_large = Refusal(
        413,
        "image",
        f"image has more than {limits.bytes:,} bytes",
        f"the limit is {limits.bytes:,}",
        "make it smaller, or save it as JPEG",
    )
    if isinstance(sent, str):
        if len(sent) > 4 * limits.bytes // 3 + 1000:
            raise too_large
        sent = _from_base64(sent)
    if not isinstance(sent, bytes):
        raise Refusal(
            422, "image", f"image is {_shown(sent)}", "it must be a file's bytes as base64 text", "send the file itself"
        )
    if len(sent) > limits.bytes:
        raise too_large
    formats = f"it must be a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, whole"
    try:
        opened = Image.open(BytesIO(sent), formats=FORMATS)
        width, height = opened.size
    except Exception as error:  # decoders raise whatever they like on what is no image
        raise Refusal(
            422, "image", f"image is {len(sent):,} bytes that cannot be read as an image", formats, "save it again"
        ) from error
    if width * height > limits.pixels:
        raise Refusal(
            413,
            "image",
            f"image has {width:,} x {height:,} pixels",
            f"the limit is {limits.pixels:,} pixels",
            "make it smaller",
        )
    try:
        return read_image(opened, "image")
    except Exception as error:
        raise Refusal(
            422, "image", f"image cannot be read ({str(error)[:200].rstrip('.')})", formats, "save it again"
        ) from error


def _from_base64(text: str) -> bytes:
    """The bytes that base64 text, or a data: URL of it, stands for. Raises Refusal."""
    given = f"image is {_shown(text)}"
    head, comma, body = text.partition(",") if text[:5].lower() == "data:" else ("", "", text)
    if head and not (comma and head.lower().endswith(";base64")):
        raise Refusal(422, "image", f"{given}, a data: URL without base64", "it must say ;base64,", "encode it so")
    if not head and re.match(r"[A-Za-z][A-Za-z0-9+.-]*:|[./~\\]", text) and text[:4] != "/9j/":
        raise Refusal(
            422,
            "image",
            f"{given}, an address or a path",
            "nothing is fetched or opened here",
            "send the file's bytes as base64 text",
        )
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(422, "image", f"{given}, which is no base64 text", "it must be base64", "encode it so") from error


# -- answering ---------------------------------------------------------------------------------------------------------


def answer_questions(model: Any, processor: Any, questions: Sequence[Question]) -> list[Any]:
    """Answer questions together: one generation for all, and the masks of each by themselves.

    Args:
        model: SegCompassModel, in evaluation mode.
        processor: its processor.
        questions: one or more. If they cannot be answered together, each is asked alone.

    Returns:
        For each a dict as `describe_answer` makes it; None where `has_left` said so; or the exception that it met, a
        Refusal where the question is at fault.
    """
    try:
        try:
            images, texts = [question.image for question in questions], [each.instruction for each in questions]
            inputs = processor(images=images, text=texts, return_tensors="pt").to(model.device)
        except ValueError as error:
            raise Refusal(422, None, str(getattr(error, "problem", error)).rstrip("."), "", "") from error
        sequences, states = model.reason(**inputs, **_watching(processor, questions, inputs["input_ids"].shape[1]))
    except Exception as error:  # whatever one question did, the others do not pay for it
        if len(questions) == 1:
            return [error]
        return [answer for question in questions for answer in answer_questions(model, processor, [question])]
    return [
        _answer_row(model, processor, question, sequences[row, inputs["input_ids"].shape[1] :], states.rows([row]))
        for row, question in enumerate(questions)
    ]


def _watching(processor: Any, questions: Sequence[Question], start: int) -> dict[str, Any]:
    """Options of `generate` under which it tells of its text and stops for those who have left."""
    if all(question.on_text is None and question.has_left is None for question in questions):
        return {}

    def watch(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = []
        for row, question in enumerate(questions):
            done.append(question.has_left is not None and question.has_left())
            if question.on_text is not None and not done[-1]:
                question.on_text(processor.decode(input_ids[row, start:], skip_special_tokens=True))
        return torch.tensor(done, device=input_ids.device)

    return {"stopping_criteria": [watch]}


@torch.no_grad()
def _answer_row(model, processor, question, response, states):
    """The answer to one question of a batch: dict, None or exception. Padding is cut off, as if it were alone."""
    if question.has_left is not None and question.has_left():
        return None
    try:
        outputs = model.decode_masks(**states.trimmed()._asdict(), **question.steering)
        text = processor.decode(response, skip_special_tokens=True)
        return describe_answer(model, processor, question, outputs, text)
    except Exception as error:
        return error


def describe_answer(model: Any, processor: Any, question: Question, outputs: Any, text: str) -> dict[str, Any]:
    """The answer to one question, as JSON.

    Args:
        model: the model.
        processor: its processor.
        question: what was asked.
        outputs: SegCompassOutput of this question alone.
        text: the response, without special tokens.

    Returns:
        "instruction", "text", "reasoning" (what stands in the think tags), "verdict", "no_target" (the model looked and
        was confident of nothing), "size" [H, W], "instances", most confident first, and "most_confident": the slot that
        came nearest where there are none, or None. An instance has "slot", "score" in [0, 1], "box" (left, top, right,
        bottom), "segmentation" (COCO RLE), "polygons" (see `outlines`) and "concepts", heaviest first: "index",
        "label" or None, "weight" (its share of the slot) and "value".
    """
    size = (question.image.height, question.image.width)
    found = processor.post_process_instance_segmentation(outputs, question.threshold, target_sizes=[size])[0]
    slots, scores, boxes = (found[name].tolist() for name in ("slots", "scores", "boxes"))
    instances = []
    for place in sorted(range(len(slots)), key=lambda place: -scores[place]):
        mask = found["masks"][place].cpu().numpy()
        instance = {
            "slot": slots[place],
            "score": scores[place],
            "box": [int(edge) for edge in boxes[place]],
            "segmentation": run_lengths(mask),
        }
        if question.polygons:
            instance["polygons"] = outlines(mask)
        instances.append({**instance, "concepts": _concepts(model, outputs, slots[place])})
    with_token = outputs.slot_mask[0].nonzero()[:, 0].tolist()
    nearest = None
    if with_token and not instances:
        confidences = outputs.pred_logits[0].float().sigmoid().tolist()
        slot = max(with_token, key=lambda slot: confidences[slot])
        nearest = {"slot": slot, "score": confidences[slot], "concepts": _concepts(model, outputs, slot)}
    return {
        "instruction": question.instruction,
        "text": text,
        "reasoning": reasoning_of(text),
        "verdict": verdict_of(len(instances)) if with_token else NO_TOKENS,
        "no_target": bool(with_token) and not instances,
        "size": list(size),
        "instances": instances,
        "most_confident": nearest,
    }


def reasoning_of(text: str) -> str:
    """What stands in a response's think tags, or the whole text without markers when they are missing."""
    thought = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    return (thought[1] if thought else re.sub(r"</?think>|<REF_POS>", " ", text)).strip()


def verdict_of(count: int) -> str:
    """How many instances there are, in words: "2 instances" or "no target"."""
    return f"{count} instance{'s' * (count > 1)}" if count else "no target"


def _concepts(model: Any, outputs: Any, slot: int) -> list[dict[str, Any]]:
    names = model.concept_labels
    return [
        {
            "index": concept.index,
            "label": names.get(concept.index),
            "weight": concept.weight,
            "value": concept.value,
        }
        for concept in heaviest_concepts(outputs, slot)
    ]
