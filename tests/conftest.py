"""What several tests share: tiny models, the tiny run's files, and where real data may lie."""
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from domain_adapt.runs import STAGES
from servers.slurm import has_slurm, slurm

os.environ.setdefault("OMP_NUM_THREADS", "1")    # tiny models lose more to a second thread than they gain
signal.signal(signal.SIGINT, signal.default_int_handler)    # what runs in the background may ignore it, and its children too

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny"
TINY_YAML = "params/tiny.yaml"
PLANTED = {"AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00", "AWS_SECRET_ACCESS_KEY": "planted/aws+secret", "HF_TOKEN": "hf_plantedplantedplanted1",
           "WRITERS_KEY": 'planted"writer\\key', "DATABASE_PASSWORD": "planted-ü-password"}
PLACES = {"AWS_ENDPOINT_URL": "http://jo:planted-login@127.0.0.1:9", "HF_ENDPOINT": "http://jo:planted-hub@127.0.0.1:9",
          "PIP_INDEX_URL": "http://jo:planted-pip@127.0.0.1:9/simple", "PIP_FIND_LINKS": ""}
HIDDEN = [v for k, v in PLANTED.items() if k != "AWS_ACCESS_KEY_ID"] + ["planted-login", "planted-hub", "planted-pip"]
CSVS = {
    "1_ingest/funnel.csv": "corpus,step,documents,characters",
    "3_train/mixture.csv": "corpus,asked,documents,tokens,share",
    "4_merge/sweep.csv": "name,method,parameters,domain_bits_per_byte,general_bits_per_byte,retention,recovery,on_front",
    "5_evaluate/perplexity.csv": "variant,tokens_seen,corpus,kind,half,documents,blocks,tokens,bytes,token_perplexity,word_perplexity,"
                                 "byte_perplexity,bits_per_byte,ci_low,ci_high,dtype",
    "5_evaluate/benchmarks.csv": "variant,suite,task,metric,value,stderr,ci_low,ci_high,n,fewshot,chat_template,dtype,seed,cut",
    "5_evaluate/chat.csv": "variant,kind,measure,value,ci_low,ci_high,n",
    "5_evaluate/contamination.csv": "variant,task,metric,items,short,hit,share,value,value_without",
    "5_evaluate/comparisons.csv": "variant,against,measure,difference,ci_low,ci_high,p,q,smallest_detectable,verdict",
}


def _make():
    spec = importlib.util.spec_from_file_location("make_tiny", TINY / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_model():
    "A function that saves a random Llama with a byte-level tokenizer: make_model(folder, seed, hidden, layers)."
    return _make().model


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, make_model) -> Path:
    "A two-layer random Llama with a tokenizer, as a HF folder."
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def dev_data() -> Path:
    "Real filings, papers and benchmarks for development; the test skips where there are none."
    folder = Path(os.environ.get("DOMAIN_ADAPT_DEV_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir(): pytest.skip(f"no development data at {folder}; DOMAIN_ADAPT_DEV_DATA can name it")
    return folder


@pytest.fixture(scope="session")
def cli():
    "Run the command line in a process of its own: cli('run', 'params/tiny.yaml', env={...}) -> CompletedProcess."
    def call(*words, env=None, timeout=600, **kw):
        return subprocess.run([sys.executable, "-m", "domain_adapt.cli", *map(str, words)], cwd=ROOT, text=True, capture_output=True,
                              env=os.environ | (env or {}), timeout=timeout, **kw)
    return call


def stages(text: str) -> dict[str, str]:
    "What each stage's last line said: 'done' or 'up to date'."
    words = [line.split() for line in text.splitlines() if line.split() and line.split()[0] in STAGES]
    return {w[0]: "done" if w[1] == "done" else " ".join(w[1:]) for w in words}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, cli) -> Path:
    "Outputs folder of a finished tiny run, made with secrets in the environment. Tests that change it work on a copy."
    outputs = tmp_path_factory.mktemp("outputs")
    done = cli("run", TINY_YAML, env={"DOMAIN_ADAPT_OUTPUTS": str(outputs), **PLANTED, **PLACES})
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [s for s in HIDDEN if s in done.stdout + done.stderr]
    assert set(stages(done.stdout).values()) == {"done"} and f"report: {outputs}/tiny/6_report/index.html" in done.stdout
    return outputs


@pytest.fixture(scope="module")
def slurm_here(tmp_path_factory):
    "The environment that finds a Slurm of two nodes."
    if not has_slurm(): pytest.skip("Slurm is not installed, or we are not root (apt: slurm-wlm munge)")
    with slurm(tmp_path_factory.mktemp("slurm") / "at") as environment: yield environment


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run tests that take over a minute")
    parser.addoption("--run-real", action="store_true", help="also run tests that train or ask a model of 135M parameters, or measure")


def pytest_collection_modifyitems(config, items):
    long = {item.path for item in items if "slow" in item.keywords} if config.getoption("--run-slow") else set()
    items.sort(key=lambda item: item.path not in long)    # the longest files first: else one process ends with them and the other waits
    for item in items:
        if {"server", "browser"} & {*item.keywords}: item.add_marker(pytest.mark.flaky(reruns=1))    # Chromium, Slurm and Ceph may be slow to come up
        for mark in ("slow", "real"):
            if mark in item.keywords and not config.getoption(f"--run-{mark}"): item.add_marker(pytest.mark.skip(reason=f"takes minutes; --run-{mark} runs it"))
