"""One process of `tests.faults.endpoint`, with many clients. It prints what they have seen as a line of JSON."""

import argparse
import collections
import json
import random
import socket
import threading
import time
from typing import Any

import httpx

PROMPTS = ["the soup", "好喝", "one two three four five six", "", "w", "the waiter was kind 服务员"]
MALFORMED = [
    b"",
    b"{",
    b"[]",
    b'{"model": 3}',
    b'{"model": "small", "prompt": "a", "n": 1e9}',
    b"\xff" * 100,
]


class Clients:
    """What the clients have seen."""

    def __init__(self, address: str):
        self.address = address
        self.port = int(address.rpartition(":")[2])
        self.counts: collections.Counter[str] = collections.Counter()
        self.texts: dict[str, Any] = {}
        self.faults: list[str] = []
        self.lock = threading.Lock()

    def run(self, seed: int, until: float) -> None:
        """One client, which asks again and again."""
        rng = random.Random(seed)
        kinds = [self.ask] * 6 + [self.read_slowly, self.cut, self.malformed]
        with httpx.Client(timeout=300) as client:
            while time.monotonic() < until and not self.faults:
                kind = rng.choice(kinds)
                try:
                    kind(client, rng)
                except Exception as error:  # counted as the server's fault, with its kind
                    self.faults.append(f"{kind.__name__}: {error!r:.300}")
                with self.lock:
                    self.counts[kind.__name__] += 1

    def request(self, rng: random.Random) -> dict[str, Any]:
        """One of some hundred requests, each of which comes many times."""
        number = rng.randrange(400)
        mine = random.Random(number)
        return {
            "model": mine.choice(["small", "other"]),
            "prompt": mine.choice(PROMPTS),
            "seed": number,
            "n": mine.choice([1, 1, 3]),
            "max_tokens": mine.choice([1, 5, 20, 60]),
            "temperature": mine.choice([0.0, 0.7, 1.0]),
            "top_p": mine.choice([1.0, 0.9]),
            "frequency_penalty": mine.choice([0.0, 0.0, 0.5]),
            "stop": mine.choice([None, "e", ["好", "\n"]]),
        }

    def ask(self, client: httpx.Client, rng: random.Random) -> None:
        """Asks and compares."""
        body = self.request(rng)
        answer = client.post(f"{self.address}/v1/completions", json=body)
        if answer.status_code == 429:
            with self.lock:
                self.counts["refused: too many"] += 1
            time.sleep(rng.random())
            return
        assert answer.status_code == 200, answer.text
        self.compare(body, [choice["text"] for choice in answer.json()["choices"]])

    def compare(self, body: dict[str, Any], texts: list[str]) -> None:
        """The same request gets the same texts."""
        key = json.dumps(body, sort_keys=True)
        with self.lock:
            before = self.texts.setdefault(key, texts)
        if before != texts:
            # Programs for other numbers of rows round differently: see the engine's page.
            with self.lock:
                self.counts["another text"] += 1

    def read_slowly(self, client: httpx.Client, rng: random.Random) -> None:
        """Reads a stream with pauses, perhaps not to its end."""
        body = {**self.request(rng), "stream": True, "logprobs": 3}
        last = rng.randrange(1, 60)
        with client.stream("POST", f"{self.address}/v1/completions", json=body) as answer:
            assert answer.status_code in (200, 429)
            for number, _ in enumerate(answer.iter_lines()):
                time.sleep(rng.random() * 0.05)
                if number == last:
                    break

    def cut(self, _: httpx.Client, rng: random.Random) -> None:
        """Sends a request, or a part of one, and is gone."""
        raw = json.dumps(self.request(rng)).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
        whole = head.encode() + raw
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(whole[: rng.randrange(1, len(whole) + 1)])
            time.sleep(rng.random() * 0.2)

    def malformed(self, client: httpx.Client, rng: random.Random) -> None:
        """Sends what is no request."""
        answer = client.post(f"{self.address}/v1/completions", content=rng.choice(MALFORMED))
        assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


def main() -> None:
    """Runs the clients."""
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--clients", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--first", type=int, help="seed of the first client")
    args = parser.parse_args()
    clients = Clients(args.address)
    until = time.monotonic() + 60 * args.minutes
    seeds = range(args.first, args.first + args.clients)
    threads = [threading.Thread(target=clients.run, args=(seed, until)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps({"counts": clients.counts, "texts": clients.texts, "faults": clients.faults}))


if __name__ == "__main__":
    main()
