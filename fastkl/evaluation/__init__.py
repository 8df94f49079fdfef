"""Evaluation: what a model does on prompts that it is not trained on, in a run (`--eval-prompts`) and by `fastkl eval`.

split.py keeps prompts out of the training, measures.py turns rewards into pass@k and standard errors, evaluate.py draws
and scores the completions, text_loss.py is the loss on a text, plan.py reads the settings, command.py is
`fastkl eval`.
"""
