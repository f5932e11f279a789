"""The overhead benchmark at a tiny size: both train the same, and its table is whole."""

import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def trainer_overhead():
    """The script as a module; its folder is on the path, as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import trainer_overhead

        yield trainer_overhead
        for name in ("trainer_overhead", "measuring"):
            del sys.modules[name]


def test_the_trainer_and_the_bare_loop_end_with_the_same_weights(trainer_overhead, tmp_path, capsys):
    words = [
        "--num-steps",
        "32",
        "--embed-dim",
        "16",
        "--depth",
        "1",
        "--batch-size",
        "4",
        "--log-every",
        "4",
        "--repeats",
        "1",
    ]
    trainer_overhead.main([*words, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["clock"] for row in found["measured"]] == ["wall", "cpu"] * 2
    assert [row["callbacks"] for row in found["measured"]] == ["ours", "ours", "none", "none"]
    for row in found["measured"]:
        assert row["same_weights"]
        assert row["steps"] == 11
        assert min(row["bare"], row["trainer"]) > 0
    said = capsys.readouterr().out
    assert "| wall  |" in said
    assert "target: 1 ms\nLightning's loop without callbacks adds " in said
    assert torch.get_num_threads() == 1
