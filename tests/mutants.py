"""Breaks the package in one place after the other and runs the quick tests each time: they must notice.

    python -m tests.mutants [--minutes N] [--seed TEXT] [--only TEXT ...] [--jobs N]

1. The mutants are made from the syntax trees of the package: one small change each, at its exact place in the source.
   A mutant is named by file, function, operator and occurrence, so that it keeps its name where lines move.
2. The tests of a mutant are found from the code: the file that mirrors the module, then those that import it or its
   users and share rare words with the lines around; at most ``MOST_FILES``.
3. Each mutant runs them on a copy of the package that comes first on the path; the working tree is never changed. The
   process is forked from one that has imported torch, Lightning and pytest.
   A test that fails, hangs or ends the process has noticed.
All quick tests must pass on the package as it is. With ``--minutes`` a random sample, drawn by the seed, is tried until
the time is over. Exits with 1 if the share of noticed mutants is below ``EXPECTED`` by more than four standard
deviations of a sample of that size.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PASSED, FAILED, BROKEN = 100, 101, 102  # exit codes of a run; another is that of a process which a mutant ended

EXPECTED = 0.65  # share of noticed mutants; 0.73 in a sample of 75, give or take 0.05
WORD = re.compile(r"[A-Za-z_]\w{2,}")
MOST_FILES = 6  # of tests that a mutant is shown to
TEST_SECONDS = 120  # for one test or the import of its file
NOT_MUTATED = (  # what people look at, and faces
    "cli", "web", "contrib", "ablation_page.py", "figures.py", "schedule_table.py", "tables.py", "flops.py",
    "memory.py", "gpus.py", "grids.py", "display.py", "public.py",
    "diffusers_pipeline.py", "__init__.py", "__main__.py",
)  # fmt: skip
NOT_QUICK = ("gpu", "slurm", "web", "wheel")  # folders of tests with targets of their own
IMPORTED_ONCE = (
    "torch", "torch.distributed.fsdp", "torch._dynamo", "torchvision", "lightning.pytorch", "torchmetrics.image.fid",
    "timm", "einops", "PIL.Image", "rich", "simplejpeg", "webdataset", "huggingface_hub", "matplotlib.pyplot",
)  # fmt: skip

COMPARISONS = {
    "<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "==",
    "is": "is not", "is not": "is", "in": "not in", "not in": "in",
}  # fmt: skip
BOUNDS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "//", "&": "|", "|": "&"}
IN_PLACE = {f"{old}=": f"{new}=" for old, new in ARITHMETIC.items()}
FUNCTIONS = {"min": "max", "any": "all", "floor": "ceil", "amin": "amax", "argmin": "argmax"}
FUNCTIONS |= {new: old for old, new in FUNCTIONS.items()}
WITHOUT_RESULT = ("log", "_log", "logger", "logging", "warnings", "print", "gc")
# Arguments that change speed, the type of an error or nothing that a test of values can see.
NEUTRAL = ("strict", "non_blocking", "exist_ok", "missing_ok", "parents", "flush", "daemon", "device", "ignore_errors",
           "persistent", "inplace", "ensure_ascii", "copy", "stable")  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A change of one place of a file, given by the bytes from ``start`` to ``end``."""

    file: str
    function: str
    operator: str
    number: int
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}::{self.function}::{self.operator}::{self.number}"

    @property
    def change(self) -> str:
        """Place and change on one line."""
        old, new = (" ".join(text.split()) or "nothing" for text in (self.old, self.new))
        return f"{self.file}:{self.line} {self.operator}: {old}  =>  {new}"

    def applied(self, source: bytes) -> bytes:
        """Returns the source with the change."""
        return source[: self.start] + self.new.encode() + source[self.end :]


Change = tuple[str, int, int, str]  # operator, first byte, the one after the last, and what takes their place


