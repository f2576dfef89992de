"""From prompt to pictures: decode.py draws codes, pipeline.py turns prompts into pictures, grid.py shows them."""
