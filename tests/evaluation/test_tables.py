import pytest

from maskgit_pl import evaluation
from maskgit_pl.evaluation.ledger import REAL
from maskgit_pl.evaluation.tables import make_editing_page, make_generation_page


def row(model: str, network: str, **numbers: object) -> dict[str, object]:
    common = {"run": "" if model == REAL else "run-a", "num_images": 100, "real_images": 500, "num_steps": 8,
              "parameters": 850_000, "seconds_per_image": 0.015, "commit": "a" * 40, "dataset": "shoes", "data": "f00",
              "split": "val", "date": "2026-01-02", "device": "cpu"}  # fmt: skip
    return {**common, "model": model, "network": network, **numbers}


def test_pages_name_the_reference_and_the_feature_networks() -> None:
    digests = {"reference": "0123456789abcdef", "judge": "fedcba9876543210", "tokenizer": "aa" * 8,
               "transformer": "b" * 16}  # fmt: skip
    file = {"split": "", "reference_file": "imagenet.npz", "real_images": None}
    for changes, compared in (({}, "500 real images of the val split"), (file, "the statistics of imagenet.npz")):
        tasks = [row("MaskGIT", "lite0", fid=1.0, task="outpaint-right", **{**digests, **changes})]
        for page in (make_generation_page(tasks, []), make_editing_page(tasks)):
            said = " ".join(page.markdown.split())
            assert f"compared with {compared}" in said
            assert f"Reference: {changes.get('reference_file', 'the val split')} 01234567." in said
            assert "feature networks: lite0 fedcba98." in said
            assert "`run-a` tokenizer aaaaaaaa, transformer bbbbbbbb." in said


def test_a_table_is_made_in_one_process_of_at_least_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="table 2 must have at least one run"):
        evaluation.table_2([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="table 3 must run in one process"):
        evaluation.table_3(["runs/a"])
