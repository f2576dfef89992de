"""A world with an exact judge: drawn scenes of a few shapes, captions by a grammar, and a judge that reads pixels.

For such a world the question whether an image shows what its prompt says has a right answer that needs no network:
the six tasks of GenEval (Ghosh et al. 2023, section 3), offline.
"""
