"""Long polls wake at once, from any thread."""

import asyncio
import threading
import time

from aggregator_server.wakeups import Wakeups


def test_a_notification_from_another_thread_ends_the_wait_at_once():
    wakeups = Wakeups()

    async def wait() -> tuple[bool, float]:
        ticket = wakeups.ticket()
        threading.Timer(0.05, wakeups.notify).start()
        started = time.monotonic()
        return await wakeups.wait(ticket, 10), time.monotonic() - started

    woken, elapsed_s = asyncio.run(wait())
    assert woken
    assert elapsed_s < 5


def test_a_notification_between_the_ticket_and_the_wait_is_not_lost():
    wakeups = Wakeups()
    ticket = wakeups.ticket()
    wakeups.notify()
    assert asyncio.run(wakeups.wait(ticket, 10))


def test_all_who_wait_are_woken():
    wakeups = Wakeups()

    async def wait_all() -> list[bool]:
        ticket = wakeups.ticket()
        tasks = [asyncio.create_task(wakeups.wait(ticket, 10)) for _ in range(20)]
        await asyncio.sleep(0)
        wakeups.notify()
        return await asyncio.gather(*tasks)

    assert all(asyncio.run(wait_all()))


def test_nobody_waits_longer_than_asked():
    wakeups = Wakeups()
    assert not asyncio.run(wakeups.wait(wakeups.ticket(), 0.01))
    assert not wakeups._waiting


def test_a_closed_broadcast_holds_nobody():
    wakeups = Wakeups()
    wakeups.close()
    assert asyncio.run(wakeups.wait(wakeups.ticket(), 10))
