"""`segcompass serve` over real HTTP: the shipped model in a process of its own, and a tiny one whose pace a test sets.

Needs the extra `serve` and httpx (`pip install -e ".[serve]" httpx`), and is skipped without.
"""

import base64
import contextlib
import gc
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

for needed in ("fastapi", "uvicorn", "python_multipart", "httpx"):
    pytest.importorskip(needed, reason=f'{needed} is missing: pip install -e ".[serve]" httpx')

import httpx  # noqa: E402
import uvicorn  # noqa: E402

from segcompass.commands import serve as command  # noqa: E402
from segcompass.loaders import load_scenes  # noqa: E402
from segcompass.loading import load  # noqa: E402
from segcompass.modeling_segcompass.answering import Limits  # noqa: E402
from segcompass.segmentation import describe  # noqa: E402
from segcompass.serve import Answer, Error, Settings, make_app, serve  # noqa: E402
from segcompass.shipped import MODEL  # noqa: E402
from tests.support.scripted import Script, lively_segcompass, noise_images  # noqa: E402

TEXT = "<think>left of it</think><REF_POS><REF_POS><REF_POS>"
JSON = {"Content-Type": "application/json"}
LIMITS = {"--max-bytes": 150_000, "--max-pixels": 100_000, "--max-characters": 200}


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def ask(client, image, instruction, **fields):
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    return client.post("/segment", files={"image": ("i.png", image)}, data={"instruction": instruction, **form})


def events(client, image, instruction, until=None):
    """The events of a stream as (name, data); up to the first of a name, after which the client leaves."""
    form = {"instruction": instruction, "stream": "true"}
    got = []
    with client.stream("POST", "/segment", files={"image": ("i.png", image)}, data=form) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("event: "):
                got.append((line.removeprefix("event: "), None))
            elif line.startswith("data: "):
                got[-1] = (got[-1][0], json.loads(line.removeprefix("data: ")))
                if got[-1][0] == until:
                    break
    return got


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


# -- the shipped model in a process of its own -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    """Ten scenes with questions, as PNG files."""
    return [(png(row["image"]), row["instruction"]) for row in load_scenes("test", seed=100, num_samples=10)]


@pytest.fixture(scope="module")
def expected(rows):
    """What `segment` gives for each of them, by itself."""
    model, processor = load(MODEL, "cpu")
    results = []
    for file, instruction in rows:
        inputs = processor(images=file, text=instruction)
        outputs = model.segment(**inputs)
        instances = processor.post_process_instance_segmentation(outputs, target_sizes=inputs["original_sizes"])[0]
        results.append(describe(instruction, outputs, processor, instances))
    return results


