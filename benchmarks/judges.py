"""Shows what each judge of generated images sees, on images with known faults.

    python benchmarks/judges.py runs/fashion-mnist-adaln --num-images 1000 --seeds 0,1

The ladder: token grids of real train images with a share of their tokens replaced by those of others at the same place;
grids joined from the halves of two images of a class; copies of train images; and images of the model with other
numbers of steps, scales of guidance and selectors. All are decoded by the tokenizer, and compared with the val split.
With ``--accept-rates 0.5,0.25``, the images are those of ``maskgit sample --accept-rate`` instead, by each judge.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from measuring import format_table
from torch import Tensor

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.devices import cpu_name
from maskgit_pl.evaluation.acceptance import Acceptance, ClassJudge, Judge, TokenJudge, generate_accepted
from maskgit_pl.evaluation.evaluator import EvaluatedModel, Evaluator, compare_images
from maskgit_pl.evaluation.folders import open_data, open_evaluator, open_model
from maskgit_pl.evaluation.ledger import Ledger
from maskgit_pl.evaluation.likelihood import encode_real_grids
from maskgit_pl.evaluation.metrics import compute_metrics, format_value, title
from maskgit_pl.evaluation.options import CLASSIFIER, with_steps
from maskgit_pl.evaluation.run_folders import find_run
from maskgit_pl.evaluation.two_sample import replace_tokens
from maskgit_pl.pipeline.bulk import BulkOptions, generate_many

_NAMES = ("fid", "class_agreement", "diversity", "two_sample", "two_sample_auc",
          "pixel_fid", "brightness_spread", "contrast_spread", "weave")  # fmt: skip
_SHARES, _STEPS, _SCALES = (0.01, 0.03, 0.1, 0.3), (1, 2, 4, 8, 16, 49), (0, 1, 2, 3, 4)
_POOL = 10_000  # train images in which copies are looked for
_NEAR = 0.1  # share of the tokens in which a copy may differ


@dataclass(frozen=True)
class Rung:
    """Images of a known fault: their tokens (n, N) int64 and classes (n,) int64, and the CPU seconds to make them."""

    name: str
    tokens: Tensor
    labels: Tensor
    seconds: float | None = None


def join_halves(tokens: Tensor, labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Joins the left half of each (n, N) grid with the right half of the next one of its class."""
    grids, joined = tokens.reshape(-1, *grid), tokens.reshape(-1, *grid).clone()
    for label in torch.unique(labels):
        rows = (labels == label).nonzero()[:, 0]
        joined[rows, :, grid[1] // 2 :] = grids[rows.roll(1), :, grid[1] // 2 :]
    return joined.flatten(1)


def nearest_share(rung: Rung, pool: Tensor, pool_labels: Tensor) -> float:
    """Returns the share of grids that differ from one of the pool, of their class, in at most a tenth of the tokens."""
    most, found = _NEAR * pool.shape[1], 0
    for label in torch.unique(rung.labels):
        of_pool = pool[pool_labels == label]
        different = [(of_pool != tokens).sum(1).min() for tokens in rung.tokens[rung.labels == label]]
        found += sum(int(count <= most) for count in different)
    return found / len(rung.tokens)


def list_decodings(start: DecodingConfig, num_tokens: int) -> dict[str, DecodingConfig]:
    """Returns the decodings of the ladder by name."""
    steps = {f"{number} steps": with_steps(start, number) for number in _STEPS if number <= num_tokens}
    scales = {
        f"guidance {scale}": replace(start, guidance={"name": "linear", "scale": float(scale)}) for scale in _SCALES
    }
    plain = replace(scales["guidance 0"], token_selector="random", sampling_temperature=1.0)
    others = {**steps, **scales, "random selector, no guidance": plain}
    return {"as exported": start, **{name: decoding for name, decoding in others.items() if decoding != start}}


def climb(evaluator: Evaluator, model: EvaluatedModel, *, num_images: int, seed: int) -> Iterator[Rung]:
    """Yields the rungs of the ladder."""
    tokenizer = model.pipe.tokenizer
    images, labels = evaluator.read_real_images("train", _POOL)
    rows = torch.arange(seed * num_images, (seed + 1) * num_images) % len(images)
    real, labels = tokenizer.encode(images[rows], batch_size=evaluator.batch_size), labels[rows]
    yield Rung("copies of train images", real, labels)
    for share in _SHARES:
        yield Rung(f"{share:.0%} of the tokens replaced", replace_tokens(real, share, seed=seed), labels)
    yield Rung("left and right half of two images", join_halves(real, labels, tokenizer.grid), labels)
    for name, decoding in list_decodings(model.pipe.decoding, real.shape[1]).items():
        first = 1_000_000 * (seed + 1)
        made = evaluator.generate(model, decoding, num_images=num_images, seed=first, title=name)
        assert made.tokens is not None
        yield Rung(name, made.tokens, made.labels)


def reject(
    evaluator: Evaluator, model: EvaluatedModel, rates: list[float], *, num_images: int, seed: int, classifier: Path
) -> Iterator[Rung]:
    """Yields images of the exported decoding, and those that each judge keeps of more of them."""
    judges: list[Judge] = [ClassJudge.load(classifier), TokenJudge(model.pipe.tokenizer, evaluator.data)]
    acceptances = [None, *(Acceptance(rate, judge) for judge in judges for rate in rates)]
    options = BulkOptions(num_images=num_images, seed=1_000_000 * (seed + 1), keep_tokens=True)
    for number, acceptance in enumerate(acceptances):
        file, start = model.folder / f"accepted-{seed}-{number}.npz", time.process_time()
        if acceptance is None:
            name = "all"
            generate_many(model.pipe, file, options)
        else:
            name = f"{'classifier' if acceptance.judge is judges[0] else 'two_sample'}, {acceptance.rate:g}"
            generate_accepted(model.pipe, file, options, acceptance)
        seconds = time.process_time() - start
        with np.load(file) as arrays:
            tokens, labels = (torch.from_numpy(arrays[key]).long() for key in ("tokens", "arr_1"))
        yield Rung(name, tokens, labels, seconds)


def measure(
    run: Path, *, data: Path | None, num_images: int, seeds: list[int], rates: list[float]
) -> list[dict[str, str]]:
    """Returns the rows of the table: each value of all seeds. With acceptance rates, they are those of ``reject``."""
    folders = find_run(run, data=data)
    with tempfile.TemporaryDirectory() as folder:
        model = open_model(folders, "cpu", out=Path(folder))
        tokenizer, images = model.pipe.tokenizer, open_data(folders, model.pipe)
        ledger = Ledger(Path(folder) / "ledger.jsonl")
        evaluator = open_evaluator(folders, images, ledger, device="cpu", batch_size=100)
        network = evaluator.networks[CLASSIFIER]
        known = network.choose(also=["tokens", "pixels"])
        grids = encode_real_grids(tokenizer, images)
        train, train_labels = evaluator.read_real_images("train", _POOL)
        pool, values = tokenizer.encode(train, batch_size=100), dict[str, list[dict[str, float | None]]]()
        for seed in seeds:
            rungs = climb(evaluator, model, num_images=num_images, seed=seed)
            if rates:
                judge = folders.classifier
                rungs = reject(evaluator, model, rates, num_images=num_images, seed=seed, classifier=judge)
            for rung in rungs:
                start = time.process_time()
                compared = compare_images(
                    lambda rows, tokens=rung.tokens: tokenizer.decode(tokens[rows.start : rows.stop]),
                    rung.labels,
                    network,
                    pixels=evaluator.pixels,
                    tokens=grids.with_sampled(rung.tokens),
                )
                numbers = compute_metrics({name: known[name] for name in _NAMES}, compared)
                numbers["copied"] = nearest_share(rung, pool, train_labels)
                numbers["seconds"] = rung.seconds
                values.setdefault(rung.name, []).append(numbers)
                line = {"rung": rung.name, "seed": seed, "cpu_seconds": time.process_time() - start, **numbers}
                print(json.dumps(line), flush=True)
    return [_row(name, of_seeds) for name, of_seeds in values.items()]


def _row(name: str, of_seeds: list[dict[str, float | None]]) -> dict[str, str]:
    def cell(column: str) -> str:
        values = [numbers.get(column) for numbers in of_seeds]
        texts = ["" if value is None else format_value(column, value) for value in values]
        return " / ".join(texts)

    copied = " / ".join(f"{100 * float(numbers['copied'] or 0):.1f}" for numbers in of_seeds)
    made = [numbers["seconds"] for numbers in of_seeds if numbers["seconds"] is not None]
    cost = {"CPU seconds": " / ".join(f"{seconds:.0f}" for seconds in made)} if made else {}
    return {"": name, **{title(column): cell(column) for column in _NAMES}, "near a train grid %": copied, **cost}


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="run folder or pretrained folder")
    parser.add_argument("--data", type=Path, help="data folder (default: that of the training)")
    parser.add_argument("--num-images", type=int, default=1000, help="images of each rung (default: 1000)")
    parser.add_argument("--seeds", default="0,1", help="seeds of the ladder (default: 0,1)")
    parser.add_argument("--accept-rates", default="", help="show rejection sampling with these rates, not the ladder")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start, seeds = time.process_time(), [int(seed) for seed in args.seeds.split(",")]
    rates = [float(rate) for rate in args.accept_rates.split(",") if rate]
    rows = measure(args.run, data=args.data, num_images=args.num_images, seeds=seeds, rates=rates)
    seconds = time.process_time() - start
    print(f"\n{args.num_images} images, seeds {args.seeds}, {cpu_name()}, one thread, {seconds:.0f} CPU seconds\n")
    print(format_table(rows))


if __name__ == "__main__":
    main()
