"The train stage: what it writes, that it repeats itself, goes on from anywhere, is megatron-core's, and never outlives its parent."
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

from domain_adapt.launch import Stopped, train
from domain_adapt.params import Params, UserError, load_params
from domain_adapt.runs import read_lines
from domain_adapt.train import check_logits, export_steps

ROOT = Path(__file__).resolve().parent.parent
SHORT = ("train.steps=6", "train.warmup=2", "train.validation.every=3", "train.validation.tokens=300", "train.export_at=[0.5, 1.0]",
         "train.global_batch=4", "train.micro_batch=2", "train.lr=0.003", "train.max_epochs=1000000")


def tiny_params(model: Path, *more: str) -> Params:
    return load_params(ROOT / "params" / "tiny.yaml", (f"model={model}", *SHORT, *more))


def write_tokens(folder: Path, documents: int = 12, length: int = 300) -> Path:
    "A tokens stage's folder: sec and encyclopedia to train on, all three held out. Ids follow a rule that can be learnt."
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    folder.mkdir()
    random = np.random.RandomState(0)
    for name in ("sec", "encyclopedia", "news"):
        for split, n, size in (("train", documents, length), ("heldout", 1, 600)):
            if (name, split) == ("news", "train"): continue
            builder = IndexedDatasetBuilder(str(folder / f"{name}_{split}.bin"), dtype=np.uint16)
            for _ in range(n): builder.add_document(torch.from_numpy((random.randint(250) + 3 * np.arange(size)) % 250 + 10), [size])
            builder.finalize(str(folder / f"{name}_{split}.idx"))
    tokens = documents * length
    table = [("sec", "train", documents, tokens), ("encyclopedia", "train", documents, tokens), ("news", "train", 0, 0)]
    pd.DataFrame(table, columns=["corpus", "split", "documents", "tokens"]).to_csv(folder / "splits.csv", index=False)
    return folder


TIMED = ["tokens_per_second", "mfu", "mfu_with_attention", "memory_bytes"]
VARIANTS = {"first": ("train.precision=fp32",), "again": ("train.precision=fp32",), "pair": ("train.precision=fp32", "train.processes=2"),
            "bf16": ("train.precision=bf16",)}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path: return write_tokens(tmp_path_factory.mktemp("run") / "tokens")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llama, tokens) -> dict[str, Path]:
    "Four short trainings, at the same time."
    at = tmp_path_factory.mktemp("trained")
    def one(name):
        (at / name).mkdir()
        train(tiny_params(tiny_llama, *VARIANTS[name]), {"tokens": tokens}, at / name)
        return at / name
    with ThreadPoolExecutor(4) as pool: return dict(zip(VARIANTS, pool.map(one, VARIANTS)))


def metrics(folder: Path) -> pd.DataFrame: return pd.read_json(folder / "metrics.jsonl", lines=True).set_index("step")
def info(folder: Path) -> dict: return json.loads((folder / "info.json").read_text())
def weights(folder: Path, step: int = 6) -> dict: return load_file(folder / "hf" / f"step_{step}" / "model.safetensors")


def test_metrics_of_every_step_and_heldout_losses_where_due(runs):
    table = metrics(runs["first"])
    assert list(table.index) == list(range(7)) and list(table["tokens"]) == [512 * s for s in range(7)]
    assert table.loc[1:, ["loss", "lr", "grad_norm", "tokens_per_second"]].notna().all().all()
    assert table["lr"].loc[2] == 0.003 and table["lr"].loc[1] == 0.0015 and table["lr"].loc[6] == pytest.approx(tiny_params(ROOT).train.min_lr)
    for corpus in ("sec", "encyclopedia", "news"):
        assert list(table.index[table[f"heldout/{corpus}"].notna()]) == [0, 3, 6]
        assert table[f"heldout/{corpus}"].loc[6] < table[f"heldout/{corpus}"].loc[0] - 0.05
    assert table["loss"].loc[6] < table["loss"].loc[1]


