"""Launches that skip Triton's binder: right results, and always the binary that Triton itself would start.

The latter without a GPU: in a process of its own, since this one interprets, on a driver that loads and starts nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from sglang_blockgtq.kernels.device import launch as launch_module
from sglang_blockgtq.kernels.device.launch import Arguments, Launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit(do_not_specialize=["n", "bias"], do_not_specialize_on_alignment=["index"])
def gather_kernel(x, index, out, n, stride, scale, bias, negate, SIZE: tl.constexpr):
    """out[i] = scale * x[index[i] * stride] + bias, perhaps negated; index None: i itself."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    at = i.to(tl.int64)
    if index is not None:
        at = tl.load(index + i, mask=i < n, other=0).to(tl.int64)
    value = tl.load(x + at * stride, mask=i < n, other=0).to(tl.float32) * scale + bias
    value = tl.where(negate != 0, -value, value)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=i < n)


def variants(device: str) -> list[dict]:
    """Every difference that Triton specialises on, and some on which it does not."""
    plain = torch.arange(1, 513, device=device)
    base = {
        "x": plain.float(),
        "index": plain % 7,
        "out": torch.zeros(64, device=device),
        "n": 40,
        "stride": 2,
        "scale": 0.5,
        "bias": 3,
        "negate": 0,
        "SIZE": 64,
    }
    changes = [
        {},
        {"x": plain.float()[1:]},  # misaligned
        {"x": plain.half()},
        {"x": plain.half()[8:]},
        {"x": plain.half()[4:]},
        {"x": plain.int()},
        {"index": None},
        {"index": (plain % 7)[1:]},
        {"index": (plain % 5).int()},
        {"out": torch.zeros(65, device=device)[1:]},
        {"out": torch.zeros(64, device=device, dtype=torch.float16)},
        {"n": 1},
        {"n": 48},
        {"n": 1 << 31},
        {"stride": 1},
        {"stride": 16},
        {"stride": 0},
        {"stride": 32},
        {"stride": 3},
        {"bias": 1},
        {"bias": 16},
        {"bias": -1},
        {"bias": 1 << 31},
        {"bias": -(1 << 31)},
        {"bias": (1 << 63) - 1},
        {"bias": 1 << 63},
        {"bias": 0.25},
        {"negate": 1},
        {"negate": True},
        {"negate": False},
        {"scale": 1.0},
        {"scale": 2},
        {"scale": True},
        {"SIZE": 128, "n": 40},
    ]
    return [base | change for change in changes]


def split(values: dict, how: int) -> tuple[dict, dict, dict]:
    """Which arguments are bound, looked at before, and given at the launch."""
    names = list(values)
    parts = [(["SIZE"], [], names[:-1]), ([], names[2:], names[:2]), (names[:3], names[3:8], ["SIZE"])]
    return tuple({name: values[name] for name in part} for part in parts[how])


@pytest.mark.parametrize("how", [0, 1, 2])
def test_results(how):
    """One after the other on one launch where the same arguments are bound: none may get another's binary."""
    launches = {}
    for _ in range(2):
        for values in variants(DEVICE):
            if max(abs(values["n"]), abs(values["bias"])) >= 1 << 31 or bool in map(type, values.values()):
                continue  # memory of that size; and interpreters differ in what they take
            bound, given, free = split(values, how)
            bound_to = tuple((name, str(x) if isinstance(x, torch.Tensor) else x) for name, x in bound.items())
            launch = launches.setdefault(bound_to, Launch(gather_kernel, **bound))
            out = launch.bound.get("out", values["out"]).fill_(torch.nan)
            launch((1, 1, 1), Arguments(gather_kernel, **given), **free)
            index = torch.arange(64, device=DEVICE) if values["index"] is None else values["index"]
            want = values["scale"] * values["x"][index[: values["n"]] * values["stride"]].float() + values["bias"]
            want = -want if values["negate"] else want
            torch.testing.assert_close(out[: values["n"]].float(), want, rtol=1e-3, atol=0)
            assert bool(out[values["n"] :].isnan().all())


def test_a_bound_tensor_is_kept():
    values = variants(DEVICE)[0]
    out = values.pop("out")
    launch = Launch(gather_kernel, **values)
    want = torch.zeros_like(out)
    launch((1, 1, 1), out=want)
    values.clear()
    torch.full((4096,), 7.0, device=DEVICE)  # would take the place of what was freed
    launch((1, 1, 1), out=out)
    assert torch.equal(out, want) and bool(out.any())


def test_arguments_of_another_kernel_are_refused():
    """Their places would be wrong."""
    with pytest.raises(ValueError, match="are needed"):
        Launch(gather_kernel)((1, 1, 1), Arguments(triton.jit(gather_kernel.fn), n=1))


