"""What the kit looks at: the name of each check, and what passes it."""

from __future__ import annotations

PLUGIN_CHECKS = {
    "made": "it can be made with these options, and is an Avalanche plugin",
    "callbacks": "its callbacks are Avalanche's, and take `strategy` and **kwargs",
    "trains": "two tasks are evaluated and trained in a run's order, to their end, with every step, and the weights learn",
    "quiet": "it prints nothing on stdout",
    "finite_loss": "loss, gradients and weights are finite numbers at every step",
    "batch": "the batch, the training images, the logits and the model's features stay as they are",
    "optimizer": "the optimizer is left to the strategy: its weights, settings, learning rate, state and steps",
    "gradients": "gradients reach only the weights that learn, and all of the loss reaches them",
    "surroundings": "the strategy, the model's mode, torch's settings and the process's stay as they are",
    "random_numbers": "the global random generators go on, and are not seeded",
    "files": "it writes no files and opens no connections",
    "teachers": "the teachers stay as they were: frozen, outside the model and outside the optimizer",
    "repeatable": "the same seed gives the same result",
    "nested_evaluation": "an evaluation in the middle of a task changes nothing",
    "evaluation": "an evaluation changes nothing, and answers for each image alike, whatever else it holds",
    "resume": "its state survives a checkpoint: task 2 after a resume is as without one",
    "growth": "it does not grow from task to task, unless it is declared to keep images",
    "replay": "it works beside Avalanche's replay, where a batch mixes tasks",
    "extremes": "it works with a task of one class, with batches of one image, and in mixed precision",
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
