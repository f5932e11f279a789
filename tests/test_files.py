import errno
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from maskgit_pl.files import read_json, write_atomically, write_tensors


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


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_what_is_written_has_the_permissions_of_any_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "tensors", {"a": torch.ones(2)})
        write_tensors(tmp_path / "tensors", {"a": torch.ones(3)})
        with write_atomically(tmp_path / "bytes") as file:
            file.write(b"a")
    finally:
        os.umask(before)
    assert {path.name for path in tmp_path.iterdir()} == {"tensors", "bytes"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_tensors_that_cannot_be_written_leave_the_older_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "model.safetensors"
    write_tensors(file, {"a": torch.ones(2)})
    before = file.read_bytes()

    def fail(*given: object, **named: object) -> None:
        raise SafetensorError("IoError")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    for free, code in ((10**12, errno.EIO), (0, errno.ENOSPC)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(OSError, match="IoError; it needs 12 bytes, ") as caught:
            write_tensors(file, {"a": torch.ones(3)})
        assert caught.value.errno == code
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == before
