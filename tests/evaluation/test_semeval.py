"""The official scores: against the formulas rendered with pandas, rouge_score and scikit-learn, and golden vectors.

The golden vectors need LUME's train split (`forget_train.parquet`, `retain_train.parquet`) in the folder that the
environment variable UNLEARNJAX_LUME names.
"""

import io
import os
import random
import statistics
from pathlib import Path

import pytest

from unlearnjax.data.rows import load_rows
from unlearnjax.errors import UserError
from unlearnjax.evaluation.csvs import Loss, Scored, write_generations, write_losses
from unlearnjax.evaluation.membership import Membership, membership
from unlearnjax.evaluation.probe import Probe, probe
from unlearnjax.evaluation.semeval import kind_of, score, score_folder

WORDS = ["the", "a", "Magical", "stone", "stones", "running", "ran", "of", "Hardy", "1999", "led", "teams;", "team's"]
ODD = [
    "",
    "nan",
    "None",
    "NULL",
    "n/a",
    " ",
    "\n",
    "6 6 6 6 6 6",
    "True",
    "007",
    "a,b",
    'he said "no"',
    "Ünïcode",
    "a\nb",
]


def random_split(draw, documents, odd=True):
    """Rows of three tasks with generations that are right, right but for case and ends, odd, or wrong."""
    rows = []
    for i in range(documents):
        for task, suffixes in (("Task1", ["sc1", "qa0"]), ("Task2", ["sc1", "qa0", "qa1"]), ("Task3", ["sc1", "qa0"])):
            for suffix in suffixes:
                gold = " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))
                kind = draw.random()
                if kind < 0.4:
                    text = gold
                elif kind < 0.5:
                    text = f" {gold.upper()}\n"
                elif kind < 0.7 and odd:
                    text = draw.choice(ODD)
                else:
                    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
                if odd and draw.random() < 0.05:
                    gold = draw.choice(ODD)
                rows.append(Scored(f'"{i}"{suffix}', task, "?", gold, text, draw.random()))
    return rows


def rendering(forget, retain, members, nonmembers, mmlu):
    """The published definition, computed on data frames."""
    pd = pytest.importorskip("pandas")
    metrics = pytest.importorskip("sklearn.metrics")
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    terms, tables = [], {}
    for name, rows in (("forget", forget), ("retain", retain)):
        stored = io.StringIO()
        pd.DataFrame(rows).to_csv(stored, index=False)
        stored.seek(0)
        frame = pd.read_csv(stored)
        frame["kind"] = frame["id"].str.slice(0, -1).str.slice(-2)
        gold, text = frame["expected_output"].map(str), frame["model_output"].map(str)
        frame["score"] = [
            rouge.score(g, t)["rougeL"].recall if k == "sc" else float(g.strip().lower() == t.strip().lower())
            for k, g, t in zip(frame["kind"], gold, text)
        ]
        table = frame.pivot_table(index="task", columns="kind", values="score", aggfunc="mean").sort_index()
        tables[name] = table
        for task in table.index:
            for kind in ("sc", "qa"):
                value = float(table.loc[task, kind])
                terms.append(1 - value if name == "forget" else value)
    labels = [1] * len(members) + [0] * len(nonmembers)
    area = metrics.roc_auc_score(labels, [-x for x in [*members, *nonmembers]])
    task_aggregate = statistics.harmonic_mean(terms)
    final = 1 - 2 * abs(area - 0.5)
    return terms, tables, task_aggregate, area, (task_aggregate + mmlu + final) / 3, (task_aggregate + final) / 2


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_formulas_on_random_generations(seed, tmp_path):
    draw = random.Random(seed)
    forget, retain = random_split(draw, 8), random_split(draw, 9)
    # Losses with one decimal, so that many tie.
    members = [round(draw.gauss(2.0, 0.5), 1) for _ in range(40)]
    nonmembers = [round(draw.gauss(2.2, 0.5), 1) for _ in range(30)]
    terms, tables, task_aggregate, area, aggregate, without = rendering(forget, retain, members, nonmembers, 0.45)
    ours = score(forget, retain, membership(members, nonmembers), 0.45)
    assert ours["aggregated_terms"] == pytest.approx(terms, abs=1e-12) and len(terms) == 12
    for split, table in tables.items():
        for task in ("Task1", "Task2", "Task3"):
            assert ours[split][task]["regurgitation"] == pytest.approx(table.loc[task, "sc"], abs=1e-12)
            assert ours[split][task]["knowledge"] == pytest.approx(table.loc[task, "qa"], abs=1e-12)
    assert ours["task_aggregate"] == pytest.approx(task_aggregate, abs=1e-12)
    assert ours["membership_auc"] == pytest.approx(area, abs=1e-12)
    assert ours["aggregate"] == pytest.approx(aggregate, abs=1e-12)
    assert ours["aggregate_without_mmlu"] == pytest.approx(without, abs=1e-12)

    # The same from a folder of files.
    write_generations(tmp_path / "forget_0.csv", forget)
    write_generations(tmp_path / "retain_0.csv", retain)
    for side, losses in (("member", members), ("nonmember", nonmembers)):
        write_losses(tmp_path / "mia_results" / f"{side}_0.csv", [Loss(str(i), x) for i, x in enumerate(losses)])
    (tmp_path / "mmlu.json").write_text('{"average_acc": 0.45}')
    assert score_folder(tmp_path, tmp_path / "mmlu.json") == ours


