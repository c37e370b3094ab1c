"""Changes of a model's parts by a user, for tests: removed, replaced, wrapped, cast alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Change = Callable[[nn.Module], None]


class Wrapper(nn.Module):
    """A module without parameters of its own around another one."""

    def __init__(self, inner: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *args, **options):
        return self.inner(*args, **options) * self.factor


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def removed(path: str) -> Change:
    def change(model):
        owner, name = owner_of(model, path)
        delattr(owner, name)

    return change


def replaced(path: str, make: Callable = lambda old: nn.Identity()) -> Change:
    """Args: make: of the old part the new one."""

    def change(model):
        owner, name = owner_of(model, path)
        setattr(owner, name, make(getattr(owner, name)))

    return change


def wrapped(path: str, factor: float = 2.0) -> Change:
    return replaced(path, lambda old: Wrapper(old, factor))


def halved(path: str) -> Change:
    return lambda model: model.get_submodule(path).half() and None
