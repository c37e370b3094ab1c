"""Model folders and original checkpoints: round trips, and files that are refused."""

import json
import os
import pickle
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from golden_models import NAMES, load_golden
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from small_models import small_model

from tests.forked_program import run_forked
from variant import VAR, VQVAE, UserError, VARiant
from variant.checkpoints import model_folder
from variant.checkpoints.original_var import load_original, save_original
from variant.files import atomic_write
from variant.folder_lock import saving
from variant.models.var import derived_buffers

# What files of the original do not tell; tests of the warning catch it themselves.
pytestmark = pytest.mark.filterwarnings("ignore:.*assumed .*because nothing tells them:UserWarning")


def same_weights(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_saved_folder_gives_the_same_model(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "model", {"training": {"recipe": "none"}})
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    again = VARiant.from_pretrained(tmp_path / "model")
    assert again.var.config == model.var.config
    assert again.vae.config == model.vae.config
    assert again.extra == {"training": {"recipe": "none"}}
    assert same_weights(model, again)
    a, b = (m.generate([1, 2], depth=2, seed=4) for m in (model, again))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.images, b.images)


def test_tied_weights_are_saved_under_both_names(tmp_path):
    model = small_model()
    first, second = model.var.blocks[0].ffn, model.var.blocks[1].ffn
    second.fc1.weight = first.fc1.weight
    model.save_pretrained(tmp_path)
    again = VARiant.from_pretrained(tmp_path)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    assert torch.equal(again.generate([1], seed=0).images, model.generate([1], seed=0).images)


def test_a_loaded_model_has_the_files_dtype_by_default(tmp_path):
    model = small_model()
    model.var.bfloat16()
    model.save_pretrained(tmp_path)
    assert VARiant.from_pretrained(tmp_path).var.head.weight.dtype == torch.bfloat16
    wide = VARiant.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.var.head.weight.dtype == torch.float32
    assert wide.generate(0, seed=0).stats.dtype == "float32"
    assert wide.generate(0, seed=0, dtype=torch.bfloat16).stats.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("head", "rest", "widest"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_of_several_dtypes_in_a_file_no_value_is_lost(head, rest, widest, tmp_path):
    model = small_model()
    model.var.to(rest)
    model.var.head.to(head)
    model.vae.decoder.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "folder")
    paths = tmp_path / "var.pth", tmp_path / "vae.pth"
    save_original(model.var, model.vae, *paths)
    expected = model.state_dict()
    for loaded in (
        VARiant.from_pretrained(tmp_path / "folder"),
        VARiant.from_var_checkpoint(*paths),
    ):
        assert {weight.dtype for weight in loaded.var.parameters()} == {widest}
        assert {weight.dtype for weight in loaded.vae.parameters()} == {torch.float32}
        for name, value in loaded.named_parameters():
            assert torch.equal(value, expected[name].to(value.dtype)), name


def test_a_dtype_in_which_no_model_runs_is_refused_and_can_be_cast(tmp_path):
    model = small_model()
    model.var.head.weight.data = model.var.head.weight.to(torch.float8_e4m3fn)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"head\.weight is float8_e4m3fn; .* Give one of them"):
        VARiant.from_pretrained(tmp_path)
    loaded = VARiant.from_pretrained(tmp_path, dtype="bfloat16").var.head.weight
    assert torch.equal(loaded, model.var.head.weight.to(torch.bfloat16))


@pytest.mark.parametrize("name", NAMES)
def test_original_files_load_with_sizes_read_from_shapes_and_write_back_equal(name, tmp_path):
    golden = load_golden(name)
    var_path, vae_path = tmp_path / "var.pth", tmp_path / "vae.pth"
    torch.save(golden.var_state, var_path)
    torch.save(golden.vae_state, vae_path)
    model = VARiant.from_var_checkpoint(var_path, vae_path)
    for field in ("depth", "embed_dim", "num_heads", "num_classes", "patch_nums", "shared_aln"):
        assert getattr(model.var.config, field) == getattr(golden.var_config, field)
    assert model.vae.config == golden.vae_config
    result = model.generate(golden.tensors["label"], cfg=4.0, top_k=1)
    assert torch.equal(result.tokens, golden.tensors["greedy_tokens_full"])
    save_original(model.var, model.vae, tmp_path / "a.pth", tmp_path / "b.pth")
    for path, state in (
        (tmp_path / "a.pth", golden.var_state),
        (tmp_path / "b.pth", golden.vae_state),
    ):
        written = torch.load(path, weights_only=True)
        assert written.keys() == state.keys()
        assert all(torch.equal(written[key], state[key]) for key in state)


