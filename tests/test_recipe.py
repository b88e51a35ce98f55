"""Recipes: what mergekit's planner resolves is what is drawn, and each lint fires where it should and nowhere else."""
import json
import re
import subprocess
import sys
from fractions import Fraction

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from domain_adapt.geometry import Weights, place
from domain_adapt.params import Candidate, UserError, load_params, read_yaml
from domain_adapt.recipe import Recipe, effective_weights, lint, located, recipes, resolved
from domain_adapt.runs import ROOT

LISTING1 = ROOT / "params" / "merges" / "arcee_listing1.yml"
BY_DEPTH = [{"filter": "self_attn", "value": [0.0, 0.5, 0.3, 0.7, 1.0]}, {"filter": "mlp", "value": [1.0, 0.5, 0.7, 0.3, 0.0]},
            {"value": 0.5}]


def one(**fields): return recipes(Candidate(name="one", **fields))[0]


def config(method, models, **more):
    parts = [{"model": m, "parameters": p} if p else {"model": m} for m, p in models.items()]
    return {"merge_method": method, "models": parts, "dtype": "float32"} | more


def own(method, models, **more): return one(mergekit=config(method, models, **more))


@pytest.fixture(scope="module")
def deep(tmp_path_factory, make_model):
    "Three models of five layers each, and the configuration of one of them alone."
    at = tmp_path_factory.mktemp("deep")
    for seed, name in enumerate(("original", "cpt", "base")): make_model(at / name, seed=seed, layers=5)
    (at / "bare").mkdir()
    (at / "bare" / "config.json").write_bytes((at / "original" / "config.json").read_bytes())
    return at


def planned(recipe, at):
    "By tensor: what mergekit's own planner, with the models' folders, hands to its merge method."
    names = {str(at / n): n for n in recipe.models}
    whole = MergeConfiguration.model_validate(located(recipe.config, lambda n: {"model": {"path": str(at / n)}}))
    options = MergeOptions()
    LoaderCache().setup(options)
    planner = MergePlanner(whole, get_architecture_info(whole, options), options, whole.referenced_models()[0].config())
    try: planner._plan()
    finally: LoaderCache.loaders.clear()
    return {w.name: (dict(t.parameters.items()), {names[m.model.path]: dict(p.items()) if hasattr(p, "items") else p
                                                  for m, p in t.input_parameters.items()},
                     t.base_model and names[t.base_model.model.path], [names[m.model.path] for m in t.model_order])
            for w, t in planner._tensors}


SLICES = {"merge_method": "slerp", "base_model": "original", "dtype": "float32", "parameters": {"t": BY_DEPTH}, "slices": [
    {"sources": [{"model": "original", "layer_range": [0, 3]}, {"model": "cpt", "layer_range": [2, 5]}]},
    {"sources": [{"model": "original", "layer_range": [3, 5]}, {"model": "cpt", "layer_range": [3, 5]}], "parameters": {"t": [0.2, 0.4]}}]}


@pytest.mark.oracle
@pytest.mark.parametrize("recipe", [
    one(mergekit=str(LISTING1)), one(method="slerp", t=BY_DEPTH), one(method="linear", weight=[0.1, 0.9]), one(mergekit=SLICES),
    recipes(Candidate(name="dare", method="dare_linear", weight=[{"filter": "v_proj", "value": 1.0}, {"value": [0.2, 0.4]}],
                      density=[0.3, 0.9]), sibling=True)[0],
    own("model_stock", {"cpt": {}, "base": {}}, base_model="original"), own("nuslerp", {"cpt": {"weight": 1}, "original": {"weight": [3, 1]}})],
    ids=["listing-1", "slerp", "linear", "slices", "dare", "model_stock", "nuslerp"])
def test_what_is_read_is_what_mergekit_plans(recipe, deep):
    plan = planned(recipe, deep)
    for folder in (deep / "original", deep / "bare"):
        read = {t.name: (t.shared, t.own, t.base, list(t.inputs)) for t in resolved(recipe, folder)}
        assert read == plan and set(read) == set(Weights(deep / "original"))


