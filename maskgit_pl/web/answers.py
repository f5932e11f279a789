"""Answers to events of the page: errors as sentences, and a pace at which people see decoding steps."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from html import escape
from typing import Any, TypeVar

from maskgit_pl.errors import RunError, is_user_error
from maskgit_pl.text import printable

__all__ = ["answer", "explain", "pace"]

T = TypeVar("T")

_log = logging.getLogger(__name__)
_SECONDS = 20  # for which an error is shown
_LONGEST_STEP, _LONGEST_RUN = 0.15, 3.0  # seconds that a fast step and a fast run are stretched to


def explain(error: Exception) -> str:
    """Returns the text that the page shows for an error; an internal error is logged with its traceback.

    Args:
        error: A caught error.
    """
    if is_user_error(error) or isinstance(error, RunError):
        return printable(error, limit=1000)
    _log.error("internal error of maskgit_pl or of a library", exc_info=error)
    return f"{type(error).__name__}: internal error of maskgit_pl or of a library; the terminal shows where"


def answer(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a handler of gradio whose errors the page shows as sentences. ``handler`` may be a generator."""
    import gradio as gr

    def shown(error: Exception) -> Any:
        if isinstance(error, gr.Error):
            return error
        # gradio renders the message as HTML.
        return gr.Error(escape(explain(error)), duration=_SECONDS, title="This cannot be done", print_exception=False)

    if inspect.isgeneratorfunction(handler):

        @wraps(handler)
        def run(*values: Any) -> Iterator[Any]:
            try:
                yield from handler(*values)
            except Exception as error:
                raise shown(error) from None

        return run

    @wraps(handler)
    def call(*values: Any, **named: Any) -> Any:
        try:
            return handler(*values, **named)
        except Exception as error:
            raise shown(error) from None

    return call


def pace(steps: Iterable[T], *, num_steps: int) -> Iterator[T]:
    """Yields the steps of a fast model slowly enough to be seen: 0.15 s each, and at most 3 s in all.

    Args:
        steps: Results of the steps.
        num_steps: Number of steps.
    """
    least = min(_LONGEST_STEP, _LONGEST_RUN / num_steps)
    for step in steps:
        began = time.monotonic()
        yield step
        # Time that the page took to draw the step counts.
        time.sleep(max(0.0, least - (time.monotonic() - began)))
