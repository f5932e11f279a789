import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from maskgit_pl.cli import main
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation import evaluator
from maskgit_pl.pipeline.pretrained import save_decoding
from tests.cli.commands import call_command
from tests.conftest import save_tiny_pretrained
from tests.observing import run_on_ranks


def call(*words: object) -> int:
    return call_command("evaluate", "--device", "cpu", "--features", "classifier", *words)


@pytest.mark.usefixtures("quick_judge")
@pytest.mark.parametrize("command", ["evaluate", "evaluate-tokenizer"])
def test_a_model_in_the_folder_of_the_classifier_is_kept(
    run_folder: Path, tiny_shards: Path, capsys, command: str
) -> None:
    folder = run_folder / "pretrained" / "transformer"
    before = {file: file.read_bytes() for file in folder.iterdir()}
    words = ["--data", tiny_shards, "--features", "classifier", "--classifier", folder, "--device", "cpu"]
    assert main([command, *map(str, [run_folder, *words, "--num-images", 12])]) == 2
    assert "must hold a classifier of these data" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.slow
@pytest.mark.usefixtures("quick_judge")
def test_writes_numbers_pictures_and_a_classifier(run_folder: Path, tiny_shards: Path, capsys) -> None:
    assert call(run_folder, "--data", tiny_shards, "--num-images", 12, "--num-steps", 4) == 0
    report = json.loads((run_folder / "evaluation.json").read_text())
    assert report["reconstruction"]["images"] == 24
    assert report["protocol"]["num_images"] == 12
    assert report["samples"]["without_guidance"]["fid/classifier"] > 0
    assert report["samples"]["exported_guidance"]["fid/classifier"] > 0
    assert report["likelihood"]["elbo_bits_per_token"] > 0
    assert report["classifier"]["real_images"] == 24
    assert report["real_against_real"]["images"] == 12
    assert (run_folder.parent / "shards-classifier" / "small" / "model.safetensors").is_file()
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(run_folder / name) as picture:
            assert picture.width > 100
    with Image.open(run_folder / "decoding.gif") as animation:
        assert animation.n_frames == 4
    out = capsys.readouterr().out
    assert "class agreement" in out
    assert "FID (classifier)" in out
    assert report["limiting_stage"]["stage"] in ("tokenizer", "transformer", "neither")
    for said in (report["limiting_stage"]["text"], report["held_out"]["text"]):
        assert said in out
    assert out.index("FID (classifier)") < out.index("of reconstructions") < out.index("KID x 1000")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_judge")
def test_the_steps_are_the_model_s_own_its_tuned_ones_where_there_are_any(run_folder: Path, tiny_shards: Path) -> None:
    for number in (4, 3):  # as exported; as tuned
        call(run_folder, "--data", tiny_shards, "--num-images", 6)
        protocol = json.loads((run_folder / "evaluation.json").read_text())["protocol"]
        assert (protocol["num_steps"], protocol["decoding"]["num_steps"]) == (number, number)
        save_decoding(run_folder / "pretrained", DecodingConfig(3, "halton"))
    assert protocol["decoding"]["token_selector"] == "halton"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_judge")
def test_the_run_says_what_data_it_was_trained_on_and_numbers_repeat(run_folder: Path, tiny_shards: Path) -> None:
    (run_folder / "transformer").mkdir()
    (run_folder / "transformer" / "config.yaml").write_text(f"data:\n  path: {tiny_shards}\n")
    reports = []
    for name in ("first", "second"):
        call(run_folder, "--num-images", 6, "--num-steps", 2, "--out", run_folder / name / "numbers.json")
        reports.append(json.loads((run_folder / name / "numbers.json").read_text()))
    for report in reports:
        for samples in report["samples"].values():
            del samples["seconds_per_image"]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_an_evaluation_that_was_stopped_goes_on(
    run_folder: Path, tiny_shards: Path, judge: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        run_folder,
        "--data",
        tiny_shards,
        "--num-images",
        6,
        "--num-steps",
        2,
        "--features",
        f"classifier={judge}",
    )

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluator.Evaluator, "measure_likelihood", stopped)
        with pytest.raises(KeyboardInterrupt):
            call(*words)
    ledger = run_folder / "evaluation" / "ledger.jsonl"
    kept = ledger.read_text()
    images = {file: file.stat().st_mtime_ns for file in (run_folder / "evaluation").glob("samples-*.npz")}
    # Those of the user, and those of a command that runs at the same time.
    others = [run_folder / "evaluation" / name for name in ("samples-50k.npz", "samples-0123456789abcdef.npz")]
    parts = [file.with_name(f"{file.name}.parts") / "0.npz" for file in others]
    for file in [*others, *parts]:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert not (run_folder / "evaluation.json").exists()
    call(*words, "--resume")
    assert ledger.read_text().startswith(kept)
    assert len(ledger.read_text().splitlines()) == len(kept.splitlines()) + 1  # the likelihood
    assert {file: file.stat().st_mtime_ns for file in images} == images
    resumed = json.loads((run_folder / "evaluation.json").read_text())
    call(*words)  # measures again
    assert all(file.is_file() for file in [*others, *parts])
    assert all(file.stat().st_mtime_ns > made for file, made in images.items())
    assert len(ledger.read_text().splitlines()) == 2 * (len(kept.splitlines()) + 1)  # nothing is lost
    again = json.loads((run_folder / "evaluation.json").read_text())
    for report in (resumed, again):
        for samples in report["samples"].values():
            samples.pop("seconds_per_image", None)
    assert resumed == again


