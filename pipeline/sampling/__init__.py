"""From prompt to images.

pipeline.py          prompts in, images out
decode.py            the decode loop; draw_next.py one turn of it, batch_memory.py how many images at once
decode_step.py       the step of a turn; cached_step.py the same for CPUs, static_step.py for GPUs, with cuda_graph.py
speculate.py         the same codes in fewer passes, for one image at a time
pass_decode.py       the same many codes a pass: parallel_decode.py in any order, level_decode.py a level; packed.py
row_batch.py         rows that come and go, for a server; row_step.py its step, row_products.py its products
pass_batch.py        the same of requests that draw in passes
logits.py            guidance, filters, the draw
image_prompt.py      which codes of a given image stay
checks.py prompts.py what is refused before anything is generated; the captions of the generate stage
to_directory.py      `smalti generate`: a folder or a sheet; grid.py, preview.py, save.py
model_source.py      finds the models of a run or an export; export.py, model_card.py write an export
"""
