"""Files of many trainers: each gives the weights of the plain file, bit by bit."""

import warnings
from argparse import Namespace

import pytest
import torch
from golden_models import load_golden
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from variant import VAR, UserError, VARiant
from variant.checkpoints.original_var import load_original, read_original
from variant.checkpoints.state_dict_forms import find_state_dict
from variant.models.vqvae import VQVAE
from variant.training.initial_weights import named_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*assumed .*because nothing tells them:UserWarning")


def golden():
    return load_golden("plain")


def ema_of(state):
    return {
        key: value * 0.5 if value.is_floating_point() and "attn_bias" not in key else value
        for key, value in state.items()
    }


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def loaded(tmp_path, content, name="var.pth", **options):
    """The transformer's weights as from_var_checkpoint loads them."""
    path, vae = tmp_path / name, tmp_path / "vae.pth"
    if path.suffix == ".safetensors":
        save_file({key: value.clone() for key, value in content.items()}, path)
    else:
        torch.save(content, path)
    torch.save(golden().vae_state, vae)
    return VARiant.from_var_checkpoint(path, vae, **options).var.state_dict()


def chosen(tmp_path, content, weights=None):
    """The state dict of a file from which from_var_checkpoint builds the transformer."""
    torch.save(content, tmp_path / "var.pth")
    return read_original(tmp_path / "var.pth", "var_wo_ddp", weights)


def equal(found, state):
    return len(found) > 50 and all(torch.equal(value, state[key]) for key, value in found.items())


HITS = "quantize.ema_vocab_hit_SV"  # a buffer
OPTIMISER = {
    "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}},
    "param_groups": [{"lr": 1e-4, "params": [0, 1]}],
}
WRAPPED = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s},
    "model": lambda s: {"model": s, "optimizer": OPTIMISER, "epoch": 3},
    "model_state_dict": lambda s: {"epoch": 1, "model_state_dict": s, "loss": 0.5},
    "module": lambda s: {"module": prefixed("module.", s)},
    "any name": lambda s: {"my_transformer": s, 7: "an integer key"},
    "nested": lambda s: {"checkpoint": {"0": {"generator": s}}},
    "DDP": lambda s: prefixed("module.", s),
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "compiled DDP": lambda s: {"state_dict": prefixed("module._orig_mod.", s)},
    "Lightning": lambda s: {
        "state_dict": prefixed("model.", s) | {"lpips.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.4.0",
        "hparams_name": None,
        "callbacks": {"EarlyStopping": {"patience": 3}},
    },
    "Lightning net": lambda s: {"state_dict": prefixed("net._orig_mod.", s)},
    "any prefix": lambda s: prefixed("wrapper.of.mine.", s),
    "compiled blocks": lambda s: {
        key.replace("blocks.1.", "blocks.1._orig_mod."): value for key, value in s.items()
    },
    "FSDP": lambda s: {
        key.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."): value
        for key, value in prefixed("_fsdp_wrapped_module.", s).items()
    },
    "AveragedModel": lambda s: prefixed("module.", s) | {"n_averaged": torch.tensor(5)},
    "only an EMA": lambda s: {"ema": {"decay": 0.999, "state_dict": s}},
    "with the VQ-VAE": lambda s: {
        "state_dict": prefixed("var.", s) | prefixed("vae.", golden().vae_state)
    },
    "with the VQ-VAE inside": lambda s: s | prefixed("vae_local.", golden().vae_state),
    "parameters": lambda s: {
        key: torch.nn.Parameter(value, requires_grad=False) if value.is_floating_point() else value
        for key, value in s.items()
    },
    "twice under two names": lambda s: {"model": s, "state_dict": s},
    "beside numbers": lambda s: {**s, "epoch": 3, 5: 6},
    "beside a Namespace": lambda s: {
        "model": s,
        "args": Namespace(lr=0.1, inner=Namespace(size=torch.ones(2))),
    },
    "within a Namespace": lambda s: {"state": Namespace(model=s)},
    "within a list": lambda s: {"models": [{"step": 1}, (s, 3)]},
}


@pytest.mark.parametrize("form", WRAPPED)
def test_every_form_gives_the_weights_of_the_plain_file(tmp_path, form, recwarn):
    state = golden().var_state
    found = chosen(tmp_path, WRAPPED[form](state))
    assert found.keys() == state.keys()
    assert equal(found, state)
    assert all(parameter.dtype == state[key].dtype for key, parameter in found.items())
    assert not [w for w in recwarn if "also has" in str(w.message)], "there was no choice"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "net.module.", "x.y."])
def test_prefixes_in_safetensors(tmp_path, prefix):
    state = golden().var_state
    assert equal(loaded(tmp_path, prefixed(prefix, state), "var.safetensors"), state)


