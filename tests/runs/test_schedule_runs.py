import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from maskgit_pl import runs
from maskgit_pl.errors import PreemptedError


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces ``subprocess.run``, and returns the list of the commands."""
    called: list[list[str]] = []

    def run(words: list[str], *, check: bool) -> SimpleNamespace:
        called.append(words)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    return called


def test_every_schedule_gets_a_run_of_its_own_on_shared_tokens(commands: list[list[str]], tmp_path: Path) -> None:
    folders = runs.train_schedules(
        ["cosine", "square"], names="paper-256", dataset="shoes", runs=tmp_path, overrides={"trainer.max_steps": 3}
    )
    assert folders == [tmp_path / "shoes-paper-256-cosine", tmp_path / "shoes-paper-256-square"]
    assert [words[:3] for words in commands] == [[sys.executable, "-m", "maskgit_pl"]] * 4
    shared = [
        "--recipe",
        "paper-256 square",
        "--dataset",
        "shoes",
        "--run",
        "shoes-paper-256-square",
        "--runs-folder",
        str(tmp_path),
    ]
    assert commands[2][3:] == ["tokenize", *shared]
    assert commands[3][3:] == ["train", "transformer", *shared, "--cluster", "single", "--trainer.max_steps=3"]


def test_all_recipes_are_read_before_the_first_run(commands: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="recipe 'squar'"):
        runs.train_schedules(["cosine", "squar"], runs=tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.max_step"):
        runs.train_schedules(["cosine"], runs=tmp_path, overrides={"trainer.max_step": 3})
    assert commands == []


@pytest.mark.parametrize(
    ("code", "kind"), [(PreemptedError.exit_code, PreemptedError), (1, ValueError)], ids=["preempted", "failed"]
)
def test_a_run_that_stops_stops_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda words, check: calls.append(words) or SimpleNamespace(returncode=code))
    with pytest.raises(kind, match=r"ablation cosine: .*repeat the command to resume"):
        runs.train_schedules(["cosine", "square"], runs=tmp_path)
    assert len(calls) == 1
