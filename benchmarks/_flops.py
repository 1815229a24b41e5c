"""Floating-point operations of one candidate-step in closed form: products only, a multiply-add counted as two.

Symbols: B rows a side, W tokens a row, A answer slots a row, T = 2 B W, M = 2 B A; D, F, V widths of the model, its MLP
and its vocabulary, L layers; P = L (4 D^2 + 3 D F) base linears, P1 = 3 D^2 the first layer's q, k, v, whose input
needs no gradient; R adapter parameters.

    base linears   2 T P forward, 2 T (P - P1) backward (they are frozen: no gradient of their own)
    adapters       2 T R forward, 4 T R backward
    attention      4 T W D L forward, 8 T W D L backward (scores and mixture over all W x W pairs)
    head, ours     4 M V D: log-sum-exp and its gradient together, at the answers alone
    head, torch    4 T V D: full logits and their gradient at every position
    reference      torch only: 2 T P + 4 T W D L + 2 T V D, a second forward pass (ours runs it once)
"""

from _subject import Size

FORMULA = {
    "ours": "2T(2P-P1) + 6TR + 12TWDL + 4MVD",
    "torch": "2T(3P-P1) + 6TR + 16TWDL + 6TVD",
    "symbols": "T=2BW, M=2BA, P=L(4DD+3DF), P1=3DD, R adapter parameters; B rows a side, W width, A answer slots",
}


def _shared(size: Size, rows: int, width: int) -> tuple[float, float, float]:
    tokens = 2.0 * rows * width
    base = float(size.layers * sum(i * o for i, o in size.linears))
    first = 3.0 * size.width**2
    pairs = tokens * width * size.width * size.layers
    return tokens, base, 2 * tokens * (2 * base - first) + 6 * tokens * size.adapter_parameters + 12 * pairs


def ours(size: Size, rows: int, width: int, answers: int) -> float:
    """One candidate-step of `rows` rows a side in our step."""
    return _shared(size, rows, width)[2] + 4.0 * (2 * rows * answers) * size.vocabulary * size.width


def torch(size: Size, rows: int, width: int) -> float:
    """One candidate-step of `rows` rows a side in the published code's way."""
    tokens, base, trained = _shared(size, rows, width)
    head = tokens * size.vocabulary * size.width
    reference = 2 * tokens * base + 4 * tokens * width * size.width * size.layers + 2 * head
    return trained + 4 * head + reference
