import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maskgit_pl import evaluation
from maskgit_pl.decoding import DecodingStep
from maskgit_pl.evaluation import timing
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.evaluation.timing import METHODS, measure_timings
from maskgit_pl.networks.transformer import TransformerConfig
from tests.networks.backbone_cases import small_config

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
    assert rows[0]["network"] == "1 layers x 16, MLP 32, 2 heads, 16 codes, 3 classes"
    assert (rows[0]["torch"], rows[0]["dtype"], rows[0]["kind"]) == (torch.__version__, "float32", "cpu")
    monkeypatch.setattr(timing, "_build_decoders", lambda *given: pytest.fail("measured again"))
    assert measure(file, num_tokens=(4, 16)) == rows


@pytest.mark.parametrize("sizes", [TINY, small_config("adaln", num_registers=0)], ids=["bert", "adaln"])
def test_all_methods_decode_whole_images_and_a_cache_changes_none(sizes):
    last: dict[str, DecodingStep] = {}
    for name, decode in timing._build_decoders(sizes, 16, 8, torch.device("cpu")).items():
        *_, last[name] = decode()
    assert all(step.tokens.shape == (1, 16) and not step.still_masked.any() for step in last.values())
    assert torch.equal(last[METHODS[1]].tokens, last[METHODS[2]].tokens)


def test_a_point_of_another_machine_version_or_network_is_measured_again(tmp_path, monkeypatch):
    file = tmp_path / "ledger.jsonl"
    monkeypatch.setattr(timing, "_build_decoders", lambda *given: dict.fromkeys(METHODS, lambda: iter(())))
    for changed in ("torch", "dtype", "device", "network"):
        file.unlink(missing_ok=True)
        measure(file)
        rows = list(map(json.loads, file.read_text().splitlines()))
        file.write_text("".join(json.dumps({**row, changed: "another"}) + "\n" for row in rows))
        measure(file)
        assert len(file.read_text().splitlines()) == 6
    configs = (small_config("adaln", num_registers=0, depth=depth) for depth in (2, 3))
    assert len({timing._describe(config) for config in (TINY, *configs, replace(TINY, num_token_groups=2))}) == 4


@pytest.mark.parametrize(("options", "match"), [
    *(({"num_tokens": (4, count)}, f"num_tokens must be squares, such as 16 or 256, got {count}") for count in (-4, 2)),
    ({"sizes": small_config("adaln", num_registers=1)}, "figure 4 must have a backbone with causal attention"),
])  # fmt: skip
def test_a_wrong_option_is_refused_before_anything_is_timed(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        measure(tmp_path / "ledger.jsonl", **options)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_figure_4_takes_sizes_of_a_run_or_of_flags(tiny_pretrained: Path, tmp_path: Path) -> None:
    options = evaluation.ReportOptions(results=tmp_path, device="cpu")
    page = evaluation.figure_4(tiny_pretrained, options, num_tokens=(4,), sizes={"depth": 2})
    assert {row["network"] for row in page.rows} == {"2 layers x 16, MLP 32, 2 heads, 16 codes, 3 classes"}
