"""The one loop over a training set: sums in any batches, moments of classes and of a layer's inputs, bases."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

from mulki_plugins.losses import class_sums
from mulki_plugins.models import ClipClassifier
from mulki_plugins.stages.prototypes import visual_prototypes
from mulki_plugins.stages.statistics import TaskImages, encoded, layer_moments, leading_basis, sum_over
from tests.conftest import naive

CPU = torch.device("cpu")


def pictures(stream, loaded, task=1):
    """Images and classes of a task's training set, prepared without Avalanche."""
    transform, train = loaded.transform(train=False), stream.tasks[task].train
    pairs = [train[i] for i in range(len(train))]
    return torch.stack([transform(image) for image, _ in pairs]), torch.tensor([label for _, label in pairs])


@pytest.mark.parametrize("size", [1, 5, 256])
def test_sums_do_not_depend_on_the_batches(benchmark, stream, loaded, size):
    x, y = pictures(stream, loaded)
    seen = []

    def term(batch):
        seen.append(len(batch.images))
        assert batch.tasks.tolist() == [1] * len(batch.images)
        assert torch.equal(batch.classes, batch.host_classes)
        return {"images": batch.images.double().sum(0), "classes": torch.bincount(batch.classes, minlength=3)}

    sums = sum_over(benchmark.train_stream[1].dataset, term, CPU, batch_size=size)
    assert torch.allclose(sums["images"], x.double().sum(0), atol=1e-9)
    assert sums["classes"].tolist() == torch.bincount(y).tolist()
    assert sum(seen) == len(x)
    assert max(seen) == min(size, len(x))


def test_what_a_term_returns_is_left_alone_and_reading_can_be_stopped(benchmark):
    dataset, kept = benchmark.train_stream[0].dataset, torch.ones(2)
    assert sum_over(dataset, lambda batch: {"n": kept}, CPU, batch_size=4)["n"].tolist() == [4, 4]
    assert kept.tolist() == [1, 1]
    read = []

    def stop():
        read.append(1)
        if len(read) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sum_over(dataset, lambda batch: {"n": kept}, CPU, batch_size=4, after_batch=stop)
    assert len(read) == 2
    with pytest.raises(ValueError, match="no images"):
        sum_over(dataset.subset([]), lambda batch: {"n": kept}, CPU)


def features(classifier, stream, loaded, task=1):
    x, y = pictures(stream, loaded, task)
    with torch.no_grad():
        return classifier.eval().encode_image(x).double(), y


def test_moments_of_classes(classifier, benchmark, stream, loaded):
    images = TaskImages(classifier.train(), benchmark.train_stream[1].dataset, 1, batch_size=5)
    moments = images.moments()
    assert classifier.training, "the model's mode is as before"
    z, y = features(classifier, stream, loaded)
    assert images.classes == 3
    assert moments.counts.tolist() == [8, 8, 8]
    assert moments.sums.dtype == moments.squares.dtype == torch.double
    within = torch.zeros(16, 16).double()
    for c in range(3):
        assert torch.allclose(moments.means[c], z[y == c].mean(0), atol=1e-6)
        assert torch.allclose(moments.covariances[c], torch.cov(z[y == c].T), atol=1e-6)
        within += 7 * torch.cov(z[y == c].T)
    assert torch.allclose(moments.shared_covariance, within / 21, atol=1e-6)
    assert torch.allclose(images.text, classifier.encode_text(1, all_templates=True))


def test_classes_without_images(classifier, benchmark):
    dataset = benchmark.train_stream[1].dataset
    some = dataset.subset([i for i, c in enumerate(dataset.targets) if c == 2][:1])
    moments = TaskImages(classifier, some, 1).moments()
    assert moments.counts.tolist() == [0, 0, 1]
    assert moments.means[:2].abs().max() == 0
    assert moments.covariances.abs().max() < 1e-12
    assert moments.shared_covariance.isfinite().all()


def test_sums_of_a_head_are_in_double_precision(classifier, benchmark):
    images = TaskImages(classifier, benchmark.train_stream[0].dataset, 0, batch_size=3)
    sums = images.sum(lambda z, y: {"z": z, "n": y} if len(z) < 3 else {"z": z[:1], "n": y[:1]})
    assert (sums["z"].dtype, sums["n"].dtype) == (torch.double, torch.long)


def test_prototypes_are_the_same_loop_to_the_last_digit(classifier, benchmark):
    dataset, model = benchmark.train_stream[1].dataset, classifier.eval()
    total = torch.zeros(3, 16)
    with torch.no_grad():  # as the prototypes have always been summed
        for batch in DataLoader(dataset.eval(), batch_size=5):
            total += class_sums(model.encode_image(batch[0]).float(), batch[1], 3)
    expected = torch.nn.functional.normalize(total, dim=1)
    assert torch.equal(visual_prototypes([model], dataset, {1}, batch_size=5)[0][1], expected)


LAYERS = ["visual.transformer.resblocks.0.mlp.c_fc", "visual.transformer.resblocks.0.attn", "visual.ln_post"]


def test_moments_of_a_layers_inputs(classifier, benchmark, stream, loaded):
    dataset, model = benchmark.train_stream[1].dataset, classifier
    got = layer_moments(model, dataset, LAYERS, batch_size=7)
    x, _ = pictures(stream, loaded)
    for path in LAYERS:
        rows = []
        hook = model.clip.get_submodule(path).register_forward_pre_hook(
            lambda module, inputs, named, rows=rows: rows.append(
                (inputs or tuple(named.values()))[0].detach().double()
            ),
            with_kwargs=True,
        )
        with torch.no_grad():
            encoded(model.eval(), x)
        hook.remove()
        flat = torch.cat([each.reshape(-1, each.shape[-1]) for each in rows])
        assert torch.allclose(got[path], flat.T @ flat / len(flat), atol=1e-5)
        assert not model.clip.get_submodule(path)._forward_pre_hooks
    with pytest.raises(ValueError, match="no layer 'visual"):
        layer_moments(model, dataset, ["visual.nothing"])
    with pytest.raises(ValueError, match=r"no image reaches the layer 'ln_final'"):
        layer_moments(model, dataset, ["ln_final"])


def test_the_leading_directions_hold_their_share():
    torch.manual_seed(0)
    a = torch.randn(40, 9).double() * torch.tensor([9, 7, 5, 3, 2, 1, 0.5, 0.2, 0.1]).double()
    moment, u, s = a.T @ a, *torch.linalg.svd(a.T)[:2]
    energy = s.square().cumsum(0) / s.square().sum()
    for share in (0.5, 0.9, 0.99, 1.0):
        basis = leading_basis(moment, share)
        k = basis.shape[1]
        assert k == int((energy < share - 1e-12).sum()) + 1
        assert torch.allclose(basis.T @ basis, torch.eye(k).double(), atol=1e-9)
        assert torch.allclose(basis @ basis.T, u[:, :k] @ u[:, :k].T, atol=1e-7)
    assert leading_basis(moment, 0.0).shape == (9, 0)
    with pytest.raises(ValueError, match=r"0\.\.1"):
        leading_basis(moment, 1.2)


def test_the_statistics_of_a_strategys_task_follow_its_settings(classifier, benchmark):
    strategy = naive(classifier, [])
    images = TaskImages.of(strategy, benchmark.train_stream[0].dataset, 0, None)
    assert images.batch_size == strategy.eval_mb_size == 16
    before = copy.deepcopy(classifier.state_dict())
    images.moments()
    assert all(torch.equal(before[name], w) for name, w in classifier.state_dict().items())
    assert isinstance(classifier, ClipClassifier)
