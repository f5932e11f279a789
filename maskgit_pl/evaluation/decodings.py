"""Decodings as values: in another number of steps, as JSON, in words.

Rows of measurements say by these which decoding they are of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from typing import Any

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.registry import describe

__all__ = ["PLOT_STEPS", "Spec", "choose_plot_steps", "decoding_key", "describe_decoding", "with_steps"]

PLOT_STEPS = (2, 3, 4, 6, 8, 12, 16, 24)  # T of the curves of mask schedules
Spec = str | dict[str, Any]  # of a token selector, a guidance schedule, a mask schedule


def with_steps(decoding: DecodingConfig, num_steps: int) -> DecodingConfig:
    """Returns the decoding in another number of steps, without a list of tokens per step, which is one of T numbers."""
    return replace(decoding, num_steps=num_steps, tokens_per_step=None)


def choose_plot_steps(num_tokens: int, steps: Iterable[int] = PLOT_STEPS) -> tuple[int, ...]:
    """Returns the T at most half the number of tokens, above which a step decides less than two; in order, each once.

    Raises:
        ValueError: if there is none.
    """
    most = max(2, num_tokens // 2)
    wanted = tuple(sorted({number for number in steps if number <= most}))
    if not wanted:
        raise ValueError(f"num_steps: a number of at most {most}, half of the tokens, is needed, got {list(steps)}")
    return wanted


def decoding_key(decoding: DecodingConfig) -> dict[str, Any]:
    """Returns what the ledger tells decodings apart by: token selector, guidance, and fields that are not the default.

    A field that a later version adds is then absent from the rows of both.
    """
    usual = {field.name: field.default for field in fields(DecodingConfig)}
    given = {name: value for name, value in asdict(decoding).items() if value != usual[name]}
    named = {"token_selector": decoding.token_selector, "guidance": decoding.guidance}
    changed: dict[str, Any] = json.loads(json.dumps({**named, **given}, sort_keys=True))
    return changed


def describe_decoding(decoding: DecodingConfig, *, steps: bool = True) -> str:
    """Returns a decoding in a line, without its defaults; ``steps`` False leaves T out."""
    temperature = decoding.sampling_temperature
    parts = [f"T {decoding.num_steps}"] if steps else []
    parts += [describe(decoding.token_selector), f"guidance {describe(decoding.guidance)}"]
    shown = f"{temperature[0]:g} to {temperature[1]:g}" if isinstance(temperature, tuple) else f"{temperature:g}"
    parts += [f"temperature {shown}"] if temperature != 1 else []
    for name in ("top_k", "top_p", "tokens_per_step", "mask_schedule"):
        value = getattr(decoding, name)
        parts += [] if value is None else [f"{name} {describe(value) if isinstance(value, str | dict) else value}"]
    return ", ".join(parts)
