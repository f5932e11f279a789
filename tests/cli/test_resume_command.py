"""A run resumes with the settings that it began with, or not at all; tests/runs/test_resolve.py has the settings."""

import shutil

import pytest

from maskgit_pl.cli import main
from maskgit_pl.data.sources.shards import open_source
from maskgit_pl.data.writer import make_shards
from maskgit_pl.pretrained.networks import fingerprint
from maskgit_pl.training.checkpoints import newest_checkpoint, read_settings, step_of
from tests.cli.conftest import Answer, refused
from tests.conftest import save_tiny_pretrained, tiny_flags


@pytest.fixture(scope="module", params=["tokenizer", "transformer"])
def begun(request, tmp_path_factory, tiny_shards, tiny_pretrained):
    """A run that stopped at step 1, as (stage, the words of its command, its folder)."""
    stage, runs = request.param, tmp_path_factory.mktemp("begun")
    words = ["train", stage, f"--data={tiny_shards}", f"--runs-folder={runs}", "--run=one"]
    words += [f"--tokenizer={tiny_pretrained / 'tokenizer'}"] if stage == "transformer" else []
    words += tiny_flags(stage)
    assert main(words) == 0
    return stage, words, runs / "one" / stage


@pytest.fixture
def resume(begun, maskgit):
    """Calls the same command again with more words."""

    def call(*more: str) -> Answer:
        return maskgit(*begun[1], *more)

    return call


def test_settings_that_would_make_another_run_are_refused_with_the_list(begun, resume):
    stage, _, folder = begun
    key = "model.network." + {"tokenizer": "codebook_size", "transformer": "embed_dim"}[stage]
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    answer = resume(f"--{key}=32", "--data.seed=7", "--data.global_batch=8", "--trainer.max_steps=9")
    refused(
        answer, f"cannot resume {folder} from step ", ": settings changed (", f"{key}: 16 -> 32", "data.seed: 0 -> 7",
        "data.global_batch: 4 -> 8", "Restore them", "--run", "--pretrained",
    )  # fmt: skip
    assert "max_steps" not in answer.error
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_inputs_may_move_but_not_change(begun, resume, tiny_shards, tiny_pretrained, tmp_path):
    (tmp_path / "shards").symlink_to(tiny_shards)
    assert resume(f"--data={tmp_path / 'shards'}").code == 0
    make_shards(open_source(tiny_shards.parent / "images"), tmp_path / "other", shard_size=50)
    old = read_settings(newest_checkpoint(begun[2] / "checkpoints"))["data"]
    refused(resume(f"--data={tmp_path / 'other'}"), f"data: {old[:12]} -> ")
    if begun[0] == "transformer":
        (tmp_path / "pretrained").symlink_to(tiny_pretrained)
        assert resume(f"--tokenizer={tmp_path / 'pretrained' / 'tokenizer'}").code == 0
        other = save_tiny_pretrained(tmp_path / "model", seed=3) / "tokenizer"
        refused(resume(f"--tokenizer={other}"), ": settings changed (tokenizer: ")


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_export_is_not_finished(begun, resume, tmp_path):
    stage, _, folder = begun
    exported, facts = folder.parent / "pretrained" / stage, folder / "exported.json"
    shutil.copytree(exported, tmp_path / stage)
    shutil.copy(facts, tmp_path)
    longer = f"--trainer.max_steps={step_of(newest_checkpoint(folder / 'checkpoints')) + 1}"
    assert resume(longer).code == 0
    last = fingerprint(exported)
    shutil.copytree(tmp_path / stage, exported, dirs_exist_ok=True)  # as it was before the longer run's export
    shutil.copy(tmp_path / facts.name, folder)
    assert fingerprint(exported) != last
    assert "exported " in resume(longer).out
    assert fingerprint(exported) == last
    assert "nothing to do" in resume(longer).out
