import math
from types import SimpleNamespace

import pytest
import torch
from torchmetrics.image import StructuralSimilarityIndexMeasure

from maskgit_pl.data import Batch
from maskgit_pl.evaluation.features import extract
from maskgit_pl.evaluation.reconstruction import measure_reconstruction, psnr
from maskgit_pl.evaluation.reference import Reference
from tests.evaluation.feature_networks import distances, few, pictures


def batch_of(images: torch.Tensor, valid: list[bool] | None = None, first: int = 0) -> Batch:
    count = torch.arange(first, first + len(images))
    return Batch(images, count, count, count, count, torch.tensor(valid or [True] * len(images)))


class Brightness(torch.nn.Module):
    """Encodes a 1 x 1 px image to its value / 4 and decodes it to that, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.config = SimpleNamespace(codebook_size=64)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return (images * 255 / 4).round().long().flatten(1)

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return (tokens.float() * 4 / 255).reshape(-1, 1, *grid) * self.factor


def tokenizer(factor: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(network=Brightness(factor), image_size=1, grid=(1, 1))


def pixels(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1)


def test_psnr_is_its_formula() -> None:
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(1.0) == 0
    assert psnr(0.0) == math.inf


def test_a_lossless_tokenizer_has_infinite_psnr() -> None:
    measured = measure_reconstruction(tokenizer(), [batch_of(pixels(0, 4, 8, 8))])
    assert measured["psnr_db"] == math.inf
    assert measured["images"] == 4
    assert measured["codebook_usage"] == pytest.approx(3 / 64)
    assert measured["perplexity"] == pytest.approx(2 ** (0.25 * 2 * 2 + 0.5), rel=1e-5)  # shares 1/4, 1/4, 1/2


def test_the_error_is_pooled_over_all_valid_images() -> None:
    batches = [batch_of(pixels(1, 0, 0)), batch_of(pixels(0, 2), valid=[True, False])]
    measured = measure_reconstruction(tokenizer(), batches)  # 1 -> 0; the padding row would add 2 -> 0 or 4
    assert measured["images"] == 4
    assert measured["psnr_db"] == pytest.approx(-10 * math.log10((1 / 255) ** 2 / 4), rel=1e-5)


def test_reconstructions_are_clipped() -> None:
    assert measure_reconstruction(tokenizer(factor=2.0), [batch_of(pixels(252))])["psnr_db"] == pytest.approx(
        -20 * math.log10(3 / 255), rel=1e-4
    )


class Noisy(Brightness):
    """Decodes any image to itself, a little darker."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        return super().encode(images[:, :1, :1, :1])

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.images * self.factor


def noisy(factor: float, size: int) -> SimpleNamespace:
    return SimpleNamespace(network=Noisy(factor), image_size=size, grid=(1, 1))


def test_structural_similarity_is_the_mean_over_images() -> None:
    images = pictures(5, size=16)
    measured = measure_reconstruction(noisy(0.5, 16), [batch_of(images[:3]), batch_of(images[3:], first=3)])
    metric = StructuralSimilarityIndexMeasure(data_range=1.0)
    assert measured["ssim"] == pytest.approx(float(metric(images / 255 * 0.5, images / 255)), rel=1e-5)
    assert measure_reconstruction(noisy(1.0, 16), [batch_of(images)])["ssim"] == pytest.approx(1)
    assert "ssim" not in measure_reconstruction(noisy(1.0, 8), [batch_of(pictures(5))])  # smaller than its window


def test_reconstructions_have_a_distance_from_the_originals() -> None:
    images, network = pictures(30), few()
    originals = Reference.from_features(extract([network], [(images, torch.arange(30))])["classifier"])
    options = {"extractors": [network], "references": {"classifier": originals}}
    batches = [batch_of(images[:20]), batch_of(images[20:], first=20)]
    assert measure_reconstruction(noisy(1.0, 8), batches, **options)["rfid/classifier"] == pytest.approx(0, abs=1e-9)
    measured = measure_reconstruction(noisy(0.5, 8), batches, **options)
    dark = extract([network], [((images * 0.5).round().to(torch.uint8), torch.arange(30))])["classifier"]
    assert measured["rfid/classifier"] == pytest.approx(distances(dark, originals)["fid"], rel=1e-6)


class HalfPerceptual(torch.nn.Module):
    backbone, label = "vgg", "lpips/vgg"

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return (images - others).abs().flatten(1).mean(1)


def test_every_number_of_a_reconstruction_has_a_name() -> None:
    images, done = pictures(12, size=16), []
    measured = measure_reconstruction(noisy(0.5, 16), [batch_of(images)], lpips=HalfPerceptual(), on_images=done.append)
    assert list(measured) == ["psnr_db", "ssim", "lpips/vgg", "codebook_usage", "perplexity", "images"]
    assert measured["lpips/vgg"] == pytest.approx(float((images / 255).mean()) / 2, rel=1e-6)
    assert done == [12]
