"""Short trainings of a tiny random Llama that save and load checkpoints, for test_checkpoints.py.

[torchrun ...] tests/checkpointing.py FILE runs the list of cases in a JSON file, which are arguments of `trained`, and writes what each
gives beside it, as FILE.<n>.<rank>."""
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

warnings.simplefilter("ignore")
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from transformers import LlamaConfig

from domain_adapt import megatron
from domain_adapt.checkpoints import Checkpoints
from domain_adapt.params import Save, Train
from parity import drawn, global_name, part, whole_shape

ps = megatron.parallel_state
HF = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                 tie_word_embeddings=True)


def start(train: Train) -> None:
    "Join the others, or be alone; take a place in the layout."
    if not torch.distributed.is_initialized():
        alone = dict(store=torch.distributed.HashStore(), rank=0, world_size=1)
        torch.distributed.init_process_group("gloo", **{} if "RANK" in os.environ else alone)
    ps.destroy_model_parallel()
    megatron.initialize(train.layout)


def model(train: Train, bf16: bool, drawn_from: str = "", bucket: int | None = None) -> tuple:
    "Model and optimizer, the weights drawn by name and `drawn_from`; gradients in buckets of at least so many."
    megatron.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=bucket)
    made = megatron.build_model(HF, megatron.transformer_config(HF, train, bf16))
    ddp, optimizer = megatron.trainable(made, train, bf16)
    megatron.set_weights(ddp, optimizer, [(n, part(n, p, drawn(drawn_from + global_name(n, made), whole_shape(p)))) for n, p in made.named_parameters()])
    return ddp, optimizer


def batches(step: int) -> list[dict]:
    "This process's micro-batches of one sequence, of a global batch of four."
    ids = torch.randint(96, (4, 17), generator=torch.Generator().manual_seed(step))
    mine = ids.chunk(ps.get_data_parallel_world_size())[ps.get_data_parallel_rank()]
    return [dict(tokens=row[:, :-1], labels=row[:, 1:], loss_mask=torch.ones(1, 16)) for row in mine.split(1)]


def weights(ddp, optimizer) -> dict:
    "What this process keeps of the fp32 weights, and its bf16 or fp32 weights."
    megatron.gather_weights(ddp)
    found = {}
    for name, p in megatron.inner(ddp).named_parameters():
        found[name], found[f"{name} master"] = p.detach().clone(), megatron._master(p, optimizer)[0]
    return {k: v.clone() for k, v in found.items() if v is not None}


def trained(folder: str, until: int, train: dict = {}, bf16: bool = False, save: list[int] = (), take: str | None = None,
            again: str | None = None, bucket: int | None = None) -> dict:
    """Train to step `until`, saving below `folder` after the steps in `save`; from the checkpoint found below `take` where that is given,
    which is saved `again` elsewhere before anything else."""
    settings = Train(steps=100, lr=1e-2, **train)
    start(settings)
    ddp, optimizer = model(settings, bf16, "other " if take else "", bucket)
    checkpoints = Checkpoints(Path(folder), Save(), set())
    step, out = 0, dict(losses=[], norms=[], events=[])
    if take:
        old = Checkpoints(Path(take), Save(), set())
        at, out["refused"] = old.find()
        for group in optimizer.param_groups: group["weight_decay"] = 0.1 * group["wd_mult"]
        step, out["extra"] = old.load(at, ddp, optimizer)
        out["lr"] = [g["lr"] for g in optimizer.param_groups]
    if again:
        other = Checkpoints(Path(again), Save(), set())
        other.save(ddp, optimizer, step, out["extra"])
        other.finish()
    while step < until:
        step += 1
        loss, norm, _ = megatron.update(ddp, optimizer, batches(step), 1e-2 / step)
        out["losses"].append(loss); out["norms"].append(norm)
        if step in save: checkpoints.save(ddp, optimizer, step, {"step_was": step, "losses": out["losses"][:]})
        out["events"] += checkpoints.poll()
    out["events"] += checkpoints.finish()
    out["optimizer"], out["buckets"] = type(optimizer.chained_optimizers[0]).__name__, len(ddp.buffers[0].buckets)
    return out | dict(weights=weights(ddp, optimizer))


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    for i, case in enumerate(cases):
        found = trained(**case)
        torch.save(found, f"{sys.argv[1]}.{i}.{torch.distributed.get_rank()}")
    torch.distributed.destroy_process_group()
