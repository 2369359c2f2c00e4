"""A Hub on localhost in a process of its own."""

import subprocess
import sys

import pytest

from tests.support.hub_client import ROOT, TOKEN, LocalHub


@pytest.fixture(scope="package")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
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
    yield LocalHub(url=server.stdout.readline().strip(), folder=folder, log=log, hold=hold)
    server.terminate()
    server.wait()
