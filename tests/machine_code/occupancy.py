"""Programs that one processor (SM) of compute capability 9.0 holds at once.

Sources: NVIDIA's CUDA C++ Programming Guide, table "Technical Specifications per Compute
Capability"; the Hopper Tuning Guide, section "Occupancy".
"""

from __future__ import annotations

MAX_PROGRAMS, MAX_WARPS = 32, 64
REGISTERS, QUARTERS = 65_536, 4
# Registers of a warp are allocated in units of 256: 8 for each thread.
REGISTER_UNIT = 8
SHARED_BYTES = 228 * 1024
# The driver's own part of each program's shared memory; the whole is a multiple of 128.
SHARED_RESERVED, SHARED_UNIT = 1024, 128
MAX_SHARED_BYTES = 227 * 1024


def programs_per_processor(registers: int, num_warps: int, shared_bytes: int) -> int:
    """Programs at once; 0 if one needs more than there is.

    Args:
        registers: of each thread.  shared_bytes: of each program, without the driver's.
    """
    if shared_bytes > MAX_SHARED_BYTES:
        return 0
    rounded = -(-max(registers, 1) // REGISTER_UNIT) * REGISTER_UNIT
    # Each quarter of a processor has its own registers, and a warp stays in its quarter.
    warps_by_registers = REGISTERS // QUARTERS // (rounded * 32) * QUARTERS
    shared = -(-(shared_bytes + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    return min(
        MAX_PROGRAMS,
        MAX_WARPS // num_warps,
        warps_by_registers // num_warps,
        SHARED_BYTES // shared,
    )
