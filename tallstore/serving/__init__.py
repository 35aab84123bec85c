"""Serving: one live model, switched between the tasks of a store in milliseconds.

>>> from tallstore.serving import TaskSwitcher
>>> switcher = TaskSwitcher(model, "zoo.tall")  # doctest: +SKIP
>>> with switcher.use("math") as model:  # doctest: +SKIP
...     answer = model(question)
"""

from __future__ import annotations

from tallstore.serving.results import Need, Switch
from tallstore.serving.switcher import TaskSwitcher

__all__ = ["Need", "Switch", "TaskSwitcher"]
