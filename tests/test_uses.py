"""Uses from outside: counted flops, results written in place, sharded parameters, checkpoints, odd tensors."""

import functools
import subprocess
import sys
import warnings

import numpy
import pytest
import torch
import torch.distributed
import torch.nn.utils.prune
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fusedattn import AdditiveAttention, FiLM, additive_attention, film
from fusedattn._conditioning import ACTIVATIONS

# Flops


def inputs_of(shape_of_query, shape_of_key, Dv=3):
    D = shape_of_query[-1]
    shapes = (shape_of_query, shape_of_key, (*shape_of_key[:-1], Dv), (D,))
    return [torch.randn(s, requires_grad=True) for s in shapes]


def counted(function, *inputs):
    with FlopCounterMode(display=False) as counter:
        output = function(*inputs)
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("lead", [(2,), (2, 3)], ids=["3d", "4d"])
def test_flops_are_those_of_the_matrix_products(lead):
    def eager(query, key, value, weight):
        scores = torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3)) @ weight.unsqueeze(-1)
        return torch.softmax(scores.squeeze(-1), -1) @ value

    inputs = inputs_of((*lead, 5, 4), (*lead, 7, 4))
    assert counted(additive_attention, *inputs) == counted(eager, *inputs)


def test_flops_of_broadcast_inputs_and_of_the_reference():
    inputs = inputs_of((1, 5, 4), (2, 7, 4))
    found = counted(additive_attention, *inputs)
    assert found == (2 * 2 * 5 * 7 * (4 + 3), 2 * 2 * 2 * 5 * 7 * (4 + 3))


def test_film_counts_no_flops_as_no_elementwise_operation_does():
    assert counted(film, torch.randn(2, 3, requires_grad=True), torch.randn(3)) == (0, 0)


