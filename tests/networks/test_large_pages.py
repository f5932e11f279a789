"""Memory moves to large pages, with its content, where it is in use."""

import ctypes
import mmap
import platform
import sys
from pathlib import Path

import pytest
import torch

from maskgit_pl.networks import kernels
from maskgit_pl.networks.kernels import PackingLinear, _packed_dtypes, set_packing
from tests.forked import run_ranks

MB = 2**20


def large_mb() -> float:
    """Returns the MB of this process that are in large pages."""
    with open("/proc/self/smaps_rollup") as lines:
        (line,) = (line for line in lines if line.startswith("AnonHugePages"))
    return int(line.split()[1]) / 1024


def resident_mb() -> float:
    """Returns the MB of this process that are in memory."""
    with open("/proc/self/statm") as numbers:
        return int(numbers.read().split()[1]) * mmap.PAGESIZE / MB


def can_move() -> bool:
    """Returns True if this system moves memory when it is asked to (Linux 6.1), and never by itself."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if sys.platform != "linux" or not setting.exists() or "[madvise]" not in setting.read_text():
        return False
    return tuple(int(number) for number in platform.release().split(".")[:2]) >= (6, 1)


needs_large_pages = pytest.mark.skipif(
    not can_move(), reason="this system has no large pages for programs that ask for them"
)


@needs_large_pages
def test_memory_moves_with_its_content():
    filled = torch.arange(8 * MB, dtype=torch.int32)
    before = large_mb()
    kernels.move(filled.data_ptr(), filled.nbytes)
    assert large_mb() >= before + 16  # of 32: what the system cannot move stays
    assert torch.equal(filled, torch.arange(8 * MB, dtype=torch.int32))


@needs_large_pages
def test_memory_that_is_hardly_used_stays_in_small_pages():
    with mmap.mmap(-1, 64 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as region:
        region[32 * MB : 40 * MB] = b"x" * (8 * MB)
        for place in range(0, 64 * MB, MB):
            region[place] = 1
        resident, large = resident_mb(), large_mb()
        view = ctypes.c_char.from_buffer(region)
        kernels.move(ctypes.addressof(view), 64 * MB)
        del view
        assert large + 4 <= large_mb() <= large + 12
        assert resident_mb() < resident + 4


@needs_large_pages
def test_what_is_stored_later_at_the_same_addresses_has_small_pages():
    with mmap.mmap(-1, 8 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as region:
        view = ctypes.c_char.from_buffer(region)
        address = ctypes.addressof(view)
        del view
        before, values = large_mb(), b"x" * (8 * MB)
        region[:] = values
        kernels.move(address, 8 * MB)
        assert large_mb() >= before + 4
        region.madvise(mmap.MADV_DONTNEED)
        region[:] = values
        assert large_mb() <= before


def test_memory_that_is_gone_is_left_alone():
    region = mmap.mmap(-1, 8 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region[:] = b"x" * (8 * MB)
    view = ctypes.c_char.from_buffer(region)
    address = ctypes.addressof(view)
    del view
    region.close()
    kernels.move(address, 8 * MB)


@pytest.mark.parametrize("setting", [None, "always madvise [never]\n"])
def test_nothing_moves_where_large_pages_are_off(monkeypatch, tmp_path, setting):
    monkeypatch.setattr(kernels, "_SETTINGS", tmp_path)
    if setting:
        (tmp_path / "enabled").write_text(setting)
    assert not kernels.are_available.__wrapped__()


@pytest.mark.slow
@needs_large_pages
@pytest.mark.parametrize("dtype", _packed_dtypes())
@pytest.mark.parametrize(("features", "moves"), [(1024, True), (128, False)])
def test_a_packed_weight_moves_once_it_was_used_often(dtype, features, moves):
    # In a process of its own: memory that other tests have freed may have large pages already.
    run_ranks(use_often, dtype, features, moves, ranks=1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", _packed_dtypes())
def test_only_large_packed_weights_are_moved(dtype, monkeypatch):
    moved = []
    monkeypatch.setattr(kernels, "move", lambda address, num_bytes: moved.append(num_bytes))
    for features in (128, 1024):
        module = PackingLinear(features, 4 * features).to(dtype).requires_grad_(requires_grad=False)
        set_packing(module, enabled=True)
        module.uses_in_small_pages = 0
        module(torch.ones(3, features, dtype=dtype))
    assert len(moved) == 1
    assert moved[0] >= 4 * 1024**2 * dtype.itemsize


@torch.no_grad()
def use_often(rank: int, dtype: torch.dtype, features: int, moves: bool) -> None:
    module = PackingLinear(features, 4 * features).to(dtype).requires_grad_(requires_grad=False)
    set_packing(module, enabled=True)
    x = torch.randn(3, features).to(dtype)
    first, before = module(x), large_mb()
    for _ in range(31):
        module(x)
    assert large_mb() == before
    last = module(x)
    assert (large_mb() >= before + 2) == moves
    assert torch.equal(first, last)
    after = large_mb()
    module(x)
    assert large_mb() == after
