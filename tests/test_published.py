"Tables of printed scores: what is read, what is refused, and that theirs never stand in the column of ours."
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain_adapt.params import UserError
from domain_adapt.published import COLUMNS, beside, published

ROW = dict(paper="made up", table="Table 1", model="M", method="merged", task="piqa", metric="acc", value="62.5", unit="%")


def write(folder, *rows: dict):
    pd.DataFrame([ROW | r for r in rows]).to_csv(folder / "made_up.csv", index=False)
    return folder / "made_up.csv"


def ours(*rows: tuple) -> pd.DataFrame: return pd.DataFrame(rows, columns=["variant", "task", "metric", "value"])


def test_values_are_read_as_printed(tmp_path):
    table = published(write(tmp_path, {}, dict(value="7", unit="", metric="perplexity", method="NA")))
    assert list(table) == COLUMNS and table["value"].tolist() == [62.5, 7] and table["method"].tolist() == ["merged", "NA"]


@pytest.mark.fault
@pytest.mark.parametrize("bad, message", [
    (dict(value="62,5"), "line 3: the value '62,5' is no number"), (dict(value=""), "line 3: the value '' is no number"),
    (dict(value="inf"), "line 3: the value 'inf'"), (dict(unit="percent"), "line 3: the unit 'percent' is neither % nor empty"),
    (dict(table=""), "line 3: name the paper and the table"), (dict(paper=""), "line 3: name the paper and the table")])
def test_a_line_that_cannot_be_is_named(tmp_path, bad, message):
    with pytest.raises(UserError, match=message): published(write(tmp_path, {}, bad))


@pytest.mark.fault
def test_other_columns_are_refused(tmp_path):
    file = write(tmp_path, {})
    file.write_text(file.read_text().replace("unit", "scale"))
    with pytest.raises(UserError, match="its columns are"): published(file)


def test_ours_and_theirs_stand_side_by_side_where_task_and_metric_are_the_same(tmp_path):
    theirs = published(write(tmp_path, {}, dict(metric="acc_norm"), dict(task="boolq"), dict(task="piqa", method="before", value="0.5", unit="")))
    table = beside(ours(("original", "piqa", "acc", 0.6), ("cpt", "piqa", "acc", 0.7), ("cpt", "arc_easy", "acc", 0.4)), theirs)
    assert table["who"].tolist() == ["original", "cpt", "M, merged", "M, before"]
    assert table["ours"].dropna().tolist() == [0.6, 0.7] and table["theirs"].dropna().tolist() == [0.625, 0.5]
    assert table["source"].tolist() == ["", "", "made up, Table 1", "made up, Table 1"]
    assert (table["task"] == "piqa").all() and (table["metric"] == "acc").all()


def test_nothing_in_common_is_an_empty_table(tmp_path):
    table = beside(ours(("cpt", "arc_easy", "acc", 0.4)), published(write(tmp_path, {})))
    assert len(table) == 0 and list(table) == ["task", "metric", "who", "ours", "theirs", "source"]


TASKS = st.tuples(st.sampled_from(["piqa", "boolq", "arc"]), st.sampled_from(["acc", "acc_norm"]))


@given(st.lists(TASKS, max_size=6), st.lists(TASKS, max_size=6))
def test_a_row_has_one_of_the_two_and_none_is_lost_or_twice(mine, printed):
    a = pd.DataFrame([dict(variant="cpt", task=t, metric=m, value=0.5) for t, m in mine], columns=["variant", "task", "metric", "value"])
    b = pd.DataFrame([ROW | dict(task=t, metric=m, value=50.0) for t, m in printed], columns=COLUMNS)
    table = beside(a, b)
    assert (table["ours"].notna() ^ table["theirs"].notna()).all()
    assert table["ours"].notna().sum() == sum(x in printed for x in mine) and table["theirs"].notna().sum() == sum(x in mine for x in printed)
