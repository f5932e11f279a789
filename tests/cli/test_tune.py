import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from maskgit_pl.cli import main
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation import evaluator
from maskgit_pl.evaluation.ledger import Ledger, Row
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.pretrained import fingerprint, read_decoding, save_decoding
from maskgit_pl.pipeline.sharing import bundled_models
from tests.cli.commands import call_command
from tests.conftest import save_tiny_pretrained

FID = "fid/classifier"

pytestmark = pytest.mark.usefixtures("quick_judge")


def call(*words: object) -> int:
    return call_command("tune", *words, "--device", "cpu")


def lines(folder: Path) -> list[Row]:
    """Returns the ledger rows of generated images, in the order of the file."""
    return [row for row in Ledger(folder / "evaluation" / "ledger.jsonl").rows("samples") if row["run"]]


@pytest.mark.slow
def test_writes_a_recipe_that_the_model_follows_from_then_on(run_folder: Path, tiny_shards: Path, capsys) -> None:
    own = MaskGIT.from_pretrained(run_folder / "pretrained").decoding
    words = (run_folder, "--data", tiny_shards, "--num-images", 12, "--trials", 6, "--num-steps", "2-4")
    assert call(*words, "--plot-images", 6) == 0
    measured = lines(run_folder)
    confirmed = [line for line in measured if line["purpose"].startswith("confirmation")]
    assert len([line for line in measured if line["purpose"].startswith("trial")]) == 6
    assert confirmed[0]["purpose"] == "confirmation of trial 0"
    assert {line["num_images"] for line in confirmed} == {24}

    content = json.loads((run_folder / "pretrained" / "decoding.json").read_text())
    values = [line["fid"] for line in confirmed]
    assert content["tuned"]["metric"] == FID
    assert content["tuned"]["before"] == values[0]
    assert content["tuned"]["value"] == min(values) < values[0]  # of seed 0
    assert content["transformer"] == fingerprint(run_folder / "pretrained" / "transformer")
    tuned = read_decoding(run_folder / "pretrained")
    assert tuned is not None
    assert MaskGIT.from_pretrained(run_folder / "pretrained").decoding == tuned != own
    assert (run_folder / "tuning" / "tuning.md").read_text().startswith("# Search for a decoding\n")
    with Image.open(run_folder / "tuning" / "tuning.png") as picture:
        assert picture.width > 1000
    assert "decoding.json: new decoding settings of this model" in capsys.readouterr().out


