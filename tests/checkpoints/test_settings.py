"""What no tensor tells: told by the file, given by the caller, or assumed with a warning."""

import dataclasses
import inspect
import json
import warnings

import numpy as np
import pytest
import torch
from golden_models import load_golden

from variant import UserError, VARiant
from variant.checkpoints.original_var import infer_var_config, infer_vqvae_config
from variant.checkpoints.settings import CHECKS, Settings, settings_of_training
from variant.cli.options import Convert

# Of the golden model without L2 norm, of which no tensor tells the number of heads.
ASSUMED = {
    "num_heads": 2,
    "norm_eps": 1e-6,
    "cond_drop_rate": 0.1,
    "drop_path_rate": 0.0,
    "quant_resi": 0.5,
    "using_znorm": False,
    "beta": 0.25,
}
GIVEN = {
    "num_heads": 4,
    "norm_eps": 1e-5,
    "cond_drop_rate": 0.2,
    "drop_path_rate": 0.3,
    "quant_resi": 0.25,
    "using_znorm": True,
    "beta": 1.0,
}


@pytest.fixture
def files(tmp_path):
    golden = load_golden("no_l2norm")
    paths = tmp_path / "var.pth", tmp_path / "vae.pth"
    torch.save(golden.var_state, paths[0])
    torch.save(golden.vae_state, paths[1])
    return paths


def settings_of(model):
    return {
        name: getattr(model.vae.config if name in ("quant_resi", "using_znorm", "beta")
                      else model.var.config, name)
        for name in ASSUMED
    }  # fmt: skip


def assumed_in(caught):
    return [str(warning.message) for warning in caught if "assumed" in str(warning.message)]


def test_one_warning_names_every_assumed_value(files):
    with pytest.warns(UserWarning, match="assumed") as caught:
        model = VARiant.from_var_checkpoint(*files)
    (message,) = assumed_in(caught)
    assert message.startswith(
        f"{files[0]}, {files[1]}: assumed num_heads=2 (one per 64 channels), norm_eps=1e-06, "
        "cond_drop_rate=0.1, drop_path_rate=0.0, quant_resi=0.5, using_znorm=False, beta=0.25, "
    )
    assert message.endswith("tells them; give the arguments of these names if they are wrong")
    assert "\n" not in message
    assert caught[0].filename == __file__
    assert settings_of(model) == ASSUMED


def test_given_values_are_used_without_a_warning(files):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = VARiant.from_var_checkpoint(*files, **GIVEN)
    assert settings_of(model) == GIVEN


@pytest.mark.parametrize("name", GIVEN)
def test_only_what_is_not_given_is_assumed(files, name):
    with pytest.warns(UserWarning, match="assumed") as caught:
        model = VARiant.from_var_checkpoint(*files, **{name: GIVEN[name]})
    (message,) = assumed_in(caught)
    assert f"{name}=" not in message
    assert settings_of(model) == ASSUMED | {name: GIVEN[name]}


