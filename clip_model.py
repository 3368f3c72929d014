"""CLIP (Radford et al., 2021) with deep prompts: the tokenizer, the two towers, and `load`.

    clip = load("ViT-B/16")                                   # fp32, eval mode, frozen
    image = clip.encode_image(images)                         # (B, 3, R, R) -> (B, D)
    text = clip.encode_text(tokenize(["a photo of a cat."]))  # (C, 77) -> (C, D)

Both encoders take `prompts` (depth, n, width): learned vectors that join the tokens at the input of
the first `depth` blocks. With `prompts=None` they are plain CLIP, so one copy of the weights serves
as both the tuned model and its frozen teacher. Not here: ResNet towers, and training CLIP itself.

To use it elsewhere, copy this file, `weights.py` and `bpe_simple_vocab_16e6.txt.gz`.
"""

import collections
import functools
import gzip
import hashlib
import html
import math
import os
from pathlib import Path
from typing import NamedTuple

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weights import MEAN, STD, file_errors, find, read_weights

# ---- Tokenizer: byte-pair encoding of lower-case text --------------------------------------------
MERGES_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
N_MERGES = 48894  # the file has more, which CLIP does not use
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def _byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte, in the order of CLIP's first 256 ids.

    Printable bytes stand for themselves. The others get the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


class Tokenizer:
    """Turns text into CLIP's token ids: 256 bytes, 256 word-final bytes, merges, SOT, EOT."""

    def __init__(self, merges_file: str | Path = MERGES_FILE):
        with gzip.open(merges_file, "rt", encoding="utf-8") as f:
            lines = f.read().split("\n")[1 : N_MERGES + 1]  # line 0 is a header
        merges = [tuple(line.split()) for line in lines]
        self.byte_symbol = _byte_symbols()
        symbols = list(self.byte_symbol.values())
        vocabulary = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges]
        self.ids = {symbol: i for i, symbol in enumerate(vocabulary)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.sot, self.eot = len(vocabulary), len(vocabulary) + 1  # start and end of text
        self.encode_word = functools.lru_cache(maxsize=2**16)(self._encode_word)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without SOT and EOT. The text is cleaned up and lower-cased.

        SOT and EOT cannot occur in a text: "<|endoftext|>" is read as punctuation and letters.
        """
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = " ".join(text.split()).lower()
        return [i for word in WORD.findall(text) for i in self.encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        """Merges adjacent symbols, the lowest rank first, until none can be merged."""
        parts = [self.byte_symbol[b] for b in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            joined = []
            i = 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                joined.append("".join(parts[i : i + step]))
                i += step
            parts = joined
        return [self.ids[part] for part in parts]


_tokenizer = functools.cache(Tokenizer)  # reads the merges when first used


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Token ids of texts, (n, context_length): SOT, the text, EOT, zeros.

    A text that is too long raises ValueError or, with `truncate`, is cut so that EOT is last.
    """
    texts = [texts] if isinstance(texts, str) else texts
    tokenizer = _tokenizer()
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(tokens, texts):
        ids = [tokenizer.sot, *tokenizer.encode(text), tokenizer.eot]
        if len(ids) > context_length:
            if not truncate:
                limit = f"has {len(ids)} tokens, but the limit is {context_length}"
                raise ValueError(f"the text {text[:60]!r} {limit}")
            ids = ids[: context_length - 1] + [tokenizer.eot]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


# ---- Packing several texts into one row ----------------------------------------------------------
class PackedTexts(NamedTuple):
    """C texts in R rows of L tokens, as `pack` lays them out."""

    tokens: Tensor  # (R, L) ids, padded with 0
    positions: Tensor  # (R, L) position of each token in its text
    mask: Tensor  # (R, 1, L, L) True where a query (row) attends to a key (column)
    ends: Tensor  # (C,) index of each text's EOT among the R * L tokens

    def to(self, device: torch.device) -> "PackedTexts":
        return PackedTexts(*(part.to(device) for part in self))


SHARED, PADDING = -1, -2  # owners of tokens outside any single text


def pack(tokens: Tensor, n_prompts: int = 0, length: int = 48) -> PackedTexts:
    """Packs texts (C, L) into rows of up to `length` tokens. Their features stay the same.

    Attention is causal, so the states of SOT and the prompts do not depend on the rest of the text
    and are computed once per row, and nothing after EOT matters. A row therefore holds SOT, the
    prompts, then the remaining tokens of one text up to EOT, those of the next, and so on. Each
    token attends to SOT, the prompts, and the earlier tokens of its own text.
    Raises ValueError if a text ends among the prompts or if the texts start with different tokens.
    """
    start = 1 + n_prompts
    texts = [row[: row.argmax() + 1].tolist() for row in tokens.cpu()]  # EOT has the highest id
    if min(map(len, texts)) <= start:
        raise ValueError(f"a text is too short: it ends among the {n_prompts} prompts")
    if len({text[0] for text in texts}) > 1:
        raise ValueError("all texts must start with the same token")
    length = max(length, *map(len, texts))
    rows = []  # lists of (token, position, owner)
    ends = []  # (row, column) of each EOT
    for i, text in enumerate(texts):
        own = [(token, position, i) for position, token in enumerate(text)][start:]
        if not rows or len(rows[-1]) + len(own) > length:
            rows.append([(text[k], k, SHARED) for k in range(start)])
        rows[-1] += own
        ends.append((len(rows) - 1, len(rows[-1]) - 1))
    length = max(map(len, rows))
    table = torch.tensor([row + (length - len(row)) * [(0, 0, PADDING)] for row in rows])
    tokens, positions, owners = table.unbind(dim=-1)  # (R, L) each
    sees = (owners[:, :, None] == owners[:, None, :]) | (owners[:, None, :] == SHARED)
    mask = sees.tril()[:, None]  # (R, 1, L, L), broadcast over heads
    return PackedTexts(tokens, positions, mask, torch.tensor([r * length + c for r, c in ends]))


# ---- The model. Attributes are named as in OpenAI's state dicts. ---------------------------------
HEAD_WIDTH = 64  # in OpenAI's text towers, and in most image towers


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.heads = heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, W) -> (B, L, W). mask: (B, 1, L, L), True where a query attends to a key."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, L, 3W)
        qkv = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # (B, heads, L, W / heads) each
        y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, heads, L, W / heads) -> (B, L, W)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702  # the same, but backward needs one tensor, not two


