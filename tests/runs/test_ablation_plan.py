"""A command in a process of its own: its exit code, its output, and what stop signals do."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from maskgit_pl import runs
from maskgit_pl.errors import PreemptedError
from maskgit_pl.runs import ablation_plan
from maskgit_pl.runs.ablation_plan import (
    AblationConfig,
    Budget,
    Factor,
    base_values,
    parse_budget,
    parse_factor,
    plan_variants,
)

DEPTH = Factor("model.network.depth", ("2", "6"))
SCALE = Factor("model.decoding.guidance.scale", ("0", "2"))


def plan(*factors: Factor, **options: Any) -> dict[str, Any]:
    """Returns the planned variants by label."""
    return {each.label: each for each in plan_variants(AblationConfig(factors, **options))}


def test_one_factor_at_a_time_changes_one_key_of_the_base() -> None:
    variants = plan(DEPTH, SCALE, overrides={"model.network.embed_dim": 64})
    assert list(variants) == ["base", "depth=2", "depth=6", "guidance.scale=0", "guidance.scale=2"]
    base = variants["base"].recipe.tree
    for label, key, value in (("depth=2", "depth", 2), ("depth=6", "depth", 6)):
        tree = variants[label].recipe.tree
        assert tree["model"]["network"].pop(key) == value
        assert tree["model"]["network"] == {
            name: each for name, each in base["model"]["network"].items() if name != key
        }
        assert tree["model"]["decoding"] == base["model"]["decoding"]
    assert {each.recipe.get("model.network.embed_dim") for each in variants.values()} == {64}


def test_a_grid_has_every_combination() -> None:
    variants = plan(DEPTH, SCALE, grid=True, recipes=("", "square"))
    assert len(variants) == 1 + 2 * 2 * 2
    pairs = {
        (each.names, each.recipe.get("model.network.depth"), each.recipe.get("model.decoding.guidance.scale"))
        for label, each in variants.items()
        if label != "base"
    }
    assert pairs == {(names, depth, scale) for names in ("", "square") for depth in (2, 6) for scale in (0, 2)}


def test_sets_of_recipes_are_variants_and_the_base_file_is_not_read_twice() -> None:
    variants = plan(recipes=("base", "square", "square log"))
    assert list(variants) == ["base", "recipe square", "recipe square log"]
    assert variants["base"].names == ""
    assert variants["recipe square log"].recipe.get("model.mask_schedule") == "log"


def test_only_keys_of_the_decoding_need_no_training() -> None:
    variants = plan(Factor("model.network", ("{depth: 2, embed_dim: 96}",)), SCALE)
    assert variants["depth=2, embed_dim=96"].trained == {"model.network": "{depth: 2, embed_dim: 96}"}
    assert variants["depth=2, embed_dim=96"].decoding == {}
    assert variants["guidance.scale=2"].trained == {}
    assert variants["guidance.scale=2"].trained_label == "base"
    assert variants["guidance.scale=2"].decoding == {"model.decoding.guidance.scale": "2"}


def test_the_base_tells_its_values_of_the_varied_keys() -> None:
    config = AblationConfig((Factor("model.network", ("{depth: 2, embed_dim: 96}",)), SCALE))
    (base, *_) = plan_variants(config)
    assert base_values(config, base.recipe.tree) == {"depth": 4, "embed_dim": 128, "guidance.scale": 1.0}


@pytest.mark.parametrize(
    ("text", "factor"),
    [
        ("model.network.depth=2,6", DEPTH),
        ("--decoding.guidance.scale=0, 2", SCALE),
        (
            "model.mask_schedule=cosine,{name: pow, exponent: 3}",
            ("model.mask_schedule", "cosine", "{name: pow, exponent: 3}"),
        ),
        ("model.optimizer.betas=[0.9, 0.96],[0.9, 0.99]", ("model.optimizer.betas", "[0.9, 0.96]", "[0.9, 0.99]")),
    ],
)
def test_factors_are_parsed(text: str, factor: Any) -> None:
    assert parse_factor("--vary", text) == (factor if isinstance(factor, Factor) else Factor(factor[0], factor[1:]))


@pytest.mark.parametrize(("text", "steps"), [("seconds=100", 400), ("seconds=0.1", 1), ("seconds=99.9", 400)])
def test_a_budget_of_seconds_gives_steps_by_the_time_of_a_step(text: str, steps: int) -> None:
    budget = parse_budget("--budget", text)
    assert budget.steps(0.25) == steps
    assert math.isclose(budget.steps(0.25) * 0.25, budget.amount or 0, abs_tol=0.25)


def test_a_budget_of_steps_sets_those_of_every_variant() -> None:
    variants = plan(DEPTH, budget=parse_budget("--budget", "steps=70"))
    assert {each.recipe.get("trainer.max_steps") for each in variants.values()} == {70}
    assert str(parse_budget("--budget", "steps")) == "steps"
    assert str(parse_budget("--budget", "seconds=2.5")) == "seconds=2.5"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("model.network.depth", "--vary must be KEY=VALUE"),
        ("=1", "--vary must be KEY=VALUE"),
        ("model.network.depth=", "must have at least one value"),
        ("model.network.depth=2,2", "must have different values, got 2 twice"),
    ],
)
def test_a_wrong_factor_is_refused(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_factor("--vary", text)


@pytest.mark.parametrize(
    "text", ["minutes=3", "seconds", "seconds=0", "seconds=x", "steps=1.5", "seconds=inf", "steps=0"]
)
def test_a_wrong_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--budget"):
        parse_budget("--budget", text)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"factors": ()}, "must vary something"),
        ({"factors": (DEPTH, DEPTH)}, "must be given once"),
        ({"factors": (DEPTH,), "seeds": (1, 1)}, "--seeds must be different"),
        ({"factors": (DEPTH,), "seeds": ()}, "--seeds must be different"),
        ({"factors": (Factor("data.seed", ("1",)),)}, "data.seed must not be set in an ablation: .*--seeds"),
        ({"factors": (DEPTH,), "overrides": ["--data.seed=3"]}, "data.seed must not be set in an ablation"),
        ({"factors": (Factor("data.image_size", ("8",)),)}, "data.image_size must not be set"),
        ({"factors": (Factor("model.network", ("{codebook_size: 8}",)),)}, "--stage tokenizer --stage-2"),
        (
            {"factors": (Factor("trainer.max_steps", ("8",)),), "budget": Budget("seconds", 3)},
            "follows --budget seconds=3",
        ),
        ({"factors": (SCALE,), "stage": "tokenizer"}, "--stage tokenizer, which decodes nothing"),
        ({"factors": (DEPTH,), "stage_2": ()}, "--stage-2 must come with --stage tokenizer"),
        ({"factors": (DEPTH,), "stage": "tokenizer", "tokenizer": Path("x")}, "--tokenizer must not be given"),
        ({"factors": (DEPTH,), "pilot_steps": 3}, "--pilot-steps must be"),
        ({"recipes": ("a", "a")}, "--recipes must be different"),
    ],
)
def test_a_wrong_ablation_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AblationConfig(**options)


def test_a_wrong_key_or_value_is_answered_with_the_nearest_key() -> None:
    with pytest.raises(ValueError, match=r"model\.network\.dept.*did you mean 'model\.network\.depth'"):
        plan(Factor("model.network.dept", ("2",)))
    with pytest.raises(ValueError, match=r"model\.network\.depth must be .*got 'deep'"):
        plan(Factor("model.network.depth", ("deep",)))
    with pytest.raises(FileNotFoundError, match="recipe 'squar'"):
        plan(recipes=("", "squar"))


def test_a_registered_object_is_labelled_like_a_call() -> None:
    quantizers = Factor(
        "model.network.quantizer", ("lfq", "{name: product, num_groups: 2, quantizer: {name: ema, decay: 0.9}}")
    )
    labels = list(plan(quantizers, stage="tokenizer"))
    assert labels == ["base", "quantizer=lfq", "quantizer=product(num_groups=2, quantizer=ema(decay=0.9))"]


ROOT = Path(__file__).parents[2]
# Stands in for a training that takes a second to save; it is found as ``maskgit_pl`` in the current folder.
SLOW = """
import pathlib, signal, sys, time

