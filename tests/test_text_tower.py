"""Sentences cut to the longest one: the features of open_clip's own `encode_text`, for every kind of text tower."""

import open_clip
import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import nn

from mulki_plugins.models import ClipClassifier, Prompts
from mulki_plugins.models.load import load_clip
from mulki_plugins.models.text_tower import encode_sentences, kind_of, length_needed

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 20, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
POOLER = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
END = 59


def coca(**text):
    multimodal = {"context_length": 20, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2}
    return CoCa(16, multimodal, {**TEXT, "embed_cls": True, "output_tokens": True, **text}, {**VISION, **POOLER})


def correct_coca():
    clip = coca()
    clip.text.correct_cls_mask = True
    return clip


def hugging_face(pooler):
    transformers = pytest.importorskip("transformers")
    from open_clip.hf_model import HFTextEncoder

    config = transformers.RobertaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=30, pad_token_id=0,
    )  # fmt: skip
    clip = CustomTextCLIP(16, VISION, TEXT)
    clip.text = HFTextEncoder("", 16, config=config, pooler_type=pooler, proj_type="linear")
    return clip


TOWERS = {
    "CLIP": (lambda: CLIP(16, VISION, TEXT), "causal", 9),
    "CLIP, pooled at its end token": (lambda: CLIP(16, VISION, {**TEXT, "pool_type": "eos", "eos_id": END}), "causal", 9),
    "CLIP with QuickGELU": (lambda: CLIP(16, VISION, TEXT, quick_gelu=True), "causal", 9),
    "custom tower": (lambda: CustomTextCLIP(16, VISION, TEXT), "causal", 9),
    "custom tower, biased projection": (
        lambda: CustomTextCLIP(16, VISION, {**TEXT, "proj_bias": True, "pool_type": "eos", "eos_id": END}), "causal", 9,
    ),
    "custom tower of custom blocks": (lambda: CustomTextCLIP(16, VISION, {**TEXT, "qk_norm": True}), "causal", 9),
    "CoCa": (coca, "class token", 10),
    "CoCa with the right mask": (correct_coca, "class token", 9),
    "SigLIP": (lambda: CustomTextCLIP(16, VISION, {**TEXT, "no_causal_mask": True, "pool_type": "last"}), "whole", 20),
    "CLIPA": (lambda: CLIP(16, VISION, {**TEXT, "no_causal_mask": True, "pool_type": "last"}), "whole", 20),
    "MobileCLIP2": (lambda: CustomTextCLIP(16, VISION, {**TEXT, "no_causal_mask": True}), "whole", 20),
    "causal, pooled at the last token": (lambda: CLIP(16, VISION, {**TEXT, "pool_type": "last"}), "whole", 20),
    "Hugging Face, mean": (lambda: hugging_face("mean_pooler"), "masked padding", 9),
    "Hugging Face, first": (lambda: hugging_face("cls_last_hidden_state_pooler"), "masked padding", 9),
}  # fmt: skip


def some_tokens():
    """Four sentences of 3 to 9 tokens: start, words, end, padding with 0."""
    tokens = torch.zeros(4, 20, dtype=torch.long)
    for row, words in zip(tokens, (1, 7, 4, 2), strict=True):
        row[0], row[words + 1] = 1, END
        row[1 : words + 1] = torch.randint(2, 50, (words,))
    return tokens


def random_tower(name):
    torch.manual_seed(0)
    clip = TOWERS[name][0]().eval()
    with torch.no_grad():  # biases and gains that differ from 0 and 1 show what is left out
        for p in clip.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return clip


@pytest.mark.parametrize("name", TOWERS)
def test_cut_sentences_have_the_features_of_whole_ones(name):
    clip, tokens = random_tower(name), some_tokens()
    _, kind, needed = TOWERS[name]
    assert kind_of(clip) == kind
    length = length_needed(clip, tokens)
    assert length == needed
    for each in {length, min(20, length + 3), 20}:
        whole, cut = clip.encode_text(tokens), encode_sentences(clip, tokens, each)
        assert torch.allclose(nn.functional.normalize(cut), nn.functional.normalize(whole), atol=1e-5), each


