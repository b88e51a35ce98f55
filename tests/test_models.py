"""Getting models: the packaged GGUF against the gguf library's own reading, a hub of our own, and folders that will not do."""
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from domain_adapt import models
from domain_adapt.assets import ASSETS, Asset, cache_folder, resolve
from domain_adapt.models import best_dtype, bf16_speedup, get_model, load_model, load_tokenizer, usable_cores
from domain_adapt.params import UserError
from domain_adapt.runs import ROOT


@pytest.fixture
def copy(tiny_llama, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


def test_local_folder(tiny_llama, monkeypatch):
    assert get_model(str(tiny_llama)) == tiny_llama
    monkeypatch.chdir(tiny_llama.parent)
    assert get_model(tiny_llama.name) == tiny_llama
    model, tokenizer = load_model(tiny_llama, "bf16"), load_tokenizer(tiny_llama)
    assert model.dtype == torch.bfloat16 and not model.training and model.config._attn_implementation == "sdpa"
    assert load_model(tiny_llama, "fp32").dtype == torch.float32 and tokenizer.is_fast


@pytest.mark.fault
def test_no_tokenizer(copy):
    for f in copy.glob("tokenizer*"): f.unlink()
    for call in (lambda: get_model(str(copy)), lambda: load_tokenizer(copy), lambda: load_model(copy, "fp32")):
        with pytest.raises(UserError, match="model .*no tokenizer.*save_pretrained") as e: call()
        assert str(copy) in str(e.value)


@pytest.mark.fault
def test_pickled_weights_are_not_opened(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin.*save_pretrained"): get_model(str(copy))


@pytest.mark.fault
def test_shard_missing(copy):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "second.safetensors"}}))
    with pytest.raises(UserError, match="second.safetensors"): get_model(str(copy))


@pytest.mark.fault
def test_truncated_weights(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"): load_model(copy, "fp32")


@pytest.mark.fault
def test_missing_and_misshapen_tensors_are_not_made_up(copy):
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=name): load_model(copy, "fp32")
    save_file(weights | {name: weights[name][:-1].contiguous()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="up_proj"): load_model(copy, "fp32")


@pytest.mark.fault
def test_code_of_a_model_is_never_run(copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "special", "auto_map": {"AutoConfig": "special.Config", "AutoModelForCausalLM": "special.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "special.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match=str(copy)): load_model(copy, "fp32")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["smollm2", "no/such/thing/at/all", "s3:/typo", ""])
def test_unknown_names(name):
    with pytest.raises(UserError, match="smollm2-135m-instruct"): get_model(name)


@pytest.fixture
def hub(tiny_llama, tmp_path, monkeypatch):
    "A hub on loopback that has `someone/tiny`, with files nobody should fetch; the environment for it, and what was asked for."
    files = {f.name: f.read_bytes() for f in tiny_llama.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "modeling.py": b"raise SystemExit", "onnx/model.json": b"{}"}
    asked, commit = [], "a" * 40

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self): self.answer(False)
        def do_GET(self): self.answer(True)

        def answer(self, body):
            name = self.path.split(f"/resolve/{commit}/")[-1]
            if self.path.startswith("/api/models/someone/tiny"):
                data = json.dumps({"id": "someone/tiny", "sha": commit, "siblings": [{"rfilename": f} for f in files]}).encode()
                if "/tree/" in self.path:
                    data = json.dumps([{"type": "file", "path": f, "size": len(d), "oid": f"{i:040x}"} for i, (f, d) in enumerate(files.items())]).encode()
            elif name in files: data = files[name]; asked.append(name)
            else: return self.send_error(404)
            self.send_response(200)
            for k, v in {"Content-Length": len(data), "ETag": f'"{name}"', "X-Repo-Commit": commit, "Content-Type": "application/json"}.items():
                self.send_header(k, str(v))
            self.end_headers()
            if body: self.wfile.write(data)

        def log_message(self, *_): pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    for name in ("DOMAIN_ADAPT_OFFLINE", "HF_HUB_OFFLINE", "HF_HUB_CACHE"): env.pop(name, None)
    yield env, asked
    server.shutdown(); server.server_close()


