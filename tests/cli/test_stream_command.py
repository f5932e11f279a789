"""``maskgit train`` on ``data.source: stream``, as a user calls it, from a web server of this machine."""

import functools
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from maskgit_pl.training.checkpoints import newest_checkpoint
from tests.cli.commands import Answer, refused
from tests.conftest import save_uneven_shards, tiny_flags


class Counting(http.server.SimpleHTTPRequestHandler):
    """Notes what is asked for."""

    asked: list[str]

    def log_message(self, *_: object) -> None:
        self.asked.append(self.path)


class Server(NamedTuple):
    """A folder of shards, its address, and what was asked of it."""

    folder: Path
    address: str
    asked: list[str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a folder of shards."""
    folder = save_uneven_shards(tmp_path_factory.mktemp("web") / "shards", (7, 5, 9, 4), (3, 8))
    asked: list[str] = []
    handler = type("Handler", (Counting,), {"asked": asked})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    ) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield Server(folder, f"http://127.0.0.1:{running.server_port}", asked)
        running.shutdown()


@pytest.fixture
def train(server, maskgit: Callable[..., Answer], tiny_pretrained: Path, tmp_path: Path) -> Callable[..., Answer]:
    """Trains a stage of the run ``one`` on a stream, with the classes and the val split of the folder of the shards."""

    def call(stage: str, *more: str) -> Answer:
        tiny = [word for word in tiny_flags(stage) if "num_classes" not in word]  # the folder says
        tokenizer = ("--tokenizer", str(tiny_pretrained / "tokenizer")) if stage == "transformer" else ()
        streams = (
            "--data.source=stream", "--data.stream.samples=25", "--data.stream.shuffle_buffer=5",
            f"--data.stream.urls={server.address}/train-{{000000..000003}}.tar",
        )  # fmt: skip
        where = ("--data", str(server.folder), "--runs-folder", str(tmp_path), "--run", "one")
        return maskgit("train", stage, *where, *tokenizer, *tiny, *streams, *more)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_stage_trains_from_a_stream_and_goes_on(server, train, tmp_path, stage):
    server.asked.clear()
    assert "a resumed run starts another order of shards" in train(stage, "--trainer.max_steps=3").out
    assert {path.split("-")[0] for path in server.asked} == {"/train"}
    assert newest_checkpoint(tmp_path / "one" / stage / "checkpoints").name == "step-00000003"
    assert (tmp_path / "one" / "pretrained" / stage / "model.safetensors").is_file()
    if stage == "transformer":
        config = json.loads((tmp_path / "one" / "pretrained" / stage / "config.json").read_text())
        assert config["class_names"] == ["0", "1", "2"]
    assert train(stage, "--trainer.max_steps=5").code == 0
    assert newest_checkpoint(tmp_path / "one" / stage / "checkpoints").name == "step-00000005"
    assert train(stage, "--trainer.max_steps=6", "--data.stream.urls=other.tar").code == 2  # other data is another run


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ("--data.stream.urls=pipe:cat x", "'pipe:cat x'"),
        ("--data=nowhere", "data nowhere: no such folder"),
        ("--data.stream.urls=nowhere.tar", "stream nowhere.tar: cannot be read: FileNotFoundError"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(train, more, part):
    refused(train("transformer", more), part)
