"""Stage 2 of the autoregressive baseline: its loss, resume, samples, and settings that are refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from maskgit_pl.data import Batch
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.config import AutoregressiveDecoding
from maskgit_pl.masking import true_positions
from maskgit_pl.networks.adaln import AdaLNConfig
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.pretrained.networks import load_transformer
from maskgit_pl.training.optimizers import LearningRate
from maskgit_pl.transformer.autoregressive import AutoregressiveModel
from tests.short_runs import autoregressive_model, data, fit, masked_model

CONFIG = TransformerConfig(
    16, 3, (4, 4), embed_dim=16, depth=2, num_heads=2, mlp_dim=32, dropout=0.1, attention="causal"
)


def model(pretrained, **options) -> AutoregressiveModel:
    torch.manual_seed(0)
    network = options.pop("network", CONFIG)
    options = {"ema_decay": 0.9, **options}
    return autoregressive_model(network, pretrained / "tokenizer", rate=LearningRate(1e-2), **options)


@pytest.mark.slow
def test_a_model_learns_and_exports_its_average(tiny_shards, tiny_pretrained, tmp_path):
    module = model(tiny_pretrained, decoding=AutoregressiveDecoding("linear", 0.5))
    seen = fit(module, data(tiny_shards), steps=50, folder=tmp_path / "checkpoints")
    losses = [float.fromhex(loss) for loss in seen.losses]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert module.trainer.callback_metrics["val/loss"] < losses[0]
    module.export(tmp_path, class_names=("a", "b", "c"))
    exported = load_transformer(tmp_path / "transformer")
    assert exported.mask_schedule is None
    assert exported.network.config == CONFIG
    assert exported.decoding == DecodingConfig(16, None, "linear", 0.5)
    assert torch.equal(exported.network.token_embedding.weight, module.ema_network.token_embedding.weight)
    assert not torch.equal(exported.network.token_embedding.weight, module.transformer.token_embedding.weight)


def test_the_loss_is_the_mean_cross_entropy_of_all_tokens(tiny_pretrained):
    module = model(tiny_pretrained, network=replace(CONFIG, dropout=0.0))
    tokens, labels, index = torch.randint(16, (5, 16)), torch.randint(3, (5,)), torch.arange(5)
    batch = module.eval()._with_draws(Batch(tokens, labels, index, torch.zeros_like(index), index, index >= 0))
    for smoothing in (0.0, 0.1):
        loss, each, hits = module.compute_losses(module.transformer, batch, tokens, smoothing=smoothing)
        logits = module.transformer(tokens, labels, vocabulary="all").flatten(0, 1)
        torch.testing.assert_close(loss, F.cross_entropy(logits, tokens.flatten(), label_smoothing=smoothing))
        torch.testing.assert_close(each, F.cross_entropy(logits, tokens.flatten(), reduction="none"))
        assert torch.equal(hits, (logits.argmax(-1) == tokens.flatten()).float())


def test_logs_group_tokens_by_their_position_in_raster_order(tiny_pretrained):
    module = model(tiny_pretrained)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 3] = False
    assert (
        module._assign_bins(mask, true_positions(mask)).tolist()
        == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4
    )


def test_samples_depend_on_their_seed_and_keep_the_training_mode(tiny_pretrained):
    module = model(tiny_pretrained).train()
    together = list(module.sample([0, 1, 2], [5, 6, 7]))
    assert module.transformer.training
    assert len(together) == 16
    alone = [list(module.sample([label], [seed]))[-1].tokens for label, seed in zip((0, 1, 2), (5, 6, 7), strict=True)]
    assert torch.equal(together[-1].tokens, torch.cat(alone))


def test_it_starts_from_weights_of_its_own_kind_only(tiny_pretrained, tiny_autoregressive):
    module = model(tiny_pretrained, network=load_transformer(tiny_autoregressive / "transformer").network.config)
    module.start_from(tiny_autoregressive / "transformer")
    expected = load_transformer(tiny_autoregressive / "transformer").network.state_dict()
    for network in (module.transformer, module.ema_network):
        assert all(torch.equal(weight, expected[name]) for name, weight in network.state_dict().items())
    with pytest.raises(
        ValueError, match=r"model\.network\.attention must be bidirectional, .*, got causal; leave the key out"
    ):
        module.start_from(tiny_pretrained / "transformer")


def test_settings_that_do_not_fit_are_refused(tiny_pretrained):
    with pytest.raises(ValueError, match=r"^decoding\.guidance must have scale 0 for a network without a null class"):
        model(
            tiny_pretrained,
            network=replace(CONFIG, class_dropout=0.0),
            decoding=AutoregressiveDecoding({"name": "constant", "scale": 1.0}),
        )
    with pytest.raises(ValueError, match="attention must be one of causal, got 'bidirectional'"):
        model(tiny_pretrained, network=replace(CONFIG, attention="bidirectional"))
    vectors = AdaLNConfig(16, 3, (4, 4), embed_dim=16, depth=1, num_heads=2, mlp_dim=32, num_registers=0,
                          attention="causal", condition_dim=4)  # fmt: skip
    with pytest.raises(ValueError, match="condition_dim must be 0 with causal attention, got 4: its sampling takes no"):
        model(tiny_pretrained, network=vectors)
    with pytest.raises(ValueError, match="attention must be one of bidirectional, got 'causal'"):
        masked_model(CONFIG, tiny_pretrained / "tokenizer")
