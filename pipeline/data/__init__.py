"""From any captioned images to exact, resumable streams of images and tokens.

prepare             a source -> image shards: prepare_part one part in a worker, prepare_index what joins the parts,
                    prepare_caption what a source gives as a caption
sources/            what a user has (folder, table, tars, `datasets`, OpenMoji) as raw records, cut into parts
source_stamp        whether a source is still what it was
images, png         bytes -> an RGB image of one size, or the reason why not; PNG files that decode fast
splits, duplicates  which split a sample belongs to; which samples repeat an earlier key or image
shards              the format of image shards: writing, reading, index; shard_table: one record a shard
tokenize_shards     image shards -> token arrays; token_blocks, token_parts: their files; tokens: reading, verifying
verification        checks in a thread, while their subject is in use already
order               the orders of samples: pure functions of (seed, position)
stream, sampler     image shards -> batches of images, token arrays -> batches of tokens, in those orders
inspect, export     `smalti data inspect` and `smalti data export`
prefetch            batches made in advance by a thread, and put on the device; caption_workers: captions encoded in
                    other processes
worker_pool         work in processes
"""
