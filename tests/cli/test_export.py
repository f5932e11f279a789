"""``maskgit export`` from checkpoints of any number of ranks, and the importers: their reports and next commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from maskgit_pl.cli import main
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pretrained.networks import load_tokenizer, load_transformer, save_tokenizer
from maskgit_pl.training.checkpoints import FolderCheckpointIO
from tests.cli.conftest import refused
from tests.conftest import save_tiny_pretrained, save_uneven_shards, tiny_flags
from tests.importers.tokenizer_references import DiffusersVQModel, diffusers_config
from tests.importers.transformer_references import Halton, randomise, save_checkpoint
from tests.observing import Runs, Topology

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Makes shards and a pretrained tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    save_uneven_shards(folder / "shards", (1, 7, 22))
    save_tiny_pretrained(folder / "pretrained")
    return folder


def words(stage: str, inputs: Path) -> list[str]:
    steps = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--checkpoint_every=2"]
    return [stage, f"--data={inputs / 'shards'}", *tiny_flags(stage), *steps, "--trainer.precision=32-true"]


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory) -> Path:
    """Trains both stages to step 4, with checkpoints of steps 2 and 4."""
    runs = tmp_path_factory.mktemp("runs")
    for stage in ("tokenizer", "transformer"):
        assert main(["train", *words(stage, inputs), f"--runs-folder={runs}", "--run=one"]) == 0
    return runs / "one"


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.suffix in (".safetensors", ".json")
    }


@pytest.mark.slow
def test_the_newest_checkpoint_becomes_the_export_of_the_training(run, maskgit, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    config = copy / "transformer" / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    # Packages of the training may be missing.
    missing = {"loggers": [{"name": "wandb"}], "callbacks": ["gone"]}
    config.write_text(yaml.safe_dump(tree | missing, sort_keys=False))
    assert maskgit("export", copy, f"--out={tmp_path / 'out'}").code == 0
    assert (tmp_path / "out" / "README.md").is_file()
    exported = content(tmp_path / "out" / "transformer")
    assert exported == content(run / "pretrained" / "transformer")
    assert set(exported) == {"config.json", "model.safetensors"}
    weights = FolderCheckpointIO().load_checkpoint(run / "tokenizer" / "checkpoints" / "step-00000004")["state_dict"]
    for name, tensor in load_tokenizer(tmp_path / "out" / "tokenizer").network.state_dict().items():
        assert torch.equal(tensor, weights[f"ema_network.{name}"])


def test_an_older_checkpoint_is_a_model_that_guides_a_later_one(run, maskgit, tmp_path):
    early = tmp_path / "early"
    assert maskgit("export", run, "--stage=transformer", "--step=2", f"--out={early}").code == 0
    weights = FolderCheckpointIO().load_checkpoint(run / "transformer" / "checkpoints" / "step-00000002")["state_dict"]
    for name, tensor in load_transformer(early / "transformer").network.state_dict().items():
        assert torch.equal(tensor, weights[f"ema_network.{name}"])
    pipe, weaker = MaskGIT.from_pretrained(run), MaskGIT.from_pretrained(early)
    assert weaker.tokenizer.fingerprint == pipe.tokenizer.fingerprint
    sample = ("sample", run, "--guidance-scale=3", f"--out={tmp_path / 'made.png'}", "--per-class=1")
    assert maskgit(*sample, f"--negative-model={early}").code == 0
    assert (tmp_path / "made.png").is_file()


def test_a_run_on_the_tokens_of_another_run_is_exported(run, inputs, maskgit, tmp_path):
    shared = (f"--runs-folder={tmp_path}", f"--tokenizer={run / 'pretrained' / 'tokenizer'}")
    assert maskgit("tokenize", f"--data={inputs / 'shards'}", "--run=one", *shared).code == 0
    flags = ("--data.source=tokens", f"--data.token_store={tmp_path / 'one' / 'tokens'}", "--run=two", *shared)
    assert maskgit("train", *words("transformer", inputs), *flags).code == 0
    assert not (tmp_path / "two" / "tokens").exists()
    assert maskgit("export", tmp_path / "two", "--stage=transformer", f"--out={tmp_path / 'out'}").code == 0
    assert content(tmp_path / "out" / "transformer") == content(tmp_path / "two" / "pretrained" / "transformer")


def test_an_export_is_replaced_only_with_its_flag(run, maskgit, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    before = content(copy / "pretrained")
    refused(maskgit("export", copy, "--step=2"), "exists; replace it with --replace")
    assert content(copy / "pretrained") == before
    assert maskgit("export", copy, "--step=2", "--stage=tokenizer", "--replace").code == 0
    assert content(copy / "pretrained") != before


def test_files_of_the_user_are_not_removed_by_an_export_or_a_training(run, inputs, maskgit, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    notes = copy / "pretrained" / "tokenizer" / "notes.txt"
    notes.write_text("years of work")
    refused(maskgit("export", copy, "--stage=tokenizer", "--replace"), "got also notes.txt; move them")
    longer = (*words("tokenizer", inputs), f"--runs-folder={tmp_path}", "--run=copy", "--trainer.max_steps=6")
    refused(maskgit("train", *longer), "got also notes.txt; move them")
    assert not (copy / "tokenizer" / "checkpoints" / "step-00000006").exists()
    # The folder of the run itself has stages with checkpoints.
    itself = maskgit("export", copy, f"--out={copy}", "--stage=tokenizer", "--replace")
    refused(itself, "must hold only files of an earlier export")
    assert (copy / "tokenizer" / "checkpoints").is_dir()
    assert notes.read_text() == "years of work"


def test_a_missing_step_and_a_damaged_checkpoint_are_refused(run, maskgit, tmp_path):
    copy, out = shutil.copytree(run, tmp_path / "copy"), tmp_path / "out"
    step = maskgit("export", copy, "--step=3", f"--out={out}")
    refused(step, "must hold a complete checkpoint of step 3, got steps: 2, 4")
    refused(maskgit("export", copy, "--data=/nowhere", f"--out={out}"), "data /nowhere: no such folder")
    file = copy / "transformer" / "checkpoints" / "step-00000004" / "tensors-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    refused(maskgit("export", copy, "--stage=transformer", f"--out={out}"), "has changed since it was written")
    assert not (out / "transformer").exists()


@pytest.mark.slow
def test_the_shards_of_two_ranks_become_one_file(inputs, maskgit, tmp_path):
    tokenizer = f"--tokenizer={inputs / 'pretrained' / 'tokenizer'}"
    runs = Runs(tmp_path, [*words("transformer", inputs), tokenizer], 4)
    runs.leg("sharded", Topology(ranks=2, cluster="fsdp"), kill_at=3)
    runs.leg("whole", Topology(), kill_at=3)
    weights = {}
    for name, files in (("sharded", 2), ("whole", 1)):
        checkpoint = runs.newest(name)
        assert checkpoint.name == "step-00000002"
        assert len(list(checkpoint.glob("tensors-*"))) == files
        assert maskgit("export", tmp_path / name, f"--out={tmp_path / name / 'out'}").code == 0
        weights[name] = load_transformer(tmp_path / name / "out" / "transformer").network.state_dict()
    assert weights["sharded"].keys() == weights["whole"].keys()
    for key, tensor in weights["whole"].items():
        torch.testing.assert_close(weights["sharded"][key], tensor, atol=1e-5, rtol=1e-5)


# Importers


def test_an_import_of_jax_is_described_and_the_next_command_samples(maskgit, tmp_path):
    out = tmp_path / "new" / "small"
    weights = ["--tokenizer", GOLDEN / "vqvae_checkpoint.msgpack"]
    weights += ["--transformer", GOLDEN / "transformer_n16_checkpoint.msgpack"]
    lines = maskgit("import-jax", *weights, "--out", out, "--image-size", 8).out.splitlines()
    assert lines[0] == f"{out}: google-research/maskgit layout, 77,323 parameters"
    assert lines[1].startswith("  images    3 x 8 x 8 -> 4 x 4 tokens of ")
    following = lines[-1].removeprefix("next: maskgit ").split()
    assert maskgit(*following, "--per-class", 2, "--out", tmp_path / "samples.png", "--device", "cpu").code == 0
    assert (tmp_path / "samples.png").is_file()


def test_an_imported_tokenizer_is_described(maskgit, tmp_path):
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}  # no downsampling
    config = diffusers_config(block_out_channels=[32], layers_per_block=1, num_vq_embeddings=8, **blocks)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(DiffusersVQModel(config).state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    out = tmp_path / "pretrained"
    said = maskgit("import-tokenizer", tmp_path, "--out", out, "--image-size", 16).out
    assert load_tokenizer(out / "tokenizer").image_size == 16
    assert "3 x 16 x 16 -> 16 x 16 tokens of 8 codes" in said
    assert f"next: maskgit tokenize --dataset NAME --recipe RECIPE --tokenizer {out}/tokenizer" in said


def test_an_imported_transformer_is_described_and_samples(maskgit, tmp_path):
    torch.manual_seed(0)
    config = VQGANConfig(
        3, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=24, code_dim=4
    )
    save_tokenizer(tmp_path / "pretrained" / "tokenizer", config, VQGAN(config).state_dict(), image_size=8)
    halton = Halton(codes=24, classes=3, side=4, size=32, blocks=2, heads=4)
    file, out = save_checkpoint(randomise(halton), tmp_path / "a.pth"), tmp_path / "out"
    more = ["--tokenizer", tmp_path / "pretrained", "--num-heads", 4]
    said = maskgit("import-transformer", file, "--out", out, *more).out
    for text in (f"{out}: Halton-MaskGIT layout, ", "network   2 blocks, 3 classes", f"next: maskgit sample {out} "):
        assert text in said
    assert maskgit("sample", out, "--classes", "1,2", "--out", tmp_path / "grid.png").code == 0
