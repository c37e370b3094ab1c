"""The command line as a whole: help, version, wrong usage, errors and warnings of one line."""

import ast
import dataclasses
import errno
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import get_args

import pytest
import torch
from golden_models import load_golden
from small_models import small_model

import variant
from variant.cli import announce, messages
from variant.cli import main as module
from variant.cli.main import main
from variant.cli.options import (
    Bench,
    Command,
    Eval,
    Generate,
    Plan,
    Tokenize,
    Train,
    TrainVae,
)
from variant.cli.output import console
from variant.cli.parser import parse
from variant.cli.tokenize import train_command
from variant.cli.words import command_line
from variant.errors import UserError
from variant.files import atomic_write
from variant.models.depths import layers_of
from variant.training.recipe import load_recipe

COMMANDS = [
    "generate",
    "plan",
    "train",
    "train-vae",
    "recipe",
    "bench",
    "convert",
    "info",
    "warm",
    "search",
]


def process(*words, **options):
    """A finished process of the command line; its streams are text unless given."""
    options = {"capture_output": True, **options}
    return subprocess.run(
        [sys.executable, "-m", "variant.cli", *map(str, words)],
        text=True, timeout=120, check=False, **options,
    )  # fmt: skip


def test_convert_works_in_both_directions(tmp_path, run):
    golden = load_golden("shared_aln")
    var, vae, folder = tmp_path / "var.pth", tmp_path / "vae.pth", tmp_path / "folder"
    torch.save(golden.var_state, var)
    torch.save(golden.vae_state, vae)
    assert run("convert", "--var", var, "--vae", vae, "--out", folder)[0] == 0
    back = tmp_path / "var2.pth", tmp_path / "vae2.pth"
    code, printed, _ = run("convert", "--model", folder, "--to-var", back[0], "--to-vae", back[1])
    assert code == 0
    assert "which the original VAR code loads" in printed
    for path, state in zip(back, (golden.var_state, golden.vae_state), strict=True):
        written = torch.load(path, weights_only=True)
        assert written.keys() == state.keys()
        assert all(torch.equal(written[key], state[key]) for key in state)


# --- help, version, usage -----------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples_and_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert re.search(rf"^Example: variant {command} ", text, re.MULTILINE)
    assert len(re.findall(r"Example: ", text)) == len(re.findall(r"^Example: ", text, re.MULTILINE))
    assert "--debug " in text
    assert not re.search(r"None|default: \)|default: ''|\{\[", text)


