"""Prints the compute capabilities of the GPUs that this process can use, one a line: 9.0

It asks the CUDA driver, which obeys CUDA_VISIBLE_DEVICES, and needs neither a toolkit nor torch.
If there is no such GPU it prints the reason to stderr and exits with 1.
"""

from __future__ import annotations

import ctypes
import sys

# Values of the driver's enumeration CUdevice_attribute.
CAPABILITY_MAJOR = 75
CAPABILITY_MINOR = 76


class NoGpuError(Exception):
    """The message says why no GPU can be used."""


def capabilities() -> list[tuple[int, int]]:
    """The different compute capabilities of the visible GPUs, lowest first.

    Raises:
        NoGpuError: there is no driver, or it shows no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise NoGpuError("the CUDA driver (libcuda.so.1) is not installed") from None

    def call(name: str, *arguments: object) -> None:
        status = getattr(driver, name)(*arguments)
        if status:
            raise NoGpuError(f"the CUDA driver's {name} returned the error {status}")

    call("cuInit", 0)
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    visible = set()
    for index in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDeviceGetAttribute", ctypes.byref(major), CAPABILITY_MAJOR, device)
        call("cuDeviceGetAttribute", ctypes.byref(minor), CAPABILITY_MINOR, device)
        visible.add((major.value, minor.value))
    if not visible:
        raise NoGpuError("the CUDA driver shows none")
    return sorted(visible)


def main() -> int:
    try:
        visible = capabilities()
    except NoGpuError as error:
        print(error, file=sys.stderr)
        return 1
    for major, minor in visible:
        print(f"{major}.{minor}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
