"""Secrets stay where the user keeps them: nothing that a run writes or says holds one."""
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from conftest import HIDDEN, PLACES, PLANTED, ROOT, TINY_YAML
from domain_adapt import study
from domain_adapt.runs import notebook_path

def written(secret: str) -> list[bytes]: return [secret.encode(), json.dumps(secret)[1:-1].encode(), json.dumps(secret, ensure_ascii=False)[1:-1].encode()]


def leaks(folder: Path, secrets=HIDDEN) -> list[tuple[str, str]]:
    "Files below a folder, packed or not, that hold a secret."
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert files, "nothing was written at all"
    text = {p: gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in files}
    return [(str(p.relative_to(folder)), s) for p, held in text.items() for s in secrets if any(w in held for w in written(s))]


def said(done: subprocess.CompletedProcess) -> str: return done.stdout + done.stderr


def at(outputs: Path) -> dict[str, str]: return {"DOMAIN_ADAPT_OUTPUTS": str(outputs), **PLANTED, **PLACES}


def test_a_whole_run_holds_no_secret(tiny_run):
    "All were in its environment; what it said is looked at where it is made."
    assert (tiny_run / "tiny/notebooks/5_evaluate.ipynb").is_file() and (tiny_run / "tiny/3_train").is_dir()
    assert not leaks(tiny_run)


@pytest.mark.fault
@pytest.mark.parametrize("sets, says", [
    (["corpora.sec.path=s3://bucket/filings"], "s3://bucket/filings: cannot be listed"),
    (["ingest.copy_to=s3://bucket/runs"], "s3://bucket/runs/ingest-"),
    (["corpora.news.path=package:news"], "pip download"),
])
def test_what_fails_quotes_no_secret(tmp_path, cli, sets, says):
    closed = {"DOMAIN_ADAPT_CACHE": str(tmp_path / "cache"), "AWS_MAX_ATTEMPTS": "1"}
    done = cli("ingest", TINY_YAML, *[w for s in sets for w in ("--set", s)], env=at(tmp_path / "o") | closed)
    assert done.returncode == 2 and says in done.stderr, said(done)
    assert not [s for s in HIDDEN if s in said(done)], said(done)
    if (tmp_path / "o").exists(): assert not leaks(tmp_path / "o")


@pytest.mark.fault
def test_a_traceback_of_the_command_line_hides_an_address(tmp_path):
    "botocore's own error on an address with an underscore in its host."
    done = subprocess.run([sys.executable, "-c", "from domain_adapt import cli\ndef app(): raise ValueError('Invalid endpoint: http://jo:PASSWORD@my_minio:9000')\n"
                           "cli.app = app\ncli.main()"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.rstrip().endswith("\nValueError: Invalid endpoint: http://***@my_minio:9000") and "PASSWORD" not in said(done)


def test_the_note_of_a_failed_arm_hides_an_address(tmp_path, monkeypatch, capsys):
    def broken(params, until): raise ValueError("Invalid endpoint: http://jo:PASSWORD@my_minio:9000")
    monkeypatch.setattr(study, "walk", broken)    # no stage lets such an error out by itself
    monkeypatch.setattr(study.signal, "signal", lambda *_: None)    # the arm runs here, where SIGTERM is the tests' own
    (tmp_path / "arms").mkdir()
    (tmp_path / "arms/a.yaml").write_text((ROOT / TINY_YAML).read_text())
    study.work(str(tmp_path), "a")
    why = "ValueError: Invalid endpoint: http://***@my_minio:9000"
    assert json.loads((tmp_path / "arms/a.json").read_text()) == dict(ended="failed", error=why) and capsys.readouterr().out == f"  failed: {why}\n"


@pytest.mark.fault
def test_a_notebook_that_prints_and_raises_secrets_keeps_none(tmp_path):
    cells = [nbformat.v4.new_code_cell(f"import os, sys\nfor name in {[*PLANTED, *PLACES]!r}: print(name, os.environ[name]); print(os.environ[name], file=sys.stderr)"),
             nbformat.v4.new_code_cell("os.environ['HF_TOKEN'], {'all': dict(os.environ)}"),
             nbformat.v4.new_code_cell("raise ValueError(' '.join(os.environ.values()))")]
    kernelspec = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernelspec)), tmp_path / "in.ipynb")
    done = subprocess.run([sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb"], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | PLANTED | PLACES)
    assert done.returncode == 1 and done.stderr.rstrip().splitlines()[-1].startswith("ValueError: ")
    executed = (tmp_path / "out.ipynb").read_text()
    assert "HF_TOKEN ***" in executed and "http://***@127.0.0.1:9" in executed and '"ename": "ValueError"' in executed
    assert not leaks(tmp_path) and not [s for s in HIDDEN if s in said(done)]


@pytest.mark.parametrize("key, value", [
    ("corpora.sec.path", "s3://AKIAPLANTED:planted/secret@bucket/filings"),
    ("corpora.sec.path", "https://jo:planted@example.org/filings"),
    ("corpora.sec.path", "s3://bucket/x?X-Amz-Signature=planted"),
    ("model", "https://example.org/model?token=planted"),
    ("evaluate.texts", "{mine: 'https://jo:planted@example.org/text'}"),
    ("train.job.setup", "['export HF_TOKEN=planted']"),
    ("train.job.setup", "['module load cuda', 'aws configure set x hf_plantedplantedplanted1']"),
    ("ingest.copy_to", "s3://jo:planted@bucket/runs"),
    ("report.title", "AKIAPLANTEDPLANTED00"),
])
def test_a_secret_in_the_settings_is_refused_and_not_quoted(tmp_path, cli, key, value):
    done = cli("run", TINY_YAML, "--set", f"{key}={value}", env={"DOMAIN_ADAPT_OUTPUTS": str(tmp_path / "o")})
    assert done.returncode == 2 and key in done.stderr and "looks like a secret" in done.stderr and "planted" not in said(done).lower(), said(done)
    assert not (tmp_path / "o").exists()


def test_papermill_alone_refuses_them_too(tmp_path):
    command = [sys.executable, "-m", "papermill", str(notebook_path("ingest")), str(tmp_path / "out.ipynb"), "-f", TINY_YAML,
               "-p", "model", "https://jo:planted@example.org/model"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ | {"DOMAIN_ADAPT_OUTPUTS": str(tmp_path / "o")})
    assert done.returncode == 1 and "model: holds what looks like a secret" in done.stderr.rstrip().splitlines()[-1]
    assert "planted" not in done.stderr and not (tmp_path / "o").exists()
