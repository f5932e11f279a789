"""Rules that hold for every command: devices, output files, and the commands that texts name."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskgit_pl.cli import build_parser, main
from maskgit_pl.cli.arguments import Output, _groups

ROOT = Path(__file__).parents[2]
RUN, IMAGE, DATA, NEW = "RUN", "IMAGE", "DATA", "NEW"
# Words with which each command would begin its work.
WORDS = {
    "sample": [RUN],
    "inpaint": [RUN, IMAGE, "--box", "0,0,4,2"],
    "edit": [RUN, IMAGE, "--box", "0,0,4,2", "--class", "1"],
    "outpaint": [RUN, IMAGE, "--right", "4"],
    "panorama": [RUN, "--width", "16"],
    "web": [RUN],
    "evaluate": [RUN, "--data", DATA],
    "inspect": [RUN, "--data", DATA],
    "evaluate-tokenizer": [RUN, "--data", DATA],
    "compare": [RUN, "--data", DATA],
    "tune": [RUN, "--data", DATA],
    "table": ["1", RUN, "--data", DATA],
    "figure": ["4"],
    "ablation": ["--data", DATA],
    "train-classifier": ["--data", DATA],
    "tokenize": ["--data", DATA, "--tokenizer", f"{RUN}/tokenizer", "--runs-folder", NEW],
    "schedules": [],
}


def parsers(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yields every command with its words, including subcommands."""
    yield " ".join(words), parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                yield from parsers(inner, (*words, word))


COMMANDS = dict(parsers(build_parser()))


def with_flag(**wanted: object) -> list[tuple[str, str]]:
    """Commands and flags whose action has these attributes."""
    return [
        (command, action.option_strings[0])
        for command, parser in COMMANDS.items()
        for action in parser._actions
        if action.option_strings and all(getattr(action, name) == value for name, value in wanted.items())
    ]


@pytest.fixture
def refusal(tiny_pretrained: Path, tiny_shards: Path, image: Path, tmp_path: Path, monkeypatch, capsys):
    """Runs a command that must be refused in one line, with nothing written; returns the line."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    places = {RUN: tiny_pretrained, IMAGE: image, DATA: tiny_shards, NEW: "new"}

    def run(command: str, *words: object) -> str:
        given = [
            re.sub(rf"^({'|'.join(places)})", lambda found: str(places[found[1]]), str(word)) for word in WORDS[command]
        ]
        before = sorted(tmp_path.rglob("*"))
        assert main([*command.split(), *given, *map(str, words)]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1), said
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    return run


# Devices


@pytest.mark.parametrize("command", [command for command, _ in with_flag(dest="device", metavar="NAME")])
@pytest.mark.parametrize("device", ["cuda:99", "cdua"])
def test_a_device_that_is_not_here_is_refused_by_every_command(command: str, device: str, refusal) -> None:
    assert re.search(rf"--device must be one of cpu.*, got '{device}'", refusal(command, "--device", device))


# Paths

PATHS = [
    (command, action.option_strings[0] if action.option_strings else action.metavar)
    for command, parser in COMMANDS.items()
    for action in parser._actions
    if action.type is Path
]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "name"), PATHS)
def test_an_empty_path_is_not_the_current_folder(command: str, name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    before: list[str] = []  # words of the positional arguments before it
    for action in COMMANDS[command]._actions:
        if action.metavar == name:
            break
        before += [] if action.option_strings else [str(next(iter(action.choices or "1")))]
    for words in ([name, ""], [f"{name}="]) if name.startswith("-") else ([*before, ""],):
        with pytest.raises(SystemExit) as stopped:
            main([*command.split(), *words])
        said = capsys.readouterr()
        assert (stopped.value.code, said.out, said.err.count("\n")) == (2, "", 1), said
        assert re.search(r"(--[a-z-]+|[A-Z]+) must not be empty, got ''", said.err)
    assert list(tmp_path.iterdir()) == []


WRITTEN = {"--out", "--gif", "--filmstrip"}


def test_what_a_command_writes_is_checked_before_any_work() -> None:
    tried = 0
    for function in (each for parser in COMMANDS.values() if (each := parser.get_default("function"))):
        for argument in (each for group in _groups(function) for each in group.arguments):
            if argument.shown in WRITTEN and argument.metavar.startswith("FILE"):
                assert isinstance(argument.form, Output), (function, argument.name)
                tried += 1
    assert tried > 15


def test_an_output_of_a_command_is_no_input(refusal, image: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "empty" / "edited.png").write_bytes(image.read_bytes())
    monkeypatch.setitem(WORDS, "inpaint", ["edited.png" if word == IMAGE else word for word in WORDS["inpaint"]])
    assert "--out must not overwrite a file that the command reads, got edited.png" in refusal("inpaint")


def test_a_folder_that_is_not_there_is_made_and_named(
    tiny_pretrained: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--per-class", "1", "--out", "one/a.PNG", "--gif", "one/two/a.gif", "--images", "three"]
    assert main(["sample", str(tiny_pretrained), *words]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.endswith(": new folder")] == [
        "one: new folder", "three: new folder", "one/two: new folder"
    ]  # fmt: skip


# What texts say of commands


def texts() -> Iterator[tuple[str, str]]:
    """Yields every text of the package with its file, and the help of every command."""
    for file in sorted((ROOT / "maskgit_pl").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield file.name, node.value
            elif isinstance(node, ast.JoinedStr):
                parts = [each.value if isinstance(each, ast.Constant) else "{}" for each in node.values]
                yield file.name, "".join(map(str, parts))
    for command, parser in COMMANDS.items():
        yield f"{command} --help", parser.format_help()


def named(tool: str) -> set[tuple[str, str]]:
    """Returns what stands in backticks after the name of a tool, and where."""
    found = ((where, each) for where, text in texts() for each in re.findall(rf"`{tool} ([^`]+)`", text))
    return {(where, " ".join(each.split())) for where, each in found}


def fault(command: str) -> str | None:
    """Returns the fault of a command line; placeholders and values in capitals match anything."""
    parser, words = COMMANDS[""], command.split()
    for number, word in enumerate(words):
        inner = next((each.choices for each in parser._actions if isinstance(each, argparse._SubParsersAction)), None)
        if word.startswith("--"):
            if word.partition("=")[0] not in parser._option_string_actions:
                return f"{parser.prog} has no {word}"
        elif inner is not None and "{" not in word:
            unknown = [each for each in word.split("|") if each not in inner]
            if unknown:
                return f"{parser.prog} has no command {unknown[0]}"
            parser = inner[word.split("|")[0]]
        elif inner is None and word.islower() and words[number - 1][:2] != "--":
            choices = [each for action in parser._actions if not action.option_strings for each in action.choices or ()]
            if choices and not {*word.split("|")} <= {*map(str, choices)}:
                return f"{parser.prog} has no {word}"
    return None


@pytest.mark.slow
def test_no_text_promises_a_command_or_a_flag_that_there_is_not() -> None:
    commands = named("maskgit")
    assert len(commands) > 30
    assert {where: f"{command}: {fault(command)}" for where, command in commands if fault(command)} == {}


@pytest.mark.slow
def test_no_text_promises_a_target_of_make_that_there_is_not() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "train-tokenizer"} <= {*targets}
    assert [(where, words) for where, words in named("make") if words.split()[0] not in targets] == []


@pytest.mark.parametrize(
    "command", ["sampel", "data show", "sample --num-imges", "train tokeniser", "slurm submit --x"]
)
def test_the_check_of_texts_finds_what_it_is_for(command: str) -> None:
    assert fault(command) is not None
