"""Heads that read pooled features: what these are, in towers of each kind, and that a run's head reads them everywhere."""

import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import normalize

from mulki_plugins.adapters import ContextPrompts
from mulki_plugins.cli import main
from mulki_plugins.errors import MulkiError
from mulki_plugins.heads import Head, Rail
from mulki_plugins.models import ClipClassifier
from mulki_plugins.models.load import load_clip
from mulki_plugins.models.pooled import encode_with_pooled
from mulki_plugins.recipe.resolve import Changes, resolve
from mulki_plugins.recipe.settings import fingerprint
from tests.conftest import small_clip, small_tokenizer


def images(n=5, size=16):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def classifier(stream, head, **options):
    return ClipClassifier(small_clip(), small_tokenizer, stream.tasks, train="none", head=head, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["a transformer of open_clip", "a model of timm"])
def test_their_projection_is_the_image_feature(kind):
    clip = small_clip() if kind.startswith("a transformer") else load_clip("mulki-tiny", pretrained="random").clip
    clip.eval()
    x = images() if kind.startswith("a transformer") else images(size=48)
    plain = normalize(clip.encode_image(x), dim=1)
    wide = encode_with_pooled(clip.visual, lambda: normalize(clip.encode_image(x), dim=1))
    d = plain.shape[1]
    assert torch.equal(wide[:, :d], plain)
    pooled = wide[:, d:]
    assert torch.allclose(pooled.norm(dim=1), torch.ones(len(x)))
    projected = pooled @ clip.visual.proj if hasattr(clip.visual, "proj") else clip.visual.head(pooled)
    assert torch.allclose(normalize(projected, dim=1), plain, atol=1e-5)
    assert torch.equal(clip.encode_image(x), clip.encode_image(x)), "the tower is as before"
    assert "_pool" not in vars(clip.visual)
    assert not any(part._forward_pre_hooks for part in clip.visual.children())


def test_routes_are_refused(stream):
    with pytest.raises(MulkiError, match="differ by the adapter's routes"):
        classifier(stream, Rail(width=8, features="pooled"), adapters=[ContextPrompts()])


class Watched(Head):
    """Notes how wide what it reads is."""

    reads_pooled = True

    def __init__(self):
        super().__init__()
        self.widths = []

    def begin(self, width):
        self.widths.append(("begin", width))

    def after_task(self, task, images):
        images.sum(lambda z, y: {"n": torch.tensor(self.widths.append(("after_task", z.shape[1])) or 1.0)})

    def forward(self, z, scope):
        self.widths.append(("forward", z.shape[1]))
        return scope.text_logits(z)


def test_a_head_reads_them_in_evaluation_and_is_not_asked_in_training(stream):
    head = Watched()
    model = classifier(stream, head)
    d, p = model.clip.visual.proj.shape[1], model.clip.visual.proj.shape[0]
    assert head.widths == [("begin", p)]
    plain = classifier(stream, None)
    assert torch.equal(model(images(), 1), plain(images(), 1))
    assert torch.equal(model.union_logits(images(), [0, 1]), plain.union_logits(images(), [0, 1]))
    assert torch.equal(model.encode_image(images()), plain.encode_image(images())), "everybody else reads z alone"
    assert head.widths[1:] == [("forward", d + p)] * 2
    model.train()
    assert torch.equal(model(images(), 1), plain.train()(images(), 1))
    assert model.features.image.shape[1] == d
    assert len(head.widths) == 3


def test_the_regression_is_on_them(stream):
    torch.manual_seed(0)
    model = classifier(stream, Rail(width=20, features="pooled"))
    hidden = model.head.hidden
    assert len(hidden) == model.clip.visual.proj.shape[0]
    with torch.no_grad():
        wide = model.encode_for_head(images())
        expected = torch.relu(wide[:, -len(hidden) :].double() @ hidden.double())
        assert torch.equal(model.head.random_features(wide), expected)


def test_the_command_says_what_to_do_if_the_model_has_none(tmp_path):
    settings = ["model.name=RN50", "model.pretrained=random", "model.head.rail.features=pooled", "device=cpu"]
    arguments = [each for setting in settings for each in ("--set", setting)]
    done = CliRunner().invoke(main, ["run", "mtil", "--strategy", "rail", *arguments, "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "has no pooled features that a head could read" in done.stderr
    assert "features: projected" in done.stderr


def test_a_run_measured_before_there_was_a_choice_is_the_same_experiment():
    one = resolve("mtil", Changes(strategy="rail")).recipe
    before = fingerprint(one)
    assert one.model.options["head"]["rail"]["features"] == "projected", "the recipe is left as it was"
    assert before == "b5c60c5e2c6a"
    assert (
        fingerprint(resolve("mtil", Changes(strategy="rail", settings=("model.head.rail.features=pooled",))).recipe)
        != before
    )
