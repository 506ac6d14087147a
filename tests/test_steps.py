"""Decoder loops, whose keys, values and weight get their gradients once: those of step by step, however used."""

import gc
import threading
import weakref

import pytest
import torch
from device import BACKEND, DEVICE, not_on_the_standin
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusedattn import AdditiveAttention, BahdanauAttention, ProjectedKeys
from fusedattn.modules import attention

STEPS = 5


class Decoder(nn.Module):
    """A state of width 6 that attends to a memory (B, 7, 9), ``STEPS`` times."""

    def __init__(self, normalize=False, heads=None, softcap=None, activation="tanh"):
        super().__init__()
        if heads is None:
            self.attention = BahdanauAttention(
                6, 9, 8, normalize=normalize, softcap=softcap, activation=activation
            )
        else:
            self.attention = AdditiveAttention(6, 9, 8, num_heads=heads, context_dim=6, softcap=softcap)
        self.cell = nn.Linear(9 if heads is None else 6, 6)

    def project(self, memory, **options):
        return self.attention.project_keys(memory, **options)

    def step(self, state, keys):
        """(the next state, weights)"""
        if isinstance(self.attention, BahdanauAttention):
            context, weights = self.attention(state, keys)
        else:  # two queries a step
            queries = torch.stack([state, state.flip(-1)], 1)
            context, weights = self.attention(queries, keys, return_weights=True)
            context = context.sum(1)
        return torch.tanh(state + self.cell(context)), weights

    def forward(self, state, keys):
        loss = 0.0
        for _ in range(STEPS):
            state, weights = self.step(state, keys)
            loss = loss + state.square().sum() + weights.square().sum()
        return loss


DECODERS = {
    "plain": {},
    "normalised": {"normalize": True},
    "heads": {"heads": 2},
    "capped": {"softcap": 2.0},
    "relu": {"activation": "relu"},
    "sigmoid": {"activation": "sigmoid", "softcap": 2.0},
}


def data(B=3):
    torch.manual_seed(0)
    return torch.randn(B, 6).requires_grad_(), torch.randn(B, 7, 9).requires_grad_()


@pytest.fixture
def decoder():
    torch.manual_seed(1)
    return Decoder()


def step_by_step(monkeypatch, function):
    """What it returns where every step makes all its gradients."""
    with monkeypatch.context() as patch:
        patch.setattr(attention, "are_recorded", lambda: False)
        return function()


