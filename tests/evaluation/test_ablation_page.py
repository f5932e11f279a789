from collections.abc import Mapping
from typing import Any

import pytest

from maskgit_pl.evaluation.ablation_page import chance_of_separation, compare_seeds, make_ablation_page

PROTOCOL = {
    "dataset": "shoes",
    "stage": "transformer",
    "variants": ["base", "depth=2", "depth=6"],
    "base": {"depth": 4},
    "seeds": [0, 1],
    "num_images": 100,
    "first": "classifier",
    "compared": "500 real images of the val split",
    "decoding": "T 8, confidence",
    "machine": "a CPU, torch 2",
}


def row(
    variant: str, seed: int, fid: float | None, protocol: Mapping[str, Any] = PROTOCOL, **columns: Any
) -> dict[str, Any]:
    numbers = {} if fid is None else {"fid/classifier": fid, "fid/lite0": 10 * fid, "precision/classifier": 0.7,
               "precision/lite0": 0.6, "bits_per_token": fid + 2, "class_agreement": 0.5}  # fmt: skip
    return {"ablation": "ablation-depth", "variant": variant, "seed": seed, "numbers": numbers,
            "protocol": protocol, "dataset": "shoes", "run": f"run-{variant}-{seed}", "max_steps": 400,
            "global_batch": "64", "training_seconds": 104.2, "parameters": 850_000,
            "real": {"fid/classifier": 0.11}, **columns}  # fmt: skip


def test_failed_runs_are_listed_and_the_others_shown() -> None:
    failed = {"failure": "model.network.depth must be >= 1, got 0", "run": None}
    rows = [row(variant, seed, 2.0) for variant in ("base", "depth=6") for seed in (0, 1)]
    rows += [row("depth=2", seed, None, **failed) for seed in (0, 1)]
    page = make_ablation_page("ablation-depth", rows).markdown
    assert "\n| depth=2 | failed |" in page.split("## Results")[1]
    assert "- depth=2, seed 1: model.network.depth must be &gt;= 1, got 0" in page
    assert "## Results" not in make_ablation_page("x", [row("base", 0, None, **failed)]).markdown


@pytest.mark.parametrize(("values", "reference", "verdict"), [
    ((1.0, 1.2), (2.0, 2.2), "better"),
    ((3.0, 3.2), (2.0, 2.2), "worse"),
    ((2.2, 3.0), (2.0, 2.2), "unclear"),
    ((1.0,), (2.0, 2.2), "unclear"),
])  # fmt: skip
def test_only_ranges_that_do_not_overlap_give_a_verdict(values: Any, reference: Any, verdict: str) -> None:
    assert compare_seeds("fid/classifier", values, reference) == verdict
    opposite = {"better": "worse", "worse": "better", "unclear": "unclear"}
    assert compare_seeds("recall/classifier", values, reference) == opposite[verdict]  # higher is better


def test_the_chance_of_separation_is_that_of_a_random_order() -> None:
    assert [chance_of_separation(seeds) for seeds in (1, 2, 3)] == pytest.approx([1, 1 / 3, 1 / 10])
