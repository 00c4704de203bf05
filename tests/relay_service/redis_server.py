"""A Redis of our own on loopback, to be stopped, killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attrs import define


def require_redis() -> str:
    """The program. Without it the test is skipped; with EXECENV_REQUIRE_TOOLS=1 it fails."""
    program = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/bin")
    reason = "" if program else "there is no redis-server"
    try:
        import coredis  # noqa: F401
    except ImportError:
        reason = "coredis is not installed"
    if not reason:
        assert program is not None
        return program
    if os.environ.get("EXECENV_REQUIRE_TOOLS") == "1":
        pytest.fail(f"EXECENV_REQUIRE_TOOLS=1, but {reason}")
    pytest.skip(reason)


@define(eq=False)
class RedisServer:
    """One server, on one port for all its lives."""

    program: str
    folder: Path
    options: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        for _ in range(20):
            port = self.port or _free_port()
            self.process = subprocess.Popen(
                [
                    self.program,
                    *("--port", str(port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""),
                    *("--enable-debug-command", "local", *self.options),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            assert self.process.stdout is not None
            for line in self.process.stdout:
                if b"Ready to accept connections" in line:
                    self.port = port
                    return
            self.end()  # somebody else has taken the port
        raise AssertionError("Redis does not start")

    def ask(self, *words: str | bytes) -> bytes:
        """A command, by a connection of its own; its reply as Redis writes it."""
        encoded = [word.encode() if isinstance(word, str) else word for word in words]
        command = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded)
        with socket.create_connection(("127.0.0.1", self.port), 10) as connection:
            connection.sendall(b"*%d\r\n%s" % (len(words), command))
            return connection.recv(65536)

    def flush(self) -> None:
        assert self.ask("FLUSHALL") == b"+OK\r\n"

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def end(self) -> None:
        """As by SIGKILL: nothing is kept."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


@contextmanager
def run_redis(folder: Path, *options: str) -> Iterator[RedisServer]:
    server = RedisServer(require_redis(), folder, options)
    server.start()
    try:
        yield server
    finally:
        server.end()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
