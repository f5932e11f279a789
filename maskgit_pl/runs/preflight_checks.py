"""Every check of ``maskgit doctor``, and what it works out on the way; all of them run, whatever fails before."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from torch.overrides import TorchFunctionMode

from maskgit_pl.cli.run_flags import folders_of, read_recipe
from maskgit_pl.data import split_batch
from maskgit_pl.errors import is_user_error
from maskgit_pl.estimates.run import CARDS, StepTime, kept_checkpoints, step_time
from maskgit_pl.estimates.sharding import Strategy
from maskgit_pl.estimates.transformer import Precision
from maskgit_pl.files import size_text
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.pretrained import read_config
from maskgit_pl.runs import host
from maskgit_pl.runs.build import StageRun, build
from maskgit_pl.runs.costs import Costs, TokenizerCosts, TransformerCosts
from maskgit_pl.runs.layers import merged
from maskgit_pl.runs.plan import Plan, find_data, find_pretrained, find_run, find_tokenizer
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.shards.manifest import DataSummary, load_manifest, read_manifest_summary
from maskgit_pl.token_model import TokenModel
from maskgit_pl.tokenizer import Tokenizer
from maskgit_pl.training.checkpoint_files import complete_checkpoints, newest_complete, step_of
from maskgit_pl.training.strategies import build_strategy, check_accelerator, check_precision, check_strategy

__all__ = ["Check", "Examination", "State", "examine"]

State = Literal["ok", "warning", "FAIL"]

_HEADROOM = 0.92  # the rest is the device's context, NCCL's buffers, and gaps between tensors
_PIXELS_A_CORE = 100e6  # that a core decodes and crops in a second: 1,565 images of 256 px (benchmarks/README.md)
_LINK, _NETWORK = 100e9, 25e9  # bytes a second: of a device within a node; of a node with one port of 200 Gbit/s
_STARTED_BY = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "TORCHELASTIC_")


@dataclass(frozen=True)
class Check:
    """One line of the list.

    Attributes:
        name: What was looked at.
        state: Whether it is as it must be.
        text: What was found; for a failure the thing, the rule and the way out.
    """

    name: str
    state: State
    text: str


@dataclass
class Examination:
    """What was found out.

    Attributes:
        args: The command's words.
        nodes: Machines.
        devices: Of each.
        strategy: Of the recipe.
        checks: In order.
        batch: Samples of a micro-batch and micro-batches of a step on each rank, if the global batch divides.
        global_batch: Of the recipe.
        values: Lines of what follows from the recipe: name and text.
        on_check: Called with each check as soon as it is made.
    """

    args: argparse.Namespace
    nodes: int = 1
    devices: int = 1
    strategy: Strategy = "auto"
    checks: list[Check] = field(default_factory=list)
    batch: tuple[int, int] | None = None
    global_batch: int = 0
    values: list[tuple[str, str]] = field(default_factory=list)
    on_check: Callable[[Check], object] = lambda check: None

    @property
    def ranks(self) -> int:
        """All devices of all nodes."""
        return self.nodes * self.devices

    @property
    def failures(self) -> list[Check]:
        """What must be put right."""
        return [check for check in self.checks if check.state == "FAIL"]

    def note(self, name: str, text: str, state: State = "ok") -> None:
        """Adds a check, unless the same failure stands there already."""
        if state != "FAIL" or all(check.text != text for check in self.checks):
            self.checks.append(Check(name, state, text))
            self.on_check(self.checks[-1])

    @contextmanager
    def listing(self, name: str) -> Iterator[None]:
        """Has an error that is for the user become a failure of the list."""
        try:
            yield
        except Exception as error:
            if not is_user_error(error):
                raise
            self.note(name, str(error), "FAIL")


def examine(args: argparse.Namespace, *, on_check: Callable[[Check], object]) -> Examination:
    """Runs every check; nothing is trained or written, and no GPU is needed.

    Args:
        args: The command's words.
        on_check: Called with each check as soon as it is made: a large model takes half a minute.
    """
    found = Examination(args, on_check=on_check)
    recipe: Recipe | None = None
    with found.listing("recipe"):
        recipe = read_recipe(args)
    _note_world(found, recipe)
    _note_host(found)
    if recipe is None:
        return found
    plan, summary = _find(found, recipe)
    _note_strategy(found, plan)
    cli = _build(found, plan)
    if cli is None:
        return found
    config = cli.config
    if all(check.name != "recipe" for check in found.checks):
        found.note("recipe", f"{recipe.title}: keys, types and names are right")
    _note_batch(found, config, summary)
    _note_going_on(found, plan, config)
    costs = _costs(found, plan, cli, config)
    _note_memory(found, costs, config)
    _note_disk(found, plan, costs, config)
    _note_values(found, plan, costs, config, summary)
    return found


# Where it runs


def _note_world(found: Examination, recipe: Recipe | None) -> None:
    def of_recipe(key: str) -> int:
        value = None if recipe is None else recipe.get(f"trainer.{key}")
        return value if isinstance(value, int) and value > 0 else max(1, torch.cuda.device_count() if recipe else 1)

    found.nodes = found.args.nodes or of_recipe("num_nodes")
    found.devices = found.args.devices or of_recipe("devices")


def _note_host(found: Examination) -> None:
    environment = {**os.environ}
    if found.args.net_port is not None:
        environment["MASTER_PORT"] = str(found.args.net_port)
    faults = host.slurm_faults(environment, nodes=found.nodes, devices=found.devices)
    for fault in faults:
        found.note("slurm", fault, "FAIL")
    if not faults:
        job = environment.get("SLURM_JOB_ID")
        found.note("slurm", "not in a job" if job is None else f"job {job} has {found.nodes} x {found.devices} tasks")
    with found.listing("network"):
        _note_network(found, environment)


def _note_network(found: Examination, environment: Mapping[str, str]) -> None:
    address, port = host.main_address(environment, nodes=found.nodes), host.main_port(environment)
    if address is None:
        found.note(
            "network",
            f"MASTER_ADDR: {found.nodes} nodes must know rank 0's, got none; Slurm tells it to them, elsewhere export "
            "MASTER_ADDR and MASTER_PORT on each",
            "warning",
        )
        return
    faulty = host.port_fault(address, port) or host.interface_fault(environment)
    where = f"{address}, {'a free port' if port is None else f'port {port}'}"
    found.note("network", faulty or f"rank 0 listens at {where}", "FAIL" if faulty else "ok")


# What it reads


def _find(found: Examination, recipe: Recipe) -> tuple[Plan, DataSummary | None]:
    """The run's pieces, each missing one in the list; what is missing stands in the plan as where it would be."""
    args, streams = found.args, recipe.get("data.source") == "stream"
    named = folders_of(args, recipe)
    plan = Plan(recipe, shards=Path(args.data or ""), folder=find_run(recipe, named["run"]))
    summary = None
    with found.listing("data"):
        plan = replace(plan, shards=find_data(recipe, named["data"]))
        if not streams:
            summary = _read_data(found, plan.shards)
    if plan.stage == "transformer":
        with found.listing("tokenizer"):
            tokenizer = find_tokenizer(
                recipe,
                folder=plan.folder,
                shards=plan.shards,
                tokenizer=named["tokenizer"],
                pretrained=named["pretrained"],
            )
            config = VQGANConfig(**read_config(tokenizer, "tokenizer")["network"])
            plan = replace(plan, tokenizer=tokenizer)
            found.note("tokenizer", f"{tokenizer}: {config.num_codes} codes")
    with found.listing("pretrained"):
        plan = replace(plan, pretrained=find_pretrained(plan.stage, named["pretrained"]))
    return plan, summary


