"""The devices of this machine, and the record of machine and versions that is saved with results."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from maskgit_pl.text import did_you_mean, shorten

_CPUINFO = Path("/proc/cpuinfo")


def device_names() -> list[str]:
    """Returns the device names of this machine: ``cpu``, and the accelerator and each of its devices if there is one.

    An accelerator is ``cuda``, ``mps``, ``xpu`` or another that torch was built for.
    """
    # torch 2.6 raises if it is asked for an accelerator that is not there.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ["cpu"]
    # For example cpu, cuda, cuda:0, cuda:1.
    kind = accelerator.type
    return ["cpu", kind, *(f"{kind}:{number}" for number in range(torch.accelerator.device_count()))]


def check_device(device: torch.device | str, *, name: str = "device") -> torch.device:
    """Returns a device such as ``cpu``, ``cuda`` or ``cuda:1``; ``name`` is that of the setting in the error."""
    names, requested = device_names(), str(device)
    if requested in names:
        return torch.device(requested)
    hint = (
        "the name of a GPU is 'cuda'" if requested.startswith("gpu")
        else "a dtype is the second argument" if requested.startswith("torch.")
        else did_you_mean(requested, names)
    )  # fmt: skip
    where = f" (torch {torch.__version__} finds no GPU here)" if names == ["cpu"] else ""
    raise ValueError(f"{name} must be one of {', '.join(names)}, got {shorten(requested)}{hint and f'; {hint}'}{where}")


def default_device(*, local_rank: int | None = None) -> str:
    """Returns the accelerator that torch finds, such as ``cuda`` or ``mps``, else the CPU.

    Args:
        local_rank: Local rank of a process that shares the GPUs with others; the GPUs are assigned in turn.
    """
    names = device_names()
    if len(names) == 1:
        return "cpu"
    devices = names[2:]  # after cpu and, for example, cuda
    return names[1] if local_rank is None else devices[local_rank % len(devices)]


def find_device(device: str | None) -> str:
    """Returns the name of a device that torch can use on this machine; without a name, that of ``default_device``."""
    return default_device() if device is None else str(check_device(device))


def has_bfloat16(device: torch.device | str) -> bool:
    """Returns True if a device multiplies bfloat16 with instructions of its own, so that it is faster than float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Bfloat16 without such instructions may be slower than float32.
    if kind != "cpu" or not (_has_instructions("avx512_bf16") or has_amx()):
        return False
    # oneDNN, which uses these instructions, may be missing, or limited to others by ONEDNN_MAX_CPU_ISA.
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch: untyped
    return bool(has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies_by_onednn() -> bool:
    """Returns True if float32 products of this CPU are faster by oneDNN than by MKL, which torch takes for them.

    This is a rule and no timing: the same machine always gives the same bits. MKL uses AVX2 on CPUs of AMD. Those of
    family 26 (Zen 5) and later do twice the work an instruction with AVX-512, which oneDNN uses; up to family 25
    (Zen 4), both widths are equally fast.
    """
    facts = _cpu_facts()
    return (
        facts.get("vendor_id") == "AuthenticAMD"
        and int(facts["cpu family"]) >= 26
        and "avx512f" in facts["flags"].split()
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch: untyped
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def has_amx() -> bool:
    """Returns True if the CPU has AMX instructions for bfloat16."""
    return _has_instructions("amx_bf16")


def _has_instructions(name: str) -> bool:
    """Returns True if the CPU has some instructions; False if torch, in an older version, does not tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get(name))


def parse_dtype(name: str | None, device: torch.device | str) -> torch.dtype | None:
    """Returns the dtype of ``float32`` or ``bfloat16``; ``auto`` is bfloat16 on a device that ``has_bfloat16``.

    None is ``auto`` on a GPU, which multiplies bfloat16 many times faster; elsewhere it leaves the weights as they are.
    """
    if name is None and torch.device(device).type != "cuda":
        return None
    if name in (None, "auto"):
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def peak_memory(device: torch.device) -> int:
    """Returns the largest memory so far in bytes: of torch's tensors on an NVIDIA GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux


def device_name(device: torch.device) -> str:
    """Returns a readable name of a device: the GPU model, or the CPU model and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_name() -> str:
    """Returns the CPU and the instructions that torch uses, such as "AMD EPYC (family 25, model 1, AVX2)".

    Processors of one name may differ in speed by a factor of two.
    """
    facts = _cpu_facts()  # on Linux, the platform module often has no name of the CPU
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [f"{key.removeprefix('cpu ')} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    instructions = [each.upper() for each in ("avx512_bf16", "amx_bf16") if _has_instructions(each)]
    return f"{name} ({', '.join([*numbers, torch.backends.cpu.get_cpu_capability(), *instructions])})"


def _cpu_facts() -> dict[str, str]:
    """Returns what Linux tells of the CPU (of the last core, as of each); nothing elsewhere."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def describe_environment() -> dict[str, Any]:
    """Returns versions, commit, machine and devices as plain values."""
    return {
        "maskgit_pl": version("maskgit_pl"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def _commit() -> str | None:
    """Returns the commit of this code; None without git or outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None
