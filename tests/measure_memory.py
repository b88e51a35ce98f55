"Peak memory of two updates of SmolLM2-135M on random tokens, over what imports take: prints bytes. Run by test_plan."
import os
import sys
import warnings

warnings.simplefilter("ignore")
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
import torch
from transformers import AutoConfig

from domain_adapt import megatron
from domain_adapt.params import Train
from domain_adapt.plan import published


def resident(field: str) -> int:
    "VmRSS (now) or VmHWM (the most so far) of this process, in bytes."
    with open("/proc/self/status") as f: return next(int(l.split()[1]) * 1024 for l in f if l.startswith(field))


precision, recompute = sys.argv[1], sys.argv[2] == "recompute"
train = Train(global_batch=4, micro_batch=4, precision=precision, recompute=recompute)
hf, length = AutoConfig.for_model(**published()["smollm2-135m-instruct"], rms_norm_eps=1e-5), 512
megatron.initialize(train.layout)
before = resident("VmRSS")
model = megatron.build_model(hf, megatron.transformer_config(hf, train, precision == "bf16"))
with torch.no_grad():
    for p in model.parameters(): p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1)
ddp, optimizer = megatron.trainable(model, train, precision == "bf16")
del model
for _ in range(2):    # the optimizer's moments are made at the end of the first
    ids = torch.randint(hf.vocab_size, (train.micro_batch, length + 1))
    batch = dict(tokens=ids[:, :-1], labels=ids[:, 1:], loss_mask=torch.ones(train.micro_batch, length), documents=None)
    megatron.update(ddp, optimizer, [batch], 1e-5, lambda loss, norm: True)
print(resident("VmHWM") - before)
