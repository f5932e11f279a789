"""Images and decoding steps that the tests of pictures draw."""

import torch

from maskgit_pl.decoding import DecodingStep


def random_images(count: int, channels: int = 1, size: int = 28) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def step(number: int, was: list[int], still: list[int], count: int = 2) -> DecodingStep:
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, was], masks[1, still] = True, True
    tokens = torch.zeros(count, 16, dtype=torch.int64)
    was_masked, still_masked = (mask.expand(count, 16) for mask in masks)
    return DecodingStep(number, tokens, was_masked, still_masked, torch.zeros(count, 16), torch.ones(count, 16))


STEPS = [step(0, list(range(16)), list(range(8))), step(1, list(range(8)), [])]
