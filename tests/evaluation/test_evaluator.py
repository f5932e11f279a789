import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation import evaluator as module
from maskgit_pl.evaluation.classifier import Accuracy
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator, FeatureMetrics, collect_numbers
from maskgit_pl.evaluation.extractors import extract
from maskgit_pl.evaluation.ledger import Ledger, Row
from maskgit_pl.evaluation.metrics import ComparedImages
from maskgit_pl.evaluation.options import CASConfig
from maskgit_pl.evaluation.pixels import pixel_extractor
from maskgit_pl.evaluation.reference import obtain_references, read_real_labels, read_references
from maskgit_pl.pipeline import MaskGIT
from tests.conftest import save_tiny_pretrained, save_uneven_shards
from tests.evaluation.feature_networks import distances, few, open_shards, pictures

DECODING = DecodingConfig(2)
QUICK = CASConfig(model="small", width=4, max_steps=2, batch=6)


@dataclass(frozen=True)
class Case:
    """A measurement, in the parts that may change."""

    data: str = "shoes"
    image_size: int = 8
    judge_seed: int = 0
    knows_classes: bool = True
    reference: str = "val"
    weights: int = 0
    config: str = ""
    decoding: DecodingConfig = DECODING
    num_images: int = 6
    seed: int = 0
    draws: int = 1
    task: Any = "outpaint-right"
    cas: CASConfig = QUICK


CHANGES: dict[str, list[Any]] = {  # by the part, what it may become
    "data": ["hats"],
    "image_size": [4],
    "judge_seed": [1],
    "knows_classes": [False],
    "reference": ["a.npz", "b.npz"],
    "weights": [1],
    "config": ["num_heads", "mask_schedule", "class_names"],
    "decoding": [DecodingConfig(3), DecodingConfig(2, "halton"), DecodingConfig(2, top_k=3)],
    "num_images": [9],
    "seed": [1],
    "draws": [2],
    "task": ["inpaint-centre"],
    "cas": [replace(QUICK, max_steps=3), replace(QUICK, batch=5), replace(QUICK, peak_rate=0.5),
            replace(QUICK, precision="bf16-mixed"), replace(QUICK, seed=1)],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """Models of other weights and configurations, other data, and two files of as many images."""
    folder = tmp_path_factory.mktemp("evaluator")
    (folder / "shoes").symlink_to(tiny_shards)
    save_uneven_shards(folder / "hats", [30, 30], [24])
    for seed in (0, 1):
        save_tiny_pretrained(folder / f"model-{seed}", seed=seed)
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "num_heads": lambda config: config["network"].update(num_heads=4),
        "mask_schedule": lambda config: config.update(mask_schedule="cosine"),
        "class_names": lambda config: config.update(class_names=config["class_names"][::-1]),
    }
    for name, change in changes.items():
        file = save_tiny_pretrained(folder / f"model-0{name}") / "transformer" / "config.json"
        config = json.loads(file.read_text())
        change(config)
        file.write_text(json.dumps(config))
    for seed, name in enumerate(("a.npz", "b.npz")):
        np.savez(folder / name, arr_0=pictures(24, seed=seed).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())
    return folder


def measure(kind: str, case: Case, folder: Path, results: Path) -> Row:
    """The row of a measurement, made or found by an evaluator of its own, as another command would."""
    data = open_shards(folder / case.data, case.image_size)
    judge = few(seed=case.judge_seed, knows_classes=case.knows_classes)
    if case.reference.endswith(".npz"):  # of three channels
        references = read_references(folder / case.reference, [few(channels=3)], folder=folder / "kept")
    else:
        references = obtain_references(folder / "kept", data, [judge])
    networks = {"classifier": FeatureMetrics(judge, references["classifier"])}
    evaluator = Evaluator(data, dataset=case.data, networks=networks, ledger=Ledger(results / "ledger.jsonl"))
    pretrained = folder / f"model-{case.weights}{case.config}"
    pipe = MaskGIT.from_pretrained(pretrained, decoding=case.decoding)
    options = {"num_images": case.num_images, "seed": case.seed}
    return KINDS[kind][0](evaluator, EvaluatedModel("run", pipe, pretrained, results / "images"), case, options)


