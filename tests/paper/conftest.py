from tests.cli.conftest import judge, two_runs

__all__ = ["judge", "two_runs"]
