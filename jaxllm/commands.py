"""What the commands do: the options of the tools, and the call that each command makes.

A stage's command takes a config and flags that override its fields. The other commands, the tools,
are in the table of `tools`. This module imports JAX, and whatever imports it, only inside the
functions that need it: `jaxllm generate --help` answers at once.
"""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jaxllm import stages, tools
from jaxllm.config import InputError, differences, load, parse_overrides, to_tree, tyro_cli
from jaxllm.config.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveProportion,
    Proportion,
    Seed,
)
from jaxllm.config.shipped import find_config, listing

if TYPE_CHECKING:
    from jaxllm.engine.config import SamplingConfig


def _argument(metavar: str) -> Any:
    """Marks a positional argument, and gives it a name in usage lines."""
    return tyro.conf.Positional, tyro.conf.arg(metavar=metavar)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """A stage's model, and how tokens are sampled from it."""

    stage_dir: Annotated[str, *_argument("STAGE_DIR")]
    """Directory of a stage that trained a model, for example runs/quickstart/ppo."""
    max_new_tokens: NonNegativeInt = 0
    """Longest response in tokens; 0 chooses."""
    temperature: NonNegativeFloat = 1.0
    """Higher is more varied; 0 is greedy."""
    top_p: PositiveProportion = 1.0
    """Nucleus sampling: sample from the smallest set of tokens with at least this probability."""
    top_k: NonNegativeInt = 0
    """Sample from the k most likely tokens only; 0: from all."""
    min_p: Proportion = 0.0
    """Sample from the tokens with at least this share of the likeliest one's probability; 0: from all."""
    repetition_penalty: PositiveFloat = 1.0
    """Divides the logits of tokens that are there already; 1: none, 1.1: fewer repetitions."""
    seed: Seed = 0
    """Random seed for sampling."""

    def sampling(self, default_length: int) -> "SamplingConfig":
        """Returns the config of the sampler; default_length: in tokens, if no --max-new-tokens is given."""
        from jaxllm.engine.config import SamplingConfig

        return SamplingConfig(
            max_new_tokens=self.max_new_tokens or default_length,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateArgs(SamplingOptions):
    """Complete a prompt. Only the text is written to standard output."""

    prompt: Annotated[str, tyro.conf.arg(metavar="TEXT")]
    """The text to complete."""
    # Declared again because its help names this command's default length.
    max_new_tokens: NonNegativeInt = 0
    """Longest completion in tokens; 0: 64, or fewer if the prompt leaves less room in the context."""
    chat: bool = False
    """Send the prompt as the user's message in the chat template."""
    num_samples: PositiveInt = 1
    """Number of completions."""
    best_of: PositiveInt = 1
    """Best-of-N: sample this many, print the one that the reward model of --reward-from prefers."""
    reward_from: str = ""
    """Stage directory of the reward model, for example runs/quickstart/reward."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatArgs(SamplingOptions):
    """Chat with a model: it streams its answers and remembers the conversation. /reset starts a new
    conversation, /quit ends."""

    max_new_tokens: NonNegativeInt = 0
    """Longest answer in tokens; 0: 128, or half of the model's context if that is less."""
    temperature: NonNegativeFloat = 0.7
    """Higher is more varied; 0 is greedy."""
    system: str = ""
    """System message."""


@dataclasses.dataclass(frozen=True)
class ImportArgs:
    """Make a stage directory from a downloaded model. generate, chat, score and export accept it, and so
    does init_from in a config."""

    source: Annotated[str, *_argument("SOURCE")]
    """Folder with config.json, *.safetensors and a tokenizer, a .gguf file, or hf://ORG/NAME[@REVISION]."""
    out: Annotated[str, *_argument("STAGE_DIR")]
    """Directory to create."""


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Write a stage's model as safetensors with config.json and tokenizer; a reward model becomes a
    classifier."""

    stage_dir: Annotated[str, *_argument("STAGE_DIR")]
    """Directory of a stage that trained a model, or of an imported model."""
    out: Annotated[str, *_argument("FOLDER")]
    """Directory to create."""
    dtype: str = ""
    """float32, bfloat16 or float16; empty: that of an imported model, or bfloat16."""
    shard_gb: PositiveFloat = 5.0
    """Maximum size of a file, in GB."""
    adapters: bool = False
    """Only the adapters of a model trained with LoRA, in PEFT's format."""


@dataclasses.dataclass(frozen=True)
class HarnessArgs:
    """Run EleutherAI's lm-evaluation-harness on a stage's model. The options after STAGE_DIR are the
    harness's own: --tasks NAME ..., --limit N and so on."""

    stage_dir: Annotated[str, *_argument("STAGE_DIR")]
    """Directory of a stage that trained a model, or of an imported model."""


@dataclasses.dataclass(frozen=True)
class ConfigArgs:
    """Print a config with every default filled in, or how it differs from another. Fields can be
    overridden with --section.field VALUE, as for a stage."""

    config: Annotated[str, *_argument("CONFIG")]
    """Config file, or the name of a shipped config."""
    diff: Annotated[str, tyro.conf.arg(metavar="OTHER")] = ""
    """Print only the fields that differ from this config."""


@dataclasses.dataclass(frozen=True)
class ConfigsArgs:
    """List the configs that ship with the program. Every command accepts one by its name."""


def generate(args: Sequence[str]) -> None:
    """`jaxllm generate`."""
    options: GenerateArgs = _parse("generate", args)
    # Each needs the other. Checked before JAX is imported, which takes seconds.
    if (options.best_of > 1) != bool(options.reward_from):
        raise InputError(
            "--best-of: give a number above 1 together with --reward-from STAGE_DIR, or neither"
        )
    from jaxllm import chat
    from jaxllm.runtime import compile_cache

    compile_cache.enable()
    completions = chat.answer_once(
        options.stage_dir,
        options.prompt,
        options.chat,
        options.sampling(default_length=64),
        options.num_samples,
        options.seed,
        best_of=options.best_of,
        reward_from=options.reward_from,
        shorten=not options.max_new_tokens,
    )
    for text in completions:
        print(text, flush=True)


def chat(args: Sequence[str]) -> None:
    """`jaxllm chat`."""
    options: ChatArgs = _parse("chat", args)
    from jaxllm.chat import converse
    from jaxllm.runtime import compile_cache

    compile_cache.enable()
    sampling = options.sampling(default_length=128)
    shorten = not options.max_new_tokens
    converse(options.stage_dir, sampling, options.seed, options.system, shorten=shorten)


def serve(args: Sequence[str]) -> None:
    """`jaxllm serve`."""
    options = _parse("serve", args)
    from jaxllm.run import set_cpu_devices
    from jaxllm.runtime import compile_cache

    set_cpu_devices(max(options.tensor, 1))
    compile_cache.enable()
    try:
        # Imports packages of an extra, which may be missing.
        from jaxllm.serve.command import command
    except ModuleNotFoundError as error:
        raise InputError(f"jaxllm serve: needs {error.name}; pip install 'jaxllm[web]'") from None
    command(options)


def import_model(args: Sequence[str]) -> None:
    """`jaxllm import`."""
    options: ImportArgs = _parse("import", args)
    from jaxllm.pretrained import convert

    convert.import_model(options.source, options.out)


def export_model(args: Sequence[str]) -> None:
    """`jaxllm export`."""
    options: ExportArgs = _parse("export", args)
    from jaxllm.pretrained import convert

    convert.export_model(
        options.stage_dir, options.out, options.dtype, options.shard_gb, options.adapters
    )


def score(args: Sequence[str]) -> None:
    """`jaxllm score`."""
    options = _parse("score", args)
    from jaxllm.evaluation import tasks
    from jaxllm.run import set_cpu_devices
    from jaxllm.runtime import compile_cache

    set_cpu_devices(1)  # it uses all cores
    compile_cache.enable()
    tasks.command(options)


def status(args: Sequence[str]) -> None:
    """`jaxllm status`."""
    options = _parse("status", args)
    from jaxllm.report import status as report

    report.command(options)


def fit_scaling(args: Sequence[str]) -> None:
    """`jaxllm fit-scaling`."""
    options = _parse("fit-scaling", args)
    from jaxllm.scaling.command import command

    command(options)


def plan(args: Sequence[str]) -> None:
    """`jaxllm plan`."""
    # Set before JAX is imported: it reads them then. The compiler for TPUs that are not attached runs
    # on the CPU, must not ask the cloud which TPU this is, and may be loaded by several plans at once.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    own, overrides = _split_overrides(args)
    options = _parse("plan", own)
    from jaxllm.plan import planning

    planning.command(options, read_config("plan", [options.config, *overrides]))


def _split_overrides(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """(a tool's own arguments, flags that override fields of a config): only names of the latter have a dot."""
    own: list[str] = []
    overrides: list[str] = []
    kind = own
    for arg in args:
        if arg.startswith("--"):
            kind = overrides if "." in arg.split("=")[0] else own
        # A value belongs to the flag before it.
        kind.append(arg)
    return own, overrides


def run_harness(args: Sequence[str]) -> None:
    """`jaxllm lm_eval`: the harness parses what follows the stage directory."""
    # Only the first argument: the harness has a parser for the others.
    options: HarnessArgs = _parse("lm_eval", args[:1])
    from jaxllm.run import set_cpu_devices

    set_cpu_devices(1)
    try:
        # Imports the harness's own package, which is an extra and may be missing.
        from jaxllm.evaluation.harness import harness
    except ModuleNotFoundError as error:
        raise InputError(
            f"jaxllm lm_eval: needs {error.name}; pip install 'jaxllm[lm_eval]'"
        ) from None
    harness(options.stage_dir, args[1:])


def list_configs(args: Sequence[str]) -> None:
    """`jaxllm configs`."""
    _parse("configs", args)
    print("\n".join(listing()), end="")


def show_config(args: Sequence[str]) -> None:
    """`jaxllm config`: a config as YAML, or its differences from another, a line each."""
    # --diff belongs to this command; every other flag is a field of the config, as for a stage:
    #   tiny --sft.num-steps 7 --diff addition  ->  tiny --diff addition  and  --sft.num-steps 7
    flags = list(args)
    diff = []
    if "--diff" in flags:
        start = flags.index("--diff")
        diff = flags[start : start + 2]
        del flags[start : start + 2]
    options: ConfigArgs = _parse("config", [*flags[:1], *diff])
    import yaml

    tree = to_tree(read_config("config", [options.config, *flags[1:]]))
    if not options.diff:
        print(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), end="")
        return
    for line in differences(to_tree(read_config("config", [options.diff])), tree):
        print(line)


def _parse(tool: str, args: Sequence[str]) -> Any:
    """Returns the options of a tool, an instance of the class that its row in the table of tools names."""
    return tyro_cli(stages.load(tools.TABLE[tool].options), args, f"jaxllm {tool}")


def read_config(command: str, args: Sequence[str]) -> Any:
    """Reads the config of a stage's command.

    Args:
        command: its name, for errors.
        args: a config file or the name of a shipped config, then flags that override its fields.
    """
    if not args or args[0].startswith("-"):
        raise InputError(
            f"jaxllm {command}: give a config file first, or a name that `jaxllm configs` lists"
        )
    path = find_config(args[0])
    if command == "rank":
        args = _without_alias(args)
    # The flags are parsed over what the file says, since some replace one item of a list in it.
    config = _config_class()
    overrides = parse_overrides(config, load(config, path), args[1:], f"jaxllm {command} CONFIG")
    return load(config, path, overrides)


def _without_alias(args: Sequence[str]) -> list[str]:
    """Replaces --browser, which only `jaxllm rank` has, by the fields that it stands for."""
    meaning = ["--rank.annotator", "browser", "--rank.open-browser"]
    expanded = []
    for arg in args:
        expanded += meaning if arg == "--browser" else [arg]
    return expanded


def explain_stage(command: str, args: Sequence[str]) -> None:
    """Prints the options of a stage's command, with the values of the config if one is given.

    --help explains the common options and the stage's own section, --help-all every section.
    """
    everything = "--help-all" in args
    # `jaxllm sft tiny --help` shows the values of that config as defaults, `jaxllm sft --help` the
    # defaults of the fields.
    config = _config_class()
    given = load(config, find_config(args[0])) if not args[0].startswith("-") else config()
    shown = config if everything else _config_class(command)
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(shown)}
    text = tools.RUN_HELP if command == "run" else stages.named(command).help
    about = f"{text[:1].upper()}{text[1:]}. --help-all explains every stage."
    if everything:
        about = "Every option of every stage."
    tyro_cli(shown, ["--help"], f"jaxllm {command} CONFIG", shown(**values), about)


