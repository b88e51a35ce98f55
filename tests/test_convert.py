"HF to Megatron-Core and back: bit for bit in every slice, nothing of a folder lost, and little memory."
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from domain_adapt import convert
from domain_adapt.convert import (COLUMNS, EMBEDDING, FUSED, MASTER, OUTPUT, Stored, apart, export_checkpoint, join_qkv, lay_out, made_of, put,
                                  split_qkv, unfused, weight_files, weights, weights_dtype, whole_name, whole_shape)
from domain_adapt.params import UserError

ROOT = Path(__file__).resolve().parent.parent
SIZES = dict(vocab_size=24, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TINY = {"llama": LlamaConfig(**SIZES), "tied": LlamaConfig(**SIZES, tie_word_embeddings=True), "wide_heads": LlamaConfig(**SIZES, head_dim=6),
        "all_heads": LlamaConfig(**SIZES | dict(num_key_value_heads=4)), "mistral": MistralConfig(**SIZES), "qwen2": Qwen2Config(**SIZES),
        "qwen2_tied": Qwen2Config(**SIZES, tie_word_embeddings=True)}
FAMILIES = pytest.mark.parametrize("hf", TINY.values(), ids=TINY)


def parts_of(hf) -> dict[str, tuple]: return {t: s for parts in made_of(hf).values() for t, s in parts.items()}


def write_model(folder: Path, hf, dtype=torch.float32, **changed) -> dict[str, torch.Tensor]:
    "An HF folder of random weights; `changed` tensors take the place of, or come to, those of the model."
    folder.mkdir(parents=True, exist_ok=True)
    hf.dtype = dtype
    hf.save_pretrained(folder)
    state = {t: torch.randn(s).to(dtype) for t, s in parts_of(hf).items()} | changed
    save_file({t: w for t, w in state.items() if w is not None}, folder / "model.safetensors", metadata={"format": "pt"})
    return state


def all_weights(folder: Path, hf, rank: int = 0, size: int = 1) -> dict[str, torch.Tensor]:
    return {n: w.clone() for n, w in weights(folder, hf, {n: n for n in made_of(hf)}, rank, size)}


def write_checkpoint(folder: Path, state: dict[str, torch.Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # that no process group is there
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def fused(name: str) -> str:
    "A local layer's tensor as TransformerEngine's layers call it."
    for te, local in FUSED.items(): name = name.replace(local, te)
    return name


@pytest.mark.oracle
@FAMILIES
def test_names_and_shapes_are_those_of_transformers(hf):
    with torch.device("meta"): theirs = {k: tuple(v.shape) for k, v in AutoModelForCausalLM.from_config(hf).state_dict().items()}
    if hf.tie_word_embeddings: del theirs["lm_head.weight"]
    assert parts_of(hf) == theirs


@pytest.mark.oracle
def test_transformer_engines_names_are_megatron_cores():
    "megatron-core maps the local layers' names to TransformerEngine's in its checkpoints; its TE layers bear the latter themselves."
    import inspect
    from domain_adapt import megatron    # imports it without its warnings
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
    assert {te: local for local, te in get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map.items()} == FUSED
    source = inspect.getsource(get_gpt_layer_with_transformer_engine_spec)
    assert '"mlp.linear_fc1.layer_norm_weight"' in source and source.count("linear_qkv=backend.column_parallel_layer_norm_linear()") == 1
    for hf in TINY.values():
        names = list(made_of(hf))
        te = [fused(n) for n in names]
        assert [unfused(n) for n in te] == names and len(set(te)) == len(names) and sum(a != b for a, b in zip(te, names)) == 4


def test_each_group_holds_its_queries_key_and_value():
    heads, groups, d = 4, 2, 3
    q, k, v = (torch.arange(n * d).view(-1, 1) + at for n, at in ((heads, 0), (groups, 100), (groups, 200)))
    rows = join_qkv(q, k, v, groups).view(groups, heads // groups + 2, d)
    assert rows[1].tolist() == [[6, 7, 8], [9, 10, 11], [103, 104, 105], [203, 204, 205]]
    assert all(torch.equal(a, b) for a, b in zip(split_qkv(join_qkv(q, k, v, groups), groups, heads), (q, k, v)))


@pytest.mark.equality
@pytest.mark.parametrize("te", [False, True], ids=["local", "te"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@FAMILIES
def test_there_and_back_bit_for_bit(tmp_path, hf, dtype, te):
    state = write_model(tmp_path / "source", hf, dtype)
    there = all_weights(tmp_path / "source", hf)
    assert all(w.dtype == torch.float32 for w in there.values())
    write_checkpoint(tmp_path / "step", {fused(n) if te else n: w for n, w in there.items()})
    export_checkpoint(tmp_path / "step", tmp_path / "source", tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").read_bytes() == (tmp_path / "source" / "model.safetensors").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert model.dtype == dtype and all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


SHAPES = dict(per=st.integers(1, 3), groups=st.sampled_from([1, 2, 3, 4]), d=st.sampled_from([1, 2, 4]), tp=st.sampled_from([1, 2, 4]))


def whole_from(slices: list[torch.Tensor], name: str) -> torch.Tensor:
    "What tensor-parallel slices are together, as megatron-core's layers cut them: gate and up each for itself."
    if "layernorm" in name:
        assert all(torch.equal(s, slices[0]) for s in slices)
        return slices[0]
    if "fc1" in name: return torch.cat([torch.cat(half) for half in zip(*(s.chunk(2) for s in slices))])
    return torch.cat(slices, int(name.endswith(COLUMNS)))


@pytest.mark.equality
@settings(max_examples=60, deadline=None)
@given(**SHAPES, layers=st.integers(1, 4), pp=st.sampled_from([1, 2, 4]), tied=st.booleans(), bias=st.booleans(), data=st.data())
def test_slices_of_every_layout_are_the_whole(per, groups, d, tp, layers, pp, tied, bias, data):
    "Tensor-parallel slices of pipeline stages, with local numbers and either spec's names, joined."
    if groups % tp and tp % groups or groups * per % tp: return
    hf = (Qwen2Config if bias else LlamaConfig)(
        vocab_size=8, hidden_size=groups * per * d, intermediate_size=8, num_hidden_layers=layers * pp, num_attention_heads=groups * per,
        num_key_value_heads=groups, tie_word_embeddings=tied)
    with tempfile.TemporaryDirectory() as at:
        folder = Path(at) / "model"
        state = write_model(folder, hf)
        joined, whole = {}, all_weights(folder, hf)
        for stage in range(pp):
            numbers = list(range(stage * layers, (stage + 1) * layers))
            own = [n for n in made_of(hf) if n.startswith("decoder.layers.0.")]
            local = [n.replace(".0.", f".{i}.", 1) for i in range(layers) for n in own]
            local += [EMBEDDING] * (stage == 0) + ["decoder.final_layernorm.weight"] * (stage == pp - 1)
            local += [OUTPUT] * (stage == pp - 1 and not (tied and pp == 1))
            names = {(fused(n) if data.draw(st.booleans()) else n): whole_name(n, numbers, tied) for n in local}
            ranks = [{n: w.clone() for n, w in weights(folder, hf, names, rank, tp)} for rank in range(tp)]
            for name, of in names.items():
                weight = whole_from([r[name] for r in ranks], of)
                assert torch.equal(joined.setdefault(of, weight), weight)    # tied embeddings come twice
    assert joined.keys() == whole.keys() and all(torch.equal(joined[n], whole[n]) for n in whole)
    back = {t: x for n, parts in made_of(hf).items() for t, x in apart(joined[n], parts, hf).items()}
    assert back.keys() == state.keys() and all(torch.equal(back[t], state[t]) for t in state)


@pytest.mark.oracle
def test_ranks_hold_the_heads_that_megatron_core_gives_them():
    "Two ranks, four heads in two groups: rank 1 has the heads 2 and 3 with the second key and value."
    hf = TINY["llama"]
    with tempfile.TemporaryDirectory() as at:
        state = write_model(Path(at) / "m", hf)
        one = dict(weights(Path(at) / "m", hf, {"x": "decoder.layers.1.self_attention.linear_qkv.weight"}, 1, 2))["x"].clone()
        out = dict(weights(Path(at) / "m", hf, {"x": "decoder.layers.1.self_attention.linear_proj.weight"}, 1, 2))["x"].clone()
        fc1 = dict(weights(Path(at) / "m", hf, {"x": "decoder.layers.1.mlp.linear_fc1.weight"}, 1, 2))["x"].clone()
    q, k, v, o, gate, up = (state[f"model.layers.1.{x}_proj.weight"] for x in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up"))
    assert torch.equal(one, torch.cat([q[4:8], k[2:4], v[2:4]])) and torch.equal(out, o[:, 4:8]) and torch.equal(fc1, torch.cat([gate[8:], up[8:]]))


@pytest.mark.equality
def test_masters_are_exported_where_there_are_some(tmp_path):
    hf = TINY["qwen2_tied"]
    write_model(tmp_path / "source", hf)
    masters = {n: w + torch.randn_like(w) for n, w in all_weights(tmp_path / "source", hf).items()}
    low = {n: w.bfloat16() for n, w in masters.items()}
    moments = {f"optimizer.state.{m}.{n}": torch.zeros_like(w) for m in ("exp_avg", "exp_avg_sq") for n, w in masters.items()}
    write_checkpoint(tmp_path / "both", low | moments | {MASTER + n: w for n, w in masters.items()})
    write_checkpoint(tmp_path / "low", low)
    for kind, expected in (("both", masters), ("low", {n: w.float() for n, w in low.items()})):
        export_checkpoint(tmp_path / kind, tmp_path / "source", tmp_path / f"export_{kind}")
        back = all_weights(tmp_path / f"export_{kind}", hf)
        assert all(torch.equal(back[n], expected[n]) for n in expected), kind


@pytest.mark.equality
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_keeps_all_but_the_weights(tiny_llama, tmp_path, dtype):
    source, folder = tmp_path / "source", tmp_path / "export"
    shutil.copytree(tiny_llama, source)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "pytorch_model.bin").write_bytes(b"old weights")
    (source / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text()) | {"dtype": dtype}))
    hf = AutoConfig.from_pretrained(source)
    moved = {n: torch.randn(whole_shape(parts)) for n, parts in made_of(hf).items()}
    write_checkpoint(tmp_path / "step", moved)
    folder.mkdir()
    (folder / "old").touch()
    export_checkpoint(tmp_path / "step", source, folder)
    assert {f.name for f in folder.iterdir()} == {f.name for f in source.iterdir()} - {"pytorch_model.bin"}
    for f in folder.iterdir():
        if f.suffix != ".safetensors": assert (source / f.name).read_bytes() == f.read_bytes(), f.name
    assert weights_dtype(folder) == getattr(torch, dtype)
    expected = {t: x.to(getattr(torch, dtype)) for n, parts in made_of(hf).items() for t, x in apart(moved[n], parts, hf).items()}
    exported = load_file(folder / "model.safetensors")
    assert exported.keys() == expected.keys() and all(torch.equal(exported[t], expected[t]) for t in expected)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_files_are_those_of_safetensors_itself(tmp_path, monkeypatch, dtype):
    "One file byte for byte; several as huggingface_hub cuts them, read by transformers."
    from huggingface_hub import save_torch_state_dict
    hf = TINY["qwen2"]
    state = write_model(tmp_path / "source", hf, dtype)
    for shard, files in ((5 * 10**9, 1), (1000, None)):
        ours, theirs = tmp_path / f"ours_{shard}", tmp_path / f"theirs_{shard}"
        monkeypatch.setattr(convert, "SHARD", shard)
        ours.mkdir(), theirs.mkdir()
        places = lay_out(ours, {t: tuple(w.shape) for t, w in state.items()}, dtype)
        for t in reversed(state): put(state[t], places[t])
        save_torch_state_dict(state, theirs, max_shard_size=shard)
        found = {f.name for f in theirs.glob("*.safetensors")}
        assert found == {f.name for f in ours.glob("*.safetensors")} and (len(found) == files if files else len(found) > 3)
        for f in found: assert (ours / f).read_bytes() == (theirs / f).read_bytes(), f
        hf.save_pretrained(ours)
        loaded = AutoModelForCausalLM.from_pretrained(ours, dtype="auto").state_dict()
        assert all(torch.equal(loaded[t], w) for t, w in state.items())
        assert all(torch.equal(w, load_file(weight_files(ours, hf)[t])[t]) for t, w in state.items())
        there = all_weights(tmp_path / "source", hf)    # of several files' parts here
        assert all(torch.equal(w, there[n]) for n, w in all_weights(ours, hf).items())
    index = "model.safetensors.index.json"
    assert json.loads((ours / index).read_text()) == json.loads((theirs / index).read_text())


WRONG = {
    "lack model.layers.1.mlp.up_proj.weight": {"model.layers.1.mlp.up_proj.weight": None},
    "model.safetensors: model.layers.0.self_attn.k_proj.bias has no place in a llama": {"model.layers.0.self_attn.k_proj.bias": torch.zeros(4)},
    r"model.safetensors: model.embed_tokens.weight is \[25, 8\], config.json asks for \[24, 8\]": {"model.embed_tokens.weight": torch.zeros(25, 8)}}


@pytest.mark.parametrize("message, changed", WRONG.items(), ids=["missing", "left over", "another shape"])
def test_a_folder_that_is_not_its_configs_is_refused_by_name_and_file(tmp_path, message, changed):
    write_model(tmp_path / "m", TINY["llama"], **changed)
    with pytest.raises(UserError, match=message): all_weights(tmp_path / "m", TINY["llama"])


@pytest.mark.fault
def test_a_damaged_or_absent_file_is_named(tmp_path):
    write_model(tmp_path / "m", TINY["llama"])
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="model.safetensors: cannot be read"): weight_files(tmp_path / "m", TINY["llama"])
    file.unlink()
    with pytest.raises(UserError, match="model.safetensors: cannot be read"): weight_files(tmp_path / "m", TINY["llama"])
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "model-1.safetensors"}}))
    with pytest.raises(UserError, match="model-1.safetensors: cannot be read"): weight_files(tmp_path / "m", TINY["llama"])


