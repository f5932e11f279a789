"""The paper's tables with our rows in them: Markdown and CSV from the rows of the results ledger.

Our numbers are named after the network whose features they are of, and stand in tables of their own: those of another
network, other data or another number of images compare with nothing in the paper's.
"""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from maskgit_pl.evaluation.bench.held_out import Task
from maskgit_pl.evaluation.bench.ledger import NUMBERS, REAL, Row, number, present
from maskgit_pl.evaluation.reports.published import (
    CLASSIFIER_ON_REAL_IMAGES,
    EDITING,
    GENERATION,
    SCHEDULES,
    PublishedGeneration,
)
from maskgit_pl.schedules import MaskSchedule
from maskgit_pl.text import code_span, markdown, printable

__all__ = [
    "Page",
    "ScheduleResult",
    "agreement_with_paper",
    "markdown_table",
    "table_1",
    "table_2",
    "table_3",
]

FORMULAS = {  # Table 3's gamma(r), as it prints them; exp and log as released
    "exp": "1 - 2^(-log2(N) (1 - r))",
    "cubic": "1 - r^3",
    "square": "1 - r^2",
    "cosine": "cos(pi r / 2)",
    "linear": "1 - r",
    "sqrt": "1 - r^0.5",
    "log": "-log2(r) / log2(N)",
}
TASKS: dict[Task, str] = {
    "outpaint-right": "outpainting, the right 50 %",
    "inpaint-centre": "inpainting, the centre 50 % x 50 %",
}


_SHOWN_DIGITS = 8


@dataclass(frozen=True)
class Page:
    """A table as it is written.

    Args:
        markdown: The page, our rows beside the published ones.
        csv: Our rows, unrounded.
    """

    markdown: str
    csv: str


@dataclass(frozen=True)
class ScheduleResult:
    """What an ablation found of one mask schedule.

    Args:
        schedule: The registered name.
        run: Of the model that was trained with it.
        best_steps: The T whose images came nearest to real ones.
        curve: Distance at each T.
        fresh: By network: the row of ``samples.csv`` at ``best_steps``, with noise that took no part in the choice.
        likelihood: The row of ``likelihood.csv``.
        mask_schedule: The schedule itself.
    """

    schedule: str
    run: str
    best_steps: int
    curve: Mapping[int, float]
    fresh: Mapping[str, Row]
    likelihood: Row
    mask_schedule: MaskSchedule


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """The lines of a table whose first ``left`` columns hold words and whose others hold numbers."""
    lines = [_line(headings), "|" + "---|" * left + "---:|" * (len(headings) - left)]
    return [*lines, *map(_line, rows)]


def paragraph(*sentences: str) -> list[str]:
    """Sentences as lines of the width that Markdown files have here."""
    return textwrap.wrap(" ".join(sentences), 118, break_long_words=False, break_on_hyphens=False)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def as_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows for a spreadsheet, with every column that one of them has."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(name for row in rows for name in row)), restval="",
                            lineterminator="\n")  # fmt: skip
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _cell(row: Mapping[str, str], name: str) -> str:
    value, (_, factor, digits) = number(row, name), NUMBERS[name]
    return "" if value is None else f"{value * factor:.{digits}f}"


def _code(text: str) -> str:
    return code_span(text) if text else ""


def _millions(row: Mapping[str, str]) -> str:
    value = number(row, "parameters")
    return "" if value is None else f"{value / 1e6:.2f}M"


def _milliseconds(row: Mapping[str, str]) -> str:
    value = number(row, "seconds_per_image")
    return "" if value is None else f"{1000 * value:.1f}"


