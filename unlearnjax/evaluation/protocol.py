"""The official evaluation of a model from its weights: generations, answers' NLLs, the membership attack, scores.

As the official script: the prompt is the raw input (no chat template, no added space, the tokenizer's own special
tokens), generation is greedy and ends at the end token, special tokens are skipped when decoding. An answer's NLL is
that of question and answer tokenised together without a space, from the question's own number of tokens on.
Departures: rows run in batches and in the weights' dtype (the script: one by one, bfloat16), and a row that does not
fit the context is refused.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, PyTree

from unlearnjax.data.rows import Document, Row
from unlearnjax.errors import UserError
from unlearnjax.evaluation.batches import check_rows
from unlearnjax.evaluation.csvs import Loss, Scored, write_generations, write_losses
from unlearnjax.evaluation.generate import generate_candidates, stack_of_one
from unlearnjax.evaluation.journal import Journal, Records, digest
from unlearnjax.evaluation.membership import membership
from unlearnjax.evaluation.nll import token_nll_candidates
from unlearnjax.evaluation.probe import probe as score_probe
from unlearnjax.evaluation.semeval import Scores, score
from unlearnjax.models.protocol import Model, Variables

PROBE_ROOM = 8  # new tokens for the probe beyond its longest answer; a generation that needs more cannot match

Progress = Callable[[str, int, int], None]
Warn = Callable[[int, str], None]


class HasModel(Protocol):
    """What `load_model` returns, as far as it is needed here."""

    @property
    def params(self) -> PyTree[Array]: ...
    @property
    def model(self) -> Model: ...
    @property
    def tokenizer(self) -> Any: ...


class _Data(NamedTuple):
    forget: Sequence[Row]
    retain: Sequence[Row]
    members: Sequence[Document]
    nonmembers: Sequence[Document]
    probe: Sequence[Row]


class _Work(NamedTuple):
    """One kind of work in tokens."""

    what: str  # for the progress
    ids: list[list[int]]
    names: list[str]  # of the rows, for errors
    starts: list[int]  # where the counted tokens begin (likelihoods)
    limit: int  # new tokens (generations)


class _Plan(NamedTuple):
    prompts: _Work
    answers: _Work
    documents: _Work
    probe: _Work


class _Outputs(NamedTuple):
    """What one candidate made of the plan."""

    texts: list[str]  # forget's rows, then retain's
    nll: list[float]
    losses: list[float]  # members' documents, then non-members'
    replies: list[str]


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(list(texts))["input_ids"]] if texts else []


def _plan(tokenizer: Any, data: _Data, max_new_tokens: int, answers: bool) -> _Plan:
    rows = [*data.forget, *data.retain]
    prompts = _tokens(tokenizer, [row.input for row in rows])
    names = [f"forget row {row.id!r}" for row in data.forget] + [f"retain row {row.id!r}" for row in data.retain]
    documents = [*data.members, *data.nonmembers]
    of_documents = [f"member document {d.id!r}" for d in data.members]
    of_documents += [f"nonmember document {d.id!r}" for d in data.nonmembers]
    longest = max((len(ids) for ids in _tokens(tokenizer, [row.output for row in data.probe])), default=0)
    return _Plan(
        _Work("generations", prompts, names, [], max_new_tokens),
        _Work(
            "answers' likelihoods",
            _tokens(tokenizer, [row.input + row.output for row in rows if answers]),
            names,
            [len(ids) for ids in prompts if answers],
            0,
        ),
        _Work("membership", _tokens(tokenizer, [d.document for d in documents]), of_documents, [1] * len(documents), 0),
        _Work(
            "probe",
            _tokens(tokenizer, [row.input for row in data.probe]),
            [f"probe row {row.id!r}" for row in data.probe],
            [],
            min(max_new_tokens, longest + PROBE_ROOM),
        ),
    )


def _check(data: _Data, plan: _Plan, model: Model) -> None:
    for split, rows in (("forget", data.forget), ("retain", data.retain)):
        if not rows:
            raise UserError(f"{split}: no rows to evaluate on")
    if bool(data.members) != bool(data.nonmembers):
        raise UserError("the membership attack needs members and non-members; give both or neither")
    for work in plan:
        check_rows(work.ids, model.config.vocab_size, model.config.max_positions, work.limit, work.names)
    for ids, name in zip(plan.documents.ids, plan.documents.names):
        if len(ids) < 2:
            raise UserError(f"{name}: a single token has no NLL; leave the document out")


def stage(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    """What work that reports how much more is done calls, for one of a bar's kinds of work."""
    if progress is None:
        return None
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(what, done, total)

    return advance


