"""One declaration per op: schema, checks, fake kernel, backends and gradient.

Ops are registered with ``define`` and ``impl``, which cost a few microseconds a call; the
``custom_op`` decorator costs three times that (2.7 against 9.5 us, torch 2.13, CPU, 16 floats).
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from variant_kernels.dispatch.request import Request
from variant_kernels.dispatch.select import (
    Backend,
    Launcher,
    check_name,
    choose_name,
    requested_name,
)
from variant_kernels.ops.derivatives import differentiate, refuse_derivatives
from variant_kernels.ops.launch import launch
from variant_kernels.ops.library import define
from variant_kernels.tensors import last_contiguous

# Remembered by each op. A program has some dozens; one with ragged batches has thousands.
MAX_SIGNATURES = 4096
_ops: list[Op] = []


def forget_signatures() -> None:
    """Make every op check its arguments and choose its backend anew at the next call.

    The backend asked for (argument, ``use_backend``, ``VARIANT_BACKEND``) is part of a signature.
    Call this after a change of anything else that a choice depends on: ``TRITON_INTERPRET``,
    ``VARIANT_CUDA_EMULATION``, an installed library, an op's table of backends.
    """
    for op in _ops:
        op.signatures.clear()


class Verdict(NamedTuple):
    """A signature that passed the checks, and the backend that serves it.

    apart: addresses of tensors of this signature that share no memory which the op writes.
    """

    backend: str
    launcher: Launcher
    on_cpu: bool
    apart: set[tuple[int, ...]]


class Op:
    """An op of ``torch.library``. Calling it runs the first backend that can serve the arguments.

    The schema names its arguments as the launchers do; one is ``str backend``. ``check`` and
    ``request`` get the schema's tensors in its order, without those after ``backend`` if omitted;
    ``check_values`` and ``launch`` get a dict of the launcher's arguments.

    Args:
        schema: as ``torch.library.define`` takes it.
        check: raises where shapes, strides, dtypes or devices are wrong. Runs once per signature.
        request: returns the properties of the tensors that decide which backends can serve them.
        fake: new tensors like the op's results.
        backends: by name, fastest first.
        check_values: raises where values are wrong. Runs at every call with CPU tensors; on a GPU
            it would wait for the device.
        check_memory: for an op that writes in place: raises where what it writes shares memory with
            another argument. Runs at every call, with a dict of the launcher's arguments and a set
            to remember the addresses in which a signature passed.
        launch: calls the launcher, where arguments or results need completing.
        exclude: backends that "auto" never takes inside the op.
        backward, backward_fake: schema and fake of the gradient; None for an inference-only op. An
            argument of it is named as an argument or a result of ``schema``, or ``grad_`` and the
            name of a result; its results are the gradients of the op's first arguments.
        title: name of the public function, if it is not the schema's.
    """

    def __init__(
        self,
        schema: str,
        *,
        check: Callable[..., None],
        request: Callable[..., Request],
        fake: Callable[..., Any],
        backends: dict[str, Backend],
        check_values: Callable[[dict[str, Any]], None] | None = None,
        check_memory: Callable[[dict[str, Any], set], None] | None = None,
        launch: Callable[[Launcher, dict[str, Any]], Any] | None = None,
        exclude: tuple[str, ...] = (),
        backward: str | None = None,
        backward_fake: Callable[..., Any] | None = None,
        title: str | None = None,
        tags: tuple[torch.Tag, ...] = (),
    ) -> None:
        self.title = title or schema.split("(", 1)[0]
        self.backends, self.exclude = backends, exclude
        self.signatures: dict[tuple[Any, ...], Verdict] = {}
        self.check, self._request, self._fake = check, request, fake
        self._check_values, self._check_memory, self._launch = check_values, check_memory, launch
        self.overload = define(schema, self._run, self._run_fake, tags)
        arguments = self.overload._schema.arguments
        self._names = tuple(argument.name for argument in arguments)
        self._backend = self._names.index("backend")
        types = {"Tensor": Tensor, "Optional[Tensor]": (Tensor, type(None))}
        kinds = [str(argument.type) for argument in arguments]
        self._positions = [i for i, kind in enumerate(kinds) if kind in types]
        self._types = [types[kinds[i]] for i in self._positions]
        # By the number of arguments: the dispatcher drops trailing ones that have their default.
        self._tensors = {
            count: itemgetter(*[i for i in self._positions if i < count])
            for count in range(self._backend + 1, len(arguments) + 1)
        }
        self._inference_only = backward is None
        # The overload of the gradient, and what runs it; None for an inference-only op.
        self.gradient: Any = None
        self.run_gradient: Callable[..., Any] | None = None
        if backward is not None and backward_fake is not None:
            self._register_gradient(backward, backward_fake)
        _ops.append(self)

    def __call__(self, *args: Any) -> Any:
        """Run the op; arguments in the schema's order."""
        if is_compiling():
            # A graph's sizes may be symbols: nothing is remembered.
            self.check(*[args[i] for i in self._positions if i < len(args)])
        else:
            # torch's own error for a list or a number names neither the op nor the argument.
            tensors = self._tensors[len(args)](args)
            for value, kind in zip(tensors, self._types):  # noqa: B905
                if not isinstance(value, kind):
                    self.check(*tensors)
        if type(args[self._backend]) is not str:
            check_name(self.title, args[self._backend])
        if self._inference_only and (torch.is_grad_enabled() or forward_ad._current_level >= 0):
            refuse_derivatives(self.title, *args)
        try:
            return self.overload(*args)
        except NotImplementedError:
            # Tensor subclasses (jagged ones under inference mode) raise it without a name.
            self.check(*[args[i] for i in self._positions if i < len(args)])
            raise

    def resolve(self, backend: str, *tensors: Any) -> str:
        """Check tensors and name the backend that serves them; in a graph ``backend`` as it is."""
        check_name(self.title, backend)
        if is_compiling():
            self.check(*tensors)
            return backend
        return self._verdict(backend, tensors).backend

    def _verdict(
        self, backend: str, tensors: tuple[Any, ...], exclude: tuple[str, ...] = ()
    ) -> Verdict:
        name = requested_name(backend)
        try:
            properties = [
                (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else type(x)
                for x in tensors
            ]
            signature = name, exclude, *properties
            verdict = self.signatures.get(signature)
        # Sizes that are symbols cannot be hashed; some sparse and nested tensors have no strides.
        except (TypeError, RuntimeError):
            verdict, signature = None, None
        if verdict is not None:
            return verdict
        self.check(*tensors)
        request = self._request(*tensors)
        name = choose_name(self.title, self.backends, name, request, exclude)
        verdict = Verdict(name, self.backends[name].forward, request.device == "cpu", set())
        if signature is not None:
            if len(self.signatures) >= MAX_SIGNATURES:
                self.signatures.clear()
            self.signatures[signature] = verdict
        return verdict

    def _run(self, *args: Any) -> Any:
        tensors = self._tensors[len(args)](args)
        name, launcher, on_cpu, apart = self._verdict(args[self._backend], tensors, self.exclude)
        arguments = dict(zip(self._names, args))  # noqa: B905
        del arguments["backend"]
        if self._check_memory is not None:
            self._check_memory(arguments, apart)
        if on_cpu and self._check_values is not None:
            self._check_values(arguments)
        return launch(name, launcher, arguments, self._launch)

    def _run_fake(self, *args: Any) -> Any:
        if not is_compiling():
            self.check(*self._tensors[len(args)](args))
        return self._fake(*args)

    def _register_gradient(self, schema: str, fake: Callable[..., Any]) -> None:
        def run(*args: Any) -> Any:
            arguments = dict(zip(names, args, strict=True))
            name = arguments.pop("backend")
            if name not in self.backends:
                text = f"backend must be one of {', '.join(self.backends)}; got {name!r}"
                raise ValueError(f"{overload._schema.name}: {text}")
            return launch(name, self.backends[name].backward, arguments, self._launch)

        overload = define(schema, run, fake, ())
        self.gradient, self.run_gradient = overload, run
        names = tuple(argument.name for argument in overload._schema.arguments)
        results = tuple(result.name for result in self.overload._schema.returns)
        known = (*self._names, *results)
        grads = [results.index(n.removeprefix("grad_")) for n in names if n.startswith("grad_")]
        rest = [known.index(n) for n in names[len(grads) :]]
        pick = self._tensors[len(self._names)]
        saved = [i for i in rest if i in self._positions or i >= len(self._names)]
        constants = [i for i in rest if i not in saved and i != self._backend]
        order = [[*saved, *constants, self._backend].index(i) for i in rest]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            values = (*inputs, *output)
            # The backward pass runs where the forward ran, whatever use_backend says by then.
            backend = inputs[self._backend]
            if backend == "auto":
                backend = self._verdict(backend, pick(inputs), self.exclude).backend
            ctx.constants = (*[values[i] for i in constants], backend)
            ctx.set_materialize_grads(len(grads) > 1)
            ctx.save_for_backward(*[values[i] for i in saved])

        def backward(ctx: Any, *grad_outputs: Any) -> Any:
            used = [grad_outputs[i] for i in grads]
            if used[0] is None:
                return (None,) * len(self._names)
            values = (*ctx.saved_tensors, *ctx.constants)
            gradients = overload(*map(last_contiguous, used), *[values[i] for i in order])
            return *gradients, *[None] * (len(self._names) - len(gradients))

        def refuse(ctx: Any, *grad_outputs: Any) -> Any:
            raise NotImplementedError(f"{self.title}: has no second derivative")

        differentiate(self.overload, self.title, backward, setup_context)
        differentiate(overload, self.title, refuse, lambda ctx, inputs, output: None)
