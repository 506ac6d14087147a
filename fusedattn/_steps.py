"""The steps of a decoder: what they share gets its gradients once, after the backward pass of all of them.

A decoder attends once per step, over the same keys and values and with the same parameters. The gradients of
these are sums over the steps; by itself each step would write one as large as all keys, for autograd to add up.
Here a step's backward yields the gradients of what is its own alone, such as its query, and leaves a record, and
one joint backward, whose queries are those of all steps, makes the sums::

    key, value, weight -- joint node -- token -- step, step, ...

The joint node makes a token without elements that is an input of every step: so the engine runs it when it is
done with all steps that the result depends on. A step has key, value and the like as real inputs, too: with
``create_graph`` it returns their gradients as any call does, and leaves no record, so that derivatives of any
order stay right.

An op whose work differs from step to step, so that one call for all would repeat it, has a step add up most of
these gradients itself (``Op.summed``): then the records are for the others, and the sums lie beside them.

Records belong to one run of the engine, a graph task: several may share a graph (``retain_graph``), and one may
fail half way. They are made only where that run reaches the joint node, and dropped when it ends.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, Variable, forward_ad

from fusedattn._autograd import Op, Operators, below_autograd, quick_function
from fusedattn._dispatch import is_eager
from fusedattn._dtypes import accumulation_dtype


def are_recorded() -> bool:
    """Whether steps may leave their gradients to a joint backward: autograd makes a graph, and nothing else."""
    return torch.is_grad_enabled() and is_eager()


def version(t: Tensor | None) -> int | None:
    """Counted up by edits in place; None where they are not counted."""
    return None if t is None or t.is_inference() else t._version


class Shared:
    """What the steps of loops share: key (B, [H,] Tk, D), value (B, [H,] Tk, Dv), and parameters at a time."""

    def __init__(self, key: Tensor, value: Tensor):
        self.key, self.value = key, value
        self._sources: tuple = ()
        self._state: list | None = None
        self._parameters: tuple[Tensor | None, ...] = ()
        self._token: Tensor | None = None

    def with_weight(self, sources: tuple, make: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        """As below, of one parameter."""
        (weight,), token = self.with_parameters(sources, lambda: (make(),))
        return weight, token  # type: ignore[return-value]

    def with_parameters(
        self, sources: tuple, make: Callable[[], tuple[Tensor | None, ...]]
    ) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """(``make()``, the token that stands for key, value and these, or None where none has a gradient).

        Both are made once, for as long as the tensors that the parameters are made of are the same, unedited, and
        the same ones ask for a gradient.
        """
        state = [(version(t), t is not None and t.requires_grad) for t in (*sources, self.key, self.value)]
        if state != self._state or any(a is not b for a, b in zip(sources, self._sources, strict=True)):
            self._sources, self._state, self._parameters = sources, state, make()
            token = _Joint.apply(self.key, self.value, *self._parameters)
            self._token = token if token.requires_grad else None
        return self._parameters, self._token


def attend(op: Op, backend: str, tensors: tuple, options: NamedTuple, flags: tuple, token: Tensor):
    """A step: ``op(backend, tensors, options, flags)``, whose token stands for what ``op.shared`` names."""
    if backend == "reference" or not _is_joint(op, tensors, options, token):
        return op(backend, tensors, options, flags)
    return _step(op.operators[backend]).apply(*tensors, *options, *flags, token)


def _is_joint(op: Op, tensors: tuple, options: NamedTuple, token: Tensor) -> bool:
    """Whether a step may leave gradients to the joint node."""
    key, value, *parameters = (tensors[n] for n in _places(op))
    of_key, of_value, *of_parameters = token.grad_fn.shared  # type: ignore[union-attr]
    fits = key is of_key and value is of_value  # most often; else perhaps their first batch elements
    fits = fits or (key.shape[1:] == of_key.shape[1:] and value.shape[1:] == of_value.shape[1:])
    # Not one key that all batch elements share.
    fits = fits and len(key) <= len(of_key) and len(value) <= len(of_value)
    fits = fits and key.dtype is of_key.dtype and value.dtype is of_value.dtype
    for t, of in zip(parameters, of_parameters, strict=True):
        fits = fits and (t is of or (t is not None and of is not None and t.shape == of.shape))
    # Without a center of its own, a query's window counts from the step's first query. Dropout's random bits are
    # of one seed for a call.
    has_window = getattr(options, "has_window", False)
    counts = has_window and tensors[len(op.inputs) + op.others.index("window_center")] is None
    return fits and not counts and getattr(options, "dropout_p", 0.0) == 0


class Repeated:
    """The call of a step over projected keys, for steps that differ from it in the numbers of their query alone.

    ``state``, compared by value, and ``tensors``, by identity and version, tell whether a step does.
    """

    def __init__(self, state: tuple, tensors: tuple[Tensor | None, ...]):
        self._state, self._tensors = state, tensors
        self._watched = [t for t in tensors if t is not None and not t.is_inference()]
        self._seen = self._look()
        self._run: Callable | None = None
        self._others: tuple = ()  # all arguments but the query

    def _look(self) -> list:
        if torch.is_grad_enabled():
            return [(t._version, t.requires_grad) for t in self._watched]
        return [t._version for t in self._watched]

    def is_like(self, state: tuple, tensors: tuple[Tensor | None, ...]) -> bool:
        if self._run is None or self._state != state:
            return False
        for a, b in zip(self._tensors, tensors, strict=True):
            if a is not b:
                return False
        return self._look() == self._seen

    def keep(self, op: Op, query: Tensor, tensors: tuple, options: NamedTuple, flags: tuple, token) -> None:
        """What a step with this query came to on the CPU; nothing where the query was expanded for it."""
        if tensors[0] is not query:
            return
        operators, self._others = op.operators["cpu"], (*tensors[1:], *options, *flags)
        if token is not None and _is_joint(op, tensors, options, token):
            self._others = *self._others, token
            self._run = _step(operators).apply
        elif torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
            self._run = operators.Forward.apply
        else:
            self._run = operators.below

    def __call__(self, query: Tensor) -> tuple:
        return self._run(query, *self._others)  # type: ignore[misc]


def _is_batched(t: Tensor) -> bool:
    """Whether it stands for several, as those that ``is_grads_batched`` makes do: nothing adds them to one sum."""
    return torch._C._functorch.is_batchedtensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)


@functools.cache
def _places(op: Op) -> tuple[int, ...]:
    """Of what steps share, among the inputs."""
    return tuple(op.inputs.index(name) for name in op.shared)


@functools.cache
def _step(operators: Operators) -> type[Function]:
    """The Function of a step: forward's, with the token as one more argument."""
    shared = _places(operators.op)

    def forward(ctx, *arguments):
        return operators.Forward.forward(ctx, *arguments[:-1])

    def backward(ctx, *grads):
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return operators.first_derivative(ctx, *grads)
        grads = operators.given(ctx, grads)
        if grads is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, joint = ctx.saved_tensors, ctx.next_functions[-1][0]
        own = list(ctx.needs_input_grad)
        for n in shared:
            own[n] = False
        if torch._C._will_engine_execute_node(joint):
            run = _run_of(joint)
            step_bwd = operators.step_bwd
            if step_bwd is not None and not any([g is not None and _is_batched(g) for g in grads]):
                return run.add_step(step_bwd, operators, ctx.options, grads, saved, own, ctx.needs_input_grad)
            run.records.append(_Record(operators, ctx.options, grads, saved))
        return operators.gradients(ctx.options, grads, saved, tuple(own))

    return quick_function(f"{operators.fwd._opname}_step", forward, backward)


