"""What a merge method is: pure functions on [N, ...] leaves, and a declaration of what they promise.

A method turns N candidate deltas into one. Each published definition of it (its *semantics*) is one `Rule`:

    rounds   statistics(deltas[N, ...]) -> partials      partials only ever reduce by SUM, so they add over leaves
             update(state, partials) -> state            (scope "tree"), over the chunks of a stream and over the
                                                         shards of a mesh (psum); an exact threshold needs many rounds
    combine  (deltas[N, ...], weights[N], state, draws, base) -> delta

One candidate's entries never meet another leaf's except through the statistics. Whoever calls a rule (`engine`, a
stream, a shard_map) decides where the leaves lie; the rule is written once. Rules use jax.numpy only and take their
numbers as arrays, so they can be jitted, and mapped over weights and hyperparameters.

Deltas are cast to float32 by `candidates` before anything is formed from them: signs and thresholds of bfloat16
differences are noise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, UInt32
from unlearnjax_kernels.dare import api as dare
from unlearnjax_kernels.threshold.passes import Passes

Scope = Literal["leaf", "tree"]
Space = Literal["delta", "core", "factors"]
Settings = Mapping[str, Any]
"""Hyperparameters by name: numbers as float32 scalars (traced or not), flags and choices as Python values."""

State = Any
"""A pytree of arrays that a rule carries from round to round; what `combine` calls its statistics."""


class Draws(NamedTuple):
    """A tensor's random numbers, the same however it is cut: they depend on the seed, the candidate and the place.

    seed: None for rules that need no key.
    part: which part of the tensor the deltas at hand are; None is the whole.
    """

    seed: UInt32[Array, "2"] | None
    part: dare.Part | None = None

    @classmethod
    def of(cls, key: Array | None, part: dare.Part | None = None) -> "Draws":
        """The numbers that belong to a JAX key of any implementation."""
        return cls(None if key is None else jax.random.bits(key, (2,), jnp.uint32), part)

    def kept(
        self, candidate: int, shape: tuple[int, ...], density: float | Float32[Array, "..."]
    ) -> Bool[Array, "..."]:
        """True with probability `density` (which may differ from entry to entry)."""
        assert self.seed is not None  # `merge` asks for a key where a rule needs one
        places = dare.places(shape, self.part)
        return dare.kept(self.seed, candidate, places, jnp.asarray(density, jnp.float32))


class Hyperparameter(NamedTuple):
    """One hyperparameter: a number in a range (may be traced), a flag, or a choice (both fixed per compile)."""

    name: str
    summary: str
    default: float | bool | str | None = None
    """None: it has no default and must be given."""
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    """Whether `low` itself is out of range."""
    choices: tuple[str, ...] = ()
    per_candidate: bool = False
    """A number for all candidates, or a sequence or array [N] of one for each."""

    @property
    def required(self) -> bool:
        return self.default is None

    @property
    def static(self) -> bool:
        """Flags and choices change the program; numbers do not."""
        return bool(self.choices) or isinstance(self.default, bool)

    @property
    def range(self) -> str:
        """The valid values in words: `(0, 1]`, `true or false`, `total or frequency`."""
        if self.choices:
            return " or ".join(self.choices)
        if self.static:
            return "true or false"
        return f"{'(' if self.low_open or math.isinf(self.low) else '['}{self.low:g}, {self.high:g}" + (
            ")" if math.isinf(self.high) else "]"
        )


class Properties(NamedTuple):
    """What a rule promises, and what tests/merging/test_properties.py holds it to."""

    identity: tuple[tuple[str, float | bool | str], ...] | None = ()
    """One candidate comes back unchanged under these hyperparameters (`()`: under any; None: under none)."""
    weighted: bool = True
    """It takes other weights than equal ones."""
    zero_weight_is_absence: bool = True
    """A candidate of weight 0 might as well not be there."""
    permutation_invariance: bool = True
    """The order of the candidates does not matter (up to the rounding of a sum)."""
    negation: Literal["always", "unless sums cancel", "never"] = "always"
    """merge(-deltas) = -merge(deltas). "unless sums cancel": wherever no elected sum is exactly zero."""
    scale_equivariance: bool = True
    """merge(c * deltas) = c * merge(deltas) for c > 0."""
    elementwise: bool = True
    """Given the statistics, an entry depends only on the candidates' entries at the same place: leaves may be cut."""
    streamable: bool = False
    """There is an `Accumulator`: candidates can be taken one at a time, in the memory of one."""


Leaves = Sequence[np.ndarray] | Passes
"""Arrays [N, ...], or what gives them one after another, as often as it is called."""


class Round(NamedTuple):
    """One pass over the data, or passes until a condition holds.

    statistics: (deltas[N, ...], weights[N], state, draws, base leaf or None, settings) -> partials, a pytree of
        arrays that reduce by sum.
    update: (state, summed partials, settings) -> state of the same structure, shapes and dtypes.
    until: (state) -> bool []; None: one pass. Where it holds before the first pass, there is none.
    before: a round that goes before each of the passes.
    at_once: (leaves in a CPU's memory, state, settings) -> the state after the round, not by sums but faster; or the
        state as it was, where that did not succeed.
    settled: (state) -> whether `at_once` made it, which a program must know when it is compiled.
    """

    statistics: Callable[
        [Float[Array, "N ..."], Float32[Array, "N"], State, Draws, Float[Array, "..."] | None, Settings], Any
    ]
    update: Callable[[State, Any, Settings], State]
    until: Callable[[State], Bool[Array, ""]] | None = None
    before: "Round | None" = None
    at_once: Callable[[Leaves, State, Settings], State] | None = None
    settled: Callable[[State], bool] = lambda state: False


