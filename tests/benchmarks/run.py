"""What the library does beside what a user would run instead, interleaved in one process. Run it with `make bench`.

Ratios above 1 say that ours is faster. Figures are medians of the rounds; nothing here passes or fails."""
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
import trafilatura
from datatrove.data import Document
from lm_eval.models.huggingface import HFLM
from evaluation import evaluation
from merging import merging

from domain_adapt.assets import resolve
from domain_adapt.asking import SharedContext
from domain_adapt.benchmarks import ask, load_suite
from domain_adapt.models import best_dtype, get_model, load_model, load_tokenizer, tune_cpu, usable_cores
from domain_adapt.params import Suite, load_params
from domain_adapt.perplexity import block_nll, document_blocks
from domain_adapt.runs import ROOT
from domain_adapt.sources.markdown import compare, to_markdown
from domain_adapt.sources.reading import decode
from domain_adapt.tokens import encoder, write_corpus
from domain_adapt.workers import Lines

MODEL = "smollm2-135m-instruct"


def interleaved(ours, theirs, rounds: int = 3) -> tuple[float, float]:
    "Median seconds of both, called in turn after one call each that is not counted."
    seconds = {ours: [], theirs: []}
    for i in range(rounds + 1):
        for f in (ours, theirs):
            start = time.perf_counter()
            f()
            if i: seconds[f].append(time.perf_counter() - start)
    return statistics.median(seconds[ours]), statistics.median(seconds[theirs])


def ingest() -> dict:
    pages = [decode(f.read_bytes()) for f in sorted(resolve("package:filings-10k").glob("*.html"))]
    plain = lambda page: trafilatura.extract(page, output_format="markdown")
    ours, theirs = interleaved(lambda: [to_markdown(p) for p in pages], lambda: [plain(p) for p in pages])
    kept = compare(pages).set_index("converter")["figures_kept"]
    return dict(what="filing to Markdown", against="trafilatura", ours=ours, theirs=theirs,
                note=f"{kept['domain_adapt']:.1%} of the body's figures kept; {kept['trafilatura']:.1%}")


def many_filings(folder: Path, n: int) -> dict:
    "The parameters of an ingest of `n` real 10-Ks, each made another by a sentence."
    pages = [f.read_text(encoding="utf-8") for f in sorted(resolve("package:filings-10k").glob("*.html"))]
    folder.mkdir(parents=True)
    for i in range(n):
        (folder / f"{i:04d}.html").write_text(pages[i % 3].replace("</body>", f"<p>This is report {i} of its kind.</p></body>"), encoding="utf-8")
    return dict(run="bench", model="m", tokens={"replay": 0}, corpora={"sec": dict(kind="domain", source="sec", path=str(folder))},
                merge={"candidates": [dict(name="a", method="linear", weight=.5)]})


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
        peak = max(peak, memory(job.pid))
        time.sleep(.2)
    assert job.returncode == 0
    return time.perf_counter() - start, peak


def memory(session: int) -> float:
    "MB held by the processes of a session."
    total = 0
    for p in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            if int((p / "stat").read_text().rpartition(")")[2].split()[3]) != session: continue
            total += next(int(x.split()[1]) for x in (p / "smaps_rollup").read_text().splitlines() if x.startswith("Pss:"))
    return total / 1024


def workers(tmp: Path, n: int = 60) -> dict:
    "One worker against two, in turn, the seconds to import everything left out."
    params, empty = many_filings(tmp / "in", n), many_filings(tmp / "one", 1)
    seconds = {1: [], 2: []}
    for _ in range(2):
        for w in seconds: seconds[w].append(ingested(params, tmp / "out", w)[0] - ingested(empty, tmp / "out", w)[0])
    one, two = (statistics.median(seconds[w]) for w in (1, 2))
    size = sum(f.stat().st_size for f in (tmp / "in").iterdir()) / 1e6
    return dict(what=f"ingest of {n} 10-Ks, two workers", against="one worker", ours=two, theirs=one, note=f"{size / two:.1f} MB/s with all filters")


def flat(tmp: Path) -> dict:
    "Memory of ingest over 100 and 1,000 documents; the ratio is of megabytes."
    peaks = [ingested(many_filings(tmp / str(n), n), tmp / "out", 2)[1] for n in (100, 1000)]
    return dict(what="peak memory of ingest of 1,000 10-Ks, MB", against="of 100", ours=peaks[1], theirs=peaks[0], note="")


