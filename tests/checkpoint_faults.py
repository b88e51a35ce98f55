"""What befalls a training that saves: kills, full disks. Each fault happens to a process forked from this one, which has imported all.

python tests/checkpoint_faults.py FOLDER prints one JSON object: what each scenario found."""
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import torch

from checkpointing import batches, model, start, weights
from domain_adapt import checkpoints, megatron
from domain_adapt.params import Save, Train, UserError
from domain_adapt.checkpoints import Checkpoints, damage, listed, steps

LAST = 45
SETTINGS = Train(steps=100, lr=1e-2)


def fork(work, *words) -> int:
    "A process that does `work(*words)`; its code is 0 where that went well."
    if pid := os.fork(): return pid
    try: work(*words)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int: return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def begun(folder: Path, **save) -> tuple:
    "A model with other weights than training starts from, until it is loaded."
    start(SETTINGS)
    return *model(SETTINGS, True, "other "), Checkpoints(folder, Save(**save), set())


def digest(ddp, optimizer) -> str:
    "Of weights, masters and moments."
    found = hashlib.sha256()
    part, = optimizer.chained_optimizers
    for tensor in [*weights(ddp, optimizer).values(), *(v for s in part.optimizer.state.values() for v in s.values())]:
        found.update(tensor.float().numpy().tobytes())
    return found.hexdigest()


def learn(ddp, optimizer, step: int) -> None: megatron.update(ddp, optimizer, batches(step), 1e-2 / step)


def first(folder: Path) -> None:
    "The checkpoint that everything starts from, step 0, and what every step must be."
    start(SETTINGS)
    ddp, optimizer = model(SETTINGS, True)
    kept = Checkpoints(folder, Save(), set())
    kept.save(ddp, optimizer, 0, {})
    kept.finish()
    right = [digest(ddp, optimizer)]
    for step in range(1, LAST + 1):
        learn(ddp, optimizer, step)
        right.append(digest(ddp, optimizer))
    (folder / "right.json").write_text(json.dumps(right))


def resumed(folder: Path, **save) -> tuple:
    "Go on from what is found, which must be what that step was."
    ddp, optimizer, kept = begun(folder, **save)
    at, refused = kept.find()
    assert not refused, refused
    step, _ = kept.load(at, ddp, optimizer)
    assert digest(ddp, optimizer) == json.loads((folder / "right.json").read_text())[step], step
    return ddp, optimizer, kept, step


def attempt(folder: Path, told: int) -> None:
    "Train to the end, saving after each step."
    ddp, optimizer, kept, step = resumed(folder)
    os.write(told, b"x")
    for step in range(step + 1, LAST + 1):
        learn(ddp, optimizer, step)
        kept.save(ddp, optimizer, step, {})
        assert not kept.poll()
    kept.finish()
    assert digest(ddp, optimizer) == json.loads((folder / "right.json").read_text())[-1]


def all_whole(folder: Path) -> bool:
    "Whether every folder that has a checkpoint's name is one."
    return all(not damage(folder / f"step_{s}" / name, file) for s in steps(folder) for name, file in listed(folder / f"step_{s}").items())


def killed_at_random(folder: Path) -> dict:
    drawn, kills, reached = random.Random(0), 0, []
    while True:
        read, write = os.pipe()
        pid = fork(attempt, folder, write)
        os.close(write)
        started = os.read(read, 1)    # loaded; or ended
        os.close(read)
        if kills < 14 and started:
            at, end = steps(folder)[0], time.monotonic() + drawn.uniform(0, 0.6)
            while time.monotonic() < end and steps(folder)[0] < at + 2: time.sleep(0.001)    # not all on a fast machine
            children = psutil.Process(pid).children(recursive=True)
            os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        if code != -signal.SIGKILL: return dict(kills=kills, code=code, whole=all_whole(folder), steps=steps(folder), reached=reached)
        kills += 1
        psutil.wait_procs(children, timeout=5)
        assert not any(c.is_running() and c.status() != "zombie" for c in children)
        assert all_whole(folder)
        reached.append(steps(folder)[0])


