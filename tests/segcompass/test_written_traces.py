"""Reasoning traces: from annotations, from a server that answers, hangs or breaks, and from an MLLM."""

import json
import pickle
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from segcompass import cli, trace_teachers
from segcompass.box_formats import possible_boxes
from segcompass.commands import train_sft, write_traces
from segcompass.loaders import load_rows
from segcompass.loaders.masks import encode_mask
from segcompass.loaders.mixing import HELD_OUT, mix_rows
from segcompass.loaders.rows import leave_images_encoded, reserved_token
from segcompass.loaders.surroundings import Thing
from segcompass.trace_questions import clean_trace, draw_targets, fault_of_boxes, fault_of_position, fault_of_trace
from segcompass.trace_teachers import BackboneTeacher, NoAnswer, ServerTeacher
from segcompass.trace_templates import PLACES, place, plural, write_trace
from tests.support.refer import ref, write_images, write_instances
from tests.support.tiny import tiny_segcompass

TRACE = "The image shows a box, and the words fit only the one that is at the left."


# -- from annotations --------------------------------------------------------------------------------------------------


def row(masks, **fields):
    return {"sample_id": "s", "instruction": "the left one", "height": 90, "width": 90, "masks": masks, **fields}


def test_a_trace_says_what_is_there_and_which_it_is():
    things = [Thing("dog", (0, 30, 20, 60), True), Thing("dog", (60, 60, 90, 90), False)]
    things.append(Thing("bench", (70, 30, 90, 50), False))
    texts = {write_trace(row([None]), things, seed) for seed in range(60)}
    assert len(texts) > 20  # several wordings
    for text in texts:
        assert "the left one" in text and "two dogs" in text and "leftmost dog" in text and "at the left" in text
        assert not re.search(r"\d", text) and reserved_token(text) is None
    assert any("left of the bench" in text for text in texts) and any("one bench" in text for text in texts)
    # a grounded read-out reads the last sentence alone
    assert all(
        '"the left one"' in last and "leftmost dog" in last for last in (text.rsplit(". ", 1)[-1] for text in texts)
    )
    for instruction in ("Which dog barks?", "the dog. The left one", "dog no.5", 'he said "stop"', "a b " * 7):
        for seed in range(9):
            last = write_trace(row([None], instruction=instruction), things, seed).rsplit(". ", 1)[-1]
            assert "leftmost dog" in last and "at the left" in last and instruction.strip(".?") not in last
    nothing = {write_trace(row([]), [Thing("dog", (0, 0, 9, 9), False)], seed) for seed in range(20)}
    assert len(nothing) > 3 and all("one dog" in text for text in nothing)
    several = write_trace(row([None] * 2), [Thing("dog", (0, 0, 9, 9), True), Thing("dog", (50, 0, 60, 9), True)])
    assert "all two dogs are meant: the tiny dog at the upper left, the tiny dog at the top." in several
    mixed = write_trace(row([None] * 2), [Thing("dog", (0, 0, 9, 9), True), Thing("cat", (50, 0, 60, 9), True)])
    assert "two things are meant: the tiny dog at the upper left, the tiny cat at the top" in mixed
    unnamed = write_trace(row([None]), [Thing(None, (60, 60, 90, 90), True)])
    assert "at the lower right" in unnamed and "None" not in unnamed


def test_the_same_sample_always_gets_the_same_trace():
    things = [Thing("dog", (0, 30, 20, 60), True)]
    assert write_trace(row([None]), things) == write_trace(row([None]), things)
    assert len({write_trace(row([None], sample_id=str(n)), things) for n in range(30)}) > 5


def test_plurals_and_places():
    words = ("person", "bus", "wine glass", "bench", "teddy bear", "dog", "knife", "sheep", "toy", "fairy")
    expected = ["people", "buses", "wine glasses", "benches", "teddy bears", "dogs", "knives", "sheep", "toys"]
    assert [plural(word) for word in words] == [*expected, "fairies"]
    boxes = [(30 * x, 30 * y, 30 * x + 30, 30 * y + 30) for y in range(3) for x in range(3)]
    assert [place(box, 90, 90) for box in boxes] == list(PLACES)
    assert place((-9, 80, 200, 300), 90, 90) == "lower right"


