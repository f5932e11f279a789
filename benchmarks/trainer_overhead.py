"""Measures what the Trainer, with all callbacks and logging on, adds to a training step of stage 2.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/trainer_overhead.py --threads 1 --json trainer_overhead.json

benchmarks/README.md describes the comparison and the columns of the table.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Literal, NamedTuple, get_args

import torch
from lightning.pytorch import Trainer
from measuring import format_table, read_cpu_name
from torch import Tensor, nn
from webdataset import TarWriter

from maskgit_pl.data import Batch, describe_store, tokenize
from maskgit_pl.data.images import encode_png
from maskgit_pl.data.index import find_shards, index_shards
from maskgit_pl.distributed import describe_environment
from maskgit_pl.mvtm import MaskedTokenModel
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline.grids import to_unit_range
from maskgit_pl.pipeline.pretrained import load_tokenizer, save_tokenizer
from maskgit_pl.runs.build import StageRun, build
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.recipe import Recipe, list_recipes
from maskgit_pl.training.optimizers import update_ema
from maskgit_pl.training.stopping import clip_gradients

Callbacks = Literal["ours", "none"]

TARGET = 1.0  # ms per step
_WARM_UP = 20  # steps that are not counted
_TOKENIZER = VQGANConfig(
    1, base_channels=8, channel_multipliers=(1, 1), num_res_blocks=1, num_groups=2, codebook_size=64, code_dim=4
)


@dataclass(frozen=True)
class Task:
    """The sizes of the network and the batch: small, so that a millisecond is visible in a step."""

    num_steps: int = 400
    embed_dim: int = 64
    depth: int = 2
    batch_size: int = 16
    log_every: int = 25
    edge: int = 14  # pixels, for 7 x 7 tokens

    def words(self) -> list[str]:
        """Returns flags on top of the base recipe, whose callbacks, logging, clipping and averages stay."""
        values = {
            "data.global_batch": self.batch_size,
            "data.max_batch_per_device": self.batch_size,
            "model.network.embed_dim": self.embed_dim,
            "model.network.depth": self.depth,
            "model.network.mlp_dim": 4 * self.embed_dim,
            "trainer.max_steps": self.num_steps,
            "trainer.val_check_interval": 10 * self.num_steps,  # never: validation and checkpoints are not overhead
            "checkpoint_every": 10 * self.num_steps,
            "trainer.log_every_n_steps": self.log_every,
            "trainer.accelerator": "cpu",
        }
        return [f"--{key}={value}" for key, value in values.items()]


def write_data(folder: Path, task: Task) -> None:
    """Writes random images, more than the steps need, a random tokenizer and the tokens of the images."""
    chance = torch.Generator().manual_seed(0)
    (folder / "shards").mkdir()
    for split, count in (("train", (task.num_steps + 4) * task.batch_size), ("val", task.batch_size)):
        with TarWriter(str(folder / "shards" / f"{split}-000000.tar")) as tar:
            for number in range(count):
                image = torch.randint(256, (1, task.edge, task.edge), dtype=torch.uint8, generator=chance)
                tar.write({"__key__": f"{number:08d}", "png": encode_png(image), "cls": number % 10})
    splits = ("train", "val")
    index_shards(folder / "shards", {split: find_shards(folder / "shards", f"{split}-*.tar") for split in splits})
    save_tokenizer(folder / "tokenizer", _TOKENIZER, VQGAN(_TOKENIZER).state_dict(), image_size=task.edge)
    tokenizer = load_tokenizer(folder / "tokenizer")
    description = describe_store(
        folder / "shards",
        grid=tokenizer.grid,
        codebook_size=_TOKENIZER.codebook_size,
        tokenizer=tokenizer.fingerprint,
        image_size=task.edge,
    )
    tokenize(
        folder / "shards",
        folder / "run" / "tokens",
        description,
        encode=lambda images: tokenizer.network.encode(to_unit_range(images)),
        in_channels=1,
    )


def build_run(folder: Path, task: Task) -> StageRun:
    """Builds module, data and Trainer in the same way as ``maskgit train transformer``."""
    files = [list_recipes("transformer")["base"], list_recipes("cluster")["single"]]
    recipe = Recipe.from_files("transformer", files, task.words())
    plan = Plan(recipe, folder / "shards", folder / "run", folder / "tokenizer")
    with redirect_stdout(io.StringIO()):  # not a terminal: progress lines instead of a bar
        return build(plan)


@dataclass
class _Run:
    """A stand-in for the Trainer with the attributes that the module reads."""

    max_steps: int
    global_step: int = 0
    log_every_n_steps: int = 1_000_001
    accumulate_grad_batches: int = 1
    world_size: int = 1


class BareLoop:
    """A plain loop for the same module and batches: forward, backward, clip, optimiser, learning rate, average."""

    def __init__(self, module: MaskedTokenModel, task: Task) -> None:
        self.module = module
        self.run = _Run(task.num_steps)  # the module has only a weak reference to it
        self.module.trainer = self.run  # type: ignore[assignment]  # stands in for the Trainer
        configured = module.configure_optimizers()
        self.optimizer, self.scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]

    def __call__(self, batch: Batch) -> Tensor:
        """Runs a step and returns its loss."""
        loss = self.module.training_step(batch, 0)
        loss.backward()  # type: ignore[no-untyped-call]  # torch: untyped
        clip_gradients(self.optimizer, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        assert self.module.ema_network is not None
        decay, step = self.module.config.ema_decay, self.run.global_step
        update_ema(self.module.ema_network, self.module.transformer, decay=decay, step=step)
        self.run.global_step += 1
        return loss.detach()


class Clock(NamedTuple):
    """Milliseconds of wall time and of CPU time of this process; other programs affect CPU time less."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Clock:
        """Returns the present readings."""
        return cls(1000 * time.perf_counter(), 1000 * time.process_time())

    def passed(self) -> Clock:
        """Returns the time since this reading."""
        now = Clock.now()
        return Clock(now.wall - self.wall, now.cpu - self.cpu)


