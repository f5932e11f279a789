"""Measures what health monitoring, norms and the figures of speed add to a training step of stage 1.

    python benchmarks/health.py --repeats 20 --json health.json

Each round trains a step, counts its tokens, measures the health and computes the norms, and each part is timed by
itself: their share of a step is smaller than the difference between two steps on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from measuring import Stopwatch, format_table, interleave, read_cpu_name
from stage1_step import Ours, Task

from maskgit_pl.distributed import describe_environment
from maskgit_pl.training.health import HealthConfig, HealthMonitor
from maskgit_pl.training.speed import SpeedMonitor
from maskgit_pl.training.stopping import clip_gradients
from maskgit_pl.training.tokenizer_losses import gradient_norm

LOG_EVERY = 50  # of recipes/tokenizer/base.yaml
_LOSSES = 3  # reconstruction, perceptual and adversarial have a norm at the image


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        name: Name for people.
        seconds: Median of CPU seconds.
        every: Number of steps between two runs of it.
    """

    name: str
    seconds: float
    every: int

    def row(self, step: float) -> dict[str, str]:
        """Returns the row of the table, with the share of a step of ``step`` seconds."""
        return {
            "part": self.name,
            "CPU ms": f"{1e3 * self.seconds:.3f}",
            "every": f"{self.every} steps" if self.every > 1 else "step",
            "share of a step": f"{100 * self.seconds / self.every / step:.3f} %",
        }


class Contenders:
    """The parts of a step, on the module and the monitor of one training.

    Args:
        task: Sizes of the networks and the batch.
        folder: Folder of the alarms.
    """

    def __init__(self, task: Task, folder: Path) -> None:
        self.ours = Ours(task, "fp32")
        self.module, self.trainer = self.ours.module, self.ours.trainer
        vars(self.trainer).update(loggers=[], is_global_zero=True, callback_metrics={}, precision="32-true")
        self.speed = SpeedMonitor(folder, lambda: 1e12)
        self.monitor = HealthMonitor(folder, HealthConfig(grace_steps=0))
        self.monitor.setup(self.trainer, self.module, "fit")  # type: ignore[arg-type]  # stands in for the Trainer
        self.tokens = torch.randint(task.codebook_size, (task.batch, *self.module.grid)).flatten(1)

    def count(self, watch: Stopwatch) -> None:
        """Counts the tokens of a micro-batch."""
        assert self.monitor.history is not None
        watch.mark("preparation")
        self.monitor.history.add(self.tokens, self.trainer.global_step)
        watch.mark("part")

    def measure(self, watch: Stopwatch) -> None:
        """Measures and judges the health, as at a logging step."""
        self.trainer.log_every_n_steps, kept = 1, self.trainer.log_every_n_steps
        watch.mark("preparation")
        self.monitor.on_train_batch_end(self.trainer, self.module)  # type: ignore[arg-type]  # stands in
        watch.mark("part")
        self.trainer.log_every_n_steps = kept

    def read_clocks(self, watch: Stopwatch) -> None:
        """Measures the waiting for data and the time of a micro-batch, as at any step."""
        watch.mark("preparation")
        self.speed.on_train_batch_start(self.trainer, self.module, self.ours.batch, 0)  # type: ignore[arg-type]  # stands in
        self.speed.on_train_batch_end(self.trainer, self.module)  # type: ignore[arg-type]  # stands in
        watch.mark("part")

    def measure_speed(self, watch: Stopwatch) -> None:
        """Measures speed, memory and the norms of the weights, as at a logging step."""
        self.trainer.log_every_n_steps, kept = 1, self.trainer.log_every_n_steps
        watch.mark("preparation")
        self.speed.on_train_batch_end(self.trainer, self.module)  # type: ignore[arg-type]  # stands in
        watch.mark("part")
        self.trainer.log_every_n_steps = kept

    def norms_at_the_image(self, watch: Stopwatch) -> None:
        """Computes the norm of the gradient of each loss at the image."""
        gradient = torch.randn(self.ours.batch.content.shape)
        watch.mark("preparation")
        for _ in range(_LOSSES):
            gradient_norm(gradient)
        watch.mark("part")

    def norms_of_weights(self, watch: Stopwatch) -> None:
        """Computes the norms of the gradients of both networks, which the check for non-finite numbers needs too."""
        self.module.replay_step(self.ours.batch, step=1)
        watch.mark("preparation")
        for optimizer in self.trainer.optimizers:
            clip_gradients(optimizer, None)
        watch.mark("part")
        self.module.zero_grad()

    def step(self, watch: Stopwatch) -> None:
        """Trains a step."""
        watch.mark("preparation")
        self.ours(watch)
        watch.mark("part")


def measure(task: Task, *, repeats: int) -> tuple[float, list[Part]]:
    """Measures all parts in turn.

    Args:
        task: Sizes of the networks and the batch.
        repeats: Number of rounds, after a round of warm-up.

    Returns:
        Median CPU seconds of a step, and the parts.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Contenders(task, Path(folder))
        parts = {
            "a step": (made.step, 1),
            "count the tokens": (made.count, 1),
            "measure and judge": (made.measure, LOG_EVERY),
            "read the clocks": (made.read_clocks, 1),
            "speed and norms of weights": (made.measure_speed, LOG_EVERY),
            "norms of losses at the image": (made.norms_at_the_image, 1),
            "norms of both networks": (made.norms_of_weights, 1),
        }
        contenders = {name: run for name, (run, _) in parts.items()}
        interleave(contenders, repeats=1, clock=time.process_time)
        watches = interleave(contenders, repeats=repeats, clock=time.process_time)
        # The step marks "step" itself, and everything else "part".
        seconds = {
            name: median(watch.total - watch.parts["preparation"] for watch in found) for name, found in watches.items()
        }
    step = seconds.pop("a step")
    return step, [Part(name, value, parts[name][1]) for name, value in seconds.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=Task.batch)
    parser.add_argument("--image-size", type=int, default=Task.image_size)
    parser.add_argument("--base-channels", type=int, default=Task.base_channels)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    task = replace(
        Task(), batch=arguments.batch_size, image_size=arguments.image_size, base_channels=arguments.base_channels
    )
    step, parts = measure(task, repeats=arguments.repeats)
    print(f"{read_cpu_name()}, 1 thread, torch {torch.__version__}, n = {arguments.repeats} rounds")
    print(
        f"{task.image_size} px, batch {task.batch}, channels {task.network.widths}, {task.codebook_size} codes: "
        f"{step:.2f} CPU seconds per step"
    )
    print("\n" + format_table([part.row(step) for part in parts]))
    share = sum(part.seconds / part.every for part in parts) / step
    print(f"\nall together: {100 * share:.3f} % of a step")
    if arguments.json:
        report = {
            "environment": {**describe_environment(), "cpu": read_cpu_name()},
            "task": asdict(task),
            "step": step,
            "parts": [asdict(part) for part in parts],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
