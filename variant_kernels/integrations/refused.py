"""Model families that are known but not supported: the error states the reason."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NoReturn

from torch import Tensor, nn

from variant_kernels.integrations.base import ClassSwap, ModelFamily, PatchError


class RefusedFamily(ModelFamily):
    """A family that is not supported: every method but ``recognise`` raises.

    reason: why, for the error message.
    """

    reason: ClassVar[str]

    @abstractmethod
    def recognise(self, model: nn.Module) -> bool:
        """See :class:`ModelFamily`."""

    def verify(self, model: nn.Module) -> None:
        """Always raise PatchError."""
        self._refuse()

    def runtime(self, model: nn.Module) -> Any:
        """Always raise PatchError."""
        self._refuse()

    def class_swaps(self, model: nn.Module, runtime: Any) -> list[ClassSwap]:
        """Always raise PatchError."""
        self._refuse()

    def probe(self, model: nn.Module) -> list[Tensor]:
        """Always raise PatchError."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise PatchError(
            f"patch: the model looks like {self.name}, which is not supported: {self.reason}"
        )


def first_block(model: nn.Module) -> Any:
    """The first of ``model.blocks``, or None."""
    blocks = getattr(model, "blocks", None)
    return blocks[0] if isinstance(blocks, nn.ModuleList) and len(blocks) else None
