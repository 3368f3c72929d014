"""CLIP's weights: where they are found, and what files of OpenAI, open_clip and transformers hold.

    weights = read_weights(find("ViT-B/16"))     # a published model, from a cache or downloaded
    weights = read_weights("clip.safetensors")   # a file, or a folder with weights and a config

Whatever the layout, `weights.state` has the keys of OpenAI's state dicts. No code that a file may
hold is run. This file knows no model, only the names and ranks of its tensors; it stands alone.
"""

import hashlib
import json
import math
import os
import pickletools
import secrets
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.error import URLError

import torch
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# Finding a model's file: caches, then the hub, then OpenAI

MODELS = {  # name -> SHA-256 of OpenAI's archive, the hub's repositories: timm/<>.openai, openai/<>
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
                 "vit_base_patch32_clip_224", "clip-vit-base-patch32"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
                 "vit_base_patch16_clip_224", "clip-vit-base-patch16"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
                 "vit_large_patch14_clip_224", "clip-vit-large-patch14"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
                       "vit_large_patch14_clip_336", "clip-vit-large-patch14-336"),
}
HOSTS = ("https://openaipublic.azureedge.net", "https://openaipublic.blob.core.windows.net")
HUB_FILES = (  # open_clip's first: where timm has both, its model.safetensors is no CLIP
    "open_clip_model.safetensors", "model.safetensors",
    "open_clip_pytorch_model.bin", "pytorch_model.bin",
)
TIMEOUT = 30  # seconds


def available_models() -> list[str]:
    """The published models that `find` knows by name."""
    return list(MODELS)


def find(name: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> Path:
    """The file or folder that holds a model's weights.

    name: one of `available_models()`, looked for in `cache_dir` (~/.cache/clip) and in the Hugging
    Face hub's cache, else downloaded into `cache_dir`; or a path; or the name of a repository that
    is in the hub's cache. Raises ValueError (unknown name) or OSError (download, disk).
    """
    if name in MODELS:
        folder = Path(os.path.expanduser(cache_dir or "~/.cache/clip"))
        return _in_caches(name, folder) or _download(name, folder)
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path) or os.path.isdir(path):
        return path
    if file := _in_hub_cache(str(name)):
        return file
    raise ValueError(f"unknown model {str(name)!r}: neither one of {', '.join(MODELS)}, nor a file "
                     "or folder, nor a repository with weights in the Hugging Face hub's cache")


def _in_caches(name: str, folder: Path) -> Path | None:
    """Weights of a published model that are on the disk, whichever program put them there."""
    _, timm, openai = MODELS[name]
    hub_file, archive = _cache_files(name, folder)
    if hub_file.is_file():
        return hub_file
    if zipfile.is_zipfile(archive):  # not if another program's download was interrupted
        return archive
    return _in_hub_cache(f"timm/{timm}.openai", HUB_FILES[:1]) or _in_hub_cache(f"openai/{openai}")


def _cache_files(name: str, folder: Path) -> tuple[Path, Path]:
    """Where a published model is kept once downloaded: the hub's file, OpenAI's archive."""
    archive = name.replace("/", "-").replace("@", "-") + ".pt"
    return folder / _folder_name(f"timm/{MODELS[name][1]}.openai") / HUB_FILES[0], folder / archive


def _folder_name(repository: str) -> str:
    return "models--" + repository.replace("/", "--")  # as the hub's cache has it


def _in_hub_cache(repository: str, files: tuple[str, ...] = HUB_FILES) -> Path | None:
    """The first of `files` in the newest snapshot of a repository that has one."""
    home = os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    snapshots = Path(home, "hub", _folder_name(repository), "snapshots").glob("*")
    newest_first = sorted(snapshots, key=os.path.getmtime, reverse=True)
    return next((s / file for s in newest_first for file in files if (s / file).is_file()), None)


