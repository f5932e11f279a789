from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl.schedules import mask_schedules
from tests.cli.commands import call_command


def call(*words: str) -> int:
    return call_command("schedules", *words)


def test_every_schedule_that_needs_no_argument_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--num-tokens", "49", "--num-steps", "4") == 0
    shown = capsys.readouterr().out
    rows = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert rows == [name for name in mask_schedules.names() if name != "pow"]


def test_named_schedules_and_mappings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    call("--schedules", 'linear, {"name": "pow", "exponent": 4}', "--num-steps", "4")
    shown = capsys.readouterr().out
    assert "pow (exponent 4)" in shown
    assert "cosine" not in shown


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    call("--out", str(tmp_path / "deep" / "figure.png"), "--schedules", "cosine,linear")
    with Image.open(tmp_path / "deep" / "figure.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedules", "cosin"], "did you mean 'cosine'"),
        (["--schedules", "{name"], "a name or a mapping such as"),
        (["--num-tokens", "4"], "--num-steps must be <= 4, the tokens per image"),
    ],
)
def test_bad_input_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*words)