@pytest.fixture(scope="module")
def server():
    options = [str(word) for option in LIMITS.items() for word in option]
    process = subprocess.Popen(
        [sys.executable, "-m", "segcompass", "serve", "--port", "0", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert line.startswith("serving mini (443 named concepts) at http://127.0.0.1:"), line + process.stderr.read()
    process.address = line.split(" at ")[1].split(";")[0]
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.address, timeout=300) as client:
        yield client


def same(answer, result):
    """Text and masks are the same bits; scores agree closely, since a batch rounds the last bits otherwise."""
    Answer.model_validate(answer)
    assert (answer["instruction"], answer["text"]) == (result["instruction"], result["text"])
    assert answer["no_target"] == result["no_target"] and answer["text"].startswith(f"<think>{answer['reasoning']}</")
    ours = {instance["slot"]: instance for instance in answer["instances"]}
    theirs = {instance["slot"]: instance for instance in result["instances"]}
    assert ours.keys() == theirs.keys()
    for slot, instance in theirs.items():
        assert ours[slot]["segmentation"] == instance["segmentation"] and ours[slot]["box"] == instance["box"]
        assert ours[slot]["score"] == pytest.approx(instance["score"], abs=1e-4)
        listed = [concept["index"] for concept in result["concepts"] if concept["slot"] == slot]
        assert {concept["index"] for concept in ours[slot]["concepts"]} == set(listed)
        assert ours[slot]["concepts"][0]["label"]


def test_forty_requests_of_eight_visitors_get_what_segment_gives(server, rows, expected):
    def visit(number):
        with httpx.Client(base_url=server.address, timeout=300) as client:
            answers = []
            for question in range(number, number + 5):
                image, instruction = rows[question % 10]
                answers.append((question % 10, ask(client, image, instruction)))
            return answers

    with ThreadPoolExecutor(8) as visitors:
        answers = [answer for each in visitors.map(visit, range(8)) for answer in each]
    assert len(answers) == 40
    for question, response in answers:
        assert response.status_code == 200, response.text
        same(response.json(), expected[question])
    assert httpx.get(f"{server.address}/health").json()["inside"] == 0


def test_json_and_a_stream_give_the_same_answer(client, rows):
    image, instruction = rows[0]
    text = base64.b64encode(image).decode()
    by_form = ask(client, image, instruction).json()
    for body in (
        {"image": text, "instruction": instruction},
        {"image": f"data:image/png;base64,{text}", "instruction": instruction, "threshold": 0.5},
        {"inputs": {"image": text, "instruction": instruction}, "parameters": {"polygons": True}},
    ):
        assert client.post("/segment", json=body).json() == by_form
    streamed = events(client, image, instruction)
    names = [name for name, _ in streamed]
    assert names[:2] == ["waiting", "begun"] and names[-1] == "answer" and set(names[2:-1]) == {"text"}
    assert len(names) > 20 and "".join(data["text"] for name, data in streamed if name == "text") == by_form["text"]
    assert streamed[-1][1] == by_form
    short = ask(client, image, instruction, polygons=False, threshold=1).json()
    assert short["no_target"] and short["instances"] == [] and short["most_confident"]["concepts"][0]["label"]


def test_words_that_the_small_model_never_learned_are_named(client, rows):
    image, _ = rows[0]
    assert ask(client, image, "the dog and the star").json()["unknown_words"] == ["dog"]
    assert ask(client, image, "the star").json()["unknown_words"] == []


def test_concepts_are_switched_off_and_replaced_by_name(client):
    scene, instruction = (MODEL.parents[1] / "scene.png").read_bytes(), "everything to the left of the blue star"
    model, processor = load(MODEL, "cpu")
    inputs = processor(images=scene, text=instruction)
    asked = {"concept_scale": {"purple": 0}, "concept_replace": {"purple": "blue"}}
    answers = {name: ask(client, scene, instruction, **{name: value}).json() for name, value in asked.items()}
    for name, value in asked.items():
        outputs = model.segment(**inputs, **{name: value})
        found = processor.post_process_instance_segmentation(outputs, target_sizes=inputs["original_sizes"])[0]
        same(answers[name], describe(instruction, outputs, processor, found))
    plain = ask(client, scene, instruction).json()
    assert plain["instances"] and answers["concept_scale"]["instances"] != plain["instances"]
    index = next(str(index) for index, label in model.concept_labels.items() if label == "purple")
    assert ask(client, scene, instruction, concept_scale={index: 1.0}).json() == plain


def test_bad_requests_are_told_what_was_given_and_what_to_do(client, rows):
    image, text = rows[0][0], base64.b64encode(rows[0][0]).decode()
    large, loud = png(Image.new("RGB", (400, 400))), np.random.default_rng(0).integers(0, 255, (300, 300, 3))
    heavy = png(Image.fromarray(loud.astype(np.uint8)))
    whole = {"image": image, "instruction": "it"}
    forms = [
        (422, "instruction", "instruction is missing", {"image": image}),
        (422, "instruction", "instruction is '  '", {**whole, "instruction": "  "}),
        (413, "instruction", "has 201 characters; the limit is 200", {**whole, "instruction": "x" * 201}),
        (413, "image", "400 x 400 pixels; the limit is 100,000 pixels", {**whole, "image": large}),
        (413, "image", "the limit is 150,000", {**whole, "image": heavy}),
        (413, "image", "the request has more than 300,000 bytes", {**whole, "image": heavy * 2}),
        (422, "image", "cannot be read", {**whole, "image": image[:200]}),
        (422, "image", "cannot be read", {**whole, "image": b"%!PS-Adobe-3.0 EPSF-3.0"}),
        (422, "threshold", "threshold is nan", {**whole, "threshold": "NaN"}),
        (422, "threshold", "threshold is 2", {**whole, "threshold": "2"}),
        (422, "stream", "stream is neither", {**whole, "stream": "maybe"}),
        (422, "url", "there is no field 'url'", {**whole, "url": "x"}),
        (422, None, "'<image>', which is reserved", {**whole, "instruction": "the <image>"}),
        (422, "concept_scale", "no concept is called", {**whole, "concept_scale": '{"x":0}'}),
        (422, "concept_scale", "factor of concept red is -1", {**whole, "concept_scale": '{"red":-1}'}),
        (422, "concept_add", "concept_add is '7'", {**whole, "concept_add": '"7"'}),
    ]
    responses = []
    for *rest, fields in forms:
        files = {name: (name, value) for name, value in fields.items() if isinstance(value, bytes)}
        texts = {name: value for name, value in fields.items() if isinstance(value, str)}
        responses.append((*rest, client.post("/segment", files=files, data=texts)))
    whole = {"image": text, "instruction": "it"}
    bodies = [
        (422, "image", "image is missing", {"instruction": "it"}),
        (422, "image", "'/etc/passwd', an address or a path", {**whole, "image": "/etc/passwd"}),
        (422, "image", "an address or a path; nothing is fetched", {**whole, "image": "http://127.0.0.1:1/x.png"}),
        (422, "image", "an address or a path", {**whole, "image": "file:///etc/passwd"}),
        (422, "image", "no base64 text", {**whole, "image": text[:-3]}),
        (422, "image", "it must be a file's bytes as base64 text", {**whole, "image": [1, 2]}),
        (422, "polygons", "polygons is 1", {**whole, "polygons": 1}),
        (422, None, "the request is of type list", [whole]),
        (422, "image", "image is given twice", {"inputs": whole, "parameters": whole}),
        (422, "model", "there is no field 'model'", {"inputs": whole, "model": "x"}),
        (422, "instruction", "holds half a character", {**whole, "instruction": "it \ud800"}),
        (422, "\ud800", "there is no field '\\ud800'", {**whole, "\ud800": 1}),
    ]
    responses += [(*rest, client.post("/segment", content=json.dumps(body), headers=JSON)) for *rest, body in bodies]
    raw = [
        (422, "no JSON", b"{", "application/json"),
        (422, "nested too deeply", b"[" * 100_000, "application/json"),
        (415, "content type is 'text/plain'", b"", "text/plain"),
        (422, "the form cannot be read", b"x", "multipart/form-data"),
    ]
    for status, said, content, kind in raw:
        response = client.post("/segment", content=content, headers={"content-type": kind})
        responses.append((status, None, said, response))
    responses.append((404, None, "the addresses are /health, /segment", client.get("/nowhere")))
    responses.append((405, None, "GET /segment", client.get("/segment")))
    for status, field, said, response in responses:
        error = response.json()["error"]
        Error.model_validate(response.json())
        assert (response.status_code, error["status"], error["field"]) == (status, status, field), response.text
        assert said in error["message"], error["message"]
    assert client.get("/health").json()["inside"] == 0


def test_health_and_the_description_name_limits_and_fields(client):
    health = client.get("/health").json()
    assert health["status"] == "ok" and health["model"] == "mini"
    assert health["limits"] == {"bytes": 150_000, "pixels": 100_000, "characters": 200, "concepts": 100}
    description = client.get("/openapi.json").json()
    operation = description["paths"]["/segment"]["post"]
    assert set(operation["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert {"200", "408", "413", "415", "422", "429", "500", "503"} <= set(operation["responses"])
    page = client.get("/docs").text
    for schema in ("Answer", "Instance", "Concept", "ErrorContent"):
        for field in description["components"]["schemas"][schema]["properties"]:
            assert f"<code>{field}</code>" in page
    assert "https://" not in page  # it needs nothing but itself


def test_a_visitor_who_leaves_stops_its_answer(client, rows, expected):
    before = client.get("/health").json()["answered"]
    events(client, *rows[1], until="text")
    wait_until(lambda: client.get("/health").json()["inside"] == 0, 5)
    assert client.get("/health").json()["answered"] == before
    same(ask(client, *rows[2]).json(), expected[2])


def test_told_to_end_it_finishes_what_was_begun(server, rows, expected):
    with httpx.Client(base_url=server.address, timeout=300) as client, ThreadPoolExecutor(1) as visitor:
        answer = visitor.submit(ask, client, *rows[3])
        wait_until(lambda: httpx.get(f"{server.address}/health").json()["inside"] == 1)
        server.send_signal(signal.SIGTERM)
        same(answer.result().json(), expected[3])
    out, err = server.communicate(timeout=60)
    assert server.returncode in (0, -signal.SIGTERM) and "Traceback" not in err, err
    assert rows[3][1] not in out + err  # nothing of what was asked is written down


# -- a tiny model whose pace the test sets -----------------------------------------------------------------------------


class Gate:
    """Lets a model write one token each time that it is opened."""

    def __init__(self):
        self.opened, self.tokens = threading.Semaphore(0), 0

    def __call__(self, input_ids, scores, **kwargs):
        assert self.opened.acquire(timeout=60)
        self.tokens += 1
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def open(self, times=1000):
        self.opened.release(times)


@pytest.fixture
def slow():
    """A server in a thread of this process: one question at a time, one that waits."""
    model, processor = lively_segcompass("llava")
    reason, gate = model.reason, Gate()

    def scripted(**inputs):
        if gate.fails:
            raise RuntimeError("the machine is on fire")
        criteria = [*inputs.pop("stopping_criteria", []), gate]
        script = Script(processor.tokenizer, [TEXT] * len(inputs["input_ids"]))
        return reason(**inputs, logits_processor=[script], stopping_criteria=criteria, max_new_tokens=60)

    gate.fails, model.reason = False, scripted
    app = make_app(model, processor, Settings(batch_size=1, max_waiting=1, patience=1.0, limits=Limits()), "tiny")
    listening = socket.create_server(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listening]})
    thread.start()
    gate.worker = app.state.worker
    with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=60) as client:
        yield client, gate
    gate.open()
    uvicorn_server.should_exit = True
    thread.join()
    listening.close()
    assert not gate.worker._thread.is_alive()


