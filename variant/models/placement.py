"""Arguments ``dtype`` and ``device`` of models: resolved from names and checked in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from variant_kernels.arguments import shown, typed
from variant_kernels.dispatch.request import dtype_name
from variant_kernels.wording import counted

# Of engines: weights, K/V and matrix products.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of weights that are only loaded or converted.
WEIGHT_DTYPES = (*DTYPES, torch.float64)
# Other names of torch for the same dtypes.
SHORT_NAMES = {"float": "float32", "half": "float16", "double": "float64"}


def check_dtype(
    op: str,
    dtype: torch.dtype | str | None,
    *,
    name: str = "dtype",
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> torch.dtype | None:
    """A dtype that is given as itself or by its name.

    Args:
        op, name: of the function and of its argument, for the message.
        dtype: a torch.dtype; its name, such as "bfloat16" or "torch.bfloat16"; None or "auto".
        dtypes: those that the function takes.
    Returns:
        the dtype; None for None and "auto", which stand for the dtype of the weights.
    Raises:
        TypeError: neither a torch.dtype nor text.
        ValueError: none of ``dtypes``.
    """
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        return None
    expected = f"{name} must be one of {', '.join(map(dtype_name, dtypes))}"
    if not isinstance(dtype, str | torch.dtype):
        raise TypeError(f"{op}: {expected} (a torch.dtype or its name); got {typed(dtype)}")
    asked = dtype if isinstance(dtype, str) else dtype_name(dtype)
    asked = asked.removeprefix("torch.")
    asked = SHORT_NAMES.get(asked, asked)
    for known in dtypes:
        if dtype_name(known) == asked:
            return known
    raise ValueError(f"{op}: {expected}; got {shown(asked)}")


def check_device(
    op: str,
    device: torch.device | str | int | None,
    *,
    name: str = "device",
    computes: bool = False,
) -> torch.device | None:
    """A device that is present on this machine.

    Args:
        op, name: of the function and of its argument, for the message.
        device: as ``torch.device`` takes it: "cpu", "cuda", "cuda:1", a torch.device, or the index
            of a GPU; None stays None.
        computes: whether values are computed there, which meta does not hold.
    Raises:
        TypeError: of another type.
        ValueError: torch knows no such device, or this machine has none.
    """
    if device is None:
        return None
    if not isinstance(device, str | int | torch.device) or isinstance(device, bool):
        raise TypeError(
            f'{op}: {name} must be a device such as "cpu" or "cuda:0"; got {typed(device)}'
        )
    # torch.device takes a bare index for its current accelerator; without one it raises.
    asked: Any = f"cuda:{device}" if isinstance(device, int) else device
    try:
        found = torch.device(asked)
    except RuntimeError:
        raise ValueError(
            f'{op}: {name} must be a device such as "cpu" or "cuda:0"; got {shown(device)}'
        ) from None
    count = torch.cuda.device_count() if found.type == "cuda" else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        has = f"has {counted(count, 'GPU')}"
        if count == 0:
            has = "sees no GPU" if torch.backends.cuda.is_built() else "was built without CUDA"
        remedy = f'"cuda:0" to "cuda:{count - 1}" or "cpu"' if count else '"cpu"'
        raise ValueError(f'{op}: {name} "{found}" is not there: torch {has}; give {remedy}')
    try:
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError, NotImplementedError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f'{op}: {name} "{found}" cannot be used: {first[:120]}; give "cpu"'
        ) from None
    if computes and found.type == "meta":
        raise ValueError(f'{op}: {name} "{found}" cannot be used: it holds no values; give "cpu"')
    return found
