"""The rooms' imports point one way."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainwright

PACKAGE = Path(trainwright.__file__).parent
MAY_IMPORT = {
    "configs": {"configs"},
    "models": {"configs", "models"},
    "trainers": {"configs", "models", "trainers"},
    "launch": {"configs", "models", "trainers", "launch"},
    "inference": {"configs", "models", "trainers", "inference"},
}
# Of the trainers, inference may use what knows devices and checkpoints, never the loop.
INFERENCE_MAY_USE = (
    "trainwright.trainers.platform",
    "trainwright.trainers.checkpoint",
    "trainwright.trainers.data.tokenizer",
)
NEVER = {"triton", "flash_attn", "bitsandbytes", "deepspeed", "torch_neuronx", "neuronx_distributed"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_stands_on(room: str):
    for path in (PACKAGE / room).rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] not in NEVER, f"{path} imports {name}"
            if parts[0] == "trainwright" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
                assert parts[1] in MAY_IMPORT[room], f"{path} imports {name}"
                if room == "inference" and parts[1] == "trainers":
                    assert name.startswith(INFERENCE_MAY_USE), f"{path} imports {name}"


def test_recipes_need_no_torch():
    code = "import sys, trainwright.configs.compose as c; c.load_recipe([]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