def test_trainer_checkpoints_of_the_original_load(tmp_path):
    golden = load_golden("plain")
    path = tmp_path / "ar-ckpt-last.pth"
    trainer = {"var_wo_ddp": golden.var_state, "vae_local": golden.vae_state}
    torch.save({"epoch": 3, "args": "...", "trainer": trainer}, path)
    var, _ = load_original(path, path)
    assert var.config.depth == 6


def test_published_layouts_are_known_without_their_buffers(tmp_path):
    golden = load_golden("plain")
    state = {k: v for k, v in golden.var_state.items() if k not in derived_buffers(_layout())}
    torch.save(state, tmp_path / "var.pth")
    torch.save(golden.vae_state, tmp_path / "vae.pth")
    with pytest.raises(UserError, match="cannot infer the token maps of 7 scales and 155 tokens"):
        VARiant.from_var_checkpoint(tmp_path / "var.pth", tmp_path / "vae.pth")


def _layout():
    return small_model().var.layout


class _Attack:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, blob in (("raw.pth", pickle.dumps(_Attack())), ("zip.pth", None)):
        if blob is None:
            torch.save({"word_embed.weight": _Attack()}, name)
        else:
            (tmp_path / name).write_bytes(blob)
        with pytest.raises(UserError, match=f"{name}: refused"):
            VARiant.from_var_checkpoint(name, name)
    assert not (tmp_path / "pwned").exists()


def test_foreign_and_damaged_pickles_are_named(tmp_path):
    good = tmp_path / "good.pth"
    torch.save(load_golden("plain").var_state, good)
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(good.read_bytes()[:1000])
    text = tmp_path / "text.pth"
    text.write_text("hello")
    foreign = tmp_path / "foreign.pth"
    torch.save({"layer.weight": torch.zeros(2, 2)}, foreign)
    numbers = tmp_path / "numbers.pth"
    torch.save({"epoch": 3}, numbers)
    listed = tmp_path / "list.pth"
    torch.save([1, 2], listed)
    for path, message in (
        (damaged, "damaged.pth: is not a readable checkpoint"),
        (text, "text.pth: is not a readable checkpoint: torch.save did not write it"),
        (tmp_path / "none.pth", "none.pth: no such file"),
        (foreign, "foreign.pth: is not a VAR transformer: it has no word_embed.weight"),
        (numbers, "numbers.pth: must hold a state dict of tensors"),
        (listed, "list.pth: must hold a dictionary of tensors; got list"),
    ):
        with pytest.raises(UserError, match=message):
            VARiant.from_var_checkpoint(path, good)


