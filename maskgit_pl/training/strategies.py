"""How a run spreads over devices: ``auto`` (one device), ``ddp`` and ``fsdp``, by name in a recipe.

Lightning's strategies with three differences: DDP wraps the two networks of stage 1 apart, so that no search for unused
parameters is needed; FSDP2 reads and writes the same checkpoint folders as DDP; both count on batches that the data
module has already divided.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from maskgit_pl.registry import nearest

__all__ = ["STRATEGIES", "build_strategy"]


class NetworksDDP(DDPStrategy):
    """DDP that lets a module wrap its networks itself, if it has ``wrap_networks``; else the usual DDP."""

    def configure_ddp(self) -> None:
        """Wraps the networks where the module offers it, and the whole module elsewhere."""
        wrap_networks = getattr(self.lightning_module, "wrap_networks", None)
        if wrap_networks is None:
            super().configure_ddp()
        else:
            wrap_networks(self._wrap)

    def _wrap(self, network: nn.Module) -> nn.Module:
        return DistributedDataParallel(network, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)


class FullyShardedDataParallel2(ModelParallelStrategy):
    """FSDP2 (``fully_shard``) over all ranks; checkpoints are assembled on rank 0 in the layout that DDP writes."""

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Shards over every rank of every node: the world is known only now."""
        self._tensor_parallel_size = 1
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on rank 0, numbered as ``optimizer.state_dict()`` of an unsharded run numbers it."""
        assert self.model is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        named = get_optimizer_state_dict(self.model, optimizer, options=_FULL)
        return _numbered(named, optimizer) if self.global_rank == 0 else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads the folder and keeps its shards."""
        assert self.model is not None
        checkpoint = self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path))
        set_model_state_dict(self.model, checkpoint["state_dict"], options=_FULL)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.model, optimizer, _named(state), options=_FULL)
        return checkpoint


_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _numbered(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    number = {name: place for place, name in enumerate(names)}
    groups = optimizer.state_dict()["param_groups"]
    return {"state": {number[name]: values for name, values in state["state"].items()}, "param_groups": groups}


def _named(state: Mapping[str, Any]) -> dict[str, Any]:
    groups = [{**group, "params": list(group["param_names"])} for group in state["param_groups"]]
    name_of = {
        number: name
        for group in state["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }
    return {"state": {name_of[number]: values for number, values in state["state"].items()}, "param_groups": groups}


STRATEGIES = ("auto", "ddp", "fsdp")


def build_strategy(name: str) -> str | Strategy:
    """The strategy that a recipe names.

    Raises:
        ValueError: Unknown name.
    """
    if name == "auto":
        return name
    if name == "ddp":
        return NetworksDDP(gradient_as_bucket_view=True)
    if name == "fsdp":
        return FullyShardedDataParallel2()
    raise ValueError(f"trainer.strategy {name!r}: {nearest(name, STRATEGIES)}")