def test_what_transformers_leaves_unused_is_left_here_too(tmp_path):
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(1), "lm_head.weight": torch.zeros(24, 8)}
    write_model(tmp_path / "m", TINY["tied"], **more)
    save_file({"foreign": torch.zeros(1)}, tmp_path / "m" / "consolidated.safetensors")
    assert all_weights(tmp_path / "m", TINY["tied"]).keys() == made_of(TINY["tied"]).keys()


@pytest.mark.fault
def test_a_checkpoint_of_another_model_leaves_nothing(tmp_path):
    write_model(tmp_path / "source", TINY["llama"])
    there = all_weights(tmp_path / "source", TINY["llama"])
    wrong = {"lacks output_layer.weight": {n: w for n, w in there.items() if n != OUTPUT},
             "without a place for it in config.json's model, decoder.layers.2.mlp": there | {"decoder.layers.2.mlp.linear_fc2.weight": torch.zeros(8, 16)},
             r"word_embeddings.weight is \[28, 8\], config.json asks for \[24, 8\]": there | {EMBEDDING: torch.zeros(28, 8)}}
    for i, (message, state) in enumerate(wrong.items()):
        write_checkpoint(tmp_path / str(i), state)
        with pytest.raises(UserError, match=message): export_checkpoint(tmp_path / str(i), tmp_path / "source", tmp_path / "out" / "export")
    with pytest.raises(UserError, match="holds no torch_dist checkpoint"): export_checkpoint(tmp_path / "source", tmp_path / "source", tmp_path / "out" / "export")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.fault
