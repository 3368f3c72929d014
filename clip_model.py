"""CLIP (Radford et al., 2021) with deep prompts: tokenizer, the two towers, loading of weights.

The file stands alone: copy it together with `bpe_simple_vocab_16e6.txt.gz`.

    clip = load("ViT-B/16")                                  # fp32, eval mode, frozen
    image = clip.encode_image(images)                        # (B, 3, R, R) -> (B, D)
    text = clip.encode_text(tokenize(["a photo of a cat."]))  # (C, 77) -> (C, D)

Both encoders take `prompts` (depth, n, width): learned vectors that stand among the tokens at the
input of the first `depth` blocks. With `prompts=None` they are plain CLIP, so that one copy of the
weights serves as the tuned model and as its frozen teacher. Features are not normalised.
"""

import collections
import functools
import gzip
import hashlib
import html
import json
import math
import os
import pickle
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------
# Tokenizer: byte-pair encoding over bytes, lower case

MERGES_FILE = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
N_MERGES = 48894  # the file goes on; CLIP's vocabulary of 49408 stops here
WORD = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def _byte_symbols() -> dict[int, str]:
    """Byte -> the printable character that stands for it, in the order of CLIP's first 256 ids.

    Printable bytes stand for themselves; the others follow, as the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


class Tokenizer:
    """Text -> token ids, as CLIP was trained: 256 bytes, 256 word-final bytes, merges, SOT, EOT."""

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
        """Ids of `text` without SOT and EOT. Text is repaired, unescaped twice and lower-cased.

        A text cannot spell SOT or EOT: "<|endoftext|>" in it is punctuation and letters.
        """
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = " ".join(text.split()).lower()
        return [i for word in WORD.findall(text) for i in self.encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        """Joins the neighbours that were merged earliest in training until none can be joined."""
        parts = [self.byte_symbol[b] for b in word.encode("utf-8")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            joined, i = [], 0
            while i < len(parts):
                step = 2 if tuple(parts[i : i + 2]) == best else 1
                joined.append("".join(parts[i : i + step]))
                i += step
            parts = joined
        return [self.ids[part] for part in parts]


_tokenizer = functools.cache(Tokenizer)  # the merges are read when the first text comes


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Texts -> LongTensor (n, context_length): SOT, the text's ids, EOT, then zeros.

    A text that does not fit is cut (its last id becomes EOT) if `truncate`, else a ValueError.
    """
    texts = [texts] if isinstance(texts, str) else texts
    tokenizer = _tokenizer()
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(tokens, texts):
        ids = [tokenizer.sot, *tokenizer.encode(text), tokenizer.eot]
        if len(ids) > context_length:
            if not truncate:
                raise ValueError(
                    f"text has {len(ids)} tokens, the limit is {context_length}: {text[:60]!r}"
                )
            ids = ids[: context_length - 1] + [tokenizer.eot]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


# --------------------------------------------------------------------------------------------------
# The model. Attribute names spell the keys of OpenAI's state dicts.

HEAD_WIDTH = 64  # of every published CLIP, in both towers


class PrefixTree(NamedTuple):
    """Texts as a tree, in which texts that begin alike share their nodes up to there.

    A causal tower gives a token the same values in all texts that are the same up to there, so it
    is enough to compute each of the T nodes once, instead of C texts of L tokens.
    """

    tokens: Tensor  # (T,), the token of each node
    positions: Tensor  # (T,), its position in the text
    rows: Tensor  # (C', L), the nodes of each distinct text, sorted; behind its end any nodes
    places: Tensor  # (T,), where in rows.flatten() each node stands
    ends: Tensor  # (C,), the node at which each text ends


