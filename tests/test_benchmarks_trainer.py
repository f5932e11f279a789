"""The overhead benchmark at a tiny size: both train the same, and its table is whole."""

import json

import pytest
import torch

from tests.benchmark_scripts import benchmark_script


@pytest.fixture(scope="module")
def trainer_overhead():
    with benchmark_script("trainer_overhead") as script:
        yield script


@pytest.mark.slow
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
