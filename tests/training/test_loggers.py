"""Loggers by name, and the wrapper that keeps training alive when a tracker fails."""

import csv
import logging
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import Logger
from PIL import Image

from maskgit_pl.runs.callbacks import callbacks
from maskgit_pl.runs.fitting import restore_process_state
from maskgit_pl.training import loggers as tolerant_logger
from maskgit_pl.training.loggers import LoggerSpec, TensorBoard, TolerantLogger, loggers


def wrap(spec: LoggerSpec, folder: Path, name: str = "tensorboard") -> TolerantLogger:
    folder.mkdir(parents=True, exist_ok=True)
    return TolerantLogger(spec, folder, name=name, settings={"trainer": {"max_steps": 3}, "loggers": ["csv"]})


def written(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("events.out*"))


def pass_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerant_logger.time, "monotonic", lambda: 1e12)


@pytest.fixture
def threads_end():
    """Waits for TensorBoard's thread, whose error belongs to the test that caused it."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)


@pytest.mark.usefixtures("threads_end")
@restore_process_state()
def test_a_disk_that_fails_is_one_warning_and_curves_continue_later(tmp_path, caplog, monkeypatch):
    logger = wrap(TensorBoard(), tmp_path / "run")
    logger.log_metrics({"before": 1.0}, step=1)
    logger.save()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("no folder any more")
    with caplog.at_level(logging.WARNING):
        for step in range(2, 40):
            logger.log_metrics({"lost": 1.0}, step=step)
            logger.log_image("lost", Image.new("RGB", (4, 4)), step)
        logger.save()
        logger.finalize("failed")
    (said,) = [record.message for record in caplog.records]
    assert "run: the logger tensorboard failed: " in said
    (tmp_path / "run").unlink()
    logger.log_metrics({"paused": 1.0}, step=40)
    assert not (tmp_path / "run").exists()
    pass_a_minute(monkeypatch)
    logger.log_metrics({"after": 1.0}, step=41)
    logger.finalize("success")
    assert b"after" in written(tmp_path)


class ServerDown(Logger):
    """A tracker whose server answers no request but the first one."""

    requests = 0
    name = version = None

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        ServerDown.requests += 1
        if ServerDown.requests > 1:
            raise ConnectionError("no route to \x1b[31mhost")


@dataclass(frozen=True)
class Remote(LoggerSpec):
    """A tracker of another package."""

    tracker: type[Logger] = ServerDown

    def create(self, folder: Path, *, run_id: str | None) -> Logger:
        return self.tracker()


def test_a_dead_server_costs_one_request_a_minute_and_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(ServerDown, "requests", 0)
    logger = wrap(Remote(), tmp_path, "remote")
    with caplog.at_level(logging.WARNING):
        for step in range(9):
            logger.log_metrics({"loss": 1.0}, step=step)
    assert ServerDown.requests == 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert "the logger remote failed: ConnectionError: no route to \\x1b[31mhost; training continues without it" in said
    pass_a_minute(monkeypatch)
    logger.log_metrics({"loss": 1.0}, step=9)
    assert ServerDown.requests == 3


class Silent(ServerDown):
    """A tracker whose server takes packets and answers when it likes, as behind a firewall."""

    answers = threading.Event()
    steps: tuple[int, ...] = ()
    ended = False

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert Silent.answers.wait(600)
        assert step is not None
        Silent.steps = (*Silent.steps, step)

    def finalize(self, status: str) -> None:
        Silent.ended = True


@pytest.mark.slow
def test_the_end_waits_for_the_last_write(tmp_path, monkeypatch):
    monkeypatch.setattr(tolerant_logger, "_LONGEST_WRITE", 0.1)
    for name, value in (("answers", threading.Event()), ("steps", ()), ("ended", False)):
        monkeypatch.setattr(Silent, name, value)
    logger = wrap(Remote(Silent), tmp_path, "remote")
    logger.log_metrics({"loss": 1.0}, step=7)
    assert Silent.steps == ()
    monkeypatch.setattr(tolerant_logger, "_LONGEST_WRITE", 600.0)
    threading.Timer(0.5, Silent.answers.set).start()
    logger.finalize("success")
    assert (Silent.steps, Silent.ended) == ((7,), True)


def test_a_server_that_does_not_answer_delays_no_step(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tolerant_logger, "_LONGEST_WRITE", 0.2)
    monkeypatch.setattr(Silent, "answers", threading.Event())
    monkeypatch.setattr(Silent, "steps", ())
    logger = wrap(Remote(Silent), tmp_path, "remote")
    with caplog.at_level(logging.WARNING):
        for step in range(9):
            logger.log_metrics({"loss": 1.0}, step=step)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "the logger remote has not answered for" in said
    Silent.answers.set()
    while len(Silent.steps) < 2:  # the first write, and then those that find the tracker free
        logger.log_metrics({"loss": 1.0}, step=9)
    assert Silent.steps[0] == 0
    assert set(Silent.steps[1:]) == {9}


def test_csv_writes_another_file_at_each_start(tmp_path):
    for start, value in enumerate((0.5, 0.25)):
        logger = wrap(loggers.build("csv"), tmp_path, "csv")
        logger.log_metrics({"train/loss": value}, step=start)
        logger.save()
        logger.finalize("success")
    texts = [(tmp_path / "csv" / f"version_{number}" / "metrics.csv").read_text() for number in range(2)]
    found = [list(csv.DictReader(text.splitlines())) for text in texts]
    assert found == [[{"step": "0", "train/loss": "0.5"}], [{"step": "1", "train/loss": "0.25"}]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in the databases of MLflow
@pytest.mark.parametrize("name", loggers.names())
def test_every_logger_takes_metrics_and_pictures_and_keeps_its_run(name, tmp_path, monkeypatch, caplog):
    pytest.importorskip({"wandb": "wandb", "mlflow": "mlflow"}.get(name, "lightning"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    spec = loggers.build({"name": "wandb", "mode": "offline"} if name == "wandb" else name)
    spec.check()
    run_ids, elsewhere = [], tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with caplog.at_level(logging.WARNING, logger="maskgit_pl"):
        for start in range(2):
            logger = wrap(spec, tmp_path / "run" / "transformer", name)
            logger.log_metrics({"train/loss": 1.0}, step=start)
            logger.log_image("samples", Image.new("RGB", (4, 4)), start)
            logger.save()
            run_ids.append(spec.run_id(logger._inner))
            logger.finalize("success")
            if name == "wandb":  # a killed training ends the process instead
                sys.modules["wandb"].finish()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("maskgit_pl")] == []
    assert run_ids[0] == run_ids[1]
    assert any(file.is_file() for file in tmp_path.rglob("*"))
    assert list(elsewhere.iterdir()) == []  # everything is in the folder of the run


def test_a_recipe_cannot_say_where_a_run_is_sent():
    for spec in ({"name": "mlflow", "tracking_uri": "http://there"}, {"name": "wandb", "entity": "others"}):
        with pytest.raises(ValueError, match="unknown key"):
            loggers.build(spec)


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_named_before_training(package, monkeypatch):
    monkeypatch.setattr("maskgit_pl.training.loggers.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"must have the package {package}: pip install 'maskgit_pl\[{package}\]'"):
        loggers.build(package).check()


@dataclass(frozen=True)
class Plain:
    """A class without a base."""


@pytest.mark.parametrize("registry", [loggers, callbacks], ids=lambda registry: registry.kind)
def test_a_part_that_does_not_derive_from_its_base_is_refused_by_name(registry, monkeypatch):
    monkeypatch.setitem(registry._factories, "plain", Plain)
    with pytest.raises(ValueError, match=r"'plain' must derive from maskgit_pl\.\w+\.\w+\.\w+Spec, got Plain"):
        registry.build("plain")
