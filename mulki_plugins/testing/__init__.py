"""The kit with which an author tests a plugin, an adapter, an optimizer or a stream.

Functions and classes are loaded on first use: they need torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mulki_plugins.libraries import load_lazily

if TYPE_CHECKING:
    from mulki_plugins.testing.kit import (
        CheckFailed,
        check_adapter,
        check_head,
        check_optimizer,
        check_plugin,
        check_stream,
    )
    from mulki_plugins.testing.small import small_model, small_stream
    from mulki_plugins.testing.trial import Trial, train_two_tasks

__all__ = [
    "ADAPTER_CHECKS",
    "HEAD_CHECKS",
    "OPTIMIZER_CHECKS",
    "PLUGIN_CHECKS",
    "STREAM_CHECKS",
    "CheckFailed",
    "Trial",
    "check_adapter",
    "check_head",
    "check_optimizer",
    "check_plugin",
    "check_stream",
    "small_model",
    "small_stream",
    "train_two_tasks",
]

PLUGIN_CHECKS = {
    "made": "it can be created with these options and is an Avalanche plugin",
    "callbacks": "its callbacks are Avalanche's and take `strategy` and **kwargs",
    "trains": "two tasks are evaluated and trained as in a run, with every step, and the weights learn",
    "quiet": "it prints nothing on stdout",
    "finite_loss": "loss, gradients and weights are finite at every step",
    "batch": "it leaves the batch, the training images, the logits and the model's features alone",
    "optimizer": "it leaves the optimizer to the strategy: its weights, settings, learning rate, state and steps",
    "gradients": "gradients reach only the weights that learn, and the whole loss reaches them",
    "surroundings": "it leaves the strategy, the model's mode, torch's settings and the process's settings alone",
    "random_numbers": "it draws from the global random generators without seeding them",
    "files": "it writes no files and opens no connections",
    "teachers": "the teachers stay frozen, unchanged, outside the model and outside the optimizer",
    "repeatable": "the same seed gives the same result",
    "nested_evaluation": "an evaluation in the middle of a task changes nothing",
    "evaluation": "an evaluation changes nothing, and an image's answer does not depend on the rest of its batch",
    "resume": "its state survives a checkpoint: both tasks are the same with and without a resume",
    "growth": "it does not grow from task to task, unless it declares keeps_images",
    "replay": "it works beside Avalanche's replay, where a batch mixes tasks",
    "extremes": "it works with a task of one class, with batches of one image and in mixed precision",
}
"""The checks of `check_plugin`, in order; kit.CHECKS names the function of each."""

HEAD_CHECKS = {
    "made": "it can be created with these options, is a Head and seeds no generator",
    "learns": "three tasks are learned as in a run, and the model's weights stay as they are",
    "answers": "the logits have a row for each image and a column for each candidate of any scope, learned or not",
    "order": "the columns are in the order of the candidates",
    "independent": "an image's answer does not depend on the rest of its batch",
    "unchanged": "an evaluation changes neither the features nor what it keeps",
    "saved": "all that it keeps is saved: a resumed head answers and goes on learning as the old one does",
    "repeatable": "the same seed gives the same answers",
    "quiet": "it prints nothing on stdout",
    "files": "it writes no files and opens no connections",
    "extremes": "it works with a task of one class, with a batch of one image and in mixed precision",
}
"""The checks of `check_head`, in order."""

ADAPTER_CHECKS = {
    "made": "it can be created with these options and is an Adapter",
    "start": "with fresh weights, also those of a first task, the model answers as without it",
    "trains": "two tasks are trained and evaluated, with only its weights learning, and they learn",
    "quiet": "it prints nothing on stdout",
    "finite_loss": "loss, gradients and weights are finite at every step",
    "optimizer": "the optimizer holds every weight that learns, and is left to the strategy",
    "learning": "it adds weights, and within a task only weights that require gradients change",
    "surroundings": "it leaves the strategy, the model's mode, torch's settings and the process's settings alone",
    "random_numbers": "it draws from the global random generators without seeding them",
    "files": "it writes no files and opens no connections",
    "teachers": "a copy of the model is independent of it: teachers answer as the model did before the task",
    "repeatable": "the same seed gives the same result",
    "nested_evaluation": "an evaluation in the middle of a task changes nothing",
    "evaluation": "an evaluation changes nothing, and an image's answer does not depend on the rest of its batch",
    "resume": "its state survives a checkpoint: evaluation and both tasks are the same with and without a resume",
    "merged": "if it can be merged: the merged weights answer as it did, and merging again changes nothing",
    "growth": "outside of the model it keeps nothing that grows from task to task",
    "replay": "it works where a batch mixes tasks",
    "extremes": "it works with a task of one class, with batches of one image and in mixed precision",
}
"""The checks of `check_adapter`, in order."""

OPTIMIZER_CHECKS = {
    "made": "it can be created of parameter groups with a learning rate and is a torch.optim.Optimizer",
    "trains": "two tasks are trained and evaluated with it, and the weights learn",
    "quiet": "it prints nothing on stdout",
    "finite_loss": "loss, gradients and weights are finite at every step",
    "rates": "each group's weights move by the group's own learning rate, also when the schedule changes it",
    "frozen": "weights without a gradient stay as they are",
    "later": "weights that are added by add_param_group learn, too",
    "state": "state_dict and load_state_dict restore it to the bit, and a checkpoint can hold its state",
    "random_numbers": "it draws from the global random generators without seeding them",
    "files": "it writes no files and opens no connections",
    "repeatable": "the same seed gives the same result",
    "resume": "a run that is resumed within a task ends as if it had never stopped",
}
"""The checks of `check_optimizer`, in order."""

STREAM_CHECKS = {
    "made": "it can be created with these options and is a TaskStream with at least one task",
    "names": "tasks, classes and templates have distinct names, and each template holds `{}`",
    "declared": "it has the tasks that its registration names",
    "labels": "`targets` are the images' classes, counted from 0, and every class has training and test images",
    "images": "every image checked is a PIL image that a model can read",
    "separate": "no test image is also a training image",
    "repeatable": "created twice, it has the same images",
    "workers": "its images can be sent to another process",
    "quiet": "it prints nothing on stdout",
    "trains": "a small model trains on each task and is evaluated on it",
}
"""The checks of `check_stream`, in order."""

__getattr__ = load_lazily(
    __name__,
    {
        "CheckFailed": "kit",
        "Trial": "trial",
        "check_head": "kit",
        "check_adapter": "kit",
        "check_optimizer": "kit",
        "check_plugin": "kit",
        "check_stream": "kit",
        "small_model": "small",
        "small_stream": "small",
        "train_two_tasks": "trial",
    },
)
