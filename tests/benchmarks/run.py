"""What the library does beside what a user would run instead, interleaved in one process. Run it with `make bench`.

Ratios above 1 say that ours is faster. Figures are medians of the rounds; nothing here passes or fails."""
import statistics
import time

import pandas as pd
import torch
import trafilatura
from lm_eval.models.huggingface import HFLM

from domain_adapt.assets import resolve
from domain_adapt.benchmarks import SharedContext, ask, load_suite
from domain_adapt.models import best_dtype, get_model, load_model, load_tokenizer, tune_cpu
from domain_adapt.params import Suite
from domain_adapt.perplexity import block_nll, document_blocks
from domain_adapt.sources.markdown import figures, to_markdown, visible_text
from domain_adapt.sources.reading import decode

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
    def plain(page): return trafilatura.extract(page, output_format="markdown", include_tables=True) or ""
    def kept(convert) -> str:
        truth = [figures(visible_text(p)) for p in pages]
        found = [figures(convert(p)) for p in pages]
        return f"{sum((t & f).total() for t, f in zip(truth, found)) / sum(t.total() for t in truth):.1%} of all visible figures kept"
    ours, theirs = interleaved(lambda: [to_markdown(p) for p in pages], lambda: [plain(p) for p in pages])
    return dict(what="filing to Markdown", against="trafilatura", ours=ours, theirs=theirs,
                note=f"{kept(lambda p: to_markdown(p).text)}; {kept(plain)}")


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


if __name__ == "__main__":
    tune_cpu()
    rows = [ingest()]
    folder, dtype = get_model(MODEL), best_dtype("auto")
    model, tokenizer = load_model(folder, dtype), load_tokenizer(folder)
    text = to_markdown(decode(next(resolve("package:filings-10k").glob("tgt*.html")).read_bytes())).text
    rows += [perplexity(model, tokenizer, text), benchmarks(model, tokenizer)]
    table = pd.DataFrame(rows)
    table.insert(2, "ratio", table["theirs"] / table["ours"])
    print(f"{MODEL} in {dtype}, {torch.get_num_threads()} threads; seconds")
    print(table.round(2).to_string(index=False))