class Source:
    """The text of a module and the changes that fit it."""

    def __init__(self, path: Path) -> None:
        self.source = path.read_bytes()
        self.starts = [0, *accumulate(map(len, self.source.splitlines(keepends=True)))]

    def mutants(self, file: str) -> Iterator[Mutant]:
        """Yields the mutants in the order of the tree."""
        counts: Counter[tuple[str, str]] = Counter()
        for function, (operator, start, end, new) in self._below(ast.parse(self.source), ()):
            counts[function, operator] += 1
            line, old = bisect_right(self.starts, start), self.source[start:end].decode()
            yield Mutant(file, function, operator, counts[function, operator], line, start, end, old, new)

    def span(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        """Returns the first byte of a node and the one after its last."""
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def _below(self, node: ast.AST, scope: tuple[str, ...]) -> Iterator[tuple[str, Change]]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            scope = (*scope, node.name)
        for change in self._of(node):
            yield ".".join(scope) or "module", change
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "type_comment"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST) and not self._is_left_out(child):
                        yield from self._below(child, scope)

    def _is_left_out(self, node: ast.AST) -> bool:
        """Returns True if no test can see a change below the node, such as in the text of a message or on a GPU."""
        if isinstance(node, ast.If | ast.IfExp):
            start, end = self.span(node.test)
            return re.search(rb"TYPE_CHECKING|cuda|win32|darwin", self.source[start:end]) is not None
        if isinstance(node, ast.Call):
            name = _dotted(node.func)
            return name.split(".")[0] in WITHOUT_RESULT or name.endswith(("Error", "TypeVar"))
        if isinstance(node, ast.Expr):
            return self._is_left_out(node.value)
        if isinstance(node, ast.BinOp):  # 2**32 is a limit
            return isinstance(node.op, ast.Pow | ast.LShift) and isinstance(node.left, ast.Constant)
        return isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr) or getattr(node, "arg", None) in NEUTRAL

    def _of(self, node: ast.AST) -> Iterator[Change]:  # noqa: C901, PLR0912  # a branch for each kind of node
        """Yields the changes of the node itself."""
        match node:
            case ast.Compare(ops=[_]):
                yield from self._between(node.left, node.comparators[0], comparison=COMPARISONS, bound=BOUNDS)
                yield from self._numbers(node.left, *node.comparators)
            case ast.BoolOp():
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield from self._between(left, right, boolean={"and": "or", "or": "and"})
            case ast.BinOp() if not (_is_text(node.left) or _is_text(node.right)):
                yield from self._between(node.left, node.right, arithmetic=ARITHMETIC)
                yield from self._numbers(node.left, node.right)
            case ast.AugAssign() if not _is_text(node.value):
                yield from self._between(node.target, node.value, arithmetic=IN_PLACE)
                yield from self._numbers(node.value)
            case ast.UnaryOp(op=ast.Not()):
                yield "condition", self.span(node)[0], self.span(node)[0] + len("not"), ""
            case ast.If() | ast.IfExp():
                yield from self._negated("condition", node.test)
            case ast.comprehension():
                for condition in node.ifs:
                    yield from self._negated("condition", condition)
            case ast.FunctionDef(returns=ast.Name(id="bool")):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return) and inner.value is not None:
                        yield from self._negated("return", inner.value)
            case ast.Call():
                yield from self._call(node)
            case ast.Expr(value=ast.Call(func=function)) if not _dotted(function).endswith("__init__"):
                yield "statement", *self.span(node), "pass"
            case ast.Subscript():
                yield from self._numbers(node.slice)
            case ast.Slice():
                yield from self._numbers(node.lower, node.upper, node.step)
            case ast.Constant(value=bool()):
                yield "boolean", *self.span(node), str(not node.value)

    def _call(self, node: ast.Call) -> Iterator[Change]:
        name = _dotted(node.func).split(".")[-1]
        if name in FUNCTIONS:
            end = self.span(node.func)[1]
            yield "function", end - len(name), end, FUNCTIONS[name]
        yield from self._numbers(*node.args, *(keyword.value for keyword in node.keywords))
        for keyword in node.keywords:
            if keyword.arg and keyword.arg not in NEUTRAL and not isinstance(keyword.value, ast.Constant):
                start, end = self.span(keyword)
                comma = re.match(rb"\s*,", self.source[end:])
                yield "argument", start, end + (comma.end() if comma else 0), ""

    def _between(self, left: ast.expr, right: ast.expr, **operators: dict[str, str]) -> Iterator[Change]:
        """Yields the changes of the operator that stands between two expressions, with or without parentheses."""
        start, end = self.span(left)[1], self.span(right)[0]
        found = re.search(rb"not\s+in|is\s+not|\w+|[^\s\w()#\\]+", self.source[start:end])
        assert found is not None
        for name, table in operators.items():
            if new := table.get(b" ".join(found[0].split()).decode()):
                yield name, start + found.start(), start + found.end(), new

    def _negated(self, name: str, node: ast.expr) -> Iterator[Change]:
        start, end = self.span(node)
        if not isinstance(node, ast.Compare | ast.Constant | ast.UnaryOp):  # these change by themselves
            yield name, start, end, f"not ({self.source[start:end].decode()})"

    def _numbers(self, *nodes: ast.expr | None) -> Iterator[Change]:
        for node in nodes:
            constant = node.operand if isinstance(node, ast.UnaryOp) else node
            if isinstance(constant, ast.Constant) and type(constant.value) in (int, float):
                number = ast.literal_eval(constant)
                if number == 0 or 0.001 < number < 1000:  # neither a tolerance nor the size of a buffer
                    yield "number", *self.span(constant), repr(number + 1)


