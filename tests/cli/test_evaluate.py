import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from maskgit_pl.data.images import encode_png
from maskgit_pl.data.sources.shards import open_source
from maskgit_pl.data.writer import make_shards
from maskgit_pl.evaluation.evaluator import Evaluator
from maskgit_pl.evaluation.ledger import Ledger, Row
from maskgit_pl.networks.classifiers import load_classifier
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.sharing import bundled_models
from maskgit_pl.pretrained.networks import fingerprint, read_decoding
from tests.cli.conftest import call_command
from tests.conftest import CLASSES, save_tiny_pretrained
from tests.forked import holder
from tests.observing import run_on_ranks


def samples(folder: Path) -> list[Row]:
    """Returns the ledger rows of generated images, in the order of the file."""
    return [row for row in Ledger(folder / "ledger.jsonl").rows("samples") if row["run"]]


def stop_after(count: int, patch: pytest.MonkeyPatch) -> None:
    """Stops the command when it generates images once more."""
    plain, left = Evaluator.generate, [None] * count

    def stops(*args: object, **options: object) -> object:
        left.pop()
        return plain(*args, **options)

    patch.setattr(Evaluator, "generate", stops)


def forbid_generation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Evaluator, "generate", lambda *_, **__: pytest.fail("measured again"))


def call(command: str, *words: object) -> int:
    return call_command(command, "--device", "cpu", *words)


# evaluate


def read_report(folder: Path) -> dict[str, Any]:
    """Returns evaluation.json without times."""
    report: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    for each in report["samples"].values():
        each.pop("seconds_per_image", None)
    return report


@pytest.mark.slow
@pytest.mark.usefixtures("own_judge")
def test_writes_numbers_and_pictures(run_folder: Path, tiny_shards: Path, tmp_path: Path, capsys) -> None:
    weaker = save_tiny_pretrained(tmp_path / "weaker", seed=0)
    words = ("--data", tiny_shards, "--num-images", 12, "--num-steps", 4, "--negative-model", weaker)
    words += ("--reconstruction-images", 13)
    assert call("evaluate", run_folder, *words, "--features", "classifier") == 0
    report = json.loads((run_folder / "evaluation.json").read_text())
    assert report["protocol"]["negative_model"]["folder"] == str(weaker / "transformer")
    assert report["reconstruction"]["images"] == 13
    assert report["protocol"]["num_images"] == 12
    assert report["samples"]["without_guidance"]["fid/classifier"] > 0
    assert report["samples"]["exported_guidance"]["fid/classifier"] > 0
    assert report["likelihood"]["elbo_bits_per_token"] > 0
    assert 0 <= report["classifier"]["accuracy_on_real_images"] <= 1
    assert report["real_against_real"]["images"] == 12
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(run_folder / name) as picture:
            assert picture.width > 100
    with Image.open(run_folder / "decoding.gif") as animation:
        assert animation.n_frames == 4
    out = capsys.readouterr().out
    assert "class agreement" in out
    assert "FID (classifier)" in out
    assert report["limiting_stage"] in out
    assert report["held_out"] in out
    assert out.index("FID (classifier)") < out.index("of reconstructions") < out.index("KID x 1000")


@pytest.mark.slow
def test_an_evaluation_that_was_stopped_resumes(
    run_folder: Path, tiny_shards: Path, judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--num-steps", 2)
    words = (*words, "--features", f"classifier={judge}")

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "measure_likelihood", stopped)
        with pytest.raises(KeyboardInterrupt):
            call("evaluate", *words)
    folder = run_folder / "evaluation"
    ledger = folder / "ledger.jsonl"
    kept = ledger.read_text()
    images = {file: file.stat().st_mtime_ns for file in folder.glob("samples-*.npz")}
    # Those of the user, and the parts of a command that runs at the same time.
    others = [folder / "samples-50k.npz", folder / "samples-0123456789abcdef.npz.parts" / "0.npz"]
    for file in others:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert not (run_folder / "evaluation.json").exists()
    call("evaluate", *words, "--resume")
    assert ledger.read_text().startswith(kept)
    assert len(ledger.read_text().splitlines()) == len(kept.splitlines()) + 1  # the likelihood
    assert {file: file.stat().st_mtime_ns for file in images} == images
    resumed = read_report(run_folder)
    call("evaluate", *words)  # measures again
    assert all(file.is_file() for file in others)
    assert all(file.stat().st_mtime_ns > made for file, made in images.items())
    assert len(ledger.read_text().splitlines()) == 2 * (len(kept.splitlines()) + 1)  # nothing is lost
    assert read_report(run_folder) == resumed


@pytest.mark.survival
@pytest.mark.slow
def test_two_ranks_write_the_numbers_of_one(run_folder: Path, tiny_shards: Path, judge: Path, tmp_path: Path) -> None:
    reports = []
    for ranks in (1, 2):
        words = ["evaluate", run_folder, "--data", tiny_shards, "--num-images", 300, "--device", "cpu"]
        out = tmp_path / f"{ranks}" / "evaluation.json"
        run_on_ranks([*words, "--features", f"classifier={judge}", "--out", out], ranks)
        reports.append(read_report(out.parent))
        del reports[-1]["environment"]
    assert reports[0] == reports[1]


# tune


