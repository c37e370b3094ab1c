"""A checksum of a whole file that ``torch.save`` wrote, kept in the comment of its zip archive.

The CRCs of a zip archive cover the contents of its members only. This SHA-256 covers every byte
before the comment, so that any changed byte is found.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import BinaryIO

from variant.errors import UserError
from variant.paths import open_regular

MARK = b"variant-sha256:"
COMMENT_SIZE = len(MARK) + 64
# The last field of a zip archive is the comment, the one before it the comment's length.
LENGTH = struct.pack("<H", COMMENT_SIZE)
TAIL_SIZE = len(LENGTH) + COMMENT_SIZE
CHUNK = 2**20


def append_checksum(path: Path) -> None:
    """Write the checksum into a new archive.

    Raises:
        ValueError: the archive has a comment already.
        OSError: the file cannot be written.
    """
    with path.open("r+b") as file:
        file.seek(-len(LENGTH), os.SEEK_END)
        size = file.tell()
        if file.read() != b"\0\0":
            raise ValueError(f"append_checksum: {path} must be a zip archive without a comment")
        digest = _sha256(file, size)
        file.seek(size)
        file.write(LENGTH + MARK + digest)


def check_checksum(path: Path) -> None:
    """Compare the file with its checksum.

    Raises:
        UserError: they differ, there is none, or the file is missing or no regular one.
    """
    try:
        with open_regular(path) as file:
            size = file.seek(0, os.SEEK_END) - TAIL_SIZE
            file.seek(max(size, 0))
            tail = file.read()
            digest = tail.removeprefix(LENGTH + MARK)
            found = None if digest == tail else _sha256(file, size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if found is None:
        raise UserError(
            f"{path}: is damaged, or is not a checkpoint of this program: no checksum is at its end"
        )
    if found != digest:
        raise UserError(
            f"{path}: is damaged: its bytes do not give the checksum at its end; use a copy of the "
            "file, or train anew in another folder"
        )


def _sha256(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the first bytes of a file, as hexadecimal digits."""
    sha256 = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, CHUNK))):
        sha256.update(chunk)
        size -= len(chunk)
    return sha256.hexdigest().encode()
