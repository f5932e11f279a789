"""The judges of pixels: each finds the fault that it is named after."""

from dataclasses import replace

import pytest
import torch

from maskgit_pl.evaluation.extractors import extract
from maskgit_pl.evaluation.metrics import ComparedImages, computed_metrics
from maskgit_pl.evaluation.pixels import pixel_extractor
from maskgit_pl.evaluation.reference import Reference
from tests.evaluation.feature_networks import few


def photos(count: int, *, channels: int = 3, size: int = 24, noise: float = 4.0, seed: int = 0) -> torch.Tensor:
    """(count, C, size, size) uint8 images of one brightness each, and noise."""
    generator = torch.Generator().manual_seed(seed)
    base = 64 + 128 * torch.rand(count, 1, 1, 1, generator=generator)
    return (base + noise * torch.randn(count, channels, size, size, generator=generator)).clamp(0, 255).to(torch.uint8)


def value(name: str, generated: torch.Tensor, real: torch.Tensor) -> float | None:
    labels = torch.arange(len(real)) % 2
    compared = []
    for extractor in (few(channels=real.shape[1]), pixel_extractor()):
        of_generated, of_real = (
            extract([extractor], [(images, torch.arange(len(images)))])[extractor.label] for images in (generated, real)
        )
        reference = Reference.from_features(of_real)
        compared.append(ComparedImages(of_generated, reference, labels[: len(generated)], labels))
    known = computed_metrics()[name].compute(replace(compared[0], pixels=compared[1]))
    assert not isinstance(known, tuple)
    return known


def test_noise_has_no_weave_and_a_checkerboard_has() -> None:
    real = photos(40, noise=8.0)
    assert value("weave", real, real) == pytest.approx(1, abs=0.1)  # each frequency has the same power
    checker = (torch.arange(24)[:, None] + torch.arange(24)) % 2 * 16
    assert value("weave", real + checker.to(torch.uint8), real) > 3
    smooth = torch.nn.functional.avg_pool2d(real.float(), 2, 1).to(torch.uint8)
    assert value("weave", smooth, real) < 0.5


def test_weave_looks_at_even_areas_only() -> None:
    stripes = torch.zeros(4, 1, 24, 24, dtype=torch.uint8)
    stripes[..., 4::8] = 255  # the blocks with an edge in one half
    assert value("weave", stripes, stripes) is None
    assert value("weave", photos(4, channels=1, size=6), photos(4, channels=1, size=6)) is None  # no block of 8 pixels


def test_the_spread_of_equal_images_is_zero_and_that_of_the_real_ones_is_one() -> None:
    real = photos(60)
    assert value("brightness_spread", real, real) == pytest.approx(1)
    assert value("brightness_spread", real[:2].repeat(20, 1, 1, 1), real) == pytest.approx(0, abs=1e-6)
    half = ((real.float() - 128) / 2 + 128).to(torch.uint8)
    assert value("brightness_spread", half, real) == pytest.approx(0.5, abs=0.01)
    assert value("contrast_spread", real, real) == pytest.approx(1)
    assert value("brightness_spread", real, real[:1].repeat(60, 1, 1, 1)) is None  # real images without any spread


def test_pixel_fid_is_the_closed_form_and_sees_what_the_images_have_in_common() -> None:
    real = photos(80)
    assert value("pixel_fid", real, real) == pytest.approx(0, abs=1e-6)
    brighter = (real.int() + 20).clamp(max=255).to(torch.uint8)
    # All pixels of 16 x 16 x 3 move by 20 / 255, but for the clamped ones; the covariance stays.
    assert value("pixel_fid", brighter, real) == pytest.approx(768 * (20 / 255) ** 2, rel=0.05)