EMA_FORMS = {
    "ema": lambda s, e: {"model": s, "ema": e},
    "state_dict_ema": lambda s, e: {"state_dict": s, "state_dict_ema": e},  # timm
    "model_ema": lambda s, e: {"model": s, "model_ema": {"module": e}},
    "ema_state_dict": lambda s, e: {"model_state_dict": s, "ema_state_dict": e},
    "EMAModel": lambda s, e: {"state_dict": s, "callbacks": {"EMAModel": {"weights": e}}},
    "Lightning": lambda s, e: {"state_dict": prefixed("model.", s) | prefixed("ema_model.", e)},
    "within a prefix": lambda s, e: {"state_dict": s | prefixed("ema.module.", e)},
    "AveragedModel": lambda s, e: {
        "model": s,
        "average": prefixed("module.", e) | {"n_averaged": torch.tensor(2)},
    },
    "unnamed AveragedModel": lambda s, e: {
        "model": s,
        "teacher": prefixed("module.", e) | {"n_averaged": torch.tensor(2)},
    },
    "WeightAveraging": lambda s, e: {
        "state_dict": prefixed("model.", e),
        "current_model_state": prefixed("model.", s),
        "averaging_state": {"n_averaged": torch.tensor(2)},
    },
    "list of state dicts": lambda s, e: {"model": s, "emas": [e]},
    "list in a list": lambda s, e: {"model": s, "optimizers": [{"ema": parameters_of(e)}]},
    "LitEma in a list": lambda s, e: {"model": s, "callbacks": [{"state": lit_ema(e)}]},
    "trainer": lambda s, e: {"trainer": {"var_wo_ddp": s, "var_ema": e}},
    "parameters alone": lambda s, e: {
        "model": s,
        "ema": {
            key: value
            for key, value in e.items()
            if not key.endswith(("zero_k_bias", "lvl_1L", "attn_bias_for_masking"))
        },
    },
}


def parameters_of(state):
    """The tensors that ``parameters()`` of the model gives, in its order."""
    buffers = ("zero_k_bias", "lvl_1L", "attn_bias_for_masking")
    return [value for key, value in state.items() if not key.endswith(buffers)]


EMA_FORMS |= {
    "torch_ema": lambda s, e: {
        "model": s,
        "ema": {
            "decay": 0.99,
            "num_updates": 3,
            "shadow_params": parameters_of(e),
            "collected_params": parameters_of(s),
        },
    },
    "list of parameters": lambda s, e: {
        "state_dict": s,
        "ema": tuple(torch.nn.Parameter(value) for value in parameters_of(e)),
    },
    "numbered": lambda s, e: {"model": s, "model_ema": dict(enumerate(parameters_of(e)))},
}


def lit_ema(average, lead=""):
    """What the state dict of latent-diffusion's ``LitEma`` holds: names without dots, counters."""
    buffers = ("zero_k_bias", "lvl_1L", "attn_bias_for_masking", "ema_vocab_hit_SV")
    named = {
        (lead + key).replace(".", ""): value
        for key, value in average.items()
        if not key.endswith(buffers)
    }
    return named | {
        "decay": torch.tensor(0.9999),
        "num_updates": torch.tensor(7, dtype=torch.int),
    }


EMA_FORMS |= {
    "LitEma": lambda s, e: {
        "state_dict": prefixed("model.", s) | prefixed("model_ema.", lit_ema(e))
    },
    "LitEma of a wrapper": lambda s, e: {
        "state_dict": prefixed("model.diffusion_model.", s)
        | prefixed("model_ema.", lit_ema(e, "diffusion_model."))
        | {"betas": torch.ones(4)}
    },
    "LitEma of the whole module": lambda s, e: {
        "state_dict": s | prefixed("model_ema.", lit_ema(e)),
        "global_step": 3,
    },
    "LitEma of two models": lambda s, e: {
        "state_dict": prefixed("var.", s)
        | prefixed("vae.", golden().vae_state)
        | prefixed("model_ema.", lit_ema(e, "var.") | lit_ema(golden().vae_state, "vae."))
    },
    "LitEma of a student": lambda s, e: {
        "state_dict": prefixed("student.", s)
        | prefixed("model_ema.", lit_ema(s, "teacher.") | lit_ema(e, "student."))
    },
    "LitEma by itself": lambda s, e: {"model": s, "average": lit_ema(e)},
}


