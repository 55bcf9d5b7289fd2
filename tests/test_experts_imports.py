"""What the package `experts` may and may not bring with it."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import experts

ROOT = Path(__file__).parent.parent

_LOADED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"experts.{name}")
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_experts_open_no_model():
    modules = [module.name for module in pkgutil.iter_modules(experts.__path__)]
    assert "merge" in modules
    command = [sys.executable, "-c", _LOADED, *modules]
    loaded = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not {"jax", "flax", "transformers", "torch", "xelm"} & set(loaded.split())
