"""`segcompass serve` in this process, over HTTP of this machine, before a tiny model: what load.py and fuzz.py ask.

The requests are made with the standard library alone. Answers are compared with those of `answer_questions` to each
question by itself, without a server. Needs the extra `serve`; `SERVES` says whether it is there.
"""

import base64
import contextlib
import gc
import http.client
import importlib.util
import io
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import torch

from segcompass.modeling_segcompass.answering import answer_questions, read_question
from tests.support.scripted import INSTRUCTIONS, Script, lively_segcompass, noise_images

ANSWER = "<think>left of it</think><REF_POS><REF_POS><REF_POS>"
PATIENCE = 900.0
"""Seconds after which a request counts as never answered; a busy machine takes long."""
SERVES = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "python_multipart"))


def scripted_model(stub: bool) -> tuple[Any, Any]:
    """A tiny model that writes `ANSWER`, and its processor; a stub writes its tokens without a forward pass."""
    model, processor = lively_segcompass("llava", num_slots=3)
    reason = model.reason
    written = processor.tokenizer(ANSWER + "</s>", add_special_tokens=False, return_tensors="pt")["input_ids"]

    def scripted(**inputs):
        script = Script(processor.tokenizer, [ANSWER] * len(inputs["input_ids"]))
        return reason(**inputs, logits_processor=[script], max_new_tokens=60)

    kept: dict[tuple, Any] = {}

    def stubbed(stopping_criteria=(), **inputs):
        if len(inputs["input_ids"]) > 1:
            raise ValueError("the stub answers one question at a time")  # the server then asks each alone
        key = tuple(inputs["input_ids"][0].tolist()), float(inputs["pixel_values"].sum())
        if key not in kept:
            if len(kept) > 50:  # what is kept here would count as kept by the server
                kept.clear()
            kept[key] = scripted(**inputs)
        for length in range(1, written.shape[1] + 1):
            ids = torch.cat([inputs["input_ids"], written[:, :length]], 1)
            if any(stop(ids, None).any() for stop in stopping_criteria):
                break
        return kept[key]

    model.reason = stubbed if stub else scripted
    return model.eval(), processor


@contextlib.contextmanager
def serving(model: Any, processor: Any, **settings: Any) -> Iterator[tuple[int, Any]]:
    """A server of this process, on a free port of this machine.

    Args:
        model: as `served_model` makes it.
        processor: its processor.
        **settings: of segcompass.serve.Settings.

    Yields:
        The port, and the server's worker.
    """
    import uvicorn

    from segcompass.serve import Settings, make_app

    app = make_app(model, processor, Settings(**settings), "stub")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listening.getsockname()[1], app.state.worker
        finally:
            server.should_exit = True
            thread.join()


def question(number: int, **fields: Any) -> dict[str, Any]:
    """A request as JSON has it: one of four images, and an instruction that says its number."""
    place, content = number % 4, io.BytesIO()
    noise_images()[place].save(content, "PNG")
    image = base64.b64encode(content.getvalue()).decode()
    return {"image": image, "instruction": INSTRUCTIONS[place], "threshold": 0.0, **fields}


