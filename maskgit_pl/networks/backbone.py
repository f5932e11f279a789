"""Backbones: the networks of stage 2, which predict tokens, by name.

A backbone is a frozen configuration, which is registered in ``backbones`` and creates the network, and the network, a
``Backbone``. ``forward`` is the only method that a network must have. Recipes and ``config.json`` choose one by name
(``model.network: {backbone: adaln, embed_dim: 128}``); without the key ``backbone`` it is ``bert``, the transformer of
the paper. Another package adds one through an entry point; see ``docs/plug-ins.md``.

Shapes: B images, N tokens per image, K codebook size, V columns of the logits, C size of a conditioning vector.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from maskgit_pl.checks import check_integer, check_keys, check_number, describe_wrong_values, validate
from maskgit_pl.networks.kernels import linear
from maskgit_pl.networks.weights import skeletons
from maskgit_pl.registry import Registry, derives_from
from maskgit_pl.text import shorten

__all__ = [
    "BUILT_IN",
    "DEFAULT_BACKBONE",
    "LARGEST_COMPOSED",
    "MOST_TOKENS",
    "Attention",
    "AutoregressiveBackbone",
    "Backbone",
    "BackboneConfig",
    "KVCache",
    "Measure",
    "PredictAt",
    "TokenEmbedding",
    "Vocabulary",
    "backbones",
    "build_config",
    "compose_logits",
    "config_class",
    "create_network",
    "likeliest_tokens",
    "read_config_values",
    "split_tokens",
    "token_head",
]

Attention = Literal["bidirectional", "causal"]
Vocabulary = Literal["codes", "all", "groups"]
Measure: TypeAlias = Callable[[Tensor, slice], Tensor]
"""Logits (m, V) of some of M tokens, and their place among the M -> (m, F) float; see ``Backbone.measure_selected``."""
PredictAt: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Tokens (B, N), positions (B, M) -> logits (B, M, K) of the codes; see ``Backbone.forward_at``."""

DEFAULT_BACKBONE = "bert"
"""The backbone of recipes and files that name none."""

BUILT_IN = {"adaln": "maskgit_pl.networks.adaln", "bert": "maskgit_pl.networks.transformer"}
"""The backbones of this package: name and module, which is imported when a backbone is looked up."""

MOST_TOKENS = 2**16
"""Largest number of tokens of a grid, 256 times those of a released image."""

LARGEST_COMPOSED = 2**18
"""Largest codebook of a network with token groups: decoding computes a logit for each code from those of the groups."""

_LARGEST = {"codebook_size": (1, 2**24), "num_classes": (1, 100_000), "condition_dim": (0, 2**16)}
_MOST_GROUPS = 24


