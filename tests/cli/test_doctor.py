"""``maskgit doctor``: its flags, its exit code and its output. tests/runs/test_doctor.py tests each check."""

import json
import os
from collections.abc import Callable

import pytest

from tests.cli.commands import Answer, refused
from tests.conftest import tiny_flags


@pytest.fixture
def doctor(maskgit, tmp_path, tiny_shards, tiny_pretrained) -> Callable[..., Answer]:
    """Examines a tiny run of stage 2; words that are given later count."""

    def call(*more: object) -> Answer:
        where = ("--data", tiny_shards, "--runs-folder", tmp_path / "runs", "--run", "one")
        tokenizer = ("--tokenizer", tiny_pretrained / "tokenizer")
        words = ("--device-memory", "1GB", *where, *tokenizer, *tiny_flags("transformer"))
        return maskgit("doctor", "transformer", *words, *more)

    return call


def test_a_run_that_can_start_and_one_that_cannot(doctor):
    ready = doctor("--cluster", "ddp", "--nodes", "2", "--devices", "2")
    assert ready.code == 0, ready
    assert "4 = 4 ranks x 1 accumulation step x 1 sample" in ready.out
    assert ready.out.endswith("checks pass.\n")
    wrong = doctor("--devices", "3", "--cluster", "ddp")
    assert wrong.code == 2
    assert "FAIL     batch" in wrong.out
    assert "1 of" in wrong.out.splitlines()[-1]


def test_json(doctor):
    answer = doctor("--json")
    found = json.loads(answer.out)
    assert (answer.code, found["ok"]) == (0, True)
    assert {"data", "batch", "memory"} <= {check["name"] for check in found["checks"]}
    assert found["memory"]["states"] > 4 * found["num_parameters"] > 0
    assert not json.loads(doctor("--json", "--trainer.precision=16-mixed").out)["ok"]


def test_names_of_files_do_not_control_the_terminal(doctor):
    answer = doctor("--data", "no\x1b[2Jwhere", "--run", os.fsdecode(b"\xff"))
    assert answer.code == 2
    assert "data no\\x1b[2Jwhere: no such folder" in answer.out
    assert "\\udcff" in answer.out
    assert "\x1b" not in answer.out


def test_without_a_stage_it_checks_this_machine(maskgit):
    answer = maskgit("doctor")
    assert answer.code == 0
    assert "torch" in answer.out


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--recipe=paper-256", "stage must be tokenizer or transformer"),
        ("transformer --device-memory=much", "--device-memory must be a size such as 80GB"),
        ("transformer --device=h1000", "--device must be one of a100-40"),
    ],
)
def test_wrong_flags_are_refused(words, rule, maskgit):
    refused(maskgit("doctor", *words.split()), rule)
