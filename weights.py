"""Finds CLIP weights, and reads the files of OpenAI, open_clip and transformers.

    weights = read_weights(find("ViT-B/16"))  # or a file, or a folder with weights and a config

The keys of `weights.state` are OpenAI's, whatever the layout. No code in a file is run. Sharded and
quantised weights, single towers and other architectures are refused. The file can be copied alone.
"""

import collections.abc
import contextlib
import json
import os
import pickle
import re
import socket
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

# ---- Finding the file: caches, then the Hugging Face hub, then OpenAI ----------------------------
MODELS = {  # name: SHA-256 of OpenAI's archive, hub repository in the layout of transformers,
    # hub repository@revision with OpenAI's keys, SHA-256 of its open_clip_model.safetensors
    "ViT-B/32": (
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "openai/clip-vit-base-patch32",
        "timm/vit_base_patch32_clip_224.openai@a6f597a30f7b82c51704746581f9a4e41421e878",
        "e6d1bd7789aa45192b3bf90570a789b478bae1b74ebcce7eddd908e83a2b7c31",
    ),
    "ViT-B/16": (
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        "openai/clip-vit-base-patch16",
        "timm/vit_base_patch16_clip_224.openai@977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d",
        "4b8699299b1e8997753c64b052ba32031449d5d853f55a039148560ee02b820f",
    ),
    "ViT-L/14": (
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        "openai/clip-vit-large-patch14",
        "timm/vit_large_patch14_clip_224.openai@18d0535469bb561bf468d76c1d73aa35156c922b",
        "9ce2e8a8ebfff3793d7d375ad6d3c35cb9aebf3de7ace0fc7308accab7cd207e",
    ),
    "ViT-L/14@336px": (
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        "openai/clip-vit-large-patch14-336",
        "timm/vit_large_patch14_clip_336.openai@81e38efc4637de5023b10e75a7f9bd1c6fa6b010",
        "fbc415c3d0d7b79faed8f5ccfb740c32b7c4f5ffe7283b851f89c6231c01a8e0",
    ),
}
HOSTS = ("https://openaipublic.azureedge.net", "https://openaipublic.blob.core.windows.net")
# Order matters: timm's model.safetensors is not a whole CLIP. An index means shards.
FILES = ("open_clip_model.safetensors", "model.safetensors", "*pytorch_model.bin", "*.index.json")


def find(name: str | os.PathLike, cache_dir: str | os.PathLike | None = None) -> Path:
    """Returns the file or folder of a model. Raises ValueError (unknown name) or OSError.

    name: a path; a repository in the Hugging Face hub's cache; or one of MODELS, downloaded to
    `cache_dir` (default ~/.cache/clip) unless it is there or in the hub's cache.
    """
    name = os.fspath(name)
    if name not in MODELS:
        path = os.path.expanduser(name)
        found = Path(path) if os.path.exists(path) else _in_hub_cache(name)
        if found:
            return found
        names = ", ".join(MODELS)
        raise ValueError(
            f"unknown model {name!r}: neither a path, nor a cached repository, nor one of {names}"
        )
    archive_sha256, openai, timm, sha256 = MODELS[name]
    timm, revision = timm.split("@")
    folder = Path(os.path.expanduser(cache_dir or "~/.cache/clip"))
    hub_file = folder / f"{timm.replace('/', '--')}.safetensors"
    archive = folder / f"{name.replace('/', '-').replace('@', '-')}.pt"
    if hub_file.is_file():
        return hub_file
    if zipfile.is_zipfile(archive):  # false for an interrupted download
        return archive
    if found := _in_hub_cache(timm, FILES[:1]) or _in_hub_cache(openai):
        return found
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    sources = [(f"{hub}/{timm}/resolve/{revision}/{FILES[0]}", hub_file, sha256)]
    path = f"clip/models/{archive_sha256}/{archive.name}"
    sources += [(f"{host}/{path}", archive, archive_sha256) for host in HOSTS]
    return _download(name, sources)


