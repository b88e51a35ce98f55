"The model against transformers: logits, gradients, a few updates. And importing leaves torch alone."
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

COMPARE = '''
import json, sys, tempfile, torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config
from domain_adapt import convert, megatron
from domain_adapt.params import Train

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
megatron.initialize()
rope = lambda **more: dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                           original_max_position_embeddings=8192) | more
kinds = dict(
    smollm=LlamaConfig(tie_word_embeddings=True), llama3=LlamaConfig(rope_parameters=rope(), max_position_embeddings=131072),
    other_scaling=LlamaConfig(rope_parameters=rope(factor=4.0, low_freq_factor=2.0, high_freq_factor=8.0, original_max_position_embeddings=64)),
    wide_heads=LlamaConfig(tie_word_embeddings=True, head_dim=16, num_key_value_heads=4), llama2=LlamaConfig(num_key_value_heads=4),
    mistral=MistralConfig(sliding_window=None, head_dim=16), mistral_window=MistralConfig(sliding_window=200, head_dim=8),
    qwen2=Qwen2Config(tie_word_embeddings=False, rope_theta=1e6), qwen2_tied=Qwen2Config(tie_word_embeddings=True))
largest = lambda a, b: {k: (a[k] - b[k]).abs().max().item() for k in b}
out = {}
for kind, hf in kinds.items():
    torch.manual_seed(1)
    sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.3)
    if hf.num_key_value_heads != 4: sizes["num_key_value_heads"] = 2
    if hf.model_type == "llama" and kind != "wide_heads" or hf.model_type == "qwen2": sizes["head_dim"] = 8
    for key, value in sizes.items(): setattr(hf, key, value)
    if hf.model_type == "qwen2": hf.layer_types = ["full_attention"] * 3
    hf._attn_implementation = "eager"
    reference = AutoModelForCausalLM.from_config(hf).train()
    for name, p in reference.named_parameters():
        if name.endswith("bias"): torch.nn.init.normal_(p, std=0.3)
    ids, labels = torch.randint(320, (4, 200)), torch.randint(320, (4, 200))
    settings = Train(lr=1e-3, weight_decay=0.1, clip_grad=1.0)
    megatron.check_family(hf, 200)
    model = megatron.build_model(hf, megatron.transformer_config(hf, settings))
    ddp, optimizer = megatron.trainable(model, settings, bf16=False)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        megatron.set_weights(ddp, optimizer, convert.local_weights(folder, hf, model))
    to_hf = lambda state: {t: x for n, parts in convert.made_of(hf).items() for t, x in convert.apart(state[n], parts, hf).items()}
    with torch.no_grad(): logits = dict(ours=model(ids, None, None), theirs=reference(ids).logits)

    def their_loss(): return F.cross_entropy(reference(ids).logits.flatten(0, 1), labels.flatten())
    ddp.zero_grad_buffer()
    ours = ddp(ids, None, None, labels=labels, loss_mask=torch.ones(4, 200)) / 800
    ours.backward()
    theirs = their_loss()
    theirs.backward()
    gradients = to_hf({n: p.main_grad.clone() for n, p in model.named_parameters()})
    expected = {n: p.grad.clone() for n, p in reference.named_parameters()}

    decay = [[p for p in reference.parameters() if (p.dim() > 1) == many] for many in (True, False)]
    adam = torch.optim.AdamW([dict(params=decay[0], weight_decay=0.1), dict(params=decay[1], weight_decay=0.0)], lr=1e-3, betas=(0.9, 0.95))
    curve, their_curve = [], []
    batches = [dict(tokens=i, labels=l, loss_mask=torch.ones(2, 200)) for i, l in zip(ids.split(2), labels.split(2))]
    for step in range(6):
        curve.append(megatron.update(ddp, optimizer, batches, 1e-3 * (step + 1)))
        for group in adam.param_groups: group["lr"] = 1e-3 * (step + 1)
        adam.zero_grad()
        loss = their_loss(); loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        adam.step()
        their_curve.append((loss.item(), norm.item()))
    moved = to_hf({n: p.detach() for n, p in model.named_parameters()})
    out[kind] = dict(logits=(logits["ours"] - logits["theirs"]).abs().max().item(), highest=logits["theirs"].abs().max().item(),
                     loss=(ours.item(), theirs.item()), gradients=largest(gradients, expected), gradient=max(g.abs().max().item() for g in expected.values()),
                     curve=curve, their_curve=their_curve, weights=largest(moved, {k: v for k, v in reference.state_dict().items() if k in moved}))
print(json.dumps(out))
'''


