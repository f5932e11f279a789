"""The console script, and rules that hold for every command: devices and outputs."""

import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl import __version__
from maskgit_pl.cli import build_parser
from maskgit_pl.cli.arguments import Output, _groups
from tests.cli.conftest import Answer, parsers
from tests.conftest import tiny_flags


def test_no_words_print_the_help_and_a_flag_the_version(maskgit):
    assert maskgit() == maskgit("--help")
    assert maskgit("--version") == Answer(0, f"maskgit_pl {__version__}\n", "")


@pytest.mark.parametrize("words", [("--traceback", "sample", "/nope"), ("sample", "--traceback", "/nope")])
def test_a_traceback_is_printed_wherever_its_flag_stands(maskgit, words):
    answer = maskgit(*words)
    assert answer.code == 2
    assert answer.error.startswith("Traceback")
    assert answer.error.splitlines()[-1].startswith("maskgit sample: run /nope: no such folder")


# Errors and interruptions


@pytest.mark.slow
def test_ctrl_c_ends_data_make_and_its_workers_with_one_line(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2000):
            Image.new("L", (8, 8), number % 256).save(tmp_path / "images" / name / f"{number}.png")
    words = ["data", "make", str(tmp_path / "images"), f"--out={tmp_path / 'made'}"]
    command = [sys.executable, "-m", "maskgit_pl", *words, "--num-workers=2", "--shard-size=50"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        begun = time.monotonic()
        while not list((tmp_path / ".made.partial").glob("*")):
            assert time.monotonic() - begun < 60
            time.sleep(0.02)
        subprocess.run(["kill", "-INT", "--", f"-{process.pid}"], check=True)
        assert process.communicate()[1] == "maskgit data make: interrupted\n"
    assert process.returncode == 130
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "to", "code", "error"),
    [
        # More than the buffer holds.
        ("recipes show paper-256", "> >(true)", 141, "maskgit recipes show: [Errno 32] Broken pipe\n"),
        ("schedules", "> >(true)", 141, "maskgit schedules: [Errno 32] Broken pipe\n"),  # written at the end
        ("plugins", "> /dev/full", 74, "maskgit plugins: [Errno 28] No space left on device\n"),
        ("train tokenizer --data nowhere", "2> /dev/full", 2, ""),
        ("schedules", ">&- 2>&- <&-", 0, ""),
    ],
)
def test_an_output_that_nobody_reads_ends_a_command_without_a_traceback(words, to, code, error):
    command = f"exec env -u PYTHONUNBUFFERED {shlex.quote(sys.executable)} -m maskgit_pl {words} {to}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, error)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["> /dev/full 2> /dev/full", ">&- 2>&-"])
def test_a_line_that_cannot_be_printed_ends_no_training(tiny_shards, tmp_path, to):
    words = shlex.join(["train", "tokenizer", f"--data={tiny_shards}", "--run=r", *tiny_flags("tokenizer")])
    command = f"exec env -u PYTHONUNBUFFERED {shlex.quote(sys.executable)} -m maskgit_pl {words} {to}"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "runs" / "r" / "pretrained" / "tokenizer" / "model.safetensors").is_file()


# The process


def test_a_command_keeps_its_number_of_threads_on_a_busy_machine(monkeypatch, maskgit):
    for name in ("MKL_DYNAMIC", "OMP_DYNAMIC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert maskgit("--version").code == 0
    names = ("MKL_DYNAMIC", "OMP_DYNAMIC", "OMP_WAIT_POLICY")
    assert [os.environ[name] for name in names] == ["FALSE", "FALSE", "ACTIVE"]


@pytest.mark.parametrize(("policy", "spins"), [(None, "10000"), ("ACTIVE", None)])
def test_threads_spin_for_a_short_while_unless_a_user_says_otherwise(monkeypatch, maskgit, policy, spins):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert maskgit("--version").code == 0
    assert (os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT")) == (policy or "PASSIVE", spins)


WITHOUT_TORCH = """
import os, sys
from maskgit_pl.cli import main
for words, wanted in (
    (["--help"], 0), (["sample", "--help"], 0), (["sampel"], 2), (["evaluate", "x", "--num-imges", "3"], 2),
    (["tune", "x", "--trials", "many"], 2),
):
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == wanted, words
    assert not {"torch", "lightning", "PIL"} & set(sys.modules), words
for words in (
    ["evaluate", "x"], ["evaluate-tokenizer", "x"], ["tune", "x"], ["sample", "x"], ["web", "x"], ["distill", "x"],
    ["edit", "x", "y.png", "--class", "z", "--strength", "1"], ["ablation", "--of", "x"], ["export", "x"],
    ["push", "x", "y/z"], ["demo", "--dataset", "x"], ["train", "tokenizer", "--data", "x"], ["data", "verify", "x"],
    ["tokenize", "--data", "x"], ["data", "make", "x", "--out", "y"], ["data", "fetch", "x"],
    ["inspect", "x"], ["train-classifier", "--data", "x"],
):
    assert main(words) == 2, words
    assert not {"torch", "lightning"} & set(sys.modules), words
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory in other ways")
def test_a_command_keeps_freed_memory():
    code = """
import resource
from maskgit_pl.cli import main
main(["schedules"])
def use():
    for _ in range(20):
        [bytes(2**21) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(-use() + use())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said.split()[-1]) < 2**21 / 4096  # less than one of 320 blocks has pages


def test_help_wrong_flags_and_wrong_paths_are_answered_without_torch(tmp_path: Path):
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, check=True, cwd=tmp_path)


WITHOUT_LIGHTNING = """
import sys
from maskgit_pl.cli import main
train = ["train", "transformer", "--data", sys.argv[1], "--tokenizer", sys.argv[2]]
for words in (
    [*train, "--trainer.max_step", "3"], [*train, "--trainer.max_steps", "x"], [*train, "--model.network.depth", "-1"],
    [*train, "--model.mask_schedule", "x"], [*train, "--data.augmentations", "[x]"], ["distill", "fashion-mnist-demo"],
    ["sample", "fashion-mnist-demo", "--classes", "x"], ["import-tokenizer", "x", "--out", "y"],
):
    assert main(words) == 2, words
    assert not {"lightning.pytorch", "torchmetrics", "timm"} & set(sys.modules), words
"""


@pytest.mark.slow
def test_a_wrong_value_of_a_recipe_is_answered_without_lightning(
    tiny_shards: Path, tiny_pretrained: Path, tmp_path: Path
):
    command = [sys.executable, "-c", WITHOUT_LIGHTNING, str(tiny_shards), str(tiny_pretrained / "tokenizer")]
    subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)


# Every command


COMMANDS = dict(parsers(build_parser()))


def test_what_a_command_writes_is_checked_before_any_work() -> None:
    tried = 0
    for function in (each for parser in COMMANDS.values() if (each := parser.get_default("function"))):
        for argument in (each for group in _groups(function) for each in group.arguments):
            if argument.label in ("--out", "--gif", "--filmstrip") and argument.metavar.startswith("FILE"):
                assert isinstance(argument.form, Output), (function, argument.name)
                tried += 1
    assert tried > 15


@pytest.mark.parametrize("words", [["--version"], ["train", "--help"]], ids=" ".join)
def test_commands_run_without_docstrings(words) -> None:
    command = [sys.executable, "-OO", "-m", "maskgit_pl", *words]
    assert "maskgit" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
