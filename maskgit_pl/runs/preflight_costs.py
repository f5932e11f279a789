"""The calculations of ``preflight``: checks of memory and disk, and the costs of the run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import cast

import torch

from maskgit_pl.checks import as_image_size
from maskgit_pl.data.manifest import DataSummary
from maskgit_pl.files import size_text
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pipeline.pretrained import read_config
from maskgit_pl.runs import host
from maskgit_pl.runs.build import StageRun
from maskgit_pl.runs.costs import Costs, TokenizerCosts, TransformerCosts
from maskgit_pl.runs.flops import Precision
from maskgit_pl.runs.memory import Memory, Strategy, max_num_checkpoints
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.preflight_report import CheckList, Machines, RunCosts, Shares, count_text, flops_text
from maskgit_pl.tokenizer import Tokenizer
from maskgit_pl.training.checkpoint_files import complete_checkpoints
from maskgit_pl.training.gpus import GPUS
from maskgit_pl.training.token_model import TokenModel

__all__ = ["CostChecks"]

_HEADROOM = 0.92  # usable fraction of memory: the rest is CUDA context, NCCL buffers and fragmentation


class CostChecks:
    """The checks of memory and disk, and the costs of a run.

    Args:
        plan: Plan of the run.
        stage_run: Module and values of the stage.
        machines: Machines, with nodes and devices set.
        shares: Samples of each rank; None if the ranks cannot share the global batch evenly.
        summary: Summary of the data; None if they are missing or a stream.
    """

    def __init__(
        self, plan: Plan, stage_run: StageRun, machines: Machines, shares: Shares | None, summary: DataSummary | None
    ) -> None:
        assert machines.nodes is not None
        assert machines.devices is not None
        self._plan = plan
        self._values = stage_run.values
        self._module = stage_run.model
        self._machines = machines
        self._ranks = machines.nodes * machines.devices
        self._shares = shares
        self._summary = summary
        self._global_batch: int = self._values.data.global_batch
        self._largest_batch: int = self._values.data.max_batch_per_device

    # Memory

    @cached_property
    def _costs(self) -> Costs:
        name = str(self._plan.recipe.get("trainer.strategy"))
        strategy = cast("Strategy", name if name in ("ddp", "fsdp") else "auto")
        precision: Precision = "bf16-mixed" if "16" in self._precision else "32-true"
        checkpointing = self._values.model.activation_checkpointing
        if isinstance(self._module, TokenModel):
            sizes = None
            if self._plan.tokenizer is not None:
                tokenizer = read_config(self._plan.tokenizer, "tokenizer")
                sizes = VQGANConfig(**tokenizer["network"]), as_image_size(tokenizer["image_size"])
            encodes = self._values.data.source != "tokens"
            return TransformerCosts(
                strategy, self._ranks, precision, checkpointing, module=self._module, tokenizer=sizes, encodes=encodes
            )
        assert isinstance(self._module, Tokenizer)
        strategy = "ddp" if strategy == "fsdp" else strategy  # fsdp is an error for this stage
        return TokenizerCosts(strategy, self._ranks, precision, checkpointing, module=self._module)

    @cached_property
    def _memory(self) -> Memory:
        return self._costs.memory(self._per_device)

    @property
    def _per_device(self) -> int:
        return self._largest_batch if self._shares is None else self._shares.per_device

    @property
    def _precision(self) -> str:
        return self._values.trainer.precision

    def check_memory(self, checks: CheckList) -> None:
        """Checks that a micro-batch fits into the memory of a device, and otherwise names the largest that does."""
        device = self._device_memory()
        if device is None:
            text = f"{self._describe_memory()}; give the available memory with --device or --device-memory"
            checks.add("memory", text, "warning")
            return
        limit, most = device * _HEADROOM, self._largest_batch
        # Too many ranks for the global batch have an error of their own.
        largest = self._costs.largest_batch(max(1, self._global_batch // self._ranks), limit)
        if self._memory.total <= limit:
            more = f"; --data.max_batch_per_device={largest} fits too" if largest and largest > most else ""
            checks.add("memory", f"{self._describe_memory()}; {size_text(device)} available{more}")
            return
        hint = f"--data.max_batch_per_device={largest} fits" if largest else "not even one sample fits"
        savings = self._savings()
        if savings:
            hint = f"{hint}; to save memory: {', '.join(savings)}"
        checks.add(
            "memory",
            f"data.max_batch_per_device {most} must fit into {size_text(limit)} of a device with {size_text(device)}, "
            f"got {self._describe_memory()}; {hint}",
            "error",
        )

    def _device_memory(self) -> float | None:
        machines = self._machines
        if machines.memory is not None:
            return machines.memory
        if machines.gpu is not None:
            return GPUS[machines.gpu].memory
        return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None

    def _describe_memory(self) -> str:
        memory = self._memory
        states = memory.weights + memory.gradients + memory.moments + memory.average + memory.frozen
        gathered = f", {size_text(memory.gathered)} gathered" if memory.gathered else ""
        is_bound = memory.casts > 0 and isinstance(self._costs, TokenizerCosts)
        return (
            f"{size_text(memory.total)} per device with {self._per_device} samples: {size_text(states)} weights and "
            f"optimizer{gathered}, {size_text(memory.activations + memory.casts + memory.working)} activations"
            f"{', at most, as in float32' if is_bound else ''}"
        )

    def _savings(self) -> list[str]:
        """Returns the flags that save memory, other than a smaller micro-batch."""
        costs, flags = self._costs, []
        if costs.checkpointing == "none":
            flags.append("--model.activation_checkpointing=blocks")
        is_transformer = isinstance(costs, TransformerCosts)  # stage 1 counts float32 in both precisions
        if costs.precision == "32-true" and is_transformer:
            flags.append("--trainer.precision=bf16-mixed")
        if costs.strategy == "ddp" and is_transformer:
            flags.append("--cluster fsdp")
        return flags

    # Disk

    def check_disk(self, checks: CheckList) -> None:
        """Checks that the run folder is writable, and that its disk has room for the checkpoints."""
        folder, free = host.free_bytes(self._plan.checkpoints)
        needed, text = self._checkpoints_to_come()
        text = f"{text}, {size_text(free)} free"
        if not host.is_writable(folder):
            text = f"{folder} must be writable for checkpoints; change its permissions, or name another --runs-folder"
            checks.add("disk", text, "error")
        elif free < needed:
            checks.add(
                "disk",
                f"{folder} must have room for checkpoints: {text}; free space, name another --runs-folder, or lower "
                "keep_last or raise keep_every",
                "error",
            )
        else:
            checks.add("disk", f"{folder}: {text}")

    def _checkpoints_to_come(self) -> tuple[int, str]:
        """Returns the bytes of the checkpoints that the run still adds, and a description."""
        run = self._values
        steps = run.trainer.max_steps
        # A run without an end is an error elsewhere: count only the newest checkpoints.
        if steps < 1:
            steps = run.checkpoint_every * (run.keep_last + 1)
        most = max_num_checkpoints(
            steps, every=run.checkpoint_every, keep_last=run.keep_last, keep_every=run.keep_every
        )
        count, size = max(1, most - len(complete_checkpoints(self._plan.checkpoints))), self._costs.checkpoint()
        return count * size, f"{size_text(count * size)} for {count_text(count, 'checkpoint')} of {size_text(size)}"

    # Costs

    def costs(self) -> RunCosts:
        """Returns the costs of the run."""
        flops = self._costs.flops(self._global_batch)
        return RunCosts(
            self._costs.trained, self._memory, self._costs.checkpoint(), flops, tuple(self._describe(flops))
        )

    def _describe(self, flops: float) -> Iterator[tuple[str, str]]:
        rate = self._values.model.optimizer.learning_rate
        yield "parameters", f"{self._costs.trained:,} trained"
        yield (
            "learning rate",
            f"peak {rate.peak:g} after {rate.warmup_steps} steps, then {rate.decay}; for a global batch of "
            f"{self._global_batch}, not rescaled by the number of devices",
        )
        yield "FLOPs of a step", f"{flops_text(flops)}; {flops_text(flops / self._ranks)} per rank"
        steps = self._values.trainer.max_steps
        if steps > 0:
            yield "the run", self._describe_run(steps)

    def _describe_run(self, steps: int) -> str:
        text = count_text(steps, "step")
        if self._summary is None:
            return text
        return f"{text}, {steps * self._global_batch / self._summary.samples['train']:,.1f} epochs"