@pytest.fixture
def refer(tmp_path):
    """RefCOCO with two rows to train on and gRefCOCO with one, several and no targets."""
    write_images(tmp_path / "train2014")
    boxes = {10: (2, 3, 10, 9), 13: (20, 3, 30, 9), 11: (1, 1, 8, 6), 12: (12, 2, 20, 8), 15: (0, 0, 5, 24)}
    for name in ("refcoco", "grefcoco"):
        write_instances(tmp_path / name)
        path = tmp_path / name / "instances.json"
        content = json.loads(path.read_text())
        content["categories"] = [{"id": 1, "name": "dog"}]
        content["annotations"] = [each for each in content["annotations"] if each["id"] in boxes]
        for each in content["annotations"]:
            left, top, right, bottom = boxes[each["id"]]
            polygon = [left, top, right, top, right, bottom, left, bottom]
            each |= {"bbox": [left, top, right - left, bottom - top], "segmentation": [polygon], "iscrowd": 0}
        path.write_text(json.dumps(content))
    refs = [ref(1, 10, ["left dog", "dog"], "train"), ref(2, 11, ["that"], "train"), ref(3, 12, ["x"], "val")]
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs))
    refs = [ref(1, [10, 13], ["both dogs"], "train", 1), ref(2, [-1], ["a cat"], "train", 2)]
    refs.append(ref(3, [11], ["it"], "train", 2))
    (tmp_path / "grefcoco" / "grefs(unc).json").write_text(json.dumps(refs))
    return tmp_path


def write(dataset, output, *more):
    return write_traces.main([str(dataset), "--output", str(output), *map(str, more)])


def traces_of(folder):
    rows = load_rows(str(folder), "train", num_samples=None)
    return dict(zip(rows["sample_id"], rows["reasoning"], strict=True))


def test_traces_of_the_refcoco_family_become_a_data_set(refer, capsys):
    where = ("--root", refer, "--image-dir", refer / "train2014")
    report = write("refcoco", refer / "out", *where)
    assert report["kept"] == 3 and report["dropped"] == {}
    assert "3 of 3 rows have a trace, by annotations" in capsys.readouterr().out
    rows = leave_images_encoded(load_rows(str(refer / "out"), "train", num_samples=None))
    assert {each["image"]["bytes"] for each in rows} == {None} and len(rows) == 3
    traces = traces_of(refer / "out")
    assert "two dogs" in traces["refcoco-unc-train-1-100"] and "leftmost dog" in traces["refcoco-unc-train-1-100"]
    assert json.loads((refer / "out" / HELD_OUT).read_text())["images"] == {"val": [0]}
    assert "Kept, 3" in (refer / "out" / "train-gallery.html").read_text()
    report = write("grefcoco", refer / "several", *where)
    traces = dict(
        zip(*(load_rows(str(refer / "several"), "train")[name] for name in ("sample_id", "reasoning")), strict=True)
    )
    assert "all two dogs are meant" in traces["grefcoco-unc-train-1-100"]
    assert re.search("There (is|are) one dog", traces["grefcoco-unc-train-2-200"])
    assert len(mix_rows([str(refer / "out"), str(refer / "several")]).rows) == 6


def test_own_rows_get_traces_and_keep_those_they_have(tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    line = {"image": "a.png", "instruction": "it", "polygons": [[0, 0, 9, 0, 9, 9, 0, 9]]}
    lines = [line, {**line, "reasoning": "my own words"}, line]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = load_rows(str(tmp_path / "own.jsonl")).remove_columns("instruction")
    rows.add_column("instruction", ["it", "it", "the <think> sign"]).save_to_disk(tmp_path / "rows")
    report = write(tmp_path / "rows", tmp_path / "out")
    assert report["kept"] == 2 and report["dropped"] == {"it holds a marker of the response's frame": 1}
    traces = traces_of(tmp_path / "out")
    assert traces["own-2"] == "my own words" and "at the upper left" in traces["own-1"]


def test_a_cold_start_without_traces_names_the_command(refer, tmp_path):
    options = ["--dataset", f'[{{"dataset": "refcoco", "root": "{refer}", "image_dir": "{refer}/train2014"}}]']
    options += ["--model", "nowhere", "--output-dir", str(tmp_path), "--use-cpu", "true", "--bf16", "false"]
    with pytest.raises(ValueError, match="3 of 3 rows have no reasoning trace.*`segcompass write-traces`"):
        train_sft.main(options)


# -- which traces are kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (TRACE, None),
        (f"<think>{TRACE}</think>", None),
        (f'"{TRACE}"', None),
        (f"{TRACE}</think>", "it holds a marker of the response's frame"),
        (f"{TRACE} <REF_POS>", "it holds a marker of the response's frame"),
        ("Left.", "it is too short"),
        ("so " * 800, "it is too long"),
        (f"{TRACE} The red outline shows it.", "it speaks of the drawn line"),
        (f"{TRACE} It is highlighted.", "it speaks of the drawn line"),
        (f"{TRACE} It is at [12, 40].", "it holds coordinates"),
        (f"{TRACE} It begins 120 pixels from the left.", "it holds coordinates"),
        ("There are 3 red boxes, 2 of them near, and the third is meant.", "it speaks of the drawn line"),
        ("There are 3 dogs, 2 of them brown, and the third is meant.", None),
    ],
)
def test_traces_of_the_wrong_form_are_dropped(answer, fault):
    assert fault_of_trace(clean_trace(answer)) == fault


