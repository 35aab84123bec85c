"""A tiny zoo for the tests of the command, and ways to run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result

from tallstore import api
from tallstore.cli.root import root

__all__ = ["ROOT", "TASKS", "make_store", "make_zoo", "ok", "ok_json", "process", "refused", "run"]

ROOT = Path(__file__).parent.parent
TASKS = ("code", "math", "法律")


def make_zoo(directory: Path) -> Path:
    """``base.pt`` and ``tasks/NAME.pt`` in `directory`."""
    generator = torch.Generator().manual_seed(0)
    base = {
        "layer.weight": torch.randn(64, 48, generator=generator),
        "layer.bias": torch.randn(64, generator=generator),
        "steps": torch.tensor(7),
    }
    torch.save(base, directory / "base.pt")
    (directory / "tasks").mkdir()
    for name in TASKS:
        tuned = {
            key: value + 0.1 * torch.randn(value.shape, generator=generator)
            if value.is_floating_point()
            else value
            for key, value in base.items()
        }
        tuned["head"] = torch.randn(2, 64, generator=generator)
        torch.save(tuned, directory / "tasks" / f"{name}.pt")
    return directory


def make_store(zoo: Path, *, exact: bool = True) -> Path:
    """A store of that zoo, beside it."""
    place = zoo / "zoo.tall"
    tasks = {name: zoo / "tasks" / f"{name}.pt" for name in TASKS}
    api.pack(place, zoo / "base.pt", tasks, exact=exact)
    return place


def run(*args: object, **options: Any) -> Result:
    return CliRunner().invoke(root, [str(arg) for arg in args], **options)


def ok(*args: object, **options: Any) -> str:
    result = run(*args, **options)
    assert result.exit_code == 0, result.output
    return result.stdout


def ok_json(*args: object) -> Any:
    """The one document on stdout."""
    return json.loads(ok(*args, "--json"))


def refused(*args: object, code: int = 1, **options: Any) -> str:
    """The message of a refusal: one line, nothing on stdout, no traceback."""
    result = run(*args, **options)
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    message = result.stderr.strip()
    if code == 1:
        assert message.startswith("Error: ") and "\n" not in message, message
    return message


def process(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tallstore", *map(str, args)],
        cwd=options.pop("cwd", ROOT),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )
