"""The steps of a decoder: what they share gets its gradients once, after the backward pass of all of them.

A decoder attends once per step, over the same keys and values and with the same weight. The gradients of these
three are sums over the steps; by itself each step would write one as large as all keys, for autograd to add up.
Here a step's backward yields the gradient of its query alone and leaves a record, and one joint backward, whose
queries are those of all steps, makes the sums::

    key, value, weight -- joint node -- token -- step, step, ...

The joint node makes a token without elements that is an input of every step: so the engine runs it when it is
done with all steps that the result depends on. A step has key, value and weight as real inputs, too: with
``create_graph`` it returns their gradients as any call does, and leaves no record, so that derivatives of any
order stay right.

Records belong to one run of the engine, a graph task: several may share a graph (``retain_graph``), and one may
fail half way. They are made only where that run reaches the joint node, and dropped when it ends.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, Variable, forward_ad

from fusedattn._autograd import Op, Operators, below_autograd, quick_function, run_saving


def are_recorded() -> bool:
    """Whether steps may leave their gradients to a joint backward: autograd makes a graph, and nothing else."""
    return torch.is_grad_enabled() and is_eager()


def is_eager() -> bool:
    """Whether calls are run as they come: nothing compiles, transforms or traces them."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
        and forward_ad._current_level < 0
    )


def version(t: Tensor | None) -> int | None:
    """Counted up by edits in place; None where they are not counted."""
    return None if t is None or t.is_inference() else t._version


class Shared:
    """What the steps of loops share: key (B, [H,] Tk, D), value (B, [H,] Tk, Dv), and a weight at a time."""

    def __init__(self, key: Tensor, value: Tensor):
        self.key, self.value = key, value
        self._sources: tuple = ()
        self._state: list | None = None
        self._weight: Tensor | None = None
        self._token: Tensor | None = None

    def with_weight(self, sources: tuple, make: Callable[[], Tensor]) -> tuple[Tensor, Tensor | None]:
        """(``make()``, the token that stands for key, value and it, or None where none of them has a gradient).

        Both are made once, for as long as the tensors that the weight is made of are the same, unedited, and the
        same ones ask for a gradient.
        """
        state = [(version(t), t is not None and t.requires_grad) for t in (*sources, self.key, self.value)]
        if state != self._state or any(a is not b for a, b in zip(sources, self._sources, strict=True)):
            self._sources, self._state, self._weight = sources, state, make()
            token = _Joint.apply(self.key, self.value, self._weight)
            self._token = token if token.requires_grad else None
        return self._weight, self._token  # type: ignore[return-value]


def attend(op: Op, backend: str, tensors: tuple, options: NamedTuple, flags: tuple, token: Tensor):
    """A step: ``op(backend, tensors, options, flags)``, whose token stands for its key, value and weight."""
    _, key, value, weight, *_ = tensors
    of_key, of_value, of_weight = token.grad_fn.shared  # type: ignore[union-attr]
    fits = key is of_key and value is of_value  # most often; else perhaps their first batch elements
    fits = fits or (key.shape[1:] == of_key.shape[1:] and value.shape[1:] == of_value.shape[1:])
    fits = fits and key.dtype is of_key.dtype and value.dtype is of_value.dtype and weight.shape == of_weight.shape
    # A causal step's queries count from its first key. Dropout's random bits are of one seed for a call.
    alone = options.is_causal or options.dropout_p != 0  # type: ignore[attr-defined]
    if not fits or backend == "reference" or alone:
        return op(backend, tensors, options, flags)
    return _step(op.operators[backend]).apply(*tensors, *options, *flags, token)


@functools.cache
def _step(operators: Operators) -> type[Function]:
    """The Function of a step: forward's, with the token as one more argument."""

    def forward(ctx, *arguments):
        return run_saving(ctx, operators.fwd, operators.save_forward, arguments[:-1])

    def backward(ctx, *grads):
        if torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return operators.first_derivative(ctx, *grads)
        grads = operators.given(ctx, grads)
        if grads is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, joint = ctx.saved_tensors, ctx.next_functions[-1][0]
        if torch._C._will_engine_execute_node(joint):
            _add(joint.records, _Record(operators, ctx.options, grads, saved))
        return operators.gradients(ctx, grads, saved, (ctx.needs_input_grad[0], False, False, False))

    return quick_function(f"{operators.fwd._opname}_step", forward, backward)


