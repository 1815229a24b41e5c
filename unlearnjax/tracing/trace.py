"""Tracing many facts: which the model knows, batches of like length, and what was measured of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unlearnjax.data.buckets import round_up
from unlearnjax.distributed.mesh import device_memory
from unlearnjax.distributed.processes import fetch, put
from unlearnjax.errors import UserError, check_known
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.tracing.facts import Skipped
from unlearnjax.tracing.mediation import KINDS, Facts, blocks, first_tokens, mediate
from unlearnjax.tracing.memory import facts_at_once
from unlearnjax.tracing.tokens import Located

# Tokens that go through a layer together: a CPU's caches hold few, an accelerator is fed by more.
CPU_TOKENS_AT_ONCE, TOKENS_AT_ONCE = 2**12, 2**16
BEFORE = 16  # what comes before a subject is padded to a multiple of it


@dataclass(frozen=True)
class Settings:
    """How facts are traced; the defaults are ROME's (2202.05262, section 2.1 and its code).

    Attributes:
      kinds: which activations are restored. window: layers restored together, of `mlp` and `attention`; None: in
        proportion to ROME's, which are 10 of GPT-2 XL's 48. (Selective Amnesia takes 10 of OLMo-1B's 16.)
      noise: standard deviation of the noise, in those of the embeddings of all subjects' tokens.
      draws: of noise, per fact. seed: of the noise; all facts and all restorations have the same draws.
    """

    kinds: tuple[str, ...] = KINDS
    window: int | None = None
    noise: float = 3.0
    draws: int = 10
    seed: int = 1

    def __post_init__(self) -> None:
        check_known(self.kinds, KINDS, "kind", "trace")
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise UserError(f"trace: kinds must be different ones of {', '.join(KINDS)}")
        for name in ("window", "draws"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"trace: {name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.noise < float("inf"):
            raise UserError(f"trace: noise must be above 0, not {self.noise}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"trace: seed must be from 0 to 2^32 - 1, not {self.seed}")


def default_window(layers: int) -> int:
    """ROME's share of the layers."""
    return max(1, round(10 * layers / 48))


class Traced(NamedTuple):
    """One fact. Positions are tokens of the prompt; the subject's are begin to end - 1.

    `restored[kind]`: float32 [positions, layers], the answer's probability with this activation put back.
    """

    id: str
    subject: str
    tokens: list[str]
    begin: int
    end: int
    answer: str
    clean: float
    corrupted: float
    restored: dict[str, np.ndarray]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "restored": {kind: x.tolist() for kind, x in self.restored.items()}}


def traced(record: dict[str, Any]) -> Traced:
    """What `Traced.plain` gave."""
    restored = {kind: np.asarray(x, np.float32) for kind, x in record["restored"].items()}
    return Traced(**{**record, "restored": restored})


def padded(length: int) -> int:
    """Of what is run again for each restoration: an even number, and a multiple of about an eighth of it."""
    unit = max(2, 1 << max(length.bit_length() - 3, 0))
    return round_up(length, unit)


class Group(NamedTuple):
    """Facts that run together, by their places in the caller's list, and the lengths and the number they are padded
    to: every distinct one is compiled."""

    places: list[int]
    before: int
    rest: int
    many: int


