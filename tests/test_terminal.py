"""Real processes whose stdout or stderr is closed, on a full disk, or read by nobody."""

import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import flags

TINY = Path(__file__).parent / "tiny"
LOST = (
    "maskgit: cannot write to stdout ([Errno 28] No space left on device); the command continues, its output is lost\n"
)
TO = {"closed": "{}>&-", "full": "{}>/dev/full", "gone": "{}> >(true)"}
WAYS = [(stream, how) for stream in ("stdout", "stderr") for how in TO]


def maskgit(words: list[str], stream: str, how: str) -> tuple[int, str, str]:
    """Runs a command with a stream in a bad way; exit code, stdout and stderr."""
    number = {"stdout": 1, "stderr": 2}[stream]
    command = f"exec {shlex.join([sys.executable, '-m', 'maskgit_pl', *words])} {TO[how].format(number)}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("stream", "how"), WAYS)
@pytest.mark.parametrize(
    "words",
    [["--help"], ["sample", "/nowhere"], pytest.param(["schedules"], marks=pytest.mark.slow)],
    ids=lambda words: words[0],
)
def test_a_command_ends_as_ever_and_says_lost_results_once(words, stream, how):
    code, out, error = maskgit(words, stream, how)
    refused = words[-1] == "/nowhere"
    if (stream, how) == ("stdout", "full") and not refused:
        assert (code, error) == (74, LOST)
    else:
        assert code == (2 if refused else 0)
        assert (error == "") == (stream == "stderr" or not refused)
        assert (out == "") == (stream == "stdout" or refused)


@pytest.mark.slow
@pytest.mark.parametrize(("stream", "how"), WAYS)
def test_sampling_writes_its_file(tiny_pretrained, tmp_path, stream, how):
    words = ["sample", str(tiny_pretrained), "--classes=0", "--per-class=1", f"--out={tmp_path / 'one.png'}"]
    code, _, error = maskgit(words, stream, how)
    assert (code, error) == ((74, LOST) if (stream, how) == ("stdout", "full") else (0, ""))
    assert (tmp_path / "one.png").is_file()


def training(shards: Path, folder: Path) -> list[str]:
    sizes = flags(yaml.safe_load((TINY / "tokenizer.yaml").read_text()))
    return ["train", "tokenizer", f"--data={shards}", f"--runs-folder={folder}", "--run=one", *sizes]


@pytest.mark.slow
@pytest.mark.parametrize(("stream", "how"), WAYS)
def test_training_runs_to_its_end(tiny_shards, tmp_path, stream, how):
    code, _, error = maskgit(training(tiny_shards, tmp_path), stream, how)
    assert (code, error) == (0, LOST if (stream, how) == ("stdout", "full") else "")
    assert (tmp_path / "one" / "pretrained" / "tokenizer" / "config.json").is_file()


@pytest.mark.slow
def test_training_outlives_its_terminal(tiny_shards, tmp_path):
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "maskgit_pl", *training(tiny_shards, tmp_path), "--trainer.max_steps=40"]
    with subprocess.Popen(words, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        os.read(ours, 1)
        os.close(ours)
    assert process.returncode == 0


def test_a_closed_stream_gives_its_number_to_no_other_file(tmp_path):
    code = (
        "import sys; from maskgit_pl.terminal import Terminal; Terminal()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); assert file.fileno() > 2\n"
        "import os; os.write(1, b'x'); os.write(2, b'x')"
    )
    command = f"exec {shlex.join([sys.executable, '-c', code])} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], check=False).returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_letters_that_the_terminal_lacks_are_escaped():
    code = "from maskgit_pl.terminal import Terminal; Terminal(); print('a…')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "a\\u2026\n"
