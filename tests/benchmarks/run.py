"""What the library does beside what a user would run instead, as one table: nbs/bench.csv, and the rows for README.md there.

    python tests/benchmarks/run.py                    every row of README.md whose code, inputs or machine have changed: `make bench`
    python tests/benchmarks/run.py merge memory       these rows
    python tests/benchmarks/run.py --again merge      though nothing has changed
    python tests/benchmarks/run.py --small merge      at a small size, to try it: nothing is kept

A machine that does nothing else is taken for granted. Each row is measured in a process of its own, both sides in turn, and kept at once."""
import argparse
import importlib
import multiprocessing
import shutil
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from domain_adapt import runs
from domain_adapt.models import usable_cores
from domain_adapt.params import load_params
from domain_adapt.runs import ROOT, Run, digest, modules_used, outputs, write_csv, write_text

HERE, TABLE, README = Path(__file__).resolve().parent, ROOT / "nbs" / "bench.csv", ROOT / "README.md"
COLUMNS = "row what unit amount ours against theirs share note rounds minutes machine measured key".split()
MARKS = "<!-- bench: written by make bench -->", "<!-- /bench -->"


@dataclass(frozen=True)
class Row:
    """What is measured, against what, by which function of which of `scripts`, the first. `unit` is of `amount` a second, or of both figures.
    What `resumes` finds its folder as a killed try left it."""
    what: str
    against: str
    function: str
    scripts: tuple[str, ...]
    unit: str = "s"
    settings: dict = field(default_factory=dict)
    readme: bool = True
    resumes: bool = False


TRAIN = dict(against="transformers' Trainer", function="training", scripts=("trainers",), unit="tokens/s")
ROWS = {
    "convert": Row("10-Ks to Markdown, one core", "trafilatura", "convert", ("ingesting",), "MB/s"),
    "ingest": Row("10-Ks through the stage, two workers", "trafilatura in two processes", "stage", ("ingesting", "by_hand"), "MB/s"),
    "train": Row("training in bf16", settings=dict(precision="bf16"), **TRAIN),
    "train-fp32": Row("training in fp32", settings=dict(precision="fp32"), **TRAIN),
    "merge": Row("six merges on disk", "`mergekit-yaml`, six times", "merges", ("merging",)),
    "candidate": Row("a merge made and scored on text", "`mergekit-yaml`, loading it, transformers", "scored", ("merging",)),
    "evaluate": Row("four variants on five benchmarks", "`lm_eval`, four times", "suite", ("evaluation", "variants", "merging", "../harness")),
    "perplexity": Row("text into bits per byte", "lm-eval's rolling log-likelihood", "rolling", ("evaluation", "merging", "../harness"), "tokens/s"),
    "quickstart": Row("the quickstart, filings to report", "these four by hand, in a row", "quickstart",
                      ("quickstart", "by_hand", "merging", "../harness"), resumes=True),
    "workers": Row("ingest with two workers", "with one", "workers", ("ingesting",), readme=False),
    "memory": Row("peak memory of ingest, ten times the filings", "a tenth of them", "memory", ("ingesting",), "MB", readme=False),
    "tokens": Row("documents to Megatron's files", "the tokenizer alone", "tokens", ("ingesting",), "tokens/s", readme=False),
    "sweep": Row("a candidate of a sweep of 24, in memory", "mergekit-yaml and loading its output", "sweep", ("merging",), readme=False),
    "large-linear": Row("three 1.1B models, linear, cold disk", "plain reads and a write", "large", ("merging",), settings=dict(method="linear"), readme=False),
    "large-ties": Row("three 1.1B models, ties, cold disk", "plain reads and a write", "large", ("merging",), settings=dict(method="ties"), readme=False),
}


def machine() -> str:
    "The processor and how many cores of it are ours."
    return f"{usable_cores()} cores of {runs.machine()['cpu']}"


def key(name: str) -> str:
    "Changes when a row's scripts, the modules they use, the quickstart, the environment or the machine do."
    row, setting = ROWS[name], ROOT / "params" / "quickstart.yaml"
    sources = [(HERE / f"{s}.py").read_text() for s in row.scripts]
    modules = [(ROOT / "domain_adapt" / m.replace(".", "/")).with_suffix(".py").read_text() for m in modules_used("\n".join(sources))]
    whole = list(Run(load_params(setting)).keys.values()) if name == "quickstart" else []
    return digest(name, row.function, row.settings, sources, modules, whole, setting.read_text(), (ROOT / "requirements.txt").read_text(), machine())


