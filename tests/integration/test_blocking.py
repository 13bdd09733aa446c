"""`BlockingMicrobatcher`: threads, forks, and the exit of a process."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import ask

import microbatch as mb
from microbatch.testing import Latency, SimulatedModel, SimulatedTransport

WAITING = mb.FlushPolicy(idle="wait", max_wait=0.2, max_batch_size=16)


def model(**options):
    return SimulatedModel(answer=lambda text, _: text.upper(), **options)


def blocking(simulated=None, **options):
    return mb.BlockingMicrobatcher(SimulatedTransport(simulated or model()), **({"policy": WAITING} | options))


def run(program):
    """Run *program* in a process of its own, and return what it printed."""
    begin = """
        import os, sys, threading, time
        import microbatch as mb
        from microbatch.testing import Latency, SimulatedModel, SimulatedTransport
        def blocking(**options):
            model = SimulatedModel(answer=lambda text, _: text.upper(), **options)
            return mb.BlockingMicrobatcher(SimulatedTransport(model), prices={"simulated": mb.Price(1.0, 1.0)})
        def ask(text):
            return [{"role": "system", "content": "Shout."}, {"role": "user", "content": text}]
    """
    text = textwrap.dedent(begin) + textwrap.dedent(program)
    # Python 3.12 and later warn of forks of processes with threads, which is what some of these are about.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout.split()


def test_the_requests_of_all_threads_share_prompts():
    with blocking() as batcher, ThreadPoolExecutor(20) as threads:
        texts = [f"word {n}" for n in range(400)]
        replies = [*threads.map(lambda text: batcher.submit(ask(text)), texts)]
        assert [reply.output for reply in replies] == [text.upper() for text in texts]
        assert batcher.stats().upstream_calls <= 40
        assert batcher.stats().answered == 400


def test_closing_waits_for_answers_and_ends_what_comes_later():
    batcher = blocking(model(latency=Latency(first_token=0.3)))
    with ThreadPoolExecutor(4) as threads:
        batcher.open()
        asked = [threads.submit(batcher.submit, ask(f"word {n}")) for n in range(4)]
        while batcher.stats().items < 4:
            threading.Event().wait(0.01)
        batcher.close()
        assert [each.result().output for each in asked] == [f"WORD {n}" for n in range(4)]
    for late in (lambda: batcher.submit(ask("late")), batcher.open, lambda: next(batcher.map([ask("late")]))):
        with pytest.raises(mb.BatcherClosed):
            late()
    batcher.close()
    assert repr(batcher) == "BlockingMicrobatcher(closed)"


def test_closing_without_grace_ends_what_waits():
    batcher = blocking(model(latency=Latency(first_token=30)))
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(batcher.submit, ask("word"))
        while batcher.stats().upstream_calls < 1:
            threading.Event().wait(0.01)
        batcher.close(0)
        with pytest.raises(mb.ShutDown):
            asked.result()


def test_a_wrong_setting_is_said_at_once_and_a_failed_opening_leaves_no_thread():
    with pytest.raises(mb.ConfigError):
        blocking(policy=mb.FlushPolicy(max_batch_size=-1))
    batcher = blocking(spool=mb.SQLiteSpool("/nowhere/at/all.sqlite"))
    for _ in range(2):
        with pytest.raises((mb.ConfigError, mb.StorageError)):
            batcher.submit(ask("word"))
    assert not [thread for thread in threading.enumerate() if thread.name == "microbatch"]


def test_a_hook_that_waits_for_its_own_batcher_gets_an_error():
    class Hooks:
        def on_settle(self, _event):
            with pytest.raises(mb.ConfigError, match="event loop"):
                batcher.submit(ask("again"))
            told.append(True)

    told = []
    with blocking(hooks=[Hooks()]) as batcher:
        assert batcher.submit(ask("word")).output == "WORD"
    assert told == [True]


def test_an_error_is_the_callers_own():
    with blocking() as batcher:
        with pytest.raises(mb.ConfigError):
            batcher.submit([])
        with pytest.raises(mb.DeadlineExceeded):
            batcher.submit(ask("word"), timeout=0)
        with pytest.raises(TypeError):
            batcher.submit(ask("word"), unknown=1)


# --- map


def test_map_reads_its_source_in_the_calling_thread():
    readers = set()

    def source():
        for n in range(300):
            readers.add(threading.get_ident())
            yield mb.Request(ask(f"word {n}"), id=str(n))

    with blocking() as batcher:
        results = [*batcher.map(source(), ordered=True)]
        assert [result.unwrap().output for result in results] == [f"WORD {n}" for n in range(300)]
        assert batcher.stats().upstream_calls <= 300 / 16 + 2
        assert {result.id for result in batcher.map(source())} == {str(n) for n in range(300)}
    assert readers == {threading.get_ident()}


def test_map_takes_an_async_source_and_an_empty_one():
    async def later():
        for n in range(5):
            yield ask(f"word {n}")

    with blocking() as batcher:
        assert sorted(result.unwrap().output for result in batcher.map(later())) == [f"WORD {n}" for n in range(5)]
        assert [*batcher.map([])] == []
        for wrong in (5, None):
            with pytest.raises(mb.ConfigError, match="iterable"):
                batcher.map(wrong)
        for wrong in (0, "many"):
            with pytest.raises(mb.ConfigError, match="max_pending"):
                batcher.map([ask("word")], max_pending=wrong)


def test_map_reads_no_further_than_it_may():
    read = itertools.count()
    with blocking() as batcher:
        results = batcher.map((ask(f"word {next(read)}") for _ in itertools.count()), max_pending=40)
        for _ in range(100):
            next(results)
        assert next(read) <= 100 + 40 + 3 * 64
        results.close()
        assert batcher.submit(ask("after")).output == "AFTER"
        while batcher.stats().queued:
            threading.Event().wait(0.01)


@pytest.mark.parametrize("taken", [0, 1, 500])
def test_closing_ends_although_results_of_a_map_are_not_taken(taken):
    batcher = blocking()
    results = batcher.map([ask(f"word {n}") for n in range(2_000)], ordered=True)
    first = [result.unwrap().output for result in itertools.islice(results, taken)]
    closing = threading.Thread(target=batcher.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()
    with pytest.raises(mb.BatcherClosed):
        first.extend(result.reply.output for result in results if result.reply is not None)
    assert first == [f"WORD {n}" for n in range(len(first))]


def test_the_error_of_a_source_comes_after_the_results_of_what_was_read():
    def source():
        yield from (ask(f"word {n}") for n in range(10))
        raise ZeroDivisionError

    with blocking() as batcher:
        results = batcher.map(source())
        assert len([*itertools.islice(results, 10)]) == 10
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_a_source_that_waits_for_results_gets_them():
    answered = []

    def source():
        for n in range(20):
            yield ask(f"word {n}")
            if n == 9:
                seen.append(len(answered))

    seen = []
    with blocking(policy=mb.FlushPolicy(low_max_wait=0.05)) as batcher:
        for result in batcher.map(source(), max_pending=4):
            answered += [result.unwrap().output]
    assert sorted(answered) == sorted(f"WORD {n}" for n in range(20))
    assert seen[0] >= 10 - 4 - 1


def test_a_bound_question_is_a_plain_function():
    with blocking() as batcher:
        shout = batcher.bind("Shout.", template="{word}")
        assert shout({"word": "hello"}) == "HELLO"
        results = [*shout.map({"word": f"w{n}"} if n != 3 else {} for n in range(6))]
        assert [result.error is None for result in results] == [True, True, True, False, True, True]
        assert results[5].unwrap().output == "W5"
        with pytest.raises(mb.ConfigError):
            batcher.bind("Shout.", template="no field")


def test_requests_are_spooled_and_read(tmp_path):
    with blocking(spool=mb.SQLiteSpool(tmp_path / "spool.sqlite")) as batcher:
        assert batcher.enqueue(ask("later"), id="one") == "one"
        with pytest.raises(mb.DeadlineExceeded):
            batcher.result("one", timeout=0)


def test_texts_are_embedded_and_an_iterator_of_them_is_read_by_the_caller():
    read_by = []

    def texts():
        for text in ("apple", "pear", "plum"):
            read_by.append(threading.current_thread())
            yield text

    with blocking() as batcher:
        vectors = [each.vector for each in batcher.embed_many(texts())]
        assert vectors == [batcher.embed(text).vector for text in ("apple", "pear", "plum")]
        assert {*read_by} == {threading.current_thread()}
        with pytest.raises(mb.ConfigError):
            batcher.embed_many("apple")


# --- processes


def test_a_global_of_a_module_works_in_each_forked_worker():
    assert run("""
        batcher = blocking()
        for number in range(3):
            if os.fork() == 0:
                assert batcher.submit(ask(f"worker {number}")).output == f"WORKER {number}"
                batcher.close()
                os._exit(7)
        print(*(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)))
        print(batcher.submit(ask("parent")).output)
    """) == ["7", "7", "7", "PARENT"]


def test_a_fork_after_opening_is_an_error_in_the_child():
    assert run("""
        batcher = blocking()
        results = batcher.map([ask("one"), ask("two")])
        print(next(results).unwrap().output)
        if os.fork() == 0:
            for use in (lambda: batcher.submit(ask("child")), lambda: next(results), lambda: batcher.map([]), batcher.open):
                try:
                    use()
                except mb.BatcherClosed as error:
                    assert "fork" in str(error)
                else:
                    os._exit(1)
            batcher.close()
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.wait()[1]))
        print(batcher.submit(ask("parent")).output)
    """) == ["ONE", "7", "PARENT"]


def test_a_child_that_was_forked_while_another_thread_closed_can_close():
    assert run("""
        import signal
        batcher = blocking().open()
        with batcher._lock:  # the lock that another thread held stays locked in the child
            if os.fork() == 0:
                signal.alarm(10)
                batcher.close()
                os._exit(7)
            print(os.waitstatus_to_exitcode(os.wait()[1]))
    """) == ["7"]


def test_it_answers_what_waits_at_the_exit_of_the_process():
    assert run("""
        import atexit
        batcher = blocking(latency=Latency(first_token=0.3))
        answers = []
        thread = threading.Thread(target=lambda: answers.append(batcher.submit(ask("word")).output), daemon=True)
        atexit.register(lambda: (thread.join(5), print(*answers, repr(batcher))))  # runs last
        thread.start()
        while batcher.stats().items < 1:
            time.sleep(0.01)
    """) == ["WORD", "BlockingMicrobatcher(closed)"]


def test_an_interruption_gives_the_request_up():
    assert run("""
        import concurrent.futures, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started with SIGINT ignored
        batcher = blocking(latency=Latency(first_token=30))
        waiting = concurrent.futures.Future.result.__code__
        def stack(frame):
            while frame is not None:
                yield frame.f_code
                frame = frame.f_back
        def interrupt():
            main = threading.main_thread().ident
            while batcher.stats().upstream_calls < 1 or waiting not in stack(sys._current_frames()[main]):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt).start()
        try:
            batcher.submit(ask("word"))
        except KeyboardInterrupt:
            while batcher.stats().queued:
                time.sleep(0.01)
            print("interrupted", batcher.stats().cancelled)
    """) == ["interrupted", "1"]