class _Record(NamedTuple):
    """One step, to the joint backward."""

    operators: Operators
    options: tuple
    grads: list[Any]  # of the outputs that are visible
    saved: tuple[Any, ...]  # inputs and others, then what is kept
    is_summed: bool = False  # whether it has added up what steps can

    def parts(self) -> dict[str, Any]:
        """``saved`` by name; outputs that are kept have names of their own."""
        op = self.operators.op
        return dict(zip((*op.inputs, *op.others, *op.kept), self.saved, strict=True))


class _Run:
    """What the steps of one run of the engine leave to the joint node."""

    def __init__(self, shared: tuple[Tensor | None, ...]):
        self._shared = shared
        self.records: list[_Record] = []
        self.sums: dict[int, Tensor] = {}  # of gradients, by place in what is shared

    def add_step(
        self, step_bwd: Callable, operators: Operators, options, grads, saved, own: list, needed: tuple
    ) -> tuple:
        """The gradients of a step that are its ``own``, once those that steps add up are added up."""
        op = operators.op
        (first, *others), read = op.summed, len(op.inputs) + len(op.others)
        places, total = dict(zip(op.inputs, range(len(op.inputs)), strict=True)), None
        if needed[places[first]]:
            total = self._sum_of(op.shared.index(first))[: len(saved[places[first]])]
        asked = [own[n] or (name in others and needed[n]) for name, n in places.items()]
        with below_autograd():
            mask = sum([1 << n for n, wanted in enumerate(asked) if wanted])
            found = step_bwd(*grads, *saved[:read], *options, *saved[read:], total, mask)
        for name in others:
            if needed[places[name]]:
                n, grad = op.shared.index(name), found[places[name]]
                self.sums[n] = self.sums[n].add_(grad) if n in self.sums else grad
        if any([needed[places[name]] for name in op.shared if name not in op.summed]):
            self.records.append(_Record(operators, options, grads, saved, is_summed=True))
        of_inputs = [grad if wanted else None for grad, wanted in zip(found, own, strict=False)]
        return (*of_inputs, *(None,) * (len(needed) - len(of_inputs)))

    def _sum_of(self, n: int) -> Tensor:
        if n not in self.sums:
            t: Any = self._shared[n]
            self.sums[n] = torch.zeros(t.shape, dtype=accumulation_dtype(t.dtype), device=t.device)
        return self.sums[n]


