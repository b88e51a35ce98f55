"""The whole chain by the command line, as a user runs it, and everything that can go wrong on the way."""
import contextlib
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from conftest import CSVS, ROOT, TINY_YAML, stages
from domain_adapt.runs import RESUMED, STAGES
from servers.hub_upload import Upload



@pytest.fixture
def copy(tiny_run, tmp_path) -> Path:
    shutil.copytree(tiny_run, tmp_path / "outputs", symlinks=True)
    return tmp_path / "outputs"


def at(outputs: Path) -> dict[str, str]:
    return {"DOMAIN_ADAPT_OUTPUTS": str(outputs)}


def kept(outputs: Path) -> list[str]: return json.loads((outputs / "tiny/4_merge/selection.json").read_text())["kept"]


def test_a_run_leaves_what_the_contract_says(tiny_run):
    run = tiny_run / "tiny"
    for name, columns in CSVS.items():
        frame = pd.read_csv(run / name)
        assert ",".join(frame.columns[:columns.count(",") + 1]) == columns, name
        assert len(frame) and (name == "4_merge/sweep.csv" or len(frame.columns) == columns.count(",") + 1), name
    lines = [json.loads(line) for line in (run / "3_train/metrics.jsonl").read_text().splitlines()]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "heldout/sec"} <= {k for x in lines for k in x}
    for name in ("params.yaml", "summary.json", "6_report/index.html", "4_merge/geometry.csv", "2_tokens/sec_train.bin", "2_tokens/sec_heldout.idx",
                 "1_ingest/dropped", "3_train/checkpoints", "3_train/hf/step_4", "3_train/hf/step_8", f"4_merge/{kept(tiny_run)[0]}/config.json", "5_evaluate/samples"):
        assert (run / name).exists(), name
    manifest = json.loads((run / "manifest.json").read_text())
    assert list(manifest["stages"]) == list(STAGES)
    assert {p.name.split("-")[0] for p in (tiny_run / ".stages").iterdir()} == {*STAGES, ".locks"}, "a stage writes its own folder only"
    for i, stage in enumerate(STAGES, 1):
        assert (run / f"{i}_{stage}").resolve() == (tiny_run / manifest["stages"][stage]["folder"]).resolve()
        assert (run / "notebooks" / f"{i}_{stage}.ipynb").exists()


def test_variants_and_training_are_what_was_asked(tiny_run):
    run = tiny_run / "tiny"
    variants = set(pd.read_csv(run / "5_evaluate/perplexity.csv").variant)
    assert variants == {"original", "cpt@4", "cpt", *(f"merge:{n}" for n in kept(tiny_run))}
    perplexity = pd.read_csv(run / "5_evaluate/perplexity.csv")
    assert (perplexity.ci_low <= perplexity.bits_per_byte).all() and (perplexity.bits_per_byte <= perplexity.ci_high).all()
    domain = perplexity[(perplexity.kind == "domain") & (perplexity.half == "all")].set_index("variant").bits_per_byte
    assert domain["cpt"] < domain["cpt@4"] < domain["original"]
    benchmarks = pd.read_csv(run / "5_evaluate/benchmarks.csv")
    assert set(benchmarks.variant) == {"original", "cpt", *(f"merge:{n}" for n in kept(tiny_run))}


def test_a_second_run_does_nothing(copy, cli):
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}
    done = cli("run", TINY_YAML, env=at(copy))
    assert set(stages(done.stdout).values()) == {"up to date"}, done.stdout + done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file()}


def test_an_edit_of_merge_reruns_merge_evaluate_and_report(copy, cli):
    done = cli("run", TINY_YAML, "--set", "merge.select.keep=1", env=at(copy))
    said = stages(done.stdout)
    assert [s for s in STAGES if said[s] == "done"] == ["merge", "evaluate", "report"], done.stdout + done.stderr
    assert [s for s in STAGES if said[s] == "up to date"] == ["ingest", "tokens", "train"]
    assert len(list((copy / ".stages").glob("merge-*"))) == 2, "an older result is never overwritten"


