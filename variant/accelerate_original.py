"""``accelerate``: a model object of the original VAR code, run by our engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from variant.checkpoints.model_folder import build
from variant.checkpoints.original_var import infer_var_config, infer_vqvae_config
from variant.errors import UserError
from variant.live_weights import LiveVARiant, LiveWeights
from variant.models.config import VARConfig, VQVAEConfig
from variant.models.parts import overridden_methods
from variant.models.quantizer import MultiScaleQuantizer
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.supernet import VARiant
from variant_kernels import ScaleLayout
from variant_kernels.arguments import instance
from variant_kernels.integrations import alterations
from variant_kernels.integrations.base import (
    Patched,
    PatchError,
    compare_outputs,
    kept_members,
)
from variant_kernels.integrations.claims import one_thread
from variant_kernels.integrations.var import VARFamily

# Of every group normalisation in the VQ-VAE.
GROUP_NORM_EPS = 1e-6
FAMILY = VARFamily()
# Methods of the original that generation or encoding calls, and the engine does not. (The original
# decorates none of them.)
UNCALLED = ("get_logits", "fhat_to_img", "img_to_idxBl")
UNCALLED_OF_QUANTIZE = (
    "embed_to_fhat",
    "f_to_idxBl_or_fhat",
    "get_next_autoregressive_input",
)


def accelerate(var: nn.Module, vae: nn.Module) -> VARiant:
    """A VARiant that shares the weights of an original VAR model and its VQ-VAE.

    The weights are not copied and the two objects, patched or not, are not changed. The VARiant
    generates with the weights that they have at each call, also after training, ``.to()`` or
    ``load_state_dict``; a change that it cannot follow is an error at that call. Sizes are read
    from tensor shapes, all other settings from the objects. Their parts are run on small inputs and
    compared with ours, so that changed code is not ignored.

    Args:
        var: a ``VAR`` of the original repository (or of CoDe), on any device; also what
            ``torch.compile`` returned for one.
        vae: its ``VQVAE``, on the same device.
    Returns:
        A model in eval mode. Its parameters are those of the two objects: ``to`` and
        ``requires_grad_`` change both.
    Raises:
        TypeError: one of the two is no module.
        UserError: one of the two is not such a model, or not as that repository makes it; the
            message names what is missing or differs.
    """
    var, vae = _unwrapped("var", var), _unwrapped("vae", vae)
    with one_thread("accelerate", [*var.modules(), *vae.modules()], UserError):
        return _accelerated(var, vae)


def _accelerated(var: nn.Module, vae: nn.Module) -> VARiant:
    """The same, while no other thread patches or compares one of the two."""
    if not FAMILY.recognise(var):
        raise UserError(
            f"accelerate: var must be a VAR of the original repository, with {FAMILY.structure}; "
            f"got {type(var).__name__}"
        )
    _check_tensors("var", var)
    _check_tensors("vae", vae)
    with _as_user_error("var"):
        FAMILY.verify(var)
        config = infer_var_config(var.state_dict(), "var", **_var_settings(var))
    vae_config = _vqvae_config(vae, config)
    our_var = build(VAR, config, var.state_dict(), "var").eval()
    our_vae = build(VQVAE, vae_config, vae.state_dict(), "vae").eval()
    links = (
        LiveWeights(
            "var",
            var,
            our_var,
            lambda: _var_settings(var),
            lambda: _compare_var(var, our_var),
        ),
        LiveWeights(
            "vae",
            vae,
            our_vae,
            lambda: _vae_settings(vae),
            lambda: _compare_vae(vae, our_vae),
        ),
    )
    for link in links:
        link.check()
    return LiveVARiant(our_var, our_vae, links).eval()


# --- the two objects ------------------------------------------------------------------------------


def _unwrapped(name: str, model: nn.Module) -> nn.Module:
    """The model that torch.compile wrapped.

    Raises:
        TypeError: no module.  UserError: in another wrapper.
    """
    instance("accelerate", name, model, nn.Module)
    while type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
        model = model.get_submodule("_orig_mod")
    if isinstance(model, VAR | VARiant):
        raise UserError(
            f"accelerate: {name} must be a model of the original repository; got this package's "
            f"{type(model).__name__}, for which VARiant(var, vae).generate(labels) is fast already"
        )
    wrapped = alterations.wrapper_alteration(model, name)
    if wrapped is not None:
        raise UserError(f"accelerate: {wrapped}")
    return model


def _check_tensors(name: str, model: nn.Module) -> None:
    """Raises: UserError, if there are no plain weights to share."""
    names = alterations.readable_names(model)
    altered = alterations.tensor_alteration(model, names, "gather its parameters first")
    for module in model.modules():
        where = names[id(module)]
        if "parametrizations" in module._modules:
            altered = f"{where} has parametrizations; remove_parametrizations() merges them"
        elif type(module).__name__ == "OptimizedModule":
            altered = f"{where} is compiled by torch.compile; put its _orig_mod there"
    if altered is not None:
        raise UserError(f"accelerate: {name}: {altered}")


@contextmanager
def _as_user_error(name: str) -> Iterator[None]:
    try:
        yield
    except PatchError as error:
        text = str(error).removeprefix("patch: the model ")
        raise UserError(f"accelerate: {name} {text}") from error.__cause__
    except (TypeError, ValueError) as error:
        raise UserError(f"accelerate: {name}: {error}") from error
    except UserError as error:
        # The functions that read a state dict begin with the name of a file, here of the argument.
        text = str(error)
        raise UserError(
            text if text.startswith("accelerate: ") else f"accelerate: {text}"
        ) from error


def _var_settings(var: Any) -> dict[str, Any]:
    """What the transformer tells beside its tensors.

    Raises:
        UserError: the layers differ, or have a setting that we do not have.
    """
    norms = [block.ln_wo_grad for block in var.blocks] + [var.head_nm.ln_wo_grad]
    for norm in norms:
        for name in ("weight", "bias"):
            if getattr(norm, name, None) is not None:
                raise UserError(f"accelerate: var: layer norms must have no {name}; set it to None")
    attentions = [block.attn for block in var.blocks]
    for attn in attentions:
        scale = 1 if attn.attn_l2_norm else 0.25 / math.sqrt(attn.head_dim)
        if not math.isclose(attn.scale, scale):
            raise UserError(f"accelerate: var: attn.scale must be {scale:g}; got {attn.scale}")
    found = {
        "norm_eps": _one("var", "eps of the layer norms", [norm.eps for norm in norms]),
        "num_heads": _one("var", "number of heads", [attn.num_heads for attn in attentions]),
    }
    _one("var", "attn_l2_norm", [attn.attn_l2_norm for attn in attentions])
    for name in ("cond_drop_rate", "drop_path_rate"):
        if hasattr(var, name):
            found[name] = getattr(var, name)
    return found | {"patch_nums": tuple(var.patch_nums)}


def _vae_settings(vae: Any) -> dict[str, Any]:
    """What the VQ-VAE tells beside its tensors; see :func:`_var_settings`."""
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm) and module.eps != GROUP_NORM_EPS:
            raise UserError(
                f"accelerate: vae: group norms must have eps {GROUP_NORM_EPS}; got {module.eps}"
            )
    if isinstance(vae, VQVAE):  # our own, beside an original transformer
        return {"config": vae.config}
    quantize = getattr(vae, "quantize", None)
    convs = [
        m
        for m in getattr(quantize, "quant_resi", nn.Module()).modules()
        if hasattr(m, "resi_ratio")
    ]
    ratios: list[Any] = [conv.resi_ratio for conv in convs]
    ratio = (
        _one("vae", "quant_resi", ratios) if ratios else getattr(quantize, "quant_resi_ratio", None)
    )
    found = {name: getattr(quantize, name, None) for name in ("using_znorm", "beta")}
    sides = getattr(quantize, "v_patch_nums", None)
    return found | {"quant_resi": ratio, "patch_nums": None if sides is None else tuple(sides)}


def _one(name: str, what: str, values: list[Any]) -> Any:
    if len(set(values)) != 1:
        raise UserError(f"accelerate: {name} must have one {what}; got {sorted(set(values))}")
    return values[0]


def _vqvae_config(vae: nn.Module, config: VARConfig) -> VQVAEConfig:
    if isinstance(vae, VQVAE):
        return vae.config
    settings = _vae_settings(vae)
    sides = settings.pop("patch_nums")
    if sides not in (None, config.patch_nums):
        raise UserError(
            f"accelerate: var and vae must have the same patch_nums; got {config.patch_nums} and "
            f"{sides}"
        )
    with _as_user_error("vae"):
        return infer_vqvae_config(vae.state_dict(), config.patch_nums, "vae", **settings)


# --- the comparison -------------------------------------------------------------------------------


def _compare_var(var: Any, our_var: VAR) -> None:
    """Run the parts of both transformers on small inputs.

    Raises:
        UserError: they compute something else; the engine would not run what makes the difference.
    """
    _check_methods("var", var)
    with _as_user_error("var"):
        FAMILY.verify(var)  # also what the small inputs do not show
    with _in_eval_mode(var):
        _compare_part("var", var, lambda: _blocks(var), lambda: _our_blocks(var, our_var))
        _compare_part("var", var, lambda: _ends(var, our_var), lambda: _ends(our_var, our_var))


def _compare_vae(vae: Any, our_vae: VQVAE) -> None:
    """The same of the VQ-VAEs."""
    _check_methods("vae", vae)
    with _in_eval_mode(vae):
        _compare_part(
            "vae", vae, lambda: _decoded(vae, our_vae), lambda: _decoded(our_vae, our_vae)
        )


def _check_methods(name: str, model: nn.Module) -> None:
    """Check that the methods which the engine does not call are those of the models' classes.

    ``forward`` may be another one: the parts' are compared by calling them, and those of the models
    and of the quantiser serve training.

    Raises:
        UserError: a method was replaced or overridden.
    """
    names = alterations.readable_names(model)
    for module in model.modules():
        where = f"{name}.{names[id(module)]}".removesuffix(".")
        for method in alterations.methods_on_instance(module):
            if method != "forward":
                raise UserError(
                    f"accelerate: {where}.{method} was replaced on the instance; the engine does "
                    f"not call it. Restore it first (del {where}.{method})"
                )
    quantize: Any = model._modules.get("quantize")
    if isinstance(model, VQVAE):
        overridden = [
            (where, module, base, method)
            for where, module, base in (
                (name, model, VQVAE),
                (f"{name}.quantize", quantize, MultiScaleQuantizer),
            )
            for method in overridden_methods(module, base)
            if method != "forward"
        ]
        for where, module, base, method in overridden:
            raise UserError(
                f"accelerate: {where}.{method} is that of {type(module).__name__}, which overrides "
                f"that of {base.__name__}; the engine does not call it"
            )
        return
    for module, where, methods in (
        (model, name, UNCALLED),
        (quantize, f"{name}.quantize", UNCALLED_OF_QUANTIZE),
    ):
        for method in methods:
            if hasattr(module, method):
                altered = alterations.method_alteration(module, method, where)
                if altered is not None:
                    raise UserError(f"accelerate: {altered}; the engine does not call it")


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Without gradients and autocast; the model's modules are as before afterwards."""
    device = next(model.parameters()).device
    with torch.no_grad(), kept_members(model), torch.autocast(device.type, enabled=False):
        for module in model.modules():
            module.training = False
        yield


