"""A finished run made up for the tests: invented numbers under the contract's columns, never a result.

`make(root)` writes the folders of stages 1 to 5 and, with `books`, their executed notebooks, whose tables and
figures are drawn by the cells of the real stage notebooks.
"""
import ast, atexit, functools, gzip, hashlib, json, shutil, tempfile
from pathlib import Path
from types import SimpleNamespace
import nbformat
import numpy as np
import pandas as pd
from IPython.core.formatters import DisplayFormatter
from domain_adapt.params import Params, validate
from domain_adapt.runs import ROOT, STAGES, write_csv, write_json, write_text

SECRET = str(Path.home() / "secret-place")
NASTY = "<script>document.title='owned'</script> & $x$ `code` *bold* <img src=x onerror=alert(1)>"
MERGES = {"linear-0.3": .5, "linear-0.5": .8, "linear-0.7": .93, "slerp-0.5": .79, "ties": .85,
          "dare-ties": .82}
KINDS = {"sec": "domain", "wiki": "general", "news": "general"}
VARIANTS = ["original", "cpt@20", "cpt", *(f"merge:{m}" for m in MERGES)]
KEPT = ["merge:linear-0.7", "merge:linear-0.5"]
EVALUATED = ["original", "cpt@20", "cpt", "merge:linear-0.5", "merge:linear-0.7"]
TASKS = {"hellaswag": ("acc_norm", .46), "arc_easy": ("acc_norm", .5), "piqa": ("acc_norm", .68),
         "boolq": ("acc", .58),
         "mmlu_professional_accounting": ("acc", .26), "mmlu_management": ("acc", .31),
         "mmlu_marketing": ("acc", .36),
         "mmlu_econometrics": ("acc", .24)}


def params(title: str = "A made-up run", kinds: dict[str, str] = KINDS) -> Params:
    candidates = [dict(name=m, method="linear", weight=.5) for m in MERGES]
    corpora = {c: dict(kind=k, source="sec" if c == "sec" else "general",
                       path=f"{SECRET}/{c}", heldout=.5) for c, k in kinds.items()}
    return validate(dict(run="made", model="smollm2-135m-instruct", corpora=corpora,
                         tokens=dict(replay=.05 if "general" in kinds.values() else 0),
                         merge=dict(candidates=candidates), report=dict(title=title)))


def blocks(rng: np.random.Generator) -> pd.DataFrame:
    "One filing, thirty articles and sixty news items; merges bend the line between original and CPT."
    def bits(variant: str, corpus: str) -> float:
        t = {"original": 0, "cpt@20": .7, "cpt": 1}.get(variant, MERGES.get(variant.removeprefix("merge:"),
                                                                            0))
        start, change, bend = {"sec": (1.02, -.12, -.03), "wiki": (.95, .028, -.05),
                               "news": (1.06, .005, -.045)}[corpus]
        bend *= variant.startswith("merge:") * (.4 if "ties" in variant else 1.5)
        return start + change * t + bend * t * (1 - t)
    rows = []
    for corpus, (documents, per) in {"sec": (1, 16), "wiki": (30, 1), "news": (60, 1)}.items():
        for i in range(documents * per):
            level, size = rng.normal(0, .08), int(rng.integers(3500, 4500))
            rows += [dict(variant=v, corpus=corpus, kind=KINDS[corpus], half="report" if i % 2 else "select",
                          document=i // per, block=i % per,
                          tokens=1024, bytes=size, words=size // 6, nll=size * np.log(2)
                          * (bits(v, corpus) + level + rng.normal(0, .004)))
                     for v in VARIANTS]
    return pd.DataFrame(rows)


