"""Evaluating beside lm-eval: four variants of a model on the suite of the quickstart, against a command each, and text read in windows.

variants.py is our side of the first, which can be profiled."""
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from merging import MODEL, jittered, seconds

from domain_adapt import suites
from domain_adapt.asking import quiet
from domain_adapt.assets import resolve
from domain_adapt.benchmarks import load_suite
from domain_adapt.models import best_dtype, get_model, load_model, load_tokenizer, tune_cpu
from domain_adapt.params import Suite
from domain_adapt.perplexity import Block, document_blocks, score_blocks
from domain_adapt.sources.markdown import to_markdown
from domain_adapt.sources.reading import decode

sys.path.append(str(Path(__file__).resolve().parent.parent))
from harness import lm_eval, scored, write_task

VARIANTS = ("original", "cpt", "merge-a", "merge-b")


class Ours:
    "Our side, a process that waits between the variants; `took` are the seconds of starting, of each variant, and of ending."
    def __init__(self, folder: Path, items: int, dtype: str):
        words = [sys.executable, "-W", "ignore", Path(__file__).with_name("variants.py"), folder, str(items), dtype, *VARIANTS]
        env = os.environ | {"DOMAIN_ADAPT_OUTPUTS": str(folder / "outputs")}    # nothing was answered before
        def start() -> None:
            self.job = subprocess.Popen(words, env=env, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self.steps = [json.loads(self.job.stdout.readline())]
        self.took = [seconds(start)]

    def ask(self) -> None:
        def asked() -> None:
            self.job.stdin.write("\n")
            self.steps.append(json.loads(self.job.stdout.readline()))
        self.took.append(seconds(asked))

    def end(self) -> None:
        self.job.stdin.close()
        self.took.append(seconds(self.job.wait))
        assert self.job.returncode == 0

    def parts(self) -> str:
        "Mean seconds of each step."
        start, *each = self.steps
        return ", ".join(f"{k} {v:.1f}" for k, v in (start | pd.DataFrame(each).mean().to_dict()).items())


def suite(folder: Path, small: bool) -> dict:
    "Our stage's functions on four variants in one process against four `lm_eval` commands, in turn; starting counts on both sides."
    items, dtype, models = 2 if small else 50, best_dtype("auto"), jittered(folder, get_model(MODEL), VARIANTS)
    configs = {c["task"]: c for c in suites.configs("quick")}
    names = [write_task(folder / "tasks", configs[t.name], t) for t in load_suite("quick", Suite(limit=items))]
    command = lambda v: lm_eval(models[v], dtype, folder / "tasks", names, folder / f"theirs-{v}")
    arm, theirs = Ours(folder, items, dtype), []
    for i, v in enumerate(VARIANTS):
        for f in (arm.ask, lambda: theirs.append(seconds(lambda: command(v))))[::-1 if i % 2 else 1]: f()
    arm.end()
    ours, total = pd.read_csv(folder / "ours" / "benchmarks.csv"), sum(arm.took)
    found = {v: scored(folder / f"theirs-{v}") for v in VARIANTS}
    assert all(found[r.variant][r.task]["sample_len"] == r.n == items for r in ours.itertuples())
    apart = max(abs(r.value - found[r.variant][r.task][r.metric]) for r in ours.itertuples())
    print("ours:", ", ".join(f"{s:.1f}" for s in arm.took), f"(mean {arm.parts()}); theirs:", ", ".join(f"{s:.1f}" for s in theirs))
    return dict(ours=total, theirs=sum(theirs), rounds=1, note=f"{items} items of each in {dtype}; accuracies at most {apart:.3f} apart")


def rolling(folder: Path, small: bool) -> dict:
    "Text into bits per byte, against lm-eval's rolling log-likelihood of the same windows, at its faster batch of 1 or 8."
    tune_cpu()
    windows, size, rounds, dtype = 2 if small else 12, 512, 1 if small else 3, best_dtype("auto")
    model, tokenizer = load_model(get_model(MODEL), dtype), load_tokenizer(get_model(MODEL))
    page = to_markdown(decode(next(resolve("package:filings-10k").glob("tgt*.html")).read_bytes())).text
    text = page.encode()[:sum(w["bytes"] for w in document_blocks(page, tokenizer, size)[:windows])].decode()
    blocks = lambda: [Block("sec", "domain", "d", **w) for w in document_blocks(text, tokenizer, size)]
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    with quiet(): lms = {n: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=n, max_length=size) for n in (1, 8)}

    def theirs(n: int) -> float:
        with quiet(): return -sum(lms[n].loglikelihood_rolling(asked, disable_tqdm=True))
    arms = {"ours": lambda: score_blocks(model, blocks(), "v")["nll"].sum(), 1: lambda: theirs(1), 8: lambda: theirs(8)}
    nats, took = {}, {a: [] for a in arms}
    for i in range(rounds + 1):
        for a in list(arms)[::-1 if i % 2 else 1]: took[a].append(seconds(lambda: nats.update({a: arms[a]()})))
    median = {a: statistics.median(s[1:]) for a, s in took.items()}
    assert abs(nats["ours"] / nats[1] - 1) < 0.01, nats
    return dict(ours=median["ours"], theirs=min(median[1], median[8]), rounds=rounds, amount=sum(len(b.ids) for b in blocks()),
                note=f"{dtype}; theirs with its faster batch, {1 if median[1] < median[8] else 8}; nats apart by {abs(nats['ours'] / nats[1] - 1):.1e}")
