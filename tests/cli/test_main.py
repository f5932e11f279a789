"""The console script itself: what it answers without a command, to a wrong one, and to what ends a command."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl import __version__
from maskgit_pl.cli import listing, main


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr."""
    try:
        code = main(words)
    except SystemExit as stop:  # argparse's own
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def test_no_words_print_the_help(capsys):
    assert answer(capsys) == answer(capsys, "--help")


def test_the_version_is_told(capsys):
    assert answer(capsys, "--version") == (0, f"maskgit_pl {__version__}\n", "")


def test_an_unknown_command_is_answered_with_the_nearest_in_one_line(capsys):
    code, out, error = answer(capsys, "sampel", "runs/x")
    assert (code, out) == (2, "")
    assert error.startswith("maskgit: unknown command 'sampel': did you mean 'sample'? commands: demo, models, data, ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("sample", "runs/x", "--num-inference-steps", "8"), "; did you mean '--num-steps'?"),
        (("data", "make", "x", "--out", "y", "--val-fractoin=1"), "; did you mean '--val-fraction'?"),
        (("sample", "runs/x", "--foo"), ""),
        (("data", "mak"), ": did you mean 'make'? commands: make, index, verify, fetch"),
        (("train",), "the following arguments are required: tokenizer|transformer; see maskgit train --help"),
        (
            ("sample", "runs/x", "--seed"),
            "--seed: expected one argument; give a value that begins with - as FLAG=VALUE; see maskgit sample --help",
        ),
    ],
)
def test_what_argparse_refuses_is_one_line_with_the_nearest(capsys, words, hint):
    code, _, error = answer(capsys, *words)
    assert code == 2
    assert error.count("\n") == 1
    assert error.endswith(f"{hint}\n")


def test_a_value_that_argparse_drops_is_refused(capsys):
    error = "maskgit: --num-steps must have a value, got '--'\n"
    assert answer(capsys, "schedules", "--num-steps=--") == (2, "", error)


@pytest.mark.parametrize("words", [("--traceback", "sample", "/nope"), ("sample", "--traceback", "/nope")])
def test_a_traceback_is_printed_wherever_its_flag_stands(capsys, words):
    code, _, error = answer(capsys, *words)
    assert code == 2
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].startswith("maskgit sample: run /nope: no such folder")


def exits(code: str) -> object:
    """A function of a package named ``plugin``."""
    space = {"__name__": "plugin.module"}
    exec(code, space)
    space["run"].__doc__ = "Runs."
    return space["run"]


@pytest.mark.parametrize(
    "code",
    [
        "import sys\ndef run(): sys.exit(0)",
        "import sys\ndef run(): sys.exit('gone')",
        "import argparse\ndef run(): argparse.ArgumentParser().parse_args(['--help'])",
        "def run(): raise SystemExit",
    ],
)
def test_a_plug_in_cannot_end_a_command_in_silence(capsys, monkeypatch, code):
    monkeypatch.setattr(listing, "schedules", exits(code))
    code, _, error = answer(capsys, "schedules")
    assert code == 70
    assert "was called by plugin, which may not end a command" in error


@pytest.mark.parametrize(
    "error", [TypeError("list indices must be integers"), KeyError("key"), ValueError("of a library")]
)
def test_a_fault_of_ours_is_no_bad_input(capsys, monkeypatch, error):
    def run() -> None:
        """Runs."""
        raise error

    monkeypatch.setattr(listing, "schedules", run)
    code, _, text = answer(capsys, "schedules")
    assert code == 70
    assert text.startswith("Traceback")
    assert "maskgit schedules: " in text.splitlines()[-1]
    assert "internal error of maskgit_pl" in text.splitlines()[-1]


def test_ctrl_c_ends_a_command_with_one_line_and_130(capsys, monkeypatch):
    def run() -> None:
        """Runs."""
        raise KeyboardInterrupt

    monkeypatch.setattr(listing, "schedules", run)
    assert answer(capsys, "schedules") == (130, "", "maskgit schedules: interrupted\n")


def test_ctrl_c_within_exec_of_a_string_ends_python_m_with_130(tmp_path: Path):
    (tmp_path / "interrupted.py").write_text(
        "import runpy\nfrom maskgit_pl.cli import listing\n"
        "listing.schedules = lambda: exec('raise KeyboardInterrupt')\nlisting.schedules.__doc__ = 'Runs.'\n"
        "runpy.run_module('maskgit_pl', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "interrupted", "schedules"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (130, "maskgit schedules: interrupted\n")


@pytest.mark.slow
def test_ctrl_c_ends_data_make_and_its_workers_with_one_line(tmp_path: Path):
    make_images(tmp_path / "images")
    words = ["data", "make", str(tmp_path / "images"), f"--out={tmp_path / 'made'}"]
    command = [sys.executable, "-m", "maskgit_pl", *words, "--num-workers=2", "--shard-size=50"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        begun = time.monotonic()
        while not list((tmp_path / ".made.partial").glob("*")):
            assert time.monotonic() - begun < 60
            time.sleep(0.02)
        subprocess.run(["kill", "-INT", "--", f"-{process.pid}"], check=True)
        assert process.communicate()[1] == "maskgit data make: interrupted\n"
    assert process.returncode == 130
    assert not (tmp_path / "made").exists()


def make_images(folder: Path) -> None:
    """Writes many images of two classes."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(2000):
            Image.new("L", (8, 8), number % 256).save(folder / name / f"{number}.png")


def test_a_command_keeps_its_number_of_threads_on_a_busy_machine(monkeypatch, capsys):
    for name in ("MKL_DYNAMIC", "OMP_DYNAMIC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert answer(capsys, "--version")[0] == 0
    names = ("MKL_DYNAMIC", "OMP_DYNAMIC", "OMP_WAIT_POLICY")
    assert [os.environ[name] for name in names] == ["FALSE", "FALSE", "ACTIVE"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "to", "code", "said"),
    [
        (["plugins"], "> >(true)", 141, ""),  # written at the end
        (["recipes", "schema", "transformer"], "> >(true)", 141, ""),  # more than the buffer holds
        (["schedules"], "> >(true)", 141, ""),  # printed by rich
        (["plugins"], "> /dev/full", 74, "maskgit plugins: [Errno 28] No space left on device\n"),
    ],
)
def test_an_output_that_nobody_reads_ends_a_command_without_a_traceback(words, to, code, said):
    command = f"exec {sys.executable} -m maskgit_pl {' '.join(words)} {to}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["sample", "--help"], 0),
        (["sampel"], 2),
        (["evaluate", "runs/x", "--num-imges", "3"], 2),
        (["tune", "runs/x", "--trials", "many"], 2),
    ],
)
def test_help_and_wrong_flags_are_answered_without_torch(words, code):
    script = (
        f"import sys; from maskgit_pl.cli import main\ntry: code = main({words!r})\n"
        "except SystemExit as stop: code = stop.code\n"
        "sys.exit(9 if {'torch', 'lightning', 'numpy', 'PIL'} & set(sys.modules) else code)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == code
