"""The scaling law of runs of many sizes, and what it predicts."""
