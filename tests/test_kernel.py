"""A notebook's kernel: files in a folder of its owner, no port, whoever starts it."""
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.manager import KernelManager, start_new_kernel

from domain_adapt import kernel as ours
from domain_adapt.params import UserError
from domain_adapt.runs import ROOT

LOOK = """
import json, os, psutil
me = psutil.Process()
sockets = [c.laddr for c in me.net_connections("unix") if c.laddr]
print(json.dumps([len(me.net_connections("inet")), sorted(sockets)]))
"""


def run(client, code: str) -> str:
    "What code printed in a kernel."
    said = []
    hook = lambda m: said.append(m["content"]["text"]) if m["msg_type"] == "stream" else None
    reply = client.execute_interactive(code, timeout=60, output_hook=hook)
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(said)


def private(sockets: list[str]) -> Path:
    "The folder of a kernel's sockets, which only its owner may enter."
    folders = {Path(s).parent for s in sockets}
    assert len(sockets) >= 6 and len(folders) == 1, sockets
    folder = folders.pop().stat()
    assert stat.S_IMODE(folder.st_mode) == 0o700 and folder.st_uid == os.getuid()
    return Path(sockets[0]).parent


@pytest.fixture
def kernel():
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT))
    yield manager, client
    client.stop_channels()
    if manager.is_alive(): manager.shutdown_kernel(now=True)


def test_no_port_is_open_before_and_after_a_restart_and_nothing_is_left(kernel):
    manager, client = kernel
    for _ in range(2):
        ports, sockets = json.loads(run(client, LOOK))
        assert ports == 0
        folder = private(sockets)
        manager.restart_kernel(now=True)
        client.wait_for_ready(timeout=60)
    manager.shutdown_kernel()
    assert not folder.exists()


def test_a_forked_child_prints_into_the_notebook(kernel):
    _, client = kernel
    said = run(client, """
import os, sys, time
if not os.fork():
    print("from a child", flush=True)
    os._exit(0)
os.wait()
time.sleep(1)
""")
    assert "from a child" in said


def test_papermill_alone_opens_no_port(tmp_path):
    cells = [nbformat.v4.new_code_cell(LOOK)]
    kernelspec = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernelspec)), tmp_path / "look.ipynb")
    child = subprocess.Popen([sys.executable, "-m", "papermill", "look.ipynb", "out.ipynb"], cwd=tmp_path,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.wait(120) == 0, child.stdout.read()
    output, = nbformat.read(tmp_path / "out.ipynb", 4).cells[0].outputs
    ports, sockets = json.loads(output["text"])
    assert ports == 0 and not Path(sockets[0]).parent.exists()


def test_no_debugger_opens_a_port(kernel):
    manager, client = kernel
    assert "debugger" not in client.kernel_info(reply=True, timeout=60)["content"]["supported_features"]
    start = dict(type="request", seq=1, command="initialize", arguments=dict(adapterID="python", pathFormat="path"))
    client.control_channel.send(client.session.msg("debug_request", start))
    while client.get_control_msg(timeout=60)["msg_type"] != "debug_reply": pass
    assert not psutil.Process(manager.provisioner.pid).net_connections("inet")


@pytest.mark.fault
def test_folders_that_are_not_the_kernel_s_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.txt").write_text("years of work")
    manager = KernelManager(kernel_name="python3", transport="ipc")
    manager.start_kernel()
    manager.shutdown_kernel(now=True)
    assert Path(manager.ip).parent.resolve() == tmp_path    # Jupyter's default is the current folder
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_is_short_whatever_the_environment_says(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = ours.private_folder()
    try: assert folder.parent == Path("/tmp") and len(str(folder / "k-2-pipe")) <= 107
    finally: folder.rmdir()


def test_without_any_folder_it_says_so(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="TMPDIR"): ours.private_folder()
