"""What a user would write without us, for the quickstart's work: trafilatura, transformers' Trainer and a loop over text.

    python by_hand.py read FOLDER OUT.jsonl.gz PROCESSES    HTML files through trafilatura
    python by_hand.py train JOB                             read, tokenise, pack and train as JOB says
    python by_hand.py perplexity JOB HALF NAME...           nats of each model on its half of the held-out text

Between them come `mergekit-yaml` and, at the end, `lm_eval`. Nothing of domain_adapt is imported."""
import bz2
import gzip
import json
import multiprocessing
import random
import re
import sys
from pathlib import Path
from xml.etree import ElementTree


def filing(file: Path) -> dict:
    import trafilatura
    return {"id": file.name, "text": trafilatura.extract(file.read_bytes(), output_format="markdown") or ""}


def filings(folder: str, processes: int) -> list[dict]:
    with multiprocessing.Pool(processes) as pool: return pool.map(filing, sorted(Path(folder).glob("*.html")), chunksize=1)


def articles(dump: str) -> list[str]:
    "Wikipedia's articles with most of their markup gone."
    found = []
    for _, node in ElementTree.iterparse(bz2.open(dump)):
        if not node.tag.endswith("}text") or not node.text or node.text[:9].upper() == "#REDIRECT": continue
        text = re.sub(r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<[^>]+>|'{2,}", "", node.text, flags=re.S)
        while (less := re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)) != text: text = less
        found.append(re.sub(r"\[\[(?:[^|\]]*\|)?([^\]]*)\]\]", r"\1", text))
    return found


def stories(file: str) -> list[str]: return [t for t in Path(file).read_text(encoding="utf-8").splitlines() if t.strip()]


def sequences(job: dict) -> tuple[list, dict[str, list[int]]]:
    "Sequences to train on, mixed, and the tokens that are held out, by corpus."
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    ids = lambda texts: [i for found in tokenizer(texts)["input_ids"] for i in [*found, tokenizer.eos_token_id]]
    docs = filings(job["filings"], job["processes"])
    wiki, news = articles(job["wikipedia"]), stories(job["news"])
    most = len(wiki) * 4 // 5
    held = dict(sec=ids([d["text"] for d in docs if "tgt" in d["id"]]), wikipedia=ids(wiki[most:]), news=ids(news))
    length, count = job["sequence_length"], job["steps"] * job["global_batch"]
    def packed(tokens: list[int], n: int) -> list[list[int]]:
        assert len(tokens) >= n * length, f"{len(tokens)} tokens for {n} sequences"
        return [tokens[i * length:(i + 1) * length] for i in range(n)]
    general = round(count * job["replay"])
    rows = packed(ids([d["text"] for d in docs if "tgt" not in d["id"]]), count - general) + packed(ids(wiki[:most]), general)
    random.Random(7).shuffle(rows)
    return rows, held


def train(job: dict) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
    out = Path(job["out"])
    rows, held = sequences(job)
    (out / "heldout.json").write_text(json.dumps(held))
    data, length, few = [dict(input_ids=r, labels=r) for r in rows], job["sequence_length"], job["validation_tokens"]
    tests = {n: [dict(input_ids=t[i:i + length], labels=t[i:i + length]) for i in range(0, few, length)] for n, t in held.items()}
    options = TrainingArguments(
        str(out / "trained"), use_cpu=True, bf16=job["bf16"], optim="adamw_torch_fused", seed=7, max_steps=job["steps"],
        per_device_train_batch_size=job["micro_batch"], gradient_accumulation_steps=job["global_batch"] // job["micro_batch"],
        learning_rate=job["lr"], lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": job["min_lr"]},
        warmup_steps=job["warmup"], weight_decay=job["weight_decay"], adam_beta2=0.95, max_grad_norm=job["clip_grad"],
        eval_strategy="steps", eval_steps=job["validate_every"], eval_on_start=True, per_device_eval_batch_size=job["micro_batch"],
        prediction_loss_only=True, save_strategy="steps", save_steps=job["save_every"], logging_steps=1, report_to="none", disable_tqdm=True)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(job["model"], dtype="float32"), AutoTokenizer.from_pretrained(job["model"])
    done = Trainer(model, options, train_dataset=data, eval_dataset=tests, processing_class=tokenizer).train()
    (out / "trained.json").write_text(json.dumps(dict(steps=done.global_step, tokens=sum(map(len, rows)), loss=done.training_loss)))


def perplexity(job: dict, half: str, names: list[str]) -> None:
    "Windows of `block` tokens, as many tokens of each corpus as `job` says, the halves one after the other."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out, asked, block = Path(job["out"]), job["windows"][half], job["block"]
    held, tokenizer, found = json.loads((out / "heldout.json").read_text()), AutoTokenizer.from_pretrained(job["model"]), []
    skip = lambda corpus: 0 if half == "select" else job["windows"]["select"][corpus]
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.bfloat16 if job["dtype"] == "bf16" else torch.float32).eval()
        for corpus, most in asked.items():
            tokens = held[corpus][skip(corpus):skip(corpus) + most]
            row = dict(model=name, corpus=corpus, tokens=len(tokens), nats=0.0, bytes=len(tokenizer.decode(tokens).encode()))
            for i in range(0, len(tokens), block):
                ids = torch.tensor([[tokenizer.bos_token_id, *tokens[i:i + block]]])
                with torch.inference_mode(): row["nats"] += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            found.append(row)
    (out / f"perplexity-{half}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    what, given, *more = sys.argv[1:]
    if what == "read":
        out, processes = more
        with gzip.open(out, "wt", encoding="utf-8") as f:
            for d in filings(given, int(processes)): f.write(json.dumps(d) + "\n")
    elif what == "train": train(json.loads(Path(given).read_text()))
    else: perplexity(json.loads(Path(given).read_text()), more[0], more[1:])