def boxed(*boxes, height=90, width=120):
    masks = []
    for left, top, right, bottom in boxes:
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = True
        masks.append(encode_mask(mask))
    return {"sample_id": "s", "instruction": "it", "height": height, "width": width, "masks": masks}


@pytest.mark.parametrize(
    ("boxes", "check", "answer", "fault"),
    [
        ([(0, 0, 20, 20)], "position", "Upper left.", None),
        ([(0, 0, 20, 20)], "position", "upper-left", None),
        ([(0, 0, 20, 20)], "position", "left", "another place"),
        ([(50, 40, 70, 50)], "position", "In the center", None),
        ([(0, 0, 20, 20), (100, 70, 120, 90)], "position", "upper left, lower right", None),
        ([(0, 0, 20, 20), (100, 70, 120, 90)], "position", "upper left", "another place"),
        ([], "position", "none", None),
        ([], "position", "left", "another place"),
        ([(0, 0, 20, 20)], "position", "I cannot say", "names no part"),
        ([(12, 9, 60, 45)], "box", "[12, 9, 60, 45]", None),
        ([(12, 9, 60, 45)], "box", '{"bbox_2d": [100, 100, 500, 500]}', None),  # thousandths
        ([(12, 9, 60, 45)], "box", "[0.1, 0.1, 0.5, 0.5]", None),
        ([(12, 9, 60, 45)], "box", "[80, 60, 110, 85]", "another place"),
        ([(12, 9, 60, 45)], "box", "[12, 9, 60", "holds no box"),
        ([(0, 0, 20, 20), (80, 60, 110, 85)], "box", "[80,60,110,85] [0,0,20,20]", None),
        ([(0, 0, 20, 20)], "box", "[0,0,20,20] [80,60,110,85]", "another place"),
        ([], "box", "None.", None),
        ([], "box", "[]", None),
        ([], "box", "[12, 9, 60, 45]", "another place"),
    ],
)
def test_a_trace_must_lead_to_its_target(boxes, check, answer, fault):
    row = boxed(*boxes)
    if check == "box":
        found = fault_of_boxes(row, answer, possible_boxes(answer, (row["width"], row["height"])))
    else:
        found = fault_of_position(row, answer)
    assert found is None if fault is None else fault in found


def test_the_target_is_drawn_around_and_not_on():
    given = boxed((20, 20, 60, 60))
    image = Image.new("RGB", (120, 90), "white")
    pixels = np.asarray(draw_targets(image, given["masks"]))
    assert (pixels[20:60, 20:60] == 255).all() and (pixels[19, 20:60] == (255, 0, 0)).all()
    red = Image.new("RGB", (120, 90), (255, 0, 0))
    rimmed = np.asarray(draw_targets(red, given["masks"], rim=(255, 255, 255)))
    assert (rimmed[18, 30:50] == (255, 0, 0)).all() and (rimmed[17, 30:50] == 255).all(), "seen on red, too"
    assert (rimmed[15, 30:50] == (255, 0, 0)).all() and (rimmed[20:60, 20:60] == (255, 0, 0)).all()


# -- a server ----------------------------------------------------------------------------------------------------------


