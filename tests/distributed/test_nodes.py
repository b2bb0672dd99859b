"""Several machines, simulated by two network namespaces; and the Slurm example there, with stubs for Slurm's commands."""

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
    settings = [*toy_settings_in(tmp_path_factory.mktemp("nodes")), "training.optimization.max_steps=40"]
    return settings, curve(settings, "here")


def start_on(host: str, rank: int, command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": f"v{rank}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_machines_train_as_one_process_under_deepspeed(settings_and_one, hosts, tmp_path):
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    settings, one = settings_and_one
    start = ["deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--master_addr", ADDRESSES[0],
             "--master_port", "29500"]  # fmt: skip
    script = ["launchers/train.py", "--deepspeed_config", "ds_configs/zero2.json", *settings, "log_fname=deepspeed"]
    running = [start_on(host, rank, [*start, "--node_rank", str(rank), *script]) for rank, host in enumerate(hosts)]
    try:
        for process in running:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in running:
            if process.poll() is None:  # the ranks notice that their launcher has died
                process.kill()
    assert losses_of(Path(settings_value(settings, "output_dir=")) / "deepspeed") == pytest.approx(one, rel=1e-5)


# Slurm's commands. srun starts a task on each machine, in its namespace; scancel signals the tasks alone.
SRUN = """test "$1" = --kill-on-bad-exit=1 || exit 9
shift
for rank in $(seq 0 $((SLURM_NNODES - 1))); do
    SLURM_NODEID=$rank GLOO_SOCKET_IFNAME=v$rank ip netns exec {host}-$rank "$@" &
    echo $! >> {folder}/tasks
done
status=0
for task in $(cat {folder}/tasks); do wait $task || status=$?; done
exit $status"""
SCANCEL = """test "$*" = "--signal=USR1 7" && kill -USR1 $(cat {folder}/tasks)"""
SCONTROL = """case "$*" in
"show hostnames m[1-2]") printf '10.77.0.1\\n10.77.0.2\\n';;
"requeue 7") touch {folder}/queued;;
*) exit 9
esac"""


def test_the_slurm_example_stops_on_two_machines_and_resumes_on_one(settings_and_one, hosts, tmp_path):
    """The batch shell passes the notice on to the tasks, whose launchers stop the training after a step."""
    if not (ROOT / ".venv").is_dir():
        pytest.skip("the example enters .venv")
    for name, text in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        text = text.format(folder=tmp_path, host=hosts[0].removesuffix("-0"))
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "m[1-2]",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NUM_TASKS": "2",  # tasks without a launcher of their own are refused
        "GPUS": "1",
        "PATH": f"{tmp_path}{os.pathsep}{ENVIRONMENT['PATH']}",
    }
    toy, one = settings_and_one
    settings = [*toy, "training.evaluation.test_evaluate_every=100", "log_fname=slurm"]
    run = Path(settings_value(toy, "output_dir=")) / "slurm"

    def submit(machines: int) -> subprocess.Popen[str]:
        (tmp_path / "tasks").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", "launchers/examples/slurm.sh", *settings], cwd=ROOT,
            env=os.environ | ENVIRONMENT | slurm | {"SLURM_NNODES": str(machines)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    job = submit(2)
    while job.poll() is None and not (run / "log.jsonl").is_file():
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=300)
    assert job.returncode and (tmp_path / "queued").is_file(), output
    assert "SIGTERM: ended after step" in output and find_checkpoint(run) is not None
    (tmp_path / "queued").unlink()
    job = submit(1)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0 and not (tmp_path / "queued").exists(), output
    assert [record["event"] for record in records_of(run)].count("resume") == 1
    assert losses_of(run) == pytest.approx(one, rel=1e-5)
