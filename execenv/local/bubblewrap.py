"""Which bubblewrap there is, and whether this kernel lets it work (sandbox.md §6, §11.5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import frozen


@frozen
class Bubblewrap:
    """One that works.

    Attributes:
        path: where it was found, resolved.
        executable: what to execute: `path`, or a descriptor of a sealed copy (`/proc/self/fd/N`) where a
            policy makes `path` writable.
        fd: that descriptor, to be passed on; `None` without a copy.
        version: as it says itself.
        argv0: whether it has `--argv0` (since 0.9.0).
        unshare: a prefix of its command line which cuts its mounts off from those made later; empty where
            no mount of this host propagates.
    """

    path: bytes
    executable: bytes
    fd: int | None
    version: str
    argv0: bool
    unshare: tuple[bytes, ...] = ()


class Bubblewraps:
    """Finds it, and remembers what was learnt of each binary.

    Args:
        ours: the environment whose PATH is searched.
    """

    def __init__(self, ours: Mapping[str, str]) -> None:
        self._ours = ours

    def close(self) -> None:
        """Let go of descriptors."""

    async def find(self, writable_roots: Iterable[bytes] = ()) -> Bubblewrap:
        """The first on PATH that works and that a sandbox with these writable roots could not exchange.

        Probes a binary once, and again after it failed or was replaced.

        Raises:
            InternalError: there is none; the message says why and what to do.
        """
        raise NotImplementedError(writable_roots)