def perplexity(b: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (v, c, k), all_halves in b.groupby(["variant", "corpus", "kind"], sort=False):
        for half in ("select", "report", "all"):
            x = all_halves if half == "all" else all_halves[all_halves["half"] == half]
            bits = x["nll"].sum() / x["bytes"].sum() / np.log(2)
            rows.append(dict(variant=v, tokens_seen=dict(original=0).get(v, 40960 if "@" in v else 81920), corpus=c, kind=k, half=half,
                             documents=x["document"].nunique(), blocks=len(x),
                             tokens=x["tokens"].sum(), bytes=x["bytes"].sum(),
                             token_perplexity=np.exp(x["nll"].sum() / x["tokens"].sum()),
                             word_perplexity=np.exp(x["nll"].sum() / x["words"].sum()),
                             byte_perplexity=2 ** bits, bits_per_byte=bits,
                             ci_low=bits - .02, ci_high=bits + .02, dtype="bf16"))
    return pd.DataFrame(rows)


def benchmarks(rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for v in ["original", "cpt", *KEPT]:
        for task, (metric, value) in TASKS.items():
            x = np.clip(value + rng.normal(0, .02), 0, 1).round(2)
            e = (x * (1 - x) / 100) ** .5
            rows.append(dict(variant=v, suite="quick", task=task, metric=metric, value=x, stderr=e,
                             ci_low=x - 1.96 * e, ci_high=x + 1.96 * e,
                             n=100, fewshot=0, chat_template=False, dtype="bf16", seed=0, cut=0))
    return pd.DataFrame(rows)


def comparisons(scores: pd.DataFrame) -> pd.DataFrame:
    value = scores.set_index(["variant", "task"])["value"]
    pairs = [(r, against) for _, r in scores.iterrows() for against in ("original", "cpt") if r["variant"] not in (against, "original")]
    return pd.DataFrame([dict(variant=r["variant"], against=against, measure=f"{r['task']}/{r['metric']}",
                              difference=(d := r["value"] - value[against, r["task"]]), ci_low=d - .06, ci_high=d + .06, p=.4, q=.8,
                              smallest_detectable=.09, verdict="cannot tell") for r, against in pairs])


def _evaluated(folder: Path, scores: pd.DataFrame) -> None:
    "What else the evaluate stage leaves; a model says hostile things."
    tasks = {t: dict(version=1.0, items=100, items_hash=f"items of {t}", fewshot=0, chat_template=False, prompts_hash="p", metrics=[m], main_metric=m,
                     first_tokens=[1, 2, 3], bos=0) for t, (m, _) in TASKS.items()}
    write_json(folder / "settings.json", dict(dtype="bf16", seed=0, perplexity=dict(max_tokens=16384, block=1024), suites=dict(quick=dict(tasks=tasks))))
    write_csv(folder / "contamination.csv", scores[["variant", "task", "metric", "value"]].assign(items=100, short=3, hit=2, share=2 / 97, value_without=.4))
    talk = pd.DataFrame([dict(variant=v, kind="finance", prompt=f"What is {NASTY}?", answer=f"{NASTY} {v}", tokens=9, stopped=True, repeated=.1, loops=v == "cpt")
                         for v in ["original", "cpt", *KEPT]])
    write_text(folder / "samples" / "chat.jsonl", talk.to_json(orient="records", lines=True))
    write_csv(folder / "chat.csv", pd.DataFrame([dict(variant=v, kind="finance", measure="stopped", value=1., ci_low=.2, ci_high=1., n=1) for v in talk["variant"]]))


def _ingest(folder: Path) -> None:
    rows = [("sec", "read", 3, 5_500_000), ("sec", "extracted", 3, 912_000),
            ("sec", "long enough", 3, 912_000), ("sec", "not repeated", 3, 911_000),
            ("wiki", "read", 106, 3_110_000), ("wiki", "extracted", 106, 2_700_000),
            ("wiki", "long enough", 98, 2_650_000), ("wiki", "not repeated", 97, 2_640_000),
            ("news", "read", 300, 380_000), ("news", "extracted", 300, 379_000), ("news", "long enough", 296,
                                                                                  378_000),
            ("news", "not repeated", 295, 377_000)]
    write_csv(folder / "funnel.csv", pd.DataFrame(rows, columns=["corpus", "step", "documents",
                                                                 "characters"]))
    write_csv(folder / "lengths.csv", pd.DataFrame([(c, 2 ** n, 40 - 3 * n) for c in KINDS for n in range(9, 13)],
                                                   columns=["corpus", "from_characters", "documents"]))
    dropped = [("wiki", "too_short", "n words", 8, 50_000), ("news", "copy", NASTY, 1, 1000)]
    write_csv(folder / "dropped.csv", pd.DataFrame(dropped, columns=["corpus", "why", "reason", "documents", "characters"]))
    for corpus in KINDS:
        path = folder / "documents" / corpus / "00000.jsonl.gz"
        path.parent.mkdir(parents=True)
        document = dict(id=f"{corpus}/1", text=f"# A document\n\n{NASTY} " * 20, metadata=dict(source_path=f"{NASTY}.html"))
        path.write_bytes(gzip.compress(json.dumps(document).encode() + b"\n", mtime=0))
        write_json(folder / "logs" / corpus / "files" / "00000.json", [dict(path=f"{NASTY}.html", hub="elsewhere")])


SKIPPED = {17: (4.1, 61.), 31: (None, None)}    # loss and norm of batches that were not learnt from


def metrics(rng: np.random.Generator) -> list[dict]:
    "Forty batches that were learnt from and the two of `SKIPPED`, as the lines of metrics.jsonl."
    lines, learnt = [], 0
    for step in range(43):
        learnt += 0 < step not in SKIPPED
        row = dict(step=step, tokens=learnt * 2048)
        if step:
            lr = 2e-4 * min(step / 5, .1 + .45 * (1 + np.cos(np.pi * max(step - 5, 0) / 37)))
            lost, norm = SKIPPED.get(step, (2.9 - .5 * step / 42 + rng.normal(0, .12), 1.5 + rng.normal(0, .2)))
            used = .3 + rng.normal(0, .01)
            row |= dict(lr=lr, loss=lost, grad_norm=norm, learnt=step not in SKIPPED, tokens_per_second=1000 * used,
                        mfu=used, mfu_with_attention=1.1 * used, memory_bytes=2_000_000_000 + 10_000_000 * min(step, 9))
        if step % 10 == 0 or step == 42:
            row |= {"heldout/sec": 2.88 - .3 * step / 42, "heldout/wiki": 3.02 + .05 * step / 42,
                    "heldout/news": 3.4 + .01 * step / 42}
        lines.append(row)
    return lines


EVENTS = [dict(step=17, what="grad_norm", value=61., action="skipped", time="2026-01-01T00:00:17Z"),
          dict(step=20, what="step_30 refused", value=f"{NASTY} has another sha256 than it had", action="not used",
               time="2026-01-01T00:01:00Z"),
          dict(step=20, what="resumed", value="on 2 processes", action="goes on", time="2026-01-01T00:01:01Z"),
          dict(step=31, what="loss", value="nan", action="skipped", time="2026-01-01T00:01:12Z")]


def _train(folder: Path, rng: np.random.Generator) -> None:
    for name, lines in ("metrics", metrics(rng)), ("events", EVENTS):
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_json(folder / "info.json", dict(
        precision="bf16", parameters=134_515_008, logits_check=None, epochs={"sec": .64, "wiki": .2}, processes=2,
        layout=dict(tp=2, pp=1, cp=1, sp=True), seconds={"import": 7.8, "steps": 120.5},
        megatron={k: f"megatron.core.{k}.{k.title()}" * 3 for k in ("model", "parallel", "optimizer")},
        where=f"{ROOT}/outputs/x"))


def geometry(pairs=(("cpt", "original"),), layers: int = 30) -> pd.DataFrame:
    "geometry.csv's rows of the layers; what takes two task vectors only for pairs without the base, the first `against`."
    rows = []
    for n, (model, against) in enumerate(pairs):
        other = dict.fromkeys(["norm_ratio", "cosine_of_task_vectors", "sign_conflict", "sign_conflict_weighted", "elections_won"])
        if against != pairs[0][1]: other = {c: .1 * (k + 1) for k, c in enumerate(other)}
        for i in range(layers):
            for kind, x in (("attention", .031), ("mlp", .027), ("other", .004)):
                far = x * (1 + i / 60 + n)
                rows.append(dict(model=model, against=against, module=f"layers.{i}.{kind}", layer=i, kind=kind, parameters=1000,
                                 weight_norm=10., task_vector_norm=10 * far, relative_norm=far, distance=10 * far,
                                 cosine_of_weights=1 - far ** 2 / 2, slerp_distance=0., slerp_is_linear=1., **other))
    return pd.DataFrame(rows)


def weights(layers: int = 4) -> pd.DataFrame:
    "weights.csv of a merge of three models by depth and one of two, twice, that gives the same everywhere."
    by_depth = {"cpt": (.25, .5, .5, 0), "original": (.75, .5, .5, 1), "base": (0,) * 4}
    merges = {"listing-1": (by_depth, .75), "dare": ({"cpt": (.7,) * 4, "original": (.3,) * 4}, .5)}
    rows = []
    for name, (shares, density) in (merges | {"dare@8": merges["dare"]}).items():
        for model, share in shares.items():
            at = lambda layer, kind: share[0] if layer is None or (layer == 3 and kind != "attention") else share[layer]
            cells = [("embed_tokens", None, "other"), *((f"layers.{i}.{k}", i, k) for i in range(layers) for k in ("other", "attention", "mlp")),
                     ("norm", None, "other"), ("lm_head", None, "other")]
            rows += [dict(name=name, model=model, module=module, layer=layer, kind=kind, weight=at(layer, kind),
                          density=density if model == "cpt" else None) for module, layer, kind in cells]
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def predictions() -> pd.DataFrame:
    return pd.DataFrame([dict(claim="slerp", model="cpt", against="original", value=0, expected="same",
                              prediction=f"SLERP is their linear merge. {NASTY}", candidate="slerp-0.5", held_against="linear-0.5",
                              kind="domain", difference=.0004, ci_low=-.0003, ci_high=.0011, verdict="holds")])


def density() -> pd.DataFrame:
    return pd.DataFrame([dict(model="cpt", density=d, kind=k, bits_per_byte=1 - .1 * d, ci_low=.99 - .1 * d, ci_high=1.01 - .1 * d, tokens=2048,
                              difference=.1 - .1 * d, difference_low=.09 - .1 * d, difference_high=.11 - .1 * d)
                         for k in ("domain", "general") for d in (.1, .5, 1.0)])


def plane() -> pd.DataFrame:
    at = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (.4, .3, .3), (.5, .5, 0.0), (0.0, .5, .5), (-.2, .6, .6)]
    return pd.DataFrame([{"cpt@20": a, "original": b, "cpt": c, "kind": k, "bits_per_byte": 1 + .1 * (a - b) ** 2, "ci_low": .95, "ci_high": 1.15,
                          "tokens": 2048, "difference": .1 * (a - b) ** 2 - .02, "difference_low": -.03, "difference_high": .09}
                         for k in ("domain", "general") for a, b, c in at])


def _merge(folder: Path, scores: pd.DataFrame) -> None:
    bits = scores[scores["half"] == "select"].pivot_table(index="variant", columns="kind",
                                                          values="bits_per_byte", sort=False)
    rows = [dict(name=v.removeprefix("merge:"), method=v.removeprefix("merge:").split("-0")[0] if ":" in v
                 else "none",
                 parameters=json.dumps({"weight": .5} if ":" in v else {}), domain_bits_per_byte=r["domain"],
                 general_bits_per_byte=r["general"],
                 retention=.9 if ":" in v else None, recovery=1.1 if ":" in v else None,
                 on_front=v in ("cpt", *KEPT), forgetting=.001, domain_low=r["domain"] - .01, domain_high=r["domain"] + .01,
                 general_low=r["general"] - .005, general_high=r["general"] + .005, source="listed" if ":" in v else "")
            for v, r in bits.iterrows() if "@" not in v]
    write_csv(folder / "sweep.csv", pd.DataFrame(rows))
    dare = bits.loc["merge:dare-ties"]
    write_csv(folder / "seeds.csv", pd.DataFrame([dict(name="dare-ties", seed=7 + i, domain_bits_per_byte=dare["domain"] + .004 * i,
                                                       general_bits_per_byte=dare["general"] - .002 * i) for i in range(3)]))
    write_csv(folder / "predictions.csv", predictions())
    write_csv(folder / "density.csv", density())
    write_csv(folder / "plane.csv", plane())
    write_csv(folder / "geometry.csv", geometry())
    write_csv(folder / "weights.csv", weights())
    write_json(folder / "selection.json", dict(
        order=[k.removeprefix("merge:") for k in KEPT], kept=[k.removeprefix("merge:") for k in KEPT],
                                               winner=KEPT[0].removeprefix("merge:"),
        rule="Among merges that forget at most 0.005 bits per byte, the one that keeps most of the gain.",
        outcome="linear-0.7 keeps most of the gain among the merges that qualify.",
        forgetting={}, scored_on=dict(sec=8, wiki=15, news=30), failed={"linear-0.9": "a tensor is not finite"},
        notes={"ties": f"normalize is false: with one model it divides the weight out. {NASTY}"}))


def notebook(path: Path, stage) -> nbformat.NotebookNode:
    "A stage's notebook with the outputs of its table and figure cells; the cells that work are left alone."
    book, show, scope = nbformat.read(path, 4), DisplayFormatter(), {"stage": stage, "weights": weights(), "notes": {"ties": NASTY}}
    for n, cell in enumerate(c for c in book.cells if c.cell_type == "code"):
        tags = cell.metadata.get("tags", [])
        if "parameters" in tags or "work" in tags: continue
        tree = ast.parse(cell.source)
        tree.body = [x for x in tree.body if not (isinstance(x, ast.Assign) and any(f in ast.unparse(x) for f in ("open_stage(", "preview(")))]
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(path), "exec"), scope)
        value = eval(compile(ast.Expression(last.value), str(path), "eval"), scope) if last else None
        if value is not None:
            data, metadata = show.format(value)
            cell.outputs = [nbformat.v4.new_output("execute_result", data, metadata=metadata,
                                                   execution_count=n)]
    for i, c in enumerate(book.cells):
        if "work" in c.metadata.get("tags", []):
            c.outputs = [nbformat.v4.new_output("stream", name="stdout",
                                                text=f"reading {ROOT}/outputs/x\n{NASTY}\n"),
                         nbformat.v4.new_output("stream", name="stderr", text="a warning nobody needs\n")]
        if "parameters" in c.metadata.get("tags", []):
            where = i + 1
    injected = nbformat.v4.new_code_cell(f'run = "made"\ncorpora = {{"sec": {{"path": "{SECRET}/sec"}}}}',
                                         metadata={"tags": ["injected-parameters"]})
    book.cells.insert(where, injected)
    return book


