import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.evaluation.decoders import tuning
from maskgit_pl.evaluation.decoders.comparison import every_selector
from maskgit_pl.evaluation.decoders.tuning import (
    Found,
    Ledger,
    SearchSpace,
    Trial,
    check_search,
    describe_decoding,
    following,
    key_of,
    plot_steps,
    schedule_curves,
    schedule_specs,
    search,
)
from maskgit_pl.evaluation.decoders.tuning_report import Figure8, as_markdown, draw_curves
from maskgit_pl.evaluation.drawing import spread
from maskgit_pl.evaluation.metrics import Distances
from maskgit_pl.schedules import Pow, mask_schedules

FID = "fid/classifier"
OWN = DecodingConfig(4, guidance={"name": "linear", "scale": 1.0})
SPACE = SearchSpace(OWN, tuple(spec for _, spec in every_selector()), (2, 4, 8), 256, guided=True)


def numbers(fid: float) -> dict[str, Any]:
    return {
        "class_agreement": 0.5,
        "diversity": 0.8,
        FID: fid,
        "kid/classifier": fid / 10,
        "steps_taken": 4.0,
        "seconds_per_image": 0.01,
    }


class FakeMeter:
    """A quality that depends on the guidance scale and, where the images are few, on luck."""

    def __init__(self, luck: float = 0.0) -> None:
        self.calls: list[tuple[DecodingConfig, int, int]] = []
        self.luck = luck
        self.measured = 0

    def __call__(self, decoding: DecodingConfig, *, num_images: int, seed: int, purpose: str) -> dict[str, Any]:
        self.calls.append((decoding, num_images, seed))
        scale = decoding.guidance["scale"] if isinstance(decoding.guidance, dict) else 0.0
        lucky = self.luck if len(self.calls) % 3 == 0 and seed < 1000 else 0.0
        return numbers(1 + scale - lucky)


def run(meter: FakeMeter, space: SearchSpace = SPACE, **options: Any) -> Found:
    return search(meter, space, **{"key": FID, "trials": 12, "num_images": 10, "seed": 0, **options})


def test_trials_are_a_function_of_seed_and_number() -> None:
    first, second = ([SPACE.trial(number, seed=3) for number in range(20)] for _ in range(2))
    assert first == second
    assert SPACE.trial(0, seed=3) == SPACE.trial(0, seed=4) == OWN
    assert [SPACE.trial(number, seed=4) for number in range(1, 20)] != first[1:]
    assert len({json.dumps(asdict(trial), default=str) for trial in first if trial}) == 20


def test_every_trial_can_be_decoded_and_all_parts_are_searched() -> None:
    made = [SPACE.trial(number, seed=0) for number in range(1, 200)]
    for decoding in made:
        assert decoding is not None
        decoding.decoder(mask_schedules.build("cosine")).plan([49], 49)
        decoding.scales()
        assert decoding.tokens_per_step is None
    selectors = {
        each.token_selector if isinstance(each.token_selector, str) else each.token_selector["name"] for each in made
    }
    assert selectors == {"confidence", "random", "halton", "margin", "entropy", "moment", "remdm"}
    assert {each.num_steps for each in made} == {2, 4, 8}
    temperatures = [each.sampling_temperature for each in made]
    assert any(isinstance(value, tuple) for value in temperatures)
    assert 1.0 in temperatures
    assert any(each.top_k for each in made)
    assert any(each.top_p for each in made)
    assert any(not any(each.scales()) for each in made)


def test_arguments_that_a_mapping_names_stay_and_a_model_without_null_class_keeps_its_guidance() -> None:
    own = DecodingConfig(4)
    space = SearchSpace(own, ({"name": "remdm", "strategy": "loop", "eta": 0.33},), (4,), 256, guided=False)
    for how in ("random", "grid"):
        for number in range(1, 9):
            decoding = space.trial(number, seed=0, how=how)
            assert isinstance(decoding.token_selector, dict)
            assert decoding.token_selector["eta"] == 0.33
            assert "choice_temperature" in decoding.token_selector
            assert decoding.guidance == own.guidance


def test_a_grid_visits_each_place_once_and_ends() -> None:
    space = SearchSpace(OWN, ("halton", "margin"), (2, 4), 256, guided=True)
    size = 2 * (1 + 3) * 4 * 3
    made = [space.trial(number, seed=0, how="grid") for number in range(1, size + 2)]
    assert made[-1] is None
    assert len({json.dumps(asdict(each)) for each in made[:-1]}) == size
    assert made[:-1] != [space.trial(number, seed=1, how="grid") for number in range(1, size + 1)]


def test_the_best_are_confirmed_with_fresh_noise_and_twice_the_images_the_own_decoding_among_them() -> None:
    meter = FakeMeter()
    found = run(meter)
    assert len(found.trials) == 12
    assert {call[1:] for call in meter.calls[:12]} == {(10, 0)}
    assert {call[1:] for call in meter.calls[12:]} == {(20, 1_000_000)}
    assert found.before.number == 0
    ranked = sorted(found.trials[1:], key=lambda trial: trial.numbers[FID])
    assert [trial.number for trial in found.confirmed[1:]] == [trial.number for trial in ranked[:3]]
    assert found.winner.number == ranked[0].number


