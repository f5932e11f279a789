"""``maskgit export``: what training exports at its end, from any checkpoint of any number of ranks."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from maskgit_pl.cli import main
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.pretrained import load_tokenizer, load_transformer
from maskgit_pl.training.checkpoints import FolderCheckpointIO
from tests.conftest import save_tiny_pretrained, save_uneven_shards, tiny_flags
from tests.observing import Runs, Topology


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Makes shards and a pretrained tokenizer."""
    folder = tmp_path_factory.mktemp("given")
    save_uneven_shards(folder / "shards", (1, 7, 22))
    save_tiny_pretrained(folder / "pretrained")
    return folder


def words(stage: str, given: Path) -> list[str]:
    named = [f"--tokenizer={given / 'pretrained' / 'tokenizer'}"] if stage == "transformer" else []
    steps = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--checkpoint_every=2"]
    return [stage, f"--data={given / 'shards'}", *named, *tiny_flags(stage), *steps, "--trainer.precision=32-true"]


@pytest.fixture(scope="module")
def run(given, tmp_path_factory) -> Path:
    """Trains both stages to step 4, with checkpoints of steps 2 and 4."""
    runs = tmp_path_factory.mktemp("runs")
    for stage in ("tokenizer", "transformer"):
        own = [word for word in words(stage, given) if not word.startswith("--tokenizer")]
        assert main(["train", *own, f"--runs-folder={runs}", "--run=one"]) == 0
    return runs / "one"


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.suffix in (".safetensors", ".json")
    }


