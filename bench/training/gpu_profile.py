"""What the GPU does in a step, and when it waits: from the events of torch.profiler.

In: a profiler that has run over some steps whose stages are annotated (gpu_stages.py). Out: per stage the share of its
time in which the GPU was idle, how often the host waited for it, and the kernels and host operations that take longest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from typing import Any

import torch

from bench.training.gpu_stages import ANNOTATION

TOP = 30
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize",
         "cudaEventSynchronize", "cudaMemcpy")  # fmt: skip
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
OUTSIDE = "outside of the stages"

Span = tuple[int, int, str]  # start and end in ns, name


def profiler() -> Any:
    """Records host operations, and the GPU's kernels where there is one."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def summary(profile: Any, steps: int) -> dict[str, Any]:
    """The profile of `steps` steps. Times are milliseconds per step."""
    host, device = spans_of(profile)
    windows = sorted(span for span in host if span[2].startswith(ANNOTATION))
    if not windows:
        return {"steps": steps, "stages": {}}
    first, last = windows[0][0], max(end for _, end, _ in windows)
    device = [span for span in device if first <= span[0] <= last]
    stages = {}
    for stage in dict.fromkeys(name for *_, name in windows):
        here = [span for span in windows if span[2] == stage]
        stages[stage.removeprefix(ANNOTATION)] = stage_summary(here, host, device, steps)
    busy, whole = covered(device), last - first
    return {
        "steps": steps,
        "wall_ms": whole / steps / 1e6,
        "gpu_idle_share": 1 - busy / whole if device else None,
        "stages": stages,
        "outside_of_stages_ms": (whole - covered(windows)) / steps / 1e6,
        "top_kernels": top(device, windows, steps),
        "top_host_operations_by_own_time": top(own_times(host), windows, steps),
    }


def spans_of(profile: Any) -> tuple[list[Span], list[Span]]:
    """What ran on the host, and the kernels and copies on the GPU."""
    host: list[Span] = []
    device: list[Span] = []
    for event in profile.profiler.kineto_results.events():
        name, start = event.name(), event.start_ns()
        span = (start, start + event.duration_ns(), name)
        if event.device_type() == torch.autograd.DeviceType.CPU:
            host.append(span)
        elif not name.startswith(ANNOTATION) and not event.is_user_annotation():
            device.append(span)
    return sorted(host), sorted(device)


def stage_summary(windows: list[Span], host: list[Span], device: list[Span], steps: int) -> dict[str, Any]:
    """One stage, whose windows these are."""
    whole = sum(end - start for start, end, _ in windows)
    calls: dict[str, int] = defaultdict(int)
    for *_, name in within(host, windows):
        calls[name] += 1
    kernels = within(device, windows)
    return {
        "ms": whole / steps / 1e6,
        "gpu_idle_share": 1 - min(1.0, covered(kernels) / whole) if device else None,
        "kernels": len(kernels) / steps,
        "launches": sum(calls[name] for name in LAUNCHES) / steps,
        "waits": {name: calls[name] / steps for name in WAITS if calls[name]},
    }


def within(spans: list[Span], windows: list[Span]) -> list[Span]:
    """The spans that begin in one of the windows; both sorted."""
    starts = [start for start, *_ in windows]
    found = []
    for span in spans:
        place = bisect_right(starts, span[0]) - 1
        if place >= 0 and span[0] < windows[place][1]:
            found.append(span)
    return found


def covered(spans: list[Span]) -> int:
    """ns in which at least one of the spans, sorted by their start, runs."""
    total, until = 0, 0
    for start, end, _ in spans:
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def own_times(host: list[Span]) -> list[Span]:
    """The host's spans without the time of those inside of them. Threads are taken together, which is exact for one."""
    own = [end - start for start, end, _ in host]
    open_spans: list[int] = []
    for i, (start, end, _) in enumerate(host):
        while open_spans and host[open_spans[-1]][1] <= start:
            open_spans.pop()
        if open_spans and end <= host[open_spans[-1]][1]:
            own[open_spans[-1]] -= end - start
        open_spans.append(i)
    kept = [(s, s + t, name) for (s, _, name), t in zip(host, own, strict=True)]
    return [span for span in kept if not span[2].startswith(ANNOTATION)]


def top(spans: list[Span], windows: list[Span], steps: int) -> list[dict[str, Any]]:
    """The names that take longest, with the stages that they run in."""
    time: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    where: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    starts = [start for start, *_ in windows]
    for start, end, name in spans:
        place = bisect_right(starts, start) - 1
        inside = place >= 0 and start < windows[place][1]
        time[name] += end - start
        count[name] += 1
        where[name][windows[place][2].removeprefix(ANNOTATION) if inside else OUTSIDE] += (end - start) / steps / 1e6
    longest = sorted(time, key=lambda name: -time[name])[:TOP]
    return [
        {
            "name": name[:160],
            "ms": time[name] / steps / 1e6,
            "count": count[name] / steps,
            "stages_ms": {stage: round(ms, 3) for stage, ms in where[name].items()},
        }
        for name in longest
    ]