def test_a_damaged_checkpoint_leaves_nothing_and_a_missing_part_is_named(tmp_path, monkeypatch):
    write_model(tmp_path / "source", TINY["llama"])
    write_checkpoint(tmp_path / "step", all_weights(tmp_path / "source", TINY["llama"]))
    stored = Stored(tmp_path / "step")
    stored.tensors[OUTPUT].chunks.clear()
    with pytest.raises(UserError, match="a part of output_layer.weight is missing"): stored.read(OUTPUT, torch.float32)
    file, = (tmp_path / "step").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(Exception): export_checkpoint(tmp_path / "step", tmp_path / "source", tmp_path / "out" / "export")
    assert not list((tmp_path / "out").iterdir())


LAYOUTS = {    # family: processes are four
    "qwen2_tied": dict(layout=dict(tp=2, pp=2)), "llama": dict(layout=dict(tp=4)), "mistral": dict(layout=dict(tp=2), distributed_optimizer=True),
    "tied": dict(layout=dict(pp=2), distributed_optimizer=True), "wide_heads": dict(layout=dict(tp=2), precision="fp32")}
THERE = '''
import json, sys
from pathlib import Path
import torch
from transformers import AutoConfig
from domain_adapt import megatron
from domain_adapt.checkpoints import Checkpoints
from domain_adapt.convert import local_weights
from domain_adapt.params import Save, Train

at = Path(sys.argv[1])
for name, settings in json.loads(sys.argv[2]).items():
    train = Train(processes=4, global_batch=4, micro_batch=1, **settings)
    megatron.initialize(train.layout)
    hf = AutoConfig.from_pretrained(at / name)
    bf16 = train.precision != "fp32"
    model = megatron.build_model(hf, megatron.transformer_config(hf, train, bf16))
    ddp, optimizer = megatron.trainable(model, train, bf16)
    megatron.set_weights(ddp, optimizer, local_weights(at / name, hf, model))
    checkpoints = Checkpoints(at / name / "checkpoints", Save(), set())
    checkpoints.save(ddp, optimizer, 1, {})
    checkpoints.finish()
    print(name, torch.distributed.get_rank(), sum(p.numel() for p in model.parameters()), flush=True)
    megatron.parallel_state.destroy_model_parallel()
torch.distributed.destroy_process_group()
'''


