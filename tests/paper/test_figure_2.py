import csv
from pathlib import Path

import pytest
from PIL import Image

from tests.paper.scripts import run


def test_it_has_the_steps_of_each_model(
    tiny_pretrained: Path, tiny_autoregressive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--class-name", "Trouser", "--seed", 3, "--results", tmp_path, "--device", "cpu")
    assert run("figure_2", tiny_autoregressive, tiny_pretrained, *words) == 0
    rows = list(csv.DictReader((tmp_path / "figure-2.csv").read_text().splitlines()))
    num_known = {
        model: [int(row["known"]) for row in rows if row["model"] == model] for model in ("MaskGIT", "autoregressive")
    }
    assert num_known["autoregressive"] == list(range(1, 17))
    assert num_known["MaskGIT"] == [1, 4, 9, 16]  # 16 tokens in 4 steps of 1 - r^2 masked ones
    assert {row["class"] for row in rows} == {"Trouser"}
    assert f"| MaskGIT | `{tiny_pretrained.name}` | 4 |" in (tmp_path / "figure-2.md").read_text()
    with Image.open(tmp_path / "figure-2.png") as picture:
        assert min(picture.size) > 8 * 168  # two filmstrips of four rows, twelve columns
    assert run("figure_2", *words) == 2
    assert capsys.readouterr().err.startswith("python -m paper.figure_2: runs must have at least one run")
