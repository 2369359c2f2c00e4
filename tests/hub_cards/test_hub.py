"""The whole way to a Hub and back, with the real client, against a server on localhost."""

import json
import os
import signal
import time

import pytest
import torch

from tests.support.hub_client import ROOT, finish
from tests.support.scripted import noise_images

OWNER = "tester"
MODEL, PARTS, SAE = f"{OWNER}/segcompass-tiny", f"{OWNER}/segcompass-parts", f"{OWNER}/sae-tiny"
DATA, METRIC = f"{OWNER}/scenes-tiny", f"{OWNER}/reasoning_segmentation"
INSTRUCTION = "the 'red' box"
RESPONSE = "<think>left of it</think><REF_POS><REF_POS><REF_POS>"

# In a process with the project: a tiny model, another state of it, and what both answer.
PUSH = f"""
import json, sys
import torch
from segcompass.hub_cards import Evaluation, push_dataset, push_metric, push_model, push_sae
from segcompass.loaders import load_scenes
from segcompass.modeling_segcompass import SegCompassModel
from tests.support.scripted import lively_segcompass, noise_images

torch.set_num_threads(1)
folder = sys.argv[1]
model, processor = lively_segcompass("llava")
model.save_pretrained(folder + "/local")
# Weights read from a file lie otherwise in memory than fresh ones, and kernels then round the last bit otherwise.
model = SegCompassModel.from_pretrained(folder + "/local")
image = noise_images()[1]
inputs = processor(images=image, text={INSTRUCTION!r}, response={RESPONSE!r})

def keep(name):
    with torch.no_grad():
        torch.save(model(**inputs).pred_masks, f"{{folder}}/{{name}}.pt")

sae = push_sae(model.sae, {SAE!r}, quality={{"explained_variance": 0.5, "l0": 12.0}})
metrics = {{"gIoU": 0.4, "cIoU": 0.3, "N-acc": None, "T-acc": 1.0, "n": 7, "protocol": "rela", "seconds": 3.0}}
card_fields = dict(
    example=(image, {INSTRUCTION!r}),
    evaluations=[Evaluation(metrics, "Noise", "noise", "test", "segcompass evaluate")],
    training={{"learning_rate": 2e-6}},
    limitations="It has seen nothing.",
    datasets=[{DATA!r}],
    emissions=1.5,
)
first = push_model(model, processor, {MODEL!r}, tag="v1", **card_fields)
keep("first")
again = push_model(model, processor, {MODEL!r}, **card_fields)
parts = push_model(model, processor, {PARTS!r}, card_fields["example"], references={{"sae": {SAE!r}}})
with torch.no_grad():
    model.mask_decoder.mask_token += 1
    model.sae.b_enc += 0.1
second = push_model(model, processor, {MODEL!r}, branch="next", **card_fields)
keep("second")
sae_next = push_sae(model.sae, {SAE!r})
refused = ""
try:
    push_model(model, processor, {PARTS!r}, card_fields["example"], references={{"sae": f"{SAE}@{{sae.oid}}"}})
except ValueError as error:
    refused = str(error)
rows = load_scenes(split="test", seed=3, num_samples=6)
data = push_dataset(rows, {DATA!r}, "Six scenes.", split="test")
data_again = push_dataset(rows, {DATA!r}, "Six scenes.", split="test")
metric = push_metric("{{root}}/loaders/reasoning_segmentation", {METRIC!r})
metric_again = push_metric("{{root}}/loaders/reasoning_segmentation", {METRIC!r})
print(json.dumps(dict(
    first=first.oid, again=again.oid, second=second.oid, parts=parts.oid, sae=sae.oid, sae_next=sae_next.oid,
    refused=refused, data=data.oid, data_again=data_again.oid, metric=metric.oid, metric_again=metric_again.oid,
    masks=list(rows["masks"]), instructions=list(rows["instruction"]),
)))
"""

# Where the project cannot be imported: revisions as arguments, a hash of each one's masks as output.
KINDS = ("first", "second")
PULL = f"""
import hashlib, json, logging
from PIL import Image
from transformers import AutoModel, AutoProcessor
pulled = {{}}
for asked in sys.argv[2:]:
    repo, _, revision = asked.partition("@")
    revision = revision or "main"
    model, info = AutoModel.from_pretrained(repo, revision=revision, trust_remote_code=True, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)
    image = Image.open(sys.argv[1])
    inputs = processor(images=image, text={INSTRUCTION!r}, response={RESPONSE!r})
    with torch.no_grad():
        masks = model.eval()(**inputs).pred_masks
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    bits = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        bits.update(name.encode() + weight.numpy().tobytes())
    pulled[asked] = [bits.hexdigest(), masks.flatten().tolist()]
print(json.dumps(pulled))
"""


