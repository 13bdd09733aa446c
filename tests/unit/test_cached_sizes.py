"""A cached answer tells from how large a batch it came, so that what an audit finds later can be applied to it."""

import asyncio

import msgspec
import pytest
from helpers import ask, batcher_for, submit_all
from two_minds import TwoMinds, ask_pairs, audited_batcher

import microbatch as mb
from microbatch.caching import entry as entries
from microbatch.caching.answer_cache import FRESH
from microbatch.caching.key import Keys
from microbatch.testing import ScriptedTransport

PAIR = {"idle": "wait", "max_batch_size": 2}

EARLIER = bytes.fromhex(
    "9a01c401 6b a6 416e73776572 a16d cb41d954fc40000000 c0 07 02 01 c40c 7b226964223a2022 78227d20".replace(" ", "")
)
"""The entry of the key b"k" as the release before wrote it: "Answer" of the model "m", stored at 1,700,000,000, with a body."""


class Slow(mb.MemoryCache):
    """A memory cache whose calls take as long as *delay*."""

    delay = 0.0

    async def get_many(self, keys):
        found = await super().get_many(keys)
        await asyncio.sleep(self.delay)
        return found


def test_an_entry_of_an_earlier_release_is_read():
    entry = entries.read(EARLIER, b"k", 0.0)
    assert entry == entries.Entry(b"k", "Answer", "m", 1_700_000_000.0, None, 7, 2, 1, b'{"id": "x"} ')
    assert (entry.batch_size, entry.lane_kind, entry.tenant) == (1, None, None)
    assert entries.read(EARLIER, b"l", 0.0) is None


def test_an_earlier_release_reads_an_entry_of_this_one_as_a_miss():
    class Entry(msgspec.Struct, frozen=True, array_like=True, tag=1):
        """As it was in that release."""

        key: bytes
        text: str
        model: str | None
        stored_at: float
        expires_at: float | None
        prompt_tokens: int
        completion_tokens: int
        cached_tokens: int
        body: bytes | None = None

    assert msgspec.msgpack.decode(EARLIER, type=Entry).text == "Answer"
    for size, kind, tenant in ((1, None, None), (8, b"kind", b"digest")):
        written = entries.encode(entries.Entry(b"k", "Answer", "m", 0.0, None, 7, 2, 1, None, size, kind, tenant))
        assert entries.read(written, b"k", 0.0).batch_size == size
        with pytest.raises(msgspec.MsgspecError):
            msgspec.msgpack.decode(written, type=Entry)


async def stored_after(ask_for, **options):
    """Return the entries that *ask_for*, given a batcher, leaves in a cache, by text, and what makes their keys."""
    cache = mb.MemoryCache()
    async with batcher_for(ScriptedTransport(), cache, **{**PAIR, "max_wait": 0.1, **options}) as batcher:
        await ask_for(batcher)
    found = [entries.read(value, key, 0.0) for key, (value, _) in cache._entries._values.items()]
    return {entry.text: entry for entry in found}, batcher._cache._keys


async def test_an_entry_tells_size_kind_and_tenant_without_an_audit():
    async def ask_for(batcher):
        replies["batch"], _ = await submit_all(batcher, "ab", tenant="shop")
        replies["alone"] = await batcher.submit(ask("c"))
        replies["by its form"] = await batcher.submit(ask("d"), params={"logprobs": True})

    replies = {}
    found, keys = await stored_after(ask_for)
    kind = replies["batch"].lane_kind
    assert len(kind) == 16
    assert replies["alone"].lane_kind == kind  # the tenant is no part of it
    kinds = {entry.text: entry.lane_kind and keys.masked(entry.key, entry.lane_kind).hex() for entry in found.values()}
    assert {text: (entry.batch_size, kinds[text]) for text, entry in found.items()} == {
        "A": (2, kind),
        "B": (2, kind),
        "C": (1, kind),
        "D": (1, None),
    }
    assert found["A"].tenant == found["B"].tenant != found["C"].tenant is None
    assert b"shop" not in found["A"].tenant
    # Without the secret a reader of the store can neither recognise a kind nor group entries by it.
    assert len({found[text].lane_kind for text in "ABC"} | {bytes.fromhex(kind)}) == 4


