"""Frozen parts of the tokenizer keep every bit, have no optimizer state, and the rest trains."""

from dataclasses import replace

import pytest
import torch

from maskgit_pl.training.tokenizer_losses import AdversarialConfig
from tests.test_tokenizer import ADVERSARIAL, NETWORK, batch_of, fit, tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`srun` command is available"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
PARTS = ("encoder", "quantizer", "decoder")


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frozen", "quantizer"),
    [
        (["encoder", "quantizer"], "ema"),
        (["quantizer"], "ema"),
        (["quantizer", "decoder"], "gradient"),
        (["encoder", "decoder"], "gradient"),  # only the codes train
    ],
    ids=str,
)
def test_frozen_parts_keep_every_bit_and_the_others_train(frozen, quantizer):
    network = replace(NETWORK, quantizer=quantizer)
    adversarial = replace(ADVERSARIAL, weight_rule="fixed" if "decoder" in frozen else "adaptive")
    module = tokenizer(network=network, freeze=frozen, adversarial=adversarial)
    before = state_of(module.network)
    trainer = fit(module, max_steps=2)
    after = state_of(module.network)
    for part in PARTS:
        same = [torch.equal(after[name], before[name]) for name in before if name.startswith(f"{part}.")]
        assert all(same) if part in frozen else not all(same), part
    averaged = state_of(module.ema_network)
    for name in before:
        if name.split(".")[0] in frozen:
            assert torch.equal(averaged[name], before[name]), name
    trained = sum(1 for name, _ in module.network.named_parameters() if name.split(".")[0] not in frozen)
    assert len(trainer.optimizers[0].state) == trained
    assert all(parameter.grad is None for part in frozen for parameter in getattr(module.network, part).parameters())


def test_a_decoder_is_fine_tuned_from_a_pretrained_tokenizer_at_another_resolution(tmp_path):
    start = tokenizer()
    fit(start, max_steps=2)
    start.export(tmp_path)
    larger = tokenizer(image_size=24, freeze=["encoder", "quantizer"])
    larger.start_from(tmp_path / "tokenizer")
    assert larger.grid == (6, 6)
    assert start.grid == (4, 4)
    images = torch.nn.functional.interpolate(batch_of(range(4)).content.float() / 255, size=(24, 24))
    tokens = start.ema_network.encode(images)
    assert torch.equal(larger.network.encode(images), tokens)
    batch = batch_of(range(4))._replace(content=(images * 255).to(torch.uint8))
    larger.replay_step(batch, step=0)
    assert all(parameter.grad is not None for parameter in larger.network.decoder.parameters())
    assert all(parameter.grad is None for parameter in larger.network.encoder.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": PARTS}, r"freeze must be one or two different parts of encoder, quantizer, decoder, got"),
        ({"freeze": ["encoder", "encoder"]}, r"freeze must be one or two different parts"),
        ({"freeze": ["encoderr"]}, r"freeze must be one of encoder, quantizer, decoder, got 'encoderr'; did you mean"),
        ({"freeze": ["encoder", "decoder"]}, r"freeze must leave weights to train, .* the quantizer ema has none"),
        (
            {"freeze": ["decoder"], "adversarial": AdversarialConfig(weight_rule="adaptive")},
            r"freeze must not hold the decoder .*set model\.adversarial\.weight_rule to fixed",
        ),
    ],
)
def test_what_cannot_be_frozen_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tokenizer(**options)
