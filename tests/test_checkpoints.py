"Checkpoints: the bits come back, in any layout; nothing damaged is loaded; no kill and no full disk costs more than one save."
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
ENV = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}


def run(script: str, *words, processes: int = 1, timeout: int = 240) -> str:
    command = [sys.executable, "-W", "ignore"]
    if processes > 1: command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*command, str(ROOT / "tests" / script), *map(str, words)], cwd=ROOT, env=os.environ | ENV, text=True,
                          capture_output=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def trained(at: Path, cases: list[dict], processes: int = 1) -> list[list[dict]]:
    "What each case gave on each process; see tests/checkpointing.py."
    file = at / f"cases_{len(list(at.glob('cases_*.json')))}.json"
    file.write_text(json.dumps(cases))
    run("checkpointing.py", file, processes=processes)
    return [[torch.load(f"{file}.{i}.{rank}") for rank in range(processes)] for i in range(len(cases))]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    "Every tensor of a checkpoint, whole, read by torch alone."
    import torch.distributed.checkpoint as dcp
    reader = dcp.FileSystemReader(str(checkpoint))
    held = reader.read_metadata().state_dict_metadata
    found = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in held.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")    # that there is no process group
        dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def same(a: dict, b: dict) -> bool: return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


SPLIT = dict(distributed_optimizer=True)
KINDS = {"fp32": (1, False, {}), "bf16": (1, True, {}), "bf16_two": (2, True, {}), "bf16_split": (2, True, SPLIT), "fp32_split": (2, False, SPLIT)}
CHAIN = {"one": {}, "tp2": dict(layout=dict(tp=2, sp=True)), "pp2": dict(layout=dict(pp=2)), "dp2": SPLIT, "dp2_again": SPLIT, "tp2_again": dict(layout=dict(tp=2)), "back": {}}
LAST = 2 * len(CHAIN) - 2


BUCKETS = {"dp2": 3000, "dp2_again": 10**9}    # the distributed optimizer's buffers in several buckets, each padded; then in one


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, list[dict]]]:
    """Where trainings wrote, and what each gave on each process. For each kind: whole, its first half, its second half. For each
    precision a chain: every layout takes the checkpoint of the layout before, saves it again at once, and goes on for two steps."""
    at, cases, before = tmp_path_factory.mktemp("checkpoints"), {}, "one"
    def case(name: str, processes: int, until: int, take: str | None = None, **more):
        take = take and str(at / take)
        cases[name] = processes, dict(folder=str(at / name), until=until, take=take, **more)
    for kind, (n, bf16, train) in KINDS.items():
        case(f"{kind} whole", n, 6, bf16=bf16, train=train)
        case(f"{kind} first", n, 3, save=[3], bf16=bf16, train=train)
        case(f"{kind} second", n, 6, f"{kind} first", bf16=bf16, train=train)
    for bf16 in (False, True):
        case(f"alone {bf16}", 1, LAST, bf16=bf16)
        for i, (name, train) in enumerate(CHAIN.items()):
            taken = dict(take=f"{before} {bf16}", again=str(at / f"{name} {bf16} resaved")) if i else {}
            case(f"{name} {bf16}", 1 if name in ("one", "back") else 2, min(LAST, 2 + 2 * i), save=[2 + 2 * i], bf16=bf16, train=train,
                 bucket=BUCKETS.get(name), **taken)
            before = name
    phases = [[n for n, (p, _) in cases.items() if p == 1 and not n.startswith("back")], [n for n, (p, _) in cases.items() if p == 2],
              [n for n in cases if n.startswith("back")]]
    found = {}
    for processes, names in zip((1, 2, 1), phases): found |= dict(zip(names, trained(at, [cases[n][1] for n in names], processes)))
    return at, found


@pytest.mark.equality
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_resumed_is_bit_identical(runs, kind):
    for a, b, c in zip(*(runs[1][f"{kind} {part}"] for part in ("whole", "first", "second"))):
        assert len(a["losses"]) == 6 and a["losses"] == b["losses"] + c["losses"] and a["norms"] == b["norms"] + c["norms"]
        assert same(a["weights"], c["weights"]) and not same(b["weights"], c["weights"])
        assert c["extra"] == {"step_was": 3, "losses": b["losses"]} and c["refused"] == [] == a["events"] + b["events"] + c["events"]
        assert a["optimizer"] == ("DistributedOptimizer" if "split" in kind else "FP32Optimizer" if kind == "fp32" else "Float16OptimizerWithFloat16Params")