@pytest.mark.parametrize("form", EMA_FORMS)
def test_a_file_with_both_gives_either(tmp_path, form):
    state = golden().var_state
    average = ema_of(state)
    content = EMA_FORMS[form](state, average)
    with pytest.warns(UserWarning, match=r"var\.pth: took .*; the file also has .*weights"):
        assert equal(loaded(tmp_path, content), state)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*also has")
        assert equal(chosen(tmp_path, content, "model"), state)
        assert equal(chosen(tmp_path, content, "ema"), average)


def test_the_warning_names_both_entries(tmp_path):
    state = golden().var_state
    content = {"trainer": {"var_wo_ddp": state, "var_ema": ema_of(state)}}
    with pytest.warns(UserWarning, match='took "trainer/var_wo_ddp".* also has "trainer/var_ema"'):
        loaded(tmp_path, content)
    assert equal(loaded(tmp_path, content, weights="trainer/var_ema"), ema_of(state))


def test_several_averages_are_chosen_by_name(tmp_path):
    state = golden().var_state
    content = {"model": state, "ema": {"0.99": ema_of(state), "0.999": ema_of(ema_of(state))}}
    assert equal(loaded(tmp_path, content, weights="ema/0.99"), ema_of(state))
    with pytest.raises(UserError, match=r'several state dicts .*"ema/0\.99", "ema/0\.999"; give'):
        loaded(tmp_path, content, weights="ema")
    with pytest.raises(UserError, match=r'has no weights "ema/0\.9"; it has "model", "ema/0\.99"'):
        loaded(tmp_path, content, weights="ema/0.9")


def test_the_order_of_a_list_is_that_of_parameters():
    model = VAR(golden().var_config)
    named = dict(model.named_parameters())
    shadow = [torch.full_like(value, i) for i, value in enumerate(named.values())]
    content = {"model": model.state_dict(), "ema": {"shadow_params": shadow}}
    found = find_state_dict(content, "var_wo_ddp", "x.pth", "ema")
    assert all(torch.equal(found[name], shadow[i]) for i, name in enumerate(named))


def test_an_average_without_names_that_does_not_fit_is_refused_by_name(tmp_path):
    state = golden().var_state
    shadow = parameters_of(ema_of(state))
    swapped = [shadow[-1], *shadow[1:-1], shadow[0]]
    names = '"ema/shadow_params" is a list of tensors without names'
    for wrong, reason in (
        (shadow[:-1], rf"it has {len(shadow) - 1} tensors for {len(shadow)} parameters of"),
        (swapped, r"its tensor 0 is \(.*\), and \w.* is \(.*\) of \"model\""),
    ):
        content = {"model": state, "ema": {"shadow_params": wrong, "collected_params": None}}
        for weights in ("ema", "ema/shadow_params"):
            with pytest.raises(UserError, match=rf"{names} \({reason}.*save model.state_dict"):
                loaded(tmp_path, content, weights=weights)
        assert equal(loaded(tmp_path, content), state)
    for content in ({"shadow_params": shadow}, {"ema": {"shadow_params": shadow}}):
        with pytest.raises(UserError, match=r'shadow_params" is a list .*no state dict of the mod'):
            loaded(tmp_path, content)


def test_an_average_with_dotless_names_that_does_not_fit_is_refused_by_name(tmp_path):
    state = golden().var_state
    named = lit_ema(ema_of(state))
    what = '"model_ema" has the names of weights without their dots'
    wrong = named | {"headbias": torch.ones(3)}
    content = {"state_dict": prefixed("model.", state) | prefixed("model_ema.", wrong)}
    shapes = rf"its headbias is \(3,\), and head\.bias is \({len(state['head.bias'])},\) of "
    for weights in ("ema", "state_dict/model_ema"):
        with pytest.raises(UserError, match=rf"dots \({shapes}\"state_dict/model\".*save model"):
            loaded(tmp_path, content, weights=weights)
    assert equal(loaded(tmp_path, content), state)
    with pytest.raises(UserError, match=rf"{what} \(the file has no state dict of the model\)"):
        loaded(tmp_path, prefixed("model_ema.", named))


def test_weights_without_a_gradient_have_no_average_and_are_those_of_the_model(tmp_path):
    state = golden().var_state
    average = ema_of(state)
    named = {k: v for k, v in lit_ema(average).items() if not k.startswith("class_emb")}
    content = {"state_dict": prefixed("model.", state) | prefixed("model_ema.", named)}
    message = r'"state_dict/model_ema" has no average of 1 weights, such as class_emb\.weight'
    with pytest.warns(UserWarning, match=message):
        found = loaded(tmp_path, content, weights="ema")
    key = "class_emb.weight"
    assert equal(found, average | {key: state[key]})
    assert not torch.equal(found[key], average[key])