@pytest.mark.slow
def test_schedules_are_searched_named_on_the_page_and_written(run_folder: Path, tiny_shards: Path, capsys) -> None:
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--trials", 6, "--num-steps", 3, "--no-plot")
    assert call(*words, "--schedules", "free", "--selectors", "confidence") == 0
    lists = [row["decoding"].get("tokens_per_step") for row in lines(run_folder)]
    assert any(lists)
    assert all(sum(each) == 16 for each in lists if each)
    assert "--schedules free" in (run_folder / "tuning" / "tuning.md").read_text()
    assert call(*words, "--schedules", "own", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "6 images each; 84 images with the second" in " ".join(out.split())
    MaskGIT.from_pretrained(run_folder).generate([0])
    with pytest.raises(ValueError, match="did you mean 'cosine'"):
        call(*words, "--schedules", "cosin")


@pytest.mark.slow
def test_a_second_run_measures_nothing_and_keeps_the_recipe(
    run_folder: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (run_folder, "--data", tiny_shards, "--num-images", 12, "--trials", 6, "--num-steps", "2-4", "--no-plot")
    call(*words)
    recipe, measured = (run_folder / "pretrained" / "decoding.json").read_text(), lines(run_folder)
    assert read_decoding(run_folder / "pretrained") is not None  # the search ends with another trial 0 than it began
    monkeypatch.setattr(evaluator, "generate_images", lambda *args, **options: pytest.fail("measured again"))
    call(*words)
    assert lines(run_folder) == measured
    assert (run_folder / "pretrained" / "decoding.json").read_text() == recipe


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_to_the_same_recipe(
    run_folder: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    words = ("--data", tiny_shards, "--num-images", 6, "--trials", 4, "--num-steps", "2,3", "--no-plot")
    call(run_folder, *words)
    plain, left = evaluator.generate_images, [None] * 2

    def stops(*args: object, **options: object) -> object:
        left.pop()
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "generate_images", stops)
        with pytest.raises(IndexError):
            call(other, *words)
    assert len(lines(other)) == 2
    call(other, *words)
    for one, two in zip(lines(run_folder), lines(other), strict=True):
        for line in (one, two):
            del line["seconds_per_image"], line["run"]
        assert one == two
    recipes = [folder / "pretrained" / "decoding.json" for folder in (run_folder, other)]
    assert recipes[0].exists() == recipes[1].exists()
    assert not recipes[0].exists() or recipes[0].read_text() == recipes[1].read_text()


def test_one_trial_is_the_model_s_own_and_changes_nothing(run_folder: Path, tiny_shards: Path, capsys) -> None:
    call(run_folder, "--data", tiny_shards, "--num-images", 6, "--trials", 1, "--no-plot")
    assert not (run_folder / "pretrained" / "decoding.json").exists()
    assert "decoding.json is unchanged" in capsys.readouterr().out
    assert "Nothing was changed" in (run_folder / "tuning" / "tuning.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["random", "grid"])
def test_a_dry_run_prints_the_trials_and_touches_nothing(run_folder: Path, tiny_shards: Path, how: str, capsys) -> None:
    assert call(run_folder, "--data", tiny_shards, "--dry-run", "--trials", 5, "--search", how) == 0
    out = capsys.readouterr().out
    assert "guidance linear" in out
    assert "│     4 │" in out
    assert [path.name for path in run_folder.iterdir()] == ["pretrained"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--trials", "0"), "--trials must be >= 1, got 0"),
        (("--trials", "99999999"), "--trials must be an integer in [1, 100000], got 99999999"),
        (("--metric", "fdi", "--dry-run"), "did you mean 'fid'"),
        (("--out", __file__), "--out must be a folder, got the file"),
        (("--seconds", "0"), "--seconds must be a"),
        (("--seconds", "nan"), "--seconds must be a"),
        (("--metric", "fdi"), "did you mean 'fid'"),
        (("--search", "bayes"), "--search must be one of random, grid, got 'bayes'"),
        (("--num-steps", "4-17"), "--num-steps must be <= 16, the tokens per image, got 17"),
        (("--num-steps", "x"), "--num-steps must be numbers such as 4,8,16 or a range such as 4-16, got 'x'"),
        (("--selectors", "halton,margn"), "did you mean 'margin'"),
        (("--num-images", "5"), "--num-images must be >= 6 (2 per class), got 5"),
        (("--plot-images", "5"), "--plot-images must be >= 6 (2 per class), got 5"),
        (("--plot-images", "0"), "--plot-images must be >= 2"),
        (("--seed", "-1"), "--seed must be an integer in [0, 2147483647], got -1"),
        (("--data", "nowhere"), "no such folder"),
    ],
)
def test_wrong_input_ends_with_2_and_one_line_before_any_work(
    run_folder: Path, tiny_shards: Path, words: tuple[str, ...], match: str, capsys
) -> None:
    given = () if "--data" in words else ("--data", str(tiny_shards))
    assert main(["tune", str(run_folder), *given, *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert match in error
    assert error.count("\n") == 1
    assert [path.name for path in run_folder.iterdir()] == ["pretrained"]


@pytest.mark.slow
def test_rows_of_other_weights_or_another_classifier_are_not_reused(
    run_folder: Path, tiny_shards: Path, judge: Path, tmp_path: Path
) -> None:
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--trials", 1, "--no-plot")
    call(*words, "--classifier", tmp_path / "judge")
    call(*words, "--classifier", judge)  # of the same weights, in another folder
    assert len(lines(run_folder)) == 2
    weights = load_file(tmp_path / "judge" / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, tmp_path / "judge" / "model.safetensors")
    call(*words, "--classifier", tmp_path / "judge")
    assert len(lines(run_folder)) == 4
    file = run_folder / "evaluation" / "ledger.jsonl"
    file.write_text(file.read_text().replace(fingerprint(run_folder / "pretrained" / "transformer")[:16], "0" * 16))
    call(*words, "--classifier", judge)
    assert len(lines(run_folder)) == 6


@pytest.mark.slow
def test_out_has_a_ledger_of_its_own(run_folder: Path, tiny_shards: Path, tmp_path: Path) -> None:
    call(run_folder, "--data", tiny_shards, "--num-images", 6, "--trials", 1, "--no-plot", "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ledger.jsonl", "tuning.csv", "tuning.md"}
    assert [path.name for path in run_folder.iterdir()] == ["pretrained"]


@pytest.mark.slow
def test_compare_finds_what_tune_has_measured(run_folder: Path, tiny_shards: Path, capsys) -> None:
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--device", "cpu")
    save_decoding(run_folder / "pretrained", DecodingConfig(4, "halton"))
    call_command("tune", *words, "--trials", 1, "--no-plot")
    call_command("compare", *words, "--num-steps", 4, "--selectors", "halton")
    assert "measured 0 rows, reused 1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_search_with_a_negative_model_records_it_next_to_the_settings(
    run_folder: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    weaker = save_tiny_pretrained(tmp_path / "weaker")
    weights = load_file(weaker / "transformer" / "model.safetensors")
    save_file({name: 0.5 * tensor for name, tensor in weights.items()}, weaker / "transformer" / "model.safetensors")
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--trials", 3, "--num-steps", 2, "--no-plot")
    call(*words)
    plain = lines(run_folder)
    assert call(*words, "--negative-model", weaker) == 0
    guided = lines(run_folder)[len(plain) :]
    assert {len(line["decoding"].get("negative_model", "")) for line in guided} == {16}
    assert all("negative_model" not in line["decoding"] for line in plain)
    content = json.loads((run_folder / "pretrained" / "decoding.json").read_text())
    assert (run_folder / "pretrained" / content["negative_model"]["folder"]).samefile(weaker / "transformer")
    assert content["negative_model"]["transformer"] == fingerprint(weaker / "transformer")
    assert f"--negative-model {weaker}" in (run_folder / "tuning" / "tuning.md").read_text()
    pipe = MaskGIT.from_pretrained(run_folder)
    assert pipe.negative_model is not None
    # The same search is found in the ledger, also with the model that decoding.json now names.
    call(*words)
    assert lines(run_folder) == plain + guided
    with pytest.raises(FileNotFoundError, match=r"--negative-model .*nowhere must be a run"):
        call(*words, "--negative-model", tmp_path / "nowhere")
    # A model that has moved is named again, and the file follows it.
    weaker.rename(tmp_path / "moved")
    assert call(*words, "--negative-model", tmp_path / "moved") == 0
    content = json.loads((run_folder / "pretrained" / "decoding.json").read_text())
    assert (run_folder / "pretrained" / content["negative_model"]["folder"]).samefile(tmp_path / "moved/transformer")


@pytest.mark.parametrize(
    "place", ["pretrained/decoding.json", "pretrained/decoding.json.old", "evaluation/ledger.jsonl"]
)
def test_an_output_that_cannot_be_written_is_found_before_the_search(
    run_folder: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (run_folder / place).mkdir(parents=True)
    monkeypatch.setattr(evaluator, "generate_images", lambda *args, **options: pytest.fail("measured"))
    with pytest.raises(ValueError, match="must be a file, got the folder"):
        call(run_folder, "--data", tiny_shards, "--num-images", 6, "--trials", 2, "--no-plot")
    (run_folder / place).rmdir()
    (run_folder / "tuning").touch()
    with pytest.raises(ValueError, match="RUN/tuning must be a folder, got the file"):
        call(run_folder, "--data", tiny_shards, "--num-images", 6, "--trials", 2, "--no-plot")


@pytest.mark.parametrize("by_path", [False, True])
def test_a_model_of_the_package_is_not_changed(tiny_shards: Path, *, by_path: bool) -> None:
    name, folder = next(iter(bundled_models().items()))
    with pytest.raises(ValueError, match=rf"{name}; copy it with .*save_pretrained\('DIR'\), and tune DIR"):
        call(folder if by_path else name, "--data", tiny_shards)
    assert not (folder / "decoding.json.old").exists()


@pytest.mark.slow
def test_the_page_is_written_even_if_the_decoding_cannot_be(
    run_folder: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("maskgit_pl.pipeline.pretrained.save_decoding", full)
    with pytest.raises(OSError, match="no space left"):
        call(run_folder, "--data", tiny_shards, "--num-images", 12, "--trials", 6, "--num-steps", "2-4")
    assert "## Second measurement" in (run_folder / "tuning" / "tuning.md").read_text()