def post(port: int, body: bytes, kind: str = "application/json") -> tuple[int, bytes]:
    """(status, content) of a request to /segment."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("POST", "/segment", body, {"Content-Type": kind})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def alike(answer: Any, alone: Any) -> bool:
    """Whether two answers are the same: words and masks bit for bit, numbers to five digits (batches round them)."""
    if isinstance(alone, dict):
        return (
            isinstance(answer, dict)
            and answer.keys() == alone.keys()
            and all(alike(answer[k], alone[k]) for k in alone)
        )
    if isinstance(alone, (list, tuple)):
        return len(answer) == len(alone) and all(map(alike, answer, alone))
    return abs(answer - alone) <= 1e-5 * (1 + abs(alone)) if isinstance(alone, float) else answer == alone


def asked_alone(model: Any, processor: Any) -> list[dict[str, Any]]:
    """The answers to the four questions, each asked by itself and without a server."""
    answers = [answer_questions(model, processor, [read_question(question(place), model)])[0] for place in range(4)]
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return json.loads(json.dumps([{**answer, "unknown_words": []} for answer in answers]))  # no words are known of it


def concurrent(port: int, alone: list[dict], requests: int, clients: int, end: float) -> Counter:
    """Requests of several clients at a time, as JSON and as a stream, each compared with the answer to it alone."""

    def client(number: int) -> str:
        if time.monotonic() > end:
            return "late"
        streams = number % 3 == 0
        status, content = post(port, json.dumps(question(number, stream=streams)).encode())
        if streams and status == 200:
            content = content.split(b"event: answer\ndata: ")[-1]
        return "right" if status == 200 and alike(json.loads(content), alone[number % 4]) else "wrong"

    with ThreadPoolExecutor(clients) as pool:  # counted here alone: threads that add to one number lose some
        counts = Counter(pool.map(client, range(requests)))
    return Counter(asked=counts["right"] + counts["wrong"], wrong=counts["wrong"])


def leave_and_ask(port: int, worker: Any, alone: list[dict], times: int, end: float) -> Counter:
    """Visitors who leave: each must free its place, and the next must get its own answer."""
    counts: Counter = Counter()
    for number in range(times):
        if time.monotonic() > end:
            break
        body = json.dumps(question(number, stream=True)).encode()
        head = "POST /segment HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as visitor:
            way = number % 4
            visitor.sendall(head.encode() + (body[: len(body) // 2] if way == 0 else body))
            if way >= 2:  # until it waits, or until it reads the first words
                seen = b""
                while b"event: waiting" not in seen if way == 2 else b"event: text" not in seen:
                    seen += visitor.recv(4096)
        counts["left"] += 1
        status, content = post(port, json.dumps(question(number + 1)).encode())
        counts["served"] += status == 200 and alike(json.loads(content), alone[(number + 1) % 4])
    wait_until(lambda: not worker.state()["inside"])
    counts["kept"] = worker.state()["inside"]
    return counts


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a condition, or for so many seconds."""
    patience = time.monotonic() + seconds
    while not condition() and time.monotonic() < patience:
        time.sleep(0.02)


def measure(port: int, requests: int, end: float) -> float:
    """Bytes by which this process grows with each request."""

    def one(number: int) -> None:
        assert post(port, json.dumps(question(number)).encode())[0] == 200

    for number in range(min(200, requests)):  # what the first ones make grows once
        one(number)
    gc.collect()
    before, done = psutil.Process().memory_info().rss, 0
    while done < requests and time.monotonic() < end:
        one(done)
        done += 1
    gc.collect()
    return max(0.0, (psutil.Process().memory_info().rss - before) / max(done, 1))


def load(size: dict[str, int], end: float) -> dict[str, int]:
    """What load.py's RESULT says of the server; zeros, with the reason printed, without the extra `serve`."""
    if not SERVES:
        print('the server was not tried: pip install -e ".[serve]"', flush=True)
        return dict.fromkeys(("serve_requests", "serve_wrong"), 0)
    threads = threading.active_count()
    model, processor = scripted_model(stub=True)
    alone = asked_alone(*scripted_model(stub=False))
    with serving(model, processor, batch_size=4, patience=PATIENCE) as (port, worker):
        asked = concurrent(port, alone, size["serve_requests"], size["clients"], end)
        print(f"{asked['asked']} requests to the server", flush=True)
        left = leave_and_ask(port, worker, alone, size["serve_left"], end)
        kept = measure(port, size["serve_kept"], end)
    with serving(*scripted_model(stub=False), batch_size=4, patience=PATIENCE) as (port, _):
        modelled = concurrent(port, alone, size["serve_model_requests"], size["clients"], end)
    wait_until(lambda: threading.active_count() <= threads)  # idle ones end by themselves
    return {
        "serve_requests": asked["asked"],
        "serve_wrong": asked["wrong"],
        "serve_model_requests": modelled["asked"],
        "serve_model_wrong": modelled["wrong"],
        "serve_left": left["left"],
        "serve_after_left": left["served"],
        "serve_places_kept": left["kept"],
        "serve_bytes": round(kept),
        "serve_threads_left": threading.active_count() - threads,
    }
