"""Every module of the package has a test file of its name, or an entry below that says where it is tested.

jaxllm/data/store.py is tested in tests/data/test_store.py, and the code of jaxllm/config/__init__.py in
tests/config/test_config.py. An `__init__.py` without functions and classes needs no test.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxllm"
TESTS = ROOT / "tests"

# Module -> the file that tests it. Mostly parts of one thing, which only say something together.
TESTED_IN = {
    # What a user types and reads.
    "__init__.py": "tests/test_api.py",
    "__main__.py": "tests/test_terminal.py",
    "chat.py": "tests/test_terminal.py",
    "run.py": "tests/test_life.py",
    "workspace.py": "tests/test_wrong_input.py",
    "config/functions.py": "tests/demo/test_annotators.py",
    "config/shipped.py": "tests/test_api.py",
    # Training: the loop with its optimizer and its batches.
    "loop.py": "tests/test_train.py",
    "optim.py": "tests/test_train.py",
    "runtime/prefetch.py": "tests/test_train.py",
    # Records from their files to rows of tokens.
    "data/cache.py": "tests/data/test_store.py",
    "data/contamination.py": "tests/data/test_scored_bytes.py",
    "data/file_formats.py": "tests/data/test_formats.py",
    "data/files.py": "tests/data/test_formats.py",
    "data/format.py": "tests/data/test_data.py",
    "data/loader.py": "tests/data/test_packing.py",
    "data/messages.py": "tests/data/test_wrong_data.py",
    "data/readers.py": "tests/data/test_formats.py",
    "data/records.py": "tests/data/test_wrong_data.py",
    "data/sources.py": "tests/data/test_formats.py",
    "data/splits.py": "tests/data/test_data.py",
    "data/templates.py": "tests/data/test_wrong_data.py",
    # The model is compared as a whole, on one device, on meshes and with published models.
    "models/attention.py": "tests/models/test_transformer.py",
    "models/config.py": "tests/models/test_transformer.py",
    "models/layers.py": "tests/models/test_mutations.py",
    "models/next_token.py": "tests/models/test_mtp.py",
    "models/pipeline.py": "tests/test_sharded.py",
    "models/rope.py": "tests/models/test_transformer.py",
    "models/scalar.py": "tests/models/test_transformer.py",
    "pretrained/downloads.py": "tests/pretrained/test_convert.py",
    "pretrained/family_fields.py": "tests/pretrained/test_family_config.py",
    "pretrained/safetensors_files.py": "tests/pretrained/test_convert.py",
    "tokenizers/chat_template.py": "tests/tokenizers/test_published.py",
    # PPO: the update's parts against NumPy, and as a whole against a known optimum (test_proofs.py).
    "rl/config.py": "tests/stages/test_ppo.py",
    "rl/experience.py": "tests/stages/test_ppo.py",
    "rl/held_out.py": "tests/stages/test_ppo.py",
    "rl/layouts.py": "tests/stages/test_ppo.py",
    "rl/numerals.py": "tests/rl/test_rewards.py",
    "rl/objectives.py": "tests/stages/test_ppo.py",
    "rl/planned.py": "tests/plan/test_planning.py",
    "rl/programs.py": "tests/stages/test_ppo.py",
    "rl/roles.py": "tests/stages/test_ppo.py",
    "rl/rollout_log.py": "tests/test_life.py",
    "rl/score_functions.py": "tests/rl/test_rewards.py",
    "rl/scoring.py": "tests/stages/test_ppo.py",
    "rl/update.py": "tests/stages/test_ppo.py",
    # Stages are what a life consists of.
    "stages/__init__.py": "tests/stages/test_table.py",
    "stages/evaluate.py": "tests/test_life.py",
    "stages/language_model.py": "tests/test_life.py",
    "stages/preference.py": "tests/test_life.py",
    "stages/reinforce.py": "tests/test_life.py",
    "stages/sample.py": "tests/test_life.py",
    "stages/tokenizer.py": "tests/test_life.py",
    # The rest.
    "evaluation/harness.py": "tests/evaluation/test_scoring.py",
    "evaluation/tasks.py": "tests/evaluation/test_scoring.py",
    "plan/estimate.py": "tests/plan/test_planning.py",
    "runtime/console.py": "tests/test_terminal.py",
    "runtime/files.py": "tests/test_metrics.py",
    "runtime/hardware.py": "tests/test_terminal.py",
    "runtime/tree_shapes.py": "tests/runtime/test_checkpoint.py",
}


def needs_a_test(file):
    if file.name != "__init__.py":
        return True
    code = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, code) for node in ast.parse(file.read_text()).body)


MODULES = {
    file.relative_to(PACKAGE).as_posix(): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if needs_a_test(file)
}


def file_of_its_name(module):
    """The test file that belongs to a module, whether it exists or not."""
    file = MODULES[module]
    name = file.parent.name if file.name == "__init__.py" else file.stem
    return TESTS / file.parent.relative_to(PACKAGE) / f"test_{name}.py"


def files_that_name(module):
    """Test files that import the module, to choose an entry from."""
    words = ["jaxllm", *Path(module).with_suffix("").parts]
    dotted = ".".join(words)
    imported = f"from {'.'.join(words[:-1])} import "
    found = []
    for file in sorted(TESTS.rglob("test_*.py")):
        lines = file.read_text().splitlines()
        if any(dotted in line or (imported in line and words[-1] in line) for line in lines):
            found.append(file.relative_to(ROOT).as_posix())
    return found


def test_every_module_has_a_test_file():
    missing = []
    for module in MODULES:
        if module not in TESTED_IN and not file_of_its_name(module).exists():
            imported = ", ".join(files_that_name(module)) or "no test"
            missing.append(f'"{module}": "",  # imported in {imported}')
    assert not missing, "write test files or add to TESTED_IN:\n" + "\n".join(missing)


def test_every_entry_is_needed_and_names_a_file():
    wrong = []
    for module, test in TESTED_IN.items():
        if module not in MODULES:
            wrong.append(f"{module} does not exist: remove the entry")
        elif file_of_its_name(module).exists():
            wrong.append(f"{module} has a test file of its name: remove the entry")
        elif not (ROOT / test).exists():
            wrong.append(f"{module}: {test} does not exist: name another file")
    assert not wrong, "\n".join(wrong)
