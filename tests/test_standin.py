"""The stand-in for a GPU: what it refuses, what it allows, and that tests on it run the kernels."""

import copy
import pickle
from types import SimpleNamespace

import choose
import pytest
import torch
from device import DEVICE

from fusedattn import UnsupportedError, additive_attention, film

pytestmark = pytest.mark.skipif(DEVICE != "standin", reason="needs FUSEDATTN_TEST_DEVICE=standin")


def on_the_cpu(*shape):
    return torch.ones(shape, device="cpu")


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + on_the_cpu(3),
        lambda x: x @ on_the_cpu(3, 2),
        lambda x: torch.cat([x, on_the_cpu(2, 3)]),
        lambda x: x.masked_fill(on_the_cpu(2, 3) > 0, 0.0),
        lambda x: torch.nn.functional.layer_norm(x, (3,), on_the_cpu(3)),
        lambda x: torch.randn(3, generator=torch.Generator("cpu")),
        lambda x: torch.ops.fusedattn.film_fwd(x, on_the_cpu(3), None, None, None, None, 1, 0.0, 0),
        lambda x: torch.vmap(torch.mul)(x, on_the_cpu(2, 3)),
    ],
)
def test_tensors_of_the_cpu_are_refused(mixed):
    with pytest.raises(RuntimeError):
        mixed(torch.ones(2, 3))


def test_what_a_gpu_allows_is_allowed():
    x = torch.arange(6.0).view(2, 3)
    assert (x + torch.tensor(1.0, device="cpu")).sum() == 21
    assert x[torch.tensor([1], device="cpu")].tolist() == [[3, 4, 5]]
    assert x.cpu().add(on_the_cpu(3)).to(x.device).device == x.device
    assert on_the_cpu(2, 3).copy_(x).sum() == 15


def test_views_share_their_memory():
    x = torch.zeros(2, 3)
    x.T[1:].unflatten(0, (2, 1)).fill_(1)
    assert x.tolist() == [[0, 1, 1], [0, 1, 1]]
    leaf = torch.ones(2, 3, requires_grad=True)
    y = leaf * 2
    y[:, 0] = 5
    y.sum().backward()
    assert leaf.grad.tolist() == [[0, 2, 2], [0, 2, 2]]


def test_copies():
    x = torch.randn(2, 3)
    for other in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert other.device == x.device and torch.equal(other, x) and other.data_ptr() != x.data_ptr()


def test_kernels_run_as_the_backend_of_gpus():
    inputs = [torch.randn(2, 3, 4) for _ in range(3)] + [torch.randn(4)]
    with torch.profiler.profile() as profile:
        additive_attention(*inputs, backend="cuda")
        film(inputs[0])
    names = {event.name for event in profile.events()}
    assert {"fusedattn::additive_attention_fwd", "fusedattn::film_fwd"} <= names
    with pytest.raises(UnsupportedError, match="standin"):
        film(inputs[0], backend="cpu")


PLAIN = {"get_closest_marker": lambda name: None}


def test_one_test_is_chosen_for_each_value_of_a_parameter():
    """By value: two strings that are equal may be two objects."""
    import standin  # it registers the device

    names = [*"ab", "".join(["key_", "exp"]), "".join(["key_", "exp"])]
    items = [
        SimpleNamespace(function=len, callspec=SimpleNamespace(params={"name": name, "size": n}), **PLAIN)
        for n, name in enumerate(names)
    ]
    assert choose.each_value(items, standin.names_or_makes) == items[:3]
    assert choose.each_value(items) == items
