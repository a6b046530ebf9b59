"""Products of half-precision operands added up in fp32, by every way that a PyTorch may know."""

import weakref

import pytest
import torch
from torch import Tensor

from npo_fast.kernels import products, reference
from npo_fast.kernels.layout import HUGE_BYTES, in_huge_pages
from npo_fast.kernels.products import add_product_, opmath_product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS = ("none", "mm", "addmm")
M, K, N = 37, 24, 20


@pytest.fixture
def _strips(monkeypatch):
    """A product is made ten rows at a time, the last strip shorter."""
    monkeypatch.setattr(products, "STRIP_BYTES", 4 * N * 10)


def take(monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype) -> list[str]:
    """Takes ``way``, in PyTorch's own products where they know it. Returns the calls."""
    called: list[str] = []
    mm, addmm = torch.mm, torch.addmm
    known = WAYS.index(opmath_product(DEVICE, dtype)) >= WAYS.index(way)

    def fp32_mm(a, b, *, out_dtype=None):
        called.append("mm" if out_dtype is None else "wide mm")
        if out_dtype is None:
            return mm(a, b)
        return mm(a, b, out_dtype=out_dtype) if known else mm(a.to(out_dtype), b.to(out_dtype))

    def fp32_addmm(beside, a, b, *, out_dtype, alpha, out):
        called.append("wide addmm")
        if known:
            return addmm(beside, a, b, out_dtype=out_dtype, alpha=alpha, out=out)
        return out.copy_(addmm(beside, a.to(out_dtype), b.to(out_dtype), alpha=alpha))

    monkeypatch.setattr(products, "opmath_product", lambda device, dtype: way)
    monkeypatch.setattr(torch, "mm", fp32_mm)
    monkeypatch.setattr(torch, "addmm", fp32_addmm)
    return called


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 sums, and factors of which one is transposed, as the gradient of the logits is."""
    a, b = torch.randn(K, M).to(DEVICE, dtype).t(), torch.randn(K, N).to(DEVICE, dtype)
    return torch.randn(M, N).to(DEVICE), a, b


@pytest.mark.usefixtures("_strips")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, -0.375])
def test_half_precision_products_add_up_in_fp32(way, dtype, beta, alpha, monkeypatch):
    out, a, b = operands(dtype)
    exact = alpha * (a.double() @ b.double()) + beta * out.double()
    if beta == 0:
        out.fill_(torch.nan)  # what nobody has written is not read
    called = take(monkeypatch, way, dtype)
    add_product_(out, a, b, beta, alpha)
    error = float((out.double() - exact).norm() / exact.norm())
    assert error < (torch.finfo(dtype).eps if way == "none" else 1e-6)
    strips = -(-M // 10)
    in_place = way == "addmm" and beta == 1
    of_strip = "mm" if way == "none" else "wide mm"
    assert called == (["wide addmm"] if in_place else [of_strip] * strips)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("beta", [0, 1])
def test_sums_in_the_dtype_of_the_operands_are_one_product(dtype, beta, monkeypatch):
    out, a, b = operands(dtype)
    out = out.to(dtype)
    exact = 0.5 * (a.double() @ b.double()) + beta * out.double()
    if beta == 0:
        out.fill_(torch.nan)
    monkeypatch.setattr(products, "opmath_product", None)
    add_product_(out, a, b, beta, 0.5)
    error = float((out.double() - exact).norm() / exact.norm())
    assert error < 2 * torch.finfo(dtype).eps


def test_only_one_strip_of_a_product_is_alive_beside_the_sum(monkeypatch):
    monkeypatch.setattr(products, "STRIP_BYTES", 4 * N)
    alive: list[int] = []
    mm, living = torch.mm, []

    def watched(a, b):
        alive.append(sum(one() is not None for one in living))
        product = mm(a, b)
        living.append(weakref.ref(product))
        return product

    monkeypatch.setattr(products, "opmath_product", lambda device, dtype: "none")
    monkeypatch.setattr(torch, "mm", watched)
    add_product_(*operands(torch.bfloat16), 1)
    assert len(alive) == M
    assert max(alive) == 0, "a strip is made while the last one is still there"


@pytest.mark.parametrize(
    ("refused", "way"), [((), "addmm"), (("addmm",), "mm"), (("addmm", "mm"), "none")]
)
@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, TypeError])
def test_what_pytorch_can_do_is_found_out_by_trying(refused, way, error, monkeypatch):
    def product(name):
        def called(*args, out_dtype, out=None):
            assert out_dtype == torch.float32
            if name in refused:
                raise error("out_dtype")
            return out

        return called

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, product(name))
    assert opmath_product.__wrapped__(torch.device("cpu"), torch.bfloat16) == way


def test_no_other_error_is_taken_for_an_answer(monkeypatch):
    def out_of_order(*args, **kwargs):
        raise ValueError

    monkeypatch.setattr(torch, "addmm", out_of_order)
    with pytest.raises(ValueError):  # noqa: PT011
        opmath_product.__wrapped__(torch.device("cpu"), torch.bfloat16)


# --- scaling --------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_of_one_leaves_every_bit_alone(dtype):
    values = torch.tensor([1.5, -0.0, torch.nan, torch.inf, 6e-8, 0.1], dtype=dtype)
    values[2] = torch.tensor(torch.nan, dtype=dtype).copysign(torch.tensor(-1.0, dtype=dtype))
    bits = values.clone().view(torch.uint8)
    torch.ops.npo_fast.scale_(values, torch.tensor(1.0))
    assert torch.equal(values.view(torch.uint8), bits)
    torch.ops.npo_fast.scale_(values, torch.tensor(-0.5))
    assert torch.equal(values[:1], torch.tensor([-0.75], dtype=dtype))
    assert torch.equal(values[5:], -0.5 * torch.tensor([0.1], dtype=dtype))


def test_a_factor_of_one_is_no_pass_over_the_values():
    called = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    values = torch.randn(9)
    with Watch():
        reference.scale_(values, torch.tensor(1.0))
    assert "aten::mul_" not in called
    with Watch():
        reference.scale_(values, torch.tensor(2.0))
    assert "aten::mul_" in called


@pytest.mark.slow
def test_scaling_keeps_the_rules_of_torch_library():
    torch.library.opcheck(torch.ops.npo_fast.scale_.default, (torch.randn(3, 4), torch.tensor(2.0)))


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, HUGE_BYTES - 1, HUGE_BYTES, HUGE_BYTES + 4097])
def test_huge_pages_are_a_hint_and_change_nothing(nbytes):
    memory = torch.zeros(nbytes + 1, dtype=torch.uint8)[1:]  # at no page's beginning
    assert in_huge_pages(memory) is memory
    memory.fill_(7)
    assert int(memory.sum(dtype=torch.int64)) == 7 * nbytes


def test_memory_without_an_address_gets_no_hint():
    from torch._subclasses import FakeTensorMode

    assert in_huge_pages(torch.empty(HUGE_BYTES, device="meta")).is_meta
    with FakeTensorMode():
        memory = torch.empty(HUGE_BYTES)
        assert in_huge_pages(memory) is memory