@pytest.mark.parity
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-5), (True, 1e-3)])
def test_resumed_in_other_layouts_the_bits_are_the_same_and_so_is_the_loss(runs, bf16, tolerance):
    "One process, TP2 with SP, PP2, DP2 with the distributed optimizer (twice), TP2, and one process again."
    at, found = runs
    losses = [x for name in CHAIN for x in found[f"{name} {bf16}"][0]["losses"]]
    assert losses == pytest.approx(found[f"alone {bf16}"][0]["losses"], rel=tolerance) and len(losses) == LAST
    assert found[f"dp2 {bf16}"][0]["buckets"] > 5 and found[f"dp2_again {bf16}"][0]["buckets"] == 1
    for i, (before, name) in enumerate(zip(CHAIN, list(CHAIN)[1:])):
        step = f"step_{2 + 2 * i}"
        first, second = tensors(at / f"{before} {bf16}" / step), tensors(at / f"{name} {bf16} resaved" / step)
        assert same(first, second) and len(first) == 26 * (4 if bf16 else 3), name


@pytest.mark.equality
def test_names_and_shapes_do_not_depend_on_the_layout(runs):
    "What an export reads: fc1 whole, gate then up; layers by global number; masters only where training is in bf16."
    everywhere = [tensors(runs[0] / f"{name} True" / f"step_{2 + 2 * i}") for i, name in enumerate(list(CHAIN)[:-1])]
    for held in everywhere:
        assert {k: v.shape for k, v in held.items()} == {k: v.shape for k, v in everywhere[0].items()}
        assert held["decoder.layers.3.mlp.linear_fc1.weight"].shape == (96, 32) and held["embedding.word_embeddings.weight"].shape == (96, 32)
        assert {k.removeprefix("optimizer.state.fp32_param.") for k in held if "fp32_param" in k} == {k for k in held if not k.startswith("optimizer")}
        for k, v in held.items():
            assert v.dtype == (torch.float32 if k.startswith("optimizer") else torch.bfloat16)
            if not k.startswith("optimizer"): assert torch.equal(held[f"optimizer.state.fp32_param.{k}"].bfloat16(), v)
    assert not any("fp32_param" in k for k in tensors(runs[0] / "one False" / "step_2"))


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> dict:
    "What tests/checkpoint_faults.py found; on a small disk too, where one can be mounted."
    disk = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True).returncode == 0
    try: return json.loads(run("checkpoint_faults.py", tmp_path_factory.mktemp("faults"), *[disk] * mounted).splitlines()[-1])
    finally:
        if mounted: subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.fault
def test_killed_at_any_moment_no_more_than_a_save_is_lost(faults):
    "After every kill what has a checkpoint's name is whole, and going on from it is bit-identical."
    found = faults["killed_at_random"]
    assert found["kills"] == 14 and found["code"] == 0 and found["whole"] and found["steps"] == [45, 44]
    assert found["reached"] == sorted(found["reached"])
    found = faults["killed_at_each_change"]
    assert found["kills"] >= found["changes"] > 12 and found["code"] == 0 and found["whole"]


@pytest.mark.fault
@pytest.mark.parametrize("what", ["moment", "writer_killed", "writer_orphaned", "files_limited", "disk_full", "retention", "refused_on_both",
                                  "other_precision"])
def test_fault(faults, what):
    "Each is a function of tests/checkpoint_faults.py."
    if what == "disk_full" and what not in faults: pytest.skip("no small disk could be mounted")
    assert faults[what] == 0


@pytest.fixture
def alone():
    "This process as the only one of a training."
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def made(folder: Path, step: int, data: bytes = bytes(3000), **beside) -> Path:
    "A checkpoint with made-up tensors, published."
    from domain_adapt.checkpoints import described, publish
    part = folder / f".step_{step}.part"
    part.mkdir(parents=True)
    (part / ".metadata").write_bytes(b"m")
    (part / "__0_0.distcp").write_bytes(data)
    torch.save(dict(step=step, extra={}, updates=step, precision="fp32") | beside, part / "common.pt")
    publish(part, {"__0_0.distcp": described(part / "__0_0.distcp")})
    return folder / f"step_{step}"


def changed(at: Path, name: str, **file) -> None:
    "Change what checksums.json says of a file."
    sums = at / "checksums.json"
    sums.write_text(json.dumps(json.loads(sums.read_text()) | {name: file}))


def flip(at: Path) -> None:
    data = bytearray((at / "__0_0.distcp").read_bytes())
    data[1234] ^= 1
    (at / "__0_0.distcp").write_bytes(data)


