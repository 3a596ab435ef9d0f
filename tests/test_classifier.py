"""ClipClassifier: logits, prompts, gradients, and that it knows nothing of which task is current."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mulki_plugins.models import ClipClassifier, Prompts
from mulki_plugins.models.classifier import MASKED
from mulki_plugins.models.text import Union, union_of
from tests.conftest import SIZE, small_clip, small_tokenizer


@pytest.fixture
def x():
    return torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def by_hand(model, x, task, templates):
    """s·z·tᵀ with plain calls to open_clip."""
    z = model.clip.encode_image(x, normalize=True)
    rows = []
    for name in model.prompts[task].class_names:
        sentences = [template.replace("{}", name) for template in templates]
        each = model.clip.encode_text(small_tokenizer(sentences), normalize=True)
        rows.append(F.normalize(each.mean(0), dim=0))
    return model.clip.logit_scale.exp() * z @ torch.stack(rows).T


def test_training_uses_the_first_template_and_evaluation_the_mean_of_all(classifier, x):
    first, both = ("a {} one.",), ("a {} one.", "it is {}.")
    assert torch.allclose(classifier.train()(x, 1), by_hand(classifier, x, 1, first), atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(classifier.eval()(x, 1), by_hand(classifier, x, 1, both), atol=1e-5)
        assert not torch.allclose(classifier.eval()(x, 1), by_hand(classifier, x, 1, first), atol=1e-5)
    assert torch.allclose(classifier.eval()(x, 1), by_hand(classifier, x, 1, first), atol=1e-5), "a loss is computed"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_templates_that_are_asked_for_are_used_in_every_mode(classifier, x, training, gradients):
    expected = {"first": ("a {} one.",), "all": ("a {} one.", "it is {}.")}
    classifier.train(training)
    with torch.set_grad_enabled(gradients):
        for templates, texts in expected.items():
            with classifier.using(templates):
                assert torch.allclose(classifier(x, 1), by_hand(classifier, x, 1, texts), atol=1e-5)
    assert classifier.templates is None


@pytest.mark.parametrize("inside", [True, False])
def test_a_context_outside_of_clip_gets_a_gradient_beside_a_frozen_text_tower(stream, x, inside):
    model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks, train="image").train()
    model(x, 1)  # texts are kept, since nothing outside of the image tower learns
    context = nn.Parameter(torch.zeros(32))
    if inside:
        model.context = context
    else:
        model.train()
    model.clip.token_embedding.register_forward_hook(lambda module, given, out: out + context)
    model(x, 1).logsumexp(1).sum().backward()
    assert context.grad.abs().sum() > 0
    with torch.no_grad():
        model.eval()
        before = model(x, 1)
        context += torch.randn(32, generator=torch.Generator().manual_seed(1))
        model.eval()
        assert not torch.allclose(model(x, 1), before)


@pytest.mark.parametrize("training", [True, False])
def test_mixed_tasks_give_each_sample_its_own_classes(classifier, x, training):
    classifier.train(training)
    labels = torch.tensor([0, 1, 2, 1, 0, 1])
    out = classifier(x, labels)
    assert out.shape == (6, 3)
    for i, task in enumerate(labels.tolist()):
        own = classifier(x[i : i + 1], task)
        assert torch.allclose(out[i, : own.shape[1]], own[0], atol=1e-5)
        assert (out[i, own.shape[1] :] == MASKED).all()
    assert F.softmax(out, 1)[0, 2] == 0


def test_no_task_labels(classifier, x, loaded, stream):
    classifier.templates = "all"
    every = classifier.eval()(x)
    assert {task: logits.shape for task, logits in every.items()} == {0: (6, 2), 1: (6, 3), 2: (6, 2)}
    assert torch.equal(every[1], classifier(x, 1))
    one = ClipClassifier(loaded.clip, loaded.tokenizer, stream.tasks[:1]).eval()
    assert torch.equal(one(x), one(x, 0))


def test_the_image_batch_is_encoded_once(classifier, x, monkeypatch):
    calls = []
    encode = classifier.clip.encode_image
    monkeypatch.setattr(classifier.clip, "encode_image", lambda images: calls.append(len(images)) or encode(images))
    classifier.train()(x, torch.tensor([0, 1, 2, 1, 0, 1]))
    assert calls == [6]


def test_texts_are_encoded_once_per_step_and_once_per_evaluation(classifier, x, monkeypatch):
    calls = []
    encode = classifier.clip.encode_text
    monkeypatch.setattr(classifier.clip, "encode_text", lambda tokens: calls.append(len(tokens)) or encode(tokens))
    classifier.train()(x, 1)
    assert calls == [3]
    classifier.eval()
    with torch.no_grad():
        for _ in range(3):
            classifier(x, 1)
    assert calls == [3, 6]


@pytest.mark.parametrize("change", ["in place", "through data", "loaded"])
def test_evaluation_never_uses_texts_of_older_weights(classifier, x, change):
    with torch.no_grad():
        before = classifier.eval()(x, 1)
        weight = classifier.clip.text_projection
        if change == "in place":
            weight.mul_(-1)
        elif change == "through data":
            weight.data.mul_(-1)
            classifier.eval()  # as Avalanche does at the start of every evaluation
        else:
            state = {k: -v if k == "text_projection" else v for k, v in classifier.clip.state_dict().items()}
            classifier.clip.load_state_dict(state)
        assert torch.allclose(classifier(x, 1), -before, atol=1e-4)


@pytest.mark.parametrize(
    ("train", "image", "text"), [("all", True, True), ("image", True, False), ("text", False, True)]
)
def test_which_towers_learn(stream, x, train, image, text):
    model = ClipClassifier(small_clip(), small_tokenizer, stream.tasks, train=train).train()
    model(x, torch.tensor([0, 1, 2, 1, 0, 1])).logsumexp(1).sum().backward()
    learning = {"image": set(), "text": set()}
    for name, p in model.clip.named_parameters():
        tower = "image" if name.startswith("visual.") else "text"
        expected = name != "logit_scale" and (image if tower == "image" else text)
        assert p.requires_grad == expected, name
        if p.grad is not None and bool(p.grad.abs().sum() > 0):
            assert expected, name
            learning[tower].add(name)
    assert ("visual.proj" in learning["image"]) == image
    assert ("text_projection" in learning["text"]) == text
    assert (len(learning["image"]) > 10, len(learning["text"]) > 10) == (image, text), "the whole tower learns"


def test_a_tower_that_does_not_learn_stays_as_in_evaluation(loaded, stream, x):
    loaded.clip.visual = nn.Sequential(nn.BatchNorm2d(3), loaded.clip.visual)
    for train, moves in (("all", True), ("text", False)):
        model = ClipClassifier(loaded.clip, loaded.tokenizer, stream.tasks, train=train).train()
        before = loaded.clip.visual[0].running_mean.clone()
        model(x, 0)
        assert torch.equal(before, loaded.clip.visual[0].running_mean) is not moves


def test_features_of_the_last_training_forward_are_kept_with_their_graph(classifier, x):
    labels = torch.tensor([0, 1, 1, 1, 0, 1])
    classifier.train()(x, labels)
    kept = classifier.features
    assert kept.image.shape == (6, 16)
    assert {task: t.shape for task, t in kept.text.items()} == {0: (2, 16), 1: (3, 16)}
    assert kept.image.requires_grad
    assert kept.text[1].requires_grad
    assert torch.allclose(kept.image.norm(dim=1), torch.ones(6))
    classifier.eval()(x, 2)
    assert classifier.features is kept, "a nested evaluation must not replace it"


def test_copies_between_forward_and_backward(classifier, x):
    classifier.train()(x, 1)
    classifier.templates = "all"
    twin = copy.deepcopy(classifier)
    assert twin.features is None
    assert torch.equal(twin.eval()(x, 1), classifier.eval()(x, 1))


def test_union_logits(classifier, x):
    classifier.eval()
    out = classifier.union_logits(x, [2, 0])
    assert torch.allclose(out, torch.cat([classifier(x, 2), classifier(x, 0)], 1))


def test_classes_that_the_model_is_told_the_same_of_are_one_in_a_union(loaded, x):
    prompts = [
        Prompts(["crane", "duck"], ["a {}."]), Prompts(["tower", "crane"], ["a {}."]), Prompts(["crane"], ["a {} bird."]),
        Prompts(["duck", "tower", "ox"], ["a {}."]),
    ]  # fmt: skip
    classifier = ClipClassifier(loaded.clip, loaded.tokenizer, prompts).eval()
    assert classifier.union([0, 1, 2, 3]).places == [[0, 1], [2, 0], [3], [1, 2, 4]]
    assert classifier.union([3, 0]).places == [[0, 1, 2], [3, 0]]
    out = classifier.union_logits(x, [0, 1, 2, 3])
    assert out.shape == (len(x), 5)
    assert torch.allclose(out[:, [0, 1]], classifier(x, 0), atol=1e-5)
    assert torch.allclose(out[:, [2, 0]], classifier(x, 1), atol=1e-5)
    assert torch.allclose(out[:, [1, 2, 4]], classifier(x, 3), atol=1e-5)


def test_two_classes_of_one_task_stay_two_in_a_union():
    assert union_of([["a", "a"], ["a", "b", "a"]]) == Union([[0, 1], [0, 2, 3]], [0, 1, 3, 4])


def test_half_precision_keeps_the_logits_exact(classifier, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = classifier.eval()(x, 1)
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()


def test_mistakes(loaded, classifier, x):
    with pytest.raises(IndexError, match="task 7: the model knows the tasks 0 to 2"):
        classifier(x, 7)
    with pytest.raises(ValueError, match="at least one"):
        ClipClassifier(loaded.clip, loaded.tokenizer, [])
    with pytest.raises(ValueError, match="at least one"):
        Prompts([])
    with pytest.raises(ValueError, match="at least one"):
        Prompts(["cat"], [])
    with pytest.raises(ValueError, match="expected a list of texts, such as \\['cat'\\], got the text 'cat'"):
        Prompts("cat")
    with pytest.raises(ValueError, match="class_names: expected texts, got 5"):
        Prompts(["cat", 5])
    with pytest.raises(
        ValueError, match=r"expected a stream's tasks or Prompts\(\[names\], \[templates\]\), got \['cat'\]"
    ):
        ClipClassifier(loaded.clip, loaded.tokenizer, [["cat"]])


def test_prompts_as_they_are_written(loaded):
    one = ClipClassifier(loaded.clip, loaded.tokenizer, Prompts(["cat", "dog"], "a photo of a {}."))
    several = ClipClassifier(loaded.clip, loaded.tokenizer, [Prompts(["cat", "dog"], ["a photo of a {}."])])
    assert one.prompts == several.prompts == (Prompts(("cat", "dog")),)