def gradient(values, layer, layers):
    "The formula: linear interpolation at i/(n-1), exactly."
    at = Fraction(layer, layers - 1) * (len(values) - 1)
    low = min(int(at), len(values) - 2)
    return float((1 - (at - low)) * Fraction(values[low]) + (at - low) * Fraction(values[low + 1]))


def test_listing_1_by_its_formula(deep):
    table = effective_weights(one(mergekit=str(LISTING1)), deep / "bare").set_index(["model", "module"])["weight"]
    for layer in range(5):
        for kind, cpt in (("mlp", [.25, .5, .5, .25]), ("attention", [.25, .5, .5, 0]), ("other", [.25, .5, .5, .25])):
            assert table["cpt", f"layers.{layer}.{kind}"] == pytest.approx(gradient(cpt, layer, 5), abs=1e-12)
    for module in ("embed_tokens", "norm"):
        assert [table[m, module] for m in ("cpt", "original", "base")] == [.25, .75, 0]


def test_a_stack_of_one_layer_takes_the_last_element(tmp_path, make_model):
    make_model(tmp_path / "m", layers=1)
    table = effective_weights(one(method="linear", weight=[0.25, 0.75]), tmp_path / "m").query("model == 'cpt'").set_index("module")
    assert table.loc["layers.0.mlp", "weight"] == 0.75 and table.loc["norm", "weight"] == 0.25


numbers = st.floats(0, 1).map(lambda x: round(x, 3))
values = numbers | st.lists(numbers, min_size=2, max_size=5)
filters = st.sampled_from(["mlp", "self_attn", "layernorm", "q_proj", "embed_tokens", "layers.3", "nothing"])
settings_of = st.tuples(st.lists(st.tuples(filters, values), max_size=3), values).map(
    lambda s: [*({"filter": f, "value": v} for f, v in s[0]), {"value": s[1]}]) | values


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weight=settings_of, method=st.sampled_from(["linear", "task_arithmetic", "ties", "dare_linear", "slerp"]), sibling=st.booleans())
def test_shares_always_sum_to_one(deep, weight, method, sibling):
    density = {"density": 0.5} if method in ("ties", "dare_linear") else {}
    fields = {"t": weight} if method == "slerp" else {"weight": weight, **density}
    recipe = recipes(Candidate(name="x", method=method, **fields), sibling=sibling)[0]
    table = effective_weights(recipe, deep / "bare")
    assert (table.groupby("module")["weight"].sum() - 1).abs().max() < 1e-9
    assert set(table["model"]) == recipe.models and len(table) == len(recipe.models) * (5 * 3 + 2)
    assert len(lint(recipe, deep / "bare")) >= 0


