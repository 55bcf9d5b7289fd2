"""What a program compiled for a GPU launches and copies; and what it is for ours, which needs the
packages of `pip install xelm[cuda13]` and no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_program

PROGRAM = """HloModule jit_each, is_scheduled=true

%fused (p: bf16[8]) -> bf16[8] {
  ROOT %e = bf16[8]{0} copy(%p)
}

%body (b: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %f = bf16[8]{0} fusion(%x), kind=kLoop, calls=%fused
  %a = (bf16[8]{0}, u8[0]{0}) custom-call(%f), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %t = (s32[], bf16[8]{0}) tuple(%i, %f)
}

%condition (c: (s32[], bf16[8])) -> pred[] {
  %n = s32[] constant(24)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%made (a: f32[4,10]) -> f32[4,10] {
  ROOT %m = f32[4,10]{1,0} fusion(%a), kind=kLoop, calls=%fused
}

%left (a: f32[4,10]) -> f32[4,10] {
  ROOT %m = f32[4,10]{1,0} copy(%a)
}

ENTRY %main (p: bf16[8]) -> bf16[8] {
  %w = (s32[], bf16[8]{0}) while(%t), condition=%condition, body=%body
  %c = f32[4,10]{1,0} conditional(%i, %w, %w), true_computation=%made, false_computation=%left
  ROOT %k = f32[4,10]{1,0} copy(%c)
}
"""


def test_loops_count_by_their_trips_and_copies_by_their_bytes():
    found = gpu_program.launched(PROGRAM)
    assert found == {"kernels": 24 * 2 + 1 + 1 + 1, "cudnn": 24, "copied": 2 * 4 * 4 * 10}


@pytest.mark.slow
def test_no_step_for_gpus_copies_its_state():
    """Twice what is trained was copied by each step while a conditional chose the new state."""
    pytest.importorskip("jax_cuda13_plugin")
    script = f"""
import json, sys
sys.path.insert(0, {gpu_program.__file__.rpartition("/")[0]!r})
import gpu_program, memory
from dataclasses import replace
from xelm.models.families import model_config
model = replace(model_config(memory.CONFIGS["XGLM 564M"]), layer_count=4, vocabulary_size=2**15)
device = gpu_program.prepare_device()
found = [gpu_program.launched(compiled.as_text()) for compiled in (
    gpu_program.training(model, 2, device), gpu_program.decoding(model, 32, device))]
print(json.dumps([model.parameter_count, *found]))
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], env=os.environ, stdout=subprocess.PIPE, check=True
    )
    parameters, training, decoding = json.loads(ended.stdout)
    assert training["cudnn"] == 2 * 4  # of each layer, forward and back
    assert training["copied"] < 0.1 * 12 * parameters
    assert decoding["copied"] < 1e6
