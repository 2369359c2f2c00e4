"""Two gloo processes, replicated (DDP) and sharded (FSDP2), learn what one learns from the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segcompass.modeling_segcompass import SegCompassModel

ROOT = Path(__file__).resolve().parents[2]
BOTH = ("loss", "grad_norm", "seg/heatmap_bce", "seg/mask_dice", "seg/conf_bce")
CURVE = {"grpo": (*BOTH, "grpo_loss", "kl", "reward"), "sft": (*BOTH, "language")}
STEPS = {"grpo": 3, "sft": 4}
TOLERANCE = 2e-3  # relative; the same sums in another order, through three steps of Adam
KL_TOLERANCE = 2e-2  # it is made of weights' changes alone, and Adam moves a weight whose gradient is noise by the rate


def launch(mode, processes, folder, reading, stage):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, str(ROOT / "tests" / "support" / "two_processes.py"), mode, str(folder), reading, stage],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / f"{mode}.json").read_text())


@pytest.fixture(scope="module", params=["feature grpo", "grounded grpo", "grounded sft"])
def alone(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    reading, stage = request.param.split()
    return launch("alone", 1, folder, reading, stage), folder / "alone" / "final", reading, stage


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_follow_the_curve_of_one(alone, mode, tmp_path):
    one, final, reading, stage = alone
    two = launch(mode, 2, tmp_path, reading, stage)
    assert two["processes"] == 2 and one["processes"] == 1
    assert ("DTensor" in two["kinds"]) == (mode == "fsdp2")
    steps = [entry for entry in one["log"] if "loss" in entry]
    others = [entry for entry in two["log"] if "loss" in entry]
    assert len(steps) == len(others) == STEPS[stage]
    for step, other in zip(steps, others, strict=True):
        for name in CURVE[stage]:
            tolerance = KL_TOLERANCE if name == "kl" else TOLERANCE
            assert other[name] == pytest.approx(step[name], rel=tolerance, abs=1e-5), (step["step"], name)
    expected = SegCompassModel.from_pretrained(final).state_dict()
    got = SegCompassModel.from_pretrained(tmp_path / mode / "final").state_dict()
    moved = 1e-3 * 80 * STEPS[stage]  # how far the fastest part can have gone
    for name, value in expected.items():
        assert torch.allclose(got[name], value, atol=0.05 * moved), name