def _in_hub_cache(repository: str, files: tuple[str, ...] = FILES) -> Path | None:
    env = os.environ.get
    home = env("HF_HOME") or (env("XDG_CACHE_HOME") or "~/.cache") + "/huggingface"
    hub = env("HF_HUB_CACHE") or env("HUGGINGFACE_HUB_CACHE") or home + "/hub"
    folder = Path(os.path.expanduser(hub), f"models--{repository.replace('/', '--')}", "snapshots")
    found = [p for file in files for p in sorted(folder.glob(f"*/{file}")) if p.is_file()]
    return found[0] if found else None


def _download(name: str, sources: list[tuple[str, Path, str]]) -> Path:
    """Tries each (URL, target, SHA-256). A file is kept only if its SHA-256 matches."""
    message = f"cannot download {name}; if you have its file, use --model PATH"
    timeout = socket.getdefaulttimeout()
    for url, path, sha256 in sources:
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url} to {path}", file=sys.stderr)
        socket.setdefaulttimeout(30)  # seconds without data; torch.hub sets no time-out
        try:
            torch.hub.download_url_to_file(url, str(path), sha256, sys.stderr.isatty())
            return path
        except Exception as e:  # network, file system or wrong hash
            message += f"; {url.split('/')[2]}: {e}"
        finally:
            socket.setdefaulttimeout(timeout)
    raise OSError(" ".join(message.split()))  # on one line


