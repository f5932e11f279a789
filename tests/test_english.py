"""The English of the project: every docstring, string and comment of the source, every page, recipe and ``--help``."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from maskgit_pl.cli import build_parser
from tests.cli.conftest import parsers

OPENINGS = r"As|How|If|Likewise|None|Nothing|Of|So|What|Whatever|When|Where|Whether|Which|Who|Whoever|Why"
ARTICLES = frozenset({"A", "An", "The"})
PLURALS = (  # nouns that look like a verb in the third person
    r"Bytes|Channels|Classes|Codes|Columns|Facts|Files|Images|Indices|Keys|Labels|Less|Lines|Logits|Numbers|Parameters|"
    r"Pixels|Positions|Rows|Seconds|Settings|Shards|Sizes|Steps|Texts|This|Tokens|Units|Values|Weights|Words"
)
_UNITS = (
    r"bytes|files?|images|kernels|lines?|megabytes|milliseconds|ms|numbers?|passes|rows?|s|samples|seconds|steps|tokens|"
    r"uniforms?"
)
_EACH = (
    r"batch|block|channel|class|code|core|device|epoch|file|GPU|image|layer|level|line|measurement|minute|node|pixel|"
    r"position|process|rank|row|run|sample|schedule|second|selector|shard|step|token|worker"
)
PHRASES = {  # pattern -> what to write
    r"\b(is|are) needed\b": "must be; requires",
    r"\bas of ``|(?-i:\bAs of\b)": "See ``X``",
    r"\blikewise\b": "also; say it",
    r"\b(go|goes|going|went|gone) on\b": "resume, continue",
    r"\bto the last (bit|digit)\b": "bit-exact, bit by bit",
    r"\bbefall\w*": "happen",
    r"(?-i:\bprocessors?\b)": "CPU",
    r"\bcannot be had\b": "is not available",
    r"\bbehind\b": "after",
    r"\b(whoever|whatever|whichever)\b": "any; the caller; say it",
    r"\bsuch a one\b": "one",
    r"\band the like\b": "such as",
    r"\bby chance\b": "randomly",
    r"\bunder (a|its|another) name\b": "named X",
    r"(?<!stand)(?<!let )\balone\b": "only",
    r"\b(that|which|who) (is|are) none\b": "say the condition",
    r"\b(is|are|be) said\b": "is given, is set",
    r"\banew\b": "again; regenerate",
    r"\bbearable\b": "",
    r"\bdearer\b": "more expensive",
    rf"\b({_UNITS}) (a|an) ({_EACH})\b": "per",
    r"\bhave a look\b": "see",
}
_COMPILED = {re.compile(pattern, re.IGNORECASE | re.MULTILINE): write for pattern, write in PHRASES.items()}
_SECTION = re.compile(r"^(?P<indent> *)(Args|Attributes):\n(?P<body>(?:(?P=indent) +.*\n?|\n)*)", re.MULTILINE)
_ENTRY = re.compile(r"^ +\*{0,2}\w+(?: \([^)]*\))?: (?P<word>[\w'-]+)", re.MULTILINE)


def check_file(path: Path) -> Iterator[str]:
    """Yields one line for each place of a file that breaks a rule."""
    text = path.read_text()
    found = check_python(text) if path.suffix == ".py" else check_prose(text)
    for line, message in found:
        yield f"{path}:{line}: {message}"


def check_python(source: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the fault of each docstring, string and comment of a Python source."""
    tree = ast.parse(source)
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for message in check_docstring(node):
                yield getattr(node, "lineno", 1), message
        if id(node) not in parts and (text := _text_of(node)):
            for line, message in check_prose(text):
                yield getattr(node, "lineno", 1) + line - 1, message
    for line, comment in _comments(source):
        for _, message in check_prose(comment):
            yield line, message


