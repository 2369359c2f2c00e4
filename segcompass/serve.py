"""The model as a service over HTTP: the work of `segcompass serve`. Needs fastapi and uvicorn.

Requests are checked as they arrive, and wait in a line of limited length and time; one thread owns the model and
answers together what waits (`Worker`). A visitor who leaves is dropped from the line, or its row stops at the next
token. What is asked and answered is `modeling_segcompass/answering.py`, as in the endpoint's handler; this file knows
HTTP alone. Nothing of a request is kept, or written to the log.
"""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from segcompass import __version__
from segcompass.api_page import api_page
from segcompass.hub_cards.space.small_model import is_small, unknown_words
from segcompass.loading import load
from segcompass.modeling_segcompass import SegCompassModel, SegCompassProcessor
from segcompass.modeling_segcompass.answering import (
    STEERING,
    Limits,
    Question,
    Refusal,
    answer_questions,
    flattened,
    read_question,
)

logger = logging.getLogger(__name__)

FAREWELL = 30
"""Seconds in which what was begun is finished when the server is told to end."""
HEARTBEAT = 10
"""Seconds after which a stream says that it is still there."""


@dataclass(frozen=True)
class Settings:
    """Where and how to serve.

    Example:
        settings = Settings(port=8001, limits=Limits(pixels=4_000_000))
        serve("examples/checkpoints/mini", settings, print)
        # serving mini (101 named concepts) at http://127.0.0.1:8001; /docs has the API
    """

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    batch_size: int = 8
    """questions answered together at most."""
    max_waiting: int = 32
    """questions that may wait besides."""
    patience: float = 60
    """seconds that a question may take to arrive, and then to wait for its turn."""
    limits: Limits = field(default_factory=Limits)


# -- the line and the worker -------------------------------------------------------------------------------------------


class Ticket:
    """One question's place in the line, and the way its news take from the worker's thread to the visitor's coroutine.

    News are ("begun", None), ("text", the piece that was added), ("answer", JSON as bytes) and ("error", exception).

    Args:
        loop: the event loop in which the visitor is served.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self.loop, self.news, self.left = loop, asyncio.Queue[tuple[str, Any]](), threading.Event()
        self.question: Question | None = None
        self._sent = ""

    def tell(self, kind: str, content: Any = None) -> None:
        """Pass news on, from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody is there
            self.loop.call_soon_threadsafe(self.news.put_nowait, (kind, content))

    def tell_text(self, text: str) -> None:
        """Pass on what a response has now and had not before; of a character that is half written nothing."""
        text = text.removesuffix("\ufffd")
        if text.startswith(self._sent) and text != self._sent:
            self.tell("text", text[len(self._sent) :])
            self._sent = text


