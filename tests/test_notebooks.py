"""The stage notebooks as a place to work: by papermill alone, without parameters, and on runs that are done."""
import filecmp
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

from conftest import CSVS, ROOT, TINY_YAML
from domain_adapt.runs import STAGES, notebook_path
from servers.s3 import KEY, SECRET, rclone


def papermill(stage: str, out, *words, at: Path, cwd: Path = ROOT, env=None) -> subprocess.CompletedProcess:
    "A stage's notebook by papermill alone, with outputs in `at`."
    command = [sys.executable, "-m", "papermill", str(notebook_path(stage)), str(out), *map(str, words), "--no-progress-bar"]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=600,
                          env=os.environ | {"DOMAIN_ADAPT_OUTPUTS": str(at)} | (env or {}))


def printed(notebook) -> str:
    return "".join(o["text"] for c in notebook.cells for o in c.get("outputs", []) if o["output_type"] == "stream" and o["name"] == "stdout")


def last_line(done) -> str: return (done.stdout + done.stderr).rstrip().splitlines()[-1]


@pytest.fixture
def copy(tiny_run, tmp_path) -> Path:
    return shutil.copytree(tiny_run, tmp_path / "outputs", symlinks=True)


@pytest.mark.slow
@pytest.mark.equality
def test_the_notebooks_without_parameters_do_the_tiny_run_in_a_minute_each(tiny_run, tmp_path):
    "By hand, one after the other; what they make is what the command line makes, to the bit."
    for stage in STAGES:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = papermill(stage, tmp_path / f"{stage}.ipynb", at=tmp_path / "o")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "unknown parameter" not in done.stderr.lower()
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60, stage
    merged = json.loads((tiny_run / "tiny/4_merge/selection.json").read_text())["kept"][0]
    for name in [*CSVS, "4_merge/geometry.csv", "4_merge/blocks.csv", "5_evaluate/blocks.csv",
                 "3_train/hf/step_8/model.safetensors", f"4_merge/{merged}/model.safetensors"]:
        assert filecmp.cmp(tiny_run / "tiny" / name, tmp_path / "o/tiny" / name, shallow=False), name
    assert {p.name for p in (tmp_path / "o/.stages").iterdir()} == {p.name for p in (tiny_run / ".stages").iterdir()}


