"""Data: sources -> records -> examples -> tokens -> rows -> batches. The modules, in the order in which data flows:

files          paths, object stores and packages; the bytes of a file, decompressed
file_formats   what format a file has
readers        files -> records, format by format; the parts of large files
records        a record: its fields, which are absent, and their values as text
sources        which files and functions records come from, and which records stay (the config sections)
templates      texts with the values of a record's fields
schema         what messages, tools and rankings in a record must look like
messages       what a conversation says and asks
format         records -> examples, each in a split
splits         the examples of one split in memory, each content once (prompts, rankings)
cache          folders that are written completely or not at all
units          pieces of about 32 MB of a source, each in a cache folder
tokenization   the content of one unit
workers        builds the missing units, in processes
deduplication  joins units: which example of each content stays, in which split
store          the examples of each source and split on disk (documents, conversations)
contamination  how much of an evaluation set is in the training data
packing        which examples are in which row
rows           the packed rows of one source
mixture        the order of rows over sources, steps and epochs
batches        global arrays of rows on devices
loader         what stages call: load rows, prompts or rankings, and make batches of them
"""
