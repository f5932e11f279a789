"""``maskgit train`` and ``maskgit tokenize`` as a user calls them: what they do, do again, and refuse."""

import json
import logging
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskgit_pl.cli import main
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline.pretrained import fingerprint, save_tokenizer
from maskgit_pl.runs import stage as stage_module
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.training.checkpoint_files import FolderCheckpointIO, newest_checkpoint
from maskgit_pl.training.stop_and_nonfinite import StepCheck
from tests.conftest import flags

TINY = Path(__file__).parents[1] / "tiny"


class Answer(NamedTuple):
    """The result of a command."""

    code: int
    out: str
    error: str


@pytest.fixture
def maskgit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs a command in this process; logging and environment are as before afterwards."""
    ours = logging.getLogger("maskgit_pl")
    monkeypatch.setattr(ours, "propagate", ours.propagate)
    monkeypatch.setattr(ours, "level", ours.level)
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def call(*words: object) -> Answer:
        capsys.readouterr()
        monkeypatch.setattr(ours, "handlers", [])  # a handler holds the stream of the test that made it
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse's own
            code = int(stop.code or 0)
        return Answer(code, *capsys.readouterr())

    return call


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def train(maskgit, tiny_shards: Path, tiny_pretrained: Path, runs: Path) -> Callable[..., Answer]:
    """Trains a stage of the run ``one`` with tiny sizes; words that are given later count."""

    def call(stage: str, *more: object, named: bool = True) -> Answer:
        tokenizer = ("--tokenizer", tiny_pretrained / "tokenizer") if stage == "transformer" and named else ()
        where = ("--data", tiny_shards, "--runs-folder", runs, "--run", "one", *tokenizer)
        return maskgit("train", stage, *where, *flags(yaml.safe_load((TINY / f"{stage}.yaml").read_text())), *more)

    return call


def files(folder: Path) -> dict[str, int]:
    """Returns every file below a folder with the time of its last change."""
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def refused(answer: Answer, *parts: str) -> None:
    """Checks for exit code 2 and one line that names the fault."""
    assert answer.code == 2, answer
    assert len(answer.error.splitlines()) == 1, answer.error
    for part in parts:
        assert part in answer.error


def add_tokenizer(folder: Path, *, seed: int) -> None:
    """A pretrained tokenizer with weights of its own."""
    import torch

    config = VQGANConfig(
        1, base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2, codebook_size=16, code_dim=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_tokenizer(folder, config, VQGAN(config).state_dict(), image_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_finished_run_is_left_alone_and_more_steps_go_on(train, runs, stage):
    assert train(stage).code == 0
    checkpoints = runs / "one" / stage / "checkpoints"
    before = files(runs)
    again = train(stage)
    assert again.code == 0
    assert "finished at step-00000001; nothing to do" in again.out
    assert files(runs) == before

    longer = train(stage, "--trainer.max_steps=3")
    assert longer.code == 0
    assert "resuming from step-00000001" in longer.out
    assert newest_checkpoint(checkpoints).name == "step-00000003"
    assert FolderCheckpointIO().load_checkpoint(newest_checkpoint(checkpoints))["global_step"] == 3


def test_a_run_may_open_more_files_than_a_shell_allows(train, runs):
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

    monkeypatch.setattr(stage_module, "write_card", broken)
    answer = train("transformer")
    assert answer.code == 0
    assert "cannot write the model card (RuntimeError: no card today)" in answer.out
    assert (runs / "one" / "pretrained" / "transformer" / "config.json").is_file()


@pytest.mark.slow
def test_stage_two_takes_the_tokenizer_that_the_run_exported(train, runs):
    assert train("tokenizer").code == 0
    assert train("transformer", named=False).code == 0
    config = yaml.safe_load((runs / "one" / "transformer" / "config.yaml").read_text())
    assert config["model"]["tokenizer"] == str(runs / "one" / "pretrained" / "tokenizer")


def test_tokens_are_made_once_and_trained_on(maskgit, train, runs, tiny_shards, tiny_pretrained):
    words = ("--data", tiny_shards, "--runs-folder", runs, "--run", "one", "--tokenizer", tiny_pretrained / "tokenizer")
    first = maskgit("tokenize", *words)
    assert first.code == 0
    assert "84 images in" in first.out
    before = files(runs)
    again = maskgit("tokenize", *words)
    assert again.code == 0
    assert "exists already" in again.out
    assert files(runs) == before
    assert train("transformer", "--data.source=tokens").code == 0


def test_tokens_that_are_missing_or_of_another_tokenizer_are_refused(maskgit, train, runs, tiny_shards, tmp_path):
    refused(train("transformer", "--data.source=tokens"), str(runs / "one" / "tokens"), "tokenize")
    add_tokenizer(tmp_path / "other", seed=5)
    assert maskgit(
        "tokenize", "--data", tiny_shards, "--runs-folder", runs, "--run", "one", "--tokenizer", tmp_path / "other"
    ).code == 0  # fmt: skip
    refused(train("transformer", "--data.source=tokens"), "tokenizer")
    assert not (runs / "one" / "pretrained").exists()


def test_missing_data_is_answered_with_how_to_make_it(train, runs, tmp_path):
    answer = train("tokenizer", "--data", tmp_path / "nowhere")
    refused(answer, f"data {tmp_path / 'nowhere'}: no such folder", "maskgit data make", "--data")
    assert not runs.exists()


def test_a_missing_tokenizer_is_answered_with_how_to_make_it(train, maskgit, runs, tmp_path, tiny_shards):
    own = runs / "one" / "pretrained" / "tokenizer"
    refused(
        train("transformer", named=False),
        f"tokenizer {own}: no such folder; train one",
        "maskgit train tokenizer",
        "--tokenizer",
    )
    refused(
        maskgit("tokenize", "--data", tiny_shards, "--runs-folder", runs, "--run", "one"),
        f"tokenizer {own}: no such folder; train one",
    )
    nowhere = tmp_path / "nowhere"
    refused(train("transformer", "--tokenizer", nowhere), f"tokenizer {nowhere}: no config.json there")


@pytest.fixture
def stage_two(maskgit, runs) -> Callable[..., Answer]:
    """Calls ``maskgit train transformer`` on a data folder without ``--tokenizer``."""

    def call(shards: Path, *more: object) -> Answer:
        tiny = flags(yaml.safe_load((TINY / "transformer.yaml").read_text()))
        return maskgit("train", "transformer", "--data", shards, "--runs-folder", runs, *tiny, *more)

    return call


def add_run(folder: Path, shards: Path, *, seed: int) -> Path:
    """A run of stage 1 as training leaves it: the exported tokenizer, and the data in config.yaml."""
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
def test_a_run_is_repeated_from_its_config(train, maskgit, runs, tiny_shards):
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


def test_the_complete_recipe_is_printed_and_nothing_is_trained(train, runs):
    answer = train("transformer", "--recipe=square", "--print-config")
    assert answer.code == 0
    printed = yaml.safe_load(answer.out)
    assert printed["model"]["mask_schedule"] == "square"
    assert printed["trainer"]["gradient_clip_algorithm"] is None
    assert not runs.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("--model.mask_sched=square", ("key 'model.mask_sched'", "did you mean 'model.mask_schedule'")),
        ("--model.zzzzzz=1", ("unknown key 'model.zzzzzz'", "recipes/transformer")),
        ("--trainer.max_steps=many", ("max_steps", "many")),
        ("--trainer.max_steps=-1", ("trainer.max_steps must be >= 1", "got -1")),
        ("--model.label_smoothing=a lot", ("label_smoothing", "a lot")),
        ("--model.optimizer.learning_rate.peak=.nan", ("model.optimizer.learning_rate.peak must be finite", "nan")),
        ("--model.mask_schedule=squar", ("unknown mask schedule 'squar'", "did you mean 'square'", "known: arccos")),
        ("--model.mask_schedule={name: pow, exponent: -1}", ("pow", "exponent", "-1")),
        ("--model.network.num_classes=4", ("num_classes", "num_classes must be 3", "got 4")),
        ("--model.network.codebook_size=8", ("model.network.codebook_size must be 16, that of the tokenizer, got 8",)),
        ("--data.seed=18446744073709551616", ("data.seed must be an integer in [0, 2**32)", "18446744073709551616")),
        ("--data.source=pixels", ("source", "pixels")),
        ("--model.decoding.num_steps=99", ("num_steps must be <= 16", "99")),
        ("--model.decoding.guidance=liner", ("unknown guidance schedule 'liner'", "did you mean 'linear'")),
        ("--model.network.class_dropout=0", ("model.decoding.guidance", "null class", "class_dropout")),
        ("--data.global_batch=0", ("global_batch", "0")),
        ("--trainer.devices=2", ("trainer.strategy must", "for 2 ranks", "--cluster ddp")),
        ("--matmul_precision=low", ("matmul_precision", "low")),
        ("--trainer.devices=-1", ("trainer: ", "devices -1")),
        ("--trainer.num_nodes=0", ("num_nodes",)),
        ("--hang_seconds=0", ("hang_seconds must be a number in (0, 1e9], got 0",)),
        ("--keep_every=7", ("keep_every must be a multiple of checkpoint_every (500)",)),
        ("--config=other.yaml", ("--config other.yaml: no such file",)),
        ("--trainer.callbacks=x.Y", ("trainer.callbacks cannot be set: name the callbacks with the key callbacks",)),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_is_written(train, runs, flag, parts):
    refused(train("transformer", flag), *parts)
    assert not runs.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("train transformer --recipe cosin", "did you mean 'cosine'"),
        ("train transformer --model.zzzzzz=1", "unknown key 'model.zzzzzz'"),
        ("train tokenizer --data nowhere", "data nowhere: no such folder"),
        ("train tokenizer --data nowhere --print-config", "data nowhere: no such folder"),
        ("train tokenizer --data . --pretrained nowhere", "pretrained nowhere: no tokenizer/config.json"),
        ("train transformer --config nowhere.yaml --run two", "--config nowhere.yaml: no such file"),
        ("tokenize --data . --tokenizer nowhere", "tokenizer nowhere: no config.json there"),
        ("export nowhere", "run nowhere has no stage with checkpoints"),
    ],
)
def test_what_is_wrong_is_answered_in_one_line(maskgit, words, part):
    refused(maskgit(*words.split()), part)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_are_rounded_as_the_recipe_says(train, precision, monkeypatch):
    seen = []
    plain = StepCheck.on_train_batch_start

    def on_train_batch_start(*args):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        plain(*args)

    monkeypatch.setattr(StepCheck, "on_train_batch_start", on_train_batch_start)
    assert train("transformer", f"--matmul_precision={precision}").code == 0
    assert set(seen) == {(precision, precision == "high")}


def test_unknown_recipes_clusters_and_flags_of_other_commands_are_refused(train, maskgit):
    refused(train("transformer", "--recipe=cosin"), "did you mean 'cosine'")
    refused(train("transformer", "--cluster=dpp"), "did you mean 'ddp'")
    unknown = maskgit("tokenize", "--batch-siz", "4")
    assert unknown.code == 2
    assert "unrecognized argument '--batch-siz'" in unknown.error


def test_a_command_that_cannot_print_ends_with_its_own_code():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "maskgit_pl", "train", "tokenizer", "--data", "nowhere"]
        assert subprocess.run(command, stderr=full, check=False).returncode == 2


@pytest.mark.slow
def test_a_training_whose_log_cannot_be_written_trains_to_its_end(tiny_shards, runs):
    sizes = flags(yaml.safe_load((TINY / "tokenizer.yaml").read_text()))
    words = ["train", "tokenizer", f"--data={tiny_shards}", f"--runs-folder={runs}", "--run=one", *sizes]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "maskgit_pl", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (74, "maskgit train: [Errno 28] No space left on device\n")
    assert (runs / "one" / "pretrained" / "tokenizer" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "names"), [("tokenizer", "val/psnr"), ("transformer", "val/loss")])
def test_validation_curves_and_pictures_stand_at_the_same_steps(train, runs, stage, names):
    steps = ("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.log_every_n_steps=2")
    assert train(stage, *steps).code == 0
    events = EventAccumulator(str(runs / "one" / stage))
    events.Reload()
    for name in (names, "train/loss" if stage == "transformer" else "train/reconstruction"):
        assert [each.step for each in events.Scalars(name)] == [2, 4], name
    for picture in events.Tags()["images"]:
        assert {each.step for each in events.Images(picture)} <= {2, 4}


@pytest.mark.slow
def test_each_recipe_file_is_parsed_once(train, maskgit, runs, monkeypatch):
    texts, load = [], yaml.load

    def counted(text: str, Loader: type[yaml.SafeLoader]) -> object:  # noqa: N803  # PyYAML's name
        texts.append(text)
        return load(text, Loader=Loader)

    def counts(files: list[Path]) -> list[int]:
        return [texts.count(file.read_text()) for file in files]

    folder = Path(__file__).parents[2] / "recipes"
    assert train("transformer").code == 0
    config = runs / "one" / "transformer" / "config.yaml"
    monkeypatch.setattr(yaml, "load", counted)
    assert train("transformer", "--recipe=paper-256 log", "--run=two", "--model.network.depth=1").code == 0
    names = ("transformer/base", "transformer/paper-256", "transformer/log", "cluster/single")
    assert counts([folder / f"{name}.yaml" for name in names]) == [1, 1, 1, 1]
    texts.clear()
    assert maskgit("train", "transformer", "--runs-folder", runs, "--run", "three", "--config", config).code == 0
    assert counts([config]) == [1]


def plan_of(answer: Answer) -> dict[str, str]:
    assert answer.code == 0, answer
    return {line[:11].strip(): line[11:] for line in answer.out.splitlines()}


@pytest.mark.slow
def test_a_dry_run_says_what_training_would_do_and_writes_nothing(train, runs: Path, tmp_path: Path) -> None:
    plan = plan_of(train("tokenizer", "--dry-run"))
    assert plan["run"] == f"{runs / 'one/tokenizer'}: starts from scratch"
    assert plan["steps"] == "1, with a global batch of 4 = 1 rank x 2 accumulation steps x 2 samples"
    assert not runs.exists()
    train("tokenizer")
    before = files(tmp_path)
    assert "resumes from step-00000001" in plan_of(train("tokenizer", "--dry-run", "--trainer.max_steps=2"))["run"]
    assert "nothing to do" in plan_of(train("tokenizer", "--dry-run"))["run"]
    assert "tiny" in plan_of(train("transformer", "--dry-run", "--run=two"))["tokenizer"]
    assert files(tmp_path) == before


@pytest.mark.slow
def test_a_dry_run_refuses_what_training_would_refuse(train, runs: Path) -> None:
    train("tokenizer")
    refused(train("tokenizer", "--dry-run", "--data.seed=7"), "cannot resume", "data.seed: 0 -> 7")
    refused(train("transformer", "--dry-run", "--data.source=tokens"), "token store", "maskgit tokenize")
    refused(train("tokenizer", "--dry-run", "--trainer.strategy=fsdp"), "trainer.strategy")


@pytest.mark.slow
def test_fresh_starts_over_and_keeps_the_old_training(train, runs: Path) -> None:
    train("tokenizer")
    old = files(runs / "one" / "tokenizer")
    for number in (1, 2):
        answer = train("tokenizer", "--fresh", "--data.seed=7")
        assert answer.code == 0, answer
        assert f"renamed to {runs / 'one'}/tokenizer.old-{number}" in answer.out
        assert (runs / "one" / "tokenizer" / "exported.json").is_file()
    moved = files(runs / "one" / "tokenizer.old-1")
    assert {name.replace("tokenizer.old-1", "tokenizer"): time for name, time in moved.items()} == old
    assert "nothing to do" in train("tokenizer", "--data.seed=7").out


def test_fresh_is_refused_for_one_of_several_ranks(train, runs: Path, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(train("tokenizer", "--fresh"), "--fresh must be given to a single process, got 2 ranks")


def test_the_recipe_is_printed_without_data_and_tokenizer(maskgit) -> None:
    for stage in ("tokenizer", "transformer"):
        answer = maskgit("train", stage, "--recipe", "adaln", "--dataset", "nowhere", "--print-config")
        assert answer.code == 0
        assert answer.out.startswith("# Keys that data and tokenizer give")
        wanted = Recipe.read(stage, names="adaln", dataset="nowhere").get("trainer.max_steps")
        assert yaml.safe_load(answer.out)["trainer"]["max_steps"] == wanted
