"""Breaks the package in one place after the other and runs the quick tests each time: they must notice.

    python tests/mutation/run.py [--only TEXT ...] [--jobs N] [--whole-suite]

1. Every mutation of ``mutants.py`` must fit: its old text stands exactly once in its file.
2. The tests that it names must pass on the package as it is.
3. Each mutation runs them on a copy of the package that comes first on the path; the working tree is never changed.
   The process is forked from one that has imported torch, Lightning and pytest.
4. A mutation that no test notices is a survivor. It needs a reason in ``mutants.py``; with ``--whole-suite`` all quick
   tests are asked before.

Exits with 1 if a survivor has no reason, if one with a reason is killed, or if fewer than 95 % are killed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":  # processes that a test starts import this file again, and have the copy first
    sys.path.insert(0, str(REPOSITORY))

import pytest  # noqa: E402

from tests.mutation.mutants import MUTANTS, Mutant  # noqa: E402

_NEEDED = 0.95
_IMPORTED_ONCE = (
    "torch", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo", "lightning.pytorch",
    "lightning.pytorch.loggers", "torchmetrics", "torchmetrics.image.fid",
    "torchmetrics.image.inception", "torchmetrics.image.kid", "torch_fidelity", "torchvision", "timm",
    "einops", "safetensors.torch", "numpy", "yaml", "PIL.Image", "rich", "simplejpeg", "webdataset", "msgpack",
    "huggingface_hub", "matplotlib.pyplot",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What the tests said of a mutation.

    Attributes:
        outcome: ``killed`` by a test, by the time limit (``timeout``) or by the end of the process (``crashed``).
        by: The first test that failed.
        seconds: How long it took.
        output: What pytest printed.
    """

    outcome: Literal["killed", "survived", "timeout", "crashed"]
    by: str
    seconds: float
    output: str = ""


