"""Rejection sampling of thousands of images into one ``.npz`` file, which ranks share and a second call continues.

``generation`` and ``maskgit sample --accept-rate`` use it. See ``pipeline.acceptance`` for the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from maskgit_pl.evaluation.npz import SampleFile, open_samples
from maskgit_pl.files import write_atomically
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.acceptance import Acceptance
from maskgit_pl.pipeline.bulk import BulkResult, generate_many, is_finished, make_plan, remove_samples, write_samples
from maskgit_pl.pipeline.bulk_plan import BulkOptions, BulkPlan
from maskgit_pl.pipeline.options import read_options

__all__ = ["candidates_file", "generate_accepted", "num_candidates"]

_BATCH = 500  # images in memory at a time


def candidates_file(file: Path) -> Path:
    """Returns the path of the candidates of a file of accepted images."""
    return file.with_name(f"{file.stem}.candidates.npz")


def num_candidates(acceptance: Acceptance | None, num_images: int, num_classes: int) -> int:
    """Returns the number of candidates of all classes: without rejection sampling, that of the images.

    Raises:
        ValueError: if the images are not evenly spread over the classes.
    """
    if acceptance is None:
        return num_images
    if num_images % num_classes:
        raise ValueError(
            f"num_images must be a multiple of {num_classes}, the number of classes, with accept_rate, got {num_images}"
        )
    return num_classes * acceptance.num_candidates(num_images // num_classes)


def generate_accepted(
    pipe: MaskGIT,
    file: Path | str,
    acceptance: Acceptance,
    *,
    on_scored: Callable[[int], object] = lambda count: None,
    **options: Any,
) -> BulkResult:
    """Generates candidates into ``FILE.candidates.npz``, and writes those that are accepted to a file.

    1. Generates the candidates with ``generate_many``: several processes share them, and a second call resumes.
    2. The process that finds all of them complete scores them with the classifier.
    3. It writes the best of each class to the file, with their ``seeds`` and ``log_probs``, and deletes the candidates.

    Args:
        pipe: Model that generates the images.
        file: Path that ends in ``.npz``. ``num_images`` is the number of accepted images in it.
        acceptance: Classifier and acceptance rate.
        on_scored: Called after each batch with its number of scored candidates.
        options: See ``generate_many``; its callbacks count candidates.

    Returns:
        The result of ``generate_many`` for the candidates, with the path of the file. Without missing parts, the file
        is complete.

    Raises:
        ValueError: if the classifier has other classes, ``num_images`` is not a multiple of the number of classes, or
            for a reason of ``generate_many``.
        FileExistsError: if the file was not written by this function.
    """
    file = Path(file)
    acceptance.check_classes(pipe.class_names)
    given = {name: value for name, value in options.items() if not name.startswith("on_")}
    bulk, decoding = read_options(BulkOptions, given, pipe.decoding)
    plan = make_plan(pipe, bulk, decoding)
    if max(plan.classes) >= len(pipe.class_names):
        raise ValueError("classes must not be None with accept_rate, which ranks by the class; name a class")
    count = num_candidates(acceptance, bulk.num_images, len(plan.classes))
    candidates, candidates_plan = candidates_file(file), replace(plan, count=count)
    plan = replace(plan, accept_rate=acceptance.rate, classifier=acceptance.digest)
    if is_finished(file, plan):
        remove_samples(candidates, candidates_plan)  # left by a run that was killed in step 3
        return BulkResult(file, 0, count, 0)
    result = generate_many(pipe, candidates, **{**options, "num_images": count})
    if result.missing_parts == 0:
        try:
            samples = open_samples(candidates)
            _write_accepted(file, plan, samples, acceptance, on_scored)
        except (ValueError, OSError):
            if not is_finished(file, plan):  # True if another process has written the file in the meantime
                raise
        with suppress(FileNotFoundError):
            candidates.unlink()
    return replace(result, file=file)


def _write_accepted(
    file: Path, plan: BulkPlan, samples: SampleFile, acceptance: Acceptance, on_scored: Callable[[int], object]
) -> None:
    """Scores the candidates of a file, and writes the accepted ones."""
    assert samples.labels is not None  # generate_many writes them
    channels = cast("Literal[1, 3]", plan.image[2])
    scores = []
    for first in range(0, len(samples), _BATCH):
        rows = range(first, min(first + _BATCH, len(samples)))
        scores.append(
            acceptance.log_probs(samples.read(rows, channels=channels), samples.labels[rows.start : rows.stop])
        )
        on_scored(len(rows))
    log_probs = torch.cat(scores)
    kept: Tensor = acceptance.choose(
        log_probs, samples.labels, dict.fromkeys(plan.classes, plan.count // len(plan.classes))
    )
    parts = (samples.images[part.numpy()] for part in torch.split(kept, _BATCH))
    arrays = {"seeds": (plan.seed + kept).numpy(), "log_probs": log_probs[kept].numpy().astype(np.float32)}
    with write_atomically(file) as stream:
        write_samples(stream, plan, parts, samples.labels[kept].numpy(), **arrays)