@pytest.mark.parametrize("as_text", [False, True])
def test_the_args_of_a_trainer_checkpoint_are_used(tmp_path, as_text):
    golden = load_golden("no_l2norm")
    state = {k: v for k, v in golden.var_state.items() if k != "lvl_1L"}
    args = {**GIVEN, "depth": 4, "tblr": 1e-4, "patch_nums": golden.var_config.patch_nums}
    content = {
        "args": repr(args) if as_text else args,
        "trainer": {"var_wo_ddp": state, "vae_local": golden.vae_state},
    }
    path = tmp_path / "ar-ckpt-last.pth"
    torch.save(content, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = VARiant.from_var_checkpoint(path, path)
    assert settings_of(model) == GIVEN
    assert model.var.config.patch_nums == golden.var_config.patch_nums
    single = {n: np.float32(v) for n, v in GIVEN.items() if isinstance(v, float)}
    assert settings_of(VARiant.from_var_checkpoint(path, path, **single)) == GIVEN
    for name, value in ASSUMED.items():
        with pytest.raises(UserError, match=f"args has {name} .*, but the argument has"):
            VARiant.from_var_checkpoint(path, path, **{name: value})


@pytest.mark.parametrize("text", ["...", "{'norm_eps': open('x')}", "(" * 50000, "[1]", 3, None])
def test_args_of_another_form_tell_nothing(text):
    assert settings_of_training({"args": text}) == []


def saved_trainer(tmp_path, args=None, config=None):
    golden = load_golden("plain")
    trainer = {"var_wo_ddp": golden.var_state, "vae_local": golden.vae_state, "config": config}
    path = tmp_path / "ar-ckpt-last.pth"
    torch.save({"args": args, "trainer": trainer}, path)
    return path


def test_places_of_a_file_that_disagree_are_refused(tmp_path):
    path = saved_trainer(
        tmp_path, {"norm_eps": 1e-5, "num_heads": 2}, {"norm_eps": 1e-4, "num_heads": 4}
    )
    message = (
        "args has num_heads 2, but the checkpoint's trainer/config has 4; "
        "the checkpoint's args has norm_eps 1e-05, but the checkpoint's trainer/config has 0.0001$"
    )
    with pytest.raises(UserError, match=message):
        VARiant.from_var_checkpoint(path, path)


@pytest.mark.filterwarnings("ignore:.*assumed")
def test_settings_that_are_tensors_are_numbers(tmp_path):
    args = {"norm_eps": torch.tensor(1e-5, dtype=torch.float64), "using_znorm": torch.tensor(True)}
    path = saved_trainer(tmp_path, args)
    model = VARiant.from_var_checkpoint(path, path)
    assert model.var.config.norm_eps == 1e-5
    assert model.vae.config.using_znorm is True


@pytest.mark.filterwarnings("ignore:.*assumed")
def test_names_of_the_other_model_do_not_count(tmp_path):
    path = saved_trainer(tmp_path, {"beta": [0.9, 0.95], "norm_eps": 1e-5})
    golden = load_golden("plain")
    torch.save(golden.vae_state, tmp_path / "vae.pth")
    model = VARiant.from_var_checkpoint(path, tmp_path / "vae.pth")
    assert model.var.config.norm_eps == 1e-5


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16])
def test_the_scales_of_tokens_are_read_in_any_dtype(files, dtype):
    golden = load_golden("no_l2norm")
    torch.save(golden.var_state | {"lvl_1L": golden.var_state["lvl_1L"].to(dtype)}, files[0])
    model = VARiant.from_var_checkpoint(*files, **GIVEN)
    assert model.var.config.patch_nums == golden.var_config.patch_nums


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused(files, dtype):
    state = load_golden("no_l2norm").var_state
    torch.save(state | {"head.bias": state["head.bias"].to(dtype)}, files[0])
    with pytest.raises(UserError, match=r"head\.bias must be of a floating-point dtype; got "):
        VARiant.from_var_checkpoint(*files, **GIVEN)


def test_token_maps_can_be_given_and_must_fit(files):
    golden = load_golden("no_l2norm")
    torch.save({k: v for k, v in golden.var_state.items() if k != "lvl_1L"}, files[0])
    with pytest.raises(UserError, match=r"no lvl_1L .*; give patch_nums \(convert: --patch-nums"):
        VARiant.from_var_checkpoint(*files, **GIVEN)
    for sides in ([1, 2, 4, 7], (1, 2, 4, 7)):
        model = VARiant.from_var_checkpoint(*files, patch_nums=sides, **GIVEN)
        assert model.var.config.patch_nums == model.vae.config.patch_nums == (1, 2, 4, 7)
    with pytest.raises(UserError, match=r"have 3 scales and 21 tokens, but the weights have 4 sc"):
        VARiant.from_var_checkpoint(*files, patch_nums=(1, 2, 4), **GIVEN)


def test_a_value_that_contradicts_the_tensors_is_refused(tmp_path, files):
    with pytest.raises(UserError, match=r"the weights have patch_nums \(1, 2, 4, 7\), but the arg"):
        VARiant.from_var_checkpoint(*files, patch_nums=(1, 2, 4, 8))
    with pytest.raises(UserError, match="quant_resi is 0, but the weights have residual conv"):
        VARiant.from_var_checkpoint(*files, quant_resi=0)
    plain = load_golden("plain")
    torch.save(plain.var_state, tmp_path / "plain.pth")
    with pytest.raises(UserError, match="the weights have num_heads 2, but the argument has 4"):
        VARiant.from_var_checkpoint(tmp_path / "plain.pth", files[1], num_heads=4)
    without = {k: v for k, v in plain.vae_state.items() if ".quant_resi." not in k}
    for none in (0.0, 1e-6, -1e-6):  # as the original, which has no convolutions up to there
        config = infer_vqvae_config(without, (1, 2), quant_resi=none, using_znorm=False, beta=1.0)
        assert config.quant_resi == 0.0
    with pytest.raises(
        UserError, match=r"the weights have quant_resi 0\.0, but the argument has 0\.5"
    ):
        infer_vqvae_config(without, (1, 2), quant_resi=0.5)
    # Phi per scale, but not one for every scale (default_qresi_counts).
    state = dict(without)
    for i in range(3):
        state[f"quantize.quant_resi.{i}.weight"] = torch.zeros(16, 16, 3, 3)
    with pytest.raises(UserError, match="has 3 residual convolutions for 2 scales"):
        infer_vqvae_config(state, (1, 2), "vae.pth")


