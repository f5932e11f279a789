"""Tables 1 and 2 of tiny runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from maskgit_pl.evaluation.evaluator import Evaluator
from maskgit_pl.evaluation.ledger import Ledger
from tests.conftest import save_tiny_pretrained
from tests.paper.scripts import run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Makes two runs with different weights; the second one has another schedule."""
    folders = [tmp_path / "runs" / name for name in ("shoes-square", "shoes-cosine")]
    for seed, folder in enumerate(folders):
        save_tiny_pretrained(folder / "pretrained", seed=seed)
    file = folders[1] / "pretrained" / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mask_schedule": "cosine"}))
    return folders


def common(data: Path, judge: Path, results: Path) -> list[object]:
    words = ["--data", data, "--features", f"classifier={judge}", "--results", results, "--num-images", 12]
    return [*words, "--device", "cpu"]


def rows(results: Path, measurement: str) -> list[dict[str, Any]]:
    return Ledger(results / "ledger.jsonl").rows(measurement)


@pytest.mark.slow
def test_table_1_is_measured_once_and_has_the_rows_of_the_paper(
    runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        seed = save_tiny_pretrained(tmp_path / f"seed-{number}" / "pretrained", seed=number, attention="causal").parent
        (seed / "transformer").mkdir()
        (seed / "transformer" / "config.yaml").write_text(yaml.safe_dump({"data": {"seed": number}}))
        runs.append(seed)
    words = [*runs, *common(tiny_shards, judge, tmp_path / "results"), "--cas-model", "none", "--num-steps", "1,4"]
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
def test_a_hostile_recipe_of_a_run_is_refused_in_one_line(runs: list[Path], text: str, capsys) -> None:
    (runs[0] / "transformer").mkdir()
    (runs[0] / "transformer" / "config.yaml").write_text(text)
    assert run("table_1", runs[0], "--device", "cpu") == 2
    error = capsys.readouterr().err
    assert "shoes-square" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_table_2_edits_held_out_images(runs: list[Path], tiny_shards: Path, judge: Path, tmp_path: Path) -> None:
    run("table_2", runs[0], *common(tiny_shards, judge, tmp_path / "results"))
    measured = rows(tmp_path / "results", "editing")
    assert [(row["task"], row["model"]) for row in measured] == [
        (task, kind) for task in ("outpaint-right", "inpaint-centre") for kind in ("MaskGIT", "masked", "unedited")
    ]
    assert measured[2]["fid"] == measured[5]["fid"]  # the same images, as they are
    assert "CoModGAN" in (tmp_path / "results" / "shards" / "table-2.md").read_text()
