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
from microbatch.accounting.labels import CallerLabels
from microbatch.accounting.live import LiveFigures
from microbatch.gateway import Gateway
from microbatch.gateway.dashboard import figures, show_dashboard
from microbatch.gateway.hour import Hour
from microbatch.gateway.served import Served
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


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def request(**fields):
    known = {"id": "x", "id_given": False, "method": "POST", "path": "/v1/x", "began": 0.0, "status": 200, "model": "m"}
    return Served(**{**known, "seconds": 0.5, "tenant": "a" * 64, **fields})


def called(**fields):
    known = {"route": "batch", "size": 4, "model": "m", "requested_model": "m", "duration": 1.0, "first_text": None}
    more = {"attempts": 1, "streamed": True, "max_tokens": None, "temperature": None, "usage": mb.Usage(9, 9)}
    last = {"cost_usd": 0.25, "finish_reason": "stop", "request_id": None, "error": None, "origins": ()}
    return mb.Called(**{**known, **more, **last, "tenant": "a" * 64, "unbatched_cost_usd": 1.0, **fields})


def shown_hour(hour, **stats):
    return figures(mb.Stats(**stats), LiveFigures().snapshot() | {"hour": hour.snapshot()})


async def table(page, name):
    return await page.value(
        f"[...document.querySelectorAll('#{name} tbody tr')].map((row) => [...row.children].map((cell) => cell.innerText))"
    )


async def line(page, chart, place=0):
    """The numbers of the points of a line, from left to right, as shares of the height of the picture."""
    path = await page.value(f"document.querySelectorAll('#chart-{chart} path')[{place}].getAttribute('d')")
    return [tuple(map(float, point.removesuffix("h0").split())) for point in path.replace("L", "M").split("M")[1:]]


@asynccontextmanager
async def page_of(hour):
    """Yield the dashboard in a browser, once it shows *hour*."""
    async with (
        site(lambda: shown_hour(hour)) as served,
        browser() as opened,
        opened(f"{served.url}/dashboard") as page,
    ):
        await page.until("!document.querySelector('#hour').hidden")
        yield page


@pytest.mark.chromium
async def test_the_page_shows_the_last_hour_over_time_and_by_model_and_caller():
    clock = Clock()
    hour = Hour(CallerLabels(), clock)
    async with page_of(hour) as page:
        assert await page.text("#hour-requests") == "0"
        assert await page.text("#hour-usd") == "–"
        assert "when this process started" in await page.text("#hour-note")
        assert "after a restart the hour begins anew" in await page.text("#hour-note")
        assert await table(page, "models") == [["None so far."]]
        for number in (4, 0, 8, 2):
            for _ in range(number):
                hour.add(request(seconds=0.1 * number))
            if number:
                hour.on_call(called())
            clock.now += 10.0
        hour.add(request(status=404, reason="not_found", model=None, tenant=None))
        hour.on_call(called(model="n", requested_model="n", cost_usd=None, unbatched_cost_usd=None, tenant=None))
        await page.until("document.querySelector('#hour-requests').innerText === '15'")
        assert await page.text("#hour-calls") == "4"
        assert await page.text("#hour-saved") == "10"
        assert await page.text("#hour-saved-of") == "71.4 % of 14"
        assert await page.text("#hour-usd") == "$2.2500"
        assert await page.text("#hour-usd-of") == "$0.7500 spent, 1 call without a known price"
        assert await page.text("#hour-errors") == "1"
        assert await page.value("document.querySelector('#hour-errors').className") == "bad"
        assert await table(page, "models") == [
            ["m", "14", "0", "3", "11", "$0.7500", "$2.2500", "841 ms", "841 ms"],
            ["none named", "1", "1", "0", "0", "–", "–", "–", "–"],
            ["n", "0", "0", "1", "-1", "no price", "–", "–", "–"],
        ]
        assert [row[:5] for row in await table(page, "callers")] == [
            ["aaaaaaaaaaaa", "14", "0", "3", "11"],
            ["none", "1", "1", "1", "-1"],
        ]
        clipped = "[...document.querySelectorAll('.scroll')].some((table) => table.scrollWidth > table.clientWidth)"
        assert not await page.value(clipped)
        # The slice under way is in the totals, and is no point yet. A higher value is further up.
        requests = await line(page, "requests")
        assert len(requests) == 4
        assert [rank for rank, _ in sorted(enumerate(requests), key=lambda point: point[1][1])] == [2, 0, 3, 1]
        steps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(requests)]
        assert steps == pytest.approx([steps[0]] * 3, abs=0.2)
        latency = await line(page, "latency", 1)
        assert len(latency) == 3  # where nothing was answered there is no latency
        assert await page.value("document.querySelectorAll('#hour section svg').length") == 6
        label = await page.value("document.querySelector('#chart-requests svg').getAttribute('aria-label')")
        assert label == "requests: 15; calls: 4"
        assert page.complaints == []


