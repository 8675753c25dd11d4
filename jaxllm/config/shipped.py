"""The configs that ship with the program, by name, and the small texts that they learn from.

In a checkout they are the folder configs/; in an installed package they lie inside it.
"""

from collections.abc import Iterator
from pathlib import Path

from jaxllm.config import InputError

_PACKAGE = Path(__file__).parent.parent


def root() -> Path:
    """The folder that holds configs/: the checkout, or the installed package."""
    return _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent


def find_config(name: str) -> str:
    """The path of a config: `name` itself where there is such a file, else the shipped config of that name.

    Raises InputError, naming the shipped ones, where there is neither.
    """
    if "/" in name or name.endswith((".yaml", ".yml")) or Path(name).exists():
        return name
    shipped = root() / "configs" / f"{name}.yaml"
    if not shipped.is_file():
        raise InputError(
            f"{name}: no such config file, and no shipped config; shipped: {', '.join(names())}"
        )
    return str(shipped)


def find_data(path: str) -> str:
    """A path of data; one below configs/ that is not there is looked for among what ships with the program."""
    if path.startswith("configs/") and not Path(path).exists():
        shipped = root() / path
        return str(shipped) if shipped.exists() else path
    return path


def names() -> list[str]:
    """The names of the shipped configs."""
    return sorted(file.stem for file in (root() / "configs").glob("*.yaml"))


def listing() -> Iterator[str]:
    """Each shipped config with the comment at its head."""
    for name in names():
        text = (root() / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
        yield name
        for line in text.split("\n"):
            if not line.startswith("#"):
                break
            yield f"  {line.removeprefix('#').strip()}".rstrip()
        yield ""
