"""Decoding flags, one for each field of ``DecodingConfig``. Used by every command that generates images.

They are read and checked before torch is imported.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from maskgit_pl.checks import check_seed
from maskgit_pl.cli.flags import add_device_argument, add_dtype_argument, check_at_least, format_flag, use_flag_names
from maskgit_pl.cli.negative_flags import add_negative_model_argument, check_negative_model_flag
from maskgit_pl.decoding.config import DecodingConfig
from maskgit_pl.runs.flag_values import parse_json_spec, parse_list

if TYPE_CHECKING:
    from maskgit_pl.pipeline.outline import Outline

__all__ = ["add_decoding_arguments", "check_seed_and_batch", "read_decoding_flags"]

_HELP = {
    "num_steps": "number of decoding steps T",
    "token_selector": 'token selector: a name such as halton, or \'{"name": "remdm", "eta": 0.1}\'',
    "guidance": 'guidance schedule: a name such as cosine, or \'{"name": "linear", "scale": 2}\'',
    "sampling_temperature": "softmax temperature of the codes; A,B goes from A at the first step to B at the last",
    "top_k": "sample from the N most likely codes only",
    "top_p": "sample from the most likely codes with a total probability of X only",
    "tokens_per_step": "number of tokens decided at each step, in place of the mask schedule",
    "mask_schedule": "mask schedule: a name such as cosine (default: that of the training)",
    "draw_method": "how codes are drawn: gumbel (nearly the same images in all precisions) or inverse_cdf",
    "guidance_scale": "scale of the guidance schedule, at least 0; 0 switches guidance off",
    "choice_temperature": "scale of the Gumbel noise on the confidence; 0 keeps the most confident tokens",
}
_PLUG_IN_ARGUMENTS = ("guidance_scale", "choice_temperature")  # settings that replace one argument of a plug-in


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--seed``, ``--batch-size``, ``--device``, and a flag for each field of ``DecodingConfig``."""
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the first image; image i has seed + i (default: 0)"
    )
    parser.add_argument("--batch-size", type=int, default=100, metavar="N", help="images per batch (default: 100)")
    add_device_argument(parser)
    group = parser.add_argument_group("decoding", "Defaults are the model's own settings.")
    for name, hint in _types().items():
        member, metavar = _member(hint)
        kind = member if member in (int, float) else str
        group.add_argument(format_flag(name), type=kind, metavar=metavar, help=_HELP[name])
    arithmetic = group.add_mutually_exclusive_group()
    add_dtype_argument(arithmetic, of="both networks")
    arithmetic.add_argument(
        "--int8", action="store_true", help="8-bit linear layers in the transformer; approximate, and only on a CPU"
    )
    group.add_argument(
        "--decoding",
        type=Path,
        metavar="FILE.json",
        help="read all settings from a decoding.json; other flags override it",
    )
    add_negative_model_argument(group)


def check_seed_and_batch(args: argparse.Namespace) -> None:
    """Checks ``--seed`` and ``--batch-size``, which do not depend on the model."""
    check_seed("--seed", args.seed)
    check_at_least(args, batch_size=1)


def read_decoding_flags(
    args: argparse.Namespace, outline: Outline, *, has_negative_class: bool = False
) -> DecodingConfig:
    """Reads the decoding settings from the flags of ``add_decoding_arguments``, and checks them without torch.

    Args:
        args: Flags of ``add_decoding_arguments``.
        outline: Sizes, classes and default settings of the model.
        has_negative_class: True if ``--negative-class`` is given.
    """
    settings = {name: _value(name, getattr(args, name), hint) for name, hint in _types().items()}
    given, names_negative_model = _read_file(args.decoding) or (None, outline.has_negative_model)
    has_negative = has_negative_class or outline.null_label is not None
    has_negative = has_negative or args.negative_model is not None or names_negative_model
    with use_flag_names(args):
        decoding = outline.decoding_with(**settings, decoding=given)
        outline.check_decoding(decoding, has_negative_class=has_negative)
    check_negative_model_flag(args)
    return decoding


def _types() -> dict[str, Any]:
    """Returns the annotation of each setting by its name."""
    return {**get_type_hints(DecodingConfig), **dict.fromkeys(_PLUG_IN_ARGUMENTS, float)}


def _member(hint: Any) -> tuple[Any, str]:
    """Returns the member of a union by which a flag is parsed, and the placeholder for the help."""
    if get_origin(hint) is Literal:
        return str, "NAME"
    members = get_args(hint) or (hint,)
    origins = {get_origin(member) or member: member for member in members}
    # In the order of generality: str | dict is a spec, float | tuple is a list, the rest are numbers.
    for kind, metavar in ((dict, "NAME"), (tuple, "A,B,..."), (int, "N"), (float, "X")):
        if kind in origins:
            return origins[kind], metavar
    raise TypeError(f"no flag can be read as {hint}")


def _value(name: str, given: Any, hint: Any) -> Any:
    """Returns the parsed value of a flag. argparse leaves lists and specs as text."""
    member, _ = _member(hint)
    if given is None or member in (int, float, str):
        return given
    if get_origin(member) is dict:
        return parse_json_spec(format_flag(name), given)
    # A single temperature is a number, two are a pair (first step, last step).
    numbers = parse_list(format_flag(name), given, get_args(member)[0])
    return numbers[0] if len(numbers) == 1 and float in get_args(hint) else numbers


def _read_file(file: Path | None) -> tuple[DecodingConfig, bool] | None:
    """Returns the settings of a file, and True if it names a negative model; None without a file."""
    if file is None:
        return None
    if not file.is_file():
        raise FileNotFoundError(f"--decoding {file}: no such file; `maskgit tune` writes RUN/pretrained/decoding.json")
    from maskgit_pl.decoding.settings_file import read_settings_file

    decoding, content = read_settings_file(file)
    return decoding, content.get("negative_model") is not None
