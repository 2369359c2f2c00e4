"""The saved model with the first version of transformers that setup.py allows, the installed one and the newest.

Skipped where the package registry cannot be reached. All minor versions: `python dev/versions.py`.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from segcompass.trainers.tested_versions import TESTED, check_tested

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "dev" / "versions.py"


@pytest.fixture(scope="module")
def versions():
    spec = importlib.util.spec_from_file_location("versions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_saved_model_gives_the_same_masks_with_the_first_and_the_newest_transformers(versions):
    done = subprocess.run([sys.executable, SCRIPT, "--ends"], capture_output=True, text=True)
    if done.returncode == versions.UNREACHABLE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.split("RESULT")[1])
    assert result["versions"] == 3 and not result["failed"] and result["max_difference"] == 0


def test_the_newest_of_each_minor_is_chosen_and_the_very_first(versions):
    released = [Version(v) for v in ("5.10.1", "5.10.4", "5.11.0", "5.12.0", "5.12.1")]
    assert versions.chosen(released, ends=False) == ["5.10.1", "5.10.4", "5.11.0", "5.12.1"]
    assert versions.chosen(released, ends=True) == ["5.10.1", "5.12.1"]


def test_a_registry_that_does_not_answer_is_told_apart_from_a_failure(versions, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(versions.Unreachable, match="pip install"):
        versions.lay_over("5.10.1", tmp_path)
    assert not (tmp_path / "transformers-5.10.1").exists()


def test_the_trainers_refuse_versions_that_nobody_tried():
    tried = {package: tested.split(",")[0].removeprefix(">=") for package, tested in TESTED.items()}
    check_tested(tried)
    with pytest.raises(ImportError, match=r"tested with transformers>=.*, but 5.10.1 is installed; pip install"):
        check_tested({**tried, "transformers": "5.10.1"})
    with pytest.raises(ImportError, match=r"tested with trl>=1.16,<1.17, but 1.17.0 is installed"):
        check_tested({**tried, "trl": "1.17.0"})
