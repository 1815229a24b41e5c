"""The whole evaluation of a tiny model against transformers, row by row as the official script does it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.data.rows import Document, Row
from unlearnjax.errors import UserError
from unlearnjax.evaluation import generate, nll
from unlearnjax.evaluation.csvs import read_folder
from unlearnjax.evaluation.journal import Journal, recorded
from unlearnjax.evaluation.nll import token_nll, token_nll_candidates
from unlearnjax.evaluation.protocol import evaluate, evaluate_candidates
from unlearnjax.evaluation.semeval import score_folder
from unlearnjax.models.language_model import load_model
from unlearnjax.models.protocol import Variables

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

FORGET = [
    Row("a1sc1", "Once there was a city of", " light and fog.", "Task1"), Row("a1qa0", "Who?", "Marcile", "Task1"),
    Row("b2qa0", "Where was it, and in which of the years?", "In 1999", "Task1"),
]  # fmt: skip
RETAIN = [Row("c3sc1", "The physicist", " led the teams", "Task1"), Row("c3qa0", "Who led?", "Hardy", "Task1")]
MEMBERS = [Document("m1", "Once there was a city of light."), Document("m2", "Marcile led it.")]
NONMEMBERS = [Document("n1", "A flying ace of the war"), Document("n2", "xyzzy plugh"), Document("n3", "Who?")]
PROBE = [Row("p1qa0", "Capital of France?", "Paris", "Probe"), Row("p2qa0", "2 + 2?", "4", "Probe")]
SETTINGS = {"max_new_tokens": 12, "batch_size": 8}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(our language model, transformers' model), of the same weights, with a byte-level tokenizer."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    bpe.train_from_iterator([row.input + row.output for row in FORGET + RETAIN] * 3, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(1)
    config = transformers.OlmoConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    reference = transformers.OlmoForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("tiny")
    reference.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder), reference


def loss_of(reference, ids, start):
    labels = torch.tensor([ids])
    labels[:, :start] = -100
    with torch.no_grad():
        return reference(torch.tensor([ids]), labels=labels).loss.item()


def random_lora(model, count, seed=0):
    rng = np.random.RandomState(seed)
    _, out, inner = model.config.linears["up"]
    shape = (count, model.config.layers)
    a, b = rng.randn(*shape, 2, inner) * 0.4, rng.randn(*shape, out, 2) * 0.4
    return {"layers": {"mlp": {"up": {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}}}}


def test_token_nll_equals_transformers(tiny):
    ours, reference = tiny
    rng = np.random.RandomState(0)
    rows = [rng.randint(2, ours.config.vocab_size, n).tolist() for n in (1, 2, 17, 5, 64, 30)]
    starts = [1, 0, 5, 5, 63, 29]
    done = []
    found = token_nll(ours.model, Variables(ours.params), rows, starts, batch_size=4, progress=done.append)
    assert found.tokens.tolist() == [0, 1, 12, 0, 1, 1] and sum(done) == 6
    assert math.isnan(found.mean[0]) and math.isnan(found.mean[3]) and found.total[0] == 0.0
    for i in (1, 2, 4, 5):
        assert found.mean[i] == pytest.approx(loss_of(reference, rows[i], starts[i]), abs=1e-4)
    # In bfloat16 the product with the head still adds up in float32.
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ours.params)
    rough = token_nll(ours.model, Variables(half), rows[2:3], batch_size=4)
    assert rough.total.dtype == np.float32
    assert rough.mean[0] == pytest.approx(loss_of(reference, rows[2], 1), rel=0.03)


def candidate(lora, n):
    return jax.tree.map(lambda leaf: leaf[n], lora)


def test_token_nll_of_candidates_equals_one_at_a_time(tiny):
    ours, _ = tiny
    rows = [list(range(2, 2 + n)) for n in (9, 20, 4)]
    lora = random_lora(ours.model, 3)
    together = token_nll_candidates(ours.model, ours.params, lora, rows, 2, batch_size=2)
    assert together.total.shape == (3, 3)
    for n in range(3):
        one = Variables(ours.params, candidate(lora, n))
        alone = token_nll(ours.model, one, rows, 2, batch_size=2)
        np.testing.assert_allclose(together.total[n], alone.total, rtol=1e-5)
    assert np.ptp(together.total, axis=0).min() > 1e-2


def test_token_nll_errors(tiny):
    ours, _ = tiny
    variables = Variables(ours.params)
    with pytest.raises(UserError, match="row 1: row longer than the context: 65 tokens, the model takes 64"):
        token_nll(ours.model, variables, [[5] * 65], batch_size=2)
    with pytest.raises(UserError, match="row 2: answer_start must not be negative"):
        token_nll(ours.model, variables, [[5], [5]], [1, -1], batch_size=2)
    with pytest.raises(UserError, match="1 entries for 2 rows"):
        token_nll(ours.model, variables, [[5], [5]], [1], batch_size=2)
    with pytest.raises(UserError, match="batch_size"):
        token_nll(ours.model, variables, [[5]], batch_size=0)


def test_evaluation_equals_the_official_steps(tiny, tmp_path):
    ours, reference = tiny
    stages = []
    found = evaluate(
        ours, None, FORGET, RETAIN, MEMBERS, NONMEMBERS, PROBE, out_folder=tmp_path, mmlu=0.5,
        progress=lambda *stage: stages.append(stage), **SETTINGS,
    )  # fmt: skip
    files = read_folder(tmp_path)
    tokenizer = ours.tokenizer
    for split, rows in ((files.forget, FORGET), (files.retain, RETAIN)):
        assert [(r.id, r.task, r.input, r.expected_output) for r in split[0]] == [
            (r.id, r.task, r.input, r.output) for r in rows
        ]
        for row in split[0]:
            prompt = tokenizer(row.input).input_ids
            out = reference.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=12
            )
            text = tokenizer.batch_decode(
                out[:, len(prompt) :], skip_special_tokens=True, clean_up_tokenization_spaces=True
            )[0]
            assert row.model_output == text
            together = tokenizer(row.input + row.expected_output).input_ids
            assert row.nll == pytest.approx(loss_of(reference, together, len(prompt)), abs=1e-4)
    for losses, documents in ((files.members, MEMBERS), (files.nonmembers, NONMEMBERS)):
        assert [loss.id for loss in losses] == [d.id for d in documents]
        for loss, document in zip(losses, documents):
            assert loss.nll == pytest.approx(loss_of(reference, tokenizer(document.document).input_ids, 0), abs=1e-4)
    again = score_folder(tmp_path, warn=lambda message: None)
    same = [key for key in found if key not in ("probe", "mmlu", "aggregate")]
    assert {key: found[key] for key in same} == {key: again[key] for key in same}
    assert found["probe"]["questions"] == 2 and found["mmlu"] == 0.5 and again["probe"] is None
    ends = {what: (done, total) for what, done, total in stages}
    assert ends == {
        "generations": (5, 5), "answers' likelihoods": (5, 5), "membership": (5, 5), "probe": (2, 2)
    }  # fmt: skip


def test_candidates_equal_one_at_a_time(tiny, tmp_path):
    ours, _ = tiny
    lora = random_lora(ours.model, 2)
    folders = [tmp_path / "a", tmp_path / "b"]
    together = evaluate_candidates(
        ours.model, ours.params, lora, ours.tokenizer, FORGET, RETAIN, MEMBERS, NONMEMBERS, out_folders=folders,
        **SETTINGS,
    )  # fmt: skip
    texts = []
    for n in range(2):
        one = Variables(ours.params, candidate(lora, n))
        alone = evaluate((ours.model, one), ours.tokenizer, FORGET, RETAIN, MEMBERS, NONMEMBERS, **SETTINGS)
        for key in ("aggregated_terms", "membership_auc", "degenerate"):
            assert together[n][key] == alone[key]
        assert together[n]["nll"] == pytest.approx(alone["nll"], rel=1e-5)
        assert together[n]["probe"] is None
        texts.append([row.model_output for row in read_folder(folders[n]).forget[0]])
    assert texts[0] != texts[1]
    without = evaluate_candidates(
        ours.model, ours.params, lora, ours.tokenizer, FORGET, RETAIN, answers=False, **SETTINGS
    )  # fmt: skip
    assert [one["aggregated_terms"] for one in without] == [one["aggregated_terms"] for one in together]
    assert all(one["nll"] == {"forget": None, "retain": None} for one in without)


def test_a_broken_candidate_spoils_only_itself(tiny):
    ours, _ = tiny
    lora = random_lora(ours.model, 2)
    broken = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), lora)
    told = []
    data = (ours.tokenizer, FORGET, RETAIN, MEMBERS, NONMEMBERS)
    whole = evaluate_candidates(ours.model, ours.params, lora, *data, **SETTINGS)
    partly = evaluate_candidates(
        ours.model, ours.params, broken, *data, warn=lambda n, message: told.append((n, message)), **SETTINGS
    )
    assert partly[0]["membership_score"] is None and partly[0]["nll"] == {"forget": None, "retain": None}
    assert partly[1] == whole[1]
    assert [n for n, message in told if message.startswith("the model's losses are not finite")] == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget": []}, "forget: no rows"),
        ({"members": None}, "give both or neither"),
        ({"forget": [Row("long", "word " * 60, "x", "T")]}, "forget row 'long': row longer than the context"),
        ({"retain": [Row("r", "", "x", "T")]}, "retain row 'r': no tokens"),
        ({"nonmembers": [Document("one", "W")]}, "nonmember document 'one': a single token"),
        ({"probe": [Row("p", "word " * 60, "x", "T")]}, "probe row 'p': row longer than the context"),
        ({"out_folders": ["a", "b"]}, "out_folders has 2 entries for 1 candidates"),
    ],
)
def test_errors_come_before_any_generation(tiny, change, message):
    ours, _ = tiny
    given = {"forget": FORGET, "retain": RETAIN, "members": MEMBERS, "nonmembers": NONMEMBERS, "probe": PROBE}
    with pytest.raises(UserError, match=message):
        evaluate_candidates(
            ours.model, ours.params, None, ours.tokenizer, **(given | SETTINGS | change),
            progress=lambda *stage: pytest.fail("work was done"),
        )  # fmt: skip


class Killed(Exception):
    pass


def test_killed_after_any_batch_it_goes_on(tiny, tmp_path, monkeypatch):
    """The same CSVs and scores, bit for bit, and no batch is computed twice."""
    ours, _ = tiny
    computed, said = [], []

    def counted(records, batch, run):
        def one(batch):
            computed.append((run.__name__, tuple(batch.places)))
            return run(batch)

        return recorded(records, batch, one)

    for module in (generate, nll):
        monkeypatch.setattr(module, "recorded", counted)

    def start(name, kill_after=None, weights="mine"):
        """Stops when so many batches have reported; returns the scores and what was computed."""
        left = kill_after
        computed.clear()

        def progress(what, done, total):
            nonlocal left
            left = None if left is None else left - 1
            if left == 0:
                raise Killed

        scores = evaluate_candidates(
            ours.model, ours.params, random_lora(ours.model, 2), ours.tokenizer, FORGET, RETAIN, MEMBERS, NONMEMBERS,
            out_folders=[tmp_path / name / "a", tmp_path / name / "b"], progress=progress, batch_size=2,
            max_new_tokens=12, journal=Journal(tmp_path / "journal", {"base weights": weights}, said.append),
        )  # fmt: skip
        return scores, list(computed)

    def files(name):
        return {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*.csv")}

    scores, whole = start("whole")
    assert len(whole) == 3 + 3 + 3
    Journal(tmp_path / "journal", {}, said.append).remove()
    done = []
    for kill_after in (2, 5, 7):  # the second and third time with what was finished before
        with pytest.raises(Killed):
            start("killed", kill_after)
        done += computed
        assert len(done) == kill_after
    assert not (tmp_path / "killed").exists()
    again, rest = start("killed")
    assert [*done, *rest] == whole and len(rest) == 2
    assert again == scores and len(files("whole")) == 8 and files("killed") == files("whole")
    # With all of it there, nothing is computed; another model takes nothing of it.
    assert start("third") == (scores, []) and files("third") == files("whole") and said == []
    assert start("other", weights="another's")[1] == whole
    assert len(said) == 3 and all("is of another evaluation (not the same: base weights)" in line for line in said)
