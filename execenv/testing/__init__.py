"""Tools for testing programs that use environments, and what connects them.

* `open_fake_environment`: an environment whose programs are functions, on Trio's mock clock if you like.
* `FaultPlan`: which frames of a connection are cut, delayed, doubled, crossed or never arrive; by rules, or
  by a seed.
* `open_fault_proxy` applies a plan to a real server; `open_memory_server` to one within this program.
* `Recording`, `Recorder`, `open_replay_server`: conversations, written down and played again.

Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from execenv.testing.carrier import Carrier
    from execenv.testing.environment import (
        FakeEnvironment,
        FakeResponse,
        ScriptedProcess,
        open_fake_backend,
        open_fake_environment,
    )
    from execenv.testing.faults import (
        Cut,
        Delay,
        Duplicate,
        Fault,
        FaultPlan,
        Frame,
        Reorder,
        Rule,
        Stall,
        Throttle,
    )
    from execenv.testing.files import MemoryFileSystem
    from execenv.testing.memory import MemoryListener, MemoryServer, open_memory_listener, open_memory_server
    from execenv.testing.proxy import FaultProxy, open_fault_proxy
    from execenv.testing.recordings import Line, Recorder, Recording, ReplayServer, open_replay_server

_WHERE = {
    "carrier": ("Carrier",),
    "environment": (
        "FakeEnvironment",
        "FakeResponse",
        "ScriptedProcess",
        "open_fake_backend",
        "open_fake_environment",
    ),
    "files": ("MemoryFileSystem",),
    "faults": (
        "Cut",
        "Delay",
        "Duplicate",
        "Fault",
        "FaultPlan",
        "Frame",
        "Reorder",
        "Rule",
        "Stall",
        "Throttle",
    ),
    "memory": ("MemoryListener", "MemoryServer", "open_memory_listener", "open_memory_server"),
    "proxy": ("FaultProxy", "open_fault_proxy"),
    "recordings": ("Line", "Recorder", "Recording", "ReplayServer", "open_replay_server"),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = [  # noqa: RUF022 - in the order of _WHERE
    "Carrier",
    "FakeEnvironment",
    "FakeResponse",
    "ScriptedProcess",
    "open_fake_backend",
    "open_fake_environment",
    "MemoryFileSystem",
    "Cut",
    "Delay",
    "Duplicate",
    "Fault",
    "FaultPlan",
    "Frame",
    "Reorder",
    "Rule",
    "Stall",
    "Throttle",
    "MemoryListener",
    "MemoryServer",
    "open_memory_listener",
    "open_memory_server",
    "FaultProxy",
    "open_fault_proxy",
    "Line",
    "Recorder",
    "Recording",
    "ReplayServer",
    "open_replay_server",
]


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'execenv.testing' has no attribute {name!r}")
    value = getattr(import_module(f"execenv.testing.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