class Worker:
    """The thread that owns the model, and the line of questions that wait for it.

    Args:
        model: the model, in evaluation mode.
        processor: its processor.
        batch_size: how many questions are answered together at most.
        max_waiting: how many may wait besides.
    """

    def __init__(self, model: SegCompassModel, processor: SegCompassProcessor, batch_size: int, max_waiting: int):
        self.model, self.processor = model, processor
        self.batch_size, self.places = batch_size, batch_size + max_waiting
        self.answered = 0
        self._small = is_small(model)
        self._inside: set[Ticket] = set()  # all that have a place, from their arrival on
        self._waiting: list[Ticket] = []  # those of them that are read, first come first
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="worker")

    @property
    def is_alive(self) -> bool:
        """Whether questions are answered."""
        return self._thread.is_alive() and not self._closing

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more: the batch at work stops at its next token."""
        with self._changed:
            self._closing = True
            for ticket in self._inside:
                ticket.left.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def enter(self, ticket: Ticket) -> None:
        """Give it a place. Raises Refusal when there is none."""
        with self._changed:
            if self._closing:
                raise Refusal(503, None, "the server is ending", "", "ask again later")
            if len(self._inside) >= self.places:
                waiting = self.places - self.batch_size
                raise Refusal(
                    429,
                    None,
                    f"{self.batch_size} questions are being answered and {waiting} wait",
                    "that is the limit",
                    "ask again in some seconds",
                )
            self._inside.add(ticket)

    def wait(self, ticket: Ticket, question: Question) -> None:
        """Put its question into the line."""
        with self._changed:
            ticket.question = question
            self._waiting.append(ticket)
            self._changed.notify_all()

    def before(self, ticket: Ticket) -> int:
        """How many wait before it."""
        with self._changed:
            return self._waiting.index(ticket) if ticket in self._waiting else 0

    def leave(self, ticket: Ticket) -> None:
        """Free its place; an answer that is being written to it stops."""
        ticket.left.set()
        with self._changed:
            self._inside.discard(ticket)
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def state(self) -> dict[str, int]:
        """How many have a place, how many of them wait, and how many were answered since the start."""
        with self._changed:
            return {"inside": len(self._inside), "waiting": len(self._waiting), "answered": self.answered}

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                batch, self._waiting = self._waiting[: self.batch_size], self._waiting[self.batch_size :]
            self._answer(batch)
            del batch  # while none waits, nothing of the last is held

    def _answer(self, batch: list[Ticket]) -> None:
        questions = [ticket.question for ticket in batch if ticket.question is not None]
        for ticket in batch:
            ticket.tell("begun")
        try:
            answers = answer_questions(self.model, self.processor, questions)
        except BaseException as error:
            answers = [error] * len(batch)
        for ticket, answer in zip(batch, answers, strict=True):
            if isinstance(answer, BaseException):
                ticket.tell("error", answer)
            elif answer is not None:
                unknown = unknown_words(self.processor.tokenizer, answer["instruction"]) if self._small else []
                ticket.tell("answer", json.dumps({**answer, "unknown_words": unknown}, allow_nan=False).encode())
                self.answered += 1


# -- the answers' form, for the API page -------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Concept(_Strict):
    """A concept's part in a slot."""

    index: int = Field(description="feature of the sparse autoencoder")
    label: str | None = Field(description="its name in the model's dictionary, or null")
    weight: float = Field(description="its share of the slot")
    value: float = Field(description="how strongly it fires at most")


class Instance(_Strict):
    """One mask."""

    slot: int
    score: float = Field(ge=0, le=1, description="how confident the model is")
    box: tuple[int, int, int, int] = Field(description="left, top, right, bottom in pixels")
    segmentation: dict[str, Any] = Field(description='COCO run lengths, {"size": [height, width], "counts": text}')
    polygons: list[list[list[tuple[int, int]]]] | None = Field(
        default=None, description="a polygon per connected part: outer ring, then holes; (x, y) are corners of pixels"
    )
    concepts: list[Concept] = Field(description="heaviest first")


class Nearest(_Strict):
    """The slot that came nearest to being an instance."""

    slot: int
    score: float
    concepts: list[Concept]


class Answer(_Strict):
    """The answer to one question."""

    instruction: str
    text: str = Field(description="the response as it was written")
    reasoning: str = Field(description="what stands in its think tags")
    verdict: str = Field(description='such as "2 instances" or "no target"')
    no_target: bool = Field(description="the model looked and was confident of nothing")
    size: tuple[int, int] = Field(description="height and width of the image, upright")
    instances: list[Instance] = Field(description="most confident first")
    most_confident: Nearest | None = Field(description="where there are no instances")
    unknown_words: list[str] = Field(
        description="those of the instruction that the small model never learned; its answer to them is a guess"
    )


class ErrorContent(_Strict):
    """What was wrong."""

    status: int
    message: str
    field: str | None = Field(description="of the request")
    given: str = Field(description="what was given")
    needed: str = Field(description="what is needed")
    remedy: str = Field(description="what to do")


class Error(_Strict):
    """An error."""

    error: ErrorContent


