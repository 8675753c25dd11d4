"""The configs that ship with the program, by name, and the small texts that they train on.

In a checkout both are in the folder configs/; in an installed package they are inside the package.
"""

from collections.abc import Iterator
from pathlib import Path

from jaxllm.errors import InputError

_PACKAGE = Path(__file__).parent.parent


def root() -> Path:
    """Returns the folder that contains configs/: the checkout, or the installed package."""
    return _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent


def find_config(name: str) -> str:
    """Returns the path of a config.

    Args:
        name: a path, which is returned unchanged, or the name of a shipped config.

    Raises:
        InputError: listing the shipped configs, if there is neither a file nor a config of that name.
    """
    # A name that can only be a path is left to the reader, whose error names the file.
    if "/" in name or name.endswith((".yaml", ".yml")) or Path(name).exists():
        return name
    shipped = _file(name)
    if not shipped.is_file():
        raise InputError(
            f"{name}: no such config file, and no shipped config; shipped: {', '.join(names())}"
        )
    return str(shipped)


def find_data(path: str) -> str:
    """Returns a path of data; if configs/... does not exist here, the file that ships under that path."""
    if path.startswith("configs/") and not Path(path).exists():
        shipped = root() / path
        if shipped.exists():
            return str(shipped)
    return path


def names() -> list[str]:
    """Returns the names of the shipped configs."""
    return sorted(file.stem for file in (root() / "configs").glob("*.yaml"))


def listing() -> Iterator[str]:
    """Yields the lines of `jaxllm configs`: each shipped config, with the comment at its head."""
    for name in names():
        yield name
        for line in _file(name).read_text(encoding="utf-8").split("\n"):
            if not line.startswith("#"):
                break
            yield f"  {line.removeprefix('#').strip()}".rstrip()
        yield ""


def _file(name: str) -> Path:
    return root() / "configs" / f"{name}.yaml"
