"""Training by ours and by transformers' Trainer, each in a process of its own, in turn step by step.

As a program, `trainers.py ours|theirs bf16|fp32 STEPS` makes a step at each line on stdin and answers with a line of JSON: seconds, seconds
of CPU. The last line: mean loss, GB of memory at its peak and before the model."""
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from domain_adapt import megatron, train
from domain_adapt.assets import resolve
from domain_adapt.models import get_model, load_tokenizer, tune_cpu, usable_cores
from domain_adapt.params import Params, load_params
from domain_adapt.runs import ROOT
from domain_adapt.sources.markdown import to_markdown
from domain_adapt.sources.reading import decode

class Step:
    "Waits to be asked for a step, then tells how long it took."
    def begin(self) -> None:
        if not sys.stdin.readline(): sys.exit("whoever asked for steps is gone")
        self.start = time.perf_counter(), time.process_time()

    def end(self) -> None:
        print(json.dumps([time.perf_counter() - self.start[0], time.process_time() - self.start[1]]), file=answers)


def peak() -> float:
    "The most memory, in GB, that this process has held."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def sequences(params: Params, folder: Path, steps: int) -> torch.Tensor:
    "Tokens of real filings [steps · batch, sequence]."
    pages = [decode(f.read_bytes()) for f in sorted(resolve("package:filings-10k").glob("*.html"))]
    tokens = load_tokenizer(folder).backend_tokenizer.encode("\n".join(to_markdown(p).text for p in pages)).ids
    count, length = steps * params.train.global_batch, params.tokens.sequence_length
    return torch.tensor(tokens[:count * length]).view(count, length)


def ours(params: Params, folder: Path, rows: torch.Tensor, bf16: bool) -> float:
    tune_cpu()
    t, device = params.train, megatron.initialize(params.train.layout, params.seed)
    ddp, optimizer, _ = train.load(folder, params, AutoConfig.from_pretrained(folder), rows[:1, :256], bf16, device)
    mask = torch.ones(rows.shape[1]).index_fill_(0, torch.tensor([rows.shape[1] - 1]), 0)    # nothing follows the last token
    step, losses = Step(), []
    for batch in rows.split(t.global_batch):
        step.begin()
        batches = [dict(tokens=r, labels=r.roll(-1, 1), loss_mask=mask.expand(r.shape)) for r in batch.split(t.micro_batch)]
        losses.append(megatron.update(ddp, optimizer, batches, t.lr)[0])
        step.end()
    return sum(losses) / len(losses)


class Told(TrainerCallback):
    def __init__(self): self.step = Step()
    def on_step_begin(self, *args, **kwargs): self.step.begin()
    def on_step_end(self, *args, **kwargs): self.step.end()


def theirs(params: Params, folder: Path, rows: torch.Tensor, bf16: bool) -> float:
    t, model = params.train, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = [dict(input_ids=r, labels=r) for r in rows]
    with tempfile.TemporaryDirectory() as out:
        options = TrainingArguments(
            out, use_cpu=True, bf16=bf16, optim="adamw_torch_fused", per_device_train_batch_size=t.micro_batch,
            gradient_accumulation_steps=t.global_batch // t.micro_batch, max_steps=len(rows) // t.global_batch, learning_rate=t.lr,
            lr_scheduler_type="constant", weight_decay=t.weight_decay, adam_beta2=0.95, max_grad_norm=t.clip_grad,
            train_sampling_strategy="sequential", save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
        return Trainer(model, options, train_dataset=data, callbacks=[Told()]).train().training_loss


def training(folder: Path, small: bool, precision: str) -> dict:
    "The quickstart's steps on real filings: same weights, batches, threads and AdamW; the first step is not counted."
    steps = 1 if small else 6
    env = dict(os.environ, OMP_NUM_THREADS=str(usable_cores()), MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1",
               GLOO_SOCKET_IFNAME="lo")
    start = lambda who: subprocess.Popen([sys.executable, "-W", "ignore", __file__, who, precision, str(steps + 1)], env=env, text=True,
                                         bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    def answer(arm, line: str) -> list[float]:
        arm.stdin.write(line)
        return json.loads(arm.stdout.readline())
    arms = [start("ours"), start("theirs")]
    took = [[answer(arm, "\n")[0] for arm in arms[::-1 if i % 2 else 1]][::-1 if i % 2 else 1] for i in range(steps + 1)][1:]
    (loss, peak, before), (their_loss, their_peak, their_before) = [answer(arm, "") for arm in arms]
    assert abs(loss / their_loss - 1) < 0.01, (loss, their_loss)
    ours, theirs = map(statistics.median, zip(*took))
    params = load_params(ROOT / "params" / "quickstart.yaml")
    return dict(ours=ours, theirs=theirs, rounds=steps, amount=params.train.global_batch * params.tokens.sequence_length,
                note=f"peak memory {peak:.1f} GB and {their_peak:.1f}, {before:.1f} and {their_before:.1f} of it before the model; "
                     f"mean loss {loss:.3f}, {their_loss:.3f}")


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", buffering=1)    # whatever else prints goes to stderr
    os.dup2(2, 1)
    who, precision, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    params, folder = load_params(ROOT / "params" / "quickstart.yaml"), get_model("smollm2-135m-instruct")
    rows, before = sequences(params, folder, steps), peak()
    loss = {"ours": ours, "theirs": theirs}[who](params, folder, rows, precision == "bf16")
    print(json.dumps([loss, peak(), before]), file=answers)
