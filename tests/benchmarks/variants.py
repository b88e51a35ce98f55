"""What the evaluate stage does for its suites, a variant at each line on stdin: python variants.py FOLDER ITEMS DTYPE NAME...

FOLDER holds a model under each name. After starting, and after each variant, it answers with a line of JSON: seconds of each step.
To see where they go: yes '' | python -m cProfile -s tottime variants.py FOLDER ITEMS DTYPE NAME..."""
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

start = time.perf_counter()
import pandas as pd

from domain_adapt.answers import answers_of
from domain_adapt.asking import Variant
from domain_adapt.benchmarks import load_suite, run_suite
from domain_adapt.evaluation import BENCHMARKS, settings
from domain_adapt.models import load_tokenizer
from domain_adapt.params import load_params
from domain_adapt.runs import ROOT, write_csv, write_json

said = os.fdopen(os.dup(1), "w", buffering=1)    # whatever else prints goes to stderr
os.dup2(2, 1)


class Steps(dict):
    "Seconds by step; a step ends where it is named."
    def __init__(self, start: float): self.last = start
    def end(self, step: str) -> None:
        now = time.perf_counter()
        self[step], self.last = now - self.last, now


def ask(folder: Path, items: int, dtype: str, names: Sequence[str], steps: Steps) -> None:
    params = load_params(ROOT / "params" / "quickstart.yaml", (f"evaluate.suites.quick.limit={items}", f"evaluate.precision={dtype}"))
    suites = {n: load_suite(n, s) for n, s in params.evaluate.suites.items()}
    steps.end("suites")
    tokenizer, out = load_tokenizer(folder / names[0]), folder / "ours"
    write_json(out / "settings.json", settings(params, dtype, tokenizer, suites))
    steps.end("settings")
    print(json.dumps(steps), file=said)
    rows = []
    for name in names:
        if not sys.stdin.readline(): sys.exit("whoever asked for variants is gone")
        steps = Steps(time.perf_counter())
        variant = Variant(name, folder / name, dtype, tokenizer, answers_of(folder / name, dtype))
        steps.end("hash")
        _ = variant.engine    # the first question would load it
        assert variant.engine.shares
        steps.end("load")
        for suite, tasks in suites.items(): rows += run_suite(variant, suite, tasks, params.seed, out)
        steps.end("ask")
        print(json.dumps(steps), file=said)
    write_csv(out / "benchmarks.csv", pd.DataFrame(rows, columns=BENCHMARKS))


if __name__ == "__main__":
    steps = Steps(start)
    steps.end("import")
    folder, items, dtype, *names = sys.argv[1:]
    ask(Path(folder), int(items), dtype, names, steps)
