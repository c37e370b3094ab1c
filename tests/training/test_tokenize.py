"""Token shards: made from a recipe's images, and trained on with the losses of the images."""

import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import open_recipe_source
from tiny_runs import CPU, metrics, quiet, resume, run_until, tiny_recipe

from tests.forked_program import run_forked
from tests.robustness.forked import option
from variant.cli.main import main
from variant.data.config import DataSection
from variant.data.encode import encode_images
from variant.data.images import epoch_order, list_images, sample_order
from variant.data.shards import (
    FORMAT,
    MANIFEST_NAME,
    SHARD_SIZE,
    Manifest,
    Rows,
    read_manifest,
    write_shard,
)
from variant.data.token_source import TokenSource
from variant.errors import UserError
from variant.files import save_safetensors
from variant.folder_lock import saving
from variant.models.config import to_plain
from variant.models.var import VAR
from variant.models.vqvae import VQVAE
from variant.search.data import held_out
from variant.supernet import VARiant
from variant.training.initial_weights import find_vae, load_vae, tokenizer_sha256
from variant.training.run_summary import RunSummary
from variant.training.tokenize import gpu_of_environment, rank_of_environment, tokenize
from variant.training.vae_task import train_vae
from variant.training.var_task import VARTask, train_var

PASSES, SHARD = 3, 10  # of 24 training images: three shards in a pass


def random_vae(path, seed):
    """A file with the weights of a VQ-VAE of the tiny recipe, not trained."""
    torch.manual_seed(seed)
    module = VQVAE(tiny_recipe(Path()).vae)
    save_safetensors(path, module.state_dict())
    return str(path)


def with_vae(recipe, path):
    """The recipe with the weights of a VQ-VAE; None trains one."""
    training = dataclasses.replace(recipe.vae_training, weights=path)
    return dataclasses.replace(recipe, vae_training=training)


@pytest.fixture(scope="module")
def tiny(folders, tmp_path_factory):
    """The tiny recipe with the weights of a VQ-VAE."""
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    return with_vae(tiny_recipe(folders), random_vae(path, 0))


@pytest.fixture(scope="module")
def tokens(tiny, tmp_path_factory):
    """A folder of tokens of the tiny recipe, which must not be changed."""
    out = tmp_path_factory.mktemp("tokens")
    made = write(tiny, out)
    assert (made.samples, made.shards, made.missing) == (3 * 24 + 6 + 6, 3 * 3 + 1 + 1, 0)
    return out


def write(recipe, out, passes=PASSES, **options):
    return tokenize(recipe, out, passes, vae_folder=out, device=CPU, shard_size=SHARD, **options)


def from_tokens(recipe, tokens, **changes):
    """The recipe, trained from shards; the keys that change images stay."""
    section = dataclasses.replace(recipe.data, kind="tokens", tokens=str(tokens), **changes)
    return dataclasses.replace(recipe, data=section)


