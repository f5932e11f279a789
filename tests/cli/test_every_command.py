"""Rules that hold for every command: devices, output files, and the commands that texts name."""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskgit_pl.cli import build_parser, main

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
    "data stats": [DATA],
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


@pytest.mark.parametrize("command", [command for command, _ in with_flag(dest="device", choices=None)])
@pytest.mark.parametrize("device", ["cuda:99", "cdua"])
def test_a_device_that_is_not_here_is_refused_by_every_command(command: str, device: str, refusal) -> None:
    assert re.search(rf"--device must be one of cpu.*, got '{device}'", refusal(command, "--device", device))


# Outputs

ENDINGS = {"FILE.png": "png", "FILE.gif": "gif", "FILE.json": "json", "FILE": "png", "PNG": "png"}
WRITTEN = {"--out", "--gif", "--filmstrip"}
OUTPUTS = [
    (command, flag, ENDINGS[metavar])
    for metavar in ENDINGS
    for command, flag in with_flag(metavar=metavar, nargs=None)
    if flag in WRITTEN
]


def test_every_command_that_draws_is_among_those_tried() -> None:
    assert {
        "sample",
        "inpaint",
        "edit",
        "outpaint",
        "panorama",
        "schedules",
        "evaluate",
        "evaluate-tokenizer",
        "data stats",
    } == {command for command, *_ in OUTPUTS}


@pytest.mark.parametrize(("command", "flag", "ending"), OUTPUTS)
def test_another_ending_is_refused_by_every_command(command: str, flag: str, ending: str, refusal) -> None:
    for name in ("a.mp4", "a", f"{ending}", f"a.{ending}x"):
        assert f"{flag} must end in .{ending}, got {name}" in refusal(command, flag, name)


