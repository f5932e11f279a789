import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl.cli import evaluate
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation import classifier
from maskgit_pl.evaluation.classifier import ClassifierConfig
from maskgit_pl.pretrained import save_decoding


@pytest.fixture
def run_folder(tiny_pretrained: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_pretrained, tmp_path / "run" / "pretrained")
    return tmp_path / "run"


@pytest.fixture
def quick_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = replace(ClassifierConfig(), width=4, max_steps=3, batch=20)
    plain = classifier.obtain_classifier
    monkeypatch.setattr(classifier, "obtain_classifier", lambda *args, **options: plain(*args, config=quick, **options))


def call(*words: object) -> int:
    parser = argparse.ArgumentParser()
    evaluate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["evaluate", *map(str, words), "--device", "cpu", "--features", "classifier"])
    code: int = args.run(args)
    return code


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
    assert (run_folder / "classifier" / "model.safetensors").is_file()
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(run_folder / name) as picture:
            assert picture.width > 100
    with Image.open(run_folder / "decoding.gif") as animation:
        assert animation.n_frames == 4
    out = capsys.readouterr().out
    assert "class agreement" in out
    assert "FID, classifier" in out


@pytest.mark.usefixtures("quick_judge")
def test_the_steps_are_the_model_s_own_its_tuned_ones_where_there_are_any(run_folder: Path, tiny_shards: Path) -> None:
    for number in (4, 3):  # as exported; as tuned
        call(run_folder, "--data", tiny_shards, "--num-images", 6)
        protocol = json.loads((run_folder / "evaluation.json").read_text())["protocol"]
        assert (protocol["num_steps"], protocol["decoding"]["num_steps"]) == (number, number)
        save_decoding(run_folder / "pretrained", DecodingConfig(3, "halton"))
    assert protocol["decoding"]["token_selector"] == "halton"


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


def test_missing_or_foreign_data_are_named(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="name them with --data"):
        call(run_folder)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        call(run_folder, "--data", tmp_path / "nowhere")


def test_too_few_images_are_refused_before_any_work(run_folder: Path, tiny_shards: Path) -> None:
    with pytest.raises(ValueError, match="--num-images: at least 2 for each of the 3 classes"):
        call(run_folder, "--data", tiny_shards, "--num-images", 5)
    assert not (run_folder / "classifier").exists()
