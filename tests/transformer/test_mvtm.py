"""Stage 2: steps by hand, logs and validation, averaging, resume of each option, and settings that are refused."""

import csv
import itertools
from copy import deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy

from maskgit_pl import MaskGIT
from maskgit_pl.data import Batch, describe_store, tokenize
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.corruption import Mask, corruptions
from maskgit_pl.masking import UniformRatio, true_positions
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import to_unit_range
from maskgit_pl.pretrained.networks import load_tokenizer, load_transformer
from maskgit_pl.randomness import random_uniform
from maskgit_pl.schedules import Pow, mask_schedules
from maskgit_pl.training.checkpoints import FolderCheckpointIO, newest_checkpoint
from maskgit_pl.training.optimizers import LearningRate
from maskgit_pl.transformer.losses import MaskedCrossEntropy, Objective, TokenLosses, mean_over_rows
from maskgit_pl.transformer.mvtm import MaskedTokenModel
from maskgit_pl.transformer.token_model import check_tokenizer
from tests.conftest import peak_predictions
from tests.short_runs import assert_equal, data, fit, masked_model

CONFIG = TransformerConfig(16, 3, (4, 4), embed_dim=16, depth=2, num_heads=2, mlp_dim=32, dropout=0.1)
VISIBLE = {"name": "masked_cross_entropy", "visible_weight": 0.5}
VARIANTS = [
    {"mask_ratio": "truncated_normal", "mask_positions": "halton", "objective": VISIBLE},
    {"mask_ratio": {"name": "uniform", "low": 0.2}, "ema_decay": 0.0},
    {"network": replace(CONFIG, num_token_groups=2)},
    {"corruption": "random_tokens", "objective": "soft_targets"},
]


def model(pretrained, **options) -> MaskedTokenModel:
    torch.manual_seed(0)
    options = {"ema_decay": 0.9, **options}
    return masked_model(options.pop("network", CONFIG), pretrained / "tokenizer", rate=LearningRate(1e-2), **options)


