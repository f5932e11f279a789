"""``maskgit demo``: its flags, and the end of the command. ``tests/evaluation/test_demo_steps.py`` tests its steps."""

import shlex
from dataclasses import asdict

import pytest

from maskgit_pl.cli import _parse, main
from maskgit_pl.cli.arguments import read_call
from maskgit_pl.evaluation.demo_steps import plan_demo
from tests.test_makefile import run_make


def commands(*words: str) -> list[list[str]]:
    args = _parse(["demo", *words])
    call = read_call(args.function, vars(args), args.rest)
    return [step.words for step in plan_demo(**asdict(call.pop("run")), **call)[0]]


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


def test_a_flag_of_a_recipe_reaches_both_stages_and_stands_in_their_commands() -> None:
    for words in commands("--short", "--data.seed", "3")[1:4]:
        assert words[-5:-3] == ["--data.seed", "3"]


def test_a_failing_step_ends_the_demo_with_one_line_and_its_exit_code(capsys, tmp_path) -> None:
    words = ["demo", "--dataset", "mine", "--images", str(tmp_path / "none"), "--data", str(tmp_path / "data")]
    assert main([*words, "--runs-folder", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr()
    assert [line for line in said.out.splitlines() if line.startswith("[")] == [
        f"[1/5] write the images of {tmp_path / 'none'} as shards"
    ]
    assert said.err.startswith("maskgit demo: ")
    assert len(said.err.splitlines()) == 1
