import csv
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskgit_pl.errors import printable
from maskgit_pl.evaluation import reports
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger
from maskgit_pl.evaluation.reports.ablation_page import (
    Spread,
    ablation_markdown,
    chance_of_separation,
    make_ablation_page,
    summarize,
)
from maskgit_pl.evaluation.reports.options import AblationProtocol, select_rows
from tests.hostile_words import HOSTILE
from tests.test_errors import structure

PROTOCOL = AblationProtocol(
    command="maskgit ablation --vary model.network.depth=2,6",
    dataset="shoes",
    stage="transformer",
    variants=("base", "depth=2", "depth=6"),
    reference="base",
    base={"depth": 4},
    seeds=(0, 1),
    budget="seconds=100",
    threads=1,
    num_images=100,
    first="classifier",
    compared="500 real images of the val split",
    decoding="T 8, confidence",
    machine="a CPU, torch 2",
)
FIDS = {"base": (2.0, 2.2), "depth=2": (3.0, 3.4), "depth=6": (1.9, 2.1)}


def row(
    variant: str, seed: int, fid: float | None, protocol: AblationProtocol = PROTOCOL, **columns: Any
) -> dict[str, Any]:
    numbers = {} if fid is None else {"fid/classifier": fid, "fid/lite0": 10 * fid, "precision/classifier": 0.7,
               "precision/lite0": 0.6, "bits_per_token": fid + 2, "class_agreement": 0.5}  # fmt: skip
    return {"ablation": "ablation-depth", "plan": "p", "variant": variant, "seed": seed, "numbers": numbers,
            "place": protocol.variants.index(variant), "protocol": protocol.to_row(), "dataset": "shoes",
            "run": f"run-{variant}-{seed}", "max_steps": 400, "seconds_per_step": 0.25, "planned_seconds": 100.0,
            "training_seconds": 104.2, "kind": "CPU", "parameters": 850_000,
            "real": {"fid/classifier": 0.11}, **columns}  # fmt: skip


def rows(fids: dict[str, tuple[float, ...]] = FIDS, **columns: Any) -> list[dict[str, Any]]:
    return [row(variant, seed, fid, **columns) for variant, values in fids.items() for seed, fid in enumerate(values)]


