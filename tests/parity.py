"""Five updates of a small random Llama under several layouts, run by torchrun: one file of results for each case.

torchrun ... tests/parity.py FOLDER CASE [CASE ...]. FOLDER holds the tokens; `whole.pt` in it has the end weights of one process,
which each case compares its own with."""
import functools
import json
import math
import sys
import warnings
import zlib
from pathlib import Path

warnings.simplefilter("ignore")
import pandas as pd
import torch
from transformers import LlamaConfig

from domain_adapt import batches, megatron
from domain_adapt.params import Params, validate

LAYOUTS = {
    "one": {}, "recompute": dict(recompute=True),
    "tp2": dict(processes=2, layout=dict(tp=2)), "tp2_sp": dict(processes=2, layout=dict(tp=2, sp=True)),
    "pp2": dict(processes=2, layout=dict(pp=2)), "cp2": dict(processes=2, layout=dict(cp=2)), "dp2": dict(processes=2),
    "dp2_distributed": dict(processes=2, distributed_optimizer=True),
    "tp4": dict(processes=4, layout=dict(tp=4)), "tp2_dp2_sp": dict(processes=4, layout=dict(tp=2, sp=True)), "tp2_pp2": dict(processes=4, layout=dict(tp=2, pp=2)),
    "pp2_dp2_distributed": dict(processes=4, distributed_optimizer=True, layout=dict(pp=2)),
    "tp2_cp2_sp_recompute": dict(processes=4, recompute=True, layout=dict(tp=2, cp=2, sp=True))}
STEPS, SKIPPED = 5, 3
RATE = {False: 1e-4, True: 1.5e-5}    # bf16 at the case study's: AdamW turns roundings of small gradients into whole steps
# Gradients and weights are sent in pieces, as those of a large model are.
megatron.DistributedDataParallelConfig = functools.partial(megatron.DistributedDataParallelConfig, bucket_size=20_000)
BLEND = pd.DataFrame([("sec", 0.75), ("wiki", 0.25)], columns=["corpus", "asked"])


def case_of(name: str) -> tuple[str, bool, str, bool]:
    "A case is LAYOUT[-bf16][-mask_loss|-separate][-untied]: layout, bf16, end of document, tied embeddings."
    layout, *more = name.split("-")
    end = next((m for m in more if m in ("mask_loss", "separate")), "attend")
    return layout, "bf16" in more, end, "untied" not in more


def params_of(name: str) -> Params:
    layout, _, end, _ = case_of(name)
    corpus = dict(source="general", path="x")
    train = dict(steps=STEPS, warmup=1, global_batch=8, micro_batch=2, lr=1e-4, end_of_document=end, validation=dict(tokens=5 * 64))
    return validate(dict(run="x", model="x", corpora=dict(sec=corpus | dict(kind="domain"), wiki=corpus | dict(kind="general")),
                         merge=dict(candidates=[dict(name="half", method="linear", weight=0.5)]),
                         tokens=dict(sequence_length=64), train=train | LAYOUTS[layout]))


def llama(tied: bool) -> LlamaConfig:
    return LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
                       num_key_value_heads=2, tie_word_embeddings=tied)


def global_name(name: str, model) -> str:
    "The name in a model of one process."
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights: return "embedding.word_embeddings.weight"
    at = name.split(".")
    if at[:2] == ["decoder", "layers"]: at[2] = str(model.decoder.layers[int(at[2])].layer_number - 1)
    return ".".join(at)


def drawn(name: str, shape: list[int]) -> torch.Tensor:
    "A random weight that depends on its name only; norms are near one."
    values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return 1 + 0.1 * values if len(shape) == 1 else 0.05 * values


def part(name: str, param, whole: torch.Tensor) -> torch.Tensor:
    "What this tensor-parallel process has of a whole weight; fc1 is gate then up, each split."
    tp, rank = megatron.parallel_state.get_tensor_model_parallel_world_size(), megatron.parallel_state.get_tensor_model_parallel_rank()
    if tp == 1 or not getattr(param, "tensor_model_parallel", False): return whole
    cut = lambda x: x.chunk(tp, param.partition_dim)[rank]
    return torch.cat([cut(x) for x in whole.chunk(2)]) if "linear_fc1" in name else cut(whole)