@pytest.fixture(scope="module")
def store(tiny_shards, tiny_pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer = load_tokenizer(tiny_pretrained / "tokenizer")
    description = describe_store(
        tiny_shards, grid=(4, 4), codebook_size=16, tokenizer=tokenizer.fingerprint, image_size=8
    )

    def encode(images: torch.Tensor) -> torch.Tensor:
        return tokenizer.network.encode(to_unit_range(images))

    tokenize(tiny_shards, folder, description, encode=encode, in_channels=1)
    return folder


def test_images_are_encoded_in_float32_in_any_precision(tiny_shards, tiny_pretrained):
    """As `maskgit tokenize` and the pipeline encode them, so that the tokens are the same."""
    batch = next(iter(data(tiny_shards).train_dataloader()))
    images = torch.randint(256, (256, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = batch._replace(content=images)
    module = model(tiny_pretrained).eval()
    expected = module._encode(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module._encode(batch), expected)
        rounded = module.tokenizer.network.encode(to_unit_range(batch.content))
    assert not torch.equal(rounded, expected)  # bfloat16 would make other tokens


@pytest.mark.slow
def test_a_model_learns_and_exports_its_average(tiny_shards, tiny_pretrained, tmp_path):
    module = model(tiny_pretrained)
    seen = fit(module, data(tiny_shards), steps=60, folder=tmp_path / "checkpoints")
    losses = [float.fromhex(loss) for loss in seen.losses]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    module.export(tmp_path, class_names=("a", "b", "c"))
    exported = load_transformer(tmp_path / "transformer")
    assert exported.class_names == ("a", "b", "c")
    assert torch.equal(exported.network.token_embedding.weight, module.ema_network.token_embedding.weight)
    assert not torch.equal(exported.network.token_embedding.weight, module.transformer.token_embedding.weight)


@pytest.mark.slow
def test_images_and_tokens_train_to_the_same_losses(tiny_shards, tiny_pretrained, store, tmp_path):
    images = fit(model(tiny_pretrained), data(tiny_shards), steps=10, folder=tmp_path / "i")
    tokens = fit(model(tiny_pretrained), data(tiny_shards, store), steps=10, folder=tmp_path / "t")
    assert images.ids == tokens.ids
    assert images.losses == tokens.losses


def test_an_extended_run_resumes_at_the_rate_of_its_new_length(tiny_shards, tiny_pretrained, store, tmp_path):
    class Rates(Callback):
        rates: ClassVar[list] = []

        def on_train_batch_start(self, trainer, *_):
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rate = LearningRate(1e-2, decay="cosine", final_fraction=0.0)
    for steps in (4, 8):
        module, newest = masked_model(CONFIG, tiny_pretrained / "tokenizer", rate=rate), newest_checkpoint(tmp_path)
        fit(module, data(tiny_shards, store), steps=steps, folder=tmp_path, resume=newest, callbacks=[Rates()])
    expected = [rate.factor(step, 4) for step in range(4)] + [rate.factor(step, 8) for step in range(4, 8)]
    assert Rates.rates == [1e-2 * factor for factor in expected]


def validate(module, source):
    """Returns the values that a validation logs."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, use_distributed_sampler=False)
    (values,) = trainer.validate(module, datamodule=source, verbose=False)
    return values


def test_padding_of_the_last_validation_batch_counts_nothing(tiny_shards, tiny_pretrained, store):
    whole, padded = (data(tiny_shards, store, validation_batch=size, validation_samples=10) for size in (5, 8))
    module = model(tiny_pretrained)
    assert validate(module, padded) == pytest.approx(validate(module, whole), rel=1e-6)


def test_validation_measures_the_averaged_network_at_masked_tokens(tiny_shards, tiny_pretrained, store):
    module = model(tiny_pretrained, label_smoothing=0.3, objective=VISIBLE)  # both in training only
    source = data(tiny_shards, store, validation_samples=8)
    module.ema_network.token_embedding.weight.mul_(3)  # now another network than the trained one
    values = validate(module, source)
    (batch,) = source.val_dataloader()
    mask = module.mask_sampler.mask(
        16, index=batch.index, epoch=batch.epoch, position=batch.position, global_batch=source.config.global_batch
    )
    hidden = batch.content.masked_fill(mask, CONFIG.mask_token_id)
    with torch.no_grad():
        logits = module.ema_network.eval().forward_selected(
            hidden, batch.labels, true_positions(mask), vocabulary="all"
        )
    loss = cross_entropy(logits, batch.content[mask])
    hits = (logits.argmax(-1) == batch.content[mask]).float().mean()
    assert values == pytest.approx({"val/loss": float(loss), "val/accuracy": float(hits)}, rel=1e-5)


class FirstStep(Callback):
    """Keeps the network as it begins, the first batch, and what was left of the gradients."""

    def on_train_start(self, trainer, module):
        self.network = deepcopy(module.transformer)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batch = batch

    def on_train_batch_end(self, trainer, module, *_):
        self.gradients = [parameter.grad for parameter in module.parameters()]


def test_the_first_step_by_hand(tiny_shards, tiny_pretrained, store, tmp_path):
    network = replace(CONFIG, dropout=0.0, class_dropout=0.5)
    module, seen = model(tiny_pretrained, network=network, label_smoothing=0.3), FirstStep()
    peak_predictions(module.transformer)  # so that classes show
    logger = CSVLogger(tmp_path, name="", version="")
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=logger, callbacks=[seen], log_every_n_steps=1, limit_val_batches=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data(tiny_shards, store))
    index, epoch, position = seen.batch.index, seen.batch.epoch, seen.batch.position
    mask = module.mask_sampler.mask(16, index=index, epoch=epoch, position=position, global_batch=8)
    dropped = random_uniform("class-dropout", seed=0, index=index, epoch=epoch)[:, 0] < 0.5
    assert 0 < dropped.sum() < 8
    labels, tokens = seen.batch.labels.masked_fill(dropped, 3), seen.batch.content
    with torch.no_grad():
        logits = seen.network(tokens.masked_fill(mask, module.config.network.mask_token_id), labels, vocabulary="all")
    losses = [cross_entropy(logits[row][mask[row]], tokens[row][mask[row]], label_smoothing=0.3) for row in range(8)]
    with (tmp_path / "metrics.csv").open() as file:
        logged = {name: float(value) for name, value in next(csv.DictReader(file)).items() if value}
    assert logged["train/loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    nll = cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(8, 16)
    quarter = (mask.float().mean(1) * 4).ceil().long() - 1
    for number in quarter.unique().tolist():
        in_bin = mask & (quarter == number).unsqueeze(1)
        name = f"train/loss/mask-ratio-{number / 4:.2f}-{(number + 1) / 4:.2f}"
        assert logged[name] == pytest.approx(float(nll[in_bin].mean()), rel=1e-5)
    assert logged["step"] == 1
    assert seen.gradients == [None] * len(seen.gradients)


def test_logs_group_rows_by_mask_ratio_with_the_upper_border(tiny_pretrained):
    masked = torch.tensor([1, 4, 5, 8, 9, 12, 13, 16])
    mask = torch.arange(16) < masked[:, None]
    bins = model(tiny_pretrained)._assign_bins(mask, torch.arange(0, mask.numel(), 16))
    assert bins.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_dropout_has_a_seed_of_its_own_in_each_step_micro_batch_and_rank(tiny_pretrained):
    module, seeds = model(tiny_pretrained), set()
    with torch.random.fork_rng():
        for step, rank, micro_batch in itertools.product(range(2), repeat=3):
            module._trainer = SimpleNamespace(
                accumulate_grad_batches=2, world_size=2, global_rank=rank, global_step=step
            )
            module._reseed_dropout(micro_batch)
            seeds.add(torch.initial_seed())
    assert len(seeds) == 8


def test_images_are_flipped_in_training_only(tiny_shards, tiny_pretrained):
    module, source = model(tiny_pretrained, flip_probability=1.0), data(tiny_shards)
    source.setup()
    batch = next(iter(source.train_dataloader()))
    mirrored = module._encode(batch._replace(content=batch.content.flip(-1)))
    assert torch.equal(
        module.eval()._encode(batch._replace(content=batch.content.flip(-1))), module.train()._encode(batch)
    )
    assert torch.equal(mirrored, module.eval()._encode(batch))
    assert not torch.equal(mirrored, module.train()._encode(batch))


def test_decoding_settings_that_do_not_fit_are_refused(tiny_pretrained):
    with pytest.raises(ValueError, match=r"num_steps.* 17"):
        model(tiny_pretrained, decoding=DecodingConfig(num_steps=17))
    with pytest.raises(ValueError, match="decoding: token_selector must be a name or a mapping for parallel decoding"):
        model(tiny_pretrained, decoding=DecodingConfig(num_steps=16, token_selector=None))
    without = replace(CONFIG, class_dropout=0.0)
    model(tiny_pretrained, network=without)
    with pytest.raises(ValueError, match="guidance must have scale 0 for a network without a null class"):
        model(tiny_pretrained, network=without, decoding=DecodingConfig(guidance={"name": "linear", "scale": 1.0}))


def test_one_schedule_object_serves_masks_and_decoding(tiny_pretrained):
    module = model(tiny_pretrained, mask_schedule="square")
    assert module.mask_sampler.mask_schedule is module.decoder.mask_schedule is module.mask_schedule
    assert module.mask_schedule == mask_schedules.build("square")


def test_class_dropout_takes_its_share_of_the_labels(tiny_pretrained):
    module = model(tiny_pretrained, network=replace(CONFIG, class_dropout=0.25))
    index = torch.arange(4000)
    batch = Batch(index, torch.zeros_like(index), index, torch.zeros_like(index), index, index >= 0)
    dropped = module._drop_classes(batch) == CONFIG.num_classes
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(dropped, module._drop_classes(batch) == CONFIG.num_classes)
    later = module._drop_classes(batch._replace(epoch=batch.epoch + 1)) == CONFIG.num_classes
    assert not torch.equal(later, dropped)


@pytest.mark.parametrize(
    ("key", "config"), [("codebook_size", replace(CONFIG, codebook_size=8)), ("grid", replace(CONFIG, grid=(2, 8)))]
)
def test_a_tokenizer_that_does_not_fit_is_named(tiny_pretrained, key, config):
    with pytest.raises(ValueError, match=f"model.network.{key}"):
        check_tokenizer(config, load_tokenizer(tiny_pretrained / "tokenizer"))


@pytest.mark.slow
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_resumed_run_equals_a_straight_one_bit_exact(tiny_shards, tiny_pretrained, tmp_path, options):
    def train(run: str, steps: int, resume=None):
        module = model(tiny_pretrained, **options)
        return fit(module, data(tiny_shards), steps=steps, folder=tmp_path / run, resume=resume, limit_val_batches=0)

    straight = train("a", 8)
    first, second = train("b", 5), train("b", 8, newest_checkpoint(tmp_path / "b"))
    assert first.losses + second.losses == straight.losses
    ends = [FolderCheckpointIO().load_checkpoint(newest_checkpoint(tmp_path / run)) for run in "ab"]
    assert_equal(ends[0]["state_dict"], ends[1]["state_dict"])


def test_a_module_in_place_of_its_folder_is_refused(tiny_pretrained):
    with pytest.raises(ValueError, match=r"^tokenizer must be the path of a pretrained folder, got a MaskedTokenModel"):
        replace(model(tiny_pretrained).config, tokenizer=model(tiny_pretrained))


def test_model_and_data_have_one_global_batch(tiny_shards, tiny_pretrained, tmp_path):
    module, message = model(tiny_pretrained, global_batch=4), "^global_batch of the model must be 8, .*, got 4"
    with pytest.raises(ValueError, match=message):
        fit(module, data(tiny_shards), steps=1, folder=tmp_path)


def test_a_checkpoint_of_lightning_is_loaded_with_the_configuration(tiny_shards, tiny_pretrained, tmp_path):
    module = model(tiny_pretrained)
    trainer = Trainer(max_steps=1, limit_val_batches=0, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, data(tiny_shards))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = MaskedTokenModel.load_from_checkpoint(tmp_path / "one.ckpt", config=module.config)
    assert_equal(loaded.state_dict(), module.state_dict())


def test_parts_of_the_configuration_may_be_objects(tiny_pretrained):
    parts = {"mask_schedule": Pow(2.0), "objective": MaskedCrossEntropy(0.5), "mask_ratio": UniformRatio()}
    config = model(tiny_pretrained, **parts).config
    assert (config.mask_schedule, config.mask_ratio, config.objective) == ("square", "uniform", VISIBLE)
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


def test_the_weighted_loss_by_hand(tiny_pretrained):
    network = replace(CONFIG, dropout=0.0, class_dropout=0.0)
    module = model(tiny_pretrained, network=network, objective=VISIBLE, label_smoothing=0.0)
    index = torch.arange(8)
    tokens = torch.randint(16, (8, 16), generator=torch.Generator().manual_seed(5))
    drawn = module._with_draws(Batch(tokens, index % 3, index, torch.zeros_like(index), index, index >= 0))
    losses, mask = module._compute_training_losses(drawn), drawn.draws.mask
    logits = module.transformer(tokens.masked_fill(mask, network.mask_token_id), drawn.labels, vocabulary="all")
    each = cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    weights = torch.where(mask, 1.0, 0.5)
    torch.testing.assert_close(losses.loss, ((each * weights).sum(1) / weights.sum(1)).mean())
    torch.testing.assert_close(losses.token_losses, each.flatten())
    assert torch.equal(drawn.draws.is_masked, mask.flatten())  # logs are of masked tokens only


@dataclass(frozen=True)
class Asks(Objective):
    """The objective of the paper, made of the logits; it keeps what it was given."""

    needs: ClassVar[frozenset[str]] = frozenset({"targets", "logits", "hidden", "code_vectors"})
    seen: ClassVar[list[TokenLosses]] = []

    def __call__(self, tokens: TokenLosses) -> torch.Tensor:
        self.seen.append(tokens)
        return mean_over_rows(cross_entropy(tokens.logits, tokens.targets, reduction="none"), tokens.rows, num_rows=8)


def test_an_objective_may_ask_for_logits_hidden_states_and_code_vectors(tiny_shards, tiny_pretrained, store):
    batch = next(iter(data(tiny_shards, store).train_dataloader()))
    plain = model(tiny_pretrained, label_smoothing=0.0)
    asking = model(tiny_pretrained, label_smoothing=0.0)
    asking.objective = Asks()
    losses = []
    for module in (plain.train(), asking.train()):
        torch.manual_seed(0)  # of dropout
        losses.append(module._compute_training_losses(module._with_draws(batch)).loss)
    assert torch.equal(*losses)
    (tokens,) = Asks.seen
    assert [hidden.shape for hidden in tokens.hidden][:1] == [(8, 17, 16)]  # with the token of the class
    assert torch.equal(tokens.code_vectors, asking.tokenizer.network.quantizer.codebook)
    assert tokens.logits.requires_grad
    assert tokens.hidden[0].requires_grad
    assert not any(block._forward_hooks for block in asking.transformer.blocks)
    asking.eval()
    validation = asking.compute_losses(asking.ema_network, asking._with_draws(batch), batch.content, smoothing=0.0)
    assert len(Asks.seen) == 1  # validation is the plain loss
    assert bool(validation.loss.isfinite())


def test_a_corruption_of_training_only_changes_no_validation(tiny_shards, tiny_pretrained, store):
    batch = next(iter(data(tiny_shards, store).train_dataloader()))
    mask_id = CONFIG.mask_token_id
    module = model(tiny_pretrained, corruption={"name": "random_tokens", "most": 0.5})
    batch = module._with_draws(batch)
    mask = batch.step_draws.mask
    seen = module.train()._hide(batch.content, batch)
    assert torch.equal(seen == mask_id, mask)
    share = float(((seen != batch.content) & ~mask).sum() / (~mask).sum())
    assert 0.05 < share < 0.5  # a quarter, less what is drawn right by chance
    assert torch.equal(seen, module._hide(batch.content, batch))  # a function of the samples
    half = batch._replace(index=batch.index[4:], epoch=batch.epoch[4:], draws=batch.draws._replace(mask=mask[4:]))
    assert torch.equal(module._hide(batch.content[4:], half), seen[4:])
    assert torch.equal(module.eval()._hide(batch.content, batch), batch.content.masked_fill(mask, mask_id))
    assert module.decoding_corruption is None


def test_a_corruption_that_decoding_shows_is_stored_with_the_weights(tiny_pretrained, tmp_path, monkeypatch):
    shown = type("Shown", (Mask,), {"in_decoding": True})
    monkeypatch.setitem(corruptions._factories, "shown", dataclass(frozen=True)(shown))
    for name, expected in (("shown", shown()), ("mask", None)):
        module = model(tiny_pretrained, corruption=name)
        assert module.decoder.corruption == expected
        module.export(tmp_path / name, class_names=("a", "b", "c"))
        pipe = MaskGIT.from_pretrained(tmp_path / name)
        assert pipe.transformer.corruption == expected
        pipe.save_pretrained(tmp_path / "again")
        assert load_transformer(tmp_path / "again" / "transformer").corruption == expected
