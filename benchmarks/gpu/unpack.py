"""Puts what was compiled beforehand where this machine looks for it. Standard library alone."""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tarfile
from pathlib import Path

MANIFEST, ARCHIVE = "manifest.json", "artefacts.tar.xz"
# Sources of the compiled libraries.
SOURCES = ("csrc", "CMakeLists.txt", "setup.py")


def unpack(artefacts: Path, triton: Path, root: Path) -> list[str]:
    """Unpack the libraries into ``root`` and the Triton cache into ``triton``; returns notes.

    Libraries of other sources or of another Python are left out, and the notes say so.
    """
    try:
        manifest = json.loads((artefacts / MANIFEST).read_text())
        archive = tarfile.open(artefacts / ARCHIVE)
    except (OSError, ValueError, tarfile.TarError) as error:
        return [f"no artefacts: {error}"]
    notes, libraries = [], True
    for name, here in (
        ("soabi", sysconfig.get_config_var("SOABI")),
        ("sources", digest_of_sources(root)),
    ):
        if manifest[name] != here:
            libraries = False
            notes.append(f"artefacts: {name} is {here}; the libraries are of {manifest[name]}")
    count = 0
    with archive:
        for member in archive:
            top, _, rest = member.name.partition("/")
            if top == "triton":
                folder, member.name = triton, rest
                count += member.name.endswith(".cubin")
            elif top == "libraries" and libraries:
                folder, member.name = root / "variant_kernels", rest
            else:
                continue
            if member.isfile() and rest:
                archive.extract(member, folder, filter="data")
    if libraries:
        notes.append("artefacts: the libraries are in place")
    notes.append(f"artefacts: {count} Triton kernels of Triton {manifest['triton']}")
    return notes


def extension_is_missing(root: Path) -> bool:
    """Whether this Python has no compiled extension in the checkout."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return not (root / "variant_kernels" / f"_C{suffix}").exists()


def digest_of_sources(root: Path) -> str:
    """A digest of everything that the libraries are compiled from."""
    digest = hashlib.sha256()
    for top in SOURCES:
        path = root / top
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "tests" not in file.relative_to(root).parts:
                digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
