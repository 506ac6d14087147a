"""Uses that meet the package from outside: counted flops, results written in place, sharded parameters."""

import subprocess
import sys

import pytest
import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fusedattn import AdditiveAttention, FiLM, additive_attention, film
from fusedattn.ops.film import ACTIVATIONS

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
