"""Pipelines, images and decoding steps that several files of this folder use."""

from pathlib import Path

import pytest
import torch

from maskgit_pl.decoding import DecodingStep
from maskgit_pl.pipeline import MaskGIT


@pytest.fixture(scope="module")
def pipe(tiny_pretrained: Path) -> MaskGIT:
    """Returns a pipeline with random weights, of 8 px images and 4 x 4 tokens."""
    return MaskGIT.from_pretrained(tiny_pretrained)


@pytest.fixture(scope="module")
def demo() -> MaskGIT:
    """Returns the model of the package."""
    return MaskGIT.from_pretrained("fashion-mnist-demo")


def random_images(count: int, channels: int = 1, size: int = 28) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def images(pipe: MaskGIT, classes, **options) -> torch.Tensor:
    return pipe.generate(classes, output_type="pt", **options)


def last_tokens(pipe: MaskGIT, classes, **options) -> torch.Tensor:
    return pipe.record(classes, **options).steps[-1].tokens


def step(number: int, was: list[int], still: list[int], count: int = 2) -> DecodingStep:
    """Builds a decoding step of equal images: tokens ``was`` are masked before it and tokens ``still`` after it."""
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, was], masks[1, still] = True, True
    tokens = torch.zeros(count, 16, dtype=torch.int64)
    was_masked, still_masked = (mask.expand(count, 16) for mask in masks)
    return DecodingStep(number, tokens, was_masked, still_masked, torch.zeros(count, 16), torch.ones(count, 16))


STEPS = [step(0, list(range(16)), list(range(8))), step(1, list(range(8)), [])]
