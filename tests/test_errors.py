"""Errors that are bad input, and the exit code and text of a command."""

import errno
import json
from array import array
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest

from maskgit_pl import checks
from maskgit_pl.errors import PreemptedError, describe_error, exit_code_of, is_user_error
from maskgit_pl.files import read_json
from maskgit_pl.processes import run_jobs


def caught(call) -> BaseException:
    """The error that a call raises."""
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "call",
    [
        lambda: checks.check_integer("--num-steps", "many", "[1, 8]"),
        lambda: checks.build_dataclass(Path, 1, "config.json"),
        lambda: Path("/nowhere/at/all").read_text(),
        lambda: Path("/").read_text(),
        lambda: Path("/etc/passwd/x").read_text(),
        lambda: Path("x" * 300).read_text(),
    ],
)
def test_what_the_package_refuses_and_paths_that_cannot_be_opened_are_bad_input(call):
    error = caught(call)
    assert is_user_error(error)
    assert exit_code_of(error) == 2
    assert describe_error(error, "maskgit sample") == f"maskgit sample: {error}\n"


def test_a_refusal_of_a_file_counts_whoever_calls(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    for name in ("config.json", "broken.json"):
        with ThreadPoolExecutor() as pool:
            assert exit_code_of(caught(pool.submit(read_json, tmp_path / name).result)) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: int("many"),
        lambda: json.loads("{"),
        lambda: b"\xff".decode(),
        lambda: array("b", b"x").frombytes(3),
        lambda: list(zip([1], [], strict=True)),
        lambda: checks.did_you_mean("x", 3),
        lambda: checks.check_integer("--num-steps", 3, "[one, two]"),  # a ValueError of float(), in our own file
        lambda: {}["key"],
        lambda: [][0],
        lambda: None.name,
        lambda: Fraction(1, 0),
    ],
)
def test_errors_of_libraries_and_expressions_are_internal(call):
    error = caught(call)
    assert exit_code_of(error) == 70
    text = describe_error(error, "maskgit sample")
    assert text.startswith("Traceback")
    assert "internal error of maskgit_pl" in text.splitlines()[-1]


def test_a_value_error_that_was_never_raised_is_not_the_users():
    assert exit_code_of(ValueError("x")) == 70


def test_a_full_disk_preemption_and_ctrl_c_have_codes_of_their_own():
    assert exit_code_of(OSError(errno.ENOSPC, "full")) == 74
    assert exit_code_of(PreemptedError("saved")) == 75
    assert exit_code_of(KeyboardInterrupt()) == 130
    assert describe_error(KeyboardInterrupt(), "maskgit sample") == "maskgit sample: interrupted\n"


def _refuse(shared: str, job: int) -> None:
    """Raises one of our own errors, or one of a library, in a worker."""
    if shared == "ours":
        checks.check_integer("job", job, "[9, 9]")
    int("many")


@pytest.mark.slow
@pytest.mark.parametrize(("whose", "code"), [("ours", 2), ("a library's", 70)])
def test_workers_tell_bad_input_from_faults(whose, code):
    assert exit_code_of(caught(lambda: list(run_jobs(_refuse, whose, [1, 2], workers=2)))) == code