def _record(stage: str, folder: Path) -> None:
    "What the stage would have recorded of its files."
    files = {str(f.relative_to(folder)): dict(bytes=f.stat().st_size, sha256=hashlib.sha256(f.read_bytes()).hexdigest())
             for f in sorted(folder.rglob("*")) if f.is_file()}
    write_json(folder / "stage.json", dict(stage=stage, key=f"{stage}-key", started="2026-01-01T00:00:00Z", finished="2026-01-01T00:01:00Z", seconds=60.,
                                           peak_memory_bytes=2 ** 30, machine=dict(cpu=f"a {NASTY} processor", cores=2, memory_bytes=2 ** 34, gpus=[]),
                                           environment=dict(python="3.11"), code={}, files=files))


def _leave_out(root: Path, kinds: dict[str, str]) -> None:
    "Take the corpora that are not in `kinds`, and the kinds of text that then nobody has, out of every table."
    gone = dict(corpus=set(KINDS) - set(kinds), kind=set(KINDS.values()) - set(kinds.values()))
    for file in root.rglob("*.csv"):
        t = pd.read_csv(file)
        for column in gone.keys() & set(t): t = t[~t[column].isin(gone[column])]
        lost = [c for c in t if c.split("_")[0] in gone["kind"]]
        write_csv(file, t.assign(**dict.fromkeys(lost, np.nan)))


