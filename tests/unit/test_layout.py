"""The direction of dependencies, and imports that must stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "xmc_trainer"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in PACKAGE.rglob("*.py")
}
# Module or package -> modules of this project that it may import. The longest matching name counts; every module needs one.
# "" is the package itself, which holds the version.
ALLOWED = {
    "": set(),
    "__main__": {"commands.cli"},
    "commands": {
        "", "builders", "calibration", "checkpoint", "commands", "config", "data", "encoder", "errors", "evaluation", "files", "head",
        "labels", "launch", "library_log", "measures", "metrics", "model", "parallel", "plan", "run_folder", "signals",
    },
    "commands.bench.step_times": {"builders", "config", "data", "encoder", "engine", "hooks"},
    "commands.doctor": {"", "errors", "kernels", "version"},
    "builders": {"builders", "config", "data", "encoder", "engine", "errors", "parallel"},
    "builders.data": {"builders.inputs", "config", "data", "errors", "labels", "metrics"},
    "builders.inputs": {
        "checkpoint.model_manifest", "config", "data.layouts", "data.sources", "encoder.adapters", "errors", "run_folder",
    },
    "builders.head": {"builders", "config", "data", "encoder", "engine", "errors", "head", "kernels.dispatch", "labels", "parallel"},
    "builders.hooks": {"config", "errors", "head", "hooks", "schedules"},
    "builders.recipe": {"builders.inputs", "config", "errors"},
    "builders.saved_model": {"builders", "checkpoint", "config", "data", "errors", "evaluation", "measures"},
    "builders.training": {
        "builders", "checkpoint", "config", "data", "encoder", "encoder_step", "errors", "hooks.base", "parallel", "run_folder",
        "step_clock", "trainer",
    },
    "plan": {"builders.encoder", "config", "data", "encoder", "engine", "errors", "head", "kernels.arguments", "kernels.dispatch", "parallel"},
    "trainer": {
        "checkpoint.finite", "checkpoint.saved_model", "config", "data", "encoder", "encoder_step", "engine", "errors", "evaluation",
        "head", "hooks.base", "metrics", "parallel", "run_folder", "signals", "step_records",
    },
    "encoder_step": {"engine", "errors", "head", "parallel"},
    "step_records": {"errors", "step_clock"},
    "step_clock": set(),
    "hooks": {"hooks.base"},
    "hooks.base": {"head"},
    "hooks.checkpoint": {"checkpoint.resume", "hooks.base", "signals"},
    "hooks.evaluate": {"hooks.base"},
    "hooks.logging": {"", "engine", "errors", "evaluation", "files", "head", "hooks.base", "metrics", "run_folder", "version"},
    "hooks.rewire": {"head", "hooks.base"},
    "hooks.schedule": {"hooks.base", "schedules"},
    "classifier": {"builders.recipe", "builders.training", "data.tables", "errors", "files", "model"},
    "model": {"checkpoint.saved_model", "data", "errors"},
    "evaluation": {"data", "errors", "head", "metrics", "step_clock"},
    "measures": {"metrics"},
    "calibration": set(),
    "checkpoint": set(),
    "checkpoint.encoder_state": {"encoder"},
    "checkpoint.finite": {"errors", "parallel"},
    "checkpoint.folder": {"errors", "files"},
    "checkpoint.model_config": {"checkpoint.folder", "config", "errors"},
    "checkpoint.model_manifest": {"calibration", "checkpoint.folder", "config.schema", "errors", "files"},
    "checkpoint.resume": {"checkpoint", "config", "engine", "errors", "files", "head", "run_folder"},
    "checkpoint.saved_model": {
        "", "calibration", "checkpoint.folder", "checkpoint.model_manifest", "encoder", "errors", "files", "head", "parallel",
    },
    "run_folder": {"checkpoint.folder", "config", "errors", "files"},
    "labels": {"data", "errors", "files", "labels", "parallel", "rng"},
    "head": {"head", "kernels.dispatch", "kernels.interface", "kernels.reference", "parallel", "rng"},
    "data": {"data", "errors", "signals"},
    "encoder": {"encoder", "errors"},
    "engine": {"errors", "launch", "parallel"},
    "kernels": set(),
    "kernels.dispatch": {"kernels"},
    "kernels.cuda": {"kernels.arguments", "kernels.cuda", "kernels.interface", "kernels.triton"},
    "kernels.triton": {"kernels.arguments", "kernels.interface", "kernels.triton"},
    "kernels.torch_sparse_head": {"kernels.interface", "kernels.reference"},
    "kernels.reference": {"kernels.eight_bits", "kernels.interface", "rng"},
    "kernels.eight_bits": {"rng"},
    "kernels.arguments": {"kernels.interface", "rng"},
    "kernels.interface": set(),
    "config": {"config", "errors", "schedules"},
    "parallel": {"errors", "launch"},
    "launch": {"errors"},
    "library_log": set(),
    "files": {"errors"},
    "errors": set(),
    "metrics": set(),
    "rng": set(),
    "schedules": set(),
    "signals": set(),
    "version": set(),
}  # fmt: skip
# The same for imports under TYPE_CHECKING.
ALLOWED_FOR_TYPES = {
    "": {"builders.training", "classifier", "config", "head", "model", "trainer"},
    "hooks": {"trainer"},
    "checkpoint.resume": {"trainer"},
    "commands.bench.step_times": {"trainer"},
    "head": {"head"},
    "checkpoint.folder": {"parallel"},
    "run_folder": {"parallel"},
}


def imported_names(nodes: list[ast.AST]) -> set[str]:
    """Return the imported modules. `from package import module` counts as the module, not the package."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name of the module"
            submodules = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            ours = {name for name in submodules.values() if name.removeprefix("xmc_trainer.") in MODULES}
            found |= ours if len(ours) == len(submodules) else ours | {node.module}
    return found


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Return (modules imported at run time, at the top or later; modules imported under TYPE_CHECKING)."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    blocks = [node for node in nodes if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"]
    typing = [node for block in blocks for statement in block.body for node in ast.walk(statement)]
    seen = {id(node) for node in typing}
    return imported_names([node for node in nodes if id(node) not in seen]), imported_names(typing)


