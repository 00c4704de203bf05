"""What every store of a relay does, and what only the file does."""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
import time
from pathlib import Path

import pytest
import trio
from attrs import evolve

from execenv.errors import UsageError
from execenv.relay_service import sqlite as sqlite_store
from execenv.relay_service.sqlite import open_sqlite
from execenv.relay_service.store import (
    ANY_ENVIRONMENT,
    EXPIRED_TOKENS_KEPT,
    SUPERSEDED_FOR,
    AuthorizationRecord,
    RegistrationRecord,
    Store,
    StoreUnavailable,
    TokenRecord,
)

NOW = time.time()
TOKEN = TokenRecord("t1", b"\x00\xff" * 16, "box", "executor", "Ann's", NOW, None)
REGISTRATION = RegistrationRecord("box", "r1", "noise_hybrid_ik_v1", '{"key":"one"}', "t1", NOW)
AUTHORIZATION = AuthorizationRecord(b"\x01" * 32, "box", "r1", '{"key":"harness"}', NOW + 7200)
# Redis goes by its own clock, and other tests may take their time between the two.


async def test_signing_key_is_made_once(store: Store) -> None:
    keys = set()

    async def ask() -> None:
        keys.add(await store.signing_key())

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
    (key,) = keys
    assert len(key) == 32
    assert await store.signing_key() == key


async def test_token_comes_back_as_it_was_given(store: Store) -> None:
    ends = evolve(TOKEN, token_id="t2", environment_id=ANY_ENVIRONMENT, role="harness", expires=NOW + 0.25)
    await store.add_token(TOKEN)
    await store.add_token(ends)
    assert await store.token("t1") == TOKEN
    assert await store.token("t2") == ends
    assert await store.token("t3") is None


async def test_tokens_are_listed_oldest_first(store: Store) -> None:
    given = [evolve(TOKEN, token_id=f"t{9 - age}", created=NOW + age) for age in range(4)]
    for token in (given[2], given[0], given[3], given[1]):
        await store.add_token(token)
    assert list(await store.tokens()) == given


async def test_revoked_token_is_forgotten(store: Store) -> None:
    await store.add_token(TOKEN)
    assert await store.revoke_token("t1") is True
    assert await store.token("t1") is None
    assert list(await store.tokens()) == []
    assert await store.revoke_token("t1") is False


async def test_expired_token_is_kept_for_a_while(store: Store) -> None:
    old = evolve(TOKEN, token_id="old", created=NOW - 2 * EXPIRED_TOKENS_KEPT, expires=NOW - 1)
    older = evolve(old, token_id="older", expires=NOW - EXPIRED_TOKENS_KEPT - 1)
    await store.add_token(old)
    await store.add_token(older)
    await store.add_token(TOKEN)
    assert [token.token_id for token in await store.tokens()] == ["old", "t1"]
    assert await store.token("old") == old
    assert await store.token("older") is None


async def test_registration_comes_back_as_it_was_given(store: Store) -> None:
    clear = evolve(REGISTRATION, environment_id="clear", security_profile=None, executor_key="")
    assert await store.register(REGISTRATION)
    assert await store.register(clear)
    assert await store.registration("box") == REGISTRATION
    assert await store.registration("clear") == clear
    assert await store.registration("other") is None


async def test_same_executor_registers_again(store: Store) -> None:
    again = evolve(REGISTRATION, registration_id="r2", created=NOW + 1)
    assert await store.register(REGISTRATION)
    assert await store.register(again)
    assert await store.registration("box") == again
    assert await store.register(evolve(again, registration_id="r3"))


async def test_executor_that_was_superseded_does_not_come_back_for_a_day(store: Store) -> None:
    newer = evolve(REGISTRATION, registration_id="r2", executor_key='{"key":"two"}', created=NOW + 1)
    assert await store.register(REGISTRATION)
    assert await store.register(newer)
    late = evolve(REGISTRATION, registration_id="r3", created=NOW + 1 + SUPERSEDED_FOR - 0.5)
    assert not await store.register(late)
    assert await store.registration("box") == newer
    assert await store.register(evolve(late, environment_id="another"))
    assert await store.register(evolve(late, created=NOW + 1 + SUPERSEDED_FOR))


