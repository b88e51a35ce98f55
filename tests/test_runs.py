"""Whole files, locks, keys: what makes an older result impossible to mistake for a newer one."""
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from conftest import ROOT
from domain_adapt import runs
from domain_adapt.params import UserError, load_params
from domain_adapt.runs import STAGES, Run, Stage, locked, progress, whole_folder, write_bytes, write_text

TINY_YAML = ROOT / "params" / "tiny.yaml"


def keys(*sets: str) -> dict[str, str]:
    return dict(Run(load_params(TINY_YAML, sets)).keys)


def changed(a: dict, b: dict) -> list[str]:
    return [s for s in STAGES if a[s] != b[s]]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A copy of the code that a test may edit, and that keys are computed from."
    for name in ("domain_adapt", "nbs", "params"): shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "tiny", tmp_path / "tests" / "tiny")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "PACKAGE", tmp_path / "domain_adapt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("change, first", [
    ("ingest.min_words=30", "ingest"), ("tokens.replay=0.1", "train"), ("corpora.sec.heldout=['*alder*']", "tokens"), ("train.lr=0.1", "train"),
    ("merge.select.keep=1", "merge"), ("evaluate.perplexity.block=64", "merge"), ("evaluate.suites.quick.limit=2", "evaluate"), ("report.title=x", "report")])
def test_an_edit_of_the_yaml_touches_its_stage_and_those_after(change, first):
    assert changed(keys(), keys(change)) == list(STAGES[STAGES.index(first):])


@pytest.mark.parametrize("module, first", [
    ("sources/sec", "ingest"), ("tokens", "tokens"), ("convert", "train"), ("merge", "merge"), ("benchmarks", "evaluate"), ("figures", "report"), ("pipeline", None)])
def test_an_edit_of_the_code_touches_the_stages_that_use_it(clone, module, first):
    before = keys()
    path = clone / "domain_adapt" / f"{module}.py"
    path.write_text(path.read_text() + "\n# edited\n")
    assert changed(before, keys()) == (list(STAGES[STAGES.index(first):]) if first else [])


def test_an_edit_of_an_input_touches_the_stages_that_read_it(clone):
    before = keys()
    path = clone / "tests" / "tiny" / "news.cor"
    path.write_text(path.read_text() + "one more\n")
    assert changed(before, keys()) == list(STAGES)


def test_an_edit_of_a_figure_draws_again_and_works_no_more(clone):
    def drawn(): return {s: Run(load_params(TINY_YAML)).notebook_key(s) for s in STAGES}
    before, worked = drawn(), keys()
    path = clone / "domain_adapt" / "figures.py"
    path.write_text(path.read_text() + "\n# edited\n")
    assert changed(before, drawn()) == list(STAGES) and changed(worked, keys()) == ["report"]


def test_outputs_and_parameters_left_in_a_notebook_draw_nothing_again(clone):
    def drawn(): return {s: Run(load_params(TINY_YAML)).notebook_key(s) for s in STAGES}
    before, path = drawn(), clone / "nbs" / "stages" / "5_evaluate.ipynb"
    notebook = json.loads(path.read_text())
    for c in notebook["cells"]:
        if c["cell_type"] == "code": c |= dict(execution_count=3, outputs=[dict(output_type="stream", name="stdout", text=["looked at"])])
        if "parameters" in c["metadata"].get("tags", []): c["source"] = ['run = "quickstart"']
    path.write_text(json.dumps(notebook))
    assert drawn() == before
    notebook["cells"][0]["source"] = ["# Another title"]
    path.write_text(json.dumps(notebook))
    assert changed(before, drawn()) == ["evaluate", "report"]


