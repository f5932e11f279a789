import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskgit_pl.evaluation.ablation import AblationRuns
from maskgit_pl.runs.variants import AblationConfig, parse_factor
from tests.conftest import flags

TINY = Path(__file__).parents[1] / "tiny"


def open_runs(
    data: Path, pretrained: Path, folder: Path, *factors: str, overrides: tuple[str, ...] = (), **options: Any
) -> AblationRuns:
    tiny = yaml.safe_load((TINY / "transformer.yaml").read_text())
    tiny["trainer"] |= {"max_steps": 3, "val_check_interval": 2}
    config = AblationConfig(
        tuple(parse_factor("--vary", text) for text in factors),
        dataset="shoes",
        runs_folder=folder,
        tokenizer=pretrained / "tokenizer",
        overrides=(*flags(tiny), *overrides),
        **options,
    )
    return AblationRuns(config, data)


@pytest.mark.slow
def test_runs_are_named_by_what_determines_their_weights(tiny_shards, tiny_pretrained, tmp_path) -> None:
    where = (tiny_shards, tiny_pretrained, tmp_path)
    runs = open_runs(*where, "model.network.depth=1,2", "decoding.guidance.scale=3")
    base, same, deep, guided = runs.variants
    assert [built.variant.label for built in runs.variants] == ["base", "depth=1", "depth=2", "guidance.scale=3"]
    assert runs.base == {"depth": 1, "guidance.scale": 1.0}
    assert runs.folder_of(base, 0) == runs.folder_of(guided, 0)
    assert base.digest == same.digest
    assert guided.decoding is not None
    assert guided.decoding.scales()[-1] == 3
    longer = open_runs(*where, "trainer.max_steps=4")
    folders = {runs.folder_of(*key) for key in [(base, 0), (base, 1), (deep, 0)]}
    assert len(folders | {longer.folder_of(longer.variants[1], 0)}) == 4

    more = ("--trainer.val_check_interval=7", "--keep_last=5")  # which do not affect weights
    again = open_runs(*where, "model.network={depth: 2}", overrides=more)
    assert [variant.digest for variant in again.variants] == [base.digest, deep.digest]
    assert again.base == {"depth": 1}


def test_a_finished_run_under_another_label_is_reused(tiny_shards, tiny_pretrained, tmp_path) -> None:
    runs = open_runs(tiny_shards, tiny_pretrained, tmp_path, "model.network.depth=2")
    own = runs.folder_of(runs.variants[1], 0)
    other = own.with_name(own.name.replace("depth-2", "base"))
    (other / "transformer").mkdir(parents=True)
    (other / "transformer" / "exported.json").write_text(json.dumps({"step": 3}))
    assert runs.train(runs.variants[1], 0).run == other
