"""The commands of README and of the other pages: the parsers take each, and those that need no hours are run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent

import pytest

from maskgit_pl.cli import build_parser, main
from maskgit_pl.cli.arguments import read_call, takes_overrides
from tests.installed_packages import install
from tests.test_makefile import run_make
from tests.test_readme import PAGES, ROOT, RUN_IN_ORDER, python_blocks, save_small_model

# Commands that are not run here: the files that they read are not in the repository, or they take longer than a test.
PARSED_ONLY = {
    "import-jax": "reads weights that others released",
    "import-tokenizer": "reads weights that others released",
    "import-transformer": "reads weights that others released",
    "tune": "measures whole runs",
    "evaluate": "measures whole runs",
    "ablation": "trains, and measures whole runs",
    "train": "trains",
    "distill": "trains",
    "tokenize": "comes before training",
    "slurm": "needs a cluster",
    "doctor": "has its own tests",
    "data": "reads a data set",
    "train-classifier": "trains",
}
OTHER_DATA = ("pretrained/imagenet256", "data/shards/mine", "runs/mine", "runs/RUN")
MAKE_ONLY = ("demo", "test", "benchmark", "help", "install", "test-slurm", "test-wheel", "lint", "format")
RECORDED = ("results/",)  # pages that commands print, of the time of the recording
COMMAND = r"(?:make|maskgit|\.venv/bin/maskgit) (?!\w+:)"  # without lines that a command printed


def text_of(page: str) -> str:
    """Returns a page with the commands of its ``bash`` blocks indented like the others, and continued lines joined."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    return re.sub(r"^```bash\n(.*?)^```", lambda found: indent(found[1], "    "), text, flags=re.DOTALL | re.MULTILINE)


def commands_of(page: str) -> list[str]:
    """Returns the indented commands of a page, their continued lines joined."""
    return re.findall(rf"^    ({COMMAND}.*)$", text_of(page), re.MULTILINE)


COMMANDS = {
    line: page for page in PAGES if not page.startswith(RECORDED) for line in commands_of(page)
}  # each with a page that has it


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def maskgit_commands(line: str) -> list[list[str]]:
    """Returns the ``maskgit`` commands of a line, those that ``make`` would run included."""
    own = words(line)
    if own[0] != "make":
        return [own[1:]]
    if own[1] in MAKE_ONLY:
        return []
    made = run_make(*own[1:])
    assert made.returncode == 0, made.stderr
    shown = made.stdout.replace("\\\n", " ")
    commands = [words(each) for each in shown.splitlines() if "/bin/maskgit " in each]
    return [command[1:] for command in commands if command[0].endswith("bin/maskgit")]


@pytest.mark.slow
def test_every_command_of_a_page_exists(site: Path) -> None:
    # The backbone whose package docs/plug-ins.md shows; test_backbone_plugin runs it.
    points = "[maskgit_pl.backbones]\nconv = conv_backbone:ConvConfig\n"
    (source,) = [block for block in python_blocks("docs/plug-ins.md") if block.startswith("# conv_backbone.py\n")]
    install(site, name="conv-backbone", entry_points=points, modules={"conv_backbone": source})
    parser, makefile = build_parser(), (ROOT / "Makefile").read_text()
    assert len(COMMANDS) > 50
    for line, page in COMMANDS.items():
        if line.startswith("make"):
            target = words(line)[1]
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), (page, line)
            for variable in re.findall(r"^([A-Z_]+)=", "\n".join(words(line)), re.MULTILINE):
                assert f"$({variable})" in makefile, (page, line)
        for command in maskgit_commands(line):
            if command == ["--help"]:
                continue
            args, rest = parser.parse_known_args(command)
            assert not rest or takes_overrides(args.function), (page, line)
            if rest and args.command in ("train", "tokenize"):
                call = read_call(args.function, vars(args), rest)
                call["run"].read(call.get("stage", "transformer"), rest)


@pytest.mark.slow
@pytest.mark.trainings
def test_commands_that_take_seconds_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the pages' commands and Python blocks in their order, on a small model that replaces the demo's."""
    save_small_model(tmp_path / "runs/fashion-mnist-adaln/pretrained")
    monkeypatch.chdir(tmp_path)
    ran, names = 0, {}
    text = "\n".join(text_of(page) for page in RUN_IN_ORDER)
    for match in re.finditer(rf"```python\n(.*?)```|^    ({COMMAND}[^\n]*)$", text, re.DOTALL | re.MULTILINE):
        block, line = match.groups()
        if block is not None:
            if "pipe" in block:
                exec(block, names)  # later blocks know earlier names
                ran += 1
        elif not any(folder in line for folder in OTHER_DATA) and "--num-images 50000" not in line:
            commands = maskgit_commands(line)
            if commands and not any(command[0] in {*PARSED_ONLY, "--help"} for command in commands):
                (command,) = commands
                assert main(command) == 0, line
                ran += 1
    assert ran >= 9
    for name in ("shirt.png", "others.png", "sleeves.png", "sleeves.gif", "wide.png", "bags.png", "schedules.png"):
        assert (tmp_path / name).is_file(), name


@pytest.mark.slow
def test_the_plug_in_installs_as_printed(tmp_path: Path) -> None:
    """Builds the package and installs it with pip into its own folder, without the network."""
    project = re.search(r"```toml\n# pyproject\.toml\n(.*?)```", (ROOT / "docs/plug-ins.md").read_text(), re.DOTALL)
    assert project is not None
    package = tmp_path / "package"
    package.mkdir()
    code, in_readme = (
        block
        for page in ("docs/plug-ins.md", "README.md")
        for block in python_blocks(page)
        if block.startswith("# sine_schedule.py\n")
    )
    assert code == in_readme
    (package / "sine_schedule.py").write_text(code)
    (package / "pyproject.toml").write_text(project[1])
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(package)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(target)])}
    ask = [sys.executable, "-m", "maskgit_pl", "schedules", "--schedules", "sine"]
    told = subprocess.run(ask, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "sine" in told.stdout
    shutil.rmtree(target)
