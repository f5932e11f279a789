"""Decodings as values: in another number of steps, as JSON, compared, in words.

Rows of measurements say by these which decoding they are of; every folder beside this file uses them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.registry import describe

__all__ = ["Spec", "as_key", "describe_decoding", "plain", "same_decoding", "with_steps"]

Spec = str | dict[str, Any]  # of a token selector, a guidance schedule, a mask schedule


def with_steps(decoding: DecodingConfig, num_steps: int) -> DecodingConfig:
    """The same decoding in another number of steps, without a list of tokens per step, which is one of T numbers."""
    return replace(decoding, num_steps=num_steps, tokens_per_step=None)


def plain(decoding: DecodingConfig) -> dict[str, Any]:
    """A decoding as JSON gives it back, so that two can be compared."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(decoding)))
    return values


def same_decoding(values: Mapping[str, Any], decoding: DecodingConfig) -> bool:
    """Whether plain values, which an older version may have written without newer fields, say that decoding."""
    try:
        return plain(DecodingConfig(**values)) == plain(decoding)
    except (TypeError, ValueError):  # fields or values that are no more
        return False


def as_key(decoding: DecodingConfig) -> str:
    """What decides a decoding, as JSON without what is as usual: the cell by which the results tell decodings apart."""
    usual = {field.name: field.default for field in fields(DecodingConfig)}
    given = {name: value for name, value in asdict(decoding).items() if value != usual[name]}
    return json.dumps(
        {"token_selector": decoding.token_selector, "guidance": decoding.guidance, **given}, sort_keys=True
    )


def describe_decoding(decoding: DecodingConfig, *, steps: bool = True) -> str:
    """A decoding in a line, without what is as usual; ``steps`` False leaves T out."""
    temperature = decoding.sampling_temperature
    annealed = isinstance(temperature, tuple)
    parts = [f"T {decoding.num_steps}"] if steps else []
    parts += [describe(decoding.token_selector), f"guidance {describe(decoding.guidance)}"]
    shown = f"{temperature[0]:g} to {temperature[1]:g}" if isinstance(temperature, tuple) else f"{temperature:g}"
    parts += [f"temperature {shown}"] if annealed or temperature != 1 else []
    for name in ("top_k", "top_p", "tokens_per_step", "mask_schedule"):
        value = getattr(decoding, name)
        parts += [] if value is None else [f"{name} {describe(value) if isinstance(value, str | dict) else value}"]
    return ", ".join(parts)
