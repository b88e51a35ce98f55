"The plan against the real GPTModel, measured memory and the sums; what check refuses."
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain_adapt import plan as room
from domain_adapt.flops import parameters, shape_of
from domain_adapt.models import bf16_speedup
from domain_adapt.params import Layout, Train, UserError, load_params
from domain_adapt.pipeline import check
from domain_adapt.plan import (FULL, configuration, disk_problems, layouts, memory, plan, problems, published, rank_parameters, saves,
                               step_time, storage, token_problems, tokenizer_problems)
from domain_adapt.runs import ROOT

TESTS = Path(__file__).parent
LLAMA3_70B, SMOLLM2 = (shape_of(published()[n]) for n in ("meta-llama/Meta-Llama-3-70B", "smollm2-135m-instruct"))
REAL = [("meta-llama/Meta-Llama-3-70B", 8, 4), ("meta-llama/Meta-Llama-3-70B", 4, 8), ("meta-llama/Meta-Llama-3-70B", 8, 16),
        ("Qwen/Qwen2.5-7B", 4, 4), ("HuggingFaceTB/SmolLM2-1.7B", 2, 8), ("HuggingFaceTB/SmolLM2-1.7B", 8, 1)]


@pytest.fixture(scope="module")
def counted() -> dict:
    "Parameters on the first and last process of every pipeline stage, as megatron-core builds them on 128."
    done = subprocess.run([sys.executable, TESTS / "count_parameters.py", json.dumps(REAL)], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parity
@pytest.mark.parametrize("name, tp, pp", REAL)
def test_parameters_of_every_process_are_the_real_models(counted, name, tp, pp):
    ours = [rank_parameters(shape_of(published()[name]), tp, pp, stage) for stage in range(pp)]
    assert counted[f"{name} {tp} {pp}"] == [[n, n] for n in ours]


@pytest.mark.real
@pytest.mark.parity
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("precision, recompute", [("fp32", False), ("bf16", True)])
def test_memory_is_what_training_takes(precision, recompute):
    """SmolLM2-135M, micro-batches of 4 x 512. The allocator is told to give back what is freed: training itself keeps it
    for the next tensor (models.tune_cpu), and its resident memory then says how it was fragmented too."""
    if precision == "bf16" and (pace := bf16_speedup()) < .1: pytest.skip(f"bf16 has {pace:.1%} of fp32's pace here: half an hour")
    giving_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "10000000", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
    done = subprocess.run([sys.executable, TESTS / "measure_memory.py", precision, "recompute" if recompute else "keep"],
                          capture_output=True, text=True, cwd=ROOT, env=os.environ | giving_back | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    measured = int(done.stdout.splitlines()[-1])
    predicted = memory(SMOLLM2, Train(recompute=recompute), 512, bf16=precision == "bf16", cpu=True)["total"]
    print(f"{precision} recompute={recompute}: measured {measured / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} GB")
    assert predicted == pytest.approx(measured, rel=0.15)


SIZES = st.sampled_from([1, 2, 4, 8])


@given(SIZES, SIZES, st.sampled_from(["meta-llama/Meta-Llama-3-70B", "meta-llama/Llama-3.2-1B"]))
def test_the_stages_hold_the_model_and_what_is_kept_twice(tp, pp, name):
    shape = shape_of(published()[name])
    count, held = parameters(shape), sum(rank_parameters(shape, tp, pp, s) for s in range(pp)) * tp
    twice = (tp - 1) * (count["norms"] + count["final_norm"]) + (count["embedding"] if shape.tied and pp > 1 else 0)
    assert held == count["total"] + twice


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.booleans(), st.booleans(), st.sampled_from([1, 2, 4]))
def test_what_saves_memory_saves_memory(tp, pp, recompute, shared, micro):
    "Dividing, recomputing, sharing the optimizer: never more of any component that they are to lower."
    make = lambda **k: Train(**dict(processes=64, global_batch=256, micro_batch=micro, layout=Layout(tp=tp, pp=pp),
                                    recompute=recompute, distributed_optimizer=shared) | k)
    this = memory(LLAMA3_70B, make(), 4096)
    assert memory(LLAMA3_70B, make(recompute=True), 4096)["activations"] <= this["activations"]
    assert memory(LLAMA3_70B, make(distributed_optimizer=True), 4096)["optimizer"] <= this["optimizer"]
    if tp > 1: assert memory(LLAMA3_70B, make(layout=Layout(tp=tp, pp=pp, sp=True)), 4096)["activations"] < this["activations"]
    assert memory(LLAMA3_70B, make(), 8192)["activations"] > this["activations"]
    assert sum(v for k, v in this.items() if k != "total") == pytest.approx(this["total"])
    per_device = memory(LLAMA3_70B, make(), 4096, stage=pp - 1)
    assert per_device["activations"] <= this["activations"]


def cluster(**more) -> Train:
    return Train(**dict(nodes=4, processes=8, launcher="slurm", global_batch=512, micro_batch=1, layout=Layout(tp=8, pp=4, sp=True)) | more)


def test_layouts_divide_fit_and_are_ranked():
    found = layouts(LLAMA3_70B, cluster(), 8192)
    assert (found[0]["tp"], found[0]["pp"], found[0]["recompute"]) == (8, 4, False)
    assert [f["step_time"] for f in found] == sorted(f["step_time"] for f in found)
    for f in found:
        assert f["tp"] * f["pp"] * f["cp"] * f["dp"] == 32 and f["memory_gb"] <= FULL * 80
        assert 80 % f["pp"] == 0 and 8 % f["tp"] == 0 and 512 % (f["micro_batch"] * f["dp"]) == 0
    assert layouts(LLAMA3_70B, cluster(nodes=1, launcher="local"), 8192) == []    # 8 x 80 GB cannot hold 18 bytes x 70B


def test_step_time_is_bubble_times_recomputation():
    plain = cluster(layout=Layout(pp=4), global_batch=64)
    assert step_time(plain) == pytest.approx(1 + 3 / 8)
    assert step_time(plain.model_copy(update={"recompute": True})) == pytest.approx((1 + 3 / 8) * 4 / 3)


@pytest.mark.parametrize("save, export_at, steps, expected", [
    ({}, [0.5, 1.0], 40, (2, 2)), ({"every": 10}, [1.0], 40, (4, 3)), ({"every": 10, "keep": 1, "keep_every": 20}, [1.0], 100, (10, 6)),
    ({"every": 10}, [5 * 4 * 512.0, 1.0], 40, (5, 4))])
def test_checkpoints_on_disk(save, export_at, steps, expected):
    train = Train(steps=steps, warmup=1, save=save, export_at=export_at)
    assert saves(train, 512) == expected
    need = storage(SMOLLM2, train, 512, 4)
    assert need["total"] == 134515008 * (14 * expected[1] + 4 * len(export_at))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])    # the first example imports torch
