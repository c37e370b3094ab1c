"""Functions of users, which a command or a recipe names as MODULE:FUNCTION.

Their module and their calls run code of which nothing is known: whatever ends it, the message says
which function it was. Imports no torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from variant.errors import UserError
from variant.paths import file_sha256

MAX_REASON = 500  # characters; torch's longest messages fill pages


def named_function(where: str, name: str) -> tuple[ModuleType, Callable[..., Any]]:
    """The module and the function of a name, "MODULE:FUNCTION".

    Modules of the current folder can be named, as with ``python -m``.

    Args:
        where: what names the function, for messages.
    Raises:
        UserError: the module cannot be imported, or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where}: {error}") from None
    # A module that calls sys.exit() would end the command without a word.
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {_reason(error)}") from error
    if not callable(function):
        raise UserError(f"{where}: must name a function; it is {type(function).__name__}")
    return module, function


def module_sha256(module: ModuleType) -> str:
    """SHA-256 of the file of a module, in hexadecimal; "" where it has none."""
    file = getattr(module, "__file__", None)
    return "" if file is None else file_sha256(file)


def called(where: str, function: Callable[..., Any], *arguments: object) -> Any:
    """What the function returns.

    Args:
        where: what names the function, for messages.
    Raises:
        UserError: it raises, or ends the process.
    """
    try:
        return function(*arguments)
    except (Exception, SystemExit) as error:
        raise UserError(f"{where}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    shortened = text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."
    return f"{type(error).__name__}: {shortened}"
