"""Address and port of rank 0 and Slurm's variables, as read by Lightning and by the job script."""

import errno
import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from maskgit_pl.runs import host

SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm" / "train.sbatch"


@pytest.mark.parametrize(
    ("environment", "nodes", "address", "port"),
    [
        ({}, 1, "127.0.0.1", None),
        ({}, 2, None, None),
        ({"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "gpu[03-07,9],other"}, 2, "gpu03", 18456),
        ({"SLURM_JOB_ID": "7", "SLURM_NODELIST": "gpu[12]"}, 1, "gpu12", 15007),
        ({"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "a1,b2", "MASTER_PORT": "77"}, 2, "a1", 77),
        ({"MASTER_ADDR": "here", "MASTER_PORT": "29500"}, 2, "here", 29500),
    ],
)
def test_where_rank_0_listens(environment, nodes, address, port):
    assert host.main_address(environment, nodes=nodes) == address
    assert host.main_port(environment) == port


@pytest.mark.parametrize("named", [{}, {"MASTER_PORT": "29500"}])
@pytest.mark.parametrize("job", ["1", "42", "9999", "10000", "1234567", "40000", "70012"])
def test_the_script_takes_the_same_port_as_lightning_and_the_check(monkeypatch, job, named):
    variables = {"SLURM_JOB_ID": job, **named}
    (line,) = re.findall(r"^export MASTER_PORT=.*$", SCRIPT.read_text(), re.MULTILINE)
    said = subprocess.run(
        ["bash", "-euc", f"{line}\necho $MASTER_PORT"], env=variables, capture_output=True, check=True
    )
    others = {name: value for name, value in os.environ.items() if name != "MASTER_PORT"}
    monkeypatch.setattr(os, "environ", {**others, **variables})  # Lightning sets MASTER_PORT in it
    assert int(said.stdout) == host.main_port(variables) == SLURMEnvironment().main_port


def test_slurm_needs_the_tasks_of_a_node():
    job = {"SLURM_JOB_ID": "70001", "SLURM_NNODES": "2", "SLURM_NTASKS": "4"}
    (fault,) = host.slurm_faults(job, nodes=2, devices=2)
    assert "--ntasks-per-node=2" in fault
    assert host.slurm_faults({}, nodes=2, devices=2) == []


def test_a_kernel_without_ipv6_reaches_addresses_of_both_kinds(monkeypatch):
    class Socket(socket.socket):
        def __init__(self, family=socket.AF_INET, *more, **named):
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            super().__init__(family, *more, **named)

    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 1, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 1)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(socket, "socket", Socket)
        assert f"MASTER_PORT {port} must be free" in str(host.port_fault("localhost", port))
    assert host.port_fault("localhost", port) is None


@pytest.mark.parametrize(
    ("variable", "value", "fits"),
    [
        ("NCCL_SOCKET_IFNAME", "eth,ib", True),  # prefixes
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", True),
        ("NCCL_SOCKET_IFNAME", "ens", False),
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "=eth0", False),  # gloo knows neither = nor ^
        ("GLOO_SOCKET_IFNAME", "^docker0,lo", False),
    ],
)
def test_names_of_interfaces_are_read_as_the_library_reads_them(monkeypatch, variable, value, fits):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "ib0")])
    fault = host.interface_fault({variable: value})
    assert (fault is None) == fits
    assert fault is None or (variable in fault and "eth0, ib0" in fault and f"export {variable}=" in fault)
