"""Compares runs of the parallel decoder: the numbers of each step, and the whole run with our network and decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comparators.comparison import TOLERANCE, Comparison, close, equal, inputs, present
from comparators.folder import Folder
from comparators.schedules import released_mask_len, released_ratio, schedule_of
from comparators.transformer import everywhere, load_transformer, our_tokens
from maskgit_pl.decoding import DecodingStep, ParallelDecoder
from maskgit_pl.decoding.predictors import ClassPredictor, Predictor
from maskgit_pl.decoding.selectors import Confidence
from maskgit_pl.networks.transformer import MaskedTransformer

_MASK = -1
_INPUTS = (
    "inputs", "prng_seed", "num_iter", "start_iter", "choice_temperature", "cat_gumbel", "conf_gumbel", "method"
)  # fmt: skip


@dataclass
class Playback:
    """The recorded noise of a run, and a predictor that returns its recorded logits.

    Attributes:
        arrays: The run's arrays, whose steps begin at ``start_iter``; the class token stands first.
    """

    arrays: Mapping[str, np.ndarray]
    calls: int = 0

    @property
    def first_step(self) -> int:
        """The step at which the run began."""
        return int(self.arrays["start_iter"])

    def at(self, name: str, step: int, positions: Tensor) -> Tensor:
        """Returns the values (B, M) or (B, M, K) of a recorded array at ``positions`` (B, M) of ``step``."""
        values = torch.from_numpy(self.arrays[name][step - self.first_step][:, 1:])
        index = positions.reshape(*positions.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        return values.gather(1, index)

    def draw(self, logits: Tensor, positions: Tensor, step: int) -> Tensor:
        """Returns recorded noise; see ``Noise``."""
        return (logits + self.at("cat_gumbel", step, positions)).argmax(-1)

    def gumbel(self, positions: Tensor, step: int) -> Tensor:
        """Returns recorded noise; see ``Noise``."""
        return self.at("conf_gumbel", step, positions)

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Returns the recorded logits of one step after the other; see ``Predictor``."""
        self.calls += 1
        return self.at("logits", self.first_step + self.calls - 1, positions)


def compare_decoding(folder: Folder, file: str) -> Iterator[Comparison]:
    """Compares ``decode_{tag}_*.npz`` with the network of the checkpoint ``tag``, and with recorded logits."""
    arrays = folder.arrays(file)
    network = load_transformer(folder, file.split("_")[1])
    yield from inputs(file, arrays, _INPUTS)
    shape, codes = arrays["cur_ids"].shape, network.config.codebook_size
    logits = everywhere(network, arrays["cur_ids"].reshape(-1, shape[-1]))["logits"][..., :codes].detach()
    logits = logits.reshape(*shape, codes)
    predictors: dict[str, Predictor] = {
        "our network": ClassPredictor(network, our_tokens(arrays["inputs"], network.config)[1])
    }
    if "logits" in arrays:
        yield close(file, "logits", logits, arrays["logits"])
        predictors["recorded logits"] = Playback(arrays)
        logits = torch.from_numpy(arrays["logits"])
    yield from _compare_numbers(file, arrays, logits)
    for name, predictor in predictors.items():
        yield from _compare_run(file, arrays, predictor, f"with {name}")


def _compare_numbers(file: str, arrays: Mapping[str, np.ndarray], logits: Tensor) -> Iterator[Comparison]:
    """Compares every array with one computed from the others, at all positions, known ones included."""
    unknown = torch.from_numpy(arrays["cur_ids"]) == _MASK  # (S, B, 1 + N)
    noisy = logits + torch.from_numpy(arrays["cat_gumbel"])
    samples = torch.from_numpy(arrays["cat_samples"]).long()
    probability = logits.softmax(-1).gather(-1, samples.unsqueeze(-1)).squeeze(-1)
    plan = _plan(arrays, unknown)
    yield _compare_samples(file, noisy, samples, unknown, exact="logits" in arrays)
    made = {
        **plan,
        "min_categorical_gap": _gap(noisy, unknown),
        "selected_probs": probability.where(unknown, torch.inf),
        **_remasked(arrays, plan["mask_len"], plan["temperature"]),
        **_tokens(arrays, samples, unknown),
    }
    yield from present(file, made, arrays)


def _plan(arrays: Mapping[str, np.ndarray], unknown: Tensor) -> dict[str, Tensor]:
    """The numbers of each step (S,) or of each step and row (S, B)."""
    steps, start, inputs = int(arrays["num_iter"]), int(arrays["start_iter"]), arrays["inputs"]
    at_start = torch.from_numpy((inputs == _MASK).sum(1))
    progress = torch.arange(start + 1, steps + 1, dtype=torch.float32) / steps
    ratio = released_ratio(str(arrays["method"]), progress, inputs.shape[1] - 1).unsqueeze(1)
    mask_len = released_mask_len(ratio, at_start, unknown.sum(-1))
    return {
        "unknown_at_start": at_start,
        "ratio": progress,
        "mask_ratio": ratio.expand(mask_len.shape),
        "mask_len": mask_len,
        "temperature": torch.from_numpy(arrays["choice_temperature"]) * (1 - progress),
    }


