"""The state dict of one model in a file of any trainer: wrappers, prefixes and averages taken off.

Trainers store a state dict under a name ("state_dict", "model", "trainer/var_wo_ddp", ...), often
beside an exponential moving average of it (EMA), and their wrappers put prefixes before every key
("module.", "_orig_mod.", the attribute of a LightningModule). Nothing is known here of particular
trainers: a state dict is wherever the keys of the model are, behind one common prefix.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from variant.checkpoints.dotless_averages import dotless_averages, with_dots, without_groups
from variant.checkpoints.unnamed_averages import (
    dictionaries,
    is_average,
    unnamed_averages,
    with_names,
)
from variant.errors import UserError
from variant_kernels.arguments import typed

# Keys that every model of a kind has; found together behind one prefix, they are the model.
VAR_KEYS = (
    "word_embed.weight",
    "lvl_embed.weight",
    "pos_1LC",
    "class_emb.weight",
    "head.weight",
    "blocks.0.ffn.fc1.weight",
)
VAE_KEYS = ("quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.weight")
# The key of each model in a trainer checkpoint of the original, and those of its state dict.
KEYS_OF_PART = {"var_wo_ddp": VAR_KEYS, "vae_local": VAE_KEYS}
MODEL, EMA = "model", "ema"
# Parts of a key that wrappers of a module or a submodule add: DistributedDataParallel and
# AveragedModel, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Averages over parameters alone lack these; they are no parameters.
BUFFERS = ("zero_k_bias", "ema_vocab_hit_SV", "lvl_1L", "attn_bias_for_masking")
COUNT = "n_averaged"  # of torch's AveragedModel: how often it was updated


@dataclass(frozen=True)
class StateDict:
    """A state dict that was found in a file.

    name: its place: the keys of the dictionaries around it and the prefix, joined by "/".
    complete: whether every key that marks the model is there.
    plain: names of weights that have no average and are those of the plain model.
    """

    name: str
    state: dict[str, Tensor]
    complete: bool
    averaged: bool
    plain: tuple[str, ...] = ()

    def describe(self) -> str:
        """The name, or words for a file that is a state dict itself."""
        return f'"{self.name}"' if self.name else "the state dict at the top"


def find_state_dict(
    content: Mapping[Any, Any], part: str, where: str, weights: str | None = None
) -> dict[str, Tensor]:
    """The state dict of one model, under the model's own keys.

    Args:
        content: of a .pth or .safetensors file.
        part: "var_wo_ddp" or "vae_local": which of the two models.
        where: names the file in errors.
        weights: "model", "ema", or the name of an entry of the file ("trainer/var_ema"); None takes
            what there is, and of several the plain model with a warning. It chooses the
            transformer; for a VQ-VAE it counts only where the file has such an entry.
    Raises:
        TypeError: ``weights`` is no text.
        UserError: the file has no such model, or several plain ones.
    """
    if weights is not None and not isinstance(weights, str):
        raise TypeError(
            f'{where}: weights must be "model", "ema" or the name of an entry; got {typed(weights)}'
        )
    found = list(_search(content, KEYS_OF_PART[part], where))
    complete = [state for state in found if state.complete]
    named, unnamed = _unnamed(content, complete)
    if not complete:
        if unnamed:
            raise _without_names(where, *next(iter(unnamed.items())))
        return _incomplete(content, found, part, where)
    complete += named
    if weights in unnamed and part == "var_wo_ddp":
        raise _without_names(where, weights, unnamed[weights])
    if weights == EMA and unnamed and not any(state.averaged for state in complete):
        raise _without_names(where, *next(iter(unnamed.items())))
    if part == "vae_local" and weights is not None:
        known = {state.name for state in complete}
        known |= {EMA if state.averaged else MODEL for state in complete}
        weights = weights if weights in known else None
    chosen = _choose(complete, weights, where)
    state = dict(chosen.state)
    if chosen.plain:
        warnings.warn(
            f"{where}: {chosen.describe()} has no average of {len(chosen.plain)} weights, such as "
            f"{chosen.plain[0]}, which are those of the plain model: they had no gradient",
            stacklevel=5,
        )
    if chosen.averaged:
        _add_buffers(state, [other.state for other in complete if not other.averaged])
    return state


def _unnamed(
    content: Mapping[Any, Any], complete: Sequence[StateDict]
) -> tuple[list[StateDict], dict[str, str]]:
    """The averages that have the names of a state dict's weights; what the others are, and why."""
    plain = [state for state in complete if not state.averaged]
    named, others = [], {}
    for name, tensors in unnamed_averages(content):
        what = "is a list of tensors without names"
        others[name] = f"{what} (the file has no state dict of the model)"
        for state in plain:
            try:
                average = with_names(tensors, _parameters(state))
            except ValueError as error:
                others[name] = f"{what} ({error} of {state.describe()})"
                continue
            named.append(StateDict(name, average, True, True))
            del others[name]
            break
    for name, tensors in dotless_averages(content):
        what = "has the names of weights without their dots"
        if not plain:
            others[name] = f"{what} (the file has no state dict of the model)"
        for state in plain:
            parameters = _parameters(state)
            try:
                average = with_dots(tensors, parameters, state.name)
            except ValueError as error:
                others[name] = f"{what} ({error} of {state.describe()})"
                continue
            if average:
                rest = tuple(key for key in parameters if key not in average)
                own = {key: parameters[key] for key in rest}
                named.append(StateDict(name, average | own, True, True, rest))
                others.pop(name, None)
                break
    return named, others