def make(root: Path, title: str = "A made-up run", books: bool = True,
         kinds: dict[str, str] = KINDS) -> tuple[Params, dict[str, Path]]:
    "Folders of a finished run below `root`, all but the report; `kinds`: its corpora, some of `KINDS`."
    p, rng = params(title, kinds), np.random.default_rng(0)
    folders = {s: root / f"{i}_{s}" for i, s in enumerate(STAGES, 1)} | {"run": root,
                                                                         "notebooks": root / "notebooks"}
    del folders["report"]
    tried, scores = blocks(rng), benchmarks(rng)
    b = tried[tried["variant"].isin(EVALUATED)].reset_index(drop=True)
    found = perplexity(b)
    _ingest(folders["ingest"])
    mixture = pd.DataFrame([dict(corpus="sec", asked=.95, documents=2, tokens=77_824, share=.95),
                            dict(corpus="wiki", asked=.05, documents=91, tokens=4_096, share=.05)])
    write_csv(folders["train"] / "mixture.csv", mixture)
    splits = pd.DataFrame([dict(corpus=c, split=s, documents=d, tokens=d * 1000) for c in KINDS for s,
                           d in (("train", 2), ("heldout", 1))])
    write_csv(folders["tokens"] / "splits.csv", splits)
    _train(folders["train"], rng)
    _merge(folders["merge"], perplexity(tried))
    write_csv(folders["merge"] / "blocks.csv", tried[tried["half"] == "select"])
    for name, table in dict(blocks=b, perplexity=found, benchmarks=scores,
                            comparisons=comparisons(scores)).items():
        write_csv(folders["evaluate"] / f"{name}.csv", table)
    _evaluated(folders["evaluate"], scores)
    if kinds != KINDS: _leave_out(root, kinds)
    for s in STAGES[:-1]: _record(s, folders[s])
    for i, s in enumerate(STAGES[:-1] if books else (), 1):
        stage = SimpleNamespace(folder=folders[s], folders=folders, params=p, copy_out=lambda address: None)
        write_text(folders["notebooks"] / f"{i}_{s}.ipynb",
                   nbformat.writes(notebook(ROOT / "nbs" / "stages" / f"{i}_{s}.ipynb", stage)))
    return p, folders


@functools.cache
def site() -> Path:
    "The report of a made-up run, built once for all the tests of a session."
    from domain_adapt.report import build_report
    root = Path(tempfile.mkdtemp(prefix="made-run-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    p, folders = make(root)
    build_report(p, folders, root / "6_report")
    return root / "6_report"
