"""The parts that MulKI brings, registered through the same hook as anybody else's."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Literal

from mulki_plugins.registry.described import describe_options
from mulki_plugins.registry.hookspecs import hookimpl
from mulki_plugins.registry.parts import Provenance
from mulki_plugins.registry.register import Register
from mulki_plugins.registry.unfit import UNFIT
from mulki_plugins.types import Count, Fraction, Positive, Weight

MULKI = "arXiv 2411.06764"


def _version() -> str:
    try:
        return version("mulki")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return ""


PROVENANCE = Provenance(distribution="mulki", version=_version())


@hookimpl
def mulki_register(register: Register) -> None:
    for kind in ("recipes", "strategies"):
        register.folder(kind, _yaml_folder(kind))  # type: ignore[arg-type]
    _register_stages(register)
    _register_baselines(register)
    _register_avalanche(register)
    _register_streams_and_models(register)
    _register_reports(register)
    describe_options(register)
    for name, summary in _COMMANDS.items():
        module = "listing:list_command" if name == "list" else f"{name}:{name}"
        register.command(name, f"mulki_plugins.cli.{module}", summary=summary)


_COMMANDS = {
    "run": "train and evaluate a recipe",
    "resume": "go on with a run that was stopped or killed",
    "data": "which data sets of a recipe are there, and how to get the others",
    "validate": "check a recipe or a strategy",
    "show": "print a recipe as it will run",
    "list": "what there is to put into a recipe",
    "results": "the tables of finished runs",
    "plugins": "the packages that add parts, and their state",
    "doctor": "whether everything that is needed is there and works",
    "new": "files to start from",
    "schema": "the JSON Schema of a recipe or a strategy",
}
"""MulKI's own, so that no other package takes their names."""


def _yaml_folder(kind: str) -> Path:
    """Inside the package in a wheel, beside it in a checkout."""
    package = Path(str(files("mulki_plugins")))
    inside = package / kind
    return inside if inside.is_dir() else package.parent / kind


def _register_stages(register: Register) -> None:
    register.plugin(
        "teachers",
        "mulki_plugins.stages.teachers:Teachers",
        summary="holds the pre-trained model and the model before this task, frozen; forwards each once per step",
        source=MULKI,
    )
    register.plugin(
        "eliciting",
        "mulki_plugins.stages.eliciting:Eliciting",
        summary="stage 1: aligns images and texts through visual prototypes that follow the student",
        source=MULKI,
        requires=["teachers"],
    )
    register.plugin(
        "adding",
        "mulki_plugins.stages.adding:Adding",
        summary="stage 2: distils the relations between samples and prototypes from each teacher",
        source=MULKI,
        requires=["teachers"],
    )
    register.plugin(
        "recalling",
        "mulki_plugins.stages.recalling:Recalling",
        summary="distils the relations of earlier tasks' classes to the prototypes from each teacher, without their images",
        requires=["teachers"],
    )
    register.plugin(
        "distinguishing",
        "mulki_plugins.stages.distinguishing:Distinguishing",
        summary="stage 3: weighs the two teachers for each sample",
        source=MULKI,
        requires=["teachers"],
    )
    register.plugin(
        "connecting",
        "mulki_plugins.stages.connecting:Connecting",
        summary="stage 4: averages weights within a task and interpolates with the weights before it",
        source=MULKI,
    )


def _register_baselines(register: Register) -> None:
    package = "mulki_plugins.baselines"
    register.plugin(
        "lwf",
        f"{package}.lwf:LearningWithoutForgetting",
        summary="distils the previous model's image-text similarities on this task's images; over random texts: LwF-VR",
        source="arXiv 1606.09282, arXiv 2207.09248",
        requires=["teachers"],
    )
    register.plugin(
        "l2",
        f"{package}.l2:WeightConstraint",
        summary="holds the weights near those before this task (WC)",
        source="arXiv 2303.06628",
    )
    register.plugin(
        "icarl",
        f"{package}.icarl:ICarl",
        summary="keeps herded exemplars of earlier tasks, trains on them and distils the previous model on them",
        source="arXiv 1611.07725",
        requires=["teachers"],
        conflicts=["avalanche.replay"],
        keeps_images=True,
    )
    register.plugin(
        "zscl",
        f"{package}.zscl:ReferenceDistillation",
        summary="distils the pre-trained model on reference images and texts",
        source="arXiv 2303.06628",
        requires=["teachers"],
        needs_reference=True,
    )
    register.plugin(
        "snd",
        f"{package}.snd:SelectiveDistillation",
        summary="distils both teachers' features on reference images, each where it knows better",
        source="arXiv 2403.09296",
        requires=["teachers"],
        needs_reference=True,
    )


