"""The direction of dependencies, and what an import must not cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "xmc_trainer"
# What a module, or every module of a package, may import of ours. The longest name that fits counts.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "launch": {"errors"},
    "metrics": set(),
    "parallel": {"errors", "launch"},
    "rng": set(),
    "schedules": set(),
    "signals": set(),
    "step_clock": set(),
    "version": set(),
    "config": {"config", "errors", "schedules"},
    "kernels": {"kernels", "rng"},
    "head": {"head", "kernels", "parallel", "rng"},
    "data": {"data", "errors"},
    "encoder": {"encoder", "errors"},
    "engine": {"encoder", "engine", "errors", "launch", "parallel"},
    "plan": {"config", "data", "encoder", "engine", "errors", "head", "kernels", "parallel"},
    "checkpoint.folder": {"errors", "files", "parallel"},
    "checkpoint.finite": {"errors", "parallel"},
    "checkpoint.encoder_state": {"encoder", "engine"},
    "checkpoint.saved_model": {"checkpoint.folder", "encoder", "errors", "files", "head", "parallel"},
    "checkpoint.model_config": {"checkpoint.folder", "config", "errors"},
    "run_folder": {"checkpoint.folder", "config", "errors", "files", "parallel"},
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def is_in(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def test_dependencies_point_downwards():
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        rules = [name for name in ALLOWED if is_in(module_of(path), name)]
        if not rules:
            continue
        checked += 1
        names = {name.removeprefix("xmc_trainer.") for name in imports_of(path) if name.startswith("xmc_trainer.")}
        wrong = [name for name in names if not any(is_in(name, allowed) for allowed in ALLOWED[max(rules, key=len)])]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
    assert checked > 50


def test_only_parallel_talks_to_other_processes():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "parallel.py":
            assert not any(name.startswith("torch.distributed") for name in imports_of(path)), path


def test_importing_the_package_stays_light():
    code = "import sys, xmc_trainer.head, xmc_trainer.config; print([m for m in ('triton', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_entry_script_stays_short():
    assert len((ROOT / "launchers" / "train.py").read_text().splitlines()) < 80