class Server:
    """A real server on a real port; `script` decides what a request gets."""

    def __init__(self, script):
        self.requests, self.script, self.release = [], script, threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                picture, text = body["messages"][0]["content"]
                assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
                answer = outer.script(text["text"], len(outer.requests))
                if answer is None:  # never
                    outer.release.wait(20)
                    return
                status, content = answer if isinstance(answer, tuple) else (200, answer)
                if isinstance(content, str) and status == 200:
                    content = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})
                content = content if isinstance(content, bytes) else content.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Six rows: the box is at the left, or nothing is meant (the last)."""
    monkeypatch.setattr(trace_teachers, "WAIT", 0.01)
    lines = []
    for number in range(6):
        Image.new("RGB", (30, 30), (number, 0, 0)).save(tmp_path / f"{number}.png")
        polygons = [[0, 10, 9, 10, 9, 19, 0, 19]] if number < 5 else []
        lines.append({"image": f"{number}.png", "instruction": f"box {number}", "polygons": polygons})
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def ask(own, server, *more):
    options = ("--server", server.url, "--server-model", "m", "--timeout", 1, "--retries", 1, "--batch-size", 2)
    return write(own / "own.jsonl", own / "out", *options, *more)


def truthful(text, count):
    if "Write what one thinks" in text:
        return f"{TRACE} It is about {re.search('box .', text)[0]}."
    return "none" if "box 5" in text else "left"


def test_a_servers_traces_are_kept_when_it_finds_the_target_by_them(own, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def script(text, count):
        if "box 1" in text and "Write" in text:
            return "The red line is around it, so it must be this one."
        return "right" if "box 2" in text and "Write" not in text else truthful(text, count)

    with Server(script) as server:
        report = ask(own, server)
    assert report["kept"] == 4 and report["not answered"] == 0
    assert report["dropped"] == {"it speaks of the drawn line": 1, "the check picks another place": 1}
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret" and body["model"] == "m"
    assert len(server.requests) == 6 + 5
    rows = load_rows(str(own / "out"))
    assert len(rows) == 4 and all(text.startswith(TRACE) for text in rows["reasoning"])
    assert "1 dropped: the check picks another place" in capsys.readouterr().out
    page = (own / "out" / "train-gallery.html").read_text()
    assert "Dropped, 2" in page and "dropped: it speaks of the drawn line" in page


def test_nothing_is_lost_when_the_server_hangs_and_the_command_is_repeated(own):
    def hangs(text, count):
        return truthful(text, count) if count <= 4 else None

    with (
        Server(hangs) as server,
        pytest.raises(OSError, match="answered none of the last 2 batches.*Repeat the command"),
    ):
        ask(own, server)
    written = (own / "out" / "traces" / "train" / "items.jsonl").read_text()
    assert len(written.splitlines()) == 2 and not list((own / "out").glob("*.parquet"))
    with (own / "out" / "traces" / "train" / "items.jsonl").open("a") as file:
        file.write('{"sample_id": "own-')  # killed while it wrote
    with Server(truthful) as server:
        report = ask(own, server)
    assert report["kept"] == 6 and len(server.requests) == 8  # four rows, two questions each
    assert (own / "out" / "traces" / "train" / "items.jsonl").read_text().startswith(written)
    with Server(truthful) as server:
        assert ask(own, server)["kept"] == 6 and not server.requests


def test_what_is_no_completion_is_asked_again_and_left_for_later(own):
    broken = {
        "box 1": b"{nonsense",
        "box 2": b'{"choices": []}',
        "box 3": b'{"choices": [{"message": {"content": null}}]}',
    }

    def script(text, count):
        name = re.search("box .", text)[0]
        if name == "box 4":
            return 503, "overloaded"
        return (200, broken[name]) if name in broken else truthful(text, count)

    with Server(script) as server:
        report = ask(own, server)
    assert report["kept"] == 2 and report["not answered"] == 4 and "2 times" in report["last failure"]
    asked_twice = [body["messages"][0]["content"][1]["text"] for _, _, body in server.requests if "box 4" in str(body)]
    assert len(asked_twice) == 2
    with Server(truthful) as server:
        assert ask(own, server)["kept"] == 6


def test_refusals_end_the_command_at_once(own):
    refused = "refuses the request with status 404: .*no model m.*--server-model='m'"
    with (
        Server(lambda text, count: (404, '{"error": "no model m"}')) as server,
        pytest.raises(ValueError, match=refused),
    ):
        ask(own, server)
    with pytest.raises(ValueError, match="no trace was kept"), Server(lambda text, count: "No.") as server:
        ask(own, server)
    with pytest.raises(SystemExit, match="1"):
        cli.main(
            ["write-traces", str(own / "own.jsonl"), "--output", str(own / "x"), "--server", "http://127.0.0.1:9/v1"]
        )
    with pytest.raises(ValueError, match="give its address with http://"):
        ServerTeacher("localhost:8000", "m")
    with Server(truthful) as server, pytest.raises(ValueError, match="choose another --output"):
        ask(own, server, "--check", "box")
    (answer,) = ServerTeacher("http://127.0.0.1:9/v1", "m", retries=0).ask([(Image.new("RGB", (4, 4)), "?")])
    assert isinstance(answer, NoAnswer)


# -- an MLLM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["llava", "qwen2_5_vl"])
def test_an_mllm_is_asked_in_batches(backbone, tmp_path):
    model, processor = tiny_segcompass(backbone)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    teacher = BackboneTeacher(str(tmp_path), max_tokens=5)
    images = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    answers = teacher.ask([(image, "What is it?") for image in images])
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    alone = teacher.ask([(images[1], "What is it?")])
    assert alone == answers[1:]
