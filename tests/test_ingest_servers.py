"""Ingest on a real cluster and from real object stores."""
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from made_corpora import corpus, params, records, result, run, some_filings, some_prose, story
from servers.edgar import Edgar
from servers.hub import Hub
from servers.s3 import KEY, SECRET, ceph, has_ceph, rclone

from domain_adapt import clean, s3, workers
from domain_adapt.params import UserError
from domain_adapt.runs import ROOT, Stage

pytestmark = pytest.mark.server
SCRIPT = """
import json, sys
from pathlib import Path
from domain_adapt import clean
from domain_adapt.clean import ingest
from domain_adapt.params import validate
Path(sys.argv[2]).mkdir(exist_ok=True)
ingest(validate(json.loads(sys.argv[1])), {}, Path(sys.argv[2]))
"""


@pytest.fixture
def cluster(slurm_here, monkeypatch):
    "A cluster that squeue and sbatch find; two tasks a corpus, as each starts a Python."
    for key, value in slurm_here.items(): monkeypatch.setenv(key, value)
    monkeypatch.setattr(clean, "MAX_TASKS", 2)


@pytest.fixture
def corpora(tmp_path) -> Path:
    some_filings(tmp_path / "sec")
    some_prose(tmp_path / "prose")
    return tmp_path


def on_slurm(root: Path, **more): return params(root, ingest={"workers": None, "slurm": {"partition": "main", "memory_gb": 1, **more}})


@pytest.mark.equality
def test_slurm_gives_the_same_bytes(cluster, corpora, tmp_path):
    run(params(corpora), tmp_path / "here")
    run(on_slurm(corpora), tmp_path / "there")
    assert result(tmp_path / "there") == result(tmp_path / "here")
    script = next((tmp_path / "there").rglob("launch_script.slurm")).read_text()
    assert "#SBATCH --partition=main" in script and "#SBATCH --mem-per-cpu=1G" in script


def test_a_task_of_a_job_sends_a_job(cluster, corpora, tmp_path, monkeypatch):
    "As an arm of a study does, which is a task of an array itself."
    for name in ("ARRAY_TASK_ID", "MEM_PER_NODE", "CPUS_PER_TASK"): monkeypatch.setenv(f"SLURM_{name}", "7")
    run(on_slurm(corpora), tmp_path / "out")
    assert records(tmp_path / "out" / "documents") and os.environ["SLURM_ARRAY_TASK_ID"] == "7"


def test_a_controller_that_does_not_answer_is_no_job_that_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for said, state in (("Unable to contact slurm controller", "silent"), ("Invalid job id specified", "")):
        (tmp_path / "squeue").write_text(f"#!/bin/sh\necho 'slurm_load_jobs error: {said}' >&2\nexit 1\n")
        (tmp_path / "squeue").chmod(0o755)
        assert workers._state("7") == state
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "squeue").unlink()
    with pytest.raises(UserError, match="no squeue on this machine"): workers._state("7")