@pytest.mark.oracle
@pytest.mark.parametrize("run, rel", [("first", 1e-6), ("bf16", 2e-3)])
def test_heldout_loss_is_what_transformers_measures_on_the_export(runs, tokens, run, rel):
    "300 tokens asked are three sequences of 128, drawn in megatron-core's order from one document of 600 tokens."
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(runs[run] / "hf" / "step_6")
    order = np.load(next((runs[run] / "index").glob("*valid-shuffle_index.npy")))
    assert sorted(order) == [0, 1, 2, 3, 4]
    for corpus in ("sec", "encyclopedia", "news"):
        ids = torch.from_numpy(np.fromfile(tokens / f"{corpus}_heldout.bin", dtype=np.uint16).astype(np.int64))
        cuts = [ids[128 * i:128 * i + 129] for i in order[:3]]
        with torch.no_grad(): sums = [model(c[None, :-1]).logits[0].log_softmax(-1).gather(1, c[1:, None]).sum() for c in cuts]
        expected = -sum(sums).item() / sum(len(c) - 1 for c in cuts)
        assert metrics(runs[run]).loc[6, f"heldout/{corpus}"] == pytest.approx(expected, rel=rel)


@pytest.mark.equality
def test_the_same_seed_gives_the_same_bits(runs):
    for step in (3, 6):
        a, b = weights(runs["first"], step), weights(runs["again"], step)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (runs["first"] / "mixture.csv").read_bytes() == (runs["again"] / "mixture.csv").read_bytes()
    drop = lambda t: t.drop(columns=TIMED)
    pd.testing.assert_frame_equal(drop(metrics(runs["first"])), drop(metrics(runs["again"])), check_exact=True)


@pytest.mark.parity
def test_two_processes_learn_what_one_does(runs):
    one, two = metrics(runs["first"]), metrics(runs["pair"])
    for column in ("loss", "grad_norm", "heldout/sec", "heldout/news"):
        assert list(two[column].dropna()) == pytest.approx(list(one[column].dropna()), rel=1e-5), column
    assert info(runs["pair"])["processes"] == 2
    a, b = weights(runs["first"]), weights(runs["pair"])
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 2e-4
    assert (runs["first"] / "mixture.csv").read_bytes() == (runs["pair"] / "mixture.csv").read_bytes()


def test_bf16_stays_near_fp32_and_keeps_fp32_weights(runs, tiny_llama):
    one, low = metrics(runs["first"]), metrics(runs["bf16"])
    assert list(low["loss"].dropna()) == pytest.approx(list(one["loss"].dropna()), rel=2e-2)
    assert info(runs["bf16"])["precision"] == "bf16" and info(runs["first"])["precision"] == "fp32"
    original, moved = load_file(tiny_llama / "model.safetensors"), weights(runs["bf16"], 6)
    assert all(v.dtype == torch.float32 for v in moved.values())
    step = max((moved[k] - original[k]).abs().max().item() for k in original)
    assert 0 < step < 0.02    # six updates of at most 0.003, not the rounding of every weight to bf16
    assert sum((moved[k] == moved[k].bfloat16()).float().mean().item() for k in moved) / len(moved) < 0.2


def test_it_was_megatron_core(runs):
    for run, optimizer in dict(first="FP32Optimizer", bf16="Float16OptimizerWithFloat16Params").items():
        used = info(runs[run])["megatron"]
        assert used == dict(model="megatron.core.models.gpt.gpt_model.GPTModel", optimizer=f"megatron.core.optimizer.optimizer.{optimizer}",
                            parallel="megatron.core.distributed.distributed_data_parallel.DistributedDataParallel",
                            data="megatron.core.datasets.blended_dataset.BlendedDataset", corpus="megatron.core.datasets.gpt_dataset.GPTDataset")
    from domain_adapt.megatron import Llama
    from megatron.core.models.gpt import GPTModel
    own = {n for n in vars(Llama) if not n.startswith("__")}
    assert issubclass(Llama, GPTModel) and own == {"_postprocess"}


def test_info_tells_how_the_model_was_made(runs, tiny_llama):
    told = info(runs["first"])
    assert told["logits_check"]["same_top_token"] == 1.0 and told["logits_check"]["largest_difference"] < 1e-4
    assert told["parameters"] == sum(v.numel() for v in load_file(tiny_llama / "model.safetensors").values())
    assert told["tokens"] == 6 * 4 * 128 and told["peak_memory_bytes"] > 1e8
    assert {"load", "steps", "validation", "saving"} <= told["seconds"].keys()
    assert told["epochs"]["sec"] == pytest.approx(told["tokens"] * pd.read_csv(runs["first"] / "mixture.csv")["share"][0] / 3600)


