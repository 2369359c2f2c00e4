"""Processes that talk to the Hub on localhost (tests/support/hub_server.py) with the real client."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_localtoken"


def environment(url, home, token=TOKEN):
    """What a user of this Hub has set: nothing of this process's, and the client's cache in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | ours | ({"HF_TOKEN": token} if token else {})


def finish(process):
    """The process's output; what it wrote to stderr if it failed."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out


class LocalHub(SimpleNamespace):
    """url, folder (for caches), log and hold of one running server."""

    def start(self, code, *arguments, token=TOKEN, project=True, home="home", cwd=None):
        """Run Python code against the Hub; without `project` where this project cannot be imported."""
        variables = environment(self.url, self.folder / home, token)
        if project:
            variables["PYTHONPATH"] = str(ROOT)
            options = []
        else:
            libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
            code = f"import sys; sys.path += {libraries!r}\n{ALONE}\n{code}"
            options = ["-I", "-S"]  # neither the working folder nor an editable install can be imported
        return subprocess.Popen(
            [sys.executable, *options, "-c", code, *map(str, arguments)],
            env=variables,
            cwd=cwd or self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code, *arguments, **options):
        """The last line that the code printed, read as JSON."""
        return json.loads(finish(self.start(code, *arguments, **options)).splitlines()[-1])

    def requests(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@contextmanager
def local_hub(folder):
    """A Hub in a process of its own, whose log and clients' caches are kept in a folder."""
    log, hold = folder / "requests.log", folder / "hold"
    server = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "tests" / "support" / "hub_server.py"),
            "--token",
            TOKEN,
            "--log",
            log,
            "--hold",
            hold,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield LocalHub(url=server.stdout.readline().strip(), folder=folder, log=log, hold=hold)
    finally:
        server.terminate()
        server.wait()


ALONE = """
import importlib.util
for name in ("segcompass", "modeling_segcompass", "trainers", "loaders", "hub_cards"):
    assert importlib.util.find_spec(name) is None, f"{name} can be imported here"
import torch
torch.set_num_threads(1)
"""