@pytest.mark.fault
def test_a_login_node_that_is_cut_off_finds_its_job_again(cluster, corpora, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT.replace("ingest(validate", "clean.MAX_TASKS = 2\nclean.ingest(validate"))
    out = tmp_path / "out"
    out.mkdir()
    login = subprocess.Popen([sys.executable, tmp_path / "script.py", on_slurm(corpora).model_dump_json(), out],
                             env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    note = out / "logs" / "sec" / "read" / "job"
    end = time.monotonic() + 60
    while not note.exists() and time.monotonic() < end: time.sleep(.02)
    login.send_signal(signal.SIGKILL)
    login.wait()
    job = note.read_text()
    sent = []
    submit = workers._Slurm.launch_job
    monkeypatch.setattr(workers._Slurm, "launch_job", lambda self: (sent.append(self.job_name), submit(self)))
    clean.ingest(on_slurm(corpora), {}, out)
    assert note.read_text() == job and "domain-adapt-sec-read" not in sent and len(sent) == 5
    run(params(corpora), tmp_path / "here")
    assert result(out) == result(tmp_path / "here")


@pytest.mark.fault
def test_a_cancelled_job_says_how_to_go_on(cluster, corpora, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    held = on_slurm(corpora, options={"begin": "now+1hour"})
    def cancel():
        note = out / "logs" / "sec" / "read" / "job"
        while not note.exists(): time.sleep(.05)
        subprocess.run(["scancel", note.read_text()], check=True)
    threading.Thread(target=cancel, daemon=True).start()
    with pytest.raises(UserError, match=r"Slurm job \d+ ended with 2 of 2 tasks not done; .*slurm_logs"): clean.ingest(held, {}, out)
    clean.ingest(on_slurm(corpora), {}, out)
    assert len(records(out / "documents")) == 16


def test_a_job_that_can_never_start_says_why(cluster, corpora, tmp_path):
    with pytest.raises(UserError, match="PartitionTimeLimit.*cancelled"): run(on_slurm(corpora, time="9-00:00:00"), tmp_path / "out")


@pytest.fixture(scope="module", params=["rclone", "ceph"])
def store(request, tmp_path_factory):
    if request.param == "ceph" and not has_ceph(): pytest.skip("Ceph is not installed (apt: ceph-mon ceph-osd radosgw)")
    with {"rclone": rclone, "ceph": ceph}[request.param](tmp_path_factory.mktemp(request.param) / "at") as endpoint: yield endpoint


@pytest.fixture
def buckets(store, corpora, monkeypatch):
    "The corpora as objects: s3://in/sec and s3://in/prose."
    for key, value in {"ENDPOINT_URL": store, "ACCESS_KEY_ID": KEY, "SECRET_ACCESS_KEY": SECRET, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    s3._client.cache_clear()
    for name in ("in-docs", "out-docs"):
        with contextlib.suppress(s3.client().exceptions.BucketAlreadyExists, s3.client().exceptions.BucketAlreadyOwnedByYou):
            s3.client().create_bucket(Bucket=name)
    for f in corpora.rglob("*"):
        if f.is_file() and f.name[0] != ".": s3.client().upload_file(str(f), "in-docs", str(f.relative_to(corpora)))
    return corpora


def remote(**more): return params(Path("/"), sec=corpus("sec", "s3://in-docs/sec", forms=["10-K"]),
                                  prose=corpus("general", "s3://in-docs/prose", "general"), **more)


@pytest.mark.equality
def test_objects_give_the_same_bytes_as_files(buckets, tmp_path):
    run(params(buckets), tmp_path / "files")
    run(remote(workers=2), tmp_path / "objects")
    assert result(tmp_path / "objects") == result(tmp_path / "files")


@pytest.mark.fault
def test_objects_that_vanish_or_change_are_counted(buckets, tmp_path):
    p = remote()
    out = tmp_path / "out"
    for name, c in p.corpora.items(): clean._list(name, c, out / "logs" / name)
    s3.client().put_object(Bucket="in-docs", Key="prose/d.txt", Body=b"changed meanwhile")
    s3.client().delete_object(Bucket="in-docs", Key="sec/a.html")
    clean.ingest(params(Path("/"), ingest={"max_failed_fraction": .5}, **{n: c.model_dump() for n, c in p.corpora.items()}), {}, out)
    reasons = {d["id"]: d["metadata"]["filter_reason"] for d in records(out / "dropped")}
    assert reasons["prose/d.txt#0"] == "changed between listing and reading"
    assert reasons["sec/a.html#0"] == "vanished between listing and reading"


def test_a_finished_stage_is_copied_out_once(buckets, tmp_path, capsys):
    stage = Stage("ingest", params(buckets), "k1", tmp_path / "ingest-k1", {})
    stage.run(clean.ingest)
    stage.copy_out("s3://out-docs/here/")
    stage.copy_out("s3://out-docs/here/")
    copied = {i.path: i.size for i in s3.listing("s3://out-docs/here/ingest-k1")}
    files = {n: f["bytes"] for n, f in json.loads(stage.record.read_text())["files"].items()}
    assert copied.pop(s3.COMPLETE) > 0 and copied == files and "documents/sec/00000.jsonl.gz" in files
    assert f"0 of {len(files)} files copied to s3://out-docs/here/ingest-k1" in capsys.readouterr().out


def test_filings_come_from_edgar_and_those_that_cannot_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAIN_ADAPT_CACHE", str(tmp_path / "cache"))
    filings = [("10-K", "2024-02-01", "0000000042-24-000001"), ("8-K", "2024-03-01", "0000000042-24-000002"), ("10-K", "2023-02-01", "0000000042-23-000001")]
    with Edgar({42: ("Widgets", "WDG", filings)}) as server:
        del server.files["/Archives/edgar/data/42/0000000042-23-000001.txt"]
        asked = dict(user_agent="Example Ltd jo@example.org", tickers=["WDG"], forms=["10-K"], base_url=server.base_url)
        given = dict(kind="domain", source="sec", edgar=asked, forms=["10-K"], language=None, filters="as_is")
        run(params(tmp_path, ingest={"max_failed_fraction": .6}, sec=given), tmp_path / "out")
        kept, = records(tmp_path / "out" / "documents")
        lost, = records(tmp_path / "out" / "dropped")
        assert kept["id"] == "sec/42/0000000042-24-000001.txt#0" and kept["metadata"]["accession"] == "0000000042-24-000001"
        assert lost["id"] == "sec/0000000042-23-000001#0" and "404" in lost["metadata"]["filter_reason"]
        asked_before = len(server.log)
        run(params(tmp_path, ingest={"max_failed_fraction": .6, "min_words": 30}, sec=given), tmp_path / "again")
        assert len([x for x in server.log[asked_before:] if "000001.txt" in x[1] and "-24-" in x[1]]) == 0    # it is in the cache


def test_a_data_set_is_streamed_from_the_hub(tmp_path):
    rows = "".join(json.dumps({"text": story(n)}) + "\n" for n in range(30))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    p = params(tmp_path, ingest={"workers": 2}, wiki=dict(kind="domain", source="general", path="hub:own/wiki", limit=20))
    with Hub({"own/wiki": {"train.jsonl": rows.encode()}}) as hub:
        env = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, script, p.model_dump_json(), tmp_path / "out"], env=env, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
    kept = records(tmp_path / "out" / "documents")
    assert {d["id"] for d in kept} == {f"wiki/hub:own/wiki/0#{n}" for n in range(20)} and {d["text"] for d in kept} == {story(n) for n in range(20)}
