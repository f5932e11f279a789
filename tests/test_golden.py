"""All arrays recorded from the released code agree (``golden/README.md``), and one that does not is found."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from check import check_file, check_model, files_of
from comparators.comparison import Comparison, gradients
from comparators.folder import Folder
from comparators.transformer import load_transformer
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from maskgit_pl.data import Batch
from maskgit_pl.importers.released import transformer_weights
from tests.forked import in_own_process
from tests.short_runs import masked_model

GOLDEN = Folder(Path(__file__).parent / "golden")
ELSEWHERE = os.environ.get("MASKGIT_GOLDEN_DIR")  # another folder of the same layout
COMPLETE = Path(ELSEWHERE or "") / "full"
FULL = Folder(COMPLETE if ELSEWHERE and COMPLETE.is_dir() else GOLDEN.path / "full", "full_golden.json")


def assert_agree(comparisons: list[Comparison], record_property, *, folder: str = "golden") -> None:
    """Counts the arrays that agree for the summary, and fails where one does not."""
    record_property(folder, (sum(comparison.agrees for comparison in comparisons), len(comparisons)))
    assert comparisons
    assert [str(comparison) for comparison in comparisons if not comparison.agrees] == []


@pytest.mark.parametrize("file", files_of(GOLDEN))
def test_every_array_agrees_with_the_recorded_one(file, record_property):
    assert_agree(check_file(GOLDEN, file), record_property)


@pytest.mark.parametrize("folder", [GOLDEN, Folder(GOLDEN.path / "full", "full_golden.json")], ids=["small", "full"])
def test_a_folder_has_the_files_of_its_manifest(folder):
    sizes = {file: (folder.path / file).stat().st_size for file in folder.present}
    assert sizes == {file: entry["bytes"] for file, entry in folder.manifest["files"].items()}


def check_full(model: str) -> list[Comparison]:
    return check_model(FULL, model)


@pytest.mark.slow
@pytest.mark.parametrize("model", FULL.manifest["sha256"])
def test_the_released_size_agrees(model, record_property):
    assert_agree(in_own_process(check_full, model), record_property, folder=f"golden {FULL.path}")


@pytest.mark.slow
@pytest.mark.skipif(ELSEWHERE is None, reason="MASKGIT_GOLDEN_DIR names no other folder of recorded arrays")
def test_every_array_of_the_other_folder_agrees(record_property):
    folder = Folder(Path(ELSEWHERE))
    comparisons = [comparison for file in files_of(folder) for comparison in check_file(folder, file)]
    assert_agree(comparisons, record_property, folder=f"golden {folder.path}")


# A whole training step


@dataclass(frozen=True)
class RecordedMasks:
    """Stands in for the mask sampler: the recorded mask of each sample."""

    masks: Tensor  # (samples, N) bool

    def mask(self, num_tokens: int, *, index: Tensor, **place: object) -> Tensor:
        return self.masks[index]


class RecordedBatch(LightningDataModule):
    """The recorded samples as one global batch, in micro-batches.

    Where the mask is off, tokens are what the network sees; where it is on, they are what it must predict.
    """

    def __init__(self, arrays: dict[str, np.ndarray], codebook_size: int, micro_batch: int) -> None:
        super().__init__()
        seen, targets = torch.from_numpy(arrays["tokens"]).long(), torch.from_numpy(arrays["loss_labels"]).long()
        self.masks = seen[:, 1:] == -1
        self.tokens = targets[:, 1:].where(self.masks, seen[:, 1:])
        self.labels = targets[:, 0] - codebook_size
        self.global_batch = len(seen)
        self.micro_batch = micro_batch

    def train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(list(self._batches()), batch_size=None)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self.train_dataloader()

    def _batches(self) -> Iterator[Batch]:
        for index in torch.arange(self.global_batch).split(self.micro_batch):
            yield Batch(
                self.tokens[index],
                self.labels[index],
                index,
                torch.zeros_like(index),
                index,
                torch.ones_like(index) > 0,
            )


class Seen(Callback):
    """The loss of each micro-batch, as it enters the step, and the gradients that the optimizer gets."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.gradients = {name: weight.grad.clone() for name, weight in module.transformer.named_parameters()}


@pytest.mark.parametrize("micro_batch", [3, 1], ids=["whole", "accumulated"])
def test_a_training_step_has_the_recorded_loss_and_gradients(micro_batch, tmp_path, record_property):
    arrays, network = GOLDEN.arrays("transformer_n16.npz"), load_transformer(GOLDEN, "n16")
    config = replace(network.config, dropout=0.0, class_dropout=0.0)
    data = RecordedBatch(arrays, config.codebook_size, micro_batch)
    module = masked_model(config, tmp_path, label_smoothing=0.1, loss_vocabulary="all", global_batch=data.global_batch)
    module.transformer.load_state_dict(network.state_dict())
    module.mask_sampler = RecordedMasks(data.masks)
    seen = Seen()
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[seen], accumulate_grad_batches=3 // micro_batch, log_every_n_steps=1,
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 1
    assert len(seen.losses) == 3 // micro_batch
    assert sum(seen.losses) == pytest.approx(
        float(arrays["loss_value"]), abs=1e-4
    )  # Lightning divides each by their number
    tree = "transformer_n16_grads.msgpack"
    to_ours = lambda recorded: transformer_weights(recorded, config)  # noqa: E731  # one expression, named for the reader
    compared = list(gradients(tree, GOLDEN.tree(tree), seen.gradients, to_ours, tolerance=1e-4))
    assert_agree(compared, record_property, folder="golden training step")


# The comparison


def test_an_element_that_differs_and_an_array_that_is_not_compared_are_found(tmp_path):
    file, array = "losses.npz", "ce_grad_smoothing0.1"
    shutil.copy(GOLDEN.path / GOLDEN.manifest_name, tmp_path)
    arrays = GOLDEN.arrays(file)
    changed = arrays[array].copy()
    changed.flat[changed.size // 2] += 1e-3
    np.savez_compressed(tmp_path / file, **{**arrays, array: changed})
    np.savez_compressed(tmp_path / "penalties.npz", **arrays)
    assert [each.array for each in check_file(Folder(tmp_path), file) if not each.agrees] == [array]
    assert not any(each.agrees for each in check_file(Folder(tmp_path), "penalties.npz"))
