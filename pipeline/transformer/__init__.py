"""The joint text+image model: one decoder over `[text | level 0 | level 1 | ...]`.

layout.py            where text and levels sit in sequence and vocabulary
model.py             the decoder, for whole sequences and with a KV cache
blocks.py norms.py   its layers
attention.py         the attention layer and its backends; attention_patterns.py what each position sees; rotary.py
tables.py            constants that follow from layout and shape
any_order.py         the decoder of codes in any order, with cross_blocks.py its layers and orders.py the orders
build.py             the model of a config or a folder, of whichever order
objective.py         the training loss; functional.py the two functions with hand-written derivatives
hf.py                the same model for transformers' AutoModel

The settings are pipeline/config/transformer.py. docs/transformer.md has the choices.
"""