def test_realised_mixture(runs):
    table = pd.read_csv(runs["first"] / "mixture.csv")
    assert list(table.columns) == ["corpus", "asked", "documents", "tokens", "share"] and list(table["corpus"]) == ["sec", "encyclopedia", "news"]
    assert table["tokens"].sum() == 6 * 4 * 128 and table["share"].sum() == pytest.approx(1)
    assert abs(table["share"][0] - 0.75) <= 1 / 24 and table["tokens"][2] == 0
    assert 1 <= table["documents"][0] <= 12 and table["documents"][2] == 0


@pytest.mark.equality
def test_exports_keep_the_source_and_checkpoints_hold_the_same_weights(runs, tiny_llama):
    from torch.distributed.checkpoint import FileSystemReader
    for step in (3, 6):
        export, checkpoint = runs["first"] / "hf" / f"step_{step}", runs["first"] / "checkpoints" / f"step_{step}"
        for f in tiny_llama.iterdir():
            if f.suffix != ".safetensors": assert (export / f.name).read_bytes() == f.read_bytes()
        assert json.loads((checkpoint / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
        held = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
        assert {"embedding.word_embeddings.weight", "optimizer.state.exp_avg.embedding.word_embeddings.weight"} <= held.keys()
    assert not list((runs["first"] / "checkpoints").glob(".*")) and not list((runs["first"] / "hf").glob(".*"))
    assert not torch.equal(weights(runs["first"], 3)["model.norm.weight"], weights(runs["first"], 6)["model.norm.weight"])


def test_somebody_elses_checkpoint_is_taken_instead(tiny_llama, tmp_path):
    train(tiny_params(tiny_llama, f"train.checkpoint={tiny_llama}"), {}, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "" and pd.read_csv(tmp_path / "mixture.csv").empty
    for f in tiny_llama.iterdir(): assert (tmp_path / "hf" / "step_0" / f.name).read_bytes() == f.read_bytes()


@pytest.mark.fault
def test_a_corpus_too_small_for_one_batch_is_refused_before_anything_starts(tiny_llama, tmp_path):
    small = write_tokens(tmp_path / "tokens", documents=1)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"corpora: sec: 300 training tokens.*= 516"):
        train(tiny_params(tiny_llama), {"tokens": small}, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.fault
def test_an_error_over_there_comes_back_as_one_message(tiny_llama, tokens, tmp_path):
    import shutil
    biased = tmp_path / "biased"
    shutil.copytree(tiny_llama, biased)
    (biased / "config.json").write_text(json.dumps(json.loads((biased / "config.json").read_text()) | {"rms_norm_eps": 1e-6, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="rope_parameters is .*linear"):
        train(tiny_params(biased), {"tokens": tokens}, tmp_path / "out")


@pytest.mark.fault
def test_logits_that_are_off_are_refused():
    from types import SimpleNamespace
    ids = torch.arange(6).view(1, 6)
    theirs = lambda ids: SimpleNamespace(logits=torch.nn.functional.one_hot(ids, 9).float())
    ours = lambda at: lambda ids, positions, mask: theirs(ids).logits + at
    assert check_logits(ours(1e-5), theirs, ids)["same_top_token"] == 1.0
    for off in (0.01, float("nan")):
        with pytest.raises(UserError, match="logits differ"): check_logits(ours(off), theirs, ids)


def test_exports_fall_on_steps():
    steps = lambda n, *at: export_steps(load_params(ROOT / "params" / "tiny.yaml", (f"train.steps={n}", "train.warmup=0", f"train.export_at={list(at)}")))
    assert steps(40, 0.5, 1.0) == [20, 40] and steps(3, 0.01, 1.0, 0.9) == [1, 3] and steps(1, 0.5, 1.0) == [1]
    assert steps(40, 5120, 1.0) == [10, 40]    # tokens, at 4 x 128 a step


START = '''
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_train import tiny_params
from domain_adapt.launch import train
train(tiny_params(Path(sys.argv[2]), "train.steps=100000", "train.precision=fp32"), {"tokens": Path(sys.argv[3])}, Path(sys.argv[4]))
'''


@pytest.mark.fault
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(tiny_llama, tokens, tmp_path, how):
    parent = subprocess.Popen([sys.executable, "-W", "ignore", "-c", START, str(ROOT / "tests"), str(tiny_llama), str(tokens), str(tmp_path)],
                              cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.time() + 120
    while not (tmp_path / "metrics.jsonl").is_file() or (tmp_path / "metrics.jsonl").read_text().count("\n") < 3:
        assert parent.poll() is None and time.time() < end
        time.sleep(0.1)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2    # torchrun and its process
    os.kill(parent.pid, how)
    parent.wait(40)
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


# Stopped and started again

LONG = ("train.precision=fp32", "train.steps=24", "train.save.every=4", "train.save.keep=3", "train.validation.every=8")


def start(model: Path, tokens: Path, out: Path, *more: str) -> subprocess.Popen:
    "The stage in a process of its own."
    out.mkdir(exist_ok=True)
    code = START.replace('"train.steps=100000", "train.precision=fp32"', "*sys.argv[5:]")
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(ROOT / "tests"), str(model), str(tokens), str(out), *LONG, *more],
                            cwd=ROOT, stderr=subprocess.PIPE, text=True)


def finish(model: Path, tokens: Path, out: Path, *more: str) -> Path:
    child = start(model, tokens, out, *more)
    error = child.communicate(timeout=200)[1]
    assert child.returncode == 0, error
    return out


def until_step(child: subprocess.Popen, out: Path, step: int) -> None:
    end = time.time() + 120
    while not (out / "metrics.jsonl").is_file() or (out / "metrics.jsonl").read_text().count("\n") <= step:
        assert child.poll() is None and time.time() < end, child.communicate()[1] if child.poll() is not None else "too slow"
        time.sleep(0.01)


def kill(child: subprocess.Popen) -> None:
    "SIGKILL to everything at once."
    family = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    for p in family: p.kill() if p.is_running() else None
    child.wait()
    psutil.wait_procs(family, timeout=10)


def same(a: Path, b: Path, steps=(12, 24)) -> None:
    "The same bits in every export, the same lines of metrics but for time, the same mixture."
    for step in steps:
        x, y = weights(a, step), weights(b, step)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), step
    pd.testing.assert_frame_equal(metrics(a).drop(columns=TIMED), metrics(b).drop(columns=TIMED), check_exact=True)
    assert (a / "mixture.csv").read_bytes() == (b / "mixture.csv").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_llama, tokens) -> Path:
    "A training that nothing stopped."
    return finish(tiny_llama, tokens, tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.fault
@pytest.mark.equality
def test_killed_anywhere_it_ends_with_the_same_bits(whole, tiny_llama, tokens, tmp_path):
    out = tmp_path / "out"
    for step in (5, 9, 13):
        child = start(tiny_llama, tokens, out)
        until_step(child, out, step)
        kill(child)
    finish(tiny_llama, tokens, out)
    same(whole, out)
    assert sum(e["what"] == "resumed" for e in read_lines(out / "events.jsonl")) >= 2


@pytest.mark.fault
@pytest.mark.equality
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_next_start_goes_on(whole, tiny_llama, tokens, tmp_path, number):
    out = tmp_path / "out"
    child = start(tiny_llama, tokens, out)
    until_step(child, out, 5)
    worker = next(p for p in psutil.Process(child.pid).children(recursive=True) if "job.json" in " ".join(p.cmdline()) and "torch.distributed.run" not in p.cmdline())
    worker.send_signal(number)
    error = child.communicate(timeout=100)[1]
    assert child.returncode and "Stopped: training was stopped and is saved at step" in error
    stopped = json.loads((out / "stopped.json").read_text())["step"]
    assert 5 <= stopped < 24 and json.loads((out / "checkpoints" / "latest.json").read_text())["step"] == stopped
    finish(tiny_llama, tokens, out)
    assert not (out / "stopped.json").exists()
    same(whole, out)


@pytest.mark.fault
@pytest.mark.equality
@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(whole, tiny_llama, tokens, tmp_path, damage):
    import shutil
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "hf")
    shards = max((out / "checkpoints" / "step_24").glob("*.distcp"), key=lambda f: f.stat().st_size)
    data = bytearray(shards.read_bytes())
    if damage == "truncate": data = data[:-1]
    else: data[len(data) // 2] ^= 1
    shards.write_bytes(data)
    finish(tiny_llama, tokens, out)
    events = list(read_lines(out / "events.jsonl"))
    assert events[0]["what"] == "step_24 refused" and shards.name in events[0]["value"]
    assert events[1]["what"] == "resumed" and events[1]["step"] == 20
    same(whole, out)


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["tp: 2, sp: true", "pp: 2", "cp: 2", ""])
def test_it_goes_on_under_another_layout(whole, tiny_llama, tokens, tmp_path, layout):
    "From step 12, on two processes: the same sequences, so the same losses."
    import shutil
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "hf")
    for f in (out / "checkpoints").glob("step_*"):
        if f.name not in ("step_12",): shutil.rmtree(f)
    (out / "checkpoints" / "latest.json").unlink()
    finish(tiny_llama, tokens, out, "train.processes=2", f"train.layout={{{layout}}}", "train.distributed_optimizer=true")
    one, two = metrics(whole), metrics(out)
    for column in ("loss", "grad_norm", "heldout/sec", "heldout/news"):
        assert list(two[column].dropna()) == pytest.approx(list(one[column].dropna()), rel=1e-5), column
    assert (whole / "mixture.csv").read_bytes() == (out / "mixture.csv").read_bytes()
    assert any(e["what"] == "resumed" and e["step"] == 12 for e in read_lines(out / "events.jsonl"))


# Spikes

POISONED = '''
import sys
from domain_adapt import batches, train
clean, poison = batches.step_batches, eval(sys.argv[2])
def step_batches(data, step, params, device):
    found = clean(data, step, params, device)
    for b in found:
        if poison.get(step) == "nan": b["loss_mask"] = b["loss_mask"] * float("nan")
        if poison.get(step) == "noise": b["labels"] = (b["labels"] * 7919) % 250
    return found
batches.step_batches = step_batches
train.work(sys.argv[1])
'''


def poisoned(model: Path, tokens: Path, out: Path, poison: dict, *more: str) -> int:
    "Train with batches that are not numbers, or whose labels are noise, at some steps. Gives the exit code."
    out.mkdir(exist_ok=True)
    params = tiny_params(model, *LONG, "train.lr=0.01", "train.guard={window: 12, loss: 1.3}", *more)
    (out / "job.json").write_text(json.dumps(dict(params=params.model_dump(mode="json"), model=str(model), tokens=str(tokens), out=str(out))))
    (out / "worker.py").write_text(POISONED)
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--no-python", sys.executable, "-W", "ignore",
                           str(out / "worker.py"), str(out / "job.json"), repr(poison)], cwd=ROOT, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}, timeout=200).returncode