def uniform(task_rows, text):
    return [row._replace(model_output=text(row)) for row in task_rows]


def perfect(text_of_forget):
    draw = random.Random(5)
    forget, retain = random_split(draw, 3, odd=False), random_split(draw, 3, odd=False)
    return score(uniform(forget, text_of_forget), uniform(retain, lambda row: row.expected_output))


def test_the_corners():
    assert perfect(lambda row: "").pop("task_aggregate") == 1.0
    kept = perfect(lambda row: row.expected_output)
    # One term at 0 makes the harmonic mean 0.
    assert kept["task_aggregate"] == 0 and kept["aggregated_terms"] == [0.0] * 6 + [1.0] * 6
    assert kept["aggregate"] is None and kept["aggregate_without_mmlu"] is None and kept["mmlu"] is None
    assert kept["probe"] is None and kept["membership_score"] is None
    empty = perfect(lambda row: "")
    assert empty["degenerate"] == {"forget": 1.0, "retain": 0.0}
    # An empty generation is "nan" to the scorer, and so is an empty answer.
    rows = [Scored("a1qa0", "T", "", "NULL", ""), Scored("a1sc1", "T", "", "nan nan", "")]
    assert score(rows, rows)["retain"]["T"] == {"regurgitation": 0.5, "knowledge": 1.0}


def test_aggregates_with_and_without_mmlu():
    rows = [Scored("a1qa0", "T", "", "x", "x"), Scored("a1sc1", "T", "", "word", "word")]
    away = [row._replace(model_output="other") for row in rows]
    attack = Membership(0.3, (0.2, 0.4), 0.6)
    told = []
    with_all = score(away, rows, attack, 0.3, probe=Probe(0.5, (0.2, 0.8), 4), warn=told.append)
    assert with_all["task_aggregate"] == 1.0
    assert with_all["aggregate"] == pytest.approx((1 + 0.3 + 0.6) / 3)
    assert with_all["aggregate_without_mmlu"] == pytest.approx(0.8)
    assert with_all["probe"] == {"accuracy": 0.5, "interval": [0.2, 0.8], "questions": 4}
    assert len(told) == 1 and "MMLU 0.300 is below 0.371" in told[0]
    told.clear()
    assert score(away, rows, attack, None, warn=told.append)["aggregate"] is None
    assert score(away, rows, None, 0.371, warn=told.append)["aggregate"] is None
    assert told == []
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="MMLU must be a share"):
            score(away, rows, attack, wrong)


def test_kinds():
    assert [kind_of(i) for i in ('"ab"sc1', "12qa0", "12qa10", "row-3", "", "q", "xsc")] == [
        "sc", "qa", None, None, None, None, None,
    ]  # fmt: skip


