import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from maskgit_pl.cli import main
from maskgit_pl.data import manifest
from maskgit_pl.evaluation import classifier, model_evaluation
from maskgit_pl.networks.feature_networks import load_classifier
from tests.conftest import CLASSES


def call(data: Path, *words: str) -> int:
    return main(["train-classifier", "--data", str(data), "--device", "cpu", *words])


@pytest.mark.slow
def test_it_trains_once_and_says_how_good_it_is(tiny_shards, tmp_path, capsys):
    words = ("--out", str(tmp_path / "judge"), "--max-steps", "80", "--batch-size", "20", "--seed", "1")
    assert call(tiny_shards, *words) == 0
    first = capsys.readouterr().out
    assert "judge: trained; on 24 real val images:" in first
    assert "top-1" in first
    found = load_classifier(tmp_path / "judge")
    assert found.class_names == CLASSES
    assert found.network.sizes.image_size == 8
    kept = (tmp_path / "judge" / "model.safetensors").stat().st_mtime_ns
    assert call(tiny_shards, *words) == 0
    second = capsys.readouterr().out
    assert "reused" in second
    assert second.splitlines()[-1] == first.splitlines()[-1]
    assert (tmp_path / "judge" / "model.safetensors").stat().st_mtime_ns == kept


@pytest.mark.slow
def test_a_network_of_timm_goes_where_the_data_say(tiny_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classifier, "available_cores", lambda: 1)
    assert call(tiny_shards, "--model", "resnet10t", "--max-steps", "2", "--batch-size", "4", "--image-size", "16") == 0
    assert (tmp_path / "runs" / "shards-classifier" / "resnet10t" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "resnt18"), "did you mean"),
        (("--max-steps", "0"), "--max-steps must be an integer in [1, inf), got 0"),
        (("--batch-size", "1"), "--batch-size must be an integer in [2, inf), got 1"),
        (("--learning-rate", "0"), "--learning-rate must be a number in (0, inf), got 0"),
        (("--learning-rate", "nan"), "--learning-rate must be a finite number in (0, inf), got nan"),
        (("--flip-probability", "2"), "--flip-probability must be a number in [0, 1], got 2"),
        (("--image-size", "0"), "--image-size must be an integer in [1, inf), got 0"),
        (("--num-workers", "-1"), "--num-workers must be an integer in [0, inf), got -1"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(tiny_shards, capsys, words, said):
    assert call(tiny_shards, *words) == 2
    assert said in capsys.readouterr().err


def test_a_folder_of_another_network_or_that_cannot_be_written_is_refused(
    tiny_shards, tiny_pretrained, tmp_path, capsys
):
    copy = Path(shutil.copytree(tiny_pretrained / "transformer", tmp_path / "copy"))
    (tmp_path / "file").touch()
    before = {file: file.read_bytes() for file in copy.iterdir()}
    for out, said in (
        (copy, "config.json is not of a classifier; name another"),
        (tmp_path / "file", "--out must be a fold"),
    ):
        assert call(tiny_shards, "--out", str(out), "--max-steps", "2") == 2
        assert said in capsys.readouterr().err
    assert {file: file.read_bytes() for file in copy.iterdir()} == before


def test_data_that_are_not_there_are_said(tmp_path, capsys):
    assert call(tmp_path / "none") == 2
    assert "none" in capsys.readouterr().err


def test_images_of_several_sizes_need_one(tiny_shards, monkeypatch, capsys):
    varied = manifest.ImageRange((8, 12), (8, 20), (1,))
    plain = manifest.read_manifest_summary(tiny_shards)
    monkeypatch.setattr(model_evaluation, "read_manifest_summary", lambda folder: replace(plain, images=varied))
    assert call(tiny_shards) == 2
    assert "--image-size must be given for data" in capsys.readouterr().err
