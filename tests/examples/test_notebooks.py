"""The notebooks run from end to end, in an empty folder, on the small model; one pushes to a Hub on localhost.

    NOTEBOOK_OUTPUTS=examples/notebooks python -m pytest -q tests/examples/test_notebooks.py

also writes the outputs of this run into the notebooks that the repository keeps.
"""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.hub_client import ROOT, TOKEN, environment

nbformat = pytest.importorskip("nbformat", reason="the notebooks need `pip install -e '.[docs]'`")
nbclient = pytest.importorskip("nbclient", reason="the notebooks need `pip install -e '.[docs]'`")
pytest.importorskip("ipykernel", reason="the notebooks need `pip install -e '.[docs]'`")

FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
BUDGET = 600_000
"""Bytes of all notebooks together, with their outputs."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The address of a Hub on localhost."""
    folder = tmp_path_factory.mktemp("hub")
    server = subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "tests" / "support" / "hub_server.py")),
            *("--token", TOKEN, "--log", folder / "requests.log"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    yield server.stdout.readline().strip()
    server.terminate()
    server.wait()


def variables(hub, folder):
    """What the kernel finds in its environment: this Hub, this project and one thread."""
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    return environment(hub, folder / "home") | ours


SMALLER = {"judge_a_white_box": ("--num-samples 24 --label-samples 60", "--num-samples 6 --label-samples 30")}
"""What a test run replaces by less work; not when the outputs are kept."""


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_from_end_to_end(name, tmp_path, hub):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    if name in SMALLER and not os.environ.get("NOTEBOOK_OUTPUTS"):
        usual, smaller = SMALLER[name]
        (cell,) = [cell for cell in notebook.cells if usual in cell.source]
        cell.source = cell.source.replace(usual, smaller)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env=variables(hub, tmp_path))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2, "an article has pictures"
    printed = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    for wanted in SAYS[name]:
        assert wanted in printed, f"{name} does not say {wanted!r}:\n{printed}"
    if kept := os.environ.get("NOTEBOOK_OUTPUTS"):
        for cell in notebook.cells:
            tidy(cell)
        notebook.metadata.pop("widgets", None)
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, Path(kept) / f"{name}.ipynb")


SAYS = {
    "segment_and_look_inside": ["answer: ", "purple", "lost without it", "largest difference"],
    "train_on_your_own_masks": ["16 of 16 rows have a trace", "gIoU", "'model.safetensors'", "'README.md'"],
    "judge_a_white_box": ["scenes were examined", "its colour is"],
}


def tidy(cell):
    """Keep what a reader wants to see: prints and pictures, small; no progress bars, no times of this run."""
    cell.metadata.clear()
    if cell.cell_type != "code":
        return
    cell.execution_count = None
    kept = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name != "stdout":
            continue
        if "image/png" in output.get("data", {}):
            output.data = {"image/png": small(output.data["image/png"])}
            output.metadata = {}
        elif output.output_type in ("display_data", "execute_result") and "text/html" in output.data:
            continue
        if output.output_type == "execute_result":
            output.execution_count = None
        kept.append(output)
    cell.outputs = kept


def small(png):
    """A PNG of at most 256 colours, as text."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def test_notebooks_are_small_and_name_nothing_of_this_machine():
    assert sum((FOLDER / f"{name}.ipynb").stat().st_size for name in NOTEBOOKS) <= BUDGET
    for name in NOTEBOOKS:
        text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
        assert not any(word in text for word in ("/tmp/", "/home/", "/root/", "127.0.0.1")), name
        for cell in json.loads(text)["cells"]:
            source = "".join(cell["source"])
            assert cell["cell_type"] == "markdown" or "import tests" not in source and "from tests" not in source
            for output in cell.get("outputs", ()):
                assert output["output_type"] != "error" and output.get("name") != "stderr", name


def test_every_notebook_is_told_what_it_must_say():
    assert set(SAYS) == set(NOTEBOOKS)
