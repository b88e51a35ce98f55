"""Make the inputs of params/tiny.yaml: three invented filings, invented general text, benchmark items and a
two-layer random Llama with a byte-level tokenizer. Run it from the repository root; what it makes is committed."""
import json, random, shutil
from pathlib import Path

HERE = Path(__file__).parent
COMPANIES = {"alder": ("Alder Works Inc.", "tools"), "birch": ("Birch Harbor Corp.", "freight"), "cedar": ("Cedar Lane Stores", "groceries")}
SUBJECTS = ["Net sales", "Operating income", "Cost of sales", "Cash from operations", "Interest expense", "Gross margin", "Capital spending"]
VERBS = ["rose", "fell", "were little changed", "increased", "decreased"]
REASONS = ["higher prices", "lower volumes", "a weaker currency", "new locations", "the timing of payments", "freight costs", "a longer fiscal year"]
PLACES = ("river valley harbour hill forest island market bridge school garden mill tower chapel orchard quarry station library "
          "workshop meadow lighthouse canal theatre square barn fountain museum bakery ferry vineyard observatory").split()
THINGS = ("bell map clock letter boat loom telescope song fossil coin lantern violin recipe machine portrait seed ladder compass "
          "manuscript kite stove carpet microscope drum saddle calendar mosaic pump basket globe").split()
QUALITIES = ("old small copper forgotten painted heavy northern quiet borrowed narrow broken wooden famous early careful blue distant "
             "unfinished patient round bright hidden curious steep generous").split()
DEEDS = ("built painted visited described measured repaired sold found drew copied moved lost kept studied opened bought shared named "
         "carried counted cleaned defended discovered photographed").split()
PEOPLE = ("teacher sailor mayor botanist weaver surgeon farmer printer astronomer cook poet carpenter widow merchant pilot nurse clerk "
          "painter miner singer judge gardener baker traveller engineer").split()
TURNS = ("In the spring", "Years later", "After the flood", "Before sunrise", "According to a neighbour", "For a while", "At first",
         "By the end of that century", "During the long winter", "With little money", "As the records say", "On the way home")


def sentence(r: random.Random, product: str) -> str:
    a, b = r.randint(100, 9999), r.randint(1, 40)
    return (f"{r.choice(SUBJECTS)} of {product} {r.choice(VERBS)} by {b}.{r.randint(0, 9)}% to ${a:,} million in fiscal "
            f"20{r.randint(19, 25)}, mainly because of {r.choice(REASONS)} and {r.choice(REASONS)}.")


def table(r: random.Random) -> str:
    rows = "".join(
        f'<tr><td>{s}</td><td>$</td><td><ix:nonFraction name="x:y" contextRef="c">{r.randint(100, 9999):,}</ix:nonFraction></td>'
        f"<td>(</td><td>{r.randint(1, 999)}</td><td>)</td></tr>" for s in SUBJECTS)
    return f'<p>(in millions)</p><table><tr><th></th><th colspan="2">2025</th><th colspan="3">2024</th></tr>{rows}</table>'


def filing(key: str, name: str, product: str) -> str:
    r = random.Random(key)
    parts = [f"<h1>{name}</h1><p>Annual report on Form 10-K for the fiscal year ended December 31, 2025</p>"]
    for item in ("Item 1. Business", "Item 1A. Risk Factors", "Item 7. Management's Discussion", "Item 8. Financial Statements"):
        parts.append(f"<h2>{item}</h2>")
        for _ in range(12): parts.append("<p>" + " ".join(sentence(r, product) for _ in range(5)) + "</p>")
        parts.append(table(r))
    hidden = ('<div style="display:none"><ix:header><ix:hidden><ix:nonNumeric name="dei:EntityRegistrantName" contextRef="c">'
              f"{name}</ix:nonNumeric><ix:nonNumeric name=\"dei:DocumentType\" contextRef=\"c\">10-K</ix:nonNumeric>"
              "<ix:nonNumeric name=\"dei:EntityCentralIndexKey\" contextRef=\"c\">0000777777</ix:nonNumeric>hiddenword</ix:hidden></ix:header></div>")
    return ('<html xmlns="http://www.w3.org/1999/xhtml" xmlns:ix="http://www.xbrl.org/2013/inlineXBRL"><head><title>10-K</title></head><body>'
            + hidden + "".join(parts) + "</body></html>\n")


