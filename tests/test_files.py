"""Files are written whole or not at all, and files of strangers are read within limits."""

import errno
import hashlib
import itertools
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl.errors import exit_code_of
from maskgit_pl.files import (
    check_writable,
    parse_yaml,
    read_json,
    read_yaml,
    remove_partials,
    sha256_of,
    sync,
    write_atomically,
    write_tensors,
    write_text,
)
from maskgit_pl.folders import replace_folder, resolve_folder, write_folder
from maskgit_pl.text import parse_size


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
def test_json_of_a_stranger_is_refused_with_the_name_of_the_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read_json(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_any_new_file(tmp_path: Path, mask: int) -> None:
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


def test_a_file_is_there_when_all_is_written_and_never_half(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_text(file, "grün")
    with write_atomically(file) as stream:
        stream.write(b"new")
        assert file.read_bytes() == "grün".encode()
        assert len(list(tmp_path.iterdir())) == 2
    assert file.read_bytes() == b"new"
    with pytest.raises(TypeError), write_atomically(file) as stream:
        stream.writelines([b"newer", None])
    assert file.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [file]


WRITES = {
    "bytes": lambda path: write_text(path, "x" * 9000),
    "array": lambda path: save_array(path, np.zeros(8184, np.uint8)),  # 8,312 bytes with the header
    "tensors": lambda path: write_tensors(path, {"a": torch.zeros(9000)}),
}


def save_array(path: Path, array: np.ndarray) -> None:
    with write_atomically(path) as file:
        np.save(file, array)


@pytest.mark.parametrize("kind", WRITES)
def test_a_disk_that_ends_within_a_file_leaves_no_part_of_it(tmp_path: Path, kind: str) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path; from tests.test_files import WRITES\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "try: WRITES[sys.argv[1]](Path(sys.argv[2]))\n"
        "except OSError as error: print(error.errno, error.filename)"
    )
    done = subprocess.run([sys.executable, "-c", code, kind, tmp_path / "file"], capture_output=True, text=True)
    number, _, name = done.stdout.strip().partition(" ")
    assert exit_code_of(OSError(int(number), "")) == 74, done.stderr
    assert name == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("call", "number"), [("fsync", errno.EIO), ("replace", errno.EXDEV)])
