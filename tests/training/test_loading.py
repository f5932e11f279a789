"""``load_from_checkpoint`` of a run that a command trained."""

import shutil

import pytest
from lightning.pytorch import Trainer
from torch.testing import assert_close

import maskgit_pl as mg
from maskgit_pl.cli import main
from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.training.checkpoints import FolderCheckpointIO, newest_checkpoint
from tests.conftest import save_uneven_shards, tiny_flags

CLASSES = {"tokenizer": mg.Tokenizer, "transformer": mg.MaskedTokenModel}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains one step of both stages."""
    folder = tmp_path_factory.mktemp("loading")
    save_uneven_shards(folder / "shards", (1, 7, 22))
    for stage in CLASSES:
        words = ["train", stage, f"--data={folder / 'shards'}", *tiny_flags(stage), "--trainer.precision=32-true"]
        assert main([*words, f"--runs-folder={folder}", "--run=one"]) == 0
    return folder / "one"


@pytest.mark.slow
@pytest.mark.parametrize("stage", CLASSES)
def test_a_run_a_checkpoint_and_the_pretrained_folder_are_loaded(run, stage):
    checkpoint = newest_checkpoint(run / stage / "checkpoints")
    saved = FolderCheckpointIO().load_checkpoint(checkpoint)["state_dict"]
    for path in (run, str(checkpoint)):
        loaded = CLASSES[stage].load_from_checkpoint(path, map_location="cpu").state_dict()
        assert_close(loaded, saved, rtol=0, atol=0)
    module = CLASSES[stage].load_from_checkpoint(run / "pretrained")
    assert_close(module.ema_network.state_dict(), {
        name.removeprefix("ema_network."): value for name, value in saved.items() if name.startswith("ema_network.")
    }, rtol=0, atol=0)  # fmt: skip
    assert CLASSES[stage].load_from_checkpoint(run, map_location="meta").device.type == "meta"


@pytest.mark.slow
def test_an_autoregressive_model_is_loaded(run):
    sizes = [flag for flag in tiny_flags("transformer") if "decoding" not in flag]
    words = ["train", "transformer", "--recipe=autoregressive", f"--data={run.parent / 'shards'}", *sizes]
    tokenizer = f"--tokenizer={run / 'pretrained' / 'tokenizer'}"
    assert main([*words, "--trainer.precision=32-true", tokenizer, f"--runs-folder={run.parent}", "--run=causal"]) == 0
    module = mg.AutoregressiveModel.load_from_checkpoint(run.parent / "causal")
    exported = mg.AutoregressiveModel.load_from_checkpoint(run.parent / "causal" / "pretrained")
    assert module.config.network.attention == "causal"
    assert_close(exported.ema_network.state_dict(), module.ema_network.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_a_plain_trainer_goes_on_from_a_loaded_module(run):
    module = mg.MaskedTokenModel.load_from_checkpoint(run)
    data = ShardData(ShardDataConfig(
        run.parent / "shards", image_size=8, in_channels=1, global_batch=4, validation_batch=8, num_workers=0
    ))  # fmt: skip
    before = {name: value.clone() for name, value in module.transformer.state_dict().items()}
    trainer = Trainer(max_steps=1, limit_val_batches=0, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, data)
    assert any(not value.equal(before[name]) for name, value in module.transformer.state_dict().items())


@pytest.mark.slow
def test_what_cannot_be_done_is_refused_in_one_line(run, tmp_path):
    load, checkpoint = mg.MaskedTokenModel.load_from_checkpoint, newest_checkpoint(run / "transformer" / "checkpoints")
    lone = shutil.copytree(run / "pretrained", tmp_path / "lone" / "pretrained")
    for error, message, call in (
        (TypeError, "^option 'configs': did you mean 'config'", lambda: load(run, configs=1)),
        (ValueError, "^hparams_file must be None", lambda: load(run, hparams_file="a.yaml")),
        (ValueError, "^map_location must be a device", lambda: load(run, map_location={})),
        (ValueError, "^strict must be True", lambda: load(run / "pretrained", strict=False)),
        (FileNotFoundError, "no such file, which has the configuration", lambda: load(lone)),
        (FileNotFoundError, "must hold a checkpoint or a pretrained", lambda: load(tmp_path)),
        (ValueError, "^checkpoint must be one of a tokenizer", lambda: mg.Tokenizer.load_from_checkpoint(checkpoint)),
        (
            ValueError,
            "^AutoregressiveModel of .*: model: unknown key .mask_schedule",
            lambda: mg.AutoregressiveModel.load_from_checkpoint(run),
        ),
    ):
        with pytest.raises(error, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
