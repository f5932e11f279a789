from pathlib import Path
from typing import IO

import pytest
import yaml

from maskgit_pl.cli import main
from maskgit_pl.evaluation.evaluator import Evaluator
from maskgit_pl.runs import variants
from tests.cli.conftest import common, rows
from tests.conftest import flags, save_tiny_pretrained

TINY = Path(__file__).parents[1] / "tiny"


# ablation


@pytest.fixture
def words(tiny_shards: Path, judge: Path, tmp_path: Path) -> list[str]:
    """The flags of a tiny ablation."""
    tokenizer = save_tiny_pretrained(tmp_path / "pretrained") / "tokenizer"
    tiny = yaml.safe_load((TINY / "transformer.yaml").read_text())
    tiny["trainer"] |= {"max_steps": 3, "val_check_interval": 2}
    where = ["--dataset", "shoes", "--runs-folder", tmp_path / "runs", "--tokenizer", tokenizer]
    return ["ablation", *map(str, [*where, *common(tiny_shards, judge, tmp_path / "results")]), *flags(tiny)]


@pytest.mark.slow
def test_the_decoding_of_a_run_is_varied_without_training(
    two_runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, run = tmp_path / "results", two_runs[0]
    words = ["ablation", "--of", run, "--vary", "decoding.token_selector=halton,{name: remdm, eta: 0.4}"]
    words += ["--at", "decoding.num_steps=2,3", "--model.decoding.sampling_temperature=0.5"]
    words += common(tiny_shards, judge, results)
    assert main([str(word) for word in words]) == 0
    labels = ("base", "token_selector=halton", "token_selector={name: remdm, eta: 0.4}")
    measured = {(row["variant"], row["seed"]): row for row in rows(results, "ablation")}
    assert [*measured] == [
        (f"{label}, num_steps={steps}", seed) for seed in (0, 1) for steps in (2, 3) for label in labels
    ]
    samples = [row for row in rows(results, "samples") if row["run"]]
    assert {(row["num_steps"], row["seed"]) for row in samples} == {(2, 0), (3, 0), (2, 12), (3, 12)}  # the same noise
    assert {row["decoding"]["sampling_temperature"] for row in samples} == {0.5}
    page = (results / "shards" / "ablation-token_selector-num_steps.md").read_text()
    assert "Decoding of the run shoes-square on shards" in page
    assert "## Results at num_steps=3" in page
    assert "## Difference from base, num_steps=3" in page
    assert "## Training" not in page

    monkeypatch.setattr(Evaluator, "generate", lambda *_, **__: pytest.fail("measured again"))
    assert main([str(word) for word in words]) == 0
    assert main([*map(str, [*words, "--num-steps", "99"])]) == 2


@pytest.mark.trainings
@pytest.mark.slow
def test_an_ablation_of_recipes_measures_the_others_despite_failures(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_training(monkeypatch, "transformer/square")
    assert main([*words, "--recipes", "cosine;square", "--seeds", "3", "--num-steps", "2,4"]) == 70
    failure = "1 run failed, and the page has the others: recipe square, seed 3: maskgit train: out"
    assert failure in capsys.readouterr().err
    page = (tmp_path / "results" / "shards" / "ablation-recipes.md").read_text()
    assert "Base: recipe cosine." in page
    assert "| variant | best T | T = 2 | T = 4 |" in page


def fail_training(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """Lets the trainings fail that have a recipe or a flag."""
    own, name = variants.run_maskgit, word.rpartition("/")[2]

    def run(command: list[str], output: IO[bytes]) -> tuple[int, bool]:
        if command[0] == "train" and name in command:
            output.write(b"maskgit train: out of memory\n")
            return 70, False
        return own(command, output)

    monkeypatch.setattr(variants, "run_maskgit", run)


@pytest.mark.slow
@pytest.mark.trainings
def test_an_ablation_repeats_only_what_failed(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        *words,
        "--vary",
        "model.network.depth=2",
        "--vary",
        "decoding.guidance.scale=2",
        "--trainer.max_steps=2",
    ]
    results = tmp_path / "results"
    with monkeypatch.context() as patch:
        fail_training(patch, "--model.network.depth=2")
        assert main(command) == 70
    assert "depth=2, seed 0: maskgit train: out of memory" in capsys.readouterr().err
    page = next((results / "shards").glob("*.md"))
    assert "- depth=2, seed 0: maskgit train: out of memory" in page.read_text()
    before = rows(results, "samples")
    assert main(command) == 0
    assert "## Failed" not in page.read_text()
    assert rows(results, "samples")[: len(before)] == before
    measured = {(row["variant"], row["seed"]): row for row in rows(results, "ablation") if not row.get("failure")}
    variants = ("base", "depth=2", "guidance.scale=2")
    assert measured.keys() == {(variant, seed) for variant in variants for seed in (0, 1)}
    assert measured["base", 0]["run"] == measured["guidance.scale=2", 0]["run"]  # guidance needs no training
    for row in measured.values():
        assert {"fid/classifier", "class_agreement", "diversity", "bits_per_token"} <= row["numbers"].keys()
        assert (row["max_steps"], row["training_seconds"] > 0) == (2, True)
    assert {row["seed"] for row in rows(results, "samples") if row["run"]} == {0, 12}  # other noise for each seed


@pytest.mark.slow
@pytest.mark.trainings
def test_tokenizers_are_compared_by_their_reconstructions(tiny_shards: Path, judge: Path, tmp_path: Path) -> None:
    tiny = yaml.safe_load((TINY / "tokenizer.yaml").read_text())
    command = ["ablation", "--stage", "tokenizer", "--vary", "model.network.codebook_size=32", "--dataset", "shoes",
               "--runs-folder", tmp_path / "runs", "--data", tiny_shards, "--features", f"classifier={judge}",
               "--results", tmp_path / "results", "--num-images", 12, "--device", "cpu", "--seeds", 0,
               *flags(tiny)]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    measured = {row["variant"]: row["numbers"] for row in rows(tmp_path / "results", "ablation")}
    assert set(measured) == {"base", "codebook_size=32"}
    for numbers in measured.values():
        assert {"rfid/classifier", "psnr_db", "codebook_usage", "perplexity"} <= numbers.keys()
        assert "fid/classifier" not in numbers
    assert (tmp_path / "results" / "shards" / "ablation-tokenizer-codebook_size.md").is_file()
