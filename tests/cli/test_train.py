"""``maskgit train``, ``tokenize``, ``slurm submit``, ``doctor`` and ``demo``; ``test_mistakes`` has the refusals."""

import functools
import gc
import http.server
import json
import os
import re
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from maskgit_pl.pretrained.networks import fingerprint, load_transformer
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.training.checkpoints import newest_checkpoint
from tests.cli.conftest import Answer, refused
from tests.conftest import save_tiny_pretrained, save_uneven_shards, tiny_flags

# A run and its records


def test_a_run_records_its_recipe_and_its_machine(train, runs, tiny_pretrained):
    assert train("transformer", "--recipe=square").code == 0
    folder, pretrained = runs / "one" / "transformer", runs / "one" / "pretrained"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["mask_schedule"] == "square"
    assert config["model"]["network"]["num_classes"] == 3
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 1
    assert {"command", "commit", "python", "torch", "lightning", "maskgit_pl"} <= environment.keys()
    assert fingerprint(pretrained / "tokenizer") == fingerprint(tiny_pretrained / "tokenizer")
    exported = json.loads((pretrained / "config.json").read_text())
    assert exported["run"]["transformer"]["settings"]["trainer.max_steps"] == 1
    assert "# one\n" in (pretrained / "README.md").read_text()


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
    refused(maskgit("train", "transformer", "--config", config), "set it with --run")
    refused(maskgit("train", "tokenizer", "--runs-folder", runs, "--run", "two", "--config", config), "unknown key")


def test_the_complete_recipe_is_printed_and_nothing_is_trained(train, maskgit, runs):
    answer = train("transformer", "--recipe=square", "--print-config")
    assert answer.code == 0
    recipe = yaml.safe_load(answer.out)
    assert recipe["model"]["mask_schedule"] == "square"
    assert recipe["trainer"]["benchmark"] is None
    assert not runs.exists()
    for stage in ("tokenizer", "transformer"):  # without data and tokenizer
        answer = maskgit("train", stage, "--recipe", "adaln", "--dataset", "nowhere", "--print-config")
        assert answer.out.startswith("# Paths are empty")
        max_steps = Recipe.read(stage, names="adaln", dataset="nowhere").get("trainer.max_steps")
        assert yaml.safe_load(answer.out)["trainer"]["max_steps"] == max_steps


@pytest.mark.slow
def test_a_baseline_trains_resumes_and_keeps_its_kind(maskgit, tiny_shards, tiny_pretrained, runs):
    where = ("--data", tiny_shards, "--runs-folder", runs, "--run", "one", "--tokenizer", tiny_pretrained / "tokenizer")
    sizes = [word for word in tiny_flags("transformer") if "decoding" not in word]
    words = ("train", "transformer", *where, "--recipe=autoregressive", *sizes)
    assert maskgit(*words, "--model.decoding.guidance=constant").code == 0
    assert "resuming from step-00000001" in maskgit(*words, "--trainer.max_steps=2").out
    assert load_transformer(runs / "one" / "pretrained" / "transformer").mask_schedule is None
    assert "| attention | causal |" in (runs / "one" / "pretrained" / "README.md").read_text()
    other = maskgit(*words, "--trainer.max_steps=3", "--model.network.attention=bidirectional")
    refused(other, "from step 2: settings changed (", "model.network.attention: causal -> bidirectional")


# The tokenizer and the tokens of stage 2


