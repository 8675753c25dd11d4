"""The command line: parses, calls, prints."""

import dataclasses
import difflib
import errno
import functools
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import tyro

import jaxllm
from jaxllm import stages
from jaxllm.config import Ending, InputError, differences, load, parse_overrides, to_tree, tyro_cli
from jaxllm.config.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveProportion,
    Seed,
)
from jaxllm.config.shipped import find_config, listing
from jaxllm.runtime.hardware import choose_platform

RUN_HELP = "all stages in order; a finished stage is skipped, a cut one resumes"
# command -> (what it takes, what it does)
OTHER_HELP = {
    "generate": ("STAGE_DIR --prompt TEXT [options]", "complete a prompt with a stage's model"),
    "chat": ("STAGE_DIR [options]", "talk to a stage's model"),
    "import": (
        "SOURCE STAGE_DIR",
        "make a stage directory from a downloaded model: a folder of safetensors, or a GGUF file",
    ),
    "export": (
        "STAGE_DIR FOLDER [options]",
        "write a stage's model for others: safetensors, config.json, tokenizer",
    ),
    "score": (
        "STAGE_DIR ... --task FILE ... [options]",
        "score stages' models on tasks in JSONL files, side by side",
    ),
    "plan": (
        "CONFIG --topology NAME [options]",
        "compile a stage's step for TPUs that are not there: does it fit, what does it cost",
    ),
    "lm_eval": (
        "STAGE_DIR --tasks NAME ...",
        "run EleutherAI's lm-evaluation-harness on a stage's model",
    ),
    "configs": (
        "",
        "list the configs that ship with the program; any command takes one by its name",
    ),
    "config": (
        "CONFIG [--diff OTHER]",
        "print a config with every default filled in, or how it differs from another",
    ),
}


@dataclasses.dataclass(frozen=True)
class GenerateArgs:
    """Complete a prompt. Only the text goes to standard output."""

    stage_dir: Annotated[str, tyro.conf.Positional]
    """Directory of a stage that trained a model, for example runs/quickstart/ppo."""
    prompt: str
    """The text to complete."""
    chat: bool = False
    """Put the prompt through the chat template, as the user's message."""
    num_samples: PositiveInt = 1
    """Completions to draw."""
    best_of: PositiveInt = 1
    """Print the best of this many draws for each, by the reward model of --reward-from."""
    reward_from: str = ""
    """Stage directory of the reward model, for example runs/quickstart/reward."""
    max_new_tokens: NonNegativeInt = 0
    """Longest completion in tokens; 0: 64, or what the prompt leaves of the model's context where that is less."""
    temperature: NonNegativeFloat = 1.0
    """Higher is more varied; 0 is greedy."""
    top_p: PositiveProportion = 1.0
    """Nucleus sampling."""
    top_k: NonNegativeInt = 0
    """Most likely tokens drawn from; 0: all."""
    seed: Seed = 0
    """Seed of the draws."""


@dataclasses.dataclass(frozen=True)
class ChatArgs:
    """Talk to a model; it streams its answers and keeps the conversation. /reset starts anew, /quit ends."""

    stage_dir: Annotated[str, tyro.conf.Positional]
    """Directory of a stage that trained a model, for example runs/quickstart/ppo."""
    max_new_tokens: NonNegativeInt = 0
    """Longest answer in tokens; 0: 128, or half of the model's context where that is less."""
    temperature: NonNegativeFloat = 0.7
    """Higher is more varied; 0 is greedy."""
    top_p: PositiveProportion = 1.0
    """Nucleus sampling."""
    top_k: NonNegativeInt = 0
    """Most likely tokens drawn from; 0: all."""
    seed: Seed = 0
    """Seed of the draws."""
    system: str = ""
    """System message."""


