import re
from pathlib import Path
from typing import Any

import pytest
import torch

from maskgit_pl.evaluation.model_evaluation import Report, describe_agreement, describe_limit

PAGE = Path(__file__).parents[2] / "docs" / "evaluation" / "README.md"


def report(fid: float = 0.64, rfid: float | None = 0.55, real: float = 0.1) -> dict[str, Any]:
    return {
        "protocol": {"features": {"classifier": {}, "lite0": {}}},
        "reconstruction": {} if rfid is None else {"rfid/classifier": rfid},
        "samples": {"exported_guidance": {"fid/classifier": fid}},
        "real_against_real": {"fid/classifier": real},
        "likelihood": {"elbo_bits_per_token": 5.15},
        "model": {"codebook_size": 256},
    }


@pytest.mark.parametrize(
    ("fid", "reconstruction_fid", "real_fid", "stage"),
    [
        (0.63, 0.55, 0.11, "tokenizer"),  # of the demo
        (1.44, 0.55, 0.11, "transformer"),
        (1.0, 0.5, 0.1, "transformer"),  # half of it is not more than half
        (0.15, 0.14, 0.1, "neither"),
    ],
)
def test_the_stage_that_most_of_the_fid_comes_from(
    fid: float, reconstruction_fid: float, real_fid: float, stage: str
) -> None:
    assert describe_limit(report(fid, reconstruction_fid, real_fid))["stage"] == stage


def test_bits_stand_beside_those_of_a_uniform_guess_with_or_without_a_reconstruction_fid() -> None:
    known, unknown = describe_limit(report()), describe_limit(report(rfid=None))  # of a reference file
    assert known["reconstruction_share"] == pytest.approx(0.55 / 0.64)
    assert (known["bits_per_token"], known["uniform_bits_per_token"]) == (5.15, 8)
    assert known["text"].startswith("The tokenizer limits: reconstructed real images already have FID 0.55, 86% of")
    assert "stage" not in unknown
    assert unknown["text"] == "The transformer needs 5.15 bits per val token, a uniform guess 8.00."


@pytest.mark.parametrize(
    ("generated", "real", "exceeds"),
    [
        ((98, 100), (700, 1000), True),
        ((80, 100), (700, 1000), True),
        ((79, 100), (700, 1000), False),  # less than two standard errors, 0.094
        ((5, 5), (800, 1000), False),  # too few images to say so
        ((7, 10), (800, 1000), False),
        ((10, 10), (100, 100), False),
    ],
)
def test_a_class_is_named_if_its_agreement_exceeds_that_of_real_images_by_two_standard_errors(
    generated: tuple[int, int], real: tuple[int, int], exceeds: bool
) -> None:
    hits, real_hits = (torch.arange(count) < right for right, count in (generated, real))
    # All images are of the class 1, and 9 generated ones of the class 2, of which there are no real ones.
    labels = torch.ones(len(hits)).long(), torch.ones(len(real_hits)).long()
    ours = torch.cat([hits, hits.new_ones(9)]), torch.cat([labels[0], torch.full((9,), 2)])
    described = describe_agreement(ours, (real_hits, labels[1]), ["Ice", "Forest", "Sea"])
    p, q = (right / count for right, count in (generated, real))
    assert described["per_class"] == [{"class": "Forest", "generated": pytest.approx(p), "real": pytest.approx(q)}]
    texts = {name: {"text": name} for name in ("limiting_stage", "held_out")}
    found = Report({**texts, "classifier": described}, Path()).findings()
    assert [found[0], found[-1]] == ["limiting_stage", "held_out"]
    assert found[1:-1] == ([described["text"]] if exceeds else [])
    assert (
        described.get("text", "").startswith(f"Agreement above that of real images: Forest {p:.0%} (real {q:.0%}).")
        is exceeds
    )


def test_the_advice_of_the_page_is_measured_on_the_pages_that_it_links() -> None:
    section = PAGE.read_text().partition("## Which stage limits\n")[2].partition("\n## ")[0]
    rows = {row.split("|")[2].strip(): row.split("|")[3] for row in section.splitlines() if row.startswith("| ")}
    assert set(rows) == {"the stage that limits", "neither", "tokenizer", "transformer"}
    for stage in ("tokenizer", "transformer"):
        pages = {link: (PAGE.parent / link).read_text() for link in re.findall(r"\]\(([^)#]+)#", rows[stage])}
        figures = re.findall(r"\d+\.\d\d", rows[stage])
        assert len(figures) >= 3
        assert all(any(figure in page for page in pages.values()) for figure in figures)
