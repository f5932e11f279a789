"""``evaluate`` measures one model.

1. It opens the model, the data and the feature networks.
2. It measures reconstructions, generated and real images, and the likelihood. Several processes under
   ``torchrun`` share the work, and the ledger keeps the rows.
3. It reports: ``evaluation.json`` with everything that reproduces it, a table, pictures, and findings, which
   say which stage of the model limits its images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from maskgit_pl.checks import check_integer, plain_size
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.devices import default_device, describe_environment
from maskgit_pl.distributed import barrier, process_group, rank_and_world
from maskgit_pl.evaluation.classifier import LabelledImages
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator, collect_numbers, delete_generated
from maskgit_pl.evaluation.folders import check_model_decoding, describe_held_out, open_data, open_evaluator, open_model
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger
from maskgit_pl.evaluation.metrics import computed_metrics, format_value, title
from maskgit_pl.evaluation.options import CLASSIFIER, EvaluationOptions, refuse_options_of_images, round_to_classes
from maskgit_pl.evaluation.pages import choose_classes
from maskgit_pl.evaluation.reconstruction import measure_reconstruction, open_lpips
from maskgit_pl.evaluation.reference import iter_real_batches
from maskgit_pl.evaluation.run_folders import find_run
from maskgit_pl.files import check_writable, write_text
from maskgit_pl.grids import class_captions, image_grid, reconstruction_grid, save_png
from maskgit_pl.pipeline.sharing import STAGES
from maskgit_pl.processes import Bars, local_rank, no_bars
from maskgit_pl.training.speed import TrainingTime, read_training_time

_LIKELIHOOD = ("num_images", "draws", "masked_nll", "elbo_", "exact_")  # beginnings of the columns of the report
_TOKENIZER_SHARE = 0.5  # of the FID of generated images
_NEAR_REAL = 1.5  # times the FID of real images
_SHOWN_OF_A_CLASS, _SHOWN_PAIRS, _ANIMATED = 8, 16, 4


def evaluate(run: Path | str, options: EvaluationOptions | None = None, *, bars: Bars = no_bars) -> Report:
    """Measures a model, and writes ``evaluation.json`` and pictures.

    Args:
        run: Run folder or pretrained folder.
        options: Images, networks, data and other options; None for the defaults.
        bars: Progress bars.

    Returns:
        The content of the JSON file.

    Raises:
        FileNotFoundError: if the run or the data do not exist.
        TypeError: if a feature network does not accept its arguments.
        ValueError: if the classes of the data are not the model's, a network is unknown, or a number is out of range.
    """
    options = options or EvaluationOptions()
    num_images, out = options.num_images, options.out
    folders = find_run(run, data=options.data)
    file = out or folders.run / "evaluation.json"
    check_writable("out", file)  # before hours of measurements
    with process_group():  # all ranks measure; the first one writes
        # 1.
        rank, world_size = rank_and_world()
        device = options.device
        if device is None and world_size > 1:  # one GPU for each process
            device = default_device(local_rank=local_rank())
        kept = file.parent / "evaluation"
        model = open_model(folders, device, dtype=options.dtype, negative_model=options.negative_model, out=kept)
        pipe = model.pipe
        decoding = pipe.decoding_with(num_steps=options.num_steps)
        check_model_decoding(pipe, decoding)
        real = open_data(folders, pipe, num_workers=options.num_workers)
        if model.tokenizer is None:
            refuse_options_of_images(options)
        round_to_classes(num_images, real.num_classes)
        if options.reconstruction_images is not None:  # the FID of fewer would be higher than that of generated images
            check_integer("reconstruction_images", options.reconstruction_images, f"[{num_images}, inf)")
        evaluator = open_evaluator(
            folders,
            real,
            Ledger(kept / FILE_NAME, reuse=options.resume),
            device=pipe.device,
            batch_size=options.batch_size,
            features=options.features,
            reference=options.reference,
            bars=bars,
        )
        barrier()  # every rank has read the ledger before the first one writes to it

        images: dict[str, Any] = {"num_images": num_images, "seed": options.seed}
        measured = _measure(model, evaluator, decoding, images, options)  # 2.
        # 3.
        content = {
            "protocol": {**images, **_describe_protocol(model, evaluator, decoding)},
            **measured,
            "model": _describe_model(model),
            "environment": {**describe_environment(), "device": str(pipe.device)},
            "held_out": describe_held_out(real.summary),
        }
        stages = (read_training_time(folders.run / stage) for stage in STAGES)
        times = [time for time in stages if time is not None and time.is_cpu]
        report = Report({**content, "limiting_stage": describe_limit(content, quote(str(run)), times=times)}, file)
        if model.tokenizer is not None:  # the file of the measured images still exists
            generated = evaluator.generate(model, decoding, title=f"{model.run}: pictures", **images)
            if rank == 0:
                originals = evaluator.read_real_images("val", _SHOWN_PAIRS)[0]
                _write_pictures(model, decoding, generated, originals, file.parent, options.seed)
        if rank == 0:
            write_text(file, json.dumps(report.content, indent=2) + "\n")
    return report


def _measure(
    model: EvaluatedModel,
    evaluator: Evaluator,
    decoding: DecodingConfig,
    images: Mapping[str, Any],
    options: EvaluationOptions,
) -> dict[str, Any]:
    available = evaluator.data.summary.samples["val"]
    count = min(options.reconstruction_images or available, available)
    rebuilt: dict[str, Any] = {}
    if model.tokenizer is not None:
        rebuilt = measure_reconstruction(
            model.tokenizer,
            iter_real_batches(evaluator.data, "val", num_images=count),
            networks=() if options.reference is not None else evaluator.networks.values(),  # a file is not the split
            lpips=open_lpips(options.lpips, model.tokenizer),
            on_images=evaluator.bars("reconstructing", count),
        )
    decodings = {"exported_guidance": decoding}
    if any(decoding.scales()):
        decodings["without_guidance"] = model.pipe.decoding_with(decoding=decoding, guidance_scale=0)
    if not options.resume:  # images of an earlier evaluation would be reused by their file name
        for settings in decodings.values():
            delete_generated(model.samples_file(settings, **images))
    samples = {
        name: collect_numbers(evaluator.measure_samples(model, settings, keep=True, **images))
        for name, settings in decodings.items()
    }
    floor = evaluator.measure_real(num_images=images["num_images"], model=model)
    likelihood = evaluator.measure_likelihood(model, num_images=options.likelihood_images)
    judge = evaluator.networks.get(CLASSIFIER)
    accuracy = None if judge is None else judge.accuracy  # which class agreement is read relative to
    return {
        "reconstruction": rebuilt,
        "samples": samples,
        "real_against_real": {**collect_numbers(floor), "images": next(iter(floor.values()))["num_images"]},
        "likelihood": {name: value for name, value in likelihood.items() if name.startswith(_LIKELIHOOD)},
        **({} if accuracy is None else {"classifier": {"accuracy_on_real_images": accuracy}}),
    }


def _describe_protocol(model: EvaluatedModel, evaluator: Evaluator, decoding: DecodingConfig) -> dict[str, Any]:
    references = [network.reference for network in evaluator.networks.values()]
    negative = model.pipe.negative_model
    return {
        "num_steps": decoding.num_steps,
        "data": evaluator.data.summary.fingerprint,
        "split": "val",
        "reference": ", ".join(dict.fromkeys(each.file or f"{each.split} split" for each in references)) or "val split",
        "mask_schedule": repr(model.pipe.transformer.mask_schedule),
        "decoding": asdict(decoding),
        **({} if negative is None else {"negative_model": {"folder": str(negative.folder), "digest": negative.digest}}),
        "features": {
            label: {
                "weights": network.extractor.digest,
                "real_images": network.columns["real_images"],
                "reference": network.reference.digest,
            }
            for label, network in evaluator.networks.items()
        },
    }


def _describe_model(model: EvaluatedModel) -> dict[str, Any]:
    tokenizer, network = model.tokenizer, model.pipe.transformer.network
    parameters = () if tokenizer is None else tokenizer.network.parameters()
    return {
        "image_size": None if tokenizer is None else plain_size(tokenizer.image_size),
        "grid": list(network.config.grid),
        "codebook_size": network.config.codebook_size,
        "num_classes": len(model.pipe.class_names),
        "tokenizer_parameters": sum(parameter.numel() for parameter in parameters),
        "transformer_parameters": sum(parameter.numel() for parameter in network.parameters()),
        "tokenizer_fingerprint": None if tokenizer is None else tokenizer.fingerprint,
        "transformer_digest": model.identity["transformer"],
        "config_digest": model.identity["config"],
    }


@dataclass(frozen=True)
class Report:
    """The values of an evaluation; names of network metrics have the label as suffix, e.g. ``fid/lite0``."""

    content: Mapping[str, Any]  # of ``evaluation.json``, in plain values
    file: Path  # of that content

    def table(self) -> Table:
        """Returns the most important values as a table for the terminal."""
        protocol, samples, rebuilt = (self.content[name] for name in ("protocol", "samples", "reconstruction"))
        # One column per kind of samples, and a last one for real images.
        columns = [*samples.values(), self.content["real_against_real"]]
        things = "images" if protocol["features"] else "samples"
        steps, seed = protocol["num_steps"], protocol["seed"]
        table = Table(title=f"{protocol['num_images']} {things}, {steps} steps, seed {seed}")
        table.add_column("")
        for name in (*(name.replace("_", " ") for name in samples), f"real {things}"):
            table.add_column(name, justify="right")
        computed = computed_metrics()
        of_images = [name for name, metric in computed.items() if not metric.of_network]
        of_networks = [name for name in computed if name not in of_images]
        sections = [[f"{each}/{label}" for each in of_networks] for label in protocol["features"]]
        for section in ([*of_images, "seconds_per_image"], *sections):
            # A metric that no column has is left out; each network has a section of its own.
            names = [name for name in section if any(name in column for column in columns)]
            for name in names:
                cells = [format_value(name, column[name]) if name in column else "" for column in columns]
                table.add_row(title(name), *cells, end_section=name == names[-1])
                if f"r{name}" in rebuilt:  # the floor of the FID above it
                    table.add_row("  of reconstructions", format_value(name, rebuilt[f"r{name}"]))
        _add_model_rows(table, self.content)
        return table

    def findings(self) -> list[str]:
        """Returns sentences about the limiting stage, if it is known, and the held-out images."""
        return [text for text in (self.content["limiting_stage"], self.content["held_out"]) if text]


def _add_model_rows(table: Table, report: Mapping[str, Any]) -> None:
    rebuilt, likelihood = report["reconstruction"], report["likelihood"]
    uniform = math.log2(report["model"]["codebook_size"])
    for name, text in (
        ("masked_nll", "NLL per masked token, nats"),
        ("elbo_bits_per_token", f"upper bound per token, bits, of {uniform:.3g}"),
        ("exact_bits_per_token", f"NLL per token, bits, of {uniform:.3g}"),
    ):
        if name in likelihood:
            table.add_row(text, f"{likelihood[name]:.3f} ± {likelihood[f'{name}_error']:.3f}")
    for name in ("psnr_db", "ssim", "lpips", "codebook_usage"):
        if name in rebuilt:
            table.add_row(f"reconstruction: {title(name)}", format_value(name, rebuilt[name]))


def describe_limit(content: Mapping[str, Any], run: str, *, times: Sequence[TrainingTime] = ()) -> str | None:
    """Describes the stage that limits the images, by the FID of the first feature network, and what to try.

    The tokenizer decodes the generated tokens, so its reconstruction FID is about the FID that a perfect
    transformer would have. The rule, in this order:

    1. Neither if the FID is at most 1.5 times that of as many real images: it can hardly fall further.
    2. The tokenizer if the reconstruction FID is more than half of the FID: a better transformer can remove
       less than half of it.
    3. The transformer otherwise.

    docs/evaluation/README.md has what was measured against each.

    Args:
        content: Content of ``evaluation.json``.
        run: Run as a word of a command.
        times: CPU times of the training of both stages, as far as they are known.

    Returns:
        The sentences; None if the real images are those of a file, which reconstructions are not compared with.
    """
    name = f"fid/{next(iter(content['protocol']['features']), '')}"
    rebuilt = content["reconstruction"].get(f"r{name}")
    if rebuilt is None:
        return None
    fid, real = content["samples"]["exported_guidance"][name], content["real_against_real"][name]
    if fid <= _NEAR_REAL * real:
        return (
            f"Neither stage limits: FID {fid:.2f} is close to {real:.2f}, that of as many real images; a larger "
            "--num-images shows smaller differences."
        )
    stage = "tokenizer" if rebuilt > _TOKENIZER_SHARE * fid else "transformer"
    decoding = f"another decoding (`maskgit tune {run}`), more steps if `maskgit inspect {run}` finds no fault, or "
    cost = f"about {sum(time.cost for time in times) / 60:.0f} CPU minutes again"  # patches of 4 x 4: that of 32 px
    is_known = len(times) == len(STAGES) and content["model"]["image_size"] == 32
    return (
        f"The {stage} limits: reconstructed real images already have FID {rebuilt:.2f} of {fid:.2f}. Try "
        f"{decoding if stage == 'transformer' else ''}a larger one of `maskgit recipes list`, such as "
        f"--recipe 'adaln 1h'.{f' 64 px: add 64px to --recipe, {cost}.' if is_known else ''}"
    )


def _write_pictures(
    model: EvaluatedModel,
    decoding: DecodingConfig,
    generated: LabelledImages,
    originals: Tensor,
    folder: Path,
    seed: int,
) -> None:
    """Writes ``samples.png``, ``reconstructions.png`` and ``decoding.gif``."""
    pipe = model.pipe
    classes = choose_classes(len(pipe.class_names))
    rows = [generated.read((generated.labels == label).nonzero()[:_SHOWN_OF_A_CLASS, 0]) for label in classes]
    least = min(len(row) for row in rows)
    names = class_captions(pipe.class_names, classes)
    folder.mkdir(parents=True, exist_ok=True)
    grid = image_grid(torch.cat([row[:least] for row in rows]), columns=least, row_captions=names)
    save_png(grid, folder / "samples.png")

    reconstructions = pipe.tokenizer.decode(pipe.tokenizer.encode(originals))
    save_png(reconstruction_grid(originals, reconstructions), folder / "reconstructions.png")

    seeds = [seed + number for number, _ in enumerate(classes[:_ANIMATED])]
    recording = pipe.record(classes[:_ANIMATED], seed=seeds, decoding=decoding)
    recording.save(folder / "decoding.gif")
