"""A real Slurm on loopback: a controller and two nodes, in a folder of their own."""
import contextlib
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from servers.s3 import free_ports, stop, wait


def has_slurm() -> bool:
    return os.geteuid() == 0 and all(shutil.which(p) for p in ("slurmctld", "slurmd", "munged", "sbatch", "squeue"))


CONFIG = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctl}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={at}/run/munge.socket
CredType=cred/munge
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool-%n
SlurmctldPidFile={at}/run/slurmctld.pid
SlurmdPidFile={at}/run/slurmd-%n.pid
SlurmctldLogFile={at}/log/slurmctld.log
SlurmdLogFile={at}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
FirstJobId={first}
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
JobRequeue=1
KillWait=5
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=2 RealMemory=16000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=2 RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=2-00:00:00 State=UP
"""


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    "A cluster of the nodes n1 and n2 with the partition `main`; yields the environment that finds it."
    for name in ("state", "log", "run", "spool-n1", "spool-n2"): (folder / name).mkdir(parents=True)
    for at in (folder, folder / "run"): at.chmod(0o755)
    (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge.key").chmod(0o600)
    ctl, one, two = free_ports(3)
    (folder / "slurm.conf").write_text(CONFIG.format(host=socket.gethostname().partition(".")[0], at=folder, ctl=ctl, one=one, two=two, first=secrets.randbelow(14000) + 1))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def do(*command: str) -> str:
        return subprocess.run(command, env=os.environ | environment, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True, timeout=30).stdout

    try:
        do("munged", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/run/munge.socket", f"--pid-file={folder}/run/munged.pid",
           f"--log-file={folder}/log/munged.log", f"--seed-file={folder}/run/munged.seed")
        do("slurmctld", "-i")
        for node in ("n1", "n2"): do("slurmd", "-N", node)
        wait(lambda: do("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 30, "Slurm")
        yield environment
    finally:
        with contextlib.suppress(subprocess.SubprocessError): do("scancel", "-u", "root")
        for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged"): stop(folder / "run" / f"{name}.pid")
