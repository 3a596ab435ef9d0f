"""What the kit looks at: the name of each check, and what passes it."""

from __future__ import annotations

PLUGIN_CHECKS = {
    "made": "it can be made with these options, and is an Avalanche plugin",
    "callbacks": "its callbacks are Avalanche's, and take `strategy` and **kwargs",
    "trains": "two tasks are trained to their end, with every step, and the weights learn",
    "quiet": "it prints nothing on stdout",
    "finite_loss": "loss, gradients and weights are finite numbers at every step",
    "optimizer": "the optimizer is left to the strategy: its weights, settings, learning rate, state and steps",
    "gradients": "gradients reach only the weights that learn",
    "teachers": "the teachers stay as they were: frozen, outside the model and outside the optimizer",
    "repeatable": "the same seed gives the same result",
    "nested_evaluation": "an evaluation in the middle of a task changes nothing",
    "resume": "its state survives a checkpoint: task 2 after a resume is as without one",
    "growth": "it does not grow from task to task, unless it is declared to keep images",
    "replay": "it works beside Avalanche's replay, where a batch mixes tasks",
}
"""Of `check_plugin`, in this order."""

STREAM_CHECKS = {
    "made": "it can be made with these options, and is a TaskStream with at least one task",
    "names": "tasks, classes and templates have names that can be told apart, each template with `{}`",
    "declared": "the tasks that it is registered with are those that it has",
    "labels": "`targets` are the images' classes, from 0, and every class has images to train and to test",
    "images": "every image that is looked at is a PIL image that a model can read",
    "separate": "no test image is also a training image",
    "repeatable": "made twice, it has the same images",
    "workers": "its images can be handed to another process",
    "quiet": "it prints nothing on stdout",
    "trains": "a small model trains on each task and is evaluated on it",
}
"""Of `check_stream`, in this order."""
