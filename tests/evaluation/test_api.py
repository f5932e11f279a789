"""The public functions, called from Python: what they give, and what importing them costs."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from maskgit_pl import evaluation
from maskgit_pl.evaluation import classifier
from maskgit_pl.evaluation.options import ClassifierConfig


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, maskgit_pl.evaluation\n"
        "print([name for name in ('torch', 'lightning', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", evaluation.__all__)
def test_every_public_name_exists_and_differs_from_all_modules(name: str) -> None:
    assert getattr(evaluation, name) is not None
    folder = Path(evaluation.__file__).parent
    assert not (folder / f"{name}.py").exists()
    assert not (folder / name).exists()


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'evaluat'"):
        evaluation.evaluat  # noqa: B018  # its access is what is tested
    assert import_module("maskgit_pl.evaluation.ledger").Ledger is evaluation.Ledger


@pytest.fixture
def run(tiny_pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of its own, whose classifier is trained for a moment."""
    shutil.copytree(tiny_pretrained, tmp_path / "run" / "pretrained")
    monkeypatch.setattr(classifier, "SMALL_TRAINING", ClassifierConfig(width=4, max_steps=3, batch=20))
    return tmp_path / "run"


@pytest.mark.slow
def test_the_functions_return_numbers_write_files_and_share_a_ledger(run: Path, tiny_shards: Path) -> None:
    report = evaluation.evaluate(
        run,
        data=tiny_shards,
        num_images=6,
        features=["classifier"],
        options=evaluation.EvaluationOptions(num_steps=2, likelihood_images=4, device="cpu"),
    )
    assert report.file == run / "evaluation.json"
    assert json.loads(report.file.read_text()) == report.content
    (name,) = report.content["protocol"]["features"]
    fid = report.content["samples"]["exported_guidance"][f"fid/{name}"]

    options = evaluation.ComparisonOptions(device="cpu")
    made = evaluation.compare(run, data=tiny_shards, selectors=["halton"], num_steps=[2], num_images=6, options=options)
    assert [row["selector"] for row in made.rows] == ["halton"]
    assert {path.name for path in made.folder.iterdir()} == {"comparison.md", "comparison.csv", "selectors.png"}

    search = evaluation.TuningOptions(num_steps=[2], device="cpu")
    result = evaluation.tune(run, data=tiny_shards, trials=2, num_images=6, options=search)
    assert result.winner.numbers[result.metric] <= result.before.numbers[result.metric]
    rows = evaluation.Ledger(run / "evaluation" / "ledger.jsonl").rows("samples")
    assert fid in [row["fid"] for row in rows]
    assert len({row["judge"] for row in rows}) == 1