class Calls(TorchDispatchMode):
    """The output_mask of every call of a backward operator."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention_bwd" in func.name():
            self.masks.append(args[-1])
        return func(*args, **(kwargs or {}))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


MASKS = {
    "all": lambda: {},
    "lengths": lambda: {"key_lengths": torch.tensor([7, 2, 0])},
    "mask": lambda: {"mask": torch.rand(3, 7) > 0.3},
    "both": lambda: {"mask": torch.rand(3, 7) > 0.3, "key_lengths": torch.tensor([7, 4, 1])},
}


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("kind", DECODERS)
def test_gradients_are_those_step_by_step(kind, masked, monkeypatch):
    decoder, (state, memory), options = Decoder(**DECODERS[kind]), data(), MASKS[masked]()
    if kind == "heads" and "mask" in options:
        options["mask"] = options["mask"][:, None].expand(-1, 2, -1)
    inputs = (state, memory, *decoder.parameters())

    def run():
        return torch.autograd.grad(decoder(state, decoder.project(memory, **options)), inputs)

    with Calls() as calls:
        actual = run()
    assert sorted(calls.masks) == [0b0001] * STEPS + [0b1110]
    close(actual, step_by_step(monkeypatch, run))
    assert all(map(torch.equal, actual, run()))


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("heads", [None, 2])
def test_steps_with_masks_of_their_own(heads, masked, monkeypatch):
    """Some have one, some have none: two calls for all, of keys that hide others themselves."""
    torch.manual_seed(2)
    module = AdditiveAttention(6, 9, 8, num_heads=heads or 1)
    queries, memory = torch.randn(4, 3, 1, 6, requires_grad=True), torch.randn(3, 7, 9, requires_grad=True)
    options = MASKS[masked]()
    if "mask" in options:
        options["mask"] = options["mask"][:, None]
    lengths = torch.tensor([1, 7, 3])
    own = [{}, {"mask": torch.arange(7) > 3}, {"key_lengths": lengths}, {"mask": torch.rand(3, 1, 7) > 0.5}]

    def run():
        keys = module.project_keys(memory, **options)
        contexts = [module(query, keys, **of) for query, of in zip(queries, own, strict=True)]
        return torch.autograd.grad(torch.cat(contexts).sin().sum(), [queries, memory, *module.parameters()])

    with Calls() as calls:
        actual = run()
    assert sorted(calls.masks) == [0b0001] * 4 + [0b1110] * (1 if "mask" in options else 2)
    close(actual, step_by_step(monkeypatch, run))
    for query, of in zip(queries, own, strict=True):
        seen = torch.ones(3, 1, 7, dtype=torch.bool)
        for hiding in (options, of):
            if "mask" in hiding:
                seen = seen & hiding["mask"]
            if "key_lengths" in hiding:
                seen = seen & (torch.arange(7) < hiding["key_lengths"][:, None, None])
        close(module(query, module.project_keys(memory, **options), **of), module(query, memory, mask=seen))


@pytest.mark.parametrize(
    ("masked", "biased"),
    [("all", False), ("lengths", False), ("lengths", True)],
)
def test_steps_with_windows_of_their_own(masked, biased, monkeypatch):
    """Around a place of each: one call for all. Without one, a window counts from the step's first query."""
    torch.manual_seed(3)
    module = BahdanauAttention(6, 9, 8)
    queries, memory = torch.randn(4, 3, 6, requires_grad=True), torch.randn(3, 7, 9, requires_grad=True)
    centers = torch.randint(-2, 9, (4, 3))
    biases = [torch.randn(3, 7, requires_grad=True) if biased else None for _ in range(4)]

    def run(centers):
        keys = module.project_keys(memory, **MASKS[masked]())
        found = [
            module(query, keys, window_size=(1, 2), window_center=center, bias=bias)
            for query, center, bias in zip(queries, centers, biases, strict=True)
        ]
        loss = sum(context.sin().sum() + weights.square().sum() for context, weights in found)
        return torch.autograd.grad(loss, [queries, memory, *(biases if biased else []), *module.parameters()])

    own = 0b10001 if biased else 0b00001
    with Calls() as calls:
        actual = run(centers)
    assert sorted(calls.masks) == sorted([own] * 4 + [0b1110])
    close(actual, step_by_step(monkeypatch, lambda: run(centers)))
    with Calls() as calls:
        run([None] * 4)
    assert calls.masks == [own | 0b1110] * 4


@pytest.mark.parametrize("heads", [None, 2])
def test_steps_with_biases_of_their_own(heads, monkeypatch):
    """Those of as many batch elements are one call; the last step has fewer than the keys."""
    torch.manual_seed(2)
    module = AdditiveAttention(6, 9, 8, num_heads=heads or 1, softcap=2.0)
    queries, memory = torch.randn(5, 3, 2, 6, requires_grad=True), torch.randn(3, 7, 9, requires_grad=True)
    shapes = [(2, 7), (7,), (3, 2, 7), (2, 1, 7)]
    biases = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def run():
        keys = module.project_keys(memory, key_lengths=torch.tensor([7, 2, 0]))
        contexts = [module(queries[n], keys, bias=bias) for n, bias in enumerate([*biases[:3], None])]
        contexts.append(module(queries[4, :2], keys[:2], bias=biases[3]))
        return torch.autograd.grad(
            torch.cat(contexts).sin().sum(), [queries, memory, *biases, *module.parameters()]
        )

    with Calls() as calls:
        actual = run()
    assert sorted(calls.masks) == sorted([0b10001] * 4 + [0b0001] + [0b1110] * 3)
    close(actual, step_by_step(monkeypatch, run))


@pytest.mark.machinery
def _negative(decoder, keys):
    decoder.attention.weight.neg_()


def _other_weight(decoder, keys):
    decoder.attention.weight = nn.Parameter(-decoder.attention.weight)


def _sharper(decoder, keys):
    decoder.attention.scale = 3.0


def _other_keys(decoder, keys):
    keys.key.mul_(2.0)


def _other_values(decoder, keys):
    keys.value.mul_(2.0)


def _hidden(decoder, keys):
    keys.mask.logical_and_(torch.arange(7) < 3)


