"""``maskgit tokenize``: killed at any moment, called again, and what it refuses and tells."""

import re
import signal
import time
from pathlib import Path

import pytest

from maskgit_pl.cli import main
from tests import forked

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NTASKS"
)  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def words(shards: Path, tokenizer: Path, runs: Path, *more: object) -> list[str]:
    where = ("--data", shards, "--tokenizer", tokenizer, "--runs-folder", runs, "--run", "one")
    small = ("--batch-size", 2, "--part-size", 1, "--flip")
    return ["tokenize", *map(str, (*where, *small, *more))]


def content(store: Path) -> dict[str, bytes]:
    assert not list(store.glob(".*"))
    return {path.name: path.read_bytes() for path in store.iterdir()}


@pytest.fixture(scope="module")
def expected(tiny_shards: Path, tiny_pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The store that one process makes undisturbed."""
    runs = tmp_path_factory.mktemp("runs")
    assert main(words(tiny_shards, tiny_pretrained / "tokenizer", runs)) == 0
    return content(runs / "one" / "tokens")


@pytest.mark.slow
def test_a_killed_command_is_gone_on_with_and_makes_the_store_of_an_undisturbed_one(
    environment, tiny_shards, tiny_pretrained, tmp_path, expected
):
    store = tmp_path / "one" / "tokens"
    arguments = words(tiny_shards, tiny_pretrained / "tokenizer", tmp_path)
    process = forked.Command(arguments)
    while len(list(store.glob(".parts-*/*.npy"))) < 30 and process.poll() is None:  # there will be 84
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (store / "store.json").exists()
    assert main(arguments) == 0
    assert content(store) == expected


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (("--rank", 0), "--rank and --world-size must be given together"),
        (("--rank", 2, "--world-size", 2), "--rank must be in [0, 1] with --world-size 2, got 2"),
        (("--part-size", 0), "part_size must be an integer in [1, inf), got 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(environment, tiny_shards, tiny_pretrained, tmp_path, capsys, more, part):
    assert main(words(tiny_shards, tiny_pretrained / "tokenizer", tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert part in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "one" / "tokens" / "store.json").exists()


@pytest.mark.slow
def test_lines_tell_speed_and_rest_where_there_is_no_terminal(
    environment, tiny_shards, tiny_pretrained, tmp_path, capsys
):
    environment.setattr("maskgit_pl.processes._SECONDS_BETWEEN_LINES", 0.0)
    assert main(words(tiny_shards, tiny_pretrained / "tokenizer", tmp_path, "--precision", "bfloat16")) == 0
    lines = capsys.readouterr().out
    assert re.search(r"^tokens of train: 118 of 120 images, \d+ images/s, 0:00:00 left$", lines, re.MULTILINE)
    # 60 x 2 and 24
    assert re.search(r"^\S+tokens/[0-9a-f]{16}: 144 images in [\d.]+ s, \d+ images/s$", lines, re.MULTILINE)
    assert '"precision": "bfloat16"' in (tmp_path / "one" / "tokens" / "store.json").read_text()


@pytest.mark.slow
def test_the_same_command_finds_the_finished_store_and_a_damaged_one_is_made_again(
    environment, tiny_shards, tiny_pretrained, tmp_path
):
    arguments = [word for word in words(tiny_shards, tiny_pretrained / "tokenizer", tmp_path) if word != "--flip"]
    assert main(arguments) == 0
    labels = tmp_path / "one" / "tokens" / "train-labels.npy"
    before, made = labels.read_bytes(), labels.stat().st_mtime_ns
    assert main(arguments) == 0
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    assert labels.stat().st_mtime_ns == made
    labels.write_bytes(before[:-8] + bytes(8))
    assert labels.read_bytes() != before
    assert main(arguments) == 0
    assert labels.read_bytes() == before


@pytest.mark.slow
def test_runs_with_the_same_tokenizer_and_data_share_their_tokens(environment, tiny_shards, tiny_pretrained, tmp_path):
    def run(name: str, *more: str) -> Path:
        own = [word for word in words(tiny_shards, tiny_pretrained / "tokenizer", tmp_path) if word != "--flip"]
        own[own.index("one")] = name
        assert main([*own, *more]) == 0
        return tmp_path / name / "tokens"

    first = run("first")
    made = (first / "train-tokens.npy").stat().st_mtime_ns
    second = run("second")
    assert first.resolve() == second.resolve() == tmp_path / "tokens" / first.resolve().name
    assert (second / "train-tokens.npy").stat().st_mtime_ns == made
    mirrored = run("mirrored", "--flip")
    assert mirrored.resolve() != first.resolve()
    assert run("mirrored").resolve() == mirrored.resolve()  # a run keeps its mirrors unless it is told otherwise


def test_a_recipe_that_reads_images_makes_no_tokens(environment, tiny_shards, tiny_pretrained, tmp_path, capsys):
    assert main(words(tiny_shards, tiny_pretrained / "tokenizer", tmp_path, "--data.source=images")) == 0
    assert capsys.readouterr().out == "data.source images: stage 2 reads no tokens; nothing to do\n"
    assert list(tmp_path.iterdir()) == []