def without_gpu() -> None:
    """Prints a JSON object of findings. No interpreter here."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    started = []

    class Launcher:
        def __init__(self, src, metadata):
            self.src = src

        def __call__(self, x, y, z, stream, function, packed, described, enter, leave, *args):
            # Constants and integers that are 1 are not passed on; tensors are, by address.
            kinds = list(self.src.signature.values())
            passed = [
                a.data_ptr() if hasattr(a, "data_ptr") else a
                for a, kind in zip(args, kinds, strict=True)
                if kind != "constexpr"
            ]
            name = described and described.get()["name"]
            started.append([function, [x, y, z], stream, name, enter is None, leave is None, passed])

    class Driver:
        launcher_cls, utils = Launcher, None
        device, stream, loaded = 0, 0, 0

        def __init__(self):
            self.utils = self

        def load_binary(self, name, kernel, shared, device):
            Driver.loaded += 1
            return self, Driver.loaded, 32, 0, 1024

        def unload_module(self, module):
            pass

        def get_device_properties(self, device):
            return {"max_shared_mem": 232448}

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return Driver.device

        def get_current_stream(self, device):
            return Driver.stream + device

    triton.runtime.driver.set_active(Driver())
    grid, findings = (3, 2, 1), {}

    def last() -> list:
        return [f"{x:.17g}" if isinstance(x, float) else x for x in started[-1]]

    wrong, slow, binaries = [], [], set()
    for how in range(3):
        launches = {}
        for again in (False, True):
            for values in variants("cpu"):
                bound, given, free = split(values, how)
                found = launches.setdefault(str([(n, str(x)) for n, x in bound.items()]), [])
                if not found:
                    found.append(Launch(gather_kernel, **bound, num_warps=2))
                bound = found[0].bound
                before = len(found[0].binaries)
                found[0](grid, Arguments(gather_kernel, **given), **free)
                mine = last()
                if again and len(found[0].binaries) != before:
                    slow.append(str(values))
                gather_kernel[grid](**bound, **given, **free)
                binaries.add(mine[0])
                # Triton describes launches to hooks even if there are none.
                if mine[:3] + mine[6:] != last()[:3] + last()[6:]:
                    wrong.append([str(values), mine, last()])
    findings |= {"wrong": wrong, "slow": slow, "binaries": len(binaries)}

    values = variants("cpu")[0]
    launch = Launch(gather_kernel, **values)
    launch(grid)
    launch(grid)
    quiet = last()
    findings["known"] = [launch_module._known(gather_kernel), len(launch.binaries)]

    # With a Triton that nobody has looked at each launch is kernel[grid](...), and nothing is remembered.
    known, launch_module.KNOWN = launch_module.KNOWN, ("0.1",)
    plain = type(gather_kernel).__getitem__
    grids = []
    type(gather_kernel).__getitem__ = lambda kernel, grid: (grids.append(list(grid)), plain(kernel, grid))[1]
    unknown = Launch(gather_kernel, **{name: values[name] for name in ("x", "index", "SIZE")})
    given = Arguments(gather_kernel, n=values["n"], stride=values["stride"])
    for i in range(3):
        unknown((i + 1, 1, 1), given, **{name: values[name] for name in ("out", "scale", "bias", "negate")})
    same = [x[0] == quiet[0] and x[6] == json.loads(json.dumps(quiet[6])) for x in started[-3:]]
    findings["unknown"] = [grids, [x[1] for x in started[-3:]], len(unknown.binaries), all(same)]
    type(gather_kernel).__getitem__ = plain
    launch_module.KNOWN = known
    Driver.stream = 50
    launch(grid)
    findings["stream"] = [quiet[2], last()[2]]
    Driver.device = 1
    launch(grid)
    first = last()
    launch(grid)
    findings["device"] = [quiet[0] != first[0], first[0] == last()[0], last()[2]]
    Driver.device = Driver.stream = 0

    def hook(described):
        pass

    knobs.runtime.launch_enter_hook.add(hook)
    knobs.runtime.launch_exit_hook.add(hook)
    launch(grid)
    findings["hooked"] = last()[3:6]
    knobs.runtime.launch_enter_hook.remove(hook)
    knobs.runtime.launch_exit_hook.remove(hook)
    launch(grid)
    findings["quiet"] = last()[3:6]

    def error(call) -> str:
        try:
            call()
        except (TypeError, ValueError, KeyError) as e:
            return type(e).__name__
        return "none"

    some = {name: values[name] for name in list(values)[1:]}
    partly = Launch(gather_kernel, **some)
    partly(grid, x=values["x"])
    findings["errors"] = [
        error(lambda: partly(grid)),
        error(lambda: partly(grid, x=values["x"], n=3)),
        error(lambda: partly(grid, x=values["x"], m=3)),
        error(lambda: partly(grid, x=(values["x"], 1))),
        error(lambda: partly(grid, Arguments(Launch), x=values["x"])),
    ]
    print(json.dumps(findings))


@pytest.fixture(scope="module")
def findings() -> dict:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", __file__]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_binary_is_the_one_that_triton_would_start(findings):
    """With the same grid and the same arguments, whatever was launched before."""
    assert findings["wrong"] == []
    assert findings["binaries"] > 15, "the variants are to need different binaries"


def test_the_second_launch_does_not_ask_triton(findings):
    assert findings["slow"] == []


def test_an_unknown_triton_launches_for_itself(findings):
    """What Launch knows of Triton belongs to no interface; the version that is installed is one that it knows."""
    assert findings["known"] == [True, 1]
    grids = [[i, 1, 1] for i in (1, 2, 3)]
    assert findings["unknown"] == [grids, grids, 0, True]


def test_current_stream_and_device(findings):
    assert findings["stream"] == [0, 50]
    assert findings["device"] == [True, True, 51]


def test_hooks_are_called_if_there_are_any(findings):
    assert findings["hooked"] == ["gather_kernel", False, False]
    assert findings["quiet"] == [None, True, True]


def test_wrong_arguments_are_refused(findings):
    assert findings["errors"] == ["TypeError", "TypeError", "KeyError", "TypeError", "ValueError"]


if __name__ == "__main__":
    without_gpu()
