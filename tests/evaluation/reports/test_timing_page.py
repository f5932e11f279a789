import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from maskgit_pl.evaluation.reports.timing import _COLOURS, METHODS, Timing, make_timing_page

COLOURS = list(_COLOURS.values())


@pytest.fixture(scope="module")
def timings() -> list[Timing]:
    seconds = {16: (0.012, 0.018, 0.022), 256: (0.08, 0.4, 2.0), 1024: (0.9, 3.0, 150.0)}
    return [
        Timing(method, count, count, value, value, 9, "8 layers x 256", "a machine", "2.13.0", "float32", "cpu")
        for count, values in seconds.items()
        for method, value in zip(METHODS, values, strict=True)
    ]


@pytest.mark.slow
def test_the_figure_has_three_lines_and_the_page_their_ratios(timings):
    made = make_timing_page(timings, command="maskgit figure 4")
    pixels = np.asarray(Image.open(io.BytesIO(made.pictures["figure-4.png"])).convert("RGB"))
    for colour in COLOURS:
        wanted = tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))
        assert (pixels == wanted).all(-1).sum() > 500
    page = made.markdown
    assert "    maskgit figure 4\n" in page
    assert "| 256 | 256 | 80 ms (n = 9) | 400 ms (n = 9) | 2 s (n = 9) | 5.0 | 25 |" in page
    said = " ".join(page.split())
    assert "At N = 1024, autoregressive decoding takes 3.3 times as long as MaskGIT with a cache, and 167 times" in said


@pytest.mark.slow
def test_the_page_explains_the_device_that_was_timed(timings):
    pages = {
        kind: " ".join(make_timing_page([replace(each, kind=kind) for each in timings], command="x").markdown.split())
        for kind in ("cpu", "cuda", "mps")
    }
    assert "Machine: a machine, torch 2.13.0" in pages["cpu"]
    assert "On a CPU, as here" in pages["cpu"]
    assert "also on a GPU" in pages["cuda"]
    assert "CPU" not in pages["cuda"] + pages["mps"]