def descendants(marker: str) -> list[str]:
    "Command lines of the processes whose environment holds `marker`."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker.encode() in (p / "environ").read_bytes() and (p / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append((p / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def start(outputs: Path, stage: str) -> subprocess.Popen:
    "A run that does `stage` again, waited for until its folder is there and unfinished."
    for folder in (outputs / ".stages").glob(f"{stage}-*"): shutil.rmtree(folder)
    child = subprocess.Popen([sys.executable, "-m", "domain_adapt.cli", "run", TINY_YAML], cwd=ROOT, env=os.environ | at(outputs),
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(900):
        if list((outputs / ".stages").glob(f"{stage}-*")): break
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.1)
    time.sleep(0.3)
    assert not list((outputs / ".stages").glob(f"{stage}-*/stage.json")), f"{stage} was over before it could be stopped"
    return child


def gone(marker: str) -> bool:
    for _ in range(300):
        if not descendants(marker): return True
        time.sleep(0.1)
    return False


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "merge", "evaluate"])
def test_ctrl_c_leaves_nothing_half_made(copy, stage):
    child = start(copy, stage)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == (75 if stage == "train" else 130) and "stopped" in said and "Traceback" not in said, said
    assert left(copy) == []
    assert gone(str(copy)), descendants(str(copy))


@pytest.mark.fault
@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_next(copy, tiny_run, cli):
    child = start(copy, "train")
    child.kill()
    child.wait()
    assert gone(str(copy)), descendants(str(copy))
    done = cli("run", TINY_YAML, env=at(copy))
    assert done.returncode == 0 and stages(done.stdout)["train"] == "done", done.stdout + done.stderr
    for name in CSVS: assert filecmp.cmp(tiny_run / "tiny" / name, copy / "tiny" / name, shallow=False), name


@pytest.mark.fault
@pytest.mark.slow
def test_two_runs_of_one_stage_at_once(copy, cli):
    child = start(copy, "train")
    first = psutil.Process(child.pid)
    tree = [first, *first.children(recursive=True)]
    for p in tree: p.suspend()    # or it may be over before the second has begun
    second = cli("train", TINY_YAML, env=at(copy))
    for p in tree: p.resume()
    assert second.returncode == 2 and "is being made by another process" in second.stderr, second.stdout + second.stderr
    said = child.communicate(timeout=300)[0]
    assert child.returncode == 0, said


def fails(done, *words) -> None:
    "One clear error with every one of `words`, exit code 2, no traceback."
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    for w in words: assert w in done.stderr, done.stderr


@pytest.mark.parametrize("sets, words", [
    (["corpora.sec.path=no/such/folder"], ["corpora.sec.path", "no/such/folder: no such file or folder"]),
    (["corpora.sec.path=package:filings"], ["corpora.sec.path", "unknown package asset 'filings'"]),
    (["train.stepps=3"], ["train.stepps: unknown key; did you mean steps?"]),
    (["train.steps=few"], ["train.steps", "few"]),
    (["evaluate.suites.quack.limit=3"], ["evaluate.suites.quack: no such suite; known: finance, medical, nous, quick"]),
    (["evaluate.suites.mine.tasks=[piqa]"], ["evaluate.suites: quick and mine both ask piqa"]),
])
def test_bad_input_known_before_work(tmp_path, cli, sets, words):
    fails(cli("run", TINY_YAML, *[x for s in sets for x in ("--set", s)], env=at(tmp_path)), *words)
    assert not list(tmp_path.rglob("*"))


def left(outputs: Path) -> list[str]:
    "Stage folders that are there without being complete, but for those the next run goes on with."
    return [p.name for p in (outputs / ".stages").glob("[!.]*") if not (p / "stage.json").exists() and not p.name.startswith(RESUMED)]


@pytest.mark.fault
def test_an_empty_corpus(tmp_path, cli):
    (tmp_path / "empty").mkdir()
    fails(cli("ingest", TINY_YAML, "--set", f"corpora.sec.path={tmp_path / 'empty'}", env=at(tmp_path / "o")), "corpora.sec.path", "empty")
    assert left(tmp_path / "o") == []


@pytest.mark.fault
def test_a_corpus_too_small_for_one_batch(copy, cli):
    fails(cli("train", TINY_YAML, "--set", "train.global_batch=4096", "--set", "train.micro_batch=4096", "--set", "train.max_epochs=1000",
              env=at(copy)), "global_batch", "4096")
    assert left(copy) == []


@pytest.mark.fault
def test_a_model_without_tokenizer(copy, tmp_path, cli):
    shutil.copytree(ROOT / "tests/tiny/model", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    fails(cli("tokens", TINY_YAML, "--set", f"model={tmp_path / 'bare'}", env=at(copy)), "model", str(tmp_path / "bare"), "tokenizer")
    assert left(copy) == []


@pytest.mark.fault
def test_no_network_and_no_cache(tmp_path, cli):
    closed = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "DOMAIN_ADAPT_CACHE": str(tmp_path / "cache")}
    done = cli("ingest", "params/quickstart.yaml", env=at(tmp_path / "o") | closed)
    fails(done, "disclosure-alpha==1.6.0", str(tmp_path / "cache"), "pip download")
    assert left(tmp_path / "o") == []


@pytest.mark.fault
def test_a_wrong_checksum(tmp_path, cli):
    file = tmp_path / "cache/downloads/disclosure_alpha-1.6.0.tar.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not what was published")
    done = cli("ingest", "params/quickstart.yaml", env=at(tmp_path / "o") | {"DOMAIN_ADAPT_CACHE": str(tmp_path / "cache"), "DOMAIN_ADAPT_OFFLINE": "1"})
    fails(done, "wrong checksum", "disclosure_alpha-1.6.0.tar.gz")
    assert left(tmp_path / "o") == [] and not file.exists()


