"""From prompt to images: decode.py draws codes, pipeline.py turns prompts into images, grid.py shows them."""