def _config_class(command: str = "") -> Any:
    """Returns a config class with the common sections and that of a stage's command, or with all sections."""
    # Of the table as it is now, which may have a row that life.Config has not.
    from jaxllm.life import config_class

    return config_class([row for row in stages.TABLE if command in ("", row.name)])


def print_completion(shell: str) -> None:
    """Prints a script that completes the commands and their options in a shell.

    shell: bash, zsh or fish.
    """
    if shell not in ("bash", "zsh", "fish"):
        raise InputError(f"--tyro-print-completion {shell!r}: must be bash, zsh or fish")
    classes = {}
    for command in ("run", *stages.names()):
        # Only the sections that the command's --help explains: with all of them the script is five times as long.
        classes[command] = _config_class(command)
    for name, tool in tools.TABLE.items():
        classes[name] = stages.load(tool.options)
    with contextlib.suppress(SystemExit):  # tyro prints the script and exits
        tyro.extras.subcommand_cli_from_dict(
            classes, prog="jaxllm", args=["--tyro-print-completion", shell]
        )
    if shell == "bash":
        print(_BASH_FILES)


# tyro's function answers with one empty word if no option matches, which would keep bash from
# completing file names.
_BASH_FILES = """
_jaxllm() { _tyro_jaxllm; [[ -n ${COMPREPLY[*]} ]] || COMPREPLY=(); }
complete -o default -F _jaxllm jaxllm"""
