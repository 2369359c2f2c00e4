"""Whole runs of caching and training: killed with -9 and started again, and on two processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "cache_and_train.py"


def start(folder, **environment):
    return subprocess.Popen([sys.executable, str(SCRIPT), str(folder)], env=os.environ | environment)


def kill_when(folder, pattern):
    """Start a slowed run, kill it with -9 as soon as a file matches, and wait until it is gone."""
    process = start(folder, PAUSE="0.1")
    deadline = time.monotonic() + 600
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_killed_while_caching_and_while_training_a_run_ends_with_the_same_weights(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    kill_when(killed, "cache/shard-00001.json")
    assert not (killed / "cache" / "shard-00005.json").exists()
    kill_when(killed, "sae/checkpoint-15/trainer_state.json")
    assert not (killed / "final").exists()
    kill_when(killed, "sae/checkpoint-25/model.safetensors")  # in the middle of writing a checkpoint, or just after
    assert start(killed).wait() == 0
    for folder, pattern in (("cache", "shard-*.safetensors"), ("final", "model.safetensors")):
        files = sorted(path.name for path in (whole / folder).glob(pattern))
        assert files
        for name in files:
            assert (killed / folder / name).read_bytes() == (whole / folder / name).read_bytes(), name


def test_two_processes_write_the_same_cache_and_train_one_autoencoder(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert start(alone).wait() == 0
    assert (
        subprocess.run([*command, str(SCRIPT), str(together)], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        == 0
    )
    for path in sorted((alone / "cache").glob("shard-*")):
        assert (together / "cache" / path.name).read_bytes() == path.read_bytes()
    weights, one = (load_file(folder / "final" / "model.safetensors") for folder in (together, alone))
    assert weights.keys() == one.keys() and not (weights["W_dec"] == one["W_dec"]).all()
    assert (weights["W_dec"].norm(dim=1) - 1).abs().max() < 1e-5
