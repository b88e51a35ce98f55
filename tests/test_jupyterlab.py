"""JupyterLab as a person uses it: a real server, a real browser, a stage notebook run by the menu."""
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from conftest import ROOT
from servers.s3 import free_ports, listens, wait
from test_browser import chromium    # noqa: F401  (a fixture)

pytestmark = pytest.mark.browser


@pytest.fixture
def copy(tiny_run, tmp_path) -> Path:
    return shutil.copytree(tiny_run, tmp_path / "outputs", symlinks=True)


@pytest.fixture
def lab(copy, tmp_path):
    "JupyterLab on copies of the notebooks, with a token, on loopback: its process, its address and its folder."
    folder, (port,) = shutil.copytree(ROOT / "nbs", tmp_path / "nbs"), free_ports(1)
    env = os.environ | {"DOMAIN_ADAPT_OUTPUTS": str(copy), "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTER_DATA_DIR": str(tmp_path / "data"),
                        "JUPYTER_TOKEN": "a-token-of-this-test"}
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url="]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", str(folder), *options], cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        wait(lambda: listens(f"http://127.0.0.1:{port}/api"), 60, "JupyterLab")
        yield psutil.Process(server.pid), f"http://127.0.0.1:{port}", folder
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired): server.wait(20)
        server.kill()
        server.wait()


@contextlib.contextmanager
def opened(browser, address: str, notebook: str):
    "A notebook in a tab of its own, once its kernel waits."
    context = browser.new_context(viewport=dict(width=1280, height=1000))
    tab = context.new_page()
    tab.goto(f"{address}/lab/tree/{notebook}?token=a-token-of-this-test")
    tab.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=90_000)
    tab.wait_for_selector("#jp-main-statusbar >> text=| Idle", timeout=90_000)    # connected, too
    yield tab
    context.close()


def run_all(tab) -> None:
    tab.click("text=Run >> nth=0")
    tab.click('[data-command="runmenu:run-all"]')


def saved(tab, path: Path, seconds: float = 240) -> list[dict]:
    "The code cells of the notebook on disk once the last of them has run."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        tab.keyboard.press("Control+s")
        tab.wait_for_timeout(1000)
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        if cells[-1]["execution_count"]: return cells
        wrong = [o["evalue"] for c in cells for o in c["outputs"] if o["output_type"] == "error"]
        assert not wrong, wrong
    raise TimeoutError(f"{path.name} was not over after {seconds} s")


def kernels(server: psutil.Process) -> list[psutil.Process]:
    return [p for p in server.children(recursive=True) if "domain_adapt.kernel" in p.cmdline()]


def test_the_evaluate_notebook_of_a_finished_run_by_hand(chromium, lab, copy, tmp_path):
    server, address, folder = lab
    before = {p: p.lstat().st_mtime_ns for p in copy.rglob("*")}
    with opened(chromium, address, "stages/5_evaluate.ipynb") as tab:
        line = tab.locator(".jp-CodeCell .cm-line", has_text="run = None").first
        line.click(click_count=3)
        tab.keyboard.insert_text('run = "tiny"\n')
        run_all(tab)
        cells = saved(tab, folder / "stages/5_evaluate.ipynb")
        assert all(c["execution_count"] for c in cells) and not [o for c in cells for o in c["outputs"] if o["output_type"] == "error"]
        assert any("evaluate is done: evaluate-" in "".join(o.get("text", "")) for c in cells for o in c["outputs"])
        drawn = tab.locator(".jp-RenderedSVG img").first
        drawn.scroll_into_view_if_needed()
        size = drawn.bounding_box()
        assert size["width"] > 300 and size["height"] > 60 and drawn.evaluate("i => i.complete && i.naturalWidth > 0")
        tab.screenshot(path=str(tmp_path / "evaluate.png"))
        kernel, = kernels(server)
        assert not kernel.net_connections("inet"), "the kernel opens no port"
    assert before == {p: p.lstat().st_mtime_ns for p in copy.rglob("*")}


def test_training_by_hand_shows_how_far_it_is(chromium, lab, copy, tmp_path):
    for gone in (copy / ".stages").glob("train-*"): shutil.rmtree(gone)
    _, address, folder = lab
    with opened(chromium, address, "stages/3_train.ipynb") as tab:
        run_all(tab)
        bar = tab.locator(".jp-OutputArea-output pre", has_text=re.compile(r"train:\s+\d+%"))
        bar.wait_for(timeout=120_000)
        tab.screenshot(path=str(tmp_path / "train.png"))
        cells = saved(tab, folder / "stages/3_train.ipynb")
        assert bar.count() == 0, "a bar goes when its work is done"
    work = next(c for c in cells if "work" in c["metadata"].get("tags", []))
    texts = ["".join(o["data"].get("text/plain", "")) for o in work["outputs"] if "data" in o]
    assert not any("train:" in t for t in texts) and len(work["outputs"]) <= 3
    assert (copy / "tiny/3_train/stage.json").is_file()
