"""Memory stays bounded when the endpoint stalls and callers go on asking. In a process of its own, where nothing else is counted."""

import json
import subprocess

import pytest

from bench import overload
from bench.apart import ROOT, command

pytestmark = pytest.mark.slow


COUNT, QUEUED = 20_000, 5_000


def measured(function, **settings):
    """Return what *function* finds in a process of its own, which has nothing to complain of."""
    done = subprocess.run(
        command(function, **settings), cwd=ROOT, check=True, capture_output=True, text=True, timeout=500
    )
    assert not done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def held():
    """Return the bytes that queued requests and waiting submits hold, of submits against a stalled server."""
    return measured(overload.waiting, count=COUNT, queued=QUEUED)


@pytest.mark.promise(of="memory")
def test_a_queued_request_costs_at_most_two_kilobytes(held):
    assert 0 < held["queued"] <= 2_000, held


@pytest.mark.promise(of="memory")
def test_a_submit_that_waits_for_room_costs_at_most_300_bytes(held):
    assert 0 < held["waiting"] <= 300, held


@pytest.mark.promise(of="memory")
def test_rejected_submits_leave_nothing_behind():
    beyond = COUNT - QUEUED
    grown = measured(overload.rejected, count=beyond, queued=QUEUED)
    assert grown < beyond  # less than a byte each
