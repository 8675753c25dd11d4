"""Run directories in an object store (gs://, s3://).

A run works in a folder of its own machine, the scratch, exactly as it would in a local run directory. `mirror.Mirror`
keeps the store equal to it: what is in the store is what lasts.

    objects   reads, lists, writes and deletes objects, with retries; conditional writes
    retry     which errors pass, and how long to wait for it
    lease     one run at a time in a run directory
    scratch   the local folder of a run
    mirror    brings a run from the store, and back after every change
"""
