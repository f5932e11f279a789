"""The architecture, read from the imports: who may know whom, and what the source never does.

Each rule is one test over all files, whose failure lists the faults.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "maskgit_pl"
FLOORS = {  # a file or a folder -> its floor; a folder's files stand on its floor
    "text": 0,
    "errors": 0,
    "checks": 0,
    "registry": 0,
    "files": 0,
    "folders": 0,
    "grids": 0,
    "processes": 0,
    "distributed": 0,
    "devices": 0,
    "randomness": 0,
    "schedules": 1,
    "networks": 1,
    "masking": 2,
    "decoding": 2,
    "pretrained": 3,
    "data": 3,
    "training": 4,
    "pipeline": 4,
    "tokenizer": 5,
    "transformer": 5,
    "importers": 7,
    "runs": 8,
    "evaluation": 9,  # it measures what the pipeline generates
    "web": 10,
    "cli": 11,
    "contrib": 12,  # the core names it only as strings
    "__main__": 13,
}
LIGHTNING_FROM = 3
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
FOUND = [name for name in MODULES if name != "__init__"]  # the root names the public things, and imports them late


def part(module: str) -> str:
    """The entry of FLOORS that a module such as ``data/index`` belongs to."""
    return module.split("/")[0]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


def statements(module: str, *, at_import: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yields the import statements of a module: all, or those that run at import."""
    waiting: list[ast.AST] = [tree(module)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        if at_import and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or for_types(node)):
            continue
        waiting.extend(ast.iter_child_nodes(node))


def for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@cache
def imported(module: str, *, at_import: bool = False) -> frozenset[str]:
    """Returns the dotted names that a module imports, e.g. ``torch.nn`` or ``maskgit_pl.data.index``."""
    names: set[str] = set()
    for statement in statements(module, at_import=at_import):
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        else:
            assert statement.level == 0, f"{module}: relative import in line {statement.lineno}"
            names |= {f"{statement.module}.{alias.name}" for alias in statement.names}
    return frozenset(names)


def own(module: str, *, at_import: bool = False) -> set[str]:
    """The modules of the package that a module imports, in the form of MODULES; the root package is left out."""
    found = set()
    for name in imported(module, at_import=at_import):
        if name.startswith("maskgit_pl."):
            path = name.removeprefix("maskgit_pl.").replace(".", "/")
            candidates = (path, f"{path}/__init__", path.rpartition("/")[0], f"{path.rpartition('/')[0]}/__init__")
            known = next((candidate for candidate in candidates if candidate in MODULES), None)
            if known is not None:  # else a name of the root package
                found.add(known)
    return found


def upwards(module: str) -> Iterator[str]:
    """Names the imports of ``module`` against the rule: lower floors, its own folder, and in the root its own floor.

    From a folder on that floor, a file of the root may import only the ``__init__``.
    """
    floor = FLOORS[part(module)]
    for other in sorted(own(module)):
        in_own_folder = "/" in module and part(other) == part(module)
        both_in_root = "/" not in module and "/" not in other.removesuffix("/__init__")
        if not (in_own_folder or FLOORS[part(other)] < floor or (both_in_root and FLOORS[part(other)] == floor)):
            yield f"{module} imports {other}"


LATE = {  # modules that import modules of the package by a name, and why
    "cli/__init__": "the command that is run, from the list of commands",
}


def hidden(module: str) -> Iterator[str]:
    """Names the imports that the other rules cannot see: of the root, and of our modules by a string."""
    for statement in statements(module, at_import=False):
        if isinstance(statement, ast.Import) and "maskgit_pl" in {alias.name for alias in statement.names}:
            yield f"{module}: import maskgit_pl (line {statement.lineno})"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and called(node).endswith("import_module") and module not in LATE:
            text = ast.unparse(node.args[0])
            if "maskgit_pl" in text or "__name__" in text:
                yield f"{module}: import_module({text}) (line {node.lineno})"


def circles() -> list[str]:
    """Circles of imports, each once."""
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for other in sorted(own(module)):
                visit(other, [*path, module])
            done.add(module)

    for module in FOUND:
        visit(module, [])
    return found


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_every_module_has_a_floor():
    assert sorted({part(module) for module in FOUND} ^ FLOORS.keys()) == []


def test_a_module_imports_from_lower_floors_or_its_own_folder():
    assert [fault for module in FOUND for fault in upwards(module)] == []


def test_no_module_imports_the_root_or_hides_an_import_in_a_string():
    assert [fault for module in FOUND for fault in hidden(module)] == []
    assert LATE.keys() <= set(MODULES)


def test_no_import_goes_in_a_circle():
    assert circles() == []


def test_a_command_imports_no_other_command():
    shared = {"cli/__init__", "cli/arguments", "cli/flags"}
    commands = [module for module in FOUND if part(module) == "cli" and module not in shared]
    assert len(commands) > 6
    assert {
        module: found
        for module in commands
        if (found := {each for each in own(module) if part(each) == "cli"} - shared)
    } == {}


def test_no_module_below_floor_3_imports_lightning():
    low = [name for name in FOUND if FLOORS[part(name)] < LIGHTNING_FROM]
    roots = {name: {each.split(".")[0] for each in imported(name)} for name in low}
    assert [name for name in low if roots[name] & {"lightning", "pytorch_lightning", "lightning_fabric"}] == []


# Modules that parse JSON or YAML themselves; all others use the readers of files, which limit size and depth.
READERS = {
    "contrib/emoji", "evaluation/ledger", "evaluation/options", "files", "pipeline/bulk", "training/checkpoints",
    "web/server",
}  # fmt: skip
PARSERS = {"json.load", "json.loads", "yaml.load", "yaml.safe_load"}


def unsafe_loads(module: str) -> Iterator[str]:
    """Names the loads that may run what they read or have no bounds; ruff's rules S find the other ways."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            is_safe = options.get("allow_pickle", "False") == "False" and options.get("weights_only", "True") == "True"
            is_bounded = module in READERS or called(node) not in PARSERS
            if not is_safe or not is_bounded or (called(node).endswith("torch.load") and "weights_only" not in options):
                yield f"{module}: {ast.unparse(node)} (line {node.lineno})"


def test_no_load_may_run_code_of_a_file():
    assert [fault for module in MODULES for fault in unsafe_loads(module)] == []


def test_the_root_package_imports_nothing_of_its_own_when_it_is_imported():
    assert own("__init__", at_import=True) == set()
    assert own("__init__")  # and names the public things for type checkers
