"""What taking a combined reply apart costs: label-sized answers arriving in 40-byte pieces.

Prints microseconds an item for 50, 500 and 5,000 items, and how much longer ten times the items take. Targets: at most 5 us an
item, at most 13x for 10x.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time

from microbatch.batching.demultiplexer import Demultiplexer
from microbatch.batching.prompt import draw_endings
from microbatch.batching.schema import answer_type

LABELS = ("electronics", "clothing", "home", "beauty", "sports", "other")
PIECE_BYTES = 40


def once(count: int) -> float:
    ids = [f"{number}{ending}" for number, ending in enumerate(draw_endings(count), 1)]
    elements = (f'{{"id":"{name}","answer":"{LABELS[index % 6]}"}}' for index, name in enumerate(ids))
    reply = '{"results":[' + ",".join(elements) + "]}"
    pieces = [reply[start : start + PIECE_BYTES] for start in range(0, len(reply), PIECE_BYTES)]
    decoders = [answer_type(str).decode] * count
    gc.collect()
    start = time.perf_counter()
    demultiplexer = Demultiplexer(ids, decoders)
    answers = 0
    for piece in pieces:
        answers += len(demultiplexer.feed(piece))
    answers += len(demultiplexer.close())
    took = time.perf_counter() - start
    assert answers == count, answers
    assert not demultiplexer.damaged
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="the best of this many counts")
    options = parser.parse_args()
    print(f"python {sys.version.split()[0]}, {platform.machine()}, best of {options.runs}")
    before = None
    for count in (50, 500, 5_000):
        best = min(once(count) for _ in range(options.runs))
        ratio = "" if before is None else f"   {best / before:5.2f}x for 10x the items"
        print(f"{count:5} items   {best / count * 1e6:5.2f} us an item{ratio}")
        before = best


if __name__ == "__main__":
    main()
