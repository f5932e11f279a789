"""Errors that are bad input, and the exit code and text of a command.

No word of a stranger controls the terminal or becomes markup, and none is lost.
"""

import ast
import errno
import io
import json
import logging
import re
import socket
import textwrap
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from matplotlib.figure import Figure

from maskgit_pl import checks
from maskgit_pl.errors import PreemptedError, describe_error, exit_code_of, is_user_error
from maskgit_pl.grids import image_grid
from maskgit_pl.processes import run_jobs
from maskgit_pl.text import PrintableFormatter, code_span, markdown, plain_label, printable, python_string
from tests.hostile_words import HOSTILE


def caught(call) -> BaseException:
    """The error that a call raises."""
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    "call",
    [
        lambda: checks.check_integer("--num-steps", "many", "[1, 8]"),
        lambda: checks.build_dataclass(Path, 1, "config.json"),
    ],
)
def test_refusals_of_the_package_are_bad_input(call):
    error = caught(call)
    assert is_user_error(error)
    assert exit_code_of(error) == 2
    assert describe_error(error, "maskgit sample") == f"maskgit sample: {error}\n"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/nowhere/at/all", "/nowhere/at/all: No such file or directory; check the path"),
        ("nots.txt", "nots.txt: No such file or directory; did you mean 'notes.txt'?"),
        ("link", "link: No such file or directory; check the path"),
        ("/", "/: Is a directory; check the path"),
        ("notes.txt/x", "notes.txt/x: Not a directory; check the path"),
        ("x" * 300, f"{'x' * 300}: File name too long; check the path"),
        ("socket", "socket: No such device or address; check the path"),
        ("a\n\x1b", "a\\n\\x1b: No such file or directory; check the path"),
    ],
)
def test_an_unusable_path_is_bad_input_and_named_with_the_way_out(path, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").touch()
    Path("link").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    error = caught(Path(path).read_text)
    assert exit_code_of(error) == 2
    assert describe_error(error, "maskgit sample") == f"maskgit sample: {text}\n"


@pytest.mark.parametrize(
    "call",
    [
        lambda: int("many"),
        lambda: json.loads("{"),
        lambda: b"\xff".decode(),
        lambda: checks.check_integer("--num-steps", 3, "[one, two]"),  # a ValueError of float(), in our own file
        lambda: {}["key"],
    ],
)
def test_errors_of_libraries_and_expressions_are_internal(call):
    error = caught(call)
    assert exit_code_of(error) == 70
    text = describe_error(error, "maskgit sample")
    assert text.startswith("Traceback")
    assert "internal error of maskgit_pl" in text.splitlines()[-1]


@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EIO", "ESTALE", "EROFS"])
def test_a_disk_that_cannot_be_written_is_no_internal_error(name):
    error = OSError(getattr(errno, name), "fault", "out/file")
    assert exit_code_of(error) == 74
    assert describe_error(error, "maskgit sample").endswith(" fault: 'out/file'\n")


def test_preemption_and_ctrl_c_have_codes_of_their_own():
    assert exit_code_of(PreemptedError("saved")) == 75
    assert exit_code_of(KeyboardInterrupt()) == 130
    assert describe_error(KeyboardInterrupt(), "maskgit sample") == "maskgit sample: interrupted\n"


def _refuse(shared: str, job: int) -> None:
    """Raises one of our own errors, or one of a library, in a worker."""
    if shared == "ours":
        checks.check_integer("job", job, "[9, 9]")
    int("many")


@pytest.mark.slow
@pytest.mark.parametrize(("whose", "code"), [("ours", 2), ("a library's", 70)])
def test_workers_tell_bad_input_from_faults(whose, code):
    assert exit_code_of(caught(lambda: list(run_jobs(_refuse, whose, [1, 2], workers=2)))) == code


PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
CONTEXTS = ("# {}", "Measured on {}: well.", "{}", "a\n{}", "| a | b |\n|---|---|\n| {} | c |", "- {}")
every_word = pytest.mark.parametrize("word", HOSTILE, ids=lambda word: ascii(word[:30]))


def flat(tokens: list[Token]) -> list[Token]:
    return [each for token in tokens for each in (token, *flat(token.children or []))]


def structure(page: str) -> list[str]:
    """Kinds of everything on a page but text."""
    return [token.type for token in flat(PARSER.parse(page)) if token.type not in ("text", "text_special", "softbreak")]


def shown(page: str) -> str:
    """The text that a reader sees of a page."""
    return "".join(token.content for token in flat(PARSER.parse(page)) if token.type in ("text", "code_inline"))


def one_line(word: str) -> str:
    return " ".join(printable(word).split())


@every_word
def test_text_for_terminals_logs_and_python_is_printable_and_loses_no_word(word: str) -> None:
    assert printable(word).isprintable()
    assert len(printable(word)) < 1000
    assert "".join(printable(word, limit=None).split()).startswith("".join(printable(word).removesuffix("...").split()))
    assert python_string(word).isprintable()
    assert ast.literal_eval(python_string(word)) == word
    record = logging.LogRecord("maskgit_pl", logging.INFO, "", 0, "class %s", (word,), None)
    assert all(line.isprintable() for line in PrintableFormatter("%(message)s").format(record).split("\n"))


def test_plain_words_of_all_scripts_are_not_escaped() -> None:
    for word in ("\u05e9\u05dc\u05d5\u05dd", "\u6f22\u5b57", "na\u00efve caf\u00e9", "T-shirt/top", "remdm (eta 0.4)"):
        assert printable(word) == markdown(word) == word
        assert code_span(word) == f"`{word}`"
    assert printable("a\u00a0b\u3000c") == "a b c"


@pytest.mark.slow
@every_word
@pytest.mark.parametrize("context", CONTEXTS)
def test_markdown_of_a_word_is_text_and_shows_the_word(context: str, word: str) -> None:
    page = context.format(markdown(word))
    if markdown(word):
        assert structure(page) == structure(context.format("name"))
    assert shown(page) == shown(context.format("\0")).replace("\ufffd", one_line(word))
    assert not re.search(r"(?<!\\)(://|@)|www\.", markdown(word))  # which GitHub makes links


@every_word
def test_markdown_of_a_word_is_text_wherever_its_line_is_broken(word: str) -> None:
    text = f"Measured on: {markdown(f'x {word} y')}; done."
    for width in range(8, 40):
        page = "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))
        assert structure(page) == structure("a\nb")


@every_word
def test_code_of_a_word_stays_in_its_cell(word: str) -> None:
    page = "| a | b |\n|---|---|\n| {} | c |"
    assert set(structure(page.format(code_span(word)))) - {"code_inline"} == set(structure(page.format("name")))
    assert shown(page.format(code_span(word))) == shown(page.format("\0")).replace("\ufffd", one_line(word))


@pytest.mark.filterwarnings("ignore:Glyph")
def test_plots_and_pictures_take_every_word() -> None:
    figure = Figure()
    axes = figure.subplots()
    for word in HOSTILE:
        axes.plot([0, 1], label=plain_label(word))
        axes.set_title(plain_label(word))
        axes.annotate(plain_label(word), (0, 0))
    assert len(axes.get_legend_handles_labels()[1]) == len(HOSTILE) - 1  # the empty one has no line in the legend
    figure.savefig(io.BytesIO(), format="png", dpi=20)
    image_grid(torch.zeros(len(HOSTILE), 1, 8, 8, dtype=torch.uint8), columns=1, row_captions=HOSTILE)
    image_grid(torch.zeros(len(HOSTILE), 1, 8, 8, dtype=torch.uint8), columns=len(HOSTILE), column_captions=HOSTILE)
