"""Puts what was compiled beforehand where this machine looks for it. Standard library alone."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

MANIFEST, ARCHIVE = "manifest.json", "artefacts.tar.xz"
# Sources of the compiled libraries.
SOURCES = ("csrc", "CMakeLists.txt", "setup.py")


def unpack(artefacts: Path, triton: Path, root: Path, packages: Path) -> list[str]:
    """Unpack the libraries into ``root``, the Triton cache into ``triton``, and the Python packages
    that are not installed here into ``packages``; returns notes.

    Libraries of other sources or of another Python are left out, packages of another Python too,
    and the notes say so.
    """
    try:
        manifest = json.loads((artefacts / MANIFEST).read_text())
        with tarfile.open(artefacts / ARCHIVE) as archive:
            return _unpack(manifest, archive, triton, root, packages)
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        return [f"no artefacts: {type(error).__name__}: {error}"]


def _unpack(
    manifest: dict[str, Any], archive: tarfile.TarFile, triton: Path, root: Path, packages: Path
) -> list[str]:
    changed = " with changes" if manifest["dirty"] else ""
    notes, libraries = [f"artefacts: of commit {manifest['commit']}{changed}"], True
    absent = {name for name in manifest["packages"] if importlib.util.find_spec(name) is None}
    if manifest["soabi"] != sysconfig.get_config_var("SOABI"):
        absent = set()
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
        elif top == "packages" and rest.partition("/")[0] in absent:
            folder, member.name = packages, rest.partition("/")[2]
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
    if absent:
        notes.append(f"artefacts: packages not installed here: {', '.join(sorted(absent))}")
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


def extension_path(root: Path) -> Path:
    """Where this Python looks for the compiled extension of the checkout."""
    return root / "variant_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def digest_of_sources(root: Path) -> str:
    """A digest of everything that the libraries are compiled from."""
    digest = hashlib.sha256()
    for top in SOURCES:
        path = root / top
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            # What Python leaves beside a script is no source, and does not travel.
            if file.is_file() and not {"tests", "__pycache__"} & {*file.relative_to(root).parts}:
                digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
