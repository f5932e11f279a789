"""Losses of large codebooks have the values and gradients of those of smaller ones, without a tensor of all logits."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from maskgit_pl.networks import base_transformer
from maskgit_pl.networks.base_transformer import measure_logits, needs_chunks
from maskgit_pl.transformer.losses import token_statistics
from tests.test_host_waits import BACKBONES, OBJECTIVES, batch, build, loss_and_gradients

OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "groups": {"label_smoothing": 0.1, "num_token_groups": 2},
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Logits of 3 rows are computed at once, for any number of columns."""
    monkeypatch.setattr(base_transformer, "_MOST_LOGITS", 0)
    monkeypatch.setattr(base_transformer, "_LEAST_COLUMNS", 1)
    monkeypatch.setattr(base_transformer, "_LEAST_ROWS", 3)
    monkeypatch.setattr(base_transformer, "_CHUNK_LOGITS", 0)


def measured(x: Tensor, table: Tensor, bias: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """Returns the statistics of the logits x table^T + bias."""

    def measure(logits: Tensor, place: slice) -> Tensor:
        return token_statistics(logits, targets[place], **options)

    return measure_logits(x, lambda part: F.linear(part, table, bias), measure, num_columns=len(table))


def inputs(rows: int, columns: int, size: int = 16) -> list[Tensor]:
    chance = torch.Generator().manual_seed(0)
    shapes = (rows, size), (columns, size), (columns,)
    return [torch.randn(shape, generator=chance).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("rows", [1, 3, 10])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_have_the_values_and_gradients_of_whole_logits(options, rows, small_chunks):
    columns = 16 if "num_token_groups" in options else 64
    arguments, generator = inputs(rows, columns), torch.Generator().manual_seed(1)
    targets, weights = torch.randint(64, (rows,), generator=generator), torch.rand(rows, generator=generator)
    whole = token_statistics(F.linear(*arguments), targets, **options)
    chunked = measured(*arguments, targets, **options)
    gradients = [
        torch.autograd.grad((statistics[:, 0] * weights).sum(), arguments, retain_graph=True)
        for statistics in (whole, chunked)
    ]
    for values, expected in zip([chunked, *gradients[1]], [whole, *gradients[0]], strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "objective"),
    [*((name, "masked_cross_entropy") for name in BACKBONES), *(("bert", name) for name in OBJECTIVES)],
)
def test_a_step_in_chunks_has_the_same_loss_and_gradients(backbone, objective, request):
    loss, gradients, _ = loss_and_gradients(build(backbone, objective), 0)
    request.getfixturevalue("small_chunks")
    chunked_loss, chunked_gradients, _ = loss_and_gradients(build(backbone, objective), 0)
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-6, atol=0)
    assert (chunked_gradients - gradients).norm() < 1e-6 * gradients.norm()


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [(42_000, 2025, False), (2048, 2**14, False), (2049, 2**14, True), (1024, 2**16, True), (100, 2**18, False)],
)
def test_large_logits_of_large_codebooks_are_divided(rows, columns, expected):
    assert needs_chunks(rows, columns) == expected


class LargestTensor(TorchDispatchMode):
    """A mode that keeps the largest number of values of a tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in torch.utils._pytree.tree_leaves(made) if is_new(t))])
        return made


def is_new(value: object) -> bool:
    """Returns True for a tensor that holds its values: neither a view nor an expanded number."""
    return isinstance(value, Tensor) and not value._is_view() and 0 not in value.stride()


@pytest.mark.parametrize(("columns", "rows"), [(2**14, 4096), (2**16, 1024), (2**18, 4096)])
def test_no_tensor_is_larger_than_a_chunk(columns, rows):
    with torch.device("meta"):
        arguments = [torch.empty(shape, requires_grad=True) for shape in ((rows, 64), (columns, 64), (columns,))]
        targets = torch.zeros(rows, dtype=torch.int64)
        with LargestTensor() as seen:
            measured(*arguments, targets)[:, 0].sum().backward()
    assert seen.numel <= max(2**24, 128 * columns) < rows * columns


@pytest.mark.parametrize("backbone", BACKBONES)
def test_values_for_the_logs_keep_no_graph(backbone, small_chunks):
    """Sums of them live until the next log: they would keep the graphs of all steps until then."""
    module = build(backbone)
    step = module._compute_training_losses(module._with_draws(batch()))
    assert step.loss.requires_grad
    assert not step.token_losses.requires_grad
    assert not step.hits.requires_grad
