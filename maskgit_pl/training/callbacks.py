"""The registries of callbacks and profilers that a recipe names.

A recipe has ``callbacks: [device_stats, {name: model_summary, max_depth: 3}]`` and ``profiler: simple``. ``runs.build``
adds the callbacks after those that every run has.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import DeviceStatsMonitor, RichModelSummary
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from maskgit_pl.checks import check_integer
from maskgit_pl.registry import Registry, derives_from

__all__ = ["CallbackSpec", "DeviceStats", "ProfilerSpec", "SummaryTable", "callbacks", "profilers"]


class CallbackSpec:
    """The base of registered callbacks: a frozen dataclass of the values in a recipe, which builds a callback."""

    def create(self, folder: Path) -> Callback:
        """Builds the callback of a run, on every rank.

        A callback that keeps a state between steps returns it from ``state_dict`` as plain values, so that a resumed
        run continues it.

        Args:
            folder: Folder of the stage, ``runs/RUN/STAGE``. Only rank 0 may write to it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define create(folder)")


class ProfilerSpec:
    """The base of registered profilers: a frozen dataclass of the values in a recipe, which builds a profiler."""

    def create(self, folder: Path) -> Profiler:
        """Builds the profiler, whose files go to a folder.

        Args:
            folder: Folder of the stage, ``runs/RUN/STAGE``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define create(folder)")


callbacks: Registry[CallbackSpec] = Registry("callback", "maskgit_pl.callbacks", check=derives_from(CallbackSpec))
profilers: Registry[ProfilerSpec] = Registry("profiler", "maskgit_pl.profilers", check=derives_from(ProfilerSpec))


@callbacks.register("device_stats")
@dataclass(frozen=True)
class DeviceStats(CallbackSpec):
    """Memory and load of the devices, in every logger, by Lightning's ``DeviceStatsMonitor``."""

    def create(self, folder: Path) -> Callback:
        if find_spec("psutil") is None:
            raise ValueError("callback 'device_stats' must have the package psutil: pip install psutil")
        return DeviceStatsMonitor()


@callbacks.register("model_summary")
@dataclass(frozen=True)
class SummaryTable(CallbackSpec):
    """A table of the layers and their parameters at the start, by Lightning's ``RichModelSummary``.

    Args:
        max_depth: Depth of the modules that have a line of their own, >= 1.
    """

    max_depth: int = 1

    def __post_init__(self) -> None:
        check_integer("max_depth", self.max_depth, "[1, 100]")

    def create(self, folder: Path) -> Callback:
        return RichModelSummary(max_depth=self.max_depth)


@profilers.register("simple")
@dataclass(frozen=True)
class Simple(ProfilerSpec):
    """Seconds of each part of Lightning's loop, written to ``fit-profile.txt`` of the stage folder at the end."""

    def create(self, folder: Path) -> Profiler:
        return SimpleProfiler(dirpath=folder, filename="profile")


@profilers.register("advanced")
@dataclass(frozen=True)
class Advanced(ProfilerSpec):
    """Python's cProfile of each part of Lightning's loop, written to ``fit-profile.txt`` at the end."""

    def create(self, folder: Path) -> Profiler:
        return AdvancedProfiler(dirpath=folder, filename="profile")


@profilers.register("pytorch")
@dataclass(frozen=True)
class PyTorch(ProfilerSpec):
    """torch's profiler of operations and kernels: a table in ``fit-profile.txt``, and a trace for Chrome."""

    def create(self, folder: Path) -> Profiler:
        return PyTorchProfiler(dirpath=folder, filename="profile")