ACTIVATIONS = {"quickgelu": QuickGELU, "gelu": nn.GELU}


class Block(nn.Module):
    """Pre-norm residual block: attention, then an MLP."""

    def __init__(self, width: int, heads: int, mlp_width: int, activation: str):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            collections.OrderedDict(
                c_fc=nn.Linear(width, mlp_width),
                gelu=ACTIVATIONS[activation](),
                c_proj=nn.Linear(mlp_width, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks without a forward: the encoders loop over it to insert prompts."""

    def __init__(self, width: int, layers: int, heads: int, mlp_width: int, activation: str):
        super().__init__()
        self.width, self.layers = width, layers
        self.resblocks = nn.ModuleList(
            Block(width, heads, mlp_width, activation) for _ in range(layers)
        )


class VisionTransformer(nn.Module):
    """The image tower. Its tokens: class token, patches, then prompts."""

    def __init__(self, resolution: int, patch_size: int, embed_dim: int, transformer: Transformer):
        super().__init__()
        width = transformer.width
        patches = (resolution // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + patches, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = transformer
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))


class CLIP(nn.Module):
    """An image tower and a text tower with a joint space of D = `embed_dim` dimensions.

    activation: "quickgelu" or "gelu". head_width: of the image tower; in the text tower it is 64.
    vision_mlp_width: by default 4 times the width. mean, std: for normalising images, per channel.
    The constructor leaves parameters uninitialised; `load` and `from_state_dict` fill them.
    """

    def __init__(
        self,
        embed_dim: int,
        image_resolution: int,
        patch_size: int,
        vision_width: int,
        vision_layers: int,
        text_width: int,
        text_layers: int,
        context_length: int = 77,
        vocab_size: int = 49408,
        activation: str = "quickgelu",
        head_width: int = HEAD_WIDTH,
        vision_mlp_width: int | None = None,
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ):
        super().__init__()
        if vision_width % head_width or text_width % HEAD_WIDTH:
            raise ValueError("the width of a tower must be a multiple of its head width")
        self.image_resolution = image_resolution
        self.context_length = context_length
        self.activation = activation
        self.head_width = head_width
        self.mean, self.std = mean, std
        self.notes: tuple[str, ...] = ()  # guesses made by `load`, one per line
        heads = vision_width // head_width
        mlp_width = vision_mlp_width or 4 * vision_width
        tower = Transformer(vision_width, vision_layers, heads, mlp_width, activation)
        self.visual = VisionTransformer(image_resolution, patch_size, embed_dim, tower)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        heads = text_width // HEAD_WIDTH
        self.transformer = Transformer(text_width, text_layers, heads, 4 * text_width, activation)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Image features (B, D), not normalised.

        images: (B, 3, R, R), normalised with `mean` and `std`. prompts: (depth, n, width) or None.
        prompts[0] follows the patches before `ln_pre`; prompts[l] replaces it at the input of
        block l (the "independent V-L prompts" of MaPLe).
        """
        tower = self.visual
        prompts = () if prompts is None else prompts
        patches = tower.conv1(images).flatten(2).transpose(1, 2)  # (B, N, W)
        start = tower.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([start, patches], dim=1) + tower.positional_embedding  # (B, 1 + N, W)
        length = x.shape[1]
        for layer, block in enumerate(tower.transformer.resblocks):
            if layer < len(prompts):
                new = prompts[layer].expand(x.shape[0], -1, -1)  # (B, n, W)
                x = torch.cat([x[:, :length], new], dim=1)  # (B, 1 + N + n, W)
            if layer == 0:
                x = tower.ln_pre(x)
            x = block(x)
        return tower.ln_post(x[:, 0]) @ tower.proj

    def encode_text(self, tokens: Tensor | PackedTexts, prompts: Tensor | None = None) -> Tensor:
        """Text features (C, D), read at the EOT token, not normalised.

        tokens: (C, L) from `tokenize`, or the result of `pack(tokens, n)`, which can be reused.
        prompts: (depth, n, width) or None. prompts[0] takes positions 1..n, after SOT, before
        positions are added; prompts[l] replaces it at the input of block l.
        Raises ValueError if `pack` does.
        """
        prompts = () if prompts is None else prompts
        n = prompts.shape[1] if len(prompts) else 0
        texts = tokens if isinstance(tokens, PackedTexts) else pack(tokens, n)
        texts = texts.to(self.positional_embedding.device)
        x = self.token_embedding(texts.tokens)  # (R, L, W)
        for layer, block in enumerate(self.transformer.resblocks):
            if layer < len(prompts):
                new = prompts[layer].expand(x.shape[0], -1, -1)  # (R, n, W)
                x = torch.cat([x[:, :1], new, x[:, 1 + n :]], dim=1)  # (R, L, W)
            if layer == 0:
                x = x + self.positional_embedding[texts.positions]
            x = block(x, texts.mask)
        return self.ln_final(x.flatten(0, 1)[texts.ends]) @ self.text_projection

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], **options) -> "CLIP":
        """A frozen fp32 model in eval mode. Its sizes are read from the shapes in `state`.

        options: activation, head_width, mean and std, which the tensors do not show.
        Raises KeyError, RuntimeError or ValueError if `state` is not that of such a CLIP.
        """
        width, _, patch, _ = state["visual.conv1.weight"].shape
        patches = len(state["visual.positional_embedding"]) - 1
        text_width, embed_dim = state["text_projection"].shape
        vocab_size = len(state["token_embedding.weight"])
        with torch.device("meta"):  # allocates nothing: every parameter is replaced below
            model = cls(
                embed_dim=embed_dim,
                image_resolution=patch * math.isqrt(patches),
                patch_size=patch,
                vision_width=width,
                vision_layers=_count_blocks(state, "visual.transformer.resblocks."),
                text_width=text_width,
                text_layers=_count_blocks(state, "transformer.resblocks."),
                context_length=len(state["positional_embedding"]),
                vocab_size=vocab_size,
                vision_mlp_width=len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
                **options,
            )
        model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
        if vocab_size < 49408:
            raise ValueError("the vocabulary is smaller than CLIP's")
        return model.requires_grad_(False).eval()