@pytest.mark.parametrize("ratio", [-0.25, 0.25])
def test_the_sign_of_quant_resi_has_no_effect_as_in_the_original(files, ratio):
    model = VARiant.from_var_checkpoint(*files, **GIVEN | {"quant_resi": ratio})
    assert model.vae.config.quant_resi == 0.25


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("num_heads", 0, ValueError),
        ("num_heads", 2.0, TypeError),
        ("num_heads", "4", TypeError),
        ("patch_nums", "1_2_3", TypeError),
        ("patch_nums", 4, TypeError),
        ("patch_nums", (1, 1), ValueError),
        ("patch_nums", (), ValueError),
        ("patch_nums", (1, 2.5), TypeError),
        ("norm_eps", 0, ValueError),
        ("norm_eps", float("nan"), ValueError),
        ("norm_eps", "1e-6", TypeError),
        ("cond_drop_rate", 1.1, ValueError),
        ("drop_path_rate", 1, ValueError),
        ("quant_resi", 2, ValueError),
        ("quant_resi", True, TypeError),
        ("using_znorm", 1, TypeError),
        ("using_znorm", "no", TypeError),
        ("beta", -1, ValueError),
    ],
)
def test_wrong_values_are_refused_by_name_before_a_file_is_read(name, value, error):
    with pytest.raises(error, match=rf"^from_var_checkpoint: {name}"):
        VARiant.from_var_checkpoint("none.pth", "none.pth", **{name: value})
    with pytest.raises(UserError, match=rf"^hub: config\.json: {name}"):
        Settings("hub", {}, [("config.json", {name: value})])


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="unknown setting 'colour'; known are num_heads"):
        infer_var_config({}, colour=3)


def test_the_hub_form_tells_every_setting(tmp_path, files):
    folder = tmp_path / "hub"
    folder.mkdir()
    torch.save(load_golden("no_l2norm").var_state, folder / "pytorch_model.bin")
    of_vae = ("quant_resi", "using_znorm", "beta")
    config = {k: v for k, v in GIVEN.items() if k not in of_vae}
    config["vae_kwargs"] = {k: v for k, v in GIVEN.items() if k in of_vae}
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = VARiant.from_var_checkpoint(folder, files[1])
    assert settings_of(model) == GIVEN
    with pytest.raises(UserError, match=r"config\.json has norm_eps 1e-05, but the argument has 0"):
        VARiant.from_var_checkpoint(folder, files[1], norm_eps=1e-4)


def test_results_depend_on_the_given_values(files):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    usual = {"quant_resi": 0.5, "using_znorm": False}
    changes = {
        "usual": {},
        "quant_resi": {"quant_resi": 0.25},
        "using_znorm": {"using_znorm": True},
    }
    models = {
        name: VARiant.from_var_checkpoint(*files, **GIVEN | usual | change)
        for name, change in changes.items()
    }
    with torch.no_grad():
        tokens = {name: model.vae.encode(images) for name, model in models.items()}
    assert not torch.equal(tokens["quant_resi"], tokens["usual"])
    assert not torch.equal(tokens["using_znorm"], tokens["usual"])


def test_every_setting_is_an_argument_of_the_three_surfaces():
    arguments = inspect.signature(VARiant.from_var_checkpoint).parameters
    options = {field.name for field in dataclasses.fields(Convert)}
    assert set(CHECKS) <= set(arguments)
    assert set(CHECKS) <= options


