"""A training restores all that it changes in its process."""

import gc
import logging
import random
import signal
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from maskgit_pl import processes, runs
from maskgit_pl.training.stopping import StepCheck
from tests.runs.test_fitting import recipe


def state() -> dict[str, object]:
    """Returns the settings of the process that results or messages may depend on."""
    loggers = [logging.getLogger(name) for name in (None, "maskgit_pl", "lightning", "lightning.pytorch")]
    return {
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cudnn.allow_tf32,
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),  # the global generator
        "python": random.getstate(),
        "warnings": list(warnings.filters),
        "lightning": [(each.level, list(each.handlers), each.propagate) for each in loggers],
        "handlers": [signal.getsignal(number) for number in processes.SIGNALS],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (
            {"trainer__deterministic": True, "cpu_threads": 3},
            {"deterministic", "tf32", "torch", "warnings", "lightning", "handlers", "threads"},
        ),
        ({"matmul_precision": "high", "trainer__benchmark": True}, {"matmul", "benchmark"}),
    ],
)
def test_the_process_is_as_before_a_training_and_its_memory_is_free(
    options, changed, tiny_shards, tmp_path, monkeypatch
):
    # The defaults, which an earlier test may have changed.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.INFO)
    inside = []
    plain = StepCheck.on_train_batch_end
    monkeypatch.setattr(StepCheck, "on_train_batch_end", lambda *args: (inside.append(state()), plain(*args))[1])
    before = state()
    runs.fit(recipe("tokenizer", **options), run=tmp_path / "run", data=tiny_shards)
    assert {name for name, value in inside[-1].items() if value != before[name]} >= changed
    assert {name for name, value in state().items() if value != before[name]} == set()
    assert [each for each in gc.get_objects() if isinstance(each, Trainer)] == []
