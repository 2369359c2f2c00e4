"""Files that are there entirely or not at all, and JSON of which no byte changes unnoticed."""

import json
import multiprocessing
import resource
import signal

import pytest

from segcompass.journal import Journal
from segcompass.modeling_segcompass.whole_files import PART, append_whole, read_signed_json, signed_json, write_whole


def _in_little_room(work, said):
    """Run where no file may grow beyond 4 kB, as on a full disk; a process of its own, since limits stay."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        work()
        said.put("done")
    except OSError as error:
        said.put(str(error))


def in_little_room(work):
    context = multiprocessing.get_context("fork")
    said = context.Queue()
    process = context.Process(target=_in_little_room, args=(work, said))
    process.start()
    text = said.get(timeout=60)
    process.join()
    return text


def test_a_full_disk_leaves_the_old_file_and_says_what_to_do(tmp_path):
    path = tmp_path / "metrics.json"
    write_whole(path, "old")
    assert "disk is full while writing" in (said := in_little_room(lambda: write_whole(path, "n" * 9000)))
    assert "metrics.json" in said and "repeat the command" in said
    assert path.read_text() == "old" and not list(tmp_path.glob(f"{PART}*"))
    write_whole(path, "n" * 9000)
    assert path.stat().st_size == 9000


def test_a_journal_on_a_full_disk_keeps_its_lines_and_goes_on(tmp_path):
    record = {"sample_id": "a", "text": "x" * 3000}
    Journal(tmp_path, {}).add([record])

    def more():
        Journal(tmp_path, {}).add([{**record, "sample_id": "b"}])

    assert "items.jsonl" in in_little_room(more)
    assert list(Journal(tmp_path, {}).records) == ["a"]
    more()
    assert list(Journal(tmp_path, {}).records) == ["a", "b"]


def test_lines_are_added_all_or_none(tmp_path):
    path = tmp_path / "lines"
    append_whole(path, "a\n" * 1500)
    assert "disk is full" in in_little_room(lambda: append_whole(path, "b\n" * 1500))
    assert path.read_text() == "a\n" * 1500


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    write_whole(tmp_path / "a.txt", b"old")

    def half(part):
        part.write_text("ha")
        raise KeyError("lf")

    with pytest.raises(KeyError):
        write_whole(tmp_path / "a.txt", half)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_signed_json_notices_each_byte(tmp_path):
    content = {"rows": 12, "name": "mine", "parts": [1.5, None, True], "text": "ä"}
    path = tmp_path / "note.json"
    whole = (signed_json(content) + "\n").encode()
    path.write_bytes(whole)
    assert read_signed_json(path) == content
    silent = 0
    for place in range(len(whole)):
        for other in (whole[place] ^ 1, whole[place] ^ 4):
            path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
            try:
                silent += read_signed_json(path) != content
            except ValueError as error:
                assert "note.json cannot be read" in str(error)
    assert silent == 0
    path.write_text(json.dumps(content))
    assert read_signed_json(path) == content  # as earlier versions wrote it


def test_a_journal_names_the_line_of_which_a_digit_changed(tmp_path):
    Journal(tmp_path, {}).add([{"sample_id": "a", "I": 12}, {"sample_id": "b", "I": 34}])
    path = tmp_path / "items.jsonl"
    path.write_text(path.read_text().replace("34", "35"))
    with pytest.raises(ValueError, match="items.jsonl, line 2 is damaged .*checksum differs"):
        Journal(tmp_path, {})
