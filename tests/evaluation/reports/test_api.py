from dataclasses import replace
from pathlib import Path

import pytest

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.evaluation import CASConfig, reports
from maskgit_pl.evaluation.classifier import obtain_classifier
from maskgit_pl.evaluation.options import ClassifierConfig
from tests.conftest import save_tiny_pretrained


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_tiny_pretrained(tmp_path / "runs" / "shoes" / "pretrained")
    return tmp_path / "runs" / "shoes"


@pytest.fixture
def options(tiny_shards: Path, tmp_path: Path) -> reports.ReportOptions:
    data = ShardData(ShardDataConfig(str(tiny_shards), image_size=8, in_channels=1))
    data.setup()
    obtain_classifier(tmp_path / "judge", data, config=replace(ClassifierConfig(), width=4, max_steps=3, batch=20))
    return reports.ReportOptions(
        data=tiny_shards,
        num_images=12,
        features=(f"classifier={tmp_path / 'judge'}",),
        results=tmp_path / "results",
        device="cpu",
    )


def test_a_table_is_a_page_that_is_written_when_asked_to(run: Path, options: reports.ReportOptions) -> None:
    page = reports.table_1([run], options, cas=CASConfig(model="small", max_steps=2, batch=6))
    assert [row["measurement"] for row in page.rows] == ["samples", "samples", "cas", "cas"]
    assert page.rows[0]["fid"] > 0
    said = f"maskgit table 1 {run} --features {options.features[0]} --num-images 12 --cas-model small --cas-max-steps 2"
    assert said in page.markdown
    assert page.folder == options.results / "shards"
    assert not page.folder.exists()
    assert all(file.is_file() for file in page.write())
    assert sorted(each.name for each in page.folder.iterdir()) == ["table-1.csv", "table-1.md", "table-1.png"]


@pytest.mark.slow
def test_figure_4_takes_sizes_of_a_run_or_of_flags(run: Path, tmp_path: Path) -> None:
    options = reports.ReportOptions(results=tmp_path, device="cpu")
    page = reports.figure_4(run, options, num_tokens=(4,), sizes={"depth": 2})
    assert {row["network"] for row in page.rows} == {"2 layers x 16, MLP 32, 2 heads, 16 codes, 3 classes"}
    assert page.pictures["figure-4.png"].startswith(b"\x89PNG")
    assert f"maskgit figure 4 {run} --num-tokens 4 --depth 2 --device cpu" in page.markdown


def test_invalid_input_is_refused(run: Path, options: reports.ReportOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"num_images must be an integer in \[2, inf\), got 1"):
        replace(options, num_images=1)
    with pytest.raises(ValueError, match="table 2 must have at least one run"):
        reports.table_2([], options)
    with pytest.raises(FileNotFoundError, match="data nowhere: no such folder"):
        reports.table_1([run], replace(options, data=Path("nowhere")))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="table 3 must run in one process"):
        reports.table_3([run], options)
