"""Registries: specs, plug-ins, broken plug-ins, a contract for every registered name, and lazy public names."""

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
from maskgit_pl.registry import PluginError, Registry
from maskgit_pl.schedules import MaskSchedule, Pow, mask_schedules
from maskgit_pl.transformer.losses import Objective, TokenLosses, objectives
from tests.installed_packages import install


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


def test_all_that_needs_no_argument_is_built_by_name(chairs):
    @chairs.register("bespoke")
    def bespoke(legs: int) -> Chair:
        return Chair(legs)

    chairs.register("stool")(lambda: Chair(3))
    assert chairs.build_all() == {"plain": Chair(4), "stool": Chair(3)}


def test_a_cell_of_a_notebook_may_register_its_class_again(chairs):
    for legs in (3, 5):
        factory = dataclass(frozen=True)(type("Stool", (), {"__module__": "__main__", "legs": legs}))
        chairs.register("stool")(factory)
    assert chairs.build("stool").legs == 5
    with pytest.raises(ValueError, match="the name is taken"):
        chairs.register("plain")(factory)


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ({"name": 3}, "chair must be a name or a mapping with the key 'name'.*plain"),
        (["plain"], r"chair must be a name or a mapping with the key 'name' .*plain\), got \['plain'\]"),
        ("plane", r"unknown chair 'plane': did you mean 'plain'\? known: bespoke, plain"),
        ({"name": "plain", "leg": 2}, "chair 'plain': unknown key 'leg': did you mean 'legs'"),
        ({"name": "plain", "legs": 0}, "plain has no legs"),
        ({"name": "bespoke", 3: 2}, "chair 'bespoke': unknown key .*known keys: legs"),
    ],
)
def test_refusals(spec, rule):
    def check(name: str, chair: Chair) -> None:
        if not chair.legs:
            raise ValueError(f"{name} has no legs")

    chairs: Registry[Chair] = Registry("chair", "maskgit_pl.tests.chairs", check=check)
    chairs.register("plain")(Chair)
    chairs.register("bespoke")(lambda legs: Chair(legs))
    with pytest.raises(ValueError, match=rule):
        chairs.build(spec)
    with pytest.raises(ValueError, match="chair must be a name, a mapping, or an object of a registered class"):
        chairs.spec(object())


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


def test_plugins_are_listed_without_being_loaded_and_built(chairs, site):
    source = "from tests.test_registry import Chair\nprint('loaded')"
    install(
        site,
        name="folding-chairs",
        entry_points=f"[{chairs.group}]\nfolding = loads:Chair\n",
        modules={"loads": source},
    )
    assert chairs.names() == ["plain", "folding"]
    assert "loads" not in sys.modules
    assert chairs.build({"name": "folding", "legs": 5}) == Chair(5)
    assert chairs.build_all() == {"folding": Chair(4), "plain": Chair(4)}


def test_the_output_of_a_plugin_goes_to_stderr(chairs, site, capsys):
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


def test_a_plugin_does_not_replace_a_built_in_part(chairs, site, caplog):
    source = "from tests.test_registry import Chair\ndef plain():\n    return Chair(1)\n"
    install(
        site, name="replaces", entry_points=f"[{chairs.group}]\nplain = replaces:plain\n", modules={"replaces": source}
    )
    assert chairs.build_all() == {"plain": Chair(4)}
    assert "chair 'plain': the name is taken" in caplog.text
    assert "package replaces (replaces:plain)" in caplog.text


def test_entry_points_that_cannot_be_parsed_leave_the_built_in_parts_usable(chairs, site, caplog):
    install(site, name="unparsable", entry_points=f"[{chairs.group}]\nno equals sign\n", modules={})
    assert chairs.names() == ["plain"]
    assert "cannot read the entry points of the installed packages" in caplog.text


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
    objectives, discriminators, perceptual_networks,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.kind)
def test_a_broken_plugin_names_its_package_and_the_others_stay_usable(registry, fault, site, monkeypatch, caplog):
    before = set(registry.build_all())
    source, text = FAULTS[fault]
    module = f"faulty{len(FAULTS) * REGISTRIES.index(registry) + list(FAULTS).index(fault)}"  # imported once
    install(
        site,
        name="faulty-package",
        entry_points=f"[{registry.group}]\nbroken = {module}:made\n",
        modules={} if source is None else {module: source},
    )
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
        (lambda r: r * torch.nan, r"must lie in \[0, 1\]"),
        (lambda r: 2 - 2 * r, r"must lie in \[0, 1\]"),
        (lambda r: (1 - r - 0.3 * torch.sin(3 * torch.pi * r)).clamp(0, 1), "it must never rise"),
        (lambda r: 1 - r / 2, "it must end at 0, got 0.5"),
        (lambda r: (1 - r) / 2, "it must start at 1, got 0.5"),
        (lambda r: (1 - r)[:-1], "in the shape of progress"),
        (lambda r: (1 - r).unsqueeze(0), "in the shape of progress"),
        (lambda r: (1 - r).round().long(), "it must return a float tensor.*got torch.int64"),
        (lambda r: [1.0, 0.0], "it must return a float tensor.*got list"),
    ],
    ids=["nan", "above 1", "rising", "never 0", "never 1", "shorter", "wider", "integer", "list"],
)
@pytest.mark.parametrize("num_tokens", [16, 1024])
def test_a_broken_mask_schedule_is_refused_by_name(monkeypatch, gamma, rule, num_tokens):
    class Broken(MaskSchedule):
        def __call__(self, progress: Tensor, asked: int) -> Tensor:
            return gamma(progress) if asked == num_tokens else 1 - progress

    monkeypatch.setitem(mask_schedules._factories, "broken", Broken)
    with pytest.raises(ValueError, match=rf"mask schedule 'broken': .*{rule}"):
        mask_schedules.build("broken")


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
        values, rows, is_masked = torch.ones(2), torch.arange(2), torch.ones(2, dtype=torch.bool)
        asked = {"targets": rows, "logits": torch.eye(2), "code_vectors": torch.eye(2)}
        return bool(made(TokenLosses(values, rows, 2, is_masked, **asked)).isfinite())
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


@pytest.mark.parametrize("package", LAZY)
def test_every_public_name_is_there_and_no_module_has_it(package):
    """Importing a module of the same name would replace the thing."""
    module = import_module(package)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    modules = {path.stem for path in Path(module.__file__).parent.iterdir()}
    assert modules.isdisjoint(module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018  # the access is what is tried
