"""Stage 1 counts steps in global batches, propagates the gradient of the summed losses, and is equal on two ranks."""

import os
import socket
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, IterableDataset

from maskgit_pl.data import Batch
from maskgit_pl.networks.discriminators import DiscriminatorConfig
from maskgit_pl.networks.vqgan import VQGANConfig
from maskgit_pl.tokenizer import adversarial as losses
from maskgit_pl.tokenizer.adversarial import AdversarialConfig
from maskgit_pl.tokenizer.losses import PerceptualConfig
from maskgit_pl.training.optimizers import LearningRate
from maskgit_pl.training.strategies import build_strategy
from tests.forked import run_ranks
from tests.short_runs import replay_step, tokenizer_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`srun` command is available"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

NETWORK = VQGANConfig(
    1, base_channels=8, channel_multipliers=(1,), num_res_blocks=1, num_middle_blocks=0, num_groups=4,
    codebook_size=16, code_dim=8,
    patch_size=4, quantizer="ema",
)  # fmt: skip
ADVERSARIAL = AdversarialConfig(DiscriminatorConfig(channel_multiplier=1 / 64))
GLOBAL_BATCH = 8


def tokenizer(**changes):
    torch.manual_seed(0)
    settings = {"network": NETWORK, "image_size": 16, "ema_decay": 0.9, **changes}
    return tokenizer_model(settings.pop("network"), **settings)


def pictures(index):
    """Squares at places that depend on the sample: (B, 1, 16, 16) uint8."""
    across = torch.arange(16)
    left, top, edge = index * 5 % 11, index * 3 % 7, 3 + index % 4

    def inside(start):
        return (across >= start.unsqueeze(1)) & (across < (start + edge).unsqueeze(1))

    return (30 + 200 * (inside(top).unsqueeze(2) & inside(left).unsqueeze(1))).to(torch.uint8).unsqueeze(1)


def batch_of(slots, *, step=0, valid=None):
    position = step * GLOBAL_BATCH + torch.as_tensor(slots)
    index, epoch = position % 64, position // 64
    valid = torch.ones(len(position), dtype=torch.bool) if valid is None else valid
    return Batch(pictures(index), index % 10, index, epoch, position, valid)


class Stream(IterableDataset):
    """The endless stream of one rank in micro-batches, as the data module gives it."""

    def __init__(self, *, accumulation=1, rank=0, ranks=1):
        self.accumulation, self.rank, self.ranks = accumulation, rank, ranks

    def __iter__(self):
        size = GLOBAL_BATCH // (self.accumulation * self.ranks)
        for step in range(10**6):
            for part in range(self.accumulation):
                start = (part * self.ranks + self.rank) * size
                yield batch_of(range(start, start + size), step=step)


class Held(IterableDataset):
    def __iter__(self):
        yield batch_of(range(8), step=3)
        yield batch_of(range(8), step=4, valid=torch.arange(8) < 5)


def fit(module, *, max_steps=3, stream=None, **options):
    settings = {
        "max_steps": max_steps, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
        "val_check_interval": max_steps, "check_val_every_n_epoch": None, **options,
    }  # fmt: skip
    trainer = Trainer(**settings)
    stream = stream or Stream(accumulation=module.accumulation)
    trainer.fit(module, DataLoader(stream, batch_size=None), DataLoader(Held(), batch_size=None))
    return trainer


def values_of(module):
    return torch.cat([value.flatten().double() for value in module.state_dict().values()])


PATCHES = {"name": "patchgan", "base_channels": 4, "num_layers": 2}


def test_the_quantizer_gets_seed_step_and_micro_batch():
    module = tokenizer(network=replace(NETWORK, quantizer="gumbel"), seed=5, accumulation=2)
    calls, begin = [], module.network.quantizer.begin_micro_batch

    def record(**arguments):
        calls.append((arguments["seed"], arguments["step"], arguments["micro_batch"]))
        begin(**arguments)

    module.network.quantizer.begin_micro_batch = record
    fit(module, max_steps=2)
    assert calls == [(5, 0, 0), (5, 0, 1), (5, 1, 0), (5, 1, 1)]