def test_no_words_print_the_help(capsys):
    texts = []
    for words in ([], ["--help"], ["-h"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert all(command in texts[0] for command in COMMANDS)
    assert "--tyro-print-completion bash" in texts[0]


def test_the_version_is_printed(run):
    for word in ("--version", "-V"):
        assert run(word)[:2] == (0, f"variant {variant.__version__}\n")


def test_the_completion_script_is_printed():
    done = process("--tyro-print-completion", "bash")
    assert done.returncode == 0
    assert "complete" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate --colour red", "generate: unrecognized options: --colour, red"),
        ("generate --depht 2", "perhaps you meant --depth"),
        # Of its own options.
        ("info --depht 2", "info: unrecognized options: --depht, 2; see variant info --help"),
        ("bench --depth 2", "--depth, 2; perhaps you meant --depths; see variant bench --help"),
        ("--tyro-print-completion foo", "--tyro-print-completion must be one of bash, zsh, tcsh"),
        ("plan --depths 2", "unrecognized options: --depths, 2; see variant plan"),
        ("convert --patch-nums x", "--patch-nums must be integers; got x"),
        ("generate --cfg abc", "generate: --cfg must be a number; got abc; see variant generate"),
        ("generate --depth 1.5", "--depth must be an integer; got 1.5"),
        ("generate --depth None", "--depth must be an integer; got None"),
        ("generate --dtype int8", "--dtype must be one of bfloat16, float16, float32; got int8"),
        ("bench --dtype int8", "--dtype must be one of bfloat16, float16, float32; got int8"),
        ("generate --cfg", "--cfg needs a value"),
        ("generate --labels 3 --labels 4", "--labels is given twice"),
        ("generate --top-k 3 --top_k=4", "--top-k is given twice"),
        ("plan --guidance --no-guidance", "--no-guidance is given twice"),
        ("plan extra", "plan: unrecognized options: extra"),
        ("paint", "paint: no such command; commands: generate, plan, train, train-vae, recipe"),
        ("recipe", "recipe: needs one of new, show, check; see variant recipe --help"),
        ("recipe paint digits", "recipe: needs one of new, show, check; got paint; see variant"),
        ("train --optim.clip", "train: --optim.clip needs a value"),
        ("train --optim.clip 1 --optim.clip=2", "--optim.clip is given twice"),
        ("train --optim.clip 1 --depht 2", "train: unrecognized options: --depht, 2"),
        ("generate --optim.clip 1", "generate: unrecognized options: --optim.clip, 1"),
        ("--model digits", "the command comes before --model"),
        ("generate --out=", "generate: --out must not be empty"),
        (
            "generate --labels 1 --out - --json -",
            "generate: --out must not be -; only --json writes",
        ),
        ("sample --out=-", "sample: --out must not be -; only --json writes to standard output (a"),
        (
            "train --recipe -",
            "train: --recipe must not be -; only --json writes to standard output",
        ),
        ("generate --labels", "generate: --labels needs a value"),
        ("warm --batch --device cpu", "warm: --batch needs a value"),
        ("convert --patch-nums --out x", "convert: --patch-nums needs a value"),
        ("convert --patch-nums 1,2", "convert: --patch-nums must be integers; got 1,2"),
        ("generate --more-smooth=true", "generate: --more-smooth takes no value; got true"),
        ("generate --resume no --depth 2", "generate: --resume takes no value; got no"),
        ("plan --no-guidance=True", "plan: --no-guidance takes no value; got True"),
        ("recipe show digits --seed 5", "recipe: unrecognized options: --seed, 5; see variant"),
        ("-v", "the command comes before -v; commands: generate, plan"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_with_2(words, message, run):
    code, printed, error = run(*words.split())
    assert (code, printed) == (2, "")
    assert error.startswith("variant: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not set("│╭╰─") & set(error)


@pytest.mark.parametrize("separator", ["\n", "\r", "\u2028", "\x0b", "\x1b[2J"])
@pytest.mark.parametrize("words", [("plan", "--kv-dtype"), ("train", "--seed"), ("generate", "x")])
def test_wrong_usage_with_line_breaks_is_one_line(words, separator, run):
    code, printed, error = run(*words, f"a{separator}b")
    assert (code, printed) == (2, "")
    assert len(error.splitlines()) == 1
    assert error.rstrip("\n").isprintable()


def examples():
    text = "\n".join(kind.__doc__ for kind in get_args(Command))
    # An example ends at an empty line; a long one goes on in the next line.
    return [
        " ".join(found.split()) for found in re.findall(r"Example: (variant .+?)\n *\n", text, re.S)
    ]


@pytest.mark.parametrize("line", examples())
def test_the_examples_of_the_help_are_commands(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = parse(shlex.split(line)[1:])
    if isinstance(command, Train | TrainVae | Tokenize):
        recipe = load_recipe(command.recipe, overrides=command.overrides)
        assert not (isinstance(command, Tokenize) and recipe.data.copies)


def test_the_command_after_tokenize_trains_the_same_recipe():
    command = Tokenize(
        recipe="digits", vae=Path("my run"), seed=3, overrides=("data.copies=0", "data.mixup=0.2")
    )
    line = train_command(command, Path("t"))
    train = parse(shlex.split(line)[1:])
    assert (train.out, train.seed) == (Path("my run"), 3)
    recipe = load_recipe(train.recipe, overrides=train.overrides)
    assert (recipe.data.kind, recipe.data.tokens, recipe.data.mixup) == ("tokens", "t", 0.2)


@pytest.mark.parametrize("word", ["--version", "--help", "plan"])
def test_a_reader_that_has_gone_is_one_line(word):
    read, write = os.pipe()
    os.close(read)
    # Unbuffered, as in many containers: the first write fails, and not the last flush.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    done = process(word, capture_output=False, stdout=write, stderr=subprocess.PIPE,
                   env=environment)  # fmt: skip
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == "variant: error: standard output: Broken pipe\n"


def test_a_file_in_place_of_a_folder_is_said(tmp_path, model, run):
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "x"):
        for command in ("train", "train-vae"):
            code, _, error = run(command, "--recipe", "digits", "--out", path)
            assert code == 1
            assert f"{path}: cannot be written: is no folder" in error
    message = r"file/x\.json: cannot be written: .*file is no folder"
    with pytest.raises(UserError, match=message), atomic_write(file / "x.json"):
        pass


def test_the_home_folder_is_put_in_place_of_a_tilde(tmp_path, run, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))  # bash leaves the tilde in --json=~/a.json
    assert run("plan", "--model", "digits", "--json=~/a.json")[0] == 0
    assert (tmp_path / "a.json").is_file()
    assert not any((tmp_path / "here").iterdir())
    assert f"{tmp_path}/nothing: no such model" in run("info", "--model", "~/nothing")[2]
    assert parse(["eval", "--compare", "~/a", "~b", "--features", "~"]) == Eval(
        compare=(tmp_path / "a", Path("~b")), features="~"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("info --images 5", "info: --images is for --kv-dtype fp8"),
        ("info --dtype float16", "info: --dtype is for --kv-dtype fp8"),
        ("plan --train --bridge 2", "plan: --bridge is excluded by --train"),
        ("plan --train --kv-dtype fp8", "plan: --kv-dtype is excluded by --train"),
        ("plan --train --no-guidance", "plan: --no-guidance is excluded by --train"),
        ("eval --images a --reference b --num 5", "eval: --num is for --model MODEL"),
        ("eval --images a --reference b --kv-dtypes fp8", "eval: --kv-dtypes is for --model MODEL"),
        ("eval --model digits --reference b --paired", "eval: --paired is for --images"),
        ("eval --compare a b --reference c", "eval: --reference is excluded by --compare"),
        ("eval --images a --reference b --features m:f --weights w",
         "eval: --weights is not for --features m:f"),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(words, message, run):
    code, _, error = run(*words.split())
    error = error.removeprefix("eval: comparing a and b\n")  # the first line of that command
    assert (code, error) == (1, f"variant: error: {message}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate --schedule 9x6", "generate: --schedule 9x6: depth must be an integer in [2, 8]"),
        ("sample --schedule 8x2", "sample: --schedule 8x2: must have one depth for each of the 6"),
        ("plan --model digits --schedule x", "plan: --schedule x: no such file; give a file"),
        ("eval --model digits --reference digits --features builtins:len --schedules 9x6",
         "eval: --schedules 9x6: depth must be an integer in [2, 8]"),
        ("eval --images . --reference digits --features no",
         "eval: --features must be one of inception, dinov2, classifier:RECIPE"),
        ("eval --reconstruct digits --reference digits --features classifier:",
         "eval: --features classifier:RECIPE needs a recipe"),
        ("eval --reconstruct digits --reference digits --features os:listdir",
         "eval: --features os:listdir: TypeError: "),
        ("generate --labels cat", "generate: --labels must be numbers, as this model has no class"),
        ("sample --labels 1 cat", "sample: --labels must be numbers, as this model has no class"),
        ("search --batch 5000", "search: --batch must be an integer in [1, 4096]; got 5000"),
    ],
)  # fmt: skip
def test_errors_name_the_command_and_its_option(words, message, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(*words.split())
    assert code == 1
    assert error.startswith(f"variant: error: {message}"), error
    assert error.count("\n") == 1
    assert "--debug shows where" not in error
    assert not any(tmp_path.iterdir())


def test_empty_words_are_refused(run):
    for words in (("generate", "--out", ""), ("info", "--model", ""), ("plan", "")):
        code, _, error = run(*words)
        assert code == 2
        assert "must not be empty" in error
        assert error.count("\n") == 1


def test_help_does_not_import_torch():
    script = "import sys; import variant.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_all_public_names_can_be_imported():
    assert all(getattr(variant, name).__name__ == name for name in variant.__all__)
    assert set(variant.__all__) <= set(dir(variant))


def test_a_command_can_be_printed():
    assert command_line("generate", Generate()) == "variant generate"
    command = Generate(labels=(3, 1), depth=2, out="my out", overwrite=True)
    assert command_line("generate", command, resume=True, overwrite=False) == (
        "variant generate --labels 3 1 --depth 2 --out 'my out' --resume"
    )
    assert command_line("plan", Plan(guidance=False)) == "variant plan --no-guidance"


# --- errors -------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_writes_nothing(model, tmp_path, run):
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    command = ("generate", "--model", model, "--out", out)
    for words, message in (
        ((*command, "--labels", 6), r"generate: --labels must be .*; got 6"),
        ((*command, "--labels", 1, "x"), r"--labels must be numbers, as .* no class names; got"),
        ((*command, "--depth", 9), r"generate: --depth must be an integer in \[2, 4\] .*; got 9"),
        ((*command, "--depth", 2, "--bridge", 7), r"--bridge must be an integer in .*; got 7"),
        ((*command, "--count", 0), r"--count must be an integer in \[1, 100000000\]; got 0"),
        ((*command, "--cfg", -1), r"generate: --cfg must be .*\[0, 10000\].*; got -1"),
        ((*command, "--bridge", 99), r"generate: --bridge must be an integer in \[0, 3\]; got 99"),
        (("plan", "--memory", "nan"), "--memory must be above 0 and at most"),
        (
            ("convert", "--model", model, "--to-var", "x.pth", "--to-vae", "x.pth"),
            "must be two files",
        ),
        ((*command, "--top-p", 2), r"generate: --top-p must be .*\[0, 1\].*; got 2"),
        ((*command, "--depth", 2, "--all-depths"), "exclude each other"),
        (("generate", "--model", tmp_path / "none"), "none: no such model"),
        (("generate", "--model", model, "--out", tmp_path / "x.jpg"), "folder or end in .png"),
        (("generate", "--model", model, "--out", tmp_path / "file" / "x"), "cannot be written"),
        (("plan", "--model", "var-d31"), "var-d31: no such model"),
        (("plan", "--batch", 0), "plan: --batch must be an integer"),
        (("plan", "--bridge", 11), r"plan: --bridge must be an integer in \[0, 10\]; got 11"),
        (("plan", "--page-size", 0), "plan: --page-size must be an integer"),
        (("info", "--model", tmp_path), "has no config.json"),
        (("convert", "--var", "a", "--vae", "b"), "give --out FOLDER, or --to-var and --to-vae"),
        (("train", "--recipe", "nonsense"), "nonsense: no such recipe"),
    ):
        code, printed, error = run(*words)
        assert code == 1, words
        assert re.search(message, error), (words, error)
        assert error.startswith("variant: error: ")
        assert error.count("\n") == 1, error
        assert "Traceback" not in error + printed
    assert not out.exists()


def test_debug_shows_the_traceback(model, run):
    for words in (("generate", "--model", model, "--labels", 9, "--debug"),):
        code, _, error = run(*words)
        assert code == 1
        assert "Traceback" in error


def test_messages_name_the_option_and_the_command():
    for command, text, expected in (
        ("generate", "select_layers: depth must be 2", "generate: --depth must be 2"),
        ("generate", "VAR.schedule: bridge must be given", "generate: --bridge must be given"),
        ("plan", "CachePlan: page_size must be 1", "plan: --page-size must be 1"),
        ("bench", "select_layers: depth must be 2", "bench: --depths must be 2"),
        ("generate", "depth must be one of 2", "generate: --depth must be one of 2"),
        ("generate", "CachePlan: page_size must be 1", "CachePlan: page_size must be 1"),
        ("train", "a.toml: model.depth must be 3", "a.toml: model.depth must be 3"),
        ("train-vae", "recipe: seed must be 3", "train-vae: --seed must be 3"),
        ("train", "a.toml: seed must be 3", "a.toml: seed must be 3"),
    ):
        assert messages.in_words(text, command) == expected


def test_values_of_a_message_are_in_the_words_of_the_command_line(monkeypatch):
    monkeypatch.delenv("VARIANT_BACKEND", raising=False)
    unfit = 'adaln_modulate: backend "cpu" cannot run this call: the dtype. Use backend="auto"'
    for command, text, expected in (
        ("generate", "(top_k=1 draws the likeliest); got 0.0",
         "(--top-k 1 draws the likeliest); got 0.0"),
        ("generate", "Engine: backend must be one of 'auto', 'cpu'; got 'a b' (str)",
         "generate: --backend must be one of auto, cpu; got 'a b'"),
        ("convert", "convert: patch_nums must be ascending; got (1, 1) (tuple)",
         "convert: --patch-nums must be ascending; got 1 1"),
        ("generate", "Engine: no native products. dtype=torch.float32 is at least as fast",
         "generate: no native products. --dtype float32 is at least as fast"),
        ("generate", "m: unexpected keys: a; strict=False leaves them out",
         "m: unexpected keys: a; in Python, strict=False leaves them out"),
        ("generate", "resume=True, overwrite=False, depth=None, kv_dtype='fp8', other=True",
         "--resume, --no-overwrite, no --depth, --kv-dtype fp8, other=True"),
        ("generate", "out/depth=8: cannot be read", "out/depth=8: cannot be read"),
        ("search", "search: --budget needs a value, as kv=0.5",
         "search: --budget needs a value, as kv=0.5"),
        ("tokenize", "digits: load_recipe: seed must be 3", "tokenize: --seed must be 3"),
        ("generate", unfit,
         "generate: --backend cpu cannot run adaln_modulate: the dtype. Give --backend auto"),
        ("plan", unfit, unfit),
    ):  # fmt: skip
        assert messages.in_words(text, command) == expected
    monkeypatch.setenv("VARIANT_BACKEND", "cpu")
    for command in ("generate", "plan"):
        assert messages.in_words(unfit, command) == (
            f"{command}: VARIANT_BACKEND=cpu cannot run adaln_modulate: the dtype. Unset "
            "VARIANT_BACKEND"
        )


# No command reaches these messages.
OF_PYTHON_ALONE = {"the engine must keep exact K/V (kv_dtype=None)"}


def test_every_argument_in_a_message_has_words_of_the_command_line():
    found, own = [], Path(messages.__file__).parent
    for path in sorted(own.parent.rglob("*.py")):
        text = path.read_text()
        if own in path.parents or not re.search(
            r"\"[^\"\n]*[a-z]=(True|False|None|torch\.|\d)[^\"\n]*\"", text
        ):
            continue
        parents = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        given = [arg for call in parents for arg in (*call.args, *call.keywords)]
        for arg in given:
            value = arg.value if isinstance(arg, ast.keyword) else arg
            parts = value.values if isinstance(value, ast.JoinedStr) else [value]
            found += [part.value for part in parts if isinstance(part, ast.Constant)]
    found = [text for text in found if isinstance(text, str) and messages.KEYWORD.search(text)]
    assert any("top_k=1" in text for text in found), "the messages are elsewhere"
    left = {
        text
        for text in found
        if messages.KEYWORD.search(messages.in_words(text, "generate").replace("in Python,", ""))
        and not any(known in text for known in OF_PYTHON_ALONE)
        and "in Python, strict=False" not in messages.in_words(text, "generate")
    }
    assert left == set()


@pytest.mark.parametrize("command", ["generate", "eval", "warm"])
def test_messages_of_a_depth_propose_no_list_of_layers(command):
    config = small_model().var.config
    remedies = {
        "generate": "; a file as --schedule runs other layers untrained",
        "eval": "; a file as --schedules runs other layers untrained",
    }
    option = "--depth" if command == "generate" else "--depths"
    for depth, expected in (
        (99, "must be an integer in [2, 4] (a number of layers); got 99"),
        (1, "must be an integer in [2, 4] (a number of layers); got 1"),
    ):
        with pytest.raises(ValueError, match="or a list of layers") as caught:
            layers_of(config, depth, "VAR.schedule")
        text = messages.in_words(str(caught.value), command)
        assert text == f"{command}: {option} {expected}"
    config = dataclasses.replace(config, subnets={2: (0, 3)})
    with pytest.raises(ValueError, match="A list of layers") as caught:
        layers_of(config, 3, "VAR.schedule")
    text = messages.in_words(str(caught.value), command)
    expected = "must be one that the model was trained at (2 or 4); got 3"
    assert text == f"{command}: {option} {expected}{remedies.get(command, '')}"


def test_a_rank_silences_only_commands_whose_work_processes_share(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as clusters set it for all that runs on a machine
    code, printed, _ = run("plan", "--model", "digits")
    assert code == 0
    assert "K/V cache of digits" in printed
    assert run("recipe", "check", "digits")[1].startswith("recipe: checking digits\n")
    for command in ("sample", "tokenize", "train", "train-vae"):
        assert console(command=command).quiet
    monkeypatch.setenv("RANK", "0")
    assert not console(command="train").quiet


def test_any_error_becomes_one_printable_line():
    text = messages.one_line(ValueError("a\nb\x1b[31m\udcff"), "plan")
    assert text == "a b\\x1b[31m\\udcff"
    assert messages.one_line(KeyError("x"), "plan") == "KeyError: 'x' (--debug shows where)"
    assert messages.one_line(OSError(36, "File name too long", "abc"), "plan") == (
        "abc: File name too long"
    )
    for number, place in {
        errno.ENOSPC: "standard output",
        errno.ENOENT: "the current folder",
        errno.EADDRINUSE: "plan",
        errno.ENOMEM: "plan",
    }.items():
        error = OSError(number, os.strerror(number))
        assert messages.one_line(error, "plan") == f"{place}: {os.strerror(number)}"
    assert len(messages.one_line(UserError("x" * 10**6), "plan")) < 3000
    for error in (MemoryError(), RuntimeError("could not create a primitive")):
        assert messages.one_line(error, "plan") == (
            "plan: this machine has too little memory for it"
        )


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (MemoryError(), "this machine"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "this machine"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "the GPU"),
    ],
)
def test_an_error_of_memory_says_for_what_it_was_asked(error, where):
    with pytest.raises(MemoryError) as caught, messages.memory_for("training of r.toml", "do less"):
        raise error
    assert messages.one_line(caught.value, "train") == (
        f"training of r.toml: {where} has too little memory for it; do less"
    )
    for other in (MemoryError("image 3 does not fit"), RuntimeError("another"), KeyError("k")):
        with pytest.raises(type(other)) as caught, messages.memory_for("x", "y"):
            raise other
        assert caught.value is other


def test_warnings_of_libraries_are_one_line(run, monkeypatch):
    def warn(command):
        warnings.warn("first\n  second", RuntimeWarning, stacklevel=1)
        warnings.warn("third batch=1", stacklevel=1)

    monkeypatch.setattr(module, "function_of", lambda command: warn)
    before = warnings.showwarning
    with warnings.catch_warnings(), messages.one_line_warnings("plan"):
        warnings.simplefilter("always")
        code, _, error = run("plan")
    assert code == 0
    assert error == "variant: warning: first second\nvariant: warning: third --batch 1\n"
    assert warnings.showwarning is before


def test_an_interrupt_that_a_library_turned_into_its_own_error_is_one(run, monkeypatch):
    def work(command):
        raise ImportError("numpy failed to import")

    monkeypatch.setattr(module, "function_of", lambda command: work)
    assert run("plan")[0] == 1
    monkeypatch.setattr("variant.cli.signals._received", [15])
    code, _, error = run("plan")
    assert (code, error) == (143, "variant: stopped.\n")


# --- first line, streams ------------------------------------------------------------------------


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "plan"])
def test_the_first_line_comes_before_torch(command):
    script = (
        "import sys\n"
        "from variant.cli import main\n"
        "def function_of(command):\n"
        "    sys.stdout.flush()\n"
        "    sys.exit('torch' in sys.modules)\n"
        "main.function_of = function_of\n"
        "main.main(sys.argv[1:])\n"
    )
    words = {"convert": ["--var", "a", "--vae", "b", "--out", "c"], "recipe": ["check", "a"]}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, command, *words.get(command, ())],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{command}: ")
    assert done.stdout.count("\n") == 1
    assert time.monotonic() - begun < 20  # 0.3 s on an idle core