@pytest.mark.parametrize("kind", ["plain", "normalised", "heads"])
@pytest.mark.parametrize("edit", [_negative, _other_weight, _sharper, _other_keys, _other_values, _hidden])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_a_step_that_repeats_another_sees_what_was_edited(kind, edit, mode):
    torch.manual_seed(1)
    decoder = Decoder(**DECODERS[kind])
    with mode():
        state, memory = (t.detach() for t in data())
        mask = torch.ones(3, 7, dtype=torch.bool)
        mask = mask[:, None, None] if kind == "heads" else mask
        keys = decoder.project(memory, mask=mask)
        for _ in range(3):
            before = decoder.step(state, keys)[0]
        with torch.no_grad():
            edit(decoder, keys)
        fresh = ProjectedKeys(keys.key, keys.value, keys.mask)
        expected = decoder.step(state, fresh)[0]
        assert not torch.allclose(before, expected)
        for _ in range(2):
            torch.testing.assert_close(decoder.step(state, keys)[0], expected)


def test_a_step_that_repeats_another_takes_any_query(decoder):
    state, memory = data()
    keys = decoder.project(memory)
    for _ in range(2):
        expected = decoder.step(state, keys)[0]
    assert decoder.step(state[:1], keys[:1])[0].shape == (1, 6)
    with pytest.raises(ValueError, match="^additive_attention: key: expected shape"):
        decoder.attention(state[:2], keys)
    with pytest.raises(ValueError, match="^BahdanauAttention: query: expected shape"):
        decoder.attention(state[:, :5], keys)
    with torch.no_grad():
        assert not decoder.step(state, keys)[0].requires_grad
    with torch.autocast(DEVICE, torch.bfloat16):
        assert decoder.attention(state, keys)[0].dtype == torch.bfloat16
    torch.testing.assert_close(decoder.step(state, keys)[0], expected)


@pytest.mark.parametrize("kind", DECODERS)
def test_second_derivatives(kind, monkeypatch):
    decoder, (state, memory) = Decoder(**DECODERS[kind]).double(), (t.detach().double() for t in data())
    inputs = (state.requires_grad_(), memory.requires_grad_(), *decoder.parameters())

    def run():
        loss = decoder(state, decoder.project(memory))
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)

    torch.testing.assert_close(run(), step_by_step(monkeypatch, run))


def test_several_backward_passes(decoder):
    state, memory = data()
    inputs = (state, memory, *decoder.parameters())
    loss = decoder(state, decoder.project(memory))
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, inputs, retain_graph=True)))
    with pytest.raises(RuntimeError, match="second time"):
        for _ in range(2):
            torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("wanted", range(2))
def test_gradients_of_some_inputs(decoder, wanted):
    state, memory = data()
    keys = decoder.project(memory)
    loss = decoder(state, keys)
    every = torch.autograd.grad(loss, (state, keys.key), retain_graph=True)
    with Calls() as calls:
        (alone,) = torch.autograd.grad(loss, (state, keys.key)[wanted])
    assert torch.equal(alone, every[wanted])
    assert (0b1110 in calls.masks) == (wanted == 1)


@not_on_the_standin("an error in its backward pass ends the process")
def test_a_backward_pass_that_failed_half_way_leaves_nothing(decoder):
    state, memory = data()
    keys = decoder.project(memory)
    inputs = (state, memory, *decoder.parameters())
    loss = decoder(state, keys)
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)

    def fail(_):
        raise ArithmeticError("planted")

    second = [0]

    def fail_at_the_second_call(grad):
        second[0] += 1
        return fail(grad) if second[0] == 2 else grad

    for hook in (state.register_hook(fail), decoder.cell.weight.register_hook(fail_at_the_second_call)):
        with pytest.raises(ArithmeticError, match="planted"):
            for _ in range(2):
                torch.autograd.grad(loss, inputs, retain_graph=True)
        hook.remove()
    assert all(map(torch.equal, torch.autograd.grad(loss, inputs), expected))


def test_steps_that_do_not_reach_the_loss(decoder, monkeypatch):
    state, memory = data()
    inputs = (memory, *decoder.attention.parameters())

    def run():
        keys = decoder.project(memory)
        later, _ = decoder.step(state, keys)
        decoder.step(later, keys)
        with torch.no_grad():
            decoder.step(later, keys)
        return torch.autograd.grad(later.square().sum(), inputs)

    close(run(), step_by_step(monkeypatch, run))