def _dotted(node: ast.expr) -> str:
    """Returns ``a.b.c`` for such an expression, with nothing for parts that are no names."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _is_text(node: ast.expr) -> bool:
    """Returns True if an operand is text or a list: other operators would only raise TypeError."""
    return isinstance(node, ast.JoinedStr | ast.List | ast.Tuple) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )


def _is_test(module: str) -> bool:
    return module.rpartition(".")[2].startswith("test_")


class Project:
    """A package with its tests, and which modules use which.

    Args:
        root: Folder that holds the package and ``tests``.
        package: Name of the package.
    """

    def __init__(self, root: Path, package: str) -> None:
        self.root, self.package = root, package
        left_out = {f"tests/{folder}" for folder in NOT_QUICK}
        self.files = {
            file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file
            for folder in (package, "tests")
            for path in sorted((root / folder).rglob("*.py"))
            if (file := path.relative_to(root).as_posix()).rpartition("/")[0] not in left_out
        }
        texts = {name: (root / file).read_text() for name, file in self.files.items()}
        trees = {name: ast.parse(text) for name, text in texts.items()}
        self.words = {name: set(WORD.findall(text)) for name, text in texts.items()}
        self.num_saying = Counter(word for name, words in self.words.items() if _is_test(name) for word in words)
        exported = {  # where a module has a name from, the faces of packages above all
            (name, alias.asname or alias.name): node.module
            for name, tree in trees.items()
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        uses = {name: self._imported(tree, exported) & trees.keys() for name, tree in trees.items()}
        self.users: dict[str, set[str]] = {name: set() for name in trees}
        for name, used in uses.items():
            for module in used:
                self.users[module].add(name)
        for name, users in self.users.items():
            mirror = self._mirror(name)
            users |= {test for test in trees if test == mirror or test.startswith(f"{mirror}_")}

    def _mirror(self, module: str) -> str:
        folder, _, last = module.partition(".")[2].rpartition(".")
        return ".".join(filter(None, ("tests", folder, f"test_{last}")))

    def _imported(self, tree: ast.Module, exported: Mapping[tuple[str, str], str]) -> set[str]:
        """Returns the modules that define what a module imports, by statements or by their names as text."""
        found = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    home = node.module
                    while f"{home}.{alias.name}" not in self.files and (home, alias.name) in exported:
                        home = exported[home, alias.name]
                    inner = f"{home}.{alias.name}"
                    found.add(inner if inner in self.files else home)
        return found

    def mutants(self) -> list[Mutant]:
        """Returns the mutants of all modules that are mutated."""
        files = [file for file in self.files.values() if file.startswith(f"{self.package}/")]
        return [
            mutant
            for file in files
            if not set(file.split("/")) & set(NOT_MUTATED)
            for mutant in Source(self.root / file).mutants(file)
        ]

    @cache  # noqa: B019  # there is one project
    def _distances(self, module: str) -> dict[str, int]:
        """Returns how many imports lie between each file of tests and a module."""
        distances, level = {module: 0}, {module}
        while level:
            level = {user for name in level for user in self.users[name]} - distances.keys() - {"tests.conftest"}
            distances |= dict.fromkeys(level, max(distances.values()) + 1)
        return {name: number for name, number in distances.items() if _is_test(name)}

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Returns the files of tests for a mutant, the most specific first.

        First comes the file that mirrors the module. The others follow by the rare words that they share with the lines
        around the mutant, divided by the number of imports between, and by 2 in another folder.
        """
        module = mutant.file.removesuffix(".py").replace("/", ".")
        mirror, distances = self._mirror(module), self._distances(module)
        lines = (self.root / mutant.file).read_text().splitlines()[max(0, mutant.line - 13) : mutant.line + 12]
        around = {word for word in WORD.findall(" ".join(lines)) if word in self.num_saying}

        def rank(test: str) -> tuple[bool, float]:
            shared = sum(1 / self.num_saying[word] for word in around & self.words[test])
            is_far = test.rpartition(".")[0] != mirror.rpartition(".")[0]
            return test != mirror, -shared / distances[test] / (1 + is_far)

        return [self.files[test] for test in sorted(distances, key=rank)[:MOST_FILES]]

    def start(self, folder: Path, mutant: Mutant, tests: Sequence[str]) -> int:
        """Forks a process that runs tests on a copy of the package in a folder.

        Returns:
            Its id. The test that it is at stands in ``folder/at``; it ends with ``PASSED`` if all pass.
        """
        if pid := os.fork():
            return pid
        code = BROKEN
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            code = self._run(folder, mutant, tests)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _run(self, folder: Path, mutant: Mutant, tests: Sequence[str]) -> int:
        if not tests:
            return PASSED  # without a file pytest would run all
        with (folder / "output.txt").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")  # what takes all memory is ended first
        shutil.copytree(self.root / self.package, folder / self.package)  # with its bytecode, which stays valid
        for path in self.root.iterdir():  # the recipes, which the package finds beside itself, and the like
            if path.name not in (self.package, "tests", "build") and not path.name.startswith("."):
                (folder / path.name).symlink_to(path)
        path = folder / mutant.file
        path.write_bytes(mutant.applied(path.read_bytes()))
        sys.path[:0] = [str(folder), str(self.root)]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for what the tests start
        os.environ["PYTHONSAFEPATH"] = "1"  # the working directory has the package as it is, and would come first
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        os.chdir(self.root)
        spec = importlib.util.find_spec(self.package)
        assert spec is not None
        assert spec.origin == str(folder / self.package / "__init__.py")
        words = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={folder}/tmp"]
        words += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported once
        watch = Watch(folder / "at")
        watch.begin("tests/conftest.py")  # its import is the first thing that can fail
        code = pytest.main([*words, *tests], plugins=[watch])
        return PASSED if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else FAILED