def test_folders_that_are_no_models_are_named(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    # Copies: load_file maps the file into memory, and the file is overwritten below.
    tensors = {key: value.clone() for key, value in load_file(weights).items()}
    described = json.loads(config.read_text())

    def fails(message):
        with pytest.raises(UserError, match=message):
            VARiant.from_pretrained(tmp_path)

    weights.write_bytes(weights.read_bytes()[:500])
    fails("model.safetensors: is missing or damaged")
    save_file({k: v for k, v in tensors.items() if k != "var.head.bias"}, weights)
    fails('does not hold the weights of this VAR: Missing key.* "head.bias"')
    save_file({**tensors, "var.head.bias": torch.zeros(7)}, weights)
    fails("size mismatch for head.bias")
    save_file(tensors, weights)
    config.write_text(json.dumps({**described, "format": "other"}))
    fails('"format" must be "variant-1"; got \'other\'')
    config.write_text("{}")
    fails('"format" must be "variant-1"; it has none. Weights of the original code')
    config.write_text("[]")
    fails("config.json: must hold an object with the sizes of a model; it holds another value")
    config.write_text(json.dumps({**described, "var": {**described["var"], "depth": 0}}))
    fails("config.json: .*depth")
    config.write_text(json.dumps({**described, "var": {**described["var"], "colour": 1}}))
    fails("config.json: .*colour")
    config.write_text("{")
    fails("config.json: cannot be read as JSON")
    config.unlink()
    fails("is not a model folder: it has no config.json")
    with pytest.raises(UserError, match="no-such-model: no such model"):
        VARiant.from_pretrained("no-such-model")


def test_a_layout_that_does_not_fit_the_model_is_named(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["vae"] |= {"patch_nums": [1, 2, 4], "vocab_size": 99}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(
        UserError, match=r"config.json: the transformer .* agree on patch_nums; .*; on vo"
    ):
        VARiant.from_pretrained(tmp_path)


def test_original_files_of_two_codebooks_are_named(tmp_path):
    model = small_model()
    config = replace(model.vae.config, vocab_size=model.vae.config.vocab_size + 8)
    paths = tmp_path / "var.pth", tmp_path / "vae.pth"
    save_original(model.var, VQVAE(config), *paths)
    with pytest.raises(UserError, match=r"var.pth, .*vae.pth: the .* agree on vocab_size; got"):
        VARiant.from_var_checkpoint(*paths)


def test_nothing_half_written_is_left(tmp_path):
    target = tmp_path / "file.bin"
    target.write_text("old")

    def write_half():
        with atomic_write(target) as path:
            path.write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write_half()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_save_that_fails_keeps_the_old_pair_of_files(tmp_path, monkeypatch, name):
    small_model().save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_text

    def full(self, text, **options):
        if self.name.startswith(f".{name}"):
            raise OSError(28, "No space left on device")
        return write(self, text, **options)

    def fail(*arguments, **options):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    if name == "model.safetensors":
        monkeypatch.setattr("variant.files.save_file", fail)
    other = small_model()
    torch.nn.init.ones_(other.var.head.bias)
    with pytest.raises(UserError, match=rf"{name}: cannot be written: No space left on device"):
        other.save_pretrained(tmp_path, {"training": {"recipe": "new"}})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_outputs_by_two_names_of_one_file_are_refused(tmp_path):
    model = small_model()
    (tmp_path / "link.pth").symlink_to("model.pth")
    with pytest.raises(UserError, match="need two files"):
        save_original(model.var, model.vae, tmp_path / "model.pth", tmp_path / "link.pth")


def test_checkpoints_in_the_old_format_load(tmp_path):
    golden = load_golden("plain")
    for name, state in (("var.pth", golden.var_state), ("vae.pth", golden.vae_state)):
        torch.save(state, tmp_path / name, _use_new_zipfile_serialization=False)
    model = VARiant.from_var_checkpoint(tmp_path / "var.pth", tmp_path / "vae.pth")
    assert same_weights(model.var, VARiant(*_built(golden)).var)


def _built(golden):
    var, vae = VAR(golden.var_config), VQVAE(golden.vae_config)
    var.load_state_dict(golden.var_state)
    vae.load_state_dict(golden.vae_state)
    return var, vae


def test_a_number_of_heads_that_is_assumed_gives_a_warning(tmp_path):
    golden = load_golden("no_l2norm")
    paths = tmp_path / "var.pth", tmp_path / "vae.pth"
    for path, state in zip(paths, (golden.var_state, golden.vae_state), strict=True):
        torch.save(state, path)
    with pytest.warns(UserWarning, match=r"assumed num_heads=2 \(one per 64 channels\)"):
        assert VARiant.from_var_checkpoint(*paths).var.config.num_heads == 2
    assert VARiant.from_var_checkpoint(*paths, num_heads=4).var.config.num_heads == 4


def test_loading_draws_no_random_numbers(tmp_path):
    small_model().save_pretrained(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    VARiant.from_pretrained(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_a_full_disk_is_one_clear_line_and_leaves_the_old_model(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    # A limit of 20 kB on the size of files simulates a full disk.
    script = (
        "import resource, signal, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from small_models import small_model\n"
        "from variant import UserError\n"
        "from variant.checkpoints.original_var import save_original\n"
        "model = small_model(seed=1)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "for save in (lambda: model.save_pretrained(sys.argv[1]),\n"
        "             lambda: save_original(model.var, model.vae,\n"
        "                                   sys.argv[1] + '/a.pth', 'b.pth')):\n"
        "    try:\n"
        "        save()\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    helpers = str(Path(__file__).parent.parent)
    done = run_forked("-c", script, tmp_path, helpers)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be written") == 2, done.stdout + done.stderr
    # The system's reason, which torch.save does not tell.
    assert done.stdout.count("File too large") == 2, done.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("part", "name", "value", "where"),
    [
        ("var.blocks.1", "norm_eps", 0.5, r"var\.blocks\[1\]"),
        ("var.blocks.0.attn", "softmax_scale", 0.5, r"var\.blocks\[0\]\.attn"),
        ("var.blocks.0.attn", "softmax_scale", torch.ones(2), r"var\.blocks\[0\]\.attn"),
        ("vae.quantize.quant_resi.qresi_ls.0", "ratio", 0.1, r"vae\.quantize\..*\[0\]"),
        ("vae.decoder.conv_in", "padding_mode", "circular", r"vae\.decoder\.conv_in"),
    ],
)
def test_a_setting_that_a_file_does_not_have_is_refused_by_name(part, name, value, where, tmp_path):
    model = small_model()
    own = getattr(model.get_submodule(part), name)
    setattr(model.get_submodule(part), name, value)
    with pytest.raises(ValueError, match=rf"^save_pretrained: {where}\.{name} must be {own!r}, as"):
        model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=rf"^save_original: {where}\.{name} must be"):
        save_original(model.var, model.vae, tmp_path / "a.pth", tmp_path / "b.pth")
    assert not list(tmp_path.iterdir())


def test_settings_that_are_others_than_when_the_weights_were_saved_are_named(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    path, text = tmp_path / "config.json", (tmp_path / "config.json").read_text()
    VARiant.from_pretrained(tmp_path)  # without a warning
    for old, new, message in (
        ('"quant_resi": 0.5', '"quant_resi": 0.7', r"vae\.quant_resi is 0\.7, and was 0\.5 when"),
        ('"norm_eps": 1e-06', '"norm_eps": 1e-02', r"var\.norm_eps is 0\.01, and was 1e-06 when"),
        ('"bridge": 1', '"bridge": 3', r"var\.bridge is 3, and was 1 when"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.warns(UserWarning, match=message) as caught:
            VARiant.from_pretrained(tmp_path)
        assert len(caught) == 1
    path.write_text(text.replace('"format"', '"remark": "of mine", "format"'))
    assert VARiant.from_pretrained(tmp_path).extra == {"remark": "of mine"}


def test_files_under_the_ending_of_another_format_are_told_so(tmp_path):
    model = small_model()
    save_original(model.var, model.vae, tmp_path / "var.pth", tmp_path / "vae.safetensors")
    for name, other, message in (
        ("var.pth", "wrong.safetensors", "is a file of torch.save; rename it to end in .pth"),
        ("vae.safetensors", "wrong.pth", "is a .safetensors file; rename it to end so"),
    ):
        (tmp_path / name).rename(tmp_path / other)
        with pytest.raises(UserError, match=f"{other}: {message}$"):
            load_original(tmp_path / other, tmp_path / other)


def test_a_tensor_that_was_saved_without_values_is_told_so(tmp_path):
    state = {**small_model().var.state_dict(), "head.bias": torch.empty(24, device="meta")}
    torch.save(state, tmp_path / "var.pth")
    with pytest.raises(UserError, match=r"has no values of a tensor of shape \(24,\), .* meta dev"):
        load_original(tmp_path / "var.pth", tmp_path / "var.pth")


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        small_model().save_pretrained(tmp_path / "model", {"x": torch.zeros(1)})
    assert not (tmp_path / "model").exists()


def test_an_unwritable_folder_is_named(tmp_path):
    occupied = tmp_path / "file"
    occupied.write_text("")
    with pytest.raises(UserError, match=r"file.*: cannot be written"):
        small_model().save_pretrained(occupied / "model")


def test_written_files_are_readable_by_others(tmp_path):
    small_model().save_pretrained(tmp_path)
    mode = stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode)
    umask = os.umask(0)
    os.umask(umask)
    assert mode == 0o666 & ~umask


def test_two_saves_at_once_leave_one_model(tmp_path, monkeypatch):
    """The second comes when the first has replaced the weights and not yet the config."""
    first, second, threads = small_model(), small_model(), []
    for model, number in ((first, 1), (second, 2)):
        model.extra = {"number": number}
        torch.nn.init.constant_(model.var.head.bias, number)
    save = model_folder.save_safetensors

    def save_then_wait(*args, **options):
        save(*args, **options)
        if not threads:
            threads.append(threading.Thread(target=second.save_pretrained, args=(tmp_path,)))
            threads[0].start()
            threads[0].join(0.3)

    monkeypatch.setattr(model_folder, "save_safetensors", save_then_wait)
    first.save_pretrained(tmp_path)
    threads[0].join()
    loaded = VARiant.from_pretrained(tmp_path)
    assert loaded.extra["number"] == 2
    assert torch.equal(loaded.var.head.bias, second.var.head.bias)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip


def test_a_save_in_the_original_format_waits_in_both_folders(tmp_path):
    model = small_model()
    for name in "ab":
        with saving(tmp_path / name), pytest.raises(UserError, match="is writing into this folder"):
            save_original(model.var, model.vae, tmp_path / "a" / "var.pth", tmp_path / "b" / "v.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_save_clears_what_a_killed_save_left(tmp_path):
    (tmp_path / ".model.safetensors.123456789012.parts.tmp").mkdir()
    for name in (".model.safetensors.123456789012.parts.tmp/tensors", ".config.json.12.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".notes.12.tmp").write_text("of another program")
    small_model().save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob(".*")] == [".notes.12.tmp"]


def test_loading_draws_no_weights_and_imports_no_compiler():
    # Drawing random weights on the meta device, which hold no values, imports torch._dynamo.
    script = (
        "import sys\n"
        "from variant import VARiant\n"
        "VARiant.from_pretrained('digits')\n"
        "sys.exit('torch._dynamo' in sys.modules or 'sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_same_weights_give_the_same_file(tmp_path):
    """The library writes metadata in an order that differs from call to call."""
    model, files = small_model(), set()
    for number in range(12):
        model.save_pretrained(tmp_path / str(number))
        files.add((tmp_path / str(number) / "model.safetensors").read_bytes())
    assert len(files) == 1


@pytest.mark.parametrize("shape", ["same", "other"])
def test_a_save_meanwhile_is_read_whole(tmp_path, monkeypatch, shape):
    """Config and weights are those of one save, also where the other one's would fit."""
    first, second = small_model(), small_model(attn_l2_norm=shape == "same")
    first.save_pretrained(tmp_path, extra={"which": "first"})
    read, saves = model_folder.read_weights_file, []

    def save_and_read(path):
        if not saves:
            saves.append(path)
            with torch.no_grad():
                second.var.head.bias.fill_(0.5)
            second.save_pretrained(tmp_path, extra={"which": "second"})
        return read(path)

    monkeypatch.setattr(model_folder, "read_weights_file", save_and_read)
    var, _, config = model_folder.load_model(tmp_path)
    assert config["which"] == "second"
    assert torch.equal(var.head.bias, second.var.head.bias)


def test_a_folder_that_is_saved_into_all_the_time_is_refused(tmp_path, monkeypatch):
    model, read = small_model(), model_folder.read_weights_file
    model.save_pretrained(tmp_path)

    def save_and_read(path):
        model.save_pretrained(tmp_path)
        return read(path)

    monkeypatch.setattr(model_folder, "read_weights_file", save_and_read)
    with pytest.raises(UserError, match=r"was saved into while it was read, 5 times; load it"):
        model_folder.load_model(tmp_path)