def _read_data(found: Examination, shards: Path) -> DataSummary:
    summary = read_manifest_summary(shards)
    if "val" not in summary.samples:
        raise FileNotFoundError(
            f"data {shards}: training validates on a val split, got train alone; see data/README.md, or make the "
            "folder again with `maskgit data make`"
        )
    counts = ", ".join(f"{count:,} {split}" for split, count in summary.samples.items())
    found.note("data", f"{shards}: {counts}; {summary.num_classes} classes")
    return summary


class _ZeroWeights(TorchFunctionMode):
    """Inside, layers begin with zeros: to draw the first weights of a large model takes half a minute."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls ``func``, or fills its tensor with zeros where it would draw."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").endswith(("normal_", "uniform_")):  # a tensor's method, or of torch.nn.init
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **kwargs)


def _build(found: Examination, plan: Plan) -> StageRun | None:
    """The stage as training builds it, where its data and tokenizer are there; else, or if that fails, its recipe."""
    complete = not found.failures or {check.name for check in found.failures} <= {"slurm", "network", "strategy"}
    here = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto"]
    plan = replace(plan, recipe=plan.recipe.with_overrides(here))
    with _unattended(), _ZeroWeights():
        if complete:
            with found.listing("recipe"):
                cli = build(plan)
                if cli.datamodule.source != "stream":
                    cli.datamodule.setup()
                found.note("recipe", f"{plan.recipe.title}: module, data and tokenizer fit each other")
                return cli
        with found.listing("recipe"):
            return _recipe_only(plan)
        if plan.stage == "tokenizer":  # most often the perceptual network's file: the rest can be examined without it
            try:
                cli = _recipe_only(replace(plan, recipe=plan.recipe.with_overrides(["--model.perceptual=null"])))
            except Exception as error:
                if not is_user_error(error):
                    raise
                return None
            found.note("memory", "calculated without the perceptual network", "warning")
            return cli
    return None


def _recipe_only(plan: Plan) -> StageRun:
    """Module and data of a recipe whose data or tokenizer are missing: no Trainer, and nothing read."""
    missing: dict[str, Any] = {"data": {"path": str(plan.shards), "token_store": str(plan.folder / "tokens")}}
    if plan.stage == "transformer":
        sizes: dict[str, Any] = {"num_codes": 1024, "num_classes": 1000, "grid": [16, 16]}
        missing["model"] = {"tokenizer": str(plan.tokenizer or "missing"), "network": sizes}
    return StageRun(plan.recipe, merged([missing, plan.recipe.tree]), plan.stage_folder)


@contextmanager
def _unattended() -> Iterator[None]:
    """Inside, this process is no task of a job, whatever started it, and Lightning keeps its advice to itself."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith(_STARTED_BY)}
    for name in hidden:
        del os.environ[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
            yield
    finally:
        os.environ.update(hidden)


# Whether it fits


def _note_strategy(found: Examination, plan: Plan) -> None:
    name = str(plan.recipe.get("trainer.strategy") or "auto")
    precision = str(plan.recipe.get("trainer.precision") or "32-true")
    with found.listing("strategy"):
        build_strategy(name)
        check_accelerator(str(plan.recipe.get("trainer.accelerator") or "auto"))
        check_precision(precision)
        check_strategy(name, stage=plan.stage, ranks=found.ranks)
        found.note("strategy", f"{name}, {precision}, {_many(found.nodes, 'node')} x {_many(found.devices, 'device')}")
    found.strategy = cast("Strategy", name if name in ("ddp", "fsdp") else "auto")


def _note_batch(found: Examination, config: Mapping[str, Any], summary: DataSummary | None) -> None:
    data = config["data"]
    found.global_batch = data["global_batch"]
    with found.listing("batch"):
        found.batch = split_batch(data["global_batch"], data["max_batch_per_device"], found.ranks)
        per_device, micro_batches = found.batch
        ranks = _many(found.ranks, "rank")
        text = f"{data['global_batch']} = {ranks} x {micro_batches} accumulated x {per_device} a device"
        if summary is not None and summary.samples["train"] < data["global_batch"]:
            found.note("batch", f"{text}; a step has more than the {summary.samples['train']} samples", "warning")
        else:
            found.note("batch", text)


def _note_going_on(found: Examination, plan: Plan, config: Mapping[str, Any]) -> None:
    newest, steps = newest_complete(plan.checkpoints), config["trainer"]["max_steps"]
    if newest is None:
        found.note("run", f"{plan.stage_folder}: begins anew")
    elif steps is not None and 0 <= steps <= step_of(newest):
        found.note("run", f"{plan.stage_folder}: {newest.name} has all of {steps} steps; training has nothing to do")
    else:
        found.note("run", f"{plan.stage_folder}: goes on from {newest.name}")


def _costs(found: Examination, plan: Plan, cli: StageRun, config: Mapping[str, Any]) -> Costs:
    precision: Precision = "bf16-mixed" if "16" in str(config["trainer"]["precision"]) else "32-true"
    checkpointing = config["model"].get("activation_checkpointing", "none")
    module: LightningModule = cli.model
    if isinstance(module, TokenModel):
        sizes = None
        if plan.tokenizer is not None:
            tokenizer = read_config(plan.tokenizer, "tokenizer")
            sizes = VQGANConfig(**tokenizer["network"]), int(tokenizer["image_size"])
        encodes = config["data"]["source"] != "tokens"
        return TransformerCosts(found.strategy, found.ranks, precision, checkpointing, module, sizes, encodes)
    assert isinstance(module, Tokenizer)
    strategy: Strategy = "ddp" if found.strategy == "fsdp" else found.strategy
    return TokenizerCosts(strategy, found.ranks, precision, checkpointing, module)


def _note_memory(found: Examination, costs: Costs, config: Mapping[str, Any]) -> None:
    per_device = config["data"]["max_batch_per_device"] if found.batch is None else found.batch[0]
    memory = costs.memory(per_device)
    states = memory.weights + memory.gradients + memory.moments + memory.average + memory.frozen
    rest = f", {size_text(memory.gathered)} gathered" if memory.gathered else ""
    text = (
        f"{size_text(memory.total)} a device at {per_device} samples: {size_text(states)} weights and optimiser"
        f"{rest}, {size_text(memory.activations + memory.casts + memory.working)} activations"
    )
    device = _device_memory(found.args)
    if device is None:
        found.note("memory", f"{text}; --device or --device-memory says what it must fit", "warning")
        return
    limit, most = device * _HEADROOM, config["data"]["max_batch_per_device"]
    largest = costs.largest_batch(found.global_batch // found.ranks, limit)
    if memory.total <= limit:
        more = f"; --data.max_batch_per_device={largest} fits too" if largest and largest > most else ""
        found.note("memory", f"{text}; {size_text(device)} are there{more}")
        return
    way_out = f"--data.max_batch_per_device={largest} fits" if largest else "not even one sample fits"
    found.note(
        "memory",
        f"data.max_batch_per_device {most}: a device of {size_text(device)} takes {size_text(limit)}, got {text}; "
        f"{way_out}{_savings(costs)}",
        "FAIL",
    )


def _savings(costs: Costs) -> str:
    """What else saves memory."""
    ways = []
    if costs.checkpointing == "none":
        ways.append("--model.activation_checkpointing=blocks")
    if costs.precision == "32-true":
        ways.append("--trainer.precision=bf16-mixed")
    if costs.strategy == "ddp" and isinstance(costs, TransformerCosts):
        ways.append("--cluster fsdp")
    return f"; less memory: {', '.join(ways)}" if ways else ""


def _device_memory(args: argparse.Namespace) -> float | None:
    if args.device_memory is not None:
        return float(args.device_memory)
    if args.device is not None:
        return CARDS[args.device].memory
    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def _note_disk(found: Examination, plan: Plan, costs: Costs, config: Mapping[str, Any]) -> None:
    existing, free = host.free_bytes(plan.checkpoints)
    steps = config["trainer"]["max_steps"]
    if steps is None or steps < 1:
        steps = config["checkpoint_every"] * (config["keep_last"] + 1)
    most = kept_checkpoints(
        steps, every=config["checkpoint_every"], keep_last=config["keep_last"], keep_every=config["keep_every"]
    )
    size, there = costs.checkpoint(), len(complete_checkpoints(plan.checkpoints))
    needed = max(1, most - there) * size
    many = _many(max(1, most - there), "checkpoint")
    text = f"{size_text(needed)} for {many} of {size_text(size)}, {size_text(free)} free"
    if not host.is_writable(existing):
        found.note("disk", f"{existing}: checkpoints go there, got no permission to write; name another --runs", "FAIL")
    elif free < needed:
        found.note(
            "disk",
            f"{existing}: checkpoints need {text}; free space, name another --runs, or lower keep_last or raise "
            "keep_every",
            "FAIL",
        )
    else:
        found.note("disk", f"{existing}: {text}")


# What follows


def _note_values(
    found: Examination, plan: Plan, costs: Costs, config: Mapping[str, Any], summary: DataSummary | None
) -> None:
    rate, steps = config["model"]["optimizer"]["learning_rate"], config["trainer"]["max_steps"]
    values = found.values
    values.append(("parameters", f"{costs.trained:,} trained"))
    values.append(
        (
            "learning rate",
            f"peak {rate['peak']:g} after {rate['warmup_steps']} steps, then {rate['decay']}; it is for a global batch "
            f"of {found.global_batch} and is not rescaled by the number of devices",
        )
    )
    if found.batch is None:
        return
    useful, executed = costs.flops(found.global_batch)
    traffic = costs.traffic(found.batch[1])
    again = "" if executed == useful else f", {executed / useful:.2f} times as many executed"
    values.append(("work of a step", f"{_flops(useful)} useful{again}; {_flops(useful / found.ranks)} a rank"))
    values.append(("traffic of a step", f"{size_text(traffic.total)} sent by each rank"))
    time = _step_time(found, executed, costs, config)
    if time is None:
        values.append(("time", "--device or --device-flops says how fast a device is"))
        return
    values.append(("a step", _time_text(found, time)))
    if steps is not None and steps > 0:
        text = f"at least {_duration(steps * time.least)} for {_many(steps, 'step')}"
        if summary is not None:
            text += f", {steps * found.global_batch / summary.samples['train']:,.1f} epochs"
        values.append(("the run", text))
    values.append(("data", _data_text(found, plan, config, time, summary)))


def _step_time(found: Examination, executed: float, costs: Costs, config: Mapping[str, Any]) -> StepTime | None:
    args = found.args
    flops = args.device_flops
    if flops is None and args.device is not None:
        high = config.get("matmul_precision", "highest") != "highest"
        flops = args.utilization * CARDS[args.device].rate(str(config["trainer"]["precision"]), tensor_float32=high)
    if flops is None:
        return None
    assert found.batch is not None
    bandwidth = args.bandwidth or (_LINK if found.nodes == 1 else _NETWORK)
    return step_time(executed, costs.traffic(found.batch[1]), ranks=found.ranks, rate=flops, bandwidth=bandwidth)


def _time_text(found: Examination, time: StepTime) -> str:
    args = found.args
    rate = (
        f"{args.device_flops:.3g} FLOP/s"
        if args.device_flops
        else f"{args.utilization:.0%} of the {args.device}'s peak"
    )
    bandwidth = args.bandwidth or (_LINK if found.nodes == 1 else _NETWORK)
    return (
        f"at least {_duration(time.least)}, or {_duration(time.most)} where traffic is not hidden behind work: "
        f"{_duration(time.computing)} of work at {rate}, {_duration(time.communicating)} of traffic at "
        f"{size_text(bandwidth)}/s; launches of kernels and waiting for data come on top"
    )


def _data_text(
    found: Examination, plan: Plan, config: Mapping[str, Any], time: StepTime, summary: DataSummary | None
) -> str:
    samples = found.global_batch / time.least
    of_rank, data = samples / found.ranks, config["data"]
    if data["source"] == "tokens":
        bytes_each = 2.0 * _tokens(plan, config)
        return f"{samples:,.0f} samples/s, {size_text(samples * bytes_each)}/s of tokens"
    text = f"{samples:,.0f} samples/s"
    if summary is not None:
        shards = load_manifest(plan.shards, "train", check=False).shards
        text += f", {size_text(samples * sum(each.bytes for each in shards) / summary.samples['train'])}/s of shards"
    cores = of_rank * data["image_size"] ** 2 / _PIXELS_A_CORE
    return f"{text}; each rank {of_rank:,.0f}/s, about {cores:.2g} cores of decoding for {data['num_workers']} workers"


def _tokens(plan: Plan, config: Mapping[str, Any]) -> int:
    grid = config["model"]["network"]["grid"]
    return int(grid[0] * grid[1])


def _flops(count: float) -> str:
    unit, factor = next(
        ((unit, factor) for unit, factor in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)) if count >= factor),
        ("MFLOP", 1e6),
    )
    return f"{count / factor:.3g} {unit}"


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    """Seconds for people: ``41 ms``, ``3.2 h``, ``12 days``."""
    for unit, factor in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= (2 if unit == "days" else 1) * factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