class TestRecipes:
    def test_filters_and_depth_leave_their_rest_leaf_by_leaf(self):
        weight = [{"filter": "mlp", "value": [0.25, 0.5]}, {"filter": "self_attn", "value": 0.1}, {"value": [0.9, 1.0]}]
        rest = [{"filter": "mlp", "value": [0.75, 0.5]}, {"filter": "self_attn", "value": 0.9}, {"value": [0.1, 0.0]}]
        linear = one(method="linear", weight=weight)
        assert [m["parameters"]["weight"] for m in linear.config["models"]] == [rest, weight]
        task = recipes(Candidate(name="t", method="task_arithmetic", weight=weight), sibling=True)[0]
        assert [m["parameters"] for m in task.config["models"]] == [{"weight": weight}, {"weight": rest}]

    @pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
    def test_masks_are_drawn_for_three_seeds_or_those_given(self, method):
        dare = Candidate(name="d", method=method, weight=0.5, density=0.5)
        assert [(r.name, r.seed) for r in recipes(dare, seed=3)] == [("d", 3), ("d@4", 4), ("d@5", 5)]
        assert [(r.name, r.seed) for r in recipes(dare.model_copy(update={"seeds": [9, 1]}))] == [("d", 9), ("d@1", 1)]

    def test_a_configuration_of_its_own_stays_as_it_is(self):
        given = config("della", {"cpt": {"weight": 0.5, "density": 0.4, "epsilon": 0.1}}, base_model="original")
        made = recipes(Candidate(name="v", mergekit=given), seed=1, dtype="bfloat16", sibling=True)
        assert [r.config for r in made] == [given] * 3 and all(r.verbatim for r in made)
        assert [r.seed for r in made] == [1, 2, 3] and "--random-seed 2" in made[1].yaml
        assert yaml.safe_load(made[0].yaml) == given
        assert one(mergekit=str(LISTING1)).config == read_yaml(LISTING1)

    def test_seeds_for_what_draws_nothing_are_refused(self):
        with pytest.raises(UserError, match=r"merge\.candidates\.x\.seeds: linear draws nothing"):
            recipes(Candidate(name="x", mergekit=config("linear", {"cpt": {"weight": 1}}), seeds=[1]))

    def test_models_are_found_wherever_they_stand(self):
        modules = {"modules": {"default": {"slices": [{"base_model": "b", "sources": [{"model": "s", "layer_range": [0, 1]}]}]}},
                   "merge_method": "ties", "base_model": "t"}
        assert Recipe("r", modules, {}).models == {"b", "s", "t"}

    def test_the_published_runs_lint_as_their_comments_say(self, deep):
        said = {r.name: lint(r, deep / "bare") for c in load_params(ROOT / "params" / "sec_llama3_70b.yaml").merge.candidates
                for r in recipes(c, sibling=True)}
        assert [("shadowed" in s, "outside the layers" in s) for s in said["ties"]] == [(True, False), (False, True), (False, True)]
        assert said["linear-0.5"] == []

    def test_a_hostile_configuration_is_a_user_error(self, deep):
        for bad in ({"merge_method": "ties"}, config("ties", {}), config("linear", {"cpt": {"weight": "much"}}), {"merge_method": "no", "models": 3},
                    config("linear", {"cpt": {"weight": []}}), config("slerp", {"cpt": {}}, parameters={"t": 0.5}), config("linear", {"cpt": {"weight": None}})):
            with pytest.raises(UserError, match=r"merge\.candidates\.one: mergekit cannot read"): lint(one(mergekit=bad), deep / "bare")


def test_reading_a_recipe_opens_no_weights(deep):
    "The configuration alone is enough, and nothing lies where weights would."
    assert [f.name for f in (deep / "bare").iterdir()] == ["config.json"]
    assert effective_weights(one(method="linear", weight=0.5), deep / "bare")["layer"].max() == 4


SOUND = own("linear", {"original": {"weight": 0.4}, "cpt": {"weight": 0.6}})
APART = own("ties", {"cpt": {"weight": 0.6, "density": 0.5}, "original": {"weight": 0.4}}, base_model="base", parameters={"normalize": True})
TRIMMED = own("ties", {"cpt": {"weight": 0.6, "density": 0.5}}, base_model="original", parameters={"normalize": False})
SEEDED = recipes(Candidate(name="s", method="dare_ties", weight=0.6, density=0.5))[0]


@pytest.mark.parametrize("recipe", [SOUND, APART, TRIMMED, SEEDED], ids=["linear", "ties", "trimmed", "dare"])
def test_nothing_is_said_of_a_sound_recipe(recipe, deep):
    assert lint(recipe, deep / "bare") == lint(recipe, deep / "original") == lint(recipe, deep / "bare", [("chat", "cpt")]) == []


def changed(recipe, *at, to):
    made = json.loads(json.dumps(recipe.config))
    node = made
    for key in at[:-1]: node = node[key]
    node[at[-1]] = to
    return Recipe("bad", made, {}, recipe.seed)