def _parameters(state: StateDict) -> dict[str, Tensor]:
    return {key: value for key, value in state.state.items() if not key.endswith(BUFFERS)}


def _without_names(where: str, name: str, reason: str) -> UserError:
    return UserError(
        f'{where}: "{name}" {reason}. Copy it into the model by the library that made it, and save '
        "model.state_dict()"
    )


def _choose(found: Sequence[StateDict], weights: str | None, where: str) -> StateDict:
    places = ", ".join(state.describe() for state in found)
    named = [state for state in found if state.name == weights]
    if named:
        return named[0]
    if weights not in (None, MODEL, EMA):
        raise UserError(f'{where}: has no weights "{weights}"; it has {places}')
    plain = [state for state in found if not state.averaged]
    averaged = [state for state in found if state.averaged]
    if weights is None and not plain:
        plain = averaged
    wanted = averaged if weights == EMA else plain
    if not wanted:
        kind = "average (EMA) of the weights" if weights == EMA else "weights but an average (EMA)"
        raise UserError(f"{where}: has no {kind}; it has {places}")
    if len(wanted) > 1:
        raise UserError(
            f"{where}: has several state dicts of this model: {places}; give the name of one as "
            "weights (convert: --weights; a recipe: model.weights_entry)"
        )
    if weights is None and len(found) > 1:
        others = ", ".join(state.describe() for state in found if state is not wanted[0])
        warnings.warn(
            f"{where}: took {wanted[0].describe()}; the file also has {others}. Give weights "
            '(convert: --weights; a recipe: model.weights_entry) to choose: "ema" or "model"',
            stacklevel=6,
        )
    return wanted[0]


def _incomplete(
    content: Mapping[Any, Any], found: Sequence[StateDict], part: str, where: str
) -> dict[str, Tensor]:
    """A state dict that lacks keys, so that the next reader names them.

    Raises:
        UserError: there is no state dict at all.
    """
    if found:
        return dict(
            max(found, key=lambda one: sum(k in one.state for k in KEYS_OF_PART[part])).state
        )
    if content and all(isinstance(k, str) for k in content) and _all_tensors(content):
        return dict(content)
    for value in content.values():  # of another model, under a name
        if isinstance(value, Mapping) and value and _all_tensors(value):
            return {str(key): tensor for key, tensor in value.items()}
    raise UserError(
        f"{where}: must hold a state dict of tensors, or a trainer checkpoint with one, such as "
        f'"trainer/{part}", "state_dict" or "model"; got keys {sorted(map(str, content))[:5]}'
    )


