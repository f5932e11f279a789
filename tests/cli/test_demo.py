"""``maskgit demo``: its steps, and what ends it."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskgit_pl.cli import build_parser, main
from maskgit_pl.cli.demo import Step, plan_demo, run_steps
from tests.test_makefile import run_make

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "tiny"


def parse(*words: str) -> argparse.Namespace:
    args, args.overrides = build_parser().parse_known_args(["demo", *words])
    return args


def commands(*words: str) -> list[list[str]]:
    return [step.words for step in plan_demo(parse(*words))]


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_the_demo_has_the_steps_of_make() -> None:
    found = commands()
    assert [words[:2] for words in found[:2]] == [["data", "fetch"], ["train", "tokenizer"]]
    assert [words[0] for words in found[2:]] == ["tokenize", "train", "evaluate"]
    # The commands of the targets that make has for single steps.
    for target, words in zip(("train-tokenizer", "tokenize", "train-transformer"), found[1:4], strict=True):
        (*_, line) = run_make(target).stdout.splitlines()
        _, *wanted = shlex.split(line)
        assert [word for word in words if word not in ("--runs-folder", "runs")] == wanted


@pytest.mark.parametrize(
    "variables", [(), ("DATASET=blue-marble",), ("RECIPE=cosine",), ("DATASET=mine", "IMAGES=photos", "BUDGET=1h")]
)
def test_make_demo_is_the_command(variables: tuple[str, ...]) -> None:
    (line,) = run_make("demo", *variables).stdout.splitlines()
    _, name, *words = shlex.split(line)
    assert name == "demo"
    given = dict(each.split("=") for each in variables)
    own = {"DATASET": "--dataset", "IMAGES": "--images"}
    recipe = given.get("RECIPE") or ("adaln 1h" if "BUDGET" in given else "")
    short = [word for key, flag in own.items() if key in given for word in (flag, given[key])]
    assert commands(*words) == commands(*short, *(["--recipe", recipe] if recipe else []))


def test_steps_of_the_default_recipe_say_how_long_they_take() -> None:
    for words in ((), ("--recipe", "adaln"), ("--dataset", "blue-marble", "--recipe", "adaln 15m"), ("--short",)):
        assert all("about" in step.title for step in plan_demo(parse(*words))[1:]), words
    assert "about" not in plan_demo(parse("--recipe", "cosine"))[1].title


def test_own_images_are_converted_and_trained_with_a_budget() -> None:
    found = commands("--dataset", "mine", "--images", "photos", "--runs-folder", "r")
    assert found[0] == ["data", "make", "photos", "--out", "data/shards/mine"]
    assert (value(found[1], "--recipe"), value(found[1], "--run")) == ("adaln 15m", "mine-adaln-15m")
    assert found[-1][:2] == ["evaluate", "r/mine-adaln-15m"]


def test_a_tokenizer_that_is_named_is_not_trained() -> None:
    assert [words[0] for words in commands("--tokenizer", "x")] == ["data", "tokenize", "train", "evaluate"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--recipe", "cosin"), "did you mean 'cosine'"),
        (("--trainer.max_step", "3"), "trainer.max_steps"),
        (("--dataset", "nowhere"), "convert your own images with --images FOLDER"),
    ],
)
def test_a_mistake_is_reported_before_the_first_step(words, message, capsys, tmp_path) -> None:
    assert main(["demo", "--runs-folder", str(tmp_path), *words]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_failing_step_ends_the_demo_with_its_exit_code(capfd) -> None:
    steps = [Step("print", ["schedules", "--help"]), Step("fail", ["sample", "nowhere"]), Step("never", ["--version"])]
    assert run_steps(steps) == 2
    said = capfd.readouterr()
    assert [line for line in said.out.splitlines() if line.startswith("[")] == ["[1/3] print", "[2/3] fail"]
    assert "maskgit sample: run nowhere: no such folder" in said.err


@pytest.mark.slow
def test_the_handlers_of_signals_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_steps([Step("print", ["--version"])]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
@pytest.mark.parametrize("moment", ["before it starts", "while it starts", "after it has started"])
def test_a_stop_signal_is_passed_on_once_whenever_it_arrives(monkeypatch, moment) -> None:
    started, sent = [], []

    class Child(subprocess.Popen):
        def __init__(self, command, **options):
            started.append(command[-1])
            is_second = len(started) == 2
            if is_second and moment == "before it starts":
                os.kill(os.getpid(), signal.SIGTERM)
            work = "import time; time.sleep(600)" if is_second else ""
            super().__init__([sys.executable, "-c", work], **options)
            if is_second and moment == "while it starts":
                os.kill(os.getpid(), signal.SIGTERM)

        def send_signal(self, number):
            sent.append((started[-1], number))
            super().send_signal(number)

        def wait(self, timeout=None):
            if len(started) == 2 and moment == "after it has started":
                os.kill(os.getpid(), signal.SIGTERM)
            return super().wait(timeout)

    monkeypatch.setattr("maskgit_pl.cli.demo.subprocess.Popen", Child)
    assert run_steps([Step(name, [name]) for name in ("one", "two", "three")]) == 128 + signal.SIGTERM
    assert started == ["one", "two"]
    assert sent == [("two", signal.SIGTERM)]


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_a_stop_signal_before_a_step_does_not_start_it(monkeypatch) -> None:
    monkeypatch.setattr("builtins.print", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("maskgit_pl.cli.demo.subprocess.Popen", None)
    assert run_steps([Step("one", ["one"])]) == 128 + signal.SIGTERM


@pytest.mark.slow
@pytest.mark.trainings
@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_a_stopped_demo_saves_and_the_same_command_finishes_it(tmp_path: Path, tiny_shards: Path) -> None:
    for stage in ("tokenizer", "transformer"):
        (tmp_path / stage).mkdir()
        steps = {"tokenizer": 300, "transformer": 2}[stage]
        text = (TINY / f"{stage}.yaml").read_text().replace("max_steps: 1,", f"max_steps: {steps},")
        (tmp_path / stage / "tiny.yaml").write_text(f"{text}\ncheckpoint_every: 1000\n")
    command = [sys.executable, "-m", "maskgit_pl", "demo", "--recipe", "tokenizer/tiny.yaml transformer/tiny.yaml"]
    command += ["--dataset", "mine", "--data", str(tiny_shards), "--run", "one"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        started = tmp_path / "runs/one/tokenizer/config.yaml"
        deadline = time.monotonic() + 120
        while not started.is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()  # only the demo: it passes the signal on
        assert process.wait(120) == 75, (tmp_path / "log").read_text()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming from step-" in done.stdout
    for stage, steps in (("tokenizer", 300), ("transformer", 2)):
        assert json.loads((tmp_path / "runs/one" / stage / "exported.json").read_text())["step"] == steps
    assert (tmp_path / "runs/one/samples.png").is_file()
    assert "Next: maskgit sample runs/one" in done.stdout
