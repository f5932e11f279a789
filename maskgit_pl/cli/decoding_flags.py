"""The flags that say how to decode, one for each field of ``DecodingConfig``, shared by every command that generates.

They are read, and refused, before torch is imported.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from maskgit_pl.checks import check_seed
from maskgit_pl.cli.flags import add_device_argument, check_at_least, format_flag, use_flag_names
from maskgit_pl.decoding.config import DecodingConfig
from maskgit_pl.flag_values import parse_json_spec, parse_list
from maskgit_pl.text import argument_docs

if TYPE_CHECKING:
    from maskgit_pl.pipeline.outline import Outline

__all__ = ["add_decoding_arguments", "check_seed_and_batch", "read_decoding_flags"]

_OF_PLUG_INS = {  # settings that replace one argument of a plug-in
    "guidance_scale": "Scale of the guidance schedule, at least 0; 0 is no guidance.",
    "choice_temperature": "Scale of the Gumbel noise that the token selector adds to the confidence, at least 0.",
}


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a flag for each field of ``DecodingConfig``, and those of the seed, the batch and the device."""
    parser.add_argument("--seed", type=int, default=0, help="of the first image; image i has seed + i (default: 0)")
    parser.add_argument("--batch-size", type=int, default=100, metavar="N", help="images at a time (default: 100)")
    add_device_argument(parser)
    group = parser.add_argument_group("decoding", "what is left out is the model's own")
    docs = {**argument_docs(DecodingConfig), **_OF_PLUG_INS}
    for name, hint in _types().items():
        member, metavar = _member(hint)
        kind = member if member in (int, float) else str
        text = docs[name].replace("``", "").replace("%", "%%")
        group.add_argument(format_flag(name), type=kind, metavar=metavar, help=text)
    group.add_argument("--int8", action="store_true", help="a transformer of 8 bits, on a CPU; approximate")
    group.add_argument(
        "--decoding", type=Path, metavar="FILE.json", help="all of it, as decoding.json has it; the others change parts"
    )


def check_seed_and_batch(args: argparse.Namespace) -> None:
    """Checks the flags that do not depend on the model."""
    check_seed("--seed", args.seed)
    check_at_least(args, batch_size=1)


def read_decoding_flags(
    args: argparse.Namespace, outline: Outline, *, has_negative_class: bool = False
) -> DecodingConfig:
    """Reads how to decode from the flags of ``add_decoding_arguments``; the last check before torch is needed.

    Args:
        args: The flags.
        outline: Facts of the model.
        has_negative_class: True if negative classes are named.
    """
    settings = {name: _value(name, getattr(args, name), hint) for name, hint in _types().items()}
    with use_flag_names(args):
        decoding = outline.decoding_with(**settings, decoding=_read_file(args.decoding))
        outline.check_decoding(decoding, has_negative_class=has_negative_class or outline.null_label is not None)
    return decoding


def _types() -> dict[str, Any]:
    """Returns the type of each setting by its name."""
    return {**get_type_hints(DecodingConfig), **dict.fromkeys(_OF_PLUG_INS, float)}


def _member(hint: Any) -> tuple[Any, str]:
    """Returns the member of a union that says how a flag is read, and its placeholder: a spec, a list or a number."""
    members = get_args(hint) or (hint,)
    origins = {get_origin(member) or member: member for member in members}
    for kind, metavar in ((dict, "NAME"), (tuple, "A,B,..."), (int, "N"), (float, "X")):
        if kind in origins:
            return origins[kind], metavar
    raise TypeError(f"no flag can be read as {hint}")


def _value(name: str, given: Any, hint: Any) -> Any:
    """Returns the value of a flag; lists and specs are text."""
    member, _ = _member(hint)
    if given is None or member in (int, float):
        return given
    if get_origin(member) is dict:
        return parse_json_spec(format_flag(name), given)
    numbers = parse_list(format_flag(name), given, get_args(member)[0])
    return numbers[0] if len(numbers) == 1 and float in get_args(hint) else numbers


def _read_file(file: Path | None) -> DecodingConfig | None:
    if file is None:
        return None
    if not file.is_file():
        raise FileNotFoundError(f"--decoding {file}: no such file; `maskgit tune` writes RUN/pretrained/decoding.json")
    from maskgit_pl.decoding.recipe_file import read_recipe

    return read_recipe(file)[0]
