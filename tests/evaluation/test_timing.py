import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maskgit_pl import MaskGIT
from maskgit_pl.decoding import DecodingStep
from maskgit_pl.evaluation import timing
from maskgit_pl.evaluation.evaluator import EvaluatedModel
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.evaluation.timing import METHODS, measure_costs, measure_timings
from maskgit_pl.networks.transformer import TransformerConfig
from tests.conftest import save_tiny_pretrained
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
    assert rows[0]["network"].startswith(
        "bert, codebook_size 16, num_classes 3, num_token_groups 1, embed_dim 16, depth 1"
    )
    assert (rows[0]["torch"], rows[0]["dtype"], rows[0]["kind"]) == (torch.__version__, "float32", "cpu")
    monkeypatch.setattr(timing, "_build_random_decoders", lambda *given: pytest.fail("measured again"))
    assert measure(file, num_tokens=(4, 16)) == rows


@pytest.mark.parametrize("sizes", [TINY, small_config("adaln", num_registers=0)], ids=["bert", "adaln"])
def test_all_methods_decode_whole_images_and_a_cache_changes_none(sizes):
    last: dict[str, DecodingStep] = {}
    for name, decode in timing._build_random_decoders(sizes, 16, 8, torch.device("cpu")).items():
        *_, last[name] = decode()
    assert all(step.tokens.shape == (1, 16) and not step.still_masked.any() for step in last.values())
    assert torch.equal(last[METHODS[1]].tokens, last[METHODS[2]].tokens)


def test_a_point_of_another_machine_version_or_network_is_measured_again(tmp_path, monkeypatch):
    file = tmp_path / "ledger.jsonl"
    monkeypatch.setattr(timing, "_build_random_decoders", lambda *given: dict.fromkeys(METHODS, lambda: iter(())))
    for changed in ("torch", "dtype", "device", "network"):
        file.unlink(missing_ok=True)
        measure(file)
        rows = list(map(json.loads, file.read_text().splitlines()))
        file.write_text("".join(json.dumps({**row, changed: "another"}) + "\n" for row in rows))
        measure(file)
        assert len(file.read_text().splitlines()) == 6
    configs = (small_config("adaln", num_registers=0, depth=depth) for depth in (2, 3))
    assert len({timing._describe(config) for config in (TINY, *configs, replace(TINY, num_token_groups=2))}) == 4


def test_a_model_is_timed_in_both_batches_once_and_equal_recipes_are_its_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    for number, (attention, steps) in enumerate([("bidirectional", 9), ("bidirectional", 9), ("bidirectional", 8),
                                                 ("causal", 9)]):  # fmt: skip
        run = tmp_path / f"run-{number}"
        folder = save_tiny_pretrained(run / "pretrained", seed=number, attention=attention)
        (run / "transformer").mkdir()
        recipe = {"data": {"seed": number, "token_store": f"{run}/tokens"}, "trainer": {"max_steps": steps}}
        (run / "transformer" / "config.yaml").write_text(yaml.safe_dump(recipe))
        models.append(EvaluatedModel(run.name, MaskGIT.from_pretrained(folder), folder, run / "evaluation"))
    file = tmp_path / "run-0" / "transformer" / "training_time.json"
    file.write_text(json.dumps({"steps": 9, "cost": 290.2, "device": "a CPU", "is_cpu": True}))

    rows = measure_costs(Ledger(tmp_path / "ledger.jsonl"), models)
    same, again, longer, causal = (row["settings"] for row in rows)
    assert same == again
    assert len({same, longer, causal}) == 3
    assert (rows[0]["backbone"], rows[0]["training_seconds"], rows[1]["training_seconds"]) == ("bert", 290.2, None)
    assert all(row["batch_1"] > 0 and row["batch_64"] > 0 for row in rows)
    monkeypatch.setattr(timing, "_build_decoder", lambda *_, **__: pytest.fail("measured again"))
    assert measure_costs(Ledger(tmp_path / "ledger.jsonl"), models) == rows