def test_the_result_is_never_worse_than_the_own_decoding_where_it_was_confirmed() -> None:
    best = DecodingConfig(4, guidance={"name": "constant", "scale": 0.0})
    for seed in range(5):
        space = SearchSpace(best, SPACE.selectors, (4,), 256, guided=True)
        found = run(FakeMeter(luck=5.0), space, seed=seed)
        assert found.winner.numbers[FID] <= found.before.numbers[FID]
    assert run(FakeMeter(), SearchSpace(best, SPACE.selectors, (4,), 256, guided=True)).winner.numbers[FID] == 1


def test_a_search_that_wrote_its_recipe_goes_on_from_where_it_began(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "trials.jsonl", {})
    assert SPACE.resumed(ledger, trials=12, seed=0) == SPACE
    ledger.add(OWN, numbers(2.0), num_images=10, seed=0, purpose="trial 0")
    tuned = replace(SPACE, own=SPACE.trial(5, seed=0))
    assert tuned.resumed(ledger, trials=12, seed=0) == SPACE
    assert tuned.resumed(ledger, trials=5, seed=0) == tuned  # trial 5 is none of these
    foreign = replace(SPACE, own=DecodingConfig(3))
    assert foreign.resumed(ledger, trials=12, seed=0) == foreign


def test_the_trial_that_is_in_use_is_confirmed_though_others_were_luckier() -> None:
    found = run(FakeMeter())
    last = max(found.trials, key=lambda trial: trial.numbers[FID])
    again = run(FakeMeter(), current=last.decoding)
    assert [trial.number for trial in again.confirmed] == [
        0,
        last.number,
        *(each.number for each in found.confirmed[1:]),
    ]
    assert len(run(FakeMeter(), current=found.winner.decoding).confirmed) == 4


def test_more_is_better_where_the_metric_says_so() -> None:
    class Agreement(FakeMeter):
        def __call__(self, decoding: DecodingConfig, **options: Any) -> dict[str, Any]:
            measured = super().__call__(decoding, **options)
            return {**measured, "class_agreement": measured[FID]}

    found = run(Agreement(), key="class_agreement")
    assert found.winner.numbers["class_agreement"] == max(trial.numbers["class_agreement"] for trial in found.trials)


def test_a_budget_of_seconds_ends_the_trials_but_not_the_confirmation() -> None:
    found = run(FakeMeter(), seconds=1e-9)
    assert [trial.number for trial in found.trials] == [0]
    assert found.winner == found.before


def test_names_of_metrics_and_searches_are_checked() -> None:
    assert key_of("kid") == "kid/classifier"
    with pytest.raises(ValueError, match="--metric 'fdi': did you mean 'fid'"):
        key_of("fdi")
    with pytest.raises(ValueError, match="--search 'gird': did you mean 'grid'"):
        check_search("gird")