@pytest.mark.parametrize(
    ("name", "taken", "refused"),
    [
        ("num_heads", {1: 1, np.int64(2): 2}, {0: ">= 1"}),
        ("patch_nums", {(1,): (1,), (1, 2, 4): (1, 2, 4)}, {(0, 1): ">= 1", (2, 1): "ascending"}),
        ("norm_eps", {1: 1.0, 1e-30: 1e-30}, {0: "positive; got 0.0", 1.01: r"in \[0, 1\]"}),
        ("cond_drop_rate", {0: 0.0, 1: 1.0}, {-0.01: r"in \[0, 1\]", 1.01: r"in \[0, 1\]"}),
        ("drop_path_rate", {0: 0.0, 0.99: 0.99}, {1: "below 1; got 1.0", -0.01: r"in \[0, 1\]"}),
        (
            "quant_resi",
            {1: 1.0, -1: 1.0, 1e-6: 0.0, 1.01e-6: 1.01e-6, 0: 0.0},
            {1.01: r"in \[-1, 1\]", -1.01: r"in \[-1, 1\]"},
        ),
        ("beta", {0: 0.0, 7: 7.0}, {-0.01: ">= 0"}),
    ],
)
def test_the_first_and_the_last_value_of_each_setting(name, taken, refused):
    for value, expected in taken.items():
        result = CHECKS[name]("op", value)
        assert (result, type(result)) == (expected, type(expected))
    for value, message in refused.items():
        with pytest.raises(ValueError, match=rf"^op: {name}.* must be .*{message}"):
            CHECKS[name]("op", value)


def test_numbers_agree_if_they_are_equal_in_float32():
    told = [("one", {"norm_eps": 1e-5, "num_heads": 2}), ("two", {"norm_eps": 1e-5 * (1 + 9e-7)})]
    settings = Settings("file", {}, told)
    assert settings.value("norm_eps", 1e-6) == 1e-5  # the first place counts
    assert settings.value("num_heads", None, 2) == 2
    with pytest.raises(UserError, match="file: the weights have num_heads 3, but one has 2"):
        settings.value("num_heads", None, 3)
    with pytest.raises(UserError, match=r"file: one has norm_eps 1e-05, but two has 1\.00002e-05"):
        Settings("file", {}, [told[0], ("two", {"norm_eps": 1.00002e-5})])
    with pytest.raises(UserError, match=r"one has norm_eps 1e-05, but three has 0\.5"):
        Settings("file", {}, [*told, ("three", {"norm_eps": 0.5})])


def test_what_is_assumed_is_named_once_with_how_to_give_it():
    first, second, told = (Settings(where, op="convert") for where in ("var", "vae", "told"))
    assert first.value("num_heads", 2, note="one per 64 channels") == 2
    assert first.value("patch_nums", None) is None  # nothing is assumed
    assert second.value("using_znorm", False) is False
    assert told.value("beta", 0.25, 0.5) == 0.5
    with pytest.warns(UserWarning, match="assumed") as caught:
        first.warn(second, told)
    assert str(caught[0].message) == (
        "var, vae: assumed num_heads=2 (one per 64 channels), using_znorm=False, because nothing "
        "tells them; give --num-heads, --using-znorm if they are wrong"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told.warn()
    plain = Settings("var")
    plain.value("beta", 0.25)
    with pytest.warns(UserWarning, match="give the arguments of these names") as caught:
        plain.warn(stacklevel=1)
    assert caught[0].filename == __file__


def test_settings_that_are_given_are_checked_and_compared():
    settings = Settings("file", {"beta": None, "norm_eps": 1}, [("args", {"norm_eps": 1.0})])
    assert settings.value("norm_eps", 1e-6) == 1.0
    assert settings.value("beta", 0.25) == 0.25
    for op, place in (("convert", "--norm-eps"), ("from_var_checkpoint", "the argument")):
        with pytest.raises(UserError, match=f"file: args has norm_eps 1.0, but {place} has 0.5"):
            Settings("file", {"norm_eps": 0.5}, [("args", {"norm_eps": 1.0})], op=op)


def test_the_settings_beside_the_weights_of_a_trainer():
    small, large = torch.ones(1024), torch.ones(1025)
    content = {
        "args": {"norm_eps": None, "beta": 0.5, "colour": 1, "patch_nums": small},
        "trainer": {"config": {"patch_nums": large, "depth": 3}},
    }
    (args, told), (config, kept) = settings_of_training(content)
    assert (args, config) == ("the checkpoint's args", "the checkpoint's trainer/config")
    assert told.keys() == {"beta", "patch_nums"}
    assert list(told["patch_nums"]) == [1.0] * 1024
    assert kept == {"patch_nums": large}  # no setting has so many numbers: it stays unread
    assert settings_of_training({"args": {"colour": 1}, "trainer": 3}) == []
    text = repr({"beta": 0.5})
    for length, found in ((2**16 - 1, 1), (2**16, 0)):
        assert len(settings_of_training({"args": text.ljust(length)})) == found