def pull(hub, *asked, code=PULL, home):
    """What each pulled revision is: "first" or "second" by its masks; those of one kind have the same weights' bits.

    Masks are compared closely and not bit for bit: kernels round the last bit by where weights lie in memory.
    """
    expected = {name: torch.load(hub.folder / f"{name}.pt", weights_only=True).flatten() for name in KINDS}
    kinds, weights = {}, {name: set() for name in KINDS}
    for revision, (bits, masks) in hub.run(code, hub.folder / "image.png", *asked, project=False, home=home).items():
        masks = torch.tensor(masks)
        (kinds[revision],) = [name for name in KINDS if torch.allclose(masks, expected[name], atol=1e-5)]
        weights[kinds[revision]].add(bits)
    assert all(len(bits) <= 1 for bits in weights.values())
    return kinds


@pytest.fixture(scope="module")
def pushed(hub):
    """Everything pushed once, and what came of it."""
    noise_images()[1].save(hub.folder / "image.png")
    pushed = hub.run(PUSH.replace("{root}", str(ROOT)), hub.folder)
    return pushed


@pytest.fixture(scope="module")
def pulled(hub, pushed):
    """What each revision is where it was pulled, in the cache "elsewhere"."""
    asked = [MODEL, f"{MODEL}@v1", f"{MODEL}@{pushed['first']}", f"{MODEL}@next", f"{PARTS}@{pushed['parts']}"]
    return pull(hub, *asked, home="elsewhere")


def test_weights_are_the_same_bits_and_masks_the_same_wherever_a_revision_is_pulled(pushed, pulled):
    pulled = dict(pulled)
    assert pulled.pop(f"{MODEL}@next") == "second"
    # The last has no SAE of its own: it fetches the one it was pushed with, though a newer one is on main there.
    assert set(pulled.values()) == {"first"} and len(pulled) == 4
    assert pushed["sae"] != pushed["sae_next"]


def test_a_push_without_change_makes_no_commit(pushed):
    for name in ("first", "data", "metric"):
        later = pushed["again" if name == "first" else f"{name}_again"]
        assert later == pushed[name], name


def test_a_reference_to_other_weights_is_refused(pushed):
    assert "sae of this model differs from" in pushed["refused"] and "'b_enc'" in pushed["refused"]


INSPECT = f"""
import json, sys
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from safetensors import safe_open
api = HfApi()
keys = {{}}
for repo in ({MODEL!r}, {PARTS!r}):
    with safe_open(hf_hub_download(repo, "model.safetensors"), "pt") as file:
        keys[repo] = sorted({{key.split(".")[0] for key in file.keys()}})
card = ModelCard.load({MODEL!r})
results = [r.__dict__ for r in card.data.eval_results]
print(json.dumps(dict(
    keys=keys,
    config=json.load(open(hf_hub_download({PARTS!r}, "config.json"))),
    commits=len(api.list_repo_commits({MODEL!r})),
    files=api.list_repo_files({MODEL!r}),
    card=card.content,
    sae_card=ModelCard.load({SAE!r}, ).content,
    parts_card=ModelCard.load({PARTS!r}).content,
    metadata=card.data.to_dict(),
    results=results,
    main=api.model_info({MODEL!r}).sha,
)))
"""


@pytest.fixture(scope="module")
def inspected(hub, pushed):
    return hub.run(INSPECT)


def test_the_repository_holds_weights_code_card_and_nothing_twice(pushed, inspected):
    assert inspected["main"] == pushed["first"]
    assert inspected["commits"] == 2  # the Hub's own first one and one push
    expected = {"README.md", "config.json", "model.safetensors", "example.png", "modeling_segcompass.py"}
    assert expected | {"pipeline_segcompass.py", "processor_config.json"} <= set(inspected["files"])
    assert "sae" in inspected["keys"][MODEL] and "sae" not in inspected["keys"][PARTS]
    assert inspected["config"]["references"] == {"sae": {"repo_id": SAE, "revision": pushed["sae"]}}