def _provenance(rows: Sequence[Row]) -> list[str]:
    """Returns on what, against what, by which networks and by which code the rows were measured."""
    said = []
    for title, name in (("data", "dataset"), ("data fingerprint", "data"), ("commit", "commit"), ("date", "date"),
                        ("device", "device")):  # fmt: skip
        values = dict.fromkeys(row.get(name, "")[:12] if name == "commit" else row.get(name, "") for row in rows)
        said.append(f"{title} {', '.join(markdown(value) for value in values if value)}")
    compared = _named(rows, reference_name, "reference")
    judges = _named(rows, lambda row: markdown(row.get("network", "")), "judge")
    models = dict.fromkeys(
        f"{_code(row['run'])} tokenizer {digest_text(row, 'tokenizer')}, transformer {digest_text(row, 'transformer')}"
        for row in rows
        if row.get("run")
    )
    return [
        *paragraph(f"Measured on: {'; '.join(said)}. Every row with its decoding is in the ledger."),
        "",
        *paragraph(
            f"First digits of sha256. Reference: {compared}. Weights of the networks that judge: {judges}. Weights of",
            f"the models: {'; '.join(models) or 'none'}.",
        ),
    ]


def _named(rows: Sequence[Row], name: Callable[[Row], str], digest: str) -> str:
    return ", ".join(dict.fromkeys(f"{name(row)} {digest_text(row, digest)}" for row in rows))


def digest_text(row: Mapping[str, str], name: str) -> str:
    """Returns the first digits of a digest, or that a row of an older version does not say."""
    return markdown(row.get(name, "")[:_SHOWN_DIGITS]) or "not recorded"


def reference_name(row: Mapping[str, str]) -> str:
    """Returns what the images of a row were compared with: a split, or a file."""
    return markdown(row.get("reference_file") or f"the {row.get('split') or 'val'} split")


def _against(rows: Sequence[Row]) -> str:
    """Returns how many real images of what the rows compare with."""
    found = dict.fromkeys(
        f"{markdown(row['real_images'])} real ones of {reference_name(row)}"
        if row.get("real_images")
        else f"the statistics of {reference_name(row)}"
        for row in rows
    )
    return " and ".join(found)


def _explain(rows: Sequence[Row]) -> list[str]:
    counts = ", ".join(dict.fromkeys(markdown(row["num_images"]) for row in rows))
    return paragraph(
        f"{counts} images of each model, spread evenly over the classes, against {_against(rows)}. The last line of",
        "each table has as many real training images in place of generated ones: what FID",
        "comes to at this number of images where nothing is wrong. FID falls with the number of images and is of one",
        "network's features: it compares with no number of another count, network or data set. KID has no such bias.",
        "IS comes from a network that knows the classes alone.",
    )


def table_1(samples: Sequence[Row], cas: Sequence[Row], *, command: str) -> Page:
    """Class-conditional generation.

    Args:
        samples: Rows of ``samples.csv``, the real images' among them.
        cas: Rows of ``cas.csv``.
        command: What makes the page again.
    """
    lines = [
        "# Table 1: class-conditional generation",
        "",
        f"    {printable(command, limit=None)}",
        "",
        *_explain(samples),
        "",
    ]
    for network in dict.fromkeys(row["network"] for row in samples):
        own = [row for row in samples if row["network"] == network]
        lines += [f"## In the features of {markdown(network)}", "", *_generation_lines(own), ""]
    if cas:
        lines += ["## Classification accuracy score", "", *_cas_lines(cas), ""]
    lines += [*_provenance(samples), "", "## Published", "", *_published_generation()]
    return Page("\n".join(lines) + "\n", as_csv([*samples, *cas]))


def _generation_lines(rows: Sequence[Row]) -> list[str]:
    network = markdown(rows[0]["network"])
    shown = [name for name in NUMBERS if present(rows, name)]
    named = ("fid", "sfid", "kid", "is", "precision", "recall", "density", "coverage")
    headings = [f"{NUMBERS[name][0]} ({network})" if name in named[:4] else NUMBERS[name][0] for name in shown]
    models = [row for row in rows if row["model"] != REAL] + [row for row in rows if row["model"] == REAL]
    return markdown_table(
        ["model", "run", *headings, "parameters", "steps", "ms an image"],
        [
            [markdown(row["model"]), _code(row["run"]), *(_cell(row, name) for name in shown),
             _millions(row), markdown(row["num_steps"]), _milliseconds(row)]
            for row in models
        ],
        left=2,
    )  # fmt: skip