def _download(name: str, folder: Path) -> Path:
    """Tries the hub, then OpenAI's two hosts; an OSError says how each of them failed."""
    sha256, timm, _ = MODELS[name]
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    hub_file, archive = _cache_files(name, folder)
    sources = [(f"{hub}/timm/{timm}.openai/resolve/main/{HUB_FILES[0]}", hub_file, None)]
    sources += [(f"{host}/clip/models/{sha256}/{archive.name}", archive, sha256) for host in HOSTS]
    failures = []
    for url, path, known_sha256 in sources:
        try:
            _fetch(url, path, known_sha256)
            return path
        except (URLError, ConnectionError, TimeoutError, HTTPException, ValueError) as e:
            failures.append(f"{url}: {_one_line(e)}")
        except OSError as e:  # the disk's fault: the next source would only meet it again
            raise OSError(f"cannot download to {folder}: {e.strerror or e}") from None
    raise OSError(f"cannot download {name} ({'; '.join(failures)}); "
                  "if you have the weights, pass their path as the model (--model PATH)")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the SHA-256 that the hub states where it redirects to the file itself."""

    sha256 = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.sha256 = self.sha256 or headers.get("X-Linked-Etag")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _fetch(url: str, path: Path, sha256: str | None) -> None:
    """Downloads to a temporary file, which gets its name only when its SHA-256 is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # each process has its own
    redirects = _Redirects()
    try:
        opener = urllib.request.build_opener(redirects)
        with opener.open(url, timeout=TIMEOUT) as response, part.open("xb") as file:
            sha256 = sha256 or redirects.sha256 or response.headers.get("X-Linked-Etag")
            if not sha256:
                raise ConnectionError("no SHA-256 is stated, so the file could not be checked")
            arrived = _copy(response, file, url)
        if arrived != sha256.strip('"'):
            raise ConnectionError(f"cut off, or another file: its SHA-256 is {arrived}")
        try:
            os.replace(part, path)
        except PermissionError:  # Windows: another first run has it already, and is reading it
            if not path.is_file():
                raise
    finally:
        part.unlink(missing_ok=True)


def _copy(response, file: BinaryIO, url: str) -> str:
    """Writes a response to an open file with progress on stderr; the SHA-256 of what arrived."""
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdecimal() else 0
    print(f"downloading {url} ({total / 1e6:.0f} MB)", file=sys.stderr)
    digest, done, start, shown = hashlib.sha256(), 0, time.monotonic(), 0.0
    while chunk := response.read1(2**20):
        file.write(chunk)
        digest.update(chunk)
        done += len(chunk)
        seconds = time.monotonic() - start
        if seconds > TIMEOUT and done < 1000 * seconds:
            raise TimeoutError("less than 1 kB arrives per second")
        if sys.stderr.isatty() and seconds > shown + 0.2:  # one line, written over and over
            left = f", {seconds * (total - done) / done:.0f} s left" if total else ""
            print(f"{done / 1e6:.0f} MB{left}  ", end="\r", file=sys.stderr, flush=True)
            shown = seconds
    file.flush()
    os.fsync(file.fileno())  # or a power cut could leave the name without the content
    return digest.hexdigest()


def _one_line(e: Exception) -> str:
    kind = "" if isinstance(e, (ValueError, OSError)) else f"{type(e).__name__} "
    return kind + " ".join(str(e).split())[:300]


# --------------------------------------------------------------------------------------------------
# Files -> tensors

DTYPES = {  # torch's storages, and safetensors' names
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
    "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
MAX_HEADER = 2**21  # bytes that describe the tensors of a file: enough for 15,000 of them
SLACK = 2**27  # bytes by which tensors may exceed their file, which may be compressed


def read_tensors(path: str | os.PathLike) -> dict:
    """What a file of weights holds, be it .safetensors or written by torch.save or torch.jit.save.

    Tensors (on the CPU, in the file's dtype) in nested dicts, lists and tuples among str, int,
    float, bool and None; a TorchScript module is the dict of its attributes.
    Raises OSError (cannot be opened) or ValueError (damaged, or of another kind).
    """
    with open(path, "rb") as file:
        try:
            start = file.read(9)
            file.seek(0)
            if start.startswith(b"PK"):
                return _read_archive(file)
            if start.endswith(b"{"):
                return _read_safetensors(file)
            if start.startswith(b"\x80"):
                raise ValueError("a bare pickle, or torch.save's format of before version 1.6; "
                                 "load it with torch and save it again")
            raise ValueError("neither .safetensors nor written by torch.save")
        except Exception as e:  # damage shows in many ways, and none of them has done any harm
            raise ValueError(f"{path}: damaged, or no weights: {_one_line(e)}") from e


def _read_flat(file: BinaryIO, dtype: torch.dtype, count: int) -> Tensor:
    """The next `count` elements of a file, (count,)."""
    raw = bytearray(count * dtype.itemsize)  # writable, as torch.frombuffer wants it
    if file.readinto(raw) != len(raw):
        raise ValueError("the file ends early")
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)


