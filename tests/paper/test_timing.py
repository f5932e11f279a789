import json
from pathlib import Path

import pytest
import yaml

from maskgit_pl import MaskGIT
from maskgit_pl.evaluation.evaluator import EvaluatedModel
from maskgit_pl.evaluation.ledger import Ledger
from paper import timing
from paper.timing import measure_costs
from tests.conftest import save_tiny_pretrained


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_MAX_RUNS", 2)


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
    monkeypatch.setattr(timing, "build_decoder", lambda *_, **__: pytest.fail("measured again"))
    assert measure_costs(Ledger(tmp_path / "ledger.jsonl"), models) == rows
