"""The wheel, built and looked into; and what it installs, imported from there."""

from __future__ import annotations

import configparser
import email
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from zoo import ROOT, child_environment

import tallstore


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    installed = metadata.version("setuptools")
    if int(installed.partition(".")[0]) < 77:
        pytest.skip(f"setuptools {installed} is older than the 77 that pyproject.toml asks for")
    # Of a copy, so that nothing is left in the tree, and nothing left there comes in.
    source = tmp_path_factory.mktemp("source") / "tallstore"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.tall")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    assert (source / "tests").is_dir() and (source / "tallstore" / "kernels").is_symlink()
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "--no-index"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(out), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return set(archive.namelist())


def test_every_module_is_in_it(names: set[str]) -> None:
    modules = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tallstore").rglob("*.py")
        if "kernels" not in path.parts
    }
    kernels = {f"tallstore/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert len(modules) > 50 and "tallstore/kernels/reference.py" in kernels
    assert modules | kernels == {name for name in names if name.endswith(".py")}


def test_kernels_are_a_part_of_tallstore_alone(names: set[str]) -> None:
    assert not [name for name in names if name.startswith("kernels")]
    assert "tallstore/kernels/__init__.py" not in names


def test_what_goes_with_the_modules(names: set[str]) -> None:
    assert {"tallstore/py.typed", "tallstore/engine/FORMAT.md"} <= names
    assert [name for name in names if name.endswith("dist-info/licenses/LICENSE")]
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"tallstore", f"tallstore-{tallstore.__version__}.dist-info"}
    kinds = {Path(name).suffix for name in names if name.startswith("tallstore/")}
    assert kinds == {".py", ".typed", ".md"}
    for name in names:
        assert not {"tests", "bench", "golden"} & set(Path(name).parts), name


def test_the_metadata(wheel: Path) -> None:
    assert wheel.name == f"tallstore-{tallstore.__version__}-py3-none-any.whl"
    info = f"tallstore-{tallstore.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        headers = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(f"{info}/entry_points.txt").decode())
        assert b"Apache License" in archive.read(f"{info}/licenses/LICENSE")
        assert len(archive.read("tallstore/engine/FORMAT.md")) > 1000
    assert headers["Version"] == tallstore.__version__
    assert headers["License-Expression"] == "Apache-2.0"
    assert headers["Requires-Python"] == ">=3.11"
    wanted = project()["project"]["dependencies"]
    required = [r for r in headers.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert sorted(required) == sorted(wanted)
    assert "lmdb>=2.3" in required and not any(r.startswith("triton") for r in required)
    assert scripts["console_scripts"]["tallstore"] == "tallstore.cli:main"
    body = headers.get_payload()
    assert isinstance(body, str) and "tallstore" in body


def test_what_it_installs_works(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    code = """
import sys, torch, tallstore, tallstore.kernels.reference
assert tallstore.__file__.startswith(sys.argv[1]), tallstore.__file__
assert tallstore.kernels.reference.__file__.startswith(sys.argv[1])
tallstore.save({"w": torch.ones(3)}, "m.tall")
assert tallstore.load("m.tall")["w"].tolist() == [1, 1, 1]
from tallstore.cli import main
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)],
        env={**child_environment(), "PYTHONPATH": str(place)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_constraints_meet_the_requirements() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert version, f"{line!r} pins nothing"
            pinned[name] = version
    table = project()["project"]
    extras = table["optional-dependencies"]
    for requirement in [*table["dependencies"], *extras["test"]]:
        name, _, least = requirement.partition(";")[0].partition(">=")
        if name not in pinned:
            assert name == "build", f"{name} is not in constraints.txt"
            continue
        have, want = (tuple(map(int, v.split("."))) for v in (pinned[name], least))
        assert have >= want, requirement
