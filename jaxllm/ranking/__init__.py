"""Rankings of responses: orders as text, the files that keep them, and the terminal in which a person ranks.

orders    "B>A=D>C" as ranks, and the shuffled order in which responses are shown
records   the lines of samples.jsonl and rankings.jsonl: read, checked, summarized
answers   the answers to a list of samples, one line on disk each: rank, skip, undo
terminal  asks a person; another interface needs only the three modules above
"""
