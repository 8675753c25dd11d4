"""The thread of the engines: who leaves at any time leaves nothing behind."""

import asyncio
import threading

import pytest

from jaxllm.engine.config import SamplingConfig
from jaxllm.engine.request import Request
from jaxllm.serve.driver import Busy, Driver, EngineStopped
from tests.serve.small_server import make_served

REQUEST = Request([5, 6, 7], SamplingConfig(4), (0, 0))


@pytest.fixture
def engine():
    served, _ = make_served()
    return served.engine


@pytest.fixture
def driver(engine):
    driver = Driver([engine], max_waiting=4)
    yield driver
    driver.stop()


def is_empty(driver, engine):
    return not (driver._waiting or driver._listeners or engine.num_unfinished or driver.num_open)


def test_leaving_before_the_thread_has_submitted_leaves_nothing(driver, engine):
    gate = threading.Event()

    async def enter_and_leave():
        driver.send(gate.wait, lambda: None)  # the thread is busy
        async with driver.draw(0, [REQUEST, REQUEST], seconds=9.0):
            pass
        gate.set()
        await driver.call(lambda: None)  # all commands before it are done

    asyncio.run(enter_and_leave())
    assert is_empty(driver, engine)


def test_leaving_in_the_middle_and_at_the_end_leaves_nothing(driver, engine):
    async def draw(most):
        tokens = 0
        async with driver.draw(0, [REQUEST, REQUEST], seconds=99.0) as drawing:
            async for _, event in drawing:
                tokens += len(event.draws)
                if tokens >= most:
                    break
        await driver.call(lambda: None)
        return tokens

    assert asyncio.run(draw(1)) < 8
    assert is_empty(driver, engine)
    assert asyncio.run(draw(9)) == 8
    assert is_empty(driver, engine)


def test_too_many_are_refused_and_count_for_nothing(driver, engine):
    async def draw():
        many = [REQUEST] * (engine.num_slots + 5)
        with pytest.raises(Busy):
            async with driver.draw(0, many, seconds=9.0):
                pass

    asyncio.run(draw())
    assert is_empty(driver, engine)


def test_who_waits_is_told_that_the_thread_has_ended(engine):
    driver = Driver([engine], max_waiting=4)
    driver.stop()

    async def draw():
        async with driver.draw(0, [REQUEST], seconds=9.0) as drawing:
            async for _ in drawing:
                raise AssertionError("an event of a stopped engine")

    with pytest.raises(EngineStopped):
        asyncio.run(draw())
    assert driver.num_open == 0
