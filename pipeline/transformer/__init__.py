"""The joint text+image model: one decoder over `[text | level 0 | level 1 | ...]`.

layout.py where each part sits in sequence and vocabulary; blocks.py the layers; model.py the decoder
and its cached form; objective.py the loss; config.py the settings (no torch there).
"""
