"""Weights: which are meant, what they were trained with, and files that hold none. One small architecture of open_clip."""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import open_clip
import open_clip.factory as factory
import pytest
import torch
from click.testing import CliRunner
from open_clip.transformer import QuickGELU
from safetensors import safe_open
from safetensors.torch import save_file

from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.models import load_clip
from mulki_plugins.models.load import settings_of_tag
from mulki_plugins.models.weights import CLIP_MEAN, TrainedWith, weight_file
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.registry import builtin as names
from mulki_plugins.training.build import build
from mulki_plugins.training.checkpoint import Moment, write_checkpoint

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SIGLIP = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The architectures `small` and `small-quickgelu`, as if open_clip had them; returns the folder of the test."""
    own = tmp_path / "open_clip"
    (own / "model_configs").mkdir(parents=True)
    shutil.copy(Path(open_clip.__file__).parent / "pretrained.py", own)
    for name, more in (("small", {}), ("small-quickgelu", {"quick_gelu": True})):
        (own / "model_configs" / f"{name}.json").write_text(json.dumps({**SMALL, **more}))
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, {**SMALL, **more})
    monkeypatch.setattr(names, "open_clip_folder", lambda: own)
    for cached in (names.open_clip_models, names._tags):
        cached.cache_clear()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for cached in (names.open_clip_models, names._tags):
        cached.cache_clear()


@pytest.fixture
def state():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return open_clip.model.CLIP(**SMALL).state_dict()


def quick(loaded):
    return any(isinstance(module, QuickGELU) for module in loaded.clip.modules())


def refusal(name, **options):
    with pytest.raises(MulkiError) as error:
        load_clip(name, **options)
    [line] = error.value.lines()
    return line


def validated(*settings):
    words = [word for setting in settings for word in ("--set", setting)]
    return CliRunner().invoke(main, ["validate", "mtil", *words])


class QuickActivation(torch.nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def scripted(state, path, activation=None):
    """An archive as OpenAI publishes them: TorchScript, half precision, weights in modules, numbers beside them."""
    root = torch.nn.Module()
    root.act = activation or QuickActivation()
    for key, value in {**state, "input_resolution": torch.tensor(16), "vocab_size": torch.tensor(49408)}.items():
        *folders, name = key.split(".")
        at = root
        for folder in folders:
            if not hasattr(at, folder):
                at.add_module(folder, torch.nn.Module())
            at = getattr(at, folder)
        at.register_buffer(name, value.half() if value.is_floating_point() else value)
    torch.jit.script(root).save(str(path))


# --- tags ---------------------------------------------------------------------------------------------------------------


def test_the_table_of_tags_is_read_without_importing_open_clip():
    found = [(name, tag) for name, tags in names._tags().items() for tag in tags]
    assert sorted(found) == sorted(open_clip.list_pretrained())


def test_a_table_that_cannot_be_read_leaves_the_tags_unknown(small):
    (small / "open_clip" / "pretrained.py").write_text("_PRETRAINED = make()\n")
    names._tags.cache_clear()
    assert not names.tags_are_known()
    assert names.open_clip_tags("ViT-B-16") == {}


class _Built(Exception):
    """Stops where open_clip would begin to build."""


@pytest.mark.parametrize("twins", [False, True])
def test_every_pair_of_open_clip_is_built_as_its_weights_were_trained(twins, monkeypatch):
    asked = {}

    def create_model(name, **options):
        asked.update(options, name=name)
        raise _Built

    monkeypatch.setattr(open_clip, "create_model", create_model)
    pairs = open_clip.list_pretrained()
    corrected = 0
    for name, tag in pairs:
        said = open_clip.get_pretrained_cfg(name, tag)
        called = names.twin(name) if twins and names.twin(name) in names.open_clip_models() else name
        with pytest.raises(MulkiError):
            load_clip(called, pretrained=tag)
        config = names.open_clip_config(asked["name"])
        built = asked.get("quick_gelu", asked["force_quick_gelu"] or config.get("quick_gelu", False))
        assert built == bool(said.get("quick_gelu")), (called, tag)
        assert asked["force_preprocess_cfg"] == {
            key: said[key] for key in ("mean", "std", "interpolation", "resize_mode")
        }
        assert open_clip.is_pretrained_cfg(asked["name"], tag), (called, tag)
        corrected += bool(config.get("quick_gelu")) != built
        asked.clear()
    assert len(pairs) >= 196
    assert corrected >= (0 if twins else 28)


@pytest.mark.parametrize(
    ("name", "tag", "quickgelu"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-B-32-quickgelu", "openai", True),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", False),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
    ],
)
def test_a_model_is_built_with_the_activation_of_its_weights(name, tag, quickgelu, monkeypatch, recwarn):
    monkeypatch.setattr(factory, "download_pretrained", lambda *a, **k: "weights.pt")
    monkeypatch.setattr(factory, "load_checkpoint", lambda *a, **k: {})
    loaded = load_clip(name, pretrained=tag)
    assert quick(loaded) == quickgelu
    told = quickgelu != name.endswith("-quickgelu")
    assert [("QuickGELU" in n, repr(tag) in n) for n in loaded.notices] == [(quickgelu, True)] * told
    assert not [w for w in recwarn if "GELU" in str(w.message)]


def test_a_recipe_that_contradicts_a_tag_is_refused():
    line = refusal("ViT-B-16", pretrained="openai", quickgelu=False)
    assert "'openai' were trained with QuickGELU, and the recipe says GELU; leave out model.quickgelu" in line
    line = refusal("ViT-B-16-SigLIP", pretrained="webli", mean=(0.4, 0.4, 0.4))
    assert "mean [0.5, 0.5, 0.5]" in line


def test_images_for_training_are_resized_as_the_weights_want_it(small):
    def train(**options):
        return (
            load_clip("small", pretrained="random", **options).transform(train=True).transforms[0].interpolation.value
        )

    assert (train(), train(interpolation="bilinear")) == ("bicubic", "bilinear")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["model.pretrained=opnai"], "open_clip has no weights 'opnai' for ViT-B-16 (did you mean 'openai'?)"),
        (["model.pretrained=OpenAI"], "did you mean 'openai'?"),
        (["model.pretrained=webli"], "open_clip has no weights 'webli' for ViT-B-16"),
        (
            [],
            "$.model.pretrained: missing: ViT-B-16 is an architecture without weights; give a tag of open_clip (openai",
        ),
        (["model.pretrained=null"], "$.model.pretrained: missing"),
        (["model.pretrained=''"], "$.model.pretrained: missing"),
        (["model.pretrained=gone.pt"], "gone.pt: no such file (a path begins in the current folder"),
        (["model.pretrained=~/no-such-folder/w"], "~/no-such-folder/w: no such file"),
        (["model.pretrained=openai", "model.std=[0.5, 0, 0.5]"], "expected numbers above 0"),
        (["model.pretrained=openai", "model.interpolation=bicubc"], "did you mean 'bicubic'?"),
        (["model.pretrained=openai", "model.quickgelu=1"], "expected true or false"),
    ],
)
def test_mistakes_in_the_weights_are_found_by_validate(settings, expected):
    done = validated("model={name: ViT-B-16}", *settings)
    assert done.exit_code == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("value", ["openai", "random", "datacomp_xl_s13b_b90k"])
def test_known_weights_are_valid(value):
    assert validated("model={name: ViT-B-16}", f"model.pretrained={value}").exit_code == 0


def test_weights_of_another_architecture_are_left_out_and_those_of_the_twin_stay():
    def model(name):
        return resolve("mtil-vitb16", Changes(settings=(f"model.name={name}", "stream.root=."))).recipe.model.options

    assert model("ViT-B-16")["pretrained"] == "openai"
    assert model("mulki-tiny")["pretrained"] is None
    with pytest.raises(MulkiError, match="ViT-B-32 is an architecture without weights"):
        model("ViT-B-32")


def test_a_resolved_recipe_takes_another_model(tmp_path):
    from mulki_plugins.recipe.emit import dump_yaml
    from mulki_plugins.recipe.schema import as_data

    changes = Changes(settings=("model={name: ViT-B-16, pretrained: openai, quickgelu: true}",))
    (tmp_path / "r.yaml").write_text(dump_yaml(as_data(resolve("mtil", changes).recipe)))
    again = resolve(str(tmp_path / "r.yaml"), Changes(settings=("model.name=mulki-tiny",)))
    assert set(again.recipe.model.options) == {"train", "head", "pretrained"}


def test_a_name_without_weights_is_refused_in_python_too():
    assert "is an architecture without weights" in refusal("ViT-B-16")


# --- files --------------------------------------------------------------------------------------------------------------


def test_a_file_that_says_nothing_is_taken_as_its_name_says_and_the_user_is_told(small, state):
    torch.save(state, "w.pt")
    for name, expected in (("small", False), ("small-quickgelu", True)):
        loaded = load_clip(name, pretrained="w.pt")
        assert quick(loaded) == expected
        [notice] = loaded.notices
        assert f"assumed: {'QuickGELU' if expected else 'GELU'}, mean" in notice
        assert "model.quickgelu" in notice
    assert quick(load_clip("small", pretrained="w.pt", quickgelu=True))
    assert not quick(load_clip("small-quickgelu", pretrained="w.pt", quickgelu=False))
    loaded = load_clip("small", pretrained="w.pt", quickgelu=False, **SIGLIP)
    assert (tuple(loaded.mean), loaded.interpolation, loaded.resize_mode) == ((0.5, 0.5, 0.5), "bilinear", "squash")
    assert loaded.notices == ()


def test_a_file_of_ours_says_what_it_was_trained_with(small, state):
    known = TrainedWith(architecture="small", quickgelu=True, **SIGLIP)
    save_file(state, "w.safetensors", metadata={"format": "pt", **known.metadata()})
    loaded = load_clip("small", pretrained="w.safetensors")
    assert quick(loaded)
    assert (tuple(loaded.mean), loaded.interpolation, loaded.resize_mode) == ((0.5, 0.5, 0.5), "bilinear", "squash")
    assert "trained with QuickGELU" in loaded.notices[0]
    assert "the recipe says GELU" in refusal("small", pretrained="w.safetensors", quickgelu=False)
    assert "the weights are those of small, and the model is RN50" in str(refusal_of_another())


def refusal_of_another():
    from mulki_plugins.models.check import refuse_another
    from mulki_plugins.models.weights import weight_file

    with pytest.raises(MulkiError) as error:
        refuse_another(weight_file("w.safetensors"), "RN50")
    return error.value


@pytest.mark.parametrize("metadata", ["[]", "{", '{"quickgelu": 3}', '{"mean": ["a", 1, 2]}', '{"resize_mode": "no"}'])
def test_metadata_that_describe_no_model_are_refused(small, state, metadata):
    save_file(state, "w.safetensors", metadata={"mulki": metadata})
    assert "its metadata are damaged" in refusal("small", pretrained="w.safetensors")


def test_a_run_keeps_what_its_weights_were_trained_with(small, state):
    folder = small / "runs" / "seed-0"
    folder.mkdir(parents=True)
    known = TrainedWith(architecture="small", quickgelu=True, **SIGLIP)
    for tasks, steps, scale in ((1, 0, 1.0), (2, 0, 2.0), (0, 0, None)):
        weights = {} if scale is None else {**state, "logit_scale": torch.tensor(scale)}
        place = Moment(tasks, steps)
        write_checkpoint(
            folder,
            f"task-{tasks:02d}",
            place,
            base=None,
            weights=weights,
            state={},
            progress={},
            metadata=known.metadata(),
        )
    with safe_open(folder / "checkpoints" / "task-02" / "weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mulki"])["resize_mode"] == "squash"
    for where, scale in ((folder, 2.0), (folder / "checkpoints", 2.0), (folder / "checkpoints" / "task-01", 1.0)):
        loaded = load_clip("small", pretrained=str(where))
        assert loaded.clip.logit_scale.item() == scale
        assert quick(loaded)
        assert "the weights are those of" in loaded.notices[0]


def test_a_run_of_the_bundled_model_writes_its_metadata():
    recipe = resolve("mtil", Changes(settings=("stream.tasks=[digits]",))).recipe
    built = build(recipe)
    said = json.loads(built.model.weights_metadata["mulki"])
    assert (said["architecture"], said["quickgelu"], said["mean"]) == ("mulki-tiny", False, [0.5, 0.5, 0.5])
    assert built.notices == []


def test_a_folder_that_is_no_runs_is_refused(small, state):
    (small / "empty").mkdir()
    assert "this folder does not belong to a run" in refusal("small", pretrained="empty/")
    (small / "hub").mkdir()
    save_file(state, "hub/other.safetensors")
    assert "name the file: hub/other.safetensors" in refusal("small", pretrained="hub")
    save_file(state, "hub/open_clip_model.safetensors")
    assert weight_file("hub").path == Path("hub/open_clip_model.safetensors"), "the file that open_clip looks for"
    (small / "runs" / "seed-1").mkdir(parents=True)
    (small / "runs" / "seed-1" / "result.json").write_text("{}")
    assert "the folder holds several runs; name one, such as runs/seed-1" in refusal("small", pretrained="runs")
    assert "this run's folder holds no weights" in refusal("small", pretrained="runs/seed-1")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 598641023\n"


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "bin", "weights"])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (POINTER, "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"\xef\xbb\xbf<html>", "a web page"),
        (b"", "the file is empty"),
        (b"Not Found", "this is a text and not weights; it begins 'Not Found'"),
        (b'{"error": "denied"}', "this is a text and not weights"),
        (b"\x80\x04N.", "a pickle that could run code"),
        (b"\x00\xff" * 300, "no file of weights"),
        (b"PK\x03\x04 cut short", "cut short or damaged"),
        (b"\x0f\x00\x00\x00\x00\x00\x00\x00{ no json here ", "its header cannot be read"),
        (b"\xff\x00\x00\x00\x00\x00\x00\x00{}", "cut short"),
    ],
)
def test_a_file_without_weights_is_named_by_what_it_is(tmp_path, content, why, suffix):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    for model in ("mulki-tiny", "RN50"):
        done = validated(f"model={{name: {model}, pretrained: {path}}}")
        assert done.exit_code == 2
        assert f"{path}: " in done.stderr
        assert why in done.stderr


def test_files_that_are_cut_short_are_named(small, state):
    save_file(state, "w.safetensors")
    torch.save(state, "w.pt")
    for name in ("w.safetensors", "w.pt"):
        path = small / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert "cut short" in refusal("small", pretrained=name)
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("weights/model.safetensors", b"x")
    assert "a zip archive without weights" in refusal("small", pretrained="other.zip")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "optimizer": {"state": {}}},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"_orig_mod.model.clip.{k}": v for k, v in s.items()},
        lambda s: {k: v.half() for k, v in s.items()},
        lambda s: {**s, "logit_scale": s["logit_scale"].reshape(1)},
    ],
)
def test_weights_in_another_wrapping_are_understood(small, state, wrap):
    torch.save(wrap({**state, "logit_scale": torch.tensor(1.5)}), "w.pt")
    assert load_clip("small", pretrained="w.pt").clip.logit_scale.item() == 1.5


def test_a_file_is_judged_by_its_content_and_a_home_is_expanded(small, state, monkeypatch):
    save_file({**state, "logit_scale": torch.tensor(2.5)}, "w.pt")
    monkeypatch.setenv("HOME", str(small))
    assert load_clip("small", pretrained="~/w.pt").clip.logit_scale.item() == 2.5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("text_projection"), "1 of the model's 38 weights are missing (text_projection)"),
        (lambda s: s.update(extra=torch.zeros(1)), "the file holds 1 other (extra)"),
        (lambda s: s.update(ln_final=torch.zeros(1)), "(ln_final)"),
        (
            lambda s: s.update({"visual.proj": torch.zeros(2, 3)}),
            "visual.proj is 2×3 in the file and 32×16 in the model",
        ),
        (lambda s: [s.pop(k) for k in list(s) if "visual" in k], "weights are missing (visual."),
        (lambda s: s.update({"vision_model.post_layernorm.bias": torch.zeros(1)}), "Hugging Face's transformers"),
    ],
)
def test_weights_that_do_not_fit_are_named(small, state, change, expected):
    change(state)
    save_file(state, "w.safetensors")
    line = refusal("small", pretrained="w.safetensors")
    assert "w.safetensors: the weights do not fit small" in line
    assert expected in line


def test_a_file_without_a_state_dict_is_named(small):
    torch.save({"epoch": 3, "loss": 0.5}, "a.pt")
    torch.save([torch.zeros(1)], "b.pt")
    assert "holds no state dict; it holds 'epoch', 'loss'" in refusal("small", pretrained="a.pt")
    assert "holds no state dict, but a list" in refusal("small", pretrained="b.pt")


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_an_archive_of_openai_loads(small, state):
    scripted({**state, "logit_scale": torch.tensor(4.5)}, "w.pt")
    loaded = load_clip("small", pretrained="w.pt")
    assert quick(loaded)
    assert loaded.mean == CLIP_MEAN
    assert loaded.clip.logit_scale.item() == 4.5
    proj = loaded.clip.visual.proj
    assert proj.dtype == torch.float32
    assert torch.equal(proj, state["visual.proj"].half().float())
    assert "the recipe says GELU" in refusal("small", pretrained="w.pt", quickgelu=False)


def test_the_code_of_an_archive_shows_its_activation(small, state):
    scripted(state, "w.pt", torch.nn.GELU())
    assert not quick(load_clip("small-quickgelu", pretrained="w.pt"))


def test_an_archive_that_is_no_clip_is_named(small):
    torch.jit.script(torch.nn.Linear(2, 2)).save("w.pt")
    assert "are missing (positional_embedding" in refusal("small", pretrained="w.pt")


def test_an_archive_runs_no_code(small, state):
    scripted(state, "w.pt")
    import pickle

    with zipfile.ZipFile("w.pt") as archive, zipfile.ZipFile("evil.pt", "w") as evil:
        for name in archive.namelist():
            content = pickle.dumps(Touch(small / "touched")) if name.endswith("/data.pkl") else archive.read(name)
            evil.writestr(name, content)
    assert "could run code" in refusal("small", pretrained="evil.pt")
    torch.save({"x": Touch(small / "touched")}, "plain.pt")
    assert "could run code" in refusal("small", pretrained="plain.pt")
    assert not (small / "touched").exists()


def test_random_weights_of_the_bundled_model_are_the_seeds():
    def first(seed):
        torch.manual_seed(seed)
        return next(load_clip("mulki-tiny", pretrained="random").clip.parameters())

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_validate_checks_weights_without_torch(tmp_path):
    import subprocess

    code = (
        "import sys; from mulki_plugins.recipe.resolve import resolve, Changes\n"
        "resolve('mtil', Changes(settings=('model={name: ViT-B-16, pretrained: openai}',)))\n"
        "assert not {'torch', 'open_clip', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_the_recipes_name_the_activation_that_openai_trained_with():
    for name in ("mtil-vitb16", "mtil-vitb16-order2", "mtil-vitb16-5shot"):
        model = resolve(name, Changes(settings=("stream.root=.",))).recipe.model
        assert settings_of_tag(model.name, model.options["pretrained"]).quickgelu
        assert names.open_clip_config(model.name)["quick_gelu"]
