"""Where the kernels' tests run: compiled on a GPU, interpreted without one."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
