"SmolLM2-135M on the quickstart's own tokens: under other layouts, and killed on two nodes of a real Slurm."
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

from domain_adapt.params import load_params
from domain_adapt.runs import Run
from servers.slurm import has_slurm, slurm
from test_launch import hurry

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parent.parent
QUICK = "params/quickstart.yaml"
SHORT = ["tokens.sequence_length=128", "train.steps=5", "train.global_batch=2", "train.micro_batch=1", "train.warmup=1", "train.precision=fp32",
         "train.validation={every: 5, tokens: 256}", "train.export_at=[1.0]"]
SAVING = "train.save={every: 2, keep: 1}"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "An outputs folder, removed at the end with those made from it: they hold checkpoints of 1.6 GB."
    folder = tmp_path_factory.mktemp("smollm2") / "outputs"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder.parent)


def command(home: Path, *more: str, stage: str = "train") -> tuple[list[str], dict]:
    sets = [x for s in [*SHORT, *more] for x in ("--set", s)]
    return [sys.executable, "-m", "domain_adapt.cli", stage, QUICK, *sets], os.environ | {"DOMAIN_ADAPT_OUTPUTS": str(home)}


def folder(home: Path, *more: str) -> Path:
    os.environ["DOMAIN_ADAPT_OUTPUTS"] = str(home)
    try: return Run(load_params(ROOT / QUICK, (*SHORT, *more))).stage("train").folder
    finally: del os.environ["DOMAIN_ADAPT_OUTPUTS"]


def trained(home: Path, *more: str) -> Path:
    words, env = command(home, *more)
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder(home, *more)


def metrics(out: Path) -> pd.DataFrame: return pd.read_json(out / "metrics.jsonl", lines=True).set_index("step")
def weights(out: Path) -> dict: return {k: v for f in (out / "hf" / "step_5").glob("*.safetensors") for k, v in load_file(f).items()}


@pytest.fixture(scope="module")
def one(home) -> Path:
    "One process."
    return trained(home, "train.max_epochs=1.0")


def copied(home: Path, name: str) -> Path:
    "Outputs of their own that have the same tokens."
    new = home.parent / name
    (new / ".stages").mkdir(parents=True)
    for f in (home / ".stages").glob("*"):
        if f.name.startswith(("ingest-", "tokens-")): shutil.copytree(f, new / ".stages" / f.name)
    return new


@pytest.fixture
def apart(home, one):
    "Outputs that are removed when the test is over."
    yield copied(home, "apart")
    shutil.rmtree(home.parent / "apart")


@pytest.fixture(scope="module")
def two(home, one) -> Path:
    "Two processes that share the optimizer."
    return trained(copied(home, "two"), "train.processes=2", "train.distributed_optimizer=true")


def same_training(out: Path, one: Path) -> None:
    for column in ("loss", "grad_norm", "heldout/sec", "heldout/news"):
        assert list(metrics(out)[column].dropna()) == pytest.approx(list(metrics(one)[column].dropna()), rel=1e-5), column
    a, b = weights(one), weights(out)
    assert a.keys() == b.keys() and (out / "mixture.csv").read_bytes() == (one / "mixture.csv").read_bytes()


@pytest.mark.parity
def test_losses_and_norms_are_those_of_one_process(apart, one): same_training(trained(apart, "train.processes=3", "train.layout={tp: 3}"), one)


@pytest.mark.parity
def test_losses_and_norms_of_a_shared_optimizer_are_those_of_one_process(two, one): same_training(two, one)


def wait_for_checkpoint(out: Path, child: subprocess.Popen) -> None:
    end = time.time() + 600
    while not (out / "checkpoints" / "latest.json").is_file():
        assert time.time() < end and child.poll() is None, child.communicate()
        time.sleep(0.05)


@pytest.mark.fault
@pytest.mark.server
@pytest.mark.equality
@pytest.mark.skipif(not has_slurm(), reason="needs Slurm (apt: slurm-wlm munge) and root")
def test_on_two_nodes_a_killed_rank_requeues_the_job_and_the_bits_are_the_same(apart, two, tmp_path):
    "The oracle is an uninterrupted run on two processes here."
    with slurm(tmp_path) as environment:
        words, env = command(apart, "train.launcher=slurm", "train.nodes=2", "train.processes=1", "train.distributed_optimizer=true", SAVING,
                             "train.job={gpus: false, partition: main, time: '0:20:00', setup: ['export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1']}")
        child = subprocess.Popen(words, env=env | environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        out = folder(apart)
        wait_for_checkpoint(out, child)
        ranks = [p for p in psutil.process_iter(["cmdline"]) if f"work('{out}" in " ".join(p.info["cmdline"] or []) and "torch.distributed.run" not in p.info["cmdline"]]
        assert len(ranks) == 2
        ranks[-1].kill()
        os.environ |= environment
        over = threading.Event()
        threading.Thread(target=hurry, args=(out, over), daemon=True).start()
        try: said = child.communicate(timeout=900)[0]
        finally:
            over.set()
            for name in environment: del os.environ[name]
        assert child.returncode == 0, said[-3000:]
    log = (out / "log.txt").read_text()
    assert "restart 1" in log and "torchrun" not in said
    a, b = weights(two), weights(out)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert metrics(out)["loss"].equals(metrics(two)["loss"]) and json.loads((out / "info.json").read_text())["nodes"] == 2
