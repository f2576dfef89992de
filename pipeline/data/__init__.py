"""From any captioned images to exact, resumable streams of images and tokens.

sources/      what a user has (folder, table, tars, `datasets`, OpenMoji) as raw records, cut into parts
images.py     bytes -> an RGB image of one size, or the reason why not
prepare.py    parts -> image shards (tars), rejected.jsonl, index.json
duplicates.py which samples repeat an earlier key or image
png.py        PNG files that decode fast
shards.py     the format of image shards: writing, reading, index
order.py      the order of samples: a pure function of (seed, epoch, position)
stream.py     image shards -> batches of images, in that order
tokenizing.py image shards -> token arrays
tokens.py     the format of token arrays: reading, verifying
ahead.py      an iterator whose items a thread makes in advance
commands.py   `smalti data inspect` and `smalti data export` (inspect.py, export.py)
sampler.py    token arrays -> batches of tokens, exactly shuffled
"""
