"""The table of tools: the commands that are not stages.

Like the table of stages it is plain data that names code as "module:name", so that `jaxllm --help` takes no
longer than Python itself.
"""

import dataclasses

RUN_HELP = "all stages in order; finished stages are skipped, an interrupted one resumes"


@dataclasses.dataclass(frozen=True)
class Tool:
    """A command that is not a stage."""

    usage: str
    """What it takes, for the list of commands."""
    help: str
    """What it does, in one line."""
    options: str
    """The class of its options, as "module:name": imported when needed."""
    run: str
    """A function that parses the arguments after the command's name and does the work, as "module:name"."""


# In the order of `jaxllm --help`.
TABLE: dict[str, Tool] = {
    "generate": Tool(
        usage="STAGE_DIR --prompt TEXT [options]",
        help="complete a prompt with a stage's model",
        options="jaxllm.commands:GenerateArgs",
        run="jaxllm.commands:generate",
    ),
    "chat": Tool(
        usage="STAGE_DIR [options]",
        help="chat with a stage's model",
        options="jaxllm.commands:ChatArgs",
        run="jaxllm.commands:chat",
    ),
    "serve": Tool(
        usage="DIR ... [--browser] [options]",
        help="serve models in OpenAI's protocol, with pages to chat, compare and watch",
        options="jaxllm.serve.config:ServeArgs",
        run="jaxllm.commands:serve",
    ),
    "import": Tool(
        usage="SOURCE STAGE_DIR",
        help="make a stage directory from a published model: safetensors, GGUF or hf://ORG/NAME",
        options="jaxllm.commands:ImportArgs",
        run="jaxllm.commands:import_model",
    ),
    "export": Tool(
        usage="STAGE_DIR FOLDER [options]",
        help="write a stage's model for other programs: safetensors, config.json, tokenizer",
        options="jaxllm.commands:ExportArgs",
        run="jaxllm.commands:export_model",
    ),
    "score": Tool(
        usage="STAGE_DIR ... --task FILE ... [options]",
        help="score stages' models on tasks in JSONL files, side by side",
        options="jaxllm.evaluation.config:ScoreArgs",
        run="jaxllm.commands:score",
    ),
    "status": Tool(
        usage="RUN_DIR [--watch] [--json]",
        help="where a run is, here or in a store: stage, step, speed, last save",
        options="jaxllm.report.status_config:StatusArgs",
        run="jaxllm.commands:status",
    ),
    "fit-scaling": Tool(
        usage="RUNS... [--flops X] [--target LOSS]",
        help="fit a scaling law to finished runs: what larger ones reach and cost",
        options="jaxllm.scaling.config:FitScalingArgs",
        run="jaxllm.commands:fit_scaling",
    ),
    "plan": Tool(
        usage="CONFIG --topology NAME [options]",
        help="compile a stage's step for TPUs that are not attached: memory and cost",
        options="jaxllm.plan.config:PlanArgs",
        run="jaxllm.commands:plan",
    ),
    "lm_eval": Tool(
        usage="STAGE_DIR --tasks NAME ...",
        help="run EleutherAI's lm-evaluation-harness on a stage's model",
        options="jaxllm.commands:HarnessArgs",
        run="jaxllm.commands:run_harness",
    ),
    "configs": Tool(
        usage="",
        help="list the configs that ship with the program; commands accept their names",
        options="jaxllm.commands:ConfigsArgs",
        run="jaxllm.commands:list_configs",
    ),
    "config": Tool(
        usage="CONFIG [--diff OTHER]",
        help="print a config with every default filled in, or how it differs from another",
        options="jaxllm.commands:ConfigArgs",
        run="jaxllm.commands:show_config",
    ),
}
