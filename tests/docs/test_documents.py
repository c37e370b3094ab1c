"""The documentation: its size, its links, and every code block and command in it.

Python blocks run as they stand, each on its own, in a folder with small stand-ins for the files
that they name. Shell commands run there too, unless NOT_RUN gives a reason.
"""

import importlib.util
import inspect
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small_model

import variant
import variant_kernels
from benchmarks import docs_results, readme_picture
from variant import VARiant
from variant.cli.main import main
from variant.cli.parser import parse
from variant.schedule_files import save_schedule
from variant_kernels import DepthSchedule

ROOT = Path(__file__).parents[2]
LOOKALIKES = ROOT / "tests" / "integrations"
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

MAX_LINES, MAX_WORDS, MAX_BLOCK_LINES = 160, 1100, 12
MAX_PICTURE_BYTES = 200_000

# Commands that take longer than a minute or change the machine, and the reason. A command is
# looked up by its beginning. Those of `variant` are parsed; of the others the module, the make
# target, the paths and the extras must exist.
NOT_RUN = {
    "torchrun": "needs several GPUs; tests/training/test_distributed.py starts two processes",
    "make": "sets up an environment of its own",
    "pip": "changes the environment",
    "pytest": "takes minutes, or runs the test suite again",
    "python -m pytest": "runs the test suite again",
    "python -m tests.mutation": "takes minutes",
    "python -m benchmarks.dropin": "needs a clone of the original code, takes minutes",
    "python -m benchmarks.gpu": "tests/benchmarks/test_gpu.py runs it",
    "python -m benchmarks.predict --fit": "needs a run on a GPU; test_predict.py runs it",
    "python -m benchmarks.shipped_choices": "rewrites a file of the package",
    "python -m variant.evaluation.digits": "needs a model trained for minutes",
    "python -m variant_kernels.triton_ops.compile_report": "takes minutes",
    "variant train": "takes minutes; a shortened recipe runs below",
    "variant train-vae": "takes minutes; a shortened recipe runs below",
    "variant tokenize": "needs a trained VQ-VAE; tests/training/test_own_images.py runs it",
    "variant convert runs/mine": "needs a trained run; tests/training/test_export.py converts some",
    "variant eval": "needs images and weights; tests/evaluation/test_evaluate.py runs it",
    "variant bench": "takes minutes",
}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language):
    """(id, text) of every fenced block of that language in all documents."""
    parameters = []
    for document in DOCUMENTS:
        for number, (kind, text) in enumerate(FENCE.findall(document.read_text())):
            if kind == language:
                parameters.append(pytest.param(text, id=f"{document.stem}-{number}"))
    return parameters


def commands():
    """Every shell command of all documents, once, as a list of words."""
    lines = [line for block in blocks("bash") for line in block.values[0].splitlines()]
    words = [tuple(shlex.split(line, comments=True)) for line in lines]
    return [pytest.param(w, id=shlex.join(w)) for w in dict.fromkeys(words) if w]


def reason_not_run(words):
    text = shlex.join(words)
    return next((r for start, r in NOT_RUN.items() if f"{text} ".startswith(f"{start} ")), None)