def files(folder):
    """Name -> bytes of the shards, their SHA-256 and the manifest."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def copied(tokens, to):
    to.mkdir()
    for name, content in files(tokens).items():
        (to / name).write_bytes(content)
    return to


def test_samples_of_shards_are_those_of_images(tiny, tokens):
    images, shards = open_recipe_source(tiny), TokenSource(from_tokens(tiny, tokens).data, 0)
    vae = load_vae(tiny, find_vae(tiny, Path())).eval()
    assert shards.classes == images.classes
    for name, arguments in (
        *(("samples", (np.arange(24), epoch)) for epoch in range(PASSES)),
        ("held_out", (np.arange(6),)),
        ("unmixed", (np.random.default_rng(0).permutation(24)[:6],)),
    ):
        expected, found = (getattr(source, name)(*arguments) for source in (images, shards))
        assert torch.equal(found.tokens_BL, encode_images(vae, expected.images))
        assert torch.equal(found.labels_B, expected.labels_B)
        if name == "samples":
            assert torch.equal(found.mixed_labels_B, expected.mixed_labels_B)
            assert torch.equal(found.mix_B, expected.mix_B)
        else:
            assert found.mix_B is None
    later = shards.samples([3, 7], PASSES + 1)  # the passes repeat
    assert torch.equal(later.tokens_BL, shards.samples([3, 7], 1).tokens_BL)


@pytest.mark.parametrize("parts", [1, 2])
def test_training_from_shards_has_the_losses_of_training_from_images(tiny, tokens, tmp_path, parts):
    optim = dataclasses.replace(tiny.optim, accumulate=parts)
    schedule = dataclasses.replace(tiny.schedule, transition=1)  # three epochs in all
    recipe = dataclasses.replace(tiny, optim=optim, schedule=schedule)
    summaries = {
        name: train_var(chosen, tmp_path / name, console=quiet(), device=CPU)
        for name, chosen in (
            ("images", recipe),
            ("shards", from_tokens(recipe, tokens, workers=parts % 2)),
        )
    }
    assert recipe.data.mixup > 0
    assert metrics(tmp_path / "shards") == metrics(tmp_path / "images")
    assert summaries["shards"].train_loss == summaries["images"].train_loss
    weights = [
        torch.load(tmp_path / name / "var-last.pt")["module"] for name in ("images", "shards")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    # The VQ-VAE is part of the model although no image was encoded.
    assert main(["generate", "--model", str(tmp_path / "shards"), "--labels", "class1",
                 "--out", str(tmp_path / "x.png")]) == 0  # fmt: skip


def test_a_run_from_shards_resumes_also_from_another_folder(tiny, tokens, tmp_path, monkeypatch):
    here = from_tokens(tiny, tokens)
    moved = from_tokens(tiny, copied(tokens, tmp_path / "moved"))
    train_var(here, tmp_path / "whole", console=quiet(), device=CPU)
    run_until(here, tmp_path / "parted", monkeypatch, train_var, VARTask, step=3)
    resume(moved, tmp_path / "parted", train_var)
    assert metrics(tmp_path / "parted") == metrics(tmp_path / "whole")


def test_shards_are_webdataset_shards(tokens):
    from webdataset import WebDataset

    shard = str(tokens / "train-p0001-00001.tar")
    samples = list(WebDataset(shard, shardshuffle=False).decode())
    order = epoch_order(0, 1, 24)[10:20]
    assert [sample["json"]["index"] for sample in samples] == order.tolist()
    for sample in samples:
        assert sample["npy"].dtype == np.int16
        assert sample["npy"].shape == (21,)
        assert sample["json"].keys() == {"index", "label", "mixed_label", "mix"}
    with tarfile.open(tokens / "held_out-00000.tar") as file:
        assert len(file.getnames()) == 2 * 6


def test_the_manifest_says_what_the_shards_hold(tiny, tokens):
    manifest = json.loads((tokens / MANIFEST_NAME).read_text())
    assert manifest["recipe"] == json.loads(json.dumps(to_plain(tiny)))
    vae = load_vae(tiny, find_vae(tiny, Path()))
    assert manifest["vae_sha256"] == tokenizer_sha256(vae)
    assert (manifest["passes"], manifest["num_train"], manifest["num_held_out"]) == (3, 24, 6)
    assert manifest["classes"] == ["class0", "class1"]
    assert len(manifest["shards"]) == 11
    for name, digest in manifest["shards"].items():
        assert hashlib.sha256((tokens / name).read_bytes()).hexdigest() == digest
        assert (tokens / f"{name}.sha256").read_text() == f"{digest}  {name}\n"


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_shards_and_the_last_writes_the_manifest(
    tiny, tokens, tmp_path, world_size
):
    missing = [
        write(tiny, tmp_path / "t", rank=rank, world_size=world_size).missing
        for rank in reversed(range(world_size))
    ]
    assert missing[-1] == 0
    assert all(count > 0 for count in missing[:-1])
    assert files(tmp_path / "t") == files(tokens)


def test_the_same_command_continues_and_more_passes_are_added(tiny, tokens, tmp_path):
    recipe, out = tiny, tmp_path / "t"
    write(recipe, out, passes=1)
    first = files(out)
    (out / "held_out-00000.tar").unlink()
    (out / "train-p0000-00002.tar.sha256").unlink()
    (out / ".train-p0000-00002.tar.123.tmp").write_bytes(b"half")
    made = write(recipe, out, passes=1)
    assert made.shards == 2
    assert files(out) == first
    assert write(recipe, out).shards == 6
    assert files(out) == files(tokens)
    assert write(recipe, out).shards == 0
    with pytest.raises(UserError, match="holds 3 passes; --passes must be at least as many"):
        write(recipe, out, passes=2)


def test_of_ranks_that_begin_at_once_one_writes_the_manifest(tiny, tmp_path):
    with saving(tmp_path / "t"), pytest.raises(UserError, match="is writing into this folder"):
        write(tiny, tmp_path / "t", passes=1)
    assert not (tmp_path / "t").exists()


def test_tokens_of_replaced_images_of_their_sizes_are_not_mixed(tiny, tmp_path):
    out, parts = tmp_path / "t", ("train", "held_out")
    shutil.copytree(Path(tiny.data.train).parent, tmp_path / "images")
    places = {part: str(tmp_path / "images" / part) for part in parts}
    recipe = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, **places))
    write(recipe, out, passes=1)
    path = tmp_path / "images" / "train" / "class1" / "3.png"
    os.utime(path, (1e9, 1e9))
    with warnings.catch_warnings(action="error"):  # on another machine: its own files
        write(recipe, copied(out, tmp_path / "other"), passes=1, rank=1, world_size=2)
    with pytest.warns(RuntimeWarning, match=r"t: .* their modification times differ\. 30 of them"):
        write(recipe, out, passes=1)
    with warnings.catch_warnings(action="error"):
        write(recipe, out, passes=1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the checksum of the last chunk, which readers of images pass over
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"t: holds tokens of other images: .* train/class1/3\.png "
    ):
        write(recipe, out, passes=3)
    earlier = json.loads((out / MANIFEST_NAME).read_text())
    del earlier["stamps"]  # of an earlier version
    (out / MANIFEST_NAME).write_text(json.dumps(earlier))
    assert write(recipe, out, passes=3).missing == 0
    assert read_manifest(out).stamps.contents["train/class1/3.png"]


def test_tokens_of_other_settings_are_not_mixed(tiny, tokens, tmp_path):
    recipe, out = tiny, copied(tokens, tmp_path / "t")
    for chosen, message in (
        (dataclasses.replace(recipe, seed=1), "seed 0 -> 1; give"),
        (
            dataclasses.replace(
                recipe, seed=1, data=dataclasses.replace(recipe.data, hflip=0.25, mixup=0.5)
            ),
            "seed 0 -> 1, augmentation.hflip 0.5 -> 0.25, augmentation.mixup 0.2 -> 0.5; give the",
        ),
    ):
        with pytest.raises(UserError, match=f"holds tokens of other settings: {message}"):
            write(chosen, out)
    assert files(out) == files(tokens)


def test_classes_of_the_recipe_are_those_of_images_and_tokens(tiny, tokens, tmp_path):
    model = dataclasses.replace(tiny.model, num_classes=3)
    other = dataclasses.replace(tiny, model=model)
    text = "tiny: model.num_classes must be 2, as many as the data has "
    with pytest.raises(UserError) as caught:
        write(other, tmp_path / "tokens")
    assert str(caught.value) == f"{text}(sub-folders of {tiny.data.train}); got 3"
    assert not (tmp_path / "tokens").exists()
    with pytest.raises(UserError) as caught:
        train_var(from_tokens(other, tokens), tmp_path / "run", console=quiet(), device=CPU)
    assert str(caught.value) == f"{text}(classes in {tokens / MANIFEST_NAME}); got 3"


def test_tokens_that_do_not_fit_the_recipe_are_refused(tiny, tokens, tmp_path):

    def refuse(chosen, message):
        with pytest.raises(UserError, match=message):
            train_var(chosen, tmp_path / "run", console=quiet(), device=CPU)

    vae = dataclasses.replace(tiny.vae, patch_nums=(1, 2, 3), vocab_size=4)
    refuse(
        from_tokens(dataclasses.replace(tiny, vae=vae), tokens),
        r"vae.patch_nums must be \(1, 2, 4\), as in .*; got \(1, 2, 3\); vae.vocab_size must be 8",
    )
    refuse(
        from_tokens(tiny, tokens, mixup=0.5, hflip=0.25),
        r"made with data.hflip = 0.5; the recipe has 0.25; with data.mixup = 0.2; the recipe has "
        "0.5. Leave them out",
    )
    other = with_vae(tiny, random_vae(tmp_path / "other.safetensors", 1))
    refuse(from_tokens(other, tokens), "made by another VQ-VAE")
    # No weight tells how the codes are compared and added up.
    vae = dataclasses.replace(tiny.vae, quant_resi=0.25, using_znorm=True)
    chosen = dataclasses.replace(tiny, vae=vae)
    refuse(
        from_tokens(chosen, tokens),
        "vae.quant_resi must be 0.5, as in .*; got 0.25; vae.using_znorm must be False, .*True",
    )
    out = copied(tokens, tmp_path / "same")
    settings = r"vae.quant_resi 0.5 -> 0.25, vae.using_znorm False -> True; give the first"
    with pytest.raises(UserError, match=f"holds tokens of other settings: {settings}"):
        write(chosen, out, passes=PASSES + 1)
    assert files(out) == files(tokens)
    refuse(from_tokens(tiny, tmp_path), "holds no tokens: it has no manifest.json")
    half = copied(tokens, tmp_path / "half")
    manifest = json.loads((half / MANIFEST_NAME).read_text())
    del manifest["shards"]["train-p0001-00002.tar"]
    (half / MANIFEST_NAME).write_text(json.dumps(manifest))
    refuse(from_tokens(tiny, half), "not complete: manifest.json has no train-p0001-00002.tar yet")
    with pytest.raises(UserError, match='kind "tokens" has no images'):
        train_vae(
            from_tokens(with_vae(tiny, None), tokens), tmp_path / "v", console=quiet(), device=CPU
        )
    with pytest.raises(UserError, match=r'data.kind must be that of images; got "tokens"'):
        write(from_tokens(tiny, tokens), tmp_path / "t")
    copies = dataclasses.replace(tiny.data, copies=2, mixup=0.0)
    with pytest.raises(UserError, match=r"data.copies must be 0: --passes takes its place; got 2"):
        write(dataclasses.replace(tiny, data=copies), tmp_path / "t")


def changed(manifest, **values):
    """Write other values into a manifest."""
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **values}))


def test_a_vqvae_is_known_by_its_weights_before_the_decoder(tiny, tokens, tmp_path):
    weights = find_vae(tiny, Path())
    state = {key: value.clone() for key, value in load_vae(tiny, weights).state_dict().items()}
    for key in state:
        if key.startswith(("decoder.", "post_quant_conv.")) or "ema_vocab_hit" in key:
            state[key] += 1
    decoder, encoder = tmp_path / "decoder.safetensors", tmp_path / "encoder.safetensors"
    save_safetensors(decoder, state)
    state["quant_conv.bias"] += 1
    save_safetensors(encoder, state)
    own = copied(tokens, tmp_path / "tokens")
    train_var(from_tokens(with_vae(tiny, str(decoder)), own), tmp_path / "run", console=quiet(),
              device=CPU)  # fmt: skip
    assert write(with_vae(tiny, str(decoder)), own).samples == 0
    chosen = from_tokens(with_vae(tiny, str(encoder)), own)
    with pytest.raises(UserError, match="its tokens were made by another VQ-VAE"):
        train_var(chosen, tmp_path / "other", console=quiet(), device=CPU)
    with pytest.raises(
        UserError, match=r"settings: vae_sha256 '\w{59}\.\.\. -> '\w{59}\.\.\.; give"
    ):
        write(with_vae(tiny, str(encoder)), own)
    # As an earlier version wrote it.
    changed(own / MANIFEST_NAME, vae_sha256=weights.sha256())
    assert write(tiny, own).samples == 0
    assert json.loads((own / MANIFEST_NAME).read_text())["vae_sha256"] == weights.sha256()


def test_a_search_takes_tokens_of_the_model_s_vqvae_alone(tiny, tokens, tmp_path):
    vae = load_vae(tiny, find_vae(tiny, Path()))
    var = VAR(dataclasses.replace(tiny.var_config, class_names=("class0", "class1")))
    images = held_out(VARiant(var, vae), str(tokens), 6)
    pixels = open_recipe_source(tiny).held_out(range(6)).images
    assert torch.equal(images.tokens_NL, encode_images(vae.eval(), pixels))
    chosen = with_vae(tiny, random_vae(tmp_path / "other.safetensors", 1))
    other = load_vae(chosen, find_vae(chosen, Path()))
    with pytest.raises(UserError, match=r"by another VQ-VAE \(SHA-256 .*, the model's has"):
        held_out(VARiant(var, other), str(tokens), 6)
    # The same weights in 16 bits, as the training would load them.
    assert tokenizer_sha256(vae.half()) == tokenizer_sha256(vae.float()) != tokenizer_sha256(other)


def test_a_summary_of_a_recipe_counts_tokens_as_it_counts_images(tiny, tokens):
    chosen = from_tokens(tiny, tokens)
    steps = dict(RunSummary(chosen).lines())["train"]
    assert steps == dict(RunSummary(tiny).lines())["train"]
    assert "steps of fp32" in steps
    assert RunSummary(chosen).problems == []
    vae = dataclasses.replace(tiny.vae, vocab_size=4)
    other = dataclasses.replace(chosen, vae=vae)
    assert RunSummary(other).problems == [f"tiny: vae.vocab_size must be 8, as in {tokens}; got 4"]


@pytest.mark.parametrize("damage", ["flipped", "cut off", "removed"])
def test_a_bad_shard_is_named_and_other_passes_take_its_place(tiny, tokens, tmp_path, damage):
    recipe, out = tiny, copied(tokens, tmp_path / "t")
    path = out / "train-p0001-00001.tar"
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content if damage == "flipped" else content[:5000])
    if damage == "removed":
        path.unlink()
    section = from_tokens(recipe, out, max_bad=0.5).data
    source, whole = TokenSource(section, 0), TokenSource(from_tokens(recipe, tokens).data, 0)
    with pytest.warns(RuntimeWarning, match=r"train-p0001-00001.tar.*Skipped: 10 of 84 samples"):
        found = source.samples(np.arange(24), 1)
    # The same images of the next pass, with their own labels.
    lost = epoch_order(0, 1, 24)[10:20]
    kept = np.setdiff1d(np.arange(24), lost)
    for indices, epoch in ((lost, 2), (kept, 1)):
        expected = whole.samples(indices, epoch)
        assert torch.equal(found.tokens_BL[indices], expected.tokens_BL)
        assert torch.equal(found.mixed_labels_B[indices], expected.mixed_labels_B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = source.samples(lost[:1], 1)
    assert torch.equal(one.tokens_BL[0], found.tokens_BL[lost[0]])
    with pytest.raises(UserError, match=r"10 of 84 samples cannot be read, more than data.max_bad"):
        TokenSource(from_tokens(recipe, out).data, 0).samples(np.arange(24), 1)


def test_a_bad_shard_of_a_single_pass_is_replaced_by_other_images(tiny, tmp_path):
    write(tiny, tmp_path, passes=1)
    for name in ("train-p0000-00000.tar", "held_out-00000.tar"):
        (tmp_path / name).unlink()
    section = from_tokens(tiny, tmp_path, max_bad=0.9).data
    sources = [TokenSource(section, 0) for _ in range(2)]
    with pytest.warns(RuntimeWarning, match="Skipped"):
        found, again = (source.samples(np.arange(24), 0) for source in sources)
    assert torch.equal(found.tokens_BL, again.tokens_BL)
    with pytest.raises(UserError, match=r"held_out-00000.tar.*nor could another sample be read"):
        sources[0].held_out([0])


def test_unreadable_images_of_all_processes_and_sittings_are_counted_together(
    tiny, folders, tmp_path
):
    """Two unreadable images of 30; the second process finds the second one."""
    shutil.copytree(folders, tmp_path / "images")
    section = dataclasses.replace(
        tiny.data,
        train=str(tmp_path / "images" / "train"),
        held_out=str(tmp_path / "images" / "held_out"),
        mixup=0.0,
        max_bad=1 / 30,
    )
    recipe, out = dataclasses.replace(tiny, data=section), tmp_path / "t"
    paths, labels, _ = list_images(section.train)
    order = epoch_order(recipe.seed, 0, 24)  # two shards of 10 images, one of 4
    second = next(index for index in order[10:20] if labels[index] != labels[order[0]])
    for index in (order[0], second):
        paths[index].write_bytes(b"no image")
    name = "train-p0000-00000.tar"
    with pytest.warns(RuntimeWarning, match="1 of 30 samples so far"):
        write(recipe, out, passes=1, rank=0, world_size=3)  # the first shard, one of the others
    (item,) = json.loads((out / f"{name}.bad.json").read_text())
    assert item["name"] == str(paths[order[0]])
    assert [path.name for path in out.glob("*.bad.json")] == [f"{name}.bad.json"]
    limit = r"2 of 30 samples cannot be read, more than data.max_bad = 0.0333333 allows"
    with pytest.raises(UserError, match=limit):
        write(recipe, out, passes=1, rank=1, world_size=3)
    assert not (out / "train-p0000-00001.tar").exists()
    # With a larger share the same command completes them. The lists stay for another sitting.
    more = dataclasses.replace(recipe, data=dataclasses.replace(section, max_bad=2 / 30))
    with pytest.warns(RuntimeWarning, match="2 of 30 samples so far"):
        assert write(more, out, passes=1).missing == 0
    with pytest.raises(UserError, match=limit):
        write(recipe, out, passes=1)
    # A shard that is written again from images that can be read has no list.
    (out / name).unlink()
    for index in (order[0], second):
        shutil.copyfile(paths[order[1]], paths[index])
    (out / MANIFEST_NAME).unlink()  # the images have other sizes now
    write(recipe, out, passes=1)
    assert len(list(out.glob("*.bad.json"))) == 1
    (out / "train-p0000-00001.tar.bad.json").write_text('[{"name": 3}]')
    with pytest.raises(UserError, match=r"00001.tar.bad.json: is damaged: .*; remove it$"):
        write(recipe, out, passes=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, '"format" must be "variant-tokens-1"; got'),
        ({"passes": 0}, "passes must be >= 1; got 0"),
        ({"shards": {"train-p0000-00000.tar": 3}}, "shards"),
        ({"num_train": 10**9}, "its tokens are not complete"),
        ({"num_train": 22}, "does not hold"),
        (
            {"patch_nums": [1, 2, 2**64]},
            "patch_nums must have at most 65,536 tokens in total",
        ),
        ({"patch_nums": [1] * 10**6}, "patch_nums must have 1 to 32 integers; got 1000000"),
        ({"patch_nums": []}, "patch_nums must have 1 to 32 integers; got 0"),
        ({"shard_size": 10**12}, "shard_size must be <= 1,048,576; got 1000000000000"),
        ({"vocab_size": 2}, r"its tokens must be in \[0, 2\); a shard has others"),
        ({"classes": ["a"]}, r"its labels must be in \[0, 1\); a shard has others"),
        ({"patch_nums": [1, 2, 5]}, "does not hold samples of manifest.json: no tokens in its pla"),
    ],
)
def test_a_wrong_manifest_is_one_line(tiny, tokens, tmp_path, change, message):
    out = copied(tokens, tmp_path / "t")
    manifest = json.loads((out / MANIFEST_NAME).read_text()) | change
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    started = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        TokenSource(from_tokens(tiny, out).data, 0).samples(range(22), 0)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"label": 1,', b'"label":"",'),
        (b'"label": 1,', b'"label":[],'),
        (b'"label": 1,', b'"label":{},'),
        (b'"mixed_label": 1,', b'"mixed_label":[],'),
        (b'"mix": 0.', b'"mix":-1.'),
        (b'"mix": 0.', b'"mix": 7.'),
        (b' "label": 1,', b'"label":1.5,'),
        (b'"label": 1,', b'"lab": 1,'),
    ],
)
def test_labels_that_are_no_numbers_are_one_line(tiny, tokens, tmp_path, old, new):
    """Also where every label is an empty text, of which torch makes an empty tensor."""
    out = copied(tokens, tmp_path / "t")
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    for name in manifest["shards"]:
        data = (out / name).read_bytes().replace(old, new.ljust(len(old)))
        (out / name).write_bytes(data)
        manifest["shards"][name] = hashlib.sha256(data).hexdigest()
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    source = TokenSource(from_tokens(tiny, out).data, 0)
    with pytest.raises(UserError, match=r"/t: its (labels|mix) must be in \[0, .*; a shard "):
        [source.samples([index], 0) for index in range(22)]


def test_a_huge_file_in_the_place_of_a_shard_is_not_read(tiny, tokens, tmp_path):
    out = copied(tokens, tmp_path / "t")
    with (out / "held_out-00000.tar").open("r+b") as file:
        file.truncate(100 * 2**30)  # takes no space on the disk
    source = TokenSource(from_tokens(tiny, out).data, 0)
    with pytest.raises(UserError, match=r"held_out-00000\.tar: is damaged: it is larger than its"):
        source.held_out(range(3))


@pytest.mark.parametrize("samples", [0, -5])
def test_a_list_of_bad_files_that_takes_samples_away_is_refused(tiny, tokens, tmp_path, samples):
    out = copied(tokens, tmp_path / "t")
    item = {"name": "a", "reason": "a is bad", "samples": samples}
    (out / "held_out-00000.tar.bad.json").write_text(json.dumps([item]))
    with pytest.raises(
        UserError, match=r"bad\.json: is damaged: .*samples must be >= 1; .*remove it"
    ):
        write(tiny, out)


def test_ranks_come_from_torchruns_variables():
    assert rank_of_environment({}) == (0, 1)
    assert rank_of_environment({"RANK": "2", "WORLD_SIZE": "3"}) == (2, 3)
    long = "9" * 5000  # int() refuses so many digits, and names nothing
    for bad in (
        {"RANK": "1"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": long, "WORLD_SIZE": long},
    ):
        with pytest.raises(UserError, match=r"^the variables? RANK ") as caught:
            rank_of_environment(bad)
        assert len(str(caught.value)) < 300


def test_the_gpu_comes_from_torchruns_variable():
    assert gpu_of_environment({}, 2) == 0
    assert gpu_of_environment({"LOCAL_RANK": "3"}, 2) == 1
    assert gpu_of_environment({"LOCAL_RANK": "3"}, 0) == 0
    for bad in ("x", "", "-1", "1.0", "9" * 5000):
        with pytest.raises(UserError, match=r"^the variable LOCAL_RANK must be an integer"):
            gpu_of_environment({"LOCAL_RANK": bad}, 2)


@pytest.mark.parametrize("stride", [option("TOKENIZE_STRIDE", 9)])
def test_a_killed_process_leaves_whole_shards_alone(tiny, tokens, tmp_path, stride):
    """kill -9 at later and later events; at the end every file is that of an undisturbed run."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    done = run_forked(
        *(here / "killed_tokenize.py", tmp_path / "t", stride),
        input=pickle.dumps(tiny),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    left = files(tmp_path / "t")
    left.pop(".variant-tokenize-0.lock", None)
    assert left == files(tokens)


