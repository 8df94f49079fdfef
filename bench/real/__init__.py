"""Runs with a real model: SmolLM2-135M-Instruct learns tasks of reasoning-gym."""