def save(*_):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit(75)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
print(*sys.argv[1:], flush=True)
pathlib.Path("started").touch()
time.sleep(0 if "short" in sys.argv else 60)
sys.exit(3)
"""
PARENT = """
import os, sys
from maskgit_pl.runs.ablation_plan import run_maskgit

os.chdir(sys.argv[1])
with open("output", "wb") as output:
    print(run_maskgit(sys.argv[2:], output))
"""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    (folder / "work" / "maskgit_pl").mkdir(parents=True)
    (folder / "work" / "maskgit_pl" / "__init__.py").touch()
    (folder / "work" / "maskgit_pl" / "__main__.py").write_text(SLOW)
    (folder / "parent.py").write_text(PARENT)
    return subprocess.Popen(
        [sys.executable, folder / "parent.py", folder / "work", *words], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip


def test_the_code_and_the_output_of_a_command(tmp_path):
    assert start(tmp_path, "train", "short").communicate(timeout=60)[0] == "(3, False)\n"
    assert (tmp_path / "work" / "output").read_text() == "train short\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no such signals")
@pytest.mark.parametrize("sent", ["Ctrl-C to all", "SIGTERM to the parent"])
def test_a_stop_signal_waits_until_the_command_has_saved(tmp_path, sent):
    process = start(tmp_path, "train")
    deadline = time.monotonic() + 60
    while not (tmp_path / "work" / "started").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if sent == "Ctrl-C to all":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.terminate()
    assert process.communicate(timeout=60)[0] == "(75, True)\n"
    assert (tmp_path / "work" / "saved").exists()


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces ``run_maskgit``, and returns the list of the commands."""
    called: list[list[str]] = []

    def run(words: list[str]) -> tuple[int, bool]:
        called.append(words)
        return 0, False

    monkeypatch.setattr(ablation_plan, "run_maskgit", run)
    return called


