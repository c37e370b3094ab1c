"""The public functions on backends, under the name by which the documentation calls them."""

from variant_kernels.dispatch.explain import explain
from variant_kernels.dispatch.select import use_backend
from variant_kernels.dispatch.support import available_backends

__all__ = ["available_backends", "explain", "use_backend"]
