import hashlib
from pathlib import Path

import pytest
import torch
import torchvision
from torchmetrics.functional.image import lpips as theirs
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from maskgit_pl.networks.perceptual import load_lpips

MODELS = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}


@pytest.fixture(scope="module", params=sorted(MODELS))
def backbone(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[str, torch.nn.Module, Path, str]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = MODELS[request.param]().features
    file = tmp_path_factory.mktemp("lpips") / f"{request.param}.pth"
    torch.save({f"features.{name}": value for name, value in features.state_dict().items()}, file)
    return request.param, features, file, hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_distance_is_torchmetrics_with_the_backbone_of_the_file(backbone, monkeypatch) -> None:
    name, features, file, sha256 = backbone
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: features)
    expected = LearnedPerceptualImagePatchSimilarity(name, normalize=True)
    images, others = torch.rand(3, 3, 32, 32), torch.rand(3, 3, 32, 32)
    ours = load_lpips(f"{name}={file}", sha256=sha256)
    found = ours(images, others)
    assert found.shape == (3,)
    assert float(found.mean()) == pytest.approx(float(expected(images, others)), rel=1e-6)
    assert ours(images, images).tolist() == [0, 0, 0]
    assert ours(images[:, :1], others[:, :1]).shape == (3,)
    assert ours.label == f"lpips/{name}"
    with pytest.raises(ValueError, match=rf"lpips/{name}: the edges of images must be >= \d+ pixels, got \(8, 8\)"):
        ours(images[..., :8, :8], others[..., :8, :8])


@pytest.mark.slow
def test_no_other_file_is_called_lpips(backbone, monkeypatch, tmp_path: Path) -> None:
    name, _, file, _ = backbone
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **options: pytest.fail("loaded"))
        with pytest.raises(ValueError, match=rf"lpips '{name}' weights must be a file whose sha256 begins with"):
            load_lpips(f"{name}={file}")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="with other tensors"):
        load_lpips(f"{name}={tmp_path / 'other.pth'}", sha256="")


def test_errors_name_the_missing_file_or_backbone() -> None:
    with pytest.raises(
        ValueError,
        match=r"lpips must be vgg=FILE .*, got 'vgg'; download the file from https://\S+/vgg16-397923af\.pth",
    ):
        load_lpips("vgg")
    with pytest.raises(
        ValueError, match=r"got 'alex=none\.pth'; download the file from https://\S+/alexnet-owt-7be5be79\.pth"
    ):
        load_lpips("alex=none.pth")
    with pytest.raises(ValueError, match="known: alex, squeeze, vgg"):
        load_lpips("lite0")
