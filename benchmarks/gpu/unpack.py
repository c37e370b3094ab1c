"""Puts what was compiled beforehand where this machine looks for it. Standard library alone."""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

MANIFEST, ARCHIVE = "manifest.json", "artefacts.tar.xz"
# Sources of the compiled libraries.
SOURCES = ("csrc", "CMakeLists.txt", "setup.py")


def unpack(artefacts: Path, triton: Path, root: Path) -> list[str]:
    """Unpack the libraries into ``root`` and the Triton cache into ``triton``; returns notes.

    Libraries of other sources or of another Python are left out, and the notes say so.
    """
    try:
        manifest = json.loads((artefacts / MANIFEST).read_text())
        with tarfile.open(artefacts / ARCHIVE) as archive:
            return _unpack(manifest, archive, triton, root)
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        return [f"no artefacts: {type(error).__name__}: {error}"]


def _unpack(
    manifest: dict[str, Any], archive: tarfile.TarFile, triton: Path, root: Path
) -> list[str]:
    notes, libraries = [], True
    for name, here in (
        ("soabi", sysconfig.get_config_var("SOABI")),
        ("sources", digest_of_sources(root)),
    ):
        if manifest[name] != here:
            libraries = False
            notes.append(f"artefacts: {name} here: {here}; of the libraries: {manifest[name]}")
    renamed, note = _folders(manifest)
    notes.append(note)
    count = 0
    for member in archive:
        top, _, rest = member.name.partition("/")
        if top == "triton":
            key, _, name = rest.partition("/")
            folder, member.name = triton, f"{renamed.get(key, key)}/{name}"
            count += name.endswith(".cubin")
        elif top == "libraries" and libraries:
            folder, member.name = root / "variant_kernels", rest
        else:
            continue
        if member.isfile():
            archive.extract(member, folder, filter="data")
    # A group lists the files of an entry by their paths where it was compiled.
    for path in triton.glob("*/__grp__*.json"):
        group = json.loads(path.read_text())
        group["child_paths"] = {name: str(path.parent / name) for name in group["child_paths"]}
        path.write_text(json.dumps(group))
    if libraries:
        notes.append("artefacts: the libraries are in place")
    notes.append(f"artefacts: {count} Triton kernels")
    return notes


def _folders(manifest: dict[str, Any]) -> tuple[dict[str, str], str]:
    """New names of the entries, where this is another build of the same version of Triton."""
    try:
        import triton
        from triton.runtime.cache import _base32, triton_key
    except ImportError as error:
        return {}, f"artefacts: Triton's cache: {error}"
    if triton.__version__ != manifest["triton"]:
        return {}, f"artefacts: Triton {manifest['triton']}; here it is {triton.__version__}"
    key = triton_key()
    if key == manifest["triton_key"]:
        return {}, f"artefacts: Triton {manifest['triton']}, the same build"
    renamed = {
        folder: _base32(hashlib.sha256((key + tail).encode()).hexdigest())
        for folder, tail in manifest["tails"].items()
    }
    return renamed, f"artefacts: another build of Triton {manifest['triton']}: entries renamed"


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