def _unique(pairs: list[tuple]) -> dict:
    """Pairs as a dict; a key that stands twice is refused."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    """8 bytes: length of a JSON header; the header: dtype, shape, place of each tensor; bytes."""
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise ValueError(f"its header claims {length} bytes")
    header = json.loads(file.read(length), object_pairs_hook=_unique)
    header.pop("__metadata__", None)
    size = os.fstat(file.fileno()).st_size - file.tell()
    state, place = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (begin, end), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
        count = _count(shape)
        if begin != place or end != begin + count * dtype.itemsize or end > size:
            raise ValueError(f"{name[:80]!r} does not lie where it should")
        state[name] = _read_flat(file, dtype, count).reshape(shape)
        place = end
    if place != size:
        raise ValueError("more bytes than the tensors have")
    return state


def _count(shape: list[int] | tuple[int, ...]) -> int:
    """Elements of a tensor, whose shape may be anything in a hostile file."""
    if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise ValueError("a tensor has no possible shape")
    return math.prod(shape)


def _read_archive(file: BinaryIO) -> dict:
    """A zip that holds <root>/data.pkl and the storages that this names: <root>/data/<key>."""
    with zipfile.ZipFile(file) as archive:
        sizes = _unique([(info.filename, info.file_size) for info in archive.infolist()])
        if sum(sizes.values()) > os.fstat(file.fileno()).st_size + SLACK:
            raise ValueError("it would unpack to many times its size")
        (pickled,) = (name for name in sizes if name.endswith("/data.pkl"))
        if sizes[pickled] > MAX_HEADER:
            raise ValueError(f"its data.pkl claims {sizes[pickled]} bytes")
        storages = {}

        def storage(_: str, dtype: torch.dtype, key: str, device: str, count: int) -> Tensor:
            member = pickled.removesuffix(".pkl") + "/" + key
            if count * dtype.itemsize != sizes[member]:
                raise ValueError(f"{member} is not as large as it should be")
            if member not in storages:
                with archive.open(member) as raw:  # compares the checksum, too
                    storages[member] = _read_flat(raw, dtype, count)
            return storages[member].view(dtype)

        value = _unpickle(archive.read(pickled), storage)
    if not isinstance(value, dict):
        raise ValueError(f"it holds no dict, but {type(value).__name__}")
    return value


class _Module(dict):
    """A TorchScript module, as the dict of its attributes."""


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS_AND_TEXT = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


def _unpickle(data: bytes, storage: Callable[..., Tensor]) -> object:
    """The value of a pickle that torch wrote, opcode by opcode.

    Python's unpickler calls what a file names, and may hang on keys that are costly to hash. Here
    nothing happens but what is written below and in `_named`; any other opcode is refused.
    """
    stack, marks, memo = [], [], {}
    for opcode, arg, _ in pickletools.genops(data):
        name, takes = opcode.name, opcode.stack_before
        start = len(stack) - len(takes)
        if pickletools.markobject in takes:  # all from the last mark on, and what stands before it
            start = marks.pop() - takes.index(pickletools.markobject)
        items = stack[start:]
        del stack[start:]
        if name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in NUMBERS_AND_TEXT:
            stack.append(arg)
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            items[0].extend(items[1:])
            stack.append(items[0])
        elif name in ("SETITEM", "SETITEMS"):
            if not all(isinstance(key, (str, int)) for key in items[1::2]):
                raise ValueError("a key that is neither text nor a number")
            items[0].update(zip(items[1::2], items[2::2]))
            stack.append(items[0])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "GLOBAL":
            stack.append(_named(arg))
        elif name == "BINPERSID":
            stack.append(_call(storage, items[0]))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(_call(*items))
        elif name == "BUILD":
            if isinstance(items[0], _Module):  # an OrderedDict's attributes are of no use
                items[0].update(**items[1])
            stack.append(items[0])
        elif name == "STOP":
            return items[0]
        elif name != "PROTO":
            raise ValueError(f"{name} does not belong in weights")


def _call(function: Callable, arguments: tuple) -> object:
    if not isinstance(arguments, tuple):  # a tensor could have millions of elements
        raise ValueError("a call without arguments")
    return function(*arguments)


def _named(name: str) -> object:
    """What stands for "module name" in a pickle."""
    module, _, attribute = name.partition(" ")
    if module == "torch" and attribute in DTYPES:
        return DTYPES[attribute]
    if name == "torch._utils _rebuild_tensor_v2":
        return _rebuild_tensor
    if name == "collections OrderedDict":
        return lambda: {}
    if module.startswith("__torch__"):
        return lambda: _Module()
    if name == "torch._utils _rebuild_parameter" or module == "torch.jit._pickle":
        return lambda value, *_: value
    raise ValueError(f"{name[:80]!r} does not belong in weights")


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
    """A tensor as a view of a storage. It must lie within, and not repeat it to seem larger."""
    count, _ = _count(size), _count(stride)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count == 0:
        return storage.new_empty(size)
    if offset < 0 or last >= len(storage) or count > len(storage):
        raise ValueError("a tensor does not lie within its storage")
    return storage.as_strided(size, stride, offset)


# --------------------------------------------------------------------------------------------------
# Tensors -> one state dict with OpenAI's keys

NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask")
FROM_TRANSFORMERS = (  # to be replaced in this order
    ("text_projection.weight", "text_projection"), ("visual_projection.weight", "visual.proj"),
    ("vision_model.", "visual."), ("text_model.", ""), ("embeddings.", ""),
    ("position_embedding.weight", "positional_embedding"), ("patch_embedding.", "conv1."),
    ("pre_layrnorm.", "ln_pre."), ("post_layernorm.", "ln_post."),
    ("final_layer_norm.", "ln_final."), ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1.", "ln_1."), ("layer_norm2.", "ln_2."), ("self_attn.", "attn."),
    ("mlp.fc1.", "mlp.c_fc."), ("mlp.fc2.", "mlp.c_proj."),
)
OTHERS = {  # what other models have, by the beginnings of their keys
    "visual.trunk.": "an image tower of timm (EVA, SigLIP, ...)", "visual.attn_pool.": "CoCa",
    "visual.attnpool.": "a ResNet", "visual.layer1.": "a ResNet", "logit_bias": "SigLIP",
    "text.transformer.embeddings.": "another text tower", "vision_model.head.": "SigLIP",
}
BLOCK = ("ln_1.", "attn.in_proj_", "attn.out_proj.", "ln_2.", "mlp.c_fc.", "mlp.c_proj.")
MAX_BLOCKS = 100
ACTIVATIONS = {"quick_gelu": "quickgelu", "gelu": "gelu"}  # as transformers calls them -> as we do
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Weights(NamedTuple):
    """A CLIP's tensors, and what the tensors do not say."""

    state: dict[str, Tensor]  # OpenAI's keys; finite numbers in the file's floating-point type
    activation: str = "quickgelu"  # or "gelu"
    head_width: int = 64  # of the image tower; in the text tower it is always 64
    mean: tuple[float, ...] = MEAN  # of the images that the image tower takes, per channel
    std: tuple[float, ...] = STD
    notes: tuple[str, ...] = ()  # what had to be guessed, each a line for the user


