"""MMLU: the layout, the prompts, and scores against transformers' logits on a tiny random model."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unlearnjax import load_model
from unlearnjax.adapters.apply import add_delta
from unlearnjax.adapters.lora import lora_weights, scaled
from unlearnjax.cli.main import main
from unlearnjax.data.bpe import train_tokenizer
from unlearnjax.data.mmlu import Question, load_mmlu
from unlearnjax.data.rows import Document, Row, write_documents, write_rows
from unlearnjax.errors import UserError
from unlearnjax.evaluation.intervals import wilson_interval
from unlearnjax.evaluation.journal import Records
from unlearnjax.evaluation.mmlu import LETTERS, mmlu, mmlu_candidates, mmlu_prompts, prompt_text
from unlearnjax.evaluation.semeval import read_mmlu
from unlearnjax.io.peft import load_adapter
from unlearnjax.models.protocol import Variables

SUBJECTS = {"us_history": 9, "abstract_algebra": 4}  # test questions of each


def record(subject, split, i):
    choices = [f"{(i * 7 + j) % 10}" for j in range(4)]
    return {"question": f"{split} {i} of {subject}?", "subject": subject, "choices": choices, "answer": (i * 3) % 4}


def write_split(folder, split, records):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), folder / f"{split}-00000-of-00001.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("mmlu")
    for subject, count in SUBJECTS.items():
        for split, n in (("test", count), ("dev", 3), ("validation", 5)):
            write_split(root / subject, split, [record(subject, split, i) for i in range(n)])
    write_split(root / "auxiliary_train", "test", [record("none", "test", 0)])  # not a subject
    return root


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data):
    """A random Llama with a tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("model")
    texts = [prompt_text(q, []) for qs in load_mmlu(data, 0).test.values() for q in qs]
    tokenizer = train_tokenizer(texts * 2, 330)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
            )
        ).eval()  # fmt: skip
        for p in model.parameters():
            p.data = torch.ones(p.shape) if p.ndim == 1 else torch.randn(p.shape) * 2 * p.shape[1] ** -0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, load_model(folder), folder


def prompts_of(lm, data, shots):
    return mmlu_prompts(
        load_mmlu(data, shots), lm.tokenizer, vocab_size=lm.config.vocab_size, max_positions=256, shots=shots
    )


def test_the_layout(data, tmp_path):
    found = load_mmlu(data, 2)
    assert {name: len(rows) for name, rows in found.test.items()} == SUBJECTS
    assert list(found.test) == sorted(SUBJECTS)
    assert found.test["us_history"][1] == Question("us_history", "test 1 of us_history?", ("7", "8", "9", "0"), 3)
    assert [q.question for q in found.solved["us_history"]] == ["dev 0 of us_history?", "dev 1 of us_history?"]
    assert load_mmlu(data, 0).solved == {}
    # The configuration `all` holds every subject; without dev, validation is used; letters are answers too.
    rows = [record(subject, "test", i) for subject, n in SUBJECTS.items() for i in range(n)]
    write_split(tmp_path / "all", "test", [{**r, "answer": LETTERS[r["answer"]]} for r in rows])
    write_split(tmp_path / "all", "validation", [record(s, "dev", i) for s in SUBJECTS for i in range(2)])
    write_split(tmp_path / "us_history", "test", rows[:1])
    assert load_mmlu(tmp_path, 2) == found