@given(st.integers(1, 60), st.integers(1, 12) | st.none(), st.integers(1, 4), st.integers(1, 30) | st.none(),
       st.lists(st.floats(0.01, 1), max_size=4))
def test_no_more_checkpoints_than_the_trainers_rule_leaves(steps, every, keep, keep_every, shares):
    "The most at once, walking through a run with checkpoints.unneeded, is at most one under what is planned."
    from domain_adapt.checkpoints import unneeded
    train = Train(steps=steps, warmup=0, save=dict(every=every, keep=keep, keep_every=keep_every), export_at=[*shares, 1.0])
    exported = {max(1, round(at * steps)) for at in train.export_at}
    there, most, written = [], 0, 0
    for step in range(1, steps + 1):
        if step not in exported and not (every and step % every == 0): continue
        there, written = [step, *there], written + 1
        most = max(most, len(there))
        gone = unneeded(there, step, train.save, exported)
        there = [s for s in there if s not in gone]
    planned = saves(train, 512)
    assert planned[0] == written and most <= planned[1] <= most + keep


def run_of(name: str, *sets: str): return load_params(ROOT / "params" / f"{name}.yaml", sets)


CLUSTER = ("model=meta-llama/Meta-Llama-3-70B", "train.processes=8", "train.global_batch=64", "train.micro_batch=1", "tokens.sequence_length=8192")
REFUSED = [
    (("train.global_batch=12", "train.micro_batch=3"), ["train.global_batch: 12", "micro_batch 3 x data parallel 8 = 24", "remainder 12"]),
    (("train.layout={tp: 3}",), ["train.layout: nodes 1 x processes 8 = 8", "tp 3 x pp 1 x cp 1 = 3", "remainder 2"]),
    (("train.layout={pp: 32}", "train.processes=32"), ["num_hidden_layers 80 is not a multiple of pp 32 (remainder 16)", "pp can be 1, 2, 4, 5, 8"]),
    (("train.layout={tp: 16}", "train.processes=16"), ["num_key_value_heads 8 is not a multiple of tp 16", "tp can be 1, 2, 4, 8"]),
    (("model=epfl-llm/meditron-7b", "train.layout={tp: 2}", "tokens.sequence_length=2048"),
     ["vocab_size 32017 is not a multiple of tp 2 (remainder 1)", "padding it to 32018 would change the model", "tp can be 1"]),
    (("model=smollm2-135m-instruct", "train.layout={tp: 2}"), ["num_attention_heads 9", "num_key_value_heads 3", "tp can be 1, 3"]),
    (("train.layout={cp: 8}", "tokens.sequence_length=8184"), ["tokens.sequence_length 8184 is not a multiple of 2 x cp 8 = 16 (remainder 8)"]),
    (("train.layout={tp: 8, sp: true}", "tokens.sequence_length=8190"), ["8190 is not a multiple of tp 8 (remainder 6)"]),
    (("train.export_at=[2.0e+10, 1.0]",), ["export_at: 20000000000 tokens are more than", "x tokens.sequence_length 8192 = 16777216"]),
    (("tokens.sequence_length=8193",), ["8193 is beyond the model's context, 8192"]),
    (("model=mistralai/Mistral-7B-v0.1",), ["8192 is longer than the 4096 tokens", "sliding_window"]),
]


