"""Folders that appear when all of them is on disk, and locks against other writers."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from maskgit_pl.files import write_text
from maskgit_pl.folders import check_only_known, hold_lock, replace_folder, resolve_folder, write_folder
from tests.forked import holder


def test_a_folder_takes_its_place_when_all_of_it_is_on_disk(tmp_path: Path, monkeypatch) -> None:
    folder, synced = tmp_path / "above" / "folder", []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    for text in ("old", "new"):
        with write_folder(folder) as fresh:
            assert fresh.parent == folder.parent
            (fresh / "inner").mkdir()
            (fresh / "inner" / "file").write_text(text)
            assert not folder.exists() or (folder / "inner" / "file").read_text() == "old"
        assert (folder / "inner" / "file").read_text() == text
        assert list(folder.parent.iterdir()) == [folder]
        assert synced == ["inner", "file", fresh.name, "above"]
        synced.clear()


@pytest.mark.parametrize("is_in_place", [False, True])
def test_the_older_folder_of_a_killed_swap_is_put_back(tmp_path: Path, is_in_place: bool) -> None:
    folder, old, other = tmp_path / "[a]", tmp_path / ".[a].old-17", tmp_path / ".[a].old-17.zip"
    for path in (old, other, *([folder] if is_in_place else [])):
        path.mkdir()
        write_text(path / "file", path.name)
    seen = []

    def look(path: Path) -> None:
        seen.append((path / "file").read_text())

    with pytest.raises(FileNotFoundError), write_folder(folder, check=look) as fresh:
        write_text(fresh / "missing" / "file", "new")
    assert seen == ["[a]" if is_in_place else ".[a].old-17"]
    assert (folder / "file").read_text() == seen[0]
    assert {path.name for path in tmp_path.iterdir()} == {"[a]", other.name}


def test_a_folder_replaces_an_empty_one_and_those_of_killed_processes(tmp_path: Path) -> None:
    folder, others = tmp_path / "[a]", [".[a]b.partial-17", ".a.partial-17", ".[a].partial-17.zip"]
    folder.mkdir()
    for name in (".[a].partial-17", ".[a].partial-0f", *others):  # also of a process whose PID is another one's now
        (tmp_path / name).mkdir()
        write_text(tmp_path / name / "half", "")
    with write_folder(folder) as fresh:
        write_text(fresh / "file", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"[a]", *others}
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_link_to_a_folder_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    folder, link = tmp_path / "disk" / "folder", tmp_path / "link"
    folder.mkdir(parents=True)
    link.symlink_to("disk/folder")
    write_text(folder / "old", "")
    with write_folder(link) as fresh:
        assert fresh.parent == folder.parent
        write_text(fresh / "file", "new")
    assert link.is_symlink()
    shutil.copytree(folder, fresh)
    write_text(fresh / "more", "new")
    replace_folder(fresh, link)
    assert link.is_symlink()
    assert sorted(path.name for path in folder.iterdir()) == ["file", "more"]


def test_a_folder_that_cannot_be_renamed_is_refused_before_any_work(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for path in ("", ".", "..", tmp_path, *["/"] * (os.getuid() == 0)):
        with pytest.raises(ValueError, match=r"--out must be a folder that a new one can replace, got /.*; name a f"):
            resolve_folder("--out", Path(path))
    assert resolve_folder("--out", Path("new")) == tmp_path / "inner" / "new"


def test_files_of_others_are_named_and_links_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    check_only_known(folder, {"a"})
    for name in ("a", "b/a", "b/c", "d", "e"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(folder / name, "")
    (folder / "f").symlink_to(tmp_path)
    check_only_known(folder, {"a", "b/a", "b/c", "d", "e", "f"})
    with pytest.raises(FileExistsError, match=r"got also b/a, f; move them, or name a new folder"):
        check_only_known(folder, {"a", "b/c", "d", "e"})
    with pytest.raises(FileExistsError, match=r"got also [\w/]+, [\w/]+, [\w/]+; move them"):
        check_only_known(folder, set())


def test_a_target_of_another_process_is_refused_by_its_number_and_host(tmp_path: Path) -> None:
    target = tmp_path / "run" / "tokenizer"
    (tmp_path / "link").symlink_to("run/tokenizer")
    with holder(target) as other:
        rule = rf"in use by process {other.pid} on {socket.gethostname()} since .*; wait .*, or give another path"
        for path in (target, tmp_path / "link", tmp_path / "run" / ".." / "run" / "tokenizer"):
            with pytest.raises(ValueError, match=rule), write_folder(path):
                pass
        with hold_lock(target, hint="", rank=1):  # of those that share the work on it
            pass
        assert other.stdin is not None
        other.stdin.close()
        assert other.wait() == 0
    with hold_lock(target, hint=""):
        assert os.listdir(target.parent) == [".tokenizer.lock"]
    assert os.listdir(tmp_path) == ["link"]  # no lock file and no new folder is left


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_a_killed_process_leaves_no_lock_even_if_its_children_live(tmp_path: Path, how: str) -> None:
    target = tmp_path / "tokens"
    with holder(target, how) as other:
        other.kill()
        other.wait()
        assert (tmp_path / ".tokens.lock").exists()
        with hold_lock(target, hint=""):
            pass
    assert os.listdir(tmp_path) == []


def test_the_text_of_a_lock_file_is_no_lock_and_printed_safely(tmp_path: Path) -> None:
    path, holder_text = tmp_path / "a", "process 1 on \x1b[31mmoon"
    (tmp_path / ".a.lock").write_text(holder_text)
    with hold_lock(path, hint=""):
        (tmp_path / ".a.lock").write_text(holder_text)
        with pytest.raises(ValueError, match=r"in use by process 1 on \\x1b\[31mmoon; wait"), hold_lock(path, hint=""):
            pass
