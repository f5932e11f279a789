"""The loss of large codebooks in chunks: the same values and gradients, without a tensor of all logits."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from maskgit_pl import losses
from maskgit_pl.losses import TokenStatistics, chunked_statistics, needs_chunks, token_statistics
from maskgit_pl.networks.transformer import TransformerConfig
from tests.modules import losses_of_step, masked_model
from tests.test_one_graph import BACKBONES, OBJECTIVES, batch, build, check_one_graph, loss_and_gradients

OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "groups": {"label_smoothing": 0.1, "num_token_groups": 2},
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Logits of 3 rows are computed at once, for any number of columns."""
    monkeypatch.setattr(losses, "_MOST_LOGITS", 0)
    monkeypatch.setattr(losses, "_LEAST_COLUMNS", 1)
    monkeypatch.setattr(losses, "_LEAST_ROWS", 3)
    monkeypatch.setattr(losses, "_CHUNK_LOGITS", 0)


def inputs(rows: int, columns: int, size: int = 16) -> list[Tensor]:
    chance = torch.Generator().manual_seed(0)
    shapes = (rows, size), (columns, size), (columns,)
    return [torch.randn(shape, generator=chance).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("rows", [1, 3, 10])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_values_and_gradients_are_those_of_whole_logits(options, rows, small_chunks):
    columns = 16 if "num_token_groups" in options else 64
    given = inputs(rows, columns)
    targets = torch.randint(64, (rows,), generator=torch.Generator().manual_seed(1))
    whole = token_statistics(F.linear(*given), targets, **options)
    found = TokenStatistics(
        *chunked_statistics(*given, targets=targets, measure=partial(token_statistics, **options)).unbind(1)
    )
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(2))
    gradients = []
    for each in (whole, found):
        gradients.append(torch.autograd.grad((each.losses * weights).sum(), given, retain_graph=True))
    for mine, expected in zip([*found, *gradients[1]], [*whole, *gradients[0]], strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "objective"),
    [*((name, "masked_cross_entropy") for name in BACKBONES), *(("bert", name) for name in OBJECTIVES)],
)
def test_a_step_has_the_same_loss_and_gradients(backbone, objective, monkeypatch, request):
    loss, gradients, _ = loss_and_gradients(build(backbone, objective), 0)
    request.getfixturevalue("small_chunks")
    found, own, _ = loss_and_gradients(build(backbone, objective), 0)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    assert (own - gradients).norm() < 1e-6 * gradients.norm()


@pytest.mark.slow
def test_chunks_are_part_of_the_graph(small_chunks, monkeypatch):
    check_one_graph("adaln", "masked_cross_entropy", monkeypatch)


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


def largest_of_a_step(columns: int, rows: int) -> int:
    with torch.device("meta"):
        given = inputs_on_meta(rows, columns)
        targets = torch.zeros(rows, dtype=torch.int64)
        with LargestTensor() as seen:
            chunked_statistics(*given, targets=targets, measure=token_statistics)[:, 0].sum().backward()
    return seen.numel


def inputs_on_meta(rows: int, columns: int) -> list[Tensor]:
    return [torch.empty(shape, requires_grad=True) for shape in ((rows, 64), (columns, 64), (columns,))]


@pytest.mark.parametrize(("columns", "rows"), [(2**14, 4096), (2**16, 1024), (2**18, 4096)])
def test_no_tensor_is_larger_than_a_chunk(columns, rows):
    assert largest_of_a_step(columns, rows) <= max(2**24, 128 * columns) < rows * columns


@pytest.mark.slow
def test_a_model_of_a_large_codebook_divides_its_logits_by_itself(monkeypatch):
    monkeypatch.setattr(losses, "_MOST_LOGITS", 2**20)
    network = TransformerConfig(2**14, 3, (16, 16), embed_dim=8, depth=1, num_heads=1, mlp_dim=8, dropout=0.0)
    module, given = masked_model(network, "unused"), batch()
    content = torch.arange(8 * 256).view(8, 256)
    module.config = replace(module.config, network=network)
    with LargestTensor() as seen:
        loss, size = loss_and_size(module, given._replace(content=content))
    assert torch.isfinite(loss)
    assert seen.numel < size * network.num_rows
    assert seen.numel <= 2**24


def loss_and_size(module, given):
    drawn = module._with_draws(given)
    loss = losses_of_step(module, drawn).loss
    loss.backward()
    return loss.detach(), len(drawn.draws.positions)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_values_for_the_logs_keep_no_graph(backbone, small_chunks):
    """Sums of them live until the next log: they would keep the graphs of all steps until then."""
    module, given = build(backbone), batch()
    drawn = module._with_draws(given)
    found = losses_of_step(module, drawn)
    assert found.loss.requires_grad
    assert not found.token_losses.requires_grad
    assert not found.hits.requires_grad