def test_weights_that_are_not_there_are_refused(tmp_path):
    state = golden().var_state
    with pytest.raises(UserError, match=r'no average \(EMA\) of the weights; it has "model"'):
        loaded(tmp_path, {"model": state}, weights="ema")
    with pytest.raises(UserError, match=r"no weights but an average \(EMA\); it has \"ema\""):
        loaded(tmp_path, {"ema": state}, weights="model")
    with pytest.raises(UserError, match='several state dicts of this model: "best", "last"; give'):
        loaded(tmp_path, {"best": state, "last": ema_of(state)})
    assert equal(
        loaded(tmp_path, {"best": state, "last": ema_of(state)}, weights="last"), ema_of(state)
    )
    with pytest.raises(TypeError, match="weights must be"):
        loaded(tmp_path, state, weights=3)


def test_a_key_with_and_without_a_wrapper_is_refused(tmp_path):
    state = golden().var_state
    twice = state | {"module.head.bias": state["head.bias"]}
    with pytest.raises(UserError, match=r'has "head\.bias" twice'):
        loaded(tmp_path, twice)


def test_a_dictionary_within_itself_ends():
    content = {"model": golden().var_state}
    for name in "abcdefgh":
        content[name] = content
    content["list"] = [content]
    content["list"].append(content["list"])
    assert len(find_state_dict(content, "var_wo_ddp", "x.pth")) > 50


def test_foreign_keys_in_the_state_dict_itself_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"Unexpected key.*extra\.weight"):
        loaded(tmp_path, golden().var_state | {"extra.weight": torch.ones(1)})


def test_a_file_without_a_state_dict_lists_its_keys(tmp_path):
    for content in ({}, {3: torch.ones(1)}, {"epoch": 3, 4: 5}, {"model": {"a": 1}}):
        with pytest.raises(UserError, match="must hold a state dict of tensors"):
            loaded(tmp_path, content)
    with pytest.raises(UserError, match=r"got keys \['a', 'b', 'c', 'd', 'e'\]$"):
        loaded(tmp_path, dict.fromkeys("gfedcba", 1))
    incomplete = dict(golden().var_state)
    del incomplete["pos_1LC"]
    for content in (incomplete, {"model": prefixed("module.", incomplete)}):
        with pytest.raises(UserError, match="not a VAR transformer: it has no pos_1LC"):
            loaded(tmp_path, content)


def test_real_wrappers_of_torch(tmp_path):
    model = VAR(golden().var_config)
    model.load_state_dict(golden().var_state)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    for module in (averaged, torch.compile(model), torch.compile(averaged)):
        # Ours has no buffer lvl_1L, so the sides of the token maps are given.
        found = loaded(tmp_path, module.state_dict(), patch_nums=golden().var_config.patch_nums)
        assert equal(found, golden().var_state)


def test_the_choice_reaches_the_vqvae_where_its_file_has_one(tmp_path):
    var, vae = golden().var_state, golden().vae_state
    paths = tmp_path / "var.pth", tmp_path / "vae.pth"
    torch.save({"model": var, "ema": ema_of(var)}, paths[0])
    torch.save({"model": vae, "ema": ema_of(vae)}, paths[1])
    models = load_original(*paths, weights="ema")
    assert equal(models[0].state_dict(), ema_of(var))
    assert equal(models[1].state_dict(), ema_of(vae))
    torch.save(vae, paths[1])
    models = load_original(*paths, weights="ema")
    assert equal(models[1].state_dict(), vae)
    torch.save(vae | prefixed("model_ema.", lit_ema(ema_of(vae))), paths[1])
    models = load_original(*paths, weights="ema")
    assert equal(models[1].state_dict(), {**ema_of(vae), HITS: vae[HITS]})


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.ckpt"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "vae."])
def test_training_reads_the_same_forms(tmp_path, name, prefix):
    state, path = golden().vae_state, tmp_path / name
    content = prefixed(prefix, state)
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save({"state_dict": content}, path)
    assert equal(started("vae", path, VQVAE(golden().vae_config)), state)
    assert equal(read_original(path, "vae_local"), state)


def test_training_takes_the_weights_file_of_a_model_folder(tmp_path):
    paths = tmp_path / "var.pth", tmp_path / "vae.pth"
    torch.save(golden().var_state, paths[0])
    torch.save(golden().vae_state, paths[1])
    VARiant.from_var_checkpoint(*paths).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    assert equal(started("var", path, VAR(golden().var_config)), golden().var_state)
    assert equal(started("vae", path, VQVAE(golden().vae_config)), golden().vae_state)


def started(kind, path, module):
    """The state dict of a model that a training starts from a file."""
    named_weights(kind, str(path)).load_into(module, recipe=None)
    return module.state_dict()
