"""Whether merges made in memory are those of the mergekit-yaml command, on three models of a run.

python tests/identity.py OUT.csv ORIGINAL HALFWAY CPT writes a row for each method and dtype."""
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
import yaml

from domain_adapt.geometry import Weights
from domain_adapt.merge import Merger
from domain_adapt.params import Candidate, read_yaml
from domain_adapt.recipe import recipes
from domain_adapt.runs import ROOT, write_csv

OURS = dict(linear=dict(weight=0.6), slerp=dict(t=0.4), ties=dict(weight=0.6, density=0.4), task_arithmetic=dict(weight=0.6))


def asked(dtype: str) -> list:
    listing = read_yaml(ROOT / "params" / "merges" / "arcee_listing1.yml") | {"dtype": dtype}
    every = [Candidate(name=m, method=m, **settings) for m, settings in OURS.items()] + [Candidate(name="listing-1", mergekit=listing)]
    return [recipes(c, sibling=True, dtype=dtype)[0] for c in every]


def row(recipe, models: dict, at: Path) -> dict:
    (at / "config.yml").write_text(yaml.safe_dump(recipe.config))
    subprocess.run([Path(sys.executable).with_name("mergekit-yaml"), "config.yml", "out", "--quiet", "--no-copy-tokenizer", "--no-write-model-card"], cwd=at, check=True,
                   stdout=subprocess.DEVNULL)
    theirs, most, same, seen = Weights(at / "out"), 0.0, 0, 0
    for name, tensor in Merger(models, 0).tensors(recipe):
        if name not in theirs: continue
        other = theirs[name]
        seen, same = seen + 1, same + (tensor.dtype == other.dtype and torch.equal(tensor, other))
        most = max(most, (tensor.float() - other.float()).abs().max().item())
    assert seen == len(theirs)
    return dict(merge=recipe.name, dtype=recipe.config["dtype"], tensors=seen, equal_to_the_bit=same, largest_difference=most)


def main(out: str, original: str, halfway: str, cpt: str) -> None:
    models, rows = {"original": Path(original), "base": Path(halfway), "cpt": Path(cpt)}, []
    for dtype in ("bfloat16", "float32"):
        for recipe in asked(dtype):
            with tempfile.TemporaryDirectory() as tmp:
                for name, folder in models.items(): (Path(tmp) / name).symlink_to(folder.resolve())
                rows.append(row(recipe, models, Path(tmp)))
                print(rows[-1])
    write_csv(out, pd.DataFrame(rows))


if __name__ == "__main__": main(*sys.argv[1:])
