"""Ingest: every document kept or accounted for, the same however many processes, in scripts and notebooks."""
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from made_corpora import corpus, filing, params, records, result, run, some_filings, some_prose, story

from domain_adapt import assets, clean
from domain_adapt.params import UserError

ROOT = Path(__file__).resolve().parent.parent

@pytest.fixture
def corpora(tmp_path) -> Path:
    some_filings(tmp_path / "sec")
    some_prose(tmp_path / "prose")
    return tmp_path


def test_every_document_is_kept_or_accounted_for(corpora, tmp_path):
    table = run(params(corpora), tmp_path / "out")
    steps = {c: dict(zip(t["step"], t["documents"])) for c, t in table.groupby("corpus")}
    assert steps == {
        "sec": {"read": 8, "of text": 7, "readable": 6, "of the forms": 5, "long enough": 4,
                "in the language": 4, "good quality": 4, "distinct": 3, "no near copy": 3, "kept": 3},
        "prose": {"read": 22, "of text": 22, "readable": 21, "articles": 19, "long enough": 17,
                  "in the language": 17, "good quality": 15, "distinct": 13, "no near copy": 13, "kept": 13}}
    kept, dropped = records(tmp_path / "out" / "documents"), records(tmp_path / "out" / "dropped")
    characters = table[table["step"] == "read"].set_index("corpus")["characters"].sum()
    assert sum(len(d.get("text", "")) for d in kept + dropped) == characters
    ids = [d["id"] for d in kept + dropped]
    assert len(ids) == len(set(ids)) == 30
    reasons = {d["id"]: d["metadata"]["filter_reason"] for d in dropped}
    assert reasons["sec/logo.jpg#0"] == "unknown kind of file .jpg" and reasons[
        "sec/all.txt#0"] == "document breaks off"
    assert reasons["sec/amended.html#0"] == "document type 10-K/A" and reasons[
        "sec/copy.html#0"] == "same as sec/2025/b.htm#0"
    assert reasons["prose/w.xml#1"] == "redirect" and reasons["prose/a.jsonl#6"].startswith("broken JSON")
    assert reasons["prose/d.txt#0"].startswith(("duplicated", "top"))
    assert not list((tmp_path / "out").glob("passed"))


def test_what_a_document_says_of_itself(corpora, tmp_path):
    run(params(corpora), tmp_path / "out")
    doc = records(tmp_path / "out" / "documents" / "sec")[0]
    assert doc["id"] == "sec/2025/b.htm#0" and "| Sales | 1 |" in doc["text"]
    said = dict(corpus="sec", source_path="2025/b.htm", kind="domain", title="B 10-K", company="B",
        form="10-K")
    assert doc["metadata"] == said | dict.fromkeys("date url cik filed period sic accession".split(), "") | {
        "document_type": "10-K"}
    prose = records(tmp_path / "out" / "documents" / "prose")
    assert [d["id"] for d in prose] == [*(f"prose/a.jsonl#{n}" for n in range(6)),
                                        *(f"prose/b/c.jsonl.gz#{n}" for n in range(2, 8)), "prose/w.xml#0"]
    said = dict(corpus="prose", kind="general", source_path="a.jsonl", title="T2", date="", url="")
    assert prose[2]["metadata"] == said


@pytest.mark.equality
def test_the_same_however_many_processes(corpora, tmp_path, monkeypatch):
    run(params(corpora), tmp_path / "one")
    run(params(corpora, workers=2), tmp_path / "two")
    monkeypatch.setattr(clean, "MAX_TASKS", 2)
    run(params(corpora, workers=2), tmp_path / "few")
    for other in ("two", "few"):
        for name in ("documents/sec", "documents/prose", "dropped/sec", "dropped/prose"):
            assert records(tmp_path / other / name) == records(tmp_path / "one" / name)
        assert (tmp_path / other / "funnel.csv").read_bytes() == (
            tmp_path / "one" / "funnel.csv").read_bytes()


def test_a_corpus_may_be_one_file(corpora, tmp_path):
    p = params(corpora, one=corpus("general", corpora / "prose" / "a.jsonl"))
    assert run(p, tmp_path / "out")["documents"].tolist() == [8, 8, 7, 7, 6, 6, 6, 6, 6, 6]
    assert records(tmp_path / "out" / "documents")[0]["id"] == "one/a.jsonl#0"


@pytest.mark.parametrize("name, source, forms, said", [
    (None, "sec", [], ["no such file or folder"]), ("", "sec", [], ["holds no files"]),
    (".hidden", "general", [], ["holds no files"]), ("a.pdf", "general", [], ["1 read, 0 of text"]),
    ("a.html", "sec", ["20-F"], ["1 readable, 0 of the forms", "`forms`"]),
    ("a.txt", "general", [], ["0 long enough", "ingest.min_words"])])
