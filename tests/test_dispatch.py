"""The choice of a backend: preference, refusals with every reason, and the reference where no kernel can run."""

import warnings

import pytest
import torch

import fusedattn
from fusedattn import UnsupportedError, _dispatch, _library
from fusedattn._dispatch import choose

META, CPU = torch.device("meta"), torch.device("cpu")


def describe():
    return "x (2, 3)"


@pytest.fixture
def backends(monkeypatch):
    """``backends(cpu=[...])``: sets which there are, each with why it cannot run."""

    def use(**reasons):
        found = {name: lambda device, dtype, found=found: found for name, found in reasons.items()}
        monkeypatch.setattr(_dispatch, "BACKENDS", found)

    monkeypatch.setattr(_dispatch, "_warned", set())
    return use


def test_auto_takes_the_first_backend_that_can_run(backends):
    backends(cuda=["no GPU"], cpu=[], slow=[])
    assert choose("film", "auto", CPU, torch.float32, describe) == "cpu"


def test_the_inputs_are_described_only_for_an_error(backends):
    backends(cpu=[])
    assert choose("film", "cpu", CPU, torch.float32, lambda: pytest.fail("described")) == "cpu"


def test_the_reference_by_name(backends):
    backends(cpu=["no"])
    assert choose("film", "reference", CPU, torch.float32, describe) == "reference"


def test_auto_takes_the_reference_after_one_warning_for_each_op_and_kind_of_device(backends):
    backends(cuda=["no driver"], cpu=["not the CPU"])
    for op in ("film", "additive_attention"):
        with pytest.warns(UserWarning, match=rf"(?s)no kernel of {op} can run on xpu:0.*no driver.*not the CPU"):
            assert choose(op, "auto", torch.device("xpu:0"), torch.float32, describe) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("film", "auto", torch.device("xpu:1"), torch.float32, describe) == "reference"
        assert choose("film", "auto", META, torch.float32, describe) == "reference"


class Subclass(torch.Tensor):
    pass


def test_calls_that_are_alike_are_checked_once():
    checked = []

    @_dispatch.once_per_signature
    def plan(tensors, number, name):
        checked.append(number)
        if number < 0:
            raise ValueError("a number from 0 up")
        return len(checked)

    x = torch.zeros(2, 3)
    assert plan((x, None), 1, "a") == plan((x.clone(), None), 1, "a") == 1
    others = [(x.double(), None), (x.T, None), (x.to_sparse(), None), (x.to(META), None), (None, x), (x, x)]
    for n, tensors in enumerate(others):
        assert plan(tensors, 1, "a") == n + 2
    for number in (True, 1.0, 2):  # True == 1 == 1.0
        assert plan((x, None), number, "a") > len(others) + 1
    for _ in range(2):  # neither what fails nor what may have rules of its own is remembered
        for tensors in ((x.as_subclass(Subclass), None), ("no tensor", None)):
            before = len(checked)
            assert plan(tensors, 1, "a") == before + 1
        with pytest.raises(ValueError, match="from 0 up"):
            plan((x, None), -1, "a")
        assert plan((x, None), 1, []) == len(checked)  # has no hash


def test_only_so_many_signatures_are_remembered():
    checked = []
    plan = _dispatch.once_per_signature(lambda tensors, n: checked.append(n) or n)
    sizes = [*range(_dispatch.MOST_SIGNATURES + 1), 0]
    for n in sizes:
        assert plan((), n) == n
    assert checked == sizes


def test_a_call_like_a_sound_one_has_the_errors_of_the_first():
    x, gamma = torch.randn(2, 3, 4), torch.randn(2, 3)
    condition = torch.randn(2, 6)
    for _ in range(2):
        fusedattn.film(x, gamma, gamma)
        fusedattn.gated_film(torch.randn(2, 6, 4), condition)
    wrong = {
        "gamma: expected shape": (x, gamma[:, :2]),
        "gamma: expected dtype": (x, gamma.double()),
        "gamma: expected dtype torch.float32 on cpu": (x, gamma.to(META)),
        "gamma: expected a dense Tensor": (x, gamma.to_sparse()),
        "x: expected a floating-point dtype": (x.int(), None),
        "x: expected shape": (x[0, 0], None),
    }
    for message, (features, parameter) in wrong.items():
        with pytest.raises(ValueError, match=f"^film: {message}"):
            fusedattn.film(features, parameter)
    for arguments in ((None, gamma), (x, gamma.numpy())):
        with pytest.raises(TypeError, match="^film: (x|gamma): expected a Tensor"):
            fusedattn.film(*arguments)
    with pytest.raises(ValueError, match="^film: residual: expected shape"):
        fusedattn.film(x, gamma, residual=x[:1])
    with pytest.raises(TypeError, match="^film: channel_dim: expected an int"):
        fusedattn.film(x, gamma, gamma, channel_dim=1.0)
    with pytest.raises(ValueError, match="^gated_film: condition: expected shape"):
        fusedattn.gated_film(torch.randn(2, 6, 4), condition[:, :4])


