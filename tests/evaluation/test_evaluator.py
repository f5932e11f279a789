import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskgit_pl.data import ShardData
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.bench import bench as module
from maskgit_pl.evaluation.bench.bench import Bench, Judge, Subject
from maskgit_pl.evaluation.bench.ledger import Row
from maskgit_pl.evaluation.cas import CASConfig
from maskgit_pl.evaluation.classifier import Accuracy
from maskgit_pl.evaluation.features import extract
from maskgit_pl.evaluation.reference import Reference, obtain_references, read_references
from maskgit_pl.pipeline import MaskGIT
from tests.conftest import save_tiny_pretrained, save_uneven_shards
from tests.evaluation.feature_networks import few, pictures

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
    reference_images: int | None = None
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
    "reference": ["train", "a.npz", "b.npz"],
    "reference_images": [10],
    "weights": [1],
    "config": ["num_heads", "mask_schedule", "class_names"],
    "decoding": [DecodingConfig(3), DecodingConfig(2, "halton"), DecodingConfig(2, top_k=3)],
    "num_images": [9],
    "seed": [1],
    "draws": [2],
    "task": ["inpaint-centre"],
    "cas": [replace(QUICK, max_steps=3), replace(QUICK, batch=5), replace(QUICK, peak_rate=0.5),
            replace(QUICK, weight_decay=0.5), replace(QUICK, flip_probability=0.5), replace(QUICK, width=8),
            replace(QUICK, precision="bf16-mixed"), replace(QUICK, seed=1)],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """Models of other weights and configurations, other data, and two files of as many images."""
    folder = tmp_path_factory.mktemp("bench")
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
    """The row of a measurement, made or found by a bench of its own, as another command would."""
    data = ShardData(str(folder / case.data), image_size=case.image_size, in_channels=1, validation_batch=10)
    data.setup()
    judge = few(seed=case.judge_seed, knows_classes=case.knows_classes)
    if case.reference.endswith(".npz"):  # of three channels
        found = read_references(folder / case.reference, [few(channels=3)])
    else:
        how = {"split": case.reference, "num_images": case.reference_images}
        found = obtain_references(folder / "kept", data, [judge], **how)
    bench = Bench(
        data,
        dataset=case.data,
        judges={"classifier": Judge(judge, found["classifier"])},
        results=results,
        bars=lambda title, total: lambda count: None,
    )
    pretrained = folder / f"model-{case.weights}{case.config}"
    pipe = MaskGIT.from_pretrained(pretrained, decoding=case.decoding)
    row: Row = KINDS[kind][0](bench, Subject("run", pipe, pretrained, results / "images"), case)
    return row


def samples(bench: Bench, subject: Subject, case: Case) -> Row:
    how = {"num_images": case.num_images, "seed": case.seed}
    return bench.samples(subject, case.decoding, networks=["classifier"], **how)["classifier"]


def real(bench: Bench, subject: Subject, case: Case) -> Row:
    return bench.real(num_images=case.num_images, networks=["classifier"])["classifier"]


def editing(bench: Bench, subject: Subject, case: Case) -> Row:
    how = {"num_images": case.num_images, "seed": case.seed}
    return bench.editing(subject, case.task, networks=["classifier"], **how)[0]


def likelihood(bench: Bench, subject: Subject, case: Case) -> Row:
    return bench.likelihood(subject, num_images=case.num_images, draws=case.draws, seed=case.seed)


def score(bench: Bench, subject: Subject, case: Case) -> Row:
    return bench.cas(subject, case.decoding, case.cas, num_images=case.num_images, seed=case.seed)


def score_of_real(bench: Bench, subject: Subject, case: Case) -> Row:
    return bench.cas(None, None, case.cas, num_images=case.num_images, seed=case.seed)


JUDGED = ("data", "judge_seed", "knows_classes", "reference", "reference_images", "num_images")
MODEL = ("weights", "config", "seed")
KINDS: dict[str, tuple[Callable[[Bench, Subject, Case], Row], str, set[str]]] = {  # the file, and what decides a row
    "samples": (samples, "samples.csv", {*JUDGED, *MODEL, "decoding"}),
    "real images": (real, "samples.csv", {*JUDGED, "image_size"}),
    "editing": (editing, "editing.csv", {*JUDGED, *MODEL, "decoding", "task"}),
    "likelihood": (likelihood, "likelihood.csv", {"data", "num_images", *MODEL, "draws"}),
    "CAS": (score, "cas.csv", {"data", "num_images", *MODEL, "decoding", "cas"}),
    "CAS of real images": (score_of_real, "cas.csv", {"data", "image_size", "num_images", "seed", "cas"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_reused_where_nothing_changed_and_measured_anew_where_anything_did(
    folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "classification_accuracy", lambda *_, **__: Accuracy(0.5, 1.0, 24))
    monkeypatch.setattr(module, "distances", lambda *_: {"fid": 1.0})  # keys do not depend on what comes out
    monkeypatch.setattr(module, "describe_environment", lambda: {"commit": None})
    _, file, decides = KINDS[kind]

    def rows(case: Case) -> int:
        measure(kind, case, folder, tmp_path)
        return len((tmp_path / file).read_text().splitlines())

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


def test_two_references_of_as_many_images_give_two_rows_that_name_them(folder: Path, tmp_path: Path) -> None:
    first, second = (measure("samples", Case(reference=name), folder, tmp_path) for name in ("a.npz", "b.npz"))
    assert first["real_images"] == second["real_images"] == "24"
    assert first["fid"] != second["fid"]
    assert (first["split"], first["reference_file"], second["reference_file"]) == ("", "a.npz", "b.npz")
    val = measure("samples", Case(), folder, tmp_path)
    assert (val["split"], val["reference_file"]) == ("val", "")


def test_a_reference_that_does_not_say_where_it_is_from_is_refused() -> None:
    features = extract([few()], [(pictures(6), torch.arange(6))])["classifier"]
    with pytest.raises(ValueError, match="reference of classifier: must have an origin"):
        Judge(few(), Reference.of(features))
