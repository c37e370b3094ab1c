"""Options of from_pretrained and save_pretrained, and weights in several files."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import small_model

from variant import UserError, VARiant
from variant.checkpoints.original_var import load_original, save_original
from variant.cli.main import main
from variant.training.initial_weights import Weights


def same_weights(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def in_shards(folder, count=3, prefix="model"):
    """Replace model.safetensors by shards and their index, as transformers writes them."""
    path = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    path.unlink()
    weight_map = {}
    for i in range(count):
        name = f"{prefix}-{i + 1:05d}-of-{count:05d}.safetensors"
        shard = {key: value for j, (key, value) in enumerate(tensors.items()) if j % count == i}
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# --- weights in other files -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_shards_give_the_weights_of_the_single_file(model, folder, count):
    in_shards(folder, count)
    assert same_weights(VARiant.from_pretrained(folder), model)


def test_a_single_file_is_preferred_to_shards(model, folder):
    (folder / "model.safetensors.index.json").write_text("{")
    assert same_weights(VARiant.from_pretrained(folder), model)


def test_a_pickle_of_the_same_keys_gives_the_same_weights(model, folder):
    path = folder / "model.safetensors"
    torch.save(dict(load_file(path)), folder / "pytorch_model.bin")
    path.unlink()
    assert same_weights(VARiant.from_pretrained(folder), model)
    torch.save({"var": {}, 3: torch.ones(1)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="must hold tensors alone"):
        VARiant.from_pretrained(folder)


def test_shards_of_a_pickle_give_the_same_weights(model, folder):
    weight_map = in_shards(folder, 2)
    for name in set(weight_map.values()):
        torch.save(load_file(folder / name), folder / name.replace("safetensors", "bin"))
        (folder / name).unlink()
    (folder / "model.safetensors.index.json").unlink()
    weight_map = {key: name.replace("safetensors", "bin") for key, name in weight_map.items()}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same_weights(VARiant.from_pretrained(folder), model)
    before = Weights("var", folder, is_model_folder=True).sha256()
    with (folder / next(iter(weight_map.values()))).open("ab") as file:
        file.write(b"x")
    assert Weights("var", folder, is_model_folder=True).sha256() != before, "shards count"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, "a.safetensors")}))
    with pytest.raises(UserError, match=r"must be the name of a \.bin file in the same folder"):
        VARiant.from_pretrained(folder)


def test_what_is_no_file_of_weights_is_named(model, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for name in ("var.pth", "var.safetensors"):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(UserError, match=r"var\..*: is a pointer of Git LFS"):
            load_original(tmp_path / name, tmp_path / "vae.pth")
    folder = tmp_path / "distributed"
    folder.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (folder / name).touch()
    for path in (folder, folder / "__0_0.distcp"):
        with pytest.raises(UserError, match=r"distributed: is a folder of torch\.distributed\.ch"):
            load_original(path, tmp_path / "vae.pth")


def test_files_of_the_original_are_told_which_function_loads_them(tmp_path):
    (tmp_path / "config.json").write_text('{"depth": 16}')
    (tmp_path / "var.pth").touch()
    for path in (tmp_path, tmp_path / "var.pth"):
        with pytest.raises(UserError, match=r"VARiant\.from_var_checkpoint, or `variant convert`"):
            VARiant.from_pretrained(path)


@pytest.mark.filterwarnings("ignore:.*assumed .*because nothing tells them:UserWarning")
def test_shards_of_the_original_form(model, tmp_path):
    paths = tmp_path / "model.safetensors", tmp_path / "vae.safetensors"
    save_original(model.var, model.vae, *paths)
    expected = load_original(*paths)[0]
    assert same_weights(expected, model.var)
    in_shards(tmp_path, prefix="part")
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert same_weights(load_original(path, paths[1])[0], model.var)


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x.bin", "a\\b", 3],
)
def test_a_shard_outside_the_folder_is_refused(folder, name):
    shutil.copy(folder / "model.safetensors", folder.parent / "model.safetensors")
    weight_map = in_shards(folder)
    write_index(folder, {**weight_map, "var.head.bias": name})
    with pytest.raises(UserError, match=r"a shard must be the name of a \.safetensors file"):
        VARiant.from_pretrained(folder)


def test_shards_that_do_not_fit_their_index_are_refused(folder):
    weight_map = in_shards(folder)
    names = sorted(set(weight_map.values()))

    def fails(message):
        with pytest.raises(UserError, match=message):
            VARiant.from_pretrained(folder)

    write_index(folder, {**weight_map, "var.extra": names[0]})
    fails("lacks var.extra, which it has by the index")
    write_index(folder, {k: v for k, v in weight_map.items() if k != "var.head.bias"})
    fails("holds var.head.bias, but the index lacks it")
    other = next(name for name in names if name != weight_map["var.head.bias"])
    write_index(folder, {**weight_map, "var.head.bias": other})
    fails(f"holds var.head.bias, but the index has it in {other}")
    index = folder / "model.safetensors.index.json"
    for text, message in (
        ("{", "cannot be read as JSON"),
        ("[]", 'must map keys to files under "weight_map"'),
        ('{"weight_map": {}}', 'must map keys to files under "weight_map"'),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "has the key a twice"),
    ):
        index.write_text(text)
        fails(message)
    write_index(folder, weight_map)
    (folder / names[1]).unlink()
    fails(f"the shard {names[1]} is missing")


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16"])
def test_the_dtype_by_either_name(folder, name, value):
    loaded = VARiant.from_pretrained(folder, **{name: value})
    assert loaded.var.head.weight.dtype == torch.bfloat16
    assert loaded.vae.quant_conv.weight.dtype == torch.float32


def test_two_names_of_one_argument_must_agree(folder):
    both = VARiant.from_pretrained(
        folder, dtype="float16", torch_dtype=torch.float16, device="cpu",
        map_location=torch.device("cpu"),
    )  # fmt: skip
    assert both.var.head.weight.dtype == torch.float16
    with pytest.raises(ValueError, match="torch_dtype is another name of dtype; got"):
        VARiant.from_pretrained(folder, dtype="float16", torch_dtype="bfloat16")
    with pytest.raises(ValueError, match="map_location is another name of device; got"):
        VARiant.from_pretrained(folder, device="cpu", map_location="meta")


@pytest.mark.filterwarnings("ignore:.*assumed .*because nothing tells them:UserWarning")
def test_files_of_the_original_take_both_names_too(model, tmp_path):
    paths = tmp_path / "var.safetensors", tmp_path / "vae.safetensors"
    save_original(model.var, model.vae, *paths)
    options = {"torch_dtype": "bfloat16", "map_location": "cpu"}
    loaded = VARiant.from_var_checkpoint(*paths, **options)
    assert loaded.var.head.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="map_location is another name of device; got"):
        VARiant.from_var_checkpoint(*paths, device="cpu", map_location="meta")


def test_auto_is_the_dtype_of_the_file(model, tmp_path):
    half = small_model()
    half.var.half()
    half.save_pretrained(tmp_path)
    loaded = VARiant.from_pretrained(tmp_path, torch_dtype="auto")
    assert loaded.var.head.weight.dtype == torch.float16


@pytest.mark.parametrize("name", ["device", "map_location"])
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=rf'^from_pretrained: {name} "cuda" is not there.*"cpu"$'):
        VARiant.from_pretrained("none", **{name: "cuda"})
    with pytest.raises(ValueError, match=r'^from_var_checkpoint: device "cuda:1" is not there'):
        VARiant.from_var_checkpoint("none.pth", "none.pth", device="cuda:1")


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": 16},
        {"torch_dtype": ["float32"]},
        {"device": 1.5},
        {"map_location": {"cuda": "cpu"}},
        {"strict": "no"},
        {"subfolder": 3},
    ],
)
def test_arguments_of_wrong_types(folder, options):
    (name,) = options
    with pytest.raises(TypeError, match=f"^from_pretrained: {name} must be"):
        VARiant.from_pretrained(folder, **options)


def test_paths_of_wrong_types(model):
    for call in (
        lambda: VARiant.from_pretrained(3),
        lambda: VARiant.from_pretrained(None),
        lambda: VARiant.from_var_checkpoint(b"var.pth", "vae.pth"),
        lambda: VARiant.from_var_checkpoint("var.pth", 4),
        lambda: model.save_pretrained(None),
    ):
        with pytest.raises(TypeError, match="must be a path or a name; got"):
            call()


def test_an_empty_path_is_not_the_current_folder(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        lambda: VARiant.from_pretrained(""),
        lambda: VARiant.from_var_checkpoint("", "vae.pth"),
        lambda: model.save_pretrained(""),
        lambda: save_original(model.var, model.vae, "", "vae.pth"),
    ):
        with pytest.raises(ValueError, match="must not be empty"):
            call()
    assert not list(tmp_path.iterdir())


def test_weights_that_are_negated_views_are_saved(tmp_path):
    model = small_model()
    model.var.head.bias = torch.nn.Parameter(torch._neg_view(torch.ones(24)))
    model.save_pretrained(tmp_path / "model")
    save_original(model.var, model.vae, tmp_path / "var.safetensors", tmp_path / "vae.pth")
    saved = VARiant.from_pretrained(tmp_path / "model").var.head.bias
    original = load_file(tmp_path / "var.safetensors")["head.bias"]
    assert torch.equal(saved, -torch.ones(24))
    assert torch.equal(original, -torch.ones(24))


def test_a_subfolder(model, tmp_path):
    model.save_pretrained(tmp_path / "a" / "b")
    assert same_weights(VARiant.from_pretrained(tmp_path, subfolder="a/b"), model)
    assert same_weights(VARiant.from_pretrained(tmp_path / "a", subfolder="b"), model)
    with pytest.raises(UserError, match=r"a/c: is not a model folder"):
        VARiant.from_pretrained(tmp_path, subfolder="a/c")
    for outside in ("../a", "a/../../x", "/etc", "a\\b"):
        with pytest.raises(ValueError, match="subfolder must lie within the model's folder"):
            VARiant.from_pretrained(tmp_path, subfolder=outside)


def changed(folder, remove=(), **add):
    path = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    save_file({k: v for k, v in (tensors | add).items() if k not in remove}, path)


def test_strict_false_names_what_does_not_fit_and_loads_the_rest(model, folder):
    extra = {"var.lora.weight": torch.ones(2), "discriminator.bias": torch.ones(3)}
    changed(folder, remove=("var.head.bias", "vae.quant_conv.bias"), **extra)
    for options in ({}, {"strict": True}):
        with pytest.raises(UserError, match=r"does not hold the weights of .*discriminator\.bias"):
            VARiant.from_pretrained(folder, **options)
    with pytest.warns(UserWarning, match="not all weights fit") as caught:
        loaded = VARiant.from_pretrained(folder, strict=False, dtype="bfloat16")
    text = " ".join(str(warning.message) for warning in caught)
    for key in ("lora.weight", "discriminator.bias"):
        assert f"unexpected (left out) keys: {key}" in text, text
    for key in ("head.bias", "quant_conv.bias"):
        assert f"missing (initialised) keys: {key}" in text, text
    expected = model.var.bfloat16().state_dict()
    model.var.float()
    for key, value in loaded.var.state_dict().items():
        assert value.dtype == torch.bfloat16
        if key == "head.bias":
            assert torch.equal(value, torch.zeros_like(value)), "as VAR.init_weights sets it"
        else:
            assert torch.equal(value, expected[key])
    assert loaded.generate([1], seed=0).images.isfinite().all()


def test_strict_false_of_a_complete_file_is_strict_true(model, folder, recwarn):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert same_weights(VARiant.from_pretrained(folder, strict=False), model)
    assert torch.equal(torch.rand(2), expected), "no weight was initialised"
    assert not recwarn.list


def test_strict_false_builds_nothing_larger_than_the_memory(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vae"] |= {"ch_mult": [1, 64, 64, 64], "num_res_blocks": 32, "ch": 2**12}
    path.write_text(json.dumps(config))
    changed(folder, remove=[key for key in load_file(folder / "model.safetensors") if "vae" in key])
    with (
        pytest.warns(UserWarning, match="not all weights fit this VQVAE") as caught,
        pytest.raises(UserError, match=r"the weights of the VQVAE need [\d,]{9,} MiB, but"),
    ):
        VARiant.from_pretrained(folder, strict=False)
    assert all(len(str(warning.message)) < 1000 for warning in caught)


def test_another_shape_is_refused_also_without_strict(folder):
    changed(folder, **{"var.head.bias": torch.zeros(7)})
    with pytest.raises(UserError, match=r"size mismatch for head\.bias"):
        VARiant.from_pretrained(folder, strict=False)


@pytest.mark.filterwarnings("ignore:.*assumed .*because nothing tells them:UserWarning")
def test_strict_false_of_original_files_names_what_does_not_fit(tmp_path):
    model = small_model()
    paths = tmp_path / "var.pth", tmp_path / "vae.pth"
    save_original(model.var, model.vae, *paths)
    complete = [torch.load(path) for path in paths]
    gone = ("head.bias", "quant_conv.bias")
    extra = ({"blocks_extra.weight": torch.ones(2)}, {"discriminator.bias": torch.ones(3)})
    for path, state, key, more in zip(paths, complete, gone, extra, strict=True):
        torch.save({k: v for k, v in (state | more).items() if k != key}, path)
    for options in ({}, {"strict": True}):
        with pytest.raises(UserError, match=r"Missing key.*head\.bias.*blocks_extra\.weight"):
            VARiant.from_var_checkpoint(*paths, **options)
    with pytest.warns(UserWarning, match="not all weights fit") as caught:
        loaded = VARiant.from_var_checkpoint(*paths, strict=False, dtype="bfloat16")
    text = " ".join(str(warning.message) for warning in caught)
    for path, key, (other,) in zip(paths, gone, extra, strict=True):
        assert f"{path}: not all weights fit this " in text, text
        assert f"missing (initialised) keys: {key}; unexpected (left out) keys: {other}" in text
    model.var.bfloat16()
    torch.nn.init.zeros_(model.var.head.bias)  # as VAR.init_weights sets it
    assert same_weights(loaded.var, model.var)
    same = loaded.vae.state_dict() | {"quant_conv.bias": None}
    assert all(
        same[k] is None or torch.equal(same[k], v) for k, v in model.vae.state_dict().items()
    )
    assert loaded.vae.quant_conv.bias.isfinite().all()
    assert not loaded.training
    # What tells a size is needed; another shape is refused.
    for key, changes, message in (
        ("class_emb.weight", {}, "is not a VAR transformer: it has no class_emb.weight"),
        ("", {"head.bias": torch.zeros(7)}, r"size mismatch for head\.bias"),
    ):
        state = {k: v for k, v in complete[0].items() if k != key}
        torch.save(state | changes, paths[0])
        with pytest.raises(UserError, match=message):
            VARiant.from_var_checkpoint(*paths, strict=False)
    with pytest.raises(TypeError, match=r"^from_var_checkpoint: strict must be"):
        VARiant.from_var_checkpoint(*paths, strict="no")


# --- save_pretrained ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"p": Path("x")}, TypeError, r"extra\['p'\] must be text.*got PosixPath\('x'\)"),
        ({"a": {"b": [1, {2, 3}]}}, TypeError, r"extra\['a'\]\['b'\]\[1\] must be .*\(set\)"),
        ({"a": {(1, 2): 3}}, TypeError, r"a key of extra\['a'\] must be .*got \(1, 2\) \(tuple\)"),
        ({"t": torch.ones(1)}, TypeError, r"extra\['t'\] must be .*\(Tensor\)"),
        ({"t": torch.ones((), device="meta")}, TypeError, r"extra\['t'\] must be .*\(Tensor\)"),
        ({"t": np.complex64(1)}, TypeError, r"extra\['t'\] must be .*\(complex64\)"),
        (
            {"a": {"b": [1, math.nan]}},
            ValueError,
            r"extra\['a'\]\['b'\]\[1\] must be fin.*; got nan",
        ),
        ({"t": torch.tensor(math.nan)}, ValueError, r"extra\['t'\] must be finite.*got nan"),
        ({"t": -np.float32("inf")}, ValueError, r"extra\['t'\] must be finite.*got -inf"),
        ({"format": "mine"}, ValueError, "extra must not have the key 'format'"),
        ({"var": {}}, ValueError, "extra must not have the key 'var'"),
        ({3: "x"}, TypeError, "the keys of extra must be text; got 3"),
        ([("a", 1)], TypeError, "extra must be of type Mapping"),
        # One key in JSON, and files that from_pretrained could not read.
        ({"a": {1: 2, "1": 3}}, ValueError, "extra must be readable .* has the key 1 twice"),
        ({"a": [{True: 2, "true": 3}]}, ValueError, "extra must be .* has the key true twice"),
        ({"a": 10**5000}, ValueError, "extra must be readable .* limit"),
        ({"a": "x" * 2**24}, ValueError, r"config\.json may have 16,777,216 bytes; with extra"),
    ],
)
def test_a_refused_extra_leaves_the_model_and_the_folder_as_they_were(
    tmp_path, extra, error, message
):
    model = small_model()
    model.save_pretrained(tmp_path / "first", {"classes": ["a", "b"]})
    with pytest.raises(error, match=f"^save_pretrained: {message}"):
        model.save_pretrained(tmp_path / "second", extra)
    assert not (tmp_path / "second").exists()
    assert model.extra == {"classes": ["a", "b"]}
    model.save_pretrained(tmp_path / "third")
    assert VARiant.from_pretrained(tmp_path / "third").extra == {"classes": ["a", "b"]}


def test_numbers_of_json_that_is_none_are_read_and_converted_to_text(tmp_path):
    folder = tmp_path / "first"
    small_model().save_pretrained(folder, {"loss": 7.25})
    path = folder / "config.json"
    path.write_text(path.read_text().replace("7.25", "NaN"))
    model = VARiant.from_pretrained(folder)
    assert math.isnan(model.extra["loss"])
    with pytest.raises(ValueError, match=r"extra\['loss'\] must be finite"):
        model.save_pretrained(tmp_path / "second")
    assert main(["convert", "--model", str(folder), "--out", str(tmp_path / "second")]) == 0
    assert VARiant.from_pretrained(tmp_path / "second").extra == {"loss": "NaN"}


def test_numbers_of_numpy_and_torch_in_extra(tmp_path):
    numbers = {"a": np.int64(3), "b": [np.float32(0.5), torch.tensor(2)], "c": np.array(True)}
    small_model().save_pretrained(tmp_path, numbers)
    extra = VARiant.from_pretrained(tmp_path).extra
    assert extra == {"a": 3, "b": [0.5, 2], "c": True}
    assert extra["c"] is True


def test_an_extra_within_itself_is_refused(tmp_path):
    endless = []
    endless.append(endless)
    with pytest.raises(TypeError, match=r"^save_pretrained: extra\['a'\]"):
        small_model().save_pretrained(tmp_path / "x", {"a": endless})


def test_a_folder_that_cannot_be_written_does_not_keep_the_extra(tmp_path):
    (tmp_path / "file").write_text("")
    model = small_model()
    with pytest.raises(UserError, match="cannot be written"):
        model.save_pretrained(tmp_path / "file" / "x", {"a": 1})
    assert model.extra == {}


# --- save_original --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*assumed .*because nothing tells them:UserWarning")
@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
def test_the_ending_chooses_the_format_and_every_format_is_read_back(model, tmp_path, ending):
    paths = tmp_path / f"var{ending}", tmp_path / f"vae{ending}"
    save_original(model.var, model.vae, *paths)
    for path, part in zip(paths, load_original(*paths), strict=True):
        assert (path.read_bytes()[:2] == b"PK") == (ending != ".safetensors")
        assert same_weights(part, model.var if path.stem == "var" else model.vae)
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_save_original_refuses_what_it_cannot_write(model, tmp_path):
    good = tmp_path / "good.pth"
    for name in ("config.json", "x.bin", "x", "x.ckpt"):
        with pytest.raises(UserError, match=r"must end in \.pth, \.pt, \.safetensors"):
            save_original(model.var, model.vae, good, tmp_path / name)
    with pytest.raises(UserError, match="two files"):
        save_original(model.var, model.vae, good, good)
    with pytest.raises(TypeError, match=r"^save_original: vae must be of type VQVAE"):
        save_original(model.var, 3, good, tmp_path / "b.pth")
    with pytest.raises(TypeError, match="must be a path"):
        save_original(model.var, model.vae, good, None)
    assert not list(tmp_path.iterdir())
