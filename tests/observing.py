"""Runs ``maskgit train`` in separate processes, with an observer callback and injected faults.

Ranks find each other through the variables of ``torchrun``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from maskgit_pl.data import Batch
from maskgit_pl.training.checkpoints import FolderCheckpointIO, newest_checkpoint
from tests.conftest import save_tiny_pretrained, save_uneven_shards, tiny_flags
from tests.forked import PROCESSES, Command, begin
from tests.injection import Fault, Injection
from tests.short_runs import assert_equal

SECONDS = 120  # limit for one process
KILLED = -signal.SIGKILL
Prepare = Callable[[], None]


@dataclass(frozen=True)
class Topology:
    """The layout of a run: ranks, data workers per rank, micro-batches per step, and strategy."""

    ranks: int = 1
    workers: int = 0
    accumulation: int = 1
    cluster: str = "ddp"

    def words(self, global_batch: int) -> list[str]:
        """Returns flags of ``maskgit train``."""
        per_device = global_batch // (self.ranks * self.accumulation)
        return [
            f"--cluster={self.cluster if self.ranks > 1 else 'single'}", f"--trainer.devices={self.ranks}",
            f"--data.num_workers={self.workers}", f"--data.max_batch_per_device={per_device}",
        ]  # fmt: skip


class Observer(Callback):
    """A callback that writes a line per micro-batch: positions, samples, random draws, losses, sum of the weights."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("a")
        self.drawn: list[str] = []
        self.losses: dict[str, str] = {}

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Wraps the methods that draw masks or mirrored images, and the one that records the losses of stage 1."""
        name = "_encode" if hasattr(module, "_encode") else "prepare_images"
        draw, record = getattr(module, name), None if name == "_encode" else module._log_metrics

        def drawing(batch: Batch, **kwargs: Any) -> Any:
            made = draw(batch, **kwargs)
            parts = (made,) if batch.draws is None else (made, batch.draws.mask)  # images, or tokens and mask
            self.drawn = [" ".join(map(digest, row)) for row in zip(*parts, strict=True)]
            return made

        def recording(metrics: dict[str, Tensor], **kwargs: Any) -> None:
            self.losses = {key: float(value).hex() for key, value in metrics.items() if key.startswith("train/")}
            assert record is not None
            record(metrics, **kwargs)

        setattr(module, name, drawing)
        if record is not None:
            module._log_metrics = recording

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, _: int) -> None:
        if outputs:  # stage 2: Lightning has divided it by the accumulation
            self.losses = {"loss": (float(outputs["loss"]) * trainer.accumulate_grad_batches).hex()}
        rows = [list(row) for row in zip(batch.index.tolist(), batch.epoch.tolist(), self.drawn, strict=True)]
        local = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]  # the shards of this rank
        weights = float(torch.stack([part.detach().double().sum() for part in local]).sum()).hex()
        line = {"positions": batch.position.tolist(), "rows": rows, "losses": self.losses, "weights": weights}
        self.losses = {}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def digest(row: Tensor) -> str:
    """Returns a hash of the bytes of a row."""
    return hashlib.blake2b(row.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def _run(
    words: list[str],
    file: Path,
    faults: tuple[Fault, ...],
    environment: dict[str, str],
    prepare: Prepare | None,
) -> None:
    log = file.with_suffix(".log")
    begin({**os.environ, **environment}, log, log)
    from maskgit_pl.cli import main
    from maskgit_pl.runs import fitting

    build, more = fitting._build_callbacks, [Observer(file), Injection(faults)]
    fitting._build_callbacks = lambda *given: [*build(*given), *more]  # replaced in this process only
    if prepare is not None:
        prepare()
    sys.argv = ["maskgit", *words]
    sys.exit(main(words))


Batches = dict[tuple[int, ...], Any]  # positions -> rows and losses of a micro-batch


@dataclass
class Seen:
    """The record of a run.

    Attributes:
        legs: Micro-batches of each execution of the command, up to its end or its kill.
        state: The last checkpoint.
    """

    legs: list[Batches]
    state: dict[str, Any]

    def batches(self) -> Batches:
        """Returns the micro-batches of all legs; those that ran twice, after a checkpoint, must be equal."""
        found: Batches = {}
        for leg in self.legs:
            for positions, batch in leg.items():
                assert found.setdefault(positions, batch) == batch, f"{positions}: another one when it was repeated"
        return found

    def repeated(self) -> int:
        """Returns the number of micro-batches that ran twice."""
        return sum(map(len, self.legs)) - len(self.batches())

    def rows(self) -> dict[int, Any]:
        """Returns [sample, epoch, hash of the random draws] by position, for any division among ranks."""
        found: dict[int, Any] = {}
        for leg in self.legs:
            for positions, batch in leg.items():
                for place, row in zip(positions, batch["rows"], strict=True):
                    assert found.setdefault(place, row) == row, f"{place}: another one when it was repeated"
        return found

    def step_losses(self, global_batch: int) -> list[tuple[int, float]]:
        """Returns step and loss of each complete global batch in each leg, from its micro-batches (stage 2)."""
        found: list[tuple[int, float]] = []
        for leg in self.legs:
            parts: dict[int, list[tuple[int, float]]] = {}
            for positions, batch in leg.items():
                loss = float.fromhex(batch["losses"]["loss"])
                parts.setdefault(positions[0] // global_batch, []).append((len(positions), loss))
            whole = {step: each for step, each in parts.items() if sum(size for size, _ in each) == global_batch}
            found += [(step, sum(size * loss for size, loss in each) / global_batch) for step, each in whole.items()]
        return found


class Runs:
    """Starts runs of one stage, and collects their records in a folder, by default that of the runs."""

    def __init__(self, folder: Path, words: Sequence[str], global_batch: int, runs: Path | None = None) -> None:
        self.folder = folder
        self.runs = runs or folder
        self.given = list(words)
        self.global_batch = global_batch

    def words(self, name: str, topology: Topology, *more: str) -> list[str]:
        """Returns the command of a run."""
        where = [f"--runs-folder={self.runs}", f"--run={name}"]
        return ["train", *self.given, *where, *topology.words(self.global_batch), *more]

    def leg(
        self,
        name: str,
        topology: Topology,
        *more: str,
        kill_at: int | None = None,
        faults: Sequence[Fault] = (),
        code: int | Sequence[int] | None = None,
        prepare: Prepare | None = None,
        during: Callable[[list[Any]], None] | None = None,
    ) -> list[str]:
        """Runs the command once: to its end, or until a fault ends it.

        Args:
            name: Name of the run.
            topology: Ranks, workers and strategy.
            *more: Flags of this leg.
            kill_at: Step after which each process is killed (SIGKILL), before it saves.
            faults: Further faults.
            code: Expected exit code of each rank, or of all.
            prepare: Function that each process calls before the command.
            during: Function that is called with the processes while they run.

        Returns:
            Output of each rank.
        """
        words, port = self.words(name, topology, *more), free_port()
        number = len(list(self.folder.glob(f"{name}-leg*-rank0.jsonl")))
        if kill_at is not None:
            faults, code = (*faults, Fault(signal.SIGKILL, kill_at)), KILLED if code is None else code
        started = []
        for rank in range(topology.ranks):
            environment = {} if topology.ranks == 1 else as_torchrun(rank, topology.ranks, port)
            file = self.folder / f"{name}-leg{number:02d}-rank{rank}.jsonl"
            process = PROCESSES.Process(target=_run, args=(words, file, tuple(faults), environment, prepare))
            process.start()
            started.append((process, file))
        if during is not None:
            during([process for process, _ in started])
        codes = [code or 0] * topology.ranks if code is None or isinstance(code, int) else list(code)
        for (process, file), expected in zip(started, codes, strict=True):
            process.join(SECONDS)
            exit_code = process.exitcode
            if exit_code != expected:
                for running, _ in started:
                    running.kill()
            assert exit_code == expected, f"{file.stem}:\n{file.with_suffix('.log').read_text()[-4000:]}"
        return [file.with_suffix(".log").read_text() for _, file in started]

    def newest(self, name: str) -> Path:
        """Returns the newest complete checkpoint of a run."""
        checkpoint = newest_checkpoint(self.runs / name / self.given[0] / "checkpoints")
        assert checkpoint is not None
        return checkpoint

    def seen(self, name: str) -> Seen:
        """Returns the record of all legs of a run."""
        legs: list[Batches] = []
        for number in range(len(list(self.folder.glob(f"{name}-leg*-rank0.jsonl")))):
            legs.append({})
            for file in sorted(self.folder.glob(f"{name}-leg{number:02d}-rank?.jsonl")):
                lines = [json.loads(line) for line in file.read_text().splitlines()]
                legs[-1] |= {tuple(line.pop("positions")): line for line in lines}
        return Seen(legs, FolderCheckpointIO().load_checkpoint(self.newest(name)))


class StageRuns:
    """Runs of both stages on the same data, with ``more`` flags for each stage; ``straight`` runs are made once."""

    def __init__(
        self, folder: Path, words: Sequence[str], more: Mapping[str, Sequence[str]], global_batch: int
    ) -> None:
        save_uneven_shards(folder / "shards", (1, 7, 100))
        save_tiny_pretrained(folder / "given")
        self._seen: dict[tuple[str, Topology, tuple[str, ...]], Seen] = {}
        tokenizers = {"tokenizer": [], "transformer": [f"--tokenizer={folder / 'given' / 'tokenizer'}"]}
        self.runs: dict[str, Runs] = {}
        for stage, tokenizer in tokenizers.items():
            (folder / stage).mkdir()
            given = [stage, f"--data={folder / 'shards'}", *tiny_flags(stage), *tokenizer]
            given += [f"--data.global_batch={global_batch}", *words, *more[stage]]
            self.runs[stage] = Runs(folder / stage, given, global_batch)

    def straight(self, stage: str, topology: Topology, *more: str) -> Seen:
        """Returns the record of an uninterrupted run."""
        key = (stage, topology, more)
        if key not in self._seen:
            name = f"straight-{sum(of == stage for of, *_ in self._seen)}"
            self.runs[stage].leg(name, topology, *more)
            self._seen[key] = self.runs[stage].seen(name)
        return self._seen[key]


def assert_same_state(left: Seen, right: Seen) -> None:
    """Asserts that the last checkpoints of two runs have bit-exact weights, averages, optimizers and rates."""
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert_equal(left.state[key], right.state[key])


def free_port() -> int:
    """Returns a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def as_torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Returns the environment variables that ``torchrun`` sets."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    return {name: str(value) for name, value in values.items()}


def run_on_ranks(words: Sequence[object], ranks: int) -> None:
    """Runs a command on one rank or more, and asserts that all of them succeed."""
    port = free_port()
    environments = [os.environ | as_torchrun(rank, ranks, port) if ranks > 1 else None for rank in range(ranks)]
    with ExitStack() as stack:  # ends the others if one fails
        for command in [stack.enter_context(Command(words, env=each)) for each in environments]:
            texts = command.communicate()
            assert command.returncode == 0, "".join(texts)
