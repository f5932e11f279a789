"""Draws a sheet of pictures without captions, and counts which of them a person named.

    python benchmarks/blind_sheet.py runs/fashion-mnist-adaln --source 'guidance 3={"guidance_scale": 3}' --out sheet
    python benchmarks/blind_sheet.py runs/fashion-mnist-adaln --rated --out sheet
    python benchmarks/blind_sheet.py --count sheet

SHEET.png shuffles real val images and those of each source, which share classes and noise; with ``--rated``, those of
1,000 generated images that look most and least real to the networks of ``two_sample``. It is looked at before
SHEET.csv, which has the number, source and class of each picture. The person writes SHEET.guesses.csv, lines of
``number,class,fault``; the fault may be empty.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any, TypeAlias

import torch
from measuring import format_table
from torch import Tensor

from maskgit_pl import MaskGIT
from maskgit_pl.data import ShardData
from maskgit_pl.evaluation.folders import open_data
from maskgit_pl.evaluation.likelihood import encode_real_grids
from maskgit_pl.evaluation.reference import draw_images
from maskgit_pl.evaluation.run_folders import find_run
from maskgit_pl.evaluation.two_sample import rate_grids
from maskgit_pl.grids import image_grid, save_png

_COLUMNS = 10
_REAL = "real"
_RATED = 1000  # images of which the most and the least real ones are drawn
Picture: TypeAlias = tuple[Tensor, str, int]  # (C, H, W) uint8, its source and its class


def rate(pipe: MaskGIT, data: ShardData, *, per_source: int, seed: int) -> list[Picture]:
    """Returns the pictures of each class that look most and least real to networks that are trained on the spot."""
    classes = len(pipe.class_names)
    labels = torch.arange(_RATED) % classes
    tokens = pipe.generate_tokens(labels.tolist(), seed=1000 * (seed + 1))
    real = encode_real_grids(pipe.tokenizer, data, split="train", limit=2 * _RATED)
    ratings, pictures = rate_grids(real.with_sampled(tokens.flatten(1)), labels), list[Picture]()
    for label in range(classes):
        rows = (labels == label).nonzero()[:, 0]
        best = rows[ratings[rows].argsort(descending=True)]
        for name, chosen in {"most real": best, "least real": best.flip(0)}.items():
            images = pipe.tokenizer.decode(tokens[chosen[: per_source // classes]].flatten(1))
            pictures += [(image, name, label) for image in images]
    return pictures


def draw_sheet(
    run: Path, sources: dict[str, dict[str, Any]], *, rated: bool, out: Path, per_source: int, seed: int
) -> None:
    """Writes SHEET.png and SHEET.csv."""
    pipe = MaskGIT.from_pretrained(run)
    data = open_data(find_run(run), pipe)
    order, _ = draw_images(data, "val", 10_000)
    random = torch.Generator().manual_seed(seed)
    batch = data.batches("val", order).__getitems__(range(seed * per_source, (seed + 1) * per_source))
    pictures: list[Picture] = [
        (image, _REAL, int(label)) for image, label in zip(batch.content, batch.labels, strict=True)
    ]
    labels = [number % len(pipe.class_names) for number in range(per_source)]
    for name, settings in sources.items():
        images = pipe.generate(labels, seed=1000 * (seed + 1), output_type="pt", **settings)
        pictures += [(image, name, label) for image, label in zip(images, labels, strict=True)]
    if rated:
        pictures += rate(pipe, data, per_source=per_source, seed=seed)
    shuffled = [pictures[row] for row in torch.randperm(len(pictures), generator=random).tolist()]
    images, captions = torch.stack([image for image, _, _ in shuffled]), map(str, range(0, len(shuffled), _COLUMNS))
    save_png(image_grid(images, columns=_COLUMNS, row_captions=list(captions)), out.with_suffix(".png"))
    with out.with_suffix(".csv").open("w", newline="") as stream:
        rows = ((number, source, pipe.class_names[label]) for number, (_, source, label) in enumerate(shuffled))
        csv.writer(stream, lineterminator="\n").writerows(rows)


def count(sheets: list[Path]) -> str:
    """Returns a table: of each source, how many pictures of all sheets were named, and how many have each fault."""
    shown, named, faults = Counter[str](), Counter[str](), Counter[tuple[str, str]]()
    for sheet in sheets:
        with sheet.with_suffix(".csv").open() as stream:
            truth = {number: (source, name) for number, source, name in csv.reader(stream)}
        shown.update(source for source, _ in truth.values())
        with sheet.with_suffix(".guesses.csv").open() as stream:
            for number, guess, fault in csv.reader(stream):
                source, name = truth[number]
                named[source] += guess == name
                faults[source, fault] += 1
    kinds = sorted({fault for _, fault in faults if fault})
    return format_table([
        {"": source, "pictures": str(shown[source]), "named": str(named[source]),
         **{fault: str(faults[source, fault]) for fault in kinds}}
        for source in sorted(shown)
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Draws a sheet, or counts guesses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, help="run folder or pretrained folder")
    parser.add_argument("--source", action="append", default=[], help="NAME={decoding settings}")
    parser.add_argument("--rated", action="store_true", help="draw the most and the least real of 1,000 images")
    parser.add_argument("--per-source", type=int, default=50, help="pictures of each source (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("sheet"), help="path without its suffix (default: sheet)")
    parser.add_argument("--count", nargs="+", type=Path, metavar="SHEET", help="count the guesses of these sheets")
    args = parser.parse_args(argv)
    if args.count:
        print(count(args.count))
        return
    sources = {name: json.loads(text) for name, text in (source.split("=", 1) for source in args.source)}
    draw_sheet(args.run, sources, rated=args.rated, out=args.out, per_source=args.per_source, seed=args.seed)


if __name__ == "__main__":
    main()