def _compare_part(
    name: str,
    model: nn.Module,
    theirs: Callable[[], list[Tensor]],
    ours: Callable[[], list[Tensor]],
) -> None:
    expected = ours()
    try:
        compare_outputs(name, theirs(), expected)
    except Exception as error:
        names = alterations.readable_names(model)
        altered = [names[id(m)] for m in model.modules() if alterations.is_altered(m)]
        hint = f"; {altered[0]} has hooks or another forward" if any(altered) else ""
        if alterations.global_hooks():
            hint = "; hooks of every module are registered (register_module_forward_hook)"
        text = str(error).removeprefix(f"patch: the model looks like {name}, but ").splitlines()[0]
        raise UserError(
            f"accelerate: {name} does not run as the original code does, and the engine reads its "
            f"weights only{hint}: {text}"
        ) from error


def _blocks(var: Any) -> list[Tensor]:
    """Outputs of the original's layers at two scales, by its own cache."""
    if not isinstance(var, Patched):
        return FAMILY.probe(var)
    runtime = var.patch_state.runtime
    kept = runtime.depth, runtime.bridge, runtime.last
    try:
        runtime.set_depth(None, None)
        return FAMILY.probe(var)
    finally:
        runtime.depth, runtime.bridge, runtime.last = kept


def _our_blocks(var: Any, our_var: VAR) -> list[Tensor]:
    """The same of our layers, in one call with the block-causal mask."""
    cond, *inputs = FAMILY.probe_inputs(var)
    layout = ScaleLayout.from_patch_nums(our_var.config.patch_nums[: len(inputs)])
    x, shared = torch.cat(inputs, dim=1), our_var.shared_condition(cond)
    for block in our_var.layers():
        x = block(x, shared, layout)
    return list(our_var.head_nm(x, cond).split([part.shape[1] for part in inputs], dim=1))


