import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from maskgit_pl.cli import _flags_of, ablation, main, paper
from maskgit_pl.evaluation import evaluator
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.evaluation.options import CASConfig
from maskgit_pl.pipeline.pretrained import read_config
from tests.conftest import flags, save_tiny_pretrained

TINY = Path(__file__).parents[1] / "tiny"


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Makes two runs with different weights; the second one has another schedule."""
    for seed, name in enumerate(("shoes-square", "shoes-cosine")):
        save_tiny_pretrained(tmp_path / "runs" / name / "pretrained", seed=seed)
    config = tmp_path / "runs" / "shoes-cosine" / "pretrained" / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"name": "pow"', '"name": "cosine"').replace('"exponent": 2.0', ""))
    text = config.read_text()
    start = text.index('"mask_schedule"')
    config.write_text(text[:start] + '"mask_schedule": "cosine"' + text[text.index("}", start) + 1 :])
    assert read_config(config.parent, "transformer")["mask_schedule"] == "cosine"
    return [tmp_path / "runs" / name for name in ("shoes-square", "shoes-cosine")]


def call(command: str, *words: object) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(dest="command")
    paper.add_paper_parser(subparsers)
    ablation.add_ablation_parser(subparsers)
    args = parser.parse_args([command, *map(str, words)])
    args.overrides, args.flags = [], _flags_of(parser, [command])
    code: int = args.run(args)
    return code


def common(data: Path, judge: Path, results: Path) -> list[object]:
    return ["--data", data, "--features", f"classifier={judge}", "--results", results, "--num-images", 12, "--device",
            "cpu"]  # fmt: skip


def rows(results: Path, measurement: str) -> list[dict[str, Any]]:
    return Ledger(results / "ledger.jsonl").rows(measurement)


@pytest.mark.slow
def test_table_1_is_measured_once_and_written_with_the_paper_s_rows(
    runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["1", *runs, *common(tiny_shards, judge, tmp_path / "results"), "--cas-model", "none"]
    assert call("table", *words) == 0
    page = (tmp_path / "results" / "shards" / "table-1.md").read_text()
    for text in ("`shoes-square`", "`shoes-cosine`", "real images", "BigGAN-deep", "maskgit table 1"):
        assert text in page
    assert "MaskGIT" in capsys.readouterr().out
    measured = rows(tmp_path / "results", "samples")
    assert [row["run"] for row in measured] == ["shoes-square", "shoes-cosine", ""]
    assert all(row["commit"] and row["date"] and row["num_images"] == 12 for row in measured)
    with Image.open(tmp_path / "results" / "shards" / "table-1.png") as picture:
        assert picture.height > 100

    monkeypatch.setattr(evaluator, "generate_images", lambda *_, **__: pytest.fail("measured again"))
    assert call("table", *words) == 0
    assert rows(tmp_path / "results", "samples") == measured


def test_reference_files_of_as_many_images_are_told_apart(
    runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path
) -> None:
    pages = []
    for name, brightness in (("dark", 60), ("bright", 250)):
        generator = np.random.default_rng(0)
        images = generator.integers(0, brightness, (20, 8, 8, 1), dtype=np.uint8).repeat(3, -1)
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
        words = ["--reference", tmp_path / f"{name}.npz", "--cas-model", "none"]
        call("table", 1, runs[0], *common(tiny_shards, judge, tmp_path / "results"), *words)
        pages.append((tmp_path / "results" / "shards" / "table-1.md").read_text())
    for start in ("| MaskGIT | `shoes-square`", "| real images"):
        found = [next(line for line in page.splitlines() if line.startswith(start)) for page in pages]
        assert found[0] != found[1]
    measured = rows(tmp_path / "results", "samples")
    assert [row["reference_file"] for row in measured] == ["dark.npz", "dark.npz", "bright.npz", "bright.npz"]
    assert {row["split"] for row in measured} == {""}
    assert "compared with 20 real images of dark.npz" in " ".join(pages[0].split())
    assert all(row["reference"][:8] in pages[1] for row in measured[2:])


def test_real_images_are_judged_anew_by_another_classifier(
    runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path
) -> None:
    shutil.copytree(judge, tmp_path / "other")
    weights = load_file(judge / "model.safetensors")
    torch.manual_seed(0)
    other = {name: torch.randn_like(each) if name.endswith("weight") else each for name, each in weights.items()}
    save_file(other, tmp_path / "other" / "model.safetensors")
    for folder in (judge, tmp_path / "other", judge):
        call("table", 1, runs[0], *common(tiny_shards, folder, tmp_path / "results"), "--cas-model", "none")
    real = [row for row in rows(tmp_path / "results", "samples") if row["model"] == "real images"]
    assert len(real) == 2
    assert real[0]["judge"] != real[1]["judge"]
    assert real[0]["fid"] != real[1]["fid"]


@pytest.mark.slow
def test_the_training_of_cas_is_set_by_flags_and_kept_apart(
    runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path
) -> None:
    how = [*common(tiny_shards, judge, tmp_path / "results"), "--cas-model", "small", "--cas-max-steps", 3]
    for flags_of_one in (
        ["--cas-batch-size", 6],
        ["--cas-batch-size", 6],
        ["--cas-batch-size", 5, "--cas-precision", "bf16-mixed"],
    ):
        call("table", 1, runs[0], *how, *flags_of_one)
    measured = rows(tmp_path / "results", "cas")
    assert [row["training"]["batch"] for row in measured] == [6, 6, 5, 5]
    assert [row["training_steps"] for row in measured] == [3] * 4
    page = (tmp_path / "results" / "shards" / "table-1.md").read_text()
    assert "--cas-max-steps 3 --cas-batch-size 5 --cas-precision bf16-mixed" in page
    for words, match in (
        (("--cas-batch-size", 1), "--cas-batch-size"),
        (("--results", __file__), "--results must be a folder, got the file"),
        (("--cas-learning-rate", "nan"), "--cas-learning-rate"),
    ):
        with pytest.raises(ValueError, match=match):
            call("table", 1, runs[0], *how, *words)


@pytest.mark.slow
def test_figure_4_times_the_sizes_of_a_run_or_of_flags(runs: list[Path], tmp_path: Path) -> None:
    how = ["--results", tmp_path, "--device", "cpu", "--num-tokens", "4"]
    call("figure", 4, runs[0], *how)
    call("figure", 4, *how, "--depth", 1, "--embed-dim", 16, "--num-heads", 2, "--mlp-dim", 8, "--codebook-size", 32)
    networks = {row["network"] for row in rows(tmp_path, "timing")}
    assert networks == {
        "1 layers x 16, MLP 32, 2 heads, 16 codes, 3 classes",
        "1 layers x 16, MLP 8, 2 heads, 32 codes, 1000 classes",
    }
    page = (tmp_path / "figure-4.md").read_text()
    assert "maskgit figure 4 --num-tokens 4 --depth 1 --embed-dim 16" in page
    assert "--device cpu" in page
    assert f"torch {torch.__version__}" in page
    for words, match in (
        ([*runs], "figure 4 must have at most one RUN"),
        (["--depth", 0], "--depth must be >= 1"),
        (["--embed-dim", 17], "embed_dim must be a multiple of num_heads"),
    ):
        with pytest.raises(ValueError, match=match):
            call("figure", 4, *words, *how)
    with pytest.raises(ValueError, match="--results must be a folder, got the file"):
        call("figure", 4, *how, "--results", __file__)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["[1]", "data: [1]", "data: {path: 3}", "a: &a [*a]", "x: " + "[" * 5000])
def test_a_run_s_own_recipe_of_a_stranger_is_refused_in_one_line(runs: list[Path], text: str, capsys) -> None:
    (runs[0] / "transformer").mkdir()
    (runs[0] / "transformer" / "config.yaml").write_text(text)
    assert main(["table", "1", str(runs[0]), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "shoes-square" in error
    assert error.count("\n") == 1


def test_the_classification_accuracy_score_stands_beside_that_of_real_images(
    runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = CASConfig(model="small", width=4, max_steps=3, batch=12)
    monkeypatch.setattr(CASConfig, "for_images", lambda *_: quick)
    how = [*common(tiny_shards, judge, tmp_path / "results"), "--cas-images", 24]
    call("table", 1, runs[0], *how)
    measured = rows(tmp_path / "results", "cas")
    assert [row["model"] for row in measured] == ["MaskGIT", "real images"]
    assert all(0 <= float(row["top1"]) <= float(row["top5"]) == 1 for row in measured)  # of 3 classes
    assert "Classification accuracy score" in (tmp_path / "results" / "shards" / "table-1.md").read_text()


@pytest.mark.slow
def test_table_2_edits_held_out_images(runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path) -> None:
    call("table", 2, runs[0], *common(tiny_shards, judge, tmp_path / "results"))
    measured = rows(tmp_path / "results", "editing")
    assert [(row["task"], row["model"]) for row in measured] == [
        (task, kind) for task in ("outpaint-right", "inpaint-centre") for kind in ("MaskGIT", "masked", "unedited")
    ]
    assert measured[2]["fid"] == measured[5]["fid"]  # the same images, as they are
    assert "CoModGAN" in (tmp_path / "results" / "shards" / "table-2.md").read_text()


@pytest.mark.slow
def test_table_3_and_figure_8_choose_t_and_measure_it_again(
    runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path
) -> None:
    config = {"trainer": {"max_steps": 100}, "data": {"global_batch": 64}}
    for run in runs:
        (run / "transformer").mkdir()
        (run / "transformer" / "config.yaml").write_text(yaml.safe_dump(config))
    how = [*common(tiny_shards, judge, tmp_path / "results"), "--num-steps", "2,4,16"]
    call("table", 3, *runs, *how)
    measured = rows(tmp_path / "results", "samples")
    steps = [(row["run"], row["num_steps"], row["seed"]) for row in measured if row["run"]]
    assert {each for each in steps if each[2] == 0} == {
        (run.name, number, 0)
        for run in runs
        for number in (2, 4)  # at most half of 16 tokens
    }
    for run in runs:
        curve = {row["num_steps"]: row["fid"] for row in measured if row["run"] == run.name and row["seed"] == 0}
        best = min(curve, key=lambda number: curve[number])
        assert (run.name, best, 12) in steps  # noise that took no part in the choice
    page = (tmp_path / "results" / "shards" / "table-3.md").read_text()
    assert "`cosine`" in page
    assert "`pow (exponent 2.0)`" in page
    assert (tmp_path / "results" / "shards" / "figure-8.png").is_file()
    assert {row["run"] for row in rows(tmp_path / "results", "likelihood")} == {run.name for run in runs}

    (runs[0] / "transformer" / "config.yaml").write_text(yaml.safe_dump({**config, "trainer": {"max_steps": 50}}))
    with pytest.raises(ValueError, match=r"trainer\.max_steps must be the same in all runs, .* shoes-square 50"):
        call("figure", 8, *runs, *how)


@pytest.mark.slow
def test_what_is_wrong_is_said_before_anything_is_measured(
    runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path
) -> None:
    how = common(tiny_shards, judge, tmp_path / "results")
    with pytest.raises(ValueError, match="table 1 must have at least one run"):
        call("table", 1, *how)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        call("table", 1, tmp_path / "nowhere", *how)
    shutil.copytree(runs[0], runs[0].with_name("again"))
    with pytest.raises(ValueError, match="the mask schedules of the runs must differ, got several with"):
        call("table", 3, runs[0], runs[0].with_name("again"), *how)
    with pytest.raises(ValueError, match="--num-steps must be <= 8, half the number of tokens, got only"):
        call("table", 3, *runs, *how, "--num-steps", "12")
    with pytest.raises(ValueError, match="--num-images must be >= 3, one per class, got 2"):
        call("table", 1, *runs, *how, "--num-images", 2)
    with pytest.raises(FileNotFoundError, match="recipe 'cosin'"):
        call("ablation", "--schedules", "square,cosin")
    tokenizer = save_tiny_pretrained(tmp_path / "pretrained") / "tokenizer"
    words = ["ablation", "--schedules", "cosine", "--tokenizer", tokenizer, "--runs-folder", tmp_path / "new", *how]
    with pytest.raises(ValueError, match="--num-steps must be <= 8, half the number of tokens, got only"):
        call(*words, "--num-steps", "12")
    with pytest.raises(ValueError, match="--num-images must be >= 3, one per class, got 2"):
        call(*words, "--num-images", 2)
    assert not (tmp_path / "new").exists()


@pytest.mark.trainings
@pytest.mark.slow
def test_an_ablation_trains_measures_and_goes_on(
    tiny_shards: Path, judge: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = save_tiny_pretrained(tmp_path / "pretrained") / "tokenizer"
    tiny = yaml.safe_load((TINY / "transformer.yaml").read_text())
    tiny["trainer"] |= {"max_steps": 2, "val_check_interval": 2}

    def ablate() -> None:
        parser = argparse.ArgumentParser()
        ablation.add_ablation_parser(parser.add_subparsers(dest="command"))
        words = [
            "ablation", "--schedules", "cosine", "--dataset", "shoes", "--runs-folder", tmp_path / "runs",
            "--tokenizer", tokenizer, "--num-steps", "2,4", *common(tiny_shards, judge, tmp_path / "results"),
        ]  # fmt: skip
        args, args.overrides = parser.parse_known_args(list(map(str, words + flags(tiny))))[0], flags(tiny)
        assert args.run(args) == 0

    ablate()
    page = (tmp_path / "results" / "shards" / "table-3.md").read_text()
    assert "maskgit ablation --dataset shoes --schedules cosine" in page
    assert page.count("shoes-") == page.count("`shoes-cosine` tokenizer") == 1  # where the weights are named
    assert {row["run"] for row in rows(tmp_path / "results", "samples")} == {"shoes-cosine", ""}
    measured = rows(tmp_path / "results", "samples")
    capfd.readouterr()
    ablate()
    assert capfd.readouterr().out.count("finished at step-00000002; nothing to do") == 1
    assert rows(tmp_path / "results", "samples") == measured