def code(at: Path) -> None:
    "A common.pt that is as listed and would make a folder when it is unpickled."
    from domain_adapt.checkpoints import described
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(at.parent / "boom"),)
    torch.save(dict(step=2, extra=Bomb()), at / "common.pt")
    changed(at, "common.pt", **described(at / "common.pt"))


def without(at: Path, key: str) -> None:
    from domain_adapt.checkpoints import common, described
    torch.save({k: v for k, v in common(at).items() if k != key}, at / "common.pt")
    changed(at, "common.pt", **described(at / "common.pt"))


def linked(at: Path, name: str) -> None:
    (at / name).rename(at.parent / "elsewhere")
    (at / name).symlink_to(at.parent / "elsewhere")


def elsewhere(at: Path) -> None:
    at.rename(at.parent / "moved")
    at.symlink_to(at.parent / "moved")


DAMAGE = {
    "truncated": (lambda at: os.truncate(at / "__0_0.distcp", 2999), "__0_0.distcp has 2999 bytes, not 3000"),
    "grown": (lambda at: os.truncate(at / "__0_0.distcp", 3001), "__0_0.distcp has 3001 bytes, not 3000"),
    "flipped": (flip, r"__0_0.distcp is not what was written \(sha256\)"),
    "missing": (lambda at: (at / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "metadata missing": (lambda at: (at / ".metadata").unlink(), ".metadata is missing"),
    "a folder": (lambda at: ((at / "__0_0.distcp").unlink(), (at / "__0_0.distcp").mkdir()), "__0_0.distcp is not a plain file"),
    "a link": (lambda at: linked(at, "__0_0.distcp"), "__0_0.distcp is not a plain file"),
    "itself a link": (elsewhere, "it is a symbolic link"),
    "no checksums": (lambda at: (at / "checksums.json").unlink(), "checksums.json is missing"),
    "no JSON": (lambda at: (at / "checksums.json").write_bytes(b"\xff{"), "checksums.json cannot be read"),
    "deep JSON": (lambda at: (at / "checksums.json").write_text("[" * 10**5), "checksums.json cannot be read"),
    "a list": (lambda at: (at / "checksums.json").write_text("[]"), "checksums.json is not a list of files"),
    "nothing listed": (lambda at: (at / "checksums.json").write_text("{}"), "checksums.json does not list .metadata"),
    "no numbers": (lambda at: changed(at, "x", bytes="1", sha256=2), "checksums.json is not a list of files"),
    "up": (lambda at: changed(at, "../step_1/common.pt", bytes=1, sha256=""), "names '../step_1/common.pt', which is not a file of this folder"),
    "absolute": (lambda at: changed(at, "/etc/passwd", bytes=1, sha256=""), "names '/etc/passwd', which is not"),
    "dots": (lambda at: changed(at, "..", bytes=1, sha256=""), "names '..', which is not"),
    "code": (code, "common.pt cannot be loaded: UnpicklingError"),
    "extra missing": (lambda at: without(at, "extra"), "common.pt has no extra"),
    "step missing": (lambda at: without(at, "step"), "common.pt has no step"),
    "renamed": (lambda at: at.rename(at.with_name("step_3")), "common.pt is of step 2")}


@pytest.mark.fault
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path, alone, what):
    from domain_adapt.checkpoints import LATEST, Checkpoints
    from domain_adapt.params import Save
    before, at = made(tmp_path, 1), made(tmp_path, 2)
    kept = Checkpoints(tmp_path, Save(), set())
    assert kept.find() == (at, []) and kept.newest() == at
    (tmp_path / ".step_5.part").mkdir()
    damage, said = DAMAGE[what]
    damage(at)
    found, refused = kept.find()
    assert found == before and re.search(said, refused[-1][1]) and refused[-1][0] == ("step_3" if what == "renamed" else "step_2")
    assert len(refused) == (2 if what == "renamed" else 1) and not (tmp_path / ".step_5.part").exists() and not (tmp_path / "boom").exists()
    assert json.loads((tmp_path / LATEST).read_text()) == {"step": 1, "folder": "step_1"} and kept.newest() == before


@pytest.mark.fault
@pytest.mark.parametrize("text, why", [(None, "it is missing"), ("", "it cannot be read"), ("{]", "it cannot be read"), ("[1]", "it names no checkpoint"),
                                       ('{"folder": "../step_1"}', "it names no checkpoint"), ('{"folder": 7}', "it names no checkpoint"),
                                       ('{"folder": "step_9"}', "it names step_9, which is missing"), ("[" * 10**5, "it cannot be read")])
def test_a_damaged_pointer_is_told_and_mended(tmp_path, alone, text, why):
    from domain_adapt.checkpoints import LATEST, Checkpoints
    from domain_adapt.params import Save
    made(tmp_path, 1), made(tmp_path, 12)
    latest = tmp_path / LATEST
    latest.unlink() if text is None else latest.write_text(text)
    kept = Checkpoints(tmp_path, Save(), set())
    assert kept.find() == (tmp_path / "step_12", [(LATEST, why)]) and kept.find() == (tmp_path / "step_12", [])


def test_the_pointer_decides(tmp_path, alone):
    "Somebody who wants to go back to an older one says so there."
    from domain_adapt.checkpoints import LATEST, Checkpoints, point
    from domain_adapt.params import Save
    kept = Checkpoints(tmp_path / "none", Save(), set())
    assert kept.find() == (None, []) and kept.newest() is None
    one, two = made(tmp_path, 1), made(tmp_path, 2)
    point(one)
    assert Checkpoints(tmp_path, Save(), set()).find() == (one, [])


@given(st.lists(st.integers(0, 60), unique=True), st.integers(0, 60), st.integers(1, 5), st.none() | st.integers(1, 9), st.sets(st.integers(0, 60)))
def test_what_is_kept(there, step, keep, every, kept):
    from domain_adapt.checkpoints import unneeded
    from domain_adapt.params import Save
    there = sorted({*there, step}, reverse=True)
    left = set(there) - set(unneeded(there, step, Save(keep=keep, keep_every=every), kept))
    before = [s for s in there if s <= step]
    expected = {s for s in there if s > step} | set(before[:keep]) | {s for s in before if s in kept or every and s % every == 0}
    assert left == expected and step in left


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), lambda x: st.lists(x, max_size=3) | st.dictionaries(
    st.sampled_from([".metadata", "common.pt", "metadata.json", "bytes", "sha256", "../x", "a"]), x, max_size=4), max_leaves=12)


