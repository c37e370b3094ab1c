"""Fixtures of all commands: a small model, and the command line within this process."""

import pytest
from small_models import small_model

from variant.cli.main import main


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder with a model of 4 layers, subnets of 3 and 2, 5 classes, 3 scales."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    small_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(capsys):
    """``run(*words)`` -> (exit code, standard output, standard error)."""

    def run_words(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_words
