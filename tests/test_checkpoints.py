"Checkpoints: the bits come back, in any layout; nothing damaged is loaded; no kill and no full disk costs more than one save."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
ENV = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def run(script: str, *words, processes: int = 1, timeout: int = 240) -> str:
    command = [sys.executable, "-W", "ignore"]
    if processes > 1: command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*command, str(ROOT / "tests" / script), *map(str, words)], cwd=ROOT, env=os.environ | ENV, text=True,
                          capture_output=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def trained(at: Path, cases: list[dict], processes: int = 1) -> list[list[dict]]:
    "What each case gave on each process; see tests/checkpointing.py."
    file = at / f"cases_{len(list(at.glob('cases_*.json')))}.json"
    file.write_text(json.dumps(cases))
    run("checkpointing.py", file, processes=processes)
    return [[torch.load(f"{file}.{i}.{rank}") for rank in range(processes)] for i in range(len(cases))]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    "Every tensor of a checkpoint, whole, read by torch alone."
    import torch.distributed.checkpoint as dcp
    reader = dcp.FileSystemReader(str(checkpoint))
    held = reader.read_metadata().state_dict_metadata
    found = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in held.items()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def same(a: dict, b: dict) -> bool: return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


SPLIT = dict(distributed_optimizer=True)


@pytest.mark.equality
@pytest.mark.parametrize("processes, kinds", [(1, [(False, {}), (True, {})]), (2, [(True, SPLIT), (False, SPLIT), (True, {})])])
def test_interrupted_and_resumed_is_bit_identical(tmp_path, processes, kinds):
    cases = []
    for i, (bf16, train) in enumerate(kinds):
        whole, part = str(tmp_path / f"whole{i}"), str(tmp_path / f"part{i}")
        cases += [dict(folder=whole, until=6, bf16=bf16, train=train), dict(folder=part, until=3, save=[3], bf16=bf16, train=train),
                  dict(folder=part, until=6, take=part, bf16=bf16, train=train)]
    found = trained(tmp_path, cases, processes)
    for whole, first, second in zip(found[::3], found[1::3], found[2::3]):
        for a, b, c in zip(whole, first, second):
            assert a["losses"] == b["losses"] + c["losses"] and a["norms"] == b["norms"] + c["norms"]
            assert same(a["weights"], c["weights"]) and not same(b["weights"], c["weights"])
            assert c["extra"] == {"step_was": 3, "losses": b["losses"]} and c["refused"] == [] == a["events"] + b["events"] + c["events"]
    names = [case[0]["optimizer"] for case in found[::3]]
    assert names == (["FP32Optimizer", "Float16OptimizerWithFloat16Params"] if processes == 1 else
                     ["DistributedOptimizer", "DistributedOptimizer", "Float16OptimizerWithFloat16Params"])


@pytest.mark.parity
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-5), (True, 1e-3)])
def test_resumed_in_other_layouts_the_bits_are_the_same_and_so_is_the_loss(tmp_path, bf16, tolerance):
    "One process, then TP2, then PP2, then DP2 with the distributed optimizer, then TP2 without; and back to one."
    at = lambda name: str(tmp_path / name)
    alone = trained(tmp_path, [dict(folder=at("none"), until=10, bf16=bf16), dict(folder=at("one"), until=2, save=[2], bf16=bf16)])
    layouts = [("tp2", dict(layout=dict(tp=2, sp=True))), ("pp2", dict(layout=dict(pp=2))), ("dp2", SPLIT), ("tp2 again", dict(layout=dict(tp=2)))]
    cases, before = [], "one"
    for i, (name, train) in enumerate(layouts):
        cases.append(dict(folder=at(name), until=4 + 2 * i, save=[4 + 2 * i], take=at(before), again=at(f"{name} resaved"), train=train, bf16=bf16))
        before = name
    found = trained(tmp_path, cases, 2)
    back, = trained(tmp_path, [dict(folder=at("back"), until=10, take=at("tp2 again"), again=at("back resaved"), bf16=bf16)])
    losses = alone[1][0]["losses"] + [x for case in found for x in case[0]["losses"]]
    assert losses == pytest.approx(alone[0][0]["losses"], rel=tolerance) and len(losses) == 10
    before = "one"
    for i, name in enumerate([n for n, _ in layouts] + ["back"]):
        step = f"step_{2 + 2 * i}"
        first, second = tensors(tmp_path / before / step), tensors(tmp_path / f"{name} resaved" / step)
        assert same(first, second) and len(first) == 26 * (4 if bf16 else 3), name
        before = name


@pytest.mark.parity
def test_names_and_shapes_do_not_depend_on_the_layout(tmp_path):
    "What an export reads: fc1 whole, gate then up; layers by global number; masters only where training is in bf16."
    trained(tmp_path, [dict(folder=str(tmp_path / "a"), until=1, save=[1], bf16=True, train=dict(layout=dict(pp=2)))], 2)
    held = tensors(tmp_path / "a" / "step_1")
    assert held["decoder.layers.3.mlp.linear_fc1.weight"].shape == (96, 32) and held["embedding.word_embeddings.weight"].shape == (96, 32)
    assert {k.removeprefix("optimizer.state.fp32_param.") for k in held if "fp32_param" in k} == {k for k in held if not k.startswith("optimizer")}
    for k, v in held.items():
        assert v.dtype == (torch.float32 if k.startswith("optimizer") else torch.bfloat16)
        if not k.startswith("optimizer"): assert torch.equal(held[f"optimizer.state.fp32_param.{k}"].bfloat16(), v)
