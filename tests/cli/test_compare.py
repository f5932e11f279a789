import csv
from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.evaluation import evaluator
from maskgit_pl.evaluation.ledger import Ledger, Row
from tests.cli.commands import call_command

pytestmark = pytest.mark.usefixtures("quick_judge")


def call(*words: object) -> int:
    return call_command("compare", *words, "--device", "cpu")


def ledger(folder: Path) -> list[Row]:
    """Returns the ledger rows of generated images, in the order of the file."""
    return [row for row in Ledger(folder / "ledger.jsonl").rows("samples") if row["run"]]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "comparison.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_measures_every_selector_and_a_second_run_measures_nothing(
    run_folder: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--num-steps", "2,3")
    assert call(*words) == 0
    out, rows = run_folder / "comparison", ledger(run_folder / "evaluation")
    assert [row["num_steps"] for row in rows] == [2] * 12 + [3] * 12
    for row in rows:
        assert 0 <= row["class_agreement"] <= 1
        assert row["fid"] > 0
        assert row["num_images"] == 6
        assert row["decoding"]["guidance"] == {"name": "linear", "scale": 1.0}  # the model's own
    assert (out / "comparison.md").read_text().startswith("# Comparison of token selectors\n\n    maskgit compare ")
    assert {float(row["fid/classifier"]) for row in table(out)} == {row["fid"] for row in rows}
    assert len(table(out)) == 24
    with Image.open(out / "selectors.png") as picture:
        assert picture.height > 12 * 84
    assert "measured 24 rows, reused 0" in capsys.readouterr().out

    monkeypatch.setattr(evaluator, "generate_images", lambda *args, **options: pytest.fail("measured again"))
    assert call(*words) == 0
    assert ledger(run_folder / "evaluation") == rows
    assert "measured 0 rows, reused 24" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_finds_what_an_unbroken_one_finds(
    run_folder: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--num-steps", 2, "--guidance-scale", "0.5")
    words = (*words, "--selectors", "halton, {name: remdm, eta: 0.4}, random")
    call(*words, "--out", run_folder / "whole")
    plain, left = evaluator.generate_images, [None]

    def stops(*args: object, **options: object) -> object:
        left.pop()  # the second call has none
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "generate_images", stops)
        with pytest.raises(IndexError):
            call(*words, "--out", run_folder / "broken")
    assert len(ledger(run_folder / "broken")) == 1
    call(*words, "--out", run_folder / "broken")
    whole, broken = (ledger(run_folder / name) for name in ("whole", "broken"))
    for row in whole + broken:
        assert row.pop("seconds_per_image") > 0
        assert row["decoding"]["guidance"] == {"name": "linear", "scale": 0.5}
    assert [row["purpose"] for row in whole] == ["selector halton", "selector remdm (eta 0.4)", "selector random"]
    assert whole == broken
    assert {row["selector"] for row in table(run_folder / "broken")} == {"halton", "remdm (eta 0.4)", "random"}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--num-steps", "4,17"), "--num-steps must be <= 16, the tokens per image, got 17"),
        (("--out", __file__), "--out must be a folder, got the file"),
        (("--num-steps", "4,0"), "must be numbers >= 1 and rising ranges, got '0'"),
        (("--num-steps", "many"), "--num-steps must be numbers such as 4,8,16"),
        (("--selectors", "halton,confidnce"), "did you mean 'confidence'"),
        (("--selectors", ","), "must have at least one name"),
        (("--selectors", "{name: remdm"), "a name or a mapping such as"),
        (("--selectors", "{name: remdm, strategy: lop}"), "did you mean 'loop'"),
        (("--selectors", "halton,halton"), "must be different, got halton twice"),
        (("--selectors", "4"), "must be names or mappings, got 4"),
        (("--guidance-scale", "-1"), "scale must be a number in [0, 10000], got -1.0"),
        (("--guidance", "{name: linear, scal: 1}"), "scal"),
        (("--num-images", "5"), "--num-images must be >= 6 (2 per class), got 5"),
        (("--batch-size", "0"), "--batch-size must be >= 1, got 0"),
        (("--data", "nowhere"), "no such folder"),
    ],
)
def test_wrong_input_ends_with_2_and_one_line_before_any_work(
    run_folder: Path, tiny_shards: Path, words: tuple[str, ...], match: str, capsys
) -> None:
    given = () if "--data" in words else ("--data", str(tiny_shards))
    assert main(["compare", str(run_folder), *given, *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert not (run_folder.parent / "shards-classifier").exists()
    assert [path.name for path in run_folder.iterdir()] == ["pretrained"]


@pytest.mark.slow
def test_numbers_of_steps_go_as_far_as_there_are_tokens(run_folder: Path, tiny_shards: Path) -> None:
    call(run_folder, "--data", tiny_shards, "--num-images", 6, "--selectors", "halton")
    assert [row["num_steps"] for row in ledger(run_folder / "evaluation")] == [4, 8, 16]
