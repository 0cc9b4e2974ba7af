"""Fixtures and settings for all test modules."""

from pathlib import Path

import pytest
import torch
from transformers import set_seed

# The tests' tensors are tiny: more threads than one only fight over the cores with other test processes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with real teachers and photos beside a checkout; where there is none, tests that ask for it skip."""
    path = Path(__file__).resolve().parents[1].parent / "shared"
    if not (path / "teachers").is_dir():
        pytest.skip("no folder with real teachers and photos beside the checkout")
    return path


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Models that a test or a fixture of any scope draws without a seed are the same in every run."""
    set_seed(0)