def test_hub(hub, tiny_llama):
    env, asked = hub
    code = "import sys; from domain_adapt.models import get_model; print(get_model(sys.argv[1]))"
    call = lambda name, **more: subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, env={**env, **more}, capture_output=True, text=True)
    got = call("someone/tiny")
    folder = Path(got.stdout.strip())
    assert got.returncode == 0, got.stderr
    assert {p.name for p in folder.iterdir()} == {p.name for p in tiny_llama.iterdir()} == set(asked)
    assert (folder / "model.safetensors").read_bytes() == (tiny_llama / "model.safetensors").read_bytes()
    asked.clear()
    assert call("someone/tiny", DOMAIN_ADAPT_OFFLINE="1").stdout == got.stdout and not asked
    refused = call("someone/else")
    assert "UserError: model someone/else: no such local folder, and the hub did not give it" in refused.stderr


def tiny_gguf(at: Path, tokenizer: dict, seed: int = 0) -> dict[str, np.ndarray]:
    "Write a two-layer Llama as GGUF; returns its tensors under their GGUF names."
    import gguf
    r, width, inner, heads, groups = np.random.default_rng(seed), 32, 64, 4, 2
    vocabulary = [t for t, _ in sorted(tokenizer["model"]["vocab"].items(), key=lambda x: x[1])]
    shapes = {"token_embd": (len(vocabulary), width), "output_norm": (width,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{n}": s for n, s in dict(
            attn_norm=(width,), ffn_norm=(width,), attn_q=(width, width), attn_k=(width * groups // heads, width),
            attn_v=(width * groups // heads, width), attn_output=(width, width), ffn_gate=(inner, width),
            ffn_up=(inner, width), ffn_down=(width, inner)).items()}
    w = gguf.GGUFWriter(at, "llama")
    w.add_context_length(64); w.add_embedding_length(width); w.add_block_count(2); w.add_feed_forward_length(inner)
    w.add_head_count(heads); w.add_head_count_kv(groups); w.add_layer_norm_rms_eps(1e-5); w.add_rope_dimension_count(8)
    w.add_vocab_size(len(vocabulary)); w.add_rope_freq_base(10000.0); w.add_file_type(0)
    w.add_tokenizer_model("gpt2"); w.add_token_list(vocabulary); w.add_token_types([1] * len(vocabulary))
    w.add_token_merges([" ".join(m) for m in tokenizer["model"]["merges"]])
    w.add_eos_token_id(0); w.add_bos_token_id(0); w.add_chat_template("{{ messages[0]['content'] }}")
    tensors = {f"{n}.weight": r.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    for n, t in tensors.items(): w.add_tensor(n, t)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return tensors


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    "A packaged model made here: its name, its GGUF tensors and the cache."
    import hashlib
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers, trainers
    words = Tokenizer(kinds.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.train_from_iterator(["Net sales were 1,234 million."] * 3, trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tensors = tiny_gguf(tmp_path / "tiny.gguf", json.loads(words.to_str()))
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as z: z.write(tmp_path / "tiny.gguf", "tiny/tiny.gguf")
    cache = tmp_path / "cache"
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / "tiny.whl").write_bytes(data.getvalue())
    monkeypatch.setenv("DOMAIN_ADAPT_CACHE", str(cache))
    digest = hashlib.sha256(data.getvalue()).hexdigest()
    monkeypatch.setitem(ASSETS, "tiny", Asset("tiny", "1", "tiny.whl", len(data.getvalue()), digest, "tiny", "*.gguf", "none"))
    monkeypatch.setattr(models, "PACKAGED", ("tiny",))
    return tensors, cache


def heads_apart(q: np.ndarray, heads: int) -> np.ndarray:
    "GGUF keeps a Llama's rotary pairs side by side, Hugging Face in two halves."
    return q.reshape(heads, q.shape[0] // heads // 2, 2, q.shape[1]).swapaxes(1, 2).reshape(q.shape)


@pytest.mark.oracle
def test_packaged_gguf(packaged):
    tensors, cache = packaged
    folder = get_model("tiny")
    weights = load_file(folder / "model.safetensors")
    assert all(w.dtype == torch.float32 for w in weights.values())
    same = lambda ours, theirs: np.array_equal(weights[ours].numpy(), theirs)
    assert same("model.embed_tokens.weight", tensors["token_embd.weight"]) and "lm_head.weight" not in weights
    assert same("model.layers.1.mlp.down_proj.weight", tensors["blk.1.ffn_down.weight"])
    assert same("model.layers.0.self_attn.q_proj.weight", heads_apart(tensors["blk.0.attn_q.weight"], 4))
    assert same("model.layers.0.self_attn.k_proj.weight", heads_apart(tensors["blk.0.attn_k.weight"], 2))
    model, tokenizer = load_model(folder, "fp32"), load_tokenizer(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight and "quantization" not in (folder / "config.json").read_text()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Net sales were $1,234 million.").input_ids)
    assert "Ġsales" in tokens and not {"12", "23", "34", "1234"} & set(tokens) and tokenizer.eos_token == "<end>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    for f in folder.glob("*.json"): assert str(cache) not in f.read_text() and "/tmp" not in f.read_text()
    assert get_model("tiny") == folder and not list(cache.rglob("*.part"))


@pytest.mark.fault
def test_failed_conversion_leaves_nothing(packaged, monkeypatch):
    from transformers import LlamaForCausalLM
    def fail(self, folder): (folder / "config.json").write_text("{}"); raise OSError(28, "No space left on device")
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"): get_model("tiny")
    assert not list((packaged[1] / "models").iterdir())


def test_second_call_imports_no_torch(packaged):
    name, cache = "smollm2-135m-instruct", packaged[1]
    (cache / "models" / f"{name}-{ASSETS[name].sha256[:12]}").mkdir(parents=True)
    code = f"import sys; from domain_adapt.models import get_model; get_model({name!r}); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.oracle
def test_real_packaged_model():
    "Weights equal the gguf library's dequantised ones; numbers are split into digits, as SmolLM2's own tokenizer does."
    name = "smollm2-135m-instruct"
    if not (cache_folder() / "downloads" / ASSETS[name].file).is_file(): pytest.skip(f"{ASSETS[name].file} is not in {cache_folder()}")
    import gguf
    from tokenizers import pre_tokenizers
    folder = get_model(name)
    weights = load_file(folder / "model.safetensors")
    pairs = {"token_embd.weight": "model.embed_tokens.weight", "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
             "blk.7.attn_k.weight": "model.layers.7.self_attn.k_proj.weight"}
    for t in gguf.GGUFReader(resolve(f"package:{name}")).tensors:
        if t.name not in pairs: continue
        values = gguf.dequantize(t.data, t.tensor_type)
        if "attn_k" in t.name: values = heads_apart(values, 3)
        assert np.array_equal(weights[pairs.pop(t.name)].numpy(), values.astype(np.float32))
    assert not pairs
    tokenizer = load_tokenizer(folder)
    text = "Net sales were $383,285 in 2024 (2023: 1.5%).\n\n| a1b22 | ½ 三 |"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and tokenizer.eos_token_id == 2 and "im_start" in tokenizer.chat_template
    assert tokenizer.convert_ids_to_tokens(ids)[3:13] == ["Ġ$", *"383,285", "Ġin", "Ġ"]
    assert not any(sum(c.isdigit() for c in t) > 1 for t in tokenizer.get_vocab())


def test_precision_by_probe():
    assert best_dtype("bf16") == "bf16" and best_dtype("fp32") == "fp32"
    assert best_dtype("auto") == ("bf16" if bf16_speedup() >= 1.3 else "fp32")
    assert bf16_speedup() > 0 and bf16_speedup() == bf16_speedup()


def run_tuned(code: str, threads: str) -> list[str]:
    "What a process of its own prints that was tuned, with `OMP_NUM_THREADS` as given; or its error."
    head = "import resource, torch; from concurrent.futures import ThreadPoolExecutor; from domain_adapt.models import tune_cpu; tune_cpu()\n"
    p = subprocess.run([sys.executable, "-c", head + code], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True)
    return p.stdout.split() or [p.stderr]


def test_tune_cpu(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "tune_cpu(); print(torch.get_num_threads(), torch.ones(2000, 2000).sum().item())"
    assert run_tuned(code, "1") == ["1", "4000000.0"]
    assert run_tuned(code, "") == [str(usable_cores()), "4000000.0"]


def test_no_other_thread_brings_a_team():
    "Of libgomp's threads, when they are more than the cores, none spins."
    code = """from pathlib import Path
work = lambda: torch.ones(2000, 2000).sum().item()
count = lambda: len(list(Path("/proc/self/task").iterdir()))
before = count()
work()
team = count()
with ThreadPoolExecutor(1) as pool: print(team - before, pool.submit(work).result(), count() - team, torch.get_num_threads())"""
    assert run_tuned(code, "3") == ["2", "4000000.0", "1", "3"]


def test_what_one_thread_frees_another_has():
    "A smaller tensor in its place: for one as large glibc wants a few bytes more, to align it, and finds them by luck."
    code = """def faults(values):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(values)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
with ThreadPoolExecutor(1) as pool: print(faults(2**26), pool.submit(faults, 2**22).result())"""
    fresh, again = map(int, run_tuned(code, "1"))
    assert again < 1000 < 2**22 * 4 / 4096 / 2 < 2**26 * 4 / 4096 / 2 < fresh
