"""The flags that say how to decode, shared by every command that generates.

They are read, and refused, before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit_pl.cli.model import add_device_argument, check_at_least, naming_flags

if TYPE_CHECKING:
    from maskgit_pl.decoding import DecodingConfig
    from maskgit_pl.pipeline import DecodingSettings
    from maskgit_pl.pipeline.outline import Outline

__all__ = ["add_decoding_arguments", "check_settings", "decoding_settings"]

_SEEDS = 2**32


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say how to decode; what is left out is the model's own."""
    parser.add_argument("--seed", type=int, default=0, help="of the first image; image i has seed + i (default: 0)")
    parser.add_argument("--batch", type=int, default=100, metavar="N", help="images at a time (default: 100)")
    add_device_argument(parser)
    group = parser.add_argument_group("decoding", "what is left out is the model's own")
    group.add_argument("--num-steps", "--steps", type=int, metavar="T", help="decoding steps")
    group.add_argument("--guidance", type=float, metavar="S", help="guidance scale; 0 is none")
    group.add_argument("--guidance-schedule", metavar="NAME", help="how the scale goes over the steps, such as linear")
    group.add_argument("--temperature", type=float, metavar="C", help="choice temperature: chance in which are kept")
    group.add_argument(
        "--selector", metavar="NAME", help='token selector: a name, or such as \'{"name": "remdm", "eta": 0.1}\''
    )
    group.add_argument(
        "--sampling-temperature", metavar="A[,B]", help="of the codes drawn; A,B goes from the first to the last step"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest codes alone")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest codes of probability P alone")
    group.add_argument("--tokens-per-step", metavar="A,B,...", help="how many tokens each step decides")
    group.add_argument("--mask-schedule", metavar="NAME", help="in place of the one of the training")
    group.add_argument(
        "--context-cache",
        type=int,
        metavar="N",
        help="compute known tokens only every N steps; approximate above 1, saves about a tenth of the time with 4",
    )
    group.add_argument("--int8", action="store_true", help="a transformer of 8 bits, on a processor; approximate")
    group.add_argument(
        "--decoding", type=Path, metavar="FILE.json", help="all of it, as decoding.json has it; the others change parts"
    )


def decoding_settings(args: argparse.Namespace) -> DecodingSettings:
    """Reads the flags of ``add_decoding_arguments``.

    Raises:
        FileNotFoundError: No such ``--decoding`` file.
        ValueError: A number out of range, or text that is no list of numbers or no JSON.
    """
    _check_numbers(args)
    return {
        "num_steps": args.num_steps,
        "guidance_scale": args.guidance,
        "guidance": _spec("--guidance-schedule", args.guidance_schedule),
        "choice_temperature": args.temperature,
        "token_selector": _spec("--selector", args.selector),
        "sampling_temperature": _temperature(args.sampling_temperature),
        "top_k": args.top_k,
        "top_p": args.top_p,
        "tokens_per_step": _counts(args.tokens_per_step),
        "mask_schedule": _spec("--mask-schedule", args.mask_schedule),
        "context_cache": args.context_cache,
        "decoding": _decoding(args.decoding),
    }


def check_settings(
    args: argparse.Namespace, settings: DecodingSettings, outline: Outline, *, pushes_away: bool = False
) -> None:
    """Refuses a way of decoding that the model cannot follow, the last check before torch is needed.

    Args:
        args: The flags.
        settings: What ``decoding_settings`` made of them.
        outline: Of the model.
        pushes_away: Whether negative classes are named.

    Raises:
        TypeError: if a part does not take its arguments.
        ValueError: if a name is unknown, a number is out of range, or the model has no class to push away from.
    """
    with naming_flags(args):
        decoding = outline.decoding_with(**settings)
        outline.check_decoding(decoding, pushes_away=pushes_away or outline.null_label is not None)


def _check_numbers(args: argparse.Namespace) -> None:
    if not 0 <= args.seed < _SEEDS:
        raise ValueError(f"--seed: a number in [0, 2**32) is needed, got {args.seed}")
    check_at_least(args, batch=1, num_steps=1, guidance=0, temperature=0, top_k=1, context_cache=1)
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p: a number in (0, 1] is needed, got {args.top_p}")


def _spec(flag: str, text: str | None) -> str | dict[str, Any] | None:
    """A name, or a mapping in JSON."""
    if text is None or not text.lstrip().startswith(("{", "[", '"')):
        return text
    example = 'write a name, or a mapping such as \'{"name": "...", "argument": 0.1}\''
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} {text}: not JSON ({error}); {example}") from error
    if not isinstance(mapping, dict) or not isinstance(mapping.get("name"), str):
        raise ValueError(f"{flag} {text}: a mapping with a name is needed; {example}")
    return mapping


def _temperature(text: str | None) -> float | tuple[float, float] | None:
    if text is None:
        return None
    rule = "a number of at least 0, or two for the first and the last step, is needed, such as 1.2,0.7"
    values = _numbers(text, float)
    if values is None or len(values) > 2 or not all(0 <= value < math.inf for value in values):
        raise ValueError(f"--sampling-temperature {text}: {rule}")
    return values[0] if len(values) == 1 else (values[0], values[1])


def _counts(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    values = _numbers(text, int)
    if values is None or min(values) < 1:
        raise ValueError(
            f"--tokens-per-step {text}: whole numbers of at least 1, one a step, are needed, such as 1,3,12"
        )
    return tuple(int(value) for value in values)


def _numbers(text: str, kind: type[float]) -> list[float] | None:
    """The numbers of a list with commas; None where there is anything else."""
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        return None


def _decoding(file: Path | None) -> DecodingConfig | None:
    if file is None:
        return None
    if not file.is_file():
        raise FileNotFoundError(f"--decoding {file}: no such file; `maskgit tune` writes RUN/pretrained/decoding.json")
    from maskgit_pl.decoding.recipe_file import read_recipe

    return read_recipe(file)[0]