@pytest.mark.parametrize("parameter", [(), (3,), (2, 3), (1, 3, 1), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("times", [1, 3000, 10000])  # by PyTorch's operators, some of them, by the kernels
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tiny_film_is_as_the_reference(parameter, times, requires_grad):
    torch.manual_seed(0)
    shapes = [(2, 3, 4 * times), *[(*parameter[:-1], 4 * times) if parameter == (2, 3, 4) else parameter] * 2]
    inputs = [torch.randn(shape).requires_grad_(requires_grad) for shape in shapes]
    for _ in range(2):  # the first of its kind is looked at
        y, expected = fusedattn.film(*inputs), fusedattn.film_ref(*inputs)
        torch.testing.assert_close(y, expected)
        if requires_grad:
            grad = torch.randn_like(y)
            found, wanted = (torch.autograd.grad(t, inputs, grad) for t in (y, expected))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)  # of long sums


def test_shapes_on_meta_are_those_of_the_real_call():
    inputs = [torch.randn(2, T, 5, device="meta") for T in (3, 4, 4)] + [torch.randn(5, device="meta")]
    options = {"return_weights": True, "return_lse": True, "is_causal": True}
    context, weights, lse = fusedattn.additive_attention(*inputs, **options)
    assert (context.shape, weights.shape, lse.shape) == ((2, 3, 5), (2, 3, 4), (2, 3))
    x = torch.randn(2, 3, 7, 7, device="meta", dtype=torch.bfloat16)
    y = fusedattn.film(x, torch.randn(2, 3, device="meta", dtype=torch.bfloat16), activation="silu")
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    for module, shapes in (
        (fusedattn.FiLM(4, 3, device="meta"), [(2, 3, 7), (2, 4)]),
        (fusedattn.AdditiveAttention(5, 6, 8, num_heads=2, device="meta"), [(2, 3, 5), (2, 4, 6)]),
        (fusedattn.BahdanauAttention(5, 6, 8, device="meta"), [(2, 5), (2, 4, 6)]),
    ):
        meta = module(*(torch.empty(shape, device="meta") for shape in shapes))
        real = module.to_empty(device="cpu")(*(torch.zeros(shape, device="cpu") for shape in shapes))
        for m, r in zip(meta, real, strict=True):
            assert m.shape == r.shape


@pytest.mark.parametrize("requested", ["cuda", "auto"])
def test_refusal_lists_inputs_and_every_reason(requested, backends):
    backends(cuda=["inputs are on meta", "dtype torch.int8"], cpu=["inputs are not on the CPU"])
    with pytest.raises(UnsupportedError) as error:
        choose("film", requested, META, torch.int8, describe)
    first, *rest = str(error.value).splitlines()
    assert first.endswith("run x (2, 3), torch.int8, meta")
    assert rest == [
        "  cuda: inputs are on meta; dtype torch.int8",
        "  cpu: inputs are not on the CPU",
        "  reference: can run (plain PyTorch, backend='reference')",
    ]


def test_a_forced_backend_is_not_replaced():
    inputs = [torch.randn(2, T, 5, device="meta") for T in (3, 4, 4)] + [torch.randn(5, device="meta")]
    with pytest.raises(UnsupportedError, match=r"(?s)query \(2, 3, 5\).*cpu: .*meta"):
        fusedattn.additive_attention(*inputs, backend="cpu")
    with pytest.raises(UnsupportedError, match=r"(?s)x \(2, 3, 5\).*cpu: .*meta"):
        fusedattn.film(inputs[0], backend="cpu")


def test_unknown_backend_names_the_choices(backends):
    backends(cpu=[])
    with pytest.raises(ValueError, match="backend: expected one of 'auto', 'cpu', 'reference', got 'gpu'"):
        choose("film", "gpu", CPU, torch.float32, describe)


def test_unsupported_error_is_a_value_error():
    assert issubclass(UnsupportedError, ValueError)


@pytest.mark.skipif(_library.EXTENSION_ERROR is not None, reason="needs the CPU kernels")
def test_choosing_compiles_without_a_graph_break():
    def f(x):
        backend = choose("film", "auto", x.device, x.dtype, lambda: f"x {x.shape}")
        return x + 1 if backend == "cpu" else x

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    x = torch.zeros(2, device="cpu")
    assert torch.equal(compiled(x), x + 1)
