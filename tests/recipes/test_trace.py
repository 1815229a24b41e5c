"""`unlearnjax trace` on a model that knows a few facts."""

import json

import jax
import numpy as np
import pytest

from unlearnjax.cli.main import main
from unlearnjax.errors import UserError
from unlearnjax.recipes.trace import run_trace
from unlearnjax.report.trace import read_trace
from unlearnjax.tracing.facts import load_facts
from unlearnjax.tracing.mediation import mediate
from unlearnjax.tracing.memory import SHARE, bytes_of_fact
from unlearnjax.tracing.tokens import locate
from unlearnjax.tracing.trace import Settings, Tracer

SETTINGS = Settings(kinds=("mlp",), draws=2)  # one kind is quicker to compile


@pytest.fixture(scope="module")
def facts(world, tmp_path_factory):
    """Facts that the model knows, and one of each kind that is skipped."""
    _, corpus, _ = world
    rows = [r._asdict() for r in corpus.forget if r.id[-3:-1] == "qa"]
    rows.append({"id": "wrong", "input": "Where was Anna born?", "output": "Zanzibar"})
    rows.append({"id": "nobody", "input": "what is after 2?", "output": "3"})
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_a_trace_ends_in_layers_a_page_and_every_score(world, facts, tmp_path, capsys):
    base, _, _ = world
    out = tmp_path / "out"
    argv = ["trace", "--model", base.source, "--facts", facts, "--out", str(out), "--draws", "2", "--quiet"]
    assert main(argv) == 0
    report = read_trace(out)
    assert report["counts"] == {"given": 6, "known": 4, "wrong": 1, "skipped": 1, "traced": 4}
    assert {s["id"] for s in report["skipped"]} == {"wrong", "nobody"}
    assert "'Z' is right" in next(s["reason"] for s in report["skipped"] if s["id"] == "wrong")
    first, last = report["recommended"]["layers"]
    assert first == last  # 3/8 of two layers
    traces = [json.loads(line) for line in (out / "facts.jsonl").read_text().splitlines()]
    for t in traces:
        for kind in ("hidden", "mlp", "attention"):
            scores = np.asarray(t["restored"][kind])
            assert scores.shape == (len(t["tokens"]), 2)
            np.testing.assert_array_equal(scores[: t["begin"]], np.float32(t["corrupted"]))
        np.testing.assert_allclose(t["restored"]["hidden"][-1][-1], t["clean"], rtol=1e-5)
    page = (out / "trace.html").read_text()
    assert "Where base keeps 4 facts" in page and "nobody" in page
    assert not (out / "journal").exists()
    assert f"layers: {first} to {last}" in capsys.readouterr().out


