"""The wheel as users have it: in a venv of its own, elsewhere, in a clone, beside folders named as ours, and editable.

The venvs see this environment's libraries (a .pth file), so nothing is downloaded. Built from a copy of the clone,
because setuptools writes into the folder it builds.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import segcompass

pytest.importorskip("setuptools", reason="setuptools is missing: pip install setuptools")
ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "docs", "runs", "tests", "*.egg-info", "__pycache__")
TRAPS = ("trainers", "loaders", "hub_cards", "modeling_segcompass", "evaluate_model", "commands")


def run(*command, cwd):
    """Standard output of a command that knows nothing of this checkout."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(Path(cwd) / "home")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


class Environment:
    """A venv that sees this environment's libraries but not its editable installs."""

    def __init__(self, folder):
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        self.command = folder / "bin" / "segcompass"
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "libraries.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")

    def install(self, *what):
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--quiet", "--no-index", "--no-deps")
        run(*pip, "--no-build-isolation", *what, cwd=self.python.parent)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("clone") / "segcompass-clone", ignore=NOT_COPIED)


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", folder, clone),
        cwd=folder,
    )
    return next(folder.glob("segcompass-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("installed"))
    environment.install(wheel)
    return environment


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A user's project, whose folders are named as ours."""
    folder = tmp_path_factory.mktemp("project")
    for name in TRAPS:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise ImportError('the user''s own {name}')\n")
    return folder


def test_top_level_of_the_wheel_is_segcompass_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"segcompass", f"segcompass-{segcompass.__version__}.dist-info"}
    assert not any("checkpoints" in name and name.endswith((".pt", ".pth")) for name in names)
    of_examples = [name.removeprefix("segcompass/examples/") for name in names if "/examples/" in name]
    code = [name for name in of_examples if name.endswith((".py", ".sh"))]  # beside the weights only, as on the Hub
    assert "recipes/mini/grpo.yaml" in of_examples and all(name.startswith("checkpoints/mini/") for name in code)
    assert Path(wheel).stat().st_size < 12_000_000


def test_an_installed_user_segments_the_shipped_scene_and_finds_the_recipes(installed, elsewhere):
    assert run(installed.command, "--version", cwd=elsewhere) == f"segcompass {segcompass.__version__}\n"
    assert "mini/grpo" in run(installed.command, "recipes", cwd=elsewhere)
    shown = run(installed.command, "segment", "--output", "out", "--explain", cwd=elsewhere)
    assert "result       2 instances" in shown
    result = json.loads((elsewhere / "out" / "result.json").read_text())
    assert len(result["instances"]) == 2 and (elsewhere / "out" / "explanation.html").exists()


def test_every_help_the_metric_and_the_public_names_beside_folders_named_as_ours(installed, elsewhere):
    code = """
import contextlib, io, sys
import segcompass, segcompass.cli
assert sys.path[0] == "" and "site-packages" in segcompass.__file__, segcompass.__file__
for command in segcompass.cli.COMMANDS:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            segcompass.cli.main([*command.split(), "--help"])
        except SystemExit as stopped:
            assert not stopped.code, command
    assert shown.getvalue().startswith(f"usage: segcompass {command}"), command
    assert "examples/" not in shown.getvalue(), command
for name in segcompass.__all__:
    getattr(segcompass, name)
import evaluate
mask = [[True, False]]
print(evaluate.load(segcompass.METRIC).compute(predictions=[mask], references=[mask])["cIoU"])
"""
    assert run(installed.python, "-c", code, cwd=elsewhere) == "1.0\n"


def test_distributed_launchers_find_the_installed_command(installed, elsewhere):
    launch = [installed.python, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    assert segcompass.__version__ in run(*launch, "-m", "segcompass", "--version", cwd=elsewhere)


FOUND = """
from importlib.util import find_spec
parts = ("modeling_segcompass", "trainers", "loaders.masks", "hub_cards", "commands.segment")
print(len({str(find_spec(f"segcompass.{part}").origin).split("/segcompass-clone/")[0] for part in parts}), end=" ")
import segcompass
print(segcompass.__file__)
"""


def test_wheel_and_clone_are_never_mixed(installed, clone):
    """In the clone's root the command takes the wheel and `python -c` the clone, each all of it."""
    assert run(installed.command, "--version", cwd=clone) == f"segcompass {segcompass.__version__}\n"
    code = "import sys; sys.path.remove('')\n" + FOUND.replace("len(", "").replace("})", "}")
    assert str(clone) not in run(installed.python, "-c", code, cwd=clone)
    count, file = run(installed.python, "-c", FOUND, cwd=clone).split()
    assert (count, file) == ("1", str(clone / "segcompass" / "__init__.py"))
    assert "segcompass segment photo.jpg" in run(installed.python, "examples/segment.py", "--help", cwd=clone)


def test_editable(clone, elsewhere, tmp_path):
    environment = Environment(tmp_path)
    environment.install("--editable", clone)
    count, file = run(environment.python, "-c", FOUND, cwd=elsewhere).split()
    assert (count, file) == ("1", str(clone / "segcompass" / "__init__.py"))
    assert "mini/grpo" in run(environment.command, "recipes", cwd=elsewhere)
    assert "usage: segcompass segment" in run(
        environment.python, clone / "examples" / "segment.py", "--help", cwd=tmp_path
    )
