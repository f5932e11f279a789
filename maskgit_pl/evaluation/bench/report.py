"""What an evaluation says: ``evaluation.json`` with everything needed to repeat it, and a table for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from maskgit_pl.data import ShardData
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.bench.bench import CLASSIFIER, Judge, Subject
from maskgit_pl.evaluation.bench.ledger import NUMBERS, Row, number
from maskgit_pl.evaluation.metrics import Reconstruction
from maskgit_pl.files import write_atomically
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.provenance import describe_environment

__all__ = ["as_report", "as_table", "save_report"]

_BY_IMAGES = ("class_agreement", "diversity", "seconds_per_image")  # of images, not of one network's features
_BY_NETWORK = (
    "fid", "sfid", "kid", "kid_deviation", "is", "is_deviation", "precision", "recall", "density", "coverage",
)  # fmt: skip


def as_report(
    subject: Subject,
    data: ShardData,
    *,
    decoding: DecodingConfig,
    num_images: int,
    seed: int,
    judges: Mapping[str, Judge],
    samples: Mapping[str, Mapping[str, Row]],
    floor: Mapping[str, Row],
    reconstruction: Reconstruction,
    likelihood: Row,
    cas: Mapping[str, Row],
) -> dict[str, Any]:
    """All numbers, in plain values; those of a network's features are named after it, as in ``fid/lite0``.

    Args:
        subject: The model.
        data: The real images.
        decoding: How it decoded.
        num_images: Images of a row.
        seed: Of the first.
        judges: The feature networks.
        samples: By how they were made, then by network: rows of the ledger.
        floor: By network: the row of as many real images.
        reconstruction: Of the tokenizer.
        likelihood: The row of the transformer.
        cas: Rows of the classification accuracy score, by what the classifier was trained on; empty where it was not
            measured.
    """
    classifier, pipe = judges.get(CLASSIFIER), subject.pipe
    report = {
        "protocol": {
            "num_images": num_images,
            "num_steps": decoding.num_steps,
            "seed": seed,
            "data": data.summary.fingerprint,
            "split": "val",
            "reference": _reference(judges),
            "mask_schedule": repr(pipe.transformer.mask_schedule),
            "decoding": asdict(decoding),
            "features": {label: _network(judge) for label, judge in judges.items()},
        },
        "reconstruction": reconstruction.numbers(),
        "samples": {name: _numbers(rows) for name, rows in samples.items()},
        "real_against_real": {**_numbers(floor), "images": int(next(iter(floor.values()))["num_images"])},
        "likelihood": {name: float(cell) for name, cell in likelihood.items() if cell and _is_likelihood(name)},
        "model": _sizes(pipe) | {f"{name}_digest": subject.identity[name] for name in ("transformer", "config")},
        "environment": {**describe_environment(), "device": str(pipe.device)},
    }
    if classifier is not None and classifier.accuracy is not None and classifier.labels is not None:
        report["classifier"] = {
            "accuracy_on_real_images": classifier.accuracy,
            "real_images": len(classifier.labels),
        }
    if cas:
        report["classification_accuracy_score"] = {name: _accuracy(row) for name, row in cas.items()}
    return report


def _network(judge: Judge) -> dict[str, Any]:
    features = judge.reference.features
    origin = judge.reference.origin
    assert origin is not None  # a judge has one
    return {
        "weights": judge.extractor.digest,
        "real_images": None if features is None else len(features),
        "reference": origin.digest,
    }


def _reference(judges: Mapping[str, Judge]) -> str:
    """Returns what generated images were compared with: a split's or a file's name."""
    origins = [judge.reference.origin for judge in judges.values()]
    return ", ".join(dict.fromkeys(origin.file or f"{origin.split} split" for origin in origins if origin is not None))


def _numbers(rows: Mapping[str, Row]) -> dict[str, float]:
    found = {}
    for label, row in rows.items():
        for name in (*_BY_IMAGES, *_BY_NETWORK):
            value = number(row, name)
            if value is not None:
                found[name if name in _BY_IMAGES else f"{name}/{label}"] = value
    return found


def _is_likelihood(name: str) -> bool:
    return name.startswith(("masked_nll", "elbo_", "exact_")) or name in ("num_images", "draws")


def _accuracy(row: Row) -> dict[str, Any]:
    numbers = {name: int(row[name]) for name in ("training_images", "training_steps", "real_images")}
    return {"top1": float(row["top1"]), "top5": float(row["top5"]), "classifier": row["classifier"], **numbers}


def save_report(report: Mapping[str, Any], path: Path) -> None:
    """Writes the JSON file, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write((json.dumps(report, indent=2) + "\n").encode())


