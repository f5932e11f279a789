"""No word of a stranger controls the terminal or becomes markup, and none is lost."""

import ast
import html
import io
import logging
import re
import textwrap

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from matplotlib.figure import Figure

from maskgit_pl.errors import PrintableFormatter, code_span, markdown, plain_label, printable, python_string
from maskgit_pl.pipeline.grids import image_grid
from tests.hostile_words import HOSTILE

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
def test_printable_text_is_one_short_line(word: str) -> None:
    assert printable(word).isprintable()
    assert len(printable(word)) < 1000
    assert "".join(printable(word, limit=None).split()).startswith("".join(printable(word).removesuffix("...").split()))


def test_letters_of_all_scripts_are_left_as_they_are() -> None:
    for word in ("T-shirt/top", "\u05e9\u05dc\u05d5\u05dd", "\u6f22\u5b57", "na\u00efve caf\u00e9"):
        assert printable(word) == word
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


def test_plain_words_are_not_escaped() -> None:
    for word in ("T-shirt/top", "fid/classifier", "remdm (eta 0.4)", "mask_schedule", "0.1.0", "timm:resnet50"):
        assert markdown(word) == word
        assert code_span(word) == f"`{word}`"


@every_word
def test_a_python_string_evaluates_to_the_word(word: str) -> None:
    assert python_string(word).isprintable()
    assert ast.literal_eval(python_string(word)) == word


@every_word
def test_a_log_line_has_no_control_characters(word: str) -> None:
    record = logging.LogRecord("maskgit_pl", logging.INFO, "", 0, "class %s", (word,), None)
    assert all(line.isprintable() for line in PrintableFormatter("%(message)s").format(record).split("\n"))


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


def test_entities_are_shown_as_they_were_written() -> None:
    assert html.unescape(markdown("&lt;b&gt;")) == "&lt;b&gt;"