async def test_executors_without_keys_replace_each_other_freely(store: Store) -> None:
    clear = evolve(REGISTRATION, security_profile=None, executor_key="")
    for number in range(3):
        assert await store.register(evolve(clear, registration_id=f"c{number}"))
    assert await store.register(REGISTRATION)
    assert await store.register(clear)
    assert not await store.register(REGISTRATION), "clear text has superseded the key"


async def test_of_many_that_register_at_once_one_is_left(store: Store) -> None:
    records = [
        evolve(REGISTRATION, registration_id=f"r{number}", executor_key=f"key {number}")
        for number in range(10)
    ]
    async with trio.open_nursery() as nursery:
        for record in records:
            nursery.start_soon(store.register, record)
    left = await store.registration("box")
    assert left in records
    assert [await store.register(record) for record in records] == [record == left for record in records]


async def test_authorization_is_taken_once(store: Store) -> None:
    await store.add_authorization(AUTHORIZATION)
    taken = []

    async def take() -> None:
        taken.append(await store.take_authorization(AUTHORIZATION.digest, NOW))

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(take)
    assert [one for one in taken if one is not None] == [AUTHORIZATION]
    assert await store.take_authorization(b"other", NOW) is None


async def test_expired_authorization_is_none(store: Store) -> None:
    await store.add_authorization(AUTHORIZATION)
    assert await store.take_authorization(AUTHORIZATION.digest, AUTHORIZATION.expires) is None
    assert await store.take_authorization(AUTHORIZATION.digest, NOW) is None, "used up by that"
    await store.add_authorization(AUTHORIZATION)
    assert await store.take_authorization(AUTHORIZATION.digest, AUTHORIZATION.expires - 0.5) == AUTHORIZATION


async def test_nonce_is_used_once(store: Store) -> None:
    assert await store.use_once("n", NOW + 7200, NOW)
    assert not await store.use_once("n", NOW + 7200, NOW)
    assert await store.use_once("m", NOW + 7200, NOW)
    assert not await store.use_once("n", NOW + 7200, NOW + 7200), "expired"
    assert not await store.use_once("never", NOW, NOW), "expired before its first use"


async def test_store_answers(store: Store) -> None:
    await store.ping()


# The file.


async def test_file_is_for_this_user_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "relay.db"
    previous = os.umask(0)
    try:
        async with open_sqlite(str(path)) as store:
            await store.add_token(TOKEN)
            modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()}
    finally:
        os.umask(previous)
    assert modes == {"relay.db": 0o600, "relay.db-wal": 0o600, "relay.db-shm": 0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_file_keeps_what_it_was_given(tmp_path: Path) -> None:
    path = str(tmp_path / "relay.db")
    async with open_sqlite(path) as store:
        key = await store.signing_key()
        await store.add_token(TOKEN)
        await store.register(REGISTRATION)
    async with open_sqlite(path) as store:
        assert await store.signing_key() == key
        assert list(await store.tokens()) == [TOKEN]
        assert await store.registration("box") == REGISTRATION


async def test_expired_rows_are_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "relay.db")
    async with open_sqlite(path) as store:
        for number in range(20):
            await store.use_once(f"n{number}", NOW + 60, NOW)
            short = evolve(AUTHORIZATION, digest=bytes([number]), expires=NOW + 60)
            await store.add_authorization(short)
        await store.use_once("last", NOW + 200, NOW + 100)
    with sqlite3.connect(path) as database:
        counts = [
            database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("nonces", "authorizations")
        ]
    database.close()
    assert counts == [1, 0]


WRITER = """
import sys, trio
from attrs import evolve
from execenv.relay_service.sqlite import open_sqlite
from tests.relay_service.test_store import TOKEN

async def main(path, name):
    async with open_sqlite(path) as store:
        for number in range(25):
            await store.add_token(evolve(TOKEN, token_id=f"{name}-{number}"))
            print(await store.use_once(f"shared {number}", TOKEN.created + 10**9, TOKEN.created))

trio.run(main, *sys.argv[1:])
"""


