"""``maskgit doctor``: its flags, its exit code and its output. tests/runs/test_doctor.py tests each check."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from maskgit_pl.cli import main
from tests.conftest import flags

TINY = Path(__file__).parents[1] / "tiny" / "transformer.yaml"


@pytest.fixture
def doctor(capsys, tmp_path, tiny_shards, tiny_pretrained) -> Callable[..., tuple[int, str]]:
    """Examines a tiny run of stage 2; words that are given later count."""

    def call(*more: object) -> tuple[int, str]:
        where = ("--data", tiny_shards, "--runs-folder", tmp_path / "runs", "--run", "one")
        tokenizer = ("--tokenizer", tiny_pretrained / "tokenizer")
        words = ("doctor", "transformer", "--device-memory", "1GB", *where, *tokenizer)
        code = main([str(word) for word in (*words, *flags(yaml.safe_load(TINY.read_text())), *more)])
        return code, capsys.readouterr().out

    return call


def test_a_run_that_can_start(doctor):
    code, text = doctor("--cluster", "ddp", "--nodes", "2", "--devices", "2")
    assert code == 0, text
    assert "4 = 4 ranks x 1 accumulation step x 1 sample" in text
    assert text.endswith("checks pass.\n")


def test_a_run_that_cannot_start(doctor):
    code, text = doctor("--devices", "3", "--cluster", "ddp")
    assert code == 2
    assert "FAIL  batch" in text
    assert "1 of" in text.splitlines()[-1]


def test_json(doctor):
    code, text = doctor("--json")
    found = json.loads(text)
    assert (code, found["ok"]) == (0, True)
    assert {"data", "batch", "memory"} <= {check["name"] for check in found["checks"]}
    assert found["memory"]["states"] > 4 * found["num_parameters"] > 0
    assert not json.loads(doctor("--json", "--trainer.precision=16-mixed")[1])["ok"]


def test_names_of_files_do_not_control_the_terminal(doctor):
    code, text = doctor("--data", "no\x1b[2Jwhere", "--run", os.fsdecode(b"\xff"))
    assert code == 2
    assert "data no\\x1b[2Jwhere: no such folder" in text
    assert "\\udcff" in text
    assert "\x1b" not in text


def test_without_a_stage_it_checks_this_machine(capsys):
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out
    assert main(["doctor", "--recipe", "paper-256"]) == 2
    assert "stage must be tokenizer or transformer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("--nodes=0",), "--nodes must be an integer in"),
        (("--device-memory=much",), "--device-memory must be a size such as 80GB"),
        (("--device=h1000",), "--device must be one of a100-40"),
        (("--recipe=cosin",), "did you mean 'cosine'"),
        (("--model.mask_sched=square",), "did you mean 'model.mask_schedule'"),
    ],
)
def test_wrong_flags_are_refused(words, rule, capsys):
    try:
        code = main(["doctor", "transformer", *words])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    assert code == 2
    said = capsys.readouterr()
    assert rule in " ".join((said.out + said.err).split())