def test_the_prompt_is_the_originals():
    q = Question("us_foreign_policy", "Who?", ("a", "b", "c", "d"), 2)
    assert prompt_text(q, [q]) == (
        "The following are multiple choice questions (with answers) about  us foreign policy.\n\n"
        "Who?\nA. a\nB. b\nC. c\nD. d\nAnswer: C\n\nWho?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    )


def test_scores_equal_transformers(saved, data):
    model, lm, _ = saved
    prompts = prompts_of(lm, data, 1)
    done = []
    found = mmlu(lm.model, Variables(lm.params), prompts, batch_size=4, progress=done.append)
    assert sum(done) == 13
    test = load_mmlu(data, 1)
    letters = [lm.tokenizer(f" {x}", add_special_tokens=False)["input_ids"][-1] for x in LETTERS]
    right, mass, replies = {}, [], set()
    for subject, questions in test.test.items():
        for q in questions:
            ids = lm.tokenizer(prompt_text(q, test.solved[subject][:1]), return_tensors="pt")["input_ids"]
            with torch.no_grad():
                p = torch.softmax(model(ids).logits[0, -1], dim=-1)[letters].numpy()
            mass.append(p.sum())
            replies.add(int(p.argmax()))
            right.setdefault(subject, []).append(int(p.argmax()) == q.answer)
    flat = [x for xs in right.values() for x in xs]
    assert len(replies) > 1 and 0 < sum(flat) < 13 and len({np.mean(x) for x in right.values()}) == 2
    assert found.average.accuracy == np.mean(flat) and found.average.questions == 13
    assert found.average.interval == wilson_interval(sum(flat), 13)
    assert {name: s.accuracy for name, s in found.subjects.items()} == {n: np.mean(x) for n, x in right.items()}
    assert found.macro == np.mean([np.mean(x) for x in right.values()]) != found.average.accuracy
    assert found.on_letters > 1e-4
    np.testing.assert_allclose(found.on_letters, np.mean(mass), rtol=1e-4)


def test_candidates_and_a_broken_one(saved, data):
    _, lm, _ = saved
    prompts = prompts_of(lm, data, 0)
    rng = np.random.default_rng(0)
    pair = {"a": rng.normal(size=(1, 2, 24)), "b": rng.normal(size=(1, 24, 2))}
    one = {"layers": {"attention": {"o": {k: jnp.asarray(v, jnp.float32) for k, v in pair.items()}}}}
    stack = jax.tree.map(lambda x: jnp.stack([0 * x, x, jnp.nan * x]), one)
    base, changed, broken = mmlu_candidates(lm.model, lm.params, stack, prompts, batch_size=16)
    assert base == mmlu(lm.model, Variables(lm.params), prompts)
    merged = mmlu(lm.model, Variables(add_delta(lm.params, lora_weights(one))), prompts)
    assert changed.subjects == merged.subjects and changed.on_letters != base.on_letters
    np.testing.assert_allclose(changed.on_letters, merged.on_letters, rtol=1e-4)
    assert (broken.average.accuracy, broken.on_letters) == (0.0, 0.0)


def test_long_prompts_lose_solved_questions_from_the_end(saved, data):
    _, lm, _ = saved
    test = load_mmlu(data, 3)
    question = test.test["us_history"][0]
    lengths = [len(lm.tokenizer(prompt_text(question, test.solved["us_history"][:k]))["input_ids"]) for k in range(4)]
    sizes = {"vocab_size": lm.config.vocab_size, "max_positions": lengths[3] - 1, "shots": 3}
    ids = mmlu_prompts(test, lm.tokenizer, **sizes).ids[SUBJECTS["abstract_algebra"]]
    assert ids == lm.tokenizer(prompt_text(question, test.solved["us_history"][:2]))["input_ids"]
    with pytest.raises(UserError, match="MMLU abstract_algebra, question 1: row longer than the context"):
        mmlu_prompts(test, lm.tokenizer, **(sizes | {"max_positions": 20}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"choices": ["a", "b", "c"]}, "row 2: column 'choices' must hold four strings"),
        ({"answer": 4}, "row 2: column 'answer' must be 0 to 3 or A to D, is 4"),
        ({"question": None}, "row 2: question and subject must be strings"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, says):
    write_split(tmp_path / "x", "test", [record("x", "test", 0), record("x", "test", 1) | change])
    with pytest.raises(UserError, match=says):
        load_mmlu(tmp_path, 0)


def test_bad_sources_are_named(data, tmp_path):
    with pytest.raises(UserError, match=r"4 solved questions are to be shown, dev .* has 3 of 'abstract_algebra'"):
        load_mmlu(data, 4)
    with pytest.raises(UserError, match="holds no MMLU test questions"):
        load_mmlu(tmp_path)
    with pytest.raises(UserError, match="must not be negative"):
        load_mmlu(data, -1)
    with pytest.raises(UserError, match="nobody/nothing: no such folder here"):
        load_mmlu("nobody/nothing")
    write_split(tmp_path / "x", "test", [{"question": "x"}])
    with pytest.raises(UserError, match="no column 'choices'; columns there are: question"):
        load_mmlu(tmp_path)
    (tmp_path / "x" / "test-00000-of-00001.parquet").write_text("x")
    with pytest.raises(UserError, match="not a readable parquet file"):
        load_mmlu(tmp_path)


@pytest.fixture
def common(saved, data, tmp_path):
    """What the commands `run` and `evaluate` share, without --out."""
    rows = [Row("d0sc1", "test 1 of", " us history", "Task1"), Row("d0qa0", "test 2 of", " algebra", "Task1")]
    argv = ["--model", str(saved[2]), "--mmlu-data", str(data), "--mmlu-shots", "0"]
    for side in ("forget", "retain"):
        write_rows(tmp_path / f"{side}.jsonl", rows)
        argv += [f"--{side}", str(tmp_path / f"{side}.jsonl")]
    return argv


@pytest.fixture
def stopping(monkeypatch):
    """`stopping.at = n`: SIGTERM comes after the n-th batch of all is recorded; `stopping.added`: of what they were."""

    class Stopping:
        at, added = 0, []

    whole = Records.add

    def add(self, places, results):
        whole(self, places, results)
        Stopping.added.append(self.path.stem)
        if len(Stopping.added) == Stopping.at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Records, "add", add)
    return Stopping


