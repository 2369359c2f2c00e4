"""Many visitors of the Space and of `segcompass serve`, many callers of `segment`: each its own answer, nothing kept?

    python benchmarks/reliability/load.py [--quick]

The Space's logic runs in this process, its requests come from threads on this machine. Most are answered by a stub of a
few tokens, so that the line, the answers and their ends are what is tried; some by a real model, whose answers are
compared with single ones. Parts: requests of concurrent clients; visitors who leave in the middle, each followed by one
who must be served right; sessions that come, ask and go, with the memory that is left. The same over HTTP of
`segcompass serve` (which needs the extra `serve`; without it those keys are 0): visitors leave before their request is
whole, while they wait, and while their answer is written. Keys of RESULT: requests, requests_wrong, refused_full,
model_requests, model_wrong, left, served_after_left, sessions, session_bytes, threads_left, segment_calls,
segment_wrong, and of the server serve_requests, serve_wrong, serve_model_requests, serve_model_wrong, serve_left,
serve_after_left, serve_places_kept, serve_bytes (kept of a request), serve_threads_left.
"""

import gc
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402

from benchmarks.reliability import served  # noqa: E402
from benchmarks.reliability.children import options, say  # noqa: E402
from tests.support.scripted import INSTRUCTIONS, Script, lively_segcompass, noise_images  # noqa: E402
from tests.support.space import demo_of, space_modules  # noqa: E402

ANSWER = "<think>left of it</think><REF_POS><REF_POS><REF_POS>"
FULL = dict(requests=10_000, model_requests=200, left=200, sessions=1000, segment_calls=60, clients=8)
FULL |= dict(serve_requests=5000, serve_model_requests=200, serve_left=200, serve_kept=1000)
QUICK = dict(requests=60, model_requests=4, left=4, sessions=20, segment_calls=6, clients=4)
QUICK |= dict(serve_requests=24, serve_model_requests=4, serve_left=6, serve_kept=8)


def make_demo(space: Any, stub: bool) -> Any:
    """A demo of a tiny model.

    Args:
        space: the Space's modules.
        stub: whether the model's forward pass is left out: four tokens come from nowhere, and masks are decoded from
            the states of one answer that was really given.

    Returns:
        The demo; `demo.passes` counts the tokens.
    """
    demo = demo_of(space, *lively_segcompass("llava", num_slots=3))
    demo.passes, demo.refusals = Counter(), space.asking.gr.Error
    reason = demo.model.reason
    tokens = demo.processor.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]

    def scripted(**inputs):
        script = Script(demo.processor.tokenizer, [ANSWER])
        return reason(**inputs, logits_processor=[script], max_new_tokens=60)

    kept: dict[tuple, Any] = {}

    def stubbed(streamer=None, stopping_criteria=(), **inputs):
        key = tuple(inputs["input_ids"].shape), float(inputs["pixel_values"].sum())
        if key not in kept:  # each image's own states, so that a mistaken answer is seen
            kept[key] = scripted(**inputs)
        streamer.put(inputs["input_ids"])
        for token in tokens:
            streamer.put(torch.tensor([token]))
            demo.passes[threading.get_ident()] += 1
            if any(stop(inputs["input_ids"], None).any() for stop in stopping_criteria):
                break
        streamer.end()
        return kept[key]

    demo.model.reason = stubbed if stub else scripted
    return demo


def ask(demo: Any, visitor: str, number: int, threshold: float = 0.0) -> Any:
    """One question of a visitor to its end, or the words of its refusal."""
    images = noise_images()
    request = SimpleNamespace(session_hash=visitor)
    try:
        place = number % len(images)
        return list(demo.ask(images[place], INSTRUCTIONS[place], threshold, request))[-1]
    except demo.refusals as error:
        return str(error)


def same(answer: Any, alone: Any) -> bool:
    """Whether two answers show the same."""
    if isinstance(answer, str) or answer.why is None:
        return False
    slots = list(zip(answer.why.slots, alone.why.slots, strict=False))
    return (
        answer.text == alone.text
        and answer.why.verdict == alone.why.verdict
        and len(answer.why.slots) == len(alone.why.slots)
        and all(one.number == other.number and np.array_equal(one.mask, other.mask) for one, other in slots)
        and all(str(one.concepts) == str(other.concepts) for one, other in slots)
    )


def concurrent(demo: Any, requests: int, clients: int, end: float) -> Counter:
    """Requests of several clients at a time, each compared with the answer to it alone."""
    alone = [ask(demo, "alone", number) for number in range(4)]

    def client(number: int) -> str:
        if time.monotonic() > end:
            return "late"
        answer = ask(demo, f"visitor {number % 50}", number)
        if isinstance(answer, str) and "waiting already" in answer:
            return "refused"
        return "right" if same(answer, alone[number % 4]) else "wrong"

    with ThreadPoolExecutor(clients) as pool:  # counted here alone: threads that add to one number lose some
        counts = Counter(pool.map(client, range(requests)))
    return counts + Counter(asked=counts["right"] + counts["wrong"] + counts["refused"])


