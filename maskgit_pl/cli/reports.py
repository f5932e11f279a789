"""``maskgit table``, ``figure`` and ``ablation``: the paper's tables and figures with our models, and other pages."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from maskgit_pl import evaluation
from maskgit_pl.cli.arguments import Output, Word
from maskgit_pl.cli.flags import CasFlags, Folder, Numbers, Runs, Seeds, Specs, check_one_of, print_page
from maskgit_pl.evaluation.options import FEATURES, NUM_TOKENS, ReportOptions
from maskgit_pl.processes import progress_bars
from maskgit_pl.runs.ablation import FOLDER, PAPER_SCHEDULES, AblationConfig, Factor, parse_factor
from maskgit_pl.runs.layers import split_values
from maskgit_pl.runs.recipe import DEFAULT_DATASET, Stage
from maskgit_pl.text import count_text, printable

if TYPE_CHECKING:
    from maskgit_pl.evaluation.pages import Page


@dataclass(frozen=True)
class ReportFlags(ReportOptions):
    """The options of a page as they are typed."""

    features: Specs = FEATURES
    results: Annotated[Path, Output("")] = Path("results")


def table(
    number: Literal[1, 2, 3],
    runs: Runs = (),
    *,
    num_steps: Numbers | None = None,
    cas_images: int | None = None,
    report: ReportFlags = ReportFlags(),
    accuracy_score: CasFlags = CasFlags(),
) -> None:
    """Writes Table 1, 2 or 3 of the paper with our rows.

    The table is written as Markdown and CSV, with the rows of the paper and of the runs, and a picture. 1:
    class-conditional generation, with the times of decoding and training. 2: outpainting and inpainting. 3: mask
    schedules, with Figure 8 (`maskgit ablation` trains them). In 1 and 3, runs that differ only in their seed share a
    row. Measurements that the ledger holds are reused.

    Example: maskgit table 1 runs/fashion-mnist-adaln --num-images 2000 --num-steps 1,2,4,8,16

    Args:
        number: Number of the table in the paper.
        runs: Run folders (runs/NAME) or pretrained folders.
        num_steps: Decoding steps T of Table 3 (default: 2,3,4,6,8,12,16,24, at most half the tokens), or further T of
            which Table 1 has the FID.
        cas_images: Number of images that the CAS network is trained on (default: --num-images).
    """
    with progress_bars() as bars:
        if number == 1:
            page = evaluation.table_1(
                runs, report, cas=accuracy_score.config, cas_images=cas_images, num_steps=num_steps or (), bars=bars
            )
        elif number == 2:
            page = evaluation.table_2(runs, report, bars=bars)
        else:
            page = evaluation.table_3(runs, report, num_steps=num_steps, bars=bars)
    _write_page(page)


def figure(
    number: Literal[2, 4],
    runs: Runs = (),
    *,
    class_name: str | None = None,
    num_tokens: Annotated[tuple[int, ...], Word("N,...")] = NUM_TOKENS,
    report: ReportFlags = ReportFlags(),
) -> None:
    """Draws Figure 2 or 4 of the paper with our models and measurements; `maskgit table 3` draws Figure 8.

    2: the decoding of each run step by step, such as that of an autoregressive one and of MaskGIT. 4: time per image of
    autoregressive decoding and of MaskGIT against the number of tokens, with random weights; a run sets the sizes of
    the networks.

    Example: maskgit figure 2 runs/fashion-mnist-adaln-autoregressive runs/fashion-mnist-adaln --class-name Sneaker

    Args:
        number: Number of the figure in the paper.
        runs: Run folders (runs/NAME) or pretrained folders.
        class_name: Name or index of the class of Figure 2 (default: the first class).
        num_tokens: Tokens per image in Figure 4.
    """
    with progress_bars() as bars:
        if number == 2:
            page = evaluation.figure_2(runs, report, class_name=class_name, bars=bars)
        elif len(runs) > 1:
            raise ValueError(f"figure 4 must have at most one RUN, which sets the sizes, got {len(runs)}")
        else:
            page = evaluation.figure_4(next(iter(runs), None), report, num_tokens=num_tokens, bars=bars)
    _write_page(page)


def ablation(
    *,
    vary: Annotated[list[Factor], Word("KEY=A,B,...", parse_factor)] | None = None,
    recipes: Annotated[tuple[str, ...], Word("'A;B;C D'", lambda _, text: tuple(text.split(";")))] | None = None,
    schedules: Annotated[tuple[str, ...], Word("A,B,...", lambda _, text: tuple(split_values(text)))] | None = None,
    stage: Stage = AblationConfig.stage,
    stage_2: Annotated[Sequence[str], Word("'FLAGS'", lambda _, text: shlex.split(text), bare="")] | None = None,
    name: str | None = None,
    seeds: Seeds = AblationConfig.seeds,
    recipe: str = "",
    dataset: str = DEFAULT_DATASET,
    cluster: str = "single",
    runs_folder: Folder = Path("runs"),
    tokenizer: Folder | None = None,
    report: ReportFlags = ReportFlags(),
    overrides: Sequence[str] = (),
) -> int:
    """Trains variants of a recipe on the same budget and compares them; by default, the schedules of Table 3.

    Each variant is trained with each seed and measured; one page compares them. Of mask schedules, the command writes
    Table 3 and Figure 8 of the paper, too. Finished runs and recorded measurements are reused. Further flags override
    single recipe values of all variants, such as --model.network.depth 2.

    Example: maskgit ablation --vary model.network.depth=2,4,6 --vary decoding.guidance.scale=0,1,2 --seeds 0,1,2

    Args:
        vary: Recipe key with the values to compare; repeat the flag for further keys. decoding.KEY needs no training.
        recipes: Sets of recipes to compare, separated by semicolons; the first one is the base (default: that
            of --recipe).
        schedules: Recipes to compare, one for each mask schedule; the first one is the base (default without --vary
            and --recipes: cosine,exp,cubic,square,linear,sqrt,log).
        stage: Stage to train.
        stage_2: With --stage tokenizer: train a transformer on each tokenizer, and measure its images, too;
            flags in quotes override its recipe, such as --stage-2='--trainer.max_steps 200'.
        name: Name of the page (default: ablation-KEY).
        seeds: Training seeds of each variant.
        recipe: Recipes of all variants; several in quotes.
        dataset: Name of the data set.
        cluster: Machines: a file of recipes/cluster.
        runs_folder: Folder of all runs.
        tokenizer: Pretrained tokenizer (default: the only one of the data set).
    """
    if schedules is None and vary is None and recipes is None:
        if stage == "tokenizer":
            raise ValueError("--stage tokenizer must come with --vary or --recipes: it has no mask schedules")
        schedules = PAPER_SCHEDULES
    check_one_of(schedules=schedules, vary=vary)
    check_one_of(schedules=schedules, recipes=recipes)
    config = AblationConfig(
        tuple(vary or ()),
        tuple(" ".join(f"{recipe} {names}".split()) for names in schedules or recipes or ("",)),
        seeds=seeds,
        stage=stage,
        stage_2=stage_2,
        dataset=dataset,
        cluster=cluster,
        overrides=tuple(overrides),
        runs=runs_folder,
        data=report.data,
        tokenizer=tokenizer,
    )
    with progress_bars() as bars:
        page = evaluation.run_ablation(config, report, name=name, bars=bars)
    _write_page(page)
    runs = [runs_folder / FOLDER / row["run"] for row in page.rows if "failure" not in row]
    if schedules is not None and runs:
        with progress_bars() as bars:
            table_3 = evaluation.table_3(runs, report, bars=bars)
        _write_page(table_3)
    failed = [row for row in page.rows if "failure" in row]
    if not failed:
        return 0
    listed = "; ".join(f"{row['variant']}, seed {row['seed']}: {row['failure']}" for row in failed)
    print(
        f"maskgit ablation: {count_text(len(failed), 'run')} failed, and the page has the others: {printable(listed)}. "
        "Repeat the command to try again",
        file=sys.stderr,
    )
    return int(failed[0]["exit_code"])


def _write_page(page: Page) -> None:
    """Writes a page to its folder, and prints it."""
    page.write()
    print_page(page)