@given(JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_checksums_are_a_list_of_own_files_or_refused(tmp_path, data):
    from domain_adapt.checkpoints import OWN, listed
    (tmp_path / "checksums.json").write_text(json.dumps(data))
    try: files = listed(tmp_path)
    except ValueError as e: assert str(e).startswith("checksums.json")
    else: assert set(OWN) <= files.keys() and all(Path(n).name == n and {"bytes", "sha256"} <= f.keys() for n, f in files.items())


@pytest.mark.server
def test_copies_on_a_server(tmp_path, alone, monkeypatch):
    "A copy is whole when its marker is there; one of other bytes of the same sizes is replaced; a failure is an event."
    from domain_adapt import s3
    from domain_adapt.checkpoints import Checkpoints
    from domain_adapt.params import Save
    from servers.s3 import KEY, SECRET, rclone
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY), monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1"), monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    folder = tmp_path / "train-abc" / "checkpoints"
    def copied(secret: str) -> list[dict]:
        "Start as a training does, and wait for the copies."
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        s3._client.cache_clear()
        kept = Checkpoints(folder, Save(copy_to="s3://runs/mine/"), set())
        assert kept.find()[1] == []
        return kept.finish()
    def there() -> dict: return {i.path: i.size for i in s3.listing("s3://runs/mine/train-abc/checkpoints")}
    def body(name: str) -> bytes: return s3.client().get_object(Bucket="runs", Key=f"mine/train-abc/checkpoints/{name}")["Body"].read()
    with rclone(tmp_path / "served") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        (tmp_path / "served" / "runs").mkdir()
        at = made(folder, 4, b"a" * 3000)
        told, = copied("wrong-secret")
        assert (told["step"], told["what"], told["action"]) == (4, "copy failed", "training goes on") and "AWS_SECRET_ACCESS_KEY" in told["value"]
        assert copied(SECRET) == []
        assert {n.removeprefix("step_4/") for n in there()} == {f.name for f in at.iterdir()} | {s3.COMPLETE}
        marker = json.loads(body(f"step_4/{s3.COMPLETE}"))
        assert marker.keys() == {f.name for f in at.iterdir()} and body("step_4/checksums.json") == (at / "checksums.json").read_bytes()
        made(folder, 4, b"b" * 3000)    # after a roll-back
        assert copied(SECRET) == [] and body("step_4/__0_0.distcp") == b"b" * 3000
        assert json.loads(body(f"step_4/{s3.COMPLETE}")) != marker
        s3.client().delete_object(Bucket="runs", Key=f"mine/train-abc/checkpoints/step_4/{s3.COMPLETE}")    # cut short
        made(folder, 4, b"c" * 3000)
        assert copied(SECRET) == [] and body("step_4/__0_0.distcp") == b"c" * 3000 and f"step_4/{s3.COMPLETE}" in there()
