"""Rankings of responses: orders as text, the files that keep them, and the terminal in which a person ranks.

orders        "B>A=D>C" as ranks, and the shuffled order in which responses are shown
records       the lines of samples.jsonl and rankings.jsonl: read, checked, summarized
answer_files  one line on disk for each answer
answers       the answers of several people to a list of samples: who gets which one, rank, skip, undo
terminal      asks a person; another interface needs only the modules above, as `jaxllm.web.rank` does
"""