def _ends(model: Any, our_var: VAR) -> list[Tensor]:
    """Outputs of what is before and after the layers."""
    like, config = our_var.head.weight, our_var.config
    generator = torch.Generator().manual_seed(0)
    words, hidden = (
        torch.randn(2, width, generator=generator, device="cpu").to(like)
        for width in (config.vae_channels, config.embed_dim)
    )
    index = torch.arange(len(config.patch_nums), device=like.device)
    label = torch.tensor([config.num_classes], device=like.device)
    return [
        model.word_embed(words),
        model.head(hidden),
        model.lvl_embed(index),
        model.class_emb(label),
    ]


def _decoded(model: Any, our_vae: VQVAE) -> list[Tensor]:
    """Outputs of the encoder and the decoder for an image of 2 by 2 tokens."""
    like, config = our_vae.post_quant_conv.weight, our_vae.config
    generator = torch.Generator().manual_seed(0)
    side = 2 * config.downsample
    image = (
        torch.rand(1, config.in_channels, side, side, generator=generator, device="cpu").to(like)
        * 2
        - 1
    )
    features = torch.randn(1, config.z_channels, 2, 2, generator=generator, device="cpu").to(like)
    outputs = [
        model.quant_conv(model.encoder(image)),
        model.decoder(model.post_quant_conv(features)),
    ]
    index = range(config.layout.num_scales)
    convs, picked = model.quantize.quant_resi, our_vae.quantize._conv_of_scale
    if model is our_vae or isinstance(model, VQVAE):
        outputs += [convs[picked[k]](features) for k in index]
    else:
        last = max(config.layout.num_scales - 1, 1)
        outputs += [convs[k / last](features) for k in index]
    return [output.nan_to_num() for output in outputs]