# --- stand-ins ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """The files that the documents name: a clone of VAR, its two files, model folders, images."""
    folder = tmp_path_factory.mktemp("documents")
    package = folder / "VAR" / "models"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from functools import partial\n"
        "import lookalike_var\n"
        "SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)\n"
        "build_vae_var = partial(lookalike_var.build_vae_var, sides=SIDES, num_classes=1000)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(LOOKALIKES))
        spec = importlib.util.spec_from_file_location("clone", package / "__init__.py")
        clone = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(clone)
        vae, var = clone.build_vae_var(device="cpu", depth=16)
    # Convolutions are NaN until a checkpoint is loaded; a real checkpoint has weights.
    state = {key: 0.1 * torch.ones_like(x) if x.isnan().any() else x
             for key, x in vae.state_dict().items()}  # fmt: skip
    torch.save(var.state_dict(), folder / "var_d16.pth")
    torch.save(state, folder / "vae_ch160v4096z32.pth")
    files = folder / "var_d16.pth", folder / "vae_ch160v4096z32.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of assumed settings
        VARiant.from_var_checkpoint(*files).save_pretrained(folder / "models" / "converted")
    small_model().save_pretrained(folder / "runs" / "mine")
    save_schedule(folder / "out/search/schedule.json", DepthSchedule.from_depths([8] * 4 + [4, 2]))
    rng = np.random.default_rng(0)
    for part, count in (("train", 16), ("held_out", 2)):
        for name in ("cat", "dog"):
            target = folder / "images" / part / name
            target.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (72, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{index}.jpg")
    return folder


@pytest.fixture
def folder(stand_ins, tmp_path, monkeypatch):
    """A copy of the stand-ins, with the project's files, as the working folder."""
    here = tmp_path / "documents"
    shutil.copytree(stand_ins, here)
    for name in ("benchmarks", "docs", "examples"):
        (here / name).symlink_to(ROOT / name)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [str(LOOKALIKES), *sys.path])
    yield here
    # A finder of a relative path keeps the folder that was the working folder then.
    sys.modules.pop("models", None)
    sys.path_importer_cache.pop("VAR", None)


# --- size, links, generated parts ---------------------------------------------------------------


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert len(text.split()) <= MAX_WORDS
    for kind, block in FENCE.findall(text):
        assert kind != "python" or len(block.splitlines()) <= MAX_BLOCK_LINES


def anchors(document):
    """The anchors of a document's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda d: d.stem)
def test_relative_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", document.read_text()))
    relative = [link for link in links if "://" not in link]
    for link in relative:
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


GUIDES = [
    document for document in DOCUMENTS if document.stem not in ("results", "study", "benchmarks")
]


@pytest.mark.parametrize("package", [variant, variant_kernels], ids=lambda p: p.__name__)
def test_the_guides_name_every_public_name(package):
    words = set(re.findall(r"\w+", "\n".join(document.read_text() for document in GUIDES)))
    assert set(package.__all__) <= words


@pytest.mark.parametrize(
    "function",
    [VARiant.generate, VARiant.from_pretrained, VARiant.save_pretrained, variant.load_schedule],
    ids=lambda function: function.__name__,
)
def test_the_guide_to_generation_names_every_argument(function):
    text = (ROOT / "docs" / "generation.md").read_text()
    named = set(re.findall(r"`(\w+)[`(=]|\b(\w+)=", text))
    named = {word for words in named for word in words}
    parameters = inspect.signature(function).parameters.values()
    keywords = {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}
    assert keywords - named == set()


def test_generated_text_is_what_the_result_files_give():
    for path, text in docs_results.outputs().items():
        assert path.read_text() == text(), f"{path.name}: run `make docs-results`"


def test_the_readmes_table_shows_the_committed_result():
    path = docs_results.RESULTS / f"{docs_results.GAINS}.json"
    row = next(row for row in json.loads(path.read_text())["rows"] if row["depth"] == 8)
    cells = next(
        line for line in README.read_text().splitlines() if "depth 8" in line and "|" in line
    )
    assert f"{row['ms']['median']:,.0f} ms" in cells
    assert f"{row['kv_allocated_bytes'] / 2**20:.1f} MiB" in cells


def test_every_document_is_linked_from_the_readme():
    text = README.read_text()
    for document in DOCUMENTS[1:]:
        assert f"({document.relative_to(ROOT).as_posix()})" in text


# --- code and commands --------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run_as_they_stand(block, folder):
    exec(compile(block, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("words", commands())
def test_commands_run(words, folder, monkeypatch):
    if reason_not_run(words):
        check_exists(words)
    elif words[0] == "variant":
        if words[1] in ("convert", "search") and "--out" in words:  # they refuse earlier results
            shutil.rmtree(words[words.index("--out") + 1])
        assert main(list(words[1:])) == 0
    else:
        assert words[:2] == ("python", "-m"), words
        monkeypatch.setattr(sys, "argv", list(words[2:]))
        assert not exit_code(words[2])


def exit_code(module):
    """Run a module as ``python -m`` does; 0 and None are success."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code
    return 0


