"""Forward hooks on parts of a transformer whose weights the engine reads without calling them.

Hooks that only look on, or that make a weight anew (torch's older weight norm, pruning), are no
obstacle. One that changes what a part takes or returns would be ignored.

Axes: R sequences, T tokens of the first scales, C width, E codebook vector width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from variant.models.parts import expected_model
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.models.zones import run_spans
from variant_kernels.integrations.alterations import global_hooks, without_global_hooks

NUM_SCALES = 2  # of the small run


@torch.no_grad()
def check_hooks(var: VAR, is_called: Callable[[str], bool]) -> None:
    """Compare the parts with the same parts without hooks, if there are any; hooks are called.

    Hooks that torch calls for every module count too.

    Args:
        is_called: of a path, whether the engine calls that module, and so its hooks.
    Raises:
        ValueError: the outputs differ.
    """
    hooked = [path for path, part in var.named_modules() if path and _has_hooks(part)]
    hooked = [path for path in hooked if not is_called(path)]
    of_all_modules = global_hooks()
    if not hooked and not of_all_modules:
        return
    own = _outputs(var, var)  # first, as a hook may make the weights that follow are read
    twin = _without_hooks(var, is_called)
    called = [part for path, part in twin.named_modules() if path and is_called(path)]
    with without_global_hooks(but=called):
        plain = _outputs(twin, var)
    if not all(map(_equal, own, plain)):
        names = [f"var.{path}" for path in hooked]
        if of_all_modules:
            names.insert(0, "every module (torch.nn.modules.module.register_module_forward_hook)")
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"Engine: forward hooks must not change what a part takes or returns, as the engine "
            f"reads weights and does not call the parts; there are hooks on "
            f"{', '.join(names[:3])}{more}. Remove them first"
        )


@torch.no_grad()
def change_images(vae: VQVAE) -> bool:
    """Whether torch's global hooks change the images (1, I, Y, X) of a small feature map."""
    weight = vae.post_quant_conv.weight
    generator = torch.Generator().manual_seed(0)
    f_hat_1CHW = torch.randn(1, weight.shape[1], 2, 2, generator=generator, device="cpu").to(weight)
    own = vae.decode_features(f_hat_1CHW)
    with without_global_hooks():
        return not _equal(own, vae.decode_features(f_hat_1CHW))


def _equal(found: Any, expected: Tensor) -> bool:
    """Whether they are the same tensor, by value; weights may have diverged to NaN."""
    return isinstance(found, Tensor) and torch.equal(found.nan_to_num(), expected.nan_to_num())


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _without_hooks(var: VAR, is_called: Callable[[str], bool]) -> VAR:
    """A model that shares the tensors of ``var``, and the parts that the engine calls."""
    twin = expected_model(var)
    called: list[str] = []
    for path, part in list(twin.named_modules()):
        if path.startswith(tuple(f"{above}." for above in called)):
            continue
        source = var.get_submodule(path)
        if path and is_called(path):
            called.append(path)
            twin.set_submodule(path, source)
            continue
        tensors = {name: getattr(source, name) for name in part._parameters}
        # Weights that a hook or a parametrization computes are no parameters.
        part._parameters = cast("dict[str, Any]", tensors)
        part._buffers = {name: getattr(source, name) for name in part._buffers}
    return cast("VAR", twin)


def _outputs(model: VAR, var: VAR) -> list[Tensor]:
    """Outputs of the layers with all their weights, and of what is before and after, small inputs.

    Args:
        var: gives the condition, and the inputs their dtype and device.
    """
    head, config = var.head.weight, var.config
    layout = var.layout.prefix(min(NUM_SCALES, var.layout.num_scales))
    generator = torch.Generator().manual_seed(0)
    x_RTC, words_RTE = (
        torch.randn(2, layout.total, width, generator=generator, device="cpu").to(head)
        for width in (config.embed_dim, config.vae_channels)
    )
    cond_RC = var.class_emb(torch.tensor([0, config.num_classes], device=head.device))
    shared = var.shared_condition(cond_RC)
    outputs = [model.word_embed(words_RTE.to(model.word_embed.weight.dtype))]
    for block in model.layers():
        for depth in map(int, block.zones):  # zone weights
            outputs += run_spans(block, [x_RTC], shared, layout, [depth])
        x_RTC = block(x_RTC, shared, layout)
    outputs.append(model.head_nm(x_RTC, cond_RC))
    return [*outputs, model.head(outputs[-1])]
