"""Files of version 0.1.0 give today what they gave then: pretrained folder, token store, checkpoints, recipes, flags.

``tests/old/0.1.0/README.md`` describes the files.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maskgit_pl import MaskGIT
from maskgit_pl.cli import main
from maskgit_pl.evaluation.digests import model_digests, shorten_digest
from maskgit_pl.old_names import rename_tensors
from maskgit_pl.pretrained import load_transformer
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.shards.store_description import read_description
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO

OLD = Path(__file__).parent / "old" / "0.1.0"
RECIPES = Path(__file__).parents[1] / "recipes"
STAGES = ("tokenizer", "transformer")


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    return load_file(OLD / "expected" / "outputs.safetensors")


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """A working directory with the old run, stopped after step 2 of 4, its data, and its recipes among today's."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs", "shards"):
        shutil.copytree(OLD / name, name)
    shutil.copytree(OLD / "pretrained", "runs/old/pretrained")
    shutil.copytree(RECIPES, "recipes")
    for stage in STAGES:
        shutil.copy(OLD / "recipe" / f"{stage}.yaml", f"recipes/{stage}/old.yaml")
    return tmp_path


def weights_after_step_4(stage: str, folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = FolderCheckpointIO().load_checkpoint(
        folder / "runs" / "old" / stage / "checkpoints" / "step-00000004"
    )["state_dict"]
    return state


def assert_as_in_version_0_1_0(stage: str, state: dict[str, torch.Tensor]) -> None:
    expected = rename_tensors(load_file(OLD / "expected" / f"{stage}-step-4.safetensors"), "expected")
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)


def test_a_pretrained_folder_gives_the_logits_of_version_0_1_0(outputs):
    network = load_transformer(OLD / "pretrained" / "transformer").network
    logits = network(outputs["input"], torch.tensor([0, 2]))
    torch.testing.assert_close(logits, outputs["logits"], rtol=0, atol=1e-5)


def test_a_pretrained_folder_gives_the_tokens_and_images_of_version_0_1_0(outputs):
    steps = []
    images = MaskGIT.from_pretrained(OLD / "pretrained").generate(
        [0, 2], seed=0, output_type="pt", callback=steps.append
    )
    assert torch.equal(steps[-1].tokens, outputs["tokens"])
    assert torch.equal(images, outputs["samples"])


def test_a_pretrained_folder_that_is_saved_again_has_todays_names_and_gives_the_same(outputs, tmp_path):
    MaskGIT.from_pretrained(OLD / "pretrained").save_pretrained(tmp_path / "saved")
    files = [file.read_text() for file in (tmp_path / "saved").glob("**/config.json")]
    assert len(files) == 3
    assert not [name for name in ("num_codes", "mlp_width", '"width"', "code_width") for text in files if name in text]
    images = MaskGIT.from_pretrained(tmp_path / "saved").generate([0, 2], seed=0, output_type="pt")
    assert torch.equal(images, outputs["samples"])


def test_maskgit_sample_gives_the_images_of_version_0_1_0(outputs, tmp_path):
    words = ["sample", str(OLD / "pretrained"), "--num-images=2", "--classes=0,2", "--seed=0", "--device=cpu"]
    assert main([*words, f"--out={tmp_path / 'two.npz'}"]) == 0
    with np.load(tmp_path / "two.npz") as file:
        images = torch.from_numpy(file["arr_0"])  # (2, H, W, 3)
    assert torch.equal(images[..., :1].permute(0, 3, 1, 2), outputs["samples"])


def test_images_of_version_0_1_0_are_found_complete(tmp_path, capsys):
    shutil.copy(OLD / "expected" / "two.npz", tmp_path / "two.npz")
    words = ["sample", str(OLD / "pretrained"), "--num-images=2", "--classes=0,2", "--seed=0", "--device=cpu"]
    assert main([*words, f"--out={tmp_path / 'two.npz'}"]) == 0
    assert "complete with 2 images" in capsys.readouterr().out