@pytest.mark.parametrize("order", ["torch.utils.flop_counter, fusedattn", "fusedattn, torch.utils.flop_counter"])
def test_flops_are_registered_whichever_is_imported_first(order):
    code = f"""
import sys
for name in {order.split(", ")!r}:
    early = "torch.utils.flop_counter" in sys.modules
    __import__(name)
    assert name != "fusedattn" or early == ("torch.utils.flop_counter" in sys.modules), "fusedattn imports it"
import torch
counter = sys.modules["torch.utils.flop_counter"]
assert torch.ops.fusedattn.additive_attention_fwd in counter.flop_registry
assert not any("_flops" in type(finder).__module__ for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_operator_of_attention_is_counted():
    operators = [f"additive_attention_{way}" for way in ("fwd", "bwd")]
    assert all(getattr(torch.ops.fusedattn, name) in flop_registry for name in operators)


# Results written in place


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_film_written_in_place_before_backward(activation, backend):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(
        (3 * film(x, gamma, gamma, activation=activation, residual=x)).sum(), (x, gamma)
    )
    y = film(x, gamma, gamma, activation=activation, residual=x, backend=backend)
    y.add_(1).mul_(3)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, gamma)), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_weights_may_be_written_before_backward_and_the_context_not_unnoticed(backend):
    """As after torch.softmax, whose result its backward reads."""
    inputs = inputs_of((2, 5, 4), (2, 7, 4))
    context = additive_attention(*inputs, backend=backend)
    if backend == "auto":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            context.mul_(2).sum().backward()
    context, weights = additive_attention(*inputs, return_weights=True)
    expected = torch.autograd.grad(context.sum() + (2 * weights).square().sum(), inputs)
    context, weights = additive_attention(*inputs, return_weights=True)
    weights.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(context.sum() + weights.square().sum(), inputs), expected)


# Sharded parameters


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("gloo") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


MODULES = {
    "film": (lambda: FiLM(4, 3, gamma_offset=0.25), lambda: (torch.randn(2, 3, 5), torch.randn(2, 4))),
    "attention": (
        lambda: AdditiveAttention(4, 4, 6, num_heads=2, normalize=True, out_dim=3),
        lambda: (torch.randn(2, 3, 4), torch.randn(2, 5, 4)),
    ),
}


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_parameters_of_a_dtensor_are_reset(name, placement, mesh):
    module = MODULES[name][0]()
    for part in module.modules():
        for key, parameter in list(part.named_parameters(recurse=False)):
            shards = distribute_tensor(torch.full_like(parameter, 7.0), mesh, [placement])
            setattr(part, key, torch.nn.Parameter(shards))
    module.reset_parameters()
    for key, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor) and not (parameter.full_tensor() == 7).any(), key
    if name == "film":
        bias = module.conditioner.bias.full_tensor()
        assert bias.tolist() == [0.75] * 3 + [0.0] * 3


@pytest.mark.parametrize("name", MODULES)
def test_fully_sharded_modules_train(name, mesh):
    make, inputs = MODULES[name]
    with torch.device("meta"):
        module = make()
    fully_shard(module, mesh=mesh)
    module.to_empty(device="cpu")
    module.reset_parameters()
    module(*inputs()).sum().backward()
    assert all(p.grad is not None and p.grad.full_tensor().isfinite().all() for p in module.parameters())


# What else programs do


def attention_and_inputs():
    torch.manual_seed(0)
    return AdditiveAttention(6, 6, 8, num_heads=2), torch.randn(2, 3, 6), torch.randn(2, 5, 6)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_checkpointed_modules(name, use_reentrant):
    make, inputs = MODULES[name]
    module, (x, *others) = make(), inputs()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(module(x, *others).square().sum(), x)
    checkpoint(module, x, *others, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_selective_checkpointing_saves_our_operator():
    module, query, key = attention_and_inputs()
    operator, seen = torch.ops.fusedattn.additive_attention_fwd.default, []

    def policy(context, called, *args, **kwargs):
        seen.append(called)
        return CheckpointPolicy.MUST_SAVE if called == operator else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    (expected,) = torch.autograd.grad(module(query, key).square().sum(), module.weight)
    checkpoint(module, query, key, use_reentrant=False, context_fn=contexts).square().sum().backward()
    torch.testing.assert_close(module.weight.grad, expected)
    assert operator in seen


def test_saved_tensors_may_be_moved():
    module, query, key = attention_and_inputs()
    (expected,) = torch.autograd.grad(module(query, key).sum(), module.weight)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy):
        module(query, key).sum().backward()
    torch.testing.assert_close(module.weight.grad, expected)


def test_tensors_with_a_negative_bit_and_read_only_memory():
    negative = torch.randn(3, 5, 6, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    rows, weight = negative.unsqueeze(1), negative[0, 0]
    expected = additive_attention(*rows.resolve_neg(), weight.resolve_neg())
    torch.testing.assert_close(additive_attention(*rows, weight), expected)
    torch.testing.assert_close(film(rows[0, 0], weight), film(rows[0, 0].resolve_neg(), weight.resolve_neg()))
    array = numpy.ones((2, 3, 6), dtype="float32")
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, of memory that must not be written
        read_only = torch.from_numpy(array)
    assert additive_attention(*[read_only] * 3, weight).isfinite().all()


def test_pruned_and_parametrized_parameters():
    module, query, key = attention_and_inputs()
    torch.nn.utils.parametrizations.spectral_norm(module.query_proj)
    torch.nn.utils.parametrizations.weight_norm(module, "weight")
    torch.nn.utils.prune.l1_unstructured(module.key_proj, "weight", 0.5)
    module.eval()
    found = module(query, key)
    module.backend = "reference"
    torch.testing.assert_close(found, module(query, key))


def test_an_ensemble_of_stacked_modules():
    modules = [attention_and_inputs()[0], AdditiveAttention(6, 6, 8, num_heads=2)]
    _, query, key = attention_and_inputs()
    parameters, _ = torch.func.stack_module_state(modules)

    def run(parameters):
        return torch.func.functional_call(modules[0], parameters, (query, key))

    expected = torch.stack([module(query, key) for module in modules])
    torch.testing.assert_close(torch.func.vmap(run)(parameters), expected)


def test_default_dtype_and_device_are_not_those_of_the_inputs():
    module, query, key = attention_and_inputs()
    lengths, gamma = torch.tensor([5, 2]), torch.ones(6)
    calls = (
        lambda: module(query, key, is_causal=True, key_lengths=lengths),
        lambda: film(query, gamma, channel_dim=2, gamma_offset=1.0, activation="silu"),
    )
    expected = [call() for call in calls]
    for backend in ("auto", "reference"):
        module.backend = backend
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                found = [call() for call in calls]
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, expected)


def test_inference_tensors():
    module, query, key = attention_and_inputs()
    expected = module(query, key)
    with torch.inference_mode():
        keys = module.project_keys(key)
        torch.testing.assert_close(module(query, keys), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(query, keys), expected)


def test_distributed_data_parallel(mesh):
    module, query, key = attention_and_inputs()
    (expected,) = torch.autograd.grad(module(query, key).sum(), module.weight)
    parallel = torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    parallel(query, key).sum().backward()
    torch.testing.assert_close(module.weight.grad, expected)


@pytest.mark.parametrize(
    "other", [None, [1.0], numpy.ones((2, 3, 6), dtype="float32")], ids=lambda t: type(t).__name__
)
def test_modules_name_what_is_no_tensor(other):
    attention, query, key = attention_and_inputs()
    kind = type(other).__name__
    for name, call in (
        ("AdditiveAttention: query", lambda: attention(other, key)),
        ("AdditiveAttention: key", lambda: attention(query, other)),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected a Tensor, got {kind}"):
            call()


def test_numbers_of_numpy():
    x, gamma = torch.randn(2, 3, 4), torch.randn(4)
    found = film(x, gamma, channel_dim=numpy.int64(-1), gamma_offset=numpy.float32(0.5))
    torch.testing.assert_close(found, (gamma + 0.5) * x)
    inputs = inputs_of((2, 5, 4), (2, 7, 4))
    found = additive_attention(*inputs, scale=numpy.float64(0.5), softcap=numpy.int64(5))
    torch.testing.assert_close(found, additive_attention(*inputs, scale=0.5, softcap=5.0))


def test_a_scale_that_depends_on_a_size():
    @functools.partial(torch.compile, fullgraph=True, dynamic=True, backend="aot_eager")
    def scaled(query, key, value, weight):
        return additive_attention(query, key, value, weight, scale=query.shape[-1] ** -0.5)

    for D in (5, 6):
        inputs = inputs_of((2, 3, D), (2, 4, D))
        torch.testing.assert_close(scaled(*inputs), additive_attention(*inputs, scale=D**-0.5))


def test_sizes_that_only_the_data_tell():
    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def kept(mask, query, key, value, weight):
        index = mask.nonzero().squeeze(1)
        context = additive_attention(query[index], key[index], value[index], weight)
        return film(context, weight.new_ones(3), channel_dim=2)

    mask, inputs = torch.tensor([True, False, True]), inputs_of((3, 5, 4), (3, 7, 4))
    query, key, value, weight = (t.detach() for t in inputs)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = kept(mask, query, key, value, weight)
    torch.testing.assert_close(found, additive_attention(query[mask], key[mask], value[mask], weight))
