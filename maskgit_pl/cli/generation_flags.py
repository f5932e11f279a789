"""Flags of the commands that generate images: the model, its decoding, and the options of ``sample`` and of editing.

Flags are read and checked before torch is imported. Each field of ``DecodingConfig`` has a flag.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from maskgit_pl.checks import check_integer, check_number, check_seed
from maskgit_pl.cli.flags import (
    add_device_argument,
    add_dtype_argument,
    add_negative_model_argument,
    check_at_least,
    check_negative_model_flag,
    format_flag,
    read_device_flag,
    use_flag_names,
)
from maskgit_pl.decoding.config import DecodingConfig, read_settings_file
from maskgit_pl.runs.flag_values import parse_json_spec, parse_list

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from maskgit_pl.pipeline import MaskGIT
    from maskgit_pl.pipeline.acceptance import Acceptance, AcceptedSeeds
    from maskgit_pl.pipeline.outline import Outline

__all__ = [
    "add_acceptance_arguments",
    "add_classes_argument",
    "add_decoding_arguments",
    "add_model_argument",
    "add_overlap_argument",
    "add_variant_arguments",
    "add_vectors_argument",
    "check_acceptance_flags",
    "check_overlap_flag",
    "check_seed_and_batch",
    "check_variant_flags",
    "choose_accepted",
    "describe_acceptance",
    "find_model",
    "give_vectors",
    "list_seeds",
    "open_acceptance",
    "open_pipe",
    "read_decoding_flags",
    "read_edit_flags",
    "read_vectors_flag",
]

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


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the positional argument RUN that names the model."""
    parser.add_argument(
        "folder",
        type=Path,
        metavar="RUN",
        help="run folder (runs/NAME), pretrained folder, owner/name on the Hub, or fashion-mnist-demo, a model in the "
        "package",
    )


def add_classes_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--classes``."""
    parser.add_argument(
        "--classes", default="all", metavar="A,B,...", help="class names or indices, or all (default: all, at most 10)"
    )


def find_model(args: argparse.Namespace) -> tuple[Path, Outline]:
    """Returns the folder with ``tokenizer/`` and ``transformer/``, and the model's outline, without torch."""
    from maskgit_pl.pipeline.outline import Outline
    from maskgit_pl.pipeline.sharing import find_folder

    folder = find_folder(args.folder)
    outline = Outline.read(folder)
    if outline is None:  # a damaged folder: loading the model raises the error that names the fault
        from maskgit_pl.pipeline import MaskGIT

        outline = MaskGIT.from_pretrained(folder).outline
    return folder, outline


def open_pipe(folder: Path, args: argparse.Namespace, *, device: str | None = None) -> MaskGIT:
    """Loads the model to the device of ``--device``, with the arithmetic of ``--dtype`` or ``--int8``.

    Args:
        folder: The folder with ``tokenizer/`` and ``transformer/``.
        args: Flags of ``add_decoding_arguments``.
        device: Default device; None for a GPU if there is one, else the CPU.
    """
    # int8 works on the CPU only, so it is the default device with --int8.
    place = read_device_flag(args, default="cpu" if args.int8 else device)
    from maskgit_pl.distributed import parse_dtype
    from maskgit_pl.pipeline import MaskGIT

    pipe = MaskGIT.from_pretrained(
        folder,
        decoding=args.decoding,
        negative_model=args.negative_model,
        device=place,
        dtype=parse_dtype(args.dtype, place),
    )
    return pipe.quantize() if args.int8 else pipe


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
    decoding, content = read_settings_file(file)
    return decoding, content.get("negative_model") is not None


def add_variant_arguments(parser: argparse.ArgumentParser, *, dilation: int, class_required: bool = False) -> None:
    """Adds the flags of ``inpaint``, ``edit`` and ``outpaint``."""
    suffix = "" if class_required else " (default: no class)"
    parser.add_argument(
        "--class", dest="class_", required=class_required, metavar="NAME", help=f"class name or index{suffix}"
    )
    parser.add_argument("--variants", type=int, default=4, metavar="N", help="number of results (default: 4)")
    parser.add_argument(
        "--blend",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="blur the seam; --no-blend keeps every pixel outside the region unchanged (default: --blend)",
    )
    text = f"tokens by which the region grows on each side (default: {dilation})"
    parser.add_argument("--dilation", type=int, default=dilation, metavar="N", help=text)


def check_variant_flags(args: argparse.Namespace) -> None:
    """Checks ``--variants`` and ``--dilation``."""
    from maskgit_pl.pipeline.options import MAX_RESULTS
    from maskgit_pl.pipeline.regions import check_dilation

    check_integer("--variants", args.variants, f"[1, {MAX_RESULTS}]")
    with use_flag_names(args):
        check_dilation(args.dilation)


def read_edit_flags(args: argparse.Namespace, label: int | None) -> dict[str, Any]:
    """Returns the options of ``MaskGIT``'s editing methods from the flags."""
    return {
        "classes": [label] * args.variants,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "dilation": args.dilation,
        "blend": None if args.blend else 0.0,
    }


def list_seeds(args: argparse.Namespace) -> list[int]:
    """Returns the seed of each variant."""
    return [args.seed + number for number in range(args.variants)]


