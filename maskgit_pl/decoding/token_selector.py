"""The interface of token selectors, the rules that choose the tokens that a decoding step keeps, and their registry.

``selectors`` holds the built-in ones. Used by ``decoding.ParallelDecoder``. The mask schedule sets the number of tokens
that stay masked. The selector scores the candidates, and those with the lowest scores are masked again. A selector may
also sharpen the distribution that codes are drawn from, mask or replace tokens that earlier steps decided, or set the
number of tokens to keep.

Functions import torch where they need it, so the command line can refuse an unknown name immediately.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from maskgit_pl.checks import check_integer, check_number, shorten
from maskgit_pl.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Candidates", "CheckedSelector", "Decided", "TokenSelector", "token_selectors"]


@dataclass(frozen=True)
class Candidates:
    """The draws of one decoding step, which a selector scores: M positions per row, with padding.

    Args:
        log_probs: (B, M, K) float32: log-softmax of the logits at temperature 1.
        tokens: (B, M) int64 in [0, K): the codes drawn, or the current codes where ``is_decided``.
        positions: (B, M) int64 in [0, N): the position of each code.
        gumbel: (B, M) float32: standard Gumbel noise, a function of image, step and position.
        progress: (t + 1) / T, in (0, 1].
        grid: Rows and columns of tokens; None if not given.
        is_decided: (B, M) bool, True = decided by an earlier step; None unless ``needs_decided_logits``.
    """

    log_probs: Tensor
    tokens: Tensor
    positions: Tensor
    gumbel: Tensor
    progress: float
    grid: tuple[int, int] | None = None
    is_decided: Tensor | None = None

    @cached_property
    def drawn_log_probs(self) -> Tensor:
        """The log-probabilities of ``tokens``, (B, M) float32."""
        return self.log_probs.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)

    @cached_property
    def entropies(self) -> Tensor:
        """The entropies -sum_k p_k log p_k of the distributions in nats, (B, M) float32."""
        # A code of probability 0 has log p = -inf; the clamp makes 0 log 0 equal to 0 in place of NaN.
        return -(self.log_probs.exp() * self.log_probs.clamp(min=-1e30)).sum(-1)


@dataclass(frozen=True)
class Decided:
    """The tokens that earlier steps decided, which a selector may mask again: all N positions of a row.

    Args:
        confidence: (B, N) float32 in [0, 1]: the probability that each code had when it was drawn. Undecided positions
            are ignored.
        gumbel: (B, N) float32: standard Gumbel noise, a function of image, step and position.
        progress: (t + 1) / T, in (0, 1].
    """

    confidence: Tensor
    gumbel: Tensor
    progress: float


class TokenSelector(ABC):
    """A rule that scores candidates. The candidates with the highest scores are kept.

    Subclasses are frozen dataclasses. ``__call__`` is enough; the defaults of the other methods do nothing.

    Attributes:
        follows_schedule: True if the mask schedule sets the number of tokens that stay masked. False if the selector
            sets it (``num_kept``): the counts then depend on the data, so each step waits for the device.
        needs_decided_logits: True if the candidates of each step are all tokens that were masked at the start, with
            their current probabilities, decided or not (``Candidates.is_decided``). Those with the lowest scores are
            masked, so that decided tokens compete with new draws. ``num_remasked`` is not used then.
        replaces_decided: True if ``replacements`` gives decided tokens other codes; requires ``needs_decided_logits``.
    """

    follows_schedule: ClassVar[bool] = True
    needs_decided_logits: ClassVar[bool] = False
    replaces_decided: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, candidates: Candidates) -> Tensor:
        """Returns finite scores (B, M) float32; the tokens with the highest scores are kept.

        Columns that only pad a row are scored too, and ignored.
        """

    def sharpness(self, progress: float) -> float:
        """Returns the positive number by which logits are multiplied before codes are drawn; ``progress`` in (0, 1]."""
        return 1.0

    def schedule_progress(self, progress: Tensor) -> Tensor:
        """Maps the progress of each step to progress of the mask schedule.

        Args:
            progress: (T,) float32 in (0, 1], rising.

        Returns:
            (T,) float32 in (0, 1], never falling.
        """
        return progress

    def num_remasked(self, *, decided: int, planned: int, progress: float) -> int:
        """Returns the number of tokens of a row that are masked again although earlier steps decided them.

        It is called on the host before the loop. The decoder clips the result to [0, decided].

        Args:
            decided: Number of tokens of the row that earlier steps decided.
            planned: Number of tokens that the schedule leaves masked after the step.
            progress: (t + 1) / T, in (0, 1].
        """
        return 0

    def remasking_scores(self, decided: Decided) -> Tensor:
        """Returns finite scores (B, N) float32; the decided tokens with the highest scores are masked again."""
        raise TypeError(
            f"token selector {type(self).__name__} must define remasking_scores(), since it masks decided tokens again"
        )

    def replacements(self, candidates: Candidates) -> Tensor:
        """Returns codes (B, M) int64 in [0, K) for decided positions; called if ``replaces_decided`` is True.

        Where a code is to stay, it is that of ``candidates.tokens``. Undecided positions are ignored.
        """
        raise TypeError(
            f"token selector {type(self).__name__} must define replacements(), since replaces_decided is True"
        )

    def num_kept(self, candidates: Candidates, scores: Tensor, valid: Tensor) -> Tensor:
        """Returns the number of tokens of each row to keep; called if ``follows_schedule`` is False.

        Args:
            candidates: The draws.
            scores: (B, M) float32: this selector's scores.
            valid: (B, M) bool: False where a position only pads its row.

        Returns:
            (B,) int64; the decoder keeps at least 1.
        """
        raise TypeError(f"token selector {type(self).__name__} must define num_kept(), since follows_schedule is False")


@dataclass(frozen=True)
class CheckedSelector:
    """A selector of a user whose results the decoder takes only after a check of their types, shapes and values.

    The methods are those of ``TokenSelector``, and raise ValueError for a result that breaks its contract: tokens would
    be kept in a wrong order, or the decoding would end in an error of torch. Values on a GPU are not read, which would
    wait for it.

    Args:
        selector: The selector.
        name: Its name for messages; None for that of its class.
    """

    selector: TokenSelector
    name: str | None = None

    def __call__(self, candidates: Candidates) -> Tensor:
        scores = self.selector(candidates)
        return self._tensor("scores", scores, "a float", candidates.tokens.shape, "(B, M)").float()

    def check_values(self, scores: Tensor, what: str = "scores") -> None:
        """Checks that scores are not NaN, once those of padding, whose logits may be NaN, have another value."""
        if _is_readable(scores) and bool(scores.isnan().any()):
            raise ValueError(f"{self}: {what} must be finite, got NaN")

    def sharpness(self, progress: float) -> float:
        """Returns the checked sharpness."""
        return check_number(
            f"{self}: sharpness at progress {progress:g}", self.selector.sharpness(progress), "(0, inf)"
        )

    def schedule_progress(self, progress: Tensor) -> Tensor:
        """Returns the checked progress of the mask schedule, (T,) float32."""
        mapped = self.selector.schedule_progress(progress)
        mapped = self._tensor("schedule_progress", mapped, "a float", progress.shape, "(T,)").float()
        values = mapped.tolist()  # not a comparison of tensors, which a recorded graph could not read
        if not all(0 < value <= 1 for value in values) or sorted(values) != values:
            raise ValueError(f"{self}: schedule_progress must lie in (0, 1] and never fall, got {shorten(values)}")
        return mapped

    def num_remasked(self, *, decided: int, planned: int, progress: float) -> int:
        """Returns the checked number of tokens to mask again."""
        asked = self.selector.num_remasked(decided=decided, planned=planned, progress=progress)
        return check_integer(f"{self}: num_remasked at progress {progress:g}", asked, "(-inf, inf)")

    def remasking_scores(self, decided: Decided) -> Tensor:
        """Returns the checked remasking scores, (B, N) float32."""
        scores = self.selector.remasking_scores(decided)
        checked = self._tensor("remasking_scores", scores, "a float", decided.confidence.shape, "(B, N)").float()
        self.check_values(checked, "remasking_scores")
        return checked

    def replacements(self, candidates: Candidates) -> Tensor:
        """Returns the checked codes, (B, M) int64."""
        codes = self.selector.replacements(candidates)
        codes = self._tensor("replacements", codes, "an int64", candidates.tokens.shape, "(B, M)")
        size = candidates.log_probs.shape[-1]
        if _is_readable(codes) and not bool(((codes >= 0) & (codes < size)).all()):
            got = f"{int(codes.min())} to {int(codes.max())}"
            raise ValueError(f"{self}: replacements must be codes in [0, {size}), got {got}")
        return codes

    def num_kept(self, candidates: Candidates, scores: Tensor, valid: Tensor) -> list[int]:
        """Returns the checked number of tokens to keep in each row; waits for the device."""
        kept = self.selector.num_kept(candidates, scores, valid)
        counts: list[int] = self._tensor("num_kept", kept, "an int64", scores.shape[:1], "(B,)").tolist()
        return counts

    def __str__(self) -> str:
        return f"token selector {(self.name or type(self.selector).__name__)!r}"

    def _tensor(self, what: str, values: Any, kind: str, shape: tuple[int, ...], letters: str) -> Tensor:
        """Returns ``values`` if they are a tensor of this kind, ``a float`` or ``an int64``, and of this shape."""
        import torch

        if isinstance(values, torch.Tensor):
            is_kind = values.is_floating_point() if kind == "a float" else values.dtype == torch.int64
            if is_kind and values.shape == shape:
                return values
        got = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, torch.Tensor) else shorten(values)
        raise ValueError(f"{self}: {what} must be {kind} tensor {letters} = {tuple(shape)}, got {got}")


def _is_readable(values: Tensor) -> bool:
    """Returns True if values can be read without waiting for a device, and no graph is recorded."""
    import torch

    is_recorded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return values.device.type == "cpu" and not is_recorded


def check_token_selector(name: str, selector: TokenSelector) -> None:
    """Checks the contract of a selector at the first, a middle and the last of 8 steps on a grid of 2 x 2 tokens.

    All methods are called that the decoder calls for this selector; their results must pass ``CheckedSelector``, and
    scores must be finite.

    Raises:
        TypeError: if a method that the selector needs is not defined.
        ValueError: if the selector breaks the contract. The message has the name, the rule and the value.
    """
    if not isinstance(selector, TokenSelector):
        raise ValueError(f"token selector {name!r} must be a TokenSelector, got {shorten(selector)}")
    import torch

    # Attributes that contradict one another.
    if selector.needs_decided_logits and not selector.follows_schedule:
        raise ValueError(
            f"token selector {name!r}: follows_schedule must be True with needs_decided_logits, got False; the counts "
            "of masked tokens must be known before the loop"
        )
    if selector.replaces_decided and not selector.needs_decided_logits:
        raise ValueError(f"token selector {name!r}: needs_decided_logits must be True with replaces_decided, got False")
    checked = CheckedSelector(selector, name)
    checked.schedule_progress(torch.arange(1, 9) / 8)
    is_decided = torch.arange(8).view(2, 4) % 3 == 0 if selector.needs_decided_logits else None
    for progress in (1 / 8, 1 / 2, 1.0):
        log_probs = torch.linspace(-3, 3, 24).view(2, 4, 3).log_softmax(-1)
        positions = torch.arange(4).expand(2, 4)
        gumbel = torch.linspace(-2, 8, 8).view(2, 4)
        candidates = Candidates(log_probs, log_probs.argmin(-1), positions, gumbel, progress, (2, 2), is_decided)
        checked.sharpness(progress)
        scores = checked(candidates)
        checked.check_values(scores)
        if not scores.isfinite().all():
            raise ValueError(f"token selector {name!r}: scores must be finite (at progress {progress:g})")
        if selector.replaces_decided:
            checked.replacements(candidates)
        if not selector.follows_schedule:
            checked.num_kept(candidates, scores, torch.ones(2, 4, dtype=torch.bool))
        elif not selector.needs_decided_logits and checked.num_remasked(decided=2, planned=1, progress=progress) > 0:
            checked.remasking_scores(Decided(log_probs.exp()[..., 0], gumbel, progress))


token_selectors: Registry[TokenSelector] = Registry(
    "token selector", "maskgit_pl.token_selectors", check=check_token_selector
)
