"""``evaluate`` and ``ablation`` on tokens of another tokenizer: what needs no images is measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from maskgit_pl import MaskGIT
from maskgit_pl.cli import main
from maskgit_pl.evaluation import two_sample
from maskgit_pl.evaluation.folders import open_data, open_evaluator, open_model
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.evaluation.run_folders import find_run
from maskgit_pl.runs import variants
from tests.cli.conftest import Answer, refused
from tests.conftest import tiny_flags

pytestmark = pytest.mark.slow  # 15 s
GRID, CODES, NUM_IMAGES = (2, 3, 3), 16, 600
OF_DATA = ("grid", "num_classes", "codebook_size", "source", "max_steps")
SIZES = [word for word in tiny_flags("transformer") if not any(name in word for name in OF_DATA)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of grids whose tokens are near one another, and a run of it."""
    folder, generator = tmp_path_factory.mktemp("measured"), np.random.default_rng(0)
    base, noise = generator.integers(1, CODES - 1, (2400, 1, 1, 1)), generator.integers(-1, 2, (2400, *GRID))
    np.save(folder / "tokens.npy", base + noise)
    np.save(folder / "labels.npy", np.arange(2400) % 3)
    words = ("--grid=2x3x3", f"--codebook-size={CODES}", f"--labels={folder / 'labels.npy'}")
    assert main(["data", "tokens", str(folder / "tokens.npy"), *words, f"--out={folder / 'store'}"]) == 0
    words = ("--recipe=base", "--run=run", f"--runs-folder={folder / 'runs'}", "--trainer.max_steps=4")
    assert main(["train", "transformer", f"--data={folder / 'store'}", *words, *SIZES]) == 0
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_sample, "_WIDTH", 16)


@pytest.fixture
def run(folder: Path) -> str:
    return str(folder / "runs" / "run")


def test_evaluate_measures_likelihood_and_judge(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", run, f"--num-images={NUM_IMAGES}"]) == 0
    assert "told from real" in capsys.readouterr().out
    content = json.loads((Path(run) / "evaluation.json").read_text())
    samples, real = content["samples"]["exported_guidance"], content["real_against_real"]
    assert samples["two_sample_auc"] > 0.9  # an untrained model
    assert abs(real["two_sample_auc"] - 0.5) < 0.15
    assert {name for name in samples if not name.endswith("_deviation")} == {"two_sample", "two_sample_auc"}
    assert content["likelihood"]["elbo_bits_per_token"] == pytest.approx(4, abs=0.5)  # log2 of the codes
    assert "samples.exported_guidance.two_sample |" in (Path(run) / "pretrained" / "README.md").read_text()
    assert not list(Path(run).glob("*.png"))


def test_the_judge_sees_a_planted_difference(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model "samples" real grids of the train split: as they are, and with replaced tokens."""
    folders = find_run(run)
    model = open_model(folders)
    data = open_data(folders, model.pipe)
    evaluator = open_evaluator(folders, data, Ledger(tmp_path / "ledger.jsonl"), device="cpu", batch_size=100)
    grids, labels = evaluator.read_real_images("train", NUM_IMAGES)
    order = labels.argsort(stable=True)

    def judge(made: torch.Tensor, seed: int) -> float:
        rows = iter(made[order])
        monkeypatch.setattr(
            MaskGIT, "generate_tokens", lambda _, labels, **options: torch.stack([next(rows) for _ in labels])
        )
        decoding = model.pipe.decoding
        return evaluator.measure_samples(model, decoding, num_images=NUM_IMAGES, seed=seed)["tokens"]["two_sample_auc"]

    assert abs(judge(grids, 0) - 0.5) < 0.15
    assert judge(two_sample.replace_tokens(grids, 0.3), 1) > 0.75


def test_ablation_trains_variants_and_compares_the_decodings_of_a_run(
    folder: Path, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(variants, "run_maskgit", lambda words, _: (main(words), False))  # not in a process of its own
    words = ["--seeds=0", f"--num-images={NUM_IMAGES}", "--name=page"]
    trained = ["--recipe=base", f"--data={folder / 'store'}", "--trainer.max_steps=2", *SIZES]
    for more in ([*trained, "--vary=model.mask_schedule=linear"], ["--of", run, "--vary=decoding.num_steps=2"]):
        assert main(["ablation", *more, *words]) == 0
        head, base, variant = (tmp_path / "results" / "store" / "page.csv").read_text().splitlines()
        names = head.split(",")
        assert {"two_sample", "bits_per_token"} <= {*names}
        assert base.count(",") == variant.count(",") == len(names) - 1
        assert "told from real % | bits per token" in (tmp_path / "results" / "store" / "page.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("evaluate", "RUN", "--features=lite0"), "--features must be left out for tokens of another tokenizer"),
        (("evaluate", "RUN", "--reconstruction-images=2000"), "--reconstruction-images must be left out for tokens"),
        (("ablation", "--of=RUN", "--vary=decoding.num_steps=2", "--features=lite0"), "--features must be left out"),
        (("ablation", "--of=RUN", "--num-steps=2,3"), "--num-steps must be left out for tokens"),
        (("evaluate", "RUN", "--data=OTHER"), "its grid must be"),
    ],
)
def test_options_of_images_and_other_stores_are_refused(
    folder: Path, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    other = ("--grid=3x6", f"--codebook-size={CODES}", f"--labels={folder / 'labels.npy'}", "--out=other")
    np.save("tokens.npy", np.load(folder / "tokens.npy").reshape(-1, 3, 6))
    assert main(["data", "tokens", "tokens.npy", *other]) == 0
    capsys.readouterr()
    words = tuple(word.replace("RUN", run).replace("OTHER", "other") for word in words)
    refused(Answer(main([*words]), *capsys.readouterr()), message)
