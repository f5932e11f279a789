"""Random numbers as a function of where they are used, not of what was drawn before.

Every random choice of the framework (order of the data, mask ratios, masks, class dropout, augmentation, decoding
noise) is ``f(stream, seed, index, epoch)``. Nothing is stored, so a run that resumes, or goes on with other ranks and
workers, sees the same numbers. The generator is Philox4x32-10 in int64 tensor operations: bit-equal on every device.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (the Random123 library).
"""

from __future__ import annotations

import hashlib
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
    """Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.

    Args:
        counter: Four int64 tensors of one shape, values in [0, 2**32).
        key: Two integers in [0, 2**32).

    Returns:
        Four int64 tensors of that shape, values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # the low 64 bits; the sign bit is masked away below
        high0, high1 = (p0 >> 32) & _WORD, (p1 >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & _WORD, high0 ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


@cache
def stream_key(stream: str) -> tuple[int, int]:
    """The Philox key of a stream: the first 64 bits of the BLAKE2b hash of its name."""
    digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def random_bits(
    stream: str, *, seed: int | Tensor, index: int | Tensor, epoch: int | Tensor = 0, count: int = 1
) -> Tensor:
    """``count`` random words for each (seed, index, epoch) of a stream.

    Args:
        stream: Name of what the numbers are for, e.g. ``"mask"``; other names give independent numbers.
        seed: Integer or (B,) int64, in [0, 2**32).
        index: Integer or (B,) int64, in [0, 2**32); usually the global sample index.
        epoch: Integer or (B,) int64, in [0, 2**32); an epoch, or a step.
        count: Words for each row.

    Returns:
        (B, count) int64, in [0, 2**32), on the device of the tensors given.

    Raises:
        ValueError: A plain integer is out of range.
    """
    blocks = -(-count // 4)
    parts = [_as_column(name, value) for name, value in (("index", index), ("epoch", epoch), ("seed", seed))]
    device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
    block = torch.arange(blocks, device=device).unsqueeze(0)  # (1, blocks)
    rows = max(len(part) for part in parts)
    index_, epoch_, seed_ = (part.to(device).expand(rows, blocks) for part in parts)
    words = philox((block.expand(rows, blocks), index_, epoch_, seed_), stream_key(stream))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]  # (B, blocks, 4) -> (B, count)


def _as_column(name: str, value: int | Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(torch.int64).reshape(-1, 1)
    if not 0 <= value <= _WORD:
        raise ValueError(f"{name}: an integer in [0, 2**32) is needed, got {value}")
    return torch.tensor([[value]])


def random_uniform(
    stream: str, *, seed: int | Tensor, index: int | Tensor, epoch: int | Tensor = 0, count: int = 1
) -> Tensor:
    """Uniform numbers with 24 bits, never 0 and never 1, so that their logarithms are finite.

    Args and shape as ``random_bits``.

    Returns:
        (B, count) float32, in [2**-24, 1 - 2**-24].
    """
    bits = random_bits(stream, seed=seed, index=index, epoch=epoch, count=count)
    return (bits >> 8).clamp(min=1).to(torch.float32) * 2.0**-24


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise, -log(-log(u)), float32; finite for the numbers of ``random_uniform``."""
    return -torch.log(-torch.log(uniform))


def permutation(
    positions: Tensor, size: int, *, stream: str, seed: int, index: int = 0, epoch: int | Tensor = 0
) -> Tensor:
    """Where a pseudo-random bijection of range(size) sends some positions, without holding the others.

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
    """One pass of the network: (M,) int64 in [0, 4**half), keys (M, rounds) -> that range; bijective for equal keys."""
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys.unbind(1):
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit moves every output bit about half of the time.

    Source: C. Wellons, hash prospector, "lowbias32".
    """
    word = ((word >> 16) ^ word) * 0x7FEB352D & _WORD
    word = ((word >> 15) ^ word) * 0x846CA68B & _WORD
    return (word >> 16) ^ word
