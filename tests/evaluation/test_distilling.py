"""``distill``: it trains, measures and exports a student, resumes it, and refuses models that have no steps."""

import shutil

import pytest

from maskgit_pl import MaskGIT
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation import ClassifierConfig, distill, train_classifier
from maskgit_pl.files import read_yaml
from maskgit_pl.pretrained.networks import save_decoding

SHORT = {"trainer.max_steps": 2, "trainer.val_check_interval": 2, "data.global_batch": 8, "trainer.accelerator": "cpu"}
MEASURED = ("val/fid", "val/class_agreement", "val/diversity", "val/pixel_fid", "val/recall")


@pytest.mark.slow
@pytest.mark.trainings
def test_a_student_is_trained_measured_and_exported(tiny_shards, tiny_pretrained, tmp_path):
    teacher, run = shutil.copytree(tiny_pretrained, tmp_path / "teacher"), tmp_path / "student"
    save_decoding(teacher, DecodingConfig(3, guidance={"name": "linear", "scale": 2.0}))

    train_classifier(tiny_shards, config=ClassifierConfig(max_steps=2, batch=8), runs_folder=tmp_path, device="cpu")

    def train():
        return distill(
            teacher,
            method="dimo",
            num_steps=2,
            data=tiny_shards,
            run=run,
            overrides={**SHORT, "loggers": ["csv"]},
        )

    result = train()
    assert result.step == 2
    assert set(result.metrics) == set(MEASURED)
    pipe = MaskGIT.from_pretrained(result.pretrained)
    assert (pipe.decoding.num_steps, pipe.decoding.random_start) == (2, 0.4)
    assert len(pipe.generate(["Trouser"] * 3, seed=1)) == 3
    assert read_yaml(run / "transformer" / "config.yaml")["model"]["teacher_decoding"]["num_steps"] == 3
    assert train().was_finished


def test_an_unknown_method_and_an_autoregressive_teacher_are_refused(tiny_shards, tiny_autoregressive, tmp_path):
    with pytest.raises(ValueError, match="method must be one of dimo, guidance, got 'dymo'"):
        distill(tiny_autoregressive, method="dymo", data=tiny_shards, run=tmp_path / "student")
    with pytest.raises(ValueError, match="distillation requires a model with bidirectional attention"):
        distill(tiny_autoregressive, data=tiny_shards, run=tmp_path / "student")