def _fields(image: dict[str, Any]) -> dict[str, Any]:
    """The request's schema; forms and JSON differ in the image alone."""
    steering = {
        "concept_scale": 'factors on concepts, such as {"red": 0}; 0 switches one off',
        "concept_add": 'weights that every slot gets on top, such as {"blue": 0.5}',
        "concept_replace": 'concepts that take over others\' weights, such as {"red": "blue"}',
    }
    properties: dict[str, Any] = {
        "image": image,
        "instruction": {"type": "string", "description": "what to segment"},
        "threshold": {
            "type": "number",
            "minimum": 0,
            "maximum": 1,
            "default": 0.5,
            "description": "confidence from which a slot is an instance",
        },
        "polygons": {"type": "boolean", "default": True, "description": "whether to send outlines too"},
        "stream": {"type": "boolean", "default": False, "description": "send the reasoning as it is written"},
        **{name: {"type": "object", "description": text} for name, text in steering.items()},
    }
    return {"type": "object", "required": ["image", "instruction"], "properties": properties}


REQUEST_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": _fields({"type": "string", "description": "the file's bytes as base64 text, or a data: URL"})
        },
        "multipart/form-data": {
            "schema": _fields({"type": "string", "format": "binary", "description": "the file"}),
        },
    },
}
REFUSALS = {
    408: "the request took too long to arrive",
    413: "the image has too many bytes or pixels, or the instruction too many characters",
    415: "neither JSON nor a form",
    422: "a field is missing, unknown or wrong",
    429: "too many questions wait; Retry-After says when to ask again",
    500: "the server failed",
    503: "no turn within the patience, or the server is ending",
}


ABOUT = (
    "An image and an instruction in; the reasoning, masks and the concepts behind them out. Images come as bytes; "
    "nothing is fetched, and nothing of a request is kept."
)


# -- HTTP --------------------------------------------------------------------------------------------------------------


def refused(error: BaseException) -> Response:
    """The answer that says why there is none.

    Args:
        error: a Refusal, or what went wrong.

    Returns:
        JSON with the error's status.
    """
    if isinstance(error, torch.OutOfMemoryError):
        error = Refusal(503, "image", "the accelerator has no memory left for this image", "", "send a smaller one")
    if not isinstance(error, Refusal):
        logger.error("a question failed", exc_info=error)
        error = Refusal(500, None, "the server failed at this question", "", "its log says why; tell who runs it")
    headers = {"Retry-After": "5"} if error.status in (429, 503) else {}
    said = json.dumps(error.as_json())  # as ASCII: what was sent may hold halves of characters
    return Response(said, error.status, headers, media_type="application/json")


async def read_request(request: Request, settings: Settings) -> dict[str, Any]:
    """The fields of a request.

    Args:
        request: JSON, or a form with a file.
        settings: its limits and patience.

    Returns:
        {field: value}, not yet checked.

    Raises:
        Refusal: too many bytes, too slow, or neither JSON nor a form.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in REQUEST_BODY["content"]:  # type: ignore[operator]
        raise Refusal(
            415,
            None,
            f"the content type is {kind[:40]!r}",
            "it must be application/json or multipart/form-data",
            "send one of these",
        )
    try:
        async with asyncio.timeout(settings.patience):
            body = await _read_body(request, settings.limits)
    except TimeoutError as error:
        raise Refusal(
            408,
            None,
            f"the request was not whole after {settings.patience:g} seconds",
            "",
            "send a smaller image",
        ) from error
    if kind == "multipart/form-data":
        return await _read_form(request, body)
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:120]
        raise Refusal(
            422, None, f"the request is no JSON ({reason})", "it must be an object", "send it whole"
        ) from error
    return flattened(fields)


async def _read_body(request: Request, limits: Limits) -> bytes:
    limit = 4 * limits.bytes // 3 + 100_000  # base64, and the other fields
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > 8 * limit:  # up to here it is read to its end, because many clients only then read what is wrong
            break
    if size > limit:
        parts.clear()
        raise Refusal(
            413,
            "image",
            f"the request has more than {limit:,} bytes",
            f"an image may have {limits.bytes:,}",
            "make it smaller, or save it as JPEG",
        )
    return b"".join(parts)


async def _read_form(request: Request, body: bytes) -> dict[str, Any]:
    """The fields of a form: the image's bytes, and the others as the JSON that their text is."""

    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        form = await Request(request.scope, replay).form(max_files=1, max_fields=20, max_part_size=len(body) + 1)
    except Exception as error:
        detail = str(getattr(error, "detail", error))[:200].rstrip(".")
        raise Refusal(422, None, f"the form cannot be read ({detail})", "", "send one file and its fields") from error
    fields: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            if name in fields:
                raise Refusal(422, name[:40], f"{name[:40]} is given twice", "a field has one value", "leave one out")
            if not isinstance(value, str):
                fields[name] = await value.read()
            elif name in ("threshold", "polygons", "stream", *STEERING):
                try:
                    fields[name] = json.loads(value)
                except (ValueError, RecursionError):
                    fields[name] = value  # it is refused for what it is
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields


