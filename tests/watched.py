"""`python -m tests.watched ARGS` is `python -m jaxllm ARGS`, and leaves a digest of every batch that a step got.

A line of RUN_DIR.batches is [stage, number of the step, digests]: the same for the same rows in the same order, however
they lie on devices and processes.
"""

import json
import sys

import jax

from jaxllm import train
from jaxllm.__main__ import main
from jaxllm.runtime import digest

FILE = sys.argv[sys.argv.index("--run-dir") + 1] + ".batches"


class Loop(train._Loop):
    def next_batch(self, number: int) -> train.Batch:
        batch = super().next_batch(number)
        line = [self.title, number, digest.digests(batch)]
        if jax.process_index() == 0:
            with open(FILE, "a") as file:
                file.write(json.dumps(line) + "\n")
        return batch


if __name__ == "__main__":
    train._Loop = Loop
    main()
