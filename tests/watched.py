"""`python -m tests.watched ARGS` is `python -m jaxllm ARGS`, and leaves a digest of every batch that a step got.

A line of RUN_DIR.batches is [stage, number of the step, digests]: the same for the same rows in the same order, however
they lie on devices and processes.
"""

import json
import sys

import jax

from jaxllm import loop
from jaxllm.__main__ import main
from jaxllm.runtime import digest

FILE = sys.argv[sys.argv.index("--run-dir") + 1] + ".batches"


class Watched(loop._Attempt):
    def next_batch(self, number):
        batch = super().next_batch(number)
        line = [self.stage.title, number, digest.digests(batch)]
        if jax.process_index() == 0:
            with open(FILE, "a") as file:
                file.write(json.dumps(line) + "\n")
        return batch


if __name__ == "__main__":
    loop._Attempt = Watched
    main()
