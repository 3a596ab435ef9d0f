"""Avalanche's plugins that do not work with a task-aware CLIP, and why: known by name and by class."""

from __future__ import annotations

UNFIT: dict[str, tuple[tuple[str, ...], str]] = {
    "der": (
        ("DERPlugin",),
        "Avalanche's DER keeps logits of one fixed width, and a CLIP's logits are as wide as the task has classes",
    ),
    "lfl": (("LFLPlugin",), "Avalanche's LFL asks the model for `get_features`, which a CLIP has not"),
    "feature_distillation": (
        ("FeatureDistillationPlugin",),
        "Avalanche's feature distillation asks the model for features by Avalanche's own wrapper",
    ),
    "gem": (
        ("GEMPlugin",),
        "Avalanche's GEM needs a solver of quadratic programs, which is not installed; take avalanche.agem",
    ),
    "lr_scheduler": (
        ("LRSchedulerPlugin",),
        "Avalanche's scheduler plugin restarts a warm-up wrongly from the second task on; use train.schedule",
    ),
    "early_stopping": (
        ("EarlyStoppingPlugin",),
        "Avalanche's early stopping looks for a metric's name that it does not find",
    ),
    "cwr_star": (
        ("CWRStarPlugin",),
        "Avalanche's CWR* consolidates the weights of a last linear layer, and a CLIP classifies by its texts",
    ),
    "bic": (
        ("BiCPlugin",),
        "Avalanche's BiC corrects a bias for each output place, and a place is another class in every task",
    ),
    "cope": (
        ("CoPEPlugin",),
        "Avalanche's CoPE classifies by prototypes kept by class number, and a number is another class in every task",
    ),
    "gss_greedy": (
        ("GSS_greedyPlugin",),
        "Avalanche's GSS calls the model without task labels, and a CLIP then answers for every task",
    ),
    "generative_replay": (
        ("GenerativeReplayPlugin", "TrainGeneratorAfterExpPlugin"),
        "Avalanche's generative replay needs a generator of images beside the model, which no recipe declares",
    ),
    "from_scratch_training": (
        ("FromScratchTrainingPlugin",),
        "Avalanche's training from scratch resets the weights for each task, and nothing is learned continually",
    ),
    "ncm": (
        ("CurrentDataNCMUpdate", "MemoryNCMUpdate", "NCMOracle"),
        "Avalanche's NCM updates need a model with an `eval_classifier`, which a CLIP has not",
    ),
    "fecam": (
        ("CurrentDataFeCAMUpdate", "MemoryFeCAMUpdate", "FeCAMOracle"),
        "Avalanche's FeCAM updates need a model with an `eval_classifier`, which a CLIP has not",
    ),
}  # fmt: skip


def unfit(classes: set[str]) -> str:
    """Why a plugin that is one of these classes of Avalanche cannot be used; empty where it can."""
    return next((reason for names, reason in UNFIT.values() if classes & set(names)), "")
