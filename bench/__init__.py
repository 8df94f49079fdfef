"""Every number that README and docs state: the scripts that measure them, and under results/ what they measured.

    operators/  the scoring operators beside PyTorch and other projects' functions
    training/   whole training steps and whole runs
    score.py    the command `fastkl score`
    gpu.py      one command for the owner of a GPU

Run them from a checkout that `make setup` has installed, as `python bench/training/steps.py`.
"""
