from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl import evaluation
from maskgit_pl.evaluation.figures import count_known_tokens
from maskgit_pl.schedules import mask_schedules


def test_the_number_of_known_tokens_rises_to_all_as_in_the_released_code() -> None:
    num_known = count_known_tokens(mask_schedules.build("cosine"), num_tokens=256, num_steps=12)
    assert all(before < after for before, after in pairwise(num_known))
    assert 256 - num_known[7] == 127  # cos(pi / 3) is just under a half in float32
    assert num_known[-1] == 256


def test_figure_2_has_the_steps_of_each_model(tiny_pretrained: Path, tiny_autoregressive: Path, tmp_path: Path) -> None:
    options = evaluation.ReportOptions(results=tmp_path, device="cpu")
    page = evaluation.figure_2([tiny_autoregressive, tiny_pretrained], options, class_name="Trouser")
    num_known = {
        model: [row["known"] for row in page.rows if row["model"] == model] for model in ("MaskGIT", "autoregressive")
    }
    assert num_known["autoregressive"] == list(range(1, 17))
    assert num_known["MaskGIT"] == [1, 4, 9, 16]  # 16 tokens in 4 steps of 1 - r^2 masked ones
    assert {row["class"] for row in page.rows} == {"Trouser"}
    files = page.write()
    assert [file.name for file in files] == ["figure-2.md", "figure-2.csv", "figure-2.png"]
    with Image.open(files[-1]) as picture:
        assert min(picture.size) > 8 * 168  # two filmstrips of four rows, twelve columns
    with pytest.raises(ValueError, match="figure 2 must have at least one run"):
        evaluation.figure_2([], options)