@dataclass(frozen=True)
class BackboneConfig(ABC):
    """The base of all configurations of backbones: what the rest of the package must know of a network.

    A subclass is a frozen dataclass with further fields, all with defaults, and gives ``backbone`` the name
    that it is registered under as its default.

    Args:
        codebook_size: K, size of the tokenizer's codebook.
        num_classes: Number of classes, >= 1 (1 for data without classes).
        grid: Sizes of the axes of the token grid, whose product is N: (h, w) of an image, (N,) of a sequence, (t, h, w)
            of a video. Tokens are in raster order, the last axis fastest.
        backbone: Registered name of the backbone.
        class_dropout: Fraction of training samples whose class and vector are hidden from the network, in [0,
            1). Above 0 there is a null label, which classifier-free guidance needs.
        dropout: Dropout probability of the network, in [0, 1).
        condition_dim: C, size of the conditioning vector of an image, such as an embedding of its caption; 0 for none.
        num_token_groups: G, groups in which a token is embedded and predicted; K = k^G. With 1, a token is one id.

    Raises:
        ValueError: if a number is out of range, K is not k^G, or the backbone has no token groups.
    """

    has_token_groups: ClassVar[bool] = False
    """True if the network follows ``num_token_groups``; see ``TokenEmbedding``."""

    transferable: ClassVar[tuple[str, ...]] = ("num_classes", "grid", "class_dropout", "dropout")
    """Fields in which a network may differ from the pretrained one that it starts from."""

    codebook_size: int
    num_classes: int
    grid: tuple[int, ...]
    _: KW_ONLY
    backbone: str
    class_dropout: float = 0.1
    dropout: float = 0.1
    condition_dim: int = 0
    num_token_groups: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name, None), list):  # of a recipe or config.json
                object.__setattr__(self, field.name, tuple(value))
        for name, (least, most) in _LARGEST.items():
            check_integer(f"transformer {name}", getattr(self, name), f"[{least}, {most}]")
        for size in self.grid:
            check_integer("transformer grid", size, f"[1, {MOST_TOKENS}]")
        if not 1 <= len(self.grid) <= 3 or self.num_tokens > MOST_TOKENS:
            raise ValueError(
                f"transformer grid must have 1 to 3 axes and at most {MOST_TOKENS} tokens, got {shorten(self.grid)}"
            )
        for name in ("dropout", "class_dropout"):
            check_number(f"transformer {name}", getattr(self, name), "[0, 1)")
        self._check_groups()

    def _check_groups(self) -> None:
        """Checks that the codebook can be divided into ``num_token_groups`` groups."""
        groups, size = self.num_token_groups, self.codebook_size
        check_integer("transformer num_token_groups", groups, f"[1, {_MOST_GROUPS}]")
        if groups == 1:
            return
        if not self.has_token_groups:
            raise ValueError(
                f"transformer num_token_groups must be 1 for the backbone {self.backbone!r}, got {groups}; use bert or "
                "adaln"
            )
        if self.group_size < 2 or self.group_size**groups != size:
            raise ValueError(
                f"transformer num_token_groups must be a number G with codebook_size = k^G, got {groups} for "
                f"{size} codes; {max(2, self.group_size) ** groups} = {max(2, self.group_size)}^{groups} codes fit"
            )
        if size > LARGEST_COMPOSED:
            raise ValueError(
                f"transformer codebook_size must be at most {LARGEST_COMPOSED} with num_token_groups above 1, because "
                f"decoding computes a logit for each code, got {size}; use a tokenizer with fewer codes"
            )

    @property
    def num_tokens(self) -> int:
        """The number of tokens of an image, N."""
        return math.prod(self.grid)

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class and no vector"; None if class dropout is 0."""
        return self.num_classes if self.class_dropout > 0 else None

    @property
    def vocabulary_size(self) -> int:
        """The size of the vocabulary: codes, classes, the null class if there is one, the mask token."""
        return self.codebook_size + self.num_classes + (self.null_label is not None) + 1

    @property
    def group_size(self) -> int:
        """The number of values of a group, k; K with one group."""
        size: int = round(self.codebook_size ** (1 / self.num_token_groups))
        return size

    @property
    def num_code_rows(self) -> int:
        """The number of rows of the token embedding for codes: k for each group, G k."""
        return self.num_token_groups * self.group_size

    @property
    def num_rows(self) -> int:
        """The number of rows of the token embedding: ``num_code_rows``, then one for each other id."""
        return self.vocabulary_size - self.codebook_size + self.num_code_rows

    def num_columns(self, vocabulary: Vocabulary) -> int:
        """Returns the number of rows of the token embedding that the logits are computed with."""
        # Codes come first in the table, so the others need not be computed.
        return self.num_rows if vocabulary == "all" and self.num_token_groups == 1 else self.num_code_rows

    def loss_columns(self, vocabulary: Vocabulary) -> Vocabulary:
        """Returns the columns of the logits that a loss needs: those of ``vocabulary``, or of the token groups."""
        return vocabulary if self.num_token_groups == 1 else "groups"

    @property
    def mask_token_id(self) -> int:
        """The id of the mask token, the last one of the vocabulary."""
        return self.vocabulary_size - 1

    @property
    def attention(self) -> Attention:
        """The tokens that a prediction depends on: all of them, or (``causal``) those before it in raster order."""
        return "bidirectional"

    @property
    def num_blocks(self) -> int:
        """The number of blocks: the field ``depth``, or 1 if that is no integer. A block has at least one tensor."""
        depth = getattr(self, "depth", None)
        return depth if isinstance(depth, int) else 1

    @abstractmethod
    def create(self) -> Backbone:
        """Creates the network, with initial weights."""


