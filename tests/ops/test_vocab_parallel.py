"""A sliced head: what goes around between ranks, and when."""

import pytest
import torch
import torch.distributed as dist

from npo_fast import linear_kl
from npo_fast.losses import NLL
from npo_fast.ops import head, linear_log_probs, linear_sequence_loss, vocab_parallel
from npo_fast.ops.vocab_parallel import VocabularySlice

ROWS, WIDTH, VOCABULARY = 200, 8, 37


@pytest.fixture
def vocabulary():
    """The only slice of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield VocabularySlice(dist.group.WORLD, VOCABULARY)
    dist.destroy_process_group()


@pytest.fixture
def events(monkeypatch):
    """Notes products of the head, and gathers as they begin and are waited for."""
    noted: list[str] = []

    class Gather:
        def __init__(self, work: dist.Work) -> None:
            self.work, self.number = work, sum(event.startswith("begin") for event in noted)
            noted.append(f"begin {self.number}")

        def wait(self) -> None:
            noted.append(f"wait {self.number}")
            self.work.wait()

    gather, product = vocab_parallel._ALL_GATHER, head.linear_
    monkeypatch.setattr(vocab_parallel, "_ALL_GATHER", lambda *a, **k: Gather(gather(*a, **k)))
    monkeypatch.setattr(head, "linear_", lambda *a: (noted.append("product"), product(*a)))
    monkeypatch.setattr(vocab_parallel, "PIECE_ROWS", 64)
    return noted


def _tensors():
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64)
    return hidden, weight, torch.randint(VOCABULARY, (ROWS,))


def test_the_numbers_of_some_rows_go_around_during_the_product_of_the_next(vocabulary, events):
    hidden, weight, labels = _tensors()
    bounds = torch.tensor([0, 90, ROWS])
    gradients = []
    for own in (None, vocabulary):
        operands = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, _ = linear_sequence_loss(*operands, labels, bounds, NLL(), vocabulary=own)
        loss.backward()
        gradients.append([tensor.grad for tensor in operands])
        if own is None:
            assert events == ["product"]
            events.clear()
    pieces = range(4)
    assert events == [
        *(event for i in pieces for event in ("product", f"begin {i}")),
        *(f"wait {i}" for i in pieces),
    ]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_log_probs_alone_go_around_in_pieces_too(vocabulary, events):
    hidden, weight, labels = _tensors()
    bounds = torch.tensor([0, 90, ROWS])
    with torch.no_grad():
        _, log_probs = linear_sequence_loss(
            hidden, weight, labels, bounds, NLL(), vocabulary=vocabulary
        )
    assert events == [*(f"begin {i}" for i in range(4)), *(f"wait {i}" for i in range(4))]
    whole = linear_log_probs(hidden, weight, labels)
    torch.testing.assert_close(log_probs, torch.stack([whole[:90].sum(), whole[90:].sum()]))


def test_a_kl_gathers_during_the_product_of_the_reference(vocabulary, events):
    hidden, weight, _ = _tensors()
    reference = hidden + 0.1
    found = linear_kl(hidden, weight, reference, weight, vocabulary=vocabulary)
    assert events == ["product", "begin 0", "product", "begin 1", "wait 1", "wait 0"]
    torch.testing.assert_close(found, linear_kl(hidden, weight, reference, weight))
