"""Weights to and from Hugging Face's format: a model's safetensors files beside a `config.json`.

Tensors pass one at a time (in writing, one output file's worth), so a model needs little more memory
than its own. The names are those of `stored_weights` with the prefix `model.`, but for the head's.

A Mixtral's experts come in two layouts: a tensor for each matrix of each expert, as published, or fused as
Transformers 5 holds them in memory, those of a layer in two tensors, (experts, 2 x inner, width) with an
expert's gate above its up, and (experts, width, inner).
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from trainwright.models.storage import Piece, SeparateWeight, head_dim, kv_heads, stored_weights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
FUSED = "model.layers.0.mlp.experts.gate_up_proj"  # where it is, experts are in the fused layout
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

# A stored parameter, one of the separate weights in it, and that one's values.
Write = Callable[[str, SeparateWeight, Tensor], None]


class _Part(NamedTuple):
    """A separate weight in a tensor of the format: the stored parameter that holds it, and its place there."""

    stored: str
    weight: SeparateWeight
    place: tuple[int | slice, ...] = ()


class _Weight(NamedTuple):
    """One tensor of the format."""

    name: str
    shape: tuple[int, ...]
    parts: list[_Part]


def write_to(pieces: Mapping[str, Piece]) -> Write:
    """What `load_hf` needs to fill `pieces` of stored parameters in place, in their own dtype.

    Of a part of the model they are its own; the other parameters are passed over.
    """

    @torch.no_grad()
    def write(stored: str, weight: SeparateWeight, values: Tensor) -> None:
        piece = pieces[stored].of(weight.expert) if stored in pieces else None
        if piece is None:
            return
        own, here = piece.rows_of(weight.rows)
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
    found = _find(folder)
    weights = {weight.name: weight for weight in _weights(config, fused=FUSED in found)}
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
                values = tensors.get_tensor(name)
                for part in weights[name].parts:
                    write(part.stored, part.weight, values[part.place])


def save_hf(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    eos: int | list[int] | None = None,
    bos: int | None = None,
    fused: bool = False,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """Write the stored parameters `state` and `config` to `folder`, complete or not at all.

    Weights are cast to `dtype`; a file takes `max_file_bytes` of them unless one alone is larger. `eos`
    and `bos` are the tokenizer's ids. fused: the layout of experts.

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

    groups = _files(config, dtype, max_file_bytes, fused)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        save_file(dict(_tensors(group, state, dtype)), partial / name, metadata={"format": "pt"})
        weight_map |= {weight.name: name for weight in group}
    if len(groups) > 1:
        total = sum(_bytes(weight, dtype) for group in groups for weight in group)
        _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    partial.replace(folder)


def _weights(config: ModelConfig, *, fused: bool) -> Iterable[_Weight]:
    """The tensors of the format. fused: the layout of experts."""
    weights = _separate_weights(config)
    return _with_stacks(weights) if fused else weights


def _separate_weights(config: ModelConfig) -> Iterator[_Weight]:
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
        "gate": (config.moe.num_local_experts or 0, width),
        "w1": (inner, width),
        "w2": (width, inner),
        "w3": (inner, width),
    }
    for stored, separate in stored_weights(config):
        for weight in separate:
            module = weight.name.split(".")[-2]
            name = weight.name if weight.name == HEAD else f"model.{weight.name}"
            yield _Weight(name, shapes.get(module, (width,)), [_Part(stored, weight)])


# Of an expert's matrix: the tensor of all experts in the fused layout, which half of its rows, and of how many.
STACKS = {"w1": ("gate_up_proj", 0, 2), "w3": ("gate_up_proj", 1, 2), "w2": ("down_proj", 0, 1)}


def _with_stacks(weights: Iterable[_Weight]) -> Iterable[_Weight]:
    """`weights` with a layer's experts in two tensors."""
    found: dict[str, _Weight] = {}
    for weight in weights:
        layer, sparse, rest = weight.name.partition(".block_sparse_moe.")
        (part,) = weight.parts
        expert = part.weight.expert
        if expert is None:
            name = f"{layer}.mlp.{rest}" if sparse else weight.name
            found[name] = weight._replace(name=name)
            continue
        module, half, halves = STACKS[rest.split(".")[-2]]
        name, height = f"{layer}.mlp.experts.{module}", weight.shape[0]
        parts = found[name].parts if name in found else []
        parts.append(part._replace(place=(expert, slice(half * height, (half + 1) * height))))
        found[name] = _Weight(name, (expert + 1, halves * height, weight.shape[1]), parts)
    return found.values()


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


def _files(config: ModelConfig, dtype: torch.dtype, max_file_bytes: int, fused: bool) -> list[list[_Weight]]:
    """The weights of each output file, in order."""
    files: list[list[_Weight]] = [[]]
    held = 0
    for weight in _weights(config, fused=fused):
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
        tensor = torch.empty(weight.shape, dtype=dtype)
        for stored, (name, rows, expert), place in weight.parts:
            values = state[stored].detach()
            if expert is not None:
                values = values[expert]
            if rows is not None:
                values = values[rows.to(values.device)]
            into = tensor[place]
            assert values.shape == into.shape, f"{name}: {tuple(values.shape)} is not {tuple(into.shape)}"
            into.copy_(values)
        yield weight.name, tensor


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
