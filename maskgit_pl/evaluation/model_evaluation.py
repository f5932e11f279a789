"""``evaluate`` measures one model.

An evaluation has three parts:

1. It opens the model, the data and the feature networks.
2. It measures reconstructions, generated and real images, the likelihood and the classification accuracy score. Several
   processes under ``torchrun`` share the work, and the ledger keeps the rows.
3. It reports: ``evaluation.json`` with everything that reproduces it, a table, pictures, and findings, which say which
   stage of the model limits its images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from maskgit_pl.checks import check_integer, plain_size
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.distributed import (
    barrier,
    default_device,
    describe_environment,
    process_group,
    rank_and_world,
)
from maskgit_pl.evaluation.classifier import check_cas, obtain_classifier
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator, collect_numbers
from maskgit_pl.evaluation.generation import GeneratedImages, delete_generated, num_candidates
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row
from maskgit_pl.evaluation.metrics import computed_metrics, format_value, metric_name, title
from maskgit_pl.evaluation.opening import (
    RunFolders,
    check_model_decoding,
    create_evaluated_model,
    describe_held_out,
    find_run,
    open_data,
    open_evaluator,
    open_model,
)
from maskgit_pl.evaluation.options import (
    CLASSIFIER,
    FEATURES,
    CASConfig,
    EvaluationOptions,
    Spec,
    round_to_classes,
)
from maskgit_pl.evaluation.pages import choose_classes
from maskgit_pl.evaluation.reconstruction import measure_reconstruction
from maskgit_pl.evaluation.reference import iter_real_batches
from maskgit_pl.files import write_text
from maskgit_pl.networks.features import LPIPS, load_lpips
from maskgit_pl.pipeline.acceptance import Acceptance
from maskgit_pl.pipeline.card import refresh_card
from maskgit_pl.pipeline.display import Recording
from maskgit_pl.pipeline.grids import image_grid, reconstruction_grid, save_png
from maskgit_pl.processes import Bars, local_rank, no_bars

__all__ = [
    "Report",
    "describe_limit",
    "evaluate",
]

_DRAWS = 4  # masks per image for likelihoods
_LIKELIHOOD = ("num_images", "draws", "masked_nll", "elbo_", "exact_")  # beginnings of the columns of the report
_BITS = ("exact_bits_per_token", "elbo_bits_per_token")
_SCORE = ("top1", "top5", "classifier", "training_images", "training_steps", "real_images")  # columns of a CAS
_TOKENIZER_SHARE = 0.5  # of the FID of generated images
_NEAR_REAL = 1.5  # times the FID of real images
_SHOWN_OF_A_CLASS, _SHOWN_PAIRS, _ANIMATED = 8, 16, 4


def evaluate(
    run: Path | str,
    *,
    data: Path | None = None,
    num_images: int = 1000,
    features: Sequence[Spec] = FEATURES,
    out: Path | None = None,
    cas: CASConfig | None = None,
    options: EvaluationOptions | None = None,
    bars: Bars = no_bars,
) -> Report:
    """Measures a model, and writes ``evaluation.json`` and pictures.

    Args:
        run: Run folder or pretrained folder.
        data: Data folder; None for the data that the run was trained on.
        num_images: Number of generated images, at least 2 per class.
        features: Feature networks: names or mappings, see ``networks.features.parse_feature_network``.
        out: Path of the JSON file, in whose folder the pictures are written; None for ``RUN/evaluation.json``.
        cas: Training of the classification accuracy score; None leaves the score out.
        options: Steps, reference, seed and other options; None for the defaults.
        bars: Progress bars.

    Returns:
        The content of the JSON file.

    Raises:
        FileNotFoundError: if the run or the data do not exist.
        TypeError: if a feature network does not accept its arguments.
        ValueError: if the classes of the data are not the model's, a network is unknown, or a number is out of range.
    """
    options = options or EvaluationOptions()
    check_integer("num_images", num_images, "[1, inf)")
    check_cas(cas)
    folders = find_run(run, data=data, classifier=options.classifier)
    file = out or folders.run / "evaluation.json"
    with process_group():  # all ranks measure; the first one writes
        plan = _open(folders, num_images, features, options, bars)
        measured = {
            "reconstruction": _measure_reconstruction(plan),
            **_measure_images(plan),
            "likelihood": _measure_likelihood(plan),
        }
        scores = {} if cas is None else {"classification_accuracy_score": _measure_cas(plan, cas)}
        content = {
            "protocol": _describe_protocol(plan),
            **measured,
            "model": _describe_model(plan.model),
            "environment": {**describe_environment(), "device": str(plan.model.pipe.device)},
            **_describe_classifier(plan.evaluator),
            **_describe_acceptance(plan),
            **scores,
            "held_out": describe_held_out(folders.data, plan.evaluator.data.summary),
        }
        report = Report({**content, "limiting_stage": describe_limit(content)}, file)
        generated = plan.generate(f"{plan.model.run}: pictures")  # the file of the measured images still exists
        if rank_and_world()[0] == 0:
            _write_pictures(plan, generated, folder=file.parent)
            report.save()
            refresh_card(folders.pretrained)
    return report


@dataclass(frozen=True)
class _Evaluation:
    """The parts of an evaluation: what is measured, and by which evaluator."""

    evaluator: Evaluator
    model: EvaluatedModel
    accepted: EvaluatedModel | None  # the model with rejection sampling
    decoding: DecodingConfig
    num_images: int
    options: EvaluationOptions
    lpips: LPIPS | None  # of reconstructions

    def generate(self, title: str) -> GeneratedImages:
        """Generates the images of the model, or opens their file."""
        return self.evaluator.generate(
            self.model, self.decoding, num_images=self.num_images, seed=self.options.seed, title=title
        )


def _open(
    folders: RunFolders, num_images: int, features: Sequence[Spec], options: EvaluationOptions, bars: Bars
) -> _Evaluation:
    """Opens model, data, ledger and networks, and checks all options that depend on them."""
    rank, world_size = rank_and_world()
    device = options.device
    if device is None and world_size > 1:  # one GPU for each process
        device = default_device(local_rank=local_rank())
    pipe = open_model(folders, device, dtype=options.dtype, negative_model=options.negative_model)
    decoding = pipe.decoding_with(num_steps=options.num_steps)
    check_model_decoding(pipe, decoding)
    data = open_data(folders, pipe, num_workers=options.num_workers)
    round_to_classes(num_images, data.num_classes, name="num_images")
    lpips = None if options.lpips is None else load_lpips(options.lpips, device=pipe.device)
    evaluator = open_evaluator(
        folders,
        pipe,
        data,
        Ledger(folders.evaluation / FILE_NAME, writes=rank == 0, reuse=options.resume),
        features=features,
        reference=options.reference,
        batch_size=options.batch_size,
        bars=bars,
    )
    barrier()  # every rank has read the ledger before the first one writes to it
    model = create_evaluated_model(folders, pipe)
    acceptance = _open_acceptance(folders, evaluator, options, num_images)
    accepted = None if acceptance is None else replace(model, acceptance=acceptance)
    return _Evaluation(evaluator, model, accepted, decoding, num_images, options, lpips)


def _open_acceptance(
    folders: RunFolders, evaluator: Evaluator, options: EvaluationOptions, num_images: int
) -> Acceptance | None:
    """Reads the classifier that accepts images; that of the data is trained if it is missing."""
    if options.accept_rate is None:
        return None
    folder = options.accept_classifier
    if folder is None:
        folder = folders.classifier
        obtain_classifier(folder, evaluator.data, replaces=folders.shares_classifier)
    acceptance = Acceptance.load(folder, options.accept_rate, device=evaluator.device)
    acceptance.check_classes(evaluator.data.class_names)
    num_candidates(acceptance, num_images, evaluator.data.num_classes)  # refuses an uneven number
    return acceptance


def _measure_reconstruction(plan: _Evaluation) -> dict[str, float]:
    """Measures reconstructions of the val split, which have no ledger row."""
    data = plan.evaluator.data
    # A reference file is not the val split.
    networks = {} if plan.options.reference is not None else plan.evaluator.networks
    return measure_reconstruction(
        plan.model.pipe.tokenizer,
        iter_real_batches(data, "val"),
        extractors=[network.extractor for network in networks.values()],
        references={label: network.reference for label, network in networks.items()},
        lpips=plan.lpips,
        on_images=plan.evaluator.bars("reconstructing", data.summary.samples["val"]),
    )


def _measure_images(plan: _Evaluation) -> dict[str, Any]:
    """Measures generated images with and without guidance and acceptance, and as many real ones."""
    evaluator, model, decoding = plan.evaluator, plan.model, plan.decoding
    options: dict[str, Any] = {"num_images": plan.num_images, "seed": plan.options.seed}
    images = {"exported_guidance": (model, decoding)}
    if any(decoding.scales()):
        images["without_guidance"] = model, model.pipe.decoding_with(decoding=decoding, guidance_scale=0)
    if plan.accepted is not None:
        images["accepted"] = plan.accepted, decoding
    if not plan.options.resume:  # images of an earlier evaluation would be reused by their file name
        for source, each in images.values():
            delete_generated(source.samples_file(each, **options))
    samples = {
        name: evaluator.measure_samples(source, each, keep=True, **options) for name, (source, each) in images.items()
    }
    real = evaluator.measure_real(num_images=plan.num_images)
    floor = next(iter(real.values()))
    numbers = {name: collect_numbers(rows) for name, rows in samples.items()}
    for values in numbers.values():
        values.pop("steps_taken", None)
    return {"samples": numbers, "real_against_real": {**collect_numbers(real), "images": floor["num_images"]}}


def _measure_likelihood(plan: _Evaluation) -> dict[str, Any]:
    row = plan.evaluator.measure_likelihood(plan.model, num_images=plan.options.likelihood_images, draws=_DRAWS)
    return {name: value for name, value in row.items() if name.startswith(_LIKELIHOOD)}


def _measure_cas(plan: _Evaluation, cas: CASConfig) -> dict[str, Row]:
    """Measures the classification accuracy score of generated, accepted and real images."""
    models = {"generated_images": plan.model, "accepted_images": plan.accepted, "real_images": None}
    rows = {
        trained_on: plan.evaluator.measure_cas(
            model, None if model is None else plan.decoding, cas, num_images=plan.num_images, seed=plan.options.seed
        )
        for trained_on, model in models.items()
        if model is not None or trained_on == "real_images"
    }
    return {trained_on: {name: row[name] for name in _SCORE} for trained_on, row in rows.items()}


def _describe_protocol(plan: _Evaluation) -> dict[str, Any]:
    pipe, networks, negative = plan.model.pipe, plan.evaluator.networks, plan.model.pipe.negative_model
    origins = [network.origin for network in networks.values()]
    protocol = {
        "num_images": plan.num_images,
        "num_steps": plan.decoding.num_steps,
        "seed": plan.options.seed,
        "data": plan.evaluator.data.summary.fingerprint,
        "split": "val",
        "reference": ", ".join(dict.fromkeys(origin.file or f"{origin.split} split" for origin in origins)),
        "mask_schedule": repr(pipe.transformer.mask_schedule),
        "decoding": asdict(plan.decoding),
    }
    if negative is not None:
        protocol["negative_model"] = {"folder": str(negative.folder), "digest": negative.digest}
    protocol["features"] = {
        label: {
            "weights": network.extractor.digest,
            "real_images": network.columns["real_images"],
            "reference": network.origin.digest,
        }
        for label, network in networks.items()
    }
    return protocol


def _describe_model(model: EvaluatedModel) -> dict[str, Any]:
    tokenizer, transformer = model.pipe.tokenizer, model.pipe.transformer
    return {
        "image_size": plain_size(tokenizer.image_size),
        "grid": list(tokenizer.grid),
        "codebook_size": tokenizer.network.config.codebook_size,
        "num_classes": len(model.pipe.class_names),
        "tokenizer_parameters": sum(each.numel() for each in tokenizer.network.parameters()),
        "transformer_parameters": sum(each.numel() for each in transformer.network.parameters()),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "transformer_digest": model.identity["transformer"],
        "config_digest": model.identity["config"],
    }


def _describe_classifier(evaluator: Evaluator) -> dict[str, Any]:
    """Describes the classifier of the data, whose accuracy the class agreement is read relative to."""
    classifier = evaluator.networks.get(CLASSIFIER)
    if classifier is None or classifier.accuracy is None or classifier.labels is None:
        return {}
    return {"classifier": {"accuracy_on_real_images": classifier.accuracy, "real_images": len(classifier.labels)}}


def _describe_acceptance(plan: _Evaluation) -> dict[str, Any]:
    if plan.accepted is None or plan.accepted.acceptance is None:
        return {}
    acceptance, networks = plan.accepted.acceptance, plan.evaluator.networks
    count = num_candidates(acceptance, plan.num_images, len(plan.model.pipe.class_names))
    judges = [label for label, network in networks.items() if network.extractor.digest == acceptance.digest]
    described = {"accept_rate": plan.num_images / count, "num_candidates": count, "classifier": acceptance.name}
    return {"acceptance": {**described, "digest": acceptance.digest, "also_judges": judges}}


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
        protocol, samples, rebuilt = (self.content[name] for name in ("protocol", "samples", "reconstruction"))
        # One column per kind of samples, and a last one for real images.
        columns = [*samples.values(), self.content["real_against_real"]]
        table = Table(title=f"{protocol['num_images']} images, {protocol['num_steps']} steps, seed {protocol['seed']}")
        table.add_column("")
        for name in (*(name.replace("_", " ") for name in samples), "real images"):
            table.add_column(name, justify="right")
        computed = computed_metrics()
        of_images = [name for name, metric in computed.items() if not metric.of_network]
        of_networks = [name for name in computed if name not in of_images]
        sections = [[metric_name(each, label) for each in of_networks] for label in protocol["features"]]
        for section in ([*of_images, "seconds_per_image"], *sections):
            # A metric that no column has is left out; each network has a section of its own.
            shown = [name for name in section if any(name in column for column in columns)]
            for name in shown:
                cells = [format_value(name, column[name]) if name in column else "" for column in columns]
                table.add_row(title(name), *cells, end_section=name == shown[-1])
                if f"r{name}" in rebuilt:  # the floor of the FID above it
                    table.add_row("  of reconstructions", format_value(name, rebuilt[f"r{name}"]))
        _add_model_rows(table, self.content)
        if "acceptance" in self.content:
            table.caption = _acceptance_caption(self.content["acceptance"])
        return table

    def findings(self) -> list[str]:
        """Returns sentences about the limiting stage and the images that were held out."""
        return [self.content["limiting_stage"]["text"], self.content["held_out"]["text"]]


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


def _acceptance_caption(acceptance: Mapping[str, Any]) -> str:
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


def describe_limit(content: Mapping[str, Any]) -> dict[str, Any]:
    """Describes the stage that limits the images, in plain values, by the FID of the first feature network.

    The tokenizer decodes the generated tokens, so its reconstruction FID is about the FID that a perfect transformer
    would have. The rule, in this order:

    1. ``neither`` if the FID is at most 1.5 times that of as many real images: it can hardly fall further.
    2. ``tokenizer`` if the reconstruction FID is more than half of the FID: a better transformer can remove less than
       half of it.
    3. ``transformer`` otherwise.

    Args:
        content: Content of ``evaluation.json``.

    Returns:
        ``text``: one or two sentences. ``bits_per_token`` and ``uniform_bits_per_token`` (log2 K). Where the
        reconstruction FID is known, ``stage`` and ``reconstruction_share``, a fraction of the FID.
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
    if fid <= _NEAR_REAL * real:
        stage = "neither"
        text = f"Neither stage limits: FID {fid:.2f} is close to {real:.2f}, that of as many real images; a larger "
        text += "--num-images shows smaller differences."
    else:
        stage = "tokenizer" if rebuilt > _TOKENIZER_SHARE * fid else "transformer"
        text = f"The {stage} limits: reconstructed real images already have FID {rebuilt:.2f}, {rebuilt / fid:.0%} of "
        text += f"{fid:.2f}."
    return {**described, "stage": stage, "reconstruction_share": rebuilt / fid, "text": f"{text} {of_tokens}"}


def _write_pictures(plan: _Evaluation, generated: GeneratedImages, *, folder: Path) -> None:
    """Writes ``samples.png``, ``reconstructions.png`` and ``decoding.gif``; ``generated`` is sorted by class."""
    pipe = plan.model.pipe
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

    originals = plan.evaluator.read_real_images("val", _SHOWN_PAIRS)[0]
    reconstructions = pipe.tokenizer.decode(pipe.tokenizer.encode(originals))
    save_png(reconstruction_grid(originals, reconstructions), folder / "reconstructions.png")

    shown = classes[:_ANIMATED]
    seeds = [plan.options.seed + number for number in range(len(shown))]
    steps = list(pipe.steps(shown, seed=seeds, decoding=plan.decoding))
    captions = [pipe.class_names[label] for label in shown]
    token_size = pipe.outline.token_size
    recording = Recording(
        steps, pipe.tokenizer.decode, pipe.tokenizer.grid, plan.decoding, captions, seeds, token_size=token_size
    )
    recording.save(folder / "decoding.gif")
