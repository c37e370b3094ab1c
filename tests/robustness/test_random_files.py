"""Damaged and hostile files and command lines; and the outcomes that must be found wrong."""

import random

import pytest

from tests.robustness import hostile_contents, hostile_files
from tests.robustness.command import part, run_generator
from tests.robustness.forked import Failed, option

FILES = option("FILES", 240)


@pytest.mark.timeout(10_000)
@pytest.mark.parametrize("index", range(2))
def test_hostile_files_end_with_one_line(index):
    run_generator("hostile_files", *part(FILES, index, 2))


CASE = hostile_files.Hostile("info of a file", ["info"], ("config.json",))


@pytest.mark.parametrize(
    ("code", "errors", "text"),
    [
        (1, "variant: error: config.json: no\nvariant: error: again", "2 lines"),
        (1, "a library says\nvariant: error: config.json: no", "2 lines"),
        (1, "", "0 lines"),
        (1, "config.json: no", "1 lines"),
        (1, "variant: error: no such file", "does not name the file"),
        (1, "variant: error: KeyError: config.json (--debug shows where)", "not foreseen"),
        (1, "Traceback (most recent call last):\n  File", "a traceback"),
        (3, "", "exit code 3"),
        (-11, "", "exit code -11"),
    ],
)
def test_a_wrong_outcome_is_found(code, errors, text):
    with pytest.raises(Failed, match=text):
        hostile_files._check_outcome(CASE, code, errors)


@pytest.mark.parametrize(
    ("code", "errors"),
    [
        (0, "whatever a command that succeeds prints"),
        (1, "variant: error: config.json: is damaged"),
        (1, "variant: warning: old torch\nvariant: error: config.json: is damaged"),
        (2, "variant: error: info: --images must be an integer"),
    ],
)
def test_a_right_outcome_holds(code, errors):
    hostile_files._check_outcome(CASE, code, errors)


def test_every_option_of_every_command_is_spoilt(tmp_path):
    rng = random.Random(0)
    seen = {"generate": set(), "convert": set(), "train": set()}
    for _ in range(4000):
        command, *words = hostile_contents.command_line(rng, tmp_path, tmp_path)
        if command in seen:
            seen[command] |= {word[2:] for word in words if word.startswith("--")}
    for command, words in seen.items():
        assert words >= set(hostile_contents.options_of(command)), command


def test_code_of_a_pickle_would_be_noticed(tmp_path):
    import pickle

    pickled = hostile_contents._Runs(exec, f"open({str(tmp_path / 'marker')!r}, 'w').close()")
    pickle.loads(pickle.dumps(pickled))
    assert (tmp_path / "marker").exists()