def measure(name: str, folder: Path, small: bool) -> dict:
    "What the row's function finds: ours, theirs, rounds, note; amount where the unit is a rate."
    row = ROWS[name]
    return getattr(importlib.import_module(row.scripts[0]), row.function)(folder, small, **row.settings)


def measured(name: str, small: bool) -> dict:
    "A row of the table, from a process of its own."
    row, start, at = ROWS[name], time.time(), outputs() / ".bench" / f"{name}-{key(name)}{'-small' if small else ''}"
    for left in at.parent.glob(f"{name}-{'[0-9a-f]' * 16}*"):
        if left != at or not row.resumes: shutil.rmtree(left)
    at.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool: found = pool.submit(measure, name, at, small).result()
    shutil.rmtree(at)
    return dict(amount=None) | found | dict(
        row=name, what=row.what, unit=row.unit, against=row.against, share=found["ours"] / found["theirs"],
        minutes=(time.time() - start) / 60, machine=machine(), measured=time.strftime("%Y-%m-%d", time.gmtime(start)), key=key(name))


def kept() -> pd.DataFrame:
    "The rows measured so far, by name, in the order of `ROWS`."
    found = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=COLUMNS)
    return found.set_index("row", drop=False).reindex([n for n in ROWS if n in set(found["row"])])


def figure(row: pd.Series, side: str) -> str:
    rate = pd.notna(row["amount"])
    value, unit = row["amount"] / row[side] if rate else row[side], row["unit"]
    if unit == "s" and value >= 300: value, unit = value / 60, "min"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def markdown(table: pd.DataFrame) -> str:
    "The rows for README.md as its table, and where they were measured; nothing where there are none."
    rows = [r for _, r in table.iterrows() if ROWS[r["row"]].readme]
    if not rows: return ""
    lines = ["| row | what | ours | instead | theirs | of their time | what else |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        cells = f"`{r['row']}`", r["what"], figure(r, "ours"), r["against"], figure(r, "theirs"), f"**{r['share']:.2f}**", r["note"]
        lines.append(f"| {' | '.join(cells)} |")
    on = {}
    for r in rows: on.setdefault(f"{r['machine']}, {r['measured']}", []).append(f"`{r['row']}`")
    where = "; ".join(f"{place} ({', '.join(names)})" for place, names in on.items())
    return "\n".join([*lines, "", f"Measured on {where}, in {sum(r['minutes'] for r in rows):.0f} minutes.", ""])


def with_table(text: str, table: str) -> str:
    "A README with the table between its two marks."
    before, after = text.split(MARKS[0]), text.split(MARKS[1])
    assert len(before) == len(after) == 2, f"{README}: wants {MARKS[0]} and {MARKS[1]} once each"
    return f"{before[0]}{MARKS[0]}\n{table}{MARKS[1]}{after[1]}"


def keep(found: dict) -> None:
    "Put a row into the table, and the table into README.md."
    table = kept()
    table.loc[found["row"], COLUMNS] = [found[c] for c in COLUMNS]
    write_csv(TABLE, table[COLUMNS])
    write_text(README, with_table(README.read_text(encoding="utf-8"), markdown(kept())))


def main(words: list[str]) -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS))
    asked.add_argument("--again", action="store_true")
    asked.add_argument("--small", action="store_true")
    given, failed = asked.parse_args(words), []
    if unknown := [n for n in given.rows if n not in ROWS]: asked.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    for name in given.rows or [n for n, r in ROWS.items() if r.readme]:
        if not (given.again or given.small) and name in (done := kept()).index and done.loc[name, "key"] == key(name):
            print(f"{name}: measured already")
            continue
        print(f"{name} …", flush=True)
        try: found = measured(name, given.small)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        print(f"{name}: ours {figure(pd.Series(found), 'ours')}, theirs {figure(pd.Series(found), 'theirs')}: {found['share']:.2f} of their time, "
              f"in {found['minutes']:.1f} minutes; {found['note']}", flush=True)
        if not given.small: keep(found)
    if not given.small: print(markdown(kept()))
    if failed: print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
