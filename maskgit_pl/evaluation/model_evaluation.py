"""``evaluate``: measures a trained model, and writes ``evaluation.json``, pictures and ledger rows.

Several processes under ``torchrun`` share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from maskgit_pl.checks import check_integer
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.distributed import barrier, default_device, process_group, rank_and_world
from maskgit_pl.evaluation.classifier import check_cas, obtain_classifier
from maskgit_pl.evaluation.evaluation_report import Measurements, Report, make_report, write_pictures
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator
from maskgit_pl.evaluation.generation import delete_generated
from maskgit_pl.evaluation.ledger import FILE_NAME, Ledger, Row
from maskgit_pl.evaluation.opening import (
    check_model_decoding,
    create_evaluated_model,
    open_data,
    open_evaluator,
    open_model,
)
from maskgit_pl.evaluation.options import FEATURES, CASConfig, EvaluationOptions, Spec, round_to_classes
from maskgit_pl.evaluation.reconstruction import measure_reconstruction
from maskgit_pl.evaluation.reference import iter_real_batches
from maskgit_pl.evaluation.run_folders import RunFolders, find_run
from maskgit_pl.networks.perceptual import load_lpips
from maskgit_pl.pipeline.acceptance import Acceptance
from maskgit_pl.processes import Bars, local_rank, no_bars

__all__ = ["evaluate"]

_DRAWS = 4  # masks per image for likelihoods


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
    # All ranks measure; the first one writes. The file of generated images still exists and is read for the pictures.
    with process_group():
        evaluator, model, rebuilt = _open(folders, num_images, features, options, bars)
        decoding = model.pipe.decoding_with(num_steps=options.num_steps)
        file = out or folders.run / "evaluation.json"
        measured = _measure(folders, evaluator, model, decoding, num_images, rebuilt, cas, options)
        report = make_report(folders, model, evaluator, measured, file)
        title = f"{model.run}: pictures"
        generated = evaluator.generate(model, decoding, num_images=num_images, seed=options.seed, title=title)
        if rank_and_world()[0] == 0:
            from maskgit_pl.pipeline.card import refresh_card

            write_pictures(evaluator, model.pipe, decoding, generated, folder=file.parent, seed=options.seed)
            report.save()
            refresh_card(folders.pretrained)
    return report


def _check_acceptance(options: EvaluationOptions, num_images: int, num_classes: int) -> None:
    if options.accept_classifier is not None and not (options.accept_classifier / "config.json").is_file():
        raise FileNotFoundError(
            f"accept_classifier {options.accept_classifier}: no classifier there; `maskgit train-classifier --data "
            "DATA` trains one"
        )
    if options.accept_rate is not None and num_images % num_classes:
        raise ValueError(
            f"num_images must be a multiple of {num_classes}, the number of classes, with accept_rate, got {num_images}"
        )


def _open(
    folders: RunFolders,
    num_images: int,
    features: Sequence[Spec],
    options: EvaluationOptions,
    bars: Bars,
) -> tuple[Evaluator, EvaluatedModel, dict[str, float]]:
    """Opens model, data and evaluator, and measures the reconstruction, which has no ledger row."""
    rank, world_size = rank_and_world()
    device = options.device
    if device is None and world_size > 1:  # one GPU for each process
        device = default_device(local_rank=local_rank())
    pipe = open_model(folders, device, dtype=options.dtype, negative_model=options.negative_model)
    check_model_decoding(pipe, pipe.decoding_with(num_steps=options.num_steps))
    _check_acceptance(options, num_images, len(pipe.class_names))
    data = open_data(folders, pipe, num_workers=options.num_workers)
    round_to_classes(num_images, data.num_classes, name="num_images")
    lpips = None if options.lpips is None else load_lpips(options.lpips, device=pipe.device)
    ledger = Ledger(folders.evaluation / FILE_NAME, writes=rank == 0, reuse=options.resume)
    evaluator = open_evaluator(
        folders,
        pipe,
        data,
        ledger,
        features=features,
        reference=options.reference,
        batch_size=options.batch_size,
        bars=bars,
    )
    compared = {} if options.reference is not None else evaluator.networks  # reconstructions are of the val split
    rebuilt = measure_reconstruction(
        pipe.tokenizer,
        iter_real_batches(data, "val"),
        extractors=[network.extractor for network in compared.values()],
        references={label: network.reference for label, network in compared.items()},
        lpips=lpips,
        on_images=bars("reconstructing", data.summary.samples["val"]),
    )
    barrier()  # every rank has read the ledger before the first one writes to it
    return evaluator, create_evaluated_model(folders, pipe), rebuilt


def _measure(
    folders: RunFolders,
    evaluator: Evaluator,
    model: EvaluatedModel,
    decoding: DecodingConfig,
    num_images: int,
    rebuilt: dict[str, float],
    cas: CASConfig | None,
    options: EvaluationOptions,
) -> Measurements:
    """Measures generated images with and without guidance, real images, the likelihood and the CAS."""
    accepted = None  # a wrong classifier is answered before anything is generated
    if options.accept_rate is not None:
        accepted = replace(model, acceptance=_open_acceptance(folders, evaluator, model, options))
    decodings, seed = {"exported_guidance": decoding}, options.seed
    if any(decoding.scales()):
        decodings["without_guidance"] = model.pipe.decoding_with(decoding=decoding, guidance_scale=0)
    if not options.resume:  # images of an earlier evaluation would be reused by their file name
        sources = [model] if accepted is None else [model, accepted]
        for source, wanted in product(sources, decodings.values()):
            delete_generated(source.samples_file(wanted, num_images=num_images, seed=seed))
    samples = {
        name: evaluator.measure_samples(model, each, num_images=num_images, seed=seed, keep=True)
        for name, each in decodings.items()
    }
    if accepted is not None:
        samples["accepted"] = evaluator.measure_samples(accepted, decoding, num_images=num_images, seed=seed, keep=True)
    real = evaluator.measure_real(num_images=num_images)
    likelihood = evaluator.measure_likelihood(model, num_images=options.likelihood_images, draws=_DRAWS)
    scores: dict[str, Row] = {}
    if cas is not None:
        trained_on = {"generated_images": model, **({} if accepted is None else {"accepted_images": accepted})}
        for name, each in trained_on.items():
            scores[name] = evaluator.measure_cas(each, decoding, cas, num_images=num_images, seed=seed)
        scores["real_images"] = evaluator.measure_cas(None, None, cas, num_images=num_images, seed=seed)
    acceptance = None if accepted is None else accepted.acceptance
    return Measurements(decoding, num_images, seed, samples, real, rebuilt, likelihood, scores, acceptance)


def _open_acceptance(
    folders: RunFolders, evaluator: Evaluator, model: EvaluatedModel, options: EvaluationOptions
) -> Acceptance:
    """Reads the classifier that accepts images; that of the data is trained if it is missing."""
    assert options.accept_rate is not None
    folder = options.accept_classifier
    if folder is None:
        folder = folders.classifier
        obtain_classifier(folder, evaluator.data, replaces=folders.shares_classifier)
    acceptance = Acceptance.load(folder, options.accept_rate, device=model.pipe.device)
    acceptance.check_classes(model.pipe.class_names)
    return acceptance