def make_app(model: SegCompassModel, processor: SegCompassProcessor, settings: Settings, name: str = "") -> FastAPI:
    """The application, which answers from its start to its end.

    Args:
        model: the model.
        processor: its processor.
        settings: limits, batch size and patience.
        name: of the model, for /health.

    Returns:
        The ASGI application; its worker is `app.state.worker`.
    """
    worker = Worker(model, processor, settings.batch_size, settings.max_waiting)

    @asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await run_in_threadpool(worker.stop)

    app = FastAPI(
        title="SegCompass", version=__version__, docs_url=None, redoc_url=None, lifespan=living, description=ABOUT
    )
    app.state.worker = worker

    @app.exception_handler(HTTPException)
    async def unknown_address(request: Request, error: HTTPException) -> Response:
        known = ", ".join(sorted(app.openapi()["paths"]))
        return refused(
            Refusal(
                error.status_code,
                None,
                f"{request.method} {request.url.path[:80]}: {error.detail}",
                f"the addresses are {known}",
                "see /docs",
            )
        )

    @app.exception_handler(Refusal)
    async def refusal(request: Request, error: Refusal) -> Response:
        return refused(error)

    @app.post(
        "/segment",
        summary="Segment what an instruction means in an image.",
        response_model=Answer,
        responses={status: {"model": Error, "description": text} for status, text in REFUSALS.items()},
        openapi_extra={"requestBody": REQUEST_BODY},
    )
    async def segment(request: Request) -> Response:
        ticket = Ticket(asyncio.get_running_loop())
        worker.enter(ticket)
        handed_on = False
        try:
            fields = await read_request(request, settings)
            stream = fields.pop("stream", False)
            if not isinstance(stream, bool):
                raise Refusal(422, "stream", "stream is neither true nor false", "it must be one of them", "choose one")
            question = await run_in_threadpool(read_question, fields, model, settings.limits)
            question.has_left = ticket.left.is_set
            if stream:
                question.on_text = ticket.tell_text
            worker.wait(ticket, question)
            news = follow(request, worker, ticket, settings.patience)
            if stream:
                handed_on = True
                return StreamingResponse(as_events(news, worker, ticket), media_type="text/event-stream", headers=LIVE)
            async for kind, content in news:
                if kind == "answer":
                    return Response(content, media_type="application/json")
                if kind == "error":
                    return refused(content)
            return Response(status_code=499)  # the visitor has left
        finally:
            if not handed_on:
                worker.leave(ticket)

    @app.get("/health", summary="Whether questions are answered, how many wait, and the limits.")
    async def health() -> Response:
        alive = worker.is_alive
        content = {"status": "ok" if alive else "ending", "model": name, "version": __version__, **worker.state()}
        content |= {"batch_size": settings.batch_size, "max_waiting": settings.max_waiting}
        return JSONResponse({**content, "limits": asdict(settings.limits)}, 200 if alive else 503)

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(api_page(app.openapi()))

    return app


