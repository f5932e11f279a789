import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.errors import CannotWriteError, exit_code_of
from maskgit_pl.evaluation import tuning
from maskgit_pl.evaluation.tuning import SearchSpace, Trial, TuningResult, make_page, search
from maskgit_pl.registry import describe
from maskgit_pl.schedules import mask_schedules

FID = "fid/classifier"
OWN = DecodingConfig(4, guidance={"name": "linear", "scale": 1.0})
SELECTORS = tuple(token_selectors.build_all())
SCHEDULES = tuple(sorted({*mask_schedules.build_all(), "pow"}))
SPACE = SearchSpace(OWN, SELECTORS, (2, 4, 8), SCHEDULES, codebook_size=256, can_guide=True)
SMALL = replace(SPACE, selectors=("halton", "confidence"), schedules=())


def numbers(fid: float) -> dict[str, float]:
    measured = {"class_agreement": 0.5, "diversity": 0.8, FID: fid, "kid/classifier": fid / 10}
    return {**measured, "seconds_per_image": 0.01}


def draw(space: SearchSpace, count: int) -> list[DecodingConfig]:
    """Returns the decodings of random trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.draw(study.ask()) for _ in range(count)]


def names(specs: list) -> set[str]:
    return {spec if isinstance(spec, str) else spec["name"] for spec in specs}


@pytest.mark.slow
def test_every_trial_can_be_decoded_and_all_parts_are_searched() -> None:
    drawn = draw(SPACE, 200)
    for decoding in drawn:
        decoding.check(49, is_autoregressive=False)
    assert names([each.token_selector for each in drawn]) == {describe(spec).split()[0] for spec in SPACE.selectors}
    assert names([each.guidance for each in drawn]) >= {"constant", "linear", "cosine"}
    assert {each.num_steps for each in drawn} == {2, 4, 8}
    assert {type(each.sampling_temperature) for each in drawn} == {float, tuple}
    assert any(each.top_k for each in drawn)
    assert any(not any(each.scales()) for each in drawn)
    schedules = [each.mask_schedule for each in drawn if each.mask_schedule is not None]
    assert names(schedules) == {*mask_schedules.build_all(), "pow"}
    assert len({spec["exponent"] for spec in schedules if isinstance(spec, dict)}) > 5
    assert any(each.mask_schedule is None for each in drawn)


def test_fixed_arguments_are_not_searched_and_a_small_codebook_is() -> None:
    remdm = {"name": "remdm", "eta": 0.33}
    space = replace(SPACE, selectors=(remdm,), schedules=(), can_guide=False, codebook_size=2)
    for decoding in draw(space, 20):
        assert decoding.top_k in (None, 2)
        assert decoding.token_selector == remdm | {"choice_temperature": decoding.token_selector["choice_temperature"]}
        assert (decoding.guidance, decoding.mask_schedule) == (OWN.guidance, OWN.mask_schedule)


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study()


class Measure:
    """A quality that falls with the guidance scale and, in every third measurement of the trials, by luck."""

    def __init__(self, luck: float = 0.0, most: int = 1000) -> None:
        self.calls: list[tuple[DecodingConfig, int, int]] = []
        self.luck, self.most = luck, most

    def __call__(self, decoding: DecodingConfig, num_images: int, seed: int, purpose: str) -> dict[str, float]:
        if len(self.calls) == self.most:
            raise KeyboardInterrupt
        self.calls.append((decoding, num_images, seed))
        scale = decoding.guidance["scale"] if isinstance(decoding.guidance, dict) else 0.0
        lucky = self.luck if len(self.calls) % 3 == 0 and seed < 1000 else 0.0
        return numbers(1 + scale - lucky)


def run(
    study: optuna.Study, measure: Any, space: SearchSpace = SMALL, trials: int = 12, metric: str = FID, seed: int = 0
) -> TuningResult:
    return search(study, space, measure, metric=metric, trials=trials, num_images=10, seed=seed)


def test_the_best_trials_and_the_first_are_measured_again_with_other_noise(study) -> None:
    measure = Measure()
    result = run(study, measure)
    assert len(result.trials) == 12
    assert {call[1:] for call in measure.calls[:12]} == {(10, 0)}
    assert {call[1:] for call in measure.calls[12:]} == {(20, 1_000_000)}
    assert result.trials[0].decoding == result.before.decoding == OWN
    ranked = sorted(result.trials, key=lambda trial: trial.numbers[FID])
    assert [trial.number for trial in result.confirmed[1:]] == [trial.number for trial in ranked[:3]]
    assert result.winner.number == ranked[0].number


def test_luck_of_the_first_measurement_does_not_win(study) -> None:
    best = replace(OWN, guidance={"name": "constant", "scale": 0.0})
    result = run(study, Measure(luck=5.0), replace(SMALL, start=best))
    assert min(trial.numbers[FID] for trial in result.trials) < 0
    assert result.winner.number == 0


@pytest.mark.slow
def test_a_search_that_was_stopped_resumes_to_the_same_trials(study, tmp_path) -> None:
    def resume(measure: Measure, trials: int = 14) -> TuningResult:
        kept = tuning._open_study(tmp_path / "tuning/study.db", FID, {"seed": 3})
        return run(kept, measure, SPACE, trials, seed=3)

    whole = run(study, Measure(), SPACE, 14, seed=3)
    for count in (0, 5, 7):
        with pytest.raises(KeyboardInterrupt):
            resume(Measure(most=count))
    measure = Measure()
    assert resume(measure) == whole
    assert len(measure.calls) == 14 - 12 + len(whole.confirmed)
    assert resume(Measure(most=len(whole.confirmed))) == whole
    assert resume(Measure(), trials=15).trials[:14] == whole.trials


def test_the_current_decoding_takes_part_also_if_another_search_wrote_it(study) -> None:
    first = run(study, Measure())
    written = replace(SMALL, start=first.winner.decoding)
    assert run(study, Measure(), written) == first  # which is also the search that wrote it
    other = DecodingConfig(3)
    again = run(study, Measure(), replace(SMALL, start=other))
    assert [again.confirmed[0].decoding, again.confirmed[-1].decoding] == [OWN, other]
    assert again.trials[:12] == first.trials
    assert len(again.trials) == 13


def test_the_direction_of_the_metric_decides_what_is_better() -> None:
    class Agreement(Measure):
        def __call__(self, *call: Any) -> dict[str, float]:
            measured = super().__call__(*call)
            return {**measured, "class_agreement": measured[FID]}

    result = run(optuna.create_study(direction="maximize"), Agreement(), metric="class_agreement")
    assert result.winner.numbers["class_agreement"] == max(trial.numbers[FID] for trial in result.trials) > 2


def test_the_study_is_the_file_of_its_path_and_a_damaged_one_is_named(tmp_path) -> None:
    file = tmp_path / "odd?%41" / "study.db"
    tuning._open_study(file, FID, {})
    assert file.is_file()
    file.write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match=r"study .*study\.db cannot be opened: .*not a database; move it away"):
        tuning._open_study(file, FID, {})


@pytest.mark.parametrize(
    ("key", "value"), [("decoding", "[]"), ("decoding", "{"), ("numbers", "{}"), ("numbers", "[" * 9999 + "]" * 9999)]
)
def test_a_study_with_a_damaged_trial_is_named(tmp_path, key, value) -> None:
    file = tmp_path / "study.db"
    run(tuning._open_study(file, FID, {}), Measure(), trials=1)
    with closing(sqlite3.connect(file)) as database:
        database.execute("UPDATE trial_user_attributes SET value_json = ? WHERE key = ?", [value, key])
        database.commit()
    with pytest.raises(ValueError, match=r"study .*study\.db cannot be opened: \w+Error: .*; move it away, or choose"):
        tuning._open_study(file, FID, {})


def test_a_full_disk_of_a_study_is_no_internal_error(small_disk) -> None:
    (small_disk / "other").write_bytes(bytes(3 * 2**20 - 150_000))
    kept = tuning._open_study(small_disk / "study.db", FID, {})
    with pytest.raises(StorageInternalError) as caught:
        run(kept, Measure(), trials=1000)
    assert exit_code_of(tuning._study_error(small_disk / "study.db", caught.value)) == 74
    with pytest.raises(CannotWriteError, match=r"study .* cannot be written: .*database or disk is full; free space"):
        tuning._open_study(small_disk / "other.db", FID, {})


def test_the_page_names_the_winner_and_the_value_before() -> None:
    real = {"fid": 0.5, "kid": 0.001, "class_agreement": 0.9, "num_images": 20}
    first, best = Trial(0, OWN, numbers(2.0)), Trial(7, DecodingConfig(8, "halton"), numbers(1.5))
    result = TuningResult(FID, (first, best), (first, best), 10)
    page = make_page(result, real)
    assert "Trial 7 wins: fid/classifier was 2 and is now 1.5" in page.markdown
    assert "2 trials of 10 images were compared by fid/classifier (lower is better)" in page.markdown
    assert "have FID 0.50 and KID x 1000 1.00." in page.markdown.replace("\n", " ")
    assert "| trial | decoding | FID (classifier) | class agreement % |" in page.markdown
    assert "| **T 8, halton" in page.markdown
    page = make_page(replace(result, confirmed=(first,)), real)
    assert "Trial 0 wins, with fid/classifier 2: no other decoding is better." in page.markdown
