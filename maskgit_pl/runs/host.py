"""Checks of the machine before a run: address and port of rank 0, Slurm variables, disk of the run folder.

Used by ``preflight``. Address and port follow the rules of Lightning's ``SLURMEnvironment``. That class itself cannot
be used outside a task, since it reads and sets the variables of this process.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

__all__ = [
    "check_tasks",
    "free_bytes",
    "interface_fault",
    "is_writable",
    "main_address",
    "main_port",
    "port_fault",
    "slurm_faults",
]

_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def main_address(environment: Mapping[str, str], *, nodes: int) -> str | None:
    """Returns the address at which rank 0 listens, or None if no variable gives it.

    Args:
        environment: Environment variables; ``MASTER_ADDR`` takes precedence over the first node of Slurm's list.
        nodes: Number of nodes of the run. With one node, the address is that of this machine.
    """
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"]
    nodelist = environment.get("SLURM_JOB_NODELIST", environment.get("SLURM_NODELIST"))
    if nodelist:
        return SLURMEnvironment.resolve_root_node_address(nodelist)
    return "127.0.0.1" if nodes == 1 else None


def main_port(environment: Mapping[str, str]) -> int | None:
    """Returns the port at which rank 0 listens, or None if Lightning will choose a free one.

    The rule is that of Lightning and of ``recipes/slurm/train.sbatch``: ``MASTER_PORT``, else 15000 + the last four
    digits of the job ID.

    Raises:
        ValueError: if MASTER_PORT is not a port, or SLURM_JOB_ID is not a number.
    """
    named = environment.get("MASTER_PORT")
    if named is not None:
        if not named.isdecimal() or not 0 < int(named) < 65536:
            raise ValueError(f"MASTER_PORT must be in [1, 65535], got {named!r}; export a port above 1023")
        return int(named)
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if not job.isdecimal():
        raise ValueError(f"SLURM_JOB_ID must be a number, got {job!r}; unset it outside of a job")
    return 15000 + int(job) % 10000


def port_fault(address: str, port: int | None) -> str | None:
    """Returns an error message about address and port of rank 0, or None if both are usable.

    Only the machine of rank 0 can test the port; on other machines, only the address is resolved.

    Args:
        address: Address of rank 0.
        port: Port of rank 0; None skips its test.
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return (
            f"MASTER_ADDR {address} must be resolved by every node, got {error}; export MASTER_ADDR as an address that "
            "all nodes reach, or enter the name in /etc/hosts"
        )
    if port is None or not any(_is_here(family, place[0]) for family, *_, place in found):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # As a server does: a port with connections in TIME_WAIT counts as free.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            return (
                f"MASTER_PORT {port} must be free for rank 0, got {error.strerror or error}; end what uses it "
                f"(`ss -ltnp | grep {port}`), or export MASTER_PORT={_free_port()}, the same on all nodes"
            )
    return None


def interface_fault(environment: Mapping[str, str]) -> str | None:
    """Returns an error message if a variable names a network interface that this machine lacks, else None."""
    known = [name for _, name in socket.if_nameindex()]
    for variable in _INTERFACES:
        wanted = environment.get(variable, "")
        # Only NCCL knows a sign before the names: ^ excludes interfaces, = asks for whole names instead of prefixes.
        sign = wanted[:1] if variable.startswith("NCCL") and wanted[:1] in ("^", "=") else ""
        if not wanted or sign == "^":
            continue
        for name in wanted.removeprefix(sign).split(","):
            if not any(each == name or (not sign and each.startswith(name)) for each in known):
                return (
                    f"{variable} {wanted} must name interfaces of this machine ({', '.join(known)}), got {name}; "
                    f"export {variable}=NAME with one of them, or unset it"
                )
    return None


def slurm_faults(environment: Mapping[str, str], *, nodes: int, devices: int) -> list[str]:
    """Returns an error message for each Slurm variable that contradicts nodes x devices; none outside a job."""
    if "SLURM_JOB_ID" not in environment:
        return []
    expected = {
        "SLURM_NNODES": (nodes, "--nodes"),
        "SLURM_NTASKS_PER_NODE": (devices, "--ntasks-per-node"),
        "SLURM_GPUS_ON_NODE": (devices, "--gpus-per-node"),
        "SLURM_NTASKS": (nodes * devices, "--ntasks-per-node and --nodes"),
    }
    # Slurm sets a variable only if the job asked for it, so missing ones are no contradiction.
    faults = [
        f"{name} must be {wanted} for {nodes} nodes x {devices} devices, got {environment[name]}; change {flag} of "
        "sbatch, or nodes and devices here"
        for name, (wanted, flag) in expected.items()
        if name in environment and environment[name] != str(wanted)
    ]
    if "SLURM_NTASKS_PER_NODE" not in environment and environment.get("SLURM_NTASKS", "1") != "1":
        faults.append(
            "SLURM_NTASKS_PER_NODE must be set, since Lightning reads the devices of a node from it; give sbatch "
            f"--ntasks-per-node={devices}"
        )
    return faults


def check_tasks(trainer: Trainer, environment: Mapping[str, str] = os.environ) -> None:
    """Checks that ``srun`` has started the ranks for which Lightning will wait in a Slurm job.

    Raises:
        ValueError: if the training was started in a batch script or an interactive job of several tasks without it.
    """
    if not isinstance(getattr(trainer.strategy, "cluster_environment", None), SLURMEnvironment):
        return
    started = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if started == "1" and trainer.world_size > 1:
        raise ValueError(
            f"{trainer.world_size} ranks must be started with srun, got 1 task in a Slurm job of several; put `srun` "
            "before the command, use recipes/slurm/train.sbatch, or start the ranks with torchrun"
        )


def free_bytes(folder: Path) -> tuple[Path, int]:
    """Returns the nearest existing parent folder (or the folder itself), and the free bytes of its file system."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing, shutil.disk_usage(existing).free


def is_writable(folder: Path) -> bool:
    """Returns True if this process may write to a folder."""
    return os.access(folder, os.W_OK | os.X_OK)


def _is_here(family: int, address: str | int) -> bool:
    """Returns True if an address belongs to this machine; only such an address can be bound."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:  # fails on a kernel without IPv6
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        number: int = probe.getsockname()[1]
        return number