LIVE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Headers under which proxies pass a stream on as it comes."""


async def follow(request: Request, worker: Worker, ticket: Ticket, patience: float) -> AsyncIterator[tuple[str, Any]]:
    """A ticket's news until its answer or error; it ends without one where the visitor leaves.

    Args:
        request: the visitor's, whose body has been read.
        worker: where the ticket waits.
        ticket: the visitor's.
        patience: seconds to wait for its turn.

    Yields:
        As `Ticket`'s news; also ("still here", how many wait before it) every `HEARTBEAT` seconds without others.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(gone())
    coming: asyncio.Future = asyncio.ensure_future(ticket.news.get())
    deadline: float | None = time.monotonic() + patience
    try:
        while True:
            rest = HEARTBEAT if deadline is None else min(HEARTBEAT, max(0.0, deadline - time.monotonic()))
            await asyncio.wait({leaving, coming}, timeout=rest, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                return
            if coming.done():
                kind, content = coming.result()
                if kind == "begun":
                    deadline = None
                yield kind, content
                if kind in ("answer", "error"):
                    return
                coming = asyncio.ensure_future(ticket.news.get())
            elif deadline is not None and time.monotonic() >= deadline:
                yield (
                    "error",
                    Refusal(
                        503, None, f"no turn within {patience:g} seconds", "", "so many are asking: ask again later"
                    ),
                )
                return
            else:
                yield "still here", worker.before(ticket)
    finally:
        leaving.cancel()
        coming.cancel()


async def as_events(news: AsyncIterator[tuple[str, Any]], worker: Worker, ticket: Ticket) -> AsyncIterator[bytes]:
    """Server-sent events of a ticket's news.

    Args:
        news: of `follow`.
        worker: where the ticket has its place, which is freed at the end.
        ticket: the visitor's.

    Yields:
        "waiting" {"before"}, "begun" {}, "text" {"text"}, and at the end "answer" or "error", as without a stream.
    """
    try:
        yield _event("waiting", {"before": worker.before(ticket)})
        async for kind, content in news:
            if kind == "answer":
                yield b"event: answer\ndata: " + content + b"\n\n"
            elif kind == "error":
                yield b"event: error\ndata: " + bytes(refused(content).body) + b"\n\n"
            elif kind == "text":
                yield _event("text", {"text": content})
            elif kind == "begun":
                yield _event("begun", {})
            else:
                yield _event("waiting", {"before": content})
    finally:
        worker.leave(ticket)


def _event(name: str, content: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(content)}\n\n".encode()


# -- the server --------------------------------------------------------------------------------------------------------


def serve(model: str, settings: Settings, started: Callable[[str], None]) -> None:
    """Serve until the process is told to end; what was begun is then finished.

    Args:
        model: SegCompass folder or Hub id.
        settings: where and how.
        started: is told the address.

    Raises:
        ValueError: no such model.
        OSError: the address cannot be had.
    """
    try:
        listening = socket.create_server(
            (settings.host, settings.port), family=socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        )
    except (OSError, OverflowError) as error:
        raise OSError(
            f"port {settings.port} of {settings.host} cannot be had ({error}); choose another --port or --host."
        ) from error
    with listening:
        loaded, processor = load(model)
        processor.check_fits(loaded.config)
        loaded.eval()
        labels = loaded.concept_labels  # a damaged dictionary is refused now, not at the first question
        name = Path(model).name
        app = make_app(loaded, processor, settings, name)
        config = uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=FAREWELL, server_header=False, access_log=False
        )
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        named = f"{len(set(labels.values()))} named concepts" if labels else "no named concepts"
        started(f"serving {name} ({named}) at http://{host}:{listening.getsockname()[1]}; /docs has the API")
        uvicorn.Server(config).run(sockets=[listening])
