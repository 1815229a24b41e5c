"""MMLU as the organisers of SemEval-2025 Task 4 ran it: Open Instruct's code, the probability of the four letters.

A prompt is "The following are multiple choice questions (with answers) about <subject>.", `shots` solved questions and
the question, up to "Answer:"; the reply is whichever of " A", " B", " C", " D" is the likeliest next token (of a letter
of several tokens the last one counts, as there). No chat template. `average_acc`, what the official script reads, is
the mean over questions; the mean over subjects is given beside it, because other papers report that.

How many solved questions the organisers showed is not published; 5 is MMLU's own number and Open Instruct's default.
As there, a prompt of more than 2048 tokens loses solved questions from the end of their list. A question's prompt that
does not fit the model's context even so is refused by its number. Replies of a model whose numbers are not finite are
wrong.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from unlearnjax.data.mmlu import Mmlu, Question
from unlearnjax.distributed.mesh import CANDIDATE, mesh_of
from unlearnjax.distributed.processes import fetch
from unlearnjax.distributed.rules import filled, spread_of, spread_rows
from unlearnjax.errors import UserError
from unlearnjax.evaluation.batches import Batch, batches, check_rows
from unlearnjax.evaluation.generate import stack_of_one
from unlearnjax.evaluation.intervals import wilson_interval
from unlearnjax.evaluation.journal import Journal, digest, finished, recorded
from unlearnjax.evaluation.memory import room
from unlearnjax.models.layers import precision
from unlearnjax.models.protocol import WHERE_IT_IS, Model, Spread, Variables

LETTERS = "ABCD"
SHOTS = 5
LONGEST = 2048  # tokens of a prompt, without special ones, beyond which solved questions are left out


class Accuracy(NamedTuple):
    """Share of right answers, its 95% Wilson interval, and the number of questions."""

    accuracy: float
    interval: tuple[float, float]
    questions: int


class MmluScores(NamedTuple):
    """`average` is over questions (the official `average_acc`), `macro` the mean over subjects.

    `on_letters` is the mean probability that the next token is any of the four letters: near 0, the accuracy compares
    noise.
    """

    average: Accuracy
    macro: float
    on_letters: float
    subjects: dict[str, Accuracy]
    shots: int

    def as_json(self) -> dict[str, Any]:
        """The content of a metrics.json that `--mmlu` reads: `average_acc` and what goes with it."""
        return {
            "average_acc": self.average.accuracy,
            "interval": list(self.average.interval),
            "questions": self.average.questions,
            "macro_acc": self.macro,
            "probability_on_letters": self.on_letters,
            "shots": self.shots,
            "subject_acc": {name: s.accuracy for name, s in self.subjects.items()},
            "subject_questions": {name: s.questions for name, s in self.subjects.items()},
        }


class Prompts(NamedTuple):
    """Every question in tokens, subject by subject."""

    ids: list[list[int]]
    names: list[str]  # for errors
    letters: list[int]  # the token of each of A to D
    answers: list[int]
    subjects: list[str]  # of each question
    shots: int


def _example(question: Question, solved: bool) -> str:
    lines = [question.question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices))]
    return "\n".join(lines) + "\nAnswer:" + (f" {LETTERS[question.answer]}\n\n" if solved else "")


def prompt_text(question: Question, solved: Sequence[Question]) -> str:
    """The whole prompt. The subject's underscores are spaces, and one more stands before it, as in the original."""
    about = " " + question.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return head + "".join(_example(q, solved=True) for q in solved) + _example(question, solved=False)


def mmlu_prompts(data: Mmlu, tokenizer: Any, *, vocab_size: int, max_positions: int, shots: int = SHOTS) -> Prompts:
    """Tokenise every question with its solved ones before it.

    Args:
      data: `load_mmlu`'s, with at least `shots` solved questions of each subject.
      tokenizer: a transformers tokenizer; it adds the special tokens that it adds to any text.
      vocab_size, max_positions: the model's.

    Raises:
      UserError: a prompt without any solved question that is longer than the context, or a tokenizer for which the
        four letters are not four tokens.
    """
    questions = [q for subject in data.test.values() for q in subject]
    numbers = [i for subject in data.test.values() for i in range(1, len(subject) + 1)]
    kept = [shots] * len(questions)
    ids: list[list[int]] = [[] for _ in questions]
    waiting = list(range(len(questions)))
    while waiting:
        texts = [prompt_text(questions[i], data.solved.get(questions[i].subject, [])[: kept[i]]) for i in waiting]
        bare = tokenizer(texts, add_special_tokens=False)["input_ids"]
        whole = tokenizer(texts)["input_ids"]
        long = []
        for i, length, row in zip(waiting, map(len, bare), whole):
            ids[i] = list(row)
            if (length > LONGEST or len(row) > max_positions) and kept[i] > 0:
                kept[i] -= 1
                long.append(i)
        waiting = long
    names = [f"MMLU {q.subject}, question {n}" for q, n in zip(questions, numbers)]
    check_rows(ids, vocab_size, max_positions, 0, names)
    letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1:] for letter in LETTERS]
    found = [token for tokens in letters for token in tokens]
    if len(set(found)) != 4:
        raise UserError("MMLU: the tokenizer does not have four different tokens for the letters A, B, C and D")
    return Prompts(ids, names, found, [q.answer for q in questions], [q.subject for q in questions], shots)


def letter_log_probabilities(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    tokens: Int[Array, "rows length"],
    segments: Int[Array, "rows length"],
    lengths: Int[Array, " rows"],
    letters: Int[Array, " options"],
    spread: Spread = WHERE_IT_IS,
) -> Float[Array, "rows options"]:
    """One candidate: log p of each letter after each row's last token, float32. Only that place meets the head."""
    hidden = model.forward(params, lora, tokens, segments=segments, spread=spread).hidden
    last = jax.vmap(lambda row, length: row[length - 1])(hidden, lengths)
    contract = (((1,), (1,)), ((), ()))
    logits = jax.lax.dot_general(
        last, model.head(params), contract, precision=precision(last.dtype), preferred_element_type=jnp.float32
    )
    return logits[:, letters] - jax.nn.logsumexp(logits, axis=1, keepdims=True)


@functools.lru_cache(maxsize=4)
def program(model: Model, mesh: Mesh | None = None) -> Callable[..., Array]:
    """`letter_log_probabilities` mapped over candidates and jitted, once per model object (and mesh)."""

    @functools.partial(jax.jit, static_argnames=("count",))
    def run(
        params: PyTree, lora: PyTree, tokens: Array, segments: Array, lengths: Array, letters: Array, *, count: int
    ) -> Array:
        one = functools.partial(letter_log_probabilities, model, spread=spread_of(mesh, count))
        apart = CANDIDATE if count > 1 else None
        return jax.vmap(one, in_axes=(None, 0, None, None, None, None), axis_size=count, spmd_axis_name=apart)(
            params, lora, tokens, segments, lengths, letters
        )

    return run


def mmlu_candidates(
    model: Model,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    prompts: Prompts,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
    journal: Journal | None = None,
) -> list[MmluScores]:
    """The MMLU scores of N candidates of one model at once; one program per length bucket.

    Args:
      model: the decoder; reuse the object, the compiled program is kept by it.
      params: base weights, shared by the candidates.
      lora: adapters stacked to [N, layers, ...] with the scale folded into `b`; None is the base alone (N = 1).
      prompts: `mmlu_prompts`.
      batch_size: questions at once, per candidate; on accelerators fewer where that many do not fit.
      progress: called with the number of questions (times N) that have been finished since the last call.
      journal: keeps finished batches; those in it are not computed again.
    """
    wanted = 1 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    lora = filled(params, lora)
    count = 1 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    run = program(model, mesh_of(params))
    letters = np.array(prompts.letters, np.int32)
    found = np.zeros((count, len(prompts.ids), len(LETTERS)), np.float32)
    records = None
    if journal is not None:
        work = {"config": repr(model.config), "tokens": digest(prompts.ids), "letters": prompts.letters}
        records = journal.records("MMLU", **work, batch_size=batch_size)

    def scores(batch: Batch) -> list[list[list[float]]]:
        rows = spread_rows(params, batch.tokens, batch.segments, batch.lengths, candidates=count)
        made = run(params, lora, *rows, letters, count=count)
        return np.asarray(fetch(made))[:, : len(batch.places)].tolist()

    # The pad id is never attended to.
    for batch in batches(
        prompts.ids, batch_size, 0, left=False, widest=model.config.max_positions, per_octave=4,
        fitted=room(model.config, params, lora, count), finished=finished(records),
    ):  # fmt: skip
        found[:, batch.places] = recorded(records, batch, scores)
        if progress is not None:
            progress(wanted * len(batch.places))
    return [_scores(one, prompts) for one in found[:wanted]]


def mmlu(
    model: Model,
    variables: Variables,
    prompts: Prompts,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> MmluScores:
    """The MMLU scores of one model: `mmlu_candidates` with N = 1, and its arguments."""
    stack = stack_of_one(variables.lora)
    return mmlu_candidates(model, variables.params, stack, prompts, batch_size=batch_size, progress=progress)[0]


def _scores(found: Float[np.ndarray, "questions options"], prompts: Prompts) -> MmluScores:
    right = (found.argmax(axis=1) == np.array(prompts.answers)) & ~np.isnan(found).any(axis=1)
    of = np.array(prompts.subjects)
    subjects = {name: _accuracy(right[of == name]) for name in dict.fromkeys(prompts.subjects)}
    macro = float(np.mean([s.accuracy for s in subjects.values()]))
    on_letters = float(np.nan_to_num(np.exp(found.astype(np.float64))).sum(axis=1).mean())
    return MmluScores(_accuracy(right), macro, on_letters, subjects, prompts.shots)


def _accuracy(right: np.ndarray) -> Accuracy:
    number, trials = int(right.sum()), len(right)
    return Accuracy(number / trials, wilson_interval(number, trials), trials)
