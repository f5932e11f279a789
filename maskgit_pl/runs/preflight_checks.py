"""``runs.preflight``: checks that a run will start and fit into memory, and estimates its costs, without training.

It builds module and data as training does, but on the CPU and with weights of zero.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from maskgit_pl.data import split_batch
from maskgit_pl.data.manifest import DataSummary, describe_resizing, load_manifest, read_manifest_summary
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pipeline.pretrained import read_config
from maskgit_pl.processes import hide_launcher
from maskgit_pl.runs import host
from maskgit_pl.runs.build import StageRun, build, restore_process_state
from maskgit_pl.runs.layers import merge
from maskgit_pl.runs.plan import Plan, find_data, find_pretrained, find_tokenizer, run_folder
from maskgit_pl.runs.preflight_costs import CostChecks
from maskgit_pl.runs.preflight_report import Check, CheckList, Machines, Preflight, Shares, Verdict, count_text
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.resolve import choose_precision, merge_recipe_values, merge_values, values_without_data
from maskgit_pl.runs.settings import ResolvedRun, resolve
from maskgit_pl.training.checkpoint_files import newest_checkpoint, step_of
from maskgit_pl.training.strategies import build_strategy, check_accelerator, check_precision, check_strategy

__all__ = [
    "build_for_preflight",
    "build_without_weights",
    "describe_start",
    "preflight",
]

_ON_ONE_CPU = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto")
_STARTABLE = {"slurm", "network", "strategy"}  # errors in these checks do not prevent building module and data


def preflight(
    recipe: Recipe,
    *,
    run: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: str | Path | None = None,
    pretrained: str | Path | None = None,
    machines: Machines | None = None,
    on_check: Callable[[Check], object] | None = None,
) -> Preflight:
    """Checks a run on any machine: Slurm, network, data, tokenizer, strategy, recipe, batch, memory, disk.

    Trains and writes nothing, and works without a GPU. A failed check does not stop the later ones. The arguments up to
    ``pretrained`` are those of ``runs.fit``.

    Args:
        recipe: Values of the run, and the stage.
        run: A name in ``runs/``, or a folder. Default: ``DATASET-RECIPE``.
        data: Data folder. Default: ``data/shards/DATASET``.
        tokenizer: Pretrained tokenizer folder, for stage 2. Default: the run's own, or the only one for these data.
        pretrained: Pretrained folder with the initial weights of a new run.
        machines: Machines of the run. Default: nodes and devices of the recipe, and the GPU memory of this machine, if
            it has a GPU.
        on_check: Called with each check as soon as it is done, since a large model takes half a minute.

    Raises:
        ValueError: if the run has no name, or a reserved one.
    """
    checks, machines = CheckList(on_check), machines or Machines()
    nodes, devices = machines.nodes or _nodes_of(recipe), machines.devices or _devices_of(recipe)
    _check_host(checks, nodes=nodes, devices=devices, port=machines.port)
    folders = {"data": data, "tokenizer": tokenizer, "pretrained": pretrained}
    plan, summary = _check_inputs(checks, recipe, run_folder(recipe, run), folders)
    plan = _check_strategy(checks, plan, summary, nodes=nodes, devices=devices, gpu=machines.gpu)
    # Without data or tokenizer, the stage is built from the recipe only, for its costs.
    stage_run = build_for_preflight(plan, checks, is_complete=checks.names_with_errors() <= _STARTABLE)
    if stage_run is None:
        return Preflight(tuple(checks.checks))
    values = stage_run.values
    # The recipe check is missing if the stage was built without data: report what is known.
    if all(check.name != "recipe" for check in checks.checks):
        checks.add("recipe", f"{recipe.title}: keys, types and names are valid")
    _check_image_size(checks, plan, values, summary)
    shares = _check_batch(checks, values, summary, nodes=nodes, devices=devices)
    checks.add("run", describe_start(plan, values.trainer.max_steps))
    cost_checks = CostChecks(plan, stage_run, replace(machines, nodes=nodes, devices=devices), shares, summary)
    cost_checks.check_memory(checks)
    cost_checks.check_disk(checks)
    return Preflight(tuple(checks.checks), shares, cost_checks.costs())


def build_for_preflight(plan: Plan, checks: CheckList, *, is_complete: bool) -> StageRun | None:
    """Builds as much of a stage as possible, and adds the errors of training to the checks.

    It tries the following until one succeeds:

    1. as in training, with data and tokenizer;
    2. only from the recipe, without a Trainer and without reading data;
    3. stage 1 without its perceptual network, whose weight file is often missing.

    Args:
        plan: Plan of the run.
        checks: List to which errors are added.
        is_complete: True if data and tokenizer exist; 1 is tried only then.

    Returns:
        The stage with weights of zero, or None if all attempts fail.
    """
    plan = replace(plan, recipe=plan.recipe.with_overrides(_ON_ONE_CPU))
    with hide_launcher(), restore_process_state(), _ZeroWeights():
        warnings.simplefilter("ignore")  # they are for training
        if is_complete:  # 1.
            with checks.catch_errors("recipe"):
                run = build(plan)
                if run.datamodule.config.source != "stream":
                    run.datamodule.setup()
                checks.add("recipe", f"{plan.recipe.title}: module, data and tokenizer fit together")
                return run
        with checks.catch_errors("recipe"):  # 2.
            return _build_from_recipe(plan)
        if plan.stage == "tokenizer":  # 3.
            without = replace(plan, recipe=plan.recipe.with_overrides(["--model.perceptual=null"]))
            with checks.catch_errors("recipe"):
                run = _build_from_recipe(without)
                checks.add("memory", "calculated without the perceptual network", "warning")
                return run
    return None


def build_without_weights(plan: Plan) -> StageRun:
    """Builds module and data of a run without a Trainer and with weights of zero. Checks all values of its recipe.

    Data and tokenizer may be missing. No file is written, and the process-wide settings of torch stay as they are.

    Raises:
        ValueError: if a value is missing, out of range or unknown. The message names the key.
    """
    with hide_launcher(), restore_process_state(), _ZeroWeights():
        warnings.simplefilter("ignore")
        return StageRun(plan.stage, resolve(plan.recipe.kind, merge_values(plan)), plan.stage_folder)


def describe_start(plan: Plan, steps: int | None) -> str:
    """Returns a line: whether the training starts, resumes or has nothing to do."""
    newest = newest_checkpoint(plan.checkpoints)
    if newest is None:
        return f"{plan.stage_folder}: starts from scratch"
    if steps is not None and 0 <= steps <= step_of(newest):
        return f"{plan.stage_folder}: {newest.name} has all of {steps} steps; training has nothing to do"
    return f"{plan.stage_folder}: resumes from {newest.name}"


def _nodes_of(recipe: Recipe) -> int:
    value = recipe.get("trainer.num_nodes")
    return value if isinstance(value, int) and value > 0 else 1


def _devices_of(recipe: Recipe) -> int:
    value = recipe.get("trainer.devices")
    if isinstance(value, list):  # the indices of the devices
        return max(1, len(value))
    if isinstance(value, int) and value > 0:
        return value
    is_on_cpu = recipe.get("trainer.accelerator") == "cpu"  # where Lightning's auto is one process
    return 1 if is_on_cpu else max(1, torch.cuda.device_count())


def _check_host(checks: CheckList, *, nodes: int, devices: int, port: int | None) -> None:
    environment = {**os.environ} if port is None else {**os.environ, "MASTER_PORT": str(port)}
    faults = host.slurm_faults(environment, nodes=nodes, devices=devices)
    for fault in faults:
        checks.add("slurm", fault, "error")
    if not faults:
        job = environment.get("SLURM_JOB_ID")
        checks.add("slurm", "not in a job" if job is None else f"job {job} has {nodes} x {devices} tasks")
    with checks.catch_errors("network"):
        checks.add("network", *_check_network(environment, nodes))


def _check_network(environment: Mapping[str, str], nodes: int) -> tuple[str, Verdict]:
    address, port = host.main_address(environment, nodes=nodes), host.main_port(environment)
    if address is None:
        return (
            f"MASTER_ADDR must be set for {nodes} nodes; Slurm sets it, elsewhere export MASTER_ADDR and MASTER_PORT "
            "on each node"
        ), "warning"
    fault = host.port_fault(address, port) or host.interface_fault(environment)
    if fault is not None:
        return fault, "error"
    return f"rank 0 listens at {address}, {'a free port' if port is None else f'port {port}'}", "ok"


def _check_inputs(
    checks: CheckList, recipe: Recipe, folder: Path, named: Mapping[str, str | Path | None]
) -> tuple[Plan, DataSummary | None]:
    """Finds the folders of a run. A missing folder adds an error, and its expected path stays in the plan."""
    plan, summary = Plan(recipe, shards=Path(named["data"] or ""), folder=folder), None
    with checks.catch_errors("data"):
        plan = replace(plan, shards=find_data(recipe, named["data"]))
        if recipe.get("data.source") != "stream":
            summary = _read_summary(plan.shards)
            counts = ", ".join(f"{count:,} {split}" for split, count in summary.samples.items())
            checks.add("data", f"{plan.shards}: {counts}; {summary.num_classes} classes")
    if plan.stage == "transformer":
        with checks.catch_errors("tokenizer"):
            found = find_tokenizer(
                recipe, folder=folder, shards=plan.shards, tokenizer=named["tokenizer"], pretrained=named["pretrained"]
            )
            config = VQGANConfig(**read_config(found, "tokenizer")["network"])
            plan = replace(plan, tokenizer=found)
            checks.add("tokenizer", f"{found}: {config.codebook_size} codes")
    with checks.catch_errors("pretrained"):
        plan = replace(plan, pretrained=find_pretrained(plan.stage, named["pretrained"]))
    return plan, summary


def _read_summary(shards: Path) -> DataSummary:
    summary = read_manifest_summary(shards)
    if "train" not in summary.samples:
        load_manifest(shards, "train", check=False)  # raises the error of training
    if "val" not in summary.samples:
        raise FileNotFoundError(
            f"data {shards} must have a val split for validation, got only train; make the "
            "folder again with `maskgit data make`, or name val shards with `maskgit data index --val`"
        )
    return summary


def _check_strategy(
    checks: CheckList, plan: Plan, summary: DataSummary | None, *, nodes: int, devices: int, gpu: str | None
) -> Plan:
    """Returns the plan with the precision that training will choose; the stage is built on a CPU, which may differ."""
    recipe = plan.recipe
    name = str(recipe.get("trainer.strategy") or "auto")
    with checks.catch_errors("strategy"):
        build_strategy(name)
        check_accelerator(str(recipe.get("trainer.accelerator") or "auto"))
        known = merge_recipe_values(plan) if summary is None else merge_values(plan)
        try:
            values = resolve(recipe.kind, merge([_values_without_data(plan), known]))
        except ValueError:  # the check of the recipe reports it
            return plan
        precision = choose_precision(values.trainer, values.model.network, plan.stage, plan.stage_folder, gpu=gpu)
        check_precision(precision)
        check_strategy(name, stage=recipe.stage, ranks=nodes * devices)
        checks.add("strategy", f"{name}, {precision}, {count_text(nodes, 'node')} x {count_text(devices, 'device')}")
        return replace(plan, recipe=recipe.with_overrides({"trainer.precision": precision}))
    return plan


def _check_image_size(checks: CheckList, plan: Plan, values: ResolvedRun, summary: DataSummary | None) -> None:
    """Adds a warning if all images are resized. Without its tokenizer, the image size of stage 2 is unknown."""
    size: Any = values.data.image_size
    if plan.stage == "transformer":
        size = None if plan.tokenizer is None else read_config(plan.tokenizer, "tokenizer")["image_size"]
    text = None if summary is None or size is None else describe_resizing(summary.images, size)
    if text is not None:
        checks.add("image size", text, "warning")


def _check_batch(
    checks: CheckList, values: ResolvedRun, summary: DataSummary | None, *, nodes: int, devices: int
) -> Shares | None:
    global_batch = values.data.global_batch
    with checks.catch_errors("batch"):
        shares = Shares(nodes, devices, *split_batch(global_batch, values.data.max_batch_per_device, nodes * devices))
        text = (
            f"{global_batch} = {count_text(shares.ranks, 'rank')} x "
            f"{count_text(shares.micro_batches, 'accumulation step')} x {count_text(shares.per_device, 'sample')}"
        )
        if summary is not None and summary.samples["train"] < global_batch:
            text = f"{text}; a step needs more samples than the {summary.samples['train']} of the train split"
            checks.add("batch", text, "warning")
        else:
            checks.add("batch", text)
        return shares
    return None


def _build_from_recipe(plan: Plan) -> StageRun:
    """Builds module and data of a recipe; data and tokenizer may be missing."""
    tree = merge([_values_without_data(plan), plan.recipe.tree])
    return StageRun(plan.stage, resolve(plan.recipe.kind, tree), plan.stage_folder)


def _values_without_data(plan: Plan) -> dict[str, Any]:
    return values_without_data(
        plan.stage,
        path=str(plan.shards),
        token_store=str(plan.folder / "tokens"),
        tokenizer=str(plan.tokenizer or "missing"),
    )


class _ZeroWeights(TorchFunctionMode):
    """A mode that fills weights with zeros; random initialization takes half a minute for a large model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls ``func``, but replaces random initialization by zeros."""
        kwargs = kwargs or {}
        # Methods of tensors, and functions of torch.nn.init.
        if getattr(func, "__name__", "").endswith(("normal_", "uniform_")):
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **kwargs)