def story(r: random.Random, sentences: int) -> str:
    def one() -> str:
        a, b = r.sample(PEOPLE, 2)
        shapes = [f"{r.choice(TURNS)}, the {a} {r.choice(DEEDS)} a {r.choice(QUALITIES)} {r.choice(THINGS)} near the {r.choice(PLACES)}.",
                  f"A {b} of the {r.choice(PLACES)} had {r.choice(DEEDS)} it with the {r.choice(THINGS)} of the {r.choice(QUALITIES)} {a}.",
                  f"{r.choice(TURNS)} nobody {r.choice(DEEDS)} the {r.choice(PLACES)}, and the {b} {r.choice(DEEDS)} that {r.choice(THINGS)} alone."]
        return r.choice(shapes)
    return " ".join(one() for _ in range(sentences))


def documents() -> None:
    for key, (name, product) in COMPANIES.items(): write(f"filings/{key}_2025_10k.html", filing(key, name, product))
    r = random.Random("encyclopedia")
    write("encyclopedia.jsonl", "".join(json.dumps({"id": f"article-{i}", "text": story(r, 25)}) + "\n" for i in range(40)))
    write("news.cor", "".join(story(r, 9) + "\n" for _ in range(40)))


def benchmarks() -> None:
    "Eight items a task (three a subject) in the layout of the data sets that the suite `quick` reads."
    r = random.Random("benchmarks")
    def pick(k: int) -> list[str]: return r.sample(PLACES, k)
    def items(folder: str, rows: list[dict]) -> None:
        write(f"benchmarks/hf_datasets/{folder}/items.jsonl", "".join(json.dumps(x) + "\n" for x in rows))

    def hellaswag(i: int) -> dict:
        return dict(ind=i, activity_label="Walking", ctx_a=f"A teacher walks to the {pick(1)[0]}.", ctx_b="she", ctx="", source_id=f"t~{i}",
                    endings=[f"looks at the {x} [step] and goes home." for x in pick(4)], split="val", split_type="indomain", label=str(r.randrange(4)))

    def arc(i: int) -> dict:
        names = pick(3 + i % 2)
        return dict(id=f"t{i}", question=f"Which is nearest to the {pick(1)[0]}?", choices=dict(text=names, label=list("ABCD")[:len(names)]),
                    answerKey="ABC"[r.randrange(3)])

    def piqa(i: int) -> dict:
        a, b, c = pick(3)
        return dict(goal=f"How do you cross the {a}?", sol1=f"Walk over the {b}.", sol2=f"Wait at the {c} until it is dry.", label=r.randrange(2))

    def boolq(i: int) -> dict:
        a, b, c = pick(3)
        return dict(question=f"is the {a} near the {b}", answer=bool(r.randrange(2)), passage=f"The {a} lies beside the {c}. The {b} was named after a teacher.")

    for folder, one in {"hellaswag/none/validation": hellaswag, "ai2_arc/ARC-Easy/validation": arc, "piqa/plain_text/validation": piqa,
                        "boolq/none/validation": boolq}.items(): items(folder, [one(i) for i in range(8)])
    for subject in ("professional_accounting", "management", "marketing", "econometrics", "high_school_macroeconomics", "high_school_microeconomics"):
        items(f"hails/mmlu_no_train/{subject}/test", [dict(question=f"Which of these is sold at the {pick(1)[0]}?", subject=subject, choices=pick(4),
                                                           answer=r.randrange(4)) for _ in range(3)])


def write(name: str, text: str) -> None:
    (HERE / name).parent.mkdir(parents=True, exist_ok=True)
    (HERE / name).write_text(text, encoding="utf-8")


def model(at: Path, seed: int = 0, hidden: int = 32, layers: int = 2) -> None:
    "A random Llama with grouped queries and tied embeddings, and a byte-level tokenizer that adds no BOS."
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=320, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
                         pad_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    made = LlamaForCausalLM(config)
    made.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    made.save_pretrained(at)
    tokenizer.save_pretrained(at)


if __name__ == "__main__":
    for name in ("filings", "benchmarks", "model"): shutil.rmtree(HERE / name, ignore_errors=True)
    documents()
    benchmarks()
    model(HERE / "model")
