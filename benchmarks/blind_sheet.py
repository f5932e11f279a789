"""Draws a sheet of pictures without captions, and counts which of them a person named.

    python benchmarks/blind_sheet.py runs/fashion-mnist-adaln --source exported={} \
        --source 'guidance 1={"guidance": {"name": "linear", "scale": 1}}' --out sheet
    python benchmarks/blind_sheet.py --answers sheet.csv --guesses guesses.csv

The sheet, SHEET.png, shuffles real val images and those of each source, which share classes and noise. It is looked at before SHEET.csv, which has the
number, source and class of each picture. Guesses are lines ``number,class,fault``: a class and the fault may be empty.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from pathlib import Path

import torch
from measuring import format_table

from maskgit_pl import MaskGIT
from maskgit_pl.data.images import from_pil
from maskgit_pl.evaluation.folders import open_data
from maskgit_pl.evaluation.run_folders import find_run
from maskgit_pl.evaluation.reference import draw_images
from maskgit_pl.grids import image_grid

_COLUMNS = 10
_REAL = "real"


def draw_sheet(run: Path, sources: dict[str, dict[str, object]], *, out: Path, per_source: int, seed: int) -> None:
    """Writes SHEET.png and SHEET.csv."""
    pipe = MaskGIT.from_pretrained(run)
    data = open_data(find_run(run), pipe)
    order, _ = draw_images(data, "val", 10_000)
    random = torch.Generator().manual_seed(seed)
    batch = data.batches("val", order).__getitems__(range(seed * per_source, (seed + 1) * per_source))
    pictures = [(image, _REAL, int(label)) for image, label in zip(batch.content, batch.labels, strict=True)]
    labels = [number % len(pipe.class_names) for number in range(per_source)]
    for name, settings in sources.items():
        images = pipe.generate(labels, seed=1000 * (seed + 1), **settings)
        tensors = [from_pil(image, channels=batch.content.shape[1], name=name) for image in images]
        pictures += [(image, name, label) for image, label in zip(tensors, labels, strict=True)]
    order = torch.randperm(len(pictures), generator=random).tolist()
    rows = [str(first) for first in range(0, len(order), _COLUMNS)]
    image_grid(torch.stack([pictures[k][0] for k in order]), columns=_COLUMNS, row_captions=rows).save(
        out.with_suffix(".png")
    )
    with out.with_suffix(".csv").open("w", newline="") as stream:
        csv.writer(stream).writerows((n, pictures[k][1], pipe.class_names[pictures[k][2]]) for n, k in enumerate(order))


def count(answers: Path, guesses: Path) -> str:
    """Returns a table: of each source, how many pictures were named and how many have each fault."""
    with answers.open() as stream:
        truth = {number: (source, name) for number, source, name in csv.reader(stream)}
    shown, named, faults = Counter(source for source, _ in truth.values()), Counter[str](), Counter[tuple[str, str]]()
    with guesses.open() as stream:
        for number, guess, fault in csv.reader(stream):
            source, name = truth[number]
            named[source] += guess == name
            faults[source, fault] += 1
    kinds = sorted({fault for _, fault in faults if fault})
    return format_table([
        {"": source, "pictures": str(total), "named": f"{named[source]} ({100 * named[source] / total:.0f} %)",
         **{fault: str(faults[source, fault]) for fault in kinds}}
        for source, total in shown.items()
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Draws a sheet, or counts guesses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, help="run folder or pretrained folder")
    parser.add_argument("--source", action="append", default=[], help="NAME={decoding settings}")
    parser.add_argument("--per-source", type=int, default=50, help="pictures of each source (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("sheet"), help="path without its suffix (default: sheet)")
    parser.add_argument("--answers", type=Path, help="SHEET.csv")
    parser.add_argument("--guesses", type=Path, help="lines of number,class,fault")
    args = parser.parse_args(argv)
    if args.answers:
        print(count(args.answers, args.guesses))
        return
    sources = {name: json.loads(text) for name, text in (source.split("=", 1) for source in args.source)}
    draw_sheet(args.run, sources, out=args.out, per_source=args.per_source, seed=args.seed)


if __name__ == "__main__":
    main()
