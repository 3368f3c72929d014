"""CLIP's weights: where they are found, and what files of OpenAI, open_clip and transformers hold.

    weights = read_weights(find("ViT-B/16"))     # a published model, from a cache or downloaded
    weights = read_weights("clip.safetensors")   # a file, or a folder with weights and a config

Whatever the layout, `weights.state` has the keys of OpenAI's state dicts. No code that a file may
hold is run. This file knows names of tensors, but no model; it can be copied alone.
"""

import hashlib
import json
import math
import mmap
import os
import pickletools
import secrets
import sys
import time
import urllib.request
import zipfile
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor


# ---- Finding a model's file: caches, then the hub, then OpenAI -----------------------------------

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
HUB_FILES = ("open_clip_model.safetensors", "model.safetensors",  # in this order: where timm has
             "open_clip_pytorch_model.bin", "pytorch_model.bin")  # both, its second is no CLIP
TIMEOUT = 30  # seconds without a byte


def available_models() -> list[str]:
    """The published models that `find` knows by name."""
    return list(MODELS)


def find(name: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> Path:
    """The file or folder that holds a model's weights.

    name: one of `available_models()`, looked for in `cache_dir` (~/.cache/clip) and in the cache of
    the Hugging Face hub, else downloaded into `cache_dir`; or a path; or a repository in the hub's
    cache. Raises ValueError (unknown name) or OSError (download, disk).
    """
    if name not in MODELS:
        path = Path(os.path.expanduser(name))
        if found := path if os.path.exists(path) else _in_hub_cache(str(name)):
            return found
        raise ValueError(f"unknown model {str(name)!r}: no file or folder, no repository with "
                         f"weights in the Hugging Face hub's cache, none of {', '.join(MODELS)}")
    sha256, timm, openai = MODELS[name]
    folder = Path(os.path.expanduser(cache_dir or "~/.cache/clip"))
    hub_file = folder / f"timm--{timm}.openai.safetensors"
    archive = folder / (name.replace("/", "-").replace("@", "-") + ".pt")
    if hub_file.is_file():
        return hub_file
    if zipfile.is_zipfile(archive):  # not if another program's download was interrupted
        return archive
    if found := (_in_hub_cache(f"timm/{timm}.openai", HUB_FILES[:1])
                 or _in_hub_cache(f"openai/{openai}")):
        return found
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    sources = [(f"{hub}/timm/{timm}.openai/resolve/main/{HUB_FILES[0]}", hub_file, None)]
    sources += [(f"{host}/clip/models/{sha256}/{archive.name}", archive, sha256) for host in HOSTS]
    failures = []
    for url, path, known_sha256 in sources:
        try:
            return _download(url, path, known_sha256)
        except (OSError, HTTPException, ValueError) as e:
            failures.append(f"{url}: {_one_line(e)}")
    raise OSError(f"cannot download {name} to {folder} ({'; '.join(failures)}); "
                  "if you have the weights, pass their path as the model (--model PATH)")


def _in_hub_cache(repository: str, files: tuple[str, ...] = HUB_FILES) -> Path | None:
    """The first of `files` that the hub's cache has of a repository."""
    home = os.path.expanduser(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    folder = Path(home, "hub", "models--" + repository.replace("/", "--"), "snapshots")
    return next((p for file in files for p in folder.glob(f"*/{file}") if p.is_file()), None)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the SHA-256 that the hub states where it redirects to the file itself."""

    sha256 = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.sha256 = self.sha256 or headers.get("X-Linked-Etag")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str, path: Path, sha256: str | None) -> Path:
    """To a temporary file, which becomes `path` only when its SHA-256 is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # each process has its own
    redirects, digest, start = _Redirects(), hashlib.sha256(), time.monotonic()
    try:
        opener = urllib.request.build_opener(redirects)
        with opener.open(url, timeout=TIMEOUT) as response, part.open("xb") as file:
            sha256 = sha256 or redirects.sha256 or response.headers.get("X-Linked-Etag")
            if not sha256:
                raise OSError("no SHA-256 is stated, so the file could not be checked")
            total = int(response.headers.get("Content-Length") or 0)
            print(f"downloading {url} ({total / 1e6:.0f} MB)", file=sys.stderr)
            while chunk := response.read(2**18):
                file.write(chunk)
                digest.update(chunk)
                if sys.stderr.isatty() and total:  # one line, written over and over
                    left = (time.monotonic() - start) * (total / file.tell() - 1)
                    sys.stderr.write(f"{file.tell() // 10**6} MB, {left:.0f} s left  \r")
        if digest.hexdigest() != sha256.strip('"'):
            raise OSError(f"cut off, or another file: its SHA-256 is {digest.hexdigest()}")
        return part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _one_line(e: Exception) -> str:
    kind = "" if isinstance(e, (ValueError, OSError)) else f"{type(e).__name__} "
    return kind + " ".join(str(e).split())[:300]


# ---- Files -> tensors ----------------------------------------------------------------------------

DTYPES = {  # as torch's pickles name them, and safetensors' headers
    "torch FloatStorage": torch.float32, "torch HalfStorage": torch.float16, "F32": torch.float32,
    "torch BFloat16Storage": torch.bfloat16, "torch LongStorage": torch.int64, "F16": torch.float16,
    "torch BoolStorage": torch.bool, "BF16": torch.bfloat16, "I64": torch.int64,
}
MAX_HEADER = 2**21  # bytes that describe the tensors of a file: enough for 15,000 of them
SLACK = 2**27  # bytes by which tensors may exceed their file, which may be compressed


def read_tensors(path: str | os.PathLike) -> dict:
    """What a file of weights holds, be it .safetensors or written by torch.save or torch.jit.save.

    Tensors (on the CPU, in the file's dtype) in nested dicts and lists, among str, int, float, bool
    and None. Tuples have become lists, TorchScript's modules the dicts of their attributes.
    Raises OSError (cannot be opened) or ValueError (damaged, or of another kind).
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is no file")  # to open a pipe would wait for ever
    with open(path, "rb") as file:
        try:
            read = _read_archive if file.read(2) == b"PK" else _read_safetensors
            file.seek(0)
            return read(file)
        except Exception as e:  # damage shows in many ways, and none of them has done any harm
            raise ValueError(f"{path}: damaged, or no weights: {_one_line(e)}") from e


def _read_safetensors(file: BinaryIO) -> dict[str, Tensor]:
    """8 bytes: length of a JSON header; the header: dtype, shape, place of each tensor; bytes."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        start = 8 + int.from_bytes(raw[:8], "little")
        if start > MAX_HEADER:
            raise ValueError("neither .safetensors nor of torch.save since version 1.6")
        header, state, place = json.loads(raw[8:start]), {}, start
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = (start + offset for offset in entry["data_offsets"])
            if not place == begin <= end <= len(raw):
                raise ValueError(f"{name[:80]!r} does not lie where it should")
            numbers = torch.frombuffer(bytearray(raw[begin:end]), dtype=DTYPES[entry["dtype"]])
            state[name] = numbers.reshape(entry["shape"][:9])
            place = end
    return state


def _read_archive(file: BinaryIO) -> dict:
    """A zip that holds <root>/data.pkl and the storages that this names: <root>/data/<key>."""
    with zipfile.ZipFile(file) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        (pickled,) = (name for name in sizes if name.endswith("/data.pkl"))
        too_large = sum(sizes.values()) > os.fstat(file.fileno()).st_size + SLACK
        if too_large or sizes[pickled] > MAX_HEADER or len(sizes) < len(archive.infolist()):
            raise ValueError("it would unpack to far more than it is, or names stand twice")
        storages = {}

        def storage(_: str, dtype: torch.dtype, key: str, *__) -> Tensor:
            if key not in storages:  # `read` compares the checksum, too
                numbers = bytearray(archive.read(f"{pickled.removesuffix('.pkl')}/{key}"))
                storages[key] = torch.frombuffer(numbers, dtype=dtype)
            return storages[key].view(dtype)

        return {**_unpickle(archive.read(pickled), storage)}  # anything but a dict is an error


def _unpickle(data: bytes, storage) -> object:
    """The value of torch's pickle. Python's own unpickler would call whatever the file names."""
    make = {  # opcode -> what it makes of items from the stack; tuples could take ages to hash
        "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
        "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": list, "TUPLE": lambda *all: [*all],
        "APPEND": lambda target, *items: target.extend(items) or target,
        "SETITEM": lambda target, *items: target.update(zip(items[::2], items[1::2])) or target,
        "BUILD": lambda target, state: target.update(islice(state.items(), 200)) or target,
        "REDUCE": lambda function, arguments: function(*arguments[:9]),  # or it could take ages
        "NEWOBJ": lambda function, arguments: function(*arguments[:9]),
        "BINPERSID": lambda arguments: storage(*arguments[:9]),
    }
    stack, marks, memo = [], [], {}
    for opcode, arg, _ in pickletools.genops(data):
        name = opcode.name.removeprefix("LONG_").rstrip("123S")  # variants differ in size alone
        start = len(stack) - len(opcode.stack_before)
        if pickletools.markobject in opcode.stack_before:  # from what stands before the last mark
            start = marks.pop() - opcode.stack_before.index(pickletools.markobject)
        items = stack[start:]
        del stack[start:]
        if name in make:
            stack.append(make[name](*items))
        elif name in ("BININT", "LONG", "BINFLOAT", "BINUNICODE"):
            stack.append(arg)
        elif name == "GLOBAL":
            stack.append(_named(arg))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "BINPUT":
            memo[arg] = stack[-1]
        elif name == "BINGET":
            stack.append(memo[arg])
        elif name == "STOP":
            return items[0]
        elif name != "PROTO":
            raise ValueError(f"{name} does not belong in weights")


def _named(name: str) -> object:
    """What stands for "module name" in a pickle."""
    if name == "collections OrderedDict" or name.startswith("__torch__"):  # TorchScript's classes
        return lambda: {}
    if name == "torch._utils _rebuild_parameter" or name.startswith("torch.jit._pickle "):
        return lambda value, *_: value
    if name != "torch._utils _rebuild_tensor_v2" and name not in DTYPES:
        raise ValueError(f"{name[:80]!r} does not belong in weights")
    return DTYPES.get(name, _rebuild_tensor)


def _rebuild_tensor(storage: Tensor, offset: int, size: list, stride: list, *_) -> Tensor:
    """A tensor as a view of a storage; torch refuses one that does not lie within."""
    if len(size) > 8 or not all(type(n) is int for n in size) or math.prod(size) > len(storage):
        raise ValueError("a tensor of an impossible shape, or larger than its storage")
    if not all(0 <= n <= len(storage) for n in (offset, *stride)):  # torch 2.5 lets some overflow
        raise ValueError("a tensor that lies outside of its storage")
    return storage.as_strided(size, stride, offset)


# ---- Tensors -> one state dict with OpenAI's keys ------------------------------------------------

NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask")
FROM_TRANSFORMERS = (  # to be replaced in this order
    ("text_projection.weight", "text_projection"), ("visual_projection.weight", "visual.proj"),
    ("vision_model.", "visual."), ("text_model.", ""), ("embeddings.", ""), (".fc2.", ".c_proj."),
    ("position_embedding.weight", "positional_embedding"), ("patch_embedding.", "conv1."),
    ("pre_layrnorm.", "ln_pre."), ("post_layernorm.", "ln_post."), ("self_attn.", "attn."),
    ("final_layer_norm.", "ln_final."), ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1.", "ln_1."), ("layer_norm2.", "ln_2."), (".fc1.", ".c_fc."),
)
OTHERS = {  # what other models have, by the beginnings of their keys
    "visual.trunk.": "timm (EVA, SigLIP, ...)", "visual.attn_pool.": "CoCa", "logit_bias": "SigLIP",
    "visual.attnpool.": "a ResNet", "text.transformer.embeddings.": "another text tower",
}
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

    activation: "quickgelu" or "gelu", in place of what the config says. Whether the tensors are a
    whole CLIP's is not checked. Raises ValueError (damaged, another architecture) or OSError.
    """
    if activation not in (None, "quickgelu", "gelu"):
        raise ValueError(f"activation {activation!r} is neither 'quickgelu' nor 'gelu'")
    path = Path(path)
    if path.is_dir():
        files = [path / file for file in HUB_FILES if (path / file).is_file()]
        path = files[0] if files else path / HUB_FILES[1]  # which is then said not to exist
    tensors = _flatten(read_tensors(path))
    try:
        if sum(t.nbytes for t in tensors.values()) > path.stat().st_size + SLACK:
            raise ValueError("its tensors are larger than the file")
        state = _openai_keys(tensors)
        for key, tensor in state.items():
            if not (tensor.is_floating_point() and tensor.mean(dtype=torch.float64).isfinite()):
                raise ValueError(f"{key[:80]!r} has no numbers, or other than finite floats")
        weights = Weights(state, *_settings(path, list(tensors), state))
    except (ValueError, KeyError, TypeError, RuntimeError) as e:
        raise ValueError(f"{path}: {_one_line(e)}") from None
    return weights._replace(activation=activation, notes=()) if activation else weights


def _flatten(tensors: dict) -> dict[str, Tensor]:
    """The tensors of nested dicts by their path: {"a": {"b": tensor}} -> {"a.b": tensor}."""
    flat, seen, todo = {}, set(), [("", tensors)]
    for prefix, level in todo:
        for key, value in level.items():
            usable = isinstance(key, str) and len(prefix) + len(key) < 500  # in hostile files, too
            if usable and isinstance(value, Tensor):
                flat[prefix + key] = value
            elif usable and isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))  # a dict could hold itself
                todo.append((f"{prefix}{key}.", value))
    return flat


def _openai_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any of the layouts -> OpenAI's keys."""
    for prefix in ("state_dict.", "module."):  # of training checkpoints
        within = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        tensors = within or tensors
    for start, kind in OTHERS.items():
        if any(key.startswith(start) for key in tensors):
            raise ValueError(f"no CLIP with a vision transformer: {start}* belongs to {kind}")
    state = {}
    for key, tensor in tensors.items():
        if key.endswith("projection.weight"):
            tensor = tensor.t().contiguous()  # transformers' linear layer: (D, W) -> (W, D)
        key = key.removeprefix("text.")  # newer models of open_clip have it
        for old, new in FROM_TRANSFORMERS:
            key = key.replace(old, new)
        if not key.endswith(NO_WEIGHTS):
            state[key] = tensor.reshape(()) if key == "logit_scale" else tensor  # it may be (1,)
    for q in [key for key in state if ".q_proj." in key]:
        qkv = [state.pop(q.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[q.replace(".q_proj.", ".in_proj_")] = torch.cat(qkv)  # three (W, W) -> (3W, W)
    return state


def _settings(path: Path, keys: list[str], state: dict[str, Tensor]) -> tuple:
    """The fields of `Weights` that the tensors do not give, from the config beside them."""
    known = any(f"timm--{timm}.openai" in str(path) for _, timm, _ in MODELS.values())
    if known or any(key.endswith("input_resolution") for key in keys):
        return ()  # the defaults are OpenAI's; only its own code stores such a number
    is_transformers = any("vision_model." in key for key in keys)
    config = path.with_name("config.json" if is_transformers else "open_clip_config.json")
    if config.is_file():
        try:
            read = _transformers_settings if is_transformers else _open_clip_settings
            _, head_width, mean, std, _ = settings = read(config)
            three = len(mean) == len(std) == 3 and all(0 < n <= 1 for n in mean + std)
            if not three or type(head_width) is not int or head_width < 1:
                raise ValueError(f"heads of {head_width!r:.20}, mean {mean!r:.80}, std {std!r:.80}")
            return settings
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
            raise ValueError(f"{config.name}: {_one_line(e)}") from None
    width = len(state.get("visual.class_embedding", ()))
    note = (f"no config is beside {path.name}, so QuickGELU and CLIP's image mean and deviation "
            "are assumed; if the zero-shot accuracy is poor, try --activation gelu")
    return "quickgelu", 64 if width <= 1024 else width // 16, MEAN, STD, (note,)


def _transformers_settings(file: Path) -> tuple:
    """From config.json, in which defaults may be absent, and preprocessor_config.json."""
    config, images = json.loads(file.read_bytes()), file.with_name("preprocessor_config.json")
    images = json.loads(images.read_bytes()) if images.is_file() else {}
    text, vision = config.get("text_config", {}), config.get("vision_config", {})
    activation = vision.get("hidden_act", "quick_gelu")
    for section, key, *supported in (
        (config, "model_type", "clip"), (vision, "hidden_act", "quick_gelu", "gelu"),
        ({"hidden_act": "quick_gelu"} | text, "hidden_act", activation),
        (text, "layer_norm_eps", 1e-5), (vision, "layer_norm_eps", 1e-5),
    ):
        if section.get(key, supported[0]) not in supported:
            raise ValueError(f"{key} {section[key]!r:.80} is not supported, only {supported[0]!r}")
    head_width = vision.get("hidden_size", 768) // vision.get("num_attention_heads", 12)
    mean, std = images.get("image_mean", MEAN), images.get("image_std", STD)
    return activation.replace("_", ""), head_width, tuple(mean), tuple(std), ()


def _open_clip_settings(file: Path) -> tuple:
    """From open_clip_config.json, in which defaults may be absent."""
    config = json.loads(file.read_bytes())
    model, images = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
    activation = "quickgelu" if model.get("quick_gelu") else "gelu"
    head_width = model.get("vision_cfg", {}).get("head_width", 64)
    mean, std = images.get("mean", MEAN), images.get("std", STD)
    note = (f"{file.name} does not say quick_gelu, which means exact GELU; if the zero-shot "
            "accuracy is poor, try --activation quickgelu")
    return activation, head_width, tuple(mean), tuple(std), () if "quick_gelu" in model else (note,)