def of_ours(names: set[str]) -> set[str]:
    """Select the imports of this package, without its name."""
    return {name.removeprefix("xmc_trainer").removeprefix(".") for name in names if is_in(name, "xmc_trainer")}


def is_in(module: str, name: str) -> bool:
    """Return whether `module` is `name` or lies in the package `name`."""
    return module == name or module.startswith(f"{name}.")


def rule_of(module: str, rules: dict[str, set[str]]) -> str | None:
    """Return the longest name in `rules` that matches a module."""
    return max((name for name in rules if is_in(module, name)), key=len, default=None)


def test_dependencies_point_downwards():
    for module, path in MODULES.items():
        rule = rule_of(module, ALLOWED)
        assert rule is not None, f"{path.relative_to(ROOT)}: enter what it may import into ALLOWED"
        running, typing = (of_ours(names) for names in imports_of(path))
        allowed = ALLOWED[rule]
        wrong = [name for name in running if not any(is_in(name, each) for each in allowed)]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
        allowed = allowed | ALLOWED_FOR_TYPES.get(rule_of(module, ALLOWED_FOR_TYPES), set())
        wrong = [name for name in typing if not any(is_in(name, each) for each in allowed)]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong} for types"


def test_rules_name_modules_and_all_are_needed():
    for rules, which in ((ALLOWED, 0), (ALLOWED_FOR_TYPES, 1)):
        used: dict[str, set[str]] = {name: set() for name in rules}
        for module, path in MODULES.items():
            if (rule := rule_of(module, rules)) is not None:
                used[rule] |= of_ours(imports_of(path)[which])
        for name, allowed in rules.items():
            unused = [each for each in allowed if not any(is_in(found, each) for found in used[name])]
            assert name in MODULES and not unused, f"{name or 'xmc_trainer'} does not import {unused}"


def test_there_are_no_import_circles():
    graph = {module: of_ours(imports_of(path)[0]) - {module} for module, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 200
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_only_parallel_imports_torch_distributed():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "parallel.py":
            names = set.union(*imports_of(path))
            assert not any(name.startswith("torch.distributed") for name in names), path


def test_the_names_of_the_package_are_loaded_lazily():
    code = """
        import sys, xmc_trainer
        before = [name for name in ("torch", "transformers", "yaml") if name in sys.modules]
        names = [getattr(xmc_trainer, name).__name__ for name in xmc_trainer.__all__]
        print(before, names == xmc_trainer.__all__, hasattr(xmc_trainer, "Nothing"), {*names} <= {*dir(xmc_trainer)})
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("[] True False True"), done.stdout + done.stderr


def test_importing_the_package_stays_light():
    code = "import sys, xmc_trainer.head, xmc_trainer.config; print([m for m in ('triton', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_loop_and_the_entry_script_stay_short():
    assert len((PACKAGE / "trainer.py").read_text().splitlines()) < 250
    assert len((ROOT / "launchers" / "train.py").read_text().splitlines()) < 80
