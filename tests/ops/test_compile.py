"""torch.compile takes the fused NPO loss into its graph and gives the numbers of eager PyTorch."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from npo_fast import (
    CEU,
    DPO,
    GA,
    KTO,
    NPO,
    WGA,
    FusedLinearNPOLoss,
    SimNPO,
    linear_log_probs,
    linear_sequence_loss,
    segment_sum,
)
from npo_fast.ops import compiled as compiled_ops
from tests.helpers import slow_but

ROWS, D, V = 9, 6, 11
CU = torch.tensor([0, 4, 9], dtype=torch.int32)
REF = torch.tensor([-5.0, -7.0])


@dataclass(frozen=True)
class Squared:
    """A loss of the user's own."""

    power: float = 2.0
    reference: ClassVar = None
    group: ClassVar[int] = 1

    def __call__(self, log_probs, cu_seqlens, ref_log_probs=None):
        return segment_sum(log_probs, cu_seqlens).abs() ** self.power


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def setting(frozen: bool = False) -> tuple[torch.nn.Linear, torch.nn.Linear, torch.Tensor]:
    body, head = torch.nn.Linear(8, D), torch.nn.Linear(D, V)
    head.requires_grad_(not frozen)
    return body, head, torch.randint(0, V, (ROWS,))


def step(body, head, labels, **options) -> Callable:
    def function(x, loss, ref=REF):
        value, log_probs = linear_sequence_loss(
            body(x), head.weight, labels, CU, loss, ref_log_probs=ref, bias=head.bias, **options
        )
        return 3 * value, log_probs

    return function


def run(function, x, loss, parameters):
    value, log_probs = function(x, loss)
    assert not log_probs.requires_grad
    return value, log_probs, *torch.autograd.grad(value, parameters)


@pytest.mark.parametrize(
    "loss", slow_but([NPO(0.3)], [NPO(0.3), SimNPO(), DPO(), CEU(), Squared()]), ids=repr
)
@pytest.mark.parametrize(
    "options",
    slow_but([{}], [{}, {"chunk_rows": 3, "softcap": 2.0, "reduction": "sum"}, {"chunk_rows": 0}]),
)
@pytest.mark.parametrize("frozen", slow_but([False], [False, True]))
def test_a_compiled_step_gives_the_numbers_of_eager(loss, options, frozen):
    body, head, labels = setting(frozen)
    function = step(body, head, labels, **options)
    parameters = [*body.parameters(), *(() if frozen else head.parameters())]
    x = torch.randn(ROWS, 8)
    eager = run(function, x, loss, parameters)
    one_graph = not isinstance(loss, Squared)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=one_graph)
    for found, expected in zip(run(compiled, x, loss, parameters), eager, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "breaks"), [(NPO(0.1), 0), (GA(), 0), (KTO(), 0), (WGA(), 0), (Squared(), 1)], ids=repr
)
def test_only_a_loss_that_autograd_differentiates_breaks_the_graph(loss, breaks):
    report = torch._dynamo.explain(step(*setting()))(torch.randn(ROWS, 8), loss)
    assert report.graph_break_count == breaks


@pytest.mark.slow
@pytest.mark.parametrize("chunk_rows", [None, 0, 4])
def test_linear_log_probs_is_part_of_the_graph(chunk_rows):
    body, head, labels = setting()

    def function(x):
        return (
            linear_log_probs(body(x), head.weight, labels, bias=head.bias, chunk_rows=chunk_rows)
            .exp()
            .sum()
        )

    x = torch.randn(ROWS, 8)
    eager = function(x)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, eager)
    parameters = [*body.parameters(), *head.parameters()]
    for g, h in zip(
        torch.autograd.grad(compiled, parameters),
        torch.autograd.grad(eager, parameters),
        strict=True,
    ):
        torch.testing.assert_close(g, h)


@pytest.mark.slow
def test_another_beta_is_another_graph():
    function = step(*setting())
    compiled = torch.compile(function, backend="aot_eager")
    x = torch.randn(ROWS, 8)
    for loss in (NPO(0.1), NPO(2.0), SimNPO(2.0), NPO(0.1)):
        torch.testing.assert_close(compiled(x, loss), function(x, loss))


@pytest.mark.slow
def test_a_forward_pass_without_gradients_compiles_too():
    function = step(*setting())
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x = torch.randn(ROWS, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, NPO(0.1)), function(x, NPO(0.1)))


@pytest.mark.slow
def test_shapes_may_change_between_calls():
    head = torch.nn.Linear(D, V)

    def function(hidden, labels, cu_seqlens):
        return linear_sequence_loss(
            hidden, head.weight, labels, cu_seqlens, NPO(), ref_log_probs=REF
        )[0]

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (5, 8, 13):
        inputs = torch.randn(rows, D), torch.randint(0, V, (rows,)), torch.tensor([0, 2, rows])
        torch.testing.assert_close(compiled(*inputs), function(*inputs))


@pytest.mark.slow
def test_autocast_in_the_graph_is_autocast_outside():
    function = step(*setting())
    x = torch.randn(ROWS, 8)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x, NPO(0.1)), function(x, NPO(0.1)))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum"])
