"""Several machines, simulated by two network namespaces; and the Slurm example, with stubs for Slurm's commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.test_launchers import BIN, ROOT, curve, losses_of, records_of, settings_value
from xmc_trainer.run_folder import find_checkpoint

pytestmark = pytest.mark.slow

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
ADDRESSES = ["10.77.0.1", "10.77.0.2"]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Return the names of two network namespaces, connected by the interfaces v0 and v1."""
    names = [f"xmc{os.getpid()}-{number}" for number in range(2)]
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", names[0]], capture_output=True).returncode:
        pytest.skip("network namespaces need root and the command ip")
    try:
        ip("netns", "add", names[1])
        ip("-n", names[0], "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[number]}/24", "dev", f"v{number}")
            ip("-n", name, "link", "set", f"v{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def settings_and_one(toy_settings_in, tmp_path_factory):
    """Settings, and the losses of one process."""
    settings = [*toy_settings_in(tmp_path_factory.mktemp("nodes")), "training.optimization.max_steps=12"]
    return settings, curve(settings, "here")


@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])  # torchrun has accelerate's agent
def test_two_machines_train_as_one_process(settings_and_one, hosts, launcher, tmp_path):
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    settings, one = settings_and_one
    running = []
    for rank, host in enumerate(hosts):
        start = {
            "accelerate": [
                "accelerate", "launch", "--config_file", "launchers/examples/accelerate_two_machines.yaml",
                "--machine_rank", str(rank), "--main_process_ip", ADDRESSES[0],
            ],
            "deepspeed": [
                "deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--node_rank", str(rank),
                "--master_addr", ADDRESSES[0], "--master_port", "29500",
            ],
        }[launcher]  # fmt: skip
        more = ["--deepspeed_config", "ds_configs/zero2.json"] if launcher == "deepspeed" else []
        command = ["ip", "netns", "exec", host, *start, "launchers/train.py", *more, *settings, f"log_fname={launcher}"]
        running.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": f"v{rank}"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
        )
    try:
        for process in running:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in running:
            if process.poll() is None:  # the ranks notice that their launcher has died
                process.kill()
    assert losses_of(Path(settings_value(settings, "output_dir=")) / launcher) == pytest.approx(one, rel=1e-5)


def test_the_slurm_example_stops_at_the_notice_and_resumes(toy_settings, tmp_path):
    """With stubs for Slurm's commands, on one node: the batch shell passes the notice on to the task."""
    if not (ROOT / ".venv").is_dir():
        pytest.skip("the example enters .venv")
    commands = {
        "srun": f'test "$1" = --kill-on-bad-exit=1 || exit 9; shift; echo $$ > {tmp_path}/task; exec "$@"',
        "scancel": f'test "$*" = "--signal=USR1 7" && kill -USR1 $(cat {tmp_path}/task)',
        "scontrol": f'case "$*" in "show hostnames n1") echo 127.0.0.1;; "requeue 7") touch {tmp_path}/queued;; *) exit 9; esac',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": "7",
    }
    slurm["SLURM_STEP_NUM_TASKS"] = "2"  # tasks without a launcher of their own are refused
    slurm |= {"GPUS": "1", "PATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT['PATH']}"}
    settings = [
        *toy_settings,
        "training.optimization.max_steps=200",
        "training.evaluation.test_evaluate_every=100",
        "log_fname=slurm",
    ]
    run = Path(settings_value(toy_settings, "output_dir=")) / "slurm"

    def submit():
        return subprocess.Popen(
            ["bash", "launchers/examples/slurm.sh", *settings], cwd=ROOT, env=os.environ | ENVIRONMENT | slurm,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    job = submit()
    while job.poll() is None and not (run / "log.jsonl").is_file():
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=300)
    assert job.returncode and (tmp_path / "queued").is_file(), output
    assert "SIGTERM: ended after step" in output and find_checkpoint(run) is not None
    (tmp_path / "queued").unlink()
    job = submit()
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0 and not (tmp_path / "queued").exists(), output
    assert [record["event"] for record in records_of(run)].count("resume") == 1 and (run / "model").is_dir()
