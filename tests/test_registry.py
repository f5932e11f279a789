"""Packages whose public names are imported when they are first used."""

import math
import re
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskgit_pl.decoding import ParallelDecoder, SeededNoise
from maskgit_pl.decoding.guidance import GuidanceSchedule, guidance_scales, guidance_schedules
from maskgit_pl.decoding.selectors import TokenSelector, token_selectors
from maskgit_pl.masking import MaskPositions, MaskRatio, MaskSampler, mask_positions, mask_ratios
from maskgit_pl.networks.discriminators import DiscriminatorConfig, PatchDiscriminatorConfig, discriminators
from maskgit_pl.networks.features import LPIPSSpec, feature_networks, perceptual_networks
from maskgit_pl.networks.quantizers import quantizers
from maskgit_pl.objectives import Corruption, Objective, TokenLosses, corruptions, objectives
from maskgit_pl.registry import PluginError, Registry, describe, nearest
from maskgit_pl.schedules import MaskSchedule, Pow, mask_schedules
from tests.installed_packages import install

ARGUMENTS = {"pow": {"exponent": 3.0}}  # what a name needs beyond its defaults


@dataclass(frozen=True)
class Chair:
    legs: int = 4


@pytest.fixture
def chairs() -> Registry[Chair]:
    made: Registry[Chair] = Registry("chair", "maskgit_pl.tests.chairs")
    made.register("plain")(Chair)
    return made


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
    with pytest.raises(ValueError, match=r"chair must have the key 'name'.*plain"):
        chairs.build(spec)


def test_a_spec_that_is_neither_name_nor_mapping_is_refused(chairs):
    with pytest.raises(ValueError, match=r"chair must be a name or a mapping with the key 'name', got \['plain'\]"):
        chairs.build(["plain"])


def test_unknown_arguments_are_refused_with_the_name(chairs):
    with pytest.raises(ValueError, match="chair 'plain': unknown key 'leg': did you mean 'legs'"):
        chairs.build({"name": "plain", "leg": 2})
    chairs.register("bespoke")(lambda legs: Chair(legs))
    with pytest.raises(ValueError, match=r"chair 'bespoke': .*; given \["):
        chairs.build("bespoke")
    for arguments in ({"arms": 2}, {3: 2}):
        with pytest.raises(ValueError, match=r"chair 'bespoke': unknown key .*known keys: legs"):
            chairs.build({"name": "bespoke", **arguments})


def test_a_cell_of_a_notebook_may_register_its_class_again(chairs):
    for legs in (3, 5):
        factory = dataclass(frozen=True)(type("Stool", (), {"__module__": "__main__", "legs": legs}))
        chairs.register("stool")(factory)
    assert chairs.build("stool").legs == 5
    with pytest.raises(ValueError, match="the name is taken"):
        chairs.register("plain")(factory)


@pytest.mark.parametrize(
    ("part", "spec"),
    [
        (Pow(1.0), "linear"),
        (Pow(3), "cubic"),
        (Pow(2.5), {"name": "pow", "exponent": 2.5}),
        ("anything", "anything"),
        ({"name": "pow", "exponent": 2}, {"name": "pow", "exponent": 2}),
    ],
)
def test_an_object_has_the_spec_that_builds_it(part, spec):
    assert mask_schedules.spec(part) == spec


def test_an_object_of_a_class_without_a_name_is_refused():
    with pytest.raises(ValueError, match="must be a name, a mapping, or an object of a registered class"):
        mask_schedules.spec(Chair())


def test_every_object_is_checked_when_it_is_built():
    def refuse(name: str, chair: Chair) -> None:
        if chair.legs < 3:
            raise ValueError(f"{name} falls over")

    checked: Registry[Chair] = Registry("chair", "maskgit_pl.tests.chairs", check=refuse)
    checked.register("plain")(Chair)
    assert checked.build("plain").legs == 4
    with pytest.raises(ValueError, match="plain falls over"):
        checked.build({"name": "plain", "legs": 2})


def test_plugins_are_listed_without_being_loaded_and_built(chairs, site):
    source = "from tests.test_registry import Chair\nprint('loaded')"
    install(
        site,
        name="folding-chairs",
        entry_points=f"[{chairs.group}]\nfolding = loads:Chair\n",
        modules={"loads": source},
    )
    assert chairs.names() == ["folding", "plain"]
    assert "loads" not in sys.modules
    assert chairs.build({"name": "folding", "legs": 5}) == Chair(5)
    assert chairs.build_all() == {"folding": Chair(4), "plain": Chair(4)}


def test_what_a_plugin_prints_does_not_mix_with_the_output_of_a_command(chairs, site, capsys):
    source = (
        "from tests.test_registry import Chair\nprint('noise')\ndef talk():\n    print('more')\n    return Chair()\n"
    )
    install(site, name="talks", entry_points=f"[{chairs.group}]\ntalks = talks:talk\n", modules={"talks": source})
    assert chairs.build("talks") == Chair(4)
    assert capsys.readouterr() == ("", "noise\nmore\n")


