"""Pre-train mulki-tiny, the bundled CLIP, from scratch: under an hour on two CPU cores.

    .venv/bin/pip install -e '.[mini]' resvg-py
    .venv/bin/python tools/pretrain_tiny.py --art /tmp/art --out mulki_plugins/models/tiny
    .venv/bin/python tools/pretrain_tiny.py --art /tmp/art --out /tmp/vit --model vit --batch 256 --lr 1e-3

`--art` is where the packages of drawings and fonts lie, or are put by npm. The result is the model's configuration, its
vocabulary and its weights, and the table of its zero-shot accuracy on mtil-mini, which shares no picture with the corpus.
With another `--model` it is a package: after `pip install /tmp/vit`, `--set model.name=mulki-vit` runs a recipe with it.
On a GPU most of the time goes into drawing new renditions, on the CPU: with `--fresh 16` on four cores a step took 75 ms.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from attrs import evolve
from model_package import write_config, write_package
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from tiny_corpus import TEMPLATES, Concepts, Sprites, caption, drawings, fetch, flags, glyphs, shapes, textures
from tiny_vocabulary import learn_merges, write_merges
from torch import Tensor

from mulki_plugins.streams.mini.pictures import draw
from mulki_plugins.streams.mini.renditions import SIZE, STYLES, disturb, pose, render

TASKS = Path(__file__).parents[1] / "mulki_plugins" / "streams" / "mini" / "tasks.yaml"

CONTEXT, MERGES = 16, 1500
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": SIZE,
            "timm_model_name": "convnext_zepto_rms",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
        },
        "text_cfg": {"context_length": CONTEXT, "width": 128, "heads": 4, "layers": 3},
    },
    "vit": {
        "embed_dim": 192,
        "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 256, "layers": 6, "head_width": 64},
        "text_cfg": {"context_length": CONTEXT, "width": 192, "heads": 6, "layers": 4},
    },
    "vit-12": {  # half the cost of a step, for a CPU
        "embed_dim": 192,
        "vision_cfg": {"image_size": SIZE, "patch_size": 12, "width": 256, "layers": 6, "head_width": 64},
        "text_cfg": {"context_length": CONTEXT, "width": 192, "heads": 6, "layers": 4},
    },
}
SHARES = {"drawing": 0.65, "flag": 0.09, "letter": 0.07, "digit": 0.05, "shape": 0.04, "texture": 0.1}
LOOKS = {
    "drawing": evolve(STYLES["drawing"], rotation=20.0, scale=(0.6, 1.0)),
    "flag": evolve(STYLES["flag"], rotation=15.0, scale=(0.7, 1.0)),
    "letter": STYLES["glyph"],
    "digit": evolve(STYLES["glyph"], rotation=15.0, bend=0.05),
    "shape": STYLES["shape"],
    "texture": evolve(STYLES["drawing"], bend=0.03, rotation=20.0, scale=(1.2, 1.5), aspect=0.0, shear=0.0),
}


class Corpus:
    """An endless supply of renditions with captions; each rendition is used a few times before it is replaced."""

    def __init__(self, kinds: dict[str, Sprites], concepts: Concepts, seed: int, size: int = 8192) -> None:
        self.concepts = concepts
        self.kinds = kinds
        self.generator = torch.Generator().manual_seed(seed)
        self.by_concept = {
            kind: [np.flatnonzero(s.concepts == c) for c in np.unique(s.concepts)] for kind, s in kinds.items()
        }
        self.images = torch.empty((size, SIZE, SIZE, 3), dtype=torch.uint8)
        self.labels = torch.empty(size, dtype=torch.long)
        self.next = 0
        for _ in range(0, size, 512):
            self.renew(512)

    def renew(self, n: int) -> None:
        """Replace the n oldest renditions; every kind gets its share, every concept of a kind the same chance."""
        kind_of = torch.multinomial(torch.tensor(list(SHARES.values())), n, replacement=True, generator=self.generator)
        for i, kind in enumerate(SHARES):
            if count := int((kind_of == i).sum()):
                groups = self.by_concept[kind]
                rows = [self._any(groups[self._below(len(groups))]) for _ in range(count)]
                images = self._seen(kind, torch.from_numpy(self.kinds[kind].pictures[rows]))
                places = (self.next + torch.arange(count)) % len(self.images)
                self.images[places] = images
                self.labels[places] = torch.from_numpy(self.kinds[kind].concepts[rows])
                self.next = (self.next + count) % len(self.images)

    def batch(self, n: int) -> tuple[Tensor, Tensor, list[str]]:
        """Images uint8 [n, SIZE, SIZE, 3], their concepts [n], and a caption for each."""
        rows = torch.randint(0, len(self.images), (n,), generator=self.generator)
        labels = self.labels[rows]
        return self.images[rows], labels, [self._said(int(c)) for c in labels]

    def _said(self, concept: int) -> str:
        text = caption(self.concepts, concept, self.generator)
        if self._below(8) == 0:  # names with a hyphen, of which the artists' file names have none
            head, _, tail = text.rpartition(" ")
            text = f"{head}-{tail}" if head.count(" ") > 1 else text
        return text

    def _seen(self, kind: str, sprites: Tensor) -> Tensor:
        if kind == "digit" and self._below(2):
            return self._scanned(sprites)
        if kind == "drawing":
            sprites = recoloured(sprites, self.generator)
        return render(sprites, LOOKS[kind], "any", self.generator)

    def _scanned(self, sprites: Tensor) -> Tensor:
        """Bright ink on black or dark ink on paper, of any thickness and coarseness, as scanners deliver it."""
        _, ink = pose(sprites, LOOKS["digit"], "any", self.generator)
        if self._below(2):
            ink = F.max_pool2d(ink, 3, 1, 1)
        if self._below(2):
            coarse = F.interpolate(ink, size=8 + self._below(12), mode="area")
            ink = F.interpolate(coarse, size=SIZE, mode="bicubic").clamp(0, 1)
        image = ink if self._below(2) else 1 - ink
        return disturb(image.repeat(1, 3, 1, 1), evolve(LOOKS["digit"], noise=0.03), self.generator)

    def _below(self, n: int) -> int:
        return int(torch.randint(0, n, (1,), generator=self.generator))

    def _any(self, rows: np.ndarray) -> int:
        return int(rows[self._below(len(rows))])


def traced(sprites: Tensor) -> Tensor:
    """Drawings with dark lines along all their edges, as many artists make them: uint8 [N, S, S, 4] -> the same."""
    picture = sprites.permute(0, 3, 1, 2).float() / 255
    colour, alpha = picture[:, :3], picture[:, 3:]
    solid = torch.cat([colour * alpha, alpha], 1)
    change = F.max_pool2d(solid, 3, 1, 1) + F.max_pool2d(-solid, 3, 1, 1)  # largest less smallest nearby
    lines = ((change.amax(1, keepdim=True) - 0.15) * 4).clamp(0, 1)
    alpha = torch.maximum(F.max_pool2d(alpha, 3, 1, 1) * lines, alpha)
    return (torch.cat([colour * (1 - lines), alpha], 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def recoloured(sprites: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter of the drawings with their colours mixed anew, a tenth in grey, half mirrored."""
    result = sprites.clone()
    chance = torch.rand((3, len(sprites)), generator=generator)
    mirrored, mixed, grey = chance[0] < 0.5, chance[1] < 0.25, chance[2] < 0.1
    result[mirrored] = result[mirrored].flip(2)
    mixing = torch.eye(3) + 0.35 * torch.randn((int(mixed.sum()), 3, 3), generator=generator)
    mixing = mixing / mixing.sum(2, keepdim=True).abs().clamp(min=0.5)
    colours = torch.einsum("nij,nhwj->nhwi", mixing, result[mixed][..., :3].float()).clamp(0, 255)
    result[mixed] = torch.cat([colours.to(torch.uint8), result[mixed][..., 3:]], -1)
    result[grey] = torch.cat(
        [
            result[grey][..., :3].float().mean(-1, keepdim=True).to(torch.uint8).expand(-1, -1, -1, 3),
            result[grey][..., 3:],
        ],
        -1,
    )
    return result