def test_the_first_line_says_what_is_about_to_happen():
    assert announce.first_line(Generate(depth=2, device="cuda")) == (
        "generate: digits, depth 2, dtype of the weights, cuda, to out"
    )
    assert announce.first_line(Bench(dtype=("float32", "bfloat16"))) == (
        "bench: digits, batch 1, 8, float32, bfloat16, cpu, 5 rounds"
    )
    for source in ("images", "model", "reconstruct"):
        assert announce.first_line(Eval(**{source: "a"}, reference="b")) == (
            "eval: a against b, features of inception, cpu"
        )
    assert announce.first_line(Eval()) == announce.first_line(Eval(model="a")) == ""


def test_a_terminal_of_ascii_only(model, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    words = ("generate", "--model", model, "--labels", 1, "--out", tmp_path / "ü図")
    done = process(*words, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "ü図" / "00000_class1.png").exists()
    assert done.stdout.isascii()
    done = process("plan", "--model", "ü図", env=environment)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.isascii()


def test_a_closed_or_full_standard_output_is_one_line():
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, os.fdopen(writer, "w") as closed:
        for target, words in ((full, ()), (closed, ()), (full, ("--json", "-"))):
            done = process("plan", *words, stdout=target, stderr=subprocess.PIPE,
                           capture_output=False)  # fmt: skip
            assert done.returncode == 1
            assert done.stderr.startswith("variant: error: standard output: ")
            assert done.stderr.count("\n") == 1
        done = process("plan", "--batch", 0, stderr=full, stdout=subprocess.PIPE,
                       capture_output=False)  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")


def test_streams_may_be_missing():
    script = f"exec {sys.executable} -m variant.cli plan >&- 2>&-"
    assert subprocess.run(["sh", "-c", script], check=False).returncode == 0


def test_the_process_prints_warnings_as_one_line(tmp_path):
    golden = load_golden("plain")
    torch.save(golden.var_state, tmp_path / "var.pth")
    torch.save(golden.vae_state, tmp_path / "vae.pth")
    words = ("--var", tmp_path / "var.pth", "--vae", tmp_path / "vae.pth", "--out", tmp_path / "o")
    done = process("convert", *words)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.startswith("variant: warning: ") for line in lines)


