"""`segcompass evaluate` as real processes that are killed and started again: every road leads to one metrics.json."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.scripted import lively_segcompass

ROOT = Path(__file__).parents[2]
N = 17
GOOD = "<think>a red ball</think>" + "<REF_POS>" * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model, processor = lively_segcompass("llava", num_slots=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(model, output, processes, pause):
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
        launch += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    script = [str(ROOT / "tests" / "segcompass" / "forced_evaluation.py"), GOOD, str(pause)]
    arguments = ["--model", str(model), "--split", "test", "--seed", "3", "--num-samples", str(N)]
    arguments += ["--batch-size", "2", "--threshold", "0", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(output.parent / "cache")
    log = (output.parent / f"{output.name}.log").open("a")
    command = [*launch, *script, *arguments]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def finish(process, output):
    code = process.wait(timeout=300)
    assert code == 0, (output.parent / f"{output.name}.log").read_text()[-3000:]
    return (output / "metrics.json").read_bytes()


def written(output):
    return sum(path.read_bytes().count(b"\n") for path in output.glob("predictions*.jsonl"))


def kill_after(process, output, lines):
    """kill -9 of all processes of a run once it has written so many lines."""
    deadline = time.monotonic() + 300
    while written(output) < lines:
        assert process.poll() is None, (output.parent / f"{output.name}.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "metrics.json").exists()
    assert lines <= written(output) < N


def test_killed_and_resumed_on_one_and_two_processes_gives_identical_metrics(model, tmp_path):
    whole = tmp_path / "whole"
    metrics = finish(start(model, whole, 1, 0), whole)
    assert json.loads(metrics)["n"] == N and json.loads(metrics)["gIoU"] > 0
    names = [json.loads(line)["sample_id"] for line in (whole / "predictions.jsonl").read_text().splitlines()]

    for processes in (1, 2):
        output = tmp_path / f"on{processes}"
        kill_after(start(model, output, processes, 0.3), output, 4)
        torn = next(iter(sorted(output.glob("predictions*.jsonl"))))
        torn.write_bytes(torn.read_bytes()[:-30])  # as if the kill had hit in the middle of a line
        before = written(output)
        assert finish(start(model, output, processes, 0), output) == metrics
        lines = (output / "predictions.jsonl").read_text().splitlines()
        assert [json.loads(line)["sample_id"] for line in lines] == names, "each sample once, in the data's order"
        assert before > 0 and list(output.glob("predictions.rank*")) == []
