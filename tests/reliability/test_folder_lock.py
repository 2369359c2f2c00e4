"""One writer to a folder; the second is told who holds it."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from segcompass.journal import Journal
from segcompass.loaders.folder_lock import HOLDER, LOCK, FolderHeldError, folder_lock
from segcompass.modeling_segcompass.image_encoder import Frame
from segcompass.modeling_segcompass.whole_files import PART
from segcompass.trainers.image_features import ImageFeatureWriter

HOLD = """
import sys
from segcompass.loaders.folder_lock import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds a folder; it leaves when its input ends, or is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_writer_is_told_who_holds_the_folder_and_a_killed_one_holds_nothing(other, tmp_path):
    said = rf"run is being written by process {other.pid} on host {socket.gethostname()} since \d{{4}}-"
    writers = {
        "lock": lambda: folder_lock(tmp_path / "run").__enter__(),
        "journal": lambda: Journal(tmp_path / "run", {}),
        "features": lambda: ImageFeatureWriter(tmp_path / "run", "an encoder", Frame(32)),
    }
    for name, write in writers.items():
        with pytest.raises(FolderHeldError, match=said):
            write()
        assert not (tmp_path / "run" / "run.json").exists(), name
    (tmp_path / "run" / f"{PART}1-half.pt").write_bytes(b"half")
    other.kill()
    other.wait()
    with folder_lock(tmp_path / "run"), folder_lock(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / HOLDER).read_text()
        assert not list((tmp_path / "run").glob(f"{PART}*"))  # what the killed one had half written
        assert (tmp_path / "run" / LOCK).exists()
    assert not list((tmp_path / "run").iterdir())


def test_another_thread_is_another_writer(tmp_path):
    said = []

    def write():
        try:
            with folder_lock(tmp_path):
                said.append("wrote")
        except FolderHeldError as error:
            said.append(str(error))

    with folder_lock(tmp_path):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    write()
    assert f"process {os.getpid()}" in said[0] and said[1] == "wrote"


def test_a_journal_that_is_gone_holds_nothing(tmp_path):
    journal = Journal(tmp_path, {"a": 1})
    journal.add([{"sample_id": "x"}])
    assert (tmp_path / LOCK).exists()
    del journal
    assert not (tmp_path / LOCK).exists()
