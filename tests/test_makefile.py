"""The Makefile: its help lists every target and variable, and its variables reach the commands."""

import os
import re
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


def test_every_public_target_has_a_help_text():
    phony = re.search(r"^\.PHONY: (.*)$", TEXT, re.MULTILINE)[1].split()
    documented = re.findall(r"^([a-z-]+):.*?## \S", TEXT, re.MULTILINE)
    assert sorted(phony) == sorted(documented)


def test_help_lists_every_variable_that_a_user_sets():
    listed = re.findall(r"^#: ([A-Z_]+)\|\S", TEXT, re.MULTILINE)
    defined = re.findall(r"^([A-Z_]+) \?=", TEXT, re.MULTILINE)
    assert sorted(listed) == sorted(set(defined) - {"PYTHON"})


def test_the_default_cluster_is_a_recipe():
    assert (ROOT / "recipes" / "cluster" / f"{re.search(r'^CLUSTER .= (.*)$', TEXT, re.MULTILINE)[1]}.yaml").is_file()


def test_variables_become_flags_of_the_same_name():
    words = ("CLASSES=3", "NUM_STEPS=12", "SEED=7", "RUN=mine")
    printed = run_make("sample", *words).stdout
    assert all(flag in printed for flag in ('--classes "3"', "--num-steps 12", "--seed 7", "runs/mine"))
    printed = run_make("doctor", "CLUSTER=fsdp", "NODES=2", "DEVICES=4", "RECIPE=paper-256").stdout
    assert all(flag in printed for flag in ("--cluster fsdp", "--nodes 2", "--devices 4", '--recipe "paper-256"'))


def test_names_may_contain_spaces():
    printed = run_make("train-tokenizer", "DATASET=my shapes", "RUN=my run").stdout
    assert '--dataset "my shapes" --data "data/shards/my shapes"' in printed
    assert '"runs/my run"' in run_make("evaluate", "RUN=my run").stdout


def test_an_unknown_benchmark_is_answered_with_the_list():
    assert "NAME must be one of: " in run_make("benchmark", "NAME=nope").stdout
    assert "stage2_step" in run_make("benchmark", "NAME=nope").stdout


def test_edit_without_an_image_says_so():
    assert "IMAGE must name an image file" in run_make("edit").stdout
    printed = run_make("edit", "IMAGE=my photo.jpg", "ARGS=--box 0,4,28,16 --class Bag").stdout
    assert 'maskgit edit "runs/fashion-mnist-adaln" "my photo.jpg" --box 0,4,28,16 --class Bag' in printed


def test_slurm_jobs_use_ddp_unless_a_cluster_is_given():
    assert "--cluster ddp" in run_make("submit-transformer").stdout
    assert "--cluster fsdp" in run_make("submit-transformer", "CLUSTER=fsdp").stdout
    assert "--cluster single" in run_make("train-tokenizer").stdout


@pytest.mark.parametrize(
    "target", ["data", "sample", "evaluate", "train-tokenizer", "tokenize", "lint", "test", "install"]
)
def test_only_targets_for_development_install_its_tools(target):
    printed = run_make("VENV=absent", target, installed=False).stdout
    wanted = '--editable ".[dev]"' if target in ("lint", "test", "install") else "--editable ."
    assert [line.partition("check ")[2] for line in printed.splitlines() if "pip install" in line] == [wanted]


def test_the_data_sets_that_make_can_fetch_are_those_of_the_package():
    assert re.search(r"^FETCHED = (.*)$", TEXT, re.MULTILINE)[1].split() == [*public_datasets()]
    assert (
        'maskgit data fetch "blue-marble" --out "data/shards/blue-marble"'
        in run_make("data", "DATASET=blue-marble").stdout
    )
    assert (
        'maskgit data make "photos" --out "data/shards/mine"'
        in run_make("data", "DATASET=mine", "IMAGES=photos").stdout
    )


def test_the_variables_of_the_make_that_runs_the_tests_do_not_reach_them(monkeypatch):
    expected = run_make("sample").stdout
    monkeypatch.setenv("MAKEFLAGS", "-- ARGS=--maxfail=80 SEED=7")
    monkeypatch.setenv("SEED", "7")
    assert run_make("sample").stdout == expected
