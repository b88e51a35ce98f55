"Reading filings beside trafilatura; what ingest gains by workers and holds in memory; tokenising beside the tokenizer alone."
import contextlib
import gzip
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from datatrove.data import Document

from domain_adapt.assets import resolve
from domain_adapt.models import get_model, load_tokenizer, tune_cpu
from domain_adapt.runs import read_lines
from domain_adapt.sources.markdown import compare, to_markdown
from domain_adapt.sources.reading import decode
from domain_adapt.tokens import encoder, write_corpus
from domain_adapt.workers import Lines

MODEL = "smollm2-135m-instruct"


def filings() -> list[Path]: return sorted(resolve("package:filings-10k").glob("*.html"))


def interleaved(ours: Callable, theirs: Callable, rounds: int) -> dict:
    "Median seconds of both, called in turn after one call each that is not counted."
    seconds = {ours: [], theirs: []}
    for i in range(rounds + 1):
        for f in (ours, theirs)[::-1 if i % 2 else 1]:
            start = time.perf_counter()
            f()
            if i: seconds[f].append(time.perf_counter() - start)
    return dict(ours=statistics.median(seconds[ours]), theirs=statistics.median(seconds[theirs]), rounds=rounds)


def convert(folder: Path, small: bool) -> dict:
    import trafilatura
    files = filings()[:1 if small else None]
    pages = [decode(f.read_bytes()) for f in files]
    took = interleaved(lambda: [to_markdown(p) for p in pages], lambda: [trafilatura.extract(p, output_format="markdown") for p in pages], 1 if small else 5)
    kept = compare(pages).set_index("converter")["figures_kept"]
    return took | dict(amount=sum(f.stat().st_size for f in files) / 1e6,
                       note=f"{kept['domain_adapt']:.1%} of the figures in the text are kept; {kept['trafilatura']:.1%}")


def many(folder: Path, n: int) -> dict:
    "The parameters of an ingest of `n` real 10-Ks, each made another by a sentence."
    pages = [f.read_text(encoding="utf-8") for f in filings()]
    folder.mkdir(parents=True)
    for i in range(n):
        (folder / f"{i:04d}.html").write_text(pages[i % 3].replace("</body>", f"<p>This is report {i} of its kind.</p></body>"), encoding="utf-8")
    return dict(run="bench", model="m", tokens={"replay": 0}, corpora={"sec": dict(kind="domain", source="sec", path=str(folder))},
                merge={"candidates": [dict(name="a", method="linear", weight=.5)]})


def size(folder: Path) -> float: return sum(f.stat().st_size for f in folder.iterdir()) / 1e6


INGEST = """import json, sys
from pathlib import Path
from domain_adapt.clean import ingest
from domain_adapt.params import validate
ingest(validate(json.loads(sys.argv[1])), {}, Path(sys.argv[2]))"""


def ingested(params: dict, out: Path, workers: int) -> tuple[float, float]:
    "Seconds, and the peak in MB of the memory of all processes together (shared pages counted once)."
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    given = json.dumps(params | {"ingest": {"workers": workers}})
    start, peak = time.perf_counter(), 0
    job = subprocess.Popen([sys.executable, "-c", INGEST, given, str(out)], stderr=subprocess.DEVNULL, start_new_session=True)
    while job.poll() is None:
        peak = max(peak, held(job.pid))
        time.sleep(.2)
    assert job.returncode == 0
    return time.perf_counter() - start, peak


def held(session: int) -> float:
    "MB held by the processes of a session."
    total = 0
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if int((p / "stat").read_text().rpartition(")")[2].split()[3]) != session: continue
            total += next(int(x.split()[1]) for x in (p / "smaps_rollup").read_text().splitlines() if x.startswith("Pss:"))
    return total / 1024


def stage(folder: Path, small: bool) -> dict:
    "The whole stage against a user's script, both from the start of the process to the packed file."
    n = 6 if small else 60
    params, read = many(folder / "in", n), folder / "theirs.jsonl.gz"
    by_hand = [sys.executable, Path(__file__).with_name("by_hand.py"), "read", folder / "in", read, "2"]
    took = interleaved(lambda: ingested(params, folder / "ours", 2), lambda: subprocess.run(by_hand, check=True), 1 if small else 3)
    ours = [d for f in (folder / "ours" / "documents" / "sec").glob("*.jsonl.gz") for d in read_lines(f)]
    with gzip.open(read, "rt", encoding="utf-8") as f: theirs = [json.loads(line) for line in f]
    assert len(ours) == len(theirs) == n, (len(ours), len(theirs))
    words = lambda documents: sum(len(d["text"].split()) for d in documents) / n
    return took | dict(amount=size(folder / "in"), note=f"ours also filters and looks for copies; {words(ours):,.0f} words a filing, {words(theirs):,.0f}")


def workers(folder: Path, small: bool) -> dict:
    "One worker against two, in turn, the seconds to import everything left out."
    params, empty, rounds = many(folder / "in", 6 if small else 60), many(folder / "one", 1), 1 if small else 2
    seconds = {1: [], 2: []}
    for _ in range(rounds):
        for w in seconds: seconds[w].append(ingested(params, folder / "out", w)[0] - ingested(empty, folder / "out", w)[0])
    one, two = (statistics.median(seconds[w]) for w in (1, 2))
    return dict(ours=two, theirs=one, rounds=rounds, note=f"{size(folder / 'in') / two:.1f} MB/s with all filters")


def memory(folder: Path, small: bool) -> dict:
    fewer, more = counts = (3, 30) if small else (100, 1000)
    peaks = {n: ingested(many(folder / str(n), n), folder / "out", 2)[1] for n in counts}
    return dict(ours=peaks[more], theirs=peaks[fewer], rounds=1, note=f"{more:,} and {fewer:,} filings")


def tokens(folder: Path, small: bool) -> dict:
    "All cores on both sides."
    tune_cpu()
    tokenizer, texts = load_tokenizer(get_model(MODEL)), [to_markdown(decode(f.read_bytes())).text for f in filings()] * (1 if small else 16)
    docs = [Document(text=t, id=str(i), metadata=dict(source_path=str(i))) for i, t in enumerate(texts)]
    list(Lines(folder / "docs").run(docs))
    encode = encoder(tokenizer, MODEL)
    took = interleaved(lambda: write_corpus(folder / "docs", folder / "x", {d.id: "train" for d in docs}, encode, 49152),
                       lambda: tokenizer.backend_tokenizer.encode_batch_fast(texts), 1 if small else 3)
    return took | dict(amount=sum(map(len, encode(texts))), note="")