def of_state(statistics: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """`statistics` of the deltas and the state alone, as a `Round` takes it."""

    def adapted(deltas: Any, weights: Any, state: Any, draws: Any, base: Any, settings: Settings) -> Any:
        return statistics(deltas, state)

    return adapted


def rounds_on(field: str, rounds: tuple[Round, ...]) -> tuple[Round, ...]:
    """The same rounds for a state (a NamedTuple) that holds theirs in `field`."""

    def lifted(inner: Round) -> Round:
        def statistics(deltas: Any, weights: Any, state: Any, draws: Any, base: Any, settings: Settings) -> Any:
            return inner.statistics(deltas, weights, getattr(state, field), draws, base, settings)

        def update(state: Any, partials: Any, settings: Settings) -> Any:
            return state._replace(**{field: inner.update(getattr(state, field), partials, settings)})

        def of_field(value: Callable[[Any], Any]) -> Callable[[Any], Any]:
            return lambda state: value(getattr(state, field))

        def at_once(leaves: Leaves, state: Any, settings: Settings) -> Any:
            assert inner.at_once is not None
            return state._replace(**{field: inner.at_once(leaves, getattr(state, field), settings)})

        return Round(
            statistics,
            update,
            None if inner.until is None else of_field(inner.until),
            None if inner.before is None else lifted(inner.before),
            None if inner.at_once is None else at_once,
            of_field(inner.settled),
        )

    return tuple(lifted(inner) for inner in rounds)


class Accumulator(NamedTuple):
    """The same rule for candidates that come one at a time.

    start: (shape, settings) -> carry.  add: (carry, delta[...], weight, settings) -> carry.
    finish: (carry, settings) -> delta.
    needs_weights: (settings) -> whether the default weights depend on how many candidates there will be; where they do
        not, each candidate without a weight has weight 1.
    """

    start: Callable[[tuple[int, ...], Settings], Any]
    add: Callable[[Any, Float[Array, "..."], Float32[Array, ""], Settings], Any]
    finish: Callable[[Any, Settings], Float32[Array, "..."]]
    needs_weights: Callable[[Settings], bool] = lambda settings: False


def _no_state(size: int, count: int, settings: Settings) -> State:
    return ()


def _any_weights(weights: np.ndarray, settings: Settings) -> str | None:
    return None


class Rule(NamedTuple):
    """One definition of a method.

    combine: (deltas[N, ...], weights[N], state, draws, base leaf or None, settings) -> float32 delta [...].
    start: (entries per candidate in one unit of `scope`, N, settings) -> the state before the first round. It is called
        outside jit with hyperparameters exactly as the user gave them, so that `int(density * size)` is computed in
        double precision when density is a Python float; it must also accept traced numbers.
    check_weights: (concrete weights, settings) -> what is wrong with them, or None.
    """

    semantics: str
    source: str
    combine: Callable[..., Float32[Array, "..."]]
    properties: Properties
    hyperparameters: tuple[Hyperparameter, ...] = ()
    scope: Scope = "leaf"
    """What one set of statistics covers: every leaf its own, or the whole tree."""
    spaces: tuple[Space, ...] = ("delta", "core")
    """Of LoRA adapters. Not "core" for rules that read the base weights; "factors" only for rules whose result is
    proportional to the weights: that is how a factor gets its scale."""
    default_weight: Literal["mean", "one"] = "mean"
    """Weights when none are given: 1/N each, or 1 each."""
    start: Callable[[int, int, Settings], State] = _no_state
    rounds: tuple[Round, ...] = ()
    accumulator: Accumulator | None = None
    check_weights: Callable[[np.ndarray, Settings], str | None] = _any_weights
    needs_key: bool = False
    needs_base: bool | Callable[[Settings], bool] = False
    """Whether it needs the base weights, always or under some settings."""
    least: int = 1
    """How many candidates it merges: at least, and at most."""
    most: int | None = None

    def wants_base(self, settings: Settings) -> bool:
        """Whether it needs the base weights under these settings."""
        return self.needs_base(settings) if callable(self.needs_base) else self.needs_base


class MergeMethod(NamedTuple):
    """A method by its name: one rule per semantics, the first one the default."""

    name: str
    summary: str
    rules: tuple[Rule, ...]

    @property
    def semantics(self) -> tuple[str, ...]:
        return tuple(rule.semantics for rule in self.rules)

    @property
    def spaces(self) -> tuple[Space, ...]:
        """Every space that some semantics of the method works in."""
        return tuple(dict.fromkeys(space for rule in self.rules for space in rule.spaces))

    def rule(self, semantics: str | None = None) -> Rule:
        """The rule of this name, or the default one. Raises KeyError for another name."""
        if semantics is None:
            return self.rules[0]
        return {rule.semantics: rule for rule in self.rules}[semantics]


LAMBDA = Hyperparameter("lambda", "what the merged delta is multiplied by", default=1.0, low=0.0)


def each(value: Any, count: int) -> list[Any]:
    """A per-candidate hyperparameter as one number for each."""
    return [value] * count if np.ndim(value) == 0 else list(value)


def candidates(deltas: Float[Array, "N ..."]) -> list[Float32[Array, "..."]]:
    """The candidates of a leaf in float32, as a Python list: loops over it unroll into one elementwise fusion,
    which is 20 to 50 times faster on CPU than reducing a leading axis."""
    return [deltas[i].astype(jnp.float32) for i in range(deltas.shape[0])]


def total(terms: list[Float32[Array, "..."]]) -> Float32[Array, "..."]:
    """Their sum, first to last."""
    result = terms[0]
    for term in terms[1:]:
        result = result + term
    return result