def test_the_notebook_of_figures_runs_in_a_kernel_where_it_draws_live(tmp_path):
    done = subprocess.run([sys.executable, "-m", "papermill", ROOT / "nbs/60_figures.ipynb", tmp_path / "out.ipynb", "--no-progress-bar"],
                          cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    live = next(c for c in nbformat.read(tmp_path / "out.ipynb", 4).cells if "with live(" in c.source and c.cell_type == "code")
    assert any(o["output_type"] == "display_data" for o in live.outputs)


@pytest.mark.server
def test_papermill_alone_from_anywhere_into_s3(copy, tmp_path):
    for folder in (copy / ".stages").glob("tokens-*"): shutil.rmtree(folder)
    (tmp_path / "elsewhere").mkdir()
    with rclone(tmp_path / "served") as endpoint:
        (tmp_path / "served" / "bucket").mkdir()
        s3 = dict(AWS_ENDPOINT_URL=endpoint, AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1")
        done = papermill("tokens", "s3://bucket/runs/2_tokens.ipynb", "-f", ROOT / TINY_YAML, at=copy, cwd=tmp_path / "elsewhere", env=s3)
    assert done.returncode == 0, done.stderr
    executed = nbformat.read(tmp_path / "served/bucket/runs/2_tokens.ipynb", 4)
    assert any("image/svg+xml" in o.get("data", {}) for c in executed.cells for o in c.get("outputs", []))
    assert (copy / "tiny/2_tokens/stage.json").is_file() and not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.fault
@pytest.mark.parametrize("words, says", [
    (["-f", TINY_YAML, "-p", "trian", "3"], "trian: unknown key; did you mean train?"),
    (["-p", "trian", "3"], "trian: unknown key; did you mean train?"),
    (["-f", TINY_YAML, "-y", "train: {stepps: 3}"], "train.stepps: unknown key; did you mean steps?"),
    (["-f", "{tmp}/extra.yaml"], "extra: unknown key"),
    (["-f", TINY_YAML], "stage train reads stage ingest, which is not done with these settings and this code: run notebook 1_ingest.ipynb first"),
    (["-p", "run", "nobody"], "run 'nobody': no such run in {tmp}"),
])
def test_a_refusal_is_the_last_line_and_the_notebook_is_kept(tmp_path, words, says):
    (tmp_path / "extra.yaml").write_text((ROOT / TINY_YAML).read_text() + "extra: {a: 1}\n")
    done = papermill("train", tmp_path / "out.ipynb", *[w.replace("{tmp}", str(tmp_path)) for w in words], at=tmp_path / "o")
    assert done.returncode == 1 and says.format(tmp=tmp_path) in last_line(done), done.stderr
    errors = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert [e["ename"] for e in errors] == ["UserError"] and says.format(tmp=tmp_path) in errors[0]["evalue"]
    assert not list((tmp_path / "o").glob(".stages/*"))


def age(outputs: Path) -> None:
    "Make a run one that an older library made: other keys, other hashes of code; the links lead to it still."
    for i, stage in enumerate(STAGES, 1):
        link = outputs / "tiny" / f"{i}_{stage}"
        old = link.resolve()
        new = old.rename(old.with_name(f"{stage}-{'0' * 16}"))
        record = json.loads((new / "stage.json").read_text())
        record["code"]["runs.py"] = "of last year"
        (new / "stage.json").write_text(json.dumps(record))
        link.unlink()
        link.symlink_to(os.path.relpath(new, link.parent))


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_is_opened_by_its_name_and_left_as_it_is(copy, tmp_path, stage):
    age(copy)
    before = {p: p.lstat().st_mtime_ns for p in copy.rglob("*")}
    done = papermill(stage, tmp_path / "out.ipynb", "-p", "run", "tiny", at=copy)
    assert done.returncode == 0, done.stderr
    assert f"{stage} is done: {stage}-{'0' * 16}, shown as it was made; the library's code has changed since" in printed(nbformat.read(tmp_path / "out.ipynb", 4))
    assert before == {p: p.lstat().st_mtime_ns for p in copy.rglob("*")}


def test_a_run_that_today_s_library_made_needs_no_remark(tiny_run, tmp_path):
    done = papermill("tokens", tmp_path / "out.ipynb", "-p", "run", "tiny", at=tiny_run)
    said = printed(nbformat.read(tmp_path / "out.ipynb", 4))
    assert done.returncode == 0 and "tokens is done: tokens-" in said and "changed" not in said


BARS = """
import time
from domain_adapt.runs import progress
for i in progress(range(300), description="outer"):
    with progress(total=5, description="inner") as bar:
        for j in range(5): bar.update()
    time.sleep(.01)
"""


def test_the_bars_of_a_cell_are_one_display_that_is_empty_in_the_end():
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT), env={k: v for k, v in os.environ.items() if k != "DOMAIN_ADAPT_PROGRESS"})
    shown = []

    def note(message):
        assert message["msg_type"] != "stream", message["content"]
        if message["msg_type"] in ("display_data", "update_display_data"): shown.append((message["msg_type"], message["content"]))
    try: assert client.execute_interactive(BARS, timeout=120, output_hook=note)["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    kinds, contents = zip(*shown)
    texts = [c["data"]["text/plain"] for c in contents]
    assert [k for k in kinds if k == "display_data"] == ["display_data"] == [kinds[0]]
    assert len({c["transient"]["display_id"] for c in contents}) == 1
    assert any(re.search(r"outer:\s+\d+%.*\d+/300.*\ninner:.*/5", t) for t in texts) and texts[-1] == ""


@pytest.mark.parametrize("stage", STAGES)
def test_an_executed_notebook_keeps_no_bar(tiny_run, stage):
    notebook = nbformat.read(tiny_run / "tiny/notebooks" / notebook_path(stage).name, 4)
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    assert outputs and "widgets" not in notebook.metadata
    assert not [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {}) or "%|" in o.get("text", "")]