class Watch:
    """A plugin of pytest that writes the test at work to a file, and ends the process if it takes too long."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def begin(self, name: str) -> None:
        """Gives the test, or the file that is imported, its time."""
        self.file.write_text(name)
        signal.alarm(TEST_SECONDS)

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        if isinstance(collector, pytest.File):
            self.begin(collector.nodeid)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.begin(nodeid)


Run = tuple[Mutant, Sequence[str]]  # a mutant and its files of tests


def run_all(
    project: Project, runs: Iterable[Run], at_once: int, until: float = math.inf
) -> Iterator[tuple[Run, str, float]]:
    """Runs tests, so many processes at once, and starts none after a time.

    Yields:
        Each run, the first test that failed in it ("" if none) and how many seconds it took.
    """
    running: dict[int, tuple[Run, Path, float]] = {}
    waiting = iter(runs)
    try:
        while True:
            while len(running) < at_once and time.monotonic() < until and (run := next(waiting, None)):
                folder = Path(tempfile.mkdtemp(prefix="mutant-"))
                running[project.start(folder, *run)] = run, folder, time.monotonic()
            if not running:
                return
            pid, status = os.wait()
            run, folder, began = running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            if code == BROKEN:
                raise SystemExit(f"the tests of {run} do not run: {(folder / 'output.txt').read_text()}")
            test = "" if code == PASSED else (folder / "at").read_text()
            end(pid, folder)
            yield run, test, time.monotonic() - began
    finally:
        for pid, (_, folder, _) in running.items():
            end(pid, folder)


def end(pid: int, folder: Path) -> None:
    """Ends a run with what its tests have started, and removes its folder."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def report(verdicts: Mapping[Mutant, str]) -> int:
    """Prints the mutants that no test noticed and their share; returns the exit code."""
    if not verdicts:
        raise SystemExit("no mutant was tried; --minutes must be longer")
    survivors = [mutant for mutant, test in verdicts.items() if not test]
    print("", *(f"survived: {mutant.change}\n          {mutant}" for mutant in survivors), sep="\n")
    tried, noticed = len(verdicts), len(verdicts) - len(survivors)
    least = EXPECTED - 4 * math.sqrt(EXPECTED * (1 - EXPECTED) / tried)
    print(f"{noticed} of {tried} mutants noticed: {noticed / tried:.1%} (least {least:.1%})")
    return int(noticed / tried < least)


def main(words: Sequence[str] | None = None, project: Project | None = None) -> int:
    """Runs what the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Do the quick tests notice faults?")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no mutant after this time; a sample")
    parser.add_argument("--seed", help="text that sets which mutants come first (default: the commit)")
    parser.add_argument("--only", nargs="+", default=[""], help="mutants whose name contains one of these texts")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at once (default: the cores)")
    args = parser.parse_args(words)
    began = time.monotonic()
    project = project or Project(REPOSITORY, "maskgit_pl")
    mutants = [mutant for mutant in project.mutants() if any(text in str(mutant) for text in args.only)]
    if not mutants:
        raise SystemExit(f"--only must be part of the name of a mutant, got {' '.join(args.only)}")
    seed = args.seed or subprocess.check_output(["git", "-C", project.root, "rev-parse", "HEAD"], text=True).strip()
    print(f"{len(mutants)} mutants in an order of the seed {seed}", flush=True)
    random.Random(seed).shuffle(mutants)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    for name in IMPORTED_ONCE:
        with suppress(ImportError):
            importlib.import_module(name)
    assert project.package not in sys.modules
    verdicts: dict[Mutant, str] = {}
    runs = ((mutant, project.tests_of(mutant)) for mutant in mutants)
    for (mutant, _), test, seconds in run_all(project, runs, args.jobs, began + 60 * args.minutes):
        verdicts[mutant] = test
        print(f"{seconds:5.1f} s  {mutant.change}\n         {test or 'NO TEST NOTICES'}", flush=True)
    return report(verdicts)


if __name__ == "__main__":
    sys.exit(main())
