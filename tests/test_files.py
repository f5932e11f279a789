import errno
import os
import socket
from pathlib import Path

import pytest

from maskgit_pl.files import locked, read_json
from tests.holding import holder


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[1]",
        b'"text"',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 1, "a": 2}',
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b'{"a": ' * 50_000 + b"1" + b"}" * 50_001,
        b'{"a": ' + b"9" * 10_000 + b"}",
        b'{"a": "' + b"x" * 1_000_000 + b'"}',
    ],
)
def test_json_of_a_stranger_is_refused_in_one_line_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read_json(file)
    assert "\n" not in str(caught.value)


def test_a_fifo_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="must be a regular file"):
        read_json(tmp_path / "config.json")


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "config.json")


def test_plain_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": [1, 2.5, null, "x"]}')
    assert read_json(tmp_path / "config.json") == {"a": [1, 2.5, None, "x"]}


def test_a_target_that_another_process_holds_is_refused_by_its_number_and_host(tmp_path: Path) -> None:
    target = tmp_path / "run" / "tokenizer"
    with holder(target) as other:
        rule = (
            rf"tokenizer is in use by process {other.pid} on {socket.gethostname()} since .*; wait .*, or name another"
        )
        with pytest.raises(ValueError, match=rule), locked(target, way_out="name another"):
            pass
        with locked(target, way_out="", rank=1):  # of those that share the work on it
            pass
        assert other.stdin is not None
        other.stdin.close()
        assert other.wait() == 0
    with locked(target, way_out=""):
        assert os.listdir(target.parent) == [".tokenizer.lock"]
    assert os.listdir(tmp_path) == []  # the lock leaves nothing behind, folders that it made included


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_a_killed_process_leaves_no_lock_that_blocks_even_if_its_children_live(tmp_path: Path, how: str) -> None:
    target = tmp_path / "tokens"
    with holder(target, how) as other:
        other.kill()
        other.wait()
        assert (tmp_path / ".tokens.lock").exists()
        with locked(target, way_out=""):
            pass
    assert os.listdir(tmp_path) == []


def test_what_a_lock_file_says_is_not_believed_and_printed_without_control_characters(tmp_path: Path) -> None:
    said = "process 1 on \x1b[31mmoon"
    (tmp_path / ".a.lock").write_text(said)
    with locked(tmp_path / "a", way_out="x"):
        (tmp_path / ".a.lock").write_text(said)
        with (
            pytest.raises(ValueError, match=r"in use by process 1 on \[31mmoon; wait"),
            locked(tmp_path / "a", way_out=""),
        ):
            pass


def test_where_no_lock_file_can_be_made_nothing_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskgit_pl.files._open_lock", lambda path: None)  # root may write to every folder
    with locked(tmp_path / "a", way_out="x"), locked(tmp_path / "a", way_out="x"):
        assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path / "a", way_out="x"):
        pass
    assert "this file system has no locks" in caplog.text
