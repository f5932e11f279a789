"""Streams from a real web server and from files: samples of each rank and worker, bad images, shards and URLs."""

import functools
import gc
import http.server
import itertools
import pickle
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from maskgit_pl.data import Batch, ShardData, StreamConfig
from maskgit_pl.data.augmentations import CENTER
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.stream import StreamBatches
from tests.conftest import save_uneven_shards
from tests.data_folders import open_data, save_data

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # see ``closed``

SIZES = (7, 5, 9, 4, 6, 8)
NUM_TRAIN = sum(SIZES)
CLASS_NAMES = ("a", "b", "c")
GREY = encode_png(torch.zeros(1, 8, 8, dtype=torch.uint8))
ALL = "train-{000000..000005}.tar"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Closes the shards, which webdataset leaves to the garbage collector."""
    yield
    gc.collect()


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


def taken(urls, count: int) -> Batch:
    """Returns the first samples of a single worker."""
    stream = StreamConfig(urls, samples=NUM_TRAIN, shuffle_buffer=4)
    images = {"image_size": 8, "in_channels": 1, "augmentations": CENTER, "seed": 0}
    return StreamBatches(stream, CLASS_NAMES, shards=stream.expand(), **images).__getitems__(range(count))


def images(*batches: Batch) -> list[bytes]:
    return [image.numpy().tobytes() for batch in batches for image in batch.content]


@pytest.fixture(scope="module")
def known(folder: Path) -> dict[bytes, int]:
    """A mapping of every training image of the shards to its label."""
    sizes = {"global_batch": NUM_TRAIN, "max_batch_per_device": NUM_TRAIN}
    (batch,) = open_data(folder, image_size=8, **sizes).train_dataloader()
    return dict(zip(images(batch), batch.labels.tolist(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_workers"), [("web", 2), ("path", 0)])
def test_all_samples_come_with_their_labels_from_anywhere(folder, web, known, kind, num_workers):
    base = {"web": web, "path": str(folder)}[kind]
    module = data(folder, f"{base}/{ALL}", num_workers=num_workers)
    batches = list(module.train_dataloader())
    assert [tuple(batch.content.shape) for batch in batches] == [(4, 1, 8, 8)] * len(batches)
    assert torch.equal(torch.cat([batch.position for batch in batches]), torch.arange(40))
    assert all(torch.equal(batch.index, batch.position) and batch.valid.all() for batch in batches)
    assert all((batch.replacement == -1).all() for batch in batches)
    assert [known[image] for image in images(*batches)] == torch.cat([batch.labels for batch in batches]).tolist()
    assert len(set(images(*batches))) > 25  # of 39


def test_one_worker_sees_each_sample_once_in_each_pass_in_other_orders(folder, known):
    seen = images(taken(f"{folder}/{ALL}", 2 * NUM_TRAIN))
    first, second = seen[:NUM_TRAIN], seen[NUM_TRAIN:]
    assert sorted(first) == sorted(second) == sorted(known)
    assert first != second


def test_ranks_and_workers_are_dealt_different_shards(folder, monkeypatch):
    urls = f"{folder}/{ALL}"
    monkeypatch.setattr(ShardData, "_world_size", 2)
    two = []
    for rank in (0, 1):
        monkeypatch.setattr(ShardData, "_rank", rank)
        two.append(set(images(*itertools.islice(data(folder, urls).train_dataloader(), 4))))
    assert two[0]
    assert not two[0] & two[1]
    with pytest.raises(ValueError, match="a shard with images for each worker of each rank"):
        next(iter(data(folder, f"{folder}/train-000000.tar").train_dataloader()))  # rank 1 has none
    monkeypatch.undo()
    batches = list(itertools.islice(data(folder, urls, num_workers=2).train_dataloader(), 6))
    even, odd = (set(images(*batches[first::2])) for first in (0, 1))
    assert even
    assert not even & odd


def test_order_depends_on_the_seed_and_on_the_step_at_which_it_begins(folder, monkeypatch):
    def order(**options) -> list[bytes]:
        return images(*itertools.islice(data(folder, f"{folder}/{ALL}", **options).train_dataloader(), 3))

    first = order()
    assert first == order()
    assert first != order(seed=1)
    monkeypatch.setattr(ShardData, "_current_step", lambda self: 3)
    assert first != order()


def test_images_that_cannot_be_read_are_skipped_with_a_warning(tmp_path, caplog):
    cut = GREY[:-20]  # the header is whole
    save_data(tmp_path / "few", {"train": [(GREY, 0), (cut, 1), (b"<html>", 1), (GREY, 2)]})
    assert set(taken(str(tmp_path / "few" / "train-000000.tar"), 6).labels.tolist()) == {0, 2}
    assert re.search(r"stream: skipped image .*train-000000\.tar:00000001", caplog.text)
    assert re.search(r"stream: skipped image .*train-000000\.tar:00000002", caplog.text)
    save_data(tmp_path / "all", {"train": [(cut, 0), (b"", 0), (cut, 0)]})
    with pytest.raises(ValueError, match="a shard with images for each worker of each rank"):
        taken(str(tmp_path / "all" / "train-000000.tar"), 1)


def test_a_shard_that_cannot_be_read_is_named_in_one_line(folder, web, tars, tmp_path):
    whole, bad = (folder / "train-000001.tar").read_bytes(), tmp_path / "bad.tar"
    bad.write_bytes(whole[:3000])
    tars.write(tmp_path / "unlabelled.tar", [("0.png", GREY)])
    tars.write(tmp_path / "other.tar", [("0.png", GREY), ("0.cls", b"3")])
    for url, text in (
        (str(bad), "unexpected end of data"),
        (f"{tmp_path}/no.tar", "No such file"),
        (f"{web}/no.tar", ""),
        (f"{tmp_path}/unlabelled.tar", r"without an image or a label \(cls\)"),
        (f"{tmp_path}/other.tar", r"must be a class number in \[0, 3\)"),
    ):
        with pytest.raises(ValueError, match=rf"^data\.stream\.urls must .*{text}") as refusal:
            taken([f"{folder}/train-000000.tar", url], 40)
        assert url in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_pickle_among_the_members_is_never_loaded(tars, tmp_path):
    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    content = pickle.dumps(Touch())
    members = [("0.png", GREY), ("0.cls", b"1"), ("0.pyd", content), ("0.pickle", content), ("0.pth", content)]
    tars.write(tmp_path / "a.tar", members)
    assert taken(str(tmp_path / "a.tar"), 2).labels.tolist() == [1, 1]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "urls", ["pipe:cat train.tar", ["good.tar", "s3://bucket/x.tar"], "-", "https://a/'; touch ran; '.tar", []]
)
def test_addresses_that_are_not_read_are_refused_by_name(urls):
    bad = urls[-1] if isinstance(urls, list) and urls else urls
    with pytest.raises(
        ValueError, match=r"data\.stream\.urls must be paths, or URLs that begin with https://"
    ) as error:
        StreamConfig(urls, samples=1)
    assert f"got {bad!r}; " in str(error.value)
    for key, value in (("samples", 0), ("samples", 2**50), ("shuffle_buffer", 0)):
        with pytest.raises(ValueError, match=rf"^data\.stream\.{key} must be .*, got {value}"):
            StreamConfig("x.tar", **{"samples": 1, key: value})
