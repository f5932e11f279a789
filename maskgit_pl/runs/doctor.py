"""``runs.preflight``: checks a run before it starts. ``maskgit doctor`` prints the result.

A run is built as training builds it, but on the CPU and with weights of zero. Nothing is trained or written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

import torch

from maskgit_pl.data import ShardDataConfig, split_batch
from maskgit_pl.data.manifest import Split
from maskgit_pl.data.token_store import read_data_summary
from maskgit_pl.errors import error_text, is_user_error
from maskgit_pl.runs.costs import Encoder, Memory, checkpoint_bytes, step_memory, useful_flops
from maskgit_pl.runs.fitting import (
    build,
    check_run_outputs,
    choose_precision,
    create_module,
    describe_batch,
    describe_start,
    leave_no_trace,
)
from maskgit_pl.runs.plan import (
    Folders,
    Inputs,
    Machines,
    Plan,
    find_data,
    find_tokenizer,
    merge_values,
    read_pretrained,
    read_tokenizer_sizes,
    run_folder,
    values_without_data,
)
from maskgit_pl.runs.recipe import Recipe, merge
from maskgit_pl.runs.resolve import ResolvedRun, resolve
from maskgit_pl.text import count_text, parse_size, printable, size_text
from maskgit_pl.tokenizer.module import Tokenizer
from maskgit_pl.training.checkpoints import complete_checkpoints
from maskgit_pl.training.strategies import check_strategy
from maskgit_pl.transformer.token_model import TokenModel

_HEADROOM = 0.92  # usable fraction of memory: the rest is CUDA context, NCCL buffers and fragmentation

Verdict = Literal["ok", "warning", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: Subject of the check, such as ``batch``.
        verdict: ``FAIL`` if the run would not start; ``warning`` if it might not, or if too little is known.
        text: Result; for a failure also the rule and a hint.
    """

    name: str
    verdict: Verdict
    text: str


@dataclass
class Preflight:
    """The result of the checks. ``print`` shows a line for each.

    Attributes:
        checks: All checks in the order in which they were done.
        num_parameters: Number of trained parameters; None if the module could not be built.
        memory: Peak memory of a rank, calculated.
        step_flops: FLOPs of a step of all ranks, without the recomputation of activation checkpointing.
    """

    checks: list[Check] = field(default_factory=list)
    num_parameters: int | None = None
    memory: Memory | None = None
    step_flops: float | None = None

    @property
    def ok(self) -> bool:
        """A bool: no check has failed."""
        return not self.errors

    @property
    def errors(self) -> list[Check]:
        """The checks that have failed."""
        return [check for check in self.checks if check.verdict == "FAIL"]

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        # A text may contain names from untrusted files, and line breaks.
        lines = [
            f"{check.verdict:9}{check.name:15}{printable(' '.join(check.text.splitlines()), limit=None)}"
            for check in self.checks
        ]
        failed, count = len(self.errors), len(self.checks)
        end = f"{failed} of {count} checks fail." if failed else f"All {count} checks pass."
        return "\n".join([*lines, end])

    def add(self, name: str, text: str, verdict: Verdict = "ok") -> None:
        """Adds a check. A failure that is already in the list is not repeated."""
        if verdict != "FAIL" or all(check.text != text for check in self.checks):
            self.checks.append(Check(name, verdict, text))

    @contextmanager
    def catch(self, name: str) -> Iterator[None]:
        """Adds a user's error that is raised in the context as a failure; other errors are raised."""
        try:
            yield
        except Exception as error:
            if not is_user_error(error):
                raise
            self.add(name, error_text(error), "FAIL")

    @contextmanager
    def count(self, name: str) -> Iterator[None]:
        """Adds a warning if a step of a plug-in cannot run without values."""
        try:
            yield
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            self.add(name, f"cannot be calculated ({type(error).__name__}: {reason})", "warning")


