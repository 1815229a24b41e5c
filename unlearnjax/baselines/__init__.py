"""Single-run baselines for unlearning image classifiers: the rows of SalUn's and NegMerge's tables that are no merge.

    found = BASELINES["salun"].run(subject, retain, forget, seed=0)

Each is built on `fine_tune`, with the definitions of OPTML-Group's code (Unlearn-Saliency Classification/, and
Unlearn-Sparse) and its settings for CIFAR-10, ResNet-18 and a tenth of the rows to forget, where it names any. A
default that is ours is marked so. What the authors searched is in `search`.
"""

from unlearnjax.baselines.boundary import boundary_expand, boundary_shrink
from unlearnjax.baselines.fine_tuned import finetune, gradient_ascent, l1_sparse
from unlearnjax.baselines.influence import influence
from unlearnjax.baselines.protocol import Baseline, Settings, Unlearned
from unlearnjax.baselines.relabelled import random_label, random_label_forget
from unlearnjax.baselines.salun import salun, salun_forget

__all__ = ["BASELINES", "Baseline", "Settings", "Unlearned"]

_ROWS = (
    Baseline(
        "finetune", "retain", finetune, Settings(learning_rate=0.01, epochs=10),
        "2108.11577; Unlearn-Saliency unlearn/FT.py, README.md",
        {"learning_rate": (1e-4, 1e-1)},  # Unlearn-WorstCase, issue 1
    ),
    Baseline(
        "random_label", "all", random_label, Settings(learning_rate=0.013, epochs=10, order="forget first"),
        "1911.04933; Unlearn-Saliency unlearn/RL.py; settings: SalUn's",
        {"learning_rate": (1e-4, 1e-1)},  # Unlearn-WorstCase, issue 1
    ),
    Baseline(
        "salun", "all", salun, Settings(learning_rate=0.013, epochs=10, order="forget first", mask=0.5),
        "2310.12508; Unlearn-Saliency generate_mask.py, unlearn/RL.py, README.md",
        {"mask": (0.1, 1.0)},  # generate_mask.py
    ),
    Baseline(
        "influence", "all", influence, Settings(momentum=None, weight_decay=None, alpha=1.0, damping=1000),
        "2304.04934; Unlearn-Saliency unlearn/Wfisher.py; alpha: ours",
        {"alpha": (1.0, 20.0)},  # the paper, as Unlearn-Saliency's issue 11 has it, where less than 1 worked better
    ),
    Baseline(
        "l1_sparse", "retain", l1_sparse, Settings(learning_rate=0.01, epochs=10, l1=1e-4),
        "2304.04934; Unlearn-Sparse unlearn/FT.py (FT_l1), README.MD; l1: ours",
    ),
    Baseline(
        "gradient_ascent", "forget", gradient_ascent, Settings(learning_rate=1e-4, epochs=5),
        "2109.13398; Unlearn-Saliency unlearn/GA.py, README.md",
        {"learning_rate": (1e-5, 1e-1)},  # Unlearn-Sparse, issue 5
    ),
    Baseline(
        "boundary_shrink", "forget", boundary_shrink, Settings(learning_rate=1e-5, epochs=10, bound=0.1),
        "2303.11570; Unlearn-Saliency unlearn/boundary_sh.py; learning_rate: ours",
    ),
    Baseline(
        "boundary_expand", "forget", boundary_expand, Settings(learning_rate=1e-5, epochs=10),
        "2303.11570; Unlearn-Saliency unlearn/boundary_ex.py; learning_rate: ours",
    ),
    Baseline(
        "random_label_forget", "forget", random_label_forget, Settings(learning_rate=1e-4, epochs=10),
        "a row of 2410.05583; all settings: ours",
    ),
    Baseline(
        "salun_forget", "forget", salun_forget, Settings(learning_rate=1e-4, epochs=10, mask=0.5),
        "a row of 2410.05583; all settings: ours",
    ),
)  # fmt: skip

BASELINES: dict[str, Baseline] = {row.name: row for row in _ROWS}
"""By name, in the order of the table."""