def test_cards_tell_what_was_measured_and_under_which_protocol(pushed, inspected):
    data = inspected["metadata"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-segmentation"
    assert data["license"] == "apache-2.0" and data["datasets"] == [DATA] and data["model-index"]
    assert data["co2_eq_emissions"] == {"emissions": 1.5}
    results = {result["metric_type"]: result for result in inspected["results"]}
    values = {name: result["metric_value"] for name, result in results.items()}
    assert values == {"gIoU": 0.4, "cIoU": 0.3, "T-acc": 1.0}
    assert all(result["metric_args"] == {"protocol": "rela", "n": 7} for result in results.values())
    for text in ("| 0.400 | 0.300 | 1.000 |", "learning_rate | 2e-06", "It has seen nothing.", "protocol\nrela"):
        assert text in inspected["card"], inspected["card"]
    assert "explained_variance" not in inspected["card"]  # not given, so left out
    assert f"| sae | {SAE} | `{pushed['sae']}` |" in inspected["parts_card"]
    assert "Not measured." in inspected["sae_card"] and "Not evaluated." in inspected["parts_card"]


def snippet(card):
    code = card.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 10
    return code


def test_the_snippets_of_the_cards_run(hub, inspected):
    code = f"""
import json
names = [{{}}, {{}}]
for code, own in zip({[snippet(inspected["card"]), snippet(inspected["sae_card"])]!r}, names, strict=True):
    exec(code, own)
mask, (features, reconstruction) = names[0]["masks"][0], (names[1][name] for name in ("features", "reconstruction"))
print(json.dumps([tuple(mask.shape), str(mask.dtype), tuple(features.shape), tuple(reconstruction.shape)]))
"""
    shape, dtype, *coded = hub.run(code, project=False, home="snippet")
    assert shape == [30, 44] and dtype == "torch.bool"
    assert coded == [[4, 128], [4, 32]]


def test_rows_and_metric_come_back(hub, pushed):
    code = f"""
import json, sys
from datasets import load_dataset
import evaluate
rows = load_dataset({DATA!r}, split="test", revision=sys.argv[1])
streamed = next(iter(load_dataset({DATA!r}, split="test", streaming=True)))
assert streamed["instruction"] == rows[0]["instruction"]
metric = evaluate.load({METRIC!r}, revision=sys.argv[2])
scores = metric.compute(predictions=rows["masks"], references=rows["masks"])
assert rows[0]["image"].size == (rows[0]["width"], rows[0]["height"])
print(json.dumps(dict(masks=list(rows["masks"]), instructions=list(rows["instruction"]), scores=scores)))
"""
    pulled = hub.run(code, pushed["data"], pushed["metric"], project=False, home="elsewhere")
    assert pulled["masks"] == pushed["masks"] and pulled["instructions"] == pushed["instructions"]
    assert pulled["scores"]["gIoU"] == 1.0 and pulled["scores"]["n"] == 6


def test_a_push_cut_off_leaves_the_old_revision(hub, pushed):
    code = f"""
from segcompass.hub_cards import push_model
from tests.support.scripted import lively_segcompass, noise_images
model, processor = lively_segcompass("llava", seed=5)
push_model(model, processor, {MODEL!r}, (noise_images()[1], {INSTRUCTION!r}))
"""
    before = len(hub.requests())
    hub.hold.touch()
    try:
        process = hub.start(code)
        deadline = time.monotonic() + 300
        while not any(line.startswith("UPLOADING") for line in hub.requests()[before:]):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    finally:
        hub.hold.unlink()
    assert pull(hub, MODEL, home="after") == {MODEL: "first"}


def test_the_hubs_own_errors_reach_the_user(hub, pushed):
    code = f"""
import json
from segcompass.hub_cards import push_sae
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from segcompass.modeling_segcompass import SegCompassModel, SparseAutoencoder, SparseAutoencoderConfig
raised = {{}}
def catch(name, call, *arguments, **keywords):
    try:
        call(*arguments, **keywords)
    except Exception as error:
        chain = [type(error).__name__, type(error.__cause__).__name__]
        raised[name] = [chain, str(error), getattr(getattr(error, "response", None), "status_code", None)]
sae = SparseAutoencoder(SparseAutoencoderConfig(d_in=8, d_sae=16, layer=1))
catch("token", push_sae, sae, "{OWNER}/other", token="hf_wrong")
catch("missing", HfApi().model_info, "{OWNER}/nothing")
catch("load", SegCompassModel.from_pretrained, "{OWNER}/nothing")
catch("revision", SegCompassModel.from_pretrained, {MODEL!r}, revision="nowhere")
print(json.dumps(raised))
"""
    raised = hub.run(code)
    assert raised["token"][2] == 401 and "credentials" in raised["token"][1]
    assert raised["missing"][0][0] == "RepositoryNotFoundError"
    assert raised["load"][0][0] == "OSError" and f"{OWNER}/nothing" in raised["load"][1]
    assert raised["revision"][0][0] == "OSError" and "nowhere" in raised["revision"][1]


def test_a_pulled_model_loads_from_the_cache_alone(hub, pushed, pulled):
    asked = [MODEL, f"{PARTS}@{pushed['parts']}"]
    assert set(asked) <= set(pulled)
    code = PULL.replace("trust_remote_code=True", "trust_remote_code=True, local_files_only=True")
    before = len(hub.requests())
    cached = pull(hub, *asked, code=code, home="elsewhere")
    assert set(cached.values()) == {"first"} and len(hub.requests()) == before


def test_the_command_pushes_and_names_the_commit(hub):
    code = f"""
import json
from segcompass.cli import main
main(["push", "metric", "{OWNER}/by_command", "--tag", "v1"])
from huggingface_hub import HfApi
print(json.dumps(HfApi().list_repo_files("{OWNER}/by_command", repo_type="space", revision="v1")))
"""
    output = finish(hub.start(code)).splitlines()
    assert output[0].startswith(f"{OWNER}/by_command is at ")
    assert set(json.loads(output[-1])) == {"README.md", "by_command.py", "run_lengths.py"}