def prefix_tree(tokens: Tensor) -> PrefixTree:
    """Token ids (C, L) as a tree; all texts end with the same id, which is the highest (EOT).

    Nodes are numbered text by text, so that the first text in rows has 0, 1, 2, ...
    """
    texts, text_of = tokens.unique(dim=0, return_inverse=True)  # sorted: like beginnings meet
    ends = texts.argmax(dim=-1)
    is_new = torch.ones_like(texts, dtype=torch.bool)  # does no text above begin like this?
    is_new[1:] = (texts[1:] != texts[:-1]).cumsum(dim=-1) > 0
    is_new &= torch.arange(texts.shape[1]) <= ends[:, None]
    numbers = is_new.flatten().cumsum(dim=0).view_as(texts) - 1
    rows = numbers.where(is_new, 0).cummax(dim=0).values  # what is not new is the node above
    return PrefixTree(
        tokens=texts[is_new],
        positions=is_new.nonzero()[:, 1],
        rows=rows,
        places=is_new.flatten().nonzero()[:, 0],
        ends=rows[torch.arange(len(texts)), ends][text_of],
    )


class Attention(nn.Module):
    """Multi-head self-attention; `causal` lets a token see itself and the tokens before it."""

    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.causal = causal

    def forward(
        self, x: Tensor, read: int | None = None, tree: PrefixTree | None = None
    ) -> Tensor:
        """(B, L, W) -> (B, L, W) or, of the first `read` tokens, (B, read, W).

        With a tree: nodes (T, W) -> (T, W).
        """
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if tree is not None:  # (T, W) -> (C', L, W); in fp32, as gradients of many texts add up
            qkv = [F.embedding(tree.rows, part.float()).to(part.dtype) for part in qkv]
        q, k, v = (part.unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2) for part in qkv)
        y = F.scaled_dot_product_attention(q[:, :, :read], k, v, is_causal=self.causal)
        y = y.transpose(1, 2).flatten(2)  # (B, heads, L, HEAD_WIDTH) -> (B, L, W)
        if tree is not None:
            y = F.embedding(tree.places, y.flatten(0, 1))  # (C', L, W) -> (T, W)
        return self.out_proj(y)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape, element by element."""
        return F.silu(1.702 * x) / 1.702  # one fused kernel, half the memory of the formula above


class Block(nn.Module):
    """Pre-norm residual block: attention, then an MLP of ratio 4."""

    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.attn = Attention(width, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            collections.OrderedDict(
                c_fc=nn.Linear(width, 4 * width),
                gelu=QuickGELU(),
                c_proj=nn.Linear(4 * width, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, read: int | None = None, tree: PrefixTree | None = None
    ) -> Tensor:
        """(B, L, W) -> (B, L, W), or only the first `read` of L, which attend to all of x.

        With a tree: nodes (T, W) -> (T, W).
        """
        y = self.attn(self.ln_1(x), read, tree)
        x = (x if read is None else x[:, :read]) + y
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks. The encoders walk through it themselves, to show where prompts enter."""

    def __init__(self, width: int, layers: int, causal: bool):
        super().__init__()
        self.width, self.layers = width, layers
        self.resblocks = nn.ModuleList(Block(width, causal) for _ in range(layers))