@pytest.mark.parametrize(("command", "flag", "ending"), OUTPUTS)
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(
    command: str, flag: str, ending: str, refusal, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    said = refusal(command, flag, tmp_path / "file" / f"a.{ending}")
    assert f"{flag} must be in a writable folder, got" in said
    assert f"({tmp_path / 'file'}: Not a directory)" in said
    (tmp_path / f"folder.{ending}").mkdir()
    assert f"{flag} must be a file, got the folder" in refusal(command, flag, tmp_path / f"folder.{ending}")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no such file system")
def test_a_file_system_that_takes_no_files_is_found_by_trying(refusal) -> None:
    assert "got /proc/x.png (/proc: " in refusal("sample", "--out", "/proc/x.png")


def test_two_outputs_are_two_files(refusal) -> None:
    assert "--filmstrip must differ from --out, got a.png" in refusal(
        "sample", "--out", "a.png", "--filmstrip", "a.png"
    )


def test_two_spellings_of_one_file_are_one_file(refusal, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for other in ("../empty/a.PNG", tmp_path / "empty" / "a.PNG", "../link/a.PNG"):
        said = refusal("sample", "--out", "a.PNG", "--filmstrip", other)
        assert f"--filmstrip must differ from --out, got {other}" in said


INPUTS = [
    (command, action.option_strings[0] if action.option_strings else action.dest)
    for command, parser in COMMANDS.items()
    for action in parser._actions
    if action.type is Path and str(action.metavar).startswith(("FILE", "IMAGE")) and f"--{action.dest}" not in WRITTEN
]
OVERWRITING = [
    (command, flag, written, ending)
    for command, written, ending in OUTPUTS
    for other, flag in INPUTS
    if other == command and flag != written
]


def test_every_edit_is_tried_with_its_image_as_output() -> None:
    tried = {(command, flag, written) for command, flag, written, _ in OVERWRITING}
    images = {(command, "image", flag) for command in ("inpaint", "edit", "outpaint") for flag in WRITTEN}
    assert images | {("edit", "--mask", "--out"), ("evaluate", "--reference", "--out")} <= tried


@pytest.mark.parametrize(("command", "flag", "written", "ending"), OVERWRITING)
def test_no_command_overwrites_a_file_that_it_reads(
    command: str, flag: str, written: str, ending: str, refusal, image: Path, tmp_path: Path
) -> None:
    file, link = tmp_path / f"in.{ending}", tmp_path / f"link.{ending}"
    file.write_bytes(image.read_bytes())
    link.symlink_to(file.name)
    given = [flag, file] if flag.startswith("-") else []
    for other in (f"../in.{ending}", link):
        with pytest.MonkeyPatch.context() as patch:
            if not given:
                patch.setitem(WORDS, command, [file if word == IMAGE else word for word in WORDS[command]])
            said = refusal(command, *given, written, other)
        assert f"{written} must not overwrite a file that the command reads, got {other} and {file}; give" in said


def test_the_default_output_and_a_folder_of_images_are_no_inputs_either(
    refusal, image: Path, tmp_path: Path, tiny_pretrained: Path, monkeypatch, capsys
) -> None:
    for command, name in (("inpaint", "edited.png"), ("edit", "edited.png"), ("outpaint", "outpainted.png")):
        (tmp_path / "empty" / name).write_bytes(image.read_bytes())
        monkeypatch.setitem(WORDS, command, [name if word == IMAGE else word for word in WORDS[command]])
        assert f"--out must not overwrite a file that the command reads, got {name}" in refusal(command)
    words = ["--images", "../made", "--seed", "3", "--out", tmp_path / "sheet.png", "--per-class", "1"]
    assert main(["sample", str(tiny_pretrained), *map(str, words)]) == 0
    capsys.readouterr()
    for file in (tmp_path / "made").iterdir():
        monkeypatch.setitem(WORDS, "outpaint", [RUN, file, "--right", "4"])
        assert "--images must not overwrite a file that the command reads, got ../made" in refusal(
            "outpaint", "--images", "../made"
        )


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


def test_a_folder_of_images_is_a_folder(refusal, image: Path) -> None:
    assert f"--images must be a folder, got the file {image}" in refusal("sample", "--images", image)


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


# What a refusal costs

NO_TORCH = [
    ["sample", RUN, "--classes", "Trousers"],
    ["sample", RUN, "--classes", "17"],
    ["sample", RUN, "--negative-class", "Trousers"],
    ["sample", RUN, "--token-selector", "confidnce"],
    ["sample", RUN, "--token-selector", '{"name": "remdm", "etta": 1}'],
    ["sample", RUN, "--mask-schedule", "cosin"],
    ["sample", RUN, "--guidance", "linea"],
    ["sample", RUN, "--num-steps", "17"],
    ["sample", RUN, "--num-steps", "1000000000"],
    ["sample", RUN, "--top-p", "2"],
    ["sample", RUN, "--tokens-per-step", "1,2"],
    ["sample", RUN, "--batch-size", "0"],
    ["sample", RUN, "--gif", "a.mp4"],
    ["sample", RUN, "--out", "a.jpgg"],
    ["sample", RUN, "--decoding", "OTHER"],
    ["sample", f"{RUN}x"],
    ["inpaint", RUN, IMAGE, "--box", "0,0,9,9"],
    ["inpaint", RUN, IMAGE, "--box", "0,0,4,4", "--class", "Trousers"],
    ["inpaint", RUN, "OTHER", "--box", "0,0,4,4"],
    ["inpaint", RUN, "LARGE", "--box", "0,0,4,4"],
    ["edit", RUN, IMAGE, "--box", "0,0,4,4", "--class", "1", "--num-steps", "17"],
    ["outpaint", RUN, IMAGE, "--right", "3"],
    ["outpaint", RUN, IMAGE, "--right", "4", "--class", "Trousers"],
    ["panorama", RUN, "--width", "6"],
    ["panorama", RUN, "--width", "16", "--classes", "Trousers"],
    ["schedules", "--schedules", "cosin"],
    ["schedules", "--num-steps", "300"],
    ["schedules", "--out", "x.xyz"],
    ["evaluate", RUN, "--data", DATA, "--num-steps", "17"],
    ["compare", RUN, "--data", DATA, "--num-steps", "4,17"],
    ["compare", RUN, "--data", DATA, "--selectors", "remdn"],
    ["tune", RUN, "--data", DATA, "--num-steps", "17"],
    ["tune", RUN, "--data", DATA, "--selectors", "remdn"],
]


@pytest.mark.slow
def test_what_needs_no_weights_is_refused_without_torch(
    tiny_pretrained: Path, tiny_shards: Path, image: Path, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("L", (12, 12)).save(tmp_path / "large.png")
    (tmp_path / "other.json").write_text('{"steps": 8}')
    places = {RUN: tiny_pretrained, IMAGE: image, "OTHER": tmp_path / "other.json", "LARGE": tmp_path / "large.png"}
    places[DATA] = tiny_shards
    commands = [
        [str(places.get(word, word)).replace(RUN, str(tiny_pretrained)) for word in words] for words in NO_TORCH
    ]
    code = (
        "import sys; from maskgit_pl.cli import main\n"
        f"for words in {commands!r}:\n"
        "    code = main(words)\n"
        "    assert code == 2 and 'torch' not in sys.modules, (words, code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == len(NO_TORCH), done.stderr


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
