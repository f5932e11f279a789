"""``maskgit table``, ``figure`` and ``ablation``: the paper's tables and figures with our models, and other pages."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from maskgit_pl import evaluation
from maskgit_pl.cli.arguments import Output, Word, flag_of
from maskgit_pl.cli.flags import CasFlags, Folder, Numbers, Runs, Seeds, Specs, print_json, print_page
from maskgit_pl.errors import printable
from maskgit_pl.evaluation.options import FEATURES, NUM_TOKENS, ReportOptions
from maskgit_pl.processes import progress_bars
from maskgit_pl.runs.ablation import PAPER_SCHEDULES, AblationConfig, Factor, Failure, parse_factor
from maskgit_pl.runs.layers import split_values
from maskgit_pl.runs.recipe import DEFAULT_DATASET, Stage

if TYPE_CHECKING:
    from maskgit_pl.evaluation.pages import Page


@dataclass(frozen=True)
class ReportFlags(ReportOptions):
    """The options of a page as they are typed."""

    features: Specs = FEATURES
    results: Annotated[Path, Output("")] = Path("results")


def table(
    number: Literal["1", "2", "3", "tokenizers"],
    runs: Runs = (),
    *,
    num_steps: Numbers | None = None,
    cas_images: int | None = None,
    json: bool = False,
    report: ReportFlags = ReportFlags(),
    accuracy_score: CasFlags = CasFlags(),
) -> None:
    """Writes Table 1, 2 or 3 of the paper with our rows, or a table of tokenizers.

    The table is written as Markdown and CSV, with the rows of the paper and of the runs, and a sheet of
    images. 1: class-conditional generation, with the times of decoding and training. 2: outpainting and inpainting. 3:
    mask schedules (`maskgit ablation` trains them). In 1 and 3, runs that differ only in their seed share a row.
    tokenizers: tokenizers side by side, without their transformers. Measurements that the ledger holds are reused.

    Example: maskgit table 1 runs/fashion-mnist-adaln --num-images 2000 --num-steps 1,2,4,8,16

    Args:
        number: Number of the table in the paper, or tokenizers.
        runs: Run folders (runs/NAME) or pretrained folders.
        num_steps: Decoding steps T of Table 3 (default: 2,3,4,6,8,12,16,24, at most half the tokens), or further T of
            which Table 1 has the FID.
        cas_images: Number of images that the CAS network is trained on (default: --num-images).
        json: Print JSON, a list of objects, instead of the table.
    """
    with progress_bars() as bars:
        if number == "tokenizers":
            page = evaluation.compare_tokenizers(runs, report, bars=bars)
        elif number == "1":
            page = evaluation.table_1(
                runs, report, cas=accuracy_score.config, cas_images=cas_images, num_steps=num_steps or (), bars=bars
            )
        elif number == "2":
            page = evaluation.table_2(runs, report, bars=bars)
        else:
            page = evaluation.table_3(runs, report, num_steps=num_steps, bars=bars)
    _write_page(page, as_json=json)


def figure(
    number: Literal[2, 4, 8],
    runs: Runs = (),
    *,
    class_name: str | None = None,
    num_steps: Numbers | None = None,
    num_tokens: Annotated[tuple[int, ...], Word("N,...")] = NUM_TOKENS,
    json: bool = False,
    report: ReportFlags = ReportFlags(),
) -> None:
    """Draws Figure 2, 4 or 8 of the paper with our models and measurements.

    2: the decoding of each run step by step, such as that of an autoregressive one and of MaskGIT. 4: time per image of
    autoregressive decoding and of MaskGIT against the number of tokens, with random weights; a run sets the sizes of
    the networks. 8: mask schedules, and quality against the number of steps T, one run for each schedule and seed.

    Example: maskgit figure 2 runs/fashion-mnist-adaln-autoregressive runs/fashion-mnist-adaln --class-name Sneaker

    Args:
        number: Number of the figure in the paper.
        runs: Run folders (runs/NAME) or pretrained folders.
        class_name: Name or index of the class of Figure 2 (default: the first class).
        num_steps: Decoding steps T of Figure 8 (default: 2,3,4,6,8,12,16,24, at most half the tokens).
        num_tokens: Tokens per image in Figure 4.
        json: Print JSON, a list of objects, instead of the page.
    """
    with progress_bars() as bars:
        if number == 2:
            page = evaluation.figure_2(runs, report, class_name=class_name, bars=bars)
        elif number == 8:
            page = evaluation.table_3(runs, report, num_steps=num_steps, bars=bars)
        elif len(runs) > 1:
            raise ValueError(f"figure 4 must have at most one RUN, which sets the sizes, got {len(runs)}")
        else:
            page = evaluation.figure_4(next(iter(runs), None), report, num_tokens=num_tokens, bars=bars)
    _write_page(page, as_json=json)


@dataclass(frozen=True)
class VariantFlags:
    """The variants of a recipe.

    Args:
        vary: Recipe key with the values to compare; repeat the flag for further keys. decoding.KEY needs no training.
        recipes: Sets of recipes to compare, separated by semicolons; the first one is the base (default: that
            of --recipe).
        grid: Compare all combinations (default: change one key of the base at a time).
        stage: Stage to train.
        stage_2: With --stage tokenizer: train a transformer on each tokenizer, and measure its images, too;
            flags in quotes override its recipe, such as --stage-2='--trainer.max_steps 200'.
        name: Name of the page (default: ablation-KEY).
        page_only: Make the page from the ledger, and train and measure nothing.
    """

    vary: Annotated[list[Factor], Word("KEY=A,B,...", parse_factor)] | None = None
    recipes: Annotated[tuple[str, ...], Word("'A;B;C D'", lambda _, text: tuple(text.split(";")))] = ("",)
    grid: bool = False
    stage: Stage = AblationConfig.stage
    stage_2: Annotated[Sequence[str], Word("'FLAGS'", lambda _, text: shlex.split(text), bare="")] | None = None
    name: str | None = None
    page_only: bool = False


def ablation(
    *,
    schedules: Annotated[tuple[str, ...], Word("A,B,...", lambda _, text: tuple(split_values(text)))] | None = None,
    num_steps: Numbers | None = None,
    seeds: Seeds | None = None,
    recipe: str = "",
    dataset: str = DEFAULT_DATASET,
    cluster: str = "single",
    runs_folder: Folder = Path("runs"),
    tokenizer: Folder | None = None,
    variants: VariantFlags = VariantFlags(),
    report: ReportFlags = ReportFlags(),
    overrides: Sequence[str] = (),
) -> int:
    """Trains variants of a recipe on the same budget and compares them; by default, the schedules of Table 3.

    Each variant is trained with each seed and measured; one page compares them. Without --vary and --recipes: a
    transformer with each mask schedule of the paper, Table 3 and Figure 8. Finished runs and recorded measurements are
    reused. Further flags override single recipe values of all variants, such as --model.network.depth 2.

    Example: maskgit ablation --vary model.network.depth=2,4,6 --vary decoding.guidance.scale=0,1,2 --seeds 0,1,2

    Args:
        schedules: Recipes to train, one for each mask schedule (default: exp,cubic,square,cosine,linear,sqrt,log).
        num_steps: Numbers of decoding steps of --schedules (default: 2,3,4,6,8,12,16,24, at most half the tokens).
        seeds: Training seeds of each variant (default: 0,1) or schedule (default: that of the recipe).
        recipe: Recipes of all variants; several in quotes.
        dataset: Name of the data set.
        cluster: Machines: a file of recipes/cluster.
        runs_folder: Folder of all runs.
        tokenizer: Pretrained tokenizer (default: the only one of the data set).
    """
    is_of_schedules = variants.vary is None and variants.recipes == VariantFlags.recipes
    sets = tuple(schedules or PAPER_SCHEDULES) if is_of_schedules else variants.recipes
    config = AblationConfig(
        tuple(variants.vary or ()),
        tuple(" ".join(f"{recipe} {names}".split()) for names in sets),
        grid=variants.grid,
        seeds=seeds if seeds is not None or is_of_schedules else AblationConfig.seeds,
        stage=variants.stage,
        stage_2=variants.stage_2,
        dataset=dataset,
        cluster=cluster,
        overrides=tuple(overrides),
        runs=runs_folder,
        data=report.data,
        tokenizer=tokenizer,
    )
    failures: list[Failure] = []
    if variants.page_only:
        if is_of_schedules and variants.name is None:
            raise ValueError("--page-only must come with --vary, --recipes or --name, which name the ablation")
        page = evaluation.read_ablation(variants.name or config.name, report)
    elif is_of_schedules:
        for field in fields(variants):
            if getattr(variants, field.name) != field.default:
                raise ValueError(f"{flag_of(field.name)} must come with --vary or --recipes, got it without")
        with progress_bars() as bars:
            page, failures = evaluation.ablate_schedules(config, report, num_steps=num_steps, bars=bars)
    else:
        for name, value in {"schedules": schedules, "num_steps": num_steps}.items():
            if value is not None:
                raise ValueError(f"{flag_of(name)} must not be given with --vary or --recipes, got both")
        if len(config.seeds or ()) == 1:
            print("--seeds: with one seed, the spread is unknown, and no difference can be told from chance")
        with progress_bars() as bars:
            page, failures = evaluation.run_ablation(config, report, name=variants.name, bars=bars)
    _write_page(page)
    if not failures:
        return 0
    listed = printable("; ".join(map(str, failures)))
    print(
        f"maskgit ablation: {len(failures)} runs failed, and the page has the others: {listed}. Repeat the command to "
        "try them again",
        file=sys.stderr,
    )
    return failures[0].exit_code


def _write_page(page: Page, *, as_json: bool = False) -> None:
    """Writes a page to its folder, and prints it, or its rows as JSON."""
    page.write()
    print_json([dict(row) for row in page.rows]) if as_json else print_page(page)
