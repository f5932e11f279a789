"""``maskgit train`` with loggers, callbacks and a profiler that the recipe names, also of another package."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from maskgit_pl.training.checkpoints import FolderCheckpointIO, newest_checkpoint
from tests.cli.commands import Answer, refused
from tests.installed_packages import install

POINTS = """
[maskgit_pl.loggers]
notes = trackers_of_mine:Notes
[maskgit_pl.callbacks]
counter = trackers_of_mine:Counter
[maskgit_pl.optimizers]
signs = trackers_of_mine:Signs
[maskgit_pl.augmentations]
grey = trackers_of_mine:Grey
"""
MODULE = '''
from dataclasses import dataclass

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from maskgit_pl.data.augmentations import Augmentation
from maskgit_pl.training.callbacks import CallbackSpec
from maskgit_pl.training.loggers import LoggerSpec
from maskgit_pl.training.optimizers import OptimizerSpec


class SignDescent(torch.optim.SGD):
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.grad.sign_()
        super().step()
        return loss


@dataclass(frozen=True)
class Signs(OptimizerSpec):
    """An optimizer that steps by the sign of the gradient."""

    momentum: float = 0.9

    def create(self, groups, config):
        return SignDescent(groups, lr=config.learning_rate.peak, momentum=self.momentum)


@dataclass(frozen=True)
class Grey(Augmentation):
    """An augmentation that makes all pixels equal."""

    value: int = 128

    def __call__(self, image, random, *, size):
        return torch.full_like(image, self.value)


@dataclass(frozen=True)
class Notes(LoggerSpec):
    """A logger that writes CSV files to a folder with a name of its own."""

    place: str = "notes"

    def create(self, folder, *, run_id):
        return CSVLogger(folder, name=self.place, flush_logs_every_n_steps=1)

    def log_image(self, logger, name, picture, step):
        picture.save(f"{logger.save_dir}/{self.place}-{name}-{step}.png")


class Counts(Callback):
    steps = 0

    def __init__(self, file):
        self.file = file

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps += 1
        self.file.write_text(f"{self.steps} {batch.content.unique().tolist()}")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


@dataclass(frozen=True)
class Counter(CallbackSpec):
    """A callback that counts steps."""

    def create(self, folder):
        return Counts(folder / "steps.txt")
'''


@pytest.fixture
def train_recipe(train: Callable[..., Answer], tmp_path: Path) -> Callable[..., Answer]:
    """Trains stage 2 of the run ``one`` with a recipe of the user."""

    def call(recipe: dict[str, object], *more: str) -> Answer:
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(recipe))
        return train("transformer", "--recipe", file, *more)

    return call


@pytest.mark.slow
def test_a_logger_a_callback_an_optimizer_and_an_augmentation_of_a_package_are_named_in_one_recipe(
    train_recipe, tmp_path, monkeypatch
) -> None:
    install(tmp_path / "site", name="trackers-of-mine", entry_points=POINTS, modules={"trackers_of_mine": MODULE})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    recipe = {
        "loggers": ["tensorboard", "csv", {"name": "notes", "place": "own"}],
        "callbacks": ["counter", {"name": "model_summary", "max_depth": 2}],
        "profiler": "simple",
        "model": {"optimizer": {"algorithm": {"name": "signs", "momentum": 0.5}}},
        "data": {"augmentations": ["random_crop", {"name": "grey", "value": 7}]},
    }
    trained = train_recipe(recipe, "--trainer.max_steps=2", "--trainer.log_every_n_steps=1")
    assert trained.code == 0, trained
    assert "Trainable params" in trained.out  # of model_summary
    stage = tmp_path / "runs" / "one" / "transformer"
    lines = (stage / "own" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "train/loss" in lines[0]
    assert lines == (stage / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert list(stage.glob("own-samples-*.png"))
    assert list(stage.glob("events.out*"))
    assert (stage / "fit-profile.txt").stat().st_size > 100
    assert (stage / "steps.txt").read_text() == "4 [7]"  # micro-batches, two a step, and the pixels
    state = FolderCheckpointIO().load_checkpoint(newest_checkpoint(stage / "checkpoints"))
    assert state["optimizer_states"][0]["param_groups"][0]["momentum"] == 0.5
    # A resumed run restores the state of the callback, and its loggers may be others.
    assert train_recipe({**recipe, "loggers": [], "profiler": None}, "--trainer.max_steps=3").code == 0
    assert (stage / "steps.txt").read_text() == "6 [7]"
    # The augmentation and the optimizer decide what is learned.
    for key, other in (("data", {"augmentations": ["grey"]}), ("model", {"optimizer": {"algorithm": "signs"}})):
        refused(train_recipe({**recipe, key: other}, "--trainer.max_steps=4"), "settings changed")


def test_the_callback_of_the_documentation_is_called(train_recipe, tmp_path, monkeypatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "trackers.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    points = "[maskgit_pl.callbacks]\nloss_alarm = loss_alarm:LossAlarm\n"
    install(tmp_path / "site", name="loss-alarm", entry_points=points, modules={"loss_alarm": code})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    trained = train_recipe({"callbacks": [{"name": "loss_alarm", "limit": 0.5}]})
    assert re.search(r"step 1: validation loss 3\.\d+ above 0\.5", trained.out)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"loggers": ["tensorbord"]}, "unknown logger 'tensorbord': did you mean 'tensorboard'?"),
        ({"loggers": ["csv", {"name": "csv"}]}, "loggers must be different, got ['csv', 'csv']"),
        ({"loggers": [{"name": "wandb", "mode": "on"}]}, "logger 'wandb'.mode must be 'online' or 'offline', got 'on'"),
        ({"callbacks": ["lightning.pytorch.callbacks.Timer"]}, "unknown callback 'lightning.pytorch.callbacks.Timer'"),
        ({"callbacks": [{"class_path": "x.Y"}]}, "class_path"),
        (
            {"data": {"augmentations": ["flip"]}, "model": {"flip_probability": 0.5}},
            "model.flip_probability must be 0 if data.augmentations lists flip, got 0.5",
        ),
        ({"profiler": "simpel"}, "unknown profiler 'simpel': did you mean 'simple'?"),
        ({"trainer": {"profiler": "simple"}}, "name it with the key profiler"),
    ],
)
def test_a_wrong_name_or_value_is_refused_before_training(recipe, said, train_recipe, runs) -> None:
    refused(train_recipe(recipe), said)
    assert not runs.exists()


def test_fsdp_is_refused_for_an_optimizer_of_whole_matrices(train_recipe, runs) -> None:
    answer = train_recipe({"model": {"optimizer": {"algorithm": "muon"}}}, "--trainer.strategy=fsdp")
    refused(answer, "trainer.strategy must be 'ddp' or 'auto' with model.optimizer.algorithm 'muon'")
    assert not runs.exists()


def test_the_examples_of_the_documentation_train(train_recipe, tmp_path, monkeypatch) -> None:
    docs = Path(__file__).parents[2] / "docs"
    modules = {}
    for page in ("optimizers.md", "plug-ins.md"):
        for code in re.findall(r"```python\n(.*?)```", (docs / page).read_text(), re.DOTALL):
            modules[code.split(".py")[0].removeprefix("# ")] = code
    points = "[maskgit_pl.optimizers]\nsignum = signum:Signum\n"
    points += "[maskgit_pl.augmentations]\nvertical_flip = vertical_flip:VerticalFlip\n"
    chosen = {name: modules[name] for name in ("signum", "vertical_flip")}
    install(tmp_path / "site", name="examples", entry_points=points, modules=chosen)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    recipe = {
        "model": {"optimizer": {"algorithm": {"name": "signum", "momentum": 0.8}}},
        "data": {"augmentations": ["random_crop", {"name": "vertical_flip", "probability": 0.3}]},
    }
    assert train_recipe(recipe).code == 0


def test_the_page_names_what_is_logged(train_recipe, runs) -> None:
    page = (Path(__file__).parents[2] / "docs" / "trackers.md").read_text()
    named = set(re.findall(r"`([a-z-]+/?[a-z_/-]*)`", page.split("## What is logged")[1].split("\n## ")[0]))
    words = ("--trainer.max_steps=2", "--trainer.log_every_n_steps=1")
    assert train_recipe({"loggers": ["csv"]}, *words).code == 0
    file = runs / "one" / "transformer" / "csv" / "version_0" / "metrics.csv"
    columns = set(file.read_text().splitlines()[0].split(",")) - {"step"}
    assert {column.partition("/mask-ratio")[0] for column in columns} <= named
    assert {name for name in named if name.startswith("speed/")} - columns == {"speed/model_flops_utilization"}
    assert {"learning-rate", "train/gradient_norm", "train/weight_norm"} <= columns
