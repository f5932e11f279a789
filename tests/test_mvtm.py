import csv
from copy import deepcopy
from dataclasses import replace
from itertools import chain

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy

from maskgit_pl import MaskGIT
from maskgit_pl.data import Batch, describe_store, tokenize
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.masking import true_positions
from maskgit_pl.mvtm import MaskedTokenModel
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.pipeline.grids import to_unit_range
from maskgit_pl.pipeline.pretrained import fingerprint, load_tokenizer, load_transformer
from maskgit_pl.randomness import random_uniform
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.training.checkpoints import FolderCheckpointIO, newest_checkpoint
from maskgit_pl.training.optimizers import LearningRate
from maskgit_pl.training.token_model import BinnedMeans, check_tokenizer
from tests.conftest import peak_predictions, save_tiny_pretrained
from tests.modules import masked_model
from tests.short_runs import data, fit

CONFIG = TransformerConfig(16, 3, (4, 4), embed_dim=16, depth=2, num_heads=2, mlp_dim=32, dropout=0.1)


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
def test_images_and_tokens_train_on_the_same_samples_to_the_same_losses(tiny_shards, tiny_pretrained, store, tmp_path):
    images = fit(model(tiny_pretrained), data(tiny_shards), steps=10, folder=tmp_path / "i")
    tokens = fit(model(tiny_pretrained), data(tiny_shards, store), steps=10, folder=tmp_path / "t")
    assert images.ids == tokens.ids
    assert images.losses == tokens.losses


def test_an_export_with_another_tokenizer_does_not_change_loaded_pipelines(tiny_pretrained, tmp_path):
    """Their weights are mapped from the file of the tokenizer."""
    other = save_tiny_pretrained(tmp_path / "other", seed=1)
    names = ("a", "b", "c")
    model(tiny_pretrained).export(tmp_path / "out", class_names=names)
    pipe = MaskGIT.from_pretrained(tmp_path / "out")
    before = pipe.generate([0, 1], num_steps=2, output_type="pt")
    model(other).export(tmp_path / "out", class_names=names)
    assert fingerprint(tmp_path / "out" / "tokenizer") == fingerprint(other / "tokenizer")
    assert torch.equal(pipe.generate([0, 1], num_steps=2, output_type="pt"), before)
    (tmp_path / "out" / "tokenizer" / "notes.txt").touch()
    model(other).export(tmp_path / "out", class_names=names)  # the same weights are not copied again
    with pytest.raises(FileExistsError, match="notes"):
        model(tiny_pretrained).export(tmp_path / "out", class_names=names)


def test_a_run_that_is_extended_resumes_at_the_rate_of_its_new_length(tiny_shards, tiny_pretrained, store, tmp_path):
    class Rates(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, *_):
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    rate, rates = LearningRate(1e-2, decay="cosine", final_fraction=0.0), Rates()
    for steps, resume in ((4, None), (8, tmp_path)):
        module = masked_model(CONFIG, tiny_pretrained / "tokenizer", rate=rate)
        newest = None if resume is None else newest_checkpoint(resume)
        fit(module, data(tiny_shards, store), steps=steps, folder=tmp_path, resume=newest, callbacks=[rates])
    assert rates.seen == [1e-2 * rate.factor(step, 4) for step in range(4)] + [
        1e-2 * rate.factor(step, 8) for step in range(4, 8)
    ]


@pytest.mark.slow
def test_a_resumed_run_equals_a_straight_one_to_the_last_bit(tiny_shards, tiny_pretrained, store, tmp_path):
    straight = fit(model(tiny_pretrained), data(tiny_shards, store), steps=20, folder=tmp_path / "a", every=7)
    first = fit(model(tiny_pretrained), data(tiny_shards, store), steps=11, folder=tmp_path / "b")
    module = model(tiny_pretrained)
    resume = newest_checkpoint(tmp_path / "b")
    second = fit(module, data(tiny_shards, store), steps=20, folder=tmp_path / "b", resume=resume)
    assert first.ids + second.ids == straight.ids
    assert first.losses + second.losses == straight.losses
    ends = [FolderCheckpointIO().load_checkpoint(newest_checkpoint(tmp_path / run)) for run in "ab"]
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.equal(tensor, ends[1]["state_dict"][name]), name


