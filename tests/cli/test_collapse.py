"""The recipes ``collapse`` and ``collapse-cured``: the codebook dies, the alarm says so, and the cure helps."""

import json
from pathlib import Path

import pytest
import torch

from maskgit_pl.cli import main
from maskgit_pl.contrib.inspect_findings import read_logs
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.sources.making import open_source
from maskgit_pl.data.writer import make_shards


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns shards of 28 px drawings, each one disc with a brightness gradient: 600 train, 100 val."""
    folder = tmp_path_factory.mktemp("drawings")
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    for split, count in (("train", 600), ("val", 100)):
        (folder / "images" / split / "disc").mkdir(parents=True)
        for number in range(count):
            y, x, radius, slope_y, slope_x = torch.rand(5, generator=generator).tolist()
            disc = (rows - 28 * y) ** 2 + (columns - 28 * x) ** 2 < (4 + 10 * radius) ** 2
            bright = 128 + 4 * (slope_y - 0.5) * (rows - 14) + 4 * (slope_x - 0.5) * (columns - 14)
            image = (disc * bright).clamp(0, 255).to(torch.uint8)
            (folder / "images" / split / "disc" / f"{number}.png").write_bytes(encode_png(image[None]))
    make_shards(open_source(folder / "images"), folder / "shards")
    return folder / "shards"


def train(recipe: str, data: Path, folder: Path) -> tuple[dict[str, str], float]:
    """Trains a tokenizer; returns its alarms by cause, and the fraction of codes that the validation images use."""
    where = ["--data", str(data), "--runs-folder", str(folder), "--run", "one", "--recipe", recipe]
    assert main(["train", "tokenizer", *where, "--data.validation_batch=100", "--data.validation_samples=100"]) == 0
    stage = folder / "one" / "tokenizer"
    health = stage / "health.json"
    reports = json.loads(health.read_text()) if health.exists() else []
    advice = {report["cause"]: " ".join(report["advice"]) for report in reports}
    return advice, read_logs(stage).last("val")["codebook_usage"]


@pytest.mark.trainings
@pytest.mark.slow
def test_the_recipe_collapse_gives_the_alarm_and_its_cure_keeps_the_codes_in_use(drawings, tmp_path):
    alarms, usage = train("collapse", drawings, tmp_path / "sick")
    assert "restart_below" in alarms["codebook_usage"]
    assert usage < 0.3
    alarms, cured_usage = train("collapse collapse-cured", drawings, tmp_path / "cured")
    assert not alarms
    assert cured_usage > 3 * usage
