"""Counter-based random numbers: a function of where they are used, without a state.

Used for every random choice of the framework: order of the data, mask ratios, masks, class dropout,
augmentation and decoding noise are ``f(stream, seed, index, epoch)``. Nothing is stored, so a resumed run
sees the same numbers, and so does a run with another number of ranks or workers. The generator is
Philox4x32-10 in int64 tensor operations, bit-exact on every device.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (the Random123 library).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF  # mask of the low 32 bits
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # PHILOX_M4x32_0 and _1 of Random123
_WEYL = (0x9E3779B9, 0xBB67AE85)  # PHILOX_W32_0 and _1: golden ratio and sqrt(3) - 1
_ROUNDS = 10  # as Random123 recommends
_FEISTEL_ROUNDS = 6
_MIX = (0x7FEB352D, 0x846CA68B - 2**32)  # multipliers of the hash lowbias32, as int32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], keys: Sequence[tuple[int, int]]) -> Tensor:
    """Computes Philox4x32-10: four 32-bit words from a 128-bit counter, under several 64-bit keys.

    One of the 10 rounds maps the words to (high(m1 c2) ^ c1 ^ k0, low(m1 c2), high(m0 c0) ^ c3 ^ k1, low(m0
    c0)), with high and low the halves of the 64-bit product; the keys then grow by a Weyl constant.

    Few asynchronous kernels compute all keys. Both multiplications of a round run as one kernel on the stacked pair
    (c0, c2):

    1. Stack the words as the pairs even = (c0, c2) and odd = (c3, c1).
    2. Compute a round. The new c0 comes from the old c2 and the new c2 from the old c0, so its pairs are in
       swapped order: (c2, c0) and (c1, c3).
    3. Compute the next round on the swapped pairs, with swapped constants. This restores the order.

    The constants lie in three rows (a, b, a): rounds of step 2 read the first two rows, those of step 3 the last two.

    Args:
        counter: Four int64 tensors of one shape, values in [0, 2**32).
        keys: Two integers in [0, 2**32) each.

    Returns:
        (keys, ..., 4) int64 in [0, 2**32).
    """
    # 1.
    c0, c1, c2, c3 = counter
    shape, ones = (2, len(keys), *c0.shape), (1,) * (c0.ndim + 1)
    even, odd = (torch.stack(pair).unsqueeze(1).expand(shape) for pair in ((c0, c2), (c3, c1)))
    multipliers = torch.full((3, *ones), _MULTIPLIERS[0], device=c0.device)
    multipliers[1].fill_(_MULTIPLIERS[1])
    forward, backward = (rows.expand(2, 2, *ones) for rows in (multipliers[:2], multipliers[1:]))  # (m0, m1), (m1, m0)
    round_keys = _round_keys(keys, c0.device).view(_ROUNDS, 3, len(keys), *ones[1:])
    for forward_key, backward_key in zip(round_keys[::2, :2], round_keys[1::2, 1:], strict=True):
        even, odd = _philox_round(even, odd, forward, forward_key)  # 2.
        even, odd = _philox_round(even, odd, backward, backward_key)  # 3.
    return torch.stack([even[0], odd[1], even[1], odd[0]], dim=-1) & _WORD


def _philox_round(even: Tensor, odd: Tensor, multipliers: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Computes one round of a pair of words, (2, keys, ...) each, and returns the pairs in swapped order."""
    # The products are written twice, (p, q, p, q): the swapped pair (q, p) then is a view of the middle, not a copy.
    products = even * multipliers  # (2 copies, 2, keys, ...): int64, modulo 2**64
    # The shift of a signed number copies the sign bit; the mask removes the copies.
    even = (products[0] >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(_WORD)
    return even, products.flatten(0, 1)[1:3]  # the low halves; the high bits are masked where they are used


def _round_keys(keys: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Returns the keys of all rounds, (rounds, 3 keys) int64: the second, the first and again the second words.

    They are computed on the device: a copy from the host would wait.
    """
    rows = [
        torch.arange(key[word], key[word] + _ROUNDS * _WEYL[word], _WEYL[word], device=device)
        for word in (1, 0, 1)
        for key in keys
    ]
    return torch.stack(rows, dim=1) & _WORD


@cache
def stream_key(stream: str) -> tuple[int, int]:
    """Returns the Philox key of a stream, two 32-bit words: the first 64 bits of the BLAKE2b hash of its name."""
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
    """Returns ``count`` random words for each (seed, index, epoch) of one or several streams.

    Seed, index and epoch broadcast to the shape of the rows: seeds (B, 1) and epochs (T,) give (B, T, count). Plain
    integers give one row. One call for many rows and streams launches as many kernels as a call for a single row.

    Args:
        stream: Name of the purpose, such as ``"mask"``. Different names give independent numbers. A list of
            names adds a first dimension.
        seed: Integer or int64 tensor in [0, 2**32).
        index: Integer or int64 tensor in [0, 2**32), usually the global sample index.
        epoch: Integer or int64 tensor in [0, 2**32): an epoch or a step.
        count: Number of words per row.

    Returns:
        (B, count) int64 in [0, 2**32), on the device of the given tensors; (streams, B, count) for a list of names.
    """
    parts = {"index": index, "epoch": epoch, "seed": seed}
    devices = [part.device for part in parts.values() if isinstance(part, Tensor)]
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    columns = [_as_column(name, value, device) for name, value in parts.items()]
    # The counter is (block, index, epoch, seed) and the key is the stream. Each block gives four words.
    block = torch.arange(-(-count // 4), device=device)
    # (..., blocks) each. torch.broadcast_shapes would import sympy.
    counter = torch.broadcast_tensors(block, *columns)  # type: ignore[no-untyped-call]  # torch: untyped
    names = [stream] if isinstance(stream, str) else stream
    words = philox(tuple(counter), [stream_key(name) for name in names])
    bits = words.flatten(-2)[..., :count]  # (streams, ..., blocks, 4) -> (streams, ..., count)
    return bits[0] if isinstance(stream, str) else bits


def _as_column(name: str, value: int | Tensor, device: torch.device) -> Tensor:
    """Returns a value as an int64 tensor with a last dimension of size 1, which broadcasts against the blocks."""
    if isinstance(value, Tensor):
        return value.to(device, torch.int64).reshape(*value.shape or (1,), 1)
    if not 0 <= value <= _WORD:  # NumPy integers are accepted
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
    """Returns uniform numbers in (0, 1), whose logarithms are finite; see ``random_bits`` for arguments and shape.

    Returns:
        (B, count) float32 in [2**-24, 1 - 2**-24].
    """
    return uniform_of(random_bits(stream, seed=seed, index=index, epoch=epoch, count=count))


def uniform_of(bits: Tensor) -> Tensor:
    """Converts words, int64 in [0, 2**32), to uniform numbers, float32 in [2**-24, 1 - 2**-24]."""
    # float32 has 24 bits of precision, so the conversion is exact and never rounds up to 1.
    return (bits >> 8).clamp(min=1).to(torch.float32) * 2.0**-24


def gumbel(uniform: Tensor) -> Tensor:
    """Computes standard Gumbel noise, -log(-log(u)); finite for the numbers of ``random_uniform``."""
    return -torch.log(-torch.log(uniform))


def gumbel_rows(first: Tensor, second: Tensor, size: int) -> Tensor:
    """Computes ``size`` standard Gumbel numbers for each pair of random words, with a few operations for each number.

    Philox gives the two words of a row, and a hash expands them (SplitMix with 32 bits): number k is the hash
    of ``first + k * golden ratio``, with ``second`` added to the bits in its middle. Uniform numbers have a
    resolution of 2**-31 near 0, where the largest Gumbel numbers come from.

    Args:
        first: int64 of any shape, in [0, 2**32): see ``random_bits``.
        second: The same for the second word.
        size: Numbers per row, >= 1.

    Returns:
        (..., size) float32 in [-2.9, 22.2].

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    # int32 wraps modulo 2**32, and needs half of the memory of int64.
    counter = (torch.arange(size, device=first.device) * _WEYL[0] & _WORD).to(torch.int32)
    word = first.to(torch.int32).unsqueeze(-1) + counter
    word ^= (word >> 16).bitwise_and_(0xFFFF)
    word *= _MIX[0]
    word ^= (word >> 15).bitwise_and_(0x1FFFF)
    word ^= second.to(torch.int32).unsqueeze(-1)
    word *= _MIX[1]
    word ^= (word >> 16).bitwise_and_(0xFFFF)
    uniform = word.bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()  # -log(-log(1 - u))


def permutation(positions: Tensor, size: int, *, stream: str, seed: int, index: int = 0, epoch: int = 0) -> Tensor:
    """Computes a pseudo-random permutation of range(size) at some positions.

    Memory and time grow with the number of positions, not with ``size``:

    1. A Feistel network is a bijection of the numbers of 2 h bits, with 4^h >= size.
    2. Values outside of range(size) pass through the network again until all are inside (cycle walking). This
       is a bijection of range(size).

    Args:
        positions: int64 of any shape, in [0, size).
        size: Length of the permuted range, in [1, 2**32].
        stream: Name of the stream; see ``random_bits``.
        seed: Seed in [0, 2**32).
        index: Integer in [0, 2**32); different values give different permutations.
        epoch: The same.

    Returns:
        int64 in [0, size), in the shape of ``positions``.
    """
    # 1. h is half the number of bits of size - 1, rounded up, so at most 3 of 4 values are out of range.
    half = max(1, (max(2, size) - 1).bit_length() + 1 >> 1)
    words = random_bits(f"{stream}/permutation", seed=seed, index=index, epoch=epoch, count=_FEISTEL_ROUNDS)
    keys = words[0].tolist()
    value = _feistel(positions, half, keys)
    # 2. Only the values that are still outside are computed again.
    while bool((outside := value >= size).any()):
        value = value.masked_scatter(outside, _feistel(value[outside], half, keys))
    return value


def _feistel(value: Tensor, half: int, keys: Sequence[int]) -> Tensor:
    """Applies a Feistel network, a bijection of [0, 4**half), to int64 values, with a round for each key."""
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(word: Tensor) -> Tensor:
    """Applies a hash, a bijection of 32-bit words: each input bit flips each output bit with probability about 1/2.

    Source: C. Wellons, hash prospector, "lowbias32".
    """
    word = ((word >> 16) ^ word) * _MIX[0] & _WORD
    word = ((word >> 15) ^ word) * _MIX[1] & _WORD
    return (word >> 16) ^ word