def whole_shape(param) -> list[int]:
    shape = list(param.shape)
    if getattr(param, "tensor_model_parallel", False): shape[param.partition_dim] *= megatron.parallel_state.get_tensor_model_parallel_world_size()
    return shape


def end_weights(ddp, optimizer) -> dict:
    "This process's fp32 weights that training moved: whole ones, or the flat part that it keeps."
    megatron.gather_weights(ddp)
    out = {}
    for name, param in megatron.inner(ddp).named_parameters():
        master, at = megatron._master(param, optimizer)
        out[name] = (param.detach().flatten(), slice(None)) if master is None and not getattr(param, "main_param_sharded", False) \
            else (None, at) if master is None else (master.detach().flatten(), at)
    return out


def run(name: str, folder: Path) -> dict:
    _, bf16, _, tied = case_of(name)
    params = params_of(name)
    device = megatron.initialize(params.train.layout)
    hf = llama(tied)
    data = batches.training_data(folder, BLEND, batches.Vocabulary(512, 0), params, folder / "index")
    held = batches.heldout_data(folder, batches.Vocabulary(512, 0), params, folder / "index")
    model = megatron.build_model(hf, megatron.transformer_config(hf, params.train, bf16))
    ddp, optimizer = megatron.trainable(model, params.train, bf16)
    if params.train.distributed_optimizer: assert len(ddp.bucket_groups) > 1 or not model.pre_process
    first = {n: part(n, p, drawn(global_name(n, model), whole_shape(p))) for n, p in model.named_parameters()}
    megatron.set_weights(ddp, optimizer, first.items())
    measure = lambda: [megatron.mean_loss(ddp, batches.heldout_batches(data, params, device)) for data in held.values()]
    out = dict(loss=[], norm=[], applied=[], heldout=[measure()])
    for step in range(1, STEPS + 2):    # the third is refused at first, then taken
        at = step - (step > SKIPPED)
        loss, norm, applied = megatron.update(ddp, optimizer, batches.step_batches(data, at, params, device), RATE[bf16],
                                              lambda *_: step != SKIPPED)
        for key, value in dict(loss=loss, norm=norm, applied=applied).items(): out[key].append(value)
    out["heldout"].append(measure())
    moved = end_weights(ddp, optimizer)
    reference = folder / ("-".join(["whole", *name.split("-")[1:]]) + ".pt")
    if name.split("-")[0] == "one": torch.save({n: v.view(p.shape) for (n, (v, _)), p in zip(moved.items(), model.parameters())}, reference)
    wholes, furthest, furthest_moved = torch.load(reference), 0.0, 0.0
    for n, p in model.named_parameters():
        value, at = moved[n]
        if value is None: continue
        expected = part(n, p, wholes[global_name(n, model)]).flatten()[at]
        furthest = max(furthest, (value - expected).abs().max().item())
        furthest_moved = max(furthest_moved, (value - first[n].flatten()[at]).abs().max().item())
    found = torch.tensor([furthest, furthest_moved])
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    same = [torch.zeros(2 * STEPS + 2, dtype=torch.double) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(same, torch.tensor(out["loss"] + out["norm"], dtype=torch.double))
    assert all(torch.equal(s, same[0]) for s in same) and math.isfinite(found.sum())
    megatron.parallel_state.destroy_model_parallel()
    return out | dict(weights=found[0].item(), moved=found[1].item(), parameters=sum(p.numel() for p in model.parameters()),
                      optimizer=type(optimizer.chained_optimizers[0]).__name__)


if __name__ == "__main__":
    torch.manual_seed(0)
    for case in sys.argv[2:]:
        found = run(case, Path(sys.argv[1]))
        if torch.distributed.get_rank() == 0: (Path(sys.argv[1]) / f"{case}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
