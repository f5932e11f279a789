"""Breaks the package in one place after the other and runs the quick tests each time: they must notice.

    python tests/mutation/run.py [--only TEXT ...] [--jobs N] [--whole-suite] [--record]

1. Every mutation of ``mutants.py`` must fit: its old text stands exactly once in its file.
2. The tests that it names must pass on the package as it is.
3. Each mutation runs them on a copy of the package that comes first on the path; the working tree is never changed.
   The process is forked from one that has imported torch, Lightning and pytest. The test in ``killers.json``, which
   noticed the mutation last time, runs first: all tests of a file take longer. ``--record`` writes that file.
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
_KILLERS = Path(__file__).with_name("killers.json")
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
    os.environ["PYTHONSAFEPATH"] = "1"  # the working directory has the package as it is, and would come first
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


def check_whole(groups: Sequence[tuple[str, ...]], at_once: int) -> dict[tuple[str, ...], float]:
    """Runs groups of tests on the package as it is; how long each group that passes took."""
    jobs = list(run_all([Job(tests) for tests in dict.fromkeys(groups)], at_once))
    seconds = {}
    for job in jobs:
        assert job.result is not None
        if job.result.outcome == "survived":
            seconds[tuple(job.tests)] = job.result.seconds
        else:
            print(f"{job.result.output}\nthe package as it is: {job.tests[0]} {job.result.outcome}", flush=True)
    print(
        f"the package as it is: {len(seconds)} of {len(jobs)} groups of tests pass, {sum(seconds.values()):.0f} s",
        flush=True,
    )
    return seconds


def run_mutants(mutants: Sequence[Mutant], at_once: int, *, whole_suite: bool) -> dict[Mutant, Result]:
    """What the tests say of each mutation; prints a line of each."""
    results: dict[Mutant, Result] = {}
    # The tests that noticed last time, file by file. One that has another name now is no reason to end.
    killers = {mutant: test for mutant in mutants if (test := read_killers().get(mutant.name))}
    groups = {
        file: tuple(dict.fromkeys(test for test in killers.values() if _file(test) == file))
        for file in map(_file, killers.values())
    }
    seconds = check_whole(list(groups.values()), at_once)
    jobs = [
        Job([test], mutant, limit=60 + 4 * seconds[groups[_file(test)]])
        for mutant, test in killers.items()
        if groups[_file(test)] in seconds
    ]
    results |= _ask(jobs, at_once)
    left = [mutant for mutant in mutants if mutant not in results]
    seconds = check_whole([(test,) for mutant in left for test in mutant.tests], at_once)
    if failing := {test for mutant in left for test in mutant.tests if (test,) not in seconds}:
        raise SystemExit(f"these tests must pass on the package as it is: {', '.join(sorted(failing))}")
    jobs = [Job(m.tests, m, limit=60 + 4 * sum(seconds[(test,)] for test in m.tests)) for m in left]
    results |= _ask(jobs, at_once, survivors=True)
    if whole_suite:
        survivors = [Job(["tests"], m, limit=1800) for m, result in results.items() if result.outcome == "survived"]
        results |= _ask(survivors, at_once, survivors=True)
    return results


def _ask(jobs: Sequence[Job], at_once: int, *, survivors: bool = False) -> dict[Mutant, Result]:
    """Runs tests on mutations, prints a line of each that is noticed, and returns these; or all with ``survivors``."""
    results = {}
    for job in run_all(jobs, at_once):
        assert job.mutant is not None
        assert job.result is not None
        if survivors or job.result.outcome != "survived":
            results[job.mutant] = job.result
            _print(job.mutant, job.result)
    return results


def read_killers() -> dict[str, str]:
    """Returns the test that noticed each mutation last time, by the name of the mutation."""
    found: dict[str, str] = json.loads(_KILLERS.read_text())
    return found


def write_killers(results: dict[Mutant, Result]) -> None:
    """Records the test that noticed each mutation; the others stay, if their mutations exist."""
    names = {mutant.name for mutant in MUTANTS}
    killers = {name: test for name, test in read_killers().items() if name in names}
    killers |= {m.name: r.by.removesuffix(" (import)") for m, r in results.items() if r.outcome == "killed"}
    _KILLERS.write_text(json.dumps(killers, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def _file(test: str) -> str:
    return test.partition("::")[0]


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
    parser.add_argument(
        "--record", action="store_true", help="write the tests that notice the mutations to killers.json"
    )
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
    results = run_mutants(chosen, args.jobs, whole_suite=args.whole_suite)
    if args.record:
        write_killers(results)
    code = verdict(results)
    print(f"{time.monotonic() - began:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
