"""``maskgit_pl.demo``: its steps, what stops it, and that its results are those of the commands that it shows."""

import hashlib
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import maskgit_pl
from maskgit_pl.errors import PreemptedError
from maskgit_pl.evaluation.demo_steps import plan_demo
from maskgit_pl.runs.recipe import STAGES
from tests.test_makefile import run_make

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "tiny"
DEMO_TOKENIZER = ROOT / "maskgit_pl/models/fashion-mnist-demo/tokenizer"
SAME = (".safetensors", ".npy", ".npz", ".png", ".gif")  # weights, tokens and images; other files have times


def commands(**options: object) -> list[list[str]]:
    return [step.words for step in plan_demo(**options)[0]]


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_the_demo_has_the_steps_of_make() -> None:
    steps = commands()
    assert [words[:2] for words in steps[:2]] == [["data", "fetch"], ["train", "tokenizer"]]
    assert [words[0] for words in steps[2:]] == ["tokenize", "train", "train-classifier", "evaluate"]
    assert value(steps[-1], "--features") == "classifier"  # grey images
    # The commands of the targets that make has for single steps.
    for target, words in zip(("train-tokenizer", "tokenize", "train-transformer"), steps[1:4], strict=True):
        (*_, line) = run_make(target).stdout.splitlines()
        _, *wanted = shlex.split(line)
        assert [word for word in words if word not in ("--runs-folder", "runs")] == wanted


def test_own_images_are_converted_and_trained_with_a_budget() -> None:
    steps = commands(dataset="mine", images="photos", runs_folder="r", lenient=True)
    assert steps[0] == ["data", "make", "photos", "--out", "data/shards/mine", "--lenient"]
    assert (value(steps[1], "--recipe"), value(steps[1], "--run")) == ("adaln 15m", "mine-adaln-15m")
    assert (steps[-1][:2], value(steps[-1], "--features")) == (["evaluate", "r/mine-adaln-15m"], "classifier,lite0")
    assert [words[0] for words in commands(tokenizer=DEMO_TOKENIZER)] == [
        "data",
        "tokenize",
        "train",
        "train-classifier",
        "evaluate",
    ]
    for words in commands(overrides=["--data.seed=3"])[1:4]:
        assert "--data.seed=3" in words


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"images": "photos"}, ValueError, "dataset must be a name of your own .*'fashion-mnist'; add --dataset NAME"),
        ({"cluster": "ddp"}, ValueError, "trainer.devices must be 1 or a list of one index in the demo"),
        ({"tokenizer": "x"}, FileNotFoundError, "tokenizer x: no config.json there"),
        ({"pretrained": "x"}, FileNotFoundError, "tokenizer x/tokenizer: no config.json there"),
        ({"shrot": True}, TypeError, "demo has no options .'shrot'., only recipe, "),
    ],
)
def test_a_mistake_is_reported_before_the_first_step(options, error, message, tmp_path, caplog) -> None:
    with pytest.raises(error, match=message), caplog.at_level("INFO"):
        maskgit_pl.demo(**{"runs_folder": tmp_path, **options})
    assert caplog.messages == list(tmp_path.iterdir()) == []


@pytest.fixture
def place(tmp_path: Path, tiny_shards: Path) -> Path:
    """An empty folder with recipes of tiny sizes. Stage 2 reads tokens."""
    for stage in STAGES:
        (tmp_path / stage).mkdir()
        text = (TINY / f"{stage}.yaml").read_text().replace("source: images", "source: tokens")
        (tmp_path / stage / "tiny.yaml").write_text(f"{text}\ncheckpoint_every: 1000\n")
    (tmp_path / "shards").symlink_to(tiny_shards)
    return tmp_path


OPTIONS = {"recipe": "tokenizer/tiny.yaml transformer/tiny.yaml", "dataset": "mine", "data": "shards", "run": "one"}
DEMO = ["demo", "--short", *(word for name, text in OPTIONS.items() for word in (f"--{name}", text))]


def start(words: list[str], place: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(log, "w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "maskgit_pl", *words], cwd=place, env=environment, stdout=output, stderr=output
        )


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.suffix in SAME)
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
@pytest.mark.trainings
@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_the_demo_makes_what_its_commands_make_also_after_a_stop(place: Path, monkeypatch, caplog) -> None:
    # The demo is stopped in the first training, and finished by the same command.
    stopped = start(DEMO, place, place / "log")
    begun, deadline = place / "runs/one/tokenizer/config.yaml", time.monotonic() + 120
    while not begun.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    stopped.terminate()
    assert stopped.wait(120) == 75, (place / "log").read_text()
    assert start(DEMO, place, place / "log").wait(300) == 0, (place / "log").read_text()
    said = (place / "log").read_text()
    assert "resuming from step-" in said
    assert "Next: maskgit sample runs/one" in said
    made = hashes(place / "runs")
    assert {Path(name).suffix for name in made} == set(SAME)

    # The commands that it has shown, each in a process of its own, with the same classifier.
    for name in ("one", "tokens"):
        (place / "runs" / name).rename(place / name)
    for line in re.findall(r"^ +maskgit (.*)", said, re.MULTILINE)[:5]:
        assert start(shlex.split(line), place, place / "log").wait(300) == 0, (place / "log").read_text()
    assert hashes(place / "runs").items() <= made.items()  # the demo has a checkpoint of its stop, too

    # A signal in a training that is done already: the next step does not begin.
    class Stop(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "nothing to do" in record.getMessage():
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.chdir(place)
    handler = Stop()
    ours = logging.getLogger("maskgit_pl")
    ours.addHandler(handler)
    try:
        with caplog.at_level("INFO"), pytest.raises(PreemptedError, match="repeat the command to resume"):
            maskgit_pl.demo(**OPTIONS, short=True)
    finally:
        ours.removeHandler(handler)
    assert [message for message in caplog.messages if message.startswith("\n[")][-1].startswith("\n[1/5]")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
