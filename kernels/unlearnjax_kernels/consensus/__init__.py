"""Sign consensus (NegMerge): keep the entries on whose sign the candidates agree, and average them, in one pass."""

from unlearnjax_kernels.consensus.api import Votes, add, consensus, finish, start

__all__ = ["Votes", "add", "consensus", "finish", "start"]
