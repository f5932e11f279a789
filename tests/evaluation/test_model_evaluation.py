import re
from pathlib import Path
from typing import Any

import pytest

from maskgit_pl.evaluation.model_evaluation import describe_limit

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


def test_the_advice_of_the_page_is_measured_on_the_pages_that_it_links() -> None:
    section = PAGE.read_text().partition("## Which stage limits\n")[2].partition("\n## ")[0]
    rows = {row.split("|")[2].strip(): row.split("|")[3] for row in section.splitlines() if row.startswith("| ")}
    assert set(rows) == {"the stage that limits", "neither", "tokenizer", "transformer"}
    for stage in ("tokenizer", "transformer"):
        pages = {link: (PAGE.parent / link).read_text() for link in re.findall(r"\]\(([^)#]+)#", rows[stage])}
        figures = re.findall(r"\d+\.\d\d", rows[stage])
        assert len(figures) >= 3
        assert all(any(figure in page for page in pages.values()) for figure in figures)
