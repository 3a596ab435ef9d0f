"""The text tower on sentences cut to the longest one, where that changes no feature.

With a causal mask nothing after the token at which the tower pools can reach a feature, and with a padding mask no padding
can. Which of the two a tower has, open_clip's classes tell: see `kind_of`. A tower that reads the padding, such as SigLIP's,
one whose code or hooks are not open_clip's own, and one of another library get whole sentences.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from open_clip.coca_model import CoCa
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

Kind = Literal["causal", "class token", "masked padding", "whole"]


def kind_of(clip: Any) -> Kind:
    """How the text tower may be cut.

    `causal`: after the token that it pools (CLIP). `class token`: before the one that it appends (CoCa). `masked padding`:
    after the last token that is no padding (towers of transformers). `whole`: not at all.
    """
    if not _is_open_clips_own(clip, (CLIP, CustomTextCLIP, CoCa), "encode_text"):
        return "whole"
    tower: Any = clip if isinstance(clip, CLIP) else clip.text
    if isinstance(tower, HFTextEncoder):
        return "masked padding"
    if tower is not clip and not _is_open_clips_own(tower, (TextTransformer,), "forward"):
        return "whole"
    if tower.attn_mask is None:
        return "whole"
    if getattr(tower, "cls_emb", None) is not None:
        return "class token"
    return "causal" if _pool_of(tower) in ("argmax", "eos") and not hasattr(clip, "text_decoder") else "whole"


def length_needed(clip: Any, tokens: Tensor) -> int:
    """How many leading tokens of each sentence the features depend on. tokens: [N, L], N ≥ 1, on the host; returns 1 to L."""
    kind, length = kind_of(clip), tokens.shape[1]
    if kind == "whole":
        return length
    if kind == "causal":
        return int(_pooled_at(clip, tokens).max()) + 1
    tower: Any = clip.text
    padding = tower.pad_id if kind == "class token" else tower.config.pad_token_id
    used = (tokens != padding).any(0).nonzero()
    last = int(used.max()) if len(used) else 0
    # CoCa's own mask is shifted by one, so that the class token sees the first padding
    return min(length, last + (2 if kind == "class token" and not tower.correct_cls_mask else 1))


def encode_sentences(clip: Any, tokens: Tensor, length: int) -> Tensor:
    """The features [N, d] that `clip.encode_text(tokens)` gives, from the first `length` tokens of each sentence.

    tokens: [N, L] on the model's device; length: at least `length_needed`. CoCa's features are not normalised here.
    """
    kind, size = kind_of(clip), tokens.shape[1]
    if kind == "masked padding":
        tokens = tokens[:, :length]
    if kind in ("whole", "masked padding") or length >= size:
        features: Tensor = clip.encode_text(tokens)
        return features
    tokens = tokens[:, :length]
    tower: Any = clip if isinstance(clip, CLIP) else clip.text
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(tokens).to(dtype)
    positions = tower.positional_embedding
    if kind == "causal":
        x = x + positions[:length].to(dtype)
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
        pooled_at = _pooled_at(clip, tokens)[:, None, None].expand(-1, 1, x.shape[2])
        x = x.gather(1, pooled_at)[:, 0]
    else:
        x = torch.cat([x, tower.cls_emb.to(dtype).expand(len(x), 1, -1)], 1)
        x = x + torch.cat([positions[:length], positions[size : size + 1]]).to(dtype)
        x = tower.ln_final(tower.transformer(x, attn_mask=_mask_with_class_token(tower, tokens, x.dtype))[:, -1])
    projection = tower.text_projection
    projected: Tensor = (
        x if projection is None else projection(x) if isinstance(projection, nn.Linear) else x @ projection
    )
    return projected


def _pool_of(tower: Any) -> str:
    return str(tower.text_pool_type if isinstance(tower, CLIP) else tower.pool_type)


def _pooled_at(clip: Any, tokens: Tensor) -> Tensor:
    """The position [N] of the token at which a causal tower pools: the end of the text."""
    tower = clip if isinstance(clip, CLIP) else clip.text
    if _pool_of(tower) == "argmax":
        return tokens.argmax(1)
    end: int = tower.text_eos_id if tower is clip else tower.eos_id
    return (tokens == end).int().argmax(1)


def _mask_with_class_token(tower: Any, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """CoCa's additive mask [N·heads, L + 1, L + 1]: causal, without the padding."""
    seen, sure = tokens != tower.pad_id, tokens.new_ones(len(tokens), 1, dtype=torch.bool)
    seen = torch.cat([seen, sure] if tower.correct_cls_mask else [sure, seen], 1)
    size = seen.shape[1]
    padding = torch.zeros(seen.shape, dtype=dtype, device=tokens.device).masked_fill(~seen, float("-inf"))
    mask: Tensor = tower.attn_mask[:size, :size] + padding[:, None]
    return mask.repeat_interleave(tower.heads, 0)


def _is_open_clips_own(module: nn.Module, classes: tuple[type[nn.Module], ...], method: str) -> bool:
    """Whether nothing has replaced a method of open_clip's, on the class or the instance, nor hooked itself in."""
    if not isinstance(module, classes) or method in vars(module):
        return False
    hooks: tuple[Any, ...] = (module._forward_hooks, module._forward_pre_hooks) if method == "forward" else ()
    return any(getattr(type(module), method) is getattr(each, method) for each in classes) and not any(map(bool, hooks))
