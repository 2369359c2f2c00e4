"""The model behind the page: answers as they are written, changes to them, and the same as functions without a page.

Answers of the page are kept per visitor, so that a change decodes the masks again from the states that generation left
behind; the MLLM does not run again. `Tools` answers each call by itself and keeps nothing. Knows nothing about layout.
"""

import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import torch
import visitors
from huggingface_hub import metadata_load
from small_model import board_names, is_small, unknown_words
from transformers import AutoModel, AutoProcessor, TextIteratorStreamer
from visitors import Answer, Answers, Line, check_question, check_threshold, read, refusal, visitor_of, within
from why import Changes, Key, Slot, Why, account, foretold, slots_of, swap_names, with_change

ZERO_GPU = os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true")
"""Whether a GPU is lent call by call, each in a process of its own."""
if ZERO_GPU:
    import spaces

    on_gpu = spaces.GPU
else:

    def on_gpu(task: Any) -> Any:
        """The task as it is: this process has the device."""
        return task


def model_of_the_space(folder: Path) -> str | None:
    """The model that a Space shows.

    Args:
        folder: the Space's repository.

    Returns:
        SEGCOMPASS_MODEL, else the first model that the head of README.md names; None where that is the placeholder.
    """
    if named := os.environ.get("SEGCOMPASS_MODEL"):
        return named
    listed = (metadata_load(folder / "README.md") or {}).get("models") or ["USER/"]
    return None if listed[0].startswith("USER/") else listed[0]


FORETELLING = 3.0
"""Seconds for which changes to a concept are tried before anybody asks for one."""


class Shown(NamedTuple):
    """What the page shows at a moment."""

    text: str = ""
    """of the response so far."""
    note: str = ""
    """instead of it, such as how many wait."""
    why: Why | None = None
    """the account, once the response is complete."""
    answer: Answer | None = None
    unknown: list[str] = []
    """the words of the instruction that the model never learned."""

    @property
    def question(self) -> str | None:
        """The name of the answer, by which the page asks for changes."""
        return self.answer.name if self.answer else None


