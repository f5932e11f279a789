from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation import tuning
from maskgit_pl.evaluation.options import TuningOptions
from maskgit_pl.evaluation.search_space import SearchSpace
from maskgit_pl.evaluation.tuning import Trial, TuningResult, add_curves, make_page, measure_curves, search, tune
from maskgit_pl.schedules import Pow, mask_schedules
from tests.evaluation.searching import FID, OWN, SPACE, numbers
from tests.hostile_words import HOSTILE
from tests.test_errors import structure

SMALL = replace(SPACE, selectors=("halton", "confidence"), schedules=())


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
    study: optuna.Study, measure: Any, space: SearchSpace = SMALL, trials: int = 12, **options: Any
) -> TuningResult:
    metric = options.pop("metric", FID)
    return search(study, space, measure, metric=metric, trials=trials, num_images=10, options=TuningOptions(**options))


def test_the_best_trials_and_the_own_decoding_are_measured_again_with_other_noise_and_twice_the_images(study) -> None:
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
def test_a_search_that_was_stopped_continues_to_the_trials_of_one_that_was_not(study, tmp_path) -> None:
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


def test_another_seed_gives_other_trials(study) -> None:
    assert run(study, Measure()).trials[1:] != run(optuna.create_study(), Measure(), seed=1).trials[1:]


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


def test_a_time_limit_ends_the_trials_but_not_the_second_measurement(study) -> None:
    result = run(study, Measure(), seconds=1e-9)
    assert [trial.number for trial in result.trials] == [0]
    assert result.winner == result.before


def test_the_study_is_the_file_of_its_path_and_a_damaged_one_is_named(tmp_path) -> None:
    file = tmp_path / "odd?%41" / "study.db"
    tuning._open_study(file, FID, {})
    assert file.is_file()
    file.write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match=r"study .*study\.db cannot be opened: .*not a database; move it away"):
        tuning._open_study(file, FID, {})


def test_a_missing_optuna_is_named(monkeypatch) -> None:
    monkeypatch.setattr(tuning, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tune requires the package optuna: pip install 'maskgit_pl\[tune\]'"):
        tune("nowhere")


def test_invalid_options_are_refused_before_the_run_is_opened() -> None:
    with pytest.raises(
        ValueError, match=r"metric must be one of fid, sfid, kid, .*, agreement, got 'fdi'; did you mean 'fid'"
    ):
        tune("nowhere", metric="fdi")
    for name, value in (("seconds", 0), ("seconds", float("nan")), ("seed", -1)):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            TuningOptions(**{name: value})


PLAIN = Trial(0, OWN, numbers(2.0))
ENTROPY = Trial(1, DecodingConfig(4, "entropy"), numbers(1.0))
CURVES = {"cosine (trained)": {2: 3.0, 4: 2.0}, "log": {2: 40.0, 4: 2.01}}
REAL = {"fid": 0.5, "kid": 0.001, "class_agreement": 0.9, "num_images": 20}


def model(schedule: Any) -> Any:
    transformer = SimpleNamespace(schedule_for=lambda task: schedule)
    return SimpleNamespace(transformer=transformer, outline=SimpleNamespace(num_tokens=8))


@pytest.mark.parametrize(
    ("schedule", "name"), [(mask_schedules.build("cosine"), "cosine"), (Pow(2.5), "Pow(exponent=2.5)")]
)
def test_curves_have_each_schedule_at_each_number_of_steps_and_that_of_the_training_first(schedule, name) -> None:
    measure, points = Measure(), []
    result = TuningResult(FID, (PLAIN,), (PLAIN,), 10)
    curves = measure_curves(measure, model(schedule), OWN, result, seed=0, bars=lambda title, total: points.append)
    assert list(curves) == [f"{name} (trained)", *sorted(set(mask_schedules.build_all()) - {name})]
    assert all(list(line) == [2, 3, 4] for line in curves.values())
    assert len(points) == len(measure.calls) == 3 * len(curves)
    assert {(call[0].mask_schedule, call[0].num_steps) for call in measure.calls} >= {(None, 2), ("linear", 4)}
    assert {call[0].token_selector for call in measure.calls} == {"confidence"}


def test_the_curves_are_those_of_the_best_decoding_that_follows_a_schedule() -> None:
    found = tuning._best_that_follows_a_schedule(TuningResult(FID, (PLAIN, ENTROPY), (PLAIN, ENTROPY), 10))
    assert found == OWN
    assert tuning._best_that_follows_a_schedule(TuningResult(FID, (ENTROPY,), (ENTROPY,), 10)) is None


def test_the_page_names_the_winner_and_the_value_before() -> None:
    other = Trial(7, DecodingConfig(8, "halton"), numbers(1.5))
    result = TuningResult(FID, (PLAIN, other), (PLAIN, other), 10)
    plain = make_page(result, REAL)
    page = add_curves(plain, result, CURVES, OWN, 0.5)
    assert "Trial 7 wins: fid/classifier was 2 and is now 1.5" in page.markdown
    assert "2 trials of 10 images were compared by fid/classifier (lower is better)" in page.markdown
    assert "have FID 0.50 and KID x 1000 1.00." in page.markdown.replace("\n", " ")
    assert "| trial | decoding | FID (classifier) | class agreement % |" in page.markdown
    assert '"token_selector": "halton"' in page.markdown
    assert "| cosine (trained) | 3.000 | 2.000 |" in page.markdown
    assert list(page.pictures) == ["tuning.png"]
    page = make_page(replace(result, confirmed=(PLAIN,)), REAL)
    assert "Trial 0 wins, with fid/classifier 2: no other decoding is better." in page.markdown
    assert not page.pictures


def test_a_trial_without_a_time_has_an_empty_cell() -> None:
    timeless = replace(PLAIN, numbers={name: value for name, value in numbers(2.0).items() if "seconds" not in name})
    page = make_page(TuningResult(FID, (timeless,), (timeless,), 10), REAL)
    assert "| **0.800** |  |" in page.markdown


@pytest.mark.slow
@pytest.mark.parametrize("word", [word for word in HOSTILE if word.strip()], ids=lambda word: ascii(word[:30]))
def test_no_name_of_a_schedule_or_selector_becomes_markup(word: str, monkeypatch) -> None:
    monkeypatch.setattr(tuning, "draw_curves", lambda *_, **__: b"")

    def page(name: str) -> list[str]:
        trials = Trial(0, DecodingConfig(8, name), numbers(2.0)), Trial(7, DecodingConfig(8, name), numbers(1.5))
        result = TuningResult(FID, trials, trials, 10)
        curves = {name: {2: 1.0}, "log": {2: 2.0}}
        text = add_curves(make_page(result, REAL), result, curves, trials[0].decoding, 0.5).markdown
        assert all(line.isprintable() for line in text.split("\n"))
        return [each for each in structure(text) if each != "code_inline"]

    assert page(word) == page("name")
