"The published runs: they pass check and plan with no network, GPU, data or disk, and say what is ours."
import json
import os
import re
import time

import pytest
import yaml

from domain_adapt.params import load_params
from domain_adapt.plan import plan
from domain_adapt.runs import ROOT

RECIPES = ("sec_llama3_70b", "medical_llama2_7b", "medical_meditron_merge", "patents_llama2_7b")
CLOSED = {"HF_HUB_OFFLINE": "1", "DOMAIN_ADAPT_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HTTPS_PROXY": "http://127.0.0.1:9",
          "HTTP_PROXY": "http://127.0.0.1:9", "AWS_EC2_METADATA_DISABLED": "true", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}


def path(name): return ROOT / "params" / f"{name}.yaml"


@pytest.mark.parametrize("name", RECIPES)
def test_check_and_plan_need_nothing(name, cli, tmp_path):
    "No network, no cache, no outputs, a read-only place to write; no torch, so under a few seconds."
    env = CLOSED | {n: str(tmp_path / "none") for n in ("DOMAIN_ADAPT_CACHE", "DOMAIN_ADAPT_OUTPUTS", "HF_HOME", "HOME")}
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(
        "import socket, sys\n"
        "def refuse(*a, **k): raise RuntimeError('the network was asked')\n"
        "socket.getaddrinfo = socket.create_connection = refuse\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *a):\n"
        "        if name.split('.')[0] in ('torch', 'megatron', 'transformers'): raise RuntimeError(name + ' was imported')\n"
        "sys.meta_path.insert(0, NoTorch())\n")
    env["PYTHONPATH"] = os.pathsep.join([str(guard), str(ROOT)])
    started = time.monotonic()
    checked, planned = cli("check", path(name), "--recipe", env=env), cli("plan", path(name), "--json", env=env)
    assert checked.returncode == planned.returncode == 0, checked.stderr + planned.stderr
    assert "nothing wrong found" in checked.stdout and json.loads(planned.stdout)["problems"] == []
    assert time.monotonic() - started < 60 and not (tmp_path / "none").exists()
    if name != "medical_meditron_merge": assert "tokens/s" in cli("plan", path(name), env=env).stdout


def test_what_the_papers_publish():
    sec, medical, patents = (load_params(path(n)) for n in ("sec_llama3_70b", "medical_llama2_7b", "patents_llama2_7b"))
    tokens = {p.run: p.train.steps * p.train.global_batch * p.tokens.sequence_length for p in (sec, medical, patents)}
    assert tokens["sec_llama3_70b"] == pytest.approx(71e9, rel=1e-4) and sec.tokens.replay * 71 == pytest.approx(1, rel=2e-3)
    assert tokens["medical_llama2_7b"] == 3500 * 2048 * 4096 == 29_360_128_000    # the case study says 27B
    assert tokens["patents_llama2_7b"] == pytest.approx(10e9, rel=1e-3)
    assert (medical.train.lr, medical.train.global_batch, medical.train.steps, medical.tokens.sequence_length) == (1.5e-5, 2048, 3500, 4096)
    assert sec.model == "meta-llama/Meta-Llama-3-70B-Instruct" and sec.base == "meta-llama/Meta-Llama-3-70B"
    assert sec.merge.candidates[0].mergekit == yaml.safe_load((ROOT / "params" / "merges" / "arcee_listing1.yml").read_text())
    assert patents.merge.candidates[0].t[:2] == [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                                                 {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}]
    assert load_params(path("medical_meditron_merge")).train.checkpoint == "epfl-llm/meditron-7b"


def test_31_days_are_32_gpus():
    found = plan(load_params(path("sec_llama3_70b")))
    assert found["cluster"]["gpus"] == 32 and found["cost"]["days"] == pytest.approx(31, abs=0.5)
    best = found["layouts"][0]
    assert {k: found["layout"][k] for k in ("tp", "pp", "cp", "dp", "micro_batch", "recompute")} == \
           {k: best[k] for k in ("tp", "pp", "cp", "dp", "micro_batch", "recompute")}


PUBLISHED = {    # what may stand without the mark: names and paths, and what the sources say
    "sec_llama3_70b": {"run", "model", "base", "corpora", "replay", "nodes", "launcher", "export_at", "nous", "precision"},
    "medical_llama2_7b": {"run", "model", "corpora", "sequence_length", "replay", "steps", "global_batch", "lr", "suites"},
    "medical_meditron_merge": {"run", "model", "base", "corpora", "checkpoint", "suites"},
    "patents_llama2_7b": {"run", "model", "corpora", "replay"}}


@pytest.mark.parametrize("name", RECIPES)
def test_every_value_that_is_not_published_is_marked(name):
    "Each line with a value says `ours`, or its key is among those published (a merge's line: by its comment above)."
    allowed, explained, open_lines = PUBLISHED[name], False, []
    for line in path(name).read_text().splitlines():
        value, _, comment = line.partition("#")
        if not value.strip():
            explained = bool(comment)
            continue
        match = re.match(r"\s*(?:- \{name: )?([\w-]+):?\s*(.*)", value)
        key, given = match[1], match[2].strip()
        if given and "ours" not in comment and key not in allowed and not explained: open_lines.append(line)
        explained = False
    assert open_lines == []


def test_every_published_key_is_there():
    for name, keys in PUBLISHED.items():
        told = yaml.safe_load(path(name).read_text())
        there = set(told) | set(told["tokens"]) | set(told["train"]) | set(told["evaluate"]) | set(told["evaluate"]["suites"])
        assert keys <= there
