import errno
import os
import socket
from pathlib import Path

import pytest

from maskgit_pl.data.folders import hold_lock
from tests.holding import holder


def test_a_target_that_another_process_holds_is_refused_by_its_number_and_host(tmp_path: Path) -> None:
    target = tmp_path / "run" / "tokenizer"
    with holder(target) as other:
        rule = (
            rf"tokenizer is in use by process {other.pid} on {socket.gethostname()} since .*; wait .*, or name another"
        )
        with pytest.raises(ValueError, match=rule), hold_lock(target, hint="name another"):
            pass
        with hold_lock(target, hint="", rank=1):  # of those that share the work on it
            pass
        assert other.stdin is not None
        other.stdin.close()
        assert other.wait() == 0
    with hold_lock(target, hint=""):
        assert os.listdir(target.parent) == [".tokenizer.lock"]
    assert os.listdir(tmp_path) == []  # no lock file and no new folder is left


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_a_killed_process_leaves_no_lock_that_blocks_even_if_its_children_live(tmp_path: Path, how: str) -> None:
    target = tmp_path / "tokens"
    with holder(target, how) as other:
        other.kill()
        other.wait()
        assert (tmp_path / ".tokens.lock").exists()
        with hold_lock(target, hint=""):
            pass
    assert os.listdir(tmp_path) == []


def test_what_a_lock_file_says_is_not_believed_and_printed_without_control_characters(tmp_path: Path) -> None:
    said = "process 1 on \x1b[31mmoon"
    (tmp_path / ".a.lock").write_text(said)
    with hold_lock(tmp_path / "a", hint="x"):
        (tmp_path / ".a.lock").write_text(said)
        with (
            pytest.raises(ValueError, match=r"in use by process 1 on \[31mmoon; wait"),
            hold_lock(tmp_path / "a", hint=""),
        ):
            pass


def test_a_path_that_cannot_be_locked_is_told_and_no_marker_file_takes_the_place_of_the_lock(
    tmp_path, monkeypatch, caplog
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with hold_lock(tmp_path / "a", hint="x"), hold_lock(tmp_path / "a", hint="x"):
        pass
    assert "cannot be locked (Function not implemented)" in caplog.text
