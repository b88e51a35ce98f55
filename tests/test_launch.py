"The launchers: the job's file, and real jobs on a Slurm of two nodes whose processes are killed, stopped and cancelled."
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from test_train import write_tokens

from domain_adapt import launch
from domain_adapt.params import Params, UserError, load_params, validate

ROOT = Path(__file__).resolve().parent.parent
STEPS = 40


def params(**train) -> Params:
    return validate(dict(run="example", model="m", corpora={"sec": dict(kind="domain", source="sec", path="sec")}, tokens={"replay": 0},
                         merge={"candidates": [dict(name="half", method="linear", weight=0.5)]}, train=train))


# ---- the file

def directives(text: str) -> dict[str, str]:
    return dict((line[len("#SBATCH --"):] + "=").split("=", 1) for line in text.splitlines() if line.startswith("#SBATCH"))


def test_the_file_asks_for_what_the_params_say(tmp_path):
    text = launch.script(params(launcher="slurm", nodes=16, processes=8, job=dict(
        partition="gpu", time="3-00:00:00", signal_before=600, restarts=7, setup=["module load cuda", "export A=1"],
        options={"account": "lab", "mem": "0", "gpus-per-node": "h100:8", "exclusive": ""})), tmp_path / "train-0123")
    asked = directives(text)
    assert asked["nodes"] == "16=" and asked["ntasks-per-node"] == "1=" and asked["gpus-per-node"] == "h100:8="
    assert asked["signal"] == "USR1@600=" and asked["requeue"] == ""
    assert asked["job-name"] == "domain-adapt-train-0123=" and asked["output"] == f"{tmp_path}/train-0123/log.txt=" and asked["chdir"] == f"{tmp_path}/train-0123="
    assert asked["open-mode"] == "append=" and asked["time"] == "3-00:00:00=" and asked["partition"] == "gpu="
    assert asked["account"] == "lab=" and asked["mem"] == "0=" and asked["exclusive"] == ""
    assert "\nprocesses=8\n" in text and "\nrestarts=7\n" in text and "    module load cuda\n    export A=1\n" in text


HOSTILE = ["$(touch pwned)", "`touch pwned`", "a b;touch pwned", "it's", 'say "hi" # no', "$HOME", "-n", "%j"]


