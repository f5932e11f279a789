"""The report of an evaluation: ``evaluation.json`` with everything that reproduces it, a table, findings and pictures.

The findings say which stage of the model limits its images, and which commands to run next. ``evaluate`` writes the
file and the pictures, and prints the rest.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from maskgit_pl.checks import plain_size
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.distributed import describe_environment
from maskgit_pl.errors import printable
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator, collect_numbers
from maskgit_pl.evaluation.generation import GeneratedImages, num_candidates
from maskgit_pl.evaluation.ledger import Row
from maskgit_pl.evaluation.metric_names import NETWORK_METRICS, format_value, metric_name, title
from maskgit_pl.evaluation.metrics import CLASSIFIER, FeatureMetrics
from maskgit_pl.evaluation.pages import choose_classes
from maskgit_pl.evaluation.run_folders import RunFolders, describe_held_out, read_run_recipe
from maskgit_pl.files import read_json, write_text
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.acceptance import Acceptance
from maskgit_pl.pipeline.display import Recording
from maskgit_pl.pipeline.grids import image_grid, reconstruction_grid, save_png

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "Measurements",
    "Report",
    "describe_limit",
    "find_limiting_stage",
    "make_report",
    "next_commands",
    "write_pictures",
]

_LimitingStage = Literal["tokenizer", "transformer", "neither"]

_OF_IMAGES = ("class_agreement", "diversity", "seconds_per_image")  # values of images that belong to no network
_ESTIMATES = ("masked_nll", "elbo_", "exact_")  # prefixes of likelihoods
_BITS = ("exact_bits_per_token", "elbo_bits_per_token")
_TOKENIZER_SHARE = 0.5  # of the FID of generated images
_NEAR_REAL = 1.5  # times the FID of real images
_MANY_CODES = 0.9  # fraction of the codes in use from which more codes can help
_BUDGETS, _LONGEST = ("15m", "1h"), "1h"  # recipes of the transformer
_SHOWN_OF_A_CLASS, _SHOWN_PAIRS, _ANIMATED = 8, 16, 4


@dataclass(frozen=True)
class Measurements:
    """The measurements of a report.

    Args:
        decoding: Decoding of the model.
        num_images: Number of generated images.
        seed: Seed of the first image.
        samples: Rows of the ledger by images (``exported_guidance``, ``without_guidance``, ``accepted``) and network.
        real: Rows of the same number of real images, by network.
        reconstruction: Reconstruction error of the tokenizer by name.
        likelihood: Row of the likelihood.
        cas: Rows of the classification accuracy score by training images; empty if it was not measured.
        acceptance: Rejection sampling of the ``accepted`` images; None if there are none.
    """

    decoding: DecodingConfig
    num_images: int
    seed: int
    samples: Mapping[str, Mapping[str, Row]]
    real: Mapping[str, Row]
    reconstruction: Mapping[str, float]
    likelihood: Row
    cas: Mapping[str, Row] = field(default_factory=dict)
    acceptance: Acceptance | None = None


@dataclass(frozen=True)
class Report:
    """The values of an evaluation; names of network metrics have the label as suffix, e.g. ``fid/lite0``.

    Args:
        content: Content of ``evaluation.json``, in plain values.
        file: Path of that file; the first rank writes it.
    """

    content: Mapping[str, Any]
    file: Path

    def save(self) -> None:
        """Writes the JSON file atomically."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, json.dumps(self.content, indent=2) + "\n")

    def table(self) -> Table:
        """Returns the most important values as a table for the terminal."""
        from rich.table import Table

        protocol, samples, rebuilt = (self.content[name] for name in ("protocol", "samples", "reconstruction"))
        # One column per kind of samples, and a last one for real images.
        columns = [*samples.values(), self.content["real_against_real"]]
        table = Table(title=f"{protocol['num_images']} images, {protocol['num_steps']} steps, seed {protocol['seed']}")
        table.add_column("")
        for name in (*(name.replace("_", " ") for name in samples), "real images"):
            table.add_column(name, justify="right")
        sections = [[metric_name(each, label) for each in NETWORK_METRICS] for label in protocol["features"]]
        for section in ([*_OF_IMAGES], *sections):
            # A metric that no column has is left out; each network has a section of its own.
            shown = [name for name in section if any(name in column for column in columns)]
            for name in shown:
                cells = [format_value(name, column[name]) if name in column else "" for column in columns]
                table.add_row(title(name), *cells, end_section=name == shown[-1])
                if f"r{name}" in rebuilt:  # the floor of the FID above it
                    table.add_row("  of reconstructions", format_value(name, rebuilt[f"r{name}"]))
        _add_model_rows(table, self.content)
        if "acceptance" in self.content:
            table.caption = _describe_acceptance(self.content["acceptance"])
        return table

    def findings(self) -> list[str]:
        """Returns sentences about the limiting stage, the next commands, and the images that were held out."""
        limit = self.content["limiting_stage"]
        commands = [f"    {command}" for command in limit.get("commands", [])]
        return [limit["text"], *(["To improve it:", *commands] if commands else []), self.content["held_out"]["text"]]


