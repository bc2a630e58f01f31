"""Time is a value here, and the database a dictionary that counts its reads."""

import asyncio
from datetime import timedelta

import pytest

from perennial.feedback.key_cache import MAX_KEYS, MAX_UNKNOWN, TTL, UNKNOWN_TTL, KeyCache
from perennial.feedback.keys import (
    KeyStore,
    Principal,
    Scope,
    StoredKey,
    open_access,
    split_key,
)
from perennial.infra.db import Database
from perennial.infra.errors import AuthError, UnavailableError
from tests.feedback.conftest import START, TickingClock

READ = frozenset({Scope.READ})
SECOND = timedelta(seconds=1)


class World:
    """A cache over real keys, a clock that is set by hand, and a database that may be away."""

    def __init__(self, keys: KeyStore) -> None:
        self.keys = keys
        self.now = START
        self.is_down = False
        self.num_reads = 0
        self.cache = KeyCache(self._find, lambda: self.now)

    def _find(self, key_id: str) -> StoredKey | None:
        self.num_reads += 1
        if self.is_down:
            raise UnavailableError("the database did not answer")
        return self.keys.find(key_id)

    def enter(self, *texts: str | None) -> list[Principal | BaseException]:
        """What each of `texts`, sent at the same moment, is answered."""

        async def all_together() -> list[Principal | BaseException]:
            calls = (_enter(self.cache, text) for text in texts)
            return await asyncio.gather(*calls, return_exceptions=True)

        return asyncio.run(all_together())

    def is_let_in(self, text: str) -> bool:
        (answer,) = self.enter(text)
        if isinstance(answer, Principal):
            return True
        assert isinstance(answer, AuthError), answer
        return False


@pytest.fixture
def world(sqlite_database: Database) -> World:
    return World(KeyStore(sqlite_database, TickingClock()))


async def _enter(cache: KeyCache, text: str | None) -> Principal:
    found = cache.authenticate(text)
    return found if isinstance(found, Principal) else await found


def _guess(number: int) -> str:
    return f"pnl_{number:016x}_" + "a" * 43


def test_key_is_read_once_per_ttl_however_often_it_comes(world: World) -> None:
    issued = world.keys.issue("acme", READ)
    expected = Principal(tenant="acme", scopes=READ, key_id=issued.key.id)

    for second in range(3 * TTL.seconds):
        world.now = START + second * SECOND
        assert world.enter(*[issued.text] * 20) == [expected] * 20

    assert world.num_reads == 3


@pytest.mark.parametrize("seconds_before_revocation", [0, 1, 29])
def test_revocation_acts_within_a_minute(world: World, seconds_before_revocation: int) -> None:
    issued = world.keys.issue("acme", READ)
    assert world.is_let_in(issued.text)

    world.now += seconds_before_revocation * SECOND
    world.keys.revoke(issued.key.id)
    revoked_at = world.now
    while world.is_let_in(issued.text):
        world.now += SECOND

    assert world.now - revoked_at <= timedelta(seconds=60)


@pytest.mark.parametrize("back", [SECOND, 29 * SECOND, timedelta(days=1)])
def test_revocation_acts_within_a_minute_of_life_though_the_clock_is_set_back(
    world: World, back: timedelta
) -> None:
    issued = world.keys.issue("acme", READ)
    assert world.is_let_in(issued.text)
    world.keys.revoke(issued.key.id)
    world.now += 29 * SECOND
    seconds_lived = 29

    world.now -= back
    while world.is_let_in(issued.text):
        world.now += SECOND
        seconds_lived += 1

    assert seconds_lived <= 60


def test_key_expires_on_the_second_though_it_is_cached(world: World) -> None:
    issued = world.keys.issue("acme", READ, lifetime=3 * SECOND)
    seen = []

    for second in range(5):
        world.now = issued.key.created_at + second * SECOND
        seen.append(world.is_let_in(issued.text))

    assert seen == [True, True, True, False, False]
    assert world.num_reads == 1


def test_wrong_secret_of_a_cached_key_is_refused_without_a_read(world: World) -> None:
    text = world.keys.issue("acme", READ).text
    assert world.is_let_in(text)

    assert not world.is_let_in(text[:-1] + ("a" if text[-1] != "a" else "b"))
    assert world.is_let_in(text)
    assert world.num_reads == 1