class Demo:
    """The model, and what its visitors asked.

    Args:
        path: SegCompass folder or Hub id.
    """

    def __init__(self, path: str):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModel.from_pretrained(path, trust_remote_code=True).to(device).eval()
        self.set_up(model, AutoProcessor.from_pretrained(path, trust_remote_code=True))

    def set_up(self, model: Any, processor: Any) -> None:
        """Begin with a model, and nobody there."""
        self.model, self.processor = model, processor
        self.line, self.answers = Line(), Answers()
        self._asking: dict[str, tuple[Event, object]] = {}  # visitor -> (set when the visitor has left, its ticket)
        is_place = model.grounded_reading.is_place.tolist() if model.grounded else []
        self.small = is_small(model)
        self.names = board_names(model.concept_labels, is_place) if self.small else {}
        self.swaps = swap_names(model.concept_labels, is_place, self.names) if model.grounded else {}
        self.foretells = model.grounded and not ZERO_GPU  # a lent GPU's time is the visitor's
        self._write, self._decode = on_gpu(self._write_here), on_gpu(self._decode_here)
        self._account = on_gpu(self._account_here)

    def unknown(self, instruction: str) -> list[str]:
        """The words of an instruction that the model never learned, where that is known: of the small model."""
        return unknown_words(self.processor.tokenizer, instruction) if self.small else []

    # -- asking ------------------------------------------------------------------------------------------------------

    def ask(self, image: Any, instruction: str, threshold: float, request: gr.Request | None = None) -> Iterator[Shown]:
        """Yield what the page shows: first the reasoning as it grows, then everything."""
        check_question(image, instruction, threshold)
        visitor, left = visitor_of(request), Event()
        ticket = self.line.enter()
        try:
            self._asking[visitor] = left, ticket
            answer, text = None, ""
            unknown = self.unknown(instruction)
            for piece in self._when_it_is_time(image, instruction, left, ticket):
                if isinstance(piece, Answer):
                    answer = piece
                else:
                    text = piece.text
                    yield piece._replace(unknown=unknown)
            if answer is None or left.is_set():
                return
            shown = self.show(answer, threshold)
            self.answers.put(visitor, answer)
            yield shown._replace(text=text)
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

    def alone(self, image: Any, instruction: str, threshold: float) -> Answer:
        """An answer for a caller without a page; it waits like the others, and is kept nowhere."""
        check_question(image, instruction, threshold)
        left, ticket = Event(), self.line.enter()
        try:
            *_, answer = self._when_it_is_time(image, instruction, left, ticket)
        finally:
            self.line.leave(ticket)
        return answer

    def _when_it_is_time(self, image: Any, instruction: str, left: Event, ticket: object) -> Iterator["Shown | Answer"]:
        """What is shown while one waits and while the response is written; the Answer last, unless the visitor left."""
        patience = time.monotonic() + visitors.PATIENCE
        while not self.line.wait(ticket, min(1.0, visitors.PATIENCE)):
            if left.is_set():
                return
            if time.monotonic() > patience:
                raise refusal(f"No answer within {visitors.PATIENCE:.0f} seconds, so many are asking; try again later.")
            before = self.line.before(ticket)
            yield Shown(note=f"{before} question{'s' * (before > 1)} before yours …")
        if not left.is_set():
            yield from self._answer(image, instruction, left)

    def _answer(self, image: Any, instruction: str, left: Event) -> Iterator["Shown | Answer"]:
        try:
            image = read(image)
            inputs = self.processor(images=image, text=instruction, return_tensors="pt")
        except (ValueError, OSError) as error:  # an empty or too long instruction, an image that cannot be read
            raise refusal(error) from error
        answer, text = Answer(image, inputs), ""
        answer.unknown = self.unknown(instruction)
        written = self._write(dict(inputs), None if ZERO_GPU else left)  # another process cannot see the event
        try:
            for piece in written:
                if left.is_set():
                    return
                if isinstance(piece, str):
                    text += piece
                    yield Shown(text=text)
                else:
                    answer.states, answer.outputs = piece
        except gr.Error:
            raise
        except Exception as error:
            logging.getLogger(__name__).exception("The model failed")
            raise refusal(f"The model failed: {error}") from error
        finally:
            written.close()  # the model stops at the next token, before the next is served
        if not left.is_set():
            yield answer

    def _write_here(self, inputs: dict, left: Event | None) -> Iterator[Any]:
        """Pieces of the response as it is written; then (states, outputs), unless the visitor left."""
        left = Event() if left is None else left
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        on_device = moved_to(self.model.device, inputs)
        made: list[Any] = []

        def stop(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), left.is_set(), dtype=torch.bool, device=input_ids.device)

        def write() -> None:
            try:
                _, states = self.model.reason(**on_device, streamer=streamer, stopping_criteria=[stop])
                if not left.is_set():
                    made.extend((states, self.model.decode_masks(**states._asdict())))
            except Exception as error:
                made.append(error)
                streamer.end()

        writer = Thread(target=torch.no_grad()(write))
        writer.start()
        try:
            yield from streamer
        except GeneratorExit:  # the visitor left: the model stops at the next token
            left.set()
            raise
        finally:
            writer.join()  # before the next is served
        if made and isinstance(made[0], Exception):
            raise made[0]
        if made:
            yield tuple(map(kept_where, made))

    @torch.no_grad()
    def _decode_here(self, answer: Answer, changes: Changes) -> Any:
        """The masks with changes. Raises gr.Error when they cannot be followed."""
        scale = {key: change for key, change in changes.items() if not isinstance(change, str)}
        replace = {key: change for key, change in changes.items() if isinstance(change, str)}
        options = {"concept_replace": replace} if replace else {}
        states = moved_to(self.model.device, answer.states)
        try:
            return kept_where(self.model.decode_masks(**states._asdict(), concept_scale=scale, **options))
        except ValueError as error:
            raise refusal(error) from error

    @torch.no_grad()
    def _account_here(self, answer: Answer, threshold: float) -> Why:
        """The account of an answer with its changes."""
        if ZERO_GPU:  # the answer is a copy, and lies in main memory
            answer.states = moved_to(self.model.device, answer.states)
            answer.outputs = moved_to(self.model.device, answer.outputs)
        decode = partial(self._decode_here, answer)
        return account(self.model, self.processor, answer, threshold, decode, self.names)

    # -- changing ----------------------------------------------------------------------------------------------------

    def show(self, answer: Answer, threshold: float) -> Shown:
        """The account of an answer with its changes. Raises gr.Error when they cannot be followed."""
        why, answer.threshold = self._account(answer, threshold), threshold
        for slot in (*why.slots, *why.after.values()):
            answer.concepts += [each.key for each in slot.concepts if each.key not in answer.concepts]
        return Shown("".join(why.words), why=why, answer=answer, unknown=answer.unknown)

    def decode(self, answer: Answer, changes: Changes) -> Any:
        """The masks with changes: SegCompassOutput. Raises gr.Error when they cannot be followed."""
        return self._decode(answer, changes)

    def change(
        self,
        question: str | None,
        concept: Any,
        change: Any,
        threshold: float,
        request: gr.Request | None = None,
    ) -> Shown:
        """The answer with one concept changed, beside those changed before; the response stays.

        Args:
            question: name of the answer.
            concept: its number on the page, a place in `Answer.concepts`.
            change: factor from 0 to 2 on what it adds, or one of `swaps` to be put in its place.
            threshold: confidence from which a slot is kept.
            request: whose question it is.

        Returns:
            Shown.
        """
        answer = self.answers.get(visitor_of(request), question)
        key = self._chosen(answer, concept)
        if isinstance(change, str):
            if change not in self.swaps:
                raise refusal(f"{change!r:.40} is no name that can be put in its place; choose one of the list.")
            if change == key:
                raise refusal(f"{change} would be put in its own place; choose another name.")
        elif not 0 <= within(change, "the strength") <= 2:
            raise refusal(f"The strength is {change!r:.40}; choose a number from 0 to 2.")
        check_threshold(threshold)
        before, earlier = answer.changes, answer.earlier
        answer.changes = with_change(before, key, change if isinstance(change, str) else float(change))
        answer.earlier = before
        try:
            return self.show(answer, threshold)
        except gr.Error:
            answer.changes, answer.earlier = before, earlier
            raise

    def restore(
        self,
        question: str | None,
        threshold: float,
        request: gr.Request | None = None,
        concept: Any = None,
    ) -> Shown:
        """The answer without the change of one concept, or with nothing changed.

        Args:
            question: name of the answer.
            threshold: confidence from which a slot is kept.
            request: whose question it is.
            concept: its number on the page; None undoes all changes.

        Returns:
            Shown.
        """
        answer = self.answers.get(visitor_of(request), question)
        undone = set(answer.changes) if concept is None else {self._chosen(answer, concept)}
        check_threshold(threshold)
        answer.changes = {key: change for key, change in answer.changes.items() if key not in undone}
        answer.earlier = dict(list(answer.changes.items())[:-1])  # the last that is left, as if it were made now
        return self.show(answer, threshold)

    def foretell(
        self, question: str | None, concept: Any, threshold: float, request: gr.Request | None = None
    ) -> dict[int, dict[str, Any]]:
        """What doubling a concept, or another in its place, would do to each mask, beside the changes in force.

        Each is decoded as the click would, for `FORETELLING` seconds at most. Nothing is changed.

        Args:
            question: name of the answer.
            concept: its number on the page.
            threshold: confidence from which a slot is kept.
            request: whose question it is.

        Returns:
            Number of each slot -> double (in a few words; "" where it is doubled already) and swaps: [[effect in a few
            words, [names]]], what moves the mask most first. {} where nothing is foretold.
        """
        answer = self.answers.get(visitor_of(request), question)
        key = self._chosen(answer, concept)
        check_threshold(threshold)
        if not self.foretells:
            return {}

        def slots_with(changes: Changes) -> dict[int, Slot]:
            outputs = self.decode(answer, changes) if changes else answer.outputs
            return slots_of(self.processor, answer, outputs, threshold, bool(self.names))

        several = len(with_change(answer.changes, key, 0.0)) > 1  # else the page compares with the answer as it was
        now = slots_with(answer.changes if several else {})
        until, changed = time.monotonic() + FORETELLING, []
        for change in (2.0, *self.swaps):
            if change not in (key, answer.changes.get(key)) and time.monotonic() < until:
                changed.append((change, slots_with(with_change(answer.changes, key, change))))
        doubled, swapped = [each for each in changed if each[0] == 2.0], [each for each in changed if each[0] != 2.0]
        double, swaps = foretold(now, doubled, threshold), foretold(now, swapped, threshold)
        return {slot: {"double": double[slot][0][0] if doubled else "", "swaps": swaps[slot]} for slot in now}

    @staticmethod
    def _chosen(answer: Answer, concept: Any) -> Key:
        """The concept with this number on the page. Raises gr.Error when there is none."""
        if isinstance(concept, bool) or not isinstance(concept, int) or not 0 <= concept < len(answer.concepts):
            raise refusal(f"The concept {concept!r:.40} is none of this answer's; choose one of the list.")
        return answer.concepts[concept]

    def rethreshold(self, question: str | None, threshold: float, request: gr.Request | None = None) -> Shown | None:
        """The same answer, other slots kept; None when nothing was asked yet, or it is shown so already."""
        if question is None:
            return None
        check_threshold(threshold)
        answer = self.answers.get(visitor_of(request), question)
        return None if threshold == answer.threshold else self.show(answer, threshold)


