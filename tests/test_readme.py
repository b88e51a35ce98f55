"What README.md shows: runs that are valid and work, all commands, and the table that was measured."
import importlib.util
import os
import re
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from domain_adapt.cli import app
from domain_adapt.params import validate
from domain_adapt.pipeline import check
from domain_adapt.runs import ROOT, STAGES

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(b) for b in re.findall(r"^```yaml\n(.*?)^```", README, re.M | re.S)]
RUNS = {b["run"]: b for b in BLOCKS if "run" in b}
FOLDERS = {"filings": "sec/html", "papers": "medical", "patents": "patents"}


@pytest.fixture(scope="module")
def bench():
    "The module that measures, which no package holds."
    spec = importlib.util.spec_from_file_location("bench_run", ROOT / "tests" / "benchmarks" / "run.py")
    module = sys.modules["bench_run"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_yaml_is_a_run_or_part_of_one():
    assert set(RUNS) == set(FOLDERS) and len(BLOCKS) > len(RUNS)
    for b in BLOCKS: validate(b if "run" in b else RUNS["patents"] | b | {"corpora": RUNS["patents"]["corpora"] | b.get("corpora", {})})


@pytest.mark.parametrize("name", FOLDERS)
def test_check_wants_no_more_than_the_folder(name, tmp_path):
    gone, there = (validate(RUNS[name] | {"corpora": RUNS[name]["corpora"] | {name: RUNS[name]["corpora"][name] | {"path": str(p)}}})
                   for p in (tmp_path / "none", tmp_path))
    assert check(there) == [] and [p.split(":")[0] for p in check(gone)] == [f"corpora.{name}.path"]


def test_every_command_stands_in_the_table():
    words = set(re.findall(r"[a-z]+", " ".join(line for line in README.splitlines() if line.startswith("| `"))))
    assert {c.name or c.callback.__name__ for c in app.registered_commands} <= words


@pytest.mark.slow
@pytest.mark.parametrize("name, until", [("filings", "tokens"), ("papers", "report"), ("patents", "evaluate")])
def test_the_recipes_run(name, until, cli, dev_data, tmp_path):
    "From real raw files, with a tiny model and few steps; what is left out is what a tiny run of filings, and any report, does too."
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(RUNS[name], sort_keys=False))
    sets = {f"corpora.{name}.path": dev_data / FOLDERS[name], "model": "tests/tiny/model", "train.steps": 2, "train.warmup": 1, "merge.max_tokens": 8192,
            "evaluate.perplexity.max_tokens": 8192, "evaluate.chat.max_tokens": 4}
    sets |= {f"evaluate.suites.{s}.limit": 2 for s in RUNS[name]["evaluate"]["suites"]}
    done = cli("run", tmp_path / "mine.yaml", "--until", until, *(w for k, v in sets.items() for w in ("--set", f"{k}={v}")),
               env={"DOMAIN_ADAPT_OUTPUTS": str(tmp_path / "outputs")}, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs" / name / f"{STAGES.index(until) + 1}_{until}" / "stage.json").is_file()


def row(bench, name: str, **more) -> dict:
    return dict(row=name, what=bench.ROWS[name].what, unit="s", amount=None, ours=2.0, against="theirs", theirs=8.0, share=0.25, note="same",
                rounds=3, minutes=1.0, machine="2 cores", measured="2026-01-02", key=bench.key(name)) | more


def test_the_table_is_what_was_measured(bench):
    assert bench.with_table(README, bench.markdown(bench.kept())) == README


def test_a_row_goes_into_the_csv_and_the_readme_and_is_not_measured_again(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "TABLE", tmp_path / "bench.csv")
    monkeypatch.setattr(bench, "README", tmp_path / "README.md")
    bench.README.write_text(f"before\n\n{bench.MARKS[0]}\nold\n{bench.MARKS[1]}\n\nafter\n")
    bench.keep(row(bench, "merge"))
    bench.keep(row(bench, "convert", unit="MB/s", amount=4.0))
    bench.keep(row(bench, "memory", unit="MB"))
    assert list(pd.read_csv(bench.TABLE)["row"]) == ["convert", "merge", "memory"]
    text = bench.README.read_text()
    assert text.startswith("before\n\n<!--") and text.endswith("-->\n\nafter\n") and "old" not in text and "`memory`" not in text
    assert "| 2 MB/s | theirs | 0.5 MB/s | **0.25** | same |" in text and "Measured on 2 cores, 2026-01-02 (`convert`, `merge`), in 2 minutes." in text
    assert bench.main(["merge", "convert"]) == 0 and capsys.readouterr().out.count("measured already") == 2
    bench.keep(row(bench, "merge", ours=4.0, share=0.5))
    assert len(pd.read_csv(bench.TABLE)) == 3 and "**0.50**" in bench.README.read_text()


def test_a_row_depends_on_its_own_code_alone(bench, monkeypatch):
    from domain_adapt.runs import modules_used
    before = {n: bench.key(n) for n in bench.ROWS}
    assert len(set(before.values())) == len(before)
    monkeypatch.setattr(bench, "modules_used", lambda source: [m for m in modules_used(source) if m != "geometry"])
    assert {n for n in before if bench.key(n) != before[n]} >= {"merge", "sweep"} and bench.key("convert") == before["convert"]
    monkeypatch.setattr(bench, "machine", lambda: "another")
    assert not set(before.values()) & {bench.key(n) for n in bench.ROWS}


@pytest.mark.real
def test_rows_can_be_tried_and_are_not_kept(bench, tmp_path):
    "At a small size, on real filings and weights; each asserts that both sides did the same work."
    before = README, bench.kept().to_csv()
    done = subprocess.run([sys.executable, bench.__file__, "--small", "convert", "ingest", "merge"], text=True, capture_output=True, timeout=1800,
                          env=os.environ | {"DOMAIN_ADAPT_OUTPUTS": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(\w+): ours", done.stdout, re.M) == ["convert", "ingest", "merge"] and not list((tmp_path / ".bench").iterdir())
    assert (bench.README.read_text(encoding="utf-8"), bench.kept().to_csv()) == before


def test_an_unknown_row_is_refused(bench, capsys):
    with pytest.raises(SystemExit): bench.main(["merging"])
    assert "no such row: merging" in capsys.readouterr().err
