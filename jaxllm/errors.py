"""The errors that end the program with one line, and the check that config classes use."""


class Ending(Exception):
    """Ends the program: the command line prints the message as one line and exits with `code`."""

    code = 1


class InputError(Ending):
    """Bad input from the user: config, data, checkpoint or command line.

    The message is one complete line. It may quote any text: line breaks and control characters are
    escaped.
    """

    code = 2

    def __init__(self, text: str):
        super().__init__("".join(map(_escape, text)))


def require(holds: bool, message: str) -> None:
    """Checks a condition in a config class.

    Args:
        holds: whether the config is valid.
        message: "field: what is wrong".

    Raises:
        ValueError: if it is not. `jaxllm.config.build` turns it into an `InputError` with a location.
    """
    if not holds:
        raise ValueError(message)


def _escape(character: str) -> str:
    # str.isprintable rejects these two spaces, which typography and Chinese text use.
    if character.isprintable() or character in "\xa0\u3000":
        return character
    return ascii(character)[1:-1]
