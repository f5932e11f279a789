import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.networks.transformer import TransformerConfig
from paper import figure_4, timing
from paper.figure_4 import METHODS, measure_timings
from tests.networks.backbone_cases import small_config
from tests.paper.scripts import run

TINY = TransformerConfig(16, 3, (4, 4), embed_dim=16, depth=1, num_heads=2, mlp_dim=32)


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_MAX_RUNS", 2)


def measure(file: Path, **options: Any) -> list[dict[str, Any]]:
    return measure_timings(Ledger(file), **{"sizes": TINY, "num_tokens": (4,), **options})


def test_every_method_is_timed_at_every_n_but_only_once(tmp_path, monkeypatch):
    file = tmp_path / "results" / "ledger.jsonl"
    rows = measure(file, num_tokens=(16, 4))
    assert [(row["num_tokens"], row["method"]) for row in rows] == [(n, method) for n in (4, 16) for method in METHODS]
    assert [row["num_steps"] for row in rows] == [4, 4, 4, 8, 16, 16]
    assert all(0 < row["least"] <= row["seconds_per_image"] and row["runs"] == 2 for row in rows)
    assert rows[0]["network"].startswith(
        "bert, codebook_size 16, num_classes 3, num_token_groups 1, embed_dim 16, depth 1"
    )
    assert (rows[0]["torch"], rows[0]["dtype"], rows[0]["kind"]) == (torch.__version__, "float32", "cpu")
    monkeypatch.setattr(figure_4, "_build_random_decoders", lambda *given: pytest.fail("measured again"))
    assert measure(file, num_tokens=(4, 16)) == rows


@pytest.mark.parametrize("sizes", [TINY, small_config("adaln", num_registers=0)], ids=["bert", "adaln"])
def test_all_methods_decode_whole_images_and_a_cache_changes_none(sizes):
    last: dict[str, DecodingStep] = {}
    for name, decode in figure_4._build_random_decoders(sizes, 16, 8, torch.device("cpu")).items():
        *_, last[name] = decode()
    assert all(step.tokens.shape == (1, 16) and not step.still_masked.any() for step in last.values())
    assert torch.equal(last[METHODS[1]].tokens, last[METHODS[2]].tokens)


def test_a_point_of_another_machine_version_or_network_is_measured_again(tmp_path, monkeypatch):
    file = tmp_path / "ledger.jsonl"
    monkeypatch.setattr(figure_4, "_build_random_decoders", lambda *given: dict.fromkeys(METHODS, lambda: iter(())))
    for changed in ("torch", "dtype", "device", "network"):
        file.unlink(missing_ok=True)
        measure(file)
        rows = list(map(json.loads, file.read_text().splitlines()))
        file.write_text("".join(json.dumps({**row, changed: "another"}) + "\n" for row in rows))
        measure(file)
        assert len(file.read_text().splitlines()) == 6
    configs = (small_config("adaln", num_registers=0, depth=depth) for depth in (2, 3))
    assert len({figure_4._describe(config) for config in (TINY, *configs, replace(TINY, num_token_groups=2))}) == 4


def test_a_run_sets_the_sizes(tiny_pretrained: Path, tmp_path: Path) -> None:
    assert run("figure_4", tiny_pretrained, "--results", tmp_path, "--device", "cpu", "--num-tokens", 4) == 0
    (network,) = {row["network"] for row in Ledger(tmp_path / "ledger.jsonl").rows("timing")}
    assert network.startswith("bert, codebook_size 16, num_classes 3, num_token_groups 1, embed_dim 16, depth 1")
    assert (tmp_path / "figure-4.png").is_file()
