"The launchers: the job's file, and real jobs on a Slurm of two nodes whose processes are killed, stopped and cancelled."
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from servers.slurm import has_slurm, slurm

from domain_adapt import launch
from domain_adapt.params import Params, UserError, validate

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40


def params(**train) -> Params:
    return validate(dict(run="example", model="m", corpora={"sec": dict(kind="domain", source="sec", path="sec")}, tokens={"replay": 0},
                         merge={"candidates": [dict(name="half", method="linear", weight=0.5)]}, train=train))


# ---- the file

def directives(text: str) -> dict[str, str]:
    return dict((line[len("#SBATCH --"):] + "=").split("=", 1) for line in text.splitlines() if line.startswith("#SBATCH"))


def test_the_file_asks_for_what_the_params_say(tmp_path):
    text = launch.script(params(launcher="slurm", nodes=16, processes=8, job=dict(
        partition="gpu", time="3-00:00:00", signal_before=600, restarts=7, setup=["module load cuda", "export A=1"],
        options={"account": "lab", "mem": "0", "gpus-per-node": "h100:8", "exclusive": ""})), tmp_path / "train-0123")
    asked = directives(text)
    assert asked["nodes"] == "16=" and asked["ntasks-per-node"] == "1=" and asked["gpus-per-node"] == "h100:8="
    assert asked["signal"] == "USR1@600=" and asked["requeue"] == ""
    assert asked["job-name"] == "domain-adapt-train-0123=" and asked["output"] == f"{tmp_path}/train-0123/log.txt="
    assert asked["open-mode"] == "append=" and asked["time"] == "3-00:00:00=" and asked["partition"] == "gpu="
    assert asked["account"] == "lab=" and asked["mem"] == "0=" and asked["exclusive"] == ""
    assert "\nprocesses=8\n" in text and "\nrestarts=7\n" in text and "    module load cuda\n    export A=1\n" in text


# ---- a Slurm of two nodes

@pytest.fixture(scope="module")
def slurm_here(tmp_path_factory):
    if not has_slurm(): pytest.skip("Slurm is not installed, or we are not root (apt: slurm-wlm munge)")
    with slurm(tmp_path_factory.mktemp("slurm") / "at") as environment: yield environment


@pytest.fixture
def cluster(slurm_here, monkeypatch):
    for key, value in slurm_here.items(): monkeypatch.setenv(key, value)
    monkeypatch.setattr(launch, "POLL", 0.5)
    yield
    subprocess.run(["scancel", "--me"])
    wait(lambda: not subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout.strip(), 60)


def wait(holds, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, holds
        time.sleep(0.1)
    return found


def at_once(job: str) -> None:
    "Let a job that was put back into the queue start now; Slurm would let two minutes pass."
    subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], stderr=subprocess.DEVNULL)


class Standin:
    "A folder whose job runs tests/standin_work.py in place of the trainer: a sum over two nodes, one process each."
    def __init__(self, folder: Path, steps: int = STEPS, **job):
        self.out, package = folder / "train-0123", folder / "package" / "domain_adapt"
        package.mkdir(parents=True)
        self.out.mkdir()
        (package / "__init__.py").touch()
        (package / "train.py").write_text((ROOT / "tests" / "standin_work.py").read_text())
        setup = [f"package={package.parent}", "export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1"]
        job = dict(partition="main", time="10", gpus=False, signal_before=60, setup=setup) | job
        self.params = params(launcher="slurm", nodes=2, steps=steps, global_batch=8, job=job)
        (self.out / "job.json").write_text(json.dumps(dict(params=self.params.model_dump(mode="json"), out=str(self.out))))

    def run(self, hurry: bool = True) -> None:
        "Send and follow; a thread sees to it that no restart waits."
        over = threading.Event()
        def push():
            while not over.wait(0.5):
                if hurry and (self.out / "slurm.json").exists(): at_once(self.job)
        thread = threading.Thread(target=push)
        thread.start()
        try: launch.slurm(self.params, self.out)
        finally: over.set(); thread.join()

    def behind(self) -> tuple[threading.Thread, list]:
        "`run` in a thread, and where its error will be."
        errors = []
        def one():
            try: self.run()
            except BaseException as e: errors.append(e)
        thread = threading.Thread(target=one)
        thread.start()
        return thread, errors

    @property
    def job(self) -> str: return json.loads((self.out / "slurm.json").read_text())["job"]
    @property
    def step(self) -> int: return launch.step_done(self.out)
    @property
    def result(self) -> dict: return json.loads((self.out / "result.json").read_text())
    @property
    def log(self) -> str: return (self.out / "log.txt").read_text()


@pytest.mark.server
def test_a_job_on_two_nodes_is_sent_followed_and_done_once(cluster, tmp_path):
    one = Standin(tmp_path)
    one.run()
    assert one.result == dict(step=STEPS, total=2 * sum(range(1, STEPS + 1)), world=2) and one.log.count("starts on") == 1
    job = one.job
    one.run()
    assert one.job == job and one.log.count("starts on") == 1


@pytest.mark.server
@pytest.mark.fault
def test_a_killed_rank_puts_the_job_back_and_it_ends_as_it_would_have(cluster, tmp_path):
    one = Standin(tmp_path)
    (one.out / "die-1-17").touch()
    one.run()
    assert one.result == dict(step=STEPS, total=2 * sum(range(1, STEPS + 1)), world=2)
    assert one.log.count("starts on") == 2 and "restart 1" in one.log