class VisionTransformer(nn.Module):
    """The image tower: patches, a class token that is read at the end, and prompts after them."""

    def __init__(self, resolution: int, patch_size: int, width: int, layers: int, embed_dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(
            torch.empty((resolution // patch_size) ** 2 + 1, width)
        )
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, embed_dim))

    def forward(self, images: Tensor, prompts: Tensor | None = None) -> Tensor:
        """(B, 3, R, R), (depth, n, width) -> (B, D)."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, N, W)
        start = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([start, patches], dim=1) + self.positional_embedding  # (B, 1 + N, W)
        prompts = [] if prompts is None else prompts.to(x.dtype)
        tokens, last = x.shape[1], self.transformer.layers - 1
        for layer, block in enumerate(self.transformer.resblocks):
            if layer < len(prompts):  # behind class token and patches: (B, 1 + N + n, W)
                x = torch.cat([x, prompts[layer].expand(len(x), -1, -1)], dim=1)
            if layer == 0:
                x = self.ln_pre(x)
            # In the end only the class token matters; prompts do not if the next layer has its own.
            read = 1 if layer == last else tokens if layer + 1 < len(prompts) else None
            x = block(x, read=read)
        return self.ln_post(x[:, 0]) @ self.proj


class CLIP(nn.Module):
    """An image tower and a text tower that meet in a space of D = `embed_dim` dimensions.

    Widths must be multiples of 64. Parameters are initialised for training from scratch; `load`
    and `from_state_dict` give a frozen model.
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
    ):
        super().__init__()
        if vision_width % HEAD_WIDTH or text_width % HEAD_WIDTH:
            widths = f"widths {vision_width} and {text_width}"
            raise ValueError(f"{widths} must be multiples of {HEAD_WIDTH}")
        self.image_resolution = image_resolution
        self.visual = VisionTransformer(
            image_resolution, patch_size, vision_width, vision_layers, embed_dim
        )
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, text_width))
        self.transformer = Transformer(text_width, text_layers, causal=True)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.empty(text_width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self._initialise()

    def _initialise(self) -> None:
        """CLIP's initialisation: deviations fall with width, residual branches also with depth."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.transformer.width**-0.5)
        for parameter in (
            self.visual.class_embedding, self.visual.positional_embedding, self.visual.proj
        ):
            nn.init.normal_(parameter, std=self.visual.transformer.width**-0.5)
        for tower in (self.transformer, self.visual.transformer):
            residual_std = tower.width**-0.5 * (2 * tower.layers) ** -0.5
            for block in tower.resblocks:
                nn.init.normal_(block.attn.in_proj_weight, std=tower.width**-0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * tower.width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    @property
    def context_length(self) -> int:
        """Tokens that a text may have."""
        return len(self.positional_embedding)

    def encode_image(self, images: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Images -> features, not normalised.

        images: (B, 3, R, R), normalised with CLIP's mean and deviation. prompts: (depth, n, width)
        or None; prompts[0] stands behind the patches before `ln_pre`, prompts[l] replaces it at
        the input of block l (MaPLe, "independent V-L prompts"). Returns (B, D).
        """
        return self.visual(images, prompts)

    def encode_text(self, tokens: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Token ids -> features read at the end-of-text token, not normalised.

        tokens: (C, L) from `tokenize`; best kept on the CPU, since their layout is looked at here.
        prompts: (depth, n, width) or None; prompts[0] takes the place of tokens 1..n, behind SOT
        and before positions are added; prompts[l] replaces them at the input of block l.
        Returns (C, D). ValueError if a text has no token left behind the prompts, or if the tokens
        ahead of the prompts differ.

        The mask is causal, so nothing behind an end-of-text token can matter, and what several
        texts begin with (SOT, the prompts, perhaps words) is the same in all of them at every
        depth: the former is left out, the latter computed once. Both are exact.
        """
        tokens, device = tokens.cpu(), self.positional_embedding.device
        ends = tokens.argmax(dim=-1)  # EOT has the highest id
        n = 0 if prompts is None or len(prompts) == 0 else prompts.shape[1]
        if ends.min() <= n:
            raise ValueError(f"a text is too short: its end-of-text token is among the {n} prompts")
        if n and (tokens[:, 0] != tokens[0, 0]).any():
            raise ValueError("with prompts, all texts must begin with the same token")
        tokens = tokens[:, : ends.max() + 1].clone()
        tokens[:, 1 : 1 + n] = 0  # whatever stood here: the prompts take its place
        tree = PrefixTree(*(part.to(device) for part in prefix_tree(tokens)))

        x = self.token_embedding(tree.tokens)  # (T, W); SOT is node 0, the prompts are 1..n
        prompts = [] if not n else prompts.to(x.dtype)
        for layer, block in enumerate(self.transformer.resblocks):
            if layer < len(prompts):
                x = torch.cat([x[:1], prompts[layer], x[1 + n :]])
            if layer == 0:
                x = x + self.positional_embedding[tree.positions]
            x = block(x, tree=tree)
        return self.ln_final(x[tree.ends]) @ self.text_projection

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "CLIP":
        """A frozen fp32 model in eval mode, its sizes read from the tensors of `state`.

        ValueError if `state` is not that of a CLIP with a vision transformer.
        """
        extra = ("input_resolution", "context_length", "vocab_size")  # numbers that OpenAI stored
        state = {k: v for k, v in state.items() if k not in extra and "attn_mask" not in k}
        try:
            if not all(v.is_floating_point() for v in state.values()):
                raise RuntimeError("not all of its tensors are of floating point")
            state = {k: v.float() for k, v in state.items()}
            if not all(v.isfinite().all() for v in state.values()):
                raise RuntimeError("not all of its numbers are finite")
            width, _, patch, _ = state["visual.conv1.weight"].shape
            patches = len(state["visual.positional_embedding"]) - 1
            text_width, embed_dim = state["text_projection"].shape
            with torch.device("meta"):  # no memory, no random numbers: every tensor is replaced
                model = cls(
                    embed_dim=embed_dim,
                    image_resolution=patch * math.isqrt(patches),
                    patch_size=patch,
                    vision_width=width,
                    vision_layers=_count_blocks(state, "visual.transformer.resblocks."),
                    text_width=text_width,
                    text_layers=_count_blocks(state, "transformer.resblocks."),
                    context_length=len(state["positional_embedding"]),
                    vocab_size=len(state["token_embedding.weight"]),
                )
            model.load_state_dict(state, assign=True)
        except KeyError as e:
            found = ", ".join(list(state)[:3]) or "nothing"
            raise ValueError(
                f"not the weights of a CLIP with a vision transformer: no {e} (found {found}, ...)"
            ) from None
        except (RuntimeError, TypeError, ValueError) as e:  # what is missing, left over, misshapen
            reason = " ".join(str(e).split())[:200]
            raise ValueError(f"not the weights of a CLIP: {reason}") from None
        return model.requires_grad_(False).eval()


def _count_blocks(state: dict[str, Tensor], prefix: str) -> int:
    return len({k[len(prefix) :].split(".")[0] for k in state if k.startswith(prefix)})


# --------------------------------------------------------------------------------------------------
# Weights

URL = "https://openaipublic.azureedge.net/clip/models"
MODELS = {  # name -> SHA-256 and file name of OpenAI's archive
    "ViT-B/32": (
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"
    ),
    "ViT-B/16": (
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"
    ),
    "ViT-L/14": (
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"
    ),
    "ViT-L/14@336px": (
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"
    ),
}


def available_models() -> list[str]:
    """The published models that `load` knows by name."""
    return list(MODELS)


def load(
    name: str | os.PathLike = "ViT-B/16",
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike | None = None,
) -> CLIP:
    """CLIP with pre-trained weights: fp32, eval mode, all parameters frozen.

    name: one of `available_models()` (downloaded once into `cache_dir`, ~/.cache/clip by default)
    or a path to weights: an OpenAI TorchScript archive, a state dict saved by `torch.save`, or
    .safetensors. No code stored in a file is run.
    The weights say nothing about head width and activation: 64 and QuickGELU, as OpenAI's, are
    taken for granted. Weights trained otherwise load, but their zero-shot accuracy is poor.
    Raises ValueError (unknown name, not a CLIP, damaged file) or OSError (cannot read, no network).
    """
    if name in MODELS:
        path = download(name, cache_dir)
    elif os.path.isfile(name):
        path = Path(name)
    else:
        known = ", ".join(available_models())
        raise ValueError(f"unknown model {str(name)!r}: neither one of {known} nor a weights file")
    try:
        return CLIP.from_state_dict(read_state_dict(path)).to(device)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def download(name: str, cache_dir: str | os.PathLike | None = None) -> Path:
    """Path of a published model's archive in the cache, downloaded and checked if it is new there.

    It comes to a temporary file, and gets its name only after its SHA-256 has been checked.
    """
    sha256, file = MODELS[name]
    folder = Path(cache_dir or "~/.cache/clip").expanduser()
    path, url = folder / file, f"{URL}/{sha256}/{file}"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False)
    try:
        with part:
            digest = _fetch(url, part)
        if digest != sha256:
            raise OSError(f"what arrived is not the published file (SHA-256 {digest[:12]}...)")
        os.replace(part.name, path)
    except OSError as e:  # URLError and time-outs are OSErrors, too
        raise OSError(
            f"cannot download {url} ({e}); if you have the weights, pass their path as the model"
        ) from None
    finally:
        Path(part.name).unlink(missing_ok=True)
    return path


def _fetch(url: str, file) -> str:
    """Copies a URL to an open file, with progress on stderr; returns the SHA-256 of the content."""
    digest, done = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=30) as response:
        total = int(response.headers.get("Content-Length", 0))
        while chunk := response.read(2**20):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            share = f" of {total / 2**20:.0f}" if total else ""
            print(f"\r{url} {done / 2**20:.0f}{share} MiB", end="", file=sys.stderr)
    print(file=sys.stderr)
    return digest.hexdigest()


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU, in the dtype of the file.

    Raises ValueError for a damaged file or one of another kind.
    """
    path = Path(path)
    path.open("rb").close()  # an OSError is about reading; from here on, errors are about content
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return _read_torchscript(archive)
                if damaged := archive.testzip():  # torch.load does not compare checksums
                    raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # each reader has its own words for damage; none of them runs code
        kinds = "TorchScript archive, torch.save'd state dict, .safetensors"
        raise ValueError(f"damaged, or none of the known kinds of weights file ({kinds})") from e
    entries = state.items() if isinstance(state, dict) else [(None, None)]
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in entries):
        raise ValueError("not a state dict (names -> tensors)")
    return state


SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """8 bytes: length of a JSON header; the header: dtype, shape, place of each tensor; bytes."""
    data = bytearray(path.read_bytes())  # writable, as torch.frombuffer likes it
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    state, covered = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != covered:
            raise ValueError("gaps or overlaps between tensors")
        raw = torch.frombuffer(data[start + begin : start + end], dtype=torch.uint8)
        state[name] = raw.view(SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        covered = end
    if start + covered != len(data):
        raise ValueError("more bytes than the tensors have")
    return state


STORAGE_DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Node:
    """Stands for a TorchScript module: its attributes are modules, tensors and plain values."""


class _TorchScriptUnpickler(pickle.Unpickler):
    """Reads `data.pkl` of a TorchScript archive. Knows modules, tensors and lists, and no code."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root, self.storages = archive, root, {}

    def find_class(self, module: str, name: str):
        """What a name in the pickle stands for; UnpicklingError for all that is not listed here."""
        if module.startswith("__torch__"):
            return _Node
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild_tensor
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return lambda value, type_name: value
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a weights file")

    def persistent_load(self, pid: tuple) -> Tensor:
        """A storage, as a flat tensor; it is read from the archive when first asked for."""
        _, dtype, key, _, size = pid  # ("storage", kind, key, device, number of elements)
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            empty = torch.empty(0, dtype=dtype)  # for which frombuffer has no use
            self.storages[key] = torch.frombuffer(raw, dtype=dtype, count=size) if raw else empty
        return self.storages[key]

    @staticmethod
    def rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
        """A tensor of its own from its place in a storage."""
        return storage.as_strided(size, stride, offset).clone()


def _read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive (a zip with data.pkl and raw storages) by name."""
    root = next(n for n in archive.namelist() if n.endswith("/data.pkl")).rsplit("/", 1)[0]
    state = {}

    def collect(node: _Node, prefix: str) -> None:
        for name, value in vars(node).items():
            if isinstance(value, Tensor):
                state[prefix + name] = value
            elif isinstance(value, _Node):
                collect(value, f"{prefix}{name}.")

    collect(_TorchScriptUnpickler(archive, root).load(), "")
    return state


def fingerprint(clip: CLIP) -> str:
    """Tells CLIP weights apart: a short hash of the two projections into the joint space."""
    digest = hashlib.sha256()
    for projection in (clip.visual.proj, clip.text_projection):
        digest.update(projection.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