def preflight(recipe: Recipe, *, machines: Machines | None = None, **folders: Unpack[Folders]) -> Preflight:
    """Checks a run on any machine: data, tokenizer, ranks, strategy, recipe, batch, memory, disk.

    A failed check stops only those that need its result. Without data, sizes are those of the paper. The machines are
    by default nodes and devices of the recipe, and the GPU memory of this machine, if it has a GPU.

    Raises:
        ValueError: if the run has no name.
    """
    report, machines = Preflight(), machines or Machines()
    nodes, devices = count_devices(machines, recipe)
    plan, inputs = _find_inputs(report, recipe, **folders)
    is_complete = report.ok
    ranks = f"{count_text(nodes, 'node')} x {count_text(devices, 'device')}"
    if nodes > 1 and not os.environ.keys() & {"MASTER_ADDR", "SLURM_JOB_ID"}:
        report.add("ranks", f"{ranks}; without Slurm, export MASTER_ADDR and MASTER_PORT on each node", "warning")
    else:
        report.add("ranks", ranks)
    built = None
    with report.catch("recipe"), leave_no_trace():
        inputs = replace(inputs, pretrained=read_pretrained(plan))
        built = _build(report, plan, inputs, nodes * devices, machines, is_complete=is_complete)
    if built is None:
        return report
    values, module = built
    num_images = None  # a stream does not count them
    if inputs.data is not None and values.data.source != "stream":
        num_images = inputs.data.samples["train"]
    per_device = _share_batch(report, values.data, num_images, nodes * devices)
    _describe_run(report, plan, values, module, num_images, inputs.tokenizer)
    options: dict[str, Any] = {  # the run was built for one CPU
        "strategy": str(recipe.get("trainer.strategy") or "auto"),
        "ranks": nodes * devices,
        "precision": values.trainer.precision,
        "encoder": inputs.tokenizer,
        "encodes": values.data.source != "tokens",
    }
    with report.count("memory"):
        _check_memory(report, module, options, per_device, _device_memory(machines))
    _check_disk(report, plan, values, module)
    return report


def count_devices(machines: Machines, recipe: Recipe) -> tuple[int, int]:
    """Returns the numbers of nodes and of devices per node; those of a recipe where none is given."""
    nodes, devices = recipe.get("trainer.num_nodes"), recipe.get("trainer.devices")
    if isinstance(devices, list):  # the indices of the devices
        devices = len(devices)
    if not isinstance(devices, int) or devices < 1:
        # On a CPU, Lightning's auto is one process.
        devices = 1 if recipe.get("trainer.accelerator") == "cpu" else max(1, torch.cuda.device_count())
    return machines.nodes or nodes or 1, machines.devices or devices


def _device_memory(machines: Machines) -> float | None:
    """Returns the memory of a device in bytes, or None if it is unknown."""
    if machines.device_memory is not None:
        return parse_size(machines.device_memory)
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def _find_inputs(
    report: Preflight,
    recipe: Recipe,
    run: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
) -> tuple[Plan, Inputs]:
    """Finds data and tokenizer of a run. A missing folder is a failure, and its expected path stays in the plan."""
    plan, inputs = Plan(recipe, shards=Path(data or ""), folder=run_folder(recipe, run)), Inputs()
    with report.catch("data"):
        plan = replace(plan, shards=find_data(recipe, data))
        summary = read_data_summary(plan.shards)
        if recipe.get("data.source") != "stream":
            for split in get_args(Split) if summary.tokens is None else ():
                summary.manifest(split)
            counts = ", ".join(f"{count:,} {split}" for split, count in summary.samples.items())
            report.add("data", f"{plan.shards}: {counts}; {count_text(summary.num_classes, 'class')}")
        inputs = replace(inputs, data=summary)
    if plan.stage == "transformer":
        with report.catch("tokenizer"):
            found = find_tokenizer(
                recipe, folder=plan.folder, shards=plan.shards, tokenizer=tokenizer, pretrained=pretrained
            )
            if found is not None:
                sizes, image_size = read_tokenizer_sizes(found)
                plan, inputs = replace(plan, tokenizer=found), replace(inputs, tokenizer=(sizes, image_size))
                report.add("tokenizer", f"{found}: {count_text(sizes.codebook_size, 'code')}")
    return replace(plan, pretrained=None if pretrained is None else Path(pretrained) / plan.stage), inputs


def _build(
    report: Preflight, plan: Plan, inputs: Inputs, ranks: int, machines: Machines, *, is_complete: bool
) -> tuple[ResolvedRun, Tokenizer | TokenModel]:
    """Builds a module on one CPU, with the precision of its own devices: as training does, or only from its recipe."""
    recipe = plan.recipe
    missing = {"path": str(plan.shards), "tokenizer": str(plan.tokenizer or "missing")}
    instead = values_without_data(plan.stage, token_store=str(plan.folder / "tokens"), **missing)
    values = resolve(recipe.kind, merge([instead, merge_values(plan, inputs)]))
    trainer = values.trainer
    on_gpu = machines.device_memory is not None and trainer.accelerator != "cpu"
    precision = choose_precision(trainer, values.model.network, plan.stage, plan.stage_folder, on_gpu=on_gpu)
    with report.catch("strategy"):
        check_strategy(trainer.strategy, values.model, stage=recipe.stage, ranks=ranks)
        report.add("strategy", f"{trainer.strategy}, {precision}")
    if not is_complete:
        module = create_module(plan, values)
        report.add("recipe", "keys, types and names are valid")
        return replace(values, trainer=replace(trainer, precision=precision)), module
    on_cpu = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": precision}
    recipe = recipe.with_overrides({f"trainer.{key}": on_cpu[key] for key in on_cpu})
    run = build(replace(plan, recipe=recipe), inputs=inputs)
    if run.datamodule.stream is None:
        run.datamodule.setup()
    report.add("recipe", "module, data and tokenizer fit together")
    if run.datamodule.enlarging is not None:
        report.add("image size", run.datamodule.enlarging, "warning")
    return run.values, run.model


