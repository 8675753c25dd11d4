"""Data: sources -> records -> examples -> tokens -> rows -> batches. Each step is a pure function of the one before."""