def one_save(folder: Path, kill_at: int, told: int) -> None:
    "Go on by a step and save, as the `kill_at`-th time that the files below `folder` change is about to come."
    ddp, optimizer, kept, step = resumed(folder, keep=1)
    me, count = os.getpid(), [0]
    def watch(name: str, words: tuple) -> None:
        changes = name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir") or name == "open" and "w" in str(words[1])
        if not changes or os.getpid() != me or str(folder) not in str(words[0]) and name not in ("os.remove", "os.rmdir"): return
        count[0] += 1
        if count[0] == kill_at: os.kill(me, signal.SIGKILL)
    sys.addaudithook(watch)
    learn(ddp, optimizer, step + 1)
    kept.save(ddp, optimizer, step + 1, {})
    kept.finish()
    os.write(told, bytes([count[0]]))
    os._exit(0)    # what Python tidies up on its way out is not of the save


def killed_at_each_change(folder: Path) -> dict:
    "Kill before the first change of a file, the second, ... as long as there is one."
    for kill_at in range(1, 100):
        read, write = os.pipe()
        code = ended(fork(one_save, folder, kill_at, write))
        os.close(write)
        changes = os.read(read, 1)
        os.close(read)
        if changes: return dict(kills=kill_at - 1, changes=changes[0], code=code, whole=all_whole(folder))
        assert code == -signal.SIGKILL and all_whole(folder), (kill_at, code)


def moment(folder: Path) -> None:
    "What is saved is what was there when `save` was called, whatever comes after."
    ddp, optimizer, kept, step = resumed(folder)
    learn(ddp, optimizer, step + 1)
    before = digest(ddp, optimizer)
    kept.save(ddp, optimizer, step + 1, {"a": [1]})
    part, = optimizer.chained_optimizers
    with torch.no_grad():
        for p in megatron.inner(ddp).parameters():
            for tensor in (p, p.main_param, *part.optimizer.state[p.main_param].values()): tensor.fill_(7)
    assert digest(ddp, optimizer) != before and kept.finish() == []
    assert kept.load(kept.newest(), ddp, optimizer) == (step + 1, {"a": [1]}) and digest(ddp, optimizer) == before


def slow(work): return lambda *words: time.sleep(3) or work(*words)


def fails(kept: Checkpoints) -> str:
    try: kept.finish()
    except UserError as e: return str(e)
    raise AssertionError("it did not fail")


def after_failure(folder: Path, ddp, optimizer, kept: Checkpoints, step: int) -> None:
    "The checkpoint before stands, nothing is left, and the next save is a save."
    assert kept.newest() == folder / f"step_{step}" and not list(folder.glob(".*")) and kept.find() == (folder / f"step_{step}", [])
    kept.save(ddp, optimizer, step + 1, {})
    told, = kept.finish()
    assert (told["step"], told["what"], told["action"]) == (step + 1, "save failed", "the checkpoint before it stands") and told["value"]
    assert kept.newest() == folder / f"step_{step + 1}" and all_whole(folder)


def writer_killed(folder: Path) -> None:
    ddp, optimizer, kept, step = resumed(folder)
    right, checkpoints.described = checkpoints.described, slow(checkpoints.described)
    kept.save(ddp, optimizer, step + 1, {})
    checkpoints.described = right
    writer, = psutil.Process().children()
    writer.terminate()
    assert kept.poll() == [] and writer.is_running()    # only a kill ends it
    writer.kill()
    assert "killed" in fails(kept)
    after_failure(folder, ddp, optimizer, kept, step)


def orphan(folder: Path, told: int) -> None:
    ddp, optimizer, kept, step = resumed(folder)
    checkpoints.described = slow(checkpoints.described)
    kept.save(ddp, optimizer, step + 1, {})
    os.write(told, b"x")
    time.sleep(60)