def test_help_does_not_follow_a_terminal_of_five_columns(run, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "5")
    with pytest.raises(SystemExit) as stop:
        run("warm", "--help")
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert "Images per batch; one or more sizes." in printed
    assert os.environ["COLUMNS"] == "5"


@pytest.mark.parametrize("words", ["recipe show a", "recipe new --data a", "eval --compare a b"])
def test_where_the_result_stands_alone_the_first_line_is_on_standard_error(words, capsys):
    announce.announce(parse(words.split()))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"{words.split()[0]}: ")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("convert runs/mine --out models/mine", "convert: reading runs/mine"),
        ("generate --depth 0", "generate: digits, depth 0, dtype of the weights, cpu, to out"),
        ("sample --depth 0", "sample: digits, depth 0, cpu, to samples"),
        ("generate", "generate: digits, full depth, dtype of the weights, cpu, to out"),
        ("recipe check", ""),
        ("recipe check digits", "recipe: checking digits"),
        ("recipe show digits", "recipe: reading digits"),
        ("recipe new --data a", "recipe: reading a"),
        ("recipe new --data a --out b", "recipe: reading a, to b"),
        ("recipe new", ""),
        ("eval --compare a b", "eval: comparing a and b"),
    ],
)
def test_the_first_line_says_what_was_given(words, line):
    assert announce.first_line(parse(words.split())) == line


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no current folder")
def test_a_removed_current_folder_is_named(model, tmp_path, run, monkeypatch):
    # torch's library of products ends the process there: "Cannot load libtorch_cpu.so".
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for words in (("plan", "--model", model), ("generate", "--model", model, "--out", tmp_path)):
        expected = "variant: error: the current folder was removed; change to another one\n"
        assert run(*words) == (1, "", expected)