def cells(page: str, start: str, heading: str) -> list[str]:
    """Returns the cells of the line of a section that starts in a way."""
    section = page.split(f"## {heading}")[1].split("\n## ")[0]
    (line,) = [line for line in section.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_mean_range_and_verdict_of_every_variant() -> None:
    page = make_ablation_page("ablation-depth", rows()).markdown
    assert "    maskgit ablation --vary model.network.depth=2,6" in page
    assert cells(page, "base", "Results")[1] == "2.10 (2.00 to 2.20)"
    assert cells(page, "depth=6", "Results")[1] == "**2.00 (1.90 to 2.10)**"
    assert cells(page, "real images", "Results")[1] == "0.11"
    assert cells(page, "depth=2", "Difference")[1] == "+1.10 worse"
    assert cells(page, "depth=6", "Difference")[1] == "-0.10 unclear"
    assert "- Helped: none." in page
    assert "- Made it worse: depth=2." in page
    assert "- No difference beyond the spread of the seeds: depth=6." in page
    assert cells(page, "depth=2", "Results")[3].strip("*") == "50.0 (50.0 to 50.0)"
    assert "precision (lite0)" not in page


def test_the_training_table_has_the_pilot_and_the_measured_seconds_of_each_run_once() -> None:
    shared = [
        each | {"run": "run-base-0"} if each["seed"] == 0 and each["variant"] == "depth=6" else each for each in rows()
    ]
    lines = make_ablation_page("x", shared).markdown.split("## Training")[1].splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    assert found[0] == ["base", "0", "0.85M", "400", "0.2500", "100.0", "104.2"]
    assert [(each[0], each[1]) for each in found] == [
        ("base", "0"), ("base", "1"), ("depth=2", "0"), ("depth=2", "1"), ("depth=6", "1")
    ]  # fmt: skip


@pytest.mark.slow
def test_the_csv_has_every_run_unrounded() -> None:
    page = make_ablation_page("ablation-depth", rows())
    found = list(csv.DictReader(io.StringIO(page.csv)))
    assert [(each["variant"], each["seed"], float(each["fid/classifier"])) for each in found] == [
        (variant, str(seed), fid) for variant, values in FIDS.items() for seed, fid in enumerate(values)
    ]


def test_failed_and_missing_runs_are_listed_and_the_others_shown() -> None:
    some = [each for each in rows() if each["variant"] != "depth=2"]
    some.insert(2, row("depth=2", 0, None, failure="model.network.depth must be >= 1, got 0"))
    page = make_ablation_page("ablation-depth", some).markdown
    assert cells(page, "depth=2", "Results")[1] == "failed"
    assert "- depth=2, seed 0: model.network.depth must be \\>= 1, got 0" in page.replace("&gt;", "\\>")
    assert "- depth=2, seed 1: not trained or not measured" in page


def test_one_seed_gives_no_verdict() -> None:
    protocol = AblationProtocol(**{**PROTOCOL.to_row(), "seeds": (0,)})
    page = make_ablation_page("x", [row(name, 0, fid, protocol) for name, (fid, _) in FIDS.items()]).markdown
    assert cells(page, "depth=2", "Difference")[1] == "+1.00 unclear"
    assert "nothing is known about the spread" in page


def test_the_figure_has_a_panel_per_metric_and_can_be_read() -> None:
    pictures = make_ablation_page("x", rows()).pictures
    with Image.open(io.BytesIO(pictures["x.png"])) as picture:
        assert picture.width > 1000
        assert picture.height > 300


@pytest.mark.parametrize(
    ("values", "reference", "verdict"),
    [
        ((1.0, 1.2), (2.0, 2.2), "better"),
        ((3.0, 3.2), (2.0, 2.2), "worse"),
        ((1.0, 2.0), (2.0, 2.2), "unclear"),
        ((2.2, 3.0), (2.0, 2.2), "unclear"),
        ((1.0, 3.0), (2.0, 2.2), "unclear"),
        ((1.0,), (2.0, 2.2), "unclear"),
    ],
)
def test_only_ranges_that_do_not_overlap_give_a_verdict(
    values: tuple[float, ...], reference: tuple[float, ...], verdict: str
) -> None:
    one, other = (Spread(dict(enumerate(each))) for each in (values, reference))
    assert one.compare("fid/classifier", other) == verdict
    opposite = {"better": "worse", "worse": "better", "unclear": "unclear"}
    assert one.compare("recall/classifier", other) == opposite[verdict]  # higher is better


def test_the_chance_of_separation_is_that_of_a_random_order() -> None:
    assert [chance_of_separation(seeds) for seeds in (1, 2, 3)] == pytest.approx([1, 1 / 3, 1 / 10])


def test_only_the_newest_plan_and_the_last_row_of_a_run_count() -> None:
    old = [each | {"plan": "old"} for each in [*rows(), row("base", 2, 3.0)]]  # with a seed more
    again = row("base", 0, 7.0)
    chosen = select_rows([*old, *rows(), again, row("base", 0, 9.0) | {"ablation": "another"}], "ablation-depth")
    assert len(chosen) == 6
    assert chosen[0]["numbers"]["fid/classifier"] == 7.0
    assert {each["plan"] for each in chosen} == {"p"}
    assert [(each["variant"], each["seed"]) for each in chosen[:3]] == [("base", 0), ("base", 1), ("depth=2", 0)]


def test_the_page_is_made_from_the_ledger_without_training(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / FILE_NAME)
    for each in rows():
        ledger.add("ablation", each)
    options = reports.ReportOptions(results=tmp_path)
    page, failures = reports.ablation(None, options, name="ablation-depth")
    assert failures == []
    assert {file.name for file in page.write()} == {f"ablation-depth.{ending}" for ending in ("md", "csv", "png")}
    assert page.folder == tmp_path / "shoes"
    with pytest.raises(ValueError, match="ablation other: there must be at least one row"):
        reports.ablation(None, options, name="other")


@pytest.mark.slow
@pytest.mark.parametrize("word", [word for word in HOSTILE if printable(word).strip()])
def test_a_page_of_a_stranger_s_words_keeps_its_structure(word: str) -> None:
    pages = []
    for text in ("word", word):
        strange = {"machine": text, "dataset": text, "decoding": text, "variants": ("base", text), "base": {text: text}}
        protocol = AblationProtocol(**{**PROTOCOL.to_row(), **strange})
        named = protocol.variants[1]
        some = [
            row("base", 0, 2.0, protocol),
            row(named, 0, 3.0, protocol),
            row(named, 1, None, protocol, failure=named),
        ]
        pages.append(structure(ablation_markdown("x", summarize(some))))
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    "change",
    [{"protocol": {"command": "x"}}, {"protocol": {**PROTOCOL.to_row(), "seeds": "0"}}],
    ids=["missing", "type"],
)
def test_a_wrong_protocol_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ablation-depth: protocol"):
        summarize([row("base", 0, 1.0) | change])


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["/tmp/x", "../../x", "..", ".", "a/b", "a/.."])
def test_a_ledger_cannot_name_a_folder_outside_the_results(tmp_path: Path, dataset: str) -> None:
    ledger = Ledger(tmp_path / "results" / FILE_NAME)
    for each in rows(dataset=dataset):
        ledger.add("ablation", each)
    with pytest.raises(ValueError, match="ablation-depth: dataset must be the name of a folder without a path"):
        reports.ablation(None, reports.ReportOptions(results=tmp_path / "results"), name="ablation-depth")


@pytest.mark.parametrize("numbers", [{"zzz": 1.0}, {"seconds_per_image": 1.0}, {"zzz": 1.0, "seconds_per_image": 1.0}])
def test_a_page_without_compared_metrics_has_no_figure(numbers: dict[str, float]) -> None:
    page = make_ablation_page("x", rows(numbers=numbers))
    assert page.pictures == {}
    assert "x.png" not in page.markdown
    assert ("ms per image" in page.markdown) == ("seconds_per_image" in numbers)


def test_a_page_is_made_from_the_largest_numbers_of_a_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / FILE_NAME)
    for seed, value in enumerate((-1e100, 1e100)):
        ledger.add("ablation", row("base", seed, None, numbers={"fid/classifier": value}))
    assert make_ablation_page("x", ledger.rows("ablation")).pictures["x.png"].startswith(b"\x89PNG")