def check_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Yields what is wrong with the openings of a docstring and of the entries in its sections."""
    docstring = ast.get_docstring(node)
    if not docstring:
        return
    match = re.match(r"[\w'-]+", docstring)
    word = match.group() if match else docstring[:10]
    if re.fullmatch(OPENINGS, word):
        yield f"the docstring begins with {word!r}"
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_verb(word) and word not in ARTICLES:
        yield f"{node.name}: the docstring begins with {word!r}, not with a verb (Returns ...) or an article"
    for section in _SECTION.finditer(docstring + "\n"):
        for entry in _ENTRY.finditer(section["body"]):
            if re.fullmatch(OPENINGS, entry["word"]) and entry["word"] != "None":
                yield f"an entry of the docstring begins with {entry['word']!r}: {entry.group().strip()}"


def check_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the phrase of each place where a text says what is not said here."""
    flat = re.sub(r"[ \t]*\n[ \t#>]*", " ", text)  # a phrase may be wrapped; the length of the text changes
    for pattern, write in _COMPILED.items():
        for match in pattern.finditer(flat):
            words = re.sub(r"\s+", r"\\s+(?:[#>]\\s*)?", re.escape(match.group()).replace(r"\ ", " "))
            place = re.search(words, text)
            line = text.count("\n", 0, place.start()) + 1 if place else 1
            yield line, f"{match.group()!r}: write {write!r}"


def _is_verb(word: str) -> bool:
    return re.fullmatch(r"[A-Z][a-z-]*s", word) is not None and not re.fullmatch(PLURALS, word)


def _text_of(node: ast.AST) -> str:
    """Returns the words of a string, or of an f-string with X for each value."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
        return node.value
    return ""


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Yields each block of comments with its first line."""
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        if line != last + 1 and block:
            yield first, " ".join(block)
            block = []
        first = first if block else line
        block.append(token.string.lstrip("# "))
        last = line
    if block:
        yield first, " ".join(block)


ROOT = Path(__file__).parents[1]
SOURCES = ("maskgit_pl/**/*.py", "benchmarks/*.py", "data/*.py", "docs/*.py")
PROSE = ("*.md", "docs/**/*.md", "data/*.md", "benchmarks/*.md", "results/**/*.md", "tests/**/*.md")
SETTINGS = ("recipes/**/*.yaml", "Makefile")


def files() -> list[Path]:
    """Returns every file that a reader sees, but not what `make docs` generates."""
    found = {path for pattern in (*SOURCES, *PROSE, *SETTINGS) for path in ROOT.glob(pattern)}
    return sorted(path for path in found if not path.is_relative_to(ROOT / "docs/reference"))


def test_docstrings_messages_and_pages_keep_the_rules():
    assert len(files()) > 100
    assert [fault for file in files() for fault in check_file(file)] == []


def test_the_help_of_every_command_keeps_the_rules():
    helps = {name: parser.format_help() for name, parser in parsers(build_parser())}
    assert len(helps) > 20
    assert {name: lines for name, text in helps.items() if (lines := list(check_prose(text)))} == {}


def test_the_check_finds():
    sources = [
        '"""What a schedule is."""',
        'def f():\n    """Whether it is one."""',
        'def f():\n    """Number of rows."""',
        'def f():\n    """(B, N) codes."""',
        'def f():\n    """Images as tensors."""',
        'class A:\n    """Of Adam."""',
        'def f(a):\n    """Returns it.\n\n    Args:\n        a: Of Adam.\n    """',
        'class A:\n    """A thing.\n\n    Attributes:\n        a: The first.\n        b: Whether it is one.\n    """',
        'raise ValueError(f"num_steps: at least 1 is needed, got {x}")',
        'raise ValueError("two names are "\n    "needed")',
        "x = 1  # the run goes on",
        "# the run goes\n# on from there",
        'print("10 images a second")',
    ]
    assert {source: found for source in sources if len(found := list(check_python(source))) != 1} == {}
    assert list(check_prose("One.\nThe run goes\n  on from there.")) == [(2, "'goes on': write 'resume, continue'")]
