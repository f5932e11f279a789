"""Tables 1 to 3 of tiny two_runs."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.evaluation.evaluator import Evaluator
from tests.cli.conftest import common, rows
from tests.conftest import save_tiny_pretrained
from tests.paper.scripts import run


@pytest.mark.slow
def test_table_1_is_measured_once_and_has_the_rows_of_the_paper(
    two_runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        seed = save_tiny_pretrained(tmp_path / f"seed-{number}" / "pretrained", seed=number, attention="causal").parent
        (seed / "transformer").mkdir()
        (seed / "transformer" / "config.yaml").write_text(yaml.safe_dump({"data": {"seed": number}}))
        two_runs.append(seed)
    words = [*two_runs, *common(tiny_shards, judge, tmp_path / "results"), "--cas-model", "none", "--num-steps", "1,4"]
    assert run("table_1", *words) == 0
    page = (tmp_path / "results" / "shards" / "table-1.md").read_text()
    for text in ("| MaskGIT (bert) | `shoes-square` |", "| autoregressive (bert) | `seed-0`, `seed-1` |", "BigGAN-deep",
                 "| real images |  |", "| T = 1 | T = 4 | T = 16 |", "| ms, batch 64 |"):  # fmt: skip
        assert text in page
    assert "MaskGIT" in capsys.readouterr().out
    measured = rows(tmp_path / "results", "samples")
    names = ["shoes-square", "shoes-cosine"]
    assert [row["run"] for row in measured] == [*names, "seed-0", "seed-1", "", *names]
    assert [row["num_steps"] for row in measured] == [4, 4, 16, 16, None, 1, 1]
    assert all(row["commit"] and row["date"] and row["num_images"] == 12 for row in measured)
    with Image.open(tmp_path / "results" / "shards" / "table-1.png") as picture:
        assert picture.height > 100

    monkeypatch.setattr(Evaluator, "generate", lambda *_, **__: pytest.fail("measured again"))
    assert run("table_1", *words) == 0
    assert rows(tmp_path / "results", "samples") == measured


@pytest.mark.slow
@pytest.mark.parametrize("text", ["data: {path: 3}", "x: " + "[" * 5000])
def test_a_hostile_recipe_of_a_run_is_refused_in_one_line(two_runs: list[Path], text: str, capsys) -> None:
    (two_runs[0] / "transformer").mkdir()
    (two_runs[0] / "transformer" / "config.yaml").write_text(text)
    assert run("table_1", two_runs[0], "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert "shoes-square" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_table_2_edits_held_out_images(two_runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path) -> None:
    run("table_2", two_runs[0], *common(tiny_shards, judge, tmp_path / "results"))
    measured = rows(tmp_path / "results", "editing")
    assert [(row["task"], row["model"]) for row in measured] == [
        (task, kind) for task in ("outpaint-right", "inpaint-centre") for kind in ("MaskGIT", "masked", "unedited")
    ]
    assert measured[2]["fid"] == measured[5]["fid"]  # the same images, as they are
    assert "CoModGAN" in (tmp_path / "results" / "shards" / "table-2.md").read_text()


@pytest.mark.slow
def test_table_3_and_figure_8_show_the_best_t_which_is_measured_again(
    two_runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    for folder in two_runs:
        words = ["ablation", "--of", folder, "--num-steps", "4,2,4", "--seeds", 0, "--model.decoding.guidance=constant"]
        assert main([*map(str, [*words, *common(tiny_shards, judge, results)])]) == 0
    measured = rows(results, "samples")
    steps = [(row["run"], row["num_steps"], row["seed"]) for row in measured if row["run"]]
    assert [number for _, number, seed in steps if seed == 0] == [2, 4] * len(two_runs)
    for row in rows(results, "ablation"):
        curve = {r["num_steps"]: r["fid"] for r in measured if r["run"] == row["run"] and r["seed"] == 0}
        assert row["fid_by_steps"] == {str(number): fid for number, fid in curve.items()}
        assert row["best_steps"] == min(curve, key=lambda number: curve[number])
        assert (row["run"], row["best_steps"], 12) in steps  # noise that took no part in the choice
    assert "| base | " in (results / "shards" / "ablation.md").read_text().split("## FID by number of steps T")[1]

    words = ["--results", results, "--num-images", 12, "--num-tokens", 16]
    assert run("table_3", *two_runs, *words) == 0
    page = (results / "shards" / "table-3.md").read_text()
    assert "`cosine`" in page
    assert "`square`" in page
    assert (results / "shards" / "figure-8.png").is_file()
    assert run("table_3", "runs/none", *words) == 2
    assert "none" in capsys.readouterr().err