def test_missing_and_empty_corpora_name_their_key(tmp_path, name, source, forms, said):
    if name is not None: (tmp_path / "mine").mkdir()
    if name: (tmp_path / "mine" / name).write_text(filing("10-K", "A", story(1))
        if ".html" in name else "Few words.")
    p = params(tmp_path, mine=corpus(source, tmp_path / "mine", forms=forms))
    with pytest.raises(UserError) as e: run(p, tmp_path / "out")
    assert all(s in str(e.value) for s in ["corpora.mine.path", *said]), e.value


def test_a_missing_corpus_is_told_before_work_starts(corpora, tmp_path):
    p = params(corpora, first=corpus("sec", corpora / "sec"), gone=corpus("sec", "gone", "general"))
    with pytest.raises(UserError, match="corpora.gone.path"): run(p, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.jsonl*"))


@pytest.mark.fault
@pytest.mark.parametrize("table", ["documents/prose", "dropped/prose/too_short", "dropped/sec/copy"])
def test_a_count_that_does_not_add_up_is_an_error(corpora, tmp_path, monkeypatch, table):
    "A document that was written and is lost before the recount stops the stage."
    recount = clean.Recount.run
    def loses_one(self, data=None, rank=0, world_size=1):
        for file in (self.out / table).glob(f"{rank:05d}.jsonl.gz"): file.unlink()
        return recount(self, data, rank, world_size)
    monkeypatch.setattr(clean.Recount, "run", loses_one)
    with pytest.raises(RuntimeError, match="read .* kept .* dropped"): run(params(corpora), tmp_path / "out")
    assert not (tmp_path / "out" / "funnel.csv").exists()


@pytest.mark.fault
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_ours_ends_the_run(corpora, tmp_path, monkeypatch, workers):
    def broken(self, doc): raise ZeroDivisionError(doc.id)
    monkeypatch.setattr(clean.Rule, "filter", broken)
    with pytest.raises(ZeroDivisionError): run(params(corpora, workers=workers), tmp_path / "out")
    assert not (tmp_path / "out" / "funnel.csv").exists()


@pytest.mark.fault
def test_a_file_that_cannot_be_read_is_counted(corpora, tmp_path, monkeypatch):
    "An error in reading, a reader that hangs and one that dies each cost their file, and no other."
    from domain_adapt.sources import general
    def odd(path: str):
        name = Path(path).name
        if name == "d.txt": raise ZeroDivisionError("of ours")
        if name == "e.txt": time.sleep(60)
        if name == "w.xml":
            yield from general.documents(path)
            os.kill(os.getpid(), signal.SIGKILL)
        yield from general.documents(path)
    monkeypatch.setitem(clean.READERS, "general", odd)
    out = tmp_path / "out"
    run(params(corpora, ingest={"timeout": 1.0, "max_failed_fraction": 0.5}, prose=corpus("general", corpora / "prose")), out)
    reasons = {d["id"]: d["metadata"]["filter_reason"] for d in records(out / "dropped" / "prose" / "unreadable")}
    assert reasons["prose/d.txt#0"] == "ZeroDivisionError: of ours" and reasons["prose/e.txt#0"] == "took longer than 1 s"
    assert reasons["prose/w.xml#3"] == "its reader died (exit code -9)" and len(reasons) == 4
    assert "prose/w.xml#0" in {d["id"] for d in records(out / "documents")}


@pytest.mark.fault
def test_too_many_failures_fail_the_stage_at_its_end_with_the_table(corpora, tmp_path):
    (corpora / "prose" / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}' * 99)[:-9])
    for n in range(8): (corpora / "prose" / f"bad{n}.jsonl").write_text("[1, 2")
    with pytest.raises(UserError) as e: run(params(corpora), tmp_path / "out")
    said = str(e.value)
    assert re.search(r"corpora.prose.path: .*32.3% of 31 documents .* ingest.max_failed_fraction 0.2:\n +9  broken JSON\n +1  damaged", said), said
    assert "dropped/prose/unreadable" in said and "corpora.sec" not in said
    assert not (tmp_path / "out" / "funnel.csv").exists() and len(records(tmp_path / "out" / "documents")) == 16


@pytest.mark.fault
def test_a_file_that_vanishes_is_counted(corpora, tmp_path):
    (tmp_path / "00000.json").write_text(json.dumps([dict(path=n, file=str(corpora / "sec" / n)) for n in ("a.html", "gone.html")]))
    reader = clean.Reader("sec", params(corpora).corpora["sec"], tmp_path, 10)
    kept, gone = reader.run()
    assert kept.metadata["form"] == "10-K" and "dropped" not in kept.metadata
    assert gone.metadata["filter_reason"] == "vanished between listing and reading"


SCRIPT = """
import json, sys
from pathlib import Path
from domain_adapt.clean import ingest
from domain_adapt.params import validate
Path(sys.argv[2]).mkdir(exist_ok=True)
ingest(validate(json.loads(sys.argv[1])), {}, Path(sys.argv[2]))
"""


@pytest.mark.fault
@pytest.mark.equality
@pytest.mark.parametrize("pass_, at", [("read", 3), ("read", 9), ("distinct", 4), ("recount", 2)])
def test_killed_and_run_again_gives_the_same_bytes(tmp_path, pass_, at):
    "SIGKILL in the middle of each pass; what was finished is not done again."
    (tmp_path / "prose").mkdir()
    for n in range(12):
        lines = [json.dumps({"text": story(i % 40)}) for i in range(n * 20, n * 20 + 20)]
        (tmp_path / "prose" / f"{n:02d}.jsonl").write_text("\n".join(lines))
    p = params(tmp_path, prose=corpus("general", tmp_path / "prose"))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = lambda out: [sys.executable, str(tmp_path / "script.py"), p.model_dump_json(), str(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command(tmp_path / "whole"), env=env, check=True, capture_output=True, timeout=120)
    child = subprocess.Popen(command(out := tmp_path / "out"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logs = out / "logs" / "prose" / pass_
    while child.poll() is None and len(list(logs.glob("completions/*"))) < at: time.sleep(.002)
    child.kill()
    child.wait()
    assert not (out / "funnel.csv").exists()
    finished = {f: f.stat().st_mtime_ns for mark in logs.glob("completions/*") for f in (logs / "stats").glob(f"{mark.name}.json")}
    assert len(finished) >= at
    subprocess.run(command(out), env=env, check=True, capture_output=True, timeout=120)
    assert {f: f.stat().st_mtime_ns for f in finished} == finished
    assert result(out) == result(tmp_path / "whole") and len(result(out)) > 12


def running(script: Path) -> list[int]:
    "Processes that run a script, those that it forked among them."
    found = (p for p in Path("/proc").glob("[0-9]*/cmdline"))
    def command(p: Path) -> bytes:
        try: return p.read_bytes()
        except OSError: return b""
    return [int(p.parent.name) for p in found if str(script).encode() in command(p)]


@pytest.mark.fault
def test_a_kill_leaves_no_process_behind(corpora, tmp_path):
    (corpora / "prose" / "big.txt").write_text(story(1) * 30_000)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", params(corpora, workers=2).model_dump_json(), tmp_path / "out"]
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(running(tmp_path / "script.py")) < 4 and child.poll() is None: time.sleep(.005)
    assert len(running(tmp_path / "script.py")) >= 4    # two workers, each with a reader
    child.kill()
    child.wait()
    end = time.monotonic() + 5
    while running(tmp_path / "script.py") and time.monotonic() < end: time.sleep(.05)
    assert not running(tmp_path / "script.py")


@pytest.mark.fault
def test_a_worker_that_is_killed_ends_the_run(corpora, tmp_path, monkeypatch):
    "The kernel kills the largest process when memory runs out; the run must not wait for it for ever."
    rule = clean.Rule.filter
    def deadly(self, doc):
        if doc.id == "sec/a.html#0": os.kill(os.getpid(), signal.SIGKILL)
        return rule(self, doc)
    monkeypatch.setattr(clean.Rule, "filter", deadly)
    with pytest.raises(UserError, match="ingest.workers"): run(params(corpora, workers=2), tmp_path / "out")


def test_a_script_needs_no_main_guard(corpora, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", params(corpora, workers=2).model_dump_json(),
        tmp_path / "out"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "PIPELINE" not in done.stderr
    assert len(records(tmp_path / "out" / "documents")) == 16


def test_two_processes_in_a_notebook_kernel(corpora, tmp_path):
    from nbclient import NotebookClient
    data, out = params(corpora, workers=2).model_dump_json(), str(tmp_path / "out")
    source = SCRIPT.replace("sys.argv[1]", repr(data)).replace("sys.argv[2]", repr(out))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert len(records(tmp_path / "out" / "documents")) == 16
    assert "PIPELINE" not in json.dumps(notebook.cells[0].outputs)


def test_the_quickstart_corpora(tmp_path):
    for name in ("filings-10k", "wikipedia"):
        archive = assets.cache_folder() / "downloads" / assets.ASSETS[name].file
        if not archive.is_file(): pytest.skip(f"{archive} is not there")
    p = params(tmp_path, workers=2, sec=corpus("sec", "package:filings-10k", forms=["10-K"]),
               wiki=corpus("general", "package:wikipedia"), news=corpus("general", "package:news"))
    table = run(p, tmp_path / "out").set_index(["corpus", "step"])["documents"]
    assert table["sec", "kept"] == 3 and table["wiki", "articles"] == 106 and table["news", "read"] == 300
    assert table["wiki", "kept"] >= 95 and table["news", "kept"] >= 285
    paths = [d["metadata"]["source_path"] for d in records(tmp_path / "out" / "documents" / "sec")]
    assert paths == ["aapl_2025_10k.html", "amzn_2026_10k.html", "tgt_2026_10k.html"]
