"""``maskgit inspect``: one HTML page that shows how a run trains, and what looks wrong."""

from maskgit_pl.evaluation.inspection.run_page import inspect_run

__all__ = ["inspect_run"]
