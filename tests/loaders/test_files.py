"""Annotation files: hostile pickles run nothing, damaged files are named."""

import os
import pickle

import pytest

from segcompass.loaders.files import read_json, read_jsonl, read_pickle
from tests.support.refer import python2_pickle

PLAIN = [{"ref_id": 1, "sent": "a café", "ids": [1, 2, -1], "inner": {"x": "y"}}]


class Hostile:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['HOSTILE_MARK']}",)


def test_plain_pickles_of_every_protocol_are_read(tmp_path):
    path = tmp_path / "refs.p"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(PLAIN, protocol))
        assert read_pickle(path) == PLAIN
    path.write_bytes(pickle.dumps([1.5, (1, None), True, {3}, b"x"]))
    assert read_pickle(path) == [1.5, (1, None), True, {3}, b"x"]


def test_python_2_strings_become_text(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(python2_pickle(PLAIN))
    assert read_pickle(path) == PLAIN
    path.write_bytes(b"\x80\x02T\x04\x00\x00\x00caf\xe9.")  # not UTF-8
    assert read_pickle(path) == "café"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_pickle_raises_and_runs_nothing(tmp_path, monkeypatch, protocol):
    mark = tmp_path / "ran"
    monkeypatch.setenv("HOSTILE_MARK", str(mark))
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps([{"ref_id": 1}, Hostile()], protocol))
    with pytest.raises(ValueError, match=r"refs\.p is .*asks for posix\.system, but only plain data is admitted"):
        read_pickle(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists(), "the pickle is hostile indeed"


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1+1'\ntR.",  # protocol 0
        b"(S'1+1'\nibuiltins\neval\n.",  # an INST opcode
        b"\x80\x02U\x04evalP7\n.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension code
    ],
)
def test_other_ways_out_of_plain_data_are_closed(tmp_path, content):
    path = tmp_path / "refs.p"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"refs\.p is truncated or no pickle of plain data"):
        read_pickle(path)


def test_truncated_files_are_named_wherever_they_are_cut(tmp_path):
    pickled, path = pickle.dumps(PLAIN), tmp_path / "refs.p"
    for length in range(len(pickled)):
        path.write_bytes(pickled[:length])
        with pytest.raises(ValueError, match=r"refs\.p is truncated"):
            read_pickle(path)
    path = tmp_path / "instances.json"
    path.write_text('{"images": [{"id": 1')
    with pytest.raises(ValueError, match=r"instances\.json is truncated or no JSON"):
        read_json(path)


def test_json_in_utf8_or_cp1252(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes('{"text": "the man’s café"}'.encode())
    assert read_json(path) == {"text": "the man’s café"}
    path.write_bytes('{"text": "the man’s café"}'.encode("cp1252"))
    assert read_json(path) == {"text": "the man’s café"}


def test_jsonl_of_a_user_is_read_to_its_last_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": 1}\r\n\n{"a": "café"}'.encode())
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"a": "café"})]
    for line, message in (
        (b"[1]", "a line must be a JSON object; this one is a list"),
        (b"{", "Expecting property"),
        (b'{"a": "caf\xe9"}', "is not UTF-8 .byte 0xe9 after 10 bytes"),
    ):
        path.write_bytes(b"{}\n" + line)
        with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{message}"):
            list(read_jsonl(path))


def test_torn_line_of_a_journal_is_left_out_and_repaired(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = '{"a": "café"}\n{"a": 2}\n'.encode()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        lines = [(1, {"a": "café"}), (2, {"a": 2})][: whole[:length].count(b"\n")]
        assert list(read_jsonl(path, journal=True)) == lines and path.stat().st_size == length
        assert list(read_jsonl(path, journal=True, repair=True)) == lines
        assert path.read_bytes() == whole[: whole[:length].rfind(b"\n") + 1]
    path.write_bytes(b'{"a": 1}\n{oops\n{"a": ')
    with pytest.raises(ValueError, match="line 2 is damaged .*delete it and start again"):
        list(read_jsonl(path, journal=True, repair=True))
