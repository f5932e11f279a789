"""The registry of metrics, and a metric of another package in everything that measures and prints."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from maskgit_pl import evaluation
from maskgit_pl.cli import main
from maskgit_pl.evaluation.extractors import ImageFeatures
from maskgit_pl.evaluation.metrics import (
    ComparedImages,
    FeatureMetric,
    compute_metrics,
    computed_metrics,
    direction,
    find_metric,
    format_value,
    is_better,
    known_metrics,
    metrics,
    title,
    tuning_column,
)
from maskgit_pl.evaluation.options import ClassifierConfig
from maskgit_pl.evaluation.reference import Reference
from tests.installed_packages import install
from tests.paper.scripts import run as run_script

PAGE = Path(__file__).parents[2] / "docs" / "plug-ins.md"


def test_names_become_titles_and_values_have_their_factor() -> None:
    assert title("kid/timm:resnet18") == "KID x 1000 (timm:resnet18)"
    assert format_value("kid/lite0", 0.012345) == "12.35"
    assert title("class_agreement") == "class agreement %"
    with pytest.raises(ValueError, match="unknown metric 'fdi': did you mean 'fid'"):
        find_metric("fdi/lite0")


def test_every_metric_has_a_title_of_its_own_and_a_direction() -> None:
    known = known_metrics()
    assert len({metric.title for metric in known.values()}) == len(known)
    for name in known:
        assert is_better(name, 2.0, 1.0) == (direction(name) == "higher is better")


def test_computed_metrics_have_the_order_of_tables_and_can_be_searched_for() -> None:
    of_networks = ["fid", "sfid", "kid", "is", "precision", "recall"]
    of_tokens = ["two_sample", "two_sample_auc"]
    of_pixels = ["pixel_fid", "brightness_spread", "contrast_spread", "weave"]
    assert list(computed_metrics()) == [*of_networks, "class_agreement", "diversity", *of_tokens, *of_pixels]
    assert tuning_column("precision") == "precision/classifier"
    assert tuning_column("class_agreement") == "class_agreement"
    with pytest.raises(ValueError, match=r"metric must be one of fid, .*, diversity.*, got 'psnr_db'"):
        tuning_column("psnr_db")


@pytest.mark.parametrize(
    ("attributes", "match"),
    [
        ({}, "must define compute"),
        ({"compute": len}, "must derive from FeatureMetric and have a title"),
        (
            {"compute": len, "title": "mine", "needs": ("depth",)},
            "needs must be one of .*real_features.*, got 'depth'",
        ),
        ({"compute": len, "title": "mine", "digits": -5}, r"digits must be an integer in \[0, 20\], got -5"),
        ({"compute": len, "title": "mine", "factor": "1"}, "factor must be a number in .*, got '1'"),
    ],
)
def test_a_metric_that_breaks_the_interface_is_named(attributes: dict, match: str, monkeypatch) -> None:
    monkeypatch.setitem(metrics._factories, "mine", type("Mine", (FeatureMetric,), attributes))
    with pytest.raises(ValueError, match=f"metric 'mine'.*{match}"):
        metrics.build("mine")


def test_a_plug_in_whose_name_has_a_slash_is_left_out_with_a_warning(site: Path, monkeypatch, caplog) -> None:
    code = "from maskgit_pl.evaluation.metrics import FeatureMetric\nclass Mine(FeatureMetric):\n    title = 'mine'\n"
    install(site, name="mine", entry_points="[maskgit_pl.metrics]\na/b = mine_metric:Mine\n",
            modules={"mine_metric": f"{code}    compute = len\n"})  # fmt: skip
    assert "a/b" not in known_metrics()
    assert "metric 'a/b' must have a name without '/'" in caplog.text


def compared() -> ComparedImages:
    features = ImageFeatures("lite0", torch.randn(8, 4), None)
    return ComparedImages(features, Reference.from_features(features), torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize(
    "value", ["high", (1.0,), (1.0, "x"), torch.ones(2), ValueError("broken"), SystemExit(3)], ids=repr
)
def test_a_metric_of_a_plug_in_that_fails_is_left_out_alone(value: object, caplog) -> None:
    class Mine(FeatureMetric):
        title = "mine"

        def compute(self, images: ComparedImages) -> object:
            if isinstance(value, BaseException):
                raise value
            return value

    assert list(compute_metrics({"mine": Mine(), "fid": computed_metrics()["fid"]}, compared())) == ["fid"]
    assert "metric mine raised" in caplog.text


@pytest.mark.parametrize(("value", "columns"), [
    (None, {"mine": None}), (float("nan"), {"mine": None}), ((1.0, float("nan")), {"mine": 1.0}),
    ((1.0, 0.5), {"mine": 1.0, "mine_deviation": 0.5}),
])  # fmt: skip
def test_a_metric_has_a_value_and_perhaps_a_deviation(value: object, columns: dict) -> None:
    metric = type("Mine", (FeatureMetric,), {"title": "mine", "compute": lambda self, images: value})()
    assert compute_metrics({"mine": metric}, compared()) == columns


@pytest.fixture
def run(tiny_pretrained: Path, tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose classifier is trained for a moment, and the metric of the documentation, installed."""
    package = PAGE.read_text().split("## A metric")[1]
    code = package.split("```python\n")[1].split("```")[0]
    # Not the name of the documentation: who follows it here may have registered that one.
    points = "[maskgit_pl.metrics]\npackaged = nearest_image:NearestImage\n"
    install(tmp_path / "site", name="nearest-image", entry_points=points, modules={"nearest_image": code})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_pretrained, tmp_path / "run" / "pretrained")
    quick = ClassifierConfig(width=4, max_steps=3, batch=20)
    shared = tmp_path / f"{tiny_shards.name}-classifier" / "small"
    evaluation.train_classifier(tiny_shards, config=quick, device="cpu", out=shared)
    return tmp_path / "run"


@pytest.mark.slow
def test_a_metric_of_another_package_is_measured_printed_and_searched_for(run: Path, tiny_shards: Path, capsys) -> None:
    options = evaluation.EvaluationOptions(
        data=tiny_shards, num_images=6, features=["classifier"], num_steps=2, likelihood_images=4, device="cpu"
    )
    report = evaluation.evaluate(run, options)
    values = json.loads((run / "evaluation.json").read_text())["samples"]["exported_guidance"]
    assert values["packaged/classifier"] > 0
    console = Console(width=200, record=True)
    console.print(report.table())
    shown = rf"nearest real image \(classifier\) +│ +{values['packaged/classifier']:.3f} "
    assert re.search(shown, console.export_text())
    rows = evaluation.Ledger(run / "evaluation" / "ledger.jsonl").rows("samples")
    assert values["packaged/classifier"] in [row["packaged"] for row in rows]

    common = [str(run), "--data", str(tiny_shards), "--num-images", "6", "--device", "cpu"]
    words = [*common, "--features", "classifier", "--cas-model", "none", "--results", "res"]
    assert run_script("table_1", *words) == 0
    page = next(Path("res").glob("*/table-1.md")).read_text()
    assert "nearest real image" in page
    assert main(["tune", *common, "--trials", "2", "--metric", "packaged"]) == 0
    assert "nearest real image" in (run / "tuning" / "tuning.md").read_text()
    capsys.readouterr()
    assert main(["plugins", "metrics"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^metrics +packaged +nearest-image +nearest_image:NearestImage$", shown, re.MULTILINE)
