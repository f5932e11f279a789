"""The devices of the tests on a GPU; a test that asks for a card is skipped where there is none."""

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU without one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def card() -> torch.device:
    """A GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@pytest.fixture
def two_cards() -> None:
    """Two GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")


@pytest.fixture(autouse=True)
def _exact_products():
    """Computes float32 matrix products in float32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