def decode(tokenizer: Any, ids: list[list[int]]) -> list[str]:
    """The official script's call. transformers 5 skips its clean-up for byte-level BPE, there as here, and says so."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return list(tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True))
    finally:
        logging.set_verbosity(before)


def _run(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    tokenizer: Any,
    plan: _Plan,
    count: int,
    batch_size: int,
    eos: Sequence[int],
    progress: Progress | None,
    journal: Journal | None,
) -> list[_Outputs]:
    pad = model.config.pad_token_id

    def records(work: _Work, **more: Any) -> Records | None:
        if journal is None:
            return None
        tokens = digest([work.ids, work.starts])
        return journal.records(work.what, config=repr(model.config), tokens=tokens, batch_size=batch_size, **more)

    def generations(work: _Work) -> list[list[str]]:
        if not work.ids:
            return [[] for _ in range(count)]
        found = generate_candidates(
            model, params, lora, work.ids, eos_token_ids=eos, pad_token_id=0 if pad is None else pad,
            max_new_tokens=work.limit, batch_size=batch_size, names=work.names,
            progress=stage(progress, work.what, count * len(work.ids)),
            records=records(work, max_new_tokens=work.limit, eos_token_ids=sorted(set(map(int, eos)))),
        )  # fmt: skip
        return [decode(tokenizer, ids) for ids in found]

    def likelihoods(work: _Work) -> list[list[float]]:
        found = token_nll_candidates(
            model, params, lora, work.ids, work.starts, batch_size=batch_size, names=work.names,
            progress=stage(progress, work.what, count * len(work.ids)), records=records(work) if work.ids else None,
        )  # fmt: skip
        return found.mean.tolist()

    parts = generations(plan.prompts), likelihoods(plan.answers), likelihoods(plan.documents), generations(plan.probe)
    return [_Outputs(*one) for one in zip(*parts)]


def _score(
    data: _Data, outputs: _Outputs, mmlu: float | None, folder: Path | None, warn: Callable[[str], None]
) -> Scores:
    losses = outputs.nll or itertools.repeat(math.nan)
    scored = [
        Scored(row.id, row.task, row.input, row.output, text, nll)
        for row, text, nll in zip([*data.forget, *data.retain], outputs.texts, losses)
    ]
    forget, retain = scored[: len(data.forget)], scored[len(data.forget) :]
    member = [Loss(d.id, nll) for d, nll in zip(data.members, outputs.losses)]
    nonmember = [Loss(d.id, nll) for d, nll in zip(data.nonmembers, outputs.losses[len(member) :])]
    if folder is not None:
        write_generations(folder / "forget_0.csv", forget)
        write_generations(folder / "retain_0.csv", retain)
        if member:
            write_losses(folder / "mia_results" / "member_0.csv", member)
            write_losses(folder / "mia_results" / "nonmember_0.csv", nonmember)
    attack = None
    if any(math.isnan(loss) for loss in outputs.losses):
        warn("the model's losses are not finite, so there is no membership score")
    elif member:
        attack = membership([x.nll for x in member], [x.nll for x in nonmember])
    known = score_probe([row.output for row in data.probe], outputs.replies) if data.probe else None
    return score(forget, retain, attack, mmlu, probe=known, warn=warn)


def evaluate_candidates(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    tokenizer: Any,
    forget: Sequence[Row],
    retain: Sequence[Row],
    members: Sequence[Document] | None = None,
    nonmembers: Sequence[Document] | None = None,
    probe: Sequence[Row] | None = None,
    *,
    mmlu: Sequence[float | None] | None = None,
    answers: bool = True,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    eos_token_ids: Sequence[int] | None = None,
    out_folders: Sequence[str | Path] | None = None,
    progress: Progress | None = None,
    warn: Warn | None = None,
    journal: Journal | None = None,
) -> list[Scores]:
    """Evaluate N candidates of one model at once; a merged adapter is one candidate more.

    Args:
      model, params: the decoder and its base weights, shared by the candidates.
      lora: adapters stacked to [N, layers, ...] with the scale folded into `b`; None is the base alone (N = 1).
      tokenizer: a transformers tokenizer.
      forget, retain: rows to generate for.
      members, nonmembers: documents of the membership attack, both or neither; two tokens or more each.
      probe: neutral questions of the general-knowledge probe.
      mmlu: each candidate's MMLU, measured elsewhere.
      answers: compute the answers' likelihoods too; no official score needs them, and without them `nll` is empty.
      max_new_tokens: the official 256.
      batch_size: rows per batch and candidate; on accelerators fewer where that many do not fit.
      eos_token_ids: end tokens; default the model's, else the tokenizer's.
      out_folders: N folders for the generations' and losses' CSV files.
      progress: called as (what, rows done, rows in all), counting each candidate's rows.
      warn: receives each warning as the candidate's number from 0 and one line; default: Python warnings.
      journal: keeps finished batches; those in it are not computed again. Its fingerprint must tell these weights from
        all others (the rows, settings and the model's configuration are added to it).

    Returns:
      N score dicts (see `unlearnjax.evaluation.semeval.score`), in the candidates' order.

    Raises:
      UserError: an empty split, a row or document that is empty or longer than the context (it is named), members
        without non-members. All of it before the first generation.
    """
    count = 1 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    for what, given in (("mmlu", mmlu), ("out_folders", out_folders)):
        if given is not None and len(given) != count:
            raise UserError(f"{what} has {len(given)} entries for {count} candidates; give one for each")
    data = _Data(forget, retain, members or [], nonmembers or [], probe or [])
    plan = _plan(tokenizer, data, max_new_tokens, answers)
    _check(data, plan, model)
    eos = model.config.eos_token_ids if eos_token_ids is None else eos_token_ids
    if not eos and eos_token_ids is None and getattr(tokenizer, "eos_token_id", None) is not None:
        eos = (tokenizer.eos_token_id,)

    def tell(n: int, message: str) -> None:
        warnings.warn(message if count == 1 else f"candidate {n + 1}: {message}", stacklevel=2)

    outputs = _run(model, params, lora, tokenizer, plan, count, batch_size, eos, progress, journal)
    scores = []
    for n, made in enumerate(outputs):
        folder = None if out_folders is None else Path(out_folders[n])
        told = functools.partial(warn or tell, n)
        scores.append(_score(data, made, None if mmlu is None else mmlu[n], folder, told))
    return scores


def evaluate(
    subject: HasModel | tuple[Model, Variables],
    tokenizer: Any,
    forget: Sequence[Row],
    retain: Sequence[Row],
    members: Sequence[Document] | None = None,
    nonmembers: Sequence[Document] | None = None,
    probe: Sequence[Row] | None = None,
    *,
    mmlu: float | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    eos_token_ids: Sequence[int] | None = None,
    out_folder: str | Path | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
) -> Scores:
    """Evaluate one model: `evaluate_candidates` with N = 1, and its arguments and errors.

    Args:
      subject: what `load_model` returns, or a model with its variables (base weights and one adapter).
      tokenizer: None takes the language model's own.
      warn: receives each warning as one line.
    """
    if isinstance(subject, tuple):
        model, variables = subject
    else:
        model, variables = subject.model, Variables(subject.params)
        tokenizer = subject.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise UserError("the model has no tokenizer; give the one that belongs to it")
    return evaluate_candidates(
        model,
        variables.params,
        stack_of_one(variables.lora),
        tokenizer,
        forget,
        retain,
        members,
        nonmembers,
        probe,
        mmlu=None if mmlu is None else [mmlu],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        eos_token_ids=eos_token_ids,
        out_folders=None if out_folder is None else [out_folder],
        progress=progress,
        warn=None if warn is None else lambda _, message: warn(message),
    )[0]
