"""What tests of stores share."""

import pytest

from jaxllm.runtime.store import retry
from jaxllm.runtime.store.lease import Lease
from tests.emulators import SERVERS, in_environment


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    """An emulator of each store, which the clients of this process find."""
    with (
        SERVERS[request.param](tmp_path_factory.mktemp("server")) as emulator,
        in_environment(emulator),
    ):
        yield emulator


@pytest.fixture(autouse=True)
def no_lease_outlives_its_test(monkeypatch):
    """A thread that renews one would go on in the tests that follow, and warn there once its emulator is gone."""
    taken = []
    take = Lease.take

    def take_and_note(lease):
        taken.append(lease)
        take(lease)

    monkeypatch.setattr(Lease, "take", take_and_note)
    yield
    for lease in taken:
        lease._ended.set()
        if lease._thread:
            lease._thread.join()


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