def test_the_digest_that_finds_a_model_in_the_ledger_has_not_changed():
    pipe = MaskGIT.from_pretrained(OLD / "pretrained")
    assert shorten_digest(model_digests(pipe, OLD / "pretrained")["config"]) == "23a499dd2099e114"


def test_a_token_store_of_version_0_1_0_is_read():
    assert read_description(OLD / "runs" / "old" / "tokens").codebook_size == 16


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_version_0_1_0_resumes_by_its_recipe_to_the_same_weights(stage, work):
    assert main(["train", stage, "--recipe=old", "--data=shards", "--run=old"]) == 0
    state = weights_after_step_4(stage, work)
    assert_as_in_version_0_1_0(stage, state)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_version_0_1_0_resumes_by_its_config_and_old_flags(stage, work):
    old = {"tokenizer": "--model.network.num_codes=16", "transformer": "--model.network.mlp_width=32"}[stage]
    words = ["train", stage, f"--config=runs/old/{stage}/config.yaml", "--run=old", old, "--model.betas=[0.8, 0.95]"]
    assert main(words) == 0
    assert_as_in_version_0_1_0(stage, weights_after_step_4(stage, work))


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_that_resumes_writes_todays_names(stage, work):
    assert main(["train", stage, "--recipe=old", "--data=shards", "--run=old"]) == 0
    folder = work / "runs" / "old" / stage
    texts = [(folder / "checkpoints/step-00000004/state.json").read_text(), (folder / "config.yaml").read_text()]
    old = ("num_codes", "mlp_width", "query_key_value", "words.weight", "r1_cost", "blocks_per_level")
    assert not [name for name in old for text in texts if name in text]


@pytest.mark.parametrize("stage", STAGES)
def test_another_size_is_refused_under_its_new_name(stage, work, capsys):
    flag, new = {
        "tokenizer": ("--model.network.code_width=8", "model.network.code_dim: 4 -> 8"),
        "transformer": ("--model.network.width=32", "model.network.embed_dim: 16 -> 32"),
    }[stage]
    assert main(["train", stage, "--recipe=old", "--data=shards", "--run=old", flag]) == 2
    assert new in capsys.readouterr().err


def test_recipes_of_version_0_1_0_are_read():
    for stage, key, value in (("tokenizer", "num_res_blocks", 1), ("transformer", "embed_dim", 16)):
        files = [RECIPES / stage / "base.yaml", OLD / "recipe" / f"{stage}.yaml"]
        assert Recipe.from_files(stage, files).get(f"model.network.{key}") == value


def test_a_checkpoint_is_read_by_the_names_of_today_piece_by_piece():
    keys = []
    state = FolderCheckpointIO().load_pieces(
        OLD / "runs/old/transformer/checkpoints/step-00000002", lambda key, saved: keys.append(key) or saved.read_all()
    )
    assert {f"/state_dict/{name}" for name in state["state_dict"]} <= set(keys)
    assert "transformer.token_embedding.weight" in state["state_dict"]
    groups = state["optimizer_states"][0]["param_groups"]
    names = [name for group in groups for name in group["param_names"]]
    assert set(names) == {name for name in state["state_dict"] if name.startswith("transformer.")}


def test_a_checkpoint_with_both_names_of_a_tensor_is_refused(tmp_path, monkeypatch):
    tensors = {"transformer.words.weight": torch.zeros(1), "transformer.token_embedding.weight": torch.ones(1)}
    folder, plugin = tmp_path / "step-00000001", FolderCheckpointIO()
    rule = r"checkpoint .*step-00000001: tensor \S+token_embedding\.weight must occur once"
    with pytest.raises(ValueError, match=rule):
        plugin.save_checkpoint({"state_dict": tensors}, folder)
    monkeypatch.setattr("maskgit_pl.training.checkpoint_files._check_readable", lambda *_: None)
    plugin.save_checkpoint({"state_dict": tensors}, folder)
    with pytest.raises(ValueError, match=rule):
        plugin.load_checkpoint(folder)