@dataclass
class Job:
    """Tests that run on a package, in a process of their own."""

    tests: Sequence[str]
    mutant: Mutant | None = None
    limit: float = 600.0
    result: Result | None = None
    folder: Path = field(init=False)
    pid: int = field(init=False)
    started: float = field(init=False)

    def start(self) -> None:
        """Forks; the child writes what came of it into its folder."""
        self.folder, self.started = Path(tempfile.mkdtemp(prefix="mutant-")), time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 3
            try:
                os.setsid()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                code = _child(self)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> bool:
        """Whether it is done; ends it where it takes too long."""
        seconds = time.monotonic() - self.started
        pid, _ = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0 and seconds < self.limit:
            return False
        self.result = self._read(seconds, is_over=pid == 0)
        self.stop(is_running=pid == 0)
        return True

    def stop(self, *, is_running: bool = True) -> None:
        """Ends the process, with what its tests have started, and removes its folder."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if is_running:
            os.waitpid(self.pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, seconds: float, *, is_over: bool) -> Result:
        said, output = self.folder / "said.json", self.folder / "output.txt"
        text = output.read_text(errors="replace") if output.exists() else ""
        if is_over:
            return Result("timeout", f"over {self.limit:.0f} s", seconds, text)
        if not said.exists():
            return Result("crashed", "the process ended", seconds, text)
        by = json.loads(said.read_text())
        return Result("killed" if by else "survived", by, seconds, text)


def _child(job: Job) -> int:
    """Puts the copy of the package in place and runs the tests."""
    output = os.open(job.folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    shutil.copytree(REPOSITORY / "maskgit_pl", job.folder / "maskgit_pl")  # with its bytecode, which stays valid
    if job.mutant is not None:
        path = job.folder / job.mutant.file
        path.write_text(job.mutant.applied(path.read_text()))
    sys.path.insert(0, str(job.folder))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(job.folder), str(REPOSITORY)])  # for what the tests start
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.chdir(REPOSITORY)
    seen = _FirstFailure()
    words = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={job.folder}/tmp"]
    words += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported once
    code = pytest.main([*words, *job.tests], plugins=[seen])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        return 3
    if not str(sys.modules["maskgit_pl"].__file__).startswith(str(job.folder)):
        return 3
    (job.folder / "said.json").write_text(json.dumps(seen.by if code else ""))
    return 0


class _FirstFailure:
    """A plugin of pytest that keeps the name of the first test that failed."""

    by = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.by = self.by or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.by = self.by or f"{report.nodeid} (import)"


def run_all(jobs: Sequence[Job], at_once: int) -> Iterator[Job]:
    """Runs jobs, so many at once; gives each when it is done."""
    waiting, running = list(reversed(jobs)), []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop())
                running[-1].start()
            time.sleep(0.05)
            done = [job for job in running if job.poll()]
            running = [job for job in running if job not in done]
            yield from done
    finally:
        for job in running:
            job.stop()


def check_whole(mutants: Sequence[Mutant], at_once: int) -> dict[str, float]:
    """Runs the named tests on the package as it is; how long each took.

    Raises:
        SystemExit: if one of them fails.
    """
    jobs = [Job([test]) for test in dict.fromkeys(test for mutant in mutants for test in mutant.tests)]
    seconds = {}
    for job in run_all(jobs, at_once):
        assert job.result is not None
        if job.result.outcome != "survived":
            raise SystemExit(f"{job.result.output}\nthe package as it is: {job.tests[0]} {job.result.outcome}")
        seconds[job.tests[0]] = job.result.seconds
    print(f"the package as it is: {len(jobs)} test files pass, {sum(seconds.values()):.0f} s", flush=True)
    return seconds


def run_mutants(mutants: Sequence[Mutant], at_once: int, *, whole_suite: bool) -> dict[Mutant, Result]:
    """What the tests say of each mutation; prints a line of each."""
    seconds = check_whole(mutants, at_once)
    jobs = [Job(m.tests, m, limit=60 + 4 * sum(seconds[test] for test in m.tests)) for m in mutants]
    results: dict[Mutant, Result] = {}
    for job in run_all(jobs, at_once):
        assert job.mutant is not None
        assert job.result is not None
        results[job.mutant] = job.result
        _print(job.mutant, job.result)
    if whole_suite:
        left = [Job(["tests"], m, limit=1800) for m, result in results.items() if result.outcome == "survived"]
        for job in run_all(left, at_once):
            assert job.mutant is not None
            assert job.result is not None
            results[job.mutant] = job.result
            _print(job.mutant, job.result)
    return results


def _print(mutant: Mutant, result: Result) -> None:
    by = result.by.removeprefix("tests/") or mutant.survives or "NO TEST NOTICES"
    print(f"{result.outcome:8} {result.seconds:5.1f} s  {mutant.name}\n{'':18}{by}", flush=True)


def verdict(results: dict[Mutant, Result]) -> int:
    """Prints the score and what is wrong; the exit code."""
    survivors = [mutant for mutant, result in results.items() if result.outcome == "survived"]
    score = 1 - len(survivors) / len(results)
    print(f"\n{len(results) - len(survivors)} of {len(results)} mutations noticed: {score:.1%}")
    for mutant in survivors:
        print(f"  survived: {mutant.name}: {mutant.survives or 'NO REASON IS GIVEN'}")
    unlisted = [mutant for mutant in survivors if not mutant.survives]
    mended = [mutant for mutant, result in results.items() if mutant.survives and result.outcome != "survived"]
    for mutant in mended:
        print(f"  noticed, take its reason away: {mutant.name}")
    return 1 if unlisted or mended or score < _NEEDED else 0


def main() -> int:
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description="Do the quick tests notice faults? See tests/mutation/mutants.py.")
    parser.add_argument("--only", nargs="+", default=[""], help="mutations whose name contains one of these texts")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutations at once (default: the cores)")
    parser.add_argument("--whole-suite", action="store_true", help="ask all quick tests about what survives")
    args = parser.parse_args()
    wrong = [text for mutant in MUTANTS if (text := mutant.misfit(REPOSITORY))]
    if wrong:
        raise SystemExit("\n".join(wrong))
    chosen = [mutant for mutant in MUTANTS if any(text in mutant.name for text in args.only)]
    if not chosen:
        raise SystemExit(f"--only must be part of the name of a mutation, got {' '.join(args.only)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    os.chdir(REPOSITORY)
    began = time.monotonic()
    for name in _IMPORTED_ONCE:
        importlib.import_module(name)
    assert "maskgit_pl" not in sys.modules
    code = verdict(run_mutants(chosen, args.jobs, whole_suite=args.whole_suite))
    print(f"{time.monotonic() - began:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
