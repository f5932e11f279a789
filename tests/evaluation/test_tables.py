import csv
import io

import pytest

from maskgit_pl import evaluation
from maskgit_pl.evaluation.ledger import REAL
from maskgit_pl.evaluation.tables import make_editing_page, make_generation_page


def row(model: str, network: str, **numbers: object) -> dict[str, object]:
    common = {"run": "" if model == REAL else "run-a", "num_images": 100, "real_images": 500, "num_steps": 8,
              "parameters": 850_000, "seconds_per_image": 0.015, "commit": "a" * 40, "dataset": "shoes", "data": "f00",
              "split": "val", "date": "2026-01-02", "device": "cpu"}  # fmt: skip
    return {**common, "model": model, "network": network, **numbers}


def test_each_network_has_a_table_of_its_own() -> None:
    page = make_generation_page(
        [row("MaskGIT", "classifier", fid=1.234, **{"is": 5.5}), row(REAL, "classifier", fid=0.1, **{"is": 9.0}),
         row("MaskGIT", "lite0", fid=77.7), row(REAL, "lite0", fid=66.6)],
        [{**row("MaskGIT", ""), "classifier": "resnet18", "training_images": 5000, "training_steps": 400,
          "top1": 0.8, "top5": 0.99}],
    )  # fmt: skip
    of_classifier, of_lite0 = page.markdown.split("## In the features of ")[1:]
    assert "FID (classifier)" in of_classifier
    assert "1.23" in of_classifier
    assert "77.70" not in of_classifier
    assert "IS" not in of_lite0.split("## ")[0]  # lite0 does not know the classes
    assert "80.00" in of_lite0
    read = list(csv.DictReader(io.StringIO(page.csv)))
    assert [each["fid"] for each in read] == ["1.234", "0.1", "77.7", "66.6", ""]


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