def test_unknown_key_is_asked_for_again_soon_but_not_each_time(world: World) -> None:
    answers = world.enter(*[_guess(7)] * 20)
    num_reads_at_first = world.num_reads

    world.now += UNKNOWN_TTL
    again = world.enter(_guess(7))

    assert {type(answer) for answer in answers + again} == {AuthError}
    assert (num_reads_at_first, world.num_reads) == (1, 2)


def test_what_cannot_be_a_key_is_refused_without_a_read(world: World) -> None:
    answers = world.enter(None, "", "pnl_a_b", "x" * 9999)

    assert {type(answer) for answer in answers} == {AuthError}
    assert world.num_reads == 0


def test_guesses_neither_grow_memory_nor_push_real_keys_out(world: World) -> None:
    text = world.keys.issue("acme", READ).text
    assert world.is_let_in(text)

    world.enter(*map(_guess, range(MAX_UNKNOWN + 1)))
    num_reads = world.num_reads
    world.enter(_guess(1))  # still known to be unknown
    world.enter(_guess(0))  # forgotten: the oldest made room

    assert world.num_reads == num_reads + 1
    assert world.is_let_in(text)
    assert world.num_reads == num_reads + 1


def test_key_that_was_read_longest_ago_makes_room_when_there_are_too_many(world: World) -> None:
    one = world.keys.issue("acme", READ)
    stored, reads = world.keys.find(one.key.id), []

    def find(key_id: str) -> StoredKey | None:
        reads.append(key_id)
        return stored  # every id is real, and has this key's secret

    async def enter(cache: KeyCache, *numbers: int) -> None:
        for number in numbers:
            await _enter(cache, one.text.replace(one.key.id, f"{number:016x}"))

    cache = KeyCache(find, lambda: world.now)
    asyncio.run(enter(cache, *range(MAX_KEYS + 1)))
    reads.clear()
    asyncio.run(enter(cache, 1, MAX_KEYS, 0))

    assert reads == [f"{0:016x}"]


def test_cache_holds_no_secret(world: World) -> None:
    text = world.keys.issue("acme", READ).text
    assert world.is_let_in(text)

    held = world.cache._known._items[split_key(text).id]

    assert split_key(text).secret not in f"{held!r} {held.stored and held.stored.secret_sha256}"


def test_without_a_database_fresh_keys_open_and_stale_ones_are_unavailable(world: World) -> None:
    text = world.keys.issue("acme", READ).text
    assert world.is_let_in(text)
    world.is_down = True

    world.now += TTL - SECOND
    assert world.is_let_in(text)
    world.now += SECOND
    refused = world.enter(*[text] * 20, _guess(1))

    assert {type(answer) for answer in refused} == {UnavailableError}
    assert world.num_reads == 2  # the others did not wait for it as well
    world.is_down = False
    world.now += 2 * SECOND
    assert world.is_let_in(text)


def test_clock_set_back_does_not_prolong_an_outage(world: World) -> None:
    text = world.keys.issue("acme", READ).text
    world.is_down = True
    world.enter(text)
    world.is_down = False

    world.now -= timedelta(days=1)

    assert world.is_let_in(text)


def test_new_key_opens_at_once(world: World) -> None:
    assert world.is_let_in(world.keys.issue("acme", READ).text)


def test_open_access_is_the_default_tenant_with_every_scope() -> None:
    caller = open_access()(None)

    assert isinstance(caller, Principal)
    assert (caller.tenant, caller.scopes) == ("default", frozenset(Scope))


def test_time_of_the_answer_is_that_before_the_read(world: World) -> None:
    """What is revoked while a slow read runs is seen a TTL after the read began."""
    text = world.keys.issue("acme", READ).text

    def slow(key_id: str) -> StoredKey | None:
        found = world.keys.find(key_id)
        world.now += 20 * SECOND
        return found

    cache = KeyCache(slow, lambda: world.now)
    asyncio.run(_enter(cache, text))
    world.keys.revoke(split_key(text).id)
    world.now = START + TTL

    with pytest.raises(AuthError):
        asyncio.run(_enter(cache, text))
