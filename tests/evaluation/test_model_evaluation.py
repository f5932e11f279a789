from pathlib import Path

import pytest

from maskgit_pl.evaluation.model_evaluation import Report, describe_limit
from maskgit_pl.training.speed import TrainingTime

TRANSFORMER = "The transformer limits: reconstructed real images already have FID"


@pytest.mark.parametrize(
    ("fid", "reconstruction_fid", "real_fid", "sentence"),
    [
        (0.63, 0.55, 0.11, "The tokenizer limits: reconstructed real images already have FID 0.55 of 0.63. Try a "),
        (1.44, 0.55, 0.11, f"{TRANSFORMER} 0.55 of 1.44. Try another decoding (`maskgit tune runs/mine`), more steps "),
        (1.0, 0.5, 0.1, f"{TRANSFORMER} 0.50 of 1.00. "),  # half of it is not more than half
        (0.15, 0.14, 0.1, "Neither stage limits: FID 0.15 is close to 0.10"),
        (0.15, None, 0.1, ""),  # of a reference file
    ],
)
def test_the_stage_that_most_of_the_fid_comes_from_and_what_to_try(
    fid: float, reconstruction_fid: float | None, real_fid: float, sentence: str
) -> None:
    content = {
        "protocol": {"features": {"classifier": {}, "lite0": {}}},
        "reconstruction": {} if reconstruction_fid is None else {"rfid/classifier": reconstruction_fid},
        "samples": {"exported_guidance": {"fid/classifier": fid}},
        "real_against_real": {"fid/classifier": real_fid},
        "model": {"image_size": 32},
    }
    limit = describe_limit(content, "runs/mine")
    assert (limit or "").startswith(sentence)
    longer = describe_limit(content, "runs/mine", times=[TrainingTime(cost=300), TrainingTime(cost=480)]) or ""
    assert ("64 px: add 64px to --recipe, about 13 CPU minutes" in longer) == ("already have" in sentence)
    findings = Report({"limiting_stage": limit, "held_out": "Held out."}, Path()).findings()
    assert findings == ([limit, "Held out."] if sentence else ["Held out."])
