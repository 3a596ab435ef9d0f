"""The parts that come with MulKI, registered through the same hook as anybody else's, and open_clip's architectures.

Summaries, options and facts of a plugin stand in its class. The architectures and the tags of their weights are read from
open_clip's files without importing it.
"""

from __future__ import annotations

import ast
import functools
import json
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from mulki_plugins.registry.callbacks import UNFIT
from mulki_plugins.registry.catalog import OURS, Part, Provenance
from mulki_plugins.registry.hookspecs import hookimpl
from mulki_plugins.registry.register import Register
from mulki_plugins.registry.static import read_docstring
from mulki_plugins.types import Count, Fraction, Positive, Weight


def _version() -> str:
    try:
        return version(OURS)
    except PackageNotFoundError:  # a checkout that was never installed
        return ""


PROVENANCE = Provenance(distribution=OURS, version=_version())


@hookimpl
def mulki_register(register: Register) -> None:
    register.folder("recipes", _yaml_folder("recipes"))
    register.folder("strategies", _yaml_folder("strategies"))
    register.folder("studies", _yaml_folder("studies"))
    _register_stages(register)
    _register_baselines(register)
    register.adapter("experts", "mulki_plugins.adapters.experts:Experts")
    register.adapter("lora", "mulki_plugins.adapters.lora:LoRA")
    register.adapter("null-space", "mulki_plugins.adapters.null_space:NullSpace")
    register.adapter("prompts", "mulki_plugins.adapters.prompts:ContextPrompts")
    register.head("text", "mulki_plugins.models.head:TextHead")
    register.head("rail", "mulki_plugins.heads.rail:Rail")
    for name, attribute in (("adamw", "adamw"), ("adam", "adam"), ("sgd", "sgd"), ("muon", "Muon")):
        register.optimizer(name, f"mulki_plugins.training.optimizers:{attribute}")
    _register_avalanche(register)
    _register_streams_and_models(register)
    _register_metrics_and_loggers(register)
    _register_commands(register)