def _share_batch(report: Preflight, data: ShardDataConfig, num_images: int | None, ranks: int) -> int:
    """Divides the global batch among the ranks, and returns the samples of a micro-batch."""
    with report.catch("batch"):
        is_small = num_images is not None and num_images < data.global_batch
        more = "; a step needs more samples than the train split has" if is_small else ""
        report.add("batch", describe_batch(data, ranks) + more, "warning" if is_small else "ok")
        return split_batch(data.global_batch, data.max_batch_per_device, ranks)[0]
    return data.max_batch_per_device


def _describe_run(
    report: Preflight,
    plan: Plan,
    values: ResolvedRun,
    module: TokenModel | Tokenizer,
    num_images: int | None,
    encoder: Encoder | None,
) -> None:
    """Adds what training will do, the size of the model and the work of a step."""
    rate, batch, steps = values.model.optimizer.learning_rate, values.data.global_batch, values.trainer.max_steps
    report.add("run", describe_start(plan.stage_folder, steps))
    epochs = "" if num_images is None else f", {steps * batch / num_images:,.1f} epochs"
    rates = f"learning rate {rate.peak:g} after {rate.warmup_steps} steps, then {rate.decay}"
    report.add("steps", f"{count_text(steps, 'step')}{epochs}; {rates}, not rescaled by the number of devices")
    report.num_parameters = sum(each.numel() for each in module.parameters() if each.requires_grad)
    work = ""
    with report.count("work"):
        reads_tokens = values.data.source == "tokens"
        report.step_flops = useful_flops(module, global_batch=batch, encoder=None if reads_tokens else encoder)
        work = f", {report.step_flops / 1e12:.3g} TFLOP per step"
    report.add("model", f"{report.num_parameters:,} trained parameters{work}")


def _check_memory(
    report: Preflight,
    module: TokenModel | Tokenizer,
    options: Mapping[str, Any],
    per_device: int,
    device: float | None,
) -> None:
    """Checks that a micro-batch fits into the memory of a device, and otherwise names one that does."""
    memory = report.memory = step_memory(module, per_device=per_device, **options)
    gathered = f", {size_text(memory.gathered)} gathered" if memory.gathered else ""
    text = (
        f"{size_text(memory.total)} per device with {count_text(per_device, 'sample')}: {size_text(memory.states)} "
        f"weights and optimizer{gathered}, {size_text(memory.activations)} activations"
    )
    if device is None:
        report.add("memory", f"{text}; give the available memory with --device-memory", "warning")
        return
    limit = device * _HEADROOM
    if memory.total <= limit:
        report.add("memory", f"{text}; {size_text(device)} available")
        return
    sizes = [size for size in range(per_device - 1, 0, -1) if per_device % size == 0]
    fitting = (size for size in sizes if step_memory(module, per_device=size, **options).total <= limit)
    largest = next(fitting, None)
    hint = f"--data.max_batch_per_device={largest} fits" if largest else "not even one sample fits"
    rule = f"a micro-batch must fit into {size_text(limit)} of a device with {size_text(device)}, got {text}"
    report.add("memory", f"{rule}; {hint}; --model.activation_checkpointing=blocks saves memory", "FAIL")


def _check_disk(report: Preflight, plan: Plan, values: ResolvedRun, module: TokenModel | Tokenizer) -> None:
    """Checks that the run folder is writable, and that its disk has room for the checkpoints to come."""
    # The newest are kept while another one is written, and so are all that ``keep_every`` protects.
    kept = values.keep_last + 1 + (values.trainer.max_steps // values.keep_every if values.keep_every else 0)
    most = min(kept, -(-values.trainer.max_steps // values.checkpoint_every))
    count, size = max(1, most - len(complete_checkpoints(plan.checkpoints))), checkpoint_bytes(module)
    existing = next(parent for parent in plan.checkpoints.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    text = (
        f"{existing}: {size_text(count * size)} for {count_text(count, 'checkpoint')} of {size_text(size)}, "
        f"{size_text(free)} free"
    )
    with report.catch("disk"):
        check_run_outputs(plan)
        if free < count * size:
            raise ValueError(f"{text}; free space, name another --runs-folder, or lower keep_last or raise keep_every")
        report.add("disk", text)
