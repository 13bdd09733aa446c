"""A spooled request survives kill -9: of its sender once it is acknowledged, and of any number of workers."""

import pytest
from kill_loop import kill_loop

pytestmark = pytest.mark.slow


@pytest.mark.promise(of="spool")
@pytest.mark.timeout(150)
@pytest.mark.parametrize("backend", ["sqlite", "redis"])
async def test_whoever_is_killed_every_request_has_its_one_right_answer(backend, tmp_path, request):
    place = str(tmp_path / "spool.sqlite") if backend == "sqlite" else request.getfixturevalue("redis_url")
    outcome = await kill_loop(place, items=160, rounds=2)
    assert outcome.wrong == []
    assert (outcome.counts.done, outcome.counts.depth, outcome.counts.dead) == (160, 0, 0)
    assert outcome.in_work > 0  # or nothing was put to the test
    assert outcome.asked > 160