class _Record(NamedTuple):
    """One step, to the joint backward."""

    operators: Operators
    options: tuple
    grads: list[Any]  # of context, lse and weights
    saved: tuple[Any, ...]  # query, key, value, weight, mask, key_lengths, key_exp, key_bound,
    # dropout_seed, then context, lse, scores


def _add(records: dict[int, list[_Record]], record: _Record) -> None:
    task = torch._C._current_graph_task_id()
    if task not in records:
        records[task] = []

        def drop() -> None:
            records.pop(task, None)

        Variable._execution_engine.queue_callback(drop)
    records[task].append(record)


class _Joint(Function):
    """Key, value and weight to a token; backward makes their gradients of the records that steps left."""

    @staticmethod
    def forward(ctx, key, value, weight):
        # Not saved: losses of different steps may be differentiated one after the other. The steps save them, and
        # find out who edits them in place.
        ctx.shared = key, value, weight
        ctx.records = {}
        ctx.set_materialize_grads(False)
        return key.new_empty(0)

    @staticmethod
    def backward(ctx, _):
        groups: dict[tuple, list[_Record]] = {}
        for record in ctx.records.pop(torch._C._current_graph_task_id(), ()):
            query, scores = record.saved[0], record.saved[-1]
            # Rows that a step was not given are hidden by their scores; without these, steps differ in batch.
            batch = None if scores.numel() else query.shape[0]
            masked = record.saved[4] is not None
            groups.setdefault((record.operators, record.options, batch, masked), []).append(record)
        found: list[Tensor | None] = [None, None, None]
        for group in groups.values():
            parts = _joint_gradients(group, ctx.shared, ctx.needs_input_grad)
            found = [b if a is None else a + b for a, b in zip(found, parts, strict=True)]
        return tuple(found)


def _joint_gradients(steps: list[_Record], shared: tuple[Tensor, ...], asked: tuple[bool, ...]) -> list:
    """Gradients of key, value and weight of steps with the same options: of one call with the queries of all."""
    batches = [step.saved[0].shape[0] for step in steps]
    batch = max(batches)
    first = steps[batches.index(batch)]
    key, value = (t[:batch] for t in shared[:2])
    rows, row = -2, -1  # where queries are in (B, [H,] Tq, width) and in (B, [H,] Tq)

    def joined(parts, dim, absent=0.0):
        """One after the other, with ``absent`` in the batch elements that a step was not given."""
        whole = []
        for part in parts:
            if part.shape[0] < batch:
                missing = (batch - part.shape[0], *part.shape[1:])
                part = torch.cat([part, part.new_full(missing, absent)])
            whole.append(part)
        return torch.cat(whole, dim)

    def saved(n):
        return [step.saved[n] for step in steps]

    def grad_outputs(n, dim, shape):
        """None where no step has any, zeros where others have."""
        present = [step.grads[n] for step in steps if step.grads[n] is not None]
        if not present:
            return None
        grads = (present[0].new_zeros(shape(step)) if step.grads[n] is None else step.grads[n] for step in steps)
        return joined(grads, dim)

    infinite = float("-inf")  # scores and lse of a query that sees no key
    mask = None if first.saved[4] is None else joined(saved(4), rows, False)
    scores = joined(saved(-1), rows, infinite) if first.saved[-1].numel() else first.saved[-1]
    with below_autograd():
        _, *found = first.operators.bwd(
            grad_outputs(0, rows, lambda step: step.saved[-3].shape),
            grad_outputs(1, row, lambda step: step.saved[-2].shape),
            grad_outputs(2, rows, lambda step: (*step.saved[-2].shape, key.shape[-2])),
            joined(saved(0), rows), key, value, first.saved[3], mask, *first.saved[5:9], *first.options,
            joined(saved(-3), rows), joined(saved(-2), row, infinite), scores,
            sum([2 << n for n, needed in enumerate(asked) if needed]),
        )  # fmt: skip
    grads = [grad if needed else None for grad, needed in zip(found, asked, strict=True)]
    for n in range(2):  # of batch elements that no step was given
        if grads[n] is not None and batch < shared[n].shape[0]:
            grads[n] = torch.cat([found[n], torch.zeros_like(shared[n][batch:])])
    return grads
