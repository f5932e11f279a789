"""Compares runs of the parallel decoder with our network and decoder, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comparators.comparison import Comparison, close, equal, inputs
from comparators.folder import Folder
from comparators.schedules import schedule_of
from comparators.transformer import everywhere, load_transformer, our_tokens
from maskgit_pl.decoding import ClassPredictor, DecodingStep, ParallelDecoder, Predictor
from maskgit_pl.decoding.selectors import Confidence
from maskgit_pl.networks.transformer import MaskedTransformer

_MASK = -1
_INPUTS = (
    "inputs", "prng_seed", "num_iter", "start_iter", "choice_temperature", "cat_gumbel", "conf_gumbel", "method",
    "cat_samples", "unknown_at_start", "ratio", "mask_ratio", "temperature", "min_categorical_gap",
    "min_confidence_gap",
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
    predictors: dict[str, Predictor] = {
        "our network": ClassPredictor(network, our_tokens(arrays["inputs"], network.config)[1])
    }
    if "logits" in arrays:
        shape, codes = arrays["cur_ids"].shape, network.config.codebook_size
        logits = everywhere(network, arrays["cur_ids"].reshape(-1, shape[-1]))["logits"][..., :codes].detach()
        yield close(file, "logits", logits.reshape(*shape, codes), arrays["logits"])
        predictors["recorded logits"] = Playback(arrays)
    for name, predictor in predictors.items():
        yield from _compare_run(file, arrays, predictor, f"with {name}")


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
    return list(decoder.steps(predictor, tokens, playback, mask_token_id=mask, first_step=playback.first_step))
