"""Pictures of an evaluation: generated images by class, reconstructions, and an animation of the decoding."""

from __future__ import annotations

from pathlib import Path

import torch

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.evaluator import Evaluator
from maskgit_pl.evaluation.generation import GeneratedImages
from maskgit_pl.evaluation.pages import choose_classes
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.display import Recording
from maskgit_pl.pipeline.imaging_grids import image_grid, reconstruction_grid, save_png

__all__ = ["write_pictures"]

_SHOWN_OF_A_CLASS, _SHOWN_PAIRS, _ANIMATED = 8, 16, 4


def write_pictures(
    evaluator: Evaluator,
    pipe: MaskGIT,
    decoding: DecodingConfig,
    generated: GeneratedImages,
    *,
    folder: Path,
    seed: int,
) -> None:
    """Writes ``samples.png``, ``reconstructions.png`` and ``decoding.gif``.

    Args:
        evaluator: Evaluator whose data give the real images.
        pipe: The model.
        decoding: Decoding of the animation.
        generated: Generated images, sorted by class.
        folder: Folder of the files.
        seed: Seed of the first image of the animation.
    """
    classes = choose_classes(len(pipe.class_names))
    rows = []
    for label in classes:
        start = int((generated.labels == label).nonzero()[0])
        rows.append(
            generated.read(range(start, min(start + _SHOWN_OF_A_CLASS, start + int((generated.labels == label).sum()))))
        )
    least = min(len(row) for row in rows)
    names = [pipe.class_names[label] for label in classes]
    folder.mkdir(parents=True, exist_ok=True)
    grid = image_grid(torch.cat([row[:least] for row in rows]), columns=least, row_captions=names)
    save_png(grid, folder / "samples.png")

    originals = evaluator.read_real_images("val", _SHOWN_PAIRS)[0]
    reconstructions = pipe.tokenizer.decode(pipe.tokenizer.encode(originals))
    save_png(reconstruction_grid(originals, reconstructions), folder / "reconstructions.png")

    shown = classes[:_ANIMATED]
    seeds = [seed + number for number in range(len(shown))]
    steps = list(pipe.steps(shown, seed=seeds, decoding=decoding))
    captions = [pipe.class_names[label] for label in shown]
    token_size = pipe.outline.token_size
    recording = Recording(
        steps, pipe.tokenizer.decode, pipe.tokenizer.grid, decoding, captions, seeds, token_size=token_size
    )
    recording.save(folder / "decoding.gif")
