"""Who may ask what, when, and what is kept for whom: the line, the answers, and the limits of a question.

Visitors are many and memory is not: questions wait in a line of limited length (`Line`), images, texts and waiting have
limits, and what an answer leaves behind is kept for a while, of the latest visitors alone (`Answers`), and let go when
its visitor leaves. Knows nothing about the model or the page.
"""

import html
import secrets
import time
from collections import OrderedDict
from threading import Condition, Lock
from typing import Any

import gradio as gr
import torch
from PIL import Image, ImageOps

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


def refusal(message: Any) -> gr.Error:
    """An error that the page shows as text, whatever a visitor wrote into it; no fault, so no traceback in the log."""
    return gr.Error(html.escape(str(message)), print_exception=False)


def visitor_of(request: Any) -> str:
    """Whose request it is: one open page each."""
    return getattr(request, "session_hash", None) or ""


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

    def __len__(self) -> int:
        return len(self._tickets)

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
    """What one question left behind: the inputs, what masks are decoded from, and what the visitor changed.

    Args:
        image: PIL image, RGB.
        inputs: what the processor made of it.
    """

    def __init__(self, image: Image.Image, inputs: Any):
        self.image, self.inputs = image, inputs
        self.states: Any = None  # what masks are decoded from
        self.outputs: Any = None  # of the response as it was written, before any change
        self.changes: dict[int | str, float | str] = {}  # concept -> its factor, or the concept in its place
        self.threshold: float | None = None  # at which it was shown last
        self.earlier: dict[int | str, float | str] | None = None  # the changes before the last was made
        self.concepts: list[int | str] = []  # those that the page shows, by the number it knows them by
        self.unknown: list[str] = []  # words of the instruction that the model never learned
        self.name, self.used = secrets.token_hex(8), time.monotonic()

    def bytes(self) -> int:
        """About how much memory it takes."""
        tensors = [*self.inputs.values(), *(self.states or ()), *(self.outputs or {}).values()]
        tensors += list(getattr(self.outputs, "grounding", None) or ())
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


# -- what a visitor may give -------------------------------------------------------------------------------------------


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
