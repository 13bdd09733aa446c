"""Memory stays bounded when the endpoint stalls and callers go on asking. In a process of its own, where nothing else is counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

OVERLOAD = Path(__file__).parent.parent / "bench" / "overload.py"


@pytest.fixture(scope="module")
def measured():
    """Return the bytes by which memory grew in 100,000 submits against a stalled server."""
    command = [sys.executable, str(OVERLOAD), "--count", "100000", "--queued", "10000", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=50)
    assert not done.stderr
    return json.loads(done.stdout)


@pytest.mark.promise(of="memory")
def test_a_queued_request_costs_at_most_two_kilobytes(measured):
    assert 0 < measured["queued"] <= 2_000, measured


@pytest.mark.promise(of="memory")
def test_a_submit_that_waits_for_room_costs_at_most_300_bytes(measured):
    assert 0 < measured["waiting"] <= 300, measured


@pytest.mark.promise(of="memory")
def test_rejected_submits_leave_nothing_behind(measured):
    assert measured["rejected"] < 90_000, measured  # a byte each
