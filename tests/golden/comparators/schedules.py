"""Compares mask schedules and the numbers of masked tokens that follow from them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from comparators.comparison import Comparison, close, equal, inputs
from comparators.folder import Folder
from maskgit_pl.decoding import ParallelDecoder
from maskgit_pl.decoding.selectors import Confidence
from maskgit_pl.schedules import MaskSchedule, mask_schedules, num_masked

_RATIO_TOLERANCE = 1e-6
_MIN_RATIO = 1e-6  # the released code clips its ratios to [1e-6, 1]


def schedule_of(method: str) -> MaskSchedule:
    """Returns our schedule for a released name: uniform, cosine, log, exp, or pow with its exponent, as in pow2.5."""
    if method.startswith("pow"):
        return mask_schedules.build({"name": "pow", "exponent": float(method.removeprefix("pow"))})
    return mask_schedules.build({"uniform": "linear"}.get(method, method))


def released_ratio(method: str, progress: Tensor, num_tokens: int) -> Tensor:
    """The ratio that the released code returns: clipped."""
    return schedule_of(method)(progress, num_tokens).clamp(_MIN_RATIO, 1.0)


def released_mask_len(ratio: Tensor, at_start: Tensor, masked: Tensor) -> Tensor:
    """Returns max(1, min(masked - 1, floor(ratio x masked at the start))), the tokens masked again after a step.

    Our decoder does the same in all steps but the last, after which it masks nothing.
    """
    return torch.minimum(num_masked(ratio, at_start, rounding="floor"), masked - 1).clamp(min=1)


def compare_schedules(folder: Folder, file: str) -> Iterator[Comparison]:
    """Compares ``schedules.npz``: rows are ``methods``; see the README for the rest."""
    arrays = folder.arrays(file)
    methods = arrays["methods"].tolist()
    known = [bool(re.fullmatch(r"uniform|cosine|log|exp|pow\d+(\.\d+)?", method)) for method in methods]
    yield equal(file, "methods", known, np.ones(len(methods), bool), note="names of the released code")
    yield from inputs(file, arrays, ["random_ratio"])
    for name, recorded in arrays.items():
        if match := re.fullmatch(r"ratio_T(\d+)_N(\d+)_(?:float32|python_float)", name):
            steps, tokens = map(int, match.groups())
            progress = torch.arange(steps + 1, dtype=torch.float32) / steps
            yield _ratios(file, name, methods, progress, tokens, recorded)
        elif match := re.fullmatch(r"random_out_N(\d+)", name):
            progress, tokens = torch.from_numpy(arrays["random_ratio"]), int(match[1])
            yield _ratios(file, name, methods, progress, tokens, recorded)
        elif match := re.fullmatch(r"mask_len_T(\d+)_N(\d+)", name):
            steps, tokens = map(int, match.groups())
            yield equal(file, name, [_lengths(method, steps, tokens) for method in methods], recorded)
            ours = np.array([_decoder_counts(method, steps, tokens) for method in methods])
            yield equal(file, name, ours[:, 1:-1], recorded[:, :-1], note="our decoder, all steps but the last")
        elif match := re.fullmatch(r"masked_before_step_T(\d+)_N(\d+)", name):
            steps, tokens = map(int, match.groups())
            yield equal(file, name, [_decoder_counts(method, steps, tokens)[:-1] for method in methods], recorded)


def _ratios(
    file: str, name: str, methods: list[str], progress: Tensor, num_tokens: int, recorded: np.ndarray
) -> Comparison:
    ours = torch.stack([released_ratio(method, progress, num_tokens) for method in methods])
    return close(file, name, ours, recorded, tolerance=_RATIO_TOLERANCE)


def _lengths(method: str, num_steps: int, num_tokens: int) -> list[int]:
    """Returns the number of tokens masked again after each step, also the last, from a fully masked image."""
    progress = torch.arange(1, num_steps + 1, dtype=torch.float32) / num_steps
    everything = masked = torch.tensor(num_tokens)
    lengths = []
    for ratio in released_ratio(method, progress, num_tokens):
        masked = released_mask_len(ratio, everything, masked)
        lengths.append(int(masked))
    return lengths


def _decoder_counts(method: str, num_steps: int, num_tokens: int) -> list[int]:
    """Returns the number of tokens masked before each step of our decoder and after the last."""
    decoder = ParallelDecoder(schedule_of(method), Confidence(), num_steps=num_steps)
    return [*(step.before[0] for step in decoder.plan([num_tokens], num_tokens)), 0]
