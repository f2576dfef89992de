"""The joint text+image model: one decoder over `[text | level 0 | level 1 | ...]`.

layout.py where each part sits in sequence and vocabulary; places.py where positions lie and which they see; blocks.py
the layers; model.py the decoder and its cached form; objective.py the loss; hf.py for AutoModel; config.py the settings
(no torch there). docs/transformer.md has the choices.
"""
