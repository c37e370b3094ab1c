"""Dtypes by the names that the command line takes."""

from __future__ import annotations

from variant.models import placement
from variant_kernels.dispatch.request import dtype_name

DTYPES = {dtype_name(dtype): dtype for dtype in placement.DTYPES}