def test_every_schedule_gets_a_run_of_its_own_on_shared_tokens(commands: list[list[str]], tmp_path: Path) -> None:
    folders = runs.train_schedules(
        ["cosine", "square"], names="paper-256", dataset="shoes", runs=tmp_path, overrides={"trainer.max_steps": 3}
    )
    assert folders == [tmp_path / "shoes-paper-256-cosine", tmp_path / "shoes-paper-256-square"]
    assert len(commands) == 4
    shared = [
        "--recipe",
        "paper-256 square",
        "--dataset",
        "shoes",
        "--run",
        "shoes-paper-256-square",
        "--runs-folder",
        str(tmp_path),
    ]
    assert commands[2] == ["tokenize", *shared, "--trainer.max_steps=3"]
    assert commands[3] == ["train", "transformer", *shared, "--cluster", "single", "--trainer.max_steps=3"]


def test_all_recipes_are_read_before_the_first_run(commands: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="recipe 'squar'"):
        runs.train_schedules(["cosine", "squar"], runs=tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.max_step"):
        runs.train_schedules(["cosine"], runs=tmp_path, overrides={"trainer.max_step": 3})
    assert commands == []


@pytest.mark.parametrize(
    ("code", "is_stopped", "kind"),
    [(PreemptedError.exit_code, False, PreemptedError), (0, True, PreemptedError), (1, False, ValueError)],
    ids=["preempted", "stopped", "failed"],
)
def test_a_run_that_stops_stops_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, is_stopped: bool, kind: type[Exception]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(ablation_plan, "run_maskgit", lambda words: calls.append(words) or (code, is_stopped))
    with pytest.raises(kind, match=r"ablation cosine: .*repeat the command to resume"):
        runs.train_schedules(["cosine", "square"], runs=tmp_path)
    assert len(calls) == 1