class Interleaved:
    """A data loader for the Trainer that runs a step of the bare loop between two steps of the Trainer.

    Args:
        trainer: Trainer that iterates over the loader.
        loader: Data loader that gives the same batches in every iteration.
        bare: Loop that is compared with the Trainer.
        profile: Profiler that is enabled during the Trainer's steps only.
    """

    def __init__(
        self, trainer: Trainer, loader: Iterable[Batch], bare: BareLoop, profile: cProfile.Profile | None = None
    ) -> None:
        self.loader = loader
        self.bare = bare
        self.trainer = trainer
        self.own: Iterator[Batch] = iter(())
        self.profile = profile
        self.times: dict[int, tuple[Clock, Clock]] = {}  # step -> time of the Trainer, of the bare loop

    def __iter__(self) -> Iterator[Batch]:
        # Both iterators give the same batches: one for the Trainer, one for the bare loop.
        theirs, self.own = iter(self.loader), iter(self.loader)
        begin = Clock.now()
        for batch in theirs:
            # Here the Trainer has just asked for the next batch: its last step is over.
            passed, done = begin.passed(), self.trainer.global_step
            if self.profile is not None:
                self.profile.disable()
            if done > self.bare.run.global_step:  # false while the Trainer prefetches its first batches
                begin = Clock.now()
                self.bare(next(self.own))
                self.times[done] = (passed, begin.passed())
            if self.profile is not None and done > _WARM_UP:
                self.profile.enable()
            begin = Clock.now()
            yield batch


@dataclass(frozen=True)
class Measured:
    """Milliseconds per step, measured by one clock.

    Attributes:
        callbacks: ``ours``, or ``none`` for Lightning's loop without callbacks.
        clock: ``wall``, or ``cpu`` for CPU time of this process.
        bare: Median of the bare loop.
        trainer: Median of the Trainer's steps that log nothing.
        overhead: Median difference between a step of the Trainer and the bare step next to it.
        at_best: First decile of the Trainer's steps minus that of the bare steps: the best estimate on a busy machine.
        logging: Median of the additional time of a step that logs.
        added: ``overhead`` plus the average of ``logging`` over all steps.
        steps: Number of steps that are counted.
        same_weights: True if the final weights of both are bit-exact.
    """

    callbacks: Callbacks
    clock: str
    bare: float
    trainer: float
    overhead: float
    at_best: float
    logging: float
    added: float
    steps: int
    same_weights: bool

    def row(self) -> dict[str, str]:
        """Returns the row of the table."""
        return {key: f"{value:.2f}" if isinstance(value, float) else str(value) for key, value in asdict(self).items()}