def _cas_lines(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    lines = paragraph(
        f"A {markdown(first['classifier'])} trained on images of one kind alone",
        f"({markdown(first['training_images'])} of them, {markdown(first['training_steps'])} steps), tested on the",
        f"{markdown(first['real_images'])} real val images.",
    )
    cells = [
        [f"{markdown(row['model'])} {_code(row['run'])}".strip(),
         *(f"{100 * float(row[name]):.2f}" for name in ("top1", "top5"))] for row in rows
    ]  # fmt: skip
    return [*lines, "", *markdown_table(["trained on images of", "top-1 %", "top-5 %"], cells)]


def _published_generation() -> list[str]:
    def decimals(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    def cells(row: PublishedGeneration) -> list[str]:
        quality = [decimals(row.fid), row.inception_score or "", decimals(row.precision), decimals(row.recall)]
        cost = [row.parameters, row.steps]
        return [row.model, str(row.size), *quality, *cost, decimals(row.cas_top1), decimals(row.cas_top5)]

    real = ["classifier trained on real images", *[""] * 7, *map(str, CLASSIFIER_ON_REAL_IMAGES)]
    headings = ["model", "size", "FID (inception)", "IS (inception)", "precision", "recall", "parameters", "steps",
                "CAS top-1", "CAS top-5"]  # fmt: skip
    lines = ["ImageNet, 50,000 images, Inception's features (arXiv:2202.04200, Table 1).", ""]
    return lines + markdown_table(headings, [*map(cells, GENERATION), real])


def table_2(rows: Sequence[Row], *, command: str) -> Page:
    """Outpainting and inpainting of held-out images.

    Args:
        rows: Rows of ``editing.csv``.
        command: What makes the page again.
    """
    lines = ["# Table 2: outpainting and inpainting", "", f"    {printable(command, limit=None)}", ""]
    lines += paragraph(
        "Each held-out image is edited once: its class and what stays visible are given, the rest is generated and",
        f"pasted in. The results are measured against {_against(rows)}. `unedited` are the same images as they are,",
        "`masked` with grey in place of what is to be generated: between the two lies what there is to win. What is",
        "hidden are whole tokens: the right half rounded up, the centre down (of 7 x 7 tokens 4 columns, and 3 x 3).",
    )
    lines += [""]
    for task, title in TASKS.items():
        own = [row for row in rows if row["task"] == task]
        if own:
            lines += [f"## {title[0].upper()}{title[1:]}", "", *_editing_lines(own), "", *_published_editing(task), ""]
    return Page("\n".join([*lines, *_provenance(rows)]) + "\n", as_csv(rows))


def _editing_lines(rows: Sequence[Row]) -> list[str]:
    shown = [name for name in NUMBERS if present(rows, name)]
    return markdown_table(
        ["result", "run", "network", *(NUMBERS[name][0] for name in shown), "images", "steps"],
        [
            [markdown(row["model"]), _code(row["run"]), markdown(row["network"]), *(_cell(row, name) for name in shown),
             markdown(row["num_images"]), markdown(row["num_steps"])]
            for row in rows
        ],
        left=3,
    )  # fmt: skip


def _published_editing(task: Task) -> list[str]:
    cells = [
        [row.model, str(row.size), f"{row.fid:.2f}", f"{row.inception_score:.2f}"]
        for row in EDITING
        if row.task == task
    ]
    headings = ["published, Places2", "size", "FID (inception)", "IS (inception)"]
    return markdown_table(headings, cells)


def table_3(results: Sequence[ScheduleResult], *, command: str) -> Page:
    """Mask schedules, each trained and decoded with its own.

    Args:
        results: One for each schedule.
        command: What makes the page again.
    """
    networks = list(dict.fromkeys(network for result in results for network in result.fresh))
    order = [row.schedule for row in SCHEDULES]
    results = sorted(results, key=lambda each: order.index(each.schedule) if each.schedule in order else len(order))
    any_row = next(iter(results[0].fresh.values()))
    rows = [row for result in results for row in result.fresh.values()]
    fids = {result.schedule: float(result.fresh[networks[0]]["fid"]) for result in results}
    lines = ["# Table 3: mask schedules", "", f"    {printable(command, limit=None)}", ""]
    steps = ", ".join(map(str, sorted(results[0].curve)))
    lines += paragraph(
        "Each schedule has a model of its own, trained with it under the same budget and decoded with it, without",
        f"guidance, at T in {{{steps}}}. The best T is the one of the least fid/{markdown(networks[0])}; the numbers",
        f"beside it are measured again with fresh noise ({any_row['num_images']} images), which took no part in the",
        "choice. NLL is the mean negative log-likelihood of masked tokens under the schedule's own masks, in nats, as",
        "the paper's: it falls where fewer tokens are masked, whatever the model knows. The bound is the",
        "order-agnostic ELBO in bits a token, which means the same for every schedule (lower is better).",
    )
    lines += ["", *_schedule_lines(results, networks), "", *agreement_with_paper(fids, networks[0]), ""]
    lines += _provenance(rows)
    return Page("\n".join(lines) + "\n", as_csv([_flat(result, networks) for result in results]))


def _schedule_lines(results: Sequence[ScheduleResult], networks: Sequence[str]) -> list[str]:
    published = {row.schedule: row for row in SCHEDULES}
    scored = [network for network in networks if present([result.fresh[network] for result in results], "is")]
    headings = ["schedule", "gamma(r)", "best T", *(f"FID ({markdown(name)})" for name in networks)]
    headings += [*(f"IS ({markdown(name)})" for name in scored), "NLL", "bound, bits", "paper: T", "FID", "IS", "NLL"]
    cells = []
    for result in results:
        likelihood, known = result.likelihood, published.get(result.schedule)
        row = [code_span(result.schedule), FORMULAS.get(result.schedule, ""), str(result.best_steps)]
        row += [_cell(result.fresh[name], "fid") for name in networks]
        row += [_cell(result.fresh[name], "is") for name in scored]
        row += [_with_error(likelihood, "masked_nll"), _with_error(likelihood, "elbo_bits_per_token")]
        if known is not None:
            row += [str(known.best_steps), f"{known.fid:.2f}", f"{known.inception_score:.1f}", f"{known.nll:.2f}"]
        cells.append(row + [""] * (len(headings) - len(row)))
    return markdown_table(headings, cells, left=2)


def _with_error(row: Mapping[str, str], name: str) -> str:
    value, error = number(row, name), number(row, f"{name}_error")
    return "" if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


def agreement_with_paper(fids: Mapping[str, float], network: str) -> list[str]:
    """Whether the paper's order of schedules holds, in words.

    Args:
        fids: Ours, by schedule.
        network: Whose features they are of.
    """
    paper = {row.schedule: row.fid for row in SCHEDULES if row.schedule in fids}
    if len(paper) < 2:
        return ["Fewer than two schedules of the paper were measured: nothing to say of its order."]
    ours = sorted(paper, key=lambda name: fids[name])
    theirs = sorted(paper, key=lambda name: paper[name])
    pairs = list(combinations(theirs, 2))
    agreeing = sum(fids[better] < fids[worse] for better, worse in pairs)
    verdict = "holds here" if ours == theirs else "does not hold here"
    return paragraph(
        f"**The paper's order {verdict}.** By FID it is {' < '.join(theirs)}; by our fid/{markdown(network)} it is",
        f"{' < '.join(f'{name} {fids[name]:.2f}' for name in ours)}. {agreeing} of {len(pairs)} pairs are in the",
        "paper's order (half of them would be by chance). One training and one set of noise a schedule: what is close",
        "is no ranking.",
    )


def _flat(result: ScheduleResult, networks: Sequence[str]) -> dict[str, object]:
    flat: dict[str, object] = {"schedule": result.schedule, "run": result.run, "best_steps": result.best_steps}
    for network in networks:
        row = result.fresh[network]
        flat |= {f"{name}/{network}": row[name] for name in NUMBERS if row.get(name)}
    flat |= {name: cell for name, cell in result.likelihood.items() if "nll" in name or "elbo" in name}
    flat |= {f"fid/{networks[0]} at T = {steps}": value for steps, value in sorted(result.curve.items())}
    kept = ("num_images", "parameters", "commit", "date", "dataset", "data", "transformer", "tokenizer", "config",
            "judge", "reference")  # fmt: skip
    return flat | {name: result.fresh[networks[0]].get(name, "") for name in kept}