@pytest.mark.fault
@pytest.mark.parametrize("value", HOSTILE)
def test_no_value_of_the_yaml_is_run(tmp_path, value):
    "Variables come out of bash as they went in, in a folder of the same name; sbatch's own reading of quotes is tested below."
    out = tmp_path / value / "train-0123"
    out.mkdir(parents=True)
    text = launch.script(params(launcher="hyperpod", nodes=2, job=dict(partition=value, options={"comment": value})), out)
    head = text[:text.index("# What every node runs")] + 'printf %s "$work"; touch ran'
    done = subprocess.run(["bash", "-c", head], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == launch.work_command(out) and {p.name for p in tmp_path.iterdir()} == {"ran", value}
    compile(done.stdout, "work", "exec")


@pytest.mark.fault
@pytest.mark.parametrize("job, why", [
    (dict(options={"comment": "a\n#SBATCH --uid=0"}), "comment"), (dict(partition="a\nb"), "partition"), (dict(time="1\\"), "time"),
    (dict(options={"job-name": "x"}), "job-name"), (dict(options={"signal": "USR1@5"}), "signal"), (dict(options={"uid=0 --x": "1"}), "uid"),
    (dict(options={"J": "x"}), "J"), (dict(setup=["if true"]), "bash"), (dict(setup=["}", "echo {"]), "bash"), (dict(setup=["cat <<X"]), "bash")])
def test_what_would_be_misread_is_refused(tmp_path, job, why):
    with pytest.raises(UserError, match=f"train.job.*{why}"): launch.script(params(launcher="slurm", job=job), tmp_path)


def test_hyperpod_resumes_the_step_in_an_allocation_of_its_own(tmp_path):
    plain, pod = (launch.script(params(launcher=name, nodes=4, processes=8), tmp_path) for name in ("slurm", "hyperpod"))
    assert "exclusive" in directives(pod) and "exclusive" not in directives(plain)
    new = [line for line in pod.splitlines() if line not in plain.splitlines()]
    assert new == ["#SBATCH --exclusive", "auto_resume=--auto-resume=1"]
    node = pod[pod.index("node() {"):pod.index("export package")]    # after a node was replaced only the step's own list is right
    assert "SLURM_STEP_NODELIST" in node and "SLURM_JOB_NODELIST" not in node and "    setup\n" in node


@pytest.mark.fault
def test_sums_that_do_not_work_out_are_refused():
    for train, why in [(dict(processes=3), "global_batch: 4 .* 4 x 3"), (dict(processes=4, layout=dict(pp=3)), "pp 3 .* = 3 does not divide .* = 4"),
                       (dict(processes=4, layout=dict(tp=2), micro_batch=4), "4 x 2 data-parallel")]:
        with pytest.raises(UserError, match=why): launch.check_layout(params(**train).train)


# ---- the command

@pytest.mark.parametrize("launcher", ["slurm", "hyperpod"])
def test_launch_writes_the_job_and_sends_nothing(cli, tmp_path, launcher):
    asked = ["launch", "params/tiny.yaml", "--set", f"train.launcher={launcher}"]
    done = cli(*asked, env={"DOMAIN_ADAPT_OUTPUTS": str(tmp_path), "PATH": "/usr/bin:/bin"})
    file = Path(done.stdout.strip())
    assert done.returncode == 0 and file.name == "train.sbatch" and file.parent == (tmp_path / "tiny" / "3_train").resolve(), done.stderr
    assert f"--job-name=domain-adapt-{file.parent.name}\n" in file.read_text() and subprocess.run(["bash", "-n", file]).returncode == 0
    assert [p.name for p in file.parent.iterdir()] == ["train.sbatch"] and "not yet to be sent" in done.stderr


@pytest.mark.fault
def test_launch_refuses_what_cannot_be_sent(cli, tmp_path):
    env = {"DOMAIN_ADAPT_OUTPUTS": str(tmp_path)}
    for more, why in [((), "error: train.launcher: local starts no job; set slurm or hyperpod"),
                      (("--set", "train.launcher=slurm", "--submit"), "error: stage train reads stage ingest, which is not done"),
                      (("--set", "train.launcher=slurm", "--set", "train.nodes=3"), "error: train.global_batch: ")]:
        done = cli("launch", "params/tiny.yaml", *more, env=env)
        assert done.returncode == 2 and done.stderr.startswith(why), done.stderr


# ---- on this machine

START = '''
import json, sys
from pathlib import Path
from domain_adapt import launch
from domain_adapt.params import validate
launch.ROOT, out = Path(sys.argv[1]), Path(sys.argv[2])
try: launch.local(validate(json.loads((out / "job.json").read_text())["params"]), out)
except Exception as e: sys.exit(f"{type(e).__name__}: {e}")
'''


def start(one: "Standin") -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", START, str(one.package), str(one.out)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_processes_here(tmp_path):
    one = Standin(tmp_path, launcher="local")
    child = start(one)
    error = child.communicate(timeout=300)[1]
    assert child.returncode == 0 and one.result == dict(step=STEPS, total=2 * sum(range(1, STEPS + 1)), world=2), error
    assert f"{STEPS}/{STEPS}" in error


@pytest.mark.fault
@pytest.mark.parametrize("how", [signal.SIGTERM, "stop"])
def test_asked_to_stop_it_saves_and_goes_on_from_there(tmp_path, how):
    one = Standin(tmp_path, steps=60, launcher="local")
    child = start(one)
    wait(lambda: one.step >= 7)
    (one.out / "stop").touch() if how == "stop" else child.send_signal(how)
    error = child.communicate(timeout=200)[1]
    saved = json.loads((one.out / "checkpoints" / "latest.json").read_text())["step"]
    assert child.returncode == 1 and f"Stopped: training was stopped and is saved at step {saved}; run again" in error and 7 <= saved < 60
    child = start(one)
    error = child.communicate(timeout=200)[1]
    assert one.result == dict(step=60, total=2 * sum(range(1, 61)), world=2) and not (one.out / "stop").exists(), error
    steps = [json.loads(line)["step"] for line in (one.out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61)) and re.search(rf"train: .* {saved}/60", error)


@pytest.mark.fault
@pytest.mark.parametrize("how", ["SIGKILL", "twice", "patience"])
def test_no_process_outlives_its_parent(tmp_path, how):
    "The processes here do not listen, so that asking once would wait for `signal_before` seconds."
    one = Standin(tmp_path, steps=5000, launcher="local", signal_before=2 if how == "patience" else 60)
    (one.out / "deaf").touch()
    child = start(one)
    wait(lambda: one.step >= 3)
    children = psutil.Process(child.pid).children(recursive=True)
    assert len(children) == 3    # torchrun and its two
    child.send_signal(signal.SIGKILL if how == "SIGKILL" else signal.SIGTERM)
    if how == "twice":
        wait(lambda: (one.out / "stop").exists())
        child.send_signal(signal.SIGTERM)
    error = child.communicate(timeout=120)[1]
    assert not psutil.wait_procs(children, timeout=30)[1]
    assert {"SIGKILL": child.returncode == -9, "twice": "KeyboardInterrupt" in error, "patience": "Stopped: training was stopped before it could save" in error}[how], error


@pytest.mark.fault
def test_what_went_wrong_over_there_is_told_here(tmp_path):
    one = Standin(tmp_path, launcher="local")
    (one.out / "fail").write_text("model: is odd")
    assert start(one).communicate(timeout=200)[1].splitlines()[-1] == "UserError: model: is odd"
    (one.out / "fail").unlink()
    (one.out / "die-0-3").touch()
    (one.out / "die-1-3").touch()
    error = start(one).communicate(timeout=200)[1]
    assert "RuntimeError: training ended with code 1 and no message; if the kernel killed it" in error and "SIGKILL" in error
    assert start(one).wait(200) == 0 and one.result["total"] == 2 * sum(range(1, STEPS + 1))


# ---- a Slurm of two nodes

@pytest.fixture
def cluster(slurm_here, monkeypatch):
    for key, value in slurm_here.items(): monkeypatch.setenv(key, value)
    monkeypatch.setattr(launch, "POLL", 0.5)
    yield
    subprocess.run(["scancel", "--me"])
    wait(lambda: not subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout.strip(), 60)


def wait(holds, seconds: float = 180):
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, holds
        time.sleep(0.1)
    return found


def behind(work) -> tuple[threading.Thread, list]:
    errors = []
    def one():
        try: work()
        except BaseException as e: errors.append(e)
    thread = threading.Thread(target=one)
    thread.start()
    return thread, errors


def hurry(out: Path, over: threading.Event) -> None:
    "Let a job that was put back into the queue start after two seconds (credentials count in whole ones), not after Slurm's 121."
    while not over.wait(0.5):
        for job, (_, reason) in (launch.jobs(out) or {}).items():
            if reason == "BeginTime" and not over.wait(2):
                subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], stderr=subprocess.DEVNULL)