class Backbone(nn.Module):
    """The base of all networks of stage 2.

    All methods take tokens (B, N) int64, codes in [0, K) or ``mask_token_id``; labels (B,) int64 in [0,
    num_classes), or ``null_label``; and for a network with ``condition_dim`` C > 0, vectors (B, C) float.
    Where the label is the null label, the network ignores the vector and uses a learned null vector instead.

    All weights must be parameters or buffers of the state dict. A network with other entry points than these,
    whose blocks are run by other methods than ``forward``, or with row-wise tables sets the attributes below.

    Args:
        config: The configuration that creates the network.

    Attributes:
        config: The configuration.
        blocks: The repeated parts. Activation checkpointing, compilation and FSDP2 work block by block. May
            be empty: the network is then one group.
        entry_points: Methods that are called besides ``forward``. FSDP2 gathers the weights for them too.
        vocabulary_tables: Names of tensors in the state dict with a row for each id of the vocabulary; the
            codes have ``num_code_rows`` rows.
        class_tables: Names of tensors with a row for each class, and for the null label if there is one.
        position_tables: Names of tensors with a row for each token of the grid in raster order, after any
            number of other rows.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("forward_selected", "measure_selected", "forward_at", "conditioned")
    vocabulary_tables: ClassVar[tuple[str, ...]] = ()
    class_tables: ClassVar[tuple[str, ...]] = ()
    position_tables: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList()

    @abstractmethod
    def forward(
        self, tokens: Tensor, labels: Tensor, *, vectors: Tensor | None = None, vocabulary: Vocabulary = "codes"
    ) -> Tensor:
        """Returns the logits of all tokens.

        Args:
            tokens: (B, N) int64.
            labels: (B,) int64.
            vectors: (B, C) float; None without conditioning vectors.
            vocabulary: Columns of the result: the K codes, the whole vocabulary, or the G k values of all
                token groups. A network that predicts only codes may return K columns for the first two.
                Without token groups, the last one is not asked for.

        Returns:
            (B, N, V) float.
        """

    def forward_selected(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        *,
        vectors: Tensor | None = None,
        vocabulary: Vocabulary = "codes",
    ) -> Tensor:
        """Returns the logits of M tokens of the batch; see ``forward`` for the other arguments.

        Args:
            tokens: (B, N) int64.
            labels: (B,) int64.
            positions: (M,) int64 in [0, B N): token n of image b is at b N + n.
            vectors: (B, C) float.
            vocabulary: Columns of the result.

        Returns:
            (M, V) float.
        """
        # Not self(...): FSDP2 and DDP have gathered the weights for this method already.
        return self.forward(tokens, labels, vectors=vectors, vocabulary=vocabulary).flatten(0, 1)[positions]

    def measure_selected(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        measure: Measure,
        *,
        vectors: Tensor | None = None,
        vocabulary: Vocabulary = "codes",
    ) -> Tensor:
        """Returns what ``measure`` computes from the logits of M tokens, (M, F) float, for training.

        A network may call it for chunks of the tokens, so that no tensor holds all logits. See ``forward_selected``
        for the other arguments.
        """
        # The method of the class, as above.
        select = type(self).forward_selected
        return measure(select(self, tokens, labels, positions, vectors=vectors, vocabulary=vocabulary), slice(None))

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor, *, vectors: Tensor | None = None) -> Tensor:
        """Returns the logits of the codes (B, M, K) at ``positions`` (B, M) int64 in [0, N), for decoding.

        See ``forward`` for the other arguments.
        """
        logits = self.forward(tokens, labels, vectors=vectors)
        return logits.gather(1, positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))

    def conditioned(self, labels: Tensor, vectors: Tensor | None = None) -> PredictAt:
        """Returns ``forward_at`` with fixed labels and vectors, for the steps of a decoding run.

        A network that computes much from these only does so here, once for all steps.
        """
        return lambda tokens, positions: self.forward_at(tokens, labels, positions, vectors=vectors)


class AutoregressiveBackbone(Backbone):
    """The base of networks with causal attention, which predict each token from those before it in raster order.

    ``forward`` and ``forward_selected`` compute all tokens in one pass; the mask token is not part of their input.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("forward_selected", "measure_selected", "forward_next")

    @abstractmethod
    def forward_next(self, tokens: Tensor, labels: Tensor, *, cache: Sequence[KVCache] | None = None) -> Tensor:
        """Returns the logits of the next token.

        Args:
            tokens: (B, t) int64 in [0, K): the tokens before it, t in [0, N).
            labels: (B,) int64 in [0, num_classes), or ``null_label``.
            cache: Cache of this decoding run from ``create_cache``, changed in place; each call has one token
                more than the call before. None computes all rows at each call.

        Returns:
            (B, K) float: logits of the codes.
        """

    def create_cache(self) -> list[KVCache]:
        """Returns an empty cache for each block, for one run of ``forward_next``."""
        return [KVCache(self.config.num_tokens) for _ in self.blocks]


