"""Cycles of a compiled program: loops count by their trips, and of a choice the longer branch."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import tpu_cycles


def estimate(cycles, name=None):
    metadata = "" if name is None else f', metadata={{op_name="{name}" stack_frame_id=7}}'
    return f'{metadata}, backend_config={{"estimated_cycles":"{cycles}"}}'


KERNEL = 'custom_call_target="tpu_custom_call"'
TWICE = 'backend_config={"known_trip_count":{"n":"2"}}'
PROGRAM = f"""HloModule jit_each, is_scheduled=true

%fused (p: bf16[8]) -> bf16[8] {{
  ROOT %e = bf16[8] exponential(%p){estimate(999, "inside/a/fusion")}
}}

%body (b: (s32[], bf16[8])) -> (s32[], bf16[8]) {{
  %f = bf16[8] fusion(%x), calls=%fused{estimate(10, "jit(each)/jvp(loss)/while/dot")}
  %k = bf16[8] custom-call(%x), {KERNEL}, metadata={{op_name="a/attention/splash_fwd/call"}}
  ROOT %t = (s32[], bf16[8]) tuple(%i, %f)
}}

%condition (c: (s32[], bf16[8])) -> pred[] {{
  %n = s32[] constant(24)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%little (a: bf16[8]) -> bf16[8] {{
  ROOT %m = bf16[8] add(%a, %a){estimate(3, "jit(each)/cond/branch_0_fun/add")}
}}

%much (a: bf16[8]) -> bf16[8] {{
  ROOT %m = bf16[8] add(%a, %a){estimate(500, "jit(each)/cond/branch_1_fun/optimizer/add")}
}}

ENTRY %main (p: bf16[8]) -> bf16[8] {{
  %w = (s32[], bf16[8]) while(%t), condition=%condition, body=%body
  %again = (s32[], bf16[8]) while(%t), condition=%condition, body=%body, {TWICE}
  %c = bf16[8] conditional(%i, %w, %w), branch_computations={{%little, %much}}
  %d = bf16[8] fusion(%c), calls=%fused{estimate(70, "jit(each)/layer/feedforward/dot_general")}
  %e = bf16[8] fusion(%d), calls=%fused{estimate(40, "jit(each)/lossy/dot_general")}
  ROOT %copy = bf16[8] copy(%e){estimate(5)}
}}
"""


def test_loops_count_by_their_trips_and_choices_by_their_longer_branch():
    found = tpu_cycles.by_part(tpu_cycles.cycles(PROGRAM, {"splash_fwd": 4}))
    assert found == {
        **{"loss": 26 * 10, "attention": 26 * 4, "optimiser": 500},
        **{"products": 70, "rest": 45},
    }


def test_a_kernel_of_unknown_cycles_is_not_counted_as_none():
    with pytest.raises(ValueError, match="splash_fwd"):
        tpu_cycles.cycles(PROGRAM, {})
