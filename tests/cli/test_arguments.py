"""The engine that makes command lines of functions."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Unpack

import pytest

from maskgit_pl.cli import _Parser
from maskgit_pl.cli.arguments import Output, Word, add_command, read_call, takes_overrides


@dataclass(frozen=True)
class Base:
    """Common flags.

    Args:
        size: A size.
    """

    size: float = 0.5


@dataclass(frozen=True)
class Flags(Base):
    """More flags.

    Args:
        file: Written.
        sheet: Written, too.
        folder: Also written.
        names: Repeated.
    """

    file: Annotated[Path, Output(".png", (".npz",))] | None = None
    sheet: Annotated[Path, Output(".png")] | None = None
    folder: Annotated[Path, Output("")] | None = None
    names: list[str] | None = None


class Settings(TypedDict, total=False):
    """Settings.

    Args:
        spec: A name or a mapping.
        range: One number or two.
        counts: Numbers.
    """

    spec: str | dict[str, Any]
    range: float | tuple[float, float]
    counts: tuple[int, ...]


def draw(
    image: Annotated[Path, Word("IMAGE")],
    more: tuple[Path, ...] = (),
    *,
    kind: Literal["a", "b", 3] = "a",
    class_: str,
    upper: Annotated[str, Word("TEXT", lambda name, text: text.upper(), bare="x")] | None = None,
    quick: bool = False,
    blend: bool = True,
    flags: Flags,
    overrides: Sequence[str] = (),
    **settings: Unpack[Settings],
) -> None:
    """Draws an image.

    It is 100% of the work.

    Example: maskgit draw in.png --class x

    Args:
        image: File to read.
        more: Other files.
        kind: One of
            three.
        class_: A ``class``.
        upper: Text.
        quick: Hurry.
        blend: Blend.
    """


def parser_of(function: Callable[..., None] = draw) -> argparse.ArgumentParser:
    parser = _Parser(prog="maskgit")
    add_command(parser.add_subparsers(), "draw", function)
    return parser


def call_of(*words: str) -> dict[str, Any]:
    args, rest = parser_of().parse_known_args(["draw", *words])
    return read_call(args.function, vars(args), rest)


def test_only_given_words_are_passed() -> None:
    call = call_of("in.png", "--class", "x")
    assert call == {"image": Path("in.png"), "class_": "x", "flags": Flags(), "overrides": []}


def test_each_type_is_read() -> None:
    call = call_of(
        "in.png", "b.png", "c.png", "--class=x", "--kind", "3", "--upper", "word", "--quick", "--no-blend", "--size",
        "1e-3", "--file", "out.NPZ", "--names", "n", "--names", "m", "--spec", '{"name": "x", "y": 1}', "--range",
        "1,2", "--counts", "1,2,2", "--data.seed=1",
    )  # fmt: skip
    assert call == {
        "image": Path("in.png"),
        "more": (Path("b.png"), Path("c.png")),
        "class_": "x",
        "kind": 3,
        "upper": "WORD",
        "quick": True,
        "blend": False,
        "flags": Flags(1e-3, Path("out.NPZ"), names=["n", "m"]),
        "spec": {"name": "x", "y": 1},
        "range": (1.0, 2.0),
        "counts": (1, 2, 2),
        "overrides": ["--data.seed=1"],
    }
    assert takes_overrides(draw)
    bare = call_of("in.png", "--class", "x", "--range", "3", "--upper")
    assert (bare["upper"], bare["range"]) == ("X", 3.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--kind c", "--kind must be one of a, b, 3, got 'c'"),
        ("--size much", "--size must be a number, got 'much'"),
        ("--file a.mp4", "--file must end in .png, got a.mp4"),
        ("--file /proc/x.png", r"got /proc/x.png \(/proc: "),
        ("--file folder.png", "--file must be a file, got the folder"),
        ("--folder other.png", "--folder must be a folder, got the file other.png"),
        ("--file a.PNG --sheet link/a.PNG", "--sheet must not overwrite another file of the command, got link/a.PNG"),
        ("--file in-link.png", "--file must not overwrite another file of the command, got in-link.png"),
    ],
)
def test_a_wrong_word_or_output_is_refused(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.png").touch()
    Path("other.png").touch()
    Path("folder.png").mkdir()
    Path("link").symlink_to(".")
    Path("in-link.png").symlink_to("in.png")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        call_of("in.png", "--class", "x", *words.split())
    assert sorted(tmp_path.iterdir()) == before


def test_the_help_comes_from_the_docstrings() -> None:
    (action,) = [action for action in parser_of()._actions if isinstance(action, argparse._SubParsersAction)]
    text = " ".join(action.choices["draw"].format_help().split())
    assert text.startswith("usage: maskgit draw IMAGE --class NAME [FLAGS] Draws an image. It is 100% of the work.")
    for line in (
        "IMAGE File to read", "--kind a|b|3 One of three (default: a)", "--class NAME A class", "flags:",
        "--size X A size (default: 0.5)", "settings:", "--counts A,B,... Numbers",
        "Example: maskgit draw in.png --class x",
    ):  # fmt: skip
        assert line in text