def read_weights(path: str | os.PathLike, activation: str | None = None) -> Weights:
    """The weights in a file or a folder, and what the config beside them says.

    activation: "quickgelu" or "gelu", in place of what the config says.
    Raises ValueError (damaged, or not a CLIP with a vision transformer) or OSError.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / file for file in HUB_FILES if (path / file).is_file()]
        if not files:
            raise ValueError(f"{path} holds none of {', '.join(HUB_FILES)}")
        path = files[0]
    tensors = _flatten(read_tensors(path))
    try:
        if sum(t.nbytes for t in tensors.values()) > path.stat().st_size + SLACK:
            raise ValueError("its tensors are larger than the file")
        keys = list(tensors)
        state = _openai_keys(tensors)
        _check(state)
        width, text_width = len(state["visual.ln_pre.bias"]), len(state["ln_final.bias"])
        weights = Weights(state, **_settings(path, keys, width, text_width))
        head_width = weights.head_width
        if type(head_width) is not int or head_width < 1 or width % head_width or text_width % 64:
            raise ValueError(f"widths of {width} and {text_width} are no multiples of those of the "
                             f"heads, {head_width!r:.80} and 64")
    except (ValueError, KeyError, RuntimeError) as e:  # of q, k and v, one may lack
        raise ValueError(f"{path}: {_one_line(e)}") from None
    return weights._replace(activation=activation, notes=()) if activation else weights


def _flatten(tensors: dict) -> dict[str, Tensor]:
    """The tensors of nested dicts by their path: {"a": {"b": tensor}} -> {"a.b": tensor}."""
    flat, seen, todo = {}, set(), [("", tensors)]
    while todo:
        prefix, level = todo.pop()
        for key, value in level.items():
            if isinstance(value, Tensor):
                flat[f"{prefix}{key}"] = value
            elif isinstance(value, dict) and id(value) not in seen and len(prefix) < 500:
                seen.add(id(value))  # a hostile file may hold dicts within themselves
                todo.append((f"{prefix}{key}.", value))
    return flat


def _openai_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any of the layouts -> OpenAI's keys; empties `tensors` on the way."""
    for prefix in ("state_dict.", "module."):  # of training checkpoints
        within = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        tensors = within or tensors
    for start, kind in OTHERS.items():
        if any(key.startswith(start) for key in tensors):
            raise ValueError(f"its keys {start}* are those of {kind}, not of a CLIP with a vision "
                             "transformer")
    is_transformers = any(key.startswith("vision_model.") for key in tensors)
    state = {}
    for key in list(tensors):
        tensor = tensors.pop(key)  # what is copied below need not stay in memory
        key = key.removeprefix("text.")  # newer models of open_clip have it
        for old, new in FROM_TRANSFORMERS if is_transformers else ():
            key = key.replace(old, new)
        if key in state:
            raise ValueError(f"two tensors are {key[:80]!r}")
        if is_transformers and key in ("text_projection", "visual.proj"):
            tensor = tensor.t().contiguous()  # a linear layer's (D, W) -> (W, D)
        if not key.endswith(NO_WEIGHTS):
            state[key] = tensor.reshape(()) if key == "logit_scale" else tensor  # it may be (1,)
    for q in [key for key in state if ".q_proj." in key]:
        qkv = [state.pop(q.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[q.replace(".q_proj.", ".in_proj_")] = torch.cat(qkv)  # three (W, W) -> (3W, W)
    return state


def _check(state: dict[str, Tensor]) -> None:
    """Refuses what has not exactly the keys and ranks of a CLIP, or numbers that are not finite."""
    ranks = {
        "logit_scale": 0, "text_projection": 2, "positional_embedding": 2,
        "token_embedding.weight": 2, "visual.conv1.weight": 4, "visual.class_embedding": 1,
        "visual.positional_embedding": 2, "visual.proj": 2,
    }
    layers = ["visual.ln_pre.", "visual.ln_post.", "ln_final."]
    for tower in ("visual.transformer.resblocks.", "transformer.resblocks."):
        blocks = sum(key.startswith(tower) and key.endswith(".ln_1.bias") for key in state)
        layers += [f"{tower}{i}.{layer}" for i in range(min(blocks, MAX_BLOCKS)) for layer in BLOCK]
    for layer in layers:
        ranks |= {f"{layer}weight": 1 if "ln_" in layer else 2, f"{layer}bias": 1}
    for key in [*ranks, *state]:
        if key not in state or key not in ranks:
            fault = f"lacks {key}" if key in ranks else f"has {key[:80]!r}"
            raise ValueError(f"not a CLIP with a vision transformer: among {len(state)} tensors "
                             f"({', '.join(list(state)[:3])[:150]!r}, ...) it {fault}")
        tensor, shape = state[key], tuple(state[key].shape)
        if len(shape) != ranks[key] or 0 in shape:
            raise ValueError(f"{key} has the shape {shape}, which no CLIP has")
        lowest, highest = map(float, tensor.aminmax())  # NaN if there is one
        largest = torch.finfo(torch.float32).max
        if not tensor.is_floating_point() or not -largest <= lowest <= highest <= largest:
            raise ValueError(f"{key} has numbers that are not finite, or no floating-point numbers")
    if (channels := state["visual.conv1.weight"].shape[1]) != 3:
        raise ValueError(f"it takes images of {channels} channels instead of 3 (RGB)")


def _settings(path: Path, keys: list[str], width: int, text_width: int) -> dict:
    """The fields of `Weights` that the tensors do not give, from the config beside them."""
    openai = {_folder_name(f"timm/{timm}.openai") for _, timm, _ in MODELS.values()}
    if openai & {*path.parts} or any(key.endswith("input_resolution") for key in keys):
        return {}  # the defaults are OpenAI's; only its own code stores such a number
    if any(key.endswith("vision_model.post_layernorm.bias") for key in keys):
        if config := _read_json(path.with_name("config.json")):
            return _transformers_settings(path.parent, config, width, text_width)
    elif config := _read_json(path.with_name("open_clip_config.json")):
        return _open_clip_settings(config, text_width)
    note = (f"no config is beside {path.name}, so QuickGELU and CLIP's image mean and deviation "
            "are assumed; if the zero-shot accuracy is poor, try --activation gelu")
    return {"head_width": 64 if width <= 1024 else width // 16, "notes": (note,)}


def _read_json(path: Path) -> dict:
    """The object in a small JSON file, an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as file:
            return _section({path.name: json.loads(file.read(MAX_HEADER))}, path.name)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None


def _section(config: dict, key: str) -> dict:
    section = config.get(key) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{key} is not an object")
    return section


def _expect(section: dict, **expected: object) -> None:
    """Refuses settings that differ from the only ones that are supported; absent ones are fine."""
    for key, value in expected.items():
        if section.get(key) not in (None, value):
            raise ValueError(f"{key} {section[key]!r:.80} is not supported, only {value!r}")


def _transformers_settings(folder: Path, config: dict, width: int, text_width: int) -> dict:
    """From config.json, in which defaults may be absent, and preprocessor_config.json."""
    _expect(config, model_type="clip")
    defaults = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    text, vision = (defaults | {"num_attention_heads": heads} | _section(config, f"{tower}_config")
                    | _section(config, f"{tower}_config_dict")  # what older files have wins
                    for tower, heads in (("text", 8), ("vision", 12)))
    activation, heads = str(vision["hidden_act"]), vision["num_attention_heads"]
    _expect(text, hidden_act=activation, num_attention_heads=text_width // 64)
    for tower in (text, vision):
        _expect(tower, layer_norm_eps=1e-5)
    if activation not in ACTIVATIONS or heads not in range(1, width + 1) or width % heads:
        raise ValueError(f"hidden_act {activation!r:.80} with {heads!r:.80} heads is not supported")
    images = _read_json(folder / "preprocessor_config.json")
    return {"activation": ACTIVATIONS[activation], "head_width": width // heads,
            **_colours(images, mean="image_mean", std="image_std")}


def _open_clip_settings(config: dict, text_width: int) -> dict:
    """From open_clip_config.json, in which defaults may be absent."""
    model = _section(config, "model_cfg")
    text, vision = _section(model, "text_cfg"), _section(model, "vision_cfg")
    _expect(vision, pool_type="tok", act_kwargs=None, norm_kwargs=None)
    _expect(text, pool_type="argmax", act_kwargs=None, norm_kwargs=None, no_causal_mask=False)
    _expect({"heads": 8} | text, heads=text_width // 64)
    note = ("open_clip_config.json does not say quick_gelu, which means exact GELU; if the "
            "zero-shot accuracy is poor, try --activation quickgelu")
    return {"activation": "quickgelu" if model.get("quick_gelu") else "gelu",
            "head_width": vision.get("head_width", 64),
            "notes": () if "quick_gelu" in model else (note,),
            **_colours(_section(config, "preprocess_cfg"), mean="mean", std="std")}


def _colours(config: dict, mean: str, std: str) -> dict[str, tuple[float, ...]]:
    """Mean and deviation of the images' channels, which stand under these keys of a config."""
    found = {"mean": config.get(mean) or MEAN, "std": config.get(std) or STD}
    for key, values in found.items():
        low = 0 if key == "mean" else 1e-3
        if not isinstance(values, (list, tuple)) or len(values) != 3 or not all(
            isinstance(value, (int, float)) and low <= value <= 1 for value in values
        ):
            raise ValueError(f"its config gives the images' {key} as {values!r:.80}")
    return {key: tuple(values) for key, values in found.items()}