@pytest.mark.parametrize("loss", ["hinge", "non-saturating"])
@pytest.mark.parametrize("discriminator", [ADVERSARIAL.discriminator, PATCHES], ids=["stylegan", "patchgan"])
def test_the_discriminator_has_the_gradients_of_its_three_losses(discriminator, loss):
    """Those of the generator are compared in ``tests/tokenizer/test_losses.py``."""
    config = replace(ADVERSARIAL, discriminator=discriminator, loss=loss, lecam_weight=0.1)
    module, images = tokenizer(adversarial=config), batch_of(range(8)).content / 255
    replay_step(module, batch_of(range(8)), step=0)
    gradients = [parameter.grad.clone() for parameter in module.discriminator.parameters()]
    real, fake = images.clone().requires_grad_(), module.network(images).reconstruction.detach()
    real_logits, fake_logits, zero = module.discriminator(real), module.discriminator(fake), torch.zeros(())
    total = losses.discriminator_loss(real_logits, fake_logits, kind=loss) + 10 * losses.r1_penalty(real_logits, real)
    total = total + 0.1 * losses.lecam_loss(real_logits, fake_logits, real_mean=zero, fake_mean=zero)
    expected = torch.autograd.grad(total, list(module.discriminator.parameters()), materialize_grads=True)
    for gradient, target in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, target, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_max_steps_counts_global_batches(accumulation):
    module = tokenizer(adversarial=ADVERSARIAL, accumulation=accumulation)
    trainer = fit(module, max_steps=3)
    assert trainer.global_step == 3
    assert trainer.fit_loop.total_batch_idx + 1 == 3 * accumulation
    states = [optimizer.state for optimizer in trainer.optimizers]
    assert all(int(state["step"]) == 3 for group in states for state in group.values())