@pytest.mark.slow
@pytest.mark.usefixtures("quick_judge")
def test_a_negative_model_is_named_in_the_report_and_changes_only_the_guided_images(
    run_folder: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    weaker = save_tiny_pretrained(tmp_path / "weaker", seed=0)
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--num-steps", 2)
    reports = []
    for more in ((), ("--negative-model", weaker)):
        assert call(*words, *more) == 0
        reports.append(json.loads((run_folder / "evaluation.json").read_text()))
    assert "negative_model" not in reports[0]["protocol"]
    named = reports[1]["protocol"]["negative_model"]
    assert named["folder"] == str(weaker / "transformer")
    plain, guided = ({name: each["fid/classifier"] for name, each in report["samples"].items()} for report in reports)
    assert plain["without_guidance"] == guided["without_guidance"]
    # The negative model is the model itself: guidance by it is none.
    assert guided["exported_guidance"] == pytest.approx(guided["without_guidance"], rel=1e-4)


@pytest.mark.slow
def test_accepted_images_are_measured_beside_all_and_a_judge_that_chose_them_is_named(
    run_folder: Path, tiny_shards: Path, judge: Path, quick_judge, tmp_path: Path, capsys
) -> None:
    words = (run_folder, "--data", tiny_shards, "--num-images", 12, "--num-steps", 2, "--accept-rate", 0.5)
    assert call(*words) == 0
    report = json.loads((run_folder / "evaluation.json").read_text())
    assert list(report["samples"]) == ["exported_guidance", "without_guidance", "accepted"]
    accepted, others = report["samples"]["accepted"], report["samples"]["exported_guidance"]
    assert accepted["class_agreement"] >= others["class_agreement"]
    assert accepted["fid/classifier"] != others["fid/classifier"]
    assert {"precision/classifier", "recall/classifier", "diversity"} <= set(accepted)
    recorded = report["acceptance"]
    assert (recorded["accept_rate"], recorded["num_candidates"]) == (0.5, 24)
    assert recorded["also_judges"] == ["classifier"]
    out = " ".join(capsys.readouterr().out.split())
    assert "the best 50.0% of 24 candidates by classifier" in out
    assert "which also judges them" in out
    assert not list((run_folder / "evaluation").glob("*candidates*"))
    # Another classifier than the one that judges.
    other = tmp_path / "other"
    shutil.copytree(judge, other)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "head.bias": weights["head.bias"] + 0.1}, other / "model.safetensors")
    assert call(*words, "--accept-classifier", other) == 0
    report = json.loads((run_folder / "evaluation.json").read_text())
    assert report["acceptance"]["also_judges"] == []
    assert report["acceptance"]["classifier"] == str(other)
    assert "which also judges" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--accept-rate", 0), "--accept-rate must be a number in"),
        (("--accept-rate", 0.5, "--num-images", 13), "--num-images must be a multiple of 3"),
        (("--accept-classifier", "runs/x"), "--accept-classifier must be given with accept_rate"),
    ],
)
def test_refuses_an_acceptance_that_cannot_be(run_folder: Path, tiny_shards: Path, words, message) -> None:
    with pytest.raises(ValueError, match=message):
        call(run_folder, "--data", tiny_shards, *words)
    assert not (run_folder / "evaluation").exists()


@pytest.mark.survival
@pytest.mark.slow
def test_two_ranks_write_the_numbers_of_one(run_folder: Path, tiny_shards: Path, judge: Path, tmp_path: Path) -> None:
    reports = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}" / "evaluation.json"
        words = [
            "evaluate", run_folder, "--data", tiny_shards, "--num-images", 300, "--features", f"classifier={judge}",
            "--device", "cpu", "--out", out,
        ]  # fmt: skip
        run_on_ranks(words, ranks)
        reports.append(json.loads(out.read_text()))
    for report in reports:
        del report["environment"]
        for samples in report["samples"].values():
            del samples["seconds_per_image"]
    assert reports[0] == reports[1]


def test_unknown_or_doubled_networks_are_refused_before_any_work(run_folder: Path, tiny_shards: Path) -> None:
    with pytest.raises(ValueError, match="unknown feature network 'clasifier'"):
        call(run_folder, "--data", tiny_shards, "--features", "clasifier")
    with pytest.raises(ValueError, match="must name each network once, got lite0 twice"):
        call(run_folder, "--data", tiny_shards, "--features", "lite0,classifier,lite0")
    with pytest.raises(ValueError, match="MASKGIT_INCEPTION"):
        call(run_folder, "--data", tiny_shards, "--features", f"inception={run_folder}/nowhere.pth")
    assert not (run_folder.parent / "shards-classifier").exists()


def test_missing_or_foreign_data_are_named(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="choose them with --data"):
        call(run_folder)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        call(run_folder, "--data", tmp_path / "nowhere")


def test_too_few_images_are_refused_before_any_work(run_folder: Path, tiny_shards: Path) -> None:
    with pytest.raises(ValueError, match=r"--num-images must be >= 6 \(2 per class\)"):
        call(run_folder, "--data", tiny_shards, "--num-images", 5)
    assert not (run_folder.parent / "shards-classifier").exists()
