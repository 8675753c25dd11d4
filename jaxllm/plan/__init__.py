"""`jaxllm plan`: what a stage's step needs on accelerators that are not there.

planning  the command: compile every program of an update for a topology, and report
measure   what one compiled program needs: memory, FLOPs, collectives
flops     FLOPs of a traced program
hlo       collectives of a compiled program, read from its text
roofline  programs together: memory, time, and what limits it
kept      a plan in the run directory, next to what a run measured
estimate  the same by formulas, for accelerators that cannot be compiled for
search    meshes, remat and batch sizes, ranked
tables    how reports are printed
"""