def kept_where(made: Any) -> Any:
    """Outputs and states as they are kept: where they are, or in main memory if the GPU goes back after the call."""
    return moved_to("cpu", made) if ZERO_GPU else made


def moved_to(device: Any, value: Any) -> Any:
    """Outputs or states, with what they hold, on a device; what is there already is not copied."""
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved_to(device, each) for each in value))
    if hasattr(value, "items"):
        return type(value)(**{name: moved_to(device, each) for name, each in value.items()})
    return value


class Tools:
    """The same as functions: each call asks anew, answers whole and keeps nothing.

    Args:
        demo: the model and its line.
    """

    def __init__(self, demo: Demo):
        self.demo = demo

    def segment(self, image: str, instruction: str, threshold: float = 0.5) -> dict:
        """Find what an instruction means in an image: one mask per thing, with the reasoning that led to them.

        Args:
            image: The image, PNG or JPEG.
            instruction: What to find, in words, such as "everything to the left of the blue star".
            threshold: Confidence from which a mask is given, from 0 to 1.

        Returns:
            text (the reasoning), no_target (true when the model looked and nothing was sure enough), and instances:
            each with slot, score, box (x0, y0, x1, y1 in pixels) and segmentation, a COCO run-length encoding
            {"size": [height, width], "counts": [...]}, column by column. unknown_words are those of the instruction
            that the small model never learned: the answer to them is a guess.
        """
        answer = self.demo.alone(image, instruction, threshold)
        return self._described(answer, answer.outputs, threshold)

    def explain(self, image: str, instruction: str, threshold: float = 0.5) -> dict:
        """Say why each mask is where it is: the concepts it was made from, the words that fired them, and their places.

        Args:
            image: The image, PNG or JPEG.
            instruction: What to find, in words.
            threshold: Confidence from which a mask is given, from 0 to 1.

        Returns:
            text, verdict, unknown_words (as `segment` gives them), and slots: each with slot, confidence, kept and
            concepts, heaviest first: name, share of the heat in [0, 1], words that fired it, place (x, y in pixels
            where it adds most), and lost_without_it, the share of the mask that is gone when the concept is switched
            off (null where that is not known). Without a mask the surest slot is explained.
        """
        answer = self.demo.alone(image, instruction, threshold)
        shown = self.demo.show(answer, threshold)
        why: Any = shown.why
        return {
            "text": "".join(why.words),
            "verdict": why.verdict,
            "unknown_words": answer.unknown,
            "slots": [
                {
                    "slot": slot.number,
                    "confidence": slot.confidence,
                    "kept": slot.kept,
                    "concepts": [
                        {
                            "name": str(concept.key),
                            "share": concept.share,
                            "words": [why.words[word].strip() for word in sorted(concept.words)],
                            "place": _highest(concept.heat, answer.image.size),
                            "lost_without_it": None if concept.off is None else concept.off.gone,
                        }
                        for concept in slot.concepts
                    ],
                }
                for slot in why.slots
            ],
        }

    def change_concepts(
        self,
        image: str,
        instruction: str,
        switch_off: str = "",
        double: str = "",
        swap: str = "",
        threshold: float = 0.5,
    ) -> dict:
        """Segment twice with the same reasoning: as it is, and with concepts switched off, doubled or swapped.

        Args:
            image: The image, PNG or JPEG.
            instruction: What to find, in words.
            switch_off: Names of concepts to switch off, with commas between them, as `explain` gives them.
            double: Names of concepts to double.
            swap: Pairs such as "blue=red, box=ball": the second takes the place of the first.
            threshold: Confidence from which a mask is given, from 0 to 1.

        Returns:
            before and after, each as `segment` gives it.
        """
        changes: Changes = {}
        for given, factor in ((switch_off, 0.0), (double, 2.0)):
            changes.update({self._key(name): factor for name in _listed(given)})
        for pair in _listed(swap):
            old, equals, new = (part.strip() for part in pair.partition("="))
            if not (old and equals and new):
                raise refusal(f"swap holds {pair!r:.60}, which is no pair; write it as blue=red.")
            changes[self._key(old)] = new
        if not changes:
            raise refusal("Nothing to change: name a concept in switch_off, double or swap; `explain` lists them.")
        answer = self.demo.alone(image, instruction, threshold)
        before = self._described(answer, answer.outputs, threshold)
        return {"before": before, "after": self._described(answer, self.demo.decode(answer, changes), threshold)}

    @staticmethod
    def _key(name: str) -> Key:
        return int(name) if name.isdecimal() else name

    def _described(self, answer: Answer, outputs: Any, threshold: float) -> dict:
        processor, sizes = self.demo.processor, answer.inputs["original_sizes"]
        found = processor.post_process_instance_segmentation(outputs, threshold, target_sizes=sizes)[0]
        start = answer.inputs["input_ids"].shape[1]
        instances = [
            {"slot": slot, "score": score, "box": box, "segmentation": run_lengths(mask)}
            for slot, score, box, mask in zip(
                found["slots"].tolist(),
                found["scores"].tolist(),
                found["boxes"].int().tolist(),
                found["masks"].cpu().numpy(),
                strict=True,
            )
        ]
        return {
            "text": processor.decode(outputs.sequences[0, start:], skip_special_tokens=True),
            "no_target": bool(outputs.slot_mask[0].any()) and not instances,
            "unknown_words": answer.unknown,
            "instances": instances,
        }


def _listed(names: Any) -> list[str]:
    if not isinstance(names, str):
        raise refusal(f"The names of concepts are {names!r:.40}; give them as text, with commas between them.")
    return [name.strip() for name in names.split(",") if name.strip()]


def _highest(heat: np.ndarray, size: tuple[int, int]) -> list[int]:
    """[x, y] in pixels of an image of (W, H) where a heat over it is greatest."""
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    return [round((column + 0.5) / heat.shape[1] * size[0]), round((row + 0.5) / heat.shape[0] * size[1])]


def run_lengths(mask: np.ndarray) -> dict:
    """A mask as uncompressed COCO RLE.

    Args:
        mask: bool (H, W).

    Returns:
        {"size": [H, W], "counts": lengths of runs of 0 and 1 in turn, column by column, of 0 first}.
    """
    flat = np.concatenate([[False], mask.flatten(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])  # where another run begins
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    return {"size": list(mask.shape), "counts": counts.tolist()}
