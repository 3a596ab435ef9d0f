"""A line on each option of MulKI's own parts, for the reference and for editors."""

from __future__ import annotations

from mulki_plugins.registry.register import Register

_PLUGINS: dict[str, dict[str, str]] = {
    "teachers": {
        "half": "keep the teachers in half precision; auto does where the device is a GPU",
        "use": "which teachers are asked: the pre-trained model (initial), the model before the task (previous), or both",
    },
    "eliciting": {
        "weight": "factor of the loss",
        "momentum": "share of the old prototypes when they follow a batch's class means",
    },
    "adding": {
        "weight": "factor of the loss",
        "temperature": "T of the softened relations; the divergence is multiplied by T²",
        "relations": "factor of each relation; null for all four with 1, one that is not named has 0",
        "classes": "prototypes of the sample's own task, or of all classes seen so far",
    },
    "recalling": {
        "weight": "factor of the loss",
        "temperature": "T of the softened relations; the divergence is multiplied by T²",
        "relations": "factor of each relation; null for text_to_image alone, one that is not named has 0",
        "count": "classes drawn from all earlier tasks in each step",
    },
    "distinguishing": {
        "score": "how unsure a teacher is: of the true label (likelihood), of its prediction (entropy), or by its margin",
        "temperature": "the larger, the more alike the teachers' shares",
    },
    "connecting": {
        "every": "steps between two snapshots of the running mean; null for the last weights alone",
        "inter": "share of the weights from before the task",
        "start": "take the weights at the task's start into the mean",
        "importance": "interpolate each weight by how much it matters to the tasks before and to this one",
    },
    "lwf": {
        "image": "factor of the distillation over the texts",
        "text": "factor of the distillation over the images",
        "temperature": "T of the softened similarities",
        "texts": "the sentences of the task's classes, or random strings",
        "count": "how many random strings",
        "length": "tokens of a random string",
    },
    "l2": {"weight": "factor of the squared distance"},
    "icarl": {
        "memory": "images kept in all",
        "batch_size": "kept images in a batch; null for as many as the task's own",
        "weight": "factor of the distillation",
        "temperature": "T of the softened logits",
    },
    "zscl": {
        "image": "factor of the distillation over the texts",
        "text": "factor of the distillation over the images",
        "temperature": "T of the softened similarities",
        "batch_size": "reference images a step; null for as many as the task's",
    },
    "snd": {
        "previous": "factor of the distance to the model before the task",
        "initial": "factor of the distance to the pre-trained model",
        "slope": "how sharply an image goes to one teacher or the other",
        "threshold": "disagreement of the teachers from which the model before the task is heard",
        "batch_size": "reference images a step; null for twice the task's",
    },
    "avalanche.ewc": {
        "ewc_lambda": "factor of the penalty",
        "mode": "importances of each task apart, or one decaying sum (online)",
        "decay_factor": "of the importances before, in the mode online",
        "keep_importance_data": "keep the importances of all tasks in the mode online",
    },
    "avalanche.si": {
        "si_lambda": "factor of the penalty, or one for each task",
        "eps": "added to the squared path length before dividing",
        "excluded_parameters": "names of weights that are left out",
        "device": "where importances are kept",
    },
    "avalanche.mas": {
        "lambda_reg": "factor of the penalty",
        "alpha": "share of the new importances in their running mean",
        "verbose": "print while importances are computed",
    },
    "avalanche.lwf": {
        "alpha": "factor of the distillation, or one for each task",
        "temperature": "T of the softened outputs",
    },
    "avalanche.replay": {
        "mem_size": "images kept in all",
        "batch_size": "images of the task in a batch; null for the recipe's",
        "batch_size_mem": "kept images in a batch; null for as many",
        "task_balanced_dataloader": "as many images of each task in a batch",
    },
    "avalanche.agem": {
        "patterns_per_experience": "images kept of each task",
        "sample_size": "kept images that a step's gradient is compared on",
    },
}


def describe_options(register: Register) -> None:
    """Add the lines to the parts that are registered."""
    for name, options in _PLUGINS.items():
        register.describe("plugin", name, **options)
    register.describe(
        "stream",
        "mtil-mini",
        order="I, II, or a list of names; without it the tasks come as written",
        tasks="only these tasks",
        evaluate_on="the test images, or a fifth of the training images that is held out (validation)",
    )
    register.describe(
        "stream",
        "mtil",
        root="the folder that holds the data sets' own",
        order="I (alphabetical), II, or a list of names; without it the tasks come as written",
        tasks="only these tasks",
        split="the official parts or four fifths at random (zscl), or the published CoOp splits (coop)",
        shots="training images of each class; null for all",
        download="fetch what is missing and can be fetched",
    )
    register.describe(
        "stream",
        "folders",
        tasks="a list of {name, train, test} or {name, images}, with class_names, templates and leave_out",
    )
    register.describe(
        "model",
        "mulki-tiny",
        pretrained="a file of weights, the folder of a run, or random for random weights; null for its own",
    )
