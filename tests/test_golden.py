"""Everything agrees with arrays recorded from the released code: see ``golden/README.md``."""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comparators.comparison import gradients
from comparators.every import Report, check_file, files_of
from comparators.folder import Folder
from comparators.full import check_model
from comparators.transformer import load_transformer
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from maskgit_pl.data import Batch
from maskgit_pl.importers.released import transformer_weights
from tests.modules import masked_model

GOLDEN = Folder(Path(__file__).parent / "golden")
ELSEWHERE = os.environ.get("MASKGIT_GOLDEN_DIR")  # another folder of the same layout
COMPLETE = Path(ELSEWHERE or "") / "full"
FULL = Folder(COMPLETE if ELSEWHERE and COMPLETE.is_dir() else GOLDEN.path / "full", "full_golden.json")


def hold(report: Report, record_property, *, folder: str = "golden") -> None:
    """Counts the arrays of a report for the summary, and fails where one is off."""
    record_property(folder, (report.agreeing, len(report.comparisons)))
    compared = [made for made in report.comparisons if made.kind == "close"]
    if compared:
        print("largest:", max(compared, key=lambda made: made.difference / made.tolerance))
    assert report.comparisons
    assert report.agrees, "\n".join(report.failures())


@pytest.mark.parametrize("file", files_of(GOLDEN))
def test_every_array_agrees_with_the_recorded_one(file, record_property):
    hold(check_file(GOLDEN, file), record_property)


@pytest.mark.parametrize("folder", [GOLDEN, Folder(GOLDEN.path / "full", "full_golden.json")], ids=["small", "full"])
def test_the_folder_is_what_its_manifest_says(folder):
    assert list(folder.problems()) == []


@pytest.mark.slow
@pytest.mark.parametrize("model", FULL.manifest["sha256"])
def test_the_released_size_agrees(model, record_property):
    hold(check_model(FULL, model), record_property, folder=f"golden {FULL.path}")
    print("peak memory:", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MiB")


@pytest.mark.slow
@pytest.mark.skipif(ELSEWHERE is None, reason="MASKGIT_GOLDEN_DIR names no other folder of recorded arrays")
def test_every_array_of_the_other_folder_agrees(record_property):
    folder = Folder(Path(ELSEWHERE))
    report = Report(problems=list(folder.problems()))
    for file in files_of(folder):
        report += check_file(folder, file)
    hold(report, record_property, folder=f"golden {folder.path}")


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
        seen, wanted = torch.from_numpy(arrays["tokens"]).long(), torch.from_numpy(arrays["loss_labels"]).long()
        self.masks = seen[:, 1:] == -1
        self.tokens = wanted[:, 1:].where(self.masks, seen[:, 1:])
        self.labels = wanted[:, 0] - codebook_size
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
    to_ours = lambda recorded: transformer_weights(recorded, config)  # noqa: E731
    compared = list(gradients(tree, GOLDEN.tree(tree), seen.gradients, to_ours, tolerance=1e-4))
    hold(Report(compared), record_property, folder="golden training step")