def _count_blocks(state: dict[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def load(
    name: str | os.PathLike = "ViT-B/16",
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike | None = None,
    activation: str | None = None,
) -> CLIP:
    """CLIP with pretrained weights: fp32, eval mode, all parameters frozen.

    name: a model in `weights.MODELS`, which is downloaded once to `cache_dir` (~/.cache/clip), or a
    path to weights in the layout of OpenAI, open_clip or transformers. No code in a file is run.
    activation: "quickgelu" or "gelu", for weights without a config file.
    Raises ValueError (unknown name, not a CLIP, damaged file) or OSError (cannot read or download).
    """
    path = find(name, cache_dir)
    weights = read_weights(path, activation)
    with file_errors(path, "; these are not the weights of a CLIP with two transformers"):
        model = CLIP.from_state_dict(
            weights.state,
            activation=weights.activation,
            head_width=weights.head_width,
            mean=weights.mean,
            std=weights.std,
        )
    model.notes = weights.notes
    return model.to(device)


def fingerprint(clip: CLIP) -> str:
    """A short hash that identifies a CLIP by its two projections and its options."""
    options = (clip.activation, clip.head_width, clip.mean, clip.std)
    digest = hashlib.sha256(repr(options).encode())
    for projection in (clip.visual.proj, clip.text_projection):
        digest.update(projection.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