def _yaml_folder(kind: str) -> Path:
    """Inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / kind
    return inside if inside.is_dir() else package.parent / kind


def _register_stages(register: Register) -> None:
    at, check = "mulki_plugins.stages", "mulki_plugins.stages.check"
    register.plugin("teachers", f"{at}.teachers:Teachers", after=["magmax"])
    register.plugin("eliciting", f"{at}.eliciting:Eliciting")
    register.plugin("adding", f"{at}.adding:Adding", check=f"{check}:check_adding")
    register.plugin("recalling", f"{at}.recalling:Recalling", check=f"{check}:check_recalling")
    register.plugin("preserving", f"{at}.preserving:Preserving", check=f"{check}:check_preserving")
    register.plugin("rephrasing", f"{at}.rephrasing:Rephrasing")
    register.plugin("distinguishing", f"{at}.distinguishing:Distinguishing", check=f"{check}:check_distinguishing")
    register.plugin("connecting", f"{at}.connecting:Connecting", check=f"{check}:check_connecting")
    register.plugin("rehearsing", f"{at}.rehearsing:Rehearsing", after=["connecting"])


def _register_baselines(register: Register) -> None:
    register.plugin("lwf", "mulki_plugins.baselines.lwf:LearningWithoutForgetting")
    register.plugin("l2", "mulki_plugins.baselines.l2:WeightConstraint", after=["magmax"])
    register.plugin("magmax", "mulki_plugins.baselines.magmax:MagMax", conflicts=["connecting"])
    register.plugin("icarl", "mulki_plugins.baselines.icarl:ICarl", after=["connecting"])
    register.plugin("zscl", "mulki_plugins.baselines.zscl:ReferenceDistillation")
    register.plugin("snd", "mulki_plugins.baselines.snd:SelectiveDistillation")


def _register_avalanche(register: Register) -> None:
    """Avalanche's own plugins, whose signatures name no types that YAML can express."""
    register.plugin(
        "avalanche.ewc",
        "mulki_plugins.baselines.avalanche:EWC",
        defaults={"ewc_lambda": 1.0},
        kinds={
            "ewc_lambda": Weight, "mode": Literal["separate", "online"], "decay_factor": Fraction | None,
            "keep_importance_data": bool,
        }, check="mulki_plugins.baselines.check:check_ewc", after=["connecting"],
    )  # fmt: skip
    register.plugin(
        "avalanche.si",
        "mulki_plugins.baselines.avalanche:SynapticIntelligence", after=["magmax"],
        defaults={"si_lambda": 1.0},
        kinds={"si_lambda": Weight | list[Weight], "eps": Positive, "device": Literal["as_strategy"]},
        check="mulki_plugins.baselines.check:check_si",
    )  # fmt: skip
    register.plugin(
        "avalanche.mas",
        "mulki_plugins.baselines.avalanche:MAS",
        kinds={"lambda_reg": Weight, "alpha": Fraction, "verbose": bool}, after=["connecting"],
    )  # fmt: skip
    register.plugin(
        "avalanche.lwf",
        "mulki_plugins.baselines.avalanche:LwF", check="mulki_plugins.baselines.check:check_lwf",
        kinds={"alpha": Weight | list[Weight], "temperature": Positive}, after=["connecting"],
    )  # fmt: skip
    register.plugin(
        "avalanche.replay",
        "mulki_plugins.baselines.avalanche:Replay",
        kinds={"mem_size": Count, "batch_size": Count | None, "batch_size_mem": Count | None},
    )
    register.plugin(
        "avalanche.agem",
        "avalanche.training.plugins.agem:AGEMPlugin",
        summary="projects gradients so that the loss on kept images does not rise",
        source="arXiv 1812.00420",
        options={
            "patterns_per_experience": "Images to keep of each task.",
            "sample_size": "Kept images that a step's gradient is compared on.",
        },
        defaults={"patterns_per_experience": 64, "sample_size": 64},
        kinds={"patterns_per_experience": Count, "sample_size": Count},
        keeps_images=True,
        no_resume="Avalanche's AGEM draws from its memory with an iterator whose position cannot be stored",
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
        summary="reference images and texts for mtil-mini, with other drawings and names than its eleven tasks",
        tasks=["reference"],
        extra="mini",
    )
    register.stream(
        "mtil",
        "mulki_plugins.streams.mtil.stream:mtil",
        summary="the published MTIL: eleven data sets on disk, with their splits, class names and templates",
        source="arXiv 2303.06628",
        tasks=[
            "Aircraft", "Caltech101", "CIFAR100", "DTD", "EuroSAT", "Flowers", "Food", "MNIST", "OxfordPet", "StanfordCars",
            "SUN397",
        ],
        check="mulki_plugins.streams.mtil.declaration:check_options",
    )  # fmt: skip
    register.stream(
        "folders",
        "mulki_plugins.streams.folders.stream:folders",
        summary="your own images: tasks with one folder per class",
        check="mulki_plugins.streams.folders.tasks:check_options",
    )
    register.stream(
        "split", "mulki_plugins.streams.class_steps:split", check="mulki_plugins.streams.nested:check_split"
    )
    register.stream("mixed", "mulki_plugins.streams.mixed:mixed", check="mulki_plugins.streams.nested:check_mixed")
    register.model(
        "mulki-tiny",
        "mulki_plugins.models.tiny:mulki_tiny",
        summary="the bundled pre-trained CLIP: 2.8 M parameters, 48 x 48 images, sentences of 16 tokens",
        check="mulki_plugins.models.check:check_tiny",
    )


def _register_metrics_and_loggers(register: Register) -> None:
    zscl = "arXiv 2303.06628"
    register.metric(
        "transfer",
        "mulki_plugins.metrics:transfer",
        summary="accuracy on tasks before they are learned: what remains of the zero-shot ability",
        source=zscl,
    )
    register.metric(
        "average", "mulki_plugins.metrics:average", summary="accuracy over all tasks and all moments", source=zscl
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
        summary="how far each task has fallen from its best by the end; lower is better",
        source="arXiv 1801.10112",
    )
    for name, what in (
        ("incremental", "all seen classes, averaged over the steps of class-incremental learning"),
        ("incremental-last", "all classes after the last step of class-incremental learning"),
    ):
        target = f"mulki_plugins.metrics:{name.replace('-', '_')}"
        summary = f"accuracy among {what}"
        register.metric(name, target, summary=summary, source="arXiv 1611.07725", counts_images=True, classes="seen")
    register.logger(
        "tensorboard",
        "mulki_plugins.report.tensorboard:TensorBoardLogger",
        summary="event files with stable tags, for TensorBoard",
    )
    register.logger("csv", "mulki_plugins.report.csv:CsvLogger", summary="every logged value as a line of metrics.csv")


