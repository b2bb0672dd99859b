"""The direction of dependencies, and what an import must not cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "xmc_trainer"
# Who may import what of the package; a folder stands for its modules. What is not listed may import anything.
ALLOWED = {
    "kernels": {"kernels", "rng"},
    "rng": set(),
    "launch": {"errors"},
    "parallel": {"errors", "launch"},
    "signals": set(),
    "errors": set(),
    "finite": {"errors", "parallel"},
    "metrics": set(),
    "schedules": set(),
    "encoder": {"errors"},
    "head": {"head", "kernels", "parallel", "rng"},
    "data": {"data", "errors"},
    "yaml_nodes": {"errors"},
    "fields": {"errors"},
    "config": {"errors", "fields", "saved_folder", "schedules", "yaml_nodes"},
    "files": {"errors"},
    "saved_folder": {"errors", "files", "parallel"},  # the ranks only as a type
    "meta_branch": {"head"},
    "engine": {"errors", "launch", "parallel"},
    "checkpoint": {"encoder", "errors", "files", "head", "parallel", "saved_folder"},
    "captured": set(),
    "flat_encoder": {"captured", "encoder"},
    "engine_state": {"flat_encoder"},
    "compiling": {"encoder"},
    "micro_batches": set(),
    "step_clock": set(),
    "run_folder": {"config", "errors", "files", "parallel", "saved_folder"},
    "resume": {
        "checkpoint",
        "config",
        "engine_state",
        "errors",
        "files",
        "head",
        "run_folder",
        "saved_folder",
        "trainer",
    },  # the trainer only as a type
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_dependencies_point_downwards():
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part not in ALLOWED:
            continue
        checked += 1
        names = {name.split(".")[1] for name in imports_of(path) if name.startswith("xmc_trainer.")}
        assert names <= ALLOWED[part], f"{path.relative_to(ROOT)} imports {names - ALLOWED[part]}"
    assert checked > 15


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