def check_exists(words):
    """Fail unless what a command names exists; run nothing."""
    program, arguments = words[0], [word for word in words[1:] if not word.startswith("-")]
    if program == "variant":
        parse(words[1:])
    elif program == "torchrun":
        assert words[3] == "-m", words
        if words[4] == "variant.cli":
            parse(words[5:])
        else:
            assert words[4] == "variant.training", words
            parse(("train", "--recipe", *words[5:]))
    elif program == "make":
        targets = [word for word in arguments if "=" not in word]
        done = subprocess.run(
            ["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    elif program == "pip":
        extras = re.findall(r"\[(\w+)\]", words[-1])
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(extras) <= set(project["optional-dependencies"])
    else:
        if program == "python":
            assert importlib.util.find_spec(words[2]), words[2]
            arguments = arguments[1:]
        for argument in arguments:
            if argument.endswith(".py") or argument == "benchmarks":
                assert (ROOT / argument).exists(), argument


def test_every_exception_is_needed():
    texts = [shlex.join(command.values[0]) for command in commands()]
    for start in NOT_RUN:
        assert any(f"{text} ".startswith(f"{start} ") for text in texts), start


@pytest.mark.nightly  # tests/training/test_own_images.py trains in CI
def test_the_recipe_for_own_images_trains(folder):
    text = (folder / "examples" / "my_images.toml").read_text()
    for key in ("epochs", "joint", "transition"):
        text = re.sub(rf"^{key} = \d+", f"{key} = 1", text, flags=re.MULTILINE)
    text = re.sub(r"^refinement = \d+", "refinement = 0", text, flags=re.MULTILINE)
    Path("short.toml").write_text(text)
    for command in ("train-vae", "train"):
        assert main([command, "--recipe", "short.toml", "--out", "runs/short"]) == 0
    assert main(["generate", "--model", "runs/short", "--all-depths", "--out", "short.png"]) == 0
    assert Path("short.png").exists()
    documented = re.findall(
        r"`([a-z-]+\.(?:json|jsonl|safetensors|pt|md))`",
        (ROOT / "docs" / "training.md").read_text().split("runs/mine`")[1].split("Both")[0],
    )
    assert documented
    for name in ("config.json", "var-last.pt", "vae-best.safetensors", "var-metrics.jsonl"):
        assert name in documented
    assert {path.name for path in Path("runs/short").iterdir()} >= set(documented)


# --- the picture --------------------------------------------------------------------------------


def test_the_picture_is_small_and_shows_the_measured_depths():
    data = json.loads(docs_results.DIGITS.read_text())
    assert [row["depth"] for row in data["rows"]] == [8, 4, 2]
    path = ROOT / "docs" / "digits.png"
    assert path.stat().st_size < MAX_PICTURE_BYTES
    assert readme_picture.draw(data).size == Image.open(path).size


@pytest.mark.nightly  # the test before compares the committed picture with its data
def test_the_picture_is_measured_anew(tmp_path):
    assert readme_picture.main(["--out", str(tmp_path), "--rounds", "1", "--count", "20"]) == 0
    data = json.loads((tmp_path / "digits.json").read_text())
    committed = json.loads(docs_results.DIGITS.read_text())
    assert data.keys() == committed.keys()
    for row, known in zip(data["rows"], committed["rows"], strict=True):
        assert row.keys() == known.keys()
        assert row["kv_allocated_bytes"] == known["kv_allocated_bytes"]
        assert 0 < row["tokens_ms"]["median"] < 1000
        assert row["classified"] > 0.8
    assert (tmp_path / "digits.png").stat().st_size < MAX_PICTURE_BYTES
