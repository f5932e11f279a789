"""``maskgit train`` and ``maskgit tokenize`` as a user calls them: what they do, do again, and refuse."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline.pretrained import fingerprint, save_tokenizer
from maskgit_pl.runs import fitting
from maskgit_pl.runs.recipe import Recipe
from tests.cli.commands import Answer, refused
from tests.conftest import tiny_flags


def files(folder: Path) -> dict[str, int]:
    """Returns every file below a folder with the time of its last change."""
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def add_tokenizer(folder: Path, *, seed: int) -> None:
    """Saves a pretrained tokenizer with weights of its own."""
    config = VQGANConfig(
        1, base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2, codebook_size=16, code_dim=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_tokenizer(folder, config, VQGAN(config).state_dict(), image_size=8)


def test_a_run_may_open_more_files_than_a_shell_allows(train):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = min(soft, 512)
    resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
    try:
        assert train("tokenizer").code == 0
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert allowed > low or low == hard


def test_a_run_writes_what_it_was_and_where_it_ran(train, runs, tiny_pretrained):
    assert train("transformer", "--recipe=square").code == 0
    folder = runs / "one" / "transformer"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["mask_schedule"] == "square"
    assert config["model"]["network"]["num_classes"] == 3
    assert config["trainer"]["max_steps"] == 1
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 1
    assert {"command", "commit", "python", "torch", "lightning", "maskgit_pl"} <= environment.keys()
    own = runs / "one" / "pretrained" / "tokenizer"
    assert fingerprint(own) == fingerprint(tiny_pretrained / "tokenizer")  # a run folder is complete
    of_all = json.loads((runs / "one" / "pretrained" / "config.json").read_text())
    assert of_all["run"]["transformer"]["settings"]["trainer.max_steps"] == 1
    assert "# one\n" in (runs / "one" / "pretrained" / "README.md").read_text()


def test_a_fault_in_the_card_costs_no_export(train, runs, monkeypatch):
    def broken(folder: Path) -> None:
        raise RuntimeError("no card today")

    monkeypatch.setattr(fitting, "write_card", broken)
    answer = train("transformer")
    assert answer.code == 0
    assert "cannot write the model card (RuntimeError: no card today)" in answer.out
    assert (runs / "one" / "pretrained" / "transformer" / "config.json").is_file()


def test_tokens_that_are_missing_or_of_another_tokenizer_are_refused(maskgit, train, runs, tiny_shards, tmp_path):
    refused(train("transformer", "--data.source=tokens"), str(runs / "one" / "tokens"), "maskgit tokenize")
    add_tokenizer(tmp_path / "other", seed=5)
    where = ("--data", tiny_shards, "--runs-folder", runs, "--run", "one", "--tokenizer", tmp_path / "other")
    assert maskgit("tokenize", *where).code == 0
    refused(train("transformer", "--data.source=tokens"), "tokenizer")
    assert not (runs / "one" / "pretrained").exists()


@pytest.fixture
def stage_two(maskgit, runs) -> Callable[..., Answer]:
    """Calls ``maskgit train transformer`` on a data folder without ``--tokenizer``."""

    def call(shards: Path, *more: object) -> Answer:
        return maskgit(
            "train", "transformer", "--data", shards, "--runs-folder", runs, *tiny_flags("transformer"), *more
        )

    return call


def add_run(folder: Path, shards: Path, *, seed: int) -> Path:
    """Makes a run of stage 1 as training leaves it: the exported tokenizer, and the data in config.yaml."""
    add_tokenizer(folder / "pretrained" / "tokenizer", seed=seed)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "config.yaml").write_text(f"data: {{path: {shards}}}\n")
    return folder / "pretrained" / "tokenizer"


def test_the_only_tokenizer_of_the_data_is_taken_and_told_and_several_must_be_named(stage_two, runs, tiny_shards):
    first = add_run(runs / "any-name", tiny_shards, seed=1)
    add_run(runs / "fashion-mnist-of-other-data", tiny_shards.parent / "elsewhere", seed=3)
    shutil.copytree(runs / "any-name", runs / "copy")  # the same weights are no choice
    taken = stage_two(tiny_shards)
    assert taken.code == 0, taken
    assert f"tokenizer: {first}, the only one trained on {tiny_shards}" in taken.out
    second = add_run(runs / "second", tiny_shards, seed=2)
    refused(stage_two(tiny_shards, "--recipe", "log"), "several others", "--tokenizer", str(first), str(second))


def test_a_mistyped_run_starts_nothing(stage_two, maskgit, runs, tiny_shards):
    add_run(runs / "clothes", tiny_shards, seed=1)
    before = files(runs)
    refused(stage_two(tiny_shards, "--run", "cloths"), f"run {runs / 'cloths'}: no such run: did you mean 'clothes'?")
    answer = maskgit("tokenize", "--data", tiny_shards, "--runs-folder", runs, "--run", "cloths")
    refused(answer, "did you mean 'clothes'?", "--tokenizer")
    assert files(runs) == before


@pytest.mark.slow
def test_a_run_is_repeated_from_its_config(train, maskgit, runs):
    assert train("transformer", "--recipe=square", "--data.seed=5").code == 0
    config = runs / "one" / "transformer" / "config.yaml"
    words = ("train", "transformer", "--runs-folder", runs, "--run", "two", "--config", config)
    assert maskgit(*words).code == 0
    again = runs / "two" / "transformer" / "config.yaml"
    assert again.read_text().replace("/two/", "/one/") == config.read_text()
    weights = [fingerprint(runs / name / "pretrained" / "transformer") for name in ("one", "two")]
    assert weights[0] == weights[1]
    refused(maskgit(*words, "--recipe", "log"), "leave out --recipe")
    refused(maskgit(*words[:-1], "nowhere.yaml"), "--config nowhere.yaml: no such file")
    refused(maskgit("train", "tokenizer", "--runs-folder", runs, "--run", "two", "--config", config), "unknown key")


def test_the_complete_recipe_is_printed_and_nothing_is_trained(train, maskgit, runs):
    answer = train("transformer", "--recipe=square", "--print-config")
    assert answer.code == 0
    printed = yaml.safe_load(answer.out)
    assert printed["model"]["mask_schedule"] == "square"
    assert printed["trainer"]["gradient_clip_algorithm"] is None
    assert not runs.exists()
    for stage in ("tokenizer", "transformer"):  # without data and tokenizer
        answer = maskgit("train", stage, "--recipe", "adaln", "--dataset", "nowhere", "--print-config")
        assert answer.code == 0
        assert answer.out.startswith("# Keys that data and tokenizer give")
        wanted = Recipe.read(stage, names="adaln", dataset="nowhere").get("trainer.max_steps")
        assert yaml.safe_load(answer.out)["trainer"]["max_steps"] == wanted


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--recipe=cosin", ("did you mean 'cosine'",)),
        ("--data=nowhere", ("data nowhere: no such folder", "maskgit data make", "--data")),
        ("--tokenizer=nowhere", ("tokenizer nowhere: no config.json there",)),
        ("--trainer.max_steps=-1", ("trainer.max_steps must be >= 1", "got -1")),
        ("--model.network.num_classes=4", ("num_classes must be 3", "got 4")),
        ("--model.decoding.num_steps=99", ("num_steps must be <= 16", "99")),
        ("--model.network.class_dropout=0", ("model.decoding.guidance", "null class", "class_dropout")),
        ("--trainer.devices=-1", ("trainer: ", "devices -1")),
        ("--trainer.num_nodes=0", ("num_nodes",)),
        ("--keep_every=7", ("keep_every must be a multiple of checkpoint_every (500)",)),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_is_written(train, runs, flag, parts):
    refused(train("transformer", flag), *parts)
    assert not runs.exists()


def test_a_command_that_cannot_print_ends_with_its_own_code():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "maskgit_pl", "train", "tokenizer", "--data", "nowhere"]
        assert subprocess.run(command, stderr=full, check=False).returncode == 2


@pytest.mark.slow
def test_a_training_whose_log_cannot_be_written_trains_to_its_end(tiny_shards, runs):
    where = [f"--data={tiny_shards}", f"--runs-folder={runs}", "--run=one"]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "maskgit_pl", "train", "tokenizer", *where, *tiny_flags("tokenizer")]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (74, "maskgit train: [Errno 28] No space left on device\n")
    assert (runs / "one" / "pretrained" / "tokenizer" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "names"),
    [("tokenizer", ("val/psnr", "train/reconstruction")), ("transformer", ("val/loss", "train/loss"))],
)
def test_validation_curves_and_pictures_stand_at_the_same_steps(train, runs, stage, names):
    steps = ("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=2")
    assert train(stage, *steps).code == 0
    events = EventAccumulator(str(runs / "one" / stage))
    events.Reload()
    for name in names:
        assert [each.step for each in events.Scalars(name)] == [2, 4], name
    for picture in events.Tags()["images"]:
        assert {each.step for each in events.Images(picture)} <= {2, 4}


def plan_of(answer: Answer) -> dict[str, str]:
    assert answer.code == 0, answer
    return {line[:11].strip(): line[11:] for line in answer.out.splitlines()}


@pytest.mark.slow
def test_a_dry_run_says_and_refuses_what_training_would_and_writes_nothing(train, runs, tmp_path):
    plan = plan_of(train("tokenizer", "--dry-run"))
    assert plan["run"] == f"{runs / 'one/tokenizer'}: starts from scratch"
    assert plan["steps"] == "1, with a global batch of 4 = 1 rank x 2 accumulation steps x 2 samples"
    assert not runs.exists()
    train("tokenizer")
    before = files(tmp_path)
    assert "resumes from step-00000001" in plan_of(train("tokenizer", "--dry-run", "--trainer.max_steps=2"))["run"]
    assert "nothing to do" in plan_of(train("tokenizer", "--dry-run"))["run"]
    assert "tiny" in plan_of(train("transformer", "--dry-run", "--run=two"))["tokenizer"]
    refused(train("tokenizer", "--dry-run", "--data.seed=7"), "cannot resume", "data.seed: 0 -> 7")
    refused(train("tokenizer", "--dry-run", "--trainer.strategy=fsdp"), "trainer.strategy")
    assert files(tmp_path) == before


def test_fresh_is_refused_for_one_of_several_ranks(train, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(train("tokenizer", "--fresh"), "--fresh must be given to a single process, got 2 ranks")