@pytest.mark.parametrize("at_once", [False, True])
def test_two_loops_over_the_same_keys(decoder, at_once, monkeypatch):
    state, memory = data()
    frozen = decoder.attention.key_proj.requires_grad_(False)  # else the second pass would need its graph again
    assert not frozen.weight.requires_grad
    inputs = (state, *(p for p in decoder.parameters() if p.requires_grad))

    def run():
        keys = decoder.project(memory.detach())
        losses = decoder(state, keys), decoder(state.sin(), keys)
        if at_once:
            return torch.autograd.grad(sum(losses), inputs)
        passes = [torch.autograd.grad(loss, inputs) for loss in losses]
        return [a + b for a, b in zip(*passes, strict=True)]

    close(run(), step_by_step(monkeypatch, run))


def test_hooks_see_whole_gradients(decoder):
    state, memory = data()
    keys = decoder.project(memory)
    seen = {}
    keys.key.register_hook(lambda grad: seen.setdefault("key", []).append(grad))
    keys.key.retain_grad()
    for name in ("weight", "query_proj.weight"):
        parameter = decoder.attention.get_parameter(name)
        parameter.register_hook(lambda grad, name=name: seen.setdefault(name, []).append(grad))
    decoder(state, keys).backward()
    assert {name: len(grads) for name, grads in seen.items()} == {"key": 1, "weight": 1, "query_proj.weight": 1}
    assert torch.equal(seen["key"][0], keys.key.grad) and torch.equal(
        seen["weight"][0], decoder.attention.weight.grad
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_steps(decoder, reentrant, monkeypatch):
    state, memory = data()
    # A reentrant checkpoint differentiates what its function closes over by itself: there may be no graph above.
    decoder.attention.key_proj.requires_grad_(not reentrant)
    inputs = [p for p in (state, *decoder.parameters()) if p.requires_grad]

    def run():
        decoder.zero_grad()
        state.grad = None
        keys = decoder.project(memory.detach() if reentrant else memory)
        x = state
        for _ in range(3):
            x, _ = checkpoint(lambda s: decoder.step(s, keys), x, use_reentrant=reentrant)
        x, _ = decoder.step(x, keys)
        x.square().sum().backward()
        return [p.grad.clone() for p in inputs]

    close(run(), step_by_step(monkeypatch, run))


@not_on_the_standin("it has no autocast")
@pytest.mark.parametrize("scaled", [False, True])
def test_autocast(decoder, scaled, monkeypatch):
    state, memory = data()
    inputs = (state, memory, *decoder.parameters())
    masks = []

    def run():
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = decoder(state, decoder.project(memory))
        with Calls() as calls:
            grads = torch.autograd.grad(loss * (512.0 if scaled else 1.0), inputs)
        masks.append(sorted(calls.masks))
        return grads

    actual, expected = run(), step_by_step(monkeypatch, run)
    assert masks[0] == [0b0001] * STEPS + [0b1110]
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= 0.03 * b.abs().max()  # a few bits of bfloat16


def test_steps_outside_of_the_autocast_that_projected(decoder, monkeypatch):
    state, memory = data()
    inputs = (state, memory, *decoder.parameters())

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            keys = decoder.project(memory)
        with Calls() as calls:
            grads = torch.autograd.grad(decoder(state, keys), inputs)
        return grads, sorted(calls.masks)

    (actual, masks), (expected, _) = run(), step_by_step(monkeypatch, run)
    assert masks == [0b0001] * STEPS + [0b1110]
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).abs().max() <= 0.03 * b.abs().max()


