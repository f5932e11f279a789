"""``trainer.precision: auto``: what it chooses, and that a run keeps it when it resumes on another device."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from maskgit_pl import runs
from maskgit_pl.runs import resolve
from maskgit_pl.runs.ablation_plan import AblationConfig, Factor
from maskgit_pl.runs.ablation_runs import AblationRuns
from maskgit_pl.runs.preflight_report import Machines
from maskgit_pl.runs.resolve import choose_precision
from tests.conftest import flags

TINY = Path(__file__).parents[1] / "tiny"
NAMES = {"tokenizer": "base_channels", "transformer": "embed_dim"}


@pytest.fixture
def bfloat16(monkeypatch):
    """Sets whether the device has instructions for bfloat16; returns the devices that were asked for."""
    asked = []

    def set_to(*, exists: bool) -> list[str]:
        def has_bfloat16(device: str) -> bool:
            asked.append(device)
            return exists

        monkeypatch.setattr(resolve, "has_bfloat16", has_bfloat16)
        return asked

    return set_to


def config(stage: str, width: object, given: str = "auto", **trainer: object) -> dict:
    trainer = {"precision": given, "strategy": "auto", "accelerator": "auto", **trainer}
    return {"trainer": trainer, "model": {"network": {NAMES[stage]: width}}}


@pytest.mark.parametrize(
    ("stage", "width", "exists", "chosen"),
    [
        ("tokenizer", 63, True, "32-true"),
        ("tokenizer", 64, True, "bf16-mixed"),
        ("tokenizer", 64, False, "32-true"),
        ("transformer", 255, True, "32-true"),
        ("transformer", 256, True, "bf16-mixed"),
        ("transformer", 256, False, "32-true"),
    ],
)
def test_wide_networks_use_bfloat16_where_the_device_has_it(stage, width, exists, chosen, bfloat16, tmp_path):
    bfloat16(exists=exists)
    assert choose_precision(config(stage, width), stage, tmp_path) == chosen
    for given in ("32-true", "bf16-mixed", "16-mixed"):  # the last one has an error of its own
        assert choose_precision(config(stage, width, given), stage, tmp_path) == given


def test_the_device_of_the_run_is_asked_and_a_named_gpu_is_not(bfloat16, tmp_path, monkeypatch):
    asked = bfloat16(exists=False)
    monkeypatch.setattr(resolve, "default_device", lambda: "cuda")
    for accelerator in ("cpu", "auto", "gpu"):
        choose_precision(config("transformer", 256, accelerator=accelerator), "transformer", tmp_path)
    assert asked == ["cpu", "cuda", "cuda"]
    assert choose_precision(config("transformer", 256), "transformer", tmp_path, gpu="h100") == "bf16-mixed"
    assert len(asked) == 3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_ranks_do_not_choose_each_for_itself(strategy, bfloat16, tmp_path):
    asked = bfloat16(exists=True)
    assert choose_precision(config("transformer", 256, strategy=strategy), "transformer", tmp_path) == "32-true"
    assert asked == []


@pytest.mark.parametrize("width", [[256, 512], "wide", None, {"first": 256}])
def test_the_width_of_a_plugin_is_what_it_likes(width, bfloat16, tmp_path):
    bfloat16(exists=True)
    assert choose_precision(config("transformer", width), "transformer", tmp_path) == "32-true"


def test_doctor_knows_the_width_of_pretrained_weights(tiny_pretrained, tmp_path):
    (tmp_path / "wide.yaml").write_text("model: {network: {embed_dim: 256}}")  # the weights have 16
    recipe = runs.Recipe.read("transformer", names=[str(tmp_path / "wide.yaml")])
    for given, chosen in ((tiny_pretrained, "32-true"), (None, "bf16-mixed")):
        found = runs.preflight(recipe, run=tmp_path / "one", machines=Machines(gpu="h100"), pretrained=given)
        (check,) = [check for check in found.checks if check.name == "strategy"]
        assert check.text == f"auto, {chosen}, 1 node x 1 device"


def test_an_ablation_has_one_precision_on_each_device(bfloat16, tiny_shards, tiny_pretrained, tmp_path):
    tiny = flags(yaml.safe_load((TINY / "transformer.yaml").read_text()))
    ablation = AblationConfig(
        factors=(Factor("model.network.embed_dim", ("192", "256")),),
        data=tiny_shards,
        tokenizer=tiny_pretrained / "tokenizer",
        runs=tmp_path,
        overrides=tiny,
    )
    digests = []
    for exists in (True, False):
        bfloat16(exists=exists)
        opened = AblationRuns.open(ablation)
        assert {each.recipe["trainer"]["precision"] for each in opened.variants} == {"32-true"}
        assert "--trainer.precision=32-true" in opened.config.overrides  # the trainings get it, too
        digests.append([each.digest for each in opened.variants])
    assert digests[0] == digests[1]
    given = replace(ablation, overrides=[*tiny, "--trainer.precision=bf16-mixed"])
    assert {each.recipe["trainer"]["precision"] for each in AblationRuns.open(given).variants} == {"bf16-mixed"}


def wide(**trainer: object) -> runs.Recipe:
    tiny = [*flags(yaml.safe_load((TINY / "transformer.yaml").read_text())), "--model.network.embed_dim=256"]
    more = [f"--trainer.{key}={value}" for key, value in trainer.items()]
    return runs.Recipe.read("transformer", overrides=[*tiny, "--trainer.accelerator=cpu", *more])


def recorded(run: Path) -> str:
    return yaml.safe_load((run / "transformer" / "config.yaml").read_text())["trainer"]["precision"]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["bf16-mixed", "32-true"])
def test_a_run_keeps_its_precision_on_a_device_that_would_choose_another(
    first, bfloat16, tiny_shards, tiny_pretrained, tmp_path, caplog
):
    caplog.set_level("INFO")
    run = tmp_path / "runs" / "one"
    where = {"run": run, "data": tiny_shards, "tokenizer": tiny_pretrained / "tokenizer"}
    bfloat16(exists=first == "bf16-mixed")
    runs.fit(wide(max_steps=1), **where)
    assert recorded(run) == first
    assert (f"{run}/transformer: trainer.precision auto: bf16-mixed" in caplog.messages) == (first == "bf16-mixed")
    bfloat16(exists=first != "bf16-mixed")
    described = runs.dry_run(wide(max_steps=2), **where)
    assert described["devices"] == f"1 x cpu, {first}"
    runs.fit(wide(max_steps=2), **where)
    assert recorded(run) == first
    # Without its record the run could not know; the message names the file.
    (run / "transformer" / "config.yaml").write_text("trainer: [")
    runs.fit(wide(max_steps=3), **where)
    assert recorded(run) != first
    assert any("config.yaml" in text and "trainer.precision is chosen again" in text for text in caplog.messages)


@pytest.mark.slow
def test_a_step_of_a_wide_network_multiplies_in_the_chosen_precision(bfloat16, tiny_shards, tiny_pretrained, tmp_path):
    where = {"data": tiny_shards, "tokenizer": tiny_pretrained / "tokenizer"}
    weights = []
    for exists, given in ((True, "auto"), (True, "bf16-mixed"), (False, "auto"), (False, "32-true")):
        bfloat16(exists=exists)
        run = tmp_path / "runs" / f"{exists}-{given}"
        trained = runs.fit(wide(max_steps=1, precision=given), run=run, **where)
        weights.append((trained.pretrained / "transformer" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[2] == weights[3]
    assert weights[0] != weights[2]