def test_a_killed_trace_goes_on(world, facts, tmp_path, monkeypatch):
    """Facts are traced once, and the result is the same."""
    base, _, _ = world
    whole = run_trace(base, facts, tmp_path / "whole", SETTINGS, progress=False)
    run, calls = Tracer.run, []

    def dies(self, group):
        calls.append(group)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, group)

    monkeypatch.setattr("unlearnjax.tracing.trace.CPU_TOKENS_AT_ONCE", 1)
    monkeypatch.setattr(Tracer, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        run_trace(base, facts, tmp_path / "out", SETTINGS, progress=False)
    assert not (tmp_path / "out" / "trace.json").exists()
    with pytest.raises(UserError, match="holds an unfinished trace; add --resume"):
        run_trace(base, facts, tmp_path / "out", SETTINGS, progress=False)
    resumed = run_trace(base, facts, tmp_path / "out", SETTINGS, progress=False, resume=True)
    assert len(calls) == 2 + 3  # four facts, one each; the first was kept, the second begun
    assert resumed["counts"] == whole["counts"]
    np.testing.assert_allclose(resumed["recommended"]["curve"], whole["recommended"]["curve"], atol=1e-6)


def test_a_blank_goes_into_the_prompt(world, facts, monkeypatch):
    """A model whose tokenizer cuts the space before a number off says this first, and then the number."""
    import unlearnjax.tracing.trace as module

    base, _, _ = world
    tokenizer = base.tokenizer
    located, _ = locate(load_facts(facts)[0][:2], tokenizer, 64)
    (blank,) = tokenizer(" ", add_special_tokens=False)["input_ids"]
    right = min(located[0].first)

    def says(config, params, batch):
        last = np.asarray(batch.rest)[:, -1]
        return np.where(last == blank, right, blank), np.full(len(last), 0.5)

    monkeypatch.setattr(module, "first_tokens", says)
    tracer = Tracer(base, located, SETTINGS)
    reported = []
    known, wrong = tracer.known(reported.append)
    assert 0 in known and sum(reported) == len(known) + len(wrong) == 2
    assert tracer.located[0].ids == [*located[0].ids, blank]
    monkeypatch.setattr(module, "first_tokens", lambda c, p, b: (np.full(len(b.rest), blank), np.ones(len(b.rest))))
    assert "the model says ''" in Tracer(base, located, SETTINGS).known()[1][0].reason


def test_calls_are_as_large_as_memory_allows(world, facts, monkeypatch):
    import unlearnjax.tracing.trace as module

    base, _, _ = world
    tracer = Tracer(base, locate(load_facts(facts)[0][:1] * 6, base.tokenizer, 64)[0], SETTINGS)
    places = range(6)
    (whole,) = tracer.groups(places)
    one = bytes_of_fact(base.config, 4, SETTINGS.draws, whole.before, whole.rest)
    held = sum(x.nbytes for x in jax.tree.leaves(base.params))
    monkeypatch.setattr(module, "device_memory", lambda: held + int(2.1 * one / SHARE))
    assert whole.many == 6 and [g.many for g in tracer.groups(places)] == [2, 2, 2]
    monkeypatch.setattr(module, "device_memory", lambda: held)
    assert {g.many for g in tracer.groups(places)} == {1}
    batch = tracer._batch(whole, SETTINGS.draws)
    program = mediate.lower(base.config, base.params, batch, SETTINGS.kinds, tracer.window).compile()
    taken = program.memory_analysis().temp_size_in_bytes
    assert taken / 2 < whole.many * one < 8 * taken


@pytest.mark.slow
def test_a_mesh_changes_nothing(world, facts):
    base, _, _ = world
    located, _ = locate(load_facts(facts)[0], base.tokenizer, 64)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    alone, spread = (Tracer(base, located, SETTINGS, mesh=m) for m in (None, mesh))
    places, _ = alone.known()
    assert spread.known()[0] == places
    runs = [[t for g in tracer.groups(places) for t in tracer.run(g)] for tracer in (alone, spread)]
    assert len(runs[0]) == len(places)
    for a, b in zip(*(sorted(run, key=lambda t: t.id) for run in runs), strict=True):
        assert a.id == b.id
        for kind, scores in a.restored.items():
            np.testing.assert_allclose(scores, b.restored[kind], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 3}, "a range of 3 layers in a model with 2; give 1 to 2"),
        ({"width": 0}, "a range of 0 layers in a model with 2"),
        ({"settings": Settings(kinds=("hidden",)), "width": 3}, "a range of 3 layers"),  # by hidden
        ({"by": "mpl"}, "unknown kind among those traced 'mpl'; did you mean 'mlp'"),
        ({"semantics": "rom"}, "unknown semantics 'rom'; did you mean 'rome'"),
        ({"most": 0}, "most must be at least 1"),
    ],
)
def test_bad_settings_cost_nothing(world, facts, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run_trace(world[0], facts, tmp_path / "out", **{"settings": SETTINGS, "progress": False, **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 0}, "draws must be at least 1"), ({"window": 0}, "window must be at least 1"),
        ({"noise": 0.0}, "noise must be above 0"), ({"kinds": ("mlp", "mlp")}, "different ones"),
        ({"kinds": ("mpl",)}, "unknown kind 'mpl'"), ({"seed": -1}, "seed must be from 0"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(UserError, match=message):
        Settings(**settings)


def test_nothing_to_trace_is_an_error_that_says_why(world, tmp_path, capsys):
    base, _, _ = world
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([{"id": "a", "prompt": "Where was he born?", "subject": "Anna", "attribute": "Oslo"}]))
    argv = ["trace", "--model", base.source, "--facts", str(path), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "no fact is left to trace (1 skipped; the first: 'a': its subject 'Anna' is not in its prompt" in error
    path.write_text(json.dumps([{"id": "a", "prompt": "Where was Anna born?", "subject": "Anna", "attribute": "Zan"}]))
    assert main(argv) == 2
    assert "the model says" in capsys.readouterr().err
    assert not (tmp_path / "out" / "trace.json").exists()