@pytest.mark.equality
def test_trainers_checkpoints_of_every_layout_come_back_bit_for_bit(tmp_path):
    "Sources in fp32, so that only masters, unrounded by bf16 training, can give them back."
    sources = {name: write_model(tmp_path / name, TINY[name]) for name in LAYOUTS}
    (tmp_path / "there.py").write_text(THERE)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", tmp_path / "there.py", tmp_path,
               json.dumps(LAYOUTS)]
    env = os.environ | dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONPATH=str(ROOT))
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for name, state in sources.items():
        export_checkpoint(tmp_path / name / "checkpoints" / "step_1", tmp_path / name, tmp_path / f"export_{name}")
        back = load_file(tmp_path / f"export_{name}" / "model.safetensors")
        assert back.keys() == state.keys() and all(torch.equal(back[t], state[t]) for t in state), name


SIZE = {    # quick: 0.7 GB, the largest tensor 49 MB; whole: 3 GB, 98 MB in the source's bf16
    "quick": (torch.float32, dict(vocab_size=12_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6)),
    "whole": (torch.bfloat16, dict(vocab_size=24_000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=7))}
MEASURE = '''
import sys, threading, time
import domain_adapt.convert as convert, torch, transformers, torch.distributed.checkpoint.planner_helpers, huggingface_hub, safetensors.torch
transformers.AutoConfig, transformers.LlamaConfig
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
source, checkpoint, folder = sys.argv[1:]
hf = transformers.AutoConfig.from_pretrained(source)
peak, done, before, started = [0], threading.Event(), resident(), time.perf_counter()
def watch():
    while not done.wait(0.002): peak[0] = max(peak[0], resident())
threading.Thread(target=watch, daemon=True).start()
if checkpoint == "-": assert sum(w.sum() for _, w in convert.weights(source, hf, {n: n for n in convert.made_of(hf)})) == 0
else: convert.export_checkpoint(checkpoint, source, folder)
done.set()
print(peak[0] - before, time.perf_counter() - started)
'''


