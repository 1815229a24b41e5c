"""Baselines that are one fine-tune on rows with their true labels."""

from unlearnjax.baselines.protocol import Job, Unlearned


def finetune(job: Job) -> Unlearned:
    """Train on the retain rows alone and let the rest be forgotten (FT: Warnecke et al. 2108.11577; Unlearn-Saliency
    unlearn/FT.py)."""
    return job.tune(job.retain)


def l1_sparse(job: Job) -> Unlearned:
    """Fine-tuning on the retain rows with an l1 penalty on all weights (Jia et al. 2304.04934; FT_l1 in
    Unlearn-Sparse's unlearn/FT.py).

    The code multiplies the penalty by 1 - epoch / epochs, the same for all updates of an epoch; here it falls with
    every update, which over all updates is epochs / (epochs + 1) of the code's: 9 % less for 10 epochs.
    """
    return job.tune(job.retain)


def gradient_ascent(job: Job) -> Unlearned:
    """Climb the forget rows' loss (GA: Thudi et al. 2109.13398; Unlearn-Saliency unlearn/GA.py)."""
    return job.tune(job.forget, ascend=True)