def _add_model_rows(table: Table, report: Mapping[str, Any]) -> None:
    rebuilt, model, likelihood = report["reconstruction"], report["model"], report["likelihood"]
    for name, row in report.get("classification_accuracy_score", {}).items():
        table.add_row(f"CAS top-1, trained on {name.replace('_', ' ')}", f"{row['top1']:.1%}")
    uniform = math.log2(model["codebook_size"])
    for name, text in (
        ("masked_nll", "NLL per masked token, nats"),
        ("elbo_bits_per_token", f"upper bound per token, bits, of {uniform:.3g}"),
        ("exact_bits_per_token", f"NLL per token, bits, of {uniform:.3g}"),
    ):
        if name in likelihood:
            table.add_row(text, f"{likelihood[name]:.3f} ± {likelihood[f'{name}_error']:.3f}")
    table.add_row(f"reconstruction PSNR, {rebuilt['images']} images", f"{rebuilt['psnr_db']:.2f} dB")
    table.add_row("reconstruction SSIM", f"{rebuilt['ssim']:.3f}" if "ssim" in rebuilt else "")
    for name, value in rebuilt.items():
        if name.startswith("lpips/"):
            table.add_row(title(name), format_value(name, value))
    table.add_row("codes used", f"{rebuilt['codebook_usage']:.1%} of {model['codebook_size']}")
    table.add_row("tokens per image", " x ".join(map(str, model["grid"])))
    parameters = (model["tokenizer_parameters"], model["transformer_parameters"])
    table.add_row("parameters", " + ".join(f"{count / 1e6:.2f} M" for count in parameters))


def _describe_acceptance(acceptance: Mapping[str, Any]) -> str:
    """Returns a sentence about the accepted images; it warns if their classifier also judges them."""
    text = (
        f"accepted: the best {acceptance['accept_rate']:.1%} of {acceptance['num_candidates']} candidates by "
        f"classifier {acceptance['classifier']}"
    )
    if acceptance["also_judges"]:
        text += (
            ", which also judges them: their class agreement and the metrics of "
            f"{', '.join(acceptance['also_judges'])} are better than the images are; compare precision, recall and "
            "diversity, and use another --accept-classifier"
        )
    return text


def make_report(
    folders: RunFolders, model: EvaluatedModel, evaluator: Evaluator, measured: Measurements, file: Path
) -> Report:
    """Returns the report of measurements, with everything that reproduces them.

    Args:
        folders: Folders of the run.
        model: The model.
        evaluator: Evaluator that made the measurements.
        measured: The measurements.
        file: Path of the report.
    """
    networks, pipe, floor = evaluator.networks, model.pipe, next(iter(measured.real.values()))
    report = {
        "protocol": {
            "num_images": measured.num_images,
            "num_steps": measured.decoding.num_steps,
            "seed": measured.seed,
            "data": evaluator.data.summary.fingerprint,
            "split": "val",
            "reference": _describe_reference(networks.values()),
            "mask_schedule": repr(pipe.transformer.mask_schedule),
            "decoding": asdict(measured.decoding),
            **_describe_negative(pipe),
            "features": {label: _describe_network(network) for label, network in networks.items()},
        },
        "reconstruction": dict(measured.reconstruction),
        "samples": {name: _collect_reported(rows) for name, rows in measured.samples.items()},
        "real_against_real": {**_collect_reported(measured.real), "images": floor["num_images"]},
        "likelihood": {
            name: value
            for name, value in measured.likelihood.items()
            if name.startswith(_ESTIMATES) or name in ("num_images", "draws")
        },
        "model": _describe_model(pipe) | {f"{name}_digest": model.identity[name] for name in ("transformer", "config")},
        "environment": {**describe_environment(), "device": str(pipe.device)},
    }
    # The class agreement of generated images is read relative to this accuracy.
    classifier = networks.get(CLASSIFIER)
    if classifier is not None and classifier.accuracy is not None and classifier.labels is not None:
        report["classifier"] = {
            "accuracy_on_real_images": classifier.accuracy,
            "real_images": len(classifier.labels),
        }
    if measured.acceptance is not None:
        count = num_candidates(measured.acceptance, measured.num_images, len(pipe.class_names))
        digest = measured.acceptance.digest
        report["acceptance"] = {
            "accept_rate": measured.num_images / count,
            "num_candidates": count,
            "classifier": measured.acceptance.name,
            "digest": digest,
            "also_judges": [label for label, network in networks.items() if network.extractor.digest == digest],
        }
    if measured.cas:
        names = ("top1", "top5", "classifier", "training_images", "training_steps", "real_images")
        report["classification_accuracy_score"] = {
            trained_on: {name: row[name] for name in names} for trained_on, row in measured.cas.items()
        }
    report["held_out"] = describe_held_out(folders.data, evaluator.data.summary)
    report["limiting_stage"] = describe_limit(report, folders.run)
    return Report(report, file)