def run(script: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", script, *words], capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def compared() -> dict:
    done = run(COMPARE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


KINDS = pytest.mark.parametrize("kind", ["smollm", "llama3", "other_scaling", "wide_heads", "llama2", "mistral", "mistral_window", "qwen2", "qwen2_tied"])


@pytest.mark.oracle
@KINDS
def test_logits_are_those_of_transformers(compared, kind):
    assert compared[kind]["highest"] > 1
    assert compared[kind]["logits"] < 1e-5 * compared[kind]["highest"]


@pytest.mark.oracle
@KINDS
def test_loss_and_gradients_are_those_of_transformers(compared, kind):
    ours, theirs = compared[kind]["loss"]
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert compared[kind]["gradient"] > 1e-3
    for name, difference in compared[kind]["gradients"].items():
        assert difference < 1e-5 * max(1, compared[kind]["gradient"]), name


@pytest.mark.oracle
@KINDS
def test_updates_are_those_of_adamw_with_clipping(compared, kind):
    "Two micro-batches here, one batch there; norms without weight decay."
    ours, theirs = compared[kind]["curve"], compared[kind]["their_curve"]
    assert theirs[-1][0] < theirs[0][0] - 0.05 and theirs[0][1] > 1.0
    for (loss, norm, applied), (their_loss, their_norm) in zip(ours, theirs):
        assert applied and loss == pytest.approx(their_loss, rel=2e-5) and norm == pytest.approx(their_norm, rel=2e-4)
    assert max(compared[kind]["weights"].values()) < 2e-4


LOAD_AND_SAVE = '''
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
'''
IMPORT_ALL = '''
import importlib, pkgutil, torch, torch._dynamo, torch.nn.functional    # torch.compile's own import wraps torch.manual_seed
import domain_adapt
places = [torch, torch.Tensor, torch.cuda, torch.nn.functional, torch.nn.Module, torch.optim, torch.distributed]
before = [dict(vars(p)) for p in places]
names = [m.name for m in pkgutil.walk_packages(domain_adapt.__path__, "domain_adapt.")]
for name in names: importlib.import_module(name)
assert "domain_adapt.megatron" in names and "domain_adapt.train" in names
for place, was in zip(places, before):
    changed = [k for k, v in was.items() if not k.startswith("__") and vars(place).get(k) is not v]
    assert not changed, (place, changed)
import megatron.core.optimizer.optimizer as inside
assert inside.torch is torch
'''


@pytest.mark.equality
def test_importing_everything_leaves_torch_alone(tiny_llama, tmp_path):
    for name, script in dict(clean=LOAD_AND_SAVE, after=IMPORT_ALL + LOAD_AND_SAVE).items():
        done = run(script, str(tiny_llama), str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    files = sorted(f.name for f in (tmp_path / "clean").iterdir())
    assert "model.safetensors" in files and files == sorted(f.name for f in (tmp_path / "after").iterdir())
    for f in files: assert (tmp_path / "clean" / f).read_bytes() == (tmp_path / "after" / f).read_bytes(), f


BACKEND = '''
import torch
from domain_adapt import megatron
import megatron.core.optimizer.optimizer as inside, transformers.modeling_utils as outside
megatron.use_cpu_backend()
assert inside.torch is not torch and outside.torch is torch and torch.cuda.current_device is not inside.torch.cuda.current_device
assert torch.zeros(1).type() == "torch.FloatTensor"
there = dict(__name__="megatron.core.somewhere", torch=inside.torch)
exec("kind = torch.zeros(1, device='cuda').type(); moved = torch.ones(2).cuda()", there)
assert there["kind"] == "torch.cuda.FloatTensor" and there["moved"].device.type == "cpu"
try: torch.zeros(1).cuda()
except (AssertionError, RuntimeError): pass
else: raise SystemExit("cuda() answered outside megatron.core")
'''


def test_cpu_backend_reaches_only_megatron_core():
    import torch
    if torch.cuda.is_available(): pytest.skip("this machine has CUDA, where the CPU backend is not used")
    done = run(BACKEND)
    assert done.returncode == 0, done.stderr


REFUSED = '''
import torch
from transformers import LlamaConfig
from domain_adapt import megatron
from domain_adapt.params import Train

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
megatron.initialize()
hf = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
ids = torch.randint(96, (2, 17))
batch = dict(tokens=ids[:, :-1], labels=ids[:, 1:], loss_mask=torch.ones(2, 16))

def state(ddp, optimizer):
    megatron.gather_weights(ddp)
    moments = [v for s in optimizer.chained_optimizers[0].optimizer.state.values() for v in s.values()]
    return [x.clone() for x in (*ddp.parameters(), *optimizer.chained_optimizers[0].get_parameters(), *moments)]

for bf16 in (False, True):
    for split in (False, True):
        train = Train(distributed_optimizer=split)
        model = megatron.build_model(hf, megatron.transformer_config(hf, train, bf16))
        weights = {n: 0.1 * torch.randn(p.shape) for n, p in model.named_parameters()}
        ddp, optimizer = megatron.trainable(model, train, bf16)
        try: megatron.set_weights(ddp, optimizer, list(weights.items())[1:])
        except ValueError as e: assert "1 weights were not given, as embedding" in str(e)
        else: raise SystemExit("a missing weight was not noticed")
        megatron.set_weights(ddp, optimizer, weights.items())
        for name, p in model.named_parameters():
            assert torch.equal(p, weights[name].to(p.dtype))
            if bf16: assert torch.equal(p.main_param.flatten(), weights[name].flatten()), name    # not rounded
        assert megatron.update(ddp, optimizer, [batch], 1e-2)[2]
        before, asked = state(ddp, optimizer), []
        loss, norm, applied = megatron.update(ddp, optimizer, [batch], 1e-2, lambda *x: asked.append(x))
        assert asked == [(loss, norm)] and not applied and norm > 0.01
        spoilt = next(p for n, p in model.named_parameters() if n.endswith("final_layernorm.weight"))
        spoilt.data[0] = float("nan")
        loss, norm, applied = megatron.update(ddp, optimizer, [batch], 1e-2, lambda *_: True)
        assert loss != loss and not applied
        spoilt.data.copy_(before[[n for n, _ in model.named_parameters()].index("decoder.final_layernorm.weight")])
        after = state(ddp, optimizer)
        assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after)), (bf16, split)
        again = megatron.update(ddp, optimizer, [batch], 1e-2)
        assert again[:2] == asked[0] and again[2] and not all(torch.equal(a, b) for a, b in zip(before, state(ddp, optimizer)))
        masked = dict(batch, loss_mask=torch.zeros(2, 16))
        assert megatron.update(ddp, optimizer, [masked], 1e-2)[:2] == (0.0, 0.0) and megatron.mean_loss(ddp, [masked, batch])[1] == 32
'''


@pytest.mark.fault
def test_a_refused_update_changes_nothing():
    done = run(REFUSED)
    assert done.returncode == 0, done.stderr
