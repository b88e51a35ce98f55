"Checkpoints: the bits come back, in any layout; nothing damaged is loaded; no kill and no full disk costs more than one save."
import json
import os
import subprocess
import sys
import warnings
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # that there is no process group
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def same(a: dict, b: dict) -> bool: return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


SPLIT = dict(distributed_optimizer=True)
KINDS = {"fp32": (1, False, {}), "bf16": (1, True, {}), "bf16_two": (2, True, {}), "bf16_split": (2, True, SPLIT), "fp32_split": (2, False, SPLIT)}
CHAIN = {"one": {}, "tp2": dict(layout=dict(tp=2, sp=True)), "pp2": dict(layout=dict(pp=2)), "dp2": SPLIT, "tp2_again": dict(layout=dict(tp=2)), "back": {}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """Where trainings wrote, and what each gave on each process. For each kind: whole, its first half, its second half. For each
    precision a chain: every layout takes the checkpoint of the layout before, saves it again at once, and goes on for two steps."""
    at, cases, before = tmp_path_factory.mktemp("checkpoints"), {}, "one"
    def case(name: str, processes: int, until: int, take: str | None = None, **more):
        take = take and str(at / take)
        cases[name] = processes, dict(folder=str(at / name), until=until, take=take, **more)
    for kind, (n, bf16, train) in KINDS.items():
        case(f"{kind} whole", n, 6, bf16=bf16, train=train)
        case(f"{kind} first", n, 3, save=[3], bf16=bf16, train=train)
        case(f"{kind} second", n, 6, f"{kind} first", bf16=bf16, train=train)
    for bf16 in (False, True):
        case(f"alone {bf16}", 1, 10, bf16=bf16)
        for i, (name, train) in enumerate(CHAIN.items()):
            taken = dict(take=f"{before} {bf16}", again=str(at / f"{name} {bf16} resaved")) if i else {}
            case(f"{name} {bf16}", 1 if name in ("one", "back") else 2, min(10, 2 + 2 * i), save=[2 + 2 * i], bf16=bf16, train=train, **taken)
            before = name
    phases = [[n for n, (p, _) in cases.items() if p == 1 and not n.startswith("back")], [n for n, (p, _) in cases.items() if p == 2],
              [n for n in cases if n.startswith("back")]]
    found = {}
    for processes, names in zip((1, 2, 1), phases): found |= dict(zip(names, trained(at, [cases[n][1] for n in names], processes)))
    return at, found


@pytest.mark.equality
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_is_bit_identical(runs, kind):
    for a, b, c in zip(*(runs[1][f"{kind} {part}"] for part in ("whole", "first", "second"))):
        assert len(a["losses"]) == 6 and a["losses"] == b["losses"] + c["losses"] and a["norms"] == b["norms"] + c["norms"]
        assert same(a["weights"], c["weights"]) and not same(b["weights"], c["weights"])
        assert c["extra"] == {"step_was": 3, "losses": b["losses"]} and c["refused"] == [] == a["events"] + b["events"] + c["events"]
        assert a["optimizer"] == ("DistributedOptimizer" if "split" in kind else "FP32Optimizer" if kind == "fp32" else "Float16OptimizerWithFloat16Params")


@pytest.mark.parity
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-5), (True, 1e-3)])
def test_resumed_in_other_layouts_the_bits_are_the_same_and_so_is_the_loss(runs, bf16, tolerance):
    "One process, TP2 with SP, PP2, DP2 with the distributed optimizer, TP2, and one process again."
    at, found = runs
    losses = [x for name in CHAIN for x in found[f"{name} {bf16}"][0]["losses"]]
    assert losses == pytest.approx(found[f"alone {bf16}"][0]["losses"], rel=tolerance) and len(losses) == 10
    for i, (before, name) in enumerate(zip(CHAIN, list(CHAIN)[1:])):
        step = f"step_{2 + 2 * i}"
        first, second = tensors(at / f"{before} {bf16}" / step), tensors(at / f"{name} {bf16} resaved" / step)
        assert same(first, second) and len(first) == 26 * (4 if bf16 else 3), name


@pytest.mark.equality
def test_names_and_shapes_do_not_depend_on_the_layout(runs):
    "What an export reads: fc1 whole, gate then up; layers by global number; masters only where training is in bf16."
    everywhere = [tensors(runs[0] / f"{name} True" / f"step_{2 + 2 * i}") for i, name in enumerate(list(CHAIN)[:-1])]
    for held in everywhere:
        assert {k: v.shape for k, v in held.items()} == {k: v.shape for k, v in everywhere[0].items()}
        assert held["decoder.layers.3.mlp.linear_fc1.weight"].shape == (96, 32) and held["embedding.word_embeddings.weight"].shape == (96, 32)
        assert {k.removeprefix("optimizer.state.fp32_param.") for k in held if "fp32_param" in k} == {k for k in held if not k.startswith("optimizer")}
        for k, v in held.items():
            assert v.dtype == (torch.float32 if k.startswith("optimizer") else torch.bfloat16)
            if not k.startswith("optimizer"): assert torch.equal(held[f"optimizer.state.fp32_param.{k}"].bfloat16(), v)
    assert not any("fp32_param" in k for k in tensors(runs[0] / "one False" / "step_2"))
