"""Errors that end a command with an exit code of their own."""

from __future__ import annotations

__all__ = ["DataBudgetError"]


class DataBudgetError(RuntimeError):
    """More images cannot be read than the budget allows; ends a command with exit code 76."""