def test_keys_import_nothing_heavy():
    code = ("import sys; from domain_adapt.params import load_params; from domain_adapt.runs import Run, up_to_date, STAGES\n"
            f"r = Run(load_params({str(TINY_YAML)!r})); [up_to_date(r, s) for s in STAGES]\n"
            "sys.exit(', '.join({'torch', 'transformers', 'mergekit', 'lm_eval', 'datatrove', 'megatron'} & set(sys.modules)) or None)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_room_imports_from_a_higher_number():
    names = []
    for p in sorted((ROOT / "nbs").glob("*.ipynb")):
        text = "\n".join("".join(c["source"]) for c in json.loads(p.read_text())["cells"])
        names.append(text.split("default_exp ")[1].split()[0])
    assert len(names) > 15
    for i, name in enumerate(names):
        used = {n for n in runs._imports((runs.PACKAGE / (name.replace(".", "/") + ".py")).read_text(), name) if runs._module_file(n)}
        assert not used - set(names[:i]), f"{name} imports {used - set(names[:i])}"


@pytest.mark.fault
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    with pytest.raises(OSError): write_bytes(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.fault
def test_a_real_full_disk_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESUMED", ())
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        stage = Stage("ingest", None, "0" * 16, disk / "ingest-0", {})
        def work(params, folders, out): write_bytes(out / "big", b"x" * 1_000_000)
        with pytest.raises(UserError, match="disk is full"): stage.run(work)
        assert not stage.folder.exists()
    finally: subprocess.run(["umount", disk], check=True)


@pytest.mark.fault
def test_a_killed_stage_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESUMED", ())
    code = textwrap.dedent(f"""
        import time; from pathlib import Path; from domain_adapt.runs import Stage
        def work(params, folders, out): (out / "half").write_text("x"); time.sleep(60)
        Stage("ingest", None, "0" * 16, Path({str(tmp_path)!r}) / "ingest-0", {{}}).run(work)""")
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    half = tmp_path / "ingest-0" / "half"
    for _ in range(300):
        if half.exists(): break
        time.sleep(0.1)
    stage = Stage("ingest", None, "0" * 16, tmp_path / "ingest-0", {})
    with pytest.raises(UserError, match=f"made by another process .pid {child.pid}"): stage.run(None)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert half.exists() and not stage.complete
    stage.run(lambda params, folders, out: (out / "whole").write_text("y"))
    assert stage.complete and not half.exists() and (tmp_path / "ingest-0" / "whole").exists()
    stage.run(None)


def test_what_is_at_work_is_not_discarded(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESUMED", ())
    stage = Stage("ingest", None, "0" * 16, tmp_path / "ingest-0", {})
    stage.folder.mkdir()
    with locked(stage.lock, "it"): stage.discard()
    assert stage.folder.exists()
    stage.discard()
    assert not stage.folder.exists()


def test_an_unfinished_ingest_is_gone_on_with(tmp_path):
    stage = Stage("ingest", None, "0" * 16, tmp_path / "ingest-0", {})
    def broken(params, folders, out): (out / "half").write_text("x"); raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): stage.run(broken)
    stage.discard()
    stage.run(lambda params, folders, out: (out / "whole").write_text((out / "half").read_text()))
    assert stage.complete and (stage.folder / "whole").read_text() == "x"


def test_a_stage_wants_those_before_it(tmp_path):
    stage = Stage("tokens", None, "0" * 16, tmp_path / "tokens-0", {"ingest": tmp_path / "ingest-0"})
    with pytest.raises(UserError, match="stage tokens reads stage ingest, which is not done with these settings and this code"): stage.run(None)


def test_whole_folder_replaces_or_keeps(tmp_path):
    with whole_folder(tmp_path / "x") as part: (part / "f").write_text("1")
    with pytest.raises(ValueError), whole_folder(tmp_path / "x") as part:
        (part / "f").write_text("2")
        raise ValueError
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x" / "f").read_text() == "1"
    with whole_folder(tmp_path / "x") as part: (part / "g").write_text("3")
    assert os.listdir(tmp_path / "x") == ["g"]


def test_progress_reports_to_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv("DOMAIN_ADAPT_PROGRESS", str(tmp_path / "p"))
    assert list(progress(range(3), description="things")) == [0, 1, 2]
    lines = [json.loads(line) for line in (tmp_path / "p").read_text().splitlines()]
    assert lines[0]["n"] == 0 and lines[-1]["n"] == 3 and lines[-1]["done"] and {x["total"] for x in lines} == {3}


@pytest.mark.parametrize("flags, cpu", [("fpu avx512f", "Xeon(R) 8"), ("fpu amx_bf16 amx_tile", "Xeon(R) 8 with AMX"),
                                        ("fpu amx_bf16_new", "Xeon(R) 8")])
def test_a_machine_tells_its_processor(tmp_path, monkeypatch, flags, cpu):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Xeon(R) 8\nflags\t\t: {flags}\n\n" * 2)
    monkeypatch.setattr(runs, "Path", {"/proc/cpuinfo": tmp_path / "cpuinfo"}.__getitem__)
    assert runs.machine()["cpu"] == cpu


def test_a_lock_is_free_again(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "l", "it"): pass
