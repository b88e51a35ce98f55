"""Real S3 servers on loopback: rclone (from PyPI), and Ceph's gateway where it is installed."""
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

KEY, SECRET = "test", "testtest"


def free_ports(n: int) -> list[int]:
    "Ports that nothing listens on."
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets: s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def wait(answers, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not answers():
        if time.monotonic() > end: raise TimeoutError(f"{what} did not come up")
        time.sleep(.1)


def listens(url: str) -> bool:
    try: urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError: return True
    except OSError: return False
    return True


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[str]:
    "rclone serving a folder; yields its endpoint. It knows no conditional writes."
    port, = free_ports(1)
    program = shutil.which("rclone") or str(Path(sys.executable).parent / "rclone")
    folder.mkdir(parents=True, exist_ok=True)
    server = subprocess.Popen([program, "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", f"127.0.0.1:{port}", str(folder)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"RCLONE_CONFIG": os.devnull})
    try:
        wait(lambda: listens(f"http://127.0.0.1:{port}"), 20, "rclone")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def has_ceph() -> bool: return all(shutil.which(p) for p in ("ceph", "ceph-mon", "ceph-osd", "radosgw", "monmaptool"))


CEPH = """[global]
fsid = {fsid}
mon host = [v1:127.0.0.1:{mon}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon data avail crit = 0
mon max pg per osd = 1000
log file = {at}/log/$name.log
admin socket = {at}/run/$name.asok
pid file = {at}/run/$name.pid
run dir = {at}/run
crash dir = {at}/log
keyring = {at}/keyring
[mon.a]
mon data = {at}/mon
[osd]
osd objectstore = memstore
memstore device bytes = 1073741824
osd data = {at}/osd
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {at}/rgw
rgw thread pool size = 16
"""


@contextlib.contextmanager
def ceph(folder: Path) -> Iterator[str]:
    """One Ceph monitor, one store in memory and a gateway; yields the endpoint. About ten seconds.

    On a busy machine the store may register before it was told the cluster's id and is refused; a new cluster is made then."""
    for attempt in range(5):
        at = folder / str(attempt)
        try: endpoint = _start(at)
        except (RuntimeError, TimeoutError, subprocess.SubprocessError):
            _stop(at)
            if attempt == 4: raise
            continue
        try: yield endpoint
        finally: _stop(at)
        return


def _start(folder: Path) -> str:
    for name in ("mon", "osd", "rgw", "log", "run"): (folder / name).mkdir(parents=True)
    (folder / "keyring").touch()
    mon, port = free_ports(2)
    config, fsid = folder / "ceph.conf", str(uuid.uuid4())
    config.write_text(CEPH.format(fsid=fsid, at=folder, mon=mon, port=port))

    def do(*command: str) -> str:
        done = subprocess.run([command[0], "-c", str(config), *command[1:]], capture_output=True, text=True, timeout=120)
        if done.returncode: raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def answers() -> bool:
        return subprocess.run(["ceph", "-c", str(config), "--connect-timeout", "5", "osd", "dump"], capture_output=True).returncode == 0

    subprocess.run(["monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[v1:127.0.0.1:{mon}]", str(folder / "monmap")],
                   check=True, capture_output=True)
    do("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(folder / "monmap"))
    do("ceph-mon", "-i", "a")
    wait(answers, 60, "Ceph's monitor")
    do("ceph", "osd", "new", str(uuid.uuid4()))
    osd = json.loads(do("ceph", "osd", "dump", "-f", "json"))["osds"][0]["uuid"]
    do("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    do("ceph-osd", "-i", "0")
    do("radosgw", "-n", "client.rgw")
    wait(lambda: listens(f"http://127.0.0.1:{port}"), 120, "Ceph's gateway")
    do("radosgw-admin", "user", "create", "--uid=test", "--display-name=test", f"--access-key={KEY}", f"--secret-key={SECRET}")
    return f"http://127.0.0.1:{port}"


def _stop(folder: Path) -> None:
    for name in ("client.rgw", "osd.0", "mon.a"): stop(folder / "run" / f"{name}.pid")


def stop(pid_file: Path) -> None:
    "End the daemon whose number a file holds, and wait for it."
    if not pid_file.is_file() or not (pid := pid_file.read_text().strip()): return
    for number in (15, 9):
        with contextlib.suppress(ProcessLookupError): os.kill(int(pid), number)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try: state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError: return
            if state == "Z": return
            time.sleep(.1)