def test_a_core_reads_ten_thousand_token_images_a_second(tmp_path):
    """A pass of shuffled batches of 680 tokens, by the processor's time."""
    count, patch_nums = 8192, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    rng = np.random.default_rng(0)
    manifest = Manifest(
        FORMAT, 0, 1, count, 2, 2, SHARD_SIZE, ("a", "b"), {"mixup": 0.2}, patch_nums, 4096, "", "",
        {}, {},
    )  # fmt: skip
    digests = {}
    for name, _, rows in manifest.files():
        index_B = np.array(rows)
        if name.startswith("train"):
            index_B = epoch_order(0, 0, count)[index_B]
        elif name.startswith("sample"):
            index_B = sample_order(count)[index_B]
        size = len(rows)
        labels_B, mix_B = rng.integers(0, 2, size), rng.random(size).astype(np.float32)
        written = Rows(index_B, rng.integers(0, 4096, (size, 680)), labels_B, labels_B, mix_B)
        digests[name] = write_shard(tmp_path / name, written, manifest.dtype)
    full = dataclasses.replace(manifest, shards=digests)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(dataclasses.asdict(full)))
    source = TokenSource(DataSection("tokens", tokens=str(tmp_path)), seed=3)
    started = time.process_time()
    for batch in np.split(epoch_order(3, 0, count), 32):
        assert len(source.samples(batch, 0)) == 256
    assert count / (time.process_time() - started) > 10_000
