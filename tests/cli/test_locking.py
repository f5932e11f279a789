"""Two processes that would write to one run, token store, file of images, data folder or export."""

from pathlib import Path

import pytest

from maskgit_pl.cli import main
from tests.conftest import tiny_flags
from tests.forked import holder


@pytest.fixture
def is_refused(maskgit):
    """Checks that a command ends with one line while another process holds the target, and runs afterwards."""

    def check(words: list[str], target: Path, *, rank: int | None = None) -> None:
        with holder(target, rank=rank) as other:
            answer = maskgit(*words)
            assert answer.code == 2
            assert f"{target} is in use by process {other.pid} on " in answer.error
            assert len(answer.error.splitlines()) == 1
        assert maskgit(*words).code == 0
        assert not list(target.parent.glob(".*.lock"))

    return check


@pytest.fixture
def training(tiny_shards: Path, tmp_path: Path) -> list[str]:
    """The words of a short training."""
    where = [f"--data={tiny_shards}", f"--runs-folder={tmp_path}", "--run=one"]
    return ["train", "tokenizer", *where, *tiny_flags("tokenizer")]


@pytest.mark.slow
def test_a_run_and_its_export_have_one_process(is_refused, training, tmp_path):
    is_refused(training, tmp_path / "one" / "tokenizer")
    is_refused(["export", str(tmp_path / "one"), f"--out={tmp_path / 'out'}"], tmp_path / "out")


def test_a_data_folder_has_one_process(is_refused, tiny_shards, tmp_path):
    is_refused(["data", "make", str(tiny_shards.parent / "images"), f"--out={tmp_path / 'out'}"], tmp_path / "out")


def test_a_token_store_has_one_process_of_each_rank(is_refused, tiny_shards, tiny_pretrained, tmp_path, monkeypatch):
    def launch(rank: int, world_size: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))

    where = [f"--data={tiny_shards}", f"--runs-folder={tmp_path}", "--run=one"]
    words = ["tokenize", *where, f"--tokenizer={tiny_pretrained / 'tokenizer'}", "--part-size=10"]
    launch(1, 3)
    assert main(words) == 0
    (store,) = (tmp_path / "tokens").iterdir()
    with holder(store, rank=0):
        launch(1, 2)
        assert main(words) == 0  # it shares the work
    launch(0, 2)
    is_refused(words, store, rank=0)
    assert (store / "store.json").is_file()
