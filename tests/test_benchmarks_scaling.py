"""The benchmark of scaling at tiny sizes: what is counted is what the formulas say, and its tables are whole."""

import dataclasses
import json

import pytest

from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from tests.benchmark_scripts import benchmark_script

CONFIG = TransformerConfig(16, 3, (4, 4), embed_dim=32, depth=2, num_heads=4, mlp_dim=64, class_dropout=0.0)
VQGAN = VQGANConfig(
    1,
    base_channels=8,
    channel_multipliers=(1, 1),
    num_res_blocks=1,
    num_groups=2,
    codebook_size=16,
    code_dim=4,
    quantizer="ema",
)


@pytest.fixture
def scaling():
    with benchmark_script("scaling") as script:
        yield script


def test_what_is_counted_is_what_the_formulas_say(scaling, monkeypatch):
    monkeypatch.setattr(scaling.DiscriminatorConfig, "widths", lambda *_: (8, 8, 8))
    counted = scaling.count_all(CONFIG, VQGAN, 16, [2, 5, 100])
    assert len(counted) == 3 * 4
    assert {(one.model, one.strategy) for one in counted} == {
        ("transformer", "ddp"), ("transformer", "fsdp"), ("tokenizer", "ddp"),
    }  # fmt: skip
    for one in counted:
        assert one.shard == one.expected_shard > 0
        assert one.traffic == one.expected
        assert one.calls > 0
        assert json.loads(json.dumps(dataclasses.asdict(one)))["ranks"] == one.ranks
    table = scaling.format_table([one.row() for one in counted]).splitlines()
    assert len(table) == 2 + len(counted)
    assert len({line.count("|") for line in table}) == 1


def test_what_is_expected_follows_the_bandwidth(scaling):
    with scaling.simulate_ranks(8):
        counted = [scaling.count_transformer_fsdp(CONFIG, 8, "32-true")]
    (row,) = scaling.estimate_times(counted, CONFIG)
    times = [float(value) for name, value in row.items() if name.startswith("traffic")]
    assert times == sorted(times, reverse=True)
    assert row["global batch"] == "256"