async def test_several_processes_write_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "relay.db")
    printed: list[str] = []

    async def write(name: str) -> None:
        done = await trio.run_process([sys.executable, "-c", WRITER, path, name], capture_stdout=True)
        printed.extend(done.stdout.decode().split())

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for name in "abcd":  # the file is made by whoever comes first
                nursery.start_soon(write, name)
    async with open_sqlite(path) as store:
        assert {token.token_id for token in await store.tokens()} == {
            f"{name}-{number}" for name in "abcd" for number in range(25)
        }
    assert (printed.count("True"), printed.count("False")) == (25, 75)


async def test_locked_file_is_unavailable_for_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "BUSY", 0.05)
    path = str(tmp_path / "relay.db")
    async with open_sqlite(path) as store:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match=r"relay\.db: database is locked"):
            await store.add_token(TOKEN)
        other.execute("ROLLBACK")
        other.close()
        await store.add_token(TOKEN)


async def test_cancelled_call_leaves_the_next_one_working(tmp_path: Path) -> None:
    async with open_sqlite(str(tmp_path / "relay.db")) as store:
        for _ in range(3):
            with trio.CancelScope() as scope:
                scope.cancel()
                await store.add_token(TOKEN)
        assert await store.use_once("n", NOW + 7200, NOW)


@pytest.mark.parametrize("content", [b"not a database, " * 1000, None], ids=["text", "another database"])
async def test_other_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "relay.db"
    if content is None:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE theirs (x)")
        database.close()
    else:
        path.write_bytes(content)
    path.chmod(0o600)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"relay\.db is not a store of a relay"):
        async with open_sqlite(str(path)):
            raise AssertionError("opened")
    assert path.read_bytes() == before


async def test_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "relay.db"
    async with open_sqlite(str(path)) as store:
        for number in range(200):
            await store.add_authorization(
                evolve(AUTHORIZATION, digest=bytes([number]), harness_key="k" * 500)
            )
    whole = path.read_bytes()
    path.write_bytes(whole[:8192] + b"\xaa" * (len(whole) - 8192))
    with pytest.raises(UsageError, match=r"relay\.db is damaged"):
        async with open_sqlite(str(path)):
            raise AssertionError("opened")


async def test_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "relay.db")
    async with open_sqlite(path):
        pass
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 2")
    database.close()
    with pytest.raises(UsageError, match=r"relay\.db was written by a newer version of execenv \(format 2"):
        async with open_sqlite(path):
            raise AssertionError("opened")


async def test_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "relay.db"
    path.touch(mode=0o600)
    path.chmod(0o640)
    with pytest.raises(UsageError, match=r"others may read .*relay\.db, which holds secrets: chmod 600"):
        async with open_sqlite(str(path)):
            raise AssertionError("opened")


async def test_path_that_cannot_be_opened_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match=r"file/relay\.db: "):
        async with open_sqlite(str(tmp_path / "file" / "relay.db")):
            raise AssertionError("opened")
    with pytest.raises(StoreUnavailable, match="Is a directory"):
        async with open_sqlite(str(tmp_path)):
            raise AssertionError("opened")


async def test_keys_that_were_superseded_are_not_kept_without_end(tmp_path: Path) -> None:
    path = tmp_path / "relay.sqlite3"
    async with open_sqlite(str(path)) as store:
        for number in range(sqlite_store.MOST_SUPERSEDED + 10):
            key = f'{{"key":"{number}"}}'
            assert await store.register(evolve(REGISTRATION, executor_key=key, created=NOW + number))
        assert not await store.register(
            evolve(REGISTRATION, executor_key=f'{{"key":"{number - 1}"}}', created=NOW)
        )
        database = sqlite3.connect(path)
        (count,) = database.execute("SELECT count(*) FROM superseded").fetchone()
        database.close()
    assert count == sqlite_store.MOST_SUPERSEDED


async def test_file_is_a_file_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with open_sqlite(":memory:") as store:
        await store.add_token(TOKEN)
    async with open_sqlite(":memory:") as store:
        assert await store.token("t1") == TOKEN
