"""The changes that mutation testing makes, and a run of it on a small package."""

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tests.mutants import REPOSITORY, Source

MODULE = """
def add(first: int | None, second=1):
    return first + second

def unseen(flag):
    if flag():
        return 7
"""
FILES = {
    "fake/__init__.py": "",
    "fake/core.py": MODULE,
    "tests/test_core.py": "from fake.core import add\n\ndef test_a_sum():\n    assert add(1, 2) == 3\n",
}
COMMAND = """
import sys
from pathlib import Path
from tests import mutants

mutants.IMPORTED_ONCE = ()
sys.exit(mutants.main(sys.argv[1:], mutants.Project(Path.cwd(), "fake")))
"""


def changes(folder: Path, source: str) -> list[str]:
    path = folder / "module.py"
    path.write_text(dedent(source))
    text = path.read_bytes()
    made = list(Source(path).mutants("module.py"))
    for mutant in made:
        compile(mutant.applied(text), "module.py", "exec")
    return [f"{mutant.old} => {mutant.new}" for mutant in made]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a = (b) < (c)", ["< => >=", "< => <="]),
        ("a = b is not c", ["is not => is"]),
        ("a = b and c or d", ["or => and", "and => or"]),
        ("a = not (b)", ["not => "]),
        ("a += 2", ["+= => -=", "2 => 3"]),
        ("a = 'é' if b() else x[-1]", ["b() => not (b())", "1 => 2"]),
        ("a = f(b, c=d, e=True)", ["c=d, => ", "True => False"]),
        ("f.g_(\n    a\n)", ["f.g_(\n    a\n) => pass"]),
        ("def f() -> bool:\n    return g()", ["g() => not (g())"]),
        ("a = max(b)", ["max => min"]),
        ("a = [b for b in c if b.d]", ["b.d => not (b.d)"]),
    ],
)
def test_each_operator_changes_its_own_place(tmp_path, source, expected):
    assert changes(tmp_path, source) == expected


def test_texts_annotations_errors_and_logs_are_left_alone(tmp_path):
    source = '''
    """Adds 1 + 1."""
    if TYPE_CHECKING:
        a = 1 + 1
    __all__ = ["a"] + ["b"]
    @decorated(c=True)
    def f(a: int | None) -> int | None:
        log.info("a" + "b", 1 + 1)
        a = f(b, parents=True)
        raise ValueError(f"{1 + 1}" + a)
    '''
    assert changes(tmp_path, source) == []


def test_a_fault_is_noticed_or_listed(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "--seed", "a", "--jobs", "1"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "core.py:3 arithmetic: +  =>  -\n         tests/test_core.py::test_a_sum" in done.stdout
    assert "survived: fake/core.py:6 condition: flag()  =>  not (flag())" in done.stdout
    assert "1 of 2 mutants noticed: 50.0% (least " in done.stdout
    assert (tmp_path / "fake/core.py").read_text() == MODULE