def spikes(out: Path) -> list[tuple]: return [(e["step"], e["action"]) for e in read_lines(out / "events.jsonl") if e["action"] in ("skipped", "rolled back")]


@pytest.mark.fault
def test_a_batch_that_is_no_number_or_spikes_is_skipped_and_written_down(tiny_llama, tokens, tmp_path):
    assert poisoned(tiny_llama, tokens, tmp_path, {3: "nan", 20: "noise"}) == 0
    assert spikes(tmp_path) == [(3, "skipped"), (20, "skipped")]
    table = metrics(tmp_path)
    assert list(table.index[table["learnt"] == False]) == [3, 20] and table.loc[24, "tokens"] == 22 * 512    # noqa: E712
    assert all(v.isfinite().all() for v in weights(tmp_path, 24).values())
    assert pd.read_csv(tmp_path / "mixture.csv")["tokens"].sum() == 22 * 512 and info(tmp_path)["skipped_batches"] == 2


@pytest.mark.fault
@pytest.mark.equality
def test_rolling_back_leaves_the_batch_out_and_is_repeated_by_a_second_run(tiny_llama, tokens, tmp_path):
    runs = [tmp_path / n for n in ("first", "again")]
    for out in runs: assert poisoned(tiny_llama, tokens, out, {2: "nan", 19: "noise"}, "train.guard.action=rollback") == 0
    for out in runs:
        assert spikes(out) == [(2, "skipped"), (19, "rolled back")]    # nothing to roll back to at step 2
        assert list(metrics(out).index) == list(range(25)) and not metrics(out).loc[19, "learnt"]
    same(*runs)


@pytest.mark.fault
def test_the_third_spike_stops_training_with_a_message_and_a_higher_limit_goes_on(tiny_llama, tokens, tmp_path):
    bad = {5: "nan", 7: "nan", 14: "nan"}
    assert poisoned(tiny_llama, tokens, tmp_path, bad) != 0
    told = json.loads((tmp_path / "error.json").read_text())
    assert told["kind"] == "UserError" and "step 14" in told["message"] and "train.guard.limit 3" in told["message"]
    assert poisoned(tiny_llama, tokens, tmp_path, bad, "train.guard.limit=9") == 0
    assert {s for s, _ in spikes(tmp_path)} == {5, 7, 14} and info(tmp_path)["skipped_batches"] == 3
