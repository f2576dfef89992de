"""Preference tuning: a trained transformer learns from rewards of what it generates.

`Rollouts` draws groups of images of prompts, and gives each image its advantage over its group;
`GroupRelativeObjective` is the loss of their codes (Shao et al. 2024, section 4.1); `rewards.py` has what is rewarded.
"""
