"""Decoding configurations in measurements: other numbers of steps, the ledger key, and a description in words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from typing import Any

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.registry import describe

__all__ = ["PLOT_STEPS", "Spec", "choose_plot_steps", "decoding_key", "describe_decoding", "with_steps"]

PLOT_STEPS = (2, 3, 4, 6, 8, 12, 16, 24)  # values of T in the curves of mask schedules
Spec = str | dict[str, Any]  # name, or mapping with arguments, of a selector or schedule


def with_steps(decoding: DecodingConfig, num_steps: int) -> DecodingConfig:
    """Returns the decoding with another number of steps, and without ``tokens_per_step``, whose length is T."""
    return replace(decoding, num_steps=num_steps, tokens_per_step=None)


def choose_plot_steps(num_tokens: int, steps: Iterable[int] = PLOT_STEPS) -> tuple[int, ...]:
    """Returns the sorted, distinct numbers of steps that are at most half the number of tokens.

    With more steps, a step decides fewer than two tokens on average.

    Args:
        num_tokens: N.
        steps: Numbers of steps to choose from.

    Raises:
        ValueError: if no number of steps is left.
    """
    most = max(2, num_tokens // 2)  # at least 2, even for 2 or 3 tokens
    wanted = tuple(sorted({number for number in steps if number <= most}))
    if not wanted:
        raise ValueError(f"num_steps must be <= {most}, half the number of tokens, got only {list(steps)}")
    return wanted


def decoding_key(decoding: DecodingConfig) -> dict[str, Any]:
    """Returns the ledger key of a decoding: token selector, guidance, and all fields that differ from their default.

    Rows remain valid when a field is added.
    """
    usual = {field.name: field.default for field in fields(DecodingConfig)}
    given = {name: value for name, value in asdict(decoding).items() if value != usual[name]}
    named = {"token_selector": decoding.token_selector, "guidance": decoding.guidance}
    changed: dict[str, Any] = json.loads(json.dumps({**named, **given}, sort_keys=True))
    return changed


def describe_decoding(decoding: DecodingConfig, *, steps: bool = True) -> str:
    """Returns a decoding in one line, without fields that have their default.

    Args:
        decoding: The decoding.
        steps: True to begin with the number of steps.
    """
    temperature = decoding.sampling_temperature
    parts = [f"T {decoding.num_steps}"] if steps else []
    parts += [describe(decoding.token_selector), f"guidance {describe(decoding.guidance)}"]
    shown = f"{temperature[0]:g} to {temperature[1]:g}" if isinstance(temperature, tuple) else f"{temperature:g}"
    parts += [f"temperature {shown}"] if temperature != 1 else []
    for name in ("top_k", "top_p", "tokens_per_step", "mask_schedule"):
        value = getattr(decoding, name)
        parts += [] if value is None else [f"{name} {describe(value) if isinstance(value, str | dict) else value}"]
    return ", ".join(parts)
