"""A command in a process of its own: its exit code, its output, and what stop signals do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
