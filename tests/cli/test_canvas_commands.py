"""The commands inpaint, outpaint and panorama, beside ``test_edit_command.py``."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.pipeline import MaskGIT
from tests.cli.commands import pixels


def call(*words: object) -> int:
    return main([*map(str, words), "--device", "cpu"])


def read(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def test_inpaint_needs_no_class(tiny_pretrained: Path, image: Path, tmp_path: Path, capsys) -> None:
    words = ["--box", "0,0,4,2", "--variants", 2, "--no-blend", "--out", tmp_path / "out.png"]
    assert call("inpaint", tiny_pretrained, image, *words, "--images", tmp_path / "none") == 0
    assert "2 variants of no class, 6 of 16 tokens generated" in capsys.readouterr().out
    assert [path.name for path in sorted((tmp_path / "none").iterdir())] == [
        "no-class-seed-000000.png",
        "no-class-seed-000001.png",
    ]
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:2, :4] = True
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    expected = pipe.inpaint(pixels().numpy(), mask, classes=[None, None], blend=0, output_type="np")
    assert (read(tmp_path / "none") == expected[..., 0]).all()


@pytest.mark.slow
def test_outpaint_writes_what_the_pipeline_makes_and_how_it_was_decoded(
    tiny_pretrained: Path, image: Path, tmp_path: Path, capsys
) -> None:
    code = call(
        "outpaint", tiny_pretrained, image, "--all", 4, "--left", 6, "--class", "Trouser", "--variants", 2,
        "--no-blend", "--num-steps", 3, "--out", tmp_path / "out.png", "--images", tmp_path / "single",
        "--gif", tmp_path / "out.gif",
        "--filmstrip", tmp_path / "strip.png",
    )  # fmt: skip
    assert code == 0
    assert "2 variants of class Trouser, 18 x 16 pixels" in capsys.readouterr().out
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    expected = pipe.outpaint(
        pixels().numpy(), left=6, right=4, up=4, down=4, classes=[2, 2], num_steps=3, blend=0, output_type="np"
    )
    made = read(tmp_path / "single")
    assert (made == expected[..., 0]).all()
    assert (made[:, 4:12, 6:14] == pixels().numpy()).all()
    with Image.open(tmp_path / "out.gif") as animation:
        assert animation.n_frames % 3 == 0  # three steps of each window
        assert animation.n_frames > 3
    assert (tmp_path / "strip.png").is_file()
    assert (tmp_path / "out.png").is_file()


def test_a_side_of_0_pixels_stays_0_beside_all(tiny_pretrained: Path, image: Path, tmp_path: Path, capsys) -> None:
    words = ["--right", 4, "--left", 0, "--all", 2, "--variants", 1, "--num-steps", 2, "--out", tmp_path / "out.png"]
    assert call("outpaint", tiny_pretrained, image, *words) == 0
    assert "1 variant of no class, 12 x 12 pixels" in capsys.readouterr().out


@pytest.mark.slow
def test_panorama_writes_what_the_pipeline_makes(tiny_pretrained: Path, tmp_path: Path, capsys) -> None:
    code = call(
        "panorama", tiny_pretrained, "--classes", "T-shirt,2", "--width", 20, "--overlap", 0.25, "--seed", 3,
        "--out", tmp_path / "out.png", "--images", tmp_path / "single", "--gif", tmp_path / "out.gif",
    )  # fmt: skip
    assert code == 0
    assert "2 images of 20 x 8 pixels" in capsys.readouterr().out
    expected = MaskGIT.from_pretrained(tiny_pretrained).panorama([1, 2], 20, overlap=0.25, seed=3, output_type="np")
    assert (read(tmp_path / "single") == expected[..., 0]).all()
    with Image.open(tmp_path / "out.gif") as animation:
        assert animation.n_frames > 4


def test_an_edit_shows_how_it_was_decoded(tiny_pretrained: Path, image: Path, tmp_path: Path) -> None:
    code = call(
        "edit", tiny_pretrained, image, "--box", "0,0,4,2", "--class", "1", "--num-steps", 6, "--variants", 3,
        "--batch-size", 2, "--out", tmp_path / "out.png", "--gif", tmp_path / "out.gif",
        "--filmstrip", tmp_path / "strip.png",
    )  # fmt: skip
    assert code == 0
    with Image.open(tmp_path / "out.gif") as animation:
        assert animation.n_frames == 5  # of 6 steps the first is left out


HUGE = "4000000000000"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["outpaint", "RUN", "IMAGE"], "one of --left, --right, --up, --down and --all must be > 0 pixels, got none"),
        (["outpaint", "RUN", "IMAGE", "--right", "-4"], "--right must be an integer in [0, 64000000], got -4"),
        (["outpaint", "RUN", "IMAGE", "--right", HUGE], f"--right must be an integer in [0, 64000000], got {HUGE}"),
        (
            ["outpaint", "RUN", "IMAGE", "--all", "16000"],
            "width must be smaller, because a canvas has at most 64000000",
        ),
        (
            ["outpaint", "RUN", "IMAGE", "--right", "4", "--dilation", HUGE],
            "--dilation must be an integer in [0, 65536]",
        ),
        (
            ["outpaint", "RUN", "IMAGE", "--right", "4", "--variants", HUGE],
            "--variants must be an integer in [1, 10000]",
        ),
        (["panorama", "RUN", "--width", HUGE], f"--width must be an integer in [1, 64000000], got {HUGE}"),
        (["panorama", "RUN", "--width", "20", "--height", HUGE], "--height must be an integer in [1, 64000000]"),
        (
            ["panorama", "RUN", "--width", "9000", "--height", "8000"],
            "--width must be smaller, because a canvas has at",
        ),
        (["outpaint", "RUN", "IMAGE", "--right", "4", "--overlap", "1"], "--overlap must be a number in (0, 1)"),
        (
            ["outpaint", "RUN", "IMAGE", "--right", "4", "--variants", "0"],
            "--variants must be an integer in [1, 10000], got 0",
        ),
        (["outpaint", "RUN", "nowhere.png", "--right", "4"], "image nowhere.png: no such file"),
        (
            ["outpaint", "RUN", "IMAGE", "--right", "3"],
            "--right must be a multiple of 2 pixels, the size of a token, got 3",
        ),
        (["inpaint", "RUN", "IMAGE"], "one of --box and --mask must be given, got neither"),
        (["panorama", "RUN", "--width", "6"], "--width must be >= 8 pixels, the width of the model's images, got 6"),
        (
            ["panorama", "RUN", "--width", "20", "--classes", "Trousers"],
            "unknown class 'Trousers': did you mean 'Trouser'",
        ),
        (["panorama", "RUN", "--width", "20", "--overlap", "0"], "--overlap must be a number in (0, 1), got 0.0"),
    ],
)
def test_bad_input_is_answered_in_one_line(
    words: list[str], message: str, tiny_pretrained: Path, image: Path, tmp_path: Path, capsys
) -> None:
    given = [{"RUN": str(tiny_pretrained), "IMAGE": str(image)}.get(word, word) for word in words]
    assert call(*given, "--out", tmp_path / "out.png") == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


def test_a_wrong_margin_is_answered_without_torch(tiny_pretrained: Path, image: Path) -> None:
    code = (
        "import sys; from maskgit_pl.cli import main\n"
        f"code = main(['outpaint', {str(tiny_pretrained)!r}, {str(image)!r}, '--right', '-1'])\n"
        "sys.exit(90 if 'torch' in sys.modules else code)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 2