def as_table(report: Mapping[str, Any]) -> Table:
    """The numbers that people ask for first."""
    protocol, samples = report["protocol"], report["samples"]
    columns = [*samples.values(), report["real_against_real"]]
    table = Table(title=f"{protocol['num_images']} images, {protocol['num_steps']} steps, seed {protocol['seed']}")
    table.add_column("")
    for name in (*(name.replace("_", " ") for name in samples), "as many real"):
        table.add_column(name, justify="right")
    table.add_row("class agreement", *(_shown(column, "class_agreement", "{:.1%}") for column in columns))
    table.add_row("diversity, of real images'", *(_shown(column, "diversity", "{:.2f}") for column in columns))
    speeds = [_shown(column, "seconds_per_image", "{:.1f}", factor=1000) for column in columns]
    table.add_row("milliseconds an image", *speeds, end_section=True)
    for label in protocol["features"]:
        _add_network(table, label, columns)
    _add_model(table, report)
    return table


def _shown(numbers: Mapping[str, float], name: str, form: str, *, factor: float = 1) -> str:
    return form.format(numbers[name] * factor) if name in numbers else ""


def _add_network(table: Table, label: str, columns: Sequence[Mapping[str, float]]) -> None:
    names = [name for name in NUMBERS if any(f"{name}/{label}" in column for column in columns)]
    for name in names:
        title, factor, digits = NUMBERS[name]
        cells = [_shown(column, f"{name}/{label}", f"{{:.{digits}f}}", factor=factor) for column in columns]
        table.add_row(f"{title}, {label}", *cells, end_section=name == names[-1])


def _add_model(table: Table, report: Mapping[str, Any]) -> None:
    rebuilt, model, likelihood = report["reconstruction"], report["model"], report["likelihood"]
    for name, row in report.get("classification_accuracy_score", {}).items():
        table.add_row(f"CAS top-1, trained on {name.replace('_', ' ')}", f"{row['top1']:.1%}")
    for name, title in (("masked_nll", "nats a masked token"), ("elbo_bits_per_token", "bits a token, at most"),
                        ("exact_bits_per_token", "bits a token")):  # fmt: skip
        if name in likelihood:
            table.add_row(title, f"{likelihood[name]:.3f} ± {likelihood[f'{name}_error']:.3f}")
    table.add_row(f"reconstruction PSNR, {rebuilt['images']} images", f"{rebuilt['psnr_db']:.2f} dB")
    table.add_row("reconstruction SSIM", f"{rebuilt['ssim']:.3f}" if "ssim" in rebuilt else "")
    for name, value in rebuilt.items():
        if name.startswith(("rfid/", "lpips/")):
            table.add_row(name.replace("rfid/", "reconstruction FID, "), f"{value:.2f}")
    table.add_row("codes used", f"{rebuilt['codebook_usage']:.1%} of {model['num_codes']}")
    table.add_row("tokens of an image", " x ".join(map(str, model["grid"])))
    parameters = (model["tokenizer_parameters"], model["transformer_parameters"])
    table.add_row("parameters", " + ".join(f"{count / 1e6:.2f} M" for count in parameters))


def _sizes(pipe: MaskGIT) -> dict[str, Any]:
    def parameters(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    return {
        "image_size": pipe.tokenizer.image_size,
        "grid": list(pipe.tokenizer.grid),
        "num_codes": pipe.tokenizer.network.config.num_codes,
        "num_classes": len(pipe.class_names),
        "tokenizer_parameters": parameters(pipe.tokenizer.network),
        "transformer_parameters": parameters(pipe.transformer.network),
        "tokenizer_fingerprint": pipe.tokenizer.fingerprint,
    }
