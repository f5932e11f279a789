"""What the machine says before a run: its network port, Slurm's variables, the disk below the run folder."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

__all__ = [
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
    """Where rank 0 listens: MASTER_ADDR, Slurm's first node, this machine for one node, or None: nobody says."""
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"]
    listed = environment.get("SLURM_JOB_NODELIST", environment.get("SLURM_NODELIST"))
    if listed:
        first = re.sub(r"\[(\d+)[^\]]*\]", r"\1", listed)  # node[03-07,9],other -> node03,other
        return first.partition(",")[0]
    return "127.0.0.1" if nodes == 1 else None


def main_port(environment: Mapping[str, str]) -> int | None:
    """The port of rank 0: MASTER_PORT, what Lightning makes of a Slurm job's number, or None: it takes a free one.

    Raises:
        ValueError: MASTER_PORT is no port, or SLURM_JOB_ID no number.
    """
    named = environment.get("MASTER_PORT")
    if named is not None:
        if not named.isdecimal() or not 0 < int(named) < 65536:
            raise ValueError(
                f"MASTER_PORT: a port's number, 1 to 65535, is needed, got {named!r}; export one above 1023"
            )
        return int(named)
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if not job.isdecimal():
        raise ValueError(
            f"SLURM_JOB_ID: the port follows from the job's number, got {job!r}; unset it outside of a job"
        )
    return int(job[-4:]) + 15000


def port_fault(address: str, port: int | None) -> str | None:
    """What is wrong with the place where rank 0 will listen, and the way out; None if nothing is.

    Whether the port is free can be known on rank 0's machine alone; elsewhere only the name is looked up.
    """
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return (
            f"MASTER_ADDR {address}: every node must resolve it, got {error}; export MASTER_ADDR as an address that "
            "all nodes reach, or enter the name in /etc/hosts"
        )
    if port is None or not any(_is_here(family, place[0]) for family, *_, place in found):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            return (
                f"MASTER_PORT {port}: rank 0 listens there, got {error.strerror or error}; end what uses it "
                f"(`ss -ltnp | grep {port}`), or export MASTER_PORT={_free_port()}, the same on all nodes"
            )
    return None


def interface_fault(environment: Mapping[str, str]) -> str | None:
    """A network interface that a variable names and this machine does not have; None if there is none such."""
    known = [name for _, name in socket.if_nameindex()]
    for variable in _INTERFACES:
        wanted = environment.get(variable, "")
        if not wanted or wanted.startswith("^"):
            continue
        for name in wanted.removeprefix("=").split(","):
            if not any(each.startswith(name) for each in known):
                return f"{variable} {wanted}: this machine has {', '.join(known)}, got {name}; name one of them"
    return None


def slurm_faults(environment: Mapping[str, str], *, nodes: int, devices: int) -> list[str]:
    """Slurm's variables that contradict nodes x devices, each with the way out; empty outside a job."""
    if "SLURM_JOB_ID" not in environment:
        return []
    expected = {
        "SLURM_NNODES": (nodes, "--nodes"),
        "SLURM_NTASKS_PER_NODE": (devices, "--ntasks-per-node"),
        "SLURM_GPUS_ON_NODE": (devices, "--gpus-per-node"),
        "SLURM_NTASKS": (nodes * devices, "--ntasks-per-node and --nodes"),
    }
    faults = [
        f"{name}: the run is for {nodes} nodes x {devices} devices, so {wanted} is needed, got {environment[name]}; "
        f"change {flag} of sbatch, or nodes and devices here"
        for name, (wanted, flag) in expected.items()
        if name in environment and environment[name] != str(wanted)
    ]
    if "SLURM_NTASKS_PER_NODE" not in environment and environment.get("SLURM_NTASKS", "1") != "1":
        faults.append(
            "SLURM_NTASKS_PER_NODE: Lightning counts the devices of a node by it, got none; give sbatch "
            f"--ntasks-per-node={devices}"
        )
    return faults


def free_bytes(folder: Path) -> tuple[Path, int]:
    """The nearest folder that exists, this one or one above it, and the bytes free on its file system."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing, shutil.disk_usage(existing).free


def is_writable(folder: Path) -> bool:
    """Whether this process may write there."""
    return os.access(folder, os.W_OK | os.X_OK)


def _is_here(family: int, address: str | int) -> bool:
    """Whether an address is one of this machine's."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        number: int = probe.getsockname()[1]
        return number
