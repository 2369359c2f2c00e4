"""The short forms of benchmarks/reliability: a few cases of each harness, none of which may fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HARNESSES = {
    "crash_states": lambda r: r["crash_states"] >= 12 and r["crash_exact"] == r["crash_states"],
    "kills": lambda r: r["kills"] >= 3 and r["kills_exact"] == r["kills"],
    "corruption": lambda r: (
        r["corrupt_cases"] >= 100
        and r["corrupt_silent"] == r["hangs"] == r["crashes"] == 0
        and r["errors_naming_file"] >= 0.95 * r["errors"] > 0
    ),
    "fuzz": lambda r: (
        r["fuzz_cases"] >= 200
        and r["fuzz_hangs"] == r["fuzz_crashes"] == r["fuzz_memory"] == r["fuzz_silent"] == r["fuzz_obscure"] == 0
    ),
    "attack": lambda r: r["attacks"] >= 25 and r["attacks_through"] == 0,
    "load": lambda r: (
        r["requests"] == 60
        and r["served_after_left"] == r["left"] == 4
        and r["requests_wrong"] == r["model_wrong"] == r["segment_wrong"] == r["threads_left"] == 0
    ),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harnesses fork; Windows cannot")
@pytest.mark.parametrize("name", HARNESSES)
def test_the_short_form_finds_nothing(name, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "reliability" / "run.py"), "--quick", "--only", name]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    last = [line for line in done.stdout.splitlines() if line.startswith(f"{name}: RESULT ")][-1]
    result = json.loads(last.split("RESULT ")[1])
    assert HARNESSES[name](result), done.stdout[-4000:]