backbones: Registry[BackboneConfig] = Registry(
    "backbone",
    "maskgit_pl.backbones",
    check=derives_from(BackboneConfig),
    modules=tuple(BUILT_IN.values()),
)
"""The configurations of all backbones by name. ``build_config`` builds one from the values of a file."""


def build_config(values: object, where: str) -> BackboneConfig:
    """Builds the configuration of a backbone from the plain values of a file.

    Args:
        values: Mapping with the key ``backbone`` (``bert`` without it) and the fields of that backbone.
        where: File and key of the values, for messages.

    Raises:
        ValueError: if the values are no mapping, the backbone is unknown, or a field is unknown, missing or wrong.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping, got {shorten(values)}")
    try:
        return cast("BackboneConfig", read_config_values(values))
    except ValueError as error:
        raise ValueError(describe_wrong_values(error, values, where)[0].text) from error


def read_config_values(values: Any) -> Any:
    """Builds the configuration of the backbone that plain values name; other objects are returned as they are.

    For ``model.network`` of a recipe, whose dataclass depends on the backbone.

    Raises:
        ValueError: if a field is unknown, missing or wrong, or the backbone is unknown.
    """
    if not isinstance(values, Mapping):
        return values
    name = values.get("backbone", DEFAULT_BACKBONE)
    if not isinstance(name, str):
        raise ValueError(f"backbone must be a string, got {shorten(name)}")
    kind = config_class(name)
    check_keys(f"backbone {name!r}", values, known=[field.name for field in fields(kind) if field.init])
    try:
        return validate(kind, {**values, "backbone": name})
    except ValueError:
        raise
    except (Exception, SystemExit) as error:  # of a plug-in
        raise ValueError(f"backbone {name!r} cannot be built: {type(error).__name__}: {error}") from error


def config_class(name: str) -> type[BackboneConfig]:
    """Returns the class of the configuration of a backbone.

    Raises:
        ValueError: if the name is unknown, or a plug-in cannot be loaded or is of another kind.
    """
    kind = backbones.factory(name)
    if not isinstance(kind, type) or not issubclass(kind, BackboneConfig):
        raise ValueError(
            f"backbone {name!r}: a class derived from BackboneConfig must be registered, got {shorten(kind)}"
        )
    return kind


def create_network(config: BackboneConfig) -> Backbone:
    """Creates the network of a configuration; the logits of a plug-in's must have a row for each token.

    Raises:
        ValueError: if the logits of another package's network have a wrong shape, which a training would not notice.
    """
    if not type(config).__module__.startswith("maskgit_pl."):
        with skeletons():  # without memory and arithmetic
            network = config.create().eval()
            tokens, labels = torch.zeros(2, config.num_tokens, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
            vectors = torch.zeros(2, config.condition_dim) if config.condition_dim else None
            shape = tuple(network(tokens, labels, vectors=vectors).shape)
        if shape != (expected := (2, config.num_tokens, config.codebook_size)):
            raise ValueError(
                f"backbone {config.backbone!r}: forward must return logits of shape (B, N, K) = {expected}, got {shape}"
            )
    return config.create()


class KVCache:
    """The keys and values that a causal block has computed so far, row after row.

    Args:
        capacity: Largest number of rows. ``extend`` allocates all of them at its first call.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_rows = 0
        self._rows: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """Adds R rows and returns all rows so far.

        Args:
            new: (2, B, heads, R, D / heads): keys and values of the next rows.

        Returns:
            (2, B, heads, S, D / heads), a view of the cache.
        """
        if self._rows is None:  # dtype, device and batch are known only now
            self._rows = new.new_empty(*new.shape[:3], self.capacity, new.shape[4])
        first, self.num_rows = self.num_rows, self.num_rows + new.shape[3]
        self._rows[:, :, :, first : self.num_rows] = new
        return self._rows[:, :, :, : self.num_rows]


