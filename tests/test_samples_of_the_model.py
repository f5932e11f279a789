"""Both modules refuse samples that are not those they were built for, with a plain Trainer and data of a user."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from maskgit_pl.data import IndexedDataModule, IndexedDataset
from tests.short_runs import tiny_module


def data(*, label: int = 0, size: int | tuple[int, int] = 8, channels: int = 1) -> IndexedDataModule:
    """Eight grey images of 8 px; the last one has the given label."""
    images = torch.arange(8 * 64, dtype=torch.int64).remainder(256).to(torch.uint8).view(8, 1, 8, 8)
    pairs = TensorDataset(images, torch.tensor([0] * 7 + [label]))
    dataset = IndexedDataset(pairs, image_size=size, in_channels=channels)
    return IndexedDataModule(dataset, dataset, global_batch=8)


def trainer() -> Trainer:
    parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(max_steps=1, accelerator="cpu", limit_val_batches=0, **dict.fromkeys(parts, False))


def build(kind: str, tiny_pretrained: Path) -> LightningModule:
    return tiny_module(kind, tiny_pretrained / "tokenizer")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformer", "autoregressive"])
def test_a_label_that_is_no_class_of_the_model_is_refused(tiny_pretrained, kind):
    module = build(kind, tiny_pretrained)
    with pytest.raises(ValueError, match=r"labels of the data must be in \[0, 3\), the classes .* got 3"):
        trainer().fit(module, data(label=3))  # the row of the null class
    with pytest.raises(ValueError, match=r"labels of the data must be in \[0, 3\)"):
        Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(module, data(label=3))
    trainer().fit(module, data(label=2))


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
@pytest.mark.parametrize(
    ("other", "got"),
    # 4 x 16 pixels have as many tokens as 8 x 8
    [({"size": (4, 16)}, r"\(1, 4, 16\)"), ({"size": 16}, r"\(1, 16, 16\)"), ({"channels": 3}, r"\(3, 8, 8\)")],
)
def test_images_of_another_shape_are_refused(tiny_pretrained, kind, other, got):
    with pytest.raises(ValueError, match=rf"samples of the data must have the shape \(1, 8, 8\) .* got {got}"):
        trainer().fit(build(kind, tiny_pretrained), data(**other))


def test_tokens_of_another_grid_are_refused(tiny_pretrained):
    batch = data().train.__getitems__(range(8))._replace(content=torch.zeros(8, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must have the shape \(16,\) of the model, got \(9,\)"):
        build("transformer", tiny_pretrained).eval().draw_on_host(batch)


@pytest.mark.parametrize("token", [16, -1])
def test_a_token_that_is_no_code_of_the_model_is_refused(tiny_pretrained, token):
    batch = data().train.__getitems__(range(8))._replace(content=torch.zeros(8, 16, dtype=torch.int64))
    batch.content[7, 15] = token  # 16 is the row of a class
    with pytest.raises(ValueError, match=rf"tokens of the data must be in \[0, 16\), the codes .* got {token}"):
        build("transformer", tiny_pretrained).eval().draw_on_host(batch)


@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_batches_of_a_plain_loader_are_refused(tiny_pretrained, kind):
    pairs = TensorDataset(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    loader = DataLoader(pairs, batch_size=4)
    with pytest.raises(TypeError, match=r"batches of the type list; use IndexedDataModule\(IndexedDataset"):
        trainer().fit(build(kind, tiny_pretrained), loader, loader)


@pytest.mark.parametrize("names", [["a"], "abc", ["a", "b", 3]])
def test_an_export_without_a_name_for_each_class_writes_nothing(tiny_pretrained, tmp_path, names):
    with pytest.raises(ValueError, match="class_names must be a list of 3 strings, one for each class"):
        build("transformer", tiny_pretrained).export(tmp_path / "out", class_names=names)
    assert not (tmp_path / "out").exists()
