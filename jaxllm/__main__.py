"""The command line: finds the command, runs it, and turns errors into one line and an exit code."""

import difflib
import errno
import functools
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import jaxllm
from jaxllm import stages, tools
from jaxllm.errors import Ending, InputError
from jaxllm.runtime import began
from jaxllm.runtime.hardware import choose_platform

_HELP = {"-h", "--help", "--help-all"}
# What a disk, its permissions and its limits can refuse to any function that writes.
_SYSTEM_ERRORS = (
    errno.ENOSPC,
    errno.EROFS,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EMFILE,
    errno.EIO,
)


def main(argv: list[str] | None = None) -> None:
    """Runs one command.

    Exit codes: 0 done, or stopped by a signal with everything saved; 1 training or the system failed;
    2 bad input; 3 stopped before the end on purpose; 130 interrupted; 141 the reader of a pipe is gone.

    Args:
        argv: the arguments after the program's name; None: those of this process.
    """
    if argv is None:
        began.note()
        argv = sys.argv[1:]
        if not _only_prints(argv):
            _use_huge_pages()
        choose_platform()  # before JAX is imported
    _escape_unprintable()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs its options as warnings
    try:
        work = _parse(argv)
        work()
    except Ending as end:
        _exit(f"jaxllm: {end}", end.code)
    except BrokenPipeError:  # the reader of the output has ended, as in `| head`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno not in _SYSTEM_ERRORS:
            raise  # a bug: it needs its traceback
        what = f"{error.filename or 'writing'}: {error.strerror}"
        _exit(f"jaxllm: {what}; fix that and run the same command again", 1)
    except KeyboardInterrupt:
        _exit("jaxllm: interrupted; run the same command again to resume", 130)


def _only_prints(args: list[str]) -> bool:
    """Whether a command computes nothing: a restart for huge pages would only take time."""
    if not args or _HELP & {*args}:
        return True
    return args[0] in ("--version", "--tyro-print-completion", "config", "configs")


def _use_huge_pages() -> None:
    """Restarts the process with glibc's huge pages, which makes a training step on a CPU 1.4x faster.

    XLA maps its buffers again in every step, and a page fault for each 4 KiB takes a third of the time.
    The C library reads the setting only when a process starts; other C libraries ignore it. A process
    whose tunables are set already is not restarted.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _escape_unprintable() -> None:
    """Makes a terminal whose encoding lacks a character, such as Chinese, show its number instead."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parse(args: list[str]) -> Callable[[], None]:
    """Returns the work that the arguments ask for.

    `main` calls it, so that a stage does not run inside the parser: tracebacks stay short.
    """
    if not args or args[0] in ("-h", "--help"):
        return functools.partial(print, _usage())
    command, *rest = args
    if command == "--version":
        return functools.partial(print, f"jaxllm {jaxllm.__version__}")
    if command == "--tyro-print-completion":
        return functools.partial(_call, "jaxllm.commands:print_completion", " ".join(rest))
    if command in tools.TABLE:
        return functools.partial(_call, tools.TABLE[command].run, rest)
    if command == "run" or command in stages.names():
        return _parse_stage(command, rest)
    known = ["run", *stages.names(), *tools.TABLE]
    close = difflib.get_close_matches(command, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "see jaxllm --help"
    raise InputError(f"unknown command {command!r}; {hint}")


def _call(spec: str, arguments: str | list[str]) -> None:
    """Calls the function named by "module:name", whose imports take longer than `jaxllm --help`."""
    stages.load(spec)(arguments)


def _parse_stage(command: str, args: list[str]) -> Callable[[], None]:
    """Returns the work of a stage's command, or of `run`."""
    from jaxllm import commands

    if _HELP & {*args}:
        return functools.partial(commands.explain_stage, command, args)
    config = commands.read_config(command, args)
    # Imports JAX and everything that trains: a wrong config is reported before.
    from jaxllm.run import run_stages

    wanted = config.stages if command == "run" else [command]
    # The path as it was given: messages name the next command with it.
    return functools.partial(run_stages, config, args[0], wanted)


def _usage() -> str:
    """Returns the list of all commands. It must not need JAX, whose import takes seconds."""
    stage_usage = "CONFIG [--section.field VALUE ...]"
    # Only the table of stages and that of tools, which are plain data.
    rows = [("run", stage_usage, tools.RUN_HELP)]
    for stage in stages.TABLE:
        rows.append((stage.name, stage_usage, stage.help))
    for name, tool in tools.TABLE.items():
        rows.append((name, tool.usage, tool.help))
    lines = ["The whole life of a language model.", ""]
    for name, usage, text in rows:
        lines.append(f"  jaxllm {name} {usage}".ljust(56) + text)
    lines += [
        "",
        "`jaxllm COMMAND --help` explains every option; `jaxllm --version` prints the version.",
        "Completion in bash (or zsh, fish): source <(jaxllm --tyro-print-completion bash)",
    ]
    return "\n".join(lines)


def _exit(text: str, code: int) -> NoReturn:
    """Prints one line and ends the process.

    One of several processes that fails ends immediately: jax.distributed's shutdown would wait for the
    others, which wait for this one.
    """
    print(text, file=sys.stderr, flush=True)
    jax = sys.modules.get("jax")  # if it is not imported, there are no other processes
    if code and jax and jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
