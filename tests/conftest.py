"""Settings that must stand before the first import of Triton, and fixtures for several modules."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # kernels run on the CPU, in Triton's interpreter; what compiles does so in a process of its own
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def poison_new_tensors(monkeypatch):
    """``new_empty`` and ``empty_like`` return NaN: an element that no kernel writes shows."""

    def poisoned(make):
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