class Tracer:
    """Traces facts with one model.

    Args:
      located: all facts: the scale of the noise is theirs together.
      mesh: spread the facts of a call over all devices of a mesh; the weights must lie on it too.
    """

    def __init__(
        self, lm: LanguageModel, located: Sequence[Located], settings: Settings, *,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:  # fmt: skip
        self.located, self.settings, self.mesh = list(located), settings, mesh
        self.window = default_window(lm.config.layers) if settings.window is None else settings.window
        self.tokenizer, self.config = lm.require_tokenizer(), lm.config
        self.params = lm.params
        self.sigma = settings.noise * self._spread_of_subjects(lm)

    def _spread_of_subjects(self, lm: LanguageModel) -> float:
        """Standard deviation over all elements of the embeddings of all subjects, each tokenized alone."""
        subjects = [x.fact.subject for x in self.located]
        coded = self.tokenizer(subjects, add_special_tokens=False)["input_ids"]
        ids = jnp.asarray([i for one in coded for i in one], jnp.int32)
        rows = np.asarray(fetch(lm.params["embed"]["weight"][ids].astype(jnp.float32)), np.float64)
        return float(np.std(rows, ddof=1)) * self.config.embed_scale

    def known(self, report: Callable[[int], None] | None = None) -> tuple[list[int], list[Skipped]]:
        """The places of the facts whose first token the model gets right, and the others with what it says.

        A blank token (where the space before a number is one, or a line break) is no answer: it goes into the fact's
        prompt, and what comes after it is the first token.
        """
        right, wrong, left = [], [], list(range(len(self.located)))
        for last in (False, False, True):  # at most two blanks
            blank = []
            for group in self.groups(left, restored=False):
                ids, chance = fetch(first_tokens(self.config, self.params, self._batch(group, draws=0)))
                for place, token, p in zip(group.places, ids.tolist(), chance, strict=False):
                    x, says = self.located[place], self.tokenizer.decode([token])
                    if says and not says.strip() and not last and len(x.ids) < self.config.max_positions:
                        self.located[place] = x._replace(ids=[*x.ids, token])
                        blank.append(place)
                    elif token in x.first or says.strip() in x.expected:
                        right.append(place)
                    else:
                        wanted = " or ".join(repr(t) for t in sorted(x.expected)) or "another token"
                        reason = f"the model says {says.strip()!r} ({p:.2f}), and {wanted} is right"
                        wrong.append((place, Skipped(x.fact.id, reason)))
                if report is not None:
                    report(sum(place not in blank for place in group.places))
            left = blank
        return sorted(right), [skipped for _, skipped in sorted(wrong)]

    def groups(self, places: Sequence[int], *, restored: bool = True) -> list[Group]:
        """The facts in calls of like lengths, the longest first.

        Args:
          restored: whether they are to be traced, or asked for their first token alone, which takes more at once.
        """
        most = CPU_TOKENS_AT_ONCE if jax.default_backend() == "cpu" else TOKENS_AT_ONCE
        memory = device_memory() if restored else None
        by_lengths: dict[tuple[int, int], list[int]] = {}
        for place in places:
            x = self.located[place]
            rest = padded(len(x.ids) - x.begin)
            lengths = (round_up(max(len(x.ids) - rest, 1), BEFORE), rest)
            by_lengths.setdefault(lengths, []).append(place)
        found = []
        for (before, rest), own in sorted(by_lengths.items(), key=lambda item: -sum(item[0])):
            tokens = self.settings.draws * max(n * (rest - first) for first, n in blocks(rest)) if restored else rest
            at_once = max(1, most // tokens)
            if memory is not None:
                devices = 1 if self.mesh is None else self.mesh.size
                fit = facts_at_once(self.config, self.params, self.settings.draws, before, rest, memory)
                at_once = min(at_once, fit * devices)
            calls = -(-len(own) // at_once)
            many = -(-len(own) // calls)
            if self.mesh is not None:
                many = round_up(many, self.mesh.size)
            found += [Group(own[i : i + many], before, rest, many) for i in range(0, len(own), many)]
        return found

    def run(self, group: Group) -> list[Traced]:
        """Trace the facts of a group."""
        got = fetch(
            mediate(self.config, self.params, self._batch(group, self.settings.draws), self.settings.kinds, self.window)
        )
        return [self._traced(self.located[place], i, got) for i, place in enumerate(group.places)]

    def _traced(self, x: Located, i: int, got: Any) -> Traced:
        rest, corrupted = len(x.ids) - x.begin, float(got.corrupted[i])
        restored = {}
        for kind in self.settings.kinds:
            scores = got.restored[kind]
            whole = np.full((len(x.ids), scores.shape[2]), corrupted, np.float32)  # before the subject: no effect
            whole[x.begin :] = scores[i, -rest:]
            restored[kind] = whole
        tokens = [self.tokenizer.decode([t]) for t in x.ids]
        answer = self.tokenizer.decode([int(got.answer[i])])
        return Traced(
            x.fact.id, x.fact.subject, tokens, x.begin, x.end, answer, float(got.clean[i]), corrupted, restored
        )

    def _batch(self, group: Group, draws: int) -> Facts:
        """The arrays of a call, filled up with its first fact, with so many draws of noise."""
        facts = [self.located[place] for place in group.places]
        facts += [facts[0]] * (group.many - len(facts))
        many, hidden = len(facts), self.config.hidden_size
        tokens = np.zeros((many, group.before + group.rest), np.int32)
        noise = np.zeros((many, draws, group.rest, hidden), np.float32)
        for i, x in enumerate(facts):
            tokens[i, -len(x.ids) :] = x.ids
            begin = group.rest - len(x.ids) + x.begin
            # As ROME's code draws it, anew for each fact.
            draw = np.random.RandomState(self.settings.seed).randn(draws, x.end - x.begin, hidden)
            noise[i, :, begin : begin + x.end - x.begin] = self.sigma * draw
        before, rest = tokens[:, : group.before], tokens[:, group.before :]
        lengths = np.asarray([len(x.ids) for x in facts], np.int32)
        made = (before, rest, lengths, noise)
        if self.mesh is None:
            return Facts(*map(jax.device_put, made))
        spread = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(self.mesh.axis_names))
        return Facts(*(put(x, spread) for x in made))
