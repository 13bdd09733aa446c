"""Foreign code may raise anything; only what ends the process gets through."""

import pytest

from microbatch.containment import contained


class Panic(BaseException):
    """What an extension module in Rust raises."""


@pytest.mark.parametrize("error", [ValueError("x"), Panic("x"), GeneratorExit()])
def test_whatever_a_block_raises_is_kept(error):
    with contained() as block:
        raise error
    assert block.error is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_what_ends_the_process_gets_through(error):
    with pytest.raises(type(error)), contained() as block:
        raise error
    assert block.error is error


def test_a_block_that_ends_normally_leaves_no_error():
    with contained() as block:
        pass
    assert block.error is None