@pytest.mark.fault
@pytest.mark.parametrize("sets, said", REFUSED)
def test_a_sum_that_does_not_work_out_is_told(sets, said):
    params = run_of("quickstart", *CLUSTER, *sets)
    found = "\n".join(problems(params, configuration(params.model)))
    for words in said: assert words in found
    assert problems(params.model_copy(update={"train": params.train.model_copy(update={"checkpoint": "some/model"})}), None) == []


@pytest.mark.fault
def test_other_families_and_odd_configurations():
    params = run_of("quickstart")
    assert "model_type is 'gpt2'" in problems(params, {"model_type": "gpt2"})[0]
    assert "has no num_hidden_layers" in problems(params, {"model_type": "llama", "num_attention_heads": 2, "hidden_size": 4})[0]
    llama = published()["smollm2-135m-instruct"]
    for more, said in (({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn'"), ({"attention_bias": True}, "attention_bias"),
                       ({"hidden_act": "gelu"}, "hidden_act is 'gelu'")):
        assert said in problems(params, llama | more)[0]
    assert problems(params, llama | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}) == []
    assert problems(params, None) == [] == problems(params, published()[params.model])


@pytest.mark.fault
def test_check_refuses_before_any_work(cli, tmp_path):
    done = cli("run", "params/tiny.yaml", "--set", "train.layout={tp: 3}", "--set", "train.processes=3", "--set", "train.global_batch=6",
               env={"DOMAIN_ADAPT_OUTPUTS": str(tmp_path / "o")})
    assert done.returncode == 2 and "is not a multiple of tp 3" in done.stderr and not (tmp_path / "o").exists()
    done = cli("check", "params/tiny.yaml", "--recipe", "--set", "train.layout={tp: 3}", "--set", "train.processes=3")
    assert done.returncode == 2 and "train.layout.tp: num_attention_heads" in done.stderr


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "tests/tiny/model", folder)
    return folder


def change(file: Path, **to) -> None: file.write_text(json.dumps(json.loads(file.read_text()) | to))


