"""Weights to and from Hugging Face's format: a Llama's safetensors files beside a `config.json`.

Tensors pass one at a time (in writing, one output file's worth), so a model needs little more memory
than its own. The names are those of `stored_weights` with the prefix `model.`, but for the head's.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainwright.configs.hf_config import FILE, to_hf
from trainwright.configs.schema import ModelConfig
from trainwright.errors import BadRequest
from trainwright.models.storage import Piece, head_dim, kv_heads, stored_weights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Write = Callable[[str, Tensor | None, Tensor], None]  # a stored parameter, its rows (None: all), their values


class _Weight(NamedTuple):
    """One tensor of the format and the stored rows that hold it."""

    name: str
    shape: tuple[int, ...]
    stored: str
    rows: Tensor | None


def write_to(pieces: Mapping[str, Piece]) -> Write:
    """What `load_hf` needs to fill `pieces` of stored parameters in place, in their own dtype.

    Of a part of the model they are its own; the other parameters are passed over.
    """

    @torch.no_grad()
    def write(stored: str, rows: Tensor | None, values: Tensor) -> None:
        if stored not in pieces:
            return
        piece = pieces[stored]
        own, here = piece.rows_of(rows)
        if values.dim() > 1:
            values = values[:, piece.column : piece.column + piece.values.shape[1]]
        target = piece.values
        target[here.to(target.device)] = values[own].to(target.device, target.dtype)

    return write


def load_hf(folder: Path, config: ModelConfig, write: Write) -> None:
    """Give every weight in `folder` to `write`, once all are known to be there and to fit `config`.

    Buffers of rotary angles are ignored, and so is a tied model's head where it repeats the embedding.

    Raises:
        BadRequest: a file is absent or broken, or a tensor is missing, unexpected, of another shape, or
            not of a float dtype.
    """
    weights = {weight.name: weight for weight in _weights(config)}
    found = _find(folder)
    ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        ignored.add(HEAD)
    listing = folder / (SINGLE if (folder / SINGLE).exists() else INDEX)
    for name in weights:
        if name not in found:
            raise BadRequest(f"{listing} lacks the tensor {name}, which the model in {FILE} has")
    for name, path in found.items():
        if name not in weights and name not in ignored:
            raise BadRequest(f"{path} holds the tensor {name}, which the model in {FILE} doesn't have")

    for path in dict.fromkeys(found.values()):
        with _opened(path) as tensors:
            for name in tensors.keys() & weights.keys():
                _check(tensors.get_slice(name), weights[name], path)
    if config.tie_word_embeddings and HEAD in found:
        _check_tied(found)
    for path in dict.fromkeys(found.values()):
        with _opened(path) as tensors:
            for name in sorted(tensors.keys() & weights.keys()):
                weight = weights[name]
                write(weight.stored, weight.rows, tensors.get_tensor(name))


def save_hf(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    eos: int | list[int] | None = None,
    bos: int | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write the stored parameters `state` and `config` to `folder`, complete or not at all.

    Weights are cast to `dtype`; a file takes `max_file_bytes` of them unless one alone is larger. `eos`
    and `bos` are the tokenizer's ids.

    Raises:
        BadRequest: `folder` isn't empty, or the model has a shape that Transformers refuses.
    """
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadRequest(f"{folder} is not empty: name a new folder to write the model to")
    description = to_hf(config, eos=eos, bos=bos, dtype=str(dtype).removeprefix("torch."))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_json(partial / FILE, description)

    groups = _files(config, dtype, max_file_bytes)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file(dict(_tensors(group, state, dtype)), partial / name, metadata={"format": "pt"})
        weight_map |= {weight.name: name for weight in group}
    if len(groups) > 1:
        total = sum(_bytes(weight, dtype) for group in groups for weight in group)
        _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    partial.replace(folder)


def _weights(config: ModelConfig) -> Iterator[_Weight]:
    queries = config.num_attention_heads * head_dim(config)
    keys, width, inner = kv_heads(config) * head_dim(config), config.hidden_size, config.intermediate_size
    shapes = {
        "embed_tokens": (config.vocab_size, width),
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
        "lm_head": (config.vocab_size, width),
    }
    for stored, separate in stored_weights(config):
        for name, rows in separate:
            module = name.split(".")[-2]
            hf_name = name if name == HEAD else f"model.{name}"
            yield _Weight(hf_name, shapes.get(module, (width,)), stored, rows)


def _find(folder: Path) -> dict[str, Path]:
    """The file that holds each tensor."""
    if (folder / SINGLE).exists():
        paths = [folder / SINGLE]
        promised: Mapping[str, Any] = {}
    else:
        promised = _read_index(folder)
        paths = [folder / name for name in sorted(set(promised.values()))]
    found: dict[str, Path] = {}
    for path in paths:
        with _opened(path) as tensors:
            found |= dict.fromkeys(tensors.keys(), path)
    for name, file in promised.items():
        if found.get(name) != folder / file:
            raise BadRequest(f"{folder / file} lacks the tensor {name}, which {INDEX} says it holds")
    return found


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.exists():
        raise BadRequest(f"{folder} has neither {SINGLE} nor {INDEX}: save the model as safetensors")
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"{path} is not an index with a weight_map") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BadRequest(f"{path}: weight_map must give a file's name for each tensor")
    return weight_map


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError as error:
        raise BadRequest(f"{path} is missing, though {path.parent / INDEX} names it") from error
    except (OSError, SafetensorError) as error:
        raise BadRequest(f"{path} is not a whole safetensors file: {error}") from error


def _check(tensor: Any, weight: _Weight, path: Path) -> None:
    if tuple(tensor.get_shape()) != weight.shape:
        raise BadRequest(
            f"{path}: the tensor {weight.name} has the shape {tuple(tensor.get_shape())}, and {FILE} makes it "
            f"{weight.shape}"
        )
    if tensor.get_dtype() not in FLOATS:
        raise BadRequest(f"{path}: the tensor {weight.name} is {tensor.get_dtype()}, not one of {FLOATS}")


def _check_tied(found: Mapping[str, Path]) -> None:
    """Refuse a head that isn't the embedding: Transformers would then leave them untied."""
    with _opened(found[HEAD]) as heads, _opened(found[EMBEDDING]) as embeddings:
        if not torch.equal(heads.get_tensor(HEAD), embeddings.get_tensor(EMBEDDING)):
            raise BadRequest(
                f"{found[HEAD]}: the tensor {HEAD} isn't {EMBEDDING}, and {FILE} says tie_word_embeddings"
            )


def _files(config: ModelConfig, dtype: torch.dtype, max_file_bytes: int) -> list[list[_Weight]]:
    """The weights of each output file, in order."""
    files: list[list[_Weight]] = [[]]
    held = 0
    for weight in _weights(config):
        size = _bytes(weight, dtype)
        if files[-1] and held + size > max_file_bytes:
            files.append([])
            held = 0
        files[-1].append(weight)
        held += size
    return files


def _bytes(weight: _Weight, dtype: torch.dtype) -> int:
    return int(torch.Size(weight.shape).numel()) * dtype.itemsize


def _tensors(
    weights: list[_Weight], state: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for weight in weights:
        tensor = state[weight.stored].detach()
        if weight.rows is not None:
            tensor = tensor[weight.rows.to(tensor.device)]
        assert tensor.shape == weight.shape, f"{weight.name}: {tuple(tensor.shape)} is not {weight.shape}"
        yield weight.name, tensor.to("cpu", dtype).contiguous()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
