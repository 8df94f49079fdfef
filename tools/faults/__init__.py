"""Faults, injected for real into small training runs: `make faults`, or `python -m tools.faults --help`.

What is injected, where: interruptions.py kills and signals runs, disks.py fills disks, damage.py changes files,
folders.py starts a second process, servers.py kills trainers whose server of vLLM stays, server_kills.py kills such
servers under a run. runs.py starts and compares the runs, table.py writes what came out of it. None of it is part of
the wheel; `--quick` is a miniature, which `make long` runs, and `make test` in part.
"""
