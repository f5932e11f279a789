"""Distillation: its losses by hand, the teacher's answers, roll-outs, resume, and wrong settings."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from maskgit_pl import MaskGIT
from maskgit_pl.data import Batch
from maskgit_pl.decoding import ConditionalModel, DecodingConfig
from maskgit_pl.decoding.decoder import decode_classes
from maskgit_pl.evaluation import distill
from maskgit_pl.pretrained.networks import fingerprint, load_transformer
from maskgit_pl.training.checkpoints import newest_checkpoint
from maskgit_pl.training.optimizers import LearningRate, OptimizerConfig
from maskgit_pl.transformer.distillation import DistillationConfig, distillations
from maskgit_pl.transformer.distilled_model import DistilledModel
from tests.short_runs import assert_equal, data, fit

METHODS = ("dimo", "guidance")
LABELS, INDEX = torch.tensor([0, 1, 2, 1]), torch.arange(4)


def student(pretrained, method: str | dict = "dimo", *, num_steps: int = 1, **options) -> DistilledModel:
    torch.manual_seed(0)
    network = load_transformer(pretrained / "transformer").network.config
    decoding = DecodingConfig(num_steps, "confidence", random_start=0.5)
    config = DistillationConfig(
        network,
        OptimizerConfig(LearningRate(1e-2)),
        str(pretrained / "tokenizer"),
        **{
            "global_batch": 8,
            "teacher": str(pretrained / "transformer"),
            "distillation": method,
            "mask_schedule": {"name": "pow", "exponent": 2.0},
            "decoding": decoding,
            **options,
        },
    )
    module = DistilledModel(config)
    module.start_from(pretrained / "transformer")
    return module


def batch_of(module: DistilledModel, step: int = 0) -> Batch:
    """Returns a batch with its draws, and makes the student stop its roll-outs at a step."""
    module.draw_step = lambda: step
    tokens = torch.randint(16, (4, 16), generator=torch.Generator().manual_seed(1))
    return module.eval()._with_draws(Batch(tokens, LABELS, INDEX, torch.zeros_like(INDEX), INDEX, INDEX >= 0))


@pytest.mark.parametrize(
    ("key", "value", "default"),
    [
        ("objective", {"name": "masked_cross_entropy", "visible_weight": 1.0}, "masked_cross_entropy"),
        ("corruption", {"name": "random_tokens", "most": 0.1}, "mask"),
    ],
)
def test_a_part_of_the_training_that_a_distillation_replaces_is_refused(tiny_pretrained, key, value, default) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{key} must be one of {default}, got \{{'name': '{value['name']}'"):
        student(tiny_pretrained, **{key: value})


def test_the_teacher_answers_as_its_decoding_draws(tiny_pretrained) -> None:
    decoding = DecodingConfig(4, guidance={"name": "linear", "scale": 3.0}, sampling_temperature=(0.5, 1.5))
    module = student(tiny_pretrained, teacher_decoding=decoding)
    batch, network = batch_of(module), module.teacher.network
    plan = decoding.build_decoder(module.mask_schedule).plan([16], 16)
    assert [counts.before[0] for counts in plan] == [16, 15, 12, 7]
    for masked, progress in ((16, 0.0), (15, 1 / 3), (12, 2 / 3), (7, 1.0), (1, 1.0)):
        tokens = batch.content.clone()
        tokens[:, :masked] = module.config.network.mask_token_id
        conditional, unconditional = network(tokens, LABELS), network(tokens, torch.full_like(LABELS, 3))
        expected = (conditional + 3 * progress * (conditional - unconditional)) / (0.5 + progress)
        torch.testing.assert_close(module.teach(tokens, batch), expected.log_softmax(-1), atol=0.02, rtol=0)


def test_guidance_is_the_divergence_at_the_masked_tokens(tiny_pretrained) -> None:
    module = student(tiny_pretrained, "guidance")
    batch = batch_of(module)
    losses = module.method(module, batch, batch.content)
    seen = batch.content.masked_fill(batch.draws.mask, module.config.network.mask_token_id)
    target, answer = module.teach(seen, batch), module.transformer(seen, LABELS).log_softmax(-1)
    each = (target.exp() * (target - answer)).sum(-1)
    means = [each[row][batch.draws.mask[row]].mean() for row in range(4)]
    torch.testing.assert_close(losses.loss, torch.stack(means).mean())
    torch.testing.assert_close(losses.token_losses, each[batch.draws.mask])


def test_dimo_moves_the_student_by_the_gradient_and_the_auxiliary_network_by_its_likelihood(tiny_pretrained) -> None:
    module = student(tiny_pretrained)
    batch = batch_of(module)
    logits, drawn, is_drawn = module.roll_out(batch)
    assert is_drawn.all()
    kept: list[Tensor] = []
    module.roll_out = lambda batch: (kept.append(logits.detach().requires_grad_()) or kept[0], drawn, is_drawn)
    losses = module.method(module, batch, batch.content)
    losses.loss.backward()
    mask = batch.draws.mask
    seen = drawn.masked_fill(mask, module.config.network.mask_token_id)
    answer = module.auxiliary(seen, LABELS).log_softmax(-1).detach()
    gradient = answer.exp() - module.teach(seen, batch).exp()
    expected = gradient * mask.unsqueeze(-1) / mask.sum(1).view(4, 1, 1) / 4
    torch.testing.assert_close(kept[0].grad, expected)
    found = [parameter.grad.clone() for parameter in module.auxiliary.parameters()]
    module.auxiliary.zero_grad()
    answer = module.auxiliary(seen, LABELS).log_softmax(-1)
    each = -answer.gather(-1, drawn.unsqueeze(-1)).squeeze(-1) * mask
    (each.sum(1) / mask.sum(1)).mean().backward()
    for mine, parameter in zip(found, module.auxiliary.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_the_auxiliary_network_has_a_rate_of_its_own(tiny_pretrained) -> None:
    groups = student(tiny_pretrained, {"name": "dimo", "auxiliary_rate": 2.0}).trained_groups()
    assert [group.get("lr") for group in groups] == [None, None, 2e-2, 2e-2]  # None: that of the optimizer, 1e-2


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_roll_out_makes_the_images_of_the_decoding(tiny_pretrained, num_steps: int) -> None:
    module = student(tiny_pretrained, num_steps=num_steps)
    batch = batch_of(module, step=num_steps - 1)
    _, noise = module.draw_start(batch)
    model = ConditionalModel(module.transformer, module.device)
    scales = module.decoding.scales()
    steps = list(decode_classes(model, LABELS.tolist(), noise.seeds.tolist(), decoder=module.decoder, scales=scales))
    assert torch.equal(module.roll_out(batch).tokens, steps[-1].tokens)
    assert len(steps) == num_steps


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_distillation_equals_an_uninterrupted_one(method, tiny_shards, tiny_pretrained, tmp_path) -> None:
    options = {"num_steps": 2, "ema_decay": 0.9}
    whole = student(tiny_pretrained, method, **options)
    expected = fit(whole, data(tiny_shards), steps=6, folder=tmp_path / "whole")
    first = fit(student(tiny_pretrained, method, **options), data(tiny_shards), steps=3, folder=tmp_path / "parts")
    resumed = student(tiny_pretrained, method, **options)
    rest = fit(
        resumed, data(tiny_shards), steps=6, folder=tmp_path / "parts", resume=newest_checkpoint(tmp_path / "parts")
    )
    assert first.losses + rest.losses == expected.losses
    assert_equal(resumed.state_dict(), whole.state_dict())
    assert not any(name.startswith("_teacher") for name in whole.state_dict())


def test_a_student_is_exported_with_its_decoding(tiny_pretrained, tmp_path) -> None:
    student(tiny_pretrained).export(tmp_path, class_names=("Ankle boot", "T-shirt", "Trouser"))
    pipe = MaskGIT.from_pretrained(tmp_path)
    assert pipe.decoding == DecodingConfig(1, "confidence", random_start=0.5)
    first, second = pipe.generate(["T-shirt"] * 2, seed=3, output_type="pt")
    assert not torch.equal(first, second)


def test_settings_that_do_not_fit_are_refused(tiny_pretrained, tiny_autoregressive) -> None:
    with pytest.raises(ValueError, match=r"^decoding\.guidance must have scale 0, since the student learns"):
        student(tiny_pretrained, decoding=DecodingConfig(2, guidance={"name": "linear", "scale": 1.0}))
    with pytest.raises(
        ValueError, match="teacher must be a pretrained transformer folder, got none; name its model by"
    ):
        student(tiny_pretrained, teacher="")
    with pytest.raises(ValueError, match=r"distillation 'dymo': .*dimo"):
        student(tiny_pretrained, "dymo")
    with pytest.raises(ValueError, match=r"auxiliary_rate must be a number in \(0, 1000\], got 0"):
        distillations.build({"name": "dimo", "auxiliary_rate": 0})
    with pytest.raises(ValueError, match=r"^model\.mask_schedule must be Pow.exponent=2.0., that of the teacher"):
        _ = student(tiny_pretrained, mask_schedule="linear").teacher
    module = student(tiny_pretrained)
    module.config = replace(module.config, teacher=str(tiny_autoregressive / "transformer"))
    with pytest.raises(ValueError, match="distillation requires a model with bidirectional attention"):
        _ = module.teacher


def test_a_transformer_that_does_not_belong_to_its_tokenizer_is_no_teacher_and_no_start(tiny_pretrained, tmp_path):
    mixed, tokenizer = shutil.copytree(tiny_pretrained, tmp_path / "mixed"), fingerprint(tiny_pretrained / "tokenizer")
    config = mixed / "transformer" / "config.json"
    config.write_text(config.read_text().replace(tokenizer, "0" * 64))
    message = f"whose fingerprint is 000000000000, got {tokenizer[:12]}; load that tokenizer"
    with pytest.raises(ValueError, match=message):
        distill(mixed, run=tmp_path / "student", data=tmp_path)
    with pytest.raises(ValueError, match=message):
        _ = student(tiny_pretrained, teacher=str(config.parent)).teacher
    with pytest.raises(ValueError, match=message):
        student(tiny_pretrained).start_from(config.parent)
    shutil.rmtree(mixed / "tokenizer")
    student(tiny_pretrained).start_from(config.parent)  # weights alone, which a run may start from