@pytest.mark.fault
def test_a_tokenizer_of_another_model(model):
    config = json.loads((model / "config.json").read_text())
    assert tokenizer_problems(model, "tiny") == []
    change(model / "config.json", eos_token_id=[config["eos_token_id"], 77])    # several ends are one of them
    assert tokenizer_problems(model, "tiny") == []
    change(model / "config.json", eos_token_id=[77, 78])
    assert "eos_token_id [77, 78]" in tokenizer_problems(model, "tiny")[0]
    change(model / "config.json", eos_token_id=config["eos_token_id"], vocab_size=100)
    assert "vocab_size is 100" in tokenizer_problems(model, "tiny")[0]
    assert "vocab_size is 100" in "\n".join(check(run_of("tiny", f"model={model}")))
    assert check(run_of("tiny", f"model={model}"), recipe=True) == []
    (model / "tokenizer.json").unlink()
    assert tokenizer_problems(model, "tiny") == []    # nothing to tell by


@pytest.mark.fault
def test_too_little_disk(tmp_path, monkeypatch):
    params, config = run_of("quickstart"), published()["smollm2-135m-instruct"]
    need = storage(SMOLLM2, params.train, 512, 2)["total"]
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda at: usage(need))
    assert disk_problems(params, config, tmp_path / "train-1234") == []
    monkeypatch.setattr(room.shutil, "disk_usage", lambda at: usage(need - 1))
    found, = disk_problems(params, config, tmp_path / "train-1234")
    assert "2 checkpoints x 1.88 GB + 2 exports x 269 MB = 4.3 GB" in found and str(tmp_path) in found
    (tmp_path / "train-1234" / "checkpoints").mkdir(parents=True)    # what is there already counts
    (tmp_path / "train-1234" / "checkpoints" / "one").write_bytes(b"x")
    assert disk_problems(params, config, tmp_path / "train-1234") == []


@pytest.mark.fault
def test_more_tokens_asked_than_there_are(tmp_path):
    params = run_of("tiny")    # 8 x 4 x 128 = 4,096 tokens, a fifth of them general
    table = pd.DataFrame([("sec", "train", 3, 3276), ("encyclopedia", "train", 3, 5000), ("news", "train", 0, 0)],
                         columns=["corpus", "split", "documents", "tokens"])
    table.to_csv(tmp_path / "splits.csv", index=False)
    assert token_problems(params, tmp_path) == []    # stage 2 is not done
    (tmp_path / "stage.json").write_text("{}")
    found, = token_problems(params, tmp_path)
    for words in ("corpora.sec", "steps 8 x batch 4 x 128 tokens", "3277 tokens", "3276", "max_epochs 1"): assert words in found
    assert token_problems(run_of("tiny", "train.max_epochs=1.001"), tmp_path) == []


def test_a_configuration_needs_no_network(model, tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAIN_ADAPT_CACHE", str(tmp_path / "empty"))
    assert configuration("smollm2-135m-instruct")["num_hidden_layers"] == 30    # published: it is not unpacked
    assert configuration(str(model))["num_hidden_layers"] == 2
    (model / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 2, "hidden_size": 4}')
    odd = plan(run_of("quickstart", f"model={model}"))
    assert "has no num_hidden_layers" in odd["problems"][0] and "cost" not in odd
    (model / "config.json").write_text("not json")
    with pytest.raises(UserError, match="is not a JSON object"): configuration(str(model))
    assert configuration("owner/unheard-of") is None
    with pytest.raises(UserError, match="neither on this machine nor among the published"): plan(run_of("quickstart", "model=owner/unheard-of"))


def test_plan_says_what_does_not_fit_and_what_idles():
    big = run_of("sec_llama3_70b", "train.layout={tp: 4, pp: 4}", "train.global_batch=4", "train.export_at=[1.0]")
    found = plan(big)
    assert any("does not fit" in n for n in found["notes"]) and any("mostly idle" in n for n in found["notes"])
    assert found["memory"][0]["total"] > 80e9 and len(found["memory"]) == 4 and found["assumptions"]
    refused = plan(run_of("sec_llama3_70b", "train.layout={tp: 8, pp: 3}"))
    assert refused["problems"] and refused["layouts"] and "memory" not in refused
    assert json.loads(json.dumps(found)) == found