@dataclasses.dataclass(frozen=True)
class ImportArgs:
    """Make a stage directory of a downloaded model: generate, chat, score, export and init_from take it as it is."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder with config.json, *.safetensors and a tokenizer, or a .gguf file."""
    out: Annotated[str, tyro.conf.Positional]
    """Directory to make."""


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Write a stage's model as safetensors with config.json and tokenizer; a reward model as a classifier."""

    stage_dir: Annotated[str, tyro.conf.Positional]
    """Directory of a stage that trained a model, or of an imported one."""
    out: Annotated[str, tyro.conf.Positional]
    """Directory to make."""
    dtype: str = ""
    """float32, bfloat16 or float16; by default that of an imported model, else bfloat16."""
    shard_gb: PositiveFloat = 5.0
    """Largest file, in GB."""
    adapters: bool = False
    """Only the adapters of a model trained with lora, in PEFT's format."""


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, or stopped by a signal with everything saved, 1 training failed, 2 bad input, 3 stopped before the end on purpose."""
    if argv is None:
        _use_huge_pages()
        choose_platform()
    args = sys.argv[1:] if argv is None else argv
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a terminal without Chinese shows its characters' numbers
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax announces its options as warnings
    try:
        work = _parse(args)
        work()
    except Ending as end:
        _exit(f"jaxllm: {end}", end.code)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno not in _OF_THE_SYSTEM:
            raise
        _exit(
            f"jaxllm: {error.filename or 'writing'}: {error.strerror}; mend that and run the same command again",
            1,
        )
    except KeyboardInterrupt:
        _exit("jaxllm: interrupted; run the same command again to resume", 130)


# What a disk, its permissions and its limits can refuse at any place.
_OF_THE_SYSTEM = (
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


def _use_huge_pages() -> None:
    """Start over with glibc's huge pages, unless its tunables are set: a training step on a CPU is 1.4x faster.

    XLA's buffers are mapped anew in every step, and a page fault for each 4 KiB costs a third of it. The C library
    reads this setting only when a process starts; other C libraries ignore it.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _parse(args: list[str]) -> Callable[[], None]:
    """What the arguments ask for, to be called; what runs a stage is then called by `main` itself."""
    if not args or args[0] in ("-h", "--help"):
        return functools.partial(print, _usage())
    if args[0] == "--version":
        return functools.partial(print, f"jaxllm {jaxllm.__version__}")
    command, *rest = args
    if command == "run" or command in stages.names():
        return _parse_stage(command, rest)
    if command in OTHER_HELP:
        return functools.partial(_run_tool, command, rest)
    close = difflib.get_close_matches(command, ["run", *stages.names(), *OTHER_HELP], n=1)
    raise InputError(
        f"unknown command {command!r}; {f'did you mean {close[0]}?' if close else 'see jaxllm --help'}"
    )


def _usage() -> str:
    lines = [("run", RUN_HELP), *((stage.name, stage.help) for stage in stages.TABLE)]
    of_stages = [(name, "CONFIG [--section.field VALUE ...]", text) for name, text in lines]
    others = [(name, takes, text) for name, (takes, text) in OTHER_HELP.items()]
    rows = [f"  jaxllm {name} {takes}".ljust(56) + text for name, takes, text in of_stages + others]
    end = "\n`jaxllm COMMAND --help` explains every option; `jaxllm --version` prints the version."
    return "\n".join(["The whole life of a language model.\n", *rows, end])


def _parse_stage(command: str, args: list[str]) -> Callable[[], None]:
    if {"-h", "--help", "--help-all"} & {*args}:
        return functools.partial(_explain, command, args)
    from jaxllm.run import run_stages

    config, path = _read_config(command, args)
    return functools.partial(
        run_stages, config, path, config.stages if command == "run" else [command]
    )


def _read_config(command: str, args: list[str]) -> tuple[Any, str]:
    """(the config with the flags that override it, its path as it is given again to the next command)."""
    from jaxllm.run import Config

    if not args or args[0].startswith("-"):
        raise InputError(
            f"jaxllm {command}: give a config file first, or the name of one that `jaxllm configs` lists"
        )
    path = find_config(args[0])
    overrides = parse_overrides(Config, load(Config, path), args[1:], f"jaxllm {command} CONFIG")
    return load(Config, path, overrides), args[0]


def _explain(command: str, args: list[str]) -> None:
    """Print the help of a stage's command: the common options and its own section, with --help-all every section."""
    from jaxllm.life import config_class
    from jaxllm.run import Config

    everything = "--help-all" in args
    rows = [stage for stage in stages.TABLE if everything or stage.name == command]
    given = load(Config, find_config(args[0])) if not args[0].startswith("-") else Config()
    shown = config_class(rows)
    default = shown(
        **{field.name: getattr(given, field.name) for field in dataclasses.fields(shown)}
    )
    about = (
        "Every option of every stage."
        if everything
        else f"{_help_of(command)}. --help-all explains every stage."
    )
    tyro_cli(shown, ["--help"], f"jaxllm {command} CONFIG", default, about)