def measure(task: Task, *, callbacks: Callbacks = "ours", profile: Path | None = None) -> list[Measured]:
    """Trains with both in turn and returns the measurements of each clock."""
    watch = None if profile is None else cProfile.Profile()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_data(folder, task)
        cli, other = build_run(folder, task), build_run(folder, task)
        # Both start from the same weights, and must end with the same ones.
        other.model.load_state_dict(cli.model.state_dict())
        # Callbacks are removed after the Trainer is built, so all other settings are the same.
        if callbacks == "none":
            cli.trainer.callbacks = []
        loader = Interleaved(cli.trainer, _with_trainer(cli), BareLoop(other.model, task), watch)
        cli.datamodule.train_dataloader = lambda: loader
        with redirect_stdout(io.StringIO()):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        while loader.bare.run.global_step < task.num_steps:  # the Trainer fetches no batch after its last step
            loader.bare(next(loader.own))
        if watch is not None:
            watch.disable()
            watch.dump_stats(str(profile))
    same = _same(cli.model, other.model)
    return [_summary(task, loader, callbacks, number, same=same) for number in range(len(Clock._fields))]


def _with_trainer(cli: StageRun) -> Iterable[Batch]:
    """Returns the loader of the data module, which reads the current step from the Trainer."""
    cli.datamodule.trainer = cli.trainer
    loader: Iterable[Batch] = cli.datamodule.train_dataloader()
    return loader


def _summary(task: Task, loader: Interleaved, callbacks: Callbacks, clock: int, *, same: bool) -> Measured:
    counted = {step: times for step, times in loader.times.items() if step > _WARM_UP}
    apart = {step: theirs[clock] - bare[clock] for step, (theirs, bare) in counted.items()}
    # Lightning logs after every ``log_every``-th step: those steps are counted separately.
    overhead = median(each for step, each in apart.items() if step % task.log_every)
    logging = median(each for step, each in apart.items() if step % task.log_every == 0) - overhead
    theirs, bare = zip(*((theirs[clock], bare[clock]) for step, (theirs, bare) in counted.items()), strict=True)
    return Measured(
        callbacks=callbacks,
        clock=Clock._fields[clock],
        bare=median(bare),
        trainer=median(theirs),
        overhead=overhead,
        at_best=quantiles(theirs, n=10)[0] - quantiles(bare, n=10)[0],
        logging=logging,
        added=overhead + logging / task.log_every,
        steps=len(counted),
        same_weights=same,
    )


def _added(measured: Iterable[Measured], callbacks: str, clock: str) -> float:
    return median(one.added for one in measured if (one.callbacks, one.clock) == (callbacks, clock))


def _same(module: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("num_steps", "embed_dim", "depth", "batch_size", "log_every"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Task, name), help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="number of runs (%(default)s)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="profile the Trainer's steps for pstats; slower")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and the environment to FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    task = Task(args.num_steps, args.embed_dim, args.depth, args.batch_size, args.log_every)
    print(f"{read_cpu_name()}, {args.threads} threads, torch {torch.__version__}, {task.num_steps} steps per run")
    measured = [
        row
        for _ in range(args.repeats)
        for callbacks in get_args(Callbacks)
        for row in measure(task, callbacks=callbacks, profile=args.profile if callbacks == "ours" else None)
    ]
    print("\n" + format_table([one.row() for one in measured]))
    wall, cpu, loop_only = (_added(measured, *row) for row in (("ours", "wall"), ("ours", "cpu"), ("none", "wall")))
    print(f"\nThe Trainer adds {wall:.2f} ms per step, of which {cpu:.2f} ms are CPU time; target: {TARGET:.0f} ms")
    print(f"Lightning's loop without callbacks adds {loop_only:.2f} ms")
    if args.json:
        report = {
            "environment": {**describe_environment(), "cpu": read_cpu_name()},
            "task": asdict(task),
            "measured": [asdict(one) for one in measured],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