@pytest.mark.fault
@pytest.mark.parametrize("size, until", [("900k", "ingest"), ("2m", "train")])
def test_a_full_disk(tiny_run, tmp_path, cli, size, until):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        if until == "train":
            for p in [*(tiny_run / ".stages").glob("ingest-*"), *(tiny_run / ".stages").glob("tokens-*")]: shutil.copytree(p, disk / ".stages" / p.name)
        else: (disk / "filler").write_bytes(b"x" * 850_000)
        nothing_to_save = ["--set", "train.checkpoint=tests/tiny/model"] if until == "ingest" else []    # else check sees it coming
        fails(cli(until, TINY_YAML, *nothing_to_save, env=at(disk)), "disk is full", str(disk))
        assert left(disk) == []
        if nothing_to_save: fails(cli(until, TINY_YAML, env=at(disk)), "train.save", "free below", str(disk))
    finally: subprocess.run(["umount", disk], check=True)


def test_an_unknown_stage(cli):
    fails(cli("run", TINY_YAML, "--until", "training"), "training: no such stage", "train")


@pytest.mark.server
def test_a_merge_is_shown_then_published_with_all_that_was_measured(tiny_run, cli):
    name = kept(tiny_run)[0]
    with Upload() as hub:
        env = {"DOMAIN_ADAPT_OUTPUTS": str(tiny_run), "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
        asked = cli("publish", "tiny", f"merge:{name}", env=env, stdin=subprocess.DEVNULL)
        assert asked.returncode == 2 and "nobody is there to ask" in asked.stderr and "model.safetensors" in asked.stdout and not hub.written()
        sent = cli("publish", "tiny", name, "--repo", "jo/mine", "--yes", env=env, stdin=subprocess.DEVNULL)
        assert sent.returncode == 0 and f"published: {hub.endpoint}/jo/mine" in sent.stdout, sent.stderr
        files = hub.repositories["jo/mine"]
        card = files["README.md"].decode()
        assert {"config.json", "tokenizer.json", "model.safetensors", "mergekit_config.yml", "merges.png"} <= set(files)
        assert card.startswith("---\n") and "that nothing was chosen on" in card and "| arc_easy |" in card and "merge_method" in card
        assert files["model.safetensors"] == (tiny_run / "tiny/4_merge" / name / "model.safetensors").read_bytes() and str(ROOT) not in card and str(tiny_run) not in card
        wrong = cli("publish", "tiny", "nobody", "--yes", env=env)
        assert wrong.returncode == 2 and "holds no finished merge nobody; there are:" in wrong.stderr