RECIPE = """
defaults: {epochs: 1, rank: 2, micro_batch: 2, accumulation: 1, dropout: 0.0, objective: npo, learning_rate: 1}
candidates: [{name: one, schedule: constant, warmup_ratio: 0}]
adapter: {targets: [o]}
merges: [{method: linear, space: factors}]
evaluation: {max_new_tokens: 4, batch_size: 8}
"""


def test_a_run_measures_it(saved, data, common, tmp_path, capsys, stopping):
    """Of the base, the candidate and the merge; stopped in the middle of it, it is not measured again."""
    _, lm, _ = saved
    for side in ("members", "nonmembers"):
        write_documents(tmp_path / f"{side}.jsonl", [Document(f"{side}{i}", f"test {i} of {side}") for i in range(2)])
        common += [f"--{side}", str(tmp_path / f"{side}.jsonl")]
    (tmp_path / "r.yml").write_text(RECIPE, "utf-8")
    argv = ["run", "--quiet", *common, "--recipe", str(tmp_path / "r.yml"), "--out", str(tmp_path / "out")]
    stopping.at = 2
    assert main(argv) == 143
    assert "in the evaluation, after 39 of 39 rows (MMLU)" in capsys.readouterr().err
    stopping.at = 0
    assert main([*argv, "--resume"]) == 0
    assert stopping.added == ["mmlu"] * 2 + ["generations", "answers-likelihoods", "membership"]
    report = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["data"]["mmlu"] == {"source": data.name, "questions": 13, "shots": 0}
    prompts, losses = prompts_of(lm, data, 0), set()
    for model in report["models"]:
        written = json.loads((tmp_path / "out" / "generations" / model["name"] / "mmlu.json").read_text("utf-8"))
        scores, stack = model["scores"], None
        assert scores["mmlu"] == written["average_acc"]
        terms = [scores[name] for name in ("task_aggregate", "mmlu", "membership_score")]
        assert scores["aggregate"] == pytest.approx(np.mean(terms))
        if model["kind"] != "base":
            adapter = load_adapter(tmp_path / "out" / f"{model['kind']}s" / model["name"], lm.config)
            stack = scaled(adapter.lora, adapter.alpha / adapter.rank)
        expected = mmlu(lm.model, Variables(lm.params, stack), prompts).as_json()
        assert written["subject_acc"] == expected["subject_acc"]
        assert written["probability_on_letters"] == pytest.approx(expected["probability_on_letters"], rel=1e-4)
        losses.add(written["probability_on_letters"])
    assert [model["kind"] for model in report["models"]] == ["base", "candidate", "merge"] and len(losses) > 1
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_an_evaluation_is_stopped_and_goes_on(common, tmp_path, capsys, stopping):
    argv = ["evaluate", "--quiet", *common, "--max-new-tokens", "4", "--batch-size", "16", "--out"]
    assert main([*argv, str(tmp_path / "whole")]) == 0
    expected, every = capsys.readouterr(), list(stopping.added)
    assert every == ["mmlu", "generations", "answers-likelihoods"]
    stopping.added.clear()
    stopping.at = 2
    assert main([*argv, str(tmp_path / "out")]) == 143
    line = capsys.readouterr().err.splitlines()[-1]
    assert "in the evaluation, after 4 of 4 rows (generations); go on with: unlearnjax evaluate" in line
    assert line.endswith(" --resume") and not (tmp_path / "out" / "scores.json").exists()
    stopping.at = 0
    assert main([*argv, str(tmp_path / "out")]) == 2 and "add --resume" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "out"), "--resume"]) == 0
    assert capsys.readouterr() == expected and stopping.added == every
    files = {
        name: {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*.*")}
        for name in ("whole", "out")
    }
    assert files["whole"] == files["out"]
    assert sorted(files["out"]) == ["forget_0.csv", "mmlu.json", "retain_0.csv", "scores.json"]


def test_the_command_line_measures_it(saved, data, common, tmp_path, capsys):
    _, lm, _ = saved
    argv = ["evaluate", *common, "--max-new-tokens", "4", "--batch-size", "16", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "MMLU" in err
    written = json.loads((tmp_path / "out" / "mmlu.json").read_text())
    expected = mmlu(lm.model, Variables(lm.params), prompts_of(lm, data, 0)).as_json()
    assert written == json.loads(json.dumps(expected))
    scores = json.loads(out)
    assert scores["mmlu"] == written["average_acc"] == read_mmlu(tmp_path / "out" / "mmlu.json")
    assert main([*argv[:-1], str(tmp_path / "other"), "--mmlu", str(tmp_path / "out" / "mmlu.json")]) == 2
    assert "give one of them" in capsys.readouterr().err and not (tmp_path / "other").exists()
