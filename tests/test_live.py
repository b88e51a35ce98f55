"The loss figure below a running cell: one display that is updated, only where somebody watches."
import json
import os
import textwrap
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel

import made_run
from domain_adapt.figures import live
from domain_adapt.runs import ROOT, notebook_path

SETUP = """
import functools, json, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {tests!r})
import made_run
from domain_adapt import figures

class Stage:
    "Stands in for the train stage: training is a line of metrics every tenth of a second."
    params, complete, fails, folder = made_run.params(), False, False, Path({folder!r})
    lines = Path({lines!r}).read_text().splitlines(True)

    def run(self, work):
        assert threading.current_thread() is threading.main_thread()
        with (self.folder / "metrics.jsonl").open("w") as f:
            for line in self.lines[:16]:
                f.write(line[:9]); f.flush(); time.sleep(.05)    # the drawing may find half a line
                f.write(line[9:]); f.flush(); time.sleep(.05)
            if self.fails: raise ValueError("it stopped here")
            f.writelines(self.lines[16:])

stage = Stage()
figures.live = functools.partial(figures.live, every=.2)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    "A function that runs code in a real kernel and gives the reply and the displays: (kind, id, data)."
    folder = tmp_path_factory.mktemp("live")
    made_run._train(folder, np.random.default_rng(0))
    (folder / "metrics.jsonl").rename(folder / "lines")
    env = {k: v for k, v in os.environ.items() if k != "DOMAIN_ADAPT_PROGRESS"}
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT), env=env)

    def run(code: str) -> tuple[dict, list]:
        shown = []
        def note(message):
            kind, content = message["msg_type"], message["content"]
            if kind in ("display_data", "update_display_data"):
                shown.append((kind, content["transient"].get("display_id"), content["data"]))
            assert kind != "stream" or content["name"] != "stderr", content["text"]
        reply = client.execute_interactive(textwrap.dedent(code), timeout=120, output_hook=note)
        return reply["content"], shown

    reply, _ = run(SETUP.format(tests=str(ROOT / "tests"), folder=str(folder), lines=str(folder / "lines")))
    assert reply["status"] == "ok", reply
    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def work_cell() -> str:
    cells = json.loads(notebook_path("train").read_text())["cells"]
    return "".join(next(c for c in cells if "work" in c["metadata"].get("tags", []))["source"])


def test_the_work_cell_shows_one_picture_that_follows_training(kernel):
    reply, shown = kernel(work_cell())
    assert reply["status"] == "ok", reply
    kinds, ids, data = zip(*shown)
    assert kinds[0] == "display_data" and set(kinds[1:]) == {"update_display_data"} and len(kinds) > 2
    assert len(set(ids)) == 1 and ids[0]
    pictures = [d["image/svg+xml"] for d in data]
    assert len(set(pictures)) == len(pictures)                           # drawn only when something is new
    assert "skipped" not in pictures[0] and "skipped" in pictures[-1]    # the last tells of the whole file


def test_a_failure_ends_the_drawing_and_is_seen(kernel):
    reply, shown = kernel("stage.fails = True\nbefore = threading.active_count()\n" + work_cell())
    assert (reply["ename"], reply["evalue"]) == ("ValueError", "it stopped here")
    assert len({id for _, id, _ in shown}) == 1 and len(shown) > 2
    reply, shown = kernel("stage.fails = False; time.sleep(.5); assert threading.active_count() == before")
    assert reply["status"] == "ok" and not shown


@pytest.mark.parametrize("reason", ["import os; os.environ['DOMAIN_ADAPT_PROGRESS'] = '/dev/null'",
                                    "stage.complete = True"])
def test_nothing_is_drawn_where_nobody_watches_or_nothing_is_left_to_do(kernel, reason):
    reply, shown = kernel(reason + "\n" + work_cell())
    undone, _ = kernel("import os; os.environ.pop('DOMAIN_ADAPT_PROGRESS', None); stage.complete = False")
    assert reply["status"] == undone["status"] == "ok" and not shown


def test_a_figure_that_cannot_be_drawn_does_not_stop_training(kernel):
    reply, shown = kernel("""
        stage.lines[0], whole = '{"tokens": "none"}\\n', stage.lines[0]
        threading.excepthook, hook = lambda failure: print(failure.exc_type.__name__), threading.excepthook
        with figures.live(stage): stage.run(None)
        stage.lines[0], threading.excepthook = whole, hook
    """)
    assert reply["status"] == "ok" and not shown


def test_outside_a_kernel_nothing_is_drawn(tmp_path):
    before = threading.active_count()
    with live(SimpleNamespace(complete=False, folder=tmp_path), every=.01): during = threading.active_count()
    assert during == before