def _describe_reference(networks: Iterable[FeatureMetrics]) -> str:
    """Returns the name of the split or file that generated images were compared with."""
    origins = [network.reference.origin for network in networks]
    return ", ".join(dict.fromkeys(origin.file or f"{origin.split} split" for origin in origins if origin is not None))


def _describe_network(network: FeatureMetrics) -> dict[str, Any]:
    features, origin = network.reference.features, network.reference.origin
    assert origin is not None
    return {
        "weights": network.extractor.digest,
        "real_images": None if features is None else len(features),
        "reference": origin.digest,
    }


def _describe_negative(pipe: MaskGIT) -> dict[str, Any]:
    """Returns the folder and the digest of the model that guidance moves away from; nothing without one."""
    negative = pipe.negative_model
    if negative is None:
        return {}
    return {"negative_model": {"folder": str(negative.folder), "digest": negative.digest}}


def _describe_model(pipe: MaskGIT) -> dict[str, Any]:
    def parameters(network: nn.Module) -> int:
        return sum(parameter.numel() for parameter in network.parameters())

    return {
        "image_size": plain_size(pipe.tokenizer.image_size),
        "grid": list(pipe.tokenizer.grid),
        "codebook_size": pipe.tokenizer.network.config.codebook_size,
        "num_classes": len(pipe.class_names),
        "tokenizer_parameters": parameters(pipe.tokenizer.network),
        "transformer_parameters": parameters(pipe.transformer.network),
        "tokenizer_fingerprint": pipe.tokenizer.fingerprint,
    }


def _collect_reported(rows: Mapping[str, Row]) -> dict[str, float]:
    return {name: value for name, value in collect_numbers(rows).items() if name != "steps_taken"}