class Standin:
    "A folder whose processes run tests/standin_work.py in place of the trainer: two, on one node each with Slurm."
    def __init__(self, folder: Path, steps: int = STEPS, launcher: str = "slurm", **job):
        self.out, self.package = folder / "train-0123", folder / "package"
        (self.package / "domain_adapt").mkdir(parents=True)
        self.out.mkdir()
        (self.package / "domain_adapt" / "__init__.py").touch()
        (self.package / "domain_adapt" / "train.py").write_text((ROOT / "tests" / "standin_work.py").read_text())
        setup = [f"package={shlex.quote(str(self.package))}", "export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1"]
        job = dict(partition="main", time="10", gpus=False, signal_before=60, setup=setup) | job
        size = dict(processes=2) if launcher == "local" else dict(nodes=2)
        self.params = params(launcher=launcher, steps=steps, global_batch=8, job=job, **size)
        (self.out / "job.json").write_text(json.dumps(dict(params=self.params.model_dump(mode="json"), out=str(self.out))))

    def run(self) -> None:
        "Send and follow; a thread sees to it that no restart waits."
        over = threading.Event()
        thread = threading.Thread(target=hurry, args=(self.out, over))
        thread.start()
        try: launch.slurm(self.params, self.out)
        finally: over.set(); thread.join()

    @property
    def job(self) -> str: return json.loads((self.out / "slurm.json").read_text())["job"]
    @property
    def step(self) -> int: return launch.step_done(self.out)
    @property
    def result(self) -> dict: return json.loads((self.out / "result.json").read_text())
    @property
    def log(self) -> str: return (self.out / "log.txt").read_text()


@pytest.mark.server
def test_a_job_on_two_nodes_is_sent_followed_and_done_once(cluster, tmp_path, monkeypatch):
    "In a folder, and with a comment, that sbatch and two shells have to read as they are; from inside a job that had more."
    for wish, value in dict(CPUS_PER_TASK="64", MEM_PER_CPU="9999999", NTASKS="7").items(): monkeypatch.setenv(f"SLURM_{wish}", value)
    name = """it's "x" #1 %j $(touch pwned)"""
    one = Standin(tmp_path / name, options={"comment": name})
    one.run()
    told = subprocess.run(["scontrol", "show", "job", one.job], capture_output=True, text=True).stdout
    assert f"Comment={name} " in told and f"WorkDir={one.out}\n" in told and not list(tmp_path.rglob("pwned"))
    assert one.result == dict(step=STEPS, total=2 * sum(range(1, STEPS + 1)), world=2) and one.log.count("starts on") == 1
    job = one.job
    one.run()
    assert one.job == job and one.log.count("starts on") == 1


