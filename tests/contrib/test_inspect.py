"""The page of a run shows what was logged and measured, loads nothing, and shows hostile names safely."""

import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.summary.writer.record_writer import RecordWriter

from maskgit_pl.cli import main
from maskgit_pl.contrib.inspect_page import (
    Logs,
    find_in_tokenizer,
    find_in_transformer,
    inspect_run,
    picture_codes,
)
from tests.conftest import tiny_tokenizer

MARKUP = "<script>alert(1)</script>\"'&\x1b"


class Tags(HTMLParser):
    """Collects the elements of a page, and fails on those that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def write_events(folder: Path, values, *, picture=None, name="samples"):
    """Writes an event file with values by name and step, as training does."""
    logger = TensorBoardLogger(folder, name="", version="")
    for step in sorted({step for each in values.values() for step in each}):
        logger.log_metrics({tag: each[step] for tag, each in values.items() if step in each}, step)
    if picture is not None:
        logger.experiment.add_image(name, picture, 10, dataformats="HWC")
    logger.experiment.close()


def test_a_page_of_both_stages_shows_metrics_codes_and_pictures(tiny_pretrained, tiny_shards, tmp_path):
    run = tmp_path / "run"
    (run / "pretrained").mkdir(parents=True)
    (run / "pretrained" / "tokenizer").symlink_to(tiny_pretrained / "tokenizer")
    write_events(run / "tokenizer", {"train/perplexity": {50: 2.0, 100: 3.0}, "val/perplexity": {100: 2.5}})
    ratios = {f"train/loss/mask-ratio-{low:.2f}-{low + 0.25:.2f}": {50: 5.0 - low} for low in (0.0, 0.25)}
    picture = torch.full((8, 8, 3), 9, dtype=torch.uint8).numpy()
    write_events(run / "transformer", {**ratios, "train/gradient_norm": {50: 1.0}}, picture=picture)
    out = inspect_run(run, data=tiny_shards, num_images=7)
    page = out.read_text()
    tags = parsed(page)
    assert out == run / "inspect.html"
    for text in ("perplexity", "loss by part", "mask-ratio-0.25-0.50", "gradient_norm", "samples at step 10",
                 "7 validation images", "PSNR by class", "worst reconstructions", "Atlas of"):  # fmt: skip
        assert text in page, text
    assert all(alt for tag, key, alt in tags.attributes if tag == "img" and key == "alt")

    # It loads and runs nothing.
    assert not {"script", "link", "iframe", "object", "form", "a"} & set(tags.seen)
    assert all(
        value.startswith("data:image/png;base64,") for _, key, value in tags.attributes if key in ("src", "href")
    )
    assert not [key for _, key, _ in tags.attributes if key.startswith("on")]
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in tags.attributes


def test_names_with_markup_are_text(tmp_path):
    run = tmp_path / "<b>run"
    write_events(run / "tokenizer", {f"train/{MARKUP}": {1: 1.0}, "train/x": {1: float("nan"), 2: float("inf")}})
    page = inspect_run(run).read_text()
    tags = parsed(page)
    assert "script" not in tags.seen
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page


def test_each_code_has_its_picture():
    assert len(picture_codes(tiny_tokenizer(), torch.arange(3)).unique(dim=0)) == 3


def test_the_rules_of_the_alarms_judge_the_last_values():
    recipe = {
        "trainer": {"max_steps": 1000, "log_every_n_steps": 50},
        "data": {"global_batch": 100},
        "model": {"network": {"codebook_size": 16, "quantizer": {"name": "ema", "restart_below": 0.0}}},
    }
    logs = Logs({"train/codebook_usage": {100: 0.1}})
    assert find_in_tokenizer(logs, recipe, None) == []  # in the grace period
    logs.scalars["train/codebook_usage"][300] = 0.1
    (problem,) = find_in_tokenizer(logs, recipe, None)
    assert "restart_below: 0.2" in problem.advice[0]
    logs.scalars["train/codebook_usage"][350] = 0.9
    assert find_in_tokenizer(logs, recipe, None) == []


def test_a_rising_validation_loss_and_a_growing_gradient_are_problems():
    falling = dict(enumerate([5.0, 4.0, 3.0, 3.1]))
    assert find_in_transformer(Logs({"val/loss": falling})) == []
    rising = Logs({"val/loss": {**falling, 4: 3.5}, "train/gradient_norm": dict(enumerate([1.0] * 6 + [20.0]))})
    assert [problem.cause for problem in find_in_transformer(rising)] == ["overfitting", "gradient_norm"]


def test_event_files_that_are_pipes_or_no_events_are_refused_by_name(tmp_path):
    file = tmp_path / "run" / "tokenizer" / "events.out.tfevents.1.host"
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"must be a regular file, got a FIFO.*tfevents"):
        inspect_run(tmp_path / "run")
    file.unlink()
    with open(file, "wb") as stream:
        RecordWriter(stream).write(b"\xff\xff")  # with right checksums
    with pytest.raises(ValueError, match=r"event files of .*tokenizer must hold events, got: .*; remove"):
        inspect_run(tmp_path / "run")


def test_a_validation_loss_that_stays_level_in_the_second_half_is_a_problem():
    level, falling = {100: 7.0, 900: 5.83, 1800: 5.82}, {100: 7.0, 850: 3.95, 1700: 3.83}
    (problem,) = find_in_transformer(Logs({"val/loss": level}))
    assert problem.text == "the validation loss was 5.83 at half of the steps and is 5.82 at the last"
    assert find_in_transformer(Logs({"val/loss": falling})) == find_in_transformer(Logs({"val/loss": {5: 3.0}})) == []


def test_the_command_writes_a_page_or_one_line_of_error(tiny_pretrained, tiny_shards, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert (
        main(["inspect", str(tiny_pretrained), "--data", str(tiny_shards), "--out", str(out), "--num-images", "3"]) == 0
    )
    assert capsys.readouterr().out == f"Nothing is outside of its healthy range.\n{out}\n"
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty")]) == 2
    assert "has neither logs nor a tokenizer" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["inspect", str(tiny_pretrained), "--num-images", "0"]) == 2
    assert "--num-images must be an integer in [1, inf), got 0" in capsys.readouterr().err