@pytest.mark.parametrize("name", [name for name, tower in TOWERS.items() if tower[1] != "whole"])
def test_cut_sentences_give_the_gradients_of_whole_ones(name):
    clip, tokens = random_tower(name), some_tokens()
    length = length_needed(clip, tokens)
    weights = [p for n, p in clip.named_parameters() if n.startswith(("text.", "transformer", "token", "positional"))]
    direction = torch.randn(4, 16)

    def gradients(features):
        return torch.autograd.grad((nn.functional.normalize(features) * direction).sum(), weights, allow_unused=True)

    for a, b in zip(
        gradients(clip.encode_text(tokens)), gradients(encode_sentences(clip, tokens, length)), strict=True
    ):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, tower in TOWERS.items() if tower[1] != "whole"])
def test_one_token_less_would_change_the_features(name):
    clip, tokens = random_tower(name), some_tokens()
    length = length_needed(clip, tokens)
    whole = nn.functional.normalize(clip.encode_text(tokens))
    short = nn.functional.normalize(encode_sentences(clip, tokens, length - 1))
    assert not torch.allclose(short, whole, atol=1e-5)


@pytest.mark.parametrize("name", ["CLIP", "custom tower", "CoCa", "Hugging Face, mean"])
def test_a_sentence_that_fills_the_context_is_not_cut(name):
    clip, tokens = random_tower(name), torch.randint(2, 50, (3, 20))
    tokens[:, -1] = END
    assert length_needed(clip, tokens) == 20


def test_another_authors_code_in_the_tower_gets_whole_sentences():
    class Prompted(CLIP):
        def encode_text(self, text, normalize=False):
            return super().encode_text(text, normalize) * text[:, -1:].add(1)

    assert kind_of(Prompted(16, VISION, TEXT)) == "whole"
    patched = random_tower("CLIP")
    patched.encode_text = lambda tokens: tokens.float()
    assert kind_of(patched) == "whole"
    tokens = some_tokens()
    assert torch.equal(encode_sentences(patched, tokens, 9), tokens.float())
    hooked = random_tower("custom tower")
    hooked.text.register_forward_hook(lambda module, inputs, output: output * 2)
    assert kind_of(hooked) == "whole"

    class Longer(TextTransformer):
        def forward(self, text):
            return super().forward(text) + text[:, -1:]

    replaced = random_tower("custom tower")
    replaced.text = Longer(context_length=20, vocab_size=60, width=32, heads=2, layers=1, output_dim=16)
    assert kind_of(replaced) == "whole"
    assert kind_of(nn.Linear(2, 2)) == "whole"


class Counted:
    """Counts the tokens that pass a model's text tower."""

    def __init__(self, clip):
        self.shapes = []
        clip.transformer.register_forward_pre_hook(
            lambda module, inputs: self.shapes.append(tuple(inputs[0].shape[:2]))
        )


def test_the_bundled_model_reads_no_padding():
    loaded = load_clip("mulki-tiny")
    counted = Counted(loaded.clip)
    tasks = [Prompts(["cat", "dog"], ["a photo of a {}.", "{}."]), Prompts(["tower", "bridge", "hut"], ["a {}."])]
    model = ClipClassifier(loaded.clip, loaded.tokenizer, tasks)
    for every in (False, True):
        for task, prompts in enumerate(tasks):
            templates = prompts.templates if every else prompts.templates[:1]
            got = model.encode_text(task, all_templates=every)
            [(rows, length)] = counted.shapes
            assert rows == len(templates) * len(prompts.class_names)
            assert length < 16
            means = []
            for template in templates:
                sentences = [template.format(name) for name in prompts.class_names]
                means.append(loaded.clip.encode_text(loaded.tokenizer(sentences), normalize=True))
            expected = nn.functional.normalize(torch.stack(means).mean(0), dim=1)
            assert torch.allclose(got, expected, atol=1e-5)
            counted.shapes.clear()


def test_open_clips_architectures_are_of_the_kinds_that_are_tested():
    """A new kind of text tower in open_clip needs a line in TOWERS."""
    kinds = set()
    for name in open_clip.list_models():
        text = open_clip.get_model_config(name)["text_cfg"]
        if "hf_model_name" in text:
            continue
        causal = not text.get("no_causal_mask", False)
        kinds.add((causal, text.get("pool_type", "argmax"), text.get("embed_cls", False)))
    assert kinds <= {
        (True, "argmax", False), (True, "eos", False), (True, "argmax", True), (False, "last", False), (False, "argmax", False)
    }  # fmt: skip
