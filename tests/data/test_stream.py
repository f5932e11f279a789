"""Streams from a real web server and from files: samples of each worker; bad, silent, missing and hostile shards."""

import functools
import http.server
import itertools
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from maskgit_pl.data import Batch, ShardData, StreamConfig
from maskgit_pl.data.augmentations import CENTER
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.samples import Labels
from maskgit_pl.data.stream import StreamBatches, _read_samples
from maskgit_pl.errors import DataBudgetError
from tests.conftest import save_uneven_shards
from tests.data_folders import open_data, save_data

SIZES = (7, 5, 9, 4, 6, 8)
NUM_TRAIN = sum(SIZES)
CLASS_NAMES = ("a", "b", "c")
GREY = encode_png(torch.zeros(1, 8, 8, dtype=torch.uint8))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_uneven_shards(tmp_path_factory.mktemp("web") / "shards", SIZES, (3, 8))


@pytest.fixture(scope="module")
def web(folder: Path) -> Iterator[str]:
    """The address of the folder on a local server."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def data(path: Path | str, urls, **options) -> ShardData:
    config = StreamConfig(urls, samples=NUM_TRAIN, shuffle_buffer=4)
    return open_data(path, source="stream", stream=config, image_size=8, max_batch_per_device=4, **options)


def stream(urls, *, place: dict[str, int] | None = None, **options) -> StreamBatches:
    """Returns the dataset of one worker, with a place among the ranks and steps."""
    of_stream = StreamConfig(urls, samples=NUM_TRAIN, shuffle_buffer=options.pop("shuffle_buffer", 4))
    defaults = {"image_size": 8, "in_channels": 1, "augmentations": CENTER, "seed": 0}
    return StreamBatches(of_stream, CLASS_NAMES, **{**defaults, **(place or {}), **options})


def images(batches: list[Batch]) -> list[bytes]:
    return [image.numpy().tobytes() for batch in batches for image in batch.content]


def taken(dataset: StreamBatches, count: int) -> list[Batch]:
    return [dataset.__getitems__(range(number, number + 1)) for number in range(count)]


@pytest.fixture(scope="module")
def known(folder: Path) -> dict[bytes, int]:
    """A mapping of every training image of the shards to its label."""
    sizes = {"global_batch": NUM_TRAIN, "max_batch_per_device": NUM_TRAIN}
    (batch,) = open_data(folder, image_size=8, **sizes).train_dataloader()
    return dict(zip(images([batch]), batch.labels.tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_workers"), [("web", 2), ("path", 0)])
def test_all_samples_come_with_their_labels_from_anywhere(folder, web, known, kind, num_workers):
    base = {"web": web, "path": str(folder)}[kind]
    module = data(folder, f"{base}/train-{{000000..000005}}.tar", num_workers=num_workers)
    batches = list(module.train_dataloader())
    assert [tuple(batch.content.shape) for batch in batches] == [(4, 1, 8, 8)] * len(batches)
    assert torch.equal(torch.cat([batch.position for batch in batches]), torch.arange(40))
    assert all(torch.equal(batch.index, batch.position) and batch.valid.all() for batch in batches)
    assert all((batch.replacement == -1).all() for batch in batches)
    assert [known[image] for image in images(batches)] == torch.cat([batch.labels for batch in batches]).tolist()
    assert len(set(images(batches))) > 30  # of 39


def test_one_worker_sees_each_sample_about_once_in_each_pass(folder, known):
    seen = images(taken(stream(f"{folder}/train-{{000000..000005}}.tar"), 5 * NUM_TRAIN))
    counts = [seen.count(image) for image in known]
    assert min(counts) >= 3
    assert max(counts) <= 6


def test_ranks_and_workers_are_dealt_different_shards(folder, known):
    urls = f"{folder}/train-{{000000..000005}}.tar"
    two = [images(taken(stream(urls, place={"rank": rank, "world_size": 2}), 15)) for rank in (0, 1)]
    assert not set(two[0]) & set(two[1])  # within the first pass, three shards each
    batches = list(itertools.islice(data(folder, urls, num_workers=2).train_dataloader(), 6))
    even, odd = (set(images(batches[first::2])) for first in (0, 1))
    assert len(even) == len(odd) == 12
    assert not even & odd


def test_order_depends_on_the_seed_and_on_the_step_at_which_it_begins(folder):
    urls = f"{folder}/train-{{000000..000005}}.tar"
    first = images(taken(stream(urls), 20))
    assert first == images(taken(stream(urls), 20))
    assert first != images(taken(stream(urls, seed=1), 20))
    assert first != images(taken(stream(urls, place={"first_step": 3}), 20))


def test_a_bad_shard_among_good_ones_is_named_and_not_passed_over(folder, tars, tmp_path):
    whole, url = (folder / "train-000001.tar").read_bytes(), str(tmp_path / "bad.tar")
    for content, text in ((whole[:3000], "truncated at byte 3000"), (bytes(10240), "no images")):
        Path(url).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^stream {url}: cannot be read: not a complete tar of samples: {text}"):
            taken(stream([f"{folder}/train-000000.tar", url]), 40)
    for members, text in (
        ([("0.png", GREY)], r"1 without a label \(first bad.tar:0"),
        ([("0.png", GREY), ("0.cls", b"3")], r"label bad.tar:0.cls must be a class number in \[0, 3\)"),
    ):
        tars.write(Path(url), members)
        with pytest.raises(ValueError, match=rf"^stream {url}: .*{text}"):
            taken(stream(url), 1)


def test_unreadable_images_are_passed_over_until_100_in_a_row(tmp_path, caplog):
    cut = GREY[:-20]  # the header is whole
    save_data(tmp_path / "few", {"train": [(GREY, 0), (cut, 1), (b"<html>", 1), (GREY, 2)]})
    batch = stream(str(tmp_path / "few" / "train-000000.tar")).__getitems__(range(6))
    assert set(batch.labels.tolist()) == {0, 2}
    assert "stream: skipped image " in caplog.text
    assert re.search(r"skipped 1 images \(first .*00000002", caplog.text)
    save_data(tmp_path / "all", {"train": [(cut, 0), (b"", 0), (cut, 0)]})
    with pytest.raises(DataBudgetError, match=r"100 images in a row cannot be read, the last is .*/train-000000\.tar:"):
        taken(stream(str(tmp_path / "all" / "train-000000.tar")), 1)


def test_a_missing_shard_or_server_is_named(web, tmp_path):
    os.mkfifo(tmp_path / "fifo.tar")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}/train-0.tar"
        for url, text in (
            (f"{web}/train-999999.tar", "HTTPError: .*404"),
            (nobody, "URLError: .*refused"),
            (f"{tmp_path}/no.tar", "No such file"),
            (f"{tmp_path}/fifo.tar", "must be a regular file"),
            ("http://127.0.0.1/\u00e9.tar", "UnicodeEncodeError"),
        ):
            with pytest.raises(ValueError, match=rf"stream {re.escape(url)}: cannot be read: .*{text}"):
                taken(stream(url), 1)


@pytest.mark.parametrize(("patience", "text"), [(0.3, "TimeoutError"), (60, "truncated at byte")])
def test_a_server_that_falls_silent_or_hangs_up_ends_the_run(folder, monkeypatch, patience, text):
    monkeypatch.setattr("maskgit_pl.data.stream._SILENT_SECONDS", patience)
    over = threading.Event()

    class Half(Quiet):
        def do_GET(self) -> None:
            whole = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[:2700])
            over.wait(20 if patience < 1 else 0)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Half, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with pytest.raises(ValueError, match=text):
            taken(stream(f"http://127.0.0.1:{server.server_port}/train-000000.tar"), 40)
        over.set()
        server.shutdown()


@pytest.mark.parametrize(
    ("urls", "text"),
    [
        ("pipe:cat train.tar", "'pipe:cat train.tar'"),
        (["good.tar", "s3://bucket/x.tar"], "https:// or http://, got 's3://bucket/x.tar'"),
        ("x-{0..1.tar", "must have braces that close"),
    ],
)
def test_addresses_that_are_not_read_are_refused_by_name(urls, text):
    with pytest.raises(ValueError, match=r"data\.stream\.urls.* must .*got") as error:
        StreamConfig(urls, samples=1)
    assert text in str(error.value)
    for key, value in (("samples", 0), ("samples", 2**50), ("shuffle_buffer", 0)):
        with pytest.raises(ValueError, match=rf"^data\.stream\.{key} must be .*, got {value}"):
            StreamConfig("x.tar", **{"samples": 1, key: value})


def test_a_server_that_sends_without_end_is_stopped(web, monkeypatch):
    monkeypatch.setattr("maskgit_pl.data.stream._MAX_SHARD_BYTES", 2**10)
    with pytest.raises(ValueError, match=r"cannot be read: more than 1.02 kB"):
        next(_read_samples([f"{web}/train-000002.tar"], Labels()))
