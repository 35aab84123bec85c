"""Everything that the README shows runs."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from tallstore.cli.root import root

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = _blocks("python")
    assert len(blocks) >= 3
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), space)
    assert {"run.tall", "model.tall", "py.tall"} <= {p.name for p in tmp_path.iterdir()}


def _model(folder: Path, shift: float) -> None:
    folder.mkdir(parents=True)
    ramp = torch.arange(12_000.0).reshape(100, 120) / 12_000
    save_file({"w": ramp + shift * torch.sin(1000 * ramp)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _model(tmp_path / "base", 0.0)
    for n, name in enumerate(("amazon", "movies", "tweets"), 1):
        _model(tmp_path / "zoo" / name, 0.001 * n)
    commands = [
        line.removeprefix("$ ")
        for block in _blocks("console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]
    assert len(commands) >= 7
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "tallstore"
        if arguments[0] == "report" and find_spec("matplotlib") is None:
            continue
        result = CliRunner().invoke(root, arguments)
        assert result.exit_code == 0, f"{command}\n{result.output}"
    assert (tmp_path / "movies-again" / "config.json").read_text() == "{}"


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = (c for c in _blocks("sh") if "pytest" in c)
    installed = command.strip().split(". .venv/bin/activate && ")[1]
    assert installed in (ROOT / ".ci" / "run").read_text()


def test_nothing_was_left_to_fill_in() -> None:
    assert not re.search(r"^@[A-Z]+@$", README, re.MULTILINE)