def writer_orphaned(folder: Path) -> None:
    read, write = os.pipe()
    pid = fork(orphan, folder, write)
    os.read(read, 1)
    writer, = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    gone, alive = psutil.wait_procs([writer], timeout=2)
    assert not [w for w in alive if w.status() != "zombie"] and list(folder.glob(".step_*.part"))
    *_, kept, step = resumed(folder)
    assert not list(folder.glob(".*"))


def files_limited(folder: Path) -> None:
    "A file cannot grow: as on a full disk, the writing process fails."
    ddp, optimizer, kept, step = resumed(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    kept.save(ddp, optimizer, step + 1, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "File too large" in fails(kept)
    after_failure(folder, ddp, optimizer, kept, step)


def disk_full(folder: Path) -> None:
    "`folder` is on a disk of 4 MB. It fills up before the save, then while it is written."
    ddp, optimizer, kept, step = resumed(folder)
    for left in (0, 2**17, 2**19):
        with (folder / "filler").open("wb", buffering=0) as f:
            try:
                while True: f.write(bytes(4096))
            except OSError: f.truncate(max(0, f.tell() - left))
        kept.save(ddp, optimizer, step + 1, {})
        assert "No space left" in fails(kept), left
        (folder / "filler").unlink()
        after_failure(folder, ddp, optimizer, kept, step)
        step += 1


def retention(folder: Path) -> None:
    ddp, optimizer, kept, _ = resumed(folder)
    kept = Checkpoints(folder, Save(keep=2, keep_every=4), {3, 8})
    for step in range(1, 11):
        kept.save(ddp, optimizer, step, {})
        kept.finish()
    assert steps(folder) == [10, 9, 8, 4, 3, 0] and kept.newest() == folder / "step_10"
    kept.save(ddp, optimizer, 6, {"again": 1})    # rolled back: those after it are left alone, and it stays
    kept.finish()
    assert steps(folder) == [10, 9, 8, 6, 4, 3, 0] and kept.newest() == kept.find()[0] == folder / "step_6"
    kept.save(ddp, optimizer, 9, {"again": 2})
    kept.finish()
    assert kept.load(folder / "step_9", ddp, optimizer) == (9, {"again": 2}) and steps(folder) == [10, 9, 8, 4, 3, 0]


def refused_on_both(folder: Path) -> None:
    "Two processes read a share of the files each, and both refuse what one of them finds."
    ddp, optimizer, kept, _ = resumed(folder)
    kept.save(ddp, optimizer, 1, {})
    kept.finish()
    torch.distributed.destroy_process_group()
    file = folder / "step_1" / "common.pt"
    file.write_bytes(file.read_bytes()[:-1])
    said = f"common.pt has {file.stat().st_size} bytes, not {file.stat().st_size + 1}"
    def one(rank: int) -> None:
        store = torch.distributed.FileStore(str(folder / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        kept = Checkpoints(folder, Save(), set())
        assert kept.find() == (folder / "step_0", [("step_1", said)]) and kept.newest() == folder / "step_0"
    assert [ended(p) for p in [fork(one, 0), fork(one, 1)]] == [0, 0]


def other_precision(folder: Path) -> None:
    start(SETTINGS)
    kept = Checkpoints(folder, Save(), set())
    try: kept.load(kept.find()[0], *model(SETTINGS, False))
    except UserError as e: assert "step_0 was trained in bf16, and this is fp32; set train.precision: bf16" in str(e)
    else: raise AssertionError


if __name__ == "__main__":
    at, found = Path(sys.argv[1]), {}
    assert ended(fork(first, at / "first")) == 0
    for work in (killed_at_random, killed_at_each_change):
        shutil.copytree(at / "first", at / work.__name__)
        found[work.__name__] = work(at / work.__name__)
    for work in (moment, writer_killed, writer_orphaned, files_limited, retention, refused_on_both, other_precision, *[disk_full] * (len(sys.argv) > 2)):
        folder = at / work.__name__ if work is not disk_full else Path(sys.argv[2]) / "checkpoints"
        shutil.copytree(at / "first", folder)
        found[work.__name__] = ended(fork(work, folder))
    print(json.dumps(found))