@pytest.mark.chromium
async def test_after_an_hour_the_page_shows_an_hour():
    clock = Clock()
    hour = Hour(CallerLabels(), clock)
    for number in range(500):
        hour.add(request(seconds=number / 100))
        hour.on_call(called())
        clock.now += 10.0
    async with page_of(hour) as page:
        assert await page.text("#hour-requests") == "359"  # and the slice under way
        assert "when this process started" not in await page.text("#hour-note")
        points = await line(page, "requests")
        assert len(points) == 360
        left, right = points[0][0], points[-1][0]
        assert right - left > 300
        ticks = await page.value("document.querySelectorAll('#chart-requests text').length")
        assert 6 <= ticks <= 12
        keep("dashboard-hour.png", await page.screenshot())
        assert page.complaints == []


@pytest.mark.chromium
async def test_names_of_models_and_callers_are_text_and_never_run():
    hour = Hour(CallerLabels(), Clock())
    hour.add(request(model=IMAGE, tenant="<script>document.title='run'</script>"))
    hour.add(request(model="x" * 5_000, tenant="y" * 5_000))
    async with (
        site(lambda: shown_hour(hour)) as served,
        browser() as opened,
        opened(f"{served.url}/dashboard") as page,
    ):
        await page.until("document.querySelectorAll('#models tbody tr').length === 2")
        assert (await table(page, "models"))[0][0] == IMAGE
        assert (await table(page, "callers"))[0][0] == "<script>document.title='run'</script>"
        assert await page.value("document.querySelectorAll('main img, main script').length") == 0
        assert await page.value("document.title") == "microbatch"
        assert await page.value("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.complaints == []


@pytest.mark.chromium
async def test_a_loss_of_calls_and_dollars_is_below_the_axis():
    clock = Clock()
    hour = Hour(CallerLabels(), clock)
    hour.on_call(called(attempts=5, cost_usd=2.0, unbatched_cost_usd=0.5))
    clock.now += 10.0
    hour.add(request())
    clock.now += 10.0
    async with page_of(hour) as page:
        assert await page.text("#hour-saved") == "-4"
        assert await page.text("#hour-usd") == "−$1.5000"
        labels = await page.value("[...document.querySelectorAll('#chart-saved text')].map((text) => text.textContent)")
        assert labels[:3] == ["-5", "0", "1"]
        (_, below), (_, above) = await line(page, "saved")
        assert below > above
        assert page.complaints == []


@pytest.mark.chromium
async def test_the_page_of_a_gateway_shows_what_its_clients_asked():
    async with (
        SimulatedEndpoint() as upstream,
        Gateway(upstream.base_url, policy=POLICY, tokens="bytes") as gateway,
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
            assert await page.text("#hour-requests") == "8"
            assert (await table(page, "models"))[0][:3] == ["gpt-4.1-mini", "8", "0"]
            assert [row[:3] for row in await table(page, "callers")] == [["none", "8", "0"]]
            async with session.post(f"{root}/v1/chat/completions", json={"messages": []}) as refused:
                assert refused.status == 400
            await page.until("document.querySelector('#hour-errors').innerText === '1'")
            assert page.complaints == []


@pytest.mark.chromium
async def test_the_page_adds_up_under_load():
    models, keys = ("gpt-4.1-mini", "gpt-4.1"), ("sk-of-the-shop", "sk-of-the-desk", "sk-of-the-night")
    async with (
        SimulatedEndpoint() as upstream,
        Gateway(upstream.base_url, policy=POLICY, tokens="bytes") as gateway,
        browser() as opened,
        ClientSession() as session,
    ):
        root = gateway.base_url.removesuffix("/v1")

        async def client(number):
            signed = {"Authorization": f"Bearer {keys[number % len(keys)]}"}
            for turn in range(10):
                body = {"model": models[turn % len(models)], "messages": ask(f"product {number} {turn}", SYSTEM)}
                async with session.post(f"{root}/v1/chat/completions", json=body, headers=signed) as answer:
                    assert answer.status == 200

        async with opened(f"{root}/dashboard") as page:
            await asyncio.gather(*map(client, range(60)))
            await page.until("document.querySelector('#hour-requests').innerText === '600'")
            counted = sorted(row[:3] for row in await table(page, "models"))
            assert counted == [[model, "300", "0"] for model in sorted(models)]
            assert [row[1] for row in await table(page, "callers")] == ["200"] * len(keys)
            async with session.get(f"{root}/stats") as answer:
                stats = await answer.json()
            assert stats["answered"] == 600
            assert await page.text("#hour-calls") == str(stats["upstream_calls"])
            keep("dashboard-load.png", await page.screenshot())
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