def _all_tensors(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in content.values())


def _search(content: Mapping[Any, Any], marks: Sequence[str], where: str) -> Iterator[StateDict]:
    """Every state dict with these keys in a dictionary and the dictionaries within."""
    averages: set[int] = set()
    for path, dictionary in dictionaries(content):
        # Lightning's WeightAveraging puts the average in the place of the model's state dict, and
        # beside it the count of an AveragedModel and the model's own state dict.
        counts = dictionary.get("averaging_state")
        if isinstance(counts, Mapping) and COUNT in counts:
            averages.add(id(dictionary.get("state_dict")))
        for name, state, complete in _state_dicts(dictionary, marks, "/".join((where, *path))):
            counted = state.pop(COUNT, None) is not None
            names = (*path, *name)
            averaged = counted or id(dictionary) in averages or is_average(names)
            yield StateDict("/".join(names), state, complete, averaged)


def _state_dicts(
    dictionary: Mapping[Any, Any], marks: Sequence[str], where: str
) -> Iterator[tuple[list[str], dict[str, Tensor], bool]]:
    """The parts of its prefix, the tensors, and whether all marks are there, of each state dict
    that stands in a dictionary itself."""
    tensors, repeated = _without_wrappers(dictionary)
    tensors = without_groups(tensors)
    # The ends of other keys can be equal to a mark, so a prefix counts only with all of them.
    complete = _complete_prefixes(tensors, marks)
    others = [p for keys in KEYS_OF_PART.values() for p in _complete_prefixes(tensors, keys)]
    for prefix in complete or sorted(_prefixes(tensors, marks)):
        within = tuple(p for p in others if p != prefix and p.startswith(prefix))
        state = {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix) and not (within and key.startswith(within))
        }
        twice = next((key for key in state if prefix + key in repeated), None)
        if twice is not None:
            raise UserError(
                f'{where}: has "{prefix}{twice}" twice, with and without the prefix of a wrapper'
            )
        yield [part for part in prefix.split(".") if part], state, prefix in complete


def _prefixes(keys: Iterable[str], marks: Sequence[str]) -> set[str]:
    """What stands before any of these marks in the keys."""
    return {
        key[: -len(mark)]
        for key in keys
        for mark in marks
        if key == mark or key.endswith(f".{mark}")
    }


def _complete_prefixes(keys: Mapping[str, Tensor], marks: Sequence[str]) -> list[str]:
    """The prefixes behind which all of these marks stand."""
    return [p for p in sorted(_prefixes(keys, marks)) if all(p + mark in keys for mark in marks)]


def _without_wrappers(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], set[str]]:
    """Tensors by names without the wrappers' parts, and the names that come more than once."""
    tensors: dict[str, Tensor] = {}
    repeated = set()
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            continue
        short = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if short in tensors:
            repeated.add(short)
        # A parameter would stay one, with its own requires_grad, in the model that is built.
        tensors[short] = value.detach() if isinstance(value, nn.Parameter) else value
    return tensors, repeated


def _add_buffers(state: dict[str, Tensor], plain: Sequence[Mapping[str, Tensor]]) -> None:
    """Add what an average over parameters lacks: from the plain model, or by its constant value."""
    for other in plain[:1]:
        for key, tensor in other.items():
            if key.endswith(BUFFERS):
                state.setdefault(key, tensor)
    for key in list(state):
        if key.endswith("attn.q_bias"):  # the bias of keys is always zero
            constant = key.removesuffix("q_bias") + "zero_k_bias"
            state.setdefault(
                constant, torch.zeros(state[key].shape, dtype=state[key].dtype, device="cpu")
            )
