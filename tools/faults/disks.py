"""Disks that are full for real: a limit on the size of files, and a small disk in memory."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tools.faults import runs
from tools.faults.fault import Bench, Row

KIB = 1 << 10
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # CLONE_NEWUSER, CLONE_NEWNS


def file_limit(bench: Bench) -> Row:
    """No file may grow beyond a random size (RLIMIT_FSIZE); the limit is lifted for --resume."""
    row = Row("files cannot grow (RLIMIT_FSIZE)", "a limit of 100 bytes to 16 MiB on every file, then --resume without")
    codes: Counter[int | None] = Counter()
    for trial in bench.trials(bench.times(24, 1)):
        rng, output = bench.random("file limit", trial), bench.output("file-limit", trial)
        limit = int(100 * (16 << 20) ** rng.random()) if trial % 2 else int((1 << 20) * 16 ** rng.random())
        limit = min(limit, 16 << 20)

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        child = runs.finished(output, "--save-every", str(rng.choice((1, 3))), before=limited)
        row.runs += 1
        codes[child.code] += 1
        wrong = _mended(bench, output, child)
        row.failed(trial, f"limit {limit} bytes", wrong)
        if not wrong:
            bench.clear(output)
    row.outcome = _ends(codes)
    return row


def small_disk(bench: Bench) -> Row:
    """A real disk of a few megabytes, or of a few files; it is made larger for --resume."""
    row = Row("a disk that is full", "a tmpfs of 50 KiB to 120 MiB, or of 4 to 60 files, made larger for --resume")
    codes: Counter[int | None] = Counter()
    if why := in_own_mounts(lambda: _mount(bench.folder, "size=64k")):
        row.skipped = f"this user may not mount here ({why})"
        return row
    for trial in bench.trials(bench.times(24, 1)):
        rng, disk = bench.random("small disk", trial), bench.output("disk", trial)
        disk.mkdir()
        few_files = trial % 3 == 2
        size = f"nr_inodes={rng.randint(4, 60)}" if few_files else f"size={int(50 * 2400 ** rng.random())}k"
        save_every = str(rng.choice((1, 3)))

        def on_the_disk(disk: Path = disk, size: str = size, save_every: str = save_every) -> str:
            if why := _mount(disk, size):
                return why
            child = runs.finished(disk, "--save-every", save_every)
            _mount(disk, "remount,size=1g,nr_inodes=0")
            wrong = _mended(bench, disk, child)
            return f"{child.code}|{'; '.join(wrong)}"

        code, _, wrong = in_own_mounts(on_the_disk).partition("|")
        row.runs += 1
        codes[int(code) if code.lstrip("-").isdigit() else None] += 1
        row.failed(trial, size, [wrong] if wrong else [] if code.isdigit() else [code])
        if not wrong:
            bench.clear(disk)
    row.outcome = _ends(codes)
    return row


def _mended(bench: Bench, output: Path, child: runs.Child) -> list[str]:
    """What is wrong with a run on a full disk, and with its end once there is room."""
    wrong = runs.damaged_beyond_one_line(child, (0, 1, 2))
    if child.code == 1 and "is not saved; the newest checkpoint is" not in child.text:
        wrong.append("exit code 1 without a word about what is saved")
    after = runs.gone_on(output, "--save-every", "3")
    wrong += runs.damaged_beyond_one_line(after, (0,))
    differ = runs.differences(output, bench.whole)
    lost = [name for name in ("metrics.jsonl", "samples.jsonl") if f"cannot log to {name}" in child.text]
    wrong += [name for name in differ if name not in lost]
    return wrong


def _ends(codes: Counter[int | None]) -> str:
    said = {0: "wrote everything (0)", 1: "trained on, said which step is saved (1)", 2: "refused at the start (2)"}
    ends = ", ".join(f"{codes[code]} × {text}" for code, text in said.items() if codes[code])
    return f"no traceback; with room again, bit for bit; {ends}"


def in_own_mounts(action: Callable[[], str]) -> str:
    """action() in a process with mounts of its own, and as root of a user namespace where need be; its answer."""
    return runs.in_fork(lambda: _own_mounts() or action())


def _own_mounts() -> str:
    """Enters a mount namespace; why not, or nothing."""
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(NEW_MOUNTS | (NEW_USER if uid else 0)):
        return f"unshare: {os.strerror(ctypes.get_errno())}"
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    return _run("mount", "--make-rprivate", "/")


def _mount(folder: Path, options: str) -> str:
    """Mounts a disk in memory on `folder`; why not, or nothing."""
    return _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as failure:
        return str(failure)
    return done.stderr.strip() or f"{command[0]} failed" if done.returncode else ""
