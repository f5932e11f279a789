"""Training with other mask ratios, positions, and objectives: steps by hand, resume, and what is refused."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from maskgit_pl.data import Batch
from maskgit_pl.losses import MaskedCrossEntropy
from maskgit_pl.masking import UniformRatio
from maskgit_pl.mvtm import MaskedTokenModel
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.schedules import Pow
from maskgit_pl.training.checkpoints import FolderCheckpointIO, newest_checkpoint
from maskgit_pl.training.optimizers import LearningRate
from tests.short_runs import assert_equal, data, fit, masked_model

CONFIG = TransformerConfig(16, 3, (4, 4), embed_dim=16, depth=2, num_heads=2, mlp_dim=32, dropout=0.1)
ALL = {
    "mask_ratio": "truncated_normal",
    "mask_positions": "halton",
    "objective": {"name": "masked_cross_entropy", "visible_weight": 0.5},
}
VARIANTS = [
    ALL,
    {"mask_ratio": {"name": "uniform", "low": 0.2}, "ema_decay": 0.0},
    {"network": replace(CONFIG, num_token_groups=2)},
]


def model(**options) -> MaskedTokenModel:
    torch.manual_seed(0)
    network, tokenizer = options.pop("network", CONFIG), options.pop("tokenizer", "unused")
    return masked_model(network, tokenizer, rate=LearningRate(1e-2), **{"ema_decay": 0.9, **options})


def batch(rows: int = 8) -> Batch:
    index = torch.arange(rows)
    tokens = torch.randint(16, (rows, 16), generator=torch.Generator().manual_seed(5))
    return Batch(tokens, index % 3, index, torch.zeros_like(index), index, index >= 0)


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_resumed_run_equals_a_straight_one_bit_exact(tiny_shards, tiny_pretrained, tmp_path, options):
    def train(run: str, steps: int, resume=None):
        module = model(**{"tokenizer": tiny_pretrained / "tokenizer", **options})
        return fit(module, data(tiny_shards), steps=steps, folder=tmp_path / run, resume=resume, limit_val_batches=0)

    straight = train("a", 8)
    first, second = train("b", 5), train("b", 8, newest_checkpoint(tmp_path / "b"))
    assert first.losses + second.losses == straight.losses
    ends = [FolderCheckpointIO().load_checkpoint(newest_checkpoint(tmp_path / run)) for run in "ab"]
    assert_equal(ends[0]["state_dict"], ends[1]["state_dict"])


def losses_of(module: MaskedTokenModel, given: Batch):
    """Returns the batch with its draws, and the losses, without class dropout."""
    given = module._with_draws(given)
    given = given._replace(draws=given.draws._replace(labels=given.labels))
    return given, module._run_step(given)


def test_parts_of_the_configuration_may_be_objects():
    config = model(mask_schedule=Pow(2.0), objective=MaskedCrossEntropy(0.5), mask_ratio=UniformRatio()).config
    assert (config.mask_schedule, config.mask_ratio) == ("square", "uniform")
    assert config.objective == {"name": "masked_cross_entropy", "visible_weight": 0.5}
    assert config.built_objective == MaskedCrossEntropy(0.5)


def test_a_subclass_with_an_optimizer_of_its_own_trains_at_its_rate(tiny_shards, tiny_pretrained, tmp_path):
    class Plain(MaskedTokenModel):
        def configure_optimizers(self):
            return torch.optim.SGD(self.transformer.parameters(), lr=0.25)

    module = Plain(masked_model(CONFIG, tiny_pretrained / "tokenizer").config)
    before = module.transformer.token_embedding.weight.clone()
    fit(module, data(tiny_shards), steps=2, folder=tmp_path)
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == 0.25
    assert not torch.equal(before, module.transformer.token_embedding.weight)


def test_the_weighted_loss_by_hand():
    network, given = replace(CONFIG, dropout=0.0), batch()
    module = model(network=network, objective=ALL["objective"], label_smoothing=0.0)
    drawn, found = losses_of(module, given)
    mask = drawn.draws.mask
    logits = module.transformer(given.content.masked_fill(mask, network.mask_token_id), given.labels, vocabulary="all")
    each = cross_entropy(logits.transpose(1, 2), given.content, reduction="none")
    weights = torch.where(mask, 1.0, 0.5)
    torch.testing.assert_close(found.loss, ((each * weights).sum(1) / weights.sum(1)).mean())
    torch.testing.assert_close(found.token_losses, each.flatten())
    assert torch.equal(drawn.draws.is_masked, mask.flatten())  # logs are of masked tokens only