JUDGED = ("data", "judge_seed", "knows_classes", "reference", "num_images")
MODEL = ("weights", "config", "seed")
KINDS: dict[str, tuple[Callable[[Evaluator, EvaluatedModel, Case, dict], Row], set[str]]] = {  # and what decides a row
    "samples": (lambda e, m, c, options: e.measure_samples(m, c.decoding, **options)["classifier"],
                {*JUDGED, *MODEL, "decoding"}),
    "real images": (lambda e, m, c, _: e.measure_real(num_images=c.num_images)["classifier"], {*JUDGED, "image_size"}),
    "other images": (lambda e, m, c, options: e.measure_images("editing", m, lambda: e.read_real_images("val", 4),
                                                               columns={"task": c.task}, **options)["classifier"],
                     {*JUDGED, *MODEL, "decoding", "task"}),
    "likelihood": (lambda e, m, c, options: e.measure_likelihood(m, draws=c.draws, **options),
                   {"data", "num_images", *MODEL, "draws"}),
    "CAS": (lambda e, m, c, options: e.measure_cas(m, c.decoding, c.cas, **options),
            {"data", "num_images", *MODEL, "decoding", "cas"}),
    "CAS of real images": (lambda e, m, c, options: e.measure_cas(None, None, c.cas, **options),
                           {"data", "image_size", "num_images", "seed", "cas"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_reused_only_if_nothing_has_changed(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "classification_accuracy", lambda *_, **__: Accuracy(0.5, 1.0, 24))
    # Keys do not depend on what comes out.
    monkeypatch.setattr(module, "compute_metrics", lambda chosen, images: dict.fromkeys(chosen, 1.0))
    monkeypatch.setattr(module, "describe_environment", lambda: {"commit": None})
    decides = KINDS[kind][1]

    def rows(case: Case) -> int:
        measure(kind, case, folder, tmp_path)
        return len((tmp_path / "ledger.jsonl").read_text().splitlines())

    count, once = rows(Case()), rows(Case())
    assert once == count
    for name in (field.name for field in fields(Case)):
        if name == "image_size" and name not in decides:  # that of the model
            continue
        for value in CHANGES[name]:
            now = rows(replace(Case(), **{name: value}))
            assert (now > count) == (name in decides), (name, value)
            count = now
    assert rows(Case()) == count


def opened(folder: Path, ledger: Ledger) -> tuple[Evaluator, EvaluatedModel]:
    """An evaluator of the tiny data with labels, whose numbers are those of a classifier."""
    data, network = open_shards(folder / "shoes"), few()
    reference = obtain_references(folder / "kept", data, [network])["classifier"]
    networks = {"classifier": FeatureMetrics(network, reference, read_real_labels(data))}
    pretrained = folder / "model-0"
    evaluator = Evaluator(data, dataset="shoes", networks=networks, ledger=ledger)
    return evaluator, EvaluatedModel("run", MaskGIT.from_pretrained(pretrained), pretrained, ledger.file.parent)


def test_values_are_those_of_the_images_that_the_seeds_give(folder: Path, tmp_path: Path) -> None:
    evaluator, model = opened(folder, Ledger(tmp_path / "ledger.jsonl"))
    generated = evaluator.generate(model, DECODING, num_images=12, seed=3, title="")
    assert generated.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    images = model.pipe.generate(generated.labels.tolist(), decoding=DECODING, seed=3, output_type="pt")
    assert (generated.read(range(12)).int() - images.int()).abs().max() <= 1
    images = generated.read(range(12))
    numbers = collect_numbers(evaluator.measure_samples(model, DECODING, num_images=12, seed=3, purpose="a test"))
    network = evaluator.networks["classifier"]
    features = extract([network.extractor], [(images, torch.arange(12))])["classifier"]
    expected = distances(features, network.reference)
    for name in ("fid", "kid", "precision", "recall"):
        assert numbers[f"{name}/classifier"] == expected[name]
    agree = features.logits.argmax(1) == generated.labels
    assert numbers["class_agreement"] == float(agree.double().mean())
    assert numbers["diversity"] > 0


def test_the_floor_is_the_distance_of_the_same_number_of_real_images(folder: Path, tmp_path: Path) -> None:
    evaluator, _ = opened(folder, Ledger(tmp_path / "ledger.jsonl"))
    floor, again, all_of_them = (evaluator.measure_real(num_images=count)["classifier"] for count in (30, 30, 1000))
    assert floor == again
    assert (floor["num_images"], all_of_them["num_images"]) == (30, 60)  # there are 60
    assert 0 < all_of_them["fid"] < floor["fid"]


def test_class_agreement_of_real_images_is_that_of_held_out_ones(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(FeatureMetrics, "accuracy", 0.576)  # on the val images; those of training it knows by heart
    evaluator, model = opened(folder, Ledger(tmp_path / "ledger.jsonl"))
    assert evaluator.measure_real(num_images=30)["classifier"]["class_agreement"] == 0.576
    assert evaluator.measure_samples(model, DECODING, num_images=6, seed=3)["classifier"]["class_agreement"] != 0.576


def test_likelihoods_are_means_with_standard_errors_in_bits() -> None:
    nats = math.log(2) * torch.tensor([4.0, 12.0, 20.0], dtype=torch.float64)
    expected = {"elbo_bits_per_token": 3, "elbo_bits_per_token_error": 8 / math.sqrt(3) / 4}
    assert module._estimate("elbo_bits_per_token", nats, 1 / (math.log(2) * 4)) == pytest.approx(expected)


def test_fast_metrics_are_found_in_a_row_of_all_but_not_the_reverse(folder: Path, tmp_path: Path) -> None:
    evaluator, model = opened(folder, Ledger(tmp_path / "ledger.jsonl"))

    def measured(metrics: Any) -> dict[str, float]:
        return collect_numbers(evaluator.measure_samples(model, DECODING, num_images=12, seed=0, metrics=metrics))

    fast = measured("fast")
    assert "precision/classifier" not in fast
    assert fast.items() <= {**measured("all"), "seconds_per_image": fast["seconds_per_image"]}.items()
    assert "precision/classifier" in measured("fast")
    assert len(evaluator.ledger.rows("samples")) == 2


def test_tokens_and_pixels_are_compared_once_beside_the_classifier(folder: Path, tmp_path: Path, monkeypatch) -> None:
    evaluator, model = opened(folder, Ledger(tmp_path / "ledger.jsonl"))
    judge, tokenizer = evaluator.networks["classifier"], model.pipe.tokenizer
    extractors = [few("other"), pixel_extractor()]
    references = obtain_references(folder / "kept", evaluator.data, extractors)
    other, pixels = (FeatureMetrics(each, references[each.label], judge.labels) for each in extractors)
    evaluator = replace(evaluator, networks={"other": other, "classifier": judge}, pixels=pixels)
    seen: dict[str, ComparedImages] = {}

    def remember(chosen: dict[str, Any], images: ComparedImages) -> dict[str, float]:
        seen[images.generated.label] = images
        return dict.fromkeys(chosen, 1.0)

    monkeypatch.setattr(module, "compute_metrics", remember)
    rows = evaluator.measure_samples(model, DECODING, num_images=12, seed=3)
    judged = {"two_sample", "two_sample_auc", "pixel_fid", "weave"}
    assert judged <= rows["classifier"].keys()
    assert not judged & rows["other"].keys()
    assert (seen["other"].tokens, seen["other"].pixels) == (None, None)
    tokens, in_pixels = seen["classifier"].tokens, seen["classifier"].pixels
    assert tokens is not None
    assert in_pixels is not None
    assert torch.equal(tokens.real.flatten(1), tokenizer.encode(evaluator.read_real_images("val", 24)[0]))
    decoded = tokenizer.decode(tokens.sampled.flatten(1))
    assert torch.allclose(in_pixels.features[:, 0], decoded.double().mean((1, 2, 3)) / 255, atol=1e-2)

    assert judged <= evaluator.measure_real(num_images=12, model=model)["classifier"].keys()
    assert "two_sample" not in evaluator.measure_real(num_images=12)["classifier"]  # of no tokenizer
