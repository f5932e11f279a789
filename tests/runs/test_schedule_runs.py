from pathlib import Path

import pytest

from maskgit_pl import runs
from maskgit_pl.errors import PreemptedError
from maskgit_pl.runs import ablation_plan


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces ``run_maskgit``, and returns the list of the commands."""
    called: list[list[str]] = []

    def run(words: list[str]) -> tuple[int, bool]:
        called.append(words)
        return 0, False

    monkeypatch.setattr(ablation_plan, "run_maskgit", run)
    return called


def test_every_schedule_gets_a_run_of_its_own_on_shared_tokens(commands: list[list[str]], tmp_path: Path) -> None:
    folders = runs.train_schedules(
        ["cosine", "square"], names="paper-256", dataset="shoes", runs=tmp_path, overrides={"trainer.max_steps": 3}
    )
    assert folders == [tmp_path / "shoes-paper-256-cosine", tmp_path / "shoes-paper-256-square"]
    assert len(commands) == 4
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
    assert commands[2] == ["tokenize", *shared, "--trainer.max_steps=3"]
    assert commands[3] == ["train", "transformer", *shared, "--cluster", "single", "--trainer.max_steps=3"]


def test_all_recipes_are_read_before_the_first_run(commands: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="recipe 'squar'"):
        runs.train_schedules(["cosine", "squar"], runs=tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.max_step"):
        runs.train_schedules(["cosine"], runs=tmp_path, overrides={"trainer.max_step": 3})
    assert commands == []


@pytest.mark.parametrize(
    ("code", "is_stopped", "kind"),
    [(PreemptedError.exit_code, False, PreemptedError), (0, True, PreemptedError), (1, False, ValueError)],
    ids=["preempted", "stopped", "failed"],
)
def test_a_run_that_stops_stops_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, is_stopped: bool, kind: type[Exception]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(ablation_plan, "run_maskgit", lambda words: calls.append(words) or (code, is_stopped))
    with pytest.raises(kind, match=r"ablation cosine: .*repeat the command to resume"):
        runs.train_schedules(["cosine", "square"], runs=tmp_path)
    assert len(calls) == 1
