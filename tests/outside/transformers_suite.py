"""transformers' own common tests, taken from the source distribution of the installed version when tests run.

Nothing of them is kept in this repository: pip fetches the distribution once into a cache folder. What it lacks
(generation, exports) has stand-ins here; the generation checks are ours, see `generation.py`.
"""

import functools
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import transformers

from tests.outside.generation import GenerationChecks

ALL = os.environ.get("SEGCOMPASS_OUTSIDE") == "all"
"""Whether everything was asked for: then a suite that cannot be had is an error, and nothing is left out for time."""

PACKAGE = "transformers_suite"
WANTED = ("test_modeling_common.py", "test_configuration_common.py", "test_processing_common.py")


def suite_module(name: str) -> ModuleType:
    """A module of the suite.

    Args:
        name: such as "test_modeling_common".

    Returns:
        The module. Where it cannot be had, the tests that ask for it are skipped, with the reason.

    Raises:
        RuntimeError: it cannot be had, and everything was asked for.
    """
    reason = _open()
    if reason:
        if ALL:
            raise RuntimeError(reason)
        pytest.skip(reason, allow_module_level=True)
    with (
        mock.patch("transformers.utils.direct_transformers_import", lambda path: transformers),
        warnings.catch_warnings(action="ignore", category=pytest.PytestUnknownMarkWarning),
    ):
        return importlib.import_module(f"{PACKAGE}.{name}")


@functools.cache
def _open() -> str:
    """Make the suite importable; why this cannot be done, or ""."""
    try:
        import parameterized  # noqa: F401
    except ImportError:
        return 'the suite of transformers needs the package parameterized: pip install -e ".[test]"'
    folder = _cache() / f"transformers-{transformers.__version__}"
    if not folder.exists():
        reason = _fetch(folder)
        if reason:
            return reason
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    stand_ins = {
        f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": GenerationChecks},
        f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},  # read for configs without parts
        "fetch_hub_objects_for_ci": {"url_to_local_path": lambda url: url},
    }
    for name, contents in stand_ins.items():
        parents = name.split(".")[1:-1]
        for parent in (f"{PACKAGE}.{part}" for part in parents):
            sys.modules[parent] = ModuleType(parent)
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(contents)
    return ""


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segcompass-tests"


def _fetch(folder: Path) -> str:
    """Fill the folder, whole or not at all; why this cannot be done, or ""."""
    wanted = f"transformers=={transformers.__version__}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        options = ["--quiet", "--retries", "1", "--timeout", "20", "--no-deps", "--no-binary", ":all:", "--dest", made]
        command = [sys.executable, "-m", "pip", "download", *options, wanted]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        archives = list(Path(made).glob("*.tar.gz"))
        if done.returncode or not archives:
            said = done.stderr.strip().splitlines()[-1:] or ["no archive"]
            return f"the source distribution of {wanted} cannot be had ({said[0]}); its suite was not run."
        tests = Path(made) / "tests"
        tests.mkdir()
        with tarfile.open(archives[0]) as archive:
            for member in archive.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and parts[1:-1] == ("tests",) and parts[-1] in WANTED:
                    (tests / parts[-1]).write_bytes(archive.extractfile(member).read())
        missing = [name for name in WANTED if not (tests / name).exists()]
        if missing:
            return f"the source distribution of {wanted} has no tests/{missing[0]}; its suite was not run."
        if not folder.exists():
            tests.rename(folder)
    return ""
