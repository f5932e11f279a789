from tests.cli.conftest import judge

__all__ = ["judge"]
