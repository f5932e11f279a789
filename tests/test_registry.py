from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from maskgit_pl import registry as registry_module
from maskgit_pl.guidance import GuidanceSchedule, guidance_schedules
from maskgit_pl.registry import Registry, describe, nearest
from maskgit_pl.schedules import MaskSchedule, mask_schedules

ARGUMENTS = {"pow": {"exponent": 3.0}}  # what a name needs beyond its defaults


@dataclass(frozen=True)
class Chair:
    legs: int = 4


@dataclass(frozen=True)
class EntryPoint:
    """What importlib.metadata gives of an installed package."""

    name: str
    value: str

    def load(self) -> type[Chair]:
        return Chair


@pytest.fixture
def chairs() -> Registry[Chair]:
    made: Registry[Chair] = Registry("chair", "maskgit_pl.tests.chairs")
    made.register("plain")(Chair)
    return made


def announce(monkeypatch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points)


def test_builds_from_a_name_and_from_a_mapping(chairs):
    assert chairs.build("plain") == Chair(4)
    spec = {"name": "plain", "legs": 3}
    assert chairs.build(spec) == Chair(3)
    assert spec == {"name": "plain", "legs": 3}  # the recipe's mapping is left as it was


def test_a_taken_name_is_refused_and_the_first_stays(chairs):
    with pytest.raises(ValueError, match=r"chair 'plain': the name is taken"):
        chairs.register("plain")(lambda: Chair(1))
    assert chairs.build("plain") == Chair(4)


def test_an_unknown_name_answers_with_the_nearest_and_the_list(chairs):
    chairs.register("stool")(Chair)
    with pytest.raises(ValueError, match=r"unknown chair 'plane': did you mean 'plain'\? known: plain, stool"):
        chairs.build("plane")
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("zzz", []) == "known: none"


def test_all_that_needs_no_argument_is_built_by_name(chairs):
    @chairs.register("bespoke")
    def bespoke(legs: int) -> Chair:
        return Chair(legs)

    chairs.register("stool")(lambda: Chair(3))
    assert chairs.build_all() == {"plain": Chair(4), "stool": Chair(3)}


def test_specs_are_told_in_a_few_words():
    assert describe("halton") == describe({"name": "halton"}) == "halton"
    assert describe(None) == "None"
    assert describe({"name": "remdm", "strategy": "loop", "eta": 0.4}) == "remdm (strategy loop, eta 0.4)"


@pytest.mark.parametrize("spec", [{}, {"legs": 3}, {"name": 3}])
def test_a_mapping_without_a_name_is_refused(chairs, spec):
    with pytest.raises(ValueError, match=r"chair: the mapping needs the key 'name'.*plain"):
        chairs.build(spec)


def test_a_spec_that_is_neither_name_nor_mapping_is_refused(chairs):
    with pytest.raises(TypeError, match="a name or a mapping with a name is needed, got list"):
        chairs.build(["plain"])


def test_unknown_arguments_are_refused_with_the_name(chairs):
    with pytest.raises(TypeError, match=r"chair 'plain': .*arms.*given \['arms'\]"):
        chairs.build({"name": "plain", "arms": 2})


def test_every_object_is_checked_when_it_is_built():
    def refuse(name: str, chair: Chair) -> None:
        if chair.legs < 3:
            raise ValueError(f"{name} falls over")

    checked: Registry[Chair] = Registry("chair", "maskgit_pl.tests.chairs", check=refuse)
    checked.register("plain")(Chair)
    assert checked.build("plain").legs == 4
    with pytest.raises(ValueError, match="plain falls over"):
        checked.build({"name": "plain", "legs": 2})


def test_entry_points_of_other_packages_are_listed_and_built(chairs, monkeypatch):
    announce(monkeypatch, EntryPoint("folding", "other:Folding"))
    assert chairs.names() == ["folding", "plain"]
    assert chairs.build({"name": "folding", "legs": 5}) == Chair(5)


def test_a_name_that_two_packages_announce_is_refused(chairs, monkeypatch):
    announce(monkeypatch, EntryPoint("folding", "one:Folding"), EntryPoint("folding", "two:Folding"))
    with pytest.raises(ValueError, match=r"'folding': announced twice, by one:Folding and two:Folding"):
        chairs.names()