@pytest.mark.slow
def test_accumulation_trains_as_whole_batches_do():
    adversarial = replace(ADVERSARIAL, lecam_weight=0.1)
    whole, parts = tokenizer(adversarial=adversarial), tokenizer(adversarial=adversarial, accumulation=4)
    fit(whole, max_steps=4)
    fit(parts, max_steps=4, val_check_interval=3)  # validated within a global batch
    torch.testing.assert_close(values_of(parts), values_of(whole), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(parts.lecam_means, whole.lecam_means, rtol=1e-3, atol=0)


class Steps(Callback):
    """Keeps the gradients and the learning rate with which each optimiser steps."""

    def on_train_start(self, trainer, module):
        self.gradients = [[] for _ in trainer.optimizers]
        self.rates = [[] for _ in trainer.optimizers]
        for number, optimizer in enumerate(trainer.optimizers):
            optimizer.register_step_pre_hook(partial(self.keep, number))

    def keep(self, number, optimizer, *_):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.gradients[number].append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        self.rates[number].append(optimizer.param_groups[0]["lr"])


def stepped(*, max_steps=1, **changes):
    seen = Steps()
    fit(tokenizer(adversarial=ADVERSARIAL, **changes), max_steps=max_steps, callbacks=[seen])
    return seen


def test_the_gradients_of_each_network_are_clipped_separately():
    for free, clipped in zip(stepped().gradients, stepped(gradient_clip=1e-3).gradients, strict=True):
        assert free[0].norm() > 1e-3
        torch.testing.assert_close(clipped[0], free[0] * 1e-3 / free[0].norm(), rtol=1e-3, atol=1e-9)


def test_both_optimizers_follow_the_learning_rate():
    rate = LearningRate(1e-3, warmup_steps=2, decay="cosine")
    expected = [1e-3 * rate.factor(step, 5) for step in range(5)]
    assert stepped(max_steps=5, rate=rate).rates == [pytest.approx(expected)] * 2


def test_the_r1_penalty_of_every_fourth_step_is_four_times_as_large():
    gradients = []
    for every in (1, 4):
        module = tokenizer(adversarial=replace(ADVERSARIAL, r1_every=every, r1_weight=10.0 / every))
        assert "r1" in replay_step(module, batch_of(range(8)), step=0)
        gradients.append(module.discriminator.head.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert ["r1" in replay_step(module, batch_of(range(8)), step=step) for step in (3, 4)] == [False, True]


def test_a_replayed_step_does_not_change_the_accumulated_one():
    module = tokenizer(adversarial=replace(ADVERSARIAL, start_step=2, lecam_weight=0.1))
    pending = module._pending
    losses_before, losses_after = (replay_step(module, batch_of(range(4)), step=step) for step in (1, 2))
    assert set(losses_after) - set(losses_before) >= {"generator", "discriminator", "lecam"}
    assert module._pending is pending
    assert (pending.tokens, pending.features, pending.logits) == ([], [], [])


def test_the_lecam_means_move_by_a_thousandth():
    module = tokenizer(adversarial=replace(ADVERSARIAL, lecam_weight=0.1))
    images = batch_of(range(8)).content / 255
    with torch.no_grad():
        logits = torch.stack([module.discriminator(x).mean() for x in (images, module.network(images)[0])])
    fit(module, max_steps=1)
    torch.testing.assert_close(module.lecam_means, 0.001 * logits, rtol=1e-3, atol=1e-7)


def test_the_codes_learn_from_the_micro_batches_of_each_step():
    module, begins = tokenizer(accumulation=2, seed=5), tokenizer()
    fit(module, max_steps=1)
    outputs = [begins.network(batch_of(slots).content / 255).quantized for slots in (range(4), range(4, 8))]
    begins.network.quantizer.update([o.tokens for o in outputs], [o.features for o in outputs], seed=5, step=0)
    torch.testing.assert_close(module.network.quantizer.codebook, begins.network.quantizer.codebook)


def test_the_discriminator_does_not_train_before_its_start():
    early, late = (tokenizer(adversarial=replace(ADVERSARIAL, start_step=step)) for step in (2, 3))
    initial = values_of(late.discriminator)
    fit(early, max_steps=3)
    fit(late, max_steps=3)
    assert torch.equal(values_of(late.discriminator), initial)
    assert not torch.equal(values_of(early.discriminator), initial)
    plain = tokenizer()
    fit(plain, max_steps=3)
    assert torch.equal(values_of(late.network), values_of(plain.network))


def test_the_average_begins_at_the_first_step_and_is_validated():
    module = tokenizer()
    trainer = fit(module, max_steps=1)
    assert all(map(torch.equal, module.ema_network.parameters(), module.network.parameters()))
    images, valid = zip(*((batch.content / 255, batch.valid) for batch in Held()), strict=True)
    network, rows = module.ema_network, torch.cat(images)[torch.cat(valid)]
    tokens = network.encode(rows)
    error = F.mse_loss(network.decode(tokens, (4, 4)).clamp(0, 1), rows)
    used = tokens.unique()
    assert trainer.callback_metrics["val/psnr"].item() == pytest.approx(-10 * error.log10().item(), abs=1e-3)
    assert trainer.callback_metrics["val/codebook_usage"].item() == pytest.approx(len(used) / 16)
    shares = torch.bincount(tokens.flatten(), minlength=16) / tokens.numel()
    assert trainer.callback_metrics["val/perplexity"].item() == pytest.approx(torch.special.entr(shares).sum().exp())


@pytest.mark.slow
def test_a_tokenizer_learns_and_keeps_pictures():
    module = tokenizer(rate=LearningRate(5e-3, warmup_steps=5, decay="cosine"))
    assert module.reconstructions is None
    first = fit(module, max_steps=1).callback_metrics["val/psnr"]
    trainer = fit(module, max_steps=80)
    assert trainer.callback_metrics["val/psnr"] > first + 3
    originals, reconstructions = module.reconstructions
    assert torch.equal(originals, batch_of(range(8), step=3).content)
    assert reconstructions.shape == originals.shape
    assert reconstructions.dtype == torch.uint8


def test_flips_are_a_function_of_sample_and_epoch():
    module = tokenizer(flip_probability=0.5)
    batch = batch_of(range(64))
    images = module.prepare_images(batch, flip_probability=0.5)
    straight = batch.content / 255
    flipped = (images != straight).flatten(1).any(1)
    assert torch.equal(images[flipped], straight[flipped].flip(-1))
    assert 20 < flipped.sum() < 44
    assert torch.equal(module.prepare_images(batch_of(range(7, 9)), flip_probability=0.5), images[7:9])
    later = module.prepare_images(batch_of(range(64), step=8), flip_probability=0.5)  # the same samples, one epoch on
    assert not torch.equal(later, images)


@pytest.mark.slow
def test_a_perceptual_network_stays_out_of_the_checkpoint(tmp_path):
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "model.pth")
    spec = {"name": "timm", "model": "mobilenetv3_small_050", "weights": str(tmp_path / "model.pth"), "size": 32}
    module = tokenizer(losses=("l2", PerceptualConfig(spec, weight=10.0)))
    assert "perceptual" in replay_step(module, batch_of(range(8)), step=0)
    assert module.state_dict().keys() == tokenizer().state_dict().keys()


def test_weights_in_16_bits_are_refused():
    with pytest.raises(ValueError, match=r"trainer\.precision must be 32-true or bf16-mixed, got bf16-true"):
        fit(tokenizer(), precision="bf16-true")


def test_logs_have_the_norms_of_both_networks_and_the_accuracy_of_the_discriminator():
    module = tokenizer(adversarial=replace(ADVERSARIAL, weight_rule="adaptive", weight=0.5), gradient_clip=1e-4)
    metrics = replay_step(module, batch_of(range(8)), step=0)
    images = batch_of(range(8)).content / 255
    image = module.network(images).reconstruction
    torch.testing.assert_close(metrics["adversarial_weight"], 0.5 * metrics["adaptive_weight"])
    real, fake = (module.discriminator(x).detach() for x in (images, image))
    assert metrics["discriminator_accuracy"] == ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
    logged = fit(module, max_steps=1).callback_metrics
    assert logged["train/gradient/generator"] > 1e-3  # before clipping
    assert logged["train/gradient/discriminator"] > 1e-3
    assert logged["train/gradient/generator"] != logged["train/gradient/discriminator"]


def test_the_adversarial_weight_rises_from_zero():
    config = replace(ADVERSARIAL, start_step=4, warmup_steps=5, weight=0.5)
    assert [config.weight_at(step) for step in (4, 5, 8, 9, 100)] == pytest.approx([0, 0.1, 0.4, 0.5, 0.5])
    assert ADVERSARIAL.weight_at(0) == 0.1
    module, plain = tokenizer(adversarial=config), tokenizer()
    weights = [replay_step(module, batch_of(range(8)), step=step)["adversarial_weight"].item() for step in (4, 6)]
    assert weights == pytest.approx([0, 0.2])
    module = tokenizer(adversarial=config)
    replay_step(module, batch_of(range(8)), step=4)
    replay_step(plain, batch_of(range(8)), step=4)
    for (name, ours), theirs in zip(module.network.named_parameters(), plain.network.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), name


def ddp_module(*, discriminator=ADVERSARIAL.discriminator, **changes):
    has_r1 = dict(discriminator).get("norm") != "batch" if isinstance(discriminator, dict) else True
    config = AdversarialConfig(
        discriminator, weight_rule="adaptive", lecam_weight=0.1, start_step=1, r1_weight=10.0 if has_r1 else 0.0
    )
    return tokenizer(adversarial=config, network=replace(NETWORK, quantizer={"name": "ema", "entropy_weight": 0.01,
                     "entropy_temperature": 1.0}), gradient_clip=1.0, **changes)  # fmt: skip


def in_two_processes(rank, folder, port, discriminator):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    module = ddp_module(discriminator=discriminator, accumulation=2)
    names = list(module.state_dict())
    stream = Stream(accumulation=2, rank=rank, ranks=2)
    trainer = fit(module, max_steps=6, stream=stream, strategy=build_strategy("ddp"), devices=2)
    assert list(module.state_dict()) == names
    torch.save([module.state_dict(), dict(trainer.callback_metrics), trainer.global_step], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


DISCRIMINATORS = [ADVERSARIAL.discriminator, *({**PATCHES, "norm": norm} for norm in ("group", "batch"))]


@pytest.mark.slow
@pytest.mark.parametrize("discriminator", DISCRIMINATORS, ids=["stylegan", "group", "batch"])
def test_two_ranks_train_as_one(tmp_path, discriminator):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(in_two_processes, str(tmp_path), port, discriminator)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first[2] == 6
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name
    alone = ddp_module(discriminator=discriminator, accumulation=2)
    trainer = fit(alone, max_steps=6)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[0][name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert first[1]["val/psnr"].item() == pytest.approx(trainer.callback_metrics["val/psnr"].item(), abs=1e-4)