def test_a_name_that_two_packages_announce_is_refused_and_the_others_stay(chairs, site, caplog):
    for name in ("one", "two"):
        install(site, name=name, entry_points=f"[{chairs.group}]\nfolding = {name}:Folding\n", modules={})
    text = r"chair 'folding' cannot be loaded: .*two packages .*package (one|two) \(.*\) and package (one|two) \("
    with pytest.raises(PluginError, match=text):
        chairs.build("folding")
    assert chairs.build_all() == {"plain": Chair(4)}
    assert "two packages define this name" in caplog.text


def test_a_plugin_does_not_replace_what_is_built_in(chairs, site, caplog):
    source = "from tests.test_registry import Chair\ndef plain():\n    return Chair(1)\n"
    install(
        site, name="replaces", entry_points=f"[{chairs.group}]\nplain = replaces:plain\n", modules={"replaces": source}
    )
    assert chairs.build_all() == {"plain": Chair(4)}
    assert "chair 'plain': the name is taken" in caplog.text
    assert "package replaces (replaces:plain)" in caplog.text


def test_entry_points_that_cannot_be_parsed_leave_the_others_usable(chairs, site, caplog):
    install(site, name="unparsable", entry_points=f"[{chairs.group}]\nno equals sign\n", modules={})
    assert chairs.names() == ["plain"]
    assert "unparsable-1.0.dist-info: cannot read the entry points" in caplog.text


FAULTS = {  # source of the module, and the message
    "no-module": (None, "cannot be loaded: ModuleNotFoundError: No module named"),
    "no-attribute": ("", "cannot be loaded: AttributeError: module 'faulty[0-9]*' has no attribute 'made'"),
    "syntax": ("def made(:", "cannot be loaded: File .* SyntaxError"),
    "exception": (
        "raise RuntimeError('first line\\nsecond \\x1b[31m')",
        r"cannot be loaded: RuntimeError: first line second \\x1b",
    ),
    "exit": ("import sys\nsys.exit(3)", "cannot be loaded: SystemExit: 3"),
    "base-exception": ("class Odd(BaseException): pass\nraise Odd()", "cannot be loaded: faulty[0-9]*.Odd"),
    "unprintable": (
        "class Odd(Exception):\n    def __str__(self): return 1 / 0\nraise Odd()",
        "cannot be loaded: faulty[0-9]*.Odd: <exception str.. failed>",
    ),
    "not-callable": ("made = 5", "cannot be loaded: TypeError: the entry point must be a class or a function, got 5"),
    "factory-raises": ("def made(): raise KeyError('x')", "cannot be built: KeyError: 'x'"),
    "factory-exits": ("def made(): raise SystemExit", "cannot be built: SystemExit"),
    "wrong-type": ("def made(): return 5", ".*5|'int' object is not callable"),
}
REGISTRIES = (
    mask_schedules, token_selectors, guidance_schedules, quantizers, feature_networks, mask_ratios, mask_positions,
    objectives, corruptions, discriminators, perceptual_networks,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_a_broken_plugin_is_named_with_its_package_and_leaves_all_other_names_usable(
    registry, fault, site, monkeypatch, caplog
):
    before = set(registry.build_all())
    source, text = FAULTS[fault]
    module = f"faulty{len(FAULTS) * REGISTRIES.index(registry) + list(FAULTS).index(fault)}"  # imported once
    install(
        site,
        name="faulty-package",
        entry_points=f"[{registry.group}]\nbroken = {module}:made\n",
        modules={} if source is None else {module: source},
    )
    monkeypatch.setattr(registry, "_loaded", {})
    expected = rf"{registry.kind} 'broken'[: ]+{text}.*; announced by package faulty-package \({module}:made\)$"
    for _ in range(2):
        with pytest.raises(PluginError, match=expected) as raised:
            registry.build("broken")
        assert str(raised.value).isprintable()
    assert "broken" in registry.names()
    assert set(registry.build_all()) == before
    assert re.search(expected, caplog.messages[-1])


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
        (lambda r: 1 / 0, "it raised ZeroDivisionError.* at 2 tokens"),
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
        def __call__(self, progress: float) -> float:
            return scale if progress == 1 else 0.0

    monkeypatch.setitem(guidance_schedules._factories, "broken", Broken)
    with pytest.raises(
        ValueError, match=r"guidance schedule 'broken': the scale at progress 1 must be .* in \[0, 10000\], got"
    ):
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


STRANGE = (
    float("nan"), float("inf"), -float("inf"), -1, -1e300, -1e-320, 0, 0.0, 1e-320, 1e-12, 0.5, 1, 1.0, 2, 1e12, 1e308,
    10**30, 10**400, True, False, "1", "nan", None, [1.0], {"a": 1}, "x" * 1000, "two\nlines",
)  # fmt: skip
FIELDS = [
    (registry, name, field.name)
    for registry in REGISTRIES
    for name in registry.names()
    if isinstance(registry._factories.get(name), type)
    for field in fields(registry._factories[name])
    if field.init
]


def works(made: object) -> bool:
    """Returns True if an object of any registry gives finite numbers."""
    if isinstance(made, MaskSchedule):
        return bool(made(torch.rand(100), 256).isfinite().all())
    if isinstance(made, GuidanceSchedule):
        return all(math.isfinite(scale) for scale in guidance_scales(made, 7))
    if isinstance(made, TokenSelector):
        decoder = ParallelDecoder(mask_schedules.build("cosine"), made, num_steps=4)
        tokens = torch.full((2, 16), 5)
        logits = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))
        noise = SeededNoise(torch.arange(2), 16)
        *_, last = decoder.steps(
            lambda tokens, positions: logits.gather(1, positions.unsqueeze(-1).expand(-1, -1, 5)),
            tokens, noise, mask_token_id=5, grid=(4, 4),
        )  # fmt: skip
        return bool((last.tokens < 5).all())
    if isinstance(made, MaskRatio | MaskPositions):
        kind = "mask_ratio" if isinstance(made, MaskRatio) else "mask_positions"
        sampler, slot = MaskSampler(mask_schedules.build("cosine"), 0, **{kind: made}), torch.arange(8)
        mask = sampler.mask(16, index=slot, epoch=slot, position=slot, global_batch=8, grid=(4, 4))
        return bool(mask.any(1).all())
    if isinstance(made, Objective):
        return bool(made(TokenLosses(torch.ones(2), torch.arange(2), 2, slopes=torch.ones(2))).isfinite())
    if isinstance(made, Corruption):
        return 0 < made.fraction < 1
    if hasattr(made, "label") or isinstance(made, LPIPSSpec):
        return isinstance(getattr(made, "label", ""), str)  # networks of features read files when they are made
    if isinstance(made, DiscriminatorConfig | PatchDiscriminatorConfig):
        return works_as_discriminator(made)
    return works_as_quantizer(made)