def _remasked(arrays: Mapping[str, np.ndarray], mask_len: Tensor, temperature: Tensor) -> dict[str, Tensor]:
    """Returns the tokens that are masked again, (S, B, 1 + N), and the closest of these decisions."""
    noise = temperature[:, None, None] * torch.from_numpy(arrays["conf_gumbel"])
    confidence = torch.from_numpy(arrays["selected_probs"]).log() + noise
    ranked = confidence.sort(-1).values
    cut = ranked.gather(-1, mask_len.unsqueeze(-1))
    margin = cut - ranked.gather(-1, mask_len.unsqueeze(-1) - 1)
    finite = margin[margin.isfinite()]
    return {"masking": confidence < cut, "min_confidence_gap": finite.min() if len(finite) else torch.tensor(torch.inf)}


def _tokens(arrays: Mapping[str, np.ndarray], samples: Tensor, unknown: Tensor) -> dict[str, Tensor | np.ndarray]:
    """Returns the tokens before and after each step; steps that were not run hold the given tokens."""
    inputs, masking = arrays["inputs"], torch.from_numpy(arrays["masking"])
    sampled = samples.where(unknown, torch.from_numpy(arrays["cur_ids"]).long())
    before = np.repeat(inputs[:, None], int(arrays["start_iter"]), 1)
    return {
        "cur_ids": np.concatenate([inputs[None], arrays["next_ids"][:-1]]),
        "next_ids": sampled.masked_fill(masking, _MASK),
        "final_seqs": np.concatenate([before, sampled.transpose(0, 1).numpy()], 1),
        "final_tokens": arrays["final_seqs"][:, -1, 1:],
    }


def _compare_samples(file: str, noisy: Tensor, samples: Tensor, unknown: Tensor, *, exact: bool) -> Comparison:
    """Checks that samples equal the argmax; at known positions, which nothing depends on, up to a tie of our logits."""
    chosen = noisy.gather(-1, samples.unsqueeze(-1)).squeeze(-1)
    slack = torch.zeros_like(chosen) if exact else torch.zeros_like(chosen).masked_fill(~unknown, 2 * TOLERANCE)
    return equal(file, "cat_samples", chosen >= noisy.max(-1).values - slack, np.ones(samples.shape, bool))


def _gap(noisy: Tensor, unknown: Tensor) -> Tensor:
    """Returns the smallest lead of a drawn code over the next one."""
    best = noisy.topk(2).values
    return (best[..., 0] - best[..., 1])[unknown].min()


def _compare_run(file: str, arrays: Mapping[str, np.ndarray], predictor: Predictor, note: str) -> Iterator[Comparison]:
    """Compares our decoder on the recorded noise, step by step."""
    made = _steps(arrays, predictor)
    start = int(arrays["start_iter"])
    tokens = torch.stack([step.tokens for step in made])  # (S, B, N), as everything below
    masked = torch.stack([step.was_masked for step in made])
    scores = torch.stack([step.scores for step in made])
    noise = arrays["temperature"][:, None, None] * arrays["conf_gumbel"][..., 1:]
    expected = np.log(arrays["selected_probs"][..., 1:]) + noise
    yield equal(file, "final_seqs", tokens, arrays["final_seqs"][:, start:, 1:].swapaxes(0, 1), note=note)
    yield equal(file, "cur_ids", masked, arrays["cur_ids"][..., 1:] == _MASK, note=note)
    yield equal(file, "final_tokens", tokens[-1], arrays["final_tokens"], note=note)
    yield close(file, "selected_probs", scores, expected, note=f"scores {note}")
    # The released loop masks one token after the last step too, but only in its state.
    still = torch.stack([step.still_masked for step in made])[:-1]
    yield equal(file, "masking", still, arrays["masking"][:-1, :, 1:], note=note)
    lengths = np.minimum(arrays["mask_len"], masked.sum(-1).numpy())  # 1 even in a row that knows everything
    yield equal(file, "mask_len", still.sum(-1), lengths[:-1], note=note)
    yield equal(file, "next_ids", tokens[:-1].masked_fill(still, _MASK), arrays["next_ids"][:-1, :, 1:], note=note)


def _steps(arrays: Mapping[str, np.ndarray], predictor: Predictor) -> list[DecodingStep]:
    playback = Playback(arrays)
    decoder = ParallelDecoder(
        schedule_of(str(arrays["method"])),
        Confidence(choice_temperature=float(arrays["choice_temperature"])),
        num_steps=int(arrays["num_iter"]),
    )
    tokens, mask = torch.from_numpy(arrays["inputs"][:, 1:]).long(), _MASK
    if isinstance(predictor, ClassPredictor):
        assert isinstance(predictor.network, MaskedTransformer)
        mask = predictor.network.config.mask_token_id
        tokens = tokens.masked_fill(tokens == _MASK, mask)
    grid = 1, tokens.shape[1]  # which the selector does not read
    return list(
        decoder.steps(predictor, tokens, playback, mask_token_id=mask, grid=grid, first_step=playback.first_step)
    )
