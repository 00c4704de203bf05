"""The store of one node: a file of SQLite, for the server and for `execenv relay token` at once."""

from __future__ import annotations

import os
import secrets
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from typing import TypeVar

import trio
from attrs import astuple

from execenv.errors import UsageError
from execenv.relay_service.store import (
    EXPIRED_TOKENS_KEPT,
    SUPERSEDED_FOR,
    AuthorizationRecord,
    RegistrationRecord,
    Store,
    StoreUnavailable,
    TokenRecord,
)

T = TypeVar("T")

BUSY = 5.0
"""Seconds that a call waits for another process to finish its own."""

MOST_SUPERSEDED = 100
"""Keys of an environment that are refused, so that who registers with new ones all day fills no disk."""

_APPLICATION = 0x45584543
_VERSION = 1

_SCHEMA = (
    "CREATE TABLE secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL)",
    """CREATE TABLE tokens (
        token_id TEXT PRIMARY KEY, digest BLOB NOT NULL, environment_id TEXT NOT NULL, role TEXT NOT NULL,
        name TEXT NOT NULL, created REAL NOT NULL, expires REAL)""",
    """CREATE TABLE registrations (
        environment_id TEXT PRIMARY KEY, registration_id TEXT NOT NULL, security_profile TEXT,
        executor_key TEXT NOT NULL, token_id TEXT NOT NULL, created REAL NOT NULL)""",
    """CREATE TABLE superseded (
        environment_id TEXT, executor_key TEXT, since REAL NOT NULL,
        PRIMARY KEY (environment_id, executor_key))""",
    """CREATE TABLE authorizations (
        digest BLOB PRIMARY KEY, environment_id TEXT NOT NULL, registration_id TEXT NOT NULL,
        harness_key TEXT NOT NULL, expires REAL NOT NULL)""",
    "CREATE TABLE nonces (nonce TEXT PRIMARY KEY, expires REAL NOT NULL)",
    "CREATE INDEX superseded_since ON superseded (since)",
    "CREATE INDEX authorizations_expires ON authorizations (expires)",
    "CREATE INDEX nonces_expires ON nonces (expires)",
)


@asynccontextmanager
async def open_sqlite(path: str, *, durable: bool = True) -> AsyncIterator[Store]:
    """The store in a file, which is made if it is missing, and its folder with it: for this user only.

    Args:
        durable: whether what was written outlives a loss of power, as a token made or revoked should.
            A relay does without: its registrations and nonces are soon made again or over, and waiting for
            the disk three times would bound how many harnesses can come in a second.

    Raises:
        UsageError: if the file is no such store, is damaged, was written by a newer version, or others may
            read it.
        StoreUnavailable: if it cannot be opened now.
    """
    limiter = trio.CapacityLimiter(1)  # one connection: one call at a time
    database = await trio.to_thread.run_sync(_open, path, durable, limiter=limiter)
    try:
        yield _SqliteStore(path, database, limiter)
    finally:
        with trio.CancelScope(shield=True):  # nothing is under way: a cancelled call waits for its thread
            await trio.to_thread.run_sync(database.close, limiter=limiter)


