"""What tests of stores share."""

import pytest

from jaxllm.runtime.store import retry
from tests.emulators import SERVERS, in_environment


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    """An emulator of each store, which the clients of this process find."""
    with (
        SERVERS[request.param](tmp_path_factory.mktemp("server")) as emulator,
        in_environment(emulator),
    ):
        yield emulator


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