def tokenization(tmp: Path) -> dict:
    "Tokenising documents to Megatron's files against the tokenizer alone on the same texts, all cores."
    tokenizer, texts = load_tokenizer(get_model(MODEL)), [to_markdown(decode(f.read_bytes())).text
                                                          for f in sorted(resolve("package:filings-10k").glob("*.html"))] * 16
    docs = [Document(text=t, id=str(i), metadata=dict(source_path=str(i))) for i, t in enumerate(texts)]
    list(Lines(tmp / "docs").run(docs))
    encode = encoder(tokenizer, MODEL)
    ours, theirs = interleaved(lambda: write_corpus(tmp / "docs", tmp / "x", {d.id: "train" for d in docs}, encode, 49152),
                               lambda: tokenizer.backend_tokenizer.encode_batch_fast(texts))
    return dict(what="documents to Megatron's files", against="the tokenizer alone", ours=ours, theirs=theirs,
                note=f"{sum(map(len, encode(texts))) / ours / 1e6:.2f} M tokens/s")


def perplexity(model, tokenizer, text: str) -> dict:
    windows = document_blocks(text, tokenizer, 512)[:6]
    def plain():
        for w in windows:
            ids = torch.tensor([[*w["context"], *w["ids"]]])
            logits = model(ids[:, :-1]).logits[0, -len(w["ids"]):].float()
            torch.nn.functional.cross_entropy(logits, ids[0, -len(w["ids"]):], reduction="sum")
    with torch.inference_mode():
        ours, theirs = interleaved(lambda: [block_nll(model, w["context"], w["ids"]) for w in windows], plain)
    tokens = sum(len(w["ids"]) for w in windows)
    return dict(what="bits per byte", against="transformers, all logits", ours=ours, theirs=theirs, note=f"{tokens / ours:.0f} tokens/s")


def benchmarks(model, tokenizer) -> dict:
    tasks = load_suite("quick", Suite(limit=10))
    ours, theirs = interleaved(lambda: ask(SharedContext(model, tokenizer), tasks),
                               lambda: ask(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8), tasks), rounds=1)
    return dict(what="benchmarks of the suite quick, 10 items each", against="lm-eval's hf model", ours=ours, theirs=theirs, note="")


def trainers(precision: str, steps: int = 4) -> list[dict]:
    """Training as in the quickstart against transformers' Trainer: same weights, batches, threads and AdamW; each in its own
    process, in turn step by step, the first step not counted. The second row's figures are gigabytes."""
    env = dict(os.environ, OMP_NUM_THREADS=str(usable_cores()), MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1",
               GLOO_SOCKET_IFNAME="lo")
    script = Path(__file__).with_name("trainers.py")
    start = lambda who: subprocess.Popen([sys.executable, "-W", "ignore", script, who, precision, str(steps + 1)], env=env, text=True,
                                         bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    def answer(arm, line: str) -> list[float]:
        arm.stdin.write(line)
        return json.loads(arm.stdout.readline())
    arms = [start("ours"), start("theirs")]
    seconds = [[answer(arm, "\n")[0] for arm in arms] for _ in range(steps + 1)][1:]
    (loss, *memory), (their_loss, *their_memory) = [answer(arm, "") for arm in arms]
    assert abs(loss / their_loss - 1) < 0.01
    ours, theirs = map(statistics.median, zip(*seconds))
    batch = load_params(ROOT / "params" / "quickstart.yaml")
    tokens = batch.train.global_batch * batch.tokens.sequence_length
    row = dict(what=f"training in {precision}, a step", against="transformers' Trainer")
    return [row | dict(ours=ours, theirs=theirs, note=f"{tokens / ours:.0f} tokens/s; {tokens / theirs:.0f}; mean loss {loss:.3f}; {their_loss:.3f}"),
            row | dict(what=f"peak memory of training in {precision}, GB", ours=memory[0] / 1024, theirs=their_memory[0] / 1024,
                       note=f"{memory[1] / 1024:.1f} and {their_memory[1] / 1024:.1f} of it before the model")]


if __name__ == "__main__":
    tune_cpu()
    rows = [ingest()]
    with tempfile.TemporaryDirectory() as tmp: rows += [workers(Path(tmp) / "w"), flat(Path(tmp) / "m"), tokenization(Path(tmp))]
    with tempfile.TemporaryDirectory() as tmp: rows += merging(Path(tmp))
    rows += [*trainers("bf16"), *trainers("fp32")]
    folder, dtype = get_model(MODEL), best_dtype("auto")
    model, tokenizer = load_model(folder, dtype), load_tokenizer(folder)
    text = to_markdown(decode(next(resolve("package:filings-10k").glob("tgt*.html")).read_bytes())).text
    rows += [perplexity(model, tokenizer, text), benchmarks(model, tokenizer)]
    with tempfile.TemporaryDirectory() as tmp: rows += evaluation(Path(tmp), dtype)
    table = pd.DataFrame(rows)
    table.insert(2, "ratio", table["theirs"] / table["ours"])
    print(f"{MODEL} in {dtype}, {torch.get_num_threads()} threads; seconds")
    print(table.round(2).to_string(index=False))
