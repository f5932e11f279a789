"""Backbones: the networks of stage 2, which predict tokens, by name.

A backbone is a frozen configuration, which is registered in ``backbones`` and creates the network, and the network, a
``Backbone``. ``forward`` is the only method that a network must have. Recipes and ``config.json`` choose one by name
(``model.network: {backbone: adaln, embed_dim: 128}``); without the key ``backbone`` it is ``bert``, the transformer of
the paper. Another package adds one through an entry point; see ``docs/plug-ins.md``.

Shapes: B images, N tokens per image, K codebook size, V columns of the logits, C size of a conditioning vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit_pl.checks import check_integer, check_keys, check_number, shorten, validate
from maskgit_pl.networks.transformer_block import KVCache
from maskgit_pl.networks.weights import skeletons
from maskgit_pl.registry import Registry

__all__ = [
    "BUILT_IN",
    "DEFAULT_BACKBONE",
    "LARGEST_COMPOSED",
    "LARGEST_GRID",
    "LARGEST_SIZES",
    "Attention",
    "AutoregressiveBackbone",
    "Backbone",
    "BackboneConfig",
    "Project",
    "Vocabulary",
    "backbones",
    "build_config",
    "check_attention",
    "config_class",
    "create_network",
    "is_plugin",
]

Attention = Literal["bidirectional", "causal"]
Vocabulary = Literal["codes", "all", "groups"]
Project: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]

DEFAULT_BACKBONE = "bert"
"""The backbone of recipes and files that name none."""

BUILT_IN = {"adaln": "maskgit_pl.networks.adaln", "bert": "maskgit_pl.networks.transformer"}
"""The backbones of this package: name and module, which is imported when a backbone is looked up."""

LARGEST_GRID = 256
"""Largest number of rows or columns of a token grid: 65,536 tokens, 256 times those of a released image."""

LARGEST_COMPOSED = 2**18
"""Largest codebook of a network with token groups: decoding computes a logit for each code from those of the groups."""

LARGEST_SIZES = {"embed_dim": 2**16, "depth": 1024, "num_heads": 1024, "mlp_dim": 2**20}
"""Largest sizes of the built-in networks, well above any that exists: a larger one is a mistake or an attack."""

_LARGEST = {"codebook_size": (1, 2**24), "num_classes": (1, 100_000), "condition_dim": (0, 2**16)}
_MOST_GROUPS = 24

_checked: set[tuple[type[BackboneConfig], str]] = set()  # configurations of plug-ins whose contract was checked


@dataclass(frozen=True)
class BackboneConfig(ABC):
    """The base of all configurations of backbones: what the rest of the package must know of a network.

    A subclass is a frozen dataclass with further fields, all with defaults, and gives ``backbone`` the name that it is
    registered under as its default.

    Args:
        codebook_size: K, size of the tokenizer's codebook.
        num_classes: Number of classes, >= 1 (1 for data without classes).
        grid: Rows and columns (h, w) of the token grid; N = h w.
        backbone: Registered name of the backbone.
        class_dropout: Fraction of training samples whose class and vector are hidden from the network, in [0, 1). Above
            0 there is a null label, which classifier-free guidance needs.
        dropout: Dropout probability of the network, in [0, 1).
        condition_dim: C, size of the conditioning vector of an image, such as an embedding of its caption; 0 for none.
        num_token_groups: G, groups in which a token is embedded and predicted; K = k^G. With 1, a token is one id.

    Raises:
        ValueError: if a number is out of range, ``backbone`` is the name of another class, K is not k^G, or the
            backbone has no token groups.
    """

    has_token_groups: ClassVar[bool] = False
    """True if the network follows ``num_token_groups``; see ``networks.token_groups``."""

    transferable: ClassVar[tuple[str, ...]] = ("num_classes", "grid", "class_dropout", "dropout")
    """Fields in which a network may differ from the pretrained one that it starts from."""

    codebook_size: int
    num_classes: int
    grid: tuple[int, int]
    _: KW_ONLY
    backbone: str
    class_dropout: float = 0.1
    dropout: float = 0.1
    condition_dim: int = 0
    num_token_groups: int = 1

    def __post_init__(self) -> None:
        for each in fields(self):
            if isinstance(value := getattr(self, each.name, None), list):  # of a recipe or config.json
                object.__setattr__(self, each.name, tuple(value))
        for name, (least, most) in _LARGEST.items():
            check_integer(f"transformer {name}", getattr(self, name), f"[{least}, {most}]")
        if len(self.grid) != 2:
            raise ValueError(f"transformer grid must be two numbers (rows, columns), got {shorten(self.grid)}")
        for side in self.grid:
            check_integer("transformer grid", side, f"[1, {LARGEST_GRID}]")
        for name in ("dropout", "class_dropout"):
            check_number(f"transformer {name}", getattr(self, name), "[0, 1)")
        own = next(each.default for each in fields(self) if each.name == "backbone")
        if self.backbone != own:
            raise ValueError(
                f"transformer backbone must be {own!r} for {type(self).__name__}, got {self.backbone!r}; "
                "networks.backbone.build_config builds the configuration of any backbone"
            )
        self._check_groups()

    def _check_groups(self) -> None:
        """Checks that the codebook can be divided into ``num_token_groups`` groups.

        Raises:
            ValueError: if not.
        """
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
        return self.grid[0] * self.grid[1]

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

    All methods take tokens (B, N) int64, codes in [0, K) or ``mask_token_id``; labels (B,) int64 in [0, num_classes),
    or ``null_label``; and for a network with ``condition_dim`` C > 0, vectors (B, C) float. Where the label is the null
    label, the network ignores the vector and uses a learned null vector instead.

    All weights must be parameters or buffers of the state dict. A network with other entry points than these, whose
    blocks are run by other methods than ``forward``, or with row-wise tables sets the attributes below.

    Args:
        config: The configuration that creates the network.

    Attributes:
        config: The configuration.
        blocks: The repeated parts. Activation checkpointing, compilation, FSDP2 and int8 work block by block. May be
            empty: the network is then one group.
        entry_points: Methods that are called besides ``forward``. FSDP2 gathers the weights for them too.
        takes_project: True if ``forward_selected`` follows ``project``.
        vocabulary_tables: Names of tensors in the state dict with a row for each id of the vocabulary; the codes have
            ``num_code_rows`` rows.
        class_tables: Names of tensors with a row for each class, and for the null label if there is one.
        position_tables: Names of tensors with a row for each token of the grid in raster order, after any number of
            other rows.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("forward_masked", "forward_selected", "forward_at")
    takes_project: ClassVar[bool] = False
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
            vocabulary: Columns of the result: the K codes, the whole vocabulary, or the G k values of all token groups.
                A network that predicts only codes may return K columns for the first two. Without token groups, the
                last one is not asked for.

        Returns:
            (B, N, V) float.
        """

    def forward_masked(
        self,
        tokens: Tensor,
        labels: Tensor,
        mask: Tensor,
        *,
        vectors: Tensor | None = None,
        vocabulary: Vocabulary = "codes",
    ) -> Tensor:
        """Returns the logits (number of True, V) where ``mask`` (B, N) bool is True, in raster order, row after row.

        The host waits for the device to count them. See ``forward`` for the other arguments.
        """
        positions = mask.flatten().nonzero().squeeze(1)
        # The method of the class: FSDP2 has gathered the weights already.
        select = type(self).forward_selected
        return select(self, tokens, labels, positions, vectors=vectors, vocabulary=vocabulary)

    def forward_selected(
        self,
        tokens: Tensor,
        labels: Tensor,
        positions: Tensor,
        *,
        vectors: Tensor | None = None,
        vocabulary: Vocabulary = "codes",
        project: Project = F.linear,
    ) -> Tensor:
        """Returns the logits of M tokens of the batch, for training.

        Args:
            tokens: (B, N) int64.
            labels: (B,) int64.
            positions: (M,) int64 in [0, B N): token n of image b is at b N + n.
            vectors: (B, C) float; None without conditioning vectors.
            vocabulary: Columns of the result: the K codes, or the whole vocabulary.
            project: (M, D) hidden states, (V, D) table, (V,) bias -> (M, V) logits, or values that are computed from
                logits without a tensor of all of them; followed if ``takes_project``.

        Returns:
            (M, V) float, or what ``project`` returns.
        """
        own = type(self).forward_masked
        if own is Backbone.forward_masked:
            # Not self(...): FSDP2 and DDP have gathered the weights for this method already.
            logits = self.forward(tokens, labels, vectors=vectors, vocabulary=vocabulary).flatten(0, 1)
            return logits[positions]
        mask = torch.zeros(tokens.numel(), dtype=torch.bool, device=tokens.device).index_fill(0, positions, value=True)
        found = own(self, tokens, labels, mask.view_as(tokens), vectors=vectors, vocabulary=vocabulary)
        return found[mask.cumsum(0)[positions] - 1]

    def forward_at(self, tokens: Tensor, labels: Tensor, positions: Tensor, *, vectors: Tensor | None = None) -> Tensor:
        """Returns the logits of the codes (B, M, K) at ``positions`` (B, M) int64 in [0, N), for decoding.

        See ``forward`` for the other arguments.
        """
        logits = self.forward(tokens, labels, vectors=vectors)
        return logits.gather(1, positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


class AutoregressiveBackbone(Backbone):
    """The base of networks with causal attention, which predict each token from those before it in raster order.

    ``forward`` and ``forward_masked`` compute all tokens in one pass; the mask token is not part of their input.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("forward_masked", "forward_selected", "forward_next")

    @abstractmethod
    def forward_next(self, tokens: Tensor, labels: Tensor, *, cache: Sequence[KVCache] | None = None) -> Tensor:
        """Returns the logits of the next token.

        Args:
            tokens: (B, t) int64 in [0, K): the tokens before it, t in [0, N).
            labels: (B,) int64 in [0, num_classes), or ``null_label``.
            cache: Cache of this decoding run from ``create_cache``, changed in place; each call has one token more than
                the call before. None computes all rows at each call.

        Returns:
            (B, K) float: logits of the codes.
        """

    def create_cache(self) -> list[KVCache]:
        """Returns an empty cache for each block, for one run of ``forward_next``."""
        return [KVCache(self.config.num_tokens) for _ in self.blocks]


def _check_config(name: str, config: BackboneConfig) -> None:
    """Checks the contract of a registered configuration: its class and its name."""
    if not isinstance(config, BackboneConfig):
        raise ValueError(f"backbone {name!r}: the class must derive from BackboneConfig, got {type(config).__name__}")
    if config.backbone != name:
        raise ValueError(
            f"backbone {name!r}: the default of the field backbone must be the registered name, got {config.backbone!r}"
        )


backbones: Registry[BackboneConfig] = Registry(
    "backbone",
    "maskgit_pl.backbones",
    check=_check_config,
    modules=tuple(BUILT_IN.values()),
)
"""The configurations of all backbones by name. ``build_config`` builds one from the values of a file."""


def build_config(values: object, where: str) -> BackboneConfig:
    """Builds the configuration of a backbone from plain values, such as ``model.network`` of a recipe.

    Args:
        values: Mapping with the key ``backbone`` (``bert`` without it) and the fields of that backbone.
        where: File and key of the values, for messages.

    Raises:
        ValueError: if the values are no mapping, the backbone is unknown, or a field is unknown, missing or wrong.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping, got {shorten(values)}")
    name = values.get("backbone", DEFAULT_BACKBONE)
    if not isinstance(name, str):
        raise ValueError(f"{where}.backbone must be a string, got {shorten(name)}")
    try:
        kind = config_class(name)
    except ValueError as error:
        raise ValueError(f"{where}.{error}" if str(error).startswith("backbone") else f"{where}: {error}") from error
    known = [each.name for each in fields(kind) if each.init]
    check_keys(where if name == DEFAULT_BACKBONE else f"{where}: backbone {name!r}", values, known=known)
    return backbones.build({**values, "backbone": name, "name": name}, where=where)


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
    try:
        config = validate(config_class(name), {**values, "backbone": name})
    except ValueError:
        raise
    except (Exception, SystemExit) as error:  # of a plug-in
        raise ValueError(f"backbone {name!r} cannot be built: {type(error).__name__}: {error}") from error
    _check_config(name, config)
    return config


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
    """Creates the network of a configuration, and checks the contract of a plug-in once for each configuration.

    Raises:
        ValueError: if what ``create`` returns is no ``Backbone`` of this configuration, or its logits have a wrong
            shape.
    """
    key = type(config), repr(config)  # a field such as a mapping cannot be hashed
    if is_plugin(config) and key not in _checked:
        _check_contract(config)
        _checked.add(key)
    return config.create()


def is_plugin(config: BackboneConfig) -> bool:
    """Returns True if another package defines the backbone; those of this package are tested."""
    return not type(config).__module__.startswith("maskgit_pl.")


def _check_contract(config: BackboneConfig) -> None:
    """Creates a network on the meta device, which takes neither memory nor time, and checks the shapes of its logits.

    Raises:
        ValueError: if they are wrong; see ``create_network``.
    """
    where = f"backbone {config.backbone!r}"
    with skeletons():
        network = config.create()
        if not isinstance(network, Backbone):
            raise ValueError(f"{where}: create must return a Backbone, got {type(network).__name__}")
        if getattr(network, "config", None) != config:
            raise ValueError(f"{where}: the config of the network must be the one that creates it")
        if config.attention == "causal" and not isinstance(network, AutoregressiveBackbone):
            raise ValueError(
                f"{where}: create must return an AutoregressiveBackbone for causal attention, got "
                f"{type(network).__name__}"
            )
        batch = 2
        tokens = torch.zeros(batch, config.num_tokens, dtype=torch.int64)
        labels = torch.zeros(batch, dtype=torch.int64)
        vectors = torch.zeros(batch, config.condition_dim) if config.condition_dim else None
        logits = network.eval()(tokens, labels, vectors=vectors)
    expected = batch, config.num_tokens, config.codebook_size
    if not isinstance(logits, Tensor) or logits.shape != expected:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"{where}: forward must return logits of shape (B, N, K) = {expected}, got {got}")


def check_attention(config: BackboneConfig, network: type[Backbone], attention: Attention) -> None:
    """Checks that a configuration names the attention that a class computes.

    Raises:
        ValueError: if it names the other one.
    """
    if config.attention != attention:
        raise ValueError(
            f"transformer attention must be {attention!r} for {network.__name__}, got {config.attention!r}; "
            "config.create() builds the class for either"
        )