@pytest.mark.server
@pytest.mark.fault
def test_a_killed_rank_puts_the_job_back_and_it_ends_as_it_would_have(cluster, tmp_path):
    one = Standin(tmp_path)
    (one.out / "die-1-17").touch()
    one.run()
    assert one.result == dict(step=STEPS, total=2 * sum(range(1, STEPS + 1)), world=2)
    assert one.log.count("starts on") == 2 and "restart 1" in one.log


@pytest.mark.server
@pytest.mark.fault
def test_time_nearly_up_saves_and_goes_on(cluster, tmp_path):
    "The limit is moved to the end of the running minute, which is nearer than `signal_before`, and back for the restart."
    one = Standin(tmp_path, steps=300)
    def limit(minutes: int): subprocess.run(["scontrol", "update", f"jobid={one.job}", f"TimeLimit={minutes}"], check=True)
    thread, errors = behind(one.run)
    wait(lambda: one.step >= 7)
    elapsed = subprocess.run(["squeue", "-h", "-j", one.job, "-o", "%M"], capture_output=True, text=True).stdout
    limit(int(elapsed.split(":")[0]) + 1)
    wait(lambda: "restarting" in one.log)
    limit(10)
    assert json.loads((one.out / "stopped.json").read_text())["signal"] == signal.SIGUSR1
    thread.join(300)
    assert not errors and one.result == dict(step=300, total=2 * sum(range(1, 301)), world=2)
    assert one.log.count("starts on") == 2 and "SIGKILL" not in one.log


@pytest.mark.server
@pytest.mark.fault
def test_a_job_that_is_there_is_found_though_its_sender_was_killed(cluster, tmp_path, monkeypatch):
    one = Standin(tmp_path)
    class Killed(BaseException): pass
    def die(*_): raise Killed
    with monkeypatch.context() as m:
        m.setattr(launch, "write_json", die)
        with pytest.raises(Killed): launch.slurm(one.params, one.out)
    assert not (one.out / "slurm.json").exists() and len(launch.jobs(one.out)) == 1
    one.run()
    assert one.result["step"] == STEPS and one.log.count("starts on") == 1 and list(launch.jobs(one.out)) == [one.job]


@pytest.mark.server
@pytest.mark.fault
def test_looking_away_leaves_the_job_alone(cluster, tmp_path):
    one = Standin(tmp_path)
    thread, errors = behind(one.run)
    wait(lambda: one.step >= 3)
    (one.out / "stop").touch()
    thread.join()
    assert isinstance(errors[0], launch.Stopped) and f"Slurm job {one.job} goes on" in str(errors[0])
    job = one.job
    one.run()
    assert one.job == job and one.result["step"] == STEPS and one.log.count("starts on") == 1


@pytest.mark.server
@pytest.mark.fault
def test_a_cancelled_job_is_told_and_stays_cancelled(cluster, tmp_path):
    one = Standin(tmp_path, steps=5000)
    thread, errors = behind(one.run)
    wait(lambda: one.step >= 7)
    subprocess.run(["scancel", one.job], check=True)
    thread.join()
    assert isinstance(errors[0], UserError) and re.search(rf"Slurm job {one.job} was cancelled at step \d+; run again to go on", str(errors[0]))
    assert "restarting" not in one.log and json.loads((one.out / "checkpoints" / "latest.json").read_text())["step"] >= 5


@pytest.mark.server
@pytest.mark.fault
def test_what_the_user_must_mend_is_not_tried_again(cluster, tmp_path):
    one = Standin(tmp_path)
    (one.out / "fail").write_text('model: its "kind": "odd"')
    with pytest.raises(UserError, match='^model: its "kind": "odd"$'): one.run()
    assert one.log.count("starts on") == 1 and "error.json says what to mend" in one.log
    (one.out / "fail").unlink()
    one.run()
    assert one.result["step"] == STEPS


@pytest.mark.server
@pytest.mark.fault
def test_starts_that_bring_nothing_end(cluster, tmp_path):
    one = Standin(tmp_path, setup=["echo nothing is here; exit 3"])
    with pytest.raises(RuntimeError, match=r"Slurm job \d+ ended \(failed NonZeroExitCode\) at step 0(.|\n)*nothing is here(.|\n)*3 starts running"): one.run()
    assert one.log.count("starts on") == 3