@pytest.mark.parametrize(
    ("gamma", "rule"),
    [
        (lambda r: r * torch.nan, "its values must be finite"),
        (lambda r: 1 / r, "its values must be finite"),
        (lambda r: 2 - 2 * r, r"must lie in \[0, 1\]"),
        (lambda r: (1 - r - 0.3 * torch.sin(3 * torch.pi * r)).clamp(0, 1), "it must never rise"),
        (lambda r: 1 - r / 2, "it must end at 0, got 0.5"),
        (lambda r: (1 - r) / 2, "it must start at 1, got 0.5"),
        (lambda r: (1 - r)[:-1], "in the shape of progress"),
        (lambda r: (1 - r).unsqueeze(0), "in the shape of progress"),
        (lambda r: (1 - r).round().long(), "it must return a float tensor.*got torch.int64"),
        (lambda r: [1.0, 0.0], "it must return a float tensor.*got list"),
        (lambda r: 1 / 0, "it raised at 2 tokens: ZeroDivisionError"),
    ],
    ids=["nan", "infinite", "above 1", "rising", "never 0", "never 1", "shorter", "wider", "integer", "list", "raises"],
)
def test_a_broken_mask_schedule_is_refused_by_name(monkeypatch, gamma, rule):
    class Broken(MaskSchedule):
        def __call__(self, progress: Tensor, num_tokens: int) -> Tensor:
            return gamma(progress)

    monkeypatch.setitem(mask_schedules._factories, "broken", Broken)
    with pytest.raises(ValueError, match=rf"mask schedule 'broken': .*{rule}"):
        mask_schedules.build("broken")


@pytest.mark.parametrize("num_tokens", [2, 16, 49, 256, 1024])
def test_a_mask_schedule_is_checked_at_every_size(monkeypatch, num_tokens):
    class Rare(MaskSchedule):
        def __call__(self, progress: Tensor, asked: int) -> Tensor:
            return progress * torch.nan if asked == num_tokens else 1 - progress

    monkeypatch.setitem(mask_schedules._factories, "rare", Rare)
    with pytest.raises(ValueError, match=rf"mask schedule 'rare': .*\(at {num_tokens} tokens\)"):
        mask_schedules.build("rare")


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_a_broken_guidance_schedule_is_refused_by_name(monkeypatch, scale):
    class Broken(GuidanceSchedule):
        def __call__(self, position: float) -> float:
            return scale if position == 1 else 0.0

    monkeypatch.setitem(guidance_schedules._factories, "broken", Broken)
    with pytest.raises(ValueError, match=r"guidance schedule 'broken': scales must be finite and >= 0"):
        guidance_schedules.build("broken")


@pytest.mark.parametrize("name", mask_schedules.names())
@pytest.mark.parametrize("num_tokens", [2, 16, 49, 256, 1024])
def test_contract_mask_schedules_fall_from_1_to_0(name, num_tokens):
    gamma = mask_schedules.build({"name": name, **ARGUMENTS.get(name, {})})
    progress = torch.rand(3, 50, generator=torch.Generator().manual_seed(num_tokens))
    ratio = gamma(progress, num_tokens)
    assert ratio.shape == progress.shape
    assert ratio.dtype == torch.float32
    assert 0 <= ratio.min() <= ratio.max() <= 1
    falling = gamma(torch.linspace(0, 1, 101), num_tokens)
    assert (falling.diff() <= 0).all()
    assert falling[0] >= 1 - 1 / num_tokens - 1e-6
    assert falling[-1] <= 1 / num_tokens + 1e-6


@pytest.mark.parametrize("name", mask_schedules.names())
def test_contract_equal_specs_give_equal_frozen_objects(name):
    spec = {"name": name, **ARGUMENTS.get(name, {})}
    gamma = mask_schedules.build(spec)
    assert gamma == mask_schedules.build(spec)
    assert hash(gamma) == hash(mask_schedules.build(spec))


@pytest.mark.parametrize("name", guidance_schedules.names())
def test_contract_guidance_scales_are_finite_and_not_negative(name):
    schedule = guidance_schedules.build(name)
    scales = [schedule(step / 100) for step in range(101)]
    assert all(0 <= scale < float("inf") for scale in scales)
