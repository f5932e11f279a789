import json
from pathlib import Path

import pytest
import yaml

from maskgit_pl.runs.ablation_plan import AblationConfig, parse_factor
from maskgit_pl.runs.ablation_runs import AblationRuns
from tests.conftest import flags

TINY = Path(__file__).parents[1] / "tiny"


def open_runs(data: Path, pretrained: Path, folder: Path, *factors: str, overrides: tuple[str, ...] = (), **options):
    tiny = yaml.safe_load((TINY / "transformer.yaml").read_text())
    tiny["trainer"] |= {"max_steps": 3, "val_check_interval": 2}
    config = AblationConfig(
        tuple(parse_factor("--vary", text) for text in factors),
        dataset="shoes",
        runs=folder,
        data=data,
        tokenizer=pretrained / "tokenizer",
        overrides=(*flags(tiny), *overrides),
        **options,
    )
    return AblationRuns.open(config)


@pytest.mark.slow
def test_runs_are_named_by_what_determines_their_weights(tiny_shards, tiny_pretrained, tmp_path) -> None:
    where = (tiny_shards, tiny_pretrained, tmp_path)
    one = open_runs(*where, "model.network.depth=1,2", "decoding.guidance.scale=3")
    base, deep, guided = one.variants
    assert [each.label for each in one.variants] == ["base", "depth=2", "guidance.scale=3"]
    assert one.base == {"depth": 1, "guidance.scale": 1.0}
    assert one.folder_of(base, 0, 3) == one.folder_of(guided, 0, 3)
    assert guided.decoding is not None
    assert guided.decoding.scales()[-1] == 3
    keys = [(base, 0, 3), (base, 1, 3), (base, 0, 4), (deep, 0, 3)]
    assert len({one.folder_of(*key) for key in keys}) == 4
    assert one.num_trainings == 2 * len(one.config.seeds)
    assert open_runs(*where, "trainer.max_steps=4,5", seeds=(0, 1)).num_trainings == 6

    # The same variant under another label, in a grid, of another length, and with settings that do not affect weights.
    more = ("--trainer.val_check_interval=7", "--keep_last=5", "--trainer.max_steps=5")
    other = open_runs(*where, "model.network.depth=2,1", grid=True, overrides=more)
    assert [each.label for each in other.variants] == ["depth=2", "depth=1"]
    assert other.variants[other.reference].label == "depth=1"
    assert [each.digest for each in other.variants] == [deep.digest, base.digest]


def test_a_finished_run_under_another_label_is_reused(tiny_shards, tiny_pretrained, tmp_path) -> None:
    runs = open_runs(tiny_shards, tiny_pretrained, tmp_path, "model.network.depth=1,2")
    deep = runs.variants[1]
    own = runs.folder_of(deep, 0, 3)
    other = own.with_name(own.name.replace("depth-2", "base"))
    (other / "transformer").mkdir(parents=True)
    (other / "pretrained" / "transformer").mkdir(parents=True)
    (other / "pretrained" / "transformer" / "model.safetensors").touch()
    (other / "transformer" / "exported.json").write_text(json.dumps({"step": 3}))
    assert runs.train(deep, 0, 3).folder == other
