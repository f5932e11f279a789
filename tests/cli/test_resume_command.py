"""A run resumes with the settings that it began with, or not at all."""

import logging
import shutil
from pathlib import Path

import pytest
import yaml

from maskgit_pl.cli import main
from maskgit_pl.data.sources.opening import open_source
from maskgit_pl.data.writer import make_shards
from maskgit_pl.pipeline.pretrained import fingerprint
from maskgit_pl.training.checkpoint_files import newest_checkpoint, read_settings, step_of
from tests.conftest import flags, save_tiny_pretrained

TINY = Path(__file__).parents[1] / "tiny"


@pytest.fixture(scope="module", params=["tokenizer", "transformer"])
def begun(request, tmp_path_factory, tiny_shards, tiny_pretrained):
    """A run that stopped at step 1, as (stage, the words of its command)."""
    stage, runs = request.param, tmp_path_factory.mktemp("begun")
    words = ["train", stage, f"--data={tiny_shards}", f"--runs-folder={runs}", "--run=one"]
    words += [f"--tokenizer={tiny_pretrained / 'tokenizer'}"] if stage == "transformer" else []
    words += flags(yaml.safe_load((TINY / f"{stage}.yaml").read_text()))
    with pytest.MonkeyPatch.context() as patch:
        quietly(patch)
        assert main(words) == 0
    return stage, words, runs / "one" / stage


def quietly(patch: pytest.MonkeyPatch) -> None:
    """Restores logging and environment afterwards."""
    ours = logging.getLogger("maskgit_pl")
    for name in ("propagate", "level"):
        patch.setattr(ours, name, getattr(ours, name))
    patch.setattr(ours, "handlers", [])
    patch.setenv("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture
def go_on(begun, monkeypatch, capsys):
    """The same command again with more words; gives the exit code and what was said."""

    def call(*more: str) -> tuple[int, str]:
        quietly(monkeypatch)
        code = main([*begun[1], *more])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


SIZES = {
    "tokenizer": ("codebook_size=32", "codebook_size: 16 -> 32"),
    "transformer": ("embed_dim=32", "embed_dim: 16 -> 32"),
}
LEARNING = {
    "tokenizer": [
        ("--model.optimizer.learning_rate.peak=0.5", "model.optimizer.learning_rate.peak: 0.004 -> 0.5"),
        ("--model.reconstruction_loss=l1", "model.reconstruction_loss: l2 -> l1"),
        ("--model.adversarial={}", "model.adversarial.weight: None -> 0.1"),
        ("--model.network.quantizer=gradient", "model.network.quantizer: {'name': 'ema'"),
    ],
    "transformer": [
        ("--model.mask_schedule=square", "model.mask_schedule: cosine -> square"),
        ("--model.network.depth=2", "model.network.depth: 1 -> 2"),
        ("--model.network.class_dropout=0.2", "model.network.class_dropout: 0.1 -> 0.2"),
        ("--trainer.gradient_clip_val=2.0", "trainer.gradient_clip_val: 1.0 -> 2.0"),
        ("--model.optimizer.betas=[0.9,0.99]", "model.optimizer.betas: [0.9, 0.96] -> [0.9, 0.99]"),
    ],
}


@pytest.mark.slow
def test_settings_that_would_make_another_run_are_refused_with_the_list(begun, go_on):
    stage, _, folder = begun
    size, change = SIZES[stage]
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    code, said = go_on(
        f"--model.network.{size}", "--data.seed=7", "--data.global_batch=8", "--data.shuffle_window=2",
        "--trainer.max_steps=9",
    )  # fmt: skip
    assert code == 2
    assert len(said.splitlines()) == 1
    for part in (
        f"cannot resume {folder} from step 1: settings changed (",
        f"model.network.{change}", "data.seed: 0 -> 7", "data.global_batch: 4 -> 8", "data.shuffle_window: None -> 2",
        "Restore them", "--run", "--pretrained",
    ):  # fmt: skip
        assert part in said
    assert "max_steps" not in said
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_each_setting_that_decides_what_is_learned_is_refused(begun, go_on):
    flags, wanted = zip(*LEARNING[begun[0]], strict=True)
    code, said = go_on(*flags)
    assert code == 2
    for change in wanted:
        assert change in said


def test_other_data_are_refused_and_the_same_data_elsewhere_are_not(begun, go_on, tiny_shards, tmp_path):
    (tmp_path / "elsewhere").symlink_to(tiny_shards)
    assert go_on(f"--data={tmp_path / 'elsewhere'}")[0] == 0
    make_shards(open_source(tiny_shards.parent / "images"), tmp_path / "other", shard_size=50)
    code, said = go_on(f"--data={tmp_path / 'other'}")
    assert code == 2
    old = read_settings(newest_checkpoint(begun[2] / "checkpoints"))["data"]
    assert f"data: {old[:12]} -> " in said


def test_another_tokenizer_is_refused_and_the_same_one_elsewhere_is_not(begun, go_on, tiny_pretrained, tmp_path):
    if begun[0] == "tokenizer":
        return  # only stage 2 has one
    (tmp_path / "elsewhere").symlink_to(tiny_pretrained)
    assert go_on(f"--tokenizer={tmp_path / 'elsewhere' / 'tokenizer'}")[0] == 0
    other = save_tiny_pretrained(tmp_path / "other", seed=3) / "tokenizer"
    code, said = go_on(f"--tokenizer={other}")
    assert code == 2
    assert " from step 1: settings changed (tokenizer: " in said


@pytest.mark.slow
def test_what_is_harmless_may_change(begun, go_on):
    stage, _, folder = begun
    decoding = ["--model.decoding.num_steps=3"] if stage == "transformer" else ["--model.memory_format=contiguous"]
    executed = [
        "--model.activation_checkpointing=blocks", "--model.optimizer.adamw=for-loop", "--matmul_precision=high",
    ]  # fmt: skip
    code, said = go_on(
        "--trainer.max_steps=3", "--trainer.log_every_n_steps=2", "--trainer.val_check_interval=2",
        "--data.validation_batch=4", "--data.validation_samples=4", "--data.num_workers=2",
        "--data.max_batch_per_device=1", "--checkpoint_every=2", "--model.optimizer.learning_rate.warmup_steps=2",
        *decoding, *executed,
    )  # fmt: skip
    assert code == 0, said
    assert newest_checkpoint(folder / "checkpoints").name == "step-00000003"


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_export_is_not_finished(begun, go_on, tmp_path):
    stage, _, folder = begun
    exported, said_of_it = folder.parent / "pretrained" / stage, folder / "exported.json"
    shutil.copytree(exported, tmp_path / stage)
    shutil.copy(said_of_it, tmp_path)
    longer = f"--trainer.max_steps={step_of(newest_checkpoint(folder / 'checkpoints')) + 1}"
    assert go_on(longer)[0] == 0
    wanted = fingerprint(exported)
    shutil.copytree(tmp_path / stage, exported, dirs_exist_ok=True)  # as it was before the longer run's export
    shutil.copy(tmp_path / said_of_it.name, folder)
    assert fingerprint(exported) != wanted
    assert "exported " in go_on(longer)[1]
    assert fingerprint(exported) == wanted
    assert "nothing to do" in go_on(longer)[1]
