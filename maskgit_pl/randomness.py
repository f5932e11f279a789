"""Random numbers as a function of where they are used, not of what was drawn before.

Every random choice of the framework (order of the data, mask ratios, masks, class dropout, augmentation, decoding
noise) is ``f(stream, seed, index, epoch)``. Nothing is stored, so a run that resumes, or goes on with other ranks and
workers, sees the same numbers. The generator is Philox4x32-10 in int64 tensor operations: bit-equal on every device.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (the Random123 library).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["gumbel", "permutation", "philox", "random_bits", "random_uniform", "stream_key"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_FEISTEL_ROUNDS = 6


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.

    Args:
        counter: Four int64 tensors of one shape, values in [0, 2**32).
        key: Two integers in [0, 2**32).

    Returns:
        Four int64 tensors of that shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = _philox(counter, [key])[0].unbind(-1)
    return c0, c1, c2, c3


def _philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], keys: Sequence[tuple[int, int]]) -> Tensor:
    """Computes ``philox`` of one counter under several keys, (keys, ..., 4), in few kernels that do not wait.

    c0 goes into the next c2 and c2 into the next c0, so a round leaves its pairs in the other order: rounds begin in
    turn from (c0, c2), (c3, c1) and from (c2, c0), (c1, c3). Constants lie in three rows (a, b, a), of which the former
    read the first two and the latter the last two.
    """
    c0, c1, c2, c3 = counter
    shape, ones = (2, len(keys), *c0.shape), (1,) * (c0.ndim + 1)
    even, odd = (torch.stack(pair).unsqueeze(1).expand(shape) for pair in ((c0, c2), (c3, c1)))
    multipliers = torch.full((3, *ones), _MULTIPLIERS[0], device=c0.device)
    multipliers[1].fill_(_MULTIPLIERS[1])
    forward, backward = (rows.expand(2, 2, *ones) for rows in (multipliers[:2], multipliers[1:]))
    round_keys = _round_keys(keys, c0.device).view(_ROUNDS, 3, len(keys), *ones[1:])
    for forward_key, backward_key in zip(round_keys[::2, :2], round_keys[1::2, 1:], strict=True):
        even, odd = _philox_round(even, odd, forward, forward_key)
        even, odd = _philox_round(even, odd, backward, backward_key)
    return torch.stack([even[0], odd[1], even[1], odd[0]], dim=-1) & _WORD


def _philox_round(even: Tensor, odd: Tensor, multipliers: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Computes both multiplications at once, written twice (p, q), (p, q), so that (q, p) is a view."""
    products = even * multipliers  # (2 copies, 2, keys, ...), modulo 2**64, signed
    even = (products[0] >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(_WORD)
    return even, products.flatten(0, 1)[1:3]  # whose upper halves are masked away where they are used


def _round_keys(keys: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Makes (rounds, 3 keys) int64 on the device: second, first, again second word of all keys."""
    rows = [
        torch.arange(key[word], key[word] + _ROUNDS * _WEYL[word], _WEYL[word], device=device)
        for word in (1, 0, 1)
        for key in keys
    ]
    return torch.stack(rows, dim=1) & _WORD


@cache
def stream_key(stream: str) -> tuple[int, int]:
    """Returns the Philox key of a stream: the first 64 bits of the BLAKE2b hash of its name."""
    digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def random_bits(
    stream: str | Sequence[str],
    *,
    seed: int | Tensor,
    index: int | Tensor,
    epoch: int | Tensor = 0,
    count: int = 1,
) -> Tensor:
    """Returns ``count`` random words for each (seed, index, epoch) of a stream, or of several streams at once.

    Rows are the shape to which seed, index and epoch broadcast, (1,) for plain integers: seeds (B, 1) and epochs (T,)
    give (B, T, count). One call for many rows and streams costs as many kernels as one for a single row.

    Args:
        stream: Name of what the numbers are for, e.g. ``"mask"``; other names give independent numbers. Several names
            give what each gives alone, one after the other in a dimension of their own, the first.
        seed: Integer or int64 tensor, in [0, 2**32).
        index: Integer or int64 tensor, in [0, 2**32); usually the global sample index.
        epoch: Integer or int64 tensor, in [0, 2**32); an epoch, or a step.
        count: Words for each row.

    Returns:
        (B, count) int64, in [0, 2**32), on the device of the tensors given; (streams, B, count) for several names.

    Raises:
        ValueError: if a plain integer is out of range.
    """
    parts = {"index": index, "epoch": epoch, "seed": seed}
    devices = [part.device for part in parts.values() if isinstance(part, Tensor)]
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    columns = [_as_column(name, value, device) for name, value in parts.items()]
    block = torch.arange(-(-count // 4), device=device)
    shape = torch.broadcast_shapes(  # type: ignore[no-untyped-call]  # torch: untyped
        *(column.shape for column in columns), block.shape
    )
    index_, epoch_, seed_, block = (part.expand(shape) for part in (*columns, block))  # (..., blocks)
    several = not isinstance(stream, str)
    names = stream if several else [stream]
    words = _philox((block, index_, epoch_, seed_), [stream_key(name) for name in names])
    bits = words.flatten(-2)[..., :count]  # (streams, ..., blocks, 4) -> (streams, ..., count)
    return bits if several else bits[0]


def _as_column(name: str, value: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(device, torch.int64).reshape(*value.shape or (1,), 1)
    if not 0 <= value <= _WORD:  # a NumPy integer may be given
        raise ValueError(f"{name} must be an integer in [0, 2**32), got {value}")
    return torch.full((1, 1), value, device=device)


def random_uniform(
    stream: str | Sequence[str],
    *,
    seed: int | Tensor,
    index: int | Tensor,
    epoch: int | Tensor = 0,
    count: int = 1,
) -> Tensor:
    """Returns uniform numbers with 24 bits, never 0 and never 1, so that their logarithms are finite.

    Args and shape as ``random_bits``.

    Returns:
        (B, count) float32, in [2**-24, 1 - 2**-24].
    """
    bits = random_bits(stream, seed=seed, index=index, epoch=epoch, count=count)
    return (bits >> 8).clamp(min=1).to(torch.float32) * 2.0**-24


def gumbel(uniform: Tensor) -> Tensor:
    """Returns standard Gumbel noise, -log(-log(u)), float32; finite for the numbers of ``random_uniform``."""
    return -torch.log(-torch.log(uniform))


def permutation(
    positions: Tensor, size: int, *, stream: str, seed: int, index: int = 0, epoch: int | Tensor = 0
) -> Tensor:
    """Computes where a pseudo-random bijection of range(size) sends some positions, without holding the others.

    A Feistel network over the next even number of bits, walked until the value falls into range (cycle walking): memory
    and time grow with the positions asked for, not with ``size``.

    Args:
        positions: Any shape, int64, in [0, size).
        size: Length of the permuted range, in [1, 2**32].
        stream: Name of the stream, as in ``random_bits``.
        seed: In [0, 2**32).
        index: In [0, 2**32); others give other permutations.
        epoch: Integer, or int64 in the shape of ``positions``: other epochs give other permutations.

    Returns:
        int64 in [0, size), in the shape of ``positions``.
    """
    half = max(1, (max(2, size) - 1).bit_length() + 1 >> 1)
    epochs = torch.as_tensor(epoch, device=positions.device).reshape(-1)  # one, or one a position
    keys = random_bits(f"{stream}/permutation", seed=seed, index=index, epoch=epochs, count=_FEISTEL_ROUNDS)
    keys = keys.expand(positions.numel(), -1)
    value = _feistel(positions.reshape(-1), half, keys)
    while bool((outside := value >= size).any()):
        value = value.masked_scatter(outside, _feistel(value[outside], half, keys[outside]))
    return value.reshape(positions.shape)


def _feistel(value: Tensor, half: int, keys: Tensor) -> Tensor:
    """Makes one pass of the network: (M,) int64 in [0, 4**half), keys (M, rounds) -> same range; bijective."""
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys.unbind(1):
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(word: Tensor) -> Tensor:
    """Applies a bijection of 32-bit words in which every input bit moves every output bit about half of the time.

    Source: C. Wellons, hash prospector, "lowbias32".
    """
    word = ((word >> 16) ^ word) * 0x7FEB352D & _WORD
    word = ((word >> 15) ^ word) * 0x846CA68B & _WORD
    return (word >> 16) ^ word
