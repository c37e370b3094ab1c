"""The loss scale of fp16 training: where it starts, its cap, the steps that it skips.

Small gradients are zero in float16, so the loss is multiplied by a scale before the backward pass.
Where a scaled gradient is infinite or NaN, the optimiser's step is skipped and the scale is halved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from variant.errors import UserError

# Start and cap as in the code of VAR. A higher scale helps no gradient, but makes steps overflow.
START, CAP = 2.0**11, 2.0**15
# More skipped steps than this in a row end the run: the scale is then below START / 2^20, and no
# lower one would help.
MAX_SKIPPED_IN_ROW = 20


class LossScaler(torch.amp.GradScaler):
    """torch's GradScaler from 2^11, never above 2^15, that counts the steps that it skips.

    The counts are on the device, and they are part of the state dict. No method but
    :meth:`state_dict` and :attr:`skipped` waits for work of the device that was queued last.

    Args:
        device: "cuda" or "cpu".  enabled: False scales by 1, skips no step and has an empty state.
    """

    def __init__(self, device: str, *, enabled: bool = True) -> None:
        super().__init__(device, init_scale=START, enabled=enabled)
        self._skipped = self._in_row = torch.zeros((), dtype=torch.int64)
        self._earlier: list[tuple[Tensor, torch.cuda.Event | None]] = []

    @property
    def skipped(self) -> int:
        """Number of skipped steps, over all resumptions of the run."""
        return int(self._skipped)

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Update the scale for the next step, cap it, and count a skipped step."""
        if not self.is_enabled():
            return
        assert self._scale is not None, "update() follows scale() and step()"
        before = self._scale.clone()
        super().update(new_scale)
        self._scale.clamp_(max=CAP)
        is_skipped = self._scale < before  # only an overflow lowers it
        device = before.device
        self._skipped = self._skipped.to(device) + is_skipped
        self._in_row = (self._in_row.to(device) + 1) * is_skipped
        event = None
        copy = self._in_row.to("cpu", non_blocking=True).reshape(())
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._earlier.append((copy, event))

    def require_progress(self, name: str, step: int) -> None:
        """Call after :meth:`update` of each step.

        On a GPU the count is read one step late, so that the device is not waited for.

        Args:
            name: of the recipe, for the message.  step: the completed steps.
        Raises:
            UserError: too many steps were skipped in a row.
        """
        while self._earlier and (self._earlier[0][1] is None or len(self._earlier) > 1):
            copy, event = self._earlier.pop(0)
            if event is not None:
                event.synchronize()
            if int(copy) > MAX_SKIPPED_IN_ROW:
                raise UserError(
                    f"{name}: {int(copy)} optimizer steps in a row were skipped until step {step}: "
                    f"gradients in fp16 overflow also at a loss scale of {self.get_scale():g}; "
                    "try precision bf16, or a lower learning_rate"
                )

    def state_dict(self) -> dict[str, Any]:
        """torch's state and the two counts; {} where the scaler is not enabled."""
        state = super().state_dict()
        if state:
            state |= {"skipped": self.skipped, "skipped_in_row": int(self._in_row)}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, also one of torch's GradScaler; a scale above the cap becomes the cap."""
        state = {"skipped": 0, "skipped_in_row": 0, **state_dict}
        counts = [
            torch.tensor(int(state.pop(name)), device="cpu")
            for name in ("skipped", "skipped_in_row")
        ]
        if self.is_enabled():
            super().load_state_dict(state | {"scale": min(state["scale"], CAP)})
            self._skipped, self._in_row = counts
            self._earlier = []
