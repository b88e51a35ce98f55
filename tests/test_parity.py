"""Every layout learns what one process does: loss, norm of the gradient, held-out loss and weights over five updates of a small
random Llama, one of them refused at first. The table is nbs/parity.csv, which the notebook shows; delete it to have it made again."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from domain_adapt.tokens import IndexedWriter

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    1: ["one", "recompute", "one-bf16", "one-untied", "one-mask_loss", "one-separate", "one-untied-separate"],
    2: ["tp2", "tp2_sp", "pp2", "cp2", "dp2", "dp2_distributed", "tp2_sp-bf16", "pp2-bf16", "cp2-bf16", "dp2_distributed-bf16",
        "pp2-untied", "dp2_distributed-untied", "cp2-separate", "tp2_sp-mask_loss"],
    4: ["tp2_dp2_sp", "tp2_pp2", "tp4", "pp2_dp2_distributed-bf16", "tp2_cp2_sp_recompute-untied-separate"]}
TABLE = ROOT / "nbs" / "parity.csv"
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
NORM = {"fp32": 1e-5, "bf16": 3e-3}    # in bf16 the norm of so small a model is itself 2e-3 from fp32's


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "Tokens of two corpora: documents shorter and longer than a sequence, each ended by 0."
    at, random = tmp_path_factory.mktemp("parity"), np.random.RandomState(0)
    for name in ("sec_train", "wiki_train", "sec_heldout", "wiki_heldout"):
        with IndexedWriter(at / name, 512) as writer:
            for n in random.randint(5, 90, 30): writer.add([*(1 + (random.randint(511) + 7 * np.arange(n)) % 511), 0])
    return at


@pytest.fixture(scope="module")
def results(folder):
    "A function that gives the result of a case; cases on equally many processes run together, one process first."

    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    def result(case: str) -> dict:
        if not (folder / f"{case}.json").is_file():
            processes = next(n for n, cases in CASES.items() if case in cases)
            if processes > 1: result("one")
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                 str(ROOT / "tests" / "parity.py"), str(folder), *CASES[processes]],
                capture_output=True, text=True, cwd=ROOT, env=env, timeout=500)
            assert done.returncode == 0, done.stderr[-5000:]
        return json.loads((folder / f"{case}.json").read_text())
    return result


def alone(case: str) -> str: return "-".join(["one", *case.split("-")[1:]])


def furthest(ours: list, theirs: list) -> float: return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def heldout(result: dict) -> list[float]: return [total / count for measured in result["heldout"] for total, count in measured]


def row(case: str, results) -> dict:
    "How far a case is from one process: relative, of the weights absolute."
    ours, theirs = results(case), results(alone(case))
    layout, *more = case.split("-")
    return dict(layout=layout, also=" ".join(m for m in more if m != "bf16"), precision="bf16" if "bf16" in more else "fp32",
                loss=furthest(ours["loss"], theirs["loss"]), grad_norm=furthest(ours["norm"], theirs["norm"]),
                heldout=furthest(heldout(ours), heldout(theirs)), weights=ours["weights"])


SPLIT = [case for n, cases in CASES.items() for case in cases if not case.startswith("one")]


@pytest.mark.parity
@pytest.mark.parametrize("case", SPLIT)
def test_a_layout_learns_what_one_process_does(case, results):
    found, result = row(case, results), results(case)
    allowed = TOLERANCE[found["precision"]]
    assert max(found["loss"], found["heldout"]) < allowed and found["grad_norm"] < NORM[found["precision"]], found
    assert found["weights"] < (2e-5 if allowed == 1e-5 else 1.5e-4) and result["moved"] > (4e-4 if allowed == 1e-5 else 6e-5)
    assert result["applied"] == [True, True, False, True, True, True]
    assert result["loss"][2] == result["loss"][3] and result["norm"][2] == result["norm"][3]    # nothing changed between
    assert result["optimizer"] == ("DistributedOptimizer" if "distributed" in case else
                                   "Float16OptimizerWithFloat16Params" if "bf16" in case else "FP32Optimizer")


@pytest.mark.parity
def test_the_cases_differ(results):
    "A comparison of equal runs would prove nothing: held-out losses fall, and each setting changes what is learnt."
    first = {case: results(case) for case in CASES[1]}
    for case, result in first.items():
        losses = heldout(result)
        assert all(after < before - (1e-4 if "bf16" in case else 1e-3) for before, after in zip(losses[:2], losses[2:]))
    for case in CASES[1][2:]: assert furthest(first[case]["norm"], first["one"]["norm"]) > 1e-4, case
    whole = first["one"]["parameters"]
    assert results("tp2")["parameters"] < 0.6 * whole and results("pp2")["parameters"] < 0.7 * whole
    counted = lambda case: first[case]["heldout"][0][0][1]
    assert counted("one") == 320 and counted("one-mask_loss") == counted("one-separate") < 320


@pytest.mark.parity
def test_the_table_in_the_notebook_is_of_these_cases(results):
    table = pd.DataFrame([row(case, results) for case in SPLIT])
    if not TABLE.is_file(): table.to_csv(TABLE, index=False, float_format="%.1e")
    shown, names = pd.read_csv(TABLE, keep_default_na=False), ["layout", "also", "precision"]
    assert shown[names].values.tolist() == table[names].values.tolist()
    for precision, allowed in TOLERANCE.items():
        rows = shown[shown["precision"] == precision]
        assert (rows[["loss", "heldout"]] < allowed).all(axis=None) and (rows["grad_norm"] < NORM[precision]).all()
