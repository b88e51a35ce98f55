"Parameters of the real GPTModel on every process of pipelines, on the meta device: prints JSON. Run by test_plan."
import json
import sys
import warnings

warnings.simplefilter("ignore")
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from domain_adapt import megatron
from domain_adapt.params import Layout, Train
from domain_adapt.plan import configuration
from megatron.core import parallel_state

WORLD = 128


def hf_config(name: str):
    config = configuration(name)
    return AutoConfig.for_model(**config, rms_norm_eps=1e-5)


def count(hf, tp: int, pp: int, rank: int) -> int:
    "Parameters of the model that process `rank` of 128 builds."
    torch.distributed.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
    parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
    train = Train(layout=Layout(tp=tp, pp=pp))
    with torch.device("meta"): model = megatron.build_model(hf, megatron.transformer_config(hf, train, True))
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return sum(p.numel() for p in model.parameters())


megatron.use_cpu_backend()
found = {}
for name, tp, pp in json.loads(sys.argv[1]):
    hf, share = hf_config(name), WORLD // pp
    # all processes of a stage hold as much: the first and the last of each are asked
    found[f"{name} {tp} {pp}"] = [[count(hf, tp, pp, s * share), count(hf, tp, pp, (s + 1) * share - 1)] for s in range(pp)]
print(json.dumps(found))