def _help_of(command: str) -> str:
    text = RUN_HELP if command == "run" else stages.named(command).help
    return f"{text[:1].upper()}{text[1:]}"


def _show_config(args: list[str]) -> None:
    """`jaxllm config CONFIG [--diff OTHER] [--section.field VALUE ...]`."""
    import yaml

    args, other = [*args], ""
    if "--diff" in args:
        place = args.index("--diff")
        if place + 1 == len(args):
            raise InputError("jaxllm config: --diff: give the config to compare with")
        other = args[place + 1]
        del args[place : place + 2]
    tree = to_tree(_read_config("config", args)[0])
    if not other:
        print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), end="")
        return
    for line in differences(to_tree(_read_config("config", [other])[0]), tree):
        print(line)


def _run_tool(command: str, args: list[str]) -> None:
    of_their_own = {
        "score": _score,
        "lm_eval": _harness,
        "plan": _plan,
        "config": _show_config,
        "configs": lambda _: print("\n".join(listing()), end=""),
    }
    if command in of_their_own:
        return of_their_own[command](args)
    kinds: dict[str, tuple[type, Callable]] = {
        **{"generate": (GenerateArgs, _generate), "chat": (ChatArgs, _chat)},
        **{"import": (ImportArgs, _import), "export": (ExportArgs, _export)},
    }
    kind, call = kinds[command]
    call(tyro_cli(kind, args, f"jaxllm {command}"))


def _import(args: ImportArgs) -> None:
    from jaxllm.pretrained.convert import import_model

    import_model(args.source, args.out)


def _export(args: ExportArgs) -> None:
    from jaxllm.pretrained.convert import export_model

    export_model(args.stage_dir, args.out, args.dtype, args.shard_gb, args.adapters)


def _generate(args: GenerateArgs) -> None:
    from jaxllm import chat
    from jaxllm.generate import SamplingConfig

    sampling = SamplingConfig(args.max_new_tokens or 64, args.temperature, args.top_k, args.top_p)
    if (args.best_of > 1) != bool(args.reward_from):
        raise InputError(
            "--best-of: give a number above 1 together with --reward-from STAGE_DIR, or neither"
        )
    best: dict = {
        "best_of": args.best_of,
        "reward_from": args.reward_from,
        "shorten": not args.max_new_tokens,
    }
    for text in chat.answer_once(
        args.stage_dir, args.prompt, args.chat, sampling, args.num_samples, args.seed, **best
    ):
        print(text, flush=True)


def _chat(args: ChatArgs) -> None:
    from jaxllm import chat
    from jaxllm.generate import SamplingConfig

    sampling = SamplingConfig(args.max_new_tokens or 128, args.temperature, args.top_k, args.top_p)
    chat.converse(args.stage_dir, sampling, args.seed, args.system, shorten=not args.max_new_tokens)


def _score(args: list[str]) -> None:
    from jaxllm.evaluation import tasks
    from jaxllm.run import set_cpu_devices

    set_cpu_devices(0)
    tasks.command(tyro_cli(tasks.ScoreArgs, args, "jaxllm score"))


def _plan(args: list[str]) -> None:
    # Before JAX looks for devices; several plans at once share nothing.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    from jaxllm.plan import planning
    from jaxllm.run import Config

    parsed = tyro_cli(planning.PlanArgs, args, "jaxllm plan")
    planning.command(parsed, load(Config, find_config(parsed.config)))


def _harness(args: list[str]) -> None:
    if not args or args[0].startswith("-"):
        raise InputError(
            "jaxllm lm_eval: give a stage directory first, then the harness's options: --tasks NAME ..."
        )
    from jaxllm.run import set_cpu_devices

    set_cpu_devices(0)
    try:
        from jaxllm.evaluation.harness import harness
    except ModuleNotFoundError as error:
        raise InputError(
            f"jaxllm lm_eval: needs {error.name}; pip install 'jaxllm[lm_eval]'"
        ) from None
    harness(args[0], args[1:])


def _exit(text: str, code: int) -> None:
    """End with one line. One of several processes that fails ends at once: a farewell would wait for the others."""
    print(text, file=sys.stderr, flush=True)
    jax = sys.modules.get("jax")  # not imported for the sake of a message
    if code and jax and jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