def test_a_compiled_step_in_fp16_gives_the_gradients_of_eager(reduction):
    """Which are held at a multiple until the loss scale is known."""
    weight = torch.randn(V, D).half().requires_grad_()
    hidden, labels = torch.randn(ROWS, D).half().requires_grad_(), torch.randint(0, V, (ROWS,))

    def function():
        value, _ = linear_sequence_loss(
            hidden, weight, labels, CU, NPO(), ref_log_probs=REF, reduction=reduction
        )
        return 1024 * value

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    runs = [torch.autograd.grad(each(), (hidden, weight)) for each in (function, compiled)]
    for eager, found in zip(*runs, strict=True):
        assert found.dtype == torch.float16
        torch.testing.assert_close(found, eager, rtol=2e-3, atol=1e-4)


@pytest.fixture
def whole_graph():
    """A compiled step, its value, and the parameters."""
    if not compiled_ops.IN_GRAPH:
        pytest.skip("this PyTorch breaks the graph at the loss")
    weight = torch.randn(V, D, requires_grad=True)
    hidden, labels = torch.randn(ROWS, D, requires_grad=True), torch.randint(0, V, (ROWS,))

    def function():
        return linear_sequence_loss(hidden, weight, labels, CU, NPO(), ref_log_probs=REF)[0]

    return function, torch.compile(function, backend="aot_eager", fullgraph=True), (hidden, weight)


def gradients_alive(weight: torch.Tensor) -> set[int]:
    """Addresses of all tensors of the shape of ``weight`` but its own: gradients that are kept."""
    gc.collect()
    tensors = (t for t in gc.get_objects() if type(t) is torch.Tensor)
    alive = {t.data_ptr() for t in tensors if t.shape == weight.shape}
    return alive - {weight.data_ptr()}


@pytest.mark.slow
def test_the_backward_hands_on_the_gradients_that_the_forward_made(whole_graph):
    """A second gradient of the head would be as large as the head."""
    _, compiled, (_, weight) = whole_graph
    before = gradients_alive(weight)
    value = compiled()
    (made,) = gradients_alive(weight) - before
    value.backward()
    assert weight.grad.data_ptr() == made
    weight.grad = None
    assert gradients_alive(weight) <= before


@pytest.mark.slow
def test_gradients_that_nobody_asks_for_go_with_their_graph(whole_graph):
    _, compiled, (hidden, weight) = whole_graph
    before = gradients_alive(weight)
    values = [compiled() for _ in range(3)]
    assert len(gradients_alive(weight) - before) == 3
    torch.autograd.grad(values[1], (hidden, weight))
    assert len(gradients_alive(weight) - before) == 2
    del values
    assert gradients_alive(weight) <= before
    with torch.no_grad():
        compiled()
    assert gradients_alive(weight) <= before


@pytest.mark.slow
def test_graphs_that_are_alive_together_do_not_mix_their_gradients(whole_graph):
    function, compiled, leaves = whole_graph
    values, expected = [], []
    for _ in range(3):
        values.append(compiled())
        expected.append(torch.autograd.grad(function(), leaves))
        with torch.no_grad():
            leaves[1].data = leaves[1].data + 1  # another weight, not another value of this one
    for at in (1, 2, 0):
        found = torch.autograd.grad(values[at], leaves)
        for one, other in zip(found, expected[at], strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_a_second_backward_through_a_retained_graph_starts_anew(whole_graph):
    function, compiled, leaves = whole_graph
    expected = torch.autograd.grad(function(), leaves)
    value = compiled()
    for factor in (2.0, 3.0):
        found = torch.autograd.grad(factor * value, leaves, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, factor * other)


@pytest.mark.slow
def test_a_label_outside_the_vocabulary_is_refused_when_the_graph_runs():
    body, head, labels = setting()
    labels[2] = V
    compiled = torch.compile(step(body, head, labels), backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match=r"labels\[2\] = 11 is outside the vocabulary"):
        compiled(torch.randn(ROWS, 8), NPO(0.1))


@pytest.mark.slow
def test_the_module_compiles_with_a_break_where_it_drops_rows():
    module, weight = FusedLinearNPOLoss(), torch.randn(V, D)
    hidden, target = torch.randn(2, 5, D), torch.randint(0, V, (2, 5))
    target[0, :2] = -100
    compiled = torch.compile(module, backend="aot_eager")
    found = compiled(weight, hidden, target, ref_log_probs=REF)
    torch.testing.assert_close(found, module(weight, hidden, target, ref_log_probs=REF))


def test_the_operator_keeps_the_rules_of_torch_library():
    from npo_fast.ops.compiled import loss_number

    hidden, weight, bias = (torch.randn(*shape) for shape in ((ROWS, D), (V, D), (V,)))
    arguments = [t.requires_grad_() for t in (hidden, weight, bias)]
    labels = torch.randint(0, V, (ROWS,))
    torch.library.opcheck(
        torch.ops.npo_fast.linear_sequence_loss.default,
        (*arguments, labels, CU, REF, loss_number(NPO(0.3)), 2, 4, [True, True, True], None, 1.0),
    )


@pytest.mark.slow
@pytest.mark.parametrize("chunk_rows", [0, 4])
def test_the_operators_of_linear_log_probs_keep_the_rules(chunk_rows):
    hidden, weight, bias = (torch.randn(*shape) for shape in ((ROWS, D), (V, D), (V,)))
    arguments = [t.requires_grad_() for t in (hidden, weight, bias)]
    labels = torch.randint(0, V, (ROWS,))
    torch.library.opcheck(
        torch.ops.npo_fast.log_probs_of_rows.default, (*arguments, labels, chunk_rows, 2.0, 1.0)
    )
