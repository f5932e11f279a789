"""``maskgit train`` on ``data.source: stream``, as a user calls it, from a web server of this machine."""

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maskgit_pl.training.checkpoints import newest_checkpoint
from tests.cli.commands import Answer, refused
from tests.conftest import save_uneven_shards, tiny_flags


class Counting(http.server.SimpleHTTPRequestHandler):
    """Notes what is asked for."""

    asked: list[str]

    def log_message(self, *_: object) -> None:
        self.asked.append(self.path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The address of a folder of shards, and what was asked of it."""
    folder = save_uneven_shards(tmp_path_factory.mktemp("web") / "shards", (7, 5, 9, 4), (3, 8))
    asked: list[str] = []
    handler = type("Handler", (Counting,), {"asked": asked})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    ) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


@pytest.fixture
def train(server, maskgit: Callable[..., Answer], tiny_pretrained: Path, tmp_path: Path) -> Callable[..., Answer]:
    """Trains a stage of the run ``one`` on streams only, without a data folder."""

    def call(stage: str, *more: str) -> Answer:
        tiny = [word for word in tiny_flags(stage) if "num_classes" not in word]  # the stream says
        tokenizer = ("--tokenizer", str(tiny_pretrained / "tokenizer")) if stage == "transformer" else ()
        streams = (
            "--data.source=stream", "--data.stream.samples=25", "--data.stream.classes=[boot, shirt, trouser]",
            f"--data.stream.urls={server[0]}/train-{{000000..000003}}.tar", "--data.stream.shuffle_buffer=5",
            f"--data.stream.validation_urls={server[0]}/val-{{000000..000001}}.tar",
        )  # fmt: skip
        where = ("--dataset", "remote", "--runs-folder", str(tmp_path), "--run", "one")
        return maskgit("train", stage, *where, *tokenizer, *tiny, *streams, *more)

    return call


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_a_stage_trains_from_a_stream_and_goes_on(server, train, tmp_path, stage):
    server[1].clear()
    assert "a resumed run starts another order of shards" in train(stage, "--trainer.max_steps=3").out
    assert {path.split("-")[0] for path in server[1]} == {"/train", "/val"}
    assert newest_checkpoint(tmp_path / "one" / stage / "checkpoints").name == "step-00000003"
    assert (tmp_path / "one" / "pretrained" / stage / "model.safetensors").is_file()
    if stage == "transformer":
        assert "boot" in (tmp_path / "one" / "pretrained" / stage / "config.json").read_text()
    assert train(stage, "--trainer.max_steps=5").code == 0
    assert newest_checkpoint(tmp_path / "one" / stage / "checkpoints").name == "step-00000005"
    assert train(stage, "--trainer.max_steps=6", "--data.stream.urls=other.tar").code == 2  # other data is another run


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ("--data.stream.urls=pipe:cat x", "'pipe:cat x'"),
        ("--data.stream.classes=null", "remote"),  # neither the stream nor a data folder says
        ("--data.validation_samples=null", "data.validation_samples must be given"),
        ("--data=nowhere", "data nowhere: no such folder"),
        ("--data.stream.urls=nowhere.tar", "stream nowhere.tar: cannot be read: FileNotFoundError"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(train, more, part):
    refused(train("transformer", more), part)
