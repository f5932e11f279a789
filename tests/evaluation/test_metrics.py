import math
from types import SimpleNamespace

import pytest
import torch
from torchmetrics.image import StructuralSimilarityIndexMeasure

from maskgit_pl.data import Batch
from maskgit_pl.evaluation.distances import distances
from maskgit_pl.evaluation.features import extract
from maskgit_pl.evaluation.metrics import (
    FeatureDistances,
    class_agreement,
    diversity,
    mean_pairwise_distance,
    psnr,
    reconstruction,
)
from maskgit_pl.evaluation.reference import Reference
from tests.evaluation.feature_networks import few, pictures


def batch_of(images: torch.Tensor, valid: list[bool] | None = None, first: int = 0) -> Batch:
    count = torch.arange(first, first + len(images))
    return Batch(images, count, count, count, count, torch.tensor(valid or [True] * len(images)))


class Brightness(torch.nn.Module):
    """Encodes a 1 x 1 px image to its value / 4 and decodes it to that, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.config = SimpleNamespace(num_codes=64)

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
    with pytest.raises(ValueError, match="mean squared error"):
        psnr(float("nan"))


def test_a_tokenizer_that_loses_nothing_has_infinite_psnr() -> None:
    measured = reconstruction(tokenizer(), [batch_of(pixels(0, 4, 8, 8))])
    assert measured.psnr_db == math.inf
    assert measured.images == 4
    assert measured.codebook_usage == pytest.approx(3 / 64)
    assert measured.perplexity == pytest.approx(2 ** (0.25 * 2 * 2 + 0.5), rel=1e-5)  # shares 1/4, 1/4, 1/2


def test_the_error_is_pooled_over_all_valid_images() -> None:
    batches = [batch_of(pixels(1, 0, 0)), batch_of(pixels(0, 2), valid=[True, False])]
    measured = reconstruction(tokenizer(), batches)  # 1 -> 0; the padding row would add 2 -> 0 or 4
    assert measured.images == 4
    assert measured.psnr_db == pytest.approx(-10 * math.log10((1 / 255) ** 2 / 4), rel=1e-5)


def test_reconstructions_are_clipped() -> None:
    assert reconstruction(tokenizer(factor=2.0), [batch_of(pixels(252))]).psnr_db == pytest.approx(
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
    measured = reconstruction(noisy(0.5, 16), [batch_of(images[:3]), batch_of(images[3:], first=3)])
    metric = StructuralSimilarityIndexMeasure(data_range=1.0)
    assert measured.ssim == pytest.approx(float(metric(images / 255 * 0.5, images / 255)), rel=1e-5)
    assert reconstruction(noisy(1.0, 16), [batch_of(images)]).ssim == pytest.approx(1)
    assert reconstruction(noisy(1.0, 8), [batch_of(pictures(5))]).ssim is None  # smaller than its window


def test_reconstructions_have_a_distance_from_the_originals() -> None:
    images, network = pictures(30), few()
    originals = Reference.of(extract([network], [(images, torch.arange(30))])["classifier"])
    options = {"extractors": [network], "references": {"classifier": originals}}
    batches = [batch_of(images[:20]), batch_of(images[20:], first=20)]
    assert reconstruction(noisy(1.0, 8), batches, **options).rfid["classifier"] == pytest.approx(0, abs=1e-9)
    measured = reconstruction(noisy(0.5, 8), batches, **options)
    dark = extract([network], [((images * 0.5).round().to(torch.uint8), torch.arange(30))])["classifier"]
    assert measured.rfid["classifier"] == pytest.approx(distances(dark, originals)["fid"], rel=1e-6)
    with pytest.raises(ValueError, match="rfid/classifier: the originals' reference is needed"):
        reconstruction(noisy(1.0, 8), batches, extractors=[network])


class HalfPerceptual(torch.nn.Module):
    backbone, label = "vgg", "lpips/vgg"

    def forward(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return (images - others).abs().flatten(1).mean(1)


def test_every_number_of_a_reconstruction_has_a_name() -> None:
    images, done = pictures(12, size=16), []
    measured = reconstruction(noisy(0.5, 16), [batch_of(images)], lpips=HalfPerceptual(), on_images=done.append)
    assert list(measured.numbers()) == ["psnr_db", "ssim", "lpips/vgg", "codebook_usage", "perplexity", "images"]
    assert measured.lpips["vgg"] == pytest.approx(float((images / 255).mean()) / 2, rel=1e-6)
    assert done == [12]


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        reconstruction(tokenizer(), [])


def test_agreement_of_a_perfect_classifier_is_one() -> None:
    asked = torch.tensor([0, 1, 2, 2])
    assert class_agreement(asked, asked) == 1
    assert class_agreement(torch.tensor([0, 1, 0, 0]), asked) == 0.5
    with pytest.raises(ValueError, match="one prediction an image"):
        class_agreement(asked, asked[:2])


def test_mean_pairwise_distance_is_over_all_pairs() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    assert mean_pairwise_distance(points) == pytest.approx(10 / 3)
    with pytest.raises(ValueError, match="at least 2 rows"):
        mean_pairwise_distance(points[:1])


def test_diversity_of_real_images_is_one_and_of_identical_images_zero() -> None:
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 3
    assert diversity(features, labels, features, labels) == pytest.approx(1)
    assert diversity(features * 2, labels, features, labels) == pytest.approx(2)
    assert diversity(torch.ones(60, 5), labels, features, labels) == 0


def test_diversity_looks_within_classes_and_takes_as_many_of_both() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[0.0], [1.0], [100.0], [101.0]])
    assert diversity(apart, labels, apart * 2, labels) == pytest.approx(0.5)
    many = torch.tensor([[0.0], [2.0], [500.0]])  # the third real image of class 0 has no generated one beside it
    assert diversity(apart[:2], labels[:2], many, torch.zeros(3, dtype=torch.int64)) == pytest.approx(0.5)
    assert diversity(many, torch.zeros(3, dtype=torch.int64), apart[:2], labels[:2]) == pytest.approx(2.0)


def test_diversity_without_pairs_is_refused() -> None:
    one, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="2 generated and 2 real"):
        diversity(one, labels, one, labels)


def features(count: int, *, width: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)


def matrix_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T


def test_fid_is_the_distance_of_two_gaussians() -> None:
    real, made = features(400).double(), 1.5 * features(300, seed=1).double() + 0.3
    one, other = torch.cov(real.T), torch.cov(made.T)
    root = matrix_root(one)
    expected = (real.mean(0) - made.mean(0)).square().sum() + (one + other).trace()
    expected -= 2 * matrix_root(root @ other @ root).trace()
    measured = FeatureDistances(real)(made)
    assert measured.fid == pytest.approx(float(expected), rel=1e-9)
    assert measured.images == 300


def test_a_shift_alone_costs_its_square() -> None:
    real = features(200)
    assert FeatureDistances(real)(real + 2.0).fid == pytest.approx(6 * 2.0**2, rel=1e-5)
    assert FeatureDistances(real)(real).fid == pytest.approx(0, abs=1e-9)


def test_kid_is_the_unbiased_discrepancy_of_the_cubic_kernel() -> None:
    real, made = features(50).double(), features(50, seed=1).double()  # one subset is all of them

    def kernel(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left @ right.T / 6 + 1) ** 3

    off = ~torch.eye(50, dtype=torch.bool)
    expected = kernel(real, real)[off].mean() + kernel(made, made)[off].mean() - 2 * kernel(real, made).mean()
    measured = FeatureDistances(real)(made)
    assert measured.kid == pytest.approx(float(expected), rel=1e-9)
    assert measured.kid_deviation == pytest.approx(0, abs=1e-9)


def test_kid_of_two_sets_of_one_kind_is_about_nothing_and_does_not_fall_with_their_number() -> None:
    def normal(count: int, seed: int) -> torch.Tensor:
        return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))

    real = FeatureDistances(normal(3000, 0))
    few, many, other = real(normal(100, 1)), real(normal(2000, 2)), real(normal(300, 3) * 2)
    assert max(abs(few.kid), abs(many.kid)) < other.kid / 20
    assert few.fid > 3 * many.fid  # which is why a fid stands beside a floor of as many images


def test_measuring_is_repeatable_and_leaves_torch_s_generator_alone() -> None:
    real = FeatureDistances(features(1500))
    torch.manual_seed(3)
    first, drawn = real(features(1200, seed=1)), torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    assert real(features(40, seed=2)) != first
    assert real(features(1200, seed=1)) == first


def test_a_distance_needs_two_images() -> None:
    with pytest.raises(ValueError, match=r"real features: .* at least 2 images"):
        FeatureDistances(features(1))
    with pytest.raises(ValueError, match=r"generated features: .* at least 2 images"):
        FeatureDistances(features(2))(features(1))