CPT = ("models", 0, "parameters")
LINTS = {
    "cancelled": (changed(TRIMMED, "parameters", "normalize", to=True), (), r"cpt's weight \(0\.6\) is cancelled in every tensor.*normalize: false"),
    "cancelled in some": (changed(APART, "models", 1, "parameters", "weight", to=[{"filter": "mlp", "value": 0.0}, {"value": 0.4}]), (),
                          r"cpt's weight \(0\.6\) is cancelled in 15 of 47 tensors"),
    "cancelled by a twin": (APART, [("base", "original")], "cpt's weight .* cancelled"),
    "depth": (changed(TRIMMED, *CPT, "weight", to=[0.2, 0.6]), (), "cpt's weight goes by depth, and embed_tokens, norm stand outside .* 0.2. "),
    "depth of density": (changed(TRIMMED, *CPT, "density", to=[0.2, 0.6]), (), "cpt's density goes by depth"),
    "symmetric depth": (changed(TRIMMED, *CPT, "weight", to=[0.2, 0.6, 0.2]), (), "cpt's weight goes by depth"),
    "depth of t": (one(method="slerp", t=[0.0, 1.0]), (), r"\nt goes by depth"),
    "no tensor": (changed(TRIMMED, *CPT, "weight", to=[{"filter": "attn_q", "value": 1.0}, {"value": 0.6}]), (), "entry 1: filter attn_q matches no tensor"),
    "shadowed": (changed(TRIMMED, *CPT, "weight", to=[{"filter": "mlp", "value": 1.0}, {"filter": "mlp.up", "value": 0.1}, {"value": 0.6}]), (),
                 "entry 2: filter mlp.up is shadowed"),
    "shadowed star": (changed(TRIMMED, *CPT, "weight", to=[{"filter": "*", "value": 1.0}, {"value": 0.6}]), (), r"entry 2: the unfiltered value 0\.6 is shadowed"),
    "nothing kept": (changed(TRIMMED, *CPT, "density", to=0.0), (), "density 0 keeps nothing of its task vector in every tensor"),
    "nothing kept in some": (changed(TRIMMED, *CPT, "density", to=[{"filter": "mlp", "value": 0}, {"value": 1}]), (), "nothing .* 15 of 47"),
    "one kept": (changed(TRIMMED, *CPT, "density", to=0.01), (), r"at most one entry in 11 of 47 tensors, .*\(32 values\).*at least 0\.033"),
    "no seed": (Recipe("d", SEEDED.config, {}), (), "dare_ties draws its masks at random and no seed"),
    "twins": (SOUND, [("cpt", "original")], "cpt and original have the same weights"),
    "a base that is no other": (TRIMMED, [("original", "cpt")], "one is the base"),
    "settings of the base": (changed(APART, "base_model", to="original"), (), "original is both the base and a model with settings"),
    "sum": (changed(changed(SOUND, "parameters", to={"normalize": False}), *CPT, "weight", to=0.6), (), "sum to 1.2 in every tensor.*scaled"),
    "sum over a base": (own("task_arithmetic", {"cpt": {"weight": 0.7}, "original": {"weight": 0.7}}, base_model="base"), (), "sum to 1.4"),
    "sum of zero": (changed(SOUND, *CPT, "weight", to=-0.6), (), "sum to 0 in every tensor"),
    "no such parameter": (changed(TRIMMED, *CPT, "densty", to=1), (), r"cpt's densty has no effect.*Did you mean density\?")}


@pytest.mark.parametrize("case", LINTS)
def test_each_lint_fires(case, deep):
    recipe, same, said = LINTS[case]
    found = lint(recipe, deep / "bare", same)
    assert len([s for s in found if re.search(said, "\n" + s)]) == 1, found
    assert all(s.endswith(".") or s.endswith("?") for s in found) and all(n not in s for s in found for n in (str(deep), "None"))


def test_the_kept_yaml_repeats_the_merge(deep, tmp_path):
    "The command line in its first line, in a folder with links of the models' names, runs."
    recipe = recipes(Candidate(name="d", method="dare_linear", weight=0.5, density=[0.4, 0.8]), seed=4)[0]
    for n in ("original", "cpt"): (tmp_path / n).symlink_to(deep / n)
    (tmp_path / "mergekit_config.yml").write_text(recipe.yaml)
    words = re.match(r"# mergekit-yaml (.*), beside", recipe.yaml)[1].split()
    assert words == ["mergekit_config.yml", "OUT", "--no-write-model-card", "--random-seed", "4"]
    script = "import sys; from mergekit.scripts.run_yaml import main; main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", script, *words, "--quiet"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Weights(tmp_path / "OUT").shapes == Weights(deep / "cpt").shapes
    assert {place(k)[1] for k in Weights(tmp_path / "OUT")} == {None, *range(5)}