def test_rows_and_tasks_that_cannot_be_scored_are_said():
    rows = [
        Scored("a1qa0", "T", "", "x", "x"), Scored("a1sc1", "T", "", "w", "w"), Scored("a1qa0", "U", "", "x", "y"),
        Scored("row-1", "T", "", "x", "no"), Scored("b1qa0", "", "", "x", "no"), Scored("a1qa0", "T", "", "x", "x"),
    ]  # fmt: skip
    told = []
    ours = score(rows, rows[:2], warn=told.append)
    assert ours["forget"] == {
        "T": {"regurgitation": 1.0, "knowledge": 1.0},
        "U": {"regurgitation": None, "knowledge": 0.0},
    }
    assert ours["aggregated_terms"] == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert any("forget: 1 of 6 rows are not scored" in t and "'row-1'" in t for t in told)
    assert any("1 rows without a task" in t for t in told)
    assert any("1 ids occur more than once" in t for t in told)
    assert any("U has no regurgitation rows" in t for t in told)
    told.clear()
    none = score([row._replace(id="x") for row in rows[:2]], rows[:2], warn=told.append)
    assert none["task_aggregate"] is None and none["aggregate"] is None
    assert any("no task aggregate" in t for t in told)
    with pytest.warns(UserWarning) as caught:
        score([rows[0]._replace(id="x")], rows[:2])
    assert any("no task aggregate" in str(w.message) for w in caught)
    with pytest.raises(UserError, match="retain: no rows"):
        score(rows, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "broken JSON"),
        ('{"average_ac": 1}', "did you mean 'average_ac'"),
        ("[]", "no key"),
        ('{"average_acc": "x"}', "must be a share"),
        ('{"average_acc": 37.1}', "must be a share"),
    ],
)
def test_mmlu_file_errors(tmp_path, content, message):
    rows = [Scored("a1qa0", "T", "", "x", "x"), Scored("a1sc1", "T", "", "w", "w")]
    for split in ("forget", "retain"):
        write_generations(tmp_path / f"{split}_0.csv", rows)
    path = tmp_path / "mmlu.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        score_folder(tmp_path, path)


def test_probe():
    found = probe(["Paris", "Au", "seven", "x"], [" paris\n", "Au.", "seven", "x"])
    assert found.accuracy == 0.75 and found.questions == 4
    # Newcombe 1998, table I, method 3: 81 of 263 gives .2553 to .3662; 0 of 20 gives 0 to .1611.
    many = probe(["a"] * 263, ["a"] * 81 + ["b"] * 182)
    assert many.interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    none = probe(["a"] * 20, ["b"] * 20)
    assert none.interval[0] == 0.0 and none.interval[1] == pytest.approx(0.1611, abs=5e-5)
    with pytest.raises(UserError, match="1 generations for 2 questions"):
        probe(["a", "b"], ["a"])


@pytest.fixture(scope="module")
def lume():
    folder = os.environ.get("UNLEARNJAX_LUME")
    if not folder:
        pytest.skip("golden vectors need LUME's train split: set UNLEARNJAX_LUME to its folder")
    splits = {}
    for split in ("forget", "retain"):
        rows = load_rows(str(Path(folder) / f"{split}_train.parquet"))
        splits[split] = [Scored(r.id, r.task, r.input, r.output, r.output) for r in rows]
    assert len(splits["forget"]) == 1112 and len(splits["retain"]) == 1136
    return splits


def test_golden_gold_everywhere(lume):
    assert score(lume["forget"], lume["retain"])["task_aggregate"] == 0


def test_golden_forget_empty(lume):
    ours = score(uniform(lume["forget"], lambda row: ""), lume["retain"])
    assert ours["task_aggregate"] == 1.0 and ours["degenerate"] == {"forget": 1.0, "retain": 0.0}


def test_golden_sixes_everywhere(lume):
    sixes = {split: uniform(rows, lambda row: "6 " * 256) for split, rows in lume.items()}
    ours = score(sixes["forget"], sixes["retain"])
    assert ours["task_aggregate"] == 0 and ours["degenerate"] == {"forget": 1.0, "retain": 1.0}


def test_golden_another_documents_text(lume):
    """Forget rows answered with a retain document's text, but emails (qa3 of Task2) guessed right from the name.

    Which document answers which was not published with the numbers; over such choices terms move by about .01.
    """
    alike, seen = {}, {}
    for row in lume["retain"]:
        alike.setdefault((row.task, row.id[-3:]), []).append(row)
    forget = []
    for row in lume["forget"]:
        key = row.task, row.id[-3:]
        place = seen[key] = seen.get(key, -1) + 1
        other = alike[key][(place + 5) % len(alike[key])]
        email = key == ("Task2", "qa3")
        forget.append(row._replace(model_output=(row if email else other).expected_output))
    ours = score(forget, lume["retain"])
    assert ours["aggregated_terms"][:6] == pytest.approx([0.889, 1, 0.699, 0.8, 0.890, 1], abs=0.006)
    assert ours["aggregated_terms"][6:] == [1.0] * 6
    assert ours["task_aggregate"] == pytest.approx(0.928, abs=0.001)
    assert ours["degenerate"] == {"forget": 0.0, "retain": 0.0}