@pytest.mark.server
@pytest.mark.fault
def test_what_slurm_refuses_is_told(cluster, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="sbatch took no job .*partition"): Standin(tmp_path / "a", partition="nowhere").run()
    with pytest.raises(UserError, match=r"would never start \(PartitionTimeLimit\)"): Standin(tmp_path / "b", time="9-00:00:00").run()
    one = Standin(tmp_path / "c")
    launch.write_script(one.params, one.out)
    with monkeypatch.context() as m, pytest.raises(UserError, match="no squeue on this machine"):
        m.setenv("PATH", str(tmp_path))
        launch.submit(one.out)


# ---- the trainer itself

REAL = ("train.steps=200", "train.max_epochs=100", "train.warmup=2", "train.precision=fp32", "train.global_batch=4", "train.micro_batch=2", "train.lr=0.003",
        "train.export_at=[1.0]", "train.save.every=20", "train.validation.every=200", "train.validation.tokens=300")
ON_NODES = ("train.launcher=slurm", "train.nodes=2", "train.job.gpus=false", "train.job.time='10'",
            "train.job.setup=[export GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1]")


def bytes_of(out: Path) -> dict[str, bytes]: return {p.name: p.read_bytes() for p in sorted((out / "hf" / "step_200").iterdir())}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path: return write_tokens(tmp_path_factory.mktemp("run") / "tokens")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_llama, tokens) -> Path:
    "Two processes on this machine."
    out = tmp_path_factory.mktemp("uninterrupted")
    launch.train(load_params(ROOT / "params" / "tiny.yaml", (f"model={tiny_llama}", *REAL, "train.processes=2")), {"tokens": tokens}, out)
    return out


def rank(out: Path, n: int) -> psutil.Process | None:
    "The process of rank `n` that works in `out`."
    for p in psutil.process_iter(["cmdline", "environ"]):
        if p.info["environ"] and str(out / "job.json") in " ".join(p.info["cmdline"] or []) and p.info["environ"].get("RANK") == str(n): return p


@pytest.mark.server
@pytest.mark.fault
@pytest.mark.equality
def test_two_nodes_with_a_rank_killed_end_with_the_same_model(cluster, tiny_llama, tokens, uninterrupted, tmp_path):
    out, over = tmp_path / "train-0123", threading.Event()
    out.mkdir()
    p = load_params(ROOT / "params" / "tiny.yaml", (f"model={tiny_llama}", *REAL, *ON_NODES))
    thread, errors = behind(lambda: launch.train(p, {"tokens": tokens}, out))
    pusher = threading.Thread(target=hurry, args=(out, over))
    pusher.start()
    try:
        wait(lambda: launch.step_done(out) >= 50, 300)
        rank(out, 1).kill()
        thread.join(300)
    finally: over.set(); pusher.join()
    assert not errors and (out / "log.txt").read_text().count("starts on") == 2
    assert bytes_of(out) == bytes_of(uninterrupted)
    assert (out / "mixture.csv").read_bytes() == (uninterrupted / "mixture.csv").read_bytes()


@pytest.mark.fault
@pytest.mark.equality
def test_stopped_here_it_ends_with_the_same_model(tiny_llama, tokens, uninterrupted, tmp_path):
    p = load_params(ROOT / "params" / "tiny.yaml", (f"model={tiny_llama}", *REAL, "train.processes=2"))
    thread, errors = behind(lambda: launch.train(p, {"tokens": tokens}, tmp_path))
    wait(lambda: launch.step_done(tmp_path) >= 7)
    (tmp_path / "stop").touch()
    thread.join(300)
    assert isinstance(errors[0], launch.Stopped) and 7 <= json.loads((tmp_path / "stopped.json").read_text())["step"] < 200
    launch.train(p, {"tokens": tokens}, tmp_path)
    assert bytes_of(tmp_path) == bytes_of(uninterrupted)


@pytest.mark.fault
def test_the_command_line_ends_with_75_when_training_was_stopped(cli, tmp_path):
    words, env = ("train", "params/tiny.yaml", "--set", "train.steps=2000", "--set", "train.max_epochs=1000"), {"DOMAIN_ADAPT_OUTPUTS": str(tmp_path)}
    child = subprocess.Popen([sys.executable, "-m", "domain_adapt.cli", *words], cwd=ROOT, env=os.environ | env, text=True, stderr=subprocess.PIPE)
    out = tmp_path / "tiny" / "3_train"
    wait(lambda: launch.step_done(out) >= 5, 400)
    children = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGTERM)
    error = child.communicate(timeout=300)[1]
    saved = json.loads((out / "stopped.json").read_text())["step"]
    assert child.returncode == 75 and f"training was stopped and is saved at step {saved}; run again" in error and "error:" not in error
    assert not psutil.wait_procs(children, timeout=20)[1] and (out / "checkpoints" / "latest.json").exists()
