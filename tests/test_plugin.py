"""A mask schedule of another package is named by a flag, and broken ones are one line each."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import tiny_flags
from tests.installed_packages import install

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCHEDULES = '''
import math
from dataclasses import dataclass

import torch
from maskgit_pl.schedules import MaskSchedule


@dataclass(frozen=True)
class Sine(MaskSchedule):
    """1 - sin(pi r / 2)."""

    def __call__(self, progress, num_tokens):
        return 1 - torch.sin(progress * math.pi / 2)


@dataclass(frozen=True)
class Broken(MaskSchedule):
    """No number in the middle."""

    def __call__(self, progress, num_tokens):
        return torch.where(progress == 0.5, torch.nan, 1 - progress)
'''
ENTRY_POINTS = """[maskgit_pl.mask_schedules]
sine = sine_schedule:Sine
broken = sine_schedule:Broken
missing = sine_schedule:Missing
leaving = leaving_schedule:Leaving
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory, and ``site`` with the plug-in as pip installs it."""
    folder = tmp_path_factory.mktemp("plugin")
    modules = {"sine_schedule": SCHEDULES, "leaving_schedule": "import sys\n\nsys.exit(3)\n"}
    install(folder / "site", name="sine-schedule", entry_points=ENTRY_POINTS, modules=modules)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def maskgit(folder: Path, *words: object, with_plugin: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a command in the workplace."""
    paths = [str(folder / "site")] if with_plugin else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)])}
    return forked.run(words, cwd=folder, env=environment)


def train(folder: Path, schedule: str, shards: Path, pretrained: Path, **how: bool) -> subprocess.CompletedProcess[str]:
    where = ("--data", shards, "--tokenizer", pretrained / "tokenizer", "--run", schedule)
    words = (*where, *tiny_flags("transformer"), f"--model.mask_schedule={schedule}")
    return maskgit(folder, "train", "transformer", *words, **how)


def test_a_schedule_of_another_package_trains_a_step_by_name(workplace, tiny_shards, tiny_pretrained):
    done = train(workplace, "sine", tiny_shards, tiny_pretrained)
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((workplace / "runs" / "sine" / "pretrained" / "transformer" / "config.json").read_text())
    assert config["mask_schedule"] == "sine"


def test_a_broken_schedule_is_refused_by_name(workplace, tiny_shards, tiny_pretrained):
    done = train(workplace, "broken", tiny_shards, tiny_pretrained)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "mask schedule 'broken': its values must be finite" in done.stderr
    assert not (workplace / "runs" / "broken").exists()


def test_without_the_package_the_name_is_unknown(workplace, tiny_shards, tiny_pretrained):
    done = train(workplace, "sine", tiny_shards, tiny_pretrained, with_plugin=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "unknown mask schedule 'sine'" in done.stderr
    assert "known: arccos, cosine, cubic" in done.stderr


def test_the_table_of_schedules_names_the_broken_ones_in_one_line_each(workplace):
    done = maskgit(workplace, "schedules", "--num-tokens", 16, "--num-steps", 4)
    assert done.returncode == 0, done.stdout + done.stderr
    package = "announced by package sine-schedule"
    for said in (
        f"'broken': its values must be finite (at 2 tokens); {package} (sine_schedule:Broken)",
        f"'leaving' cannot be loaded: SystemExit: 3; {package} (leaving_schedule:Leaving)",
        "'missing' cannot be loaded: AttributeError: module 'sine_schedule' has no attribute 'Missing'; "
        f"{package} (sine_schedule:Missing)",
    ):
        assert f"mask schedule {said}\n" in done.stdout
    for name in ("sine", "cosine", "log"):
        assert f"\n{name} " in done.stdout


@pytest.mark.parametrize("name", ["missing", "leaving"])
def test_a_plugin_that_cannot_be_loaded_is_answered_in_one_line(workplace, name):
    done = maskgit(workplace, "schedules", "--schedules", name)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith(f"maskgit schedules: mask schedule '{name}' cannot be loaded: ")
    assert done.stderr.count("\n") == 1