INDICES = {
    "shrinking": lambda t: slice(0, 3 - t // 2),
    "beams": lambda t: torch.tensor([0, 2, 1][: 3 - t // 2]),
    "later ones": lambda t: slice(t // 2, None),
}


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("index", INDICES)
def test_chosen_batch_elements(decoder, index, masked, monkeypatch):
    state, memory = data()
    inputs, options = (state, memory, *decoder.parameters()), MASKS[masked]()

    def run():
        keys, x, loss = decoder.project(memory, **options), state, 0.0
        for t in range(STEPS):
            chosen = INDICES[index](t)
            x, _ = decoder.step(state[chosen] + x.mean(), keys[chosen])
            loss = loss + x.square().sum()
        return torch.autograd.grad(loss, inputs)

    with Calls() as calls:
        actual = run()
    assert (calls.masks.count(0b1110) == 1) == (index == "shrinking")
    close(actual, step_by_step(monkeypatch, run))


def test_only_the_first_batch_elements_are_ever_used(decoder, monkeypatch):
    state, memory = data()

    def run():
        keys = decoder.project(memory)
        return torch.autograd.grad(decoder(state[:2], keys[:2]), (state, memory, *decoder.parameters()))

    close(run(), step_by_step(monkeypatch, run))


def test_parameters_that_change_between_loops(decoder):
    state, memory = data()
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    keys = ProjectedKeys(torch.randn(3, 7, 8), memory.detach())
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        decoder(state, keys).backward()
        found.append(decoder.attention.weight.grad.clone())
        optimizer.step()
    fresh = ProjectedKeys(keys.key, keys.value)
    optimizer.zero_grad()
    decoder(state, fresh).backward()
    again = decoder.attention.weight.grad.clone()
    optimizer.zero_grad()
    decoder(state, keys).backward()
    assert torch.equal(again, decoder.attention.weight.grad)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("cast", [False, True])
def test_what_asks_for_a_gradient_may_change_between_loops(decoder, cast, monkeypatch):
    state, memory = data()
    keys = ProjectedKeys(torch.randn(3, 7, 8), memory.detach())
    if cast:
        keys = keys.to(torch.bfloat16)
    decoder.attention.weight.requires_grad_(False)
    decoder(state, keys).backward()
    decoder.attention.weight.requires_grad_()
    keys.key.requires_grad_()
    wanted = (state, decoder.attention.weight, keys.key)

    def run():
        return torch.autograd.grad(decoder(state, keys), wanted)

    close(run(), step_by_step(monkeypatch, run))


def test_a_normalised_weight_follows_its_parameters(monkeypatch):
    decoder, (state, memory) = Decoder(normalize=True), data()
    keys = decoder.project(memory)
    before, _ = decoder.step(state, keys)
    with torch.no_grad():
        decoder.attention.weight_g.mul_(30.0)
    after, _ = decoder.step(state, keys)
    assert not torch.allclose(before, after)
    close(after, step_by_step(monkeypatch, lambda: decoder.step(state, keys)[0]))


def test_edits_in_place_between_forward_and_backward_are_errors(decoder):
    state, memory = data()
    for edited in ("key", "weight"):
        keys = decoder.project(memory)
        loss = decoder(state, keys)
        with torch.no_grad():
            (keys.key if edited == "key" else decoder.attention.weight).add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_threads_that_differentiate_one_graph(decoder):
    state, memory = data()
    inputs = (state, memory, *decoder.parameters())
    loss = decoder(state, decoder.project(memory))
    expected = torch.autograd.grad(loss, inputs, retain_graph=True)
    found = []

    def run():
        found.append(torch.autograd.grad(loss, inputs, retain_graph=True))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(all(map(torch.equal, grads, expected)) for grads in found)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
@not_on_the_standin("it has no process group")
def test_distributed_data_parallel(decoder, tmp_path, monkeypatch):
    state, memory = (t.detach() for t in data())
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.decoder = decoder

            def forward(self, state, memory):
                return self.decoder(state, self.decoder.project(memory))

        parallel = nn.parallel.DistributedDataParallel(Model())
        parallel(state, memory).backward()
        actual = [p.grad.clone() for p in decoder.parameters()]
    finally:
        torch.distributed.destroy_process_group()

    def run():
        return torch.autograd.grad(decoder(state, decoder.project(memory)), tuple(decoder.parameters()))

    close(actual, step_by_step(monkeypatch, run))


def test_nothing_outlives_the_loop(decoder):
    state, memory = data()
    keys = decoder.project(memory)
    loss = decoder(state, keys)
    joint = weakref.ref(keys.shared().with_weight((decoder.attention.weight, None), None)[1].grad_fn)
    gc.disable()  # nothing may wait for it
    try:
        torch.autograd.grad(loss, (state, memory), retain_graph=True)
        assert joint().runs == {}
        del loss, keys
        assert joint() is None
    finally:
        gc.enable()


@pytest.mark.skipif(BACKEND == "triton" or DEVICE != "cpu", reason="compiles for the CPU")
def test_compiled_and_transformed_steps_take_the_plain_way(decoder, monkeypatch):
    state, memory = data()
    inputs = (state, memory, *decoder.parameters())

    def run(function=decoder):
        return torch.autograd.grad(function(state, decoder.project(memory)), inputs)

    expected = run()
    close(run(torch.compile(decoder, backend="aot_eager", fullgraph=True)), expected)
    keys = decoder.project(memory.detach())
    actual = torch.func.grad(lambda s: decoder(s, keys))(state.detach())
    close(actual, torch.autograd.grad(decoder(state, keys), state)[0])
