"""Two processes that would write to one run, token store, file of images, data folder or export."""

import signal
import time
from pathlib import Path

import pytest

from maskgit_pl.cli import main
from tests import forked
from tests.conftest import tiny_flags
from tests.holding import holder


def training(shards: Path, runs: Path, *more: str) -> list[str]:
    """The words of a short training."""
    where = [f"--data={shards}", f"--runs-folder={runs}", "--run=one"]
    return ["train", "tokenizer", *where, *tiny_flags("tokenizer"), *more]


def is_refused(words: list[str], target: Path, capsys: pytest.CaptureFixture[str], *, rank: int | None = None) -> None:
    """Checks that the command ends with one line while another process holds the target, and runs afterwards."""
    with holder(target, rank=rank) as other:
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"{target} is in use by process {other.pid} on " in error
        assert len(error.splitlines()) == 1
    assert main(words) == 0
    assert not list(target.parent.glob(".*.lock"))


def test_a_run_that_is_trained(tiny_shards, tmp_path, capsys):
    is_refused(training(tiny_shards, tmp_path), tmp_path / "one" / "tokenizer", capsys)


def test_a_token_store_that_is_made_by_the_same_rank(tiny_shards, tiny_pretrained, tmp_path, capsys):
    where = [f"--data={tiny_shards}", f"--runs-folder={tmp_path}", "--run=one"]
    words = ["tokenize", *where, f"--tokenizer={tiny_pretrained / 'tokenizer'}", "--part-size=10"]
    assert main([*words, "--rank=1", "--world-size=3"]) == 0
    (store,) = (tmp_path / "tokens").iterdir()
    with holder(store, rank=0):
        assert main([*words, "--rank=1", "--world-size=2"]) == 0  # it shares the work
    is_refused([*words, "--rank=0", "--world-size=2"], store, capsys, rank=0)
    assert (store / "store.json").is_file()


def test_a_file_of_images_that_is_made_by_the_same_rank(tiny_pretrained, tmp_path, capsys):
    words = ["sample", str(tiny_pretrained), "--num-images=4", f"--out={tmp_path / 'many.npz'}"]
    with holder(tmp_path / "many.npz", rank=1):
        assert main([*words, "--rank=0", "--world-size=2"]) == 0
    is_refused([*words, "--rank=1", "--world-size=2"], tmp_path / "many.npz", capsys, rank=1)
    assert (tmp_path / "many.npz").is_file()


def test_a_data_folder_that_is_made(tiny_shards, tmp_path, capsys):
    words = ["data", "make", str(tiny_shards.parent / "images"), f"--out={tmp_path / 'made'}"]
    is_refused(words, tmp_path / "made", capsys)


@pytest.mark.slow
def test_a_folder_that_a_run_is_exported_to(tiny_shards, tmp_path, capsys):
    assert main(training(tiny_shards, tmp_path)) == 0
    is_refused(["export", str(tmp_path / "one"), f"--out={tmp_path / 'out'}"], tmp_path / "out", capsys)


@pytest.mark.slow
def test_a_second_training_is_refused_and_a_killed_one_blocks_none(tiny_shards, tmp_path):
    endless = training(tiny_shards, tmp_path, "--trainer.max_steps=100000", "--data.num_workers=1")
    with forked.Command(endless) as first:
        begun = time.monotonic()
        while not (tmp_path / "one" / ".tokenizer.lock").exists():
            assert time.monotonic() - begun < 120
            time.sleep(0.1)
        second = forked.run(endless)
        assert second.returncode == 2
        assert f"is in use by process {first.pid} on " in second.stderr
        first.send_signal(signal.SIGKILL)
    assert main(training(tiny_shards, tmp_path)) == 0
