"""What an evaluation says: ``metrics.json`` with everything needed to repeat it, and a table for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn

from maskgit_pl.data import ShardData
from maskgit_pl.evaluation.classifier import Classifier
from maskgit_pl.evaluation.metrics import Distances, Reconstruction
from maskgit_pl.evaluation.protocol import Protocol, RealImages, Samples
from maskgit_pl.files import write_atomically
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.training.environment import describe_environment

__all__ = ["as_report", "as_table", "save_report"]


def as_report(
    pipe: MaskGIT,
    data: ShardData,
    protocol: Protocol,
    *,
    reconstruction: Reconstruction,
    classifier: Classifier,
    real: RealImages,
    floor: Distances,
    guided: Samples,
    unguided: Samples,
) -> dict[str, Any]:
    """All numbers, in plain values.

    Args:
        pipe: The model.
        data: The real images.
        protocol: How it was measured.
        reconstruction: Of the tokenizer.
        classifier: The judge.
        real: What it says about real images.
        floor: The distance of as many real images.
        guided: With the model's own guidance.
        unguided: Without.
    """
    return {
        "protocol": {
            **asdict(protocol),
            "num_images": len(guided.labels),
            "data": data.summary.fingerprint,
            "split": "val",
            "mask_schedule": repr(pipe.transformer.mask_schedule),
            "decoding": asdict(pipe.decoding),
            "classifier": asdict(classifier.config),
        },
        "reconstruction": asdict(reconstruction),
        "samples": {"exported_guidance": _plain(guided), "without_guidance": _plain(unguided)},
        "classifier": {"accuracy_on_real_images": real.accuracy, "real_images": len(real.labels)},
        "real_against_real": {"fid/classifier": floor.fid, "kid/classifier": floor.kid, "images": floor.images},
        "model": _sizes(pipe),
        "environment": {**describe_environment(), "device": str(pipe.device)},
    }


def save_report(report: Mapping[str, Any], path: Path) -> None:
    """Writes the JSON file, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as file:
        file.write((json.dumps(report, indent=2) + "\n").encode())


def as_table(report: Mapping[str, Any]) -> Table:
    """The numbers that people ask for first."""
    protocol, samples = report["protocol"], report["samples"]
    guided, unguided = samples["exported_guidance"], samples["without_guidance"]
    rebuilt, judge, model = report["reconstruction"], report["classifier"], report["model"]
    table = Table(title=f"{protocol['num_images']} images, {protocol['num_steps']} steps, seed {protocol['seed']}")
    for column, justify in (("", "left"), ("model's guidance", "right"), ("no guidance", "right"), ("real", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]  # one of rich's literals
    agreement = (guided["class_agreement"], unguided["class_agreement"], judge["accuracy_on_real_images"])
    table.add_row("class agreement", *(f"{value:.1%}" for value in agreement))
    table.add_row("diversity, of real images'", f"{guided['diversity']:.2f}", f"{unguided['diversity']:.2f}", "1.00")
    floor = report["real_against_real"]
    for name, digits in (("fid/classifier", 2), ("kid/classifier", 4)):
        values = (guided[name], unguided[name], floor[name])
        table.add_row(f"{name}, {protocol['num_images']} images", *(f"{value:.{digits}f}" for value in values))
    table.add_row(
        "milliseconds an image",
        *(f"{1000 * part['seconds_per_image']:.1f}" for part in (guided, unguided)),
        "",
        end_section=True,
    )
    table.add_row(f"reconstruction PSNR, {rebuilt['images']} images", f"{rebuilt['psnr_db']:.2f} dB")
    table.add_row("codes used", f"{rebuilt['codebook_usage']:.1%} of {model['num_codes']}")
    table.add_row("tokens of an image", " x ".join(map(str, model["grid"])))
    parameters = (model["tokenizer_parameters"], model["transformer_parameters"])
    table.add_row("parameters", " + ".join(f"{count / 1e6:.2f} M" for count in parameters))
    return table


def _plain(samples: Samples) -> dict[str, Any]:
    return {"guidance_scales": list(samples.guidance_scales), **samples.numbers()}


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