# Token groups: a token of K = k^G codes as G digits in base k, each embedded and predicted for itself.
#
# Tables and heads have G k rows in place of K. The digits are independent given the visible tokens, so the logit of a
# code is the sum of the logits of its digits: the softmax over the K codes is the product of those of the groups. The
# most significant digit comes first: token = sum_g digit_g k^(G - 1 - g). For ``lfq``, whose bit i is the
# sign of channel i, group g of B bits holds the channels from D - (g + 1) B on; for ``product``, the group G - 1 - g.
#
# Source: MaskBit, arXiv:2409.16211 (groups of bits), and the class ``Bert`` of its code: the sum of an
# embedding for each group, a head for each group. Factorized prediction: Open-MAGVIT2, arXiv:2409.04410.
# MaskBit masks and decodes each group for itself; here a token is masked and decoded as a whole.


def split_tokens(tokens: Tensor, *, num_groups: int, group_size: int) -> Tensor:
    """Returns the digits (..., G) int64 in [0, k) of tokens (...) int64 in [0, k^G), the most significant one first."""
    # Not a tensor of the powers: its copy to the device would wait.
    digits = [tokens // group_size**power % group_size for power in reversed(range(num_groups))]
    return torch.stack(digits, dim=-1)


def compose_logits(logits: Tensor, *, num_groups: int) -> Tensor:
    """Computes the logits of all codes from those of the groups. Exact: the groups are independent.

    Args:
        logits: (..., G k) float: the logits of the values of each group, group after group.
        num_groups: G.

    Returns:
        (..., k^G) float: for each code the sum of the logits of its digits.
    """
    first, *rest = logits.chunk(num_groups, dim=-1)
    for group in rest:
        first = (first.unsqueeze(-1) + group.unsqueeze(-2)).flatten(-2)
    return first


def likeliest_tokens(logits: Tensor, *, num_groups: int) -> Tensor:
    """Returns the most likely tokens (...) int64 for logits (..., G k) of the groups; for G = 1, those of codes."""
    group_size = logits.shape[-1] // num_groups
    first, *rest = (group.argmax(-1) for group in logits.chunk(num_groups, dim=-1))
    for digit in rest:  # the most significant one comes first
        first = first * group_size + digit
    return first


class TokenEmbedding(nn.Embedding):
    """The embedding of the ids of a vocabulary: the sum of a row for each digit of a code, or the row of another id.

    Rows: the k values of the first group, of the second one and so on, then one for each id from K on
    (classes, mask token). With one group, it is ``torch.nn.Embedding`` of the vocabulary.

    Args:
        config: Sizes of the vocabulary and of its groups.
        embed_dim: D.
    """

    def __init__(self, config: BackboneConfig, embed_dim: int) -> None:
        super().__init__(config.num_rows, embed_dim)
        self.codebook_size = config.codebook_size
        self.num_groups, self.group_size = config.num_token_groups, config.group_size

    def forward(self, ids: Tensor) -> Tensor:
        """Returns the embeddings (..., D) of ids (...) int64 of the vocabulary."""
        if self.num_groups == 1:
            return super().forward(ids)
        is_code = (ids < self.codebook_size).unsqueeze(-1)
        codes = ids.clamp(max=self.codebook_size - 1)
        digits = split_tokens(codes, num_groups=self.num_groups, group_size=self.group_size).unbind(-1)
        embedded = super().forward(digits[0])
        for group, digit in enumerate(digits[1:], start=1):
            embedded = embedded + super().forward(digit + group * self.group_size)
        first_other = self.num_groups * self.group_size
        embedded_others = super().forward((ids - self.codebook_size).clamp(min=0) + first_other)
        return torch.where(is_code, embedded, embedded_others)


def token_head(
    table: Tensor, bias: Tensor, *, config: BackboneConfig, vocabulary: Vocabulary
) -> Callable[[Tensor], Tensor]:
    """Returns the function that computes logits with a table that has the rows of ``TokenEmbedding``.

    Args:
        table: (rows, D) float.
        bias: (rows,) float.
        config: Sizes of the vocabulary and of its groups.
        vocabulary: Columns of the logits: the K codes, the whole vocabulary, or the G k values of all groups.
            With several groups, the whole vocabulary is that of the codes.

    Returns:
        A function from hidden states (..., D) float to logits (..., V) float.
    """
    groups, rows = config.num_token_groups, config.num_columns(vocabulary)
    table, bias = table[:rows], bias[:rows]
    if groups == 1 or vocabulary == "groups":
        return lambda x: linear(x, table, bias)
    return lambda x: compose_logits(linear(x, table, bias), num_groups=groups)