def add_overlap_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--overlap`` for commands that fill a canvas window by window."""
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        metavar="F",
        help="fraction of a window that is known before it is decoded (default: 0.5)",
    )


def check_overlap_flag(args: argparse.Namespace) -> None:
    """Checks ``--overlap``."""
    from maskgit_pl.pipeline.regions import check_overlap

    with use_flag_names(args):
        check_overlap(args.overlap)


def add_acceptance_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``--accept-rate`` and ``--classifier``: rejection sampling by a classifier."""
    parser.add_argument(
        "--accept-rate",
        type=float,
        metavar="X",
        help="generate 1 / X times as many images, and keep the fraction X of each class to which a classifier gives "
        "the highest probability of that class",
    )
    parser.add_argument(
        "--classifier",
        type=Path,
        metavar="DIR",
        help="classifier of --accept-rate (default: that of the data of the run, runs/DATA-classifier/small)",
    )


def check_acceptance_flags(args: argparse.Namespace) -> None:
    """Checks ``--accept-rate``, and finds its classifier before torch is imported."""
    if args.accept_rate is None:
        if args.classifier is not None:
            raise ValueError(f"--classifier must be given with --accept-rate, got only {args.classifier}")
        return
    check_number("--accept-rate", args.accept_rate, "(0, 1]")
    if args.classifier is None:
        from maskgit_pl.evaluation.run_folders import find_run

        try:
            args.classifier = find_run(args.folder).classifier
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--accept-rate: {error}; or name a classifier with --classifier") from error
    if not (args.classifier / "config.json").is_file():
        raise FileNotFoundError(
            f"--classifier {args.classifier}: no classifier there; `maskgit train-classifier --data DATA` trains one"
        )


def open_acceptance(pipe: MaskGIT, args: argparse.Namespace) -> Acceptance | None:
    """Reads the classifier of ``--classifier``; returns None without ``--accept-rate``."""
    if args.accept_rate is None:
        return None
    from maskgit_pl.pipeline.acceptance import Acceptance

    acceptance = Acceptance.load(args.classifier, args.accept_rate, device=pipe.device)
    acceptance.check_classes(pipe.class_names)
    return acceptance


def choose_accepted(pipe: MaskGIT, labels: list[int], args: argparse.Namespace, **options: Any) -> AcceptedSeeds | None:
    """Chooses the seeds of accepted images and prints them; returns None without ``--accept-rate``."""
    acceptance = open_acceptance(pipe, args)
    if acceptance is None:
        return None
    from maskgit_pl.pipeline.acceptance import choose_seeds
    from maskgit_pl.processes import progress_bars

    with progress_bars() as bars:
        total = sum(acceptance.num_candidates(labels.count(label)) for label in set(labels))
        on_images = bars("candidates", total, unit="images")
        chosen = choose_seeds(
            pipe, labels, acceptance, seed=args.seed, batch_size=args.batch_size, on_images=on_images, **options
        )
    print(describe_acceptance(acceptance, len(labels), chosen.num_candidates))
    print(f"seeds: {', '.join(map(str, chosen.seeds))}")
    return chosen


def describe_acceptance(acceptance: Acceptance, count: int, num_candidates: int) -> str:
    """Returns the number of accepted images, that of candidates, and the classifier, in one line."""
    return f"accepted {count} of {num_candidates} candidates ({count / num_candidates:.1%}) by {acceptance.name}"


def add_vectors_argument(parser: argparse.ArgumentParser) -> None:
    """Adds ``--vectors``."""
    parser.add_argument(
        "--vectors",
        type=Path,
        metavar="FILE.npy",
        help="array with one vector per row, for a model that was trained with vectors: makes one image of each class "
        "for each row, or takes the rows in turn with --num-images; one row only with --accept-rate",
    )


def read_vectors_flag(args: argparse.Namespace, outline: Outline) -> npt.NDArray[np.float32] | None:
    """Reads the file of ``--vectors`` without torch; returns (n, C) float32, or None for a model without vectors.

    Raises:
        ValueError: if the flag is missing or must not be given, or the file is no array of finite vectors of the
            model's size.
    """
    dim = outline.condition_dim
    if args.vectors is None:
        if dim:
            raise ValueError(
                f"--vectors must be given: the model was trained with a vector of {dim} values for each image; give a "
                f".npy file of shape (n, {dim})"
            )
        return None
    if not dim:
        raise ValueError(f"--vectors must be left out: the model was trained without vectors, got {args.vectors}")
    import numpy as np

    from maskgit_pl.data.vectors import map_array

    try:
        array = map_array(args.vectors)
    except ValueError as error:
        raise ValueError(f"--vectors {error}") from error
    if array.ndim != 2 or array.shape[1] != dim or not len(array) or array.dtype.kind != "f":
        raise ValueError(
            f"--vectors {args.vectors} must hold floats of shape (n, {dim}), one vector a row, got {array.dtype} "
            f"{array.shape}"
        )
    vectors: npt.NDArray[np.float32] = array.astype(np.float32)
    if not np.isfinite(vectors).all():
        raise ValueError(f"--vectors {args.vectors} must be finite, got NaN or infinity")
    return vectors


def give_vectors(pipe: MaskGIT, vectors: npt.NDArray[np.float32] | None, *, seed: int) -> None:
    """Lets the image of ``seed`` take the first vector, the next one the second, and so on."""
    if vectors is not None:
        import torch

        from maskgit_pl.decoding.vectors import VectorPool

        pipe.vector_pool = VectorPool(torch.from_numpy(vectors), first_seed=seed)