@pytest.mark.parametrize("size", ["quick", pytest.param("whole", marks=pytest.mark.real)])
def test_memory_is_that_of_the_largest_tensor(size):
    "A checkpoint of bf16 weights and fp32 masters, each tensor in one chunk, from and to its HF folder; the promise is 4 times and 1 GB."
    dtype, sizes = SIZE[size]
    hf = LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=4, dtype=dtype)
    shapes, largest = {n: whole_shape(parts) for n, parts in made_of(hf).items()}, hf.vocab_size * hf.hidden_size * dtype.itemsize
    with tempfile.TemporaryDirectory() as at:
        source, step = Path(at) / "source", Path(at) / "step"
        hf.save_pretrained(source)
        places = lay_out(source, parts_of(hf), dtype)
        last = max(places, key=lambda t: places[t][1])
        put(torch.zeros(parts_of(hf)[last], dtype=dtype), places[last])    # the rest is zeros too: a hole in the file
        low, high = ({n: torch.ones(1, dtype=d).expand(s) for n, s in shapes.items()} for d in (torch.bfloat16, torch.float32))
        write_checkpoint(step, low | {MASTER + n: w for n, w in high.items()})
        total = sum(f.stat().st_size for f in source.iterdir())
        assert total > 8 * largest
        for checkpoint in ("-", step):
            command = [sys.executable, "-W", "ignore", "-c", MEASURE, source, checkpoint, Path(at) / "export"]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=300)
            assert done.returncode == 0, done.stderr
            grown, seconds = map(float, done.stdout.split())
            way = "HF to Megatron" if checkpoint == "-" else "Megatron to HF"
            print(f"{way}: {grown / largest:.2f} times the largest tensor, {total / seconds / 1e6:.0f} MB/s")
            assert largest < grown < 4 * largest + 10**8, way    # some 100 MB for what comes and goes beside
        assert load_file(next((Path(at) / "export").glob("*.safetensors")))["model.norm.weight"].sum() == hf.hidden_size
