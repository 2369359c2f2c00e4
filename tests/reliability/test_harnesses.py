"""The short form of benchmarks/reliability: a few cases of each harness, of which none may fail."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from benchmarks.reliability.served import SERVES

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harnesses fork; Windows cannot")
def test_the_short_form_finds_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "reliability" / "run.py"), "--quick"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800
    )
    shown = done.stdout[-6000:] + done.stderr[-3000:]
    assert done.returncode == 0, shown
    result = json.loads(done.stdout.splitlines()[-1].removeprefix("RESULT "))
    assert len(result) == 18, shown
    assert result["crash_states"] >= 12 and result["crash_exact"] == result["crash_states"], shown
    assert result["kills"] >= 3 and result["kills_exact"] == result["kills"], shown
    assert result["corrupt_cases"] >= 60 and result["corrupt_silent"] == 0, shown
    assert result["errors_naming_file"] >= 0.95 * result["errors"] > 0, shown
    assert result["fuzz_cases"] >= 200, shown
    assert result["fuzz_hangs"] == result["fuzz_crashes"] == result["fuzz_silent"] == 0, shown
    assert result["attacks"] >= 25 and result["attacks_through"] == 0, shown
    assert result["sessions"] == 20, shown
    assert "| crash states | " in shown and "| attacks | " in shown and "| 0 through |" in shown
    assert result["serve_requests"] == (24 if SERVES else 0) and result["serve_wrong"] == 0, shown


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harnesses fork; Windows cannot")
def test_parts_of_the_crash_states_are_all_of_them_once(tmp_path, monkeypatch):
    """Three processes share a writer's states; a fourth, which has no time, adds up what they noted."""
    # the harnesses hide GPUs and move the cache for good; other tests of this process have both as they were
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", datasets.config.HF_DATASETS_CACHE)
    from benchmarks.reliability import crash_states

    words = ["--writers", "journal", "--output", str(tmp_path)]
    found = [crash_states.main([*words, "--part", f"{part}/3"])["crash_states"] for part in (1, 2, 3)]
    whole = crash_states.main([*words, "--minutes", "0"])
    exact, tried, there = whole["by_writer"]["journal"]
    assert exact == tried == there == sum(found) and min(found) >= there // 3
    with pytest.raises(SystemExit):
        crash_states.main([*words, "--part", "4/3"])


@pytest.mark.skipif(not SERVES, reason='fastapi and uvicorn are missing: pip install -e ".[serve]"')
def test_load_loses_no_wrong_answer_among_its_threads(monkeypatch):
    """Eight clients, every answer slow to be judged and wrong: each is counted."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    from benchmarks.reliability import load, served

    def slowly_wrong(*given):
        time.sleep(0.002)
        return False

    monkeypatch.setattr(served, "post", lambda *given: (200, b"{}"))
    monkeypatch.setattr(served, "alike", slowly_wrong)
    monkeypatch.setattr(load, "ask", lambda *given: "an answer")
    monkeypatch.setattr(load, "same", slowly_wrong)
    end = time.monotonic() + 60
    assert served.concurrent(0, [{}] * 4, 200, 8, end) == {"asked": 200, "wrong": 200}
    found = load.concurrent(None, 200, 8, end)
    assert (found["asked"], found["wrong"], found["refused"]) == (200, 200, 0)
