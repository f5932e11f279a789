import pytest
import torch
from torch import nn

from maskgit_pl.training.optimizers import frozen_copy, update_ema


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def moved(source: nn.Module) -> None:
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1.0)


def test_a_frozen_copy_is_equal_apart_and_needs_no_gradient():
    source = network()
    ema = frozen_copy(source)
    for kept, new in zip(ema.parameters(), source.parameters(), strict=True):
        assert torch.equal(kept, new)
        assert kept.data_ptr() != new.data_ptr()
        assert not kept.requires_grad
        assert new.requires_grad


def test_a_frozen_copy_stays_in_evaluation_mode_where_its_owner_trains():
    owner = nn.ModuleDict({"network": network()})
    owner["ema"] = frozen_copy(owner["network"])
    owner.train()
    assert owner["network"][2].training
    assert not any(module.training for module in owner["ema"].modules())
    assert owner["ema"].train() is owner["ema"]


@pytest.mark.parametrize(
    ("decay", "step", "effective"),
    [(0.999, 0, 0.1), (0.999, 1, 2 / 11), (0.999, 90, 0.91), (0.999, 10**6, 0.999), (0.5, 90, 0.5), (0.0, 5, 0.0)],
)
def test_the_average_moves_by_the_formula_with_its_ramp(decay, step, effective):
    source = network()
    ema = frozen_copy(source)
    before = [parameter.clone() for parameter in ema.parameters()]
    moved(source)
    update_ema(ema, source, decay=decay, step=step)
    for old, kept, new in zip(before, ema.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(kept, effective * old + (1 - effective) * new.detach())


def test_the_source_is_left_as_it_is_and_no_gradient_flows():
    source = network()
    ema = frozen_copy(source)
    moved(source)
    before = [parameter.detach().clone() for parameter in source.parameters()]
    update_ema(ema, source, decay=0.9, step=3)
    for old, new in zip(before, source.parameters(), strict=True):
        assert torch.equal(old, new)
    assert not any(parameter.requires_grad for parameter in ema.parameters())


def test_buffers_are_copied_and_not_averaged():
    source = network()
    ema = frozen_copy(source)
    source.train()(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(ema[1].running_mean, source[1].running_mean)
    update_ema(ema, source, decay=0.9, step=3)
    assert torch.equal(ema[1].running_mean, source[1].running_mean)
    assert ema[1].num_batches_tracked == 1


def test_repeated_updates_reach_a_source_that_stands_still():
    source = network()
    ema = frozen_copy(source)
    moved(source)
    for step in range(200):
        update_ema(ema, source, decay=0.9, step=step)
    for kept, new in zip(ema.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(kept, new.detach(), rtol=0, atol=1e-5)
