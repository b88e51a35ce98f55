"""A stand-in for `domain_adapt.train.work` that needs no model: every step sums 1 over all processes and adds it up.

It keeps the trainer's promises: a checkpoint every five steps, metrics.jsonl, stopped.json and code 75 after SIGTERM or USR1,
error.json when it fails, and it goes on from its checkpoint. A file `die-<rank>-<step>` in `out` kills that rank at that step
once; a file `fail` makes it raise what it holds; with a file `deaf` it does not listen to signals."""
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path


def work(job: str) -> None:
    out = Path(json.loads(Path(job).read_text())["out"])
    try: _work(out, json.loads(Path(job).read_text())["params"]["train"]["steps"])
    except Exception as e:
        try: f = open(out / "error.json", "x")
        except FileExistsError: raise e
        with f: json.dump(dict(kind=type(e).__name__, message=str(e), traceback=""), f)
        raise


def save(path: Path, what: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(what))
    os.replace(path.with_suffix(".part"), path)


class UserError(Exception): pass


def _work(out: Path, steps: int) -> None:
    stop = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN if (out / "deaf").exists() else lambda n, _: stop.append(n))
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent: return
    import torch
    import torch.distributed as dist
    dist.init_process_group("gloo")
    rank, latest = dist.get_rank(), out / "checkpoints" / "latest.json"
    if (out / "fail").exists(): raise UserError((out / "fail").read_text())
    state = json.loads(latest.read_text()) if latest.exists() else dict(step=0, total=0)
    while state["step"] < steps:
        step = state["step"] + 1
        if (die := out / f"die-{rank}-{step}").exists():
            die.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        both = torch.tensor([float(step), float(bool(stop))])
        dist.all_reduce(both)
        state = dict(step=step, total=state["total"] + both[0].item())
        if rank == 0:
            with (out / "metrics.jsonl").open("a") as f: f.write(json.dumps({"step": step, "pids": os.getpid()}) + "\n")
            if step % 5 == 0 or both[1]: save(latest, state)
        if both[1]:
            if rank == 0: save(out / "stopped.json", dict(step=step, signal=stop and stop[0]))
            dist.barrier()
            sys.exit(75)
        time.sleep(0.1)
    if rank == 0: save(out / "result.json", state | {"world": dist.get_world_size()})
    dist.destroy_process_group()