def add_run(folder: Path, shards: Path, *, seed: int) -> Path:
    """Makes a run of stage 1 as training leaves it: the exported tokenizer, and the data in config.yaml."""
    save_tiny_pretrained(folder / "pretrained", seed=seed)
    shutil.rmtree(folder / "pretrained" / "transformer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "config.yaml").write_text(f"data: {{path: {shards}}}\n")
    return folder / "pretrained" / "tokenizer"


@pytest.fixture
def stage_two(maskgit, runs, tiny_shards) -> Callable[..., Answer]:
    """Calls ``maskgit train transformer`` without ``--tokenizer``."""
    where = ("--data", tiny_shards, "--runs-folder", runs)
    return lambda *more: maskgit("train", "transformer", *where, *tiny_flags("transformer"), *more)


def test_tokens_of_another_tokenizer_are_refused(maskgit, train, runs, tiny_shards, tmp_path):
    other = save_tiny_pretrained(tmp_path / "other", seed=5) / "tokenizer"
    where = ("--data", tiny_shards, "--runs-folder", runs, "--run", "one", "--tokenizer", other)
    assert maskgit("tokenize", *where).code == 0
    refused(train("transformer", "--data.source=tokens"), "tokenizer")
    assert not (runs / "one" / "pretrained").exists()


def test_the_only_tokenizer_of_the_data_is_taken_and_several_must_be_named(stage_two, runs, tiny_shards):
    first = add_run(runs / "any-name", tiny_shards, seed=1)
    add_run(runs / "fashion-mnist-of-other-data", tiny_shards.parent / "elsewhere", seed=3)
    answer = stage_two()
    assert answer.code == 0, answer
    assert f"tokenizer: {first}, the only one trained on {tiny_shards}" in answer.out
    second = add_run(runs / "second", tiny_shards, seed=2)
    refused(stage_two("--recipe", "log"), "several others", "--tokenizer", str(first), str(second))


@pytest.fixture
def tokenize(maskgit, runs, tiny_shards, tiny_pretrained) -> Callable[..., Answer]:
    """Makes the tokens of the run ``one``; words that are given later count."""
    where = ("--data", tiny_shards, "--runs-folder", runs, "--run", "one")
    return lambda *more: maskgit("tokenize", *where, "--tokenizer", tiny_pretrained / "tokenizer", *more)


@pytest.mark.slow
def test_tokenize_prints_its_progress_and_speed(tokenize, runs, monkeypatch):
    monkeypatch.setattr("maskgit_pl.processes._SECONDS_BETWEEN_LINES", 0.0)
    lines = tokenize("--flip", "--batch-size", 2, "--part-size", 1, "--precision", "bfloat16").out
    assert re.search(r"^tokens of train: +98% 118/120 \[00:\d\d<00:00, .*images/s\]$", lines, re.MULTILINE)
    # 60 x 2 and 24
    assert re.search(r"^\S+tokens/[0-9a-f]{16}: 144 images in [\d.]+ s, \d+ images/s$", lines, re.MULTILINE)
    assert '"precision": "bfloat16"' in (runs / "one" / "tokens" / "store.json").read_text()


@pytest.mark.slow
def test_runs_with_the_same_tokenizer_and_data_share_their_tokens(tokenize, runs):
    def store_of(*more: str) -> Path:
        assert tokenize(*more).code == 0
        return (runs / (more[1] if more else "one") / "tokens").resolve()

    store = store_of()
    labels = store / "train-labels.npy"
    content, changed = labels.read_bytes(), labels.stat().st_mtime_ns
    assert store_of("--run", "two") == store == runs / "tokens" / store.name
    assert labels.stat().st_mtime_ns == changed
    labels.write_bytes(content[:-8] + bytes(8))
    assert labels.read_bytes() != content
    assert store_of() == store
    assert labels.read_bytes() == content  # a damaged store is made again
    mirrored = store_of("--run", "mirrored", "--flip")
    assert mirrored != store
    assert store_of("--run", "mirrored") == mirrored  # a run keeps its mirrors unless a flag says otherwise


# Data of a web server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder of shards, and its address on a server of this machine."""
    folder = save_uneven_shards(tmp_path_factory.mktemp("web") / "shards", (7, 5, 9, 4), (3, 8))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves shards to the garbage collector
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_stage_trains_from_a_stream_and_resumes(served, maskgit, tiny_pretrained, tmp_path, stage):
    folder, address = served
    stream = (
        "--data.source=stream", "--data.stream.samples=25", "--data.stream.shuffle_buffer=5",
        f"--data.stream.urls={address}/train-{{000000..000003}}.tar",
    )  # fmt: skip
    tokenizer = ("--tokenizer", tiny_pretrained / "tokenizer") if stage == "transformer" else ()
    tiny = [word for word in tiny_flags(stage) if "num_classes" not in word]  # the folder has it
    where = ("--data", folder, "--runs-folder", tmp_path, "--run", "one", *tokenizer, *tiny)
    train = functools.partial(maskgit, "train", stage, *where, *stream)
    assert "neither the order of samples nor the resume is exact" in train("--trainer.max_steps=3").out
    assert (tmp_path / "one" / "pretrained" / stage / "model.safetensors").is_file()
    assert train("--trainer.max_steps=5").code == 0
    assert newest_checkpoint(tmp_path / "one" / stage / "checkpoints").name == "step-00000005"
    refused(train("--trainer.max_steps=6", "--data.stream.urls=other.tar"), "settings changed")  # is another run
    refused(train("--run=two", "--data.stream.urls=pipe:cat x"), "'pipe:cat x'")
    refused(train("--run=three", "--data.stream.urls=no.tar"), "URLs by curl, got No such file or directory: no.tar")
    gc.collect()


# A job; tests/runs/test_slurm.py has its options


def test_a_dry_run_prints_the_job_and_writes_nothing(maskgit, runs, tiny_shards, tiny_pretrained):
    answer = maskgit(
        "slurm", "submit", "transformer", "--data", tiny_shards, "--runs-folder", runs, "--run=one", "--nodes=2",
        "--devices=1", "--tokenizer", tiny_pretrained / "tokenizer", *tiny_flags("transformer"), "--dry-run",
        "--cluster=fsdp", "--sbatch=--mem=0 --exclusive", "--srun=--cpu-bind=cores",
        "--container=apptainer exec --nv 'my image.sif'",
    )  # fmt: skip
    assert answer.code == 0, answer
    printed = answer.out[answer.out.index("STAGE=") : answer.out.index("dry run:")]
    words = shlex.split(printed.replace("\\\n", ""))
    script = words.index("recipes/slurm/train.sbatch")
    variables = {"STAGE=transformer", "RUN=one", f"RUNS={runs}", "CONTAINER=apptainer exec --nv 'my image.sif'"}
    assert variables <= set(words[:script])
    assert words[script - 2 : script] == ["--mem=0", "--exclusive"]  # the user's words come last
    assert "--trainer.max_steps=1" in words[script:]
    assert not runs.exists()


# The check of a run


@pytest.fixture
def doctor(maskgit, runs, tiny_shards, tiny_pretrained) -> Callable[..., Answer]:
    """Examines a tiny run of stage 2; words that are given later count."""
    where = ("--data", tiny_shards, "--runs-folder", runs, "--run", "one")
    words = ("--device-memory", "1GB", *where, "--tokenizer", tiny_pretrained / "tokenizer")
    return lambda *more: maskgit("doctor", "transformer", *words, *tiny_flags("transformer"), *more)


def test_doctor_prints_lines_or_json_and_ends_with_the_verdict(doctor):
    ready = doctor("--cluster", "ddp", "--nodes", "2", "--devices", "2")
    assert (ready.code, ready.out.splitlines()[-1]) == (0, "All 11 checks pass.")
    assert "4 = 4 ranks x 1 accumulation step x 1 sample" in ready.out
    assert "recipe         no.yaml: No such file or directory; check the path" in doctor("--recipe=no.yaml").out
    wrong = doctor("--devices", "3", "--cluster", "ddp")
    assert (wrong.code, re.findall(r"^FAIL +(\w+)", wrong.out, re.MULTILINE)) == (2, ["batch"])
    checks = json.loads(doctor("--json").out)
    assert checks["ok"]
    assert {"data", "batch", "memory"} <= {check["name"] for check in checks["checks"]}
    assert not json.loads(doctor("--json", "--trainer.precision=16-mixed").out)["ok"]


def test_names_of_files_do_not_control_the_terminal(doctor):
    answer = doctor("--data", "no\x1b[2Jwhere", "--run", os.fsdecode(b"\xff"))
    assert answer.code == 2
    assert "data no\\x1b[2Jwhere: no such folder" in answer.out
    assert "\\udcff" in answer.out
    assert "\x1b" not in answer.out


# The demo; tests/evaluation/test_demo_steps.py runs its steps


def test_a_failing_step_ends_the_demo_with_one_line(maskgit, tmp_path) -> None:
    words = ["--dataset", "mine", "--images", tmp_path / "none", "--data", tmp_path / "data"]
    answer = maskgit("demo", *words, "--runs-folder", tmp_path / "runs")
    refused(answer, "maskgit demo: ", str(tmp_path / "none"))
    steps = [line for line in answer.out.splitlines() if line.startswith("[")]
    assert steps == [f"[1/6] write the images of {tmp_path / 'none'} as shards"]