@pytest.mark.slow
def test_the_newest_checkpoint_becomes_what_training_exported(run, tmp_path):
    assert main(["export", str(run), "--stage=transformer", f"--out={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "README.md").is_file()
    made = content(tmp_path / "out" / "transformer")
    assert made == content(run / "pretrained" / "transformer")
    assert set(made) == {"config.json", "model.safetensors"}
    assert main(["export", str(run), "--stage=tokenizer", f"--out={tmp_path / 'second'}"]) == 0
    trained = FolderCheckpointIO().load_checkpoint(run / "tokenizer" / "checkpoints" / "step-00000004")["state_dict"]
    for name, tensor in load_tokenizer(tmp_path / "second" / "tokenizer").network.state_dict().items():
        assert torch.equal(tensor, trained[f"ema_network.{name}"])


@pytest.mark.slow
def test_parts_of_the_training_that_are_gone_do_not_matter(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    config = copy / "transformer" / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    missing = {"loggers": [{"name": "wandb"}, {"name": "mlflow"}], "callbacks": ["gone"], "profiler": "gone"}
    config.write_text(yaml.safe_dump(tree | missing, sort_keys=False))
    assert main(["export", str(copy), "--stage=transformer", f"--out={tmp_path / 'out'}"]) == 0
    assert content(tmp_path / "out" / "transformer") == content(run / "pretrained" / "transformer")


def test_an_older_checkpoint_is_named_by_its_step(run, tmp_path):
    assert main(["export", str(run), "--stage=transformer", "--step=2", f"--out={tmp_path}"]) == 0
    assert content(tmp_path / "transformer") != content(run / "pretrained" / "transformer")
    trained = FolderCheckpointIO().load_checkpoint(run / "transformer" / "checkpoints" / "step-00000002")["state_dict"]
    for name, tensor in load_transformer(tmp_path / "transformer").network.state_dict().items():
        assert torch.equal(tensor, trained[f"ema_network.{name}"])


def test_what_is_there_is_replaced_only_when_asked_for(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "copy")
    before = content(copy / "pretrained")
    assert main(["export", str(copy), "--step=2"]) == 2
    assert "exists; replace it with --replace" in capsys.readouterr().err
    assert content(copy / "pretrained") == before
    assert main(["export", str(copy), "--step=2", "--stage=tokenizer", "--replace"]) == 0
    assert content(copy / "pretrained") != before


def test_files_of_the_user_are_not_removed_by_an_export_or_a_training(run, given, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    notes = copy / "pretrained" / "tokenizer" / "notes.txt"
    notes.write_text("years of work")
    assert main(["export", str(copy), "--stage=tokenizer", "--replace"]) == 2
    assert "got also notes.txt; move them" in capsys.readouterr().err
    words_of_longer = [*words("tokenizer", given), f"--runs-folder={tmp_path}", "--run=copy", "--trainer.max_steps=6"]
    assert main(["train", *words_of_longer]) == 2
    assert "got also notes.txt; move them" in capsys.readouterr().err
    assert not (copy / "tokenizer" / "checkpoints" / "step-00000006").exists()
    # The folder of the run itself has stages with checkpoints.
    assert main(["export", str(copy), f"--out={copy}", "--stage=tokenizer", "--replace"]) == 2
    assert "must hold only files of an earlier export" in capsys.readouterr().err
    assert (copy / "tokenizer" / "checkpoints").is_dir()
    assert notes.read_text() == "years of work"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--step=3"], "must hold a complete checkpoint of step 3, got steps: 2, 4"),
        (["--data=/nowhere"], "data /nowhere of"),
        (["--format=torchscript"], "--format must be one of pretrained, onnx, pt2, diffusers, got 'torchscript'"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_written(run, tmp_path, capsys, more, message):
    assert main(["export", str(run), f"--out={tmp_path / 'out'}", *more]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_run_and_a_damaged_checkpoint_are_refused(run, tmp_path, capsys):
    assert main(["export", str(tmp_path)]) == 2
    assert "has no stage with checkpoints" in capsys.readouterr().err
    copy = shutil.copytree(run, tmp_path / "copy")
    file = copy / "transformer" / "checkpoints" / "step-00000004" / "tensors-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert main(["export", str(copy), "--stage=transformer", f"--out={tmp_path / 'out'}"]) == 2
    assert "has changed since it was written" in capsys.readouterr().err
    assert not (tmp_path / "out" / "transformer").exists()


@pytest.mark.slow
def test_the_shards_of_two_ranks_become_one_file(given, tmp_path):
    runs = Runs(tmp_path, words("transformer", given), 4)
    runs.leg("sharded", Topology(ranks=2, cluster="fsdp"), kill_at=3)
    runs.leg("whole", Topology(), kill_at=3)
    made = {}
    for name, files in (("sharded", 2), ("whole", 1)):
        checkpoint = runs.newest(name)
        assert checkpoint.name == "step-00000002"
        assert len(list(checkpoint.glob("tensors-*"))) == files
        assert main(["export", str(tmp_path / name), f"--out={tmp_path / name / 'out'}"]) == 0
        made[name] = load_transformer(tmp_path / name / "out" / "transformer").network.state_dict()
    assert made["sharded"].keys() == made["whole"].keys()
    for key, tensor in made["whole"].items():
        torch.testing.assert_close(made["sharded"][key], tensor, atol=1e-5, rtol=1e-5)


def test_an_early_checkpoint_is_a_whole_model_that_can_be_sampled_and_guide_a_later_one(run, tmp_path):
    early = tmp_path / "early"
    assert main(["export", str(run), "--stage=transformer", "--step=2", f"--out={early}"]) == 0
    pipe, weaker = MaskGIT.from_pretrained(run), MaskGIT.from_pretrained(early)
    assert weaker.tokenizer.fingerprint == pipe.tokenizer.fingerprint
    settings = {"output_type": "pt", "guidance_scale": 3.0, "negative_model": early}
    assert torch.equal(weaker.generate([0, 1], **settings), weaker.generate([0, 1], output_type="pt", guidance_scale=0))
    words = ["sample", str(run), "--guidance-scale=3", f"--out={tmp_path / 'made.png'}", "--per-class=1"]
    assert main([*words, f"--negative-model={early}"]) == 0
    assert (tmp_path / "made.png").is_file()
