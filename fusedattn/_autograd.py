"""Makes an op from its declaration: what autograd, ``torch.func``, ``torch.compile`` and export ask of it.

An op has a reference and, for each family of backends, two raw operators::

    reference(*tensors, options)                           -> outputs
    <op>_fwd(*tensors, *options, *flags)                   -> outputs, then what only backward reads
    <op>_bwd(*grads, *inputs, *others, *options, *kept, output_mask)    -> gradients of inputs

Tensors are inputs (differentiable), others (no gradient) and added (their gradient is that of the first output);
any may be None. grads are those of the outputs, kept is what backward reads of the forward pass. Options are
numbers that both passes take; flags go to forward alone. An output that was not asked for has shape (0,); bit n of
output_mask asks for the gradient of input n.

:class:`Op` makes of them::

    derivative        a Function around <op>_fwd, whose backward calls <op>_bwd; the raw operator carries it, too,
                      so that an exported program trains like its module
    second and more   a Function around <op>_bwd, whose backward goes through the reference
    forward mode      the reference in place of the kernels
    vmap              the same operators, once, with the vmapped dimension folded into another (:class:`Fold`)
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from fusedattn import _flops, _library
from fusedattn._dispatch import MOST_SIGNATURES, UnsupportedError, are_plain, is_eager

# The families of backends: a dispatch key holds one kernel, so Triton's operators have names of their own.
_SUFFIXES = {"cpu": "", "cuda": "", "triton": "_triton"}
_IMPLEMENTATIONS = torch.library.Library("fusedattn", "IMPL")
# Around a call whose derivative is taken care of: the dispatcher would come back to Python for the operator's own,
# which doubles the cost of a small call.
below_autograd = torch._C._AutoDispatchBelowAutograd


class Fold:
    """Folds a vmapped dimension of size N into one that the op has; each op says how.

    Args:
        N: size of the vmapped dimension.
        tensors: of the op, in order (of its backward pass: without the added ones).
        dims: where N is in each of them, or None.
        options: of the op.
    """

    def __init__(self, N: int, tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...], options):
        self.N, self.tensors, self.dims, self.options = N, tensors, dims, options

    def folded(self) -> tuple[Tensor | None, ...]:
        """The tensors."""
        raise NotImplementedError

    def output(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        """An output of forward, or the gradient of one."""
        raise NotImplementedError

    def outputs_apart(self, outputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """Outputs with N in a dimension of its own, and which that is in each."""
        raise NotImplementedError

    def gradients_apart(self, grads: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        """The same for the gradients of inputs."""
        raise NotImplementedError


class BatchFold(Fold):
    """Into the first dimension of all tensors, batch elements or groups of them with parameters each.

    N of (B, ...) become (N B, ...), and N of (G, ...) N G groups.
    """

    def output(self, t, dim):
        if t is None or not asked_for(t):
            return t
        return (t.expand(self.N, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)

    def folded(self):
        return tuple(map(self.output, self.tensors, self.dims))

    def outputs_apart(self, outputs):
        found = [(t.unflatten(0, (self.N, -1)), 0) if asked_for(t) else (t, None) for t in outputs]
        return tuple(zip(*found, strict=True))

    gradients_apart = outputs_apart


DECLARED: list["Op"] = []  # every op


@dataclass(eq=False)
class Op:
    """An op, made from its declaration.

    Attributes:
        name: of the public function; the raw operators are ``<name>_fwd`` and ``<name>_bwd``.
        inputs, others, added: the tensors by name, in the order of the raw operators.
        options: NamedTuple type of the numbers that both operators take.
        outputs: what forward returns, by name; ``kept`` names those that backward reads.
        hidden: outputs, the last ones, that have no gradient: they are for backward alone.
        reference: (\\*tensors, options) -> outputs, in plain PyTorch, differentiable to any order.
        fwd_fake, bwd_fake: results of the raw operators by shape and dtype, from the same arguments; of backward
            all of them, without output_mask.
        fold: see :class:`Fold`.
        shared: inputs that the steps of a loop share, by name: those of which ``_steps.py`` makes the gradients.
        summed: those of them that steps add up themselves, where a family has the raw operator
            ``<name>_step_bwd``: backward with one tensor more, before output_mask: a sum of the gradients of the
            first one, in the dtype of the arithmetic, to add to. For ops most of whose work one call for all steps
            would repeat.
        tiny: (\\*tensors, options) -> outputs by plain PyTorch, of what :meth:`at_once` takes, where that is as
            accurate as kernels and faster; None elsewhere.
        flops: (\\*shapes of the inputs) -> operations in forward's products of matrices; backward has twice those.
        any_strides: whether kernels and fakes take tensors as they lie. Inductor then passes on what a convolution
            made with its channels last, which else it would copy for every call.
    """

    name: str
    inputs: tuple[str, ...]
    options: type[Any]
    outputs: tuple[str, ...]
    reference: Callable[..., Any]
    fwd_fake: Callable[..., Any]
    bwd_fake: Callable[..., Any]
    fold: Callable[..., Fold]
    others: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    summed: tuple[str, ...] = ()
    tiny: Callable[..., Any] | None = None
    flops: Callable[..., int] | None = None
    any_strides: bool = False
    operators: dict[str, "Operators"] = field(init=False, default_factory=dict)
    _sound: dict[tuple, tuple] = field(init=False, default_factory=dict)

    def __post_init__(self):
        DECLARED.append(self)
        errors = {"": _library.EXTENSION_ERROR, "_triton": _library.TRITON_ERROR}
        ops = torch.ops.fusedattn
        made = {
            suffix: Operators(self, suffix)
            for suffix, error in errors.items()
            if error is None
            and hasattr(ops, f"{self.name}_fwd{suffix}")  # not every op has kernels of every family
        }
        self.operators.update((name, made[suffix]) for name, suffix in _SUFFIXES.items() if suffix in made)
        if self.flops is not None:
            for operators in made.values():
                _flops.count(operators.fwd.overloadpacket, partial(self._fwd_flops, self.flops))
                _flops.count(operators.bwd.overloadpacket, partial(self._bwd_flops, self.flops))

    def __call__(self, backend: str, tensors: tuple, options: tuple, flags: tuple = ()):
        """Runs forward on a backend, with every derivative that may be asked for; the reference takes no flags."""
        if backend == "reference" or forward_ad._current_level >= 0:
            return self.reference(*tensors, options)
        try:
            return self.operators[backend].forward((*tensors, *options, *flags))
        except (TypeError, RuntimeError) as error:
            self._name_subclass(tensors, error)
            raise

    def at_once(self, tensors: tuple, settings: tuple):
        """A call whose settings were found sound before, for tensors of as many dimensions as its first one.

        Nothing else is looked at: the operator checks its tensors itself. None where there is something to look
        at, errors to be put into words included. For ops whose operator takes whatever the public function does.
        """
        if not (is_eager() and are_plain(tensors)) or torch._C._len_torch_dispatch_stack() or tensors[0] is None:
            return None
        first = tensors[0]
        dtype = first.dtype
        for t in tensors:
            if t is not None and not (t.dtype is dtype and t.is_cpu):
                return None
        try:
            options = self._sound[first.dim(), settings]
            if self.tiny is not None and (found := self.tiny(*tensors, options)) is not None:
                return found
            operators = self.operators["cpu"]
            asked = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
            return (operators.Forward.apply if asked else operators.below)(*tensors, *options)
        except (KeyError, TypeError, RuntimeError):
            return None

    def is_sound(self, backend: str, tensors: tuple, settings: tuple, options: tuple) -> None:
        """Remembers these settings for :meth:`at_once`."""
        if backend == "cpu" and is_eager():
            if len(self._sound) >= MOST_SIGNATURES:
                self._sound.clear()
            self._sound[tensors[0].dim(), settings] = options

    def _name_subclass(self, tensors: tuple, error: Exception) -> None:
        """In place of the dispatcher's error: the argument that is a subclass without a rule for the operator."""
        from torch._subclasses import FakeTensor

        names = (*self.inputs, *self.others, *self.added)
        for name, t in zip(names, tensors, strict=True):
            if isinstance(t, FakeTensor):  # it has rules
                continue
            if isinstance(t, Tensor) and type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                reason = str(error).strip().partition("\n")[0]
                got = f"got {type(t).__name__}, with which the operator fails: {reason}"
                raise UnsupportedError(f"{self.name}: {name}: expected a plain Tensor, {got}") from error

    def decompositions(self) -> dict[torch._ops.OpOverload, Callable]:
        """Forward by each family of backends as the reference's ATen operators."""
        return {operators.fwd: self._decomposed for operators in self.operators.values()}

    def _decomposed(self, *arguments):
        tensors, options, _ = self.fwd_parts(arguments)
        found, fakes = _tuple(self.reference(*tensors, options)), _tuple(self.fwd_fake(*arguments))
        absent = (fake.new_empty(0) for fake in fakes[len(found) :])  # what only backward reads
        outputs = (
            *(t if asked_for(fake) else t.new_empty(0) for t, fake in zip(found, fakes, strict=False)),
            *absent,
        )
        return outputs if len(outputs) > 1 else outputs[0]

    def _fwd_flops(self, formula, *arguments, **_):
        return formula(*arguments[: len(self.inputs)])

    def _bwd_flops(self, formula, *arguments, **_):
        return 2 * formula(*self.bwd_parts(arguments)[1][: len(self.inputs)])

    # The arguments of the raw operators, cut into their parts

    def fwd_parts(self, arguments: tuple) -> tuple[tuple, tuple, tuple]:
        """(tensors, options, flags) of forward's arguments."""
        a = len(self.inputs) + len(self.others) + len(self.added)
        b = a + len(self.options._fields)
        return arguments[:a], self.options(*arguments[a:b]), arguments[b:]

    def bwd_parts(self, arguments: tuple) -> tuple[tuple, tuple, tuple, tuple]:
        """(grads, tensors, options, kept) of backward's arguments, of which output_mask is the last."""
        a = len(self.outputs) - len(self.hidden)
        b = a + len(self.inputs) + len(self.others)
        c = b + len(self.options._fields)
        return arguments[:a], arguments[a:b], self.options(*arguments[b:c]), arguments[c:-1]

    def _masked_bwd_fake(self, *arguments):
        grads = _tuple(self.bwd_fake(*arguments[:-1]))
        found = tuple(grad if arguments[-1] >> n & 1 else grad.new_empty(0) for n, grad in enumerate(grads))
        return found if len(found) > 1 else found[0]