def test_one_too_many_is_refused_and_who_waits_too_long_is_told(slow):
    client, gate = slow
    image = png(noise_images()[1])
    with ThreadPoolExecutor(2) as visitors:
        first = visitors.submit(ask, client, image, "it")
        wait_until(
            lambda: client.get("/health").json() | {"waiting": 0} == client.get("/health").json() | {"inside": 1}
        )
        second = visitors.submit(ask, client, image, "it")
        wait_until(lambda: client.get("/health").json()["waiting"] == 1)
        third = ask(client, image, "it")
        assert third.status_code == 429 and "1 questions are being answered and 1 wait" in third.text
        assert third.headers["retry-after"]
        late = second.result()
        assert late.status_code == 503 and "no turn within 1 seconds" in late.text
        gate.open()
        assert first.result().status_code == 200 and first.result().json()["text"] == TEXT


def test_a_failure_is_told_and_the_next_is_served(slow):
    client, gate = slow
    gate.fails = True
    failed = ask(client, png(noise_images()[1]), "it")
    assert failed.status_code == 500 and "on fire" not in failed.text and "its log says why" in failed.text
    gate.fails = False
    gate.open()
    assert ask(client, png(noise_images()[1]), "it", threshold=0).json()["verdict"] == "3 instances"


def test_the_model_stops_for_who_has_left_and_nothing_of_it_is_kept(slow):
    client, gate = slow
    kept = []
    wait = gate.worker.wait
    gate.worker.wait = lambda ticket, question: kept.append(weakref.ref(question)) or wait(ticket, question)
    gate.open(3)
    with contextlib.suppress(httpx.ReadTimeout):
        client.post(
            "/segment", files={"image": png(noise_images()[1])}, data={"instruction": "it"}, timeout=httpx.Timeout(1.5)
        )
    wait_until(lambda: client.get("/health").json()["inside"] == 0)
    gate.open()
    wait_until(lambda: gc.collect() and kept[0]() is None or kept[0]() is None)
    assert gate.tokens <= 5 and gate.worker.answered == 0


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 cannot be had .* choose another --port"):
            serve("nowhere", Settings(port=port), print)
    with pytest.raises(SystemExit):
        command.parse(["--port", "70000"])


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r'uvicorn is missing, .*pip install "segcompass\[serve\]"'):
        command.main([])