def test_a_ledger_gives_back_what_it_was_told(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "trials.jsonl"
    Ledger(file, {"data": "x"}).add(SPACE.trial(5, seed=0), numbers(2.0), num_images=10, seed=7, purpose="trial 5")
    again = Ledger(file, {"data": "x"})
    assert again.find(SPACE.trial(5, seed=0), num_images=10, seed=7) == numbers(2.0)
    for other in ({"num_images": 11, "seed": 7}, {"num_images": 10, "seed": 8}):
        assert again.find(SPACE.trial(5, seed=0), **other) is None
    assert again.find(SPACE.trial(6, seed=0), num_images=10, seed=7) is None
    head, line = file.read_text().splitlines()
    assert json.loads(head)["protocol"] == {"data": "x"}
    assert json.loads(line)["purpose"] == "trial 5"


def test_a_line_that_was_cut_off_is_forgotten_and_the_next_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    ledger = Ledger(file, {})
    for number in (1, 2):
        ledger.add(SPACE.trial(number, seed=0), numbers(number), num_images=10, seed=0, purpose="")
    file.write_text(file.read_text()[:-20])
    again = Ledger(file, {})
    assert again.find(SPACE.trial(1, seed=0), num_images=10, seed=0) == numbers(1)
    assert again.find(SPACE.trial(2, seed=0), num_images=10, seed=0) is None
    again.add(SPACE.trial(2, seed=0), numbers(2), num_images=10, seed=0, purpose="")
    assert Ledger(file, {}).find(SPACE.trial(2, seed=0), num_images=10, seed=0) == numbers(2)


def test_a_ledger_of_another_protocol_or_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    Ledger(file, {"data": "x", "split": "val"})
    with pytest.raises(ValueError, match=r"measured with another data; name another --out"):
        Ledger(file, {"data": "y", "split": "val"})
    for text, match in (
        ("{}\n", "not of the format"),
        ("[]\n", "not of the format"),
        ("nonsense\n", "line 1 is not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=match):
            Ledger(file, {"data": "x"})


def test_a_ledger_that_was_cut_off_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "trials.jsonl"
    for text in ("", '{"format": "mask'):
        file.write_text(text)
        Ledger(file, {"data": "x"}).add(OWN, numbers(1), num_images=10, seed=0, purpose="")
        assert Ledger(file, {"data": "x"}).find(OWN, num_images=10, seed=0) == numbers(1)
        file.unlink()


def test_schedules_are_drawn_at_a_few_numbers_of_steps_up_to_half_the_tokens() -> None:
    assert plot_steps(49) == (2, 3, 4, 6, 8, 12, 16, 24)
    assert plot_steps(16) == (2, 3, 4, 6, 8)
    assert plot_steps(3) == (2,)


def test_the_schedule_of_the_training_is_one_of_the_lines_whether_it_has_a_name_or_not() -> None:
    own, specs = schedule_specs(mask_schedules.build("cosine"))
    assert own == "cosine"
    assert specs["cosine"] is None
    assert specs["linear"] == "linear"
    assert "pow" not in specs  # it needs an argument
    own, specs = schedule_specs(Pow(2.5))
    assert own == "Pow(exponent=2.5)"
    assert specs[own] is None
    assert specs["cosine"] == "cosine"


def test_curves_measure_each_schedule_at_each_number_of_steps() -> None:
    meter, points = FakeMeter(), []
    own, curves = schedule_curves(
        meter, OWN, mask_schedules.build("cosine"), num_tokens=8, num_images=10, seed=0, on_point=points.append
    )
    assert own == "cosine"
    assert set(curves) == set(schedule_specs(mask_schedules.build("cosine"))[1])
    assert all(list(line) == [2, 3, 4] for line in curves.values())
    assert len(points) == len(meter.calls) == 3 * len(curves)
    assert {(call[0].mask_schedule, call[0].num_steps) for call in meter.calls} >= {(None, 2), ("linear", 4)}


def test_schedules_are_drawn_with_a_decoding_that_follows_them() -> None:
    entropy = Trial(1, DecodingConfig(4, "entropy"), numbers(1.0))
    plain = Trial(0, OWN, numbers(2.0))
    found = Found((plain, entropy), (plain, entropy), entropy, 20, 0)
    assert following(found, FID) == plain
    assert following(Found((entropy,), (entropy,), entropy, 20, 0), FID) is None


def test_a_decoding_is_told_without_what_is_as_usual() -> None:
    assert describe_decoding(DecodingConfig(8)) == "T 8, confidence, guidance constant"
    told = describe_decoding(
        DecodingConfig(
            4, guidance="linear", sampling_temperature=(1.2, 0.6), top_k=9, mask_schedule={"name": "pow", "exponent": 2}
        ),
        steps=False,
    )
    assert told == "confidence, guidance linear, temperature 1.2 to 0.6, top_k 9, mask_schedule pow (exponent 2)"


def curves(values: dict[str, list[float]]) -> tuning.Curves:
    return {name: {2 * (i + 1): numbers(value) for i, value in enumerate(line)} for name, line in values.items()}


FIGURE = Figure8(curves({"cosine": [3.0, 2.0], "linear": [9.0, 8.0], "log": [40.0, 2.01]}), "cosine", "halton", 10)


def test_the_page_says_what_won_and_how_good_it_was_before() -> None:
    own, other = Trial(0, OWN, numbers(2.0)), Trial(7, DecodingConfig(8, "halton"), numbers(1.5))
    floor = Distances(0.5, 0.0, 0.0, 20)
    options = {"key": FID, "command": "maskgit tune runs/x", "floor": floor, "accuracy": 0.9, "num_images": 10}
    page = as_markdown(Found((own, other), (own, other), other, 20, 0), **options, figure=FIGURE)
    assert "Trial 7 wins: fid/classifier 2 before, 1.5 now" in page
    assert '"token_selector": "halton"' in page
    assert "| cosine (trained) | 3.000 | **2.000** |" in page
    assert "Best: cosine at T = 4, 2.000" in page
    page = as_markdown(Found((own, other), (own, other), own, 20, 0), **options, figure=None)
    assert "nothing is changed" in page
    assert "json" not in page


@pytest.mark.parametrize("key", [FID, "kid/classifier", "class_agreement"])
def test_the_figure_is_drawn_for_every_metric(tmp_path: Path, key: str) -> None:
    draw_curves(FIGURE, tmp_path / "figure.png", key=key, floor=0.5)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_names_at_the_ends_of_lines_keep_their_order_and_their_distance() -> None:
    moved = spread({"a": 0.5, "b": 0.51, "c": 0.9, "d": 0.505}, least=0.1)
    assert [name for name, _ in sorted(moved.items(), key=lambda item: item[1])] == ["a", "d", "b", "c"]
    assert moved["c"] == 0.9
    assert (moved["a"] + moved["b"] + moved["d"]) / 3 == pytest.approx(0.505)
    heights = sorted(moved.values())
    assert all(high - low >= 0.1 - 1e-9 for low, high in pairwise(heights))
