import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.evaluation.reports import figure4
from maskgit_pl.evaluation.reports.figure4 import Timing, as_markdown, draw, measure
from maskgit_pl.networks.transformer import TransformerConfig

TINY = TransformerConfig(16, 3, (4, 4), width=16, depth=1, num_heads=2, mlp_width=32)
METHODS = ["MaskGIT", "sequential, KV cache", "sequential, no cache"]


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch):
    monkeypatch.setattr(figure4, "_MOST", 2)


@pytest.fixture(scope="module")
def timings() -> list[Timing]:
    seconds = {16: (0.012, 0.018, 0.022), 256: (0.08, 0.4, 2.0), 1024: (0.9, 3.0, 150.0)}
    return [
        Timing(method, count, count, value, value, 9, "8 layers x 256", "a machine", "2.13.0", "float32", "cpu")
        for count, values in seconds.items()
        for method, value in zip(METHODS, values, strict=True)
    ]


def test_every_method_is_timed_at_every_n_and_a_second_call_measures_nothing(tmp_path, monkeypatch):
    file, told = tmp_path / "results" / "figure-4.csv", []
    made = measure(file, sizes=TINY, num_tokens=(16, 4), on_point=told.append)
    assert [(timing.num_tokens, timing.method) for timing in made] == [
        (n, method) for n in (4, 16) for method in METHODS
    ]
    assert sorted(told, key=made.index) == made
    assert [timing.num_steps for timing in made] == [4, 4, 4, 8, 16, 16]
    assert all(0 < timing.least <= timing.seconds and timing.runs == 2 for timing in made)
    assert made[0].network == "1 layers x 16, MLP 32, 2 heads, 16 codes, 3 classes"
    assert (made[0].torch, made[0].dtype, made[0].kind) == (torch.__version__, "float32", "cpu")
    monkeypatch.setattr(figure4, "_decoders", lambda *given: pytest.fail("measured again"))
    again = []
    assert measure(file, sizes=TINY, num_tokens=(4, 16), on_point=again.append) == again == made


def test_a_point_is_kept_as_soon_as_it_is_measured_and_the_rest_goes_on(tmp_path):
    file = tmp_path / "figure-4.csv"

    def stop(timing: Timing) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(file, sizes=TINY, num_tokens=(4,), on_point=stop)
    (kept,) = csv.DictReader(file.read_text().splitlines())
    made = measure(file, sizes=TINY, num_tokens=(4,))
    assert [timing.method for timing in made] == METHODS
    assert float(kept["seconds_per_image"]) in [timing.seconds for timing in made]
    other = measure(file, sizes=replace(TINY, depth=2), num_tokens=(4,))
    assert {timing.network for timing in other}.isdisjoint(timing.network for timing in made)
    assert len(file.read_text().splitlines()) == 7


def test_slow_methods_run_less_often_in_turn_with_the_quick_ones(tmp_path, monkeypatch):
    order: list[str] = []
    costs = dict(zip(METHODS, (0.75, 4.0, 30.0), strict=True))
    monkeypatch.setattr(figure4, "_MOST", 15)
    monkeypatch.setattr(figure4, "_decoders", lambda *given: {name: lambda name=name: iter([name]) for name in costs})
    monkeypatch.setattr(figure4, "_seconds", lambda decode, device: order.append(next(decode())) or costs[order[-1]])
    made = measure(tmp_path / "a.csv", sizes=TINY, num_tokens=(4,))
    assert [timing.runs for timing in made] == [13, 2, 1]
    assert order[:5] == [*METHODS, METHODS[0], METHODS[1]]


def test_all_methods_decode_whole_images_and_a_cache_changes_none():
    last: dict[str, DecodingStep] = {}
    for name, decode in figure4._decoders(TINY, 16, torch.device("cpu")).items():
        *_, last[name] = decode()
    assert all(step.tokens.shape == (1, 16) and not step.still_masked.any() for step in last.values())
    assert torch.equal(last[METHODS[1]].tokens, last[METHODS[2]].tokens)


def test_the_figure_has_the_three_lines_and_the_page_their_factors(timings, tmp_path):
    draw(timings, tmp_path / "deep" / "figure-4.png")
    pixels = np.asarray(Image.open(tmp_path / "deep" / "figure-4.png").convert("RGB"))
    for colour in figure4._COLOURS.values():
        wanted = tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))
        assert (pixels == wanted).all(-1).sum() > 500
    page = as_markdown(timings, "maskgit figure 4")
    assert "    maskgit figure 4\n" in page
    assert "| 256 | 256 | 80 ms (n = 9) | 400 ms (n = 9) | 2 s (n = 9) | 5.0 | 25 |" in page
    said = " ".join(page.split())
    assert "At N = 1024 a sequential image takes 3.3 times as long as MaskGIT's with a cache and 167 times" in said


def test_the_page_explains_the_device_that_was_timed(timings):
    pages = {
        kind: " ".join(as_markdown([replace(each, kind=kind) for each in timings], "x").split())
        for kind in ("cpu", "cuda", "mps")
    }
    assert "on a machine, torch 2.13.0" in pages["cpu"]
    assert "on a CPU, as here" in pages["cpu"]
    assert "This is a GPU, as in the paper" in pages["cuda"]
    assert "CPU" not in pages["cuda"] + pages["mps"]


@pytest.mark.parametrize("changed", ["torch", "dtype", "device", "network"])
def test_a_point_of_another_machine_version_or_network_is_measured_anew(tmp_path, changed):
    file = tmp_path / "timing.csv"
    measure(file, sizes=TINY, num_tokens=(4,))
    rows = list(csv.DictReader(file.read_text().splitlines()))
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows([{**row, changed: "another"} for row in rows])
    measure(file, sizes=TINY, num_tokens=(4,))
    assert len(file.read_text().splitlines()) == 7


def test_points_of_an_older_version_stay_and_are_not_reused(tmp_path):
    file = tmp_path / "timing.csv"
    measure(file, sizes=TINY, num_tokens=(4,))
    rows = list(csv.DictReader(file.read_text().splitlines()))
    names = [name for name in rows[0] if name not in ("dtype", "kind")]
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    measure(file, sizes=TINY, num_tokens=(4,))
    again = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["seconds_per_image"] for row in again[:3]] == [row["seconds_per_image"] for row in rows]
    assert [row["kind"] for row in again] == [""] * 3 + ["cpu"] * 3


def test_the_sizes_of_a_pretrained_transformer_are_timed(tiny_pretrained, tmp_path):
    assert figure4.sizes_of(tiny_pretrained / "transformer") == TransformerConfig(
        16, 3, (4, 4), 16, 1, 2, 32, class_dropout=0.1
    )


@pytest.mark.parametrize("count", [0, -4, 2, 50])
def test_a_number_of_tokens_that_is_no_square_is_refused(tmp_path, count):
    with pytest.raises(ValueError, match=f"num_tokens: squares are needed, such as 16 or 256, got {count}"):
        measure(tmp_path / "a.csv", sizes=TINY, num_tokens=(4, count))
    assert not (tmp_path / "a.csv").exists()


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("colour\nred\n")
    with pytest.raises(ValueError, match=r"a\.csv: columns .* are missing"):
        measure(tmp_path / "a.csv", sizes=TINY, num_tokens=(4,))
