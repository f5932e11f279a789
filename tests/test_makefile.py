"""The Makefile: its help lists every target and variable, and its variables reach the commands."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from maskgit_pl.data.sources.public import public_datasets

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Makefile").read_text()
INSTALLED = ("--old-file=.venv/.installed", "--old-file=.venv/.installed-dev")


def run_make(*words: str, installed: bool = True) -> subprocess.CompletedProcess[str]:
    """Prints the commands of a target without running them; .venv counts as installed.

    The variables of a ``make test ARGS=...`` that runs these tests do not reach it.
    """
    own = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", *re.findall(r"^([A-Z_]+) \?=", TEXT, re.MULTILINE)}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    command = ["make", "--no-print-directory", "--dry-run", *(INSTALLED if installed else ()), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_help_lists_every_target_and_every_variable_that_a_user_sets():
    phony = re.search(r"^\.PHONY: (.*)$", TEXT, re.MULTILINE)[1].split()
    assert sorted(phony) == sorted(re.findall(r"^([a-z-]+):.*?## \S", TEXT, re.MULTILINE))
    listed = re.findall(r"^#: ([A-Z_]+)\|\S", TEXT, re.MULTILINE)
    defined = re.findall(r"^([A-Z_]+) \?=", TEXT, re.MULTILINE)
    assert sorted(listed) == sorted(set(defined) - {"PYTHON"})


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ("sample CLASSES=3 NUM_STEPS=12 SEED=7", ('--classes "3"', "--num-steps 12", "--seed 7")),
        ("doctor CLUSTER=fsdp NODES=2 RECIPE=paper-256", ("--cluster fsdp", "--nodes 2", '--recipe "paper-256"')),
        ("train-tokenizer 'DATASET=my shapes'", ('--dataset "my shapes" --data "data/shards/my shapes"', "single")),
        ("evaluate 'RUN=my run'", ('"runs/my run"',)),
        ("benchmark NAME=nope", ("NAME must be one of: ", "stage2_step")),
        ("edit 'IMAGE=my photo.jpg' 'ARGS=--box 0,4,28,16'", ('adaln" "my photo.jpg" --box 0,4,28,16',)),
        ("submit-transformer", ("--cluster ddp",)),
        ("demo DATASET=mine IMAGES=photos BUDGET=1h", ('--recipe "adaln 1h"', '--images "photos"')),
        ("data DATASET=mine IMAGES=photos", ('maskgit data make "photos" --out "data/shards/mine"',)),
        ("sample 'RECIPE=paper-256 log' 'ARGS=--a=b STEPS=4'", ("runs/fashion-mnist-paper-256-log", "--a=b STEPS=4")),
    ],
)
def test_variables_reach_the_commands(words, printed):
    output = run_make(*shlex.split(words)).stdout
    assert [text for text in printed if text not in output] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sample CLASS=Bag STEPS=4", " TOKENIZER WORKERS, got CLASS STEPS; see `make help`."),
        ("demo IMAGES=photos", "DATASET must be a name of your own with IMAGES, got fashion-mnist; set DATASET=NAME."),
        ("data IMAGES=photos", "DATASET must be a name of your own with IMAGES, got fashion-mnist; set DATASET=NAME."),
    ],
)
def test_a_variable_that_would_be_ignored_or_misread_is_refused_in_one_line(words, message):
    result = run_make(*shlex.split(words))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert message in result.stderr


@pytest.mark.parametrize("target", ["sample", "tokenize", "lint", "install"])
def test_only_targets_for_development_install_its_tools(target):
    printed = run_make("VENV=absent", target, installed=False).stdout
    wanted = '--editable ".[dev]"' if target in ("lint", "install") else "--editable ."
    assert [line.partition("check ")[2] for line in printed.splitlines() if "pip install" in line] == [wanted]


def test_make_fetches_the_data_sets_of_the_package():
    assert re.search(r"^FETCHED = (.*)$", TEXT, re.MULTILINE)[1].split() == [*public_datasets()]
