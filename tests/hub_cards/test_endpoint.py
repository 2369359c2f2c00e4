"""The shipped model pushed to a Hub on localhost: its card's snippets, the endpoint's handler, results and picture.

All that users run is run in a process that cannot import this project.
"""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image

from segcompass.hub_cards import Evaluation, model_card
from segcompass.loaders.masks import decode_mask
from segcompass.loading import load
from segcompass.segmentation import describe
from segcompass.shipped import MODEL, default_scene
from tests.support.hub_client import ROOT

REPO = "tester/segcompass-mini"
METRICS = {"gIoU": 0.75, "cIoU": 0.5, "N-acc": None, "T-acc": 1.0, "n": 7, "protocol": "rela"}

PUSH = f"""
import json, sys
metrics, output = sys.argv[1:]
from segcompass.commands import push
from segcompass.shipped import MODEL
for again in range(2):  # the second time there is nothing new
    push.main(["model", str(MODEL), {REPO!r}, "--evaluation", metrics, "--evaluation-name", "Scenes",
               "--evaluation-data", "tester/scenes@0123456", "--evaluation-command", "segcompass evaluate"])
from huggingface_hub import HfApi, hf_hub_download
files = ["README.md", "explanation.png", ".eval_results/segcompass-results.yaml", "requirements.txt", "manifest.json"]
print(json.dumps(dict(
    listed=HfApi().list_repo_files({REPO!r}),
    commits=len(HfApi().list_repo_commits({REPO!r})),
    paths={{name: hf_hub_download({REPO!r}, name) for name in files}},
)))
"""

# As the endpoints' server does it: the handler is loaded from its file, and called with the JSON of each request.
SERVED = f"""
import importlib.util, json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from huggingface_hub import snapshot_download

folder = snapshot_download({REPO!r})
sys.path.insert(0, folder)
spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
handler = module.EndpointHandler(folder)

class Endpoint(BaseHTTPRequestHandler):
    def do_POST(self):
        try:
            status, answer = 200, handler(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        except Exception as error:
            status, answer = 400, {{"error": str(error)}}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass

endpoint = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
threading.Thread(target=endpoint.serve_forever, daemon=True).start()
os.environ["ENDPOINT_URL"] = f"http://127.0.0.1:{{endpoint.server_port}}"
snippets = [{{}}, {{}}, {{}}]
for code, names in zip(json.loads(sys.argv[1]), snippets, strict=True):
    exec(code, names)
by_model, by_pipe, by_endpoint = snippets
from huggingface_hub import get_session
def refused(inputs):
    response = get_session().post(os.environ["ENDPOINT_URL"], json={{"inputs": inputs}})
    return [response.status_code, response.json()["error"]]
print(json.dumps(dict(
    union=by_model["masks"][0].int().tolist(),
    pipe=[[segment["score"], list(segment["box"])] for segment in by_pipe["answer"]],
    text=by_pipe["answer"].text,
    concepts=[segment["concepts"][0]["index"] for segment in by_pipe["answer"]],
    endpoint=by_endpoint["answer"],
    address=refused({{"image": "http://127.0.0.1:1/x.png", "instruction": "it"}}),
    empty=refused({{"image": by_endpoint["inputs"]["image"], "instruction": " "}}),
)))
"""


@pytest.fixture(scope="module")
def pushed(hub, tmp_path_factory):
    metrics = tmp_path_factory.mktemp("measured") / "metrics.json"
    metrics.write_text(json.dumps(METRICS))
    return hub.run(PUSH, metrics, hub.folder)


def blocks(card):
    return [part.split("```")[0] for part in card.split("```python\n")[1:]]


def test_every_snippet_and_the_endpoint_give_the_masks_of_segment(hub, pushed):
    card = Path(pushed["paths"]["README.md"]).read_text()
    snippets = blocks(card)
    assert len(snippets) == 3 and all(len(code.splitlines()) <= 10 for code in snippets)
    got = hub.run(SERVED, json.dumps(snippets), project=False, home="endpoint")

    scene, instruction = default_scene()
    model, processor = load(MODEL, "cpu")
    inputs = processor(images=scene, text=instruction)
    outputs = model.segment(**inputs)
    found = processor.post_process_instance_segmentation(outputs, target_sizes=inputs["original_sizes"])[0]
    expected = describe(instruction, outputs, processor, found)
    segmentations = {each["slot"]: each["segmentation"] for each in expected["instances"]}
    assert len(segmentations) == 2
    answer = got["endpoint"]
    assert {each["slot"]: each["segmentation"] for each in answer["instances"]} == segmentations
    assert answer["text"] == got["text"] == expected["text"]
    height, width = answer["size"]
    union = decode_mask(list(segmentations.values()), height, width)
    assert (union == got["union"]).all()
    assert got["pipe"] == [[pytest.approx(each["score"], abs=1e-5), each["box"]] for each in answer["instances"]]
    assert got["concepts"] == [each["concepts"][0]["index"] for each in answer["instances"]]
    assert "purple" in [concept["label"] for concept in answer["instances"][0]["concepts"]]
    assert got["address"][0] == 400 and "an address or a path; nothing is fetched" in got["address"][1]
    assert got["empty"][0] == 400 and "instruction is ' '; it must be text" in got["empty"][1]


def test_the_repository_is_ready_for_an_endpoint_and_signed(pushed):
    paths = pushed["paths"]
    assert pushed["commits"] == 2  # the Hub's own first one and one push
    assert {"handler.py", "answering.py", "mask_outlines.py"} <= set(pushed["listed"])
    needed = Path(paths["requirements.txt"]).read_text().splitlines()
    assert all(f'"{line}"' in (ROOT / "setup.py").read_text() for line in needed)
    signed = json.loads(Path(paths["manifest.json"]).read_text())["files"]
    assert {"handler.py", "requirements.txt", "explanation.png", "example.png", "concepts.json"} <= set(signed)


def test_the_card_shows_a_picture_of_why_the_mask_is_where_it_is(pushed):
    picture = Image.open(pushed["paths"]["explanation.png"])
    assert picture.width >= 800 and len(picture.convert("RGB").getcolors(2**24)) > 100
    assert "](explanation.png)" in Path(pushed["paths"]["README.md"]).read_text()
    config = load(MODEL, "cpu")[0].config
    assert "explanation.png" not in str(model_card(REPO, config, "it"))  # where there is none


def test_results_stand_in_the_front_matter_and_as_a_file(pushed):
    card = ModelCard.load(pushed["paths"]["README.md"])
    in_card = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert in_card == {"gIoU": 0.75, "cIoU": 0.5, "T-acc": 1.0}
    assert {result.dataset_revision for result in card.data.eval_results} == {"0123456"}
    entries = parse_eval_result_entries(
        yaml.safe_load(Path(pushed["paths"][".eval_results/segcompass-results.yaml"]).read_text())
    )
    assert {entry.task_id: entry.value for entry in entries} == {f"test_{name}": v for name, v in in_card.items()}
    for entry in entries:
        assert (entry.dataset_id, entry.dataset_revision) == ("tester/scenes", "0123456")
        assert entry.notes == "rela protocol, 7 samples, fractions from 0 to 1; segcompass evaluate"


@pytest.mark.parametrize("data", ["scenes", "runs/scenes.jsonl", "a/b/c", "./scenes"])
def test_only_a_data_set_on_the_hub_gets_a_results_file(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "scenes.jsonl").write_text("")
    assert Evaluation(METRICS, "Scenes", data, "test").entries() == []