class _SqliteStore(Store):
    def __init__(self, path: str, database: sqlite3.Connection, limiter: trio.CapacityLimiter) -> None:
        self._path = path
        self._database = database
        self._limiter = limiter

    async def _call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` in a transaction, in a thread. A call that is cancelled waits for it: `BUSY` at most."""

        def call() -> T:
            with _errors(self._path), _transaction(self._database):
                return work(self._database)

        return await trio.to_thread.run_sync(call, limiter=self._limiter)

    async def signing_key(self) -> bytes:
        def work(database: sqlite3.Connection) -> bytes:
            database.execute(
                "INSERT OR IGNORE INTO secrets VALUES ('signing_key', ?)", (secrets.token_bytes(32),)
            )
            (key,) = database.execute("SELECT value FROM secrets WHERE name = 'signing_key'").fetchone()
            return bytes(key)

        return await self._call(work)

    async def add_token(self, token: TokenRecord) -> None:
        def work(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM tokens WHERE expires <= ?", (token.created - EXPIRED_TOKENS_KEPT,))
            database.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?)", astuple(token))

        await self._call(work)

    async def token(self, token_id: str) -> TokenRecord | None:
        row = await self._call(
            lambda database: database.execute(
                "SELECT * FROM tokens WHERE token_id = ?", (token_id,)
            ).fetchone()
        )
        return TokenRecord(*row) if row else None

    async def tokens(self) -> Sequence[TokenRecord]:
        rows = await self._call(
            lambda database: database.execute("SELECT * FROM tokens ORDER BY created, token_id").fetchall()
        )
        return [TokenRecord(*row) for row in rows]

    async def revoke_token(self, token_id: str) -> bool:
        done = await self._call(
            lambda database: database.execute("DELETE FROM tokens WHERE token_id = ?", (token_id,)).rowcount
        )
        return done == 1

    async def register(self, registration: RegistrationRecord) -> bool:
        environment_id, key, now = (
            registration.environment_id,
            registration.executor_key,
            registration.created,
        )

        def work(database: sqlite3.Connection) -> bool:
            database.execute("DELETE FROM superseded WHERE since <= ?", (now - SUPERSEDED_FOR,))
            lost = database.execute(
                "SELECT 1 FROM superseded WHERE environment_id = ? AND executor_key = ?",
                (environment_id, key),
            ).fetchone()
            if lost:
                return False
            database.execute(
                """INSERT OR REPLACE INTO superseded SELECT environment_id, executor_key, ? FROM registrations
                    WHERE environment_id = ? AND executor_key NOT IN ('', ?)""",
                (now, environment_id, key),
            )
            database.execute(
                """DELETE FROM superseded WHERE environment_id = ? AND rowid NOT IN
                    (SELECT rowid FROM superseded WHERE environment_id = ? ORDER BY since DESC LIMIT ?)""",
                (environment_id, environment_id, MOST_SUPERSEDED),
            )
            database.execute(
                "INSERT OR REPLACE INTO registrations VALUES (?, ?, ?, ?, ?, ?)", astuple(registration)
            )
            return True

        return await self._call(work)

    async def registration(self, environment_id: str) -> RegistrationRecord | None:
        row = await self._call(
            lambda database: database.execute(
                "SELECT * FROM registrations WHERE environment_id = ?", (environment_id,)
            ).fetchone()
        )
        return RegistrationRecord(*row) if row else None

    async def add_authorization(self, authorization: AuthorizationRecord) -> None:
        await self._call(
            lambda database: database.execute(
                "INSERT OR REPLACE INTO authorizations VALUES (?, ?, ?, ?, ?)", astuple(authorization)
            )
        )

    async def take_authorization(self, digest: bytes, now: float) -> AuthorizationRecord | None:
        def work(database: sqlite3.Connection) -> AuthorizationRecord | None:
            database.execute("DELETE FROM authorizations WHERE expires <= ?", (now,))
            row = database.execute("SELECT * FROM authorizations WHERE digest = ?", (digest,)).fetchone()
            database.execute("DELETE FROM authorizations WHERE digest = ?", (digest,))
            return AuthorizationRecord(*row) if row else None

        return await self._call(work)

    async def use_once(self, nonce: str, expires: float, now: float) -> bool:
        def work(database: sqlite3.Connection) -> bool:
            # Every connection comes by here: what nobody has asked for goes here too.
            database.execute("DELETE FROM nonces WHERE expires <= ?", (now,))
            database.execute("DELETE FROM authorizations WHERE expires <= ?", (now,))
            if expires <= now:
                return False
            return (
                database.execute("INSERT OR IGNORE INTO nonces VALUES (?, ?)", (nonce, expires)).rowcount == 1
            )

        return await self._call(work)

    async def ping(self) -> None:
        await self._call(lambda database: database.execute("SELECT 1 FROM secrets LIMIT 1").fetchone())


@contextmanager
def _errors(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_NOTADB:
            raise UsageError(
                f"{path} is not a store of a relay: name another file, or move it away"
            ) from None
        if code == sqlite3.SQLITE_CORRUPT:
            raise UsageError(f"{path} is damaged ({error}): put back a copy, or move it away") from None
        raise StoreUnavailable(f"{path}: {error}") from None


def _not_a_store(path: str) -> UsageError:
    return UsageError(f"{path} is not a store of a relay: name another file, or move it away")


@contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")  # at once: a lock that is wanted later is not waited for
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


def _open(path: str, durable: bool) -> sqlite3.Connection:
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), mode=0o700, exist_ok=True)
        with _closed_fd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as fd:
            mode = os.fstat(fd).st_mode
    except OSError as error:
        raise StoreUnavailable(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is not a file")
    if mode & 0o077:
        raise UsageError(f"others may read {path}, which holds secrets: chmod 600 it first")
    with _errors(path):
        file = os.path.abspath(path)  # as it was checked; `:memory:` would be none
        database = sqlite3.connect(file, timeout=BUSY, isolation_level=None, check_same_thread=False)
        try:
            _prepare(path, database, durable)
        except BaseException:
            database.close()
            raise
    return database


@contextmanager
def _closed_fd(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _prepare(path: str, database: sqlite3.Connection, durable: bool) -> None:
    _version(path, database)  # before anything is written: it may be somebody else's
    database.execute("PRAGMA journal_mode = WAL")
    database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
    with _transaction(database):
        version = _version(path, database)
        if version == 0:
            for statement in _SCHEMA:
                database.execute(statement)
            database.execute(f"PRAGMA application_id = {_APPLICATION}")
            database.execute(f"PRAGMA user_version = {_VERSION}")
    if version > _VERSION:
        raise UsageError(
            f"{path} was written by a newer version of execenv (format {version}, "
            f"this one knows {_VERSION}): use that version, or name another file"
        )
    with closing(database.execute("PRAGMA quick_check(1)")) as check:
        (result,) = check.fetchone()
    if result != "ok":
        raise UsageError(f"{path} is damaged ({result}): put back a copy, or move it away")


def _version(path: str, database: sqlite3.Connection) -> int:
    """The version of the file; 0 if it is empty."""
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (objects,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != _APPLICATION and (application, version, objects) != (0, 0, 0):
        raise _not_a_store(path)
    return int(version)