@pytest.mark.parametrize("kind", WRITES)
def test_errors_of_a_failing_disk_have_the_name_of_the_file(
    tmp_path: Path, monkeypatch, call: str, number: int, kind: str
) -> None:
    def fail(*arguments: object) -> None:
        paths = [os.fspath(each) for each in arguments if isinstance(each, str | Path)]
        raise OSError(number, os.strerror(number), *paths[:1])

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=rf"{os.strerror(number)}: '{tmp_path}/file'") as caught:
        WRITES[kind](tmp_path / "file")
    assert exit_code_of(caught.value) == 74
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
@pytest.mark.parametrize("kind", WRITES)
def test_a_file_system_without_fsync_takes_files_and_folders(tmp_path: Path, monkeypatch, number: int, kind: str):
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    WRITES[kind](tmp_path / "file")
    sync(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_only_partial_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    kept = {".hidden", "a.partial", ".a.partial", ".a.0f.partial", f"a.{'0' * 32}.partial"}
    first, second = (f".{name}.{'0f' * 16}.partial" for name in ("a[1].npz", "a1.npz"))
    for name in {*kept, first, second}:
        (tmp_path / name).touch()
    remove_partials(tmp_path, "a[1].npz")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, second}
    remove_partials(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_fifo_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    with pytest.raises(ValueError, match="must be a regular file"):
        read_json(tmp_path / "fifo.json")
    for path, kind in ((tmp_path / "fifo.json", "a FIFO"), (tmp_path, "a folder")):
        with pytest.raises(OSError, match=f"must be a regular file, got {kind}"):
            sha256_of(path)


def test_a_hash_is_that_of_the_whole_file_by_name_or_descriptor(tmp_path: Path) -> None:
    content = os.urandom(3 * 2**20 + 1)
    (tmp_path / "file").write_bytes(content)
    (tmp_path / "link").symlink_to("file")
    expected = hashlib.sha256(content).hexdigest()
    assert sha256_of(tmp_path / "file") == sha256_of(str(tmp_path / "link")) == expected
    with open(tmp_path / "file", "rb") as file:
        file.seek(5)
        assert sha256_of(file.fileno()) == expected


def test_a_path_is_checked_before_any_work_and_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_writable("--out", tmp_path / "new" / "a.png")
    check_writable("--out", tmp_path / "new", is_folder=True)
    with pytest.raises(ValueError, match="--out must be a folder, got the file"):
        check_writable("--out", tmp_path / "file", is_folder=True)
    with pytest.raises(ValueError, match="--out must be a file, got the folder"):
        check_writable("--out", tmp_path)
    with pytest.raises(ValueError, match="--out must be in a writable folder"):
        check_writable("--out", tmp_path / "file" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


WRITERS_OF_FILES = [
    lambda path: write_text(path, "new"),
    lambda path: write_tensors(path, {"a": torch.zeros(1)}),
    lambda path: check_writable("--out", path),
]
WRITERS_OF_FOLDERS = [
    lambda path: write_folder(path).__enter__(),
    lambda path: replace_folder(path.with_name("fresh"), path),
    lambda path: check_writable("--out", path, is_folder=True),
    lambda path: resolve_folder("--out", path),
]


@pytest.mark.parametrize(
    ("make", "writers"),
    [
        (os.mkfifo, WRITERS_OF_FILES + WRITERS_OF_FOLDERS),
        (os.mkdir, WRITERS_OF_FILES),
        (Path.touch, WRITERS_OF_FOLDERS),
    ],
)
def test_nothing_of_another_kind_is_replaced(tmp_path: Path, make: Callable, writers: Sequence[Callable]) -> None:
    """A user who may write to /dev would lose /dev/null."""
    (tmp_path / "fresh").mkdir()
    make(tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    before = sorted((each, each.lstat().st_mode) for each in tmp_path.iterdir())
    for name, write in itertools.product(("there", "link"), writers):
        with pytest.raises(ValueError, match=r"must be a (file|folder), got the .*; give another path"):
            write(tmp_path / name)
        assert sorted((each, each.lstat().st_mode) for each in tmp_path.iterdir()) == before


@pytest.mark.parametrize("write", [write_text, lambda path, text: write_tensors(path, {text: torch.zeros(1)})])
def test_a_link_to_a_file_stays_and_its_target_is_written(tmp_path: Path, write: Callable) -> None:
    (tmp_path / "disk").mkdir()
    file, link = tmp_path / "disk" / "file", tmp_path / "link"
    link.symlink_to("disk/file")
    for text in ("new", "newer"):  # the target is missing, then it is there
        check_writable("--out", link)
        write(link, text)
        assert link.is_symlink()
        assert text.encode() in file.read_bytes()
    with write_atomically(link) as stream:  # the partial file is on the disk of the target
        stream.write(b"newest")
        assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}
    assert {path.name for path in tmp_path.rglob("*")} == {"disk", "file", "link"}


def test_a_link_to_a_missing_disk_is_refused_and_makes_no_folder(tmp_path: Path) -> None:
    for name, target in (("link", "disk/one"), ("folder", "disk"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    before = sorted(tmp_path.rglob("*"))
    for name in ("link", "folder/one", "folder/one/two", "loop"):
        for write in WRITERS_OF_FILES + WRITERS_OF_FOLDERS:
            with pytest.raises(ValueError, match=r"must lead to a folder that exists, got .*; make that folder, or"):
                write(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: &x [1, 1]\nb: [*x, *x]", "aliases are not allowed"),
        ("model: {mask_schedule: cosine}\nmodel: {}", "appears twice"),
        ("model:\n\tmask_schedule: cosine", "recipe.yaml"),
        ("- 1\n- 2", "must be a mapping, got"),
        ("model: {class_path: os.system}", "model.class_path cannot be set"),
        ("trainer: {callbacks: [{class_path: a.B}]}", "trainer.callbacks.class_path cannot be set"),
        ("1: 2", "the key 1 is not a string"),
        ("model: {a: .nan}", "model.a must be finite"),
        ("model: {a: 2020-01-01}", "model.a must be a number, a word, a list or a mapping"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("a: " + "[" * 30 + "]" * 30, "nested too deep"),
        ("a: " + "9" * 5000, "recipe.yaml"),
        ("a: b: c", r"line 1, column 5: mapping values are not allowed here"),
        ("model: !!python/object/apply:os.system [echo]", "recipe.yaml"),
        ("a: !!map [1]", "column 4: tags such as !!str are not allowed in recipes"),
        ("a: !!bool x", "tags such as !!str"),
        ("a: !!timestamp x", "tags such as !!str"),
        ("a: " + "x" * 200_001, "at most 200 kB"),
    ],
)
def test_an_unsafe_recipe_is_refused_by_name(tmp_path, text, rule):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=rule) as caught:
        read_yaml(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("-07", -7), ("0x1F", 31), ("0b11", 3), ("1_000", 1000), ("12:30", "12:30"), ("1:30.5", "1:30.5"),
     ("1e-3", 0.001), ("1.5", 1.5), ("+5", 5)],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text, value):
    assert repr(parse_yaml(text)) == repr(value)


@pytest.mark.parametrize(("text", "size"), [("80GB", 80e9), ("24GiB", 24 * 2**30), ("1.5 T", 1.5e12), ("4e10", 4e10)])
def test_a_size_is_decimal_or_binary_by_its_unit(text, size):
    assert parse_size(text) == size
