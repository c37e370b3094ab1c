"""The model card and the conventions of the Hub."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin, hub_mixin
from small_models import small_model

from tests.forked_program import run_forked
from variant import VARiant
from variant.checkpoints.model_card import MARK, _how_to_run, model_card, was_generated
from variant.engine.planning import plan_row


def card_of(folder):
    return (folder / "README.md").read_text()


def test_a_card_names_depths_layers_cache_and_how_to_run(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "small", {"training": {"loss": 2.25, "settings": {"x": 1}}})
    card = card_of(tmp_path / "small")
    rows = dict(re.findall(r"^\| (\d+) \| (.*?) \|", card, re.MULTILINE))
    assert rows == {"4": "all", "3": "0, 2, 3", "2": "0, 3"}
    for depth in (2, 3, 4):
        size = plan_row(model.var.config, depth, 1, 1, torch.float32).ours / 2**20
        assert re.search(rf"^\| {depth} \| .* \| {size:.2f} MiB \|", card, re.MULTILINE)
    assert "Every layer runs at the first 1 scale," in card
    assert "- loss: 2.2500" in card
    assert "settings" not in card
    data = ModelCard.load(tmp_path / "small" / "README.md").data
    assert data.library_name == "variant"
    assert "pytorch_model_hub_mixin" in data.tags


def test_a_card_states_sizes_and_what_training_reached():
    model = small_model(zone_weights="lora", lora_rank=2, class_names=tuple("abcde"))
    # Wide, so that the sizes have digits.
    var = dataclasses.replace(model.var.config, embed_dim=2048, num_heads=32, vocab_size=24)
    reached = {"by depth": {"full": 3.88424, "2": 4}, "loss": 2.25, "settings": {"x": 1}}
    card = model_card(var, model.vae.config, "owner/name", "bfloat16", reached)
    assert "- 4 layers, width 2048, 32 heads; 5 classes; weights in bfloat16\n" in card
    assert "- 6x6 pixels; 3 scales with sides 1, 2, 3; 14 tokens; codebook 24 x 8\n" in card
    assert "\nClasses: a, b, c, d, e.\n" in card
    assert "each smaller depth uses low-rank additions (LoRA, rank 2), which the full n" in card
    for depth, layers in ((4, "all"), (3, "0, 2, 3"), (2, "0, 3")):
        row = plan_row(var, depth, 1, 1, "bfloat16")
        size = f"{row.ours / 2**20:,.2f} MiB | {row.share:.1%}"
        assert f"\n| {depth} | {layers} | {size} |\n" in card
    assert "generate([1], depth=2, cfg" in card
    assert "--labels 1 --depth 2 --out" in card
    assert card.endswith("## Training\n\n- by depth: full 3.8842, 2 4\n- loss: 2.2500\n")
    kind = {"zone_weights": "shared", "lora_rank": 0}
    plain = dataclasses.replace(var, subnets={}, bridge=None, class_names=(), **kind)
    for nothing in (None, {}, 3):
        card = model_card(plain, model.vae.config, "owner/name", "bfloat16", nothing)
        assert "Training" not in card
        assert "Classes" not in card
    shared = dataclasses.replace(var, shared_aln=True, **kind)
    card = model_card(shared, model.vae.config, "owner/name", "bfloat16")
    assert "32 heads, one class projection shared by all layers; 5 classes" in card
    assert "The same weights serve every depth." in card


def test_a_file_of_somebody_else_is_left_alone(tmp_path):
    path = tmp_path / "README.md"
    assert was_generated(path)
    path.write_text("mine")
    assert not was_generated(path)
    path.write_bytes(b"\xff" + MARK.encode())
    assert was_generated(path)
    assert not was_generated(tmp_path)


def test_the_code_and_the_command_of_a_card_run(tmp_path):
    small_model().save_pretrained(tmp_path / "small")
    card = card_of(tmp_path / "small")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    script = code + "print(tuple(result.images.shape), result.stats.depths)"
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    done = run_forked("-c", script, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "(1, 3, 6, 6) (4, 2, 2)"
    # The size in the comment of the card's code.
    assert "(1, 3, 6, 6) in [0, 1]" in code
    command = re.search(r"`variant (generate .*?)`", card).group(1)
    done = run_forked("-m", "variant.cli", *command.split(), cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "image.png").is_file()


def test_a_model_without_subnets_claims_none(tmp_path):
    small_model(subnets={}, bridge=None).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert "trained at full depth only" in card
    assert re.findall(r"^\| (\d+) \|", card, re.MULTILINE) == ["4"]
    assert "depth=" not in card


@pytest.mark.parametrize(("num_classes", "label"), [(1, 0), (2, 1), (5, 1)])
def test_the_label_of_a_card_is_a_class_of_the_model(num_classes, label):
    model = small_model(subnets={}, bridge=None)
    var = dataclasses.replace(model.var.config, num_classes=num_classes)
    text = _how_to_run(var, model.vae.config, "me/model")
    assert f"generate([{label}], cfg" in text
    assert f"--labels {label} --out" in text


def test_a_card_is_overwritten_until_its_mark_is_removed(tmp_path):
    small_model().save_pretrained(tmp_path)
    small_model(subnets={}, bridge=None).save_pretrained(tmp_path)
    assert "trained at full depth only" in card_of(tmp_path)
    own = card_of(tmp_path).replace(MARK, "").replace("trained", "TRAINED")
    (tmp_path / "README.md").write_text(own)
    small_model().save_pretrained(tmp_path)
    assert card_of(tmp_path) == own


class Uploads:
    """A fake Hub that records what would be uploaded."""

    def __init__(self):
        self.repos, self.files, self.options = [], {}, {}

    def __call__(self, token=None):
        return self

    def create_repo(self, repo_id, **options):
        self.repos.append(repo_id)
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, *, folder_path, **options):
        self.options = options
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return "https://example.org/commit"


def test_push_to_hub_uploads_weights_config_and_card(tmp_path, monkeypatch):
    hub = Uploads()
    monkeypatch.setattr(hub_mixin, "HfApi", hub)
    model = small_model()
    model.extra = {"training": {"seed": 3}}
    url = model.push_to_hub("someone/small", commit_message="first", private=True)
    assert url == "https://example.org/commit"
    assert hub.repos == ["someone/small"]
    assert hub.options["commit_message"] == "first"
    assert sorted(hub.files) == ["README.md", "config.json", "model.safetensors"]
    assert b'VARiant.from_pretrained("someone/small")' in hub.files["README.md"]
    for name, blob in hub.files.items():
        (tmp_path / name).write_bytes(blob)
    again = VARiant.from_pretrained(tmp_path)
    assert again.extra == model.extra
    assert torch.equal(again.generate(1, seed=0).tokens, model.generate(1, seed=0).tokens)


def test_save_pretrained_can_push_in_the_same_call(tmp_path, monkeypatch):
    hub = Uploads()
    monkeypatch.setattr(hub_mixin, "HfApi", hub)
    model = small_model()
    url = model.save_pretrained(tmp_path / "mine", push_to_hub=True, commit_message="m")
    assert url == "https://example.org/commit"
    assert hub.repos == ["mine"]
    assert hub.files["config.json"] == (tmp_path / "mine" / "config.json").read_bytes()
    assert model.save_pretrained(tmp_path / "mine") is None


def test_from_pretrained_passes_on_the_hubs_options(tmp_path, monkeypatch):
    import huggingface_hub

    small_model().save_pretrained(tmp_path / "small")
    request = {}

    def snapshot_download(repo_id, **options):
        request.update(options, repo_id=repo_id)
        return str(tmp_path / "small")

    small_model().save_pretrained(tmp_path / "small" / "a" / "b")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    VARiant.from_pretrained("someone/small", revision="v1", token="t", local_files_only=True)
    assert request["repo_id"] == "someone/small"
    assert (request["revision"], request["token"], request["local_files_only"]) == ("v1", "t", True)
    assert request["allow_patterns"] == [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-*.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "pytorch_model-*.bin",
    ]
    VARiant.from_pretrained("someone/small", subfolder="a/b/.")
    assert request["allow_patterns"][3] == "a/b/model-*.safetensors"


@pytest.mark.parametrize("name", ["from_pretrained", "save_pretrained", "push_to_hub"])
def test_every_option_of_the_hubs_mixin_is_accepted(name):
    ours = inspect.signature(getattr(VARiant, name)).parameters
    theirs = inspect.signature(getattr(PyTorchModelHubMixin, name)).parameters
    has_kwargs = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in ours.values())
    positional = ("self", "pretrained_model_name_or_path", "save_directory", "model_kwargs")
    missing = [key for key in theirs if key not in ours and key not in positional]
    assert not missing or has_kwargs, missing
    assert issubclass(VARiant, PyTorchModelHubMixin)


def test_the_generated_card_is_the_written_one(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path / "small")
    assert str(model.generate_model_card(model_id="small")) == card_of(tmp_path / "small")