def _register_avalanche(register: Register) -> None:
    package, own = "avalanche.training.plugins", "mulki_plugins.baselines.avalanche"
    register.plugin(
        "avalanche.ewc",
        f"{own}:EWC",
        summary="elastic weight consolidation: holds the weights that mattered to earlier tasks",
        source="arXiv 1612.00796",
        defaults={"ewc_lambda": 1.0},
        kinds={
            "ewc_lambda": Weight,
            "mode": Literal["separate", "online"],
            "decay_factor": Fraction | None,
            "keep_importance_data": bool,
        },
        sequential=True,
    )
    register.plugin(
        "avalanche.si",
        f"{own}:SynapticIntelligence",
        summary="synaptic intelligence: like EWC, with importances gathered along the path of training",
        source="arXiv 1703.04200",
        defaults={"si_lambda": 1.0},
        kinds={"si_lambda": Weight | list[Weight], "eps": Positive, "device": Literal["as_strategy"]},
        sequential=True,
    )
    register.plugin(
        "avalanche.mas",
        f"{own}:MAS",
        summary="memory-aware synapses: like EWC, with importances from the outputs' sensitivity",
        source="arXiv 1711.09601",
        kinds={"lambda_reg": Weight, "alpha": Fraction, "verbose": bool},
        sequential=True,
    )
    register.plugin(
        "avalanche.lwf",
        f"{own}:LwF",
        summary="learning without forgetting: distils the previous model's outputs on this task's images",
        source="arXiv 1606.09282",
        kinds={"alpha": Weight | list[Weight], "temperature": Positive},
        sequential=True,
    )
    register.plugin(
        "avalanche.replay",
        f"{own}:Replay",
        summary="rehearsal: keeps images of earlier tasks and mixes them into every batch",
        source="arXiv 1902.10486",
        kinds={"mem_size": Count, "batch_size": Count | None, "batch_size_mem": Count | None},
        keeps_images=True,
    )
    register.plugin(
        "avalanche.agem",
        f"{package}.agem:AGEMPlugin",
        summary="projects gradients so that the loss on kept images does not rise",
        source="arXiv 1812.00420",
        defaults={"patterns_per_experience": 64, "sample_size": 64},
        kinds={"patterns_per_experience": Count, "sample_size": Count},
        keeps_images=True,
        no_resume="Avalanche's AGEM draws from its memory by an iterator whose place cannot be stored",
    )
    for name, (_, reason) in UNFIT.items():
        register.refuse("plugin", f"avalanche.{name}", reason)


def _register_streams_and_models(register: Register) -> None:
    register.stream(
        "mtil-mini",
        "mulki_plugins.streams.mini.stream:mtil_mini",
        summary="eleven small image domains in the spirit of MTIL, drawn on this machine",
        tasks=[
            "animals", "digits", "faces", "flags", "food", "letters", "objects", "scans", "shapes", "textures", "travel",
        ],
        extra="mini",
    )  # fmt: skip
    register.stream(
        "mtil-mini-reference",
        "mulki_plugins.streams.mini.stream:mtil_mini_reference",
        summary="reference images and texts for mtil-mini, of other drawings and with other names than its eleven",
        tasks=["reference"],
        extra="mini",
    )
    register.stream(
        "mtil",
        "mulki_plugins.streams.mtil.stream:mtil",
        summary="the published MTIL: eleven data sets that are on disk, with their splits, class names and templates",
        source="arXiv 2303.06628",
        tasks=[
            "Aircraft",
            "Caltech101",
            "CIFAR100",
            "DTD",
            "EuroSAT",
            "Flowers",
            "Food",
            "MNIST",
            "OxfordPet",
            "StanfordCars",
            "SUN397",
        ],
        extra="mtil",
        check="mulki_plugins.streams.mtil.root:check",
    )
    register.stream(
        "folders",
        "mulki_plugins.streams.folders.stream:folders",
        summary="your own images: tasks of one folder for each class",
        check="mulki_plugins.streams.folders.declared:check",
    )
    register.model(
        "mulki-tiny",
        "mulki_plugins.models.tiny:mulki_tiny",
        summary="the bundled CLIP of 2.8 M parameters for 48 x 48 images and sentences of 16 tokens, pre-trained",
        check="mulki_plugins.models.check:check_tiny",
    )


def _register_reports(register: Register) -> None:
    zscl = "arXiv 2303.06628"
    register.metric(
        "transfer",
        "mulki_plugins.metrics:transfer",
        summary="accuracy on tasks before they are learned: what is left of the zero-shot ability",
        source=zscl,
    )
    register.metric(
        "average",
        "mulki_plugins.metrics:average",
        summary="accuracy over all tasks and all moments",
        source=zscl,
    )
    register.metric(
        "last",
        "mulki_plugins.metrics:last",
        summary="accuracy over all tasks at the end of the stream",
        source=zscl,
        sequential=False,
    )
    register.metric(
        "forgetting",
        "mulki_plugins.metrics:forgetting",
        summary="how far each task has fallen from its best, at the end; less is better",
        source="arXiv 1801.10112",
    )
    register.logger(
        "tensorboard",
        "mulki_plugins.report.tensorboard:TensorBoardLogger",
        summary="event files with stable tags, for TensorBoard",
    )
    register.logger(
        "csv", "mulki_plugins.report.csv_log:CsvLogger", summary="every logged value as a line of metrics.csv"
    )