def _run_of(joint) -> _Run:
    """That of the engine in this thread; it is dropped when the engine ends."""
    task = torch._C._current_graph_task_id()
    if task not in joint.runs:
        runs = joint.runs
        runs[task] = _Run(joint.shared)

        def drop() -> None:
            runs.pop(task, None)

        Variable._execution_engine.queue_callback(drop)
    return joint.runs[task]


class _Joint(Function):
    """Key, value and parameters to a token; backward makes their gradients of the records that steps left."""

    @staticmethod
    def forward(ctx, key, value, *parameters):
        # Not saved: losses of different steps may be differentiated one after the other. The steps save them, and
        # find out who edits them in place.
        ctx.shared = key, value, *parameters
        ctx.runs = {}
        ctx.set_materialize_grads(False)
        return key.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        groups: dict[tuple, list[_Record]] = {}
        run = ctx.runs.pop(torch._C._current_graph_task_id(), None)
        if run is None:
            return (None,) * len(ctx.shared)
        for record in run.records:
            saved = record.parts()
            # Rows that a step was not given are hidden by their scores; without these, steps differ in batch.
            batch = None if saved["scores"].numel() else saved["query"].shape[0]
            masked, bias = saved["mask"] is not None, saved.get("bias")
            # One of its own for each step, but of as many batch elements, heads and keys.
            sizes = None if bias is None else (bias.dtype, bias.shape[0] == 1, bias.shape[1:-2], bias.shape[-1])
            kind = (record.operators, record.options, record.is_summed, batch, masked, sizes)
            groups.setdefault(kind, []).append(record)
        found: list[Tensor | None] = [None] * len(ctx.shared)
        for n, total in run.sums.items():
            found[n] = total.to(ctx.shared[n].dtype)
        for group in groups.values():
            op = group[0].operators.op
            done = op.summed if group[0].is_summed else ()
            needed = zip(op.shared, ctx.needs_input_grad, strict=True)
            asked = [wanted and name not in done for name, wanted in needed]
            parts = _joint_gradients(group, ctx.shared, asked)
            found = [b if a is None else a if b is None else a + b for a, b in zip(found, parts, strict=True)]
        return tuple(found)


# Rows of steps by name, and what stands for those that a step was not given: infinite are scores and lse of a
# query that sees no key. What is not here is that of all steps.
_ABSENT = {
    "query": 0.0,
    "previous": 0.0,
    "mask": False,
    "window_center": 0,
    "context": 0.0,
    "lse": -math.inf,
    "scores": -math.inf,
}


def _joint_gradients(steps: list[_Record], shared: tuple[Tensor, ...], asked: Sequence[bool]) -> list:
    """Gradients of what is shared, of steps with the same options: of one call with the queries of all."""
    operators, op = steps[0].operators, steps[0].operators.op
    parts = [step.parts() for step in steps]
    batches = [saved["query"].shape[0] for saved in parts]
    batch = max(batches)
    first = parts[batches.index(batch)]
    key, value = (t[:batch] for t in shared[:2])
    row = key.dim() - 2  # where queries are counted in each of their tensors

    def joined(rows, absent=0.0):
        """One after the other, with ``absent`` in the batch elements that a step was not given."""
        whole = []
        for part in rows:
            if part.shape[0] < batch:
                missing = (batch - part.shape[0], *part.shape[1:])
                part = torch.cat([part, part.new_full(missing, absent)])
            whole.append(part)
        return torch.cat(whole, row)

    def saved(name):
        if name in ("key", "value"):
            return key if name == "key" else value
        t = first[name]
        if name == "bias" and t is not None:
            rows = [p[name].expand(*p[name].shape[:-2], p["query"].shape[-2], -1) for p in parts]
            return torch.cat(rows, row) if t.shape[0] == 1 else joined(rows)
        return (
            t
            if t is None or t.numel() == 0 or name not in _ABSENT
            else joined([p[name] for p in parts], _ABSENT[name])
        )

    def grad_outputs(n, name):
        """None where no step has any, zeros where others have."""
        grads = [step.grads[n] for step in steps]
        present = [grad for grad in grads if grad is not None]
        if not present:
            return None
        width = {"context": value.shape[-1:], "lse": ()}.get(name, key.shape[-2:-1])
        lead = [p["query"].shape[:-1] for p in parts]
        return joined(
            [
                present[0].new_zeros(*at, *width) if grad is None else grad
                for at, grad in zip(lead, grads, strict=True)
            ]
        )

    visible = op.outputs[: len(op.outputs) - len(op.hidden)]
    places = _places(op)
    with below_autograd():
        found = operators.bwd(
            *(grad_outputs(n, name) for n, name in enumerate(visible)),
            *map(saved, (*op.inputs, *op.others)),
            *steps[0].options,
            *map(saved, op.kept),
            sum([1 << place for place, needed in zip(places, asked, strict=True) if needed]),
        )
    grads: list[Any] = [found[place] if needed else None for place, needed in zip(places, asked, strict=True)]
    for n in range(2):  # of batch elements that no step was given
        if grads[n] is not None and batch < shared[n].shape[0]:
            grads[n] = torch.cat([grads[n], torch.zeros_like(shared[n][batch:])])
    return grads