def _register_commands(register: Register) -> None:
    """MulKI's own commands, so that no other package takes their names."""
    register.command("list", "mulki_plugins.cli.list:list_command", summary="list what a recipe can use")
    for name, summary in (
        ("run", "train and evaluate a recipe"),
        ("resume", "continue a run that was stopped or killed"),
        ("extend", "teach the model of a finished run further tasks"),
        ("study", "run many recipes, strategies, seeds, orders and settings"),
        ("data", "check for a recipe's data sets and download missing ones"),
        ("validate", "check a recipe, a strategy or a study"),
        ("show", "print a recipe as it will run"),
        ("results", "show the tables of finished runs"),
        ("report", "write a page that compares runs"),
        ("export", "write a trained model as a folder for open_clip"),
        ("predict", "classify images with a trained model"),
        ("evaluate", "measure a trained model on test images, without training"),
        ("clean", "free the disk of what finished runs no longer need"),
        ("cache", "list the files of the cache"),
        ("plugins", "list the packages that add parts, and their state"),
        ("doctor", "check that everything works"),
        ("bench", "measure a recipe's speed and predict the time of a run"),
        ("new", "create files to start from"),
        ("completion", "switch on completion in a shell"),
        ("schema", "print the JSON Schema of a recipe or a strategy"),
    ):
        register.command(name, f"mulki_plugins.cli.{name}:{name}", summary=summary)


QUICKGELU = "-quickgelu"
"""The suffix of open_clip's names for architectures with QuickGELU instead of GELU."""


def open_clip_part(name: str) -> Part:
    """An architecture of open_clip, as a part that a recipe can name."""
    target = "mulki_plugins.models.load:open_clip_model"
    return Part(
        kind="model",
        name=name,
        target=target,
        summary="an architecture of open_clip",
        provenance=Provenance(distribution="open_clip_torch", version=""),
        defaults={"name": name},
        options=read_docstring(target)[1],
        check="mulki_plugins.models.check:check_open_clip",
    )


@functools.cache
def open_clip_models() -> list[str]:
    """Names such as `ViT-B-16`, sorted; empty if open_clip is not installed."""
    folder = open_clip_folder()
    return sorted(path.stem for path in (folder / "model_configs").glob("*.json")) if folder else []


def open_clip_config(name: str) -> dict[str, Any]:
    """open_clip's configuration of an architecture; empty for an unknown name."""
    folder = open_clip_folder()
    if folder is None or name not in open_clip_models():
        return {}
    config: dict[str, Any] = json.loads((folder / "model_configs" / f"{name}.json").read_text("utf-8"))
    return config


def twin(name: str) -> str:
    """The same architecture with the other activation: `ViT-B-16` and `ViT-B-16-quickgelu`."""
    return name.removesuffix(QUICKGELU) if name.endswith(QUICKGELU) else name + QUICKGELU


def open_clip_tags(name: str) -> dict[str, str]:
    """The tags of the weights that fit an architecture, each with the name under which open_clip lists it.

    These are the tags of the name itself and of its twin, which has the same weights.
    """
    return {tag: other for other in (twin(name), name) for tag in _tags().get(other, ())}


def tags_are_known() -> bool:
    """Whether the table of tags could be read; another version of open_clip may write it differently."""
    return bool(_tags())


@functools.cache
def open_clip_folder() -> Path | None:
    """The folder of the installed open_clip, or None."""
    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def _tags() -> dict[str, list[str]]:
    """The tags of each architecture, from the table in open_clip's `pretrained.py`."""
    folder = open_clip_folder()
    try:
        module = ast.parse((folder / "pretrained.py").read_text("utf-8")) if folder else ast.Module([], [])
        tables: dict[str, ast.expr] = {}
        for node in module.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                tables[node.targets[0].id] = node.value
        entries = {name: _entries(value, tables) for name, value in _entries(tables["_PRETRAINED"], tables).items()}
    except (OSError, SyntaxError, LookupError, ValueError):
        return {}
    for name, tags in list(entries.items()):  # as open_clip itself does at the end of its table
        if quick := {tag: value for tag, value in tags.items() if _is_quick(value)}:
            entries[name + QUICKGELU] = quick
    return {name: list(tags) for name, tags in entries.items()}


def _entries(node: ast.expr, tables: dict[str, ast.expr]) -> dict[str, ast.expr]:
    """The items of a dictionary that is written as `{...}`, as `dict(...)` or as a name of another one."""
    if isinstance(node, ast.Name):
        return _entries(tables[node.id], tables)
    if isinstance(node, ast.Dict):
        pairs = [
            (ast.literal_eval(key) if key else None, value) for key, value in zip(node.keys, node.values, strict=True)
        ]
    elif isinstance(node, ast.Call) and not node.args:
        pairs = [(keyword.arg, keyword.value) for keyword in node.keywords]
    else:
        raise ValueError
    entries: dict[str, ast.expr] = {}
    for key, value in pairs:
        entries |= _entries(value, tables) if key is None else {key: value}
    return entries


def _is_quick(node: ast.expr) -> bool:
    keywords = node.keywords if isinstance(node, ast.Call) else []
    return any(k.arg == "quick_gelu" and isinstance(k.value, ast.Constant) and bool(k.value.value) for k in keywords)
