"""The dashboard in a real browser: it shows the figures, keeps them fresh, and runs nothing but itself."""

# ruff: noqa: RUF001 - a minus is a minus, and a dash a dash
from __future__ import annotations

import asyncio
import itertools
import os
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from aiohttp import ClientSession, web
from chromium import PATIENCE, browser
from helpers import ask

import microbatch as mb
from microbatch.accounting.live import LiveFigures
from microbatch.gateway import Gateway
from microbatch.gateway.dashboard import figures, show_dashboard
from microbatch.testing import ScriptedTransport, SimulatedEndpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(150)]  # a browser takes its time to start on a loaded machine

POLICY = mb.FlushPolicy(idle="wait", max_wait=0.5, max_batch_size=8)
SYSTEM = "Sort the products of a shop into its departments. " * 40
IMAGE = "<img src=x onerror=\"document.title='run'\">"


class Site:
    """The page, and what it reads."""

    def __init__(self, answer):
        self.answer = answer
        self.reads = []
        self.url = ""

    async def stats(self, _request):
        self.reads.append(asyncio.get_running_loop().time())
        body = self.answer()
        if isinstance(body, int):
            return web.Response(status=body)
        return web.Response(body=body, content_type="application/json")


@asynccontextmanager
async def site(answer):
    served = Site(answer)
    application = web.Application()
    application.router.add_get("/dashboard", show_dashboard)
    application.router.add_get("/stats", served.stats)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield served
    finally:
        await runner.cleanup()


def batcher_for(live, *script):
    return mb.Microbatcher(
        ScriptedTransport(*script),
        hooks=[live],
        cache=mb.MemoryCache(),
        tokens="bytes",
        prices={"m": mb.Price(input=200.0, output=800.0)},
        policy=POLICY,
        retry=mb.RetryPolicy(max_attempts=1),
    )


