"""Messages to the user: standard error, without markup."""

from rich.console import Console

# Messages quote paths and data, whose square brackets and colons are not markup.
console = Console(stderr=True, highlight=False, markup=False, emoji=False)
