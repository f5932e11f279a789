"""Networks with shapes, but without memory and values: to compare names, to count, or to be filled with weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["skeletons"]


class _NoDraws(TorchFunctionMode):
    """Leaves out normal draws: on the meta device torch would import its compiler for them, in twice its own time."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],  # the interface of torch
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def skeletons() -> Iterator[None]:
    """Creates the networks of a ``with`` block on the meta device, and draws no initial weights for them."""
    with torch.device("meta"), _NoDraws():
        yield