def test_accumulation_changes_no_sample_and_hardly_the_loss(tiny_shards, tiny_pretrained, store, tmp_path):
    network = replace(CONFIG, dropout=0.0)
    whole = fit(model(tiny_pretrained, network=network), data(tiny_shards, store), steps=6, folder=tmp_path / "a")
    parts = fit(
        model(tiny_pretrained, network=network), data(tiny_shards, store, max_batch_per_device=4), steps=6,
        folder=tmp_path / "b", accumulate_grad_batches=2,
    )  # fmt: skip
    assert list(chain(*parts.ids)) == list(chain(*whole.ids))
    halves = [float.fromhex(loss) for loss in parts.losses]
    means = [2 * (a + b) / 2 for a, b in zip(halves[::2], halves[1::2], strict=True)]  # Lightning divides by 2
    assert means == pytest.approx([float.fromhex(loss) for loss in whole.losses], rel=1e-5)


def averages_by_hand(weights, decay):
    """The average after each step, of the weights before and after each step."""
    average, found = weights[0], []
    for step, new in enumerate(weights[1:], start=1):
        kept = min(decay, step / (9 + step))  # 1/10, 2/11, 3/12 ...
        average = kept * average + (1 - kept) * new
        found.append(average)
    return found


class Weights(Callback):
    """Keeps one weight and its average, before the first step and after each."""

    def __init__(self):
        self.trained, self.averaged = [], []

    def on_train_start(self, trainer, module):
        self.trained.append(module.transformer.token_embedding.weight.detach().clone())

    def on_train_batch_end(self, trainer, module, *_):
        self.on_train_start(trainer, module)
        self.averaged.append(module.ema_network.token_embedding.weight.clone())


def test_the_average_follows_its_ramp_from_the_first_step_on(tiny_shards, tiny_pretrained, store, tmp_path):
    seen = Weights()
    fit(model(tiny_pretrained, ema_decay=0.2), data(tiny_shards, store), steps=5, folder=tmp_path, callbacks=[seen])
    for kept, wanted in zip(seen.averaged, averages_by_hand(seen.trained, 0.2), strict=True):
        torch.testing.assert_close(kept, wanted)


def validate(module, source):
    """Returns the values that a validation logs."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, use_distributed_sampler=False)
    (values,) = trainer.validate(module, datamodule=source, verbose=False)
    return values


def test_rows_that_fill_up_the_last_validation_batch_count_nothing(tiny_shards, tiny_pretrained, store):
    whole, padded = (data(tiny_shards, store, validation_batch=size, validation_samples=10) for size in (5, 8))
    module = model(tiny_pretrained)
    assert validate(module, padded) == pytest.approx(validate(module, whole), rel=1e-6)


def test_validation_asks_the_averaged_network_about_masked_tokens(tiny_shards, tiny_pretrained, store):
    module, source = model(tiny_pretrained, label_smoothing=0.3), data(tiny_shards, store, validation_samples=8)
    module.ema_network.token_embedding.weight.mul_(3)  # now another network than the trained one
    values = validate(module, source)
    (batch,) = source.val_dataloader()
    mask = module.mask_sampler.mask(
        16, index=batch.index, epoch=batch.epoch, position=batch.position, global_batch=source.config.global_batch
    )
    seen = batch.content.masked_fill(mask, CONFIG.mask_token_id)
    with torch.no_grad():
        logits = module.ema_network.eval().forward_masked(seen, batch.labels, mask, vocabulary="all")
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
    rows = [cross_entropy(logits[row][mask[row]], tokens[row][mask[row]], label_smoothing=0.3) for row in range(8)]
    with (tmp_path / "metrics.csv").open() as file:
        logged = {name: float(value) for name, value in next(csv.DictReader(file)).items() if value}
    assert logged["train/loss"] == pytest.approx(float(torch.stack(rows).mean()), rel=1e-5)
    each = cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(8, 16)
    quarter = (mask.float().mean(1) * 4).ceil().long() - 1
    for number in quarter.unique().tolist():
        chosen = mask & (quarter == number).unsqueeze(1)
        name = f"train/loss/mask-ratio-{number / 4:.2f}-{(number + 1) / 4:.2f}"
        assert logged[name] == pytest.approx(float(each[chosen].mean()), rel=1e-5)
    assert logged["step"] == 1
    assert seen.gradients == [None] * len(seen.gradients)


def test_tokens_are_binned_by_the_share_of_their_row_that_is_masked(tiny_pretrained):
    counts = torch.tensor([1, 4, 5, 8, 12, 16])
    mask = torch.arange(16) < counts.unsqueeze(1)
    bins = model(tiny_pretrained)._assign_bins(mask, true_positions(mask))
    assert bins.tolist() == [0] * 5 + [1] * 13 + [2] * 12 + [3] * 16


def test_means_of_many_tokens_are_not_rounded():
    means = BinnedMeans("position")
    losses = torch.full((2**16,), 6.1)
    for _ in range(300):  # 20 million tokens: float32 cannot count them one by one
        means.add(torch.zeros(2**16, dtype=torch.int64), losses, torch.ones(2**16))
    assert means.take(torch.tensor(0.0))["train/loss/position-0.00-0.25"] == pytest.approx(6.1, rel=1e-3)


class Seeds(Callback):
    """Keeps what torch's generator was seeded with for each micro-batch."""

    def __init__(self):
        self.seeds = []

    def on_before_backward(self, trainer, module, loss):
        self.seeds.append(torch.initial_seed())