def test_the_digest_of_a_tenant_depends_on_the_secret_and_the_tenant_only():
    one, two = (Keys(bytes([number]) * 32, endpoint="", model=None) for number in (1, 2))
    assert one.tenant_digest("shop") == one.tenant_digest("shop")
    digests = [one.tenant_digest("shop"), one.tenant_digest("Shop"), one.tenant_digest(""), two.tenant_digest("shop")]
    assert len({*digests, one.tenant_digest("\ud800")}) == 5
    assert one.tenant_digest(None) is None


def test_a_masked_digest_is_read_with_the_secret_and_the_key_only():
    one, two = (Keys(bytes([number]) * 32, endpoint="", model=None) for number in (1, 2))
    digest = bytes(range(8))
    masked = one.masked(b"key", digest)
    assert one.masked(b"key", masked) == digest
    assert len({digest, masked, two.masked(b"key", masked), one.masked(b"other", masked)}) == 4


@pytest.mark.promise(of="audit_cache")
async def test_an_answer_given_alone_is_never_condemned():
    cache = mb.MemoryCache()
    async with batcher_for(ScriptedTransport(), cache, **PAIR, max_wait=0.1) as batcher:
        await submit_all(batcher, "ab")
        await batcher.submit(ask("c"))
        await batcher.submit(ask("d"), params={"logprobs": True})
        batcher._cache.is_condemned = lambda kind, size, given_at: True
        assert (await batcher.submit(ask("c"))).route == "cache"
        assert (await batcher.submit(ask("d"), params={"logprobs": True})).route == "cache"
        assert (await batcher.submit(ask("a"))).route == "single"


@pytest.mark.promise(of="audit_cache")
async def test_an_audit_that_only_reports_leaves_hits_as_they_are():
    async with audited_batcher(TwoMinds(), cache=mb.MemoryCache(), policy={"rate": 1.0}) as batcher:
        await ask_pairs(batcher, "worse", 20)
        assert [row.condemned for row in batcher.stats().audit] == [True]
        assert {(await batcher.submit(ask(f"worse {pair} a"))).route for pair in range(20)} == {"cache"}


@pytest.mark.promise(of="audit_cache")
@pytest.mark.parametrize("bulk", [False, True])
async def test_what_was_stored_a_moment_ago_is_condemned_too(bulk):
    """Then it is still in memory, and no look-up is made."""
    async with audited_batcher(TwoMinds(), cache=mb.MemoryCache(), policy={"adapt": True}) as batcher:
        replies = await ask_pairs(batcher, "worse", 20)
        assert {reply.output for reply in replies[:10]} == {"WRONG"}
        assert len(batcher._cache._fresh) == 40  # no time has passed
        requests = [mb.Request(ask(f"worse {pair} {item}")) for pair in range(20) for item in "ab"]
        if bulk:
            again = [result.unwrap() async for result in batcher.map(requests, ordered=True)]
        else:
            again = [await batcher.submit(request.messages) for request in requests]
        assert batcher.stats().cache_misses > 40
    assert [reply.output for reply in again] == [f"WORSE {pair} {item.upper()}" for pair in range(20) for item in "ab"]


@pytest.mark.promise(of="audit_cache")
async def test_what_a_condemned_size_has_answered_stays_condemned_when_the_size_is_tried_again():
    cache = mb.MemoryCache()
    async with (
        audited_batcher(TwoMinds(), cache=cache, policy={"adapt": True}) as batcher,
        batcher_for(TwoMinds(), cache, **PAIR) as other,
    ):
        await submit_all(batcher, ["worse old", "worse older"])
        await batcher.audits.settled()
        await ask_pairs(batcher, "worse", 20)
        assert [row.condemned for row in batcher.stats().audit] == [True]
        await submit_all(other, ["worse late", "worse later"])  # by a process that does not know
        for number in range(500):
            await batcher.submit(ask(f"sound {number}"), use_cache=False)
        both = await submit_all(batcher, ["sound again", "sound too"])
        assert {reply.batch_size for reply in both} == {2}  # it is tried again
        assert not any(row.condemned for row in batcher.stats().audit)
        old = [await batcher.submit(ask(f"worse {text}")) for text in ("old", "older", "late", "later")]
        new = [await batcher.submit(ask(text)) for text in ("sound again", "sound too")]
    assert [reply.output for reply in old] == ["WORSE OLD", "WORSE OLDER", "WORSE LATE", "WORSE LATER"]
    assert [(reply.route, reply.batch_size) for reply in new] == [("cache", 2), ("cache", 2)]


