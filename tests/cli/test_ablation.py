import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

from maskgit_pl.cli import _flags_of, ablation, main
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.evaluation.reports import ablation_measurements
from maskgit_pl.runs import ablation_runs
from tests.conftest import flags, save_tiny_pretrained

TINY = Path(__file__).parents[1] / "tiny"


@pytest.fixture
def words(tiny_shards: Path, judge: Path, tmp_path: Path) -> list[str]:
    """The flags of a tiny ablation."""
    tokenizer = save_tiny_pretrained(tmp_path / "pretrained") / "tokenizer"
    tiny = yaml.safe_load((TINY / "transformer.yaml").read_text())
    tiny["trainer"] |= {"max_steps": 3, "val_check_interval": 2}
    common = ["--dataset", "shoes", "--runs-folder", tmp_path / "runs", "--tokenizer", tokenizer, "--data", tiny_shards,
              "--features", f"classifier={judge}", "--results", tmp_path / "results", "--num-images", 12, "--device",
              "cpu", *flags(tiny)]  # fmt: skip
    return ["ablation", *map(str, common)]


def rows(folder: Path, kind: str = "ablation") -> list[dict[str, Any]]:
    return Ledger(folder / "results" / "ledger.jsonl").rows(kind)


def start(words: list[str], file: Path) -> subprocess.Popen[bytes]:
    """Starts the command in a process group of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with file.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "maskgit_pl", *words], stdout=output, stderr=output, env=environment,
            start_new_session=True,
        )  # fmt: skip


def wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    while not condition():
        assert process.poll() is None, "the command ended before"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.trainings
def test_an_ablation_survives_kills_and_failures_and_is_not_repeated(words: list[str], tmp_path: Path) -> None:
    command = [*words, "--vary", "model.network.depth=1,2", "--vary", "decoding.guidance.scale=2",
               "--trainer.max_steps=40", "--checkpoint_every=10"]  # fmt: skip
    log, runs = tmp_path / "log", tmp_path / "runs" / "ablation"

    # A stop signal reaches the training, which saves; the command ends with 75.
    stopped = start(command, log)
    wait_for(lambda: list(runs.glob("*/transformer/checkpoints/step-*/COMPLETE.json")), stopped)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait() == 75
    assert "repeat the command to resume" in log.read_text()

    # A kill of everything loses nothing that was measured.
    killed = start(command, log)
    wait_for(lambda: (tmp_path / "results" / "ledger.jsonl").exists() and len(rows(tmp_path)) == 1, killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    first = rows(tmp_path, "samples")

    again = start(command, log)
    assert again.wait() == 0, log.read_text()
    measured = rows(tmp_path)
    assert [(row["variant"], row["seed"]) for row in measured] == [
        (variant, seed) for seed in (0, 1) for variant in ("base", "depth=2", "guidance.scale=2")
    ]
    assert rows(tmp_path, "samples")[: len(first)] == first  # not measured again
    assert len(list(runs.glob("shoes-*"))) == 4  # guidance needs no training
    by = {(row["variant"], row["seed"]): row for row in measured}
    assert by["base", 0]["run"] == by["guidance.scale=2", 0]["run"]
    for row in measured:
        assert {"fid/classifier", "class_agreement", "diversity", "bits_per_token"} <= row["numbers"].keys()
        assert row["max_steps"] == 40
        assert row["training_seconds"] > 0
    assert len({row["numbers"]["bits_per_token"] for row in measured}) == 4  # seeds differ, decoding does not matter
    samples = [row["seed"] for row in rows(tmp_path, "samples") if row["run"]]
    assert set(samples) == {0, 12}  # other noise for each seed

    # The same command repeats nothing, and --page-only needs no run.
    assert main(command) == 0
    assert rows(tmp_path) == measured
    page = tmp_path / "results" / "shards" / "ablation-depth-scale.md"
    text = page.read_text()
    page.unlink()
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert main([*command, "--page-only"]) == 0
    assert page.read_text() == text
    assert page.with_suffix(".png").is_file()


@pytest.mark.slow
@pytest.mark.trainings
def test_a_budget_of_seconds_is_divided_by_the_time_of_a_step_and_a_failure_does_not_end_the_others(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ablation_runs.run_maskgit

    def fail(command: list[str], output: IO[bytes]) -> tuple[int, bool]:
        if "--model.network.depth=2" in command:
            output.write(b"maskgit train: out of memory\n")
            return 70, False
        return own(command, output)

    monkeypatch.setattr(ablation_runs, "run_maskgit", fail)
    words = [word for word in words if not word.startswith("--trainer.max_steps")]
    command = [*words, "--vary", "model.network.depth=1,2", "--vary", "model.network.mlp_dim=64", "--seeds", "3",
               "--budget", "seconds=0.5", "--pilot-steps", "20"]  # fmt: skip
    assert main(command) == 70
    assert "depth=2, pilot: maskgit train: out of memory" in capsys.readouterr().err
    pilots = {row["variant"]: row["seconds_per_step"] for row in rows(tmp_path, "pilot")}
    assert set(pilots) == {"base", "mlp_dim=64"}
    for row in rows(tmp_path):
        assert row["max_steps"] == max(1, round(0.5 / pilots[row["variant"]]))
        assert row["planned_seconds"] == pytest.approx(row["max_steps"] * row["seconds_per_step"])
        file = tmp_path / "runs" / "ablation" / row["run"] / "transformer" / "config.yaml"
        config = yaml.safe_load(file.read_text())
        assert config["trainer"]["max_steps"] == row["max_steps"]
        assert config["cpu_threads"] >= 1
        assert config["data"]["seed"] == 3
    assert not list((tmp_path / "runs" / "ablation").glob("pilot-*"))
    text = next((tmp_path / "results" / "shards").glob("*.md")).read_text()
    assert "depth=2, seed 3: not trained or not measured" in text

    # The pilot is not measured again, so that a repeated command has the same runs.
    monkeypatch.setattr(ablation_runs, "run_maskgit", own)
    monkeypatch.setattr(ablation_measurements.AblationRuns, "pilot", lambda *_: pytest.fail("measured again"))
    before = rows(tmp_path)
    assert main([word if word != "model.network.depth=1,2" else "model.network.depth=1" for word in command]) == 0
    assert [row["run"] for row in rows(tmp_path)][: len(before)] == [row["run"] for row in before]


@pytest.mark.slow
@pytest.mark.trainings
def test_tokenizers_are_judged_by_their_reconstructions_and_their_transformers(
    tiny_shards: Path, judge: Path, tmp_path: Path
) -> None:
    tiny = yaml.safe_load((TINY / "tokenizer.yaml").read_text())
    command = ["ablation", "--stage", "tokenizer", "--vary", "model.network.codebook_size=16,32", "--dataset", "shoes",
               "--runs-folder", tmp_path / "runs", "--data", tiny_shards, "--features", f"classifier={judge}",
               "--results", tmp_path / "results", "--num-images", 12, "--device", "cpu", "--seeds", 0,
               *flags(tiny)]  # fmt: skip
    assert main([str(word) for word in command]) == 0
    found = {row["variant"]: row["numbers"] for row in rows(tmp_path)}
    assert set(found) == {"base", "codebook_size=32"}
    for numbers in found.values():
        assert {"rfid/classifier", "psnr_db", "codebook_usage", "perplexity"} <= numbers.keys()
        assert "fid/classifier" not in numbers
    assert (tmp_path / "results" / "shards" / "ablation-tokenizer-codebook_size.md").is_file()


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    ablation.add_ablation_parser(parser.add_subparsers(dest="command"))
    args, args.overrides = parser.parse_known_args(["ablation", *words])
    args.flags = _flags_of(parser, ["ablation"])
    code: int = args.run(args)
    return code


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (("--grid",), "--grid must come with --vary or --recipes"),
        (("--seeds", "0"), "--seeds must come with --vary or --recipes"),
        (("--vary", "model.network.depth=2", "--schedules", "cosine"), "--schedules must come with no --vary"),
        (("--vary", "model.network.depth=2", "--seeds", "a"), "--seeds must be integers"),
        (("--vary", "model.network.depth=2", "--name", "../x"), "--name must be letters"),
        (("--page-only",), "--page-only must come with --name"),
        (("--features", "bogus"), "unknown feature network 'bogus'"),
        (("--features", "lite0,inception=nowhere"), "nowhere"),
        (("--results", __file__), "--results must be a folder, got the file"),
        (("--vary", "model.network.dept=2"), "did you mean 'model.network.depth'"),
        (("--vary", "model.network.depth=2", "--budget", "hours=2"), "--budget must be"),
        (("--vary", "model.network.depth=2", "--num-images", "1"), "--num-images must be"),
        (("--reference", "nowhere.npz"), "reference nowhere.npz: no such file"),
    ],
)
def test_a_wrong_flag_is_answered_before_anything_is_trained(
    given: tuple[str, ...], match: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        call("--runs-folder", str(tmp_path), "--results", str(tmp_path), *given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vary", "match"),
    [
        ("model.network.num_heads=2,3", r"variant num_heads=3: .*num_heads"),
        (
            "decoding.token_selector=confidence,confidenc",
            r"variant token_selector=confidenc: .*did you mean 'confidence'",
        ),
        ("decoding.num_steps=4,99", r"variant num_steps=99: .*num_steps must be"),
        ("model.network.class_dropout=0.1,0", r"variant class_dropout=0: .*guidance"),
        ("model.network.depth=1", "at least two variants"),
    ],
)
def test_a_value_that_cannot_be_built_names_its_variant(
    words: list[str], vary: str, match: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=match):
        call(*words[1:], "--vary", vary)
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "results").exists()


def test_images_of_too_few_classes_are_refused_before_training(words: list[str], tmp_path: Path) -> None:
    words[words.index("--num-images") + 1] = "5"
    with pytest.raises(ValueError, match="--num-images must be >= 6"):
        call(*words[1:], "--vary", "model.network.depth=1,2")
    assert not (tmp_path / "runs" / "ablation").exists()


@pytest.mark.slow
def test_runs_are_named_by_what_determines_their_weights(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    ablation.add_ablation_parser(parser.add_subparsers(dest="command"))

    def open_runs(*more: str) -> ablation_runs.AblationRuns:
        args, args.overrides = parser.parse_known_args([*words, *more])
        return ablation_runs.AblationRuns.open(
            ablation._read_config(args, tuple(map(ablation.parse_factor, args.vary)))
        )

    one = open_runs("--vary", "model.network.depth=1,2", "--vary", "decoding.guidance.scale=3")
    base, deep, guided = one.variants
    assert [each.label for each in one.variants] == ["base", "depth=2", "guidance.scale=3"]
    assert one.base == {"depth": 1, "guidance.scale": 1.0}
    assert one.folder_of(base, 0, 3) == one.folder_of(guided, 0, 3)
    assert guided.decoding is not None
    assert guided.decoding.scales()[-1] == 3
    keys = [(base, 0, 3), (base, 1, 3), (base, 0, 4), (deep, 0, 3)]
    assert len({one.folder_of(*key) for key in keys}) == 4
    assert one.num_trainings == 2 * len(one.config.seeds)
    assert open_runs("--vary", "trainer.max_steps=4,5", "--seeds", "0,1").num_trainings == 6

    # The same variant under another label, in a grid, of another length, and with settings that do not affect weights.
    more = ("--trainer.val_check_interval=7", "--keep_last=5", "--trainer.max_steps=5")
    other = open_runs("--vary", "model.network.depth=2,1", "--grid", *more)
    assert [each.label for each in other.variants] == ["depth=2", "depth=1"]
    assert other.variants[other.reference].label == "depth=1"
    assert [each.digest for each in other.variants] == [deep.digest, base.digest]


def test_a_finished_run_under_another_label_is_reused(words: list[str], tmp_path: Path) -> None:
    args = argparse.ArgumentParser()
    ablation.add_ablation_parser(args.add_subparsers(dest="command"))
    parsed, parsed.overrides = args.parse_known_args([*words, "--vary", "model.network.depth=1,2"])
    runs = ablation_runs.AblationRuns.open(ablation._read_config(parsed, (ablation.parse_factor(parsed.vary[0]),)))
    deep = runs.variants[1]
    own = runs.folder_of(deep, 0, 3)
    other = own.with_name(own.name.replace("depth-2", "base"))
    (other / "transformer").mkdir(parents=True)
    (other / "pretrained" / "transformer").mkdir(parents=True)
    (other / "pretrained" / "transformer" / "model.safetensors").touch()
    (other / "transformer" / "exported.json").write_text(json.dumps({"step": 3}))
    assert runs.train(deep, 0, 3).folder == other