def test_dropout_is_seeded_anew_for_each_micro_batch_whatever_was_drawn_before(
    tiny_shards, tiny_pretrained, store, tmp_path
):
    runs = []
    for torch_seed in (1, 2):
        seen, source = Seeds(), data(tiny_shards, store, max_batch_per_device=4)
        module = model(tiny_pretrained)
        torch.manual_seed(torch_seed)
        options = {"steps": 3, "folder": tmp_path / str(torch_seed), "accumulate_grad_batches": 2}
        fit(module, source, callbacks=[seen], **options)
        runs.append(seen.seeds)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 6


def test_images_are_mirrored_in_training_alone(tiny_shards, tiny_pretrained):
    module, source = model(tiny_pretrained, flip_probability=1.0), data(tiny_shards)
    source.setup()
    batch = next(iter(source.train_dataloader()))
    mirrored = module._encode(batch._replace(content=batch.content.flip(-1)))
    assert torch.equal(
        module.eval()._encode(batch._replace(content=batch.content.flip(-1))), module.train()._encode(batch)
    )
    assert torch.equal(mirrored, module.eval()._encode(batch))
    assert not torch.equal(mirrored, module.train()._encode(batch))


def test_the_trained_and_the_averaged_network_begin_from_pretrained_weights(tiny_pretrained):
    module = model(tiny_pretrained, network=replace(CONFIG, depth=1))
    module.start_from(tiny_pretrained / "transformer")
    wanted = load_transformer(tiny_pretrained / "transformer").network.state_dict()
    for network in (module.transformer, module.ema_network):
        for name, value in network.state_dict().items():
            assert torch.equal(value, wanted[name]), name


def test_more_steps_than_tokens_and_guidance_without_a_null_class_are_refused_at_once(tiny_pretrained):
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


def test_class_dropout_replaces_its_share_by_the_null_class(tiny_pretrained):
    module = model(tiny_pretrained, network=replace(CONFIG, class_dropout=0.25))
    index = torch.arange(4000)
    batch = Batch(index, torch.zeros_like(index), index, torch.zeros_like(index), index, index >= 0)
    dropped = module._drop_classes(batch) == CONFIG.num_classes
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(dropped, module._drop_classes(batch) == CONFIG.num_classes)
    later = module._drop_classes(batch._replace(epoch=batch.epoch + 1)) == CONFIG.num_classes
    assert not torch.equal(later, dropped)


def test_a_part_of_a_decoding_leaves_the_network_in_its_mode(tiny_pretrained):
    module = model(tiny_pretrained, ema_decay=0.0).train()  # without an average the network that trains is decoded
    steps = module.sample([0], [5])
    next(steps)
    assert not module.transformer.training
    steps.close()
    assert module.transformer.training


@pytest.mark.parametrize(
    ("key", "config"), [("codebook_size", replace(CONFIG, codebook_size=8)), ("grid", replace(CONFIG, grid=(2, 8)))]
)
def test_a_tokenizer_that_does_not_fit_is_named(tiny_pretrained, key, config):
    with pytest.raises(ValueError, match=f"model.network.{key}"):
        check_tokenizer(config, load_tokenizer(tiny_pretrained / "tokenizer"))


def test_a_global_batch_that_is_not_the_datas_is_refused_at_the_first_step(tiny_shards, tiny_pretrained, tmp_path):
    network = TransformerConfig(16, 3, (4, 4), embed_dim=16, depth=1, num_heads=2, mlp_dim=32)
    module = masked_model(network, tiny_pretrained / "tokenizer", global_batch=16)
    with pytest.raises(ValueError, match=r"got 16 and 8 samples x 1 ranks x 1 accumulated; give MaskedTokenConfig"):
        fit(module, data(tiny_shards), steps=1, folder=tmp_path)