def _tuple(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def asked_for(output: Tensor) -> bool:
    """Whether an output is none of the empty ones in place of what was not."""
    return output.dim() != 1 or output.shape[0] != 0


class Operators:
    """The raw operators of one family of backends, and the Functions that make them differentiable."""

    def __init__(self, op: Op, suffix: str):
        self.op = op
        ops = torch.ops.fusedattn
        self.fwd = getattr(ops, f"{op.name}_fwd{suffix}").default
        self.bwd = getattr(ops, f"{op.name}_bwd{suffix}").default
        step = f"{op.name}_step_bwd{suffix}"
        self.step_bwd = getattr(ops, step).default if op.summed and hasattr(ops, step) else None
        # Where the parts of forward's arguments end, and which of its outputs are which: counted once.
        self._read = len(op.inputs) + len(op.others)  # by backward
        self._tensors = self._read + len(op.added)
        self._numbers = self._tensors + len(op.options._fields)
        self._visible = len(op.outputs) - len(op.hidden)
        self._kept = [op.outputs.index(name) for name in op.kept]
        self._inputs = len(op.inputs)
        self._patterns: dict[tuple[bool, ...], tuple[int, Callable[[tuple], tuple]]] = {}
        self.Forward, self.TransformedForward = _functions(
            self.fwd, self.save_forward, self.first_derivative, self._vmap_forward
        )
        self.Backward, self.TransformedBackward = _functions(
            self.bwd, self._save_backward, self._second_derivative, self._vmap_backward
        )
        for operator, fake, function in (
            (self.fwd, op.fwd_fake, self.Forward),
            (self.bwd, op._masked_bwd_fake, self.Backward),
        ):
            if op.any_strides:
                operator.tags.append(torch.Tag.flexible_layout)
            torch.library.register_fake(operator.name(), fake)
            kernel = partial(_carry_derivative, operator, function)
            _IMPLEMENTATIONS.impl(operator.name(), kernel, "Autograd", with_keyset=True)
        if self.step_bwd is not None:
            torch.library.register_fake(self.step_bwd.name(), lambda *a: op._masked_bwd_fake(*a[:-2], a[-1]))

    def below(self, *arguments):
        """Forward, of which no derivative will be asked."""
        with below_autograd():
            return self.fwd._op(*arguments)  # which is what the operator calls

    def forward(self, arguments: tuple):
        return self._run(self.fwd, self.Forward, self.TransformedForward, arguments)

    @staticmethod
    def _run(operator, function, transformed, arguments):
        if not is_eager():
            compiling = torch.compiler.is_compiling()
            if torch._C._are_functorch_transforms_active():
                return transformed.apply(*(map(_traced, arguments) if compiling else arguments))
            if compiling or torch._C._is_tracing():
                return operator(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(*arguments)
        with below_autograd():  # a Function costs more than a small problem
            return operator._op(*arguments)  # which is what the operator calls

    # First derivative: by <op>_bwd

    def save_forward(self, ctx, arguments, outputs):
        read, tensors = self._read, self._tensors
        ctx.options = arguments[tensors : self._numbers]
        ctx.set_materialize_grads(False)
        ctx.asked_for = None  # all
        if not isinstance(outputs, tuple):
            kept = (outputs,) if self._kept else ()
            ctx.save_for_backward(*arguments[:read], *kept)
            return
        ctx.save_for_backward(*arguments[:read], *[outputs[k] for k in self._kept])
        asked = [asked_for(t) for t in outputs[: self._visible]]
        if False in asked:
            ctx.asked_for = asked
        if len(outputs) > self._visible or False in asked:
            unasked = [t for t, wanted in zip(outputs, asked, strict=False) if not wanted]
            ctx.mark_non_differentiable(*unasked, *outputs[self._visible :])

    def given(self, ctx, grads):
        """The gradients of the outputs that were asked for; None where there are none."""
        if len(grads) > self._visible:
            grads = grads[: self._visible]
        if ctx.asked_for is not None:  # torch.compile gives zeros for placeholders
            grads = [grad if asked else None for grad, asked in zip(grads, ctx.asked_for, strict=True)]
        for grad in grads:  # a comprehension takes longer than a small problem's share of it
            if grad is not None:
                return grads
        return None

    def first_derivative(self, ctx, *grads):
        grads = self.given(ctx, grads)
        if grads is None:
            return (None,) * len(ctx.needs_input_grad)
        return self.gradients(ctx.options, grads, ctx.saved_tensors, ctx.needs_input_grad)

    def gradients(self, options, grads, saved, needed) -> tuple:
        """What backward returns of those that are needed, from what :meth:`save_forward` saved."""
        mask, returned = (self._pattern if torch.compiler.is_compiling() else self._known_pattern)(needed)
        tensors, kept = saved[: self._read], saved[self._read :]
        found: Any
        if not mask:  # what is added alone
            found = (None,) * self._inputs
        elif forward_ad._current_level >= 0:
            gradients, present, primals = self._through_reference(grads, tensors, options)
            found = [None] * self._inputs
            for k, grad in zip(present, gradients(*primals), strict=True):
                found[k] = grad
        else:
            arguments = (*grads, *tensors, *options, *kept, mask)
            found = _tuple(self._run(self.bwd, self.Backward, self.TransformedBackward, arguments))
        return returned((*found, grads[0], None))

    def _pattern(self, needed: tuple[bool, ...]) -> tuple[int, Callable[[tuple], tuple]]:
        """(output_mask, what picks backward's results), by what needs a gradient.

        It picks from the gradients of all inputs, then that of what is added, then None.
        """
        inputs, nothing = self._inputs, self._inputs + 1
        places = [nothing] * len(needed)
        for n, wanted in enumerate(needed[: self._tensors]):
            if wanted and (n < inputs or n >= self._read):
                places[n] = min(n, inputs)
        mask = sum([1 << n for n, wanted in enumerate(needed[:inputs]) if wanted])
        return mask, itemgetter(*places)

    def _known_pattern(self, needed: tuple[bool, ...]) -> tuple[int, Callable[[tuple], tuple]]:
        """The same, made once for each of the few that there are."""
        if needed not in self._patterns:
            self._patterns[needed] = self._pattern(needed)
        return self._patterns[needed]

    def _vmap_forward(self, info, in_dims, *arguments):
        tensors, options, flags = self.op.fwd_parts(arguments)
        fold = self.op.fold(info.batch_size, tensors, in_dims[: len(tensors)], options)
        outputs = self.TransformedForward.apply(*fold.folded(), *options, *flags)
        outputs, dims = fold.outputs_apart(_tuple(outputs))
        return (outputs, dims) if len(outputs) > 1 else (outputs[0], dims[0])

    # Second derivative: through the reference

    def _save_backward(self, ctx, arguments, _):
        grads, tensors, ctx.options, _ = self.op.bwd_parts(arguments)
        ctx.save_for_backward(*grads, *tensors)
        ctx.set_materialize_grads(False)

    def _second_derivative(self, ctx, *grad_grads):
        n = len(self.op.outputs) - len(self.op.hidden)
        saved = ctx.saved_tensors
        gradients, present, primals = self._through_reference(saved[:n], saved[n:], ctx.options)
        results, pullback = torch.func.vjp(gradients, *primals)
        cotangents = (grad_grads[k] for k in present)
        second = pullback(
            tuple(torch.zeros_like(r) if c is None else c for r, c in zip(results, cotangents, strict=True))
        )
        given = [k for k, grad in enumerate(saved[:n]) if grad is not None]
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for k, grad in zip((*(n + k for k in present), *given), second, strict=True):
            found[k] = grad
        return tuple(found)

    def _through_reference(self, grads, tensors, options):
        """What <op>_bwd computes, as a function that can be differentiated.

        Returns (function, which inputs are present, its arguments): it takes the inputs and the grads that are not
        None, and returns the gradients of these inputs.
        """
        op, options = self.op, self.op.options(*options)
        inputs, others = tensors[: len(op.inputs)], tensors[len(op.inputs) :]
        present = [k for k, t in enumerate(inputs) if t is not None]
        given = [k for k, grad in enumerate(grads) if grad is not None]

        def gradients(*arguments):
            def outputs(*primals):
                filled = dict(zip(present, primals, strict=True))
                all_inputs = (filled.get(k) for k in range(len(inputs)))
                results = _tuple(op.reference(*all_inputs, *others, *(None for _ in op.added), options))
                return tuple(results[k] for k in given)

            return torch.func.vjp(outputs, *arguments[: len(present)])[1](arguments[len(present) :])

        return gradients, present, (*(inputs[k] for k in present), *(grads[k] for k in given))

    def _vmap_backward(self, info, in_dims, *arguments):
        grads, tensors, options, kept = self.op.bwd_parts(arguments)
        a, b, c = len(grads), len(grads) + len(tensors), len(arguments) - len(kept) - 1
        fold = self.op.fold(info.batch_size, tensors, in_dims[a:b], options)
        grads = (fold.output(t, dim) for t, dim in zip(grads, in_dims[:a], strict=True))
        kept = (fold.output(t, dim).contiguous() for t, dim in zip(kept, in_dims[c:-1], strict=True))
        found = self.TransformedBackward.apply(*grads, *fold.folded(), *options, *kept, arguments[-1])
        return fold.gradients_apart(_tuple(found))


def _traced(x):
    """A view of a tensor: within ``torch.func.grad`` torch.compile knows only of what was made there that it may
    require gradients, and else takes a Function for inference: gradients come out zero."""
    return x.view_as(x) if isinstance(x, Tensor) else x


def _functions(operator, save, derivative, vmap) -> tuple[type[Function], type[Function]]:
    """The Function of an operator in PyTorch's two forms: the quick one, and the one that ``torch.func`` takes.

    torch.compile traces the second and wants plain functions with a known number of parameters.
    """

    def quick(ctx, *arguments):
        with below_autograd():
            outputs = operator._op(*arguments)
        save(ctx, arguments, outputs)
        return outputs

    def forward(*arguments):
        return operator(*arguments)

    def setup_context(ctx, inputs, output):
        save(ctx, inputs, output)

    def backward(ctx, *grads):
        return derivative(ctx, *grads)

    def vmap_rule(info, in_dims, *arguments):
        return vmap(info, in_dims, *arguments)

    parameters = [inspect.Parameter(a.name, inspect.Parameter.POSITIONAL_ONLY) for a in operator._schema.arguments]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

    name = operator._opname  # shown by grad_fn
    return (
        quick_function(name, quick, derivative),
        function(name, forward=forward, setup_context=setup_context, backward=backward, vmap=vmap_rule),
    )


def function(name: str, **methods) -> type[Function]:
    return type(name, (Function,), {method: staticmethod(f) for method, f in methods.items()})


def quick_function(name: str, forward, backward) -> type[Function]:
    """A Function in its form with a ctx, for calls outside of ``torch.func``: what ``Function.apply`` does for its
    sake, to every argument, is left out."""
    quick = function(name, forward=forward, backward=backward)
    quick.apply = torch._C._FunctionBase.__dict__["apply"]  # type: ignore[method-assign]
    return quick


def _carry_derivative(operator, function, keyset, *arguments):
    """The Autograd kernel of a raw operator, for exported and compiled programs, which hold nothing else."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(f"{operator}: forward-mode derivatives are those of the public function")
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
        return function.apply(*arguments)
    with below_autograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
