"""Where a process talks to its user: standard error, without markup."""

from rich.console import Console

# What is printed is text: square brackets and colons in a path are not markup.
console = Console(stderr=True, highlight=False, markup=False, emoji=False)