def works_as_quantizer(made) -> bool:
    """Returns True if a quantizer trains three steps with finite losses and codes."""
    levels = getattr(made, "levels", (2, 2))  # those of fsq determine its sizes
    quantizer = made.create(codebook_size=math.prod(levels), code_dim=len(levels))
    for step in range(3):
        output = quantizer(torch.randn(1, len(levels), 3, 3, generator=torch.Generator().manual_seed(step)))
        quantizer.update([output.tokens], [output.features], seed=0, step=step)
    return bool(output.loss.isfinite() and quantizer.lookup(torch.arange(4)).isfinite().all())


def works_as_discriminator(made: DiscriminatorConfig | PatchDiscriminatorConfig) -> bool:
    """Returns True if a discriminator gives finite logits, or refuses the size of the images by name."""
    try:
        with torch.device("meta"):
            logits = made.create(in_channels=3, image_size=32)(torch.rand(2, 3, 32, 32))
    except ValueError as error:
        return str(error).startswith("discriminator ")
    return logits.shape[0] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("registry", "name", "field"), FIELDS, ids=lambda part: getattr(part, "kind", str(part)))
def test_every_value_of_every_argument_is_refused_by_name_or_works(registry, name, field):
    own = registry._factories[name].__annotations__
    others = {key: given for key, given in {"weights": "x", "model": "resnet18", "folder": "z"}.items() if key in own}
    refused = []
    for value in STRANGE:
        try:
            made = registry.build({"name": name, **others, field: value})
        except ValueError as error:
            refused.append(str(error))
        else:
            assert works(made), value
    assert refused
    for text in refused:
        assert re.match(rf"{registry.kind} '{name}'[.: ]+({registry.kind} )?{field} must be ", text), text
        assert text.isprintable()
        assert len(text) < 400


PACKAGE = Path(__file__).parents[1] / "maskgit_pl"
LAZY = sorted(
    ".".join(["maskgit_pl", *file.parent.relative_to(PACKAGE).parts])
    for file in PACKAGE.rglob("__init__.py")
    if re.search(r"^__getattr__ = lazy_names\(", file.read_text(), re.MULTILINE)
)


def test_the_packages_are_found():
    assert {"maskgit_pl.decoding", "maskgit_pl.evaluation", "maskgit_pl.pipeline", "maskgit_pl.runs"} < {*LAZY}


@pytest.mark.parametrize("package", LAZY)
def test_every_public_name_is_there(package):
    module = import_module(package)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("package", LAZY)
def test_no_module_has_the_name_of_a_public_thing(package):
    """Importing the module would replace the thing."""
    module = import_module(package)
    modules = {path.stem for path in Path(module.__file__).parent.iterdir()}
    assert modules.isdisjoint(module.__all__)


@pytest.mark.parametrize("package", LAZY)
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        import_module(package).nothing  # noqa: B018  # the access is what is tried
