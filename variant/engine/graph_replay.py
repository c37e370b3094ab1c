"""Generation and decoding of whole batches by CUDA graphs.

Axes: B images, L tokens of all scales, E codebook vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from variant.engine.cuda_graphs import GraphCache, Recorder, Tensors
from variant.engine.generation import Sampling
from variant.engine.step_loop import BatchState, TokenBatch, generate_tokens
from variant_kernels import DepthSchedule
from variant_kernels.integrations.alterations import is_equal


class GraphReplay:
    """One graph per schedule, batch size and filters; recorded at the first use, then replayed.

    Graphs read the weights that they were recorded with: other weights need another object.

    Args:
        recorder: records the graphs; a :class:`variant.engine.cuda_graphs.GraphRecorder` on a GPU.
        weights: all tensors that graphs may read. They are kept, so that a graph can be replayed
            before it is known whether the model has others by now.
        settings: reads what else decides the kernels, and may change between two calls.
    """

    def __init__(
        self,
        recorder: Recorder,
        weights: Sequence[Tensor] = (),
        settings: Callable[[], tuple[Any, ...]] = tuple,
    ) -> None:
        self.graphs = GraphCache(recorder)
        self._weights = weights
        self._read_settings, self._settings = settings, settings()
        # Bytes of the K/V cache of each recorded generation: allocated, and in use at most.
        self._kv_bytes: dict[Hashable, tuple[int, int]] = {}

    def generate_tokens(
        self,
        start: Callable[[Tensor], BatchState],
        labels_B: Tensor,
        image_ids_B: Tensor,
        sampling: Sampling,
        schedule: DepthSchedule,
        configuration: Hashable,
    ) -> TokenBatch:
        """:func:`variant.engine.step_loop.generate_tokens` by a graph.

        Args:
            start: allocates the batch of given labels; ``configuration`` must identify all
                that its work depends on besides the labels, ``sampling`` and ``schedule``.
            labels_B: (B,) int64.  image_ids_B: (B,) int64 on the device.
            sampling: that a graph can draw (:attr:`Sampling.can_be_captured`).
        """
        key = _key(len(labels_B), sampling, schedule, configuration)
        # The graph keeps its body. A reference from there to self would be a cycle, and the graphs
        # of old weights would stay in memory until the garbage collector runs.
        kv_bytes = self._kv_bytes

        def body(labels_B: Tensor, image_ids_B: Tensor, cfg: Tensor, seed: Tensor) -> Tensors:
            batch = generate_tokens(start(labels_B), sampling.with_tensors(cfg, seed), image_ids_B)
            kv_bytes[key] = batch.allocated_bytes, batch.peak_bytes
            return batch.tokens_BL, batch.f_hat_BEHW

        # full() launches a kernel. A tensor made from a number would be copied to the device, and
        # the host would wait for the copy.
        device = image_ids_B.device
        cfg = 0.0 if isinstance(sampling.cfg, tuple) else float(cast("float", sampling.cfg))
        tokens_BL, f_hat_BEHW = self._run(
            ("generate_tokens", key),
            body,
            labels_B.to(device, non_blocking=True),
            image_ids_B,
            torch.full((), cfg, dtype=torch.float64, device=device),
            torch.full((), int(sampling.seed or 0), dtype=torch.int64, device=device),
        )
        return TokenBatch(tokens_BL, f_hat_BEHW, schedule, *kv_bytes[key])

    def has(
        self, batch: int, sampling: Sampling, schedule: DepthSchedule, configuration: Hashable
    ) -> bool:
        """Whether :meth:`generate_tokens` replays a recording for these."""
        return ("generate_tokens", _key(batch, sampling, schedule, configuration)) in self.graphs

    def has_decoder(self, shape_BEHW: tuple[int, ...]) -> bool:
        """Whether :meth:`decode` replays a recording for a feature map of this shape."""
        return ("decode", shape_BEHW) in self.graphs

    def decode(self, decode: Callable[[Tensor], Tensor], f_hat_BEHW: Tensor) -> Tensor:
        """``decode(f_hat_BEHW)`` by a graph, a new tensor."""
        key = ("decode", tuple(f_hat_BEHW.shape))
        return self._run(key, lambda f_hat_BEHW: (decode(f_hat_BEHW),), f_hat_BEHW)[0]

    @property
    def are_outdated(self) -> bool:
        """Whether a setting changed since the graphs were recorded."""
        return not is_equal(self._read_settings(), self._settings)

    def _run(self, key: Hashable, body: Callable[..., Tensors], *inputs: Tensor) -> Tensors:
        recorded = key not in self.graphs
        outputs = self.graphs.run(key, body, *inputs)
        if recorded:  # which runs the parts: a counter in one is no setting that changed
            self._settings = self._read_settings()
        return outputs


def _key(
    batch: int, sampling: Sampling, schedule: DepthSchedule, configuration: Hashable
) -> Hashable:
    return schedule.layers, configuration, batch, sampling.recorded
