"""`python -m tests.watched ARGS` is `python -m jaxllm ARGS`, and leaves a digest of every batch that a step got.

A line of RUN_DIR.batches (or of the file WATCHED, for a run directory in a store) is [stage, number of the step, digests]: the same for the same rows in the same order, however
they lie on devices and processes.
"""

import json
import os
import sys

import jax

from jaxllm import loop
from jaxllm.__main__ import main
from jaxllm.runtime import digest

FILE = os.environ.get("WATCHED", sys.argv[sys.argv.index("--run-dir") + 1] + ".batches")


class Watched(loop._Attempt):
    def next_batch(self, number):
        batch = super().next_batch(number)
        on_devices = {name: x for name, x in batch.items() if isinstance(x, jax.Array)}
        line = [self.stage.title, number, digest.digests(on_devices)]
        if jax.process_index() == 0:
            with open(FILE, "a") as file:
                file.write(json.dumps(line) + "\n")
        return batch


if __name__ == "__main__":
    loop._Attempt = Watched
    main()
