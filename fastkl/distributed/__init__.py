"""Several processes as one: who speaks, what is exchanged, and what becomes of all when one of them fails.

world.py has the processes as the stages see them; with one process there is none of this, and no process group.
"""