# ---- File -> tensors -----------------------------------------------------------------------------
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@contextlib.contextmanager
def file_errors(path: str | os.PathLike, advice: str = "") -> collections.abc.Iterator[None]:
    """Turns an error into a ValueError with one line that names the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as e:  # files can be wrong in many ways
        kind = "" if isinstance(e, ValueError) else f"{type(e).__name__}: "
        raise ValueError(f"{path}: {kind}{' '.join(str(e).split())[:300]}{advice}") from e


def read_tensors(path: str | os.PathLike) -> dict:
    """Reads what safetensors, torch.save or torch.jit.save wrote. Raises ValueError or OSError."""
    advice = "; if it was downloaded, delete it and run again; else save it again"
    with open(path, "rb") as file, file_errors(path, advice):
        start = file.read(24)
        if start.startswith(b"PK"):  # a zip file
            with zipfile.ZipFile(file) as archive:
                return {**_Unpickler(archive).load()}
        length = int.from_bytes(start[:8], "little")
        if length > 100e6:  # the limit of safetensors
            raise ValueError(f"neither safetensors nor a file of PyTorch 1.6 or newer: {start}...")
        return _read_safetensors(file, length)


def _read_safetensors(file: BinaryIO, length: int) -> dict[str, Tensor]:
    """After 8 bytes, a JSON header of `length` bytes (dtype, shape, place of each tensor); data."""
    file.seek(8)
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    state = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        file.seek(8 + length + begin)
        content = bytearray(file.read(end - begin))
        numbers = torch.frombuffer(content, dtype=DTYPES[entry["dtype"]])
        state[name] = numbers.reshape(entry["shape"])
    return state


class _Inert(dict):
    """Stands in for any object: a dict of its attributes or items."""

    __hash__ = object.__hash__  # it may be a dict key

    def __init__(self, *args, **kwargs):
        pass  # arguments, such as the command of an os.system, are ignored

    def __setstate__(self, state: object):
        if isinstance(state, dict):
            self.update(state)

    def append(self, item: object):  # for the items of a deque
        self[len(self)] = item


class _Unpickler(pickle.Unpickler):
    """Reads the pickle in a PyTorch archive. Names in it are resolved here, never imported."""

    def __init__(self, archive: zipfile.ZipFile):
        name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), "data.pkl")
        super().__init__(archive.open(name))
        self.archive = archive
        self.folder = name.removesuffix(".pkl")
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> object:
        if name == "_rebuild_tensor_v2":
            # torch 2.6 checks the bounds of a slice, but not those of an offset in as_strided
            return lambda storage, at, size, stride, *_: storage[at:].as_strided(size, stride)
        if name.startswith("_rebuild_parameter") or module == "torch.jit._pickle":
            return lambda value, *_: value
        if name == "OrderedDict":
            return collections.OrderedDict
        if name.endswith("Storage"):  # torch.FloatStorage -> torch.float32
            return getattr(vars(torch).get(name[:-7] + "Tensor"), "dtype", torch.uint8)
        return _Inert

    def persistent_load(self, place: tuple) -> Tensor:
        _, dtype, key, *_ = place
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.folder}/{key}"))
            self.storages[key] = torch.frombuffer(raw or bytearray(16), dtype=dtype)  # not empty
        return self.storages[key]


# ---- Tensors -> one state dict with OpenAI's keys ------------------------------------------------
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask")
FROM_TRANSFORMERS = (  # applied in this order
    ("text_projection.weight", "text_projection"),
    ("visual_projection.weight", "visual.proj"),
    ("vision_model.", "visual."),
    ("text_model.", ""),
    ("embeddings.", ""),
    ("position_embedding.weight", "positional_embedding"),
    ("patch_embedding.", "conv1."),
    ("pre_layrnorm.", "ln_pre."),
    ("post_layernorm.", "ln_post."),
    ("final_layer_norm.", "ln_final."),
    ("encoder.layers.", "transformer.resblocks."),
    (".self_attn.", ".attn."),
    (".layer_norm", ".ln_"),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
)
OTHERS = r"visual\.(trunk|attn_?pool)\.|logit_bias|text\.transformer\.embeddings\."


class Weights(NamedTuple):
    """The tensors of a CLIP, and the settings that they do not show."""

    state: dict[str, Tensor]  # OpenAI's keys; finite, in the file's floating-point dtype
    activation: str = "quickgelu"  # or "gelu"
    head_width: int = 64  # of the image tower; in the text tower it is always 64
    mean: tuple[float, ...] = MEAN  # image normalisation, per channel
    std: tuple[float, ...] = STD
    notes: tuple[str, ...] = ()  # guesses, one per line


def read_weights(path: str | os.PathLike, activation: str | None = None) -> Weights:
    """Reads the weights in a file or folder, and the config beside them.

    activation: "quickgelu" or "gelu", overrides the config.
    Raises ValueError (damaged, another architecture) or OSError (cannot be read).
    """
    path = Path(path)
    if path.is_dir():
        files = [found for file in FILES for found in sorted(path.glob(file))]
        if not files:
            raise ValueError(f"no weights in {path}: it has none of {', '.join(FILES[:3])}")
        path = files[0]
    if re.search(r"index\.json$|-\d{5}-of-\d{5}\.", path.name):
        raise ValueError(f"{path}: sharded; save the model as one file (max_shard_size='99GB')")
    tensors = read_tensors(path)
    with file_errors(path):
        tensors = _select_clip(_flatten(tensors))
        weights = Weights(_openai_keys(tensors), *_settings(path, tensors))
    return weights._replace(activation=activation, notes=()) if activation else weights


def _flatten(tensors: dict, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts by their path: {"a": {"b": tensor}} -> {"a.b": tensor}."""
    if "_modules" in tensors:  # an nn.Module that was saved whole
        tensors = tensors["_parameters"] | tensors["_buffers"] | tensors["_modules"]
    flat = {}
    for key, value in tensors.items():
        if isinstance(value, Tensor):
            flat[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
    return flat


def _select_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose keys share the CLIP's prefix ("module.", "", ...), without the prefix."""
    ends = ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight")
    prefixes = [key.removesuffix(end) for key in tensors for end in ends if key.endswith(end)]
    if len(prefixes) > 1:
        raise ValueError(f"several CLIPs, {prefixes}; save the state dict of one to its own file")
    for prefix in prefixes:
        tensors = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    for key in tensors:
        if re.search(OTHERS, key):
            raise ValueError(f"{key} is not supported: timm, CoCa, SigLIP, ResNet, ...")
    if not prefixes or not any(key.endswith("token_embedding.weight") for key in tensors):
        raise ValueError(
            f"not a whole CLIP (found {list(tensors)[:3]}); in transformers, save the CLIPModel, "
            "not its CLIPTextModel or CLIPVisionModel"
        )
    return tensors


def _openai_keys(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any of the layouts -> OpenAI's keys."""
    state = {}
    for key, tensor in tensors.items():
        if key.endswith(NOT_WEIGHTS):
            continue
        if not (tensor.is_floating_point() and tensor.float().isfinite().all()):
            raise ValueError(f"{key} is not all finite floats (quantised, or diverged?)")
        if key.endswith("projection.weight"):  # a linear layer of transformers
            tensor = tensor.t().contiguous()  # (D, W) -> (W, D)
        key = key.removeprefix("text.")  # prefix in newer open_clip models
        for old, new in FROM_TRANSFORMERS:
            key = key.replace(old, new)
        state[key] = tensor.reshape(()) if key == "logit_scale" else tensor  # sometimes (1,)
    for q in [key for key in state if ".q_proj." in key]:
        qkv = [state.pop(q.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        state[q.replace(".q_proj.", ".in_proj_")] = torch.cat(qkv)  # three (W, W) -> (3W, W)
    return state


def _settings(path: Path, tensors: dict[str, Tensor]) -> tuple:
    """The fields of `Weights` after `state`, from the config beside the file."""
    if "input_resolution" in tensors or re.search(r"timm--\w+\.openai", str(path)):
        return ()  # OpenAI's own file, or timm's copy of it
    is_transformers = "visual_projection.weight" in tensors
    config = path.with_name("config.json" if is_transformers else "open_clip_config.json")
    read = _transformers_settings if is_transformers else _open_clip_settings
    if config.is_file():
        with file_errors(config.name):
            return read(config)
    width = next(len(t) for key, t in tensors.items() if key.endswith("class_embedding"))
    head_width = 64 if width <= 1024 else width // 16
    note = f"no {config.name}: assuming QuickGELU; if accuracy is poor, try --activation gelu"
    return "quickgelu", head_width, MEAN, STD, (note,)


def _transformers_settings(file: Path) -> tuple:
    """From config.json, which may omit defaults, and preprocessor_config.json."""
    config = json.loads(file.read_bytes())
    if config.get("model_type", "clip") != "clip":
        raise ValueError(f"model_type {config['model_type']!r} is not supported")
    text = config.get("text_config", {})
    vision = config.get("vision_config", {})
    activations = [tower.get("hidden_act", "quick_gelu") for tower in (text, vision)]
    if activations not in (["quick_gelu"] * 2, ["gelu"] * 2):
        raise ValueError(f"hidden_act {activations} is not supported")
    for tower in (text, vision):
        if tower.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"layer_norm_eps {tower['layer_norm_eps']} is not supported")
    if text.get("hidden_size", 512) != 64 * text.get("num_attention_heads", 8):
        raise ValueError("only text towers with heads of width 64 are supported")
    head_width = vision.get("hidden_size", 768) // vision.get("num_attention_heads", 12)
    file = file.with_name("preprocessor_config.json")
    images = json.loads(file.read_bytes()) if file.is_file() else {}
    mean, std = images.get("image_mean", MEAN), images.get("image_std", STD)
    return activations[0].replace("_", ""), head_width, tuple(mean), tuple(std), ()


def _open_clip_settings(file: Path) -> tuple:
    """From open_clip_config.json, which may omit defaults."""
    config = json.loads(file.read_bytes())
    model = config.get("model_cfg", {})
    images = config.get("preprocess_cfg", {})
    activation = "quickgelu" if model.get("quick_gelu") else "gelu"
    head_width = model.get("vision_cfg", {}).get("head_width", 64)
    mean, std = images.get("mean", MEAN), images.get("std", STD)
    note = "quick_gelu is not set: assuming GELU; if accuracy is poor, try --activation quickgelu"
    notes = () if "quick_gelu" in model else (note,)
    return activation, head_width, tuple(mean), tuple(std), notes