def leave_and_ask(demo: Any, times: int, end: float) -> Counter:
    """A visitor leaves in the middle of an answer; the next must get its own, as if alone."""
    alone = [ask(demo, "alone", number) for number in range(4)]
    counts: Counter = Counter()
    images = noise_images()
    for number in range(times):
        if time.monotonic() > end:
            break
        place = number % 4
        leaving = demo.ask(images[place], INSTRUCTIONS[place], 0.0, SimpleNamespace(session_hash="leaving"))
        next(leaving)
        for _ in range(number % 3):
            next(leaving)
        if number % 2:
            leaving.close()
        else:  # the page is closed while the question goes on
            demo.leave(SimpleNamespace(session_hash="leaving"))
        counts["left"] += 1
        counts["served"] += same(ask(demo, "next", number + 1), alone[(number + 1) % 4])
        leaving.close()
    return counts


def sessions(demo: Any, count: int, end: float) -> tuple[int, float]:
    """Visitors who come, ask, look and go: (how many, bytes that each leaves behind)."""

    def one(number: int) -> None:
        visitor = f"session {number}"
        answer = ask(demo, visitor, number)
        assert not isinstance(answer, str), answer
        request = SimpleNamespace(session_hash=visitor)
        demo.foretell(answer.question, 0, 0.0, request)
        demo.change(answer.question, 0, 0.0, 0.0, request)
        demo.restore(answer.question, 0.0, request)
        demo.leave(request)

    process = psutil.Process()
    for number in range(min(40, count)):  # what the first ones make grows once
        one(number)
    gc.collect()
    before, done = process.memory_info().rss, 0
    for number in range(count):
        if time.monotonic() > end:
            break
        one(number)
        done += 1
    gc.collect()
    assert len(demo.answers) == 0 or all("session" not in name for name in demo.answers._kept)
    return done, max(0.0, (process.memory_info().rss - before) / max(done, 1))


def segment_calls(calls: int, clients: int, end: float) -> Counter:
    """`segment` called from several threads, compared with single calls."""
    model, processor = lively_segcompass("llava", num_slots=3)
    images = noise_images()

    def call(place: int) -> tuple:
        script = Script(processor.tokenizer, [ANSWER])
        inputs = processor(images=images[place], text=INSTRUCTIONS[place])
        outputs = model.segment(**inputs, logits_processor=[script], max_new_tokens=60)
        return outputs.sequences.tolist(), outputs.pred_masks

    alone = [call(place) for place in range(4)]

    def one(number: int) -> str:
        if time.monotonic() > end:
            return "late"
        sequences, pred_masks = call(number % 4)
        wanted = alone[number % 4]
        return "right" if sequences == wanted[0] and torch.equal(pred_masks, wanted[1]) else "wrong"

    with ThreadPoolExecutor(clients) as pool:
        counts = Counter(pool.map(one, range(calls)))
    return counts + Counter(calls=counts["right"] + counts["wrong"])


def space_and_segment(size: dict[str, int], end: float) -> dict[str, int]:
    """What RESULT says of the Space and of `segment`."""
    space = space_modules()
    threads = threading.active_count()
    stubbed, real = make_demo(space, stub=True), make_demo(space, stub=False)
    asked = concurrent(stubbed, size["requests"], size["clients"], end)
    print(f"{asked['asked']} requests of {size['clients']} clients", flush=True)
    modelled = concurrent(real, size["model_requests"], size["clients"], end)
    print(f"{modelled['asked']} requests to the model", flush=True)
    left = leave_and_ask(real, size["left"], end)
    print(f"{left['left']} visitors left", flush=True)
    stubbed.passes.clear()
    done, kept = sessions(stubbed, size["sessions"], end)
    called = segment_calls(size["segment_calls"], size["clients"], end)
    return {
        "requests": asked["asked"],
        "requests_wrong": asked["wrong"],
        "refused_full": asked["refused"] + modelled["refused"],
        "model_requests": modelled["asked"],
        "model_wrong": modelled["wrong"],
        "left": left["left"],
        "served_after_left": left["served"],
        "sessions": done,
        "session_bytes": round(kept),
        "threads_left": threading.active_count() - threads,
        "segment_calls": called["calls"],
        "segment_wrong": called["wrong"],
    }


PARTS = {"space": space_and_segment, "serve": served.load}


def main(argv: list[str] | None = None) -> dict:
    """Run the harness and return what its RESULT says."""
    parts = {"nargs": "+", "choices": list(PARTS), "default": list(PARTS), "help": "some of the parts"}
    args = options(__doc__, argv, {"--parts": parts})
    torch.set_num_threads(1)
    size, found = QUICK if args.quick else FULL, {}
    for name in args.parts:
        found |= PARTS[name](size, args.end)
    return say(found)


if __name__ == "__main__":
    main()
