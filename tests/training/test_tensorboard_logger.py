"""A failed write of TensorBoard logs does not stop training."""

import logging
import shutil
import threading

import pytest
from PIL import Image

from maskgit_pl.training import tensorboard_logger
from maskgit_pl.training.tensorboard_logger import RunLogger


def written(folder) -> bytes:
    return b"".join(file.read_bytes() for file in folder.rglob("events.out*"))


@pytest.fixture
def threads_end():
    """Waits for TensorBoard's thread, whose error belongs to the test that caused it."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)


@pytest.mark.usefixtures("threads_end")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread says it too
def test_curves_go_on_when_there_is_a_place_again(tmp_path, caplog, monkeypatch):
    logger = RunLogger(tmp_path / "run", name="", version="")
    logger.log_metrics({"before": 1.0}, step=1)
    logger.experiment.flush()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").write_text("no folder any more")
    with caplog.at_level(logging.WARNING):
        for step in range(2, 40):
            logger.log_metrics({"lost": 1.0}, step=step)
            logger.log_image("lost", Image.new("RGB", (4, 4)), step)
        logger.save()
        logger.finalize("failed")
    (said,) = [record.message for record in caplog.records]
    assert "run: TensorBoard logs cannot be written: " in said
    (tmp_path / "run").unlink()
    logger.log_metrics({"paused": 1.0}, step=40)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(tensorboard_logger.time, "monotonic", lambda: 1e12)
    logger.log_metrics({"after": 1.0}, step=41)
    logger.finalize("success")
    assert b"after" in written(tmp_path)


def test_what_is_no_number_is_an_error_still(tmp_path):
    with pytest.raises(ValueError, match="not supported"):
        RunLogger(tmp_path, name="", version="").log_metrics({"x": "text"}, step=1)