def keep(name, picture):
    """Keep *picture* where the environment says that what tests leave behind is to be kept, if it says so."""
    folder = os.environ.get("MICROBATCH_ARTEFACTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_bytes(picture)


@pytest.mark.chromium
async def test_the_page_shows_the_figures_and_keeps_them_fresh():
    live = LiveFigures()
    async with (
        batcher_for(live) as batcher,
        site(lambda: figures(batcher.stats(), live.snapshot())) as served,
        browser() as opened,
        opened(f"{served.url}/dashboard") as page,
    ):
        await page.until("document.querySelector('#state').innerText.startsWith('As of')")
        assert await page.text("#calls-saved") == "0"
        assert await page.text("#sizes") == "None so far."
        assert await page.text("#p50") == "–"

        await asyncio.gather(*(batcher.submit(ask(f"product {n}", SYSTEM), model="m") for n in range(20)))
        await batcher.submit(ask("product 3", SYSTEM), model="m")
        stats = batcher.stats()
        await page.until("document.querySelector('#calls-saved').innerText !== '0'")
        assert (stats.upstream_calls, stats.answered) == (3, 21)
        assert await page.text("#calls-saved") == "18"
        assert await page.text("#calls-of") == "3 instead of 21"
        saved = stats.unbatched_cost_usd - stats.cost_usd
        assert saved > 0
        assert await page.text("#usd-saved") == f"${saved:.4f}"
        assert await page.text("#answered") == "21 answered, 0 failed"
        assert await page.text("#hit-rate") == "4.8 %"
        assert await page.text("#hits") == "1 of 21"
        assert await page.text("#fallbacks") == "0"
        assert (await page.text("#p50")).endswith(" ms")
        rows = await page.value(
            "[...document.querySelectorAll('#sizes .row')].map((row) => row.innerText.split('\\n'))"
        )
        assert [row for row in rows if row[-1] != "0"] == [["4", "1"], ["8", "2"]]
        widths = await page.value("[...document.querySelectorAll('#sizes .bar')].map((bar) => bar.style.width)")
        assert (widths[3], widths[7]) == ("50%", "100%")
        reasons = await page.value(
            "[...document.querySelectorAll('#reasons .row')].map((row) => row.innerText.split('\\n'))"
        )
        assert dict(reasons) == {reason: str(number) for reason, number in stats.batches_by_reason.items()}
        routes = await page.value(
            "[...document.querySelectorAll('#routes .row')].map((row) => row.innerText.split('\\n'))"
        )
        assert routes == [["batch", "20"], ["cache", "1"]]
        keep("dashboard.png", await page.screenshot())
        assert page.complaints == []
        assert set(page.requests) == {f"{served.url}/dashboard", f"{served.url}/stats"}


@pytest.mark.chromium
async def test_the_page_reads_once_a_second():
    async with (
        site(lambda: figures(mb.Stats(), LiveFigures().snapshot())) as served,
        browser() as opened,
        opened(f"{served.url}/dashboard"),
    ):

        def steady():
            """How many of its pauses were a second; a loaded machine makes some of them longer."""
            return sum(0.8 < later - earlier < 1.5 for earlier, later in itertools.pairwise(served.reads))

        async with asyncio.timeout(PATIENCE):
            while steady() < 3:  # noqa: ASYNC110 nothing tells
                await asyncio.sleep(0.05)
        assert len(served.reads) <= 2 + (served.reads[-1] - served.reads[0]) / 0.8


@pytest.mark.chromium
async def test_what_is_in_the_figures_is_text_and_never_runs():
    hostile = mb.Stats(batches_by_reason={IMAGE: 3, "<script>document.title='run'</script>": 2})
    live = LiveFigures().snapshot() | {"errors": {IMAGE: 1}, "routes": {"<b>bold</b>": 1}}
    async with (
        site(lambda: figures(hostile, live)) as served,
        browser() as opened,
        opened(f"{served.url}/dashboard") as page,
    ):
        await page.until("document.querySelectorAll('#reasons .row').length === 2")
        assert IMAGE in await page.value("document.querySelector('#reasons').textContent")
        assert await page.value("document.querySelectorAll('main img, main script, main b').length") == 0
        assert await page.value("document.title") == "microbatch"
        assert page.complaints == []


@pytest.mark.chromium
async def test_the_policy_lets_nothing_run_that_is_not_of_the_page():
    async with (
        site(lambda: figures(mb.Stats(), LiveFigures().snapshot())) as served,
        browser() as opened,
        opened(f"{served.url}/dashboard") as page,
    ):
        await page.until("document.querySelector('#state').innerText.startsWith('As of')")
        await page.value(
            "{ const script = document.createElement('script'); script.textContent = \"document.title = 'run'\";"
            " document.body.append(script); document.body.insertAdjacentHTML('beforeend', "
            + msgspec.json.encode(IMAGE).decode()
            + "); }"
        )
        elsewhere = await page.value("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
        await page.until("true")
        assert elsewhere == "refused"
        assert await page.value("document.title") == "microbatch"
        told = " ".join(page.complaints)
        assert "Content Security Policy" in told
        assert all(word in told for word in ("script-src", "img-src", "connect-src"))


@pytest.mark.chromium
async def test_when_there_are_no_new_figures_the_page_says_so_and_recovers():
    answers = [figures(mb.Stats(queued=7), LiveFigures().snapshot())]
    async with (
        site(lambda: answers[-1]) as served,
        browser() as opened,
        opened(f"{served.url}/dashboard") as page,
    ):
        await page.until("document.querySelector('#queued').innerText === '7'")
        answers.append(503)
        await page.until("document.querySelector('#state').className === 'bad'")
        assert "status 503" in await page.text("#state")
        assert await page.text("#queued") == "7"
        answers.append(b"no JSON")
        await page.until("document.querySelector('#state').innerText.includes('JSON')")
        answers.append(figures(mb.Stats(queued=8), LiveFigures().snapshot()))
        await page.until("document.querySelector('#queued').innerText === '8'")
        assert await page.value("document.querySelector('#state').className") == "quiet"


@pytest.mark.chromium
async def test_a_loss_is_shown_as_one_and_an_unknown_price_as_unknown():
    answers = [mb.Stats(cost_usd=2.5, unbatched_cost_usd=1.0)]
    async with (
        site(lambda: figures(answers[-1], LiveFigures().snapshot())) as served,
        browser() as opened,
        opened(f"{served.url}/dashboard") as page,
    ):
        await page.until("document.querySelector('#usd-saved').innerText === '−$1.5000'")
        answers.append(mb.Stats(cost_usd=None, unbatched_cost_usd=None))
        await page.until("document.querySelector('#usd-saved').innerText === '–'")
        assert "unknown" in await page.text("#usd-of")


def audited(**fields):
    """The figures of a size in which nothing was found."""
    known = {"kind": "00ff", "model": "m", "size": 4, "asked": 0, "compared": 0, "not_comparable": 0, "raw": 0.0}
    open_ = {"noise": 0.0, "excess": 0.0, "upper": 1.0, "certified": False, "condemned": False}
    return mb.AuditedSize(**{**known, **open_, **fields})


@pytest.mark.chromium
async def test_the_page_shows_what_audits_have_found_the_condemned_first():
    found = {"asked": 900, "compared": 900, "raw": 0.011, "noise": 0.008, "excess": 0.003, "upper": 0.016}
    rows = (
        audited(size=2, asked=7, not_comparable=7),
        audited(size=8, **found, certified=True),
        audited(size=64, asked=30, compared=30, raw=0.4, noise=-0.01, excess=0.41, upper=0.6, condemned=True),
        audited(model=IMAGE, size=16, asked=1, compared=1),
    )
    answers = [mb.Stats()]
    async with (
        site(lambda: figures(answers[-1], LiveFigures().snapshot())) as served,
        browser() as opened,
        opened(f"{served.url}/dashboard") as page,
    ):
        await page.until("document.querySelector('#audit').innerText === 'Nothing audited so far.'")
        answers.append(mb.Stats(audit=rows))
        await page.until("document.querySelectorAll('#audit .finding').length === 4")
        lines = await page.value(
            "[...document.querySelectorAll('#audit .finding')].map((row) => [...row.children].map((cell) => cell.innerText))"
        )
        assert lines == [
            [
                "m, above 32",
                (
                    "40.0 % of answers differ from asking alone; 0.0 % is the model's own noise; "
                    "the excess is at most 60.0 % (95 %); 30 compared"
                ),
                "condemned",
            ],
            [
                "m, up to 8",
                (
                    "1.1 % of answers differ from asking alone; 0.8 % is the model's own noise; "
                    "the excess is at most 1.6 % (95 %); 900 compared"
                ),
                "certified",
            ],
            ["m, up to 2", "7 sampled, and none could be compared", "undecided"],
            [
                f"{IMAGE}, up to 16",
                (
                    "0.0 % of answers differ from asking alone; 0.0 % is the model's own noise; "
                    "the excess is at most 100.0 % (95 %); 1 compared"
                ),
                "undecided",
            ],
        ]
        classes = await page.value(
            "[...document.querySelectorAll('#audit .finding')].map((row) => row.lastChild.className)"
        )
        assert classes == ["bad", "quiet", "quiet", "quiet"]
        keep("dashboard-audit.png", await page.screenshot())
        answers.append(mb.Stats(audit=tuple(audited(kind=str(number), asked=number) for number in range(50))))
        await page.until("document.querySelectorAll('#audit .finding').length === 20")
        assert (await page.text("#audit")).endswith("And 30 more.")
        assert await page.value("document.title") == "microbatch"
        assert page.complaints == []


@pytest.mark.chromium
async def test_the_page_of_a_gateway_shows_what_its_clients_asked():
    live = LiveFigures()

    async def stats(_request):
        return web.Response(body=figures(gateway.stats(), live.snapshot()), content_type="application/json")

    async with SimulatedEndpoint() as upstream:
        pages = {"/dashboard": show_dashboard, "/stats": stats}
        async with (
            Gateway(upstream.base_url, policy=POLICY, tokens="bytes", hooks=[live], pages=pages) as gateway,
            browser() as opened,
            ClientSession() as session,
        ):
            root = gateway.base_url.removesuffix("/v1")
            async with opened(f"{root}/dashboard") as page:

                async def chat(text):
                    body = {"model": "gpt-4.1-mini", "messages": ask(text)}
                    async with session.post(f"{root}/v1/chat/completions", json=body) as answer:
                        assert answer.status == 200

                await asyncio.gather(*(chat(f"product {n}") for n in range(8)))
                await page.until("document.querySelector('#answered').innerText === '8 answered, 0 failed'")
                assert page.complaints == []


async def test_the_page_comes_with_a_policy_and_is_not_kept():
    async with (
        site(bytes) as served,
        ClientSession() as session,
        session.get(f"{served.url}/dashboard") as answer,
    ):
        policy = answer.headers["Content-Security-Policy"]
        assert answer.content_type == "text/html"
        assert answer.headers["Cache-Control"] == "no-store"
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        text = await answer.text()
    assert "innerHTML" not in text
    assert "http://" not in text
    assert "https://" not in text


def test_the_figures_are_those_of_stats_and_the_recent_ones():
    stats = mb.Stats(answered=4, cache_hits=1, cache_misses=3, unclaimed=mb.Usage(5, 6))
    told = msgspec.json.decode(figures(stats, LiveFigures().snapshot()))
    assert told["answered"] == 4
    assert told["cache_hit_rate"] == 0.25
    assert told["unclaimed"]["prompt_tokens"] == 5
    assert set(mb.Stats.__struct_fields__) < set(told)
    assert {"latency_p50", "batch_sizes"} < set(told["live"])
