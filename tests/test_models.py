"""Models by name: the bundled one and those of open_clip, their weights and their mistakes."""

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mulki_plugins.errors import MissingData, MulkiError
from mulki_plugins.models import ClipClassifier, Prompts, load_clip
from mulki_plugins.streams import as_benchmark, mtil_mini
from tests.conftest import small_clip


def test_the_bundled_model_is_an_open_clip_of_about_three_million_weights():
    loaded = load_clip("mulki-tiny")
    assert isinstance(loaded.clip, open_clip.model.CLIP)
    assert 2.5e6 < sum(p.numel() for p in loaded.clip.parameters()) < 3.5e6
    assert loaded.image_size == 48
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in loaded.clip.parameters())


def test_loading_it_draws_no_random_numbers():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_clip("mulki-tiny")
    assert torch.rand(1) == expected


def test_the_bundled_model_has_real_zero_shot_ability():
    loaded, stream = load_clip("mulki-tiny"), mtil_mini()
    model = ClipClassifier(loaded.clip, loaded.tokenizer, stream.tasks).eval()
    benchmark = as_benchmark(stream, loaded.transform(train=True), loaded.transform(train=False))
    accuracies = []
    for task, experience in enumerate(benchmark.test_stream):
        some = range(0, len(experience.dataset), 4)
        x = torch.stack([experience.dataset[i][0] for i in some])
        with torch.no_grad():
            right = model(x, task).argmax(1) == torch.tensor([experience.dataset[i][1] for i in some])
        accuracies.append(100 * right.float().mean().item())
        assert accuracies[-1] > 2 * 100 / len(stream.tasks[task].class_names), stream.tasks[task].name
    assert 40 <= sum(accuracies) / 11 <= 65


def test_vit_b_16_builds_and_takes_a_training_step():
    loaded = load_clip("ViT-B-16", pretrained="random")
    model = ClipClassifier(loaded.clip, loaded.tokenizer, [Prompts(["cat", "dog"])]).train()
    assert loaded.image_size == 224
    before = model.clip.visual.proj.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 224, 224), 0), torch.tensor([0, 1]))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert not torch.equal(model.clip.visual.proj, before)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_weights_from_a_file(kind, tmp_path):
    model = open_clip.create_model("RN50")
    with torch.no_grad():
        model.logit_scale.fill_(1.25)
    path = tmp_path / f"weights.{kind}"
    save_file(model.state_dict(), path) if kind == "safetensors" else torch.save(model.state_dict(), path)
    assert load_clip("RN50", pretrained=str(path)).clip.logit_scale.item() == 1.25


def test_weights_for_the_bundled_model_from_a_file(tmp_path):
    loaded = load_clip("mulki-tiny")
    state = {k: v.clone().contiguous() for k, v in loaded.clip.state_dict().items()}
    state["logit_scale"] = torch.tensor(1.5)
    save_file(state, tmp_path / "w.safetensors")
    assert load_clip("mulki-tiny", pretrained=str(tmp_path / "w.safetensors")).clip.logit_scale.item() == 1.5
    save_file(small_clip().state_dict(), tmp_path / "other.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for wrong, why in (("other", "do not fit mulki-tiny"), ("junk", "not weights"), ("gone", "no such file")):
        with pytest.raises(MulkiError, match=rf"{wrong}.safetensors: .*{why}"):
            load_clip("mulki-tiny", pretrained=str(tmp_path / f"{wrong}.safetensors"))


def test_mistakes(tmp_path):
    with pytest.raises(MulkiError, match=r"no model is named 'ViT-B-61' \(did you mean 'ViT-B-16'"):
        load_clip("ViT-B-61")
    with pytest.raises(MissingData, match=r"no weights 'opena' .*\(did you mean 'openai'"):
        load_clip("ViT-B-16", pretrained="opena")


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_disguised_as_weights_runs_no_code(tmp_path):
    torch.save({"x": Evil(tmp_path / "owned")}, tmp_path / "w.pt")
    with pytest.raises(MissingData, match="could run code"):
        load_clip("RN50", pretrained=str(tmp_path / "w.pt"))
    assert not (tmp_path / "owned").exists()
