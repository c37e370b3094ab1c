"""A VARiant on the parameters of two models of the original code, which may go on changing.

Each of our modules uses the very dictionaries in which the original's module keeps its parameters
and buffers. So whatever torch puts there (``load_state_dict(assign=True)``, ``.half()``, ``.to()``,
a new ``.data``) is what the VARiant reads; what it cannot follow is refused at the next call. Where
hooks, a method, a setting or a part changed, both models are compared again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from variant.engine.engine import Engine, check_engine_dtype
from variant.engine.weights import EngineWeights
from variant.errors import UserError
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.supernet import VARiant
from variant_kernels.integrations.alterations import (
    global_hooks,
    is_dtensor,
    methods_of,
    readable,
    settings_of,
)
from variant_kernels.integrations.claims import one_thread
from variant_kernels.untraced import untraced


class LiveWeights:
    """The link between a model of the original code and ours.

    Args:
        name: "var" or "vae", for messages.
        original, ours: the two models; ``ours`` uses the original's tensors from now on.
        settings: reads what the original's object tells beside its tensors.
        compare: runs both models' parts on small inputs; raises UserError where they differ.
    """

    def __init__(
        self,
        name: str,
        original: nn.Module,
        ours: nn.Module,
        settings: Callable[[], Mapping[str, Any]],
        compare: Callable[[], None],
    ) -> None:
        self.original = original
        self._ours, self._name, self._read_settings = ours, name, settings
        self._compare, self._compared = compare, ([original], [])
        self._settings = dict(settings())
        self._modules: list[tuple[str, nn.Module]] = []
        self._children: list[tuple[str, nn.Module, str, nn.Module]] = []
        self._shapes: list[tuple[str, nn.Module, dict[str, torch.Size]]] = []
        for path, module in ours.named_modules():
            source = _submodule(original, path)
            if source is None and not any(True for _ in module.parameters()):
                continue  # an identity of the quantiser, which may be elsewhere in the original
            assert source is not None
            where = f"{name}.{readable(path)}".removesuffix(".")
            shapes = {n: p.shape for n, p in module._parameters.items() if p is not None}
            shapes |= {n: p.shape for n, p in source._parameters.items() if p is not None}
            self._shapes.append((where, source, shapes))
            for child in module._modules:
                inner = source._modules.get(child)
                if inner is None:
                    continue
                inside = f"{where}[{child}]" if child.isdigit() else f"{where}.{child}"
                self._children.append((inside, source, child, inner))
            module._parameters = source._parameters
            if module._buffers.keys() == source._buffers.keys():
                module._buffers = source._buffers

    def check(self) -> None:
        """Follow the original to its device.

        Raises:
            UserError: it was changed in a way that cannot be followed.
        """
        with one_thread("accelerate", self.original.modules(), UserError):
            self._check()

    def _check(self) -> None:
        for where, parent, name, child in self._children:
            if parent._modules.get(name) is not child:
                raise self._changed(f"{where} is another module now")
        device = None
        for where, module, shapes in self._shapes:
            for name, tensor in module._parameters.items():
                if tensor is not None and name not in shapes:
                    raise self._changed(f"{where}.{name} is a parameter now")
            for name, shape in shapes.items():
                tensor = module._parameters.get(name)
                if tensor is None:
                    raise self._changed(f"{where}.{name} is no parameter any more")
                if tensor.is_meta or is_dtensor(tensor):
                    kind = "on the meta device" if tensor.is_meta else "distributed"
                    raise self._changed(f"{where}.{name} is {kind} now")
                if tensor.shape != shape:
                    change = f"{tuple(tensor.shape)} now, not {tuple(shape)}"
                    raise self._changed(f"{where}.{name} has shape {change}")
                device = device or tensor.device
                if tensor.device != device:
                    raise self._changed(f"{where}.{name} is on {tensor.device}, not on {device}")
        for name, value in self._read_settings().items():
            if value != self._settings.get(name):
                change = f"{value!r} now, not {self._settings.get(name)!r}"
                raise self._changed(f"{self._name}: {name} is {change}")
        for name, buffer in self._ours._buffers.items():
            if buffer is not None and buffer.device != device:
                self._ours._buffers[name] = buffer.to(device)
        if _code(self._compared[0]) != self._compared[1]:
            self._compare()
            modules = list(self.original.modules())
            self._compared = modules, _code(modules)

    @staticmethod
    def _changed(what: str) -> UserError:
        return UserError(
            f"accelerate: {what}; undo that, or call accelerate again with the changed model"
        )


def _code(modules: list[nn.Module]) -> list[tuple[Any, ...]]:
    """What determines, beside tensors, what each of these modules computes."""
    of_classes = {
        kind: {name: getattr(kind, name, None) for name in methods_of(kind)}
        for kind in {type(module) for module in modules}
    }
    own = [
        (
            of_classes[type(module)],
            {n: module.__dict__[n] for n in module.__dict__.keys() & methods_of(type(module))},
            settings_of(module),
            *module._forward_pre_hooks.values(),
            *module._forward_hooks.values(),
            *module._modules.values(),
        )
        for module in modules
    ]
    return [global_hooks(), *own]


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = model
    for name in filter(None, path.split(".")):
        found = None if found is None else found._modules.get(name)
    return found


class LiveVARiant(VARiant):
    """A VARiant that runs with the weights that two models of the original code have at each call.

    ``to``, ``half`` and the like change those models too. A copy, or a pickle, is a plain VARiant
    with weights of its own.

    Args:
        var, vae: our models.  links: theirs with the original's.
    """

    def __init__(self, var: VAR, vae: VQVAE, links: tuple[LiveWeights, ...]) -> None:
        super().__init__(var, vae)
        self._links = links

    @untraced
    def engine(self, dtype: torch.dtype | str | None = None) -> Engine:
        for link in self._links:
            link.check()
        dtype = check_engine_dtype("VARiant", dtype, self.var)
        return self._kept_engine(dtype, lambda: LiveEngine(self.var, self.vae, self._links, dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LiveVARiant:
        # In the originals, so that their other tensors come along.
        for link in self._links:
            link.original._apply(fn, recurse)
            link.check()
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        members = {n: v for n, v in vars(self).items() if n != "_links"} | {"_engines": {}}
        return object.__new__, (VARiant,), members


class LiveEngine(Engine):
    """An engine that looks for changes of the original models at each call."""

    def __init__(
        self, var: VAR, vae: VQVAE, links: tuple[LiveWeights, ...], dtype: torch.dtype
    ) -> None:
        self._links = links
        super().__init__(var, vae, dtype=dtype)

    def _weights(self) -> EngineWeights:
        for link in self._links:
            link.check()
        return super()._weights()

    def _presumed(self) -> None:
        """Nothing is presumed: the original may have changed in a way that cannot be followed."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        members = {n: v for n, v in self.__getstate__().items() if n != "_links"}
        return object.__new__, (Engine,), members