@pytest.mark.slow
@pytest.mark.usefixtures("own_judge")
def test_a_search_writes_the_settings_that_the_model_then_uses(run_folder: Path, tiny_shards: Path, capsys) -> None:
    own = MaskGIT.from_pretrained(run_folder / "pretrained").decoding
    words = (run_folder, "--data", tiny_shards, "--num-images", 12, "--trials", 6, "--num-steps", "2,3,4")
    assert call("tune", *words) == 0
    measured = samples(run_folder / "evaluation")
    confirmed = [line for line in measured if line["purpose"].startswith("confirmation")]
    assert len([line for line in measured if line["purpose"].startswith("trial")]) == 6
    assert confirmed[0]["purpose"] == "confirmation of trial 0"
    assert {line["num_images"] for line in confirmed} == {24}

    content = json.loads((run_folder / "pretrained" / "decoding.json").read_text())
    values = [line["fid"] for line in confirmed]
    assert content["tuned"]["metric"] == "fid/classifier"
    assert content["tuned"]["before"] == values[0]
    assert content["tuned"]["value"] == min(values) < values[0]  # of seed 0
    assert content["transformer"] == fingerprint(run_folder / "pretrained" / "transformer")
    tuned = read_decoding(run_folder / "pretrained")
    assert tuned is not None
    assert MaskGIT.from_pretrained(run_folder / "pretrained").decoding == tuned != own
    page = (run_folder / "tuning" / "tuning.md").read_text()
    assert page.startswith("# Search for a decoding\n")
    assert "decoding.json: new decoding settings of this model" in capsys.readouterr().out
    # The same command finds all measurements, and comes to the same page.
    assert call("tune", *words) == 0
    assert samples(run_folder / "evaluation") == measured
    assert (run_folder / "tuning" / "tuning.md").read_text() == page
    assert "decoding.json is unchanged" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("own_judge")
def test_a_search_with_a_negative_model_records_it_next_to_the_settings(
    run_folder: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    weaker = save_tiny_pretrained(tmp_path / "weaker")
    weights = load_file(weaker / "transformer" / "model.safetensors")
    save_file({name: 0.5 * tensor for name, tensor in weights.items()}, weaker / "transformer" / "model.safetensors")
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--trials", 3, "--num-steps", 2)

    call("tune", *words)
    plain = samples(run_folder / "evaluation")
    assert call("tune", *words, "--negative-model", weaker) == 0
    guided = samples(run_folder / "evaluation")[len(plain) :]
    assert {len(line["decoding"].get("negative_model", "")) for line in guided} == {16}
    assert all("negative_model" not in line["decoding"] for line in plain)
    assert fingerprint(run_folder / "pretrained" / "negative") == fingerprint(weaker / "transformer")
    assert MaskGIT.from_pretrained(run_folder).negative_model is not None


@pytest.mark.usefixtures("own_judge")
def test_a_study_has_one_search_at_a_time(run_folder: Path, tiny_shards: Path, monkeypatch) -> None:
    forbid_generation(monkeypatch)
    study = run_folder / "tuning" / "study.db"
    with (
        holder(study) as other,
        pytest.raises(ValueError, match=f"study.db is in use by process {other.pid} on .*--out"),
    ):
        call("tune", run_folder, "--data", tiny_shards, "--num-images", 6)


def test_a_decoding_that_cannot_be_written_is_found_before_the_search(
    run_folder: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_folder / "pretrained/decoding.json").mkdir()
    forbid_generation(monkeypatch)
    with pytest.raises(ValueError, match=r"decoding\.json must be a file, got the folder"):
        call("tune", run_folder, "--data", tiny_shards, "--num-images", 6)


def test_a_model_of_the_package_is_not_changed(tiny_shards: Path) -> None:
    for run in next(iter(bundled_models().items())):  # its name and its folder
        with pytest.raises(ValueError, match=r"copy it with .*save_pretrained\('DIR'\), and tune DIR"):
            call("tune", run, "--data", tiny_shards)


# evaluate-tokenizer


def test_an_exported_tokenizer_needs_no_transformer(
    run_folder: Path, tiny_shards: Path, judge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run_folder / "pretrained" / "transformer")
    words = (run_folder / "pretrained" / "tokenizer", "--data", tiny_shards, "--num-images", 10)
    assert call("evaluate-tokenizer", *words, "--features", f"classifier={judge}") == 0
    assert "PSNR, dB" in capsys.readouterr().out
    assert json.loads((run_folder / "tokenizer.json").read_text())["num_images"] == 10


def test_images_of_several_sizes_need_a_size_for_a_classifier(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 6)):
        (tmp_path / "images" / split / "Bag").mkdir(parents=True)
        for number in range(count):
            pixels = torch.randint(0, 256, (1, 12, 20 + number), dtype=torch.uint8)
            (tmp_path / "images" / split / "Bag" / f"{number}.png").write_bytes(encode_png(pixels))
    make_shards(open_source(tmp_path / "images"), tmp_path / "wide")
    with pytest.raises(ValueError, match="--image-size must be given for data"):
        call("train-classifier", "--data", tmp_path / "wide")


# train-classifier


@pytest.mark.slow
def test_a_classifier_is_trained_once_and_its_accuracy_printed(tiny_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("--data", tiny_shards, "--max-steps", 80, "--batch-size", 20, "--seed", 1)
    assert call("train-classifier", *words) == 0
    first = capsys.readouterr().out
    assert "runs/shards-classifier/small: trained; on 24 real val images:" in first
    assert "top-1" in first
    assert load_classifier(Path("runs/shards-classifier/small")).class_names == CLASSES
    assert call("train-classifier", *words) == 0
    second = capsys.readouterr().out
    assert "reused" in second
    assert second.splitlines()[-1] == first.splitlines()[-1]