def describe_limit(content: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Describes the limiting stage in plain values, by the FID of the first feature network.

    Args:
        content: Content of ``evaluation.json``.
        run: Run folder.

    Returns:
        ``text``: one or two sentences. ``bits_per_token`` and ``uniform_bits_per_token`` (log2 K). Where the
        reconstruction FID is known, ``stage``, ``reconstruction_share`` (a fraction of the FID) and ``commands``.
    """
    network = next(iter(content["protocol"]["features"]))
    bits = next(content["likelihood"][name] for name in _BITS if name in content["likelihood"])
    uniform = math.log2(content["model"]["codebook_size"])
    described: dict[str, Any] = {"network": network, "bits_per_token": bits, "uniform_bits_per_token": uniform}
    of_tokens = f"The transformer needs {bits:.2f} bits per val token, a uniform guess {uniform:.2f}."
    rebuilt = content["reconstruction"].get(metric_name("rfid", network))
    if rebuilt is None:  # reconstructions are compared with the val split only
        return {**described, "text": of_tokens}
    columns = content["samples"]["exported_guidance"], content["real_against_real"]
    fid, real = (column[metric_name("fid", network)] for column in columns)
    stage = find_limiting_stage(fid, rebuilt, real)
    return {
        **described,
        "stage": stage,
        "reconstruction_share": rebuilt / fid,
        "text": f"{_sentence(stage, fid, rebuilt, real)} {of_tokens}",
        "commands": next_commands(stage, run, content),
    }


def find_limiting_stage(fid: float, reconstruction_fid: float, real_fid: float) -> _LimitingStage:
    """Finds the stage that most of the FID of generated images comes from.

    The tokenizer decodes the generated tokens, so its reconstruction FID is about the FID that a perfect transformer
    would have. The rule, in this order:

    1. ``neither`` if the FID is at most 1.5 times that of as many real images: it can hardly fall further.
    2. ``tokenizer`` if the reconstruction FID is more than half of the FID: a better transformer can remove less than
       half of it.
    3. ``transformer`` otherwise.

    Args:
        fid: FID of generated images.
        reconstruction_fid: FID of reconstructed val images in the same network.
        real_fid: FID of as many real images as were generated, in the same network.
    """
    if fid <= _NEAR_REAL * real_fid:
        return "neither"
    return "tokenizer" if reconstruction_fid > _TOKENIZER_SHARE * fid else "transformer"


def _sentence(stage: _LimitingStage, fid: float, rebuilt: float, real: float) -> str:
    if stage == "neither":
        return (
            f"Neither stage limits: FID {fid:.2f} is close to {real:.2f}, that of as many real images; a larger "
            "--num-images shows smaller differences."
        )
    share = f"reconstructed real images already have FID {rebuilt:.2f}, {rebuilt / fid:.0%} of {fid:.2f}"
    return f"The {stage} limits: {share}."


def next_commands(stage: _LimitingStage, run: Path, content: Mapping[str, Any]) -> list[str]:
    """Returns the commands that improve the limiting stage in a new run.

    A tokenizer gets four times as many codes if it uses at least 90 % of them, else twice as many steps. A transformer
    gets the budget of an hour, after that twice as many steps.

    Args:
        stage: The limiting stage.
        run: Run folder.
        content: Content of ``evaluation.json``.

    Returns:
        The commands; none if neither stage limits, or the folder does not record its training.
    """
    if stage == "neither":
        return []
    file = run / stage / "environment.json"
    steps = (read_run_recipe(run / stage / "config.yaml").get("trainer") or {}).get("max_steps")
    record = read_json(file) if file.is_file() else {}
    if steps is None or not {"recipe", "dataset", "data"} <= record.keys():
        return []
    recipes = [printable(name) for name in record["recipe"]]
    dataset, data = printable(record["dataset"]), printable(record["data"])
    if stage == "tokenizer" and content["reconstruction"]["codebook_usage"] >= _MANY_CODES:
        more = [f"--model.network.codebook_size={4 * content['model']['codebook_size']}"]
    elif stage == "tokenizer" or _LONGEST in recipes:
        more = [f"--trainer.max_steps={2 * steps}"]
    else:
        recipes, more = [*(each for each in recipes if each not in _BUDGETS), _LONGEST], []
    of_run = {
        "--dataset": dataset,
        "--data": None if data == f"data/shards/{dataset}" else data,
        "--recipe": " ".join(recipes),
        "--run": f"{run.resolve().name}-more",
        "--tokenizer": f"{run}/pretrained/tokenizer" if stage == "transformer" else None,
    }
    words = [word for flag, text in of_run.items() if text for word in (flag, text)]
    later = more if stage == "transformer" else []
    commands = [["tokenize", *words, *later], ["train", "transformer", *words, *later]]
    if stage == "tokenizer":
        commands = [["train", "tokenizer", *words, *more], *commands]
    return [shlex.join(["maskgit", *each]) for each in commands]


def write_pictures(
    evaluator: Evaluator,
    pipe: MaskGIT,
    decoding: DecodingConfig,
    generated: GeneratedImages,
    *,
    folder: Path,
    seed: int,
) -> None:
    """Writes ``samples.png``, ``reconstructions.png`` and ``decoding.gif``.

    Args:
        evaluator: Evaluator whose data give the real images.
        pipe: The model.
        decoding: Decoding of the animation.
        generated: Generated images, sorted by class.
        folder: Folder of the files.
        seed: Seed of the first image of the animation.
    """
    classes = choose_classes(len(pipe.class_names))
    rows = []
    for label in classes:
        is_of_class = generated.labels == label
        start, count = int(is_of_class.nonzero()[0]), min(_SHOWN_OF_A_CLASS, int(is_of_class.sum()))
        rows.append(generated.read(range(start, start + count)))
    least = min(len(row) for row in rows)
    names = [pipe.class_names[label] for label in classes]
    folder.mkdir(parents=True, exist_ok=True)
    grid = image_grid(torch.cat([row[:least] for row in rows]), columns=least, row_captions=names)
    save_png(grid, folder / "samples.png")

    originals = evaluator.read_real_images("val", _SHOWN_PAIRS)[0]
    reconstructions = pipe.tokenizer.decode(pipe.tokenizer.encode(originals))
    save_png(reconstruction_grid(originals, reconstructions), folder / "reconstructions.png")

    shown = classes[:_ANIMATED]
    seeds = [seed + number for number in range(len(shown))]
    steps = list(pipe.steps(shown, seed=seeds, decoding=decoding))
    captions = [pipe.class_names[label] for label in shown]
    token_size = pipe.outline.token_size
    recording = Recording(
        steps, pipe.tokenizer.decode, pipe.tokenizer.grid, decoding, captions, seeds, token_size=token_size
    )
    recording.save(folder / "decoding.gif")
