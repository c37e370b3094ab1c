"""Peak rates of GPUs in 16-bit matrix products: what model FLOPs utilisation (MFU) is a share of.

Rates are those of the vendor's data sheets, of dense products (without structured sparsity) with
float32 sums. A GPU that is not listed has no MFU: a guessed peak would make one up.
"""

from __future__ import annotations

import torch

TERA = 1e12
# FLOP/s by the name that torch.cuda.get_device_name gives. A part of a GPU (MIG) has a name of its
# own, and so no peak here.
PEAKS = {
    "NVIDIA A100-PCIE-40GB": 312 * TERA,
    "NVIDIA A100 80GB PCIe": 312 * TERA,
    "NVIDIA A100-SXM4-40GB": 312 * TERA,
    "NVIDIA A100-SXM4-80GB": 312 * TERA,
    "NVIDIA A10": 125 * TERA,
    "NVIDIA L4": 121 * TERA,
    "NVIDIA L40S": 362 * TERA,
    "NVIDIA GeForce RTX 4090": 165.2 * TERA,
    "NVIDIA GH200 480GB": 989.4 * TERA,
    "NVIDIA H100 80GB HBM3": 989.4 * TERA,
    "NVIDIA H100 PCIe": 756 * TERA,
    "NVIDIA H100 NVL": 835 * TERA,
    "NVIDIA H200": 989.4 * TERA,
}


def peak_rate(device: torch.device, precision: str) -> tuple[float | None, str]:
    """FLOP/s of a GPU in a precision; without one, the reason.

    Args:
        precision: "fp32", "bf16" or "fp16". Float32 products have no one peak: their rate depends
            on whether TF32 is allowed.
    """
    if device.type != "cuda":
        return None, f"no peak is known of the device {device.type}"
    name = torch.cuda.get_device_name(device)
    if precision == "fp32":
        return None, "precision fp32 has no one peak"
    if name not in PEAKS:
        return None, f"no peak is known of {name}"
    return PEAKS[name], ""
