"""``maskgit train`` with loggers, callbacks and a profiler that the recipe names, also of other packages."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from maskgit_pl.training.checkpoints import FolderCheckpointIO, newest_checkpoint
from tests.cli.conftest import Answer, refused
from tests.installed_packages import install

DOCS = Path(__file__).parents[2] / "docs"
POINTS = """
[maskgit_pl.loggers]
notes = notes:Notes
[maskgit_pl.callbacks]
counter = notes:Counter
loss_alarm = loss_alarm:LossAlarm
[maskgit_pl.optimizers]
signum = signum:Signum
[maskgit_pl.augmentations]
vertical_flip = vertical_flip:VerticalFlip
"""
NOTES = '''
from dataclasses import dataclass

from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from maskgit_pl.runs.callbacks import CallbackSpec
from maskgit_pl.training.loggers import LoggerSpec


@dataclass(frozen=True)
class Notes(LoggerSpec):
    """A logger that writes CSV files to a folder with a name of its own."""

    folder: str = "notes"

    def create(self, folder, *, run_id):
        return CSVLogger(folder, name=self.folder, flush_logs_every_n_steps=1)

    def log_image(self, logger, name, picture, step):
        picture.save(f"{logger.save_dir}/{self.folder}-{name}-{step}.png")


class Counts(Callback):
    steps = 0

    def __init__(self, file):
        self.file = file

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps += 1
        self.file.write_text(str(self.steps))

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


@pytest.fixture
def plug_ins(site: Path) -> None:
    """Installs the logger and the callback above, and the plug-ins that the pages show."""
    modules = {"notes": NOTES}
    for page in ("optimizers.md", "plug-ins.md", "trackers.md"):
        for code in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
            name = re.match(r"# (\w+)\.py", code)
            modules[name[1] if name else "loss_alarm"] = code
    chosen = {name: modules[name] for name in ("notes", "loss_alarm", "signum", "vertical_flip")}
    install(site, name="plug-ins-of-mine", entry_points=POINTS, modules=chosen)


@pytest.mark.slow
@pytest.mark.usefixtures("plug_ins")
def test_plug_ins_of_a_package_and_of_the_pages_are_named_in_one_recipe(train_recipe, runs) -> None:
    recipe = {
        "loggers": ["tensorboard", "csv", {"name": "notes", "folder": "own"}],
        "callbacks": ["counter", {"name": "loss_alarm", "limit": 0.5}],
        "profiler": "simple",
        "model": {"optimizer": {"algorithm": {"name": "signum", "momentum": 0.5}}},
        "data": {"augmentations": ["random_crop", {"name": "vertical_flip", "probability": 0.3}]},
    }
    answer = train_recipe(recipe, "--trainer.max_steps=2", "--trainer.log_every_n_steps=1")
    assert answer.code == 0, answer
    assert re.search(r"step 2: validation loss \d\.\d+ above 0\.5", answer.out)
    stage = runs / "one" / "transformer"
    lines = (stage / "own" / "version_0" / "metrics.csv").read_text().splitlines()
    assert "train/loss" in lines[0]
    assert lines == (stage / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert list(stage.glob("own-samples-*.png"))
    assert list(stage.glob("events.out*"))
    assert (stage / "fit-profile.txt").stat().st_size > 100
    assert (stage / "steps.txt").read_text() == "4"  # micro-batches, two a step
    state = FolderCheckpointIO().load_checkpoint(newest_checkpoint(stage / "checkpoints"))
    assert state["optimizer_states"][0]["param_groups"][0]["momentum"] == 0.5
    # A resumed run restores the state of the callback, and its loggers may be others.
    assert train_recipe({**recipe, "loggers": [], "profiler": None}, "--trainer.max_steps=3").code == 0
    assert (stage / "steps.txt").read_text() == "6"
    # The augmentation and the optimizer decide what is learned.
    for key, other in (("data", {"augmentations": ["flip"]}), ("model", {"optimizer": {"algorithm": "signum"}})):
        refused(train_recipe({**recipe, key: other}, "--trainer.max_steps=4"), "settings changed")


def test_the_page_names_what_is_logged(train_recipe, runs) -> None:
    page = (DOCS / "trackers.md").read_text()
    named = set(re.findall(r"`([a-z-]+/?[a-z_/-]*)`", page.split("## What is logged")[1].split("\n## ")[0]))
    words = ("--trainer.max_steps=2", "--trainer.log_every_n_steps=1")
    assert train_recipe({"loggers": ["csv"]}, *words).code == 0
    file = runs / "one" / "transformer" / "csv" / "version_0" / "metrics.csv"
    columns = set(file.read_text().splitlines()[0].split(",")) - {"step"}
    assert {column.partition("/mask-ratio")[0] for column in columns} <= named
    assert {name for name in named if name.startswith("speed/")} <= columns
    assert {"learning-rate", "train/gradient_norm"} <= columns