@pytest.mark.promise(of="audit_cache")
@pytest.mark.parametrize("word", ["sound", "noisy", "long"])
async def test_what_combining_has_not_changed_is_not_replaced(word):
    async with audited_batcher(TwoMinds(), cache=mb.MemoryCache()) as batcher:
        first = await ask_pairs(batcher, word, 4)
        again = [await batcher.submit(ask(f"{word} {pair} {item}")) for pair in range(4) for item in "ab"]
    assert [(reply.route, reply.output, reply.batch_size) for reply in again] == [
        ("cache", reply.output, 2) for reply in first
    ]


async def test_an_answer_alone_that_was_cut_short_replaces_nothing():
    class CutShort(TwoMinds):
        async def send(self, call, on_text):
            completion = await super().send(call, on_text)
            if not self.together:
                completion.finish_reason = "length"
            return completion

    async with audited_batcher(CutShort(), cache=mb.MemoryCache()) as batcher:
        await ask_pairs(batcher, "worse", 1)
        await asyncio.sleep(1)
        found = [(await batcher.submit(ask(f"worse 0 {item}"))).output for item in "ab"]
    assert found == ["WRONG", "WRONG"]


@pytest.mark.promise(of="audit_cache")
async def test_a_look_up_under_way_finds_the_answer_that_replaces_the_one_it_has_read():
    cache = Slow()
    transport = TwoMinds()
    async with audited_batcher(transport, cache=cache) as batcher:
        await submit_all(batcher, ["worse a", "worse b"])
        cache.delay = 0.04  # what is looked up now has read the answers from the batch
        looking = [asyncio.ensure_future(batcher._cache._live.submit(key)) for key in cache._entries._values]
        await batcher.audits.settled()
        keys = list(cache._entries._values)
        found = [entries.read(value, key, 0.0) for key, value in zip(keys, await asyncio.gather(*looking), strict=True)]
    assert sorted(entry.text[:5] for entry in found) == ["WORSE", "WRONG"]


async def test_the_answer_that_replaces_another_is_at_hand_for_its_own_time():
    """Not only for that of the answer it replaces, for a look-up of which it may come too late."""
    cache = Slow()
    async with audited_batcher(TwoMinds(delay=0.02), cache=cache) as batcher:
        await submit_all(batcher, ["worse a", "worse b"])  # at 0.02; audited from then to 0.06
        await batcher.audits.settled()
        await asyncio.sleep(FRESH - 0.03)
        assert [entries.read(value, key, 0.0).text[:5] for key, value in batcher._cache._fresh.items()] == ["WORSE"]
        await asyncio.sleep(0.04)
        assert not batcher._cache._fresh


# --- a batcher that combines nothing


async def test_a_batcher_that_combines_nothing_takes_no_answer_of_a_batch_and_replaces_it():
    cache, transport = mb.MemoryCache(), ScriptedTransport()
    async with batcher_for(transport, cache, **PAIR) as batcher:
        assert {reply.batch_size for reply in await submit_all(batcher, "ab")} == {2}
        alone = await batcher.submit(ask("c"), priority="high")
        assert (alone.route, alone.batch_size) == ("single", 1)
    async with batcher_for(transport, cache, max_batch_size=1) as single:
        again = await submit_all(single, "abc")
        assert [(reply.route, reply.batch_size) for reply in again] == [("single", 1), ("single", 1), ("cache", 1)]
        mapped = [result.unwrap() async for result in single.map([ask(text) for text in "abc"])]
        assert {(reply.route, reply.batch_size) for reply in mapped} == {("cache", 1)}
        assert single.stats().cache_misses == 2
    async with batcher_for(transport, cache, **PAIR) as batcher:
        assert {(reply.route, reply.batch_size) for reply in await submit_all(batcher, "ab")} == {("cache", 1)}


def test_an_answer_of_which_it_is_not_known_how_it_was_asked_is_not_one_alone():
    assert entries.read(EARLIER, b"k", 0.0) is not None
    assert entries.read(EARLIER, b"k", 0.0, alone=True) is None
    for size in (1, 2, 16):
        written = entries.encode(entries.Entry(b"k", "Answer", "m", 0.0, None, 7, 2, 1, None, size))
        assert (entries.read(written, b"k", 0.0, alone=True) is None) == (size > 1)