def build_corpus(art: Path, seed: int) -> Corpus:
    """Every sprite, drawn anew (about a minute)."""
    concepts = Concepts()
    drawn = drawings(art, concepts)
    is_flag = np.array([concepts.kinds[c] == "flag" for c in drawn.concepts])
    more_flags = flags(art, concepts)
    letters, digits = glyphs(art, concepts)
    plain = torch.from_numpy(drawn.pictures[~is_flag])
    lined = torch.cat([traced(part) for part in plain.split(512)])
    kinds = {
        "drawing": Sprites(torch.cat([plain, lined]).numpy(), np.tile(drawn.concepts[~is_flag], 2)),
        "flag": Sprites(
            np.concatenate([drawn.pictures[is_flag], more_flags.pictures]),
            np.concatenate([drawn.concepts[is_flag], more_flags.concepts]),
        ),
        "letter": letters,
        "digit": digits,
        "shape": shapes(concepts),
        "texture": textures(concepts, each=150, seed=seed),
    }
    return Corpus(kinds, concepts, seed)


def contrastive_loss(images: Tensor, texts: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss with several positives: the target of a row is uniform over the batch's pairs of the same concept.

    images, texts: unit norm [B, d]; labels: [B]; scale: the temperature's inverse. Khosla et al. (arXiv 2004.11362).
    """
    same = (labels[:, None] == labels[None]).float()
    target = same / same.sum(1, keepdim=True)
    logits = scale * images @ texts.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train(model: CLIP, tokenizer: SimpleTokenizer, corpus: Corpus, args: argparse.Namespace) -> None:
    device, start = next(model.parameters()).device, time.monotonic()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    tokens: dict[str, Tensor] = {}
    running = 0.0
    for step in range(args.steps):
        warm, done = min(1.0, (step + 1) / 200), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.5 + 0.5 * math.cos(math.pi * done))
        corpus.renew(args.fresh)
        images, labels, texts = corpus.batch(args.batch)
        for text in texts:
            if text not in tokens:
                tokens[text] = tokenizer(text)[0]
        unique = sorted(set(texts))
        place = {text: i for i, text in enumerate(unique)}
        x = images.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.bf16):
            z = model.encode_image(x, normalize=True)
            t = model.encode_text(torch.stack([tokens[text] for text in unique]).to(device), normalize=True)
        t = t[torch.tensor([place[text] for text in texts], device=device)]
        loss = contrastive_loss(z.float(), t.float(), labels.to(device), model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step + 1 == args.steps:
            passed = time.monotonic() - start
            left = passed / (step + 1) * (args.steps - step - 1)
            print(f"step {step}/{args.steps}  loss {running:.3f}  {passed:.0f} s, {left:.0f} s left", flush=True)
        if step % 1000 == 999:
            print("  " + shown(zero_shot(model, tokenizer, "train")), flush=True)
            model.train()


@torch.no_grad()
def zero_shot(model: CLIP, tokenizer: SimpleTokenizer, split: str) -> dict[str, float]:
    """Accuracy in percent on each task of mtil-mini, with the mean of all its templates."""
    device = next(model.parameters()).device
    model.eval()
    table = {}
    for name, task in yaml.safe_load(TASKS.read_text()).items():
        pictures = draw(name, task, split)
        texts = torch.stack(
            [
                F.normalize(
                    model.encode_text(
                        tokenizer([t.format(c) for t in task["templates"]]).to(device), normalize=True
                    ).mean(0),
                    dim=0,
                )
                for c in task["classes"]
            ]
        )
        x = torch.from_numpy(pictures.images).permute(0, 3, 1, 2).float().to(device) / 127.5 - 1
        z = model.encode_image(x, normalize=True)
        table[name] = 100 * ((z @ texts.T).argmax(1).cpu() == torch.from_numpy(pictures.labels)).float().mean().item()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--art", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=list(MODELS), default="tiny")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--fresh", type=int, default=48, help="renditions made anew per step")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--bf16", action="store_true", help="mixed precision, where the processor has it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_flash_sdp(False)  # on a CPU its backward takes half of a bf16 step
    fetch(args.art)
    began = time.monotonic()
    corpus = build_corpus(args.art, args.seed)
    name, settings = f"mulki-{args.model}", MODELS[args.model]
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    if args.model != "tiny":
        out = write_package(
            out, name, f"a CLIP with a {args.model} for {SIZE} x {SIZE} images, pre-trained on drawings"
        )
    vocabulary = out / f"{name}-merges.txt.gz"
    texts = [
        t.format(n)
        for names, kind in zip(corpus.concepts.names, corpus.concepts.kinds, strict=True)
        for n in names
        for t in TEMPLATES[kind]
    ]
    write_merges(learn_merges(texts, MERGES), vocabulary)
    tokenizer = SimpleTokenizer(bpe_path=str(vocabulary), context_length=CONTEXT)
    settings["text_cfg"]["vocab_size"] = tokenizer.vocab_size
    model = CLIP(**settings).to("cuda" if torch.cuda.is_available() else "cpu")
    model.visual.to(memory_format=torch.channels_last)
    sizes = {kind: len(sprites.pictures) for kind, sprites in corpus.kinds.items()}
    print(
        f"corpus ready after {time.monotonic() - began:.0f} s: {sizes}, {len(corpus.concepts.names)} concepts",
        flush=True,
    )
    train(model, tokenizer, corpus, args)
    weights = {k: v.half().contiguous().cpu() for k, v in model.state_dict().items() if k != "attn_mask"}
    save_file(weights, out / f"{name}.safetensors")
    write_config(out, name, settings)
    for split in ("train", "test"):
        print(f"zero-shot on the {split} images: {shown(zero_shot(model, tokenizer, split))}")


def shown(table: dict[str, float]) -> str:
    return "  ".join(
        f"{name} {value:.1f}" for name, value in {**table, "mean": float(np.mean(list(table.values())))}.items()
    )


if __name__ == "__main__":
    main()
